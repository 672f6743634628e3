"""Non-maximum suppression over a batch of patches."""

import itertools

import torch
from torch import Tensor
from torchvision.ops import nms

from pipeline.config import STRIDES
from pipeline.model.device import count_up, kernels_problem

# Compared on a GPU in one go by torchvision, which walks through its matrix of bits, every box by every other, in one
# block of threads: on an H200, 24,000 boxes of 16 patches took 40 ms together and 9 ms two patches at a time; of 4,800
# boxes, 2.5 ms together and 6 ms one patch at a time.
_BOXES_AT_ONCE = 1 << 12

# How far boxes may lie left of and above their patch's corner: views are shifted by less (`views`).
_BEYOND_PX = 64


def suppress(
    boxes: Tensor, scores: Tensor, patch: Tensor, patches: int, *, level: Tensor | None = None, iou: float
) -> tuple[Tensor, list[int]]:
    """Of boxes that overlap by more than `iou` keep the best; only boxes of one patch and one level are compared.

    boxes: float32 (N, 4), no coordinate below -_BEYOND_PX
    patch: int (N,), the number of each box's patch, ascending; patches: how many there are
    level: int (N,), or None where all are of one level
    Returns the indices of the boxes that are kept, patch by patch and the best first, and how many each patch keeps.
    On a CPU the patches are taken one by one, which takes less time there, and of equal scores the first is the best.
    On a GPU all are taken together; without `gpu_kernels` as many as have up to _BOXES_AT_ONCE boxes.
    """
    if len(boxes) == 0:
        return patch, [0] * patches
    if boxes.device.type == "cpu":
        sizes = counts(patch, patches)
        levels = [None] * patches if level is None else level.split(sizes)
        each = zip(boxes.split(sizes), scores.split(sizes), levels, strict=True)
        kept = [_by_level(*columns, iou) for columns in each]
    elif kernels_problem(boxes.device) is None:
        group = patch.long() if level is None else patch.long() * len(STRIDES) + level
        kept = [_by_group(boxes, scores, group, patches * (1 if level is None else len(STRIDES)), iou)]
    else:
        # what must not be compared lies apart: patches side by side, levels one below the other
        apart = patch[:, None] if level is None else torch.stack([patch, level, patch, level], 1)
        boxes = boxes + apart * (boxes.max() + (1 + _BEYOND_PX))
        sizes = [len(boxes)] if len(boxes) <= _BOXES_AT_ONCE else _grouped(counts(patch, patches))
        kept = []
        for of_group in zip(boxes.split(sizes), scores.split(sizes), strict=True):
            kept.append(nms(*of_group, iou))
    keep = kept[0]
    if len(kept) > 1:
        firsts = itertools.accumulate(sizes, initial=0)
        keep = torch.cat([first + k for k, first in zip(kept, firsts, strict=False)])
    if boxes.device.type == "cpu":
        return keep, [len(k) for k in kept]
    owner = patch[keep]
    return keep[owner.argsort(stable=True)], counts(owner, patches)


def _by_group(boxes: Tensor, scores: Tensor, group: Tensor, groups: int, iou: float) -> Tensor:
    """Indices of the boxes that no better one of their group overlaps, the best of all first; group: int64 (N,)."""
    from pipeline.model import gpu_kernels

    best_first = scores.argsort(descending=True, stable=True)
    ordered, by_group = group[best_first].sort(stable=True)
    starts = torch.searchsorted(ordered, count_up(groups + 1, boxes.device).long(), out_int32=True)
    keep = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[by_group] = gpu_kernels.suppress(boxes[best_first[by_group]].T.contiguous(), starts, iou)
    return best_first[torch.where(keep)[0]]


def _grouped(sizes: list[int]) -> list[int]:
    """Neighbouring patches joined to groups -> how many boxes each group has.

    sizes: how many boxes each patch has. A group has at most _BOXES_AT_ONCE boxes, unless it is a single patch.
    """
    sums = [0]
    for size in sizes:
        if sums[-1] and sums[-1] + size > _BOXES_AT_ONCE:
            sums.append(0)
        sums[-1] += size
    return sums


def _by_level(boxes: Tensor, scores: Tensor, level: Tensor | None, iou: float) -> Tensor:
    """`suppress` for one patch, as torchvision's batched_nms, which sorts equal scores into any order."""
    keep: Tensor
    if level is None:
        keep = nms(boxes, scores, iou)
    else:
        levels = [torch.where(level == number)[0] for number in level.unique()]
        none = torch.empty(0, dtype=torch.int64)
        keep = torch.cat([none, *(at[nms(boxes[at], scores[at], iou)] for at in levels)])
    return keep[scores[keep].sort(stable=True, descending=True).indices]


def counts(patch: Tensor, patches: int) -> list[int]:
    """How often each number below `patches` occurs."""
    occurrences: list[int] = (patch[:, None] == count_up(patches, patch.device)).sum(0).tolist()
    return occurrences
