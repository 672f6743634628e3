"""What a GPU computes with gives what PyTorch's own layers give. Triton's interpreter stands in for the GPU."""

import copy
import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torchvision.ops import nms

from pipeline.config import Architecture
from pipeline.model import device as model_device
from pipeline.model import suppress as model_suppress
from pipeline.model.detector import NucleusDetector
from pipeline.model.device import kernels_problem
from pipeline.model.gpu_layers import _Depthwise, use_gpu_layers, use_kernels
from pipeline.model.prepare import fold
from pipeline.model.weights import detector_architecture, find_weights

CPU = torch.device("cpu")
BOTH = (torch.float32, torch.bfloat16)
TINY = Architecture(channels=16, semantic=8, box_hidden=16, mask_channels=8, mask_layers=2)

pytest.importorskip("triton", reason="needs Triton, which PyTorch has on Linux")
gpu_kernels: Any = importlib.import_module("pipeline.model.gpu_kernels")


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4
    return drawn.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ kernels


@given(st.sampled_from([3, 5]), st.sampled_from([1, 2]), st.integers(1, 6), st.integers(1, 36), st.booleans())
@settings(max_examples=8)
def test_a_depthwise_convolution_pads_clamps_and_adds(side: int, stride: int, high: int, wide: int, same: bool) -> None:
    """Law: what the layers give one after the other, padded as TensorFlow does or evenly, of any size."""
    channels = 33
    x = maps(2, channels, high, wide)
    kind = Conv2dSame if same else torch.nn.Conv2d
    layer = kind(channels, channels, side, stride, padding=0 if same else side // 2, groups=channels)
    with torch.inference_mode():
        expected = layer(x.clamp(0, 6)).clamp(min=0)
        torch.testing.assert_close(_Depthwise(layer, 6.0, math.inf)(x), expected, rtol=1e-4, atol=1e-4)
        plain = _Depthwise(layer, None, None)(x)
        torch.testing.assert_close(plain, layer(x), rtol=1e-4, atol=1e-4)
    assert plain.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("limit", [None, 6.0, math.inf])
def test_a_bias_is_added_and_clamped_in_place(limit: float | None) -> None:
    """Law: the same bits. Also of no map at all, and where a value is not a number."""
    for images in (0, 3):
        x, bias = maps(images, 40, 5, 7), maps(40, 1, 1, 1).flatten()
        expected = x + bias[:, None, None]
        expected = expected if limit is None else expected.clamp(0, limit)
        x[:1, 0, 0, 0], expected[:1, 0, 0, 0] = torch.nan, torch.nan
        assert gpu_kernels.add_bias(x, bias, limit) is x
        torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_a_smaller_map_is_added_to_a_larger_one() -> None:
    x, smaller = maps(2, 40, 6, 70), maps(2, 40, 3, 35, seed=1)
    expected = x + F.interpolate(smaller, scale_factor=2.0)
    assert torch.equal(gpu_kernels.add_doubled(x, smaller), expected)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 140), min_size=1, max_size=3), st.sampled_from([0.0, 0.5, 0.75]))
@settings(max_examples=12)
def test_suppression_is_torchvisions_in_each_group(seed: int, sizes: list[int], iou: float) -> None:
    """Law: of boxes from the best to the worst, also of equal and of empty ones. On a CPU torchvision compares its
    overlaps, float32, with a limit in float64, so the limits here are the same in both."""
    draw = torch.Generator().manual_seed(seed)
    corners = (torch.rand(sum(sizes), 2, generator=draw) * 40).round()
    boxes = torch.cat([corners, corners + (torch.rand(len(corners), 2, generator=draw) * 12).round()], 1)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    expected = torch.zeros(len(boxes), dtype=torch.bool)
    for first, size in zip(starts.tolist(), sizes, strict=False):
        expected[first + nms(boxes[first : first + size], torch.arange(size, 0, -1.0), iou)] = True
    assert torch.equal(gpu_kernels.suppress(boxes.T.contiguous(), starts, iou), expected)


