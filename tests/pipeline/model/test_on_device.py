"""Detection and training on a GPU, proven without one: no tensor meets one of another device, nothing waits but what
the data decides, and the results are the CPU's."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Architecture, Detector, Settings, Stain, Tiling
from pipeline.model import detector as model_detector
from pipeline.model import fuse, inference, instances, load
from pipeline.model.detector import NucleusDetector
from pipeline.model.fitted_stain import TEMPLATE, FittedStain, Normalisation, read_template
from pipeline.model.inference import detect_patches
from pipeline.model.instances import HostInstances, Instances, Patches, columns
from pipeline.model.prepare import fold
from pipeline.model.weights import detector_architecture, find_weights
from pretend_cuda import BLOCKING, COSTS, DOWNLOAD, LAUNCH, UPLOAD, WAIT, PretendedCuda
from slides.geometry import Size
from slides.phantom import draw
from training.data.crops import Crop, collate, regions, targets
from training.fit import _optimise, _parameter_groups, initial_model

SIDE = 128
# In that of seed 3 one view has two boxes for a nucleus, of scores .998 and .997, and the device keeps the other one.
IMAGE = draw(Size(1024, 1024), 4).image
LARGER = [IMAGE[256:512, 256:512], IMAGE[640:896, 256:512]]
METHODS: tuple[Any, ...] = ("none", "reinhard", "macenko", "dcgmm")
COARSE = 1  # levels of 256, in which masks leave the device

# What a batch costs beyond computation, by function. A number may become smaller, and is then lowered here.
DETECTION = {
    "queued download: pipeline/model/device.py start_download": 1,
    "download: pipeline/model/suppress.py counts": 2,
    "upload: pipeline/model/inference.py _detect": 1,
    "wait: pipeline/model/detector.py NucleusDetector.classify": 1,
    "wait: pipeline/model/device.py _on_gpu": 1,  # for the results, when another thread has its turn
    "wait: pipeline/model/detector.py NucleusDetector._proposals": 1,
    "wait: pipeline/model/suppress.py suppress": 2,
}
FUSION = {
    "download: pipeline/model/suppress.py counts": 2,
    "wait: pipeline/model/fuse.py fuse": 1,
    "wait: pipeline/model/suppress.py suppress": 1,
}
TRAINING = {
    "blocking upload: pipeline/model/detector.py _anchor_grids": 4,  # once in a process, as the next three
    "blocking upload: pipeline/model/detector.py _bounds": 1,
    "blocking upload: pipeline/model/roi_align.py _layout": 1,
    "blocking upload: pipeline/model/roi_align.py _least_areas": 1,
    "blocking upload: training/fit.py _losses.<locals>.<genexpr>": 5,  # the loader pins its batches; here nothing does
    "download: pipeline/model/losses.py mask_targets": 1,
    "download: pipeline/model/suppress.py counts": 2,  # more boxes than a call takes, as the wait below
    "wait: pipeline/model/detector.py NucleusDetector._head_losses": 1,
    "wait: pipeline/model/detector.py NucleusDetector._proposals": 1,
    "wait: pipeline/model/losses.py proposal_losses": 4,
    "wait: pipeline/model/losses.py proposal_losses.<locals>.<genexpr>": 2,
    "wait: pipeline/model/losses.py sample_proposals": 6,
    "wait: pipeline/model/suppress.py suppress": 2,
    "wait: training/fit.py _optimise": 1,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The maps are so small that threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def patches() -> list[np.ndarray]:
    """Eight of SIDE px, parts of a phantom slide; the last one shows glass."""
    corners = [(y, x) for y in (256, 448, 640) for x in (256, 448, 640)][1:8]
    cut = [IMAGE[y : y + SIDE, x : x + SIDE] for y, x in corners]
    return [*cut, np.full_like(cut[0], 243)]


def chosen(device: str, method: Any = "none", tile: int = SIDE, **detection: Any) -> Settings:
    detector = Detector(**{"device": device, "precision": "float32", "score": 0.6, **detection})
    return Settings(tiling=Tiling(mpp=0.25, tile=tile, margin=32), stain=Stain(method=method), detector=detector)


def normalisation(method: str) -> Normalisation:
    target = read_template(find_weights("stain")) if method == "dcgmm" else TEMPLATE[method]
    paler = FittedStain(method, {name: tuple(0.9 * v for v in values) for name, values in target.numbers.items()})
    return Normalisation(paler, target)


def detect(patches: Patches, settings: Settings) -> list[HostInstances]:
    return [result() for result in detect_patches(patches, normalisation(settings.stain.method), settings)]


def assert_same(there: list[HostInstances], here: list[HostInstances]) -> None:
    """Shapes, dtypes, and values within rounding."""
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        assert a[7:] == b[7:]  # flags
        for name in columns(Instances):
            x, y = getattr(a, name), getattr(b, name)
            assert (x.dtype, x.shape) == (y.dtype, y.shape), name
            if name == "mask_probs":
                assert np.abs(x.astype(int) - y).max(initial=0) <= COARSE
            else:
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_device_gives_what_a_cpu_gives(patches: list[np.ndarray], method: Any, views: int) -> None:
    """And a batch waits for what the data decides, once for each head."""
    expected = detect(patches[4:], chosen("cpu", method, views=views))
    assert sum(len(patch.boxes) for patch in expected) > 10
    with PretendedCuda() as cuda:
        for batch in (4, 1, 1):
            cuda.costs.clear()
            there = detect(patches[-batch:], chosen("cuda", method, views=views, batch=batch))
            assert_same(there, expected[-batch:])
    assert_no_more(cuda.by_function(*COSTS), costs(views))  # of the last: constants of its size were uploaded before


def test_patches_of_several_sizes_are_filled_up_to_few() -> None:
    """With glass, as a CPU detects in that, without what lies beyond; also in the views that turn a patch by a quarter.

    Each size would cost a GPU seconds; so would each number of patches, of which there are few, too. The tile has
    192 px, a half of it 96 or, in steps that the network needs, 128.
    """
    sizes = [(128, 160), (192, 128), (128, 192), (100, 150)]
    patches = [
        IMAGE[y : y + height, 448 : 448 + width] for y, (height, width) in zip((256, 448, 640, 300), sizes, strict=True)
    ]
    filled = [np.full((192 if h > 128 else 128, 192 if w > 128 else 128, 3), 255, np.uint8) for h, w in sizes]
    for square, patch in zip(filled, patches, strict=True):
        square[: patch.shape[0], : patch.shape[1]] = patch
    expected = detect(filled, chosen("cpu", tile=192, views=8))
    within = [
        found if patch.shape == square.shape else inference._cropped(found, patch.shape[:2])
        for found, patch, square in zip(expected, patches, filled, strict=True)
    ]
    assert all(len(patch.boxes) for patch in within)
    with PretendedCuda() as cuda, mock.patch.object(fuse, "infer", wraps=fuse.infer) as infer:
        assert_same(detect(patches, chosen("cuda", tile=192, views=8, batch=4)), within)
    uploaded = [shape for shape in cuda.uploads if len(shape) == 4 and shape[-1] == 3 and shape[1] > 100]
    assert uploaded == [(3, 128, 192, 3), (1, 192, 128, 3)]
    assert [call.args[1].shape for call in infer.call_args_list] == [(4, 3, 128, 192), (1, 3, 192, 128)]


LEVELS_PER_PX = 255 / 180  # x + y of a box's corner is at most 180


@given(st.integers(0, 2**31), st.integers(20, 60), st.integers(20, 60))
def test_what_lies_beyond_a_patch_is_cut_off(seed: int, width: int, height: int) -> None:
    """Law: within the patch the masks stay where they are: one that states its own position still states it."""
    rng, count, grid = np.random.default_rng(seed), 12, 28
    low = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 30, (count, 2))], 1).astype(np.float32)
    others: Any = {name: np.arange(count) for name in columns(Instances)}
    levels = (positions(boxes, grid).sum(-1) * LEVELS_PER_PX).round().astype(np.uint8)
    found = instances.empty(grid)._replace(**others | {"boxes": boxes, "mask_probs": levels})
    cropped = inference._cropped(found, (height, width))
    kept = np.flatnonzero((boxes[:, :2] < (width, height)).all(1))
    assert cropped.scores.tolist() == kept.tolist()
    np.testing.assert_allclose(cropped.boxes, np.minimum(boxes[kept], (width, height) * 2), rtol=1e-6)
    at, before = positions(cropped.boxes, grid), positions(boxes[kept], grid)
    # beyond the outermost centres of the old grid there is nothing to interpolate with
    at = at.clip(before.min((1, 2), keepdims=True), before.max((1, 2), keepdims=True)) if len(kept) else at
    # rounded before and after
    np.testing.assert_allclose(cropped.mask_probs, at.sum(-1) * LEVELS_PER_PX, rtol=1e-4, atol=1)


def positions(boxes: np.ndarray, grid: int) -> np.ndarray:
    """The centres of the pixels of each box's grid: float32 (N, grid, grid, 2), x y."""
    centres = (np.arange(grid) + 0.5) / grid
    steps = np.stack([np.broadcast_to(centres, (grid, grid)), np.broadcast_to(centres[:, None], (grid, grid))], -1)
    corner, sides = boxes[:, None, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None, None]
    return np.asarray(corner + steps * sides, np.float32)


