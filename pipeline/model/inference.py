"""Patches -> instances: stain normalisation, every view, fusion, batch by batch on the device."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms, roi_align

from pipeline.config import Settings
from pipeline.model import fuse, load, stain, views
from pipeline.model.detector import caps
from pipeline.model.instances import Found
from pipeline.segment.plan import Plan

_computing = threading.Lock()


def device_lock() -> threading.Lock:
    """The turn of this process's device: hold it while you compute."""
    return _computing


def detect_patches(patches: NDArray[np.uint8], plan: Plan, settings: Settings) -> Iterator[Found]:
    """What is in patches uint8 (n, T, T, 3), a Found each, in their order; batch by batch.

    Where the device has no memory for a batch, batches are smaller from then on; a patch that it has no memory for
    by itself is looked at in quarters, and is lost where it has none for the least of them either.
    Law: what is found in a patch that fits does not depend on whether others did.
    """
    first = 0
    while first < len(patches):
        batch = patches[first : first + _batch_size(settings)]
        found = _attempt(batch, plan, settings)
        if found is None and len(batch) > 1:
            _that_fits[settings] = len(batch) // 2
            continue
        yield from found or [_in_quarters(batch[0], plan, settings) or _lost(settings)]
        first += len(batch)


def _batch_size(settings: Settings) -> int:
    wanted = settings.detector.batch or (8 if load.detector(settings.detector).device.type == "cuda" else 1)
    return min(wanted, _that_fits.get(settings, wanted))


_that_fits: dict[Settings, int] = {}  # patches per inference, where more of them were too many for this process


def _detect(batch: NDArray[np.uint8], plan: Plan, settings: Settings) -> list[Found]:
    """Normalise a batch uint8 (B, T, T, 3), infer in every view, fuse."""
    detector, running = settings.detector, load.detector(settings.detector)
    limits = caps(batch.shape[1], settings.tiling.mpp, detector.proposals_per_mm2, detector.instances_per_mm2)
    normaliser = load.normaliser(plan.normalisation, settings.stain, running.device)
    pixels = torch.from_numpy(batch)
    if running.device.type == "cuda":
        pixels = pixels.pin_memory()  # from elsewhere the copy is not asynchronous
    with torch.inference_mode():
        raw = pixels.to(running.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255  # (B, 3, T, T)
        images = normaliser(raw)
        chosen = views.views(settings.detector.views)
        with torch.autocast(running.device.type, running.precision, enabled=running.precision != torch.float32):
            found = fuse.infer(running.model, images, chosen, detector, limits, settings.tiling.margin)
        return _off_device([_table(image, f) for image, f in zip(raw, found, strict=True)], found)


def _table(image: torch.Tensor, found: fuse.Instances) -> torch.Tensor:
    """A patch's instances as float32 (N, 9 + M * M), in the order of `_off_device`, still on the device.

    image: float32 (3, T, T), before normalisation: the stains are the mean densities of what the masks cover there.
    """
    boxes, soft = found.boxes.float(), found.soft.float()
    density = roi_align(stain.he_density(image[None]), [boxes], soft.shape[-1], sampling_ratio=1)  # (N, 2, M, M)
    inside = (soft > 0.5).float()[:, None]
    means = (density * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    numbers = torch.stack([found.scores.float(), found.classes.float(), found.votes.float()], 1)
    return torch.cat([boxes, numbers, means, soft.flatten(1)], 1)


def _off_device(tables: list[torch.Tensor], found: list[fuse.Instances]) -> list[Found]:
    """Copy a batch's tables to the host, all at once: the device waits for every copy."""
    host = torch.cat(tables).cpu().numpy()
    return [
        Found(
            boxes=rows[:, :4].copy(),
            soft=rows[:, 9:].reshape(f.soft.shape),
            scores=rows[:, 4].copy(),
            classes=rows[:, 5].astype(np.int64),
            votes=rows[:, 6].astype(np.int64),
            stains=rows[:, 7:9].copy(),
            saturated=f.saturated,
        )
        for rows, f in zip(np.split(host, np.cumsum([len(t) for t in tables])[:-1]), found, strict=True)
    ]


# ------------------------------------------------------------------------------------------- out of memory


_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA, the processor, CUDA's libraries
_LEAST_PX = 256  # of a quarter: smaller ones are more margin than anything else


def _attempt(batch: NDArray[np.uint8], plan: Plan, settings: Settings) -> list[Found] | None:
    """What is in a batch; or None where there is no memory for it, and what the attempt held is free again.

    Every other error passes.
    """
    try:
        return _detect(batch, plan, settings)
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not of_memory and not any(words in str(error) for words in _OF_MEMORY):
            raise
    # not before here, where the exception is gone, are the tensors gone that its frames held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _in_quarters(patch: NDArray[np.uint8], plan: Plan, settings: Settings) -> Found | None:
    """A patch (T, T, 3) in quarters, and those again where need be; None where that fails too.

    That it was needed is not remembered: the next patch may hold less, and as a whole it is seen better.
    """
    parts = fuse.quarters(len(patch), settings.tiling.margin)
    if not parts or parts[0].side < _LEAST_PX:
        return None
    seen = []
    for part in parts:
        piece = patch[part.y : part.y + part.side, part.x : part.x + part.side]
        whole = _attempt(piece[None], plan, settings)
        found = whole[0] if whole else _in_quarters(piece, plan, settings)
        if found is None:
            return None
        boxes, mine = part.of(torch.from_numpy(found.boxes))
        seen.append(_rows(found._replace(boxes=boxes.numpy()), mine.numpy()))
    return _together(seen, settings.detector.nms)


def _rows(found: Found, chosen: NDArray[Any]) -> Found:
    """Some of the instances: a mask bool (N,), or indices in the order wanted."""
    return found._replace(**{name: getattr(found, name)[chosen] for name in _COLUMNS})


_COLUMNS = Found._fields[:6]  # a row an instance


def _together(seen: list[Found], iou: float) -> Found:
    """The quarters of a patch, all in its frame; non-maximum suppression settles what two of them claim."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(f, name) for f in seen]) for name in _COLUMNS}
    every = Found(**columns, saturated=any(f.saturated for f in seen), quartered=True)
    return _rows(every, nms(torch.from_numpy(every.boxes), torch.from_numpy(every.scores), iou).numpy())


def _lost(settings: Settings) -> Found:
    """Nothing, of a patch that could not be looked at."""
    side = load.detector(settings.detector).model.architecture.mask_size
    return Found(
        boxes=np.zeros((0, 4), np.float32),
        soft=np.zeros((0, side, side), np.float32),
        scores=np.zeros(0, np.float32),
        classes=np.zeros(0, np.int64),
        votes=np.zeros(0, np.int64),
        stains=np.zeros((0, 2), np.float32),
        saturated=False,
        lost=True,
    )
