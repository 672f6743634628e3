"""Inference where memory is short: patches that fit are not affected, others are detected in quarters, or lost."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Architecture, Detector, Settings, Stain, Tiling
from pipeline.model import fuse, inference, load, stain
from pipeline.model.detector import NucleusDetector
from pipeline.model.deterministic import pointwise
from pipeline.model.fitted_stain import TEMPLATE, FittedStain, Normalisation, read_template
from pipeline.model.inference import detect_patches
from pipeline.model.instances import HostInstances, Instances, Patches, columns
from pipeline.model.prepare import fold
from pipeline.model.weights import find_weights

SIDE, MARGIN, MASK = 512, 64, 4  # in quarters 320 px, then 256
NONE = Normalisation(TEMPLATE["none"], TEMPLATE["none"])
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def chosen(batch: int = 1) -> Settings:
    return Settings(tiling=Tiling(mpp=0.25, tile=SIDE, margin=MARGIN), detector=Detector(batch=batch, score=0.1))


def painted(squares: list[tuple[int, int]], weight: int = 0) -> np.ndarray:
    """A patch of black squares on white, each of a red of its own; `weight`: how much memory its inference takes."""
    patch = np.full((SIDE, SIDE, 3), 255, np.uint8)
    patch[..., 2] = weight
    for number, (x, y) in enumerate(squares):
        patch[y : y + 12, x : x + 12, 0] = number
    return patch


class Device:
    """In place of the detector: sees the squares exactly, but fails where a batch takes more than `memory`."""

    def __init__(self, memory: float = float("inf"), error: Exception = NO_MEMORY) -> None:
        self.memory, self.error = memory, error
        self.tried: list[tuple[int, int]] = []  # batch and side of every inference

    def infer(self, _model: Any, images: torch.Tensor, *_: Any) -> list[Instances[torch.Tensor]]:
        self.tried.append((len(images), images.shape[-1]))
        if sum(taken(image) for image in images) > self.memory:
            raise type(self.error)(*self.error.args)  # one that holds no traceback of an earlier attempt
        return [self.see(image) for image in images]

    def see(self, image: torch.Tensor) -> Instances[torch.Tensor]:
        red = (image[0] * 255).round()
        boxes, scores = [], []
        for number in torch.unique(red)[:-1]:  # white is the last
            y, x = torch.where(red == number)
            boxes.append([float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)])
            scores.append(0.9 - float(number) / 300)
        count = len(boxes)
        masks = torch.tensor(scores)[:, None, None].expand(-1, MASK, MASK)
        ones, unknown = torch.ones(count, dtype=torch.int64), torch.full((count, 2, 5), torch.nan)
        return Instances(
            torch.tensor(boxes).reshape(-1, 4), masks, torch.tensor(scores), ones, ones.float(), ones, unknown
        )

    def detect(self, patches: Patches, batch: int = 1) -> list[HostInstances]:
        return [result() for result in detect_patches(patches, NONE, chosen(batch))]


def taken(image: torch.Tensor) -> float:
    """Memory of an inference: an image's pixels, and more where its blue says so."""
    return image[0].numel() * (1 + round(float(image[2, 0, 0]) * 255))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    def begin(**shortage: Any) -> Device:
        return install(Device(**shortage), monkeypatch)

    return begin


