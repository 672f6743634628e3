"""The views of a patch -> its instances: boxes fused by overlap with votes, masks averaged."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, nms

from pipeline.config import side_step
from pipeline.model.detector import Candidates, Limits, NucleusDetector, Pyramid
from pipeline.model.instances import STATISTICS, Instances, select
from pipeline.model.split import Quarter, join, quarters
from pipeline.model.views import View, apply, apply_boxes, undo_boxes, undo_masks

_BOXES_AT_ONCE = 512  # rows of the overlap matrix held at once


class Fused(NamedTuple):
    """Boxes of one patch after fusion, best first; parallel (N, ...)."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,): the mean over all views, where one that did not detect it counts 0
    class_index: Tensor  # int64 (N,)
    votes: Tensor  # int64 (N,): how many views detected it


def fuse(boxes: Sequence[Tensor], scores: Sequence[Tensor], class_index: Sequence[Tensor], *, iou: float) -> Fused:
    """Fuse the boxes that several views give one patch, all in the patch's frame.

    boxes: a float32 (Ni, 4) per view; scores: (Ni,); class_index: int64 (Ni,); iou: boxes that overlap by more are one
    The best boxes lead (non-maximum suppression over all views); every other box joins the leader it overlaps
    most, and of each view a leader counts the best. The fused box is the mean weighted by score, the class
    the one of the highest summed score.
    Laws: one view is returned as it is, with one vote each; the order of the views does not matter, to the bit.
    """
    count = len(boxes)
    if count == 1:
        return Fused(boxes[0], scores[0], class_index[0], torch.ones_like(class_index[0]))
    every, score, class_ = torch.cat(list(boxes)), torch.cat(list(scores)), torch.cat(list(class_index))
    view = torch.cat([torch.full_like(c, i) for i, c in enumerate(class_index)])
    order = _canonical(every, score, class_)
    every, score, class_, view = every[order], score[order], class_[order], view[order]
    leaders = nms(every, score, iou).sort().values  # canonical order is falling score
    members = _members(_best_leader(every, every[leaders]), view, len(leaders), count)  # (L, V)
    detected = members < len(every)  # whether the view detected the leader's nucleus
    members = members.clamp(max=max(len(every) - 1, 0))
    weight = score[members].double() * detected  # (L, V)
    total = weight.sum(1)
    lead = every[leaders].double()
    offset = every[members].double() - lead[:, None]  # (L, V, 4); exactly 0 for a box equal to its leader
    classes = F.one_hot(class_[members], int(class_.max()) + 1 if len(class_) else 1)  # (L, V, K)
    fused = Fused(
        (lead + (offset * weight[..., None]).sum(1) / total.clamp(min=1e-12)[:, None]).to(every.dtype),
        (total / count).to(score.dtype),
        (classes * weight[..., None]).sum(1).argmax(1),
        detected.sum(1),
    )
    return select(fused, _canonical(fused.boxes, fused.scores, fused.class_index))


def _canonical(boxes: Tensor, scores: Tensor, class_index: Tensor) -> Tensor:
    """Indices by falling score, then by coordinates and class: the same order whatever the order of the input."""
    order = torch.arange(len(boxes), device=boxes.device)
    for key in (class_index, boxes[:, 3], boxes[:, 2], boxes[:, 1], boxes[:, 0], -scores):
        order = order[key[order].argsort(stable=True)]
    return order


def _best_leader(boxes: Tensor, leaders: Tensor) -> Tensor:
    """Each box's most overlapping leader, int64 (N,); the first of equals.

    Every box has one that overlaps by the IoU of the suppression: itself, or the one that suppressed it.
    """
    best = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
    order = boxes[:, 0].argsort()  # neighbours in x together, so that few leaders are near
    for first in range(0, len(boxes), _BOXES_AT_ONCE):
        part = order[first : first + _BOXES_AT_ONCE]
        some = boxes[part]
        near = torch.where((leaders[:, 0] <= some[:, 2].max()) & (leaders[:, 2] >= some[:, 0].min()))[0]
        best[part] = near[box_iou(some, leaders[near]).argmax(1)]
    return best