def costs(views: int) -> dict[str, int]:
    """What a batch in several views may cost."""
    per_batch = {k: v if "inference" in k or "model/device" in k else views * v for k, v in DETECTION.items()}
    fusion = FUSION if views > 1 else {}
    return {k: per_batch.get(k, 0) + fusion.get(k, 0) for k in per_batch.keys() | fusion.keys()}


def test_the_cost_of_a_batch(patches: list[np.ndarray]) -> None:
    """Of eight patches in one view, in the precision of a GPU; `pytest -s` shows the table by source line."""
    settings = chosen("cuda", batch=8, precision="bfloat16")
    with PretendedCuda() as cuda:
        detect(patches, settings)
        cuda.costs.clear()
        cuda.uploads.clear()
        queued = list(detect_patches(patches, normalisation("none"), settings))
        assert cuda.total(WAIT, DOWNLOAD, BLOCKING) <= 6  # then another thread has its turn
        detected = [result() for result in queued]
    print(f"\n{cuda.table(*COSTS)}\n{cuda.total(LAUNCH)} launches")
    assert sum(len(patch.boxes) for patch in detected) > 10
    assert_no_more(cuda.by_function(*COSTS), costs(1))
    assert cuda.uploads == [(8, SIDE, SIDE, 3)]
    assert cuda.total(WAIT, DOWNLOAD, BLOCKING) <= 7
    assert cuda.total(UPLOAD) == 1
    assert cuda.total(LAUNCH) <= 399  # 28 of them for the statistics of the stains, 12 to thin the anchors


