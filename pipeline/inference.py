"""Patches -> instances: stain normalisation, every view, fusion, batch by batch on the device."""

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from pipeline import fuse, stain, views
from pipeline.config import Detection, Settings
from pipeline.detector import NucleusDetector, caps, choose_device, choose_precision, fold, load_weights
from pipeline.plan import Plan, stain_network
from pipeline.tensorfile import find_weights


class Engine(NamedTuple):
    """A detector on its device."""

    model: NucleusDetector
    device: torch.device
    precision: torch.dtype


_loading, _computing = threading.Lock(), threading.Lock()


def computing() -> threading.Lock:
    """The turn of this process's device: hold it while you compute."""
    return _computing


def engine(settings: Detection) -> Engine:
    """The detector of these settings: loaded once per process, weights and device."""
    with _loading:
        return _engine(find_weights(settings.weights), settings.device, settings.precision)


@functools.lru_cache(maxsize=2)
def _engine(weights: Path, device_name: str, precision: str) -> Engine:
    device = choose_device(device_name)
    return Engine(fold(load_weights(weights)).to(device), device, choose_precision(precision, device))


class Found(NamedTuple):
    """A tile's instances, off the device: patch px."""

    boxes: NDArray[np.float32]  # (N, 4)
    soft: NDArray[np.float32]  # (N, M, M)
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    votes: NDArray[np.int64]
    stains: NDArray[np.float32]  # (N, 2) mean haematoxylin and eosin density
    saturated: bool
    lost: bool = False  # the device had no memory for it


def detect_patches(patches: NDArray[np.uint8], plan: Plan, settings: Settings) -> Iterator[Found]:
    """Instances of patches uint8 (n, T, T, 3): normalise, infer in every view, fuse; batch by batch."""
    running = engine(settings.detector)
    size = settings.detector.batch or (8 if running.device.type == "cuda" else 1)
    limits = caps(
        patches.shape[1],
        settings.tiling.mpp,
        settings.detector.proposals_per_mm2,
        settings.detector.instances_per_mm2,
    )
    chosen = views.views(settings.fusion.views)
    for first in range(0, len(patches), size):
        batch = torch.from_numpy(patches[first : first + size]).to(running.device, non_blocking=True)
        raw = batch.permute(0, 3, 1, 2).float() / 255  # (B, 3, T, T)
        with torch.inference_mode():
            images = stain.normalise(raw, plan.stain, plan.target, stain_network(settings))
            with torch.autocast(running.device.type, running.precision, enabled=running.precision != torch.float32):
                found = fuse.infer(running.model, images, chosen, settings.detector, limits, settings.tiling.margin)
            for image, instances in zip(raw, found, strict=True):
                yield _off_device(image, instances)


def _off_device(image: torch.Tensor, found: fuse.Instances) -> Found:
    """Copy a tile's instances to the host, with the mean stain densities of what their masks cover."""
    side = found.soft.shape[-1]
    density = roi_align(stain.hed(image[None]), [found.boxes.float()], side, sampling_ratio=1)  # (N, 2, M, M)
    inside = (found.soft > 0.5).float()[:, None]
    means = (density * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    return Found(
        found.boxes.float().cpu().numpy(),
        found.soft.float().cpu().numpy(),
        found.scores.float().cpu().numpy(),
        found.classes.cpu().numpy(),
        found.votes.cpu().numpy(),
        means.cpu().numpy(),
        found.saturated,
    )