def _members(leader: Tensor, view: Tensor, leaders: int, views: int) -> Tensor:
    """Of the boxes that each view gives a leader, the first: int64 (L, V), ascending along V, N where none.

    Ascending, so that sums over V run in canonical order whatever the order of the views; a table of minima, because
    scattered additions run in any order on a GPU, which changes their sums, but not minima.
    """
    table = torch.full((leaders * views,), len(leader), dtype=torch.int64, device=leader.device)
    table.scatter_reduce_(0, leader * views + view, torch.arange(len(leader), device=leader.device), "amin")
    return table.reshape(leaders, views).sort(1).values


def infer(
    model: NucleusDetector, images: Tensor, chosen: Sequence[View], limits: Limits, margin: int
) -> list[Instances[Tensor]]:
    """Detect in every view, fuse the boxes, and average the masks that each view gives the fused boxes.

    images: float32 (B, 3, T, T) in 0..1, square patches; `margin` px of each edge belong to its neighbours too.
    Returns the instances of each patch, best first. Their stain density is NaN: it is measured on the patch before
    normalisation. The score is the mean over all views, so an instance that few views detect must be certain in those.
    Runs under the caller's autocast and inference mode.
    """
    side = images.shape[-1]
    # boxes below the lowest score in one view may reach it in the mean over all
    in_view = limits if len(chosen) == 1 else limits._replace(score=limits.score / 2)
    pyramids, per_view = [], []
    for view in chosen:
        shown = apply(view, images)
        features = model.features(shown)
        pyramids.append(features)
        detected = candidates(model, shown, features, in_view, margin)
        per_view.append([c._replace(boxes=undo_boxes(view, c.boxes, side)) for c in detected])
    per_patch = list(zip(*per_view, strict=True))
    fused = [_fuse_patch(patch, limits) for patch in per_patch]
    in_views = (_masks(model, features, view, fused, side) for view, features in zip(chosen, pyramids, strict=True))
    masks = torch.split(functools.reduce(torch.add, in_views) / len(chosen), [len(f.boxes) for f in fused])
    return [
        Instances(
            boxes=f.boxes,
            mask_probs=mask_probs,
            scores=f.scores,
            class_index=f.class_index,
            votes=f.votes,
            stain_density=f.boxes.new_full((len(f.boxes), 2, len(STATISTICS)), torch.nan),
            saturated=any(c.saturated for c in patch),
        )
        for f, mask_probs, patch in zip(fused, masks, per_patch, strict=True)
    ]


def _masks(model: NucleusDetector, features: Pyramid, view: View, fused: Sequence[Fused], side: int) -> Tensor:
    """The masks that one view gives the fused boxes of all patches: float32 (sum N, M, M), turned back."""
    boxes = [apply_boxes(view, patch.boxes, side) for patch in fused]
    return undo_masks(view, torch.cat(model.masks(features, boxes, [patch.class_index for patch in fused])))


def _fuse_patch(views_of_patch: Sequence[Candidates], limits: Limits) -> Fused:
    """One patch's boxes from all its views, those whose mean score suffices."""
    columns = ([getattr(c, name) for c in views_of_patch] for name in ("boxes", "scores", "class_index"))
    fused = fuse(*columns, iou=limits.nms)
    return select(fused, fused.scores >= limits.score)


def candidates(
    model: NucleusDetector, images: Tensor, features: Pyramid, limits: Limits, margin: int
) -> list[Candidates]:
    """Boxes of every patch in one view; a patch that reaches a limit is detected again in quarters.

    images: (B, 3, T, T) as the view shows them, features: theirs. Each quarter has the limits of a whole patch.
    """
    parts = quarters(images.shape[-1], margin, side_step(model.architecture.upscale))
    whole = model.classify(features, model.propose(features, limits), limits)
    return [
        _in_quarters(model, image, parts, limits) if patch.saturated and parts else patch
        for image, patch in zip(images, whole, strict=True)
    ]


def _in_quarters(model: NucleusDetector, image: Tensor, parts: Sequence[Quarter], limits: Limits) -> Candidates:
    """One patch (3, T, T), quarter by quarter."""
    detected = []
    for part in parts:
        features = model.features(image[None, :, *part.window])
        detected += model.classify(features, model.propose(features, limits), limits)
    return join(parts, detected, limits.nms)