def test_a_device_is_prepared_with_a_whole_batch_of_nuclei(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the size that most batches have; a CPU has nothing to plan."""
    monkeypatch.setattr(inference, "compute", lambda device, function: function())
    with PretendedCuda() as cuda, mock.patch.object(fuse, "infer", wraps=fuse.infer) as infer:
        inference.prepare_device(chosen("cuda", batch=2))
        (call,) = infer.call_args_list
        assert call.args[1].shape == (2, 3, SIDE, SIDE)
        assert cuda.by_function(DOWNLOAD)
        infer.reset_mock()
        inference.prepare_device(chosen("cpu"))
        assert not infer.called


def test_float32_is_not_rounded_to_fewer_bits() -> None:
    """Nor are the colours that dcgmm gives in it; cuDNN does so by default."""
    with PretendedCuda():
        networks: tuple[Callable[[], object], ...] = (
            lambda: load.detector(Detector(device="cuda", precision="float32")),
            lambda: load.stain_network(Stain(method="dcgmm"), torch.device("cuda", 0)),
        )
        for load_network in networks:
            torch.backends.cudnn.allow_tf32 = True
            load_network()
            assert not torch.backends.cudnn.allow_tf32


def test_a_view_turns_the_boxes_of_all_patches_at_once(patches: list[np.ndarray]) -> None:
    """A batch of four launches no more for it than a single patch."""
    launches = []
    for batch in (1, 4):
        with PretendedCuda() as cuda:
            detected = detect(patches[:batch], chosen("cuda", views=4, batch=batch))
        assert all(len(patch.boxes) for patch in detected)
        counted = cuda.by_function(LAUNCH)
        launches.append(sum(count for place, count in counted.items() if "model/views.py" in place))
    assert launches[0] == launches[1]


def assert_no_more(counted: Mapping[str, int], expected: Mapping[str, int]) -> None:
    more = {k: (v, expected.get(k, 0)) for k, v in counted.items() if v > expected.get(k, 0)}
    assert not more, f"more than expected (counted, expected): {more}"


# ------------------------------------------------------------------------------------- classes, limits, memory


def install(model: NucleusDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this network detect, on the device of the settings."""

    @functools.cache
    def detector(settings: Detector) -> load.LoadedDetector:
        device = torch.device(settings.device)
        return load.LoadedDetector(copy.deepcopy(model).to(device), device, torch.float32)

    monkeypatch.setattr(load, "detector", detector)
    monkeypatch.setattr(inference, "_batch_that_fits", {})


@pytest.mark.parametrize("views", [1, 4])
def test_classes_and_limits_are_those_of_a_cpu(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three classes is the likeliest; a patch that reaches its limit is detected in quarters."""
    architecture = dataclasses.replace(detector_architecture(find_weights("nuclei")), classes=("a", "b", "c"))
    model = fold(initial_model("nuclei", architecture).eval())
    model.roi_heads.box_predictor.score.bias.data[3] += 1
    install(model, monkeypatch)
    monkeypatch.setattr(model_detector, "_LEAST_INSTANCES", 12)
    limit = {"views": views, "instances_per_mm2": 1}
    expected = detect(LARGER, chosen("cpu", **limit))
    assert any(len(patch.boxes) > 12 for patch in expected)
    assert all((patch.class_index == 2).all() for patch in expected)
    with PretendedCuda():
        assert_same(detect(LARGER, chosen("cuda", batch=2, **limit)), expected)


@pytest.mark.parametrize(("share", "split", "lost"), [(1.1, False, False), (0.95, True, False), (0.1, False, True)])
def test_a_device_without_memory_detects_less_at_once(
    share: float, split: bool, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that does not fit is halved; a patch that does not fit is detected in quarters, and lost at the worst.

    share: of the memory that the largest map of a patch takes.
    """
    monkeypatch.setattr(inference, "_batch_that_fits", {})
    monkeypatch.setattr(inference, "_LEAST_PX", 128)
    with PretendedCuda(largest=share * 96 * 193**2 * 4) as cuda:
        there = detect(LARGER, chosen("cuda", batch=2))
    assert [(patch.split, patch.lost) for patch in there] == [(split, lost)] * 2
    assert lost or all(len(patch.boxes) for patch in there)
    tried = [shape[:2] for shape in cuda.uploads if len(shape) == 4 and shape[1] == shape[2] > 100]  # batch and side
    assert tried[:2] == [(2, 256), (1, 256)]


# -------------------------------------------------------------------------------------------------- training


TINY = Architecture(
    channels=16, upscale=1.0, semantic=8, box_hidden=16, mask_channels=8, mask_layers=1, backbone="test_efficientnet"
)


def crop(seed: int) -> Crop:
    """A crop of a phantom slide, at half the scale, with its nuclei."""
    phantom = draw(Size(512, 512), seed)
    labels = np.ascontiguousarray(phantom.labels[192:320, 192:320])
    image = torch.from_numpy(phantom.image[192:320, 192:320].copy()).permute(2, 0, 1).float() / 255
    return Crop(image, *targets(labels, np.ones(labels.max() + 1, np.int64)), torch.from_numpy(regions(labels)))


def test_a_training_step_is_a_cpus() -> None:
    """The same losses and weights after it, and no more waits than before. The gradients are the CPU's."""
    torch.manual_seed(0)
    here = NucleusDetector(TINY).train()
    there, batch = copy.deepcopy(here), [crop(1), crop(2)]
    assert len(batch[0].boxes) > 3
    expected = step(here, batch, torch.device("cpu"))
    gradients = [p.grad for p in here.parameters()]
    with PretendedCuda() as cuda:
        there.to("cuda")
        uploaded = [None if g is None else g.clone().to("cuda") for g in gradients]

        def backward(_loss: torch.Tensor) -> None:
            for parameter, gradient in zip(there.parameters(), uploaded, strict=True):
                parameter.grad = gradient

        cuda.costs.clear()
        with mock.patch.object(torch.Tensor, "backward", backward):
            losses = step(there, batch, torch.device("cuda"))
        counted = cuda.by_function(*COSTS)
        print(f"\n{cuda.table(*COSTS)}")
        for name, loss in losses.items():
            torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-3, atol=1e-4)
        for a, b in zip(there.parameters(), here.parameters(), strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-3, atol=1e-4)
    assert_no_more(counted, TRAINING)


def step(model: NucleusDetector, batch: list[Crop], device: torch.device) -> dict[str, torch.Tensor]:
    optimiser = torch.optim.AdamW(_parameter_groups(model, 0.01), lr=1e-3)
    torch.manual_seed(1)  # torchvision draws its samples
    with mock.patch("training.fit.choose_precision", return_value=torch.float32):
        return _optimise(model, optimiser, collate(batch), device)[0]
