"""Detection and training on a GPU, proven without one: no tensor meets one of another device, nothing waits but what
the data decides, and the results are the CPU's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pretend_cuda import BLOCKING, COSTS, DOWNLOAD, LAUNCH, UPLOAD, WAIT, OnDevice, PretendedCuda

from pipeline.config import Architecture, Detector, Settings, Stain, Tiling
from pipeline.model import inference, load, stain
from pipeline.model.detector import NucleusDetector, fold
from pipeline.model.inference import detect_patches
from pipeline.model.instances import HostInstances
from pipeline.model.stain import FittedStain, Normalisation
from pipeline.model.weights import find_weights
from slides.geometry import Size
from slides.phantom import draw
from training.config import Training
from training.data.crops import Crop, regions, targets
from training.fit import _optimise, _parameter_groups

SIDE = 128
METHODS: tuple[Any, ...] = ("none", "reinhard", "macenko", "dcgmm")
COARSE = 1 / 255  # masks leave the device in 256 levels

# What a batch costs beyond computation, by function. A number may become smaller, and is then lowered here.
DETECTION = {
    "blocking upload": 0,
    "download: pipeline/model/inference.py _download": 1,
    "download: pipeline/model/suppress.py counts": 2,
    "upload: pipeline/model/inference.py _detect": 1,
    "wait: pipeline/model/detector.py NucleusDetector.classify": 1,
    "wait: pipeline/model/detector.py NucleusDetector.propose": 1,
    "wait: pipeline/model/suppress.py suppress": 2,
}
FUSION = {
    "download: pipeline/model/suppress.py counts": 2,
    "wait: pipeline/model/fuse.py fuse": 1,
    "wait: pipeline/model/suppress.py suppress": 1,
}
TRAINING: dict[str, int] = {}


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """uint8 (8, SIDE, SIDE, 3), parts of a phantom slide; the last one shows glass."""
    image = draw(Size(1024, 1024), 3).image
    corners = [(y, x) for y in (256, 448, 640) for x in (256, 448, 640)][1:8]
    cut = [image[y : y + SIDE, x : x + SIDE] for y, x in corners]
    return np.stack([*cut, np.full_like(cut[0], 243)])


def chosen(device: str, method: Any = "none", **detection: Any) -> Settings:
    detector = Detector(**{"device": device, "precision": "float32", **detection})
    return Settings(tiling=Tiling(tile=SIDE, margin=32), stain=Stain(method=method), detector=detector)


def normalisation(method: str) -> Normalisation:
    target = stain.read_template(find_weights("stain")) if method == "dcgmm" else stain.TEMPLATE[method]
    paler = FittedStain(method, {name: tuple(0.9 * v for v in values) for name, values in target.numbers.items()})
    return Normalisation(paler, target)


def detect(patches: np.ndarray, settings: Settings) -> list[HostInstances]:
    return list(detect_patches(patches, normalisation(settings.stain.method), settings))


def assert_same(there: list[HostInstances], here: list[HostInstances]) -> None:
    """Shapes, dtypes, and values within rounding."""
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        assert a[6:] == b[6:]  # flags
        for name, x, y in zip(HostInstances._fields[:6], a, b, strict=False):
            assert isinstance(x, np.ndarray)
            assert (x.dtype, x.shape) == (y.dtype, y.shape), name
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=COARSE if name == "mask_probs" else 2e-3, err_msg=name)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_device_gives_what_a_cpu_gives(patches: np.ndarray, method: Any, views: int) -> None:
    """And a batch waits for what the data decides, once for each head."""
    expected = detect(patches[4:], chosen("cpu", method, views=views))
    assert sum(len(patch.boxes) for patch in expected) > 10
    with PretendedCuda() as cuda:
        for batch in (4, 1, 1):
            cuda.costs.clear()
            there = detect(patches[-batch:], chosen("cuda", method, views=views, batch=batch))
            assert_same(there, expected[-batch:])
    assert_no_more(cuda.by_function(*COSTS), costs(views))  # of the last: constants of its size were uploaded before


def costs(views: int) -> dict[str, int]:
    """What a batch in several views may cost."""
    per_batch = {k: v if "inference" in k else views * v for k, v in DETECTION.items()}
    fusion = FUSION if views > 1 else {}
    return {k: per_batch.get(k, 0) + fusion.get(k, 0) for k in per_batch.keys() | fusion.keys()}


def test_the_cost_of_a_batch(patches: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """Of eight patches in one view, in the precision of a GPU; the table by source line is printed."""
    settings = chosen("cuda", batch=8, precision="bfloat16")
    with PretendedCuda() as cuda:
        detect(patches, settings)
        cuda.costs.clear()
        cuda.uploads.clear()
        detected = detect(patches, settings)
    with capsys.disabled():
        print(f"\n{cuda.table(*COSTS)}\n{cuda.total(LAUNCH)} launches")
    assert sum(len(patch.boxes) for patch in detected) > 10
    assert_no_more(cuda.by_function(*COSTS), costs(1))
    assert cuda.uploads == [patches.shape]
    assert cuda.total(WAIT, DOWNLOAD, BLOCKING) <= 7
    assert cuda.total(UPLOAD) == 1
    assert cuda.total(LAUNCH) <= 400


def assert_no_more(counted: Mapping[str, int], expected: Mapping[str, int]) -> None:
    more = {k: (v, expected.get(k, 0)) for k, v in counted.items() if v > expected.get(k, 0)}
    assert not more, f"more than expected (counted, expected): {more}"
