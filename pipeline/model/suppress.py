"""Non-maximum suppression over a batch of patches."""

import itertools

import torch
from torch import Tensor
from torchvision.ops import nms

_BOXES_AT_ONCE = 1 << 15  # compared on a GPU in one go: a matrix of bits, 128 MiB


def suppress(
    boxes: Tensor, scores: Tensor, patch: Tensor, level: Tensor, patches: int, *, iou: float
) -> tuple[Tensor, list[int]]:
    """Of boxes of one patch and level that overlap by more than `iou`, keep the best.

    boxes: float32 (N, 4), from 0; patch: int64 (N,), ascending, below `patches`; level: int64 (N,)
    Returns indices of what is kept, patch by patch, best first, and how many they are in each patch.
    On a CPU each patch is a call of its own, which takes less time there, and of equal scores the first is the best.
    On a GPU it is one only where there are so many boxes that a call of all would need much memory.
    """
    if len(boxes) == 0:
        return patch, [0] * patches
    if boxes.device.type == "cpu":
        sizes = counts(patch, patches)
        each = zip(boxes.split(sizes), scores.split(sizes), level.split(sizes), strict=True)
        kept = [_by_level(*columns, iou) for columns in each]
    else:
        # what must not be compared lies apart: patches side by side, levels one below the other
        boxes = boxes + torch.stack([patch, level, patch, level], 1) * (boxes.max() + 1)
        if len(boxes) <= _BOXES_AT_ONCE:
            keep = nms(boxes, scores, iou)
            owner = patch[keep]
            return keep[owner.argsort(stable=True)], counts(owner, patches)
        sizes = counts(patch, patches)
        kept = [nms(b, s, iou) for b, s in zip(boxes.split(sizes), scores.split(sizes), strict=True)]
    firsts = itertools.accumulate(sizes, initial=0)
    keep = torch.cat([first + k for k, first in zip(kept, firsts, strict=False)])
    return keep, [len(k) for k in kept]


def _by_level(boxes: Tensor, scores: Tensor, level: Tensor, iou: float) -> Tensor:
    """`suppress` for one patch, as torchvision's batched_nms, which sorts equal scores into any order."""
    levels = [torch.where(level == number)[0] for number in level.unique()]
    keep = torch.cat([level[:0], *(at[nms(boxes[at], scores[at], iou)] for at in levels)])
    return keep[scores[keep].sort(stable=True, descending=True).indices]


def counts(patch: Tensor, patches: int) -> list[int]:
    """How often each number below `patches` occurs."""
    every = torch.arange(patches, device=patch.device)
    occurrences: list[int] = (patch[:, None] == every).sum(0).tolist()
    return occurrences