@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 4))
@settings(max_examples=15)
def test_boxes_of_groups_in_any_order_are_suppressed_in_each(seed: int, count: int, groups: int) -> None:
    """Law: what stays, the best first, whatever group has it; of equal scores the first is the best."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=draw) * 40
    boxes = torch.cat([corners, corners + 9], 1)
    scores = torch.randint(1, 20, (count,), generator=draw) / 20
    group = torch.randint(groups, (count,), generator=draw)
    ranks = torch.argsort(scores.argsort(descending=True, stable=True))
    kept = [at[nms(boxes[at], -ranks[at].float(), 0.4)] for at in (torch.where(group == g)[0] for g in range(groups))]
    expected = torch.cat(kept)[ranks[torch.cat(kept)].argsort()]
    assert torch.equal(model_suppress._by_group(boxes, scores, group, groups, 0.4), expected)


# -------------------------------------------------------------------------------------------- the detector


@pytest.fixture(scope="module")
def folded() -> NucleusDetector:
    torch.manual_seed(1)
    return fold(NucleusDetector(TINY).eval())


def results(model: NucleusDetector) -> list[torch.Tensor]:
    """What every part of a detector gives for one image."""
    images, pooled = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)), maps(3, 16, 14, 14)
    with torch.inference_mode():
        features = model.features(images)
        heads = model.roi_heads
        return [features.table.pixels, *model.rpn.head(features.maps)[0], heads.mask_predictor(heads.mask_head(pooled))]


def test_products_in_place_of_convolutions_of_one_pixel(folded: NucleusDetector) -> None:
    """Law: the same, within rounding; and no such convolution is left."""
    model = use_gpu_layers(copy.deepcopy(folded), CPU)
    for got, expected in zip(results(model), results(folded), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]


def test_kernels_in_place_of_layers(folded: NucleusDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same, within rounding. The interpreter takes as long for a program of few channels as for one of all."""
    monkeypatch.setattr(gpu_kernels, "_CHANNELS", 2048)
    model = use_kernels(copy.deepcopy(folded))
    for got, expected in zip(results(model), results(folded), strict=True):
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_of_the_shipped_detector_few_convolutions_are_left_to_cudnn() -> None:
    """The stem's, and those of 3 x 3 with all channels: each pass over a map counts there, and each plan."""
    model = fold(NucleusDetector(detector_architecture(find_weights("nuclei"))).eval())
    before = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    use_gpu_layers(use_kernels(model), CPU)
    left = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert (before, len(left)) == (66, 10)
    assert all(module.bias is None and module.groups == 1 for module in left)
    assert not any(isinstance(module, torch.nn.ReLU6) for module in model.modules())


@pytest.mark.parametrize("backbone", ["resnet18", "res2net50_26w_4s", "ghostnet_050", "efficientnet_b0_g8_gn"])
def test_other_backbones_stay_right(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same, within rounding, also where a backbone has none of the blocks that are known here, or has norms
    that are not folded.
    """
    monkeypatch.setattr(gpu_kernels, "_CHANNELS", 2048)
    torch.manual_seed(1)
    model = fold(NucleusDetector(dataclasses.replace(TINY, backbone=backbone)).eval())
    expected = results(model)
    for got, before in zip(results(use_gpu_layers(use_kernels(model), CPU)), expected, strict=True):
        torch.testing.assert_close(got, before, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------- where there are none


def test_kernels_that_are_wrong_or_missing_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reason is said."""
    gpu_kernels.check(CPU, BOTH)
    assert kernels_problem(CPU) == "they are for GPUs"
    for name in ("depthwise", "add_bias", "add_doubled", "suppress"):
        right = getattr(gpu_kernels, name)
        with monkeypatch.context() as patched:
            patched.setattr(gpu_kernels, name, lambda *args, right=right: right(*args) * 0)
            with pytest.raises(ArithmeticError, match=name):
                gpu_kernels.check(CPU, BOTH)

    def broken(_device: torch.device, _dtypes: Any) -> None:
        assert not torch.is_autocast_enabled("cuda")
        raise RuntimeError("Failed to find C compiler.\nPlease install one")

    device = torch.device("cuda", 7)
    monkeypatch.setattr(gpu_kernels, "check", broken)
    monkeypatch.setattr(model_device, "_cuda_has_bfloat16", lambda device: True)
    kernels_problem.cache_clear()
    torch.set_autocast_enabled("cuda", True)  # as by a detector that finds out in the midst of a batch
    try:
        assert kernels_problem(device) == "Failed to find C compiler. Please install one"
    finally:
        torch.set_autocast_enabled("cuda", False)
    kernels_problem.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernels_problem(device) == "Triton is not installed"
    kernels_problem.cache_clear()