def install(one: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A new process with this device."""
    model: Any = SimpleNamespace(architecture=SimpleNamespace(mask_size=MASK, upscale=1.5))
    on_cpu = load.LoadedDetector(model, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(load, "detector", lambda _: on_cpu)
    monkeypatch.setattr(inference, "_batch_that_fits", {})
    monkeypatch.setattr(fuse, "infer", one.infer)
    return one


def same(a: HostInstances, b: HostInstances) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Instances._fields)


# ---------------------------------------------------------------------------------------------------- laws


corners = st.lists(st.sampled_from([(x, y) for x in range(4, 490, 20) for y in range(4, 490, 20)]), unique=True)
patches_ = st.lists(st.tuples(corners, st.integers(0, 3)), min_size=1, max_size=4)


@given(patches_, st.integers(1, 4), st.floats(0.2, 9))
@settings(max_examples=15)
def test_what_fits_does_not_depend_on_what_does_not(
    content: list[tuple[list[tuple[int, int]], int]], batch: int, memory: float
) -> None:
    """Law: whatever the memory, instances of every patch, in order; those that fit have the same as without a limit.

    With an exact detector that holds for those detected in quarters too.
    """
    patches = [painted(squares[:250], weight) for squares, weight in content]
    with pytest.MonkeyPatch.context() as patched:
        expected = install(Device(), patched).detect(patches)
        short = install(Device(memory=memory * SIDE**2), patched).detect(patches, batch)
    assert len(short) == len(expected) == len(patches)
    for patch, whole, (squares, weight) in zip(short, expected, content, strict=True):
        assert len(whole.boxes) == len(squares[:250])
        if 1 + weight <= memory:
            assert same(patch, whole)
        elif (1 + weight) * 256**2 <= memory * SIDE**2:
            assert same(patch, whole._replace(split=True))
        else:
            assert patch.lost
            assert not len(patch.boxes)


# ------------------------------------------------------------------------------------------------- batches


def test_batches_are_halved_until_they_fit_and_stay_so(device: Callable[..., Device]) -> None:
    one = device(memory=3 * SIDE**2)
    patches = [painted([(20 * i, 40)]) for i in range(9)]
    detected = one.detect(patches, batch=8)
    assert [float(f.boxes[0, 0]) for f in detected] == [20 * i for i in range(9)]
    assert [count for count, _ in one.tried] == [8, 4, 2, 2, 2, 2, 1]
    one.tried.clear()
    one.detect(patches, batch=8)  # the next block of the same run
    assert [count for count, _ in one.tried] == [2, 2, 2, 2, 1]
    one.tried.clear()
    one.detect(patches[:3], batch=3)  # other settings
    assert [count for count, _ in one.tried] == [3]


def test_a_batch_is_of_one_size_and_results_come_in_order(device: Callable[..., Device]) -> None:
    """However patches of several sizes alternate; a narrow one that does not fit is divided along its length."""
    one = device()
    tall, wide = painted([(100, 100)])[:, :192], painted([(200, 100), (400, 100)])[:192]
    detected = one.detect([tall, wide, tall, wide, tall], batch=4)
    assert [len(f.boxes) for f in detected] == [1, 2, 1, 2, 1]
    assert one.tried == [(3, 192), (2, 512)]
    one = device(memory=SIDE * 192 - 1)
    (narrow,) = one.detect([wide])
    assert narrow.split
    assert sorted(narrow.boxes[:, 0]) == [200, 400]
    assert one.tried == [(1, 512), (1, 320), (1, 320)]


def test_that_one_patch_did_not_fit_is_not_remembered(device: Callable[..., Device]) -> None:
    one = device(memory=SIDE**2)
    heavy, light = painted([(100, 100)], weight=1), painted([(100, 100)])
    detected = one.detect([light, heavy, light])
    assert [f.split for f in detected] == [False, True, False]
    assert one.tried == [(1, 512), (1, 512), *[(1, 320)] * 4, (1, 512)]


ERRORS = (
    NO_MEMORY,
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_every_shortage_of_memory_is_recognised(device: Callable[..., Device], error: Exception) -> None:
    detected = device(memory=0, error=error).detect([painted([(9, 9)])] * 2, batch=2)
    assert [f.lost for f in detected] == [True, True]


def test_what_may_be_a_shortage_is_tried_with_fewer_patches(device: Callable[..., Device]) -> None:
    """cuDNN says the same where it has no kernel for a GPU at all: then nothing must count as lost."""
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    one, patches = device(memory=2 * SIDE**2, error=error), [painted([(9, 9)])] * 4
    assert [len(f.boxes) for f in one.detect(patches, batch=4)] == [1] * 4
    assert [count for count, _ in one.tried] == [4, 2, 2]
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        device(memory=0, error=error).detect(patches, batch=4)


def test_a_shortage_of_host_memory_is_recognised(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the message of the allocator itself."""
    one = device()
    monkeypatch.setattr(one, "see", lambda _: torch.empty(2**60, dtype=torch.uint8))
    (patch,) = one.detect([painted([(9, 9)])])
    assert patch.lost


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type Float"), ValueError("no")], ids=str)
def test_other_errors_are_raised(device: Callable[..., Device], error: Exception) -> None:
    one = device(memory=0, error=error)
    with pytest.raises(type(error), match=str(error)):
        one.detect([painted([])])
    assert len(one.tried) == 1


def test_what_a_failure_held_is_free_before_the_next_attempt(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, held = device(), list[weakref.ref[torch.Tensor]]()

    def infer(*_: Any) -> Iterator[Instances[torch.Tensor]]:
        assert all(tensor() is None for tensor in held)
        features = torch.ones(1000)
        held.append(weakref.ref(features))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fuse, "infer", infer)
    (patch,) = one.detect([painted([])])
    assert patch.lost
    assert len(held) == 3  # the patch, a quarter, a quarter of that


# ------------------------------------------------------------------------------------------------- results


def test_a_lost_patch_has_the_shapes_and_dtypes_of_every_other(device: Callable[..., Device]) -> None:
    lost, empty, some = device(memory=SIDE**2).detect(
        [painted([], weight=9), painted([]), painted([(7, 7), (80, 7)])], batch=2
    )
    assert (lost.lost, empty.lost, some.lost) == (True, False, False)
    for name in columns(Instances):
        a, b, c = (getattr(patch, name) for patch in (lost, empty, some))
        assert len(a) == len(b) == 0
        assert len(c) == 2
        assert a.shape[1:] == b.shape[1:] == c.shape[1:]
        assert a.dtype == b.dtype == c.dtype


def test_what_leaves_the_device_is_what_was_detected(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, but for masks in 256 levels, in one table for patches of many, one and no instances."""
    random = torch.Generator().manual_seed(0)

    def instances(count: int) -> Instances[torch.Tensor]:
        boxes, masks = torch.rand(count, 4, generator=random) * 200, torch.rand(count, MASK, MASK, generator=random)
        boxes[:, 2:] += boxes[:, :2]
        class_index, votes = (torch.randint(high, (count,), generator=random) for high in (7, 9))
        scores, unknown = torch.rand(count, generator=random), torch.full((count, 2, 5), torch.nan)
        certain = torch.rand(count, generator=random)
        return Instances(boxes, masks, scores, class_index, certain, votes, unknown, saturated=count == 1)

    batch = [instances(5), instances(0), instances(1)]
    one = device()
    monkeypatch.setattr(fuse, "infer", lambda *_: batch)
    glass = [np.full((SIDE, SIDE, 3), 255, np.uint8)] * 3
    for f, expected in zip(one.detect(glass, batch=3), batch, strict=True):
        for name in ("boxes", "mask_probs", "scores", "class_index", "class_scores", "votes"):
            given, wanted = getattr(f, name), getattr(expected, name).numpy()
            if name == "mask_probs":
                wanted = (wanted * np.float32(255)).round().astype(np.uint8)
            assert given.dtype == wanted.dtype
            assert np.array_equal(given, wanted)
        assert not f.stain_density.any()  # of glass
        assert f.stain_density.shape == (len(f.boxes), 2, 5)
        assert (f.saturated, f.split, f.lost) == (expected.saturated, False, False)


def test_stain_densities_are_of_what_a_mask_covers(device: Callable[..., Device]) -> None:
    """In quarters the same as in the whole patch; of one colour, all are its density, and the deviation is 0."""
    patch = painted([(30, 30), (250, 250)])
    (whole,) = device().detect([patch])
    (parts,) = device(memory=0.5 * SIDE**2).detect([patch])
    assert parts.split
    assert np.array_equal(parts.stain_density, whole.stain_density)
    colour = torch.tensor(patch[35, 35]).view(1, 3, 1, 1) / 255
    mean, *others, deviation = whole.stain_density[0].T
    assert np.allclose(mean, stain.he_density(colour).flatten(), atol=1e-4)
    assert np.allclose(others, mean, atol=1e-4)
    assert np.allclose(deviation, 0, atol=1e-4)


def test_the_detector_sees_the_normalised_patch_and_densities_are_the_patch_s_own(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is told how much of the patch belongs to its neighbours too."""
    seen: list[torch.Tensor | int] = []

    def infer(_: Any, images: torch.Tensor, views: Any, limits: Any, margin: int) -> list[Instances[torch.Tensor]]:
        seen.extend((images, margin))
        return [one.see(torch.from_numpy(painted([(20, 30)])).permute(2, 0, 1) / 255)]

    one = device()
    monkeypatch.setattr(fuse, "infer", infer)
    target = TEMPLATE["macenko"]
    stronger = FittedStain("macenko", {**target.numbers, "strength": (4.0, 3.0)})
    settings = dataclasses.replace(chosen(), stain=Stain(method="macenko"))
    patch = np.full((SIDE, SIDE, 3), (90, 40, 120), np.uint8)
    (result,) = detect_patches([patch], Normalisation(stronger, target), settings)
    detected = result()
    raw = torch.from_numpy(patch).permute(2, 0, 1)[None] / 255
    images, margin = seen
    assert isinstance(images, torch.Tensor)
    assert (images > raw + 0.05).all()
    assert margin == MARGIN
    np.testing.assert_allclose(detected.stain_density[0, :, 0], stain.he_density(raw)[0, :, 0, 0], atol=1e-5)


def test_stain_statistics_are_numpy_s() -> None:
    """Of masks of one pixel, an even and an odd number, and all; whatever lies outside the mask is ignored.

    In a box of as many pixels as the mask has, wherever it lies, they are those of the pixels to the last bit.
    """
    random = torch.Generator().manual_seed(0)
    image = torch.rand(3, 40, 48, generator=random)
    pixels = torch.stack([torch.randperm(64, generator=random) for _ in range(4)]).view(4, 8, 8)
    probs = torch.where(pixels < torch.tensor([1, 20, 33, 64]).view(4, 1, 1), 0.9, 0.2)
    corners = [(0, 32), (3, 7), (37, 1), (40, 32)]
    boxes = torch.tensor([(x, y, x + 8, y + 8) for x, y in corners]).float()
    measured = inference._stain_density(image[None], [boxes], probs).numpy()
    density = stain.he_density(image[None])[0].numpy()
    for i, (mask, (x, y)) in enumerate(zip(probs.numpy() > 0.5, corners, strict=True)):
        values = density[:, y : y + 8, x : x + 8][:, mask]
        expected = [f(values, 1) for f in (np.mean, np.median, np.min, np.max)]
        np.testing.assert_allclose(measured[i, :, :4], np.transpose(expected), atol=1e-5)
        np.testing.assert_array_equal(measured[i, :, 2:4], np.transpose(expected[2:]))
        if mask.sum() > 1:
            np.testing.assert_allclose(measured[i, :, 4], np.std(values, 1, ddof=1), atol=1e-5)
        else:
            assert np.isnan(measured[i, :, 4]).all()


@given(st.integers(0, 2**31), st.sampled_from([-1, -2]))
@settings(max_examples=30)
def test_the_mirrored_picture_has_the_same_densities(seed: int, axis: int) -> None:
    """Law: of boxes anywhere, with their masks mirrored too; so what is measured is not beside the mask."""
    random, side = torch.Generator().manual_seed(seed), 40
    image, probs = torch.rand(1, 3, side, side, generator=random), torch.rand(5, 7, 7, generator=random)
    corner = torch.rand(5, 2, generator=random) * 20
    boxes = torch.cat([corner, corner + 3 + torch.rand(5, 2, generator=random) * 15], 1)
    mirrored, low = boxes.clone(), 0 if axis == -1 else 1
    mirrored[:, low], mirrored[:, low + 2] = side - boxes[:, low + 2], side - boxes[:, low]
    there, here = (
        inference._stain_density(i, [b], m)
        for i, b, m in ((image.flip(axis), mirrored, probs.flip(axis)), (image, boxes, probs))
    )
    torch.testing.assert_close(there, here, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(("method", "precision"), [("macenko", torch.bfloat16), ("dcgmm", torch.float32)])
def test_neither_threads_nor_batches_show(method: Any, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same bits on one thread and on several, alone and in a batch; also where there are few proposals."""
    torch.manual_seed(0)
    model = pointwise(fold(NucleusDetector(Architecture(box_hidden=32, mask_channels=8, mask_layers=1)).eval()))
    monkeypatch.setattr(load, "detector", lambda _: load.LoadedDetector(model, torch.device("cpu"), precision))
    patches = np.random.default_rng(0).integers(60, 255, (2, 320, 320, 3)).astype(np.uint8)
    patches[1, 32:] = 240
    target = read_template(find_weights("stain")) if method == "dcgmm" else TEMPLATE[method]
    paler = FittedStain(method, {name: tuple(0.9 * v for v in values) for name, values in target.numbers.items()})

    def detect(batch: int, threads: int) -> list[HostInstances]:
        detection = Detector(batch=batch, score=0.05, objectness=0.3)
        torch.set_num_threads(threads)
        staining = Settings(detector=detection, stain=Stain(method=method))
        return [result() for result in detect_patches(list(patches), Normalisation(paler, target), staining)]

    before = torch.get_num_threads()
    try:
        expected, *others = [detect(*how) for how in ((1, 1), (1, 3), (2, 2))]
    finally:
        torch.set_num_threads(before)
    assert len(expected[0].boxes) > 5
    for detected in others:
        assert all(same(a, b) for a, b in zip(detected, expected, strict=True))


@pytest.mark.parametrize(("kind", "times"), [("cpu", 3), ("cuda", 0)])
def test_freed_pages_are_returned_where_a_processor_computes(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch, kind: str, times: int
) -> None:
    """After each patch; beside a GPU a process is large by its libraries alone, and patches take milliseconds."""
    one, returned = device(), list[None]()
    monkeypatch.setattr(inference, "choose_device", lambda name: torch.device(kind))
    stack = inference._stack
    monkeypatch.setattr(inference, "_stack", lambda *patches, pinned=False: stack(*patches))  # no GPU has it pinned
    monkeypatch.setattr(inference, "return_freed_memory", lambda: returned.append(None))
    one.detect([np.full((256, 256, 3), 255, np.uint8)] * 3)
    assert len(returned) == times
