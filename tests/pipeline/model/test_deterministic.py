"""The same bits on any number of threads, and within rounding what torch's plain operations give."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.model import deterministic
from pipeline.model.deterministic import mix_channels, pad_rows, pointwise, sigmoid, softmax, topk, upsample

MATRIX = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.rand(256, 4704, generator=torch.Generator().manual_seed(1)) / 100


def plain_mix(images: Tensor) -> Tensor:
    return torch.einsum("rc,bchw->brhw", MATRIX, images)


Operation = Callable[[Tensor], Tensor]

PLAIN: dict[str, tuple[Operation, Operation, tuple[int, ...]]] = {
    "softmax": (lambda x: softmax(x, 1), lambda x: x.softmax(1), (2, 3, 61, 67)),
    "sigmoid": (sigmoid, Tensor.sigmoid, (2, 3, 61, 67)),
    "pad_rows": (lambda x: (pad_rows(x) @ WEIGHT.T)[: len(x)], lambda x: x @ WEIGHT.T, (3, 4704)),
}
ALL = PLAIN | {
    "mix_channels": (lambda x: mix_channels(x, MATRIX), plain_mix, (2, 3, 61, 67)),
    "upsample": (
        lambda x: upsample(x, 1.5),
        lambda x: F.interpolate(x.double(), scale_factor=1.5, mode="bilinear").float(),
        (2, 3, 61, 64),
    ),
}


@pytest.mark.parametrize(("ours", "plain", "shape"), ALL.values(), ids=ALL)
def test_threads_do_not_show_and_the_numbers_are_torchs(
    ours: Operation, plain: Operation, shape: tuple[int, ...]
) -> None:
    """Law: the same bits on one thread and on several; torch's plain operation, within rounding."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 4
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], plain(x), rtol=1e-5, atol=1e-5)


def test_on_a_gpu_channels_are_mixed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its rounding: not in the ten bits that a GPU's convolutions may round to."""
    monkeypatch.setattr(deterministic, "_on_cpu", lambda _: False)
    x = torch.randn((2, 3, 61, 67), generator=torch.Generator().manual_seed(2)) * 4
    exact = torch.einsum("rc,bchw->brhw", MATRIX.double(), x.double())
    torch.testing.assert_close(mix_channels(x, MATRIX).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "plain", "shape"), PLAIN.values(), ids=PLAIN)
def test_on_a_gpu_they_are_the_plain_operations(
    ours: Operation,
    plain: Operation,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit; here on the CPU, taken for a GPU."""
    monkeypatch.setattr(deterministic, "_on_cpu", lambda _: False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 4
    assert torch.equal(ours(x), plain(x))


@given(st.sampled_from([1.25, 1.5, 2.0, 4.0, 8.0]), st.integers(1, 40), st.integers(1, 40))
def test_an_enlarged_pixel_is_the_same_bits_wherever_it_lies(factor: float, across: int, down: int) -> None:
    """Law: a part that begins at whole steps of the factor, enlarged alone, is a part of the enlarged image."""
    step = Fraction(factor).denominator
    image = torch.rand(1, 3, (down + 9) * step, (across + 9) * step, generator=torch.Generator().manual_seed(across))
    part = upsample(image[..., down * step :, across * step :], factor)
    whole = upsample(image, factor)[..., int(down * step * factor) :, int(across * step * factor) :]
    first = math.ceil(factor)  # nearer pixels are made of the part's edge, too
    assert torch.equal(part[..., first:, first:], whole[..., first:, first:])


def test_shrinking_is_antialiased_on_every_device() -> None:
    """A chequerboard halved is grey."""
    board = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).float()[None, None]
    torch.testing.assert_close(upsample(board, 0.5)[..., 1:-1, 1:-1], torch.full((1, 1, 2, 2), 0.5))


def test_convolutions_of_one_pixel_are_dilated_on_a_cpu_alone() -> None:
    """Also within others; dilation does not change what such a convolution gives."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 5, 1)))
    images = torch.rand(1, 3, 16, 16)
    expected = network(images)
    assert pointwise(network) is network
    assert [m.dilation for m in network.modules() if isinstance(m, nn.Conv2d)] == [(1, 1), (2, 2)]
    torch.testing.assert_close(network(images), expected)
    elsewhere = pointwise(nn.Conv2d(4, 5, 1, device="meta"))
    assert elsewhere.dilation == (1, 1)


def test_only_a_cpu_takes_the_other_path() -> None:
    """On any other device nothing is padded."""
    assert len(pad_rows(torch.ones(3, 5))) == 64
    assert len(pad_rows(torch.ones(70, 5))) == 70
    assert len(pad_rows(torch.ones(3, 5, device="meta"))) == 3


@given(st.integers(0, 2**31), st.integers(1, 500), st.data())
def test_the_largest_stand_in_order(seed: int, length: int, data: st.DataObject) -> None:
    """Torch's largest, equal or not, in the order in which they were; elsewhere than on a CPU in torch's."""
    values = torch.randint(5, (2, length), generator=torch.Generator().manual_seed(seed)).bfloat16()
    count = data.draw(st.integers(1, length))
    best, index = topk(values, count)
    assert (index.diff() > 0).all()
    assert torch.equal(values.gather(1, index), best)
    assert torch.equal(best.sort(descending=True).values, values.topk(count).values)
    assert topk(values.to("meta"), count)[1].shape == index.shape
