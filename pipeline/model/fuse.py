"""The views of a tile -> its instances: boxes fused by overlap with votes, masks averaged."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, nms

from pipeline.config import Detector
from pipeline.model.detector import Candidates, Caps, NucleusDetector
from pipeline.model.views import View, apply, apply_boxes, undo_boxes, undo_masks

_BOXES_AT_ONCE = 512  # rows of the overlap matrix held at once


class Fused(NamedTuple):
    """Boxes of one patch after fusion, best first; parallel (N, ...)."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,): the mean over all views, where one that saw nothing counts 0
    classes: Tensor  # int64 (N,)
    votes: Tensor  # int64 (N,): how many views saw it


def fuse(boxes: Sequence[Tensor], scores: Sequence[Tensor], classes: Sequence[Tensor], *, iou: float) -> Fused:
    """Fuse the boxes that several views give one patch, all in the patch's frame.

    boxes: a float32 (Ni, 4) per view; scores: (Ni,); classes: int64 (Ni,); iou: what overlaps by more is one
    The best boxes lead (non-maximum suppression over all views); every other box joins the leader it overlaps
    most, and of each view a leader counts the best. The fused box is the mean weighted by score, the class
    the one of the highest summed score.
    Laws: one view is returned as it is, with one vote each; the order of the views does not matter, to the bit.
    """
    count = len(boxes)
    if count == 1:
        return Fused(boxes[0], scores[0], classes[0], torch.ones_like(classes[0]))
    every, score, klass = torch.cat(list(boxes)), torch.cat(list(scores)), torch.cat(list(classes))
    view = torch.cat([torch.full_like(c, i) for i, c in enumerate(classes)])
    order = _canonical(every, score, klass)
    every, score, klass, view = every[order], score[order], klass[order], view[order]
    leaders = nms(every, score, iou).sort().values  # canonical order is falling score
    members = _members(_best_leader(every, every[leaders]), view, len(leaders), count)  # (L, V)
    there = members < len(every)
    members = members.clamp(max=max(len(every) - 1, 0))
    weight = score[members].double() * there  # (L, V)
    total = weight.sum(1)
    lead = every[leaders].double()
    away = every[members].double() - lead[:, None]  # (L, V, 4): what agrees with the leader moves it not at all
    kinds = F.one_hot(klass[members], int(klass.max()) + 1 if len(klass) else 1)  # (L, V, K)
    fused = Fused(
        (lead + (away * weight[..., None]).sum(1) / total.clamp(min=1e-12)[:, None]).to(every.dtype),
        (total / count).to(score.dtype),
        (kinds * weight[..., None]).sum(1).argmax(1),
        there.sum(1),
    )
    best = _canonical(fused.boxes, fused.scores, fused.classes)
    return Fused(*(values[best] for values in fused))


def _canonical(boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
    """Indices by falling score, then by coordinates and class: an order that no input order shows in."""
    order = torch.arange(len(boxes), device=boxes.device)
    for key in (classes, boxes[:, 3], boxes[:, 2], boxes[:, 1], boxes[:, 0], -scores):
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

    Ascending, so that sums over V run in canonical order whatever the order of the views; a table, because
    scattered additions run in any order on a GPU, and scattered minima do not care.
    """
    table = torch.full((leaders * views,), len(leader), dtype=torch.int64, device=leader.device)
    table.scatter_reduce_(0, leader * views + view, torch.arange(len(leader), device=leader.device), "amin")
    return table.reshape(leaders, views).sort(1).values


class Instances(NamedTuple):
    """What one patch holds, seen in every view, in patch px, best first."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,)
    classes: Tensor  # int64 (N,), 0-based
    votes: Tensor  # int64 (N,)
    soft: Tensor  # float32 (N, M, M): the views' mean, the grid spans the box
    saturated: bool  # a cap was reached even after the patch was split: nuclei may be missing


def infer(
    model: NucleusDetector,
    images: Tensor,
    chosen: Sequence[View],
    detection: Detector,
    limits: Caps,
    margin: int,
) -> list[Instances]:
    """Detect in every view, fuse the boxes, and average the masks that each view gives the fused boxes.

    images: float32 (B, 3, T, T) in 0..1, square patches; `margin` px of them belong to their neighbours too.
    A box stands with its mean score over all views, so what few views see must be certain there. In one view
    nothing is fused. Runs under the caller's autocast and inference mode.
    """
    side = images.shape[-1]
    pyramids, seen = [], []
    for view in chosen:
        shown = apply(view, images)
        features = model.features(shown)
        pyramids.append(features)
        found = candidates(model, shown, features, detection, limits, margin, len(chosen))
        seen.append([c._replace(boxes=undo_boxes(view, c.boxes, side)) for c in found])
    fused = [_fuse_patch(views_of_patch, detection) for views_of_patch in zip(*seen, strict=True)]
    boxes, classes = [f.boxes for f in fused], [f.classes for f in fused]
    counts = [len(b) for b in boxes]
    total = torch.zeros(())
    for view, features in zip(chosen, pyramids, strict=True):
        moved = [apply_boxes(view, b, side) for b in boxes]
        soft = torch.cat(model.masks(features, moved, classes, model.side((side, side))))
        total = total.to(soft.device) + undo_masks(view, soft)
    masks = torch.split(total / len(chosen), counts)
    return [
        Instances(f.boxes, f.scores, f.classes, f.votes, m, any(c.saturated for c in patch))
        for f, m, patch in zip(fused, masks, zip(*seen, strict=True), strict=True)
    ]


def _fuse_patch(seen: Sequence[Candidates], detection: Detector) -> Fused:
    """One patch's boxes from all its views, those whose mean score suffices."""
    fused = fuse([c.boxes for c in seen], [c.scores for c in seen], [c.classes for c in seen], iou=detection.nms)
    keep = fused.scores >= detection.score
    return Fused(*(values[keep] for values in fused))


def candidates(
    model: NucleusDetector,
    images: Tensor,
    features: Mapping[str, Tensor],
    detection: Detector,
    limits: Caps,
    margin: int,
    views: int,
) -> list[Candidates]:
    """Boxes of every patch in one view; a patch whose caps are reached is looked at again in four parts."""
    side = model.side(images.shape[-2:])
    # what a view alone would drop can still be carried by the others
    floor = detection.score if views == 1 else detection.score / 2
    found = model.classify(features, model.propose(features, side, limits), side, limits, floor, detection.nms)
    parts = quarters(images.shape[-1], margin)
    return [
        _in_quarters(model, image[None], parts, detection, limits, floor) if one.saturated and parts else one
        for image, one in zip(images, found, strict=True)
    ]


class Quarter(NamedTuple):
    """A part of a square patch that is looked at by itself: it owns a quarter, and reads its neighbours' edges too."""

    x: int  # of what it reads, in patch px
    y: int
    side: int
    half: int  # where the quarters meet, along either axis
    right: bool
    lower: bool

    def of(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) in px of what it reads -> the same in patch px, and bool (N,): the centre lies in its own."""
        boxes = boxes + boxes.new_tensor([self.x, self.y, self.x, self.y])
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        return boxes, ((centre[:, 0] >= self.half) == self.right) & ((centre[:, 1] >= self.half) == self.lower)


def quarters(side: int, margin: int) -> tuple[Quarter, ...]:
    """The four quarters of a patch, with `margin` px and more of their neighbours; none where that is all of it.

    Law: every box of the patch is owned by one quarter.
    """
    half = side // 2
    reach = -(-(half + margin) // _STEP_PX) * _STEP_PX
    if reach >= side:
        return ()
    return tuple(
        Quarter((side - reach) * right, (side - reach) * lower, reach, half, bool(right), bool(lower))
        for lower in (0, 1)
        for right in (0, 1)
    )


_STEP_PX = 64  # enlarged by a half, a multiple of every stride: other sides would displace the anchors


def _in_quarters(
    model: NucleusDetector,
    image: Tensor,
    parts: Sequence[Quarter],
    detection: Detector,
    limits: Caps,
    floor: float,
) -> Candidates:
    """The quarters of a crowded patch (1, 3, T, T), each with the caps of a whole one; a last NMS settles the seams."""
    seen = []
    for part in parts:
        piece = image[:, :, part.y : part.y + part.side, part.x : part.x + part.side]
        side, features = model.side(piece.shape[-2:]), model.features(piece)
        (found,) = model.classify(features, model.propose(features, side, limits), side, limits, floor, detection.nms)
        boxes, mine = part.of(found.boxes)
        seen.append(Candidates(boxes[mine], found.scores[mine], found.classes[mine], found.saturated))
    boxes, scores, classes = (torch.cat([getattr(s, name) for s in seen]) for name in ("boxes", "scores", "classes"))
    keep = nms(boxes, scores, detection.nms)
    return Candidates(boxes[keep], scores[keep], classes[keep], any(s.saturated for s in seen))
