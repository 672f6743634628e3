"""The views of a patch -> its instances: boxes fused by overlap with votes, masks averaged."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.config import side_step
from pipeline.model.detector import Candidates, Limits, NucleusDetector, Pyramid
from pipeline.model.instances import STATISTICS, Instances, select
from pipeline.model.roi_align import flatten_boxes
from pipeline.model.split import Quarter, join, quarters
from pipeline.model.suppress import counts, suppress
from pipeline.model.views import View, apply, apply_boxes, undo_boxes, undo_masks

_BOXES_AT_ONCE = 512  # rows of the overlap matrix held at once on a CPU
_ROWS_ON_GPU = 4096


class Fused(NamedTuple):
    """Boxes of one patch after fusion, best first; parallel (N, ...)."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,): the mean over all views, where one that did not detect it counts 0
    class_index: Tensor  # int64 (N,)
    class_scores: Tensor  # float32 (N,): the mean over the views that detected it; one that gave another class counts 0
    votes: Tensor  # int64 (N,): how many views detected it


def fuse(patches: Sequence[Sequence[Candidates]], limits: Limits, classes: int) -> list[Fused]:
    """Fuse the boxes that several views give each patch of a batch, all in the patch's frame.

    patches: of each patch, the candidates of every view; classes: how many there are
    limits: boxes that overlap by more than its IoU `nms` are one; one is kept if its mean score over all views is at
        least `score`
    Non-maximum suppression over the boxes of all views together decides which boxes lead. Every other box joins the
    leader that it overlaps most; of the boxes that one view gives a leader, only the best counts. The fused box is the
    mean of these, weighted by their scores, and the class is the one with the highest sum of scores.
    Laws: one view is returned as it is, with one vote each; the order of the views does not matter, to the bit;
    neither do the other patches.
    """
    views = len(patches[0])
    if views == 1:
        sizes = [len(c.boxes) for (c,) in patches]
        votes = patches[0][0].class_index.new_ones(sum(sizes)).split(sizes)
        return [
            Fused(c.boxes, c.scores, c.class_index, c.class_scores, v) for (c,), v in zip(patches, votes, strict=True)
        ]
    rows = [candidates for patch in patches for candidates in patch]
    every, number = flatten_boxes([c.boxes for c in rows])  # number: of the patch and the view
    score, class_ = torch.cat([c.scores for c in rows]), torch.cat([c.class_index for c in rows])
    class_score = torch.cat([c.class_scores for c in rows])
    order = _canonical(every, score, class_, class_score, number // views)
    every, score, class_, class_score, number = (c[order] for c in (every, score, class_, class_score, number))
    patch = number // views
    leaders, sizes = suppress(every, score, patch, len(patches), iou=limits.nms)
    leaders = leaders.sort().values  # canonical order is falling score
    per_patch = every.split([sum(len(c.boxes) for c in patch) for patch in patches])
    best = _best_leaders(per_patch, every[leaders].split(sizes))
    members = _members(best, number % views, len(leaders), views)  # (L, V)
    detected = members < len(every)  # whether the view detected the leader's nucleus
    members = members.clamp(max=len(every) - 1)
    weight = score[members].double() * detected  # (L, V)
    total = weight.sum(1)
    lead = every[leaders].double()
    offset = every[members].double() - lead[:, None]  # (L, V, 4); exactly 0 for a box equal to its leader
    chosen = (F.one_hot(class_[members], classes) * weight[..., None]).sum(1).argmax(1)
    certain = (class_score[members] * weight * (class_[members] == chosen[:, None])).sum(1)
    fused = Fused(
        (lead + (offset * weight[..., None]).sum(1) / total.clamp(min=1e-12)[:, None]).to(every.dtype),
        (total / views).to(score.dtype),
        chosen,
        (certain / total.clamp(min=1e-12)).to(score.dtype),
        detected.sum(1),
    )
    enough = torch.where(fused.scores >= limits.score)[0]
    fused, patch = select(fused, enough), patch[leaders][enough]
    fused = select(fused, _canonical(*fused[:4], patch))
    sizes = counts(patch, len(patches))
    columns = (column.split(sizes) for column in fused)
    return [Fused(*of_patch) for of_patch in zip(*columns, strict=True)]


def _canonical(boxes: Tensor, scores: Tensor, class_index: Tensor, class_scores: Tensor, patch: Tensor) -> Tensor:
    """Indices by patch, falling score, then coordinates and class: the same order whatever the order of the input."""
    order = torch.arange(len(boxes), device=boxes.device)
    for key in (class_scores, class_index, boxes[:, 3], boxes[:, 2], boxes[:, 1], boxes[:, 0], -scores, patch):
        order = order[key[order].argsort(stable=True)]
    return order


def _best_leaders(boxes: Sequence[Tensor], leaders: Sequence[Tensor]) -> Tensor:
    """Boxes and leaders of each patch -> every box's most overlapping leader, an index among all: int64 (sum N,)."""
    firsts = itertools.accumulate(map(len, leaders), initial=0)
    best = map(_best_leader, boxes, leaders)
    return torch.cat([first + index for first, index in zip(firsts, best, strict=False)])


def _best_leader(boxes: Tensor, leaders: Tensor) -> Tensor:
    """Each box's most overlapping leader, int64 (N,); the first of equals.

    Every box has one that overlaps by the IoU of the suppression: itself, or the one that suppressed it.
    """
    best = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
    if boxes.device.type != "cpu":  # to choose the near ones is a wait, and there more than to compare all
        for first in range(0, len(boxes), _ROWS_ON_GPU):
            rows = slice(first, first + _ROWS_ON_GPU)
            best[rows] = box_iou(boxes[rows], leaders).argmax(1)
        return best
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

    images: float32 (B, 3, H, W) in 0..1, patches of one size; `margin` px of each edge belong to its neighbours too.
    Returns the instances of each patch, best first. Their stain density is NaN: it is measured on the patch before
    normalisation. The score is the mean over all views, so an instance that few views detect must be certain in those.
    Runs under the caller's autocast and inference mode.
    """
    size = images.shape[-2], images.shape[-1]
    # boxes below the lowest score in one view may reach it in the mean over all
    in_view = limits if len(chosen) == 1 else limits._replace(score=limits.score / 2)
    pyramids, per_view = [], []
    for view in chosen:
        shown = apply(view, images)
        features = model.features(shown)
        per_view.append(_undone(view, candidates(model, shown, features, in_view, margin), size))
        features = features._replace(maps=[])  # masks need the table only
        pyramids.append(features)
    per_patch = list(zip(*per_view, strict=True))
    fused = fuse(per_patch, limits, len(model.architecture.classes))
    in_views = (_masks(model, features, view, fused, size) for view, features in zip(chosen, pyramids, strict=True))
    masks = functools.reduce(torch.add, in_views) / len(chosen)
    unknown = masks.new_full((len(masks), 2, len(STATISTICS)), torch.nan)
    sizes = [len(f.boxes) for f in fused]
    return [
        Instances(
            boxes=f.boxes,
            mask_probs=mask_probs,
            scores=f.scores,
            class_index=f.class_index,
            class_scores=f.class_scores,
            votes=f.votes,
            stain_density=density,
            saturated=any(c.saturated for c in patch),
        )
        for f, mask_probs, density, patch in zip(
            fused, masks.split(sizes), unknown.split(sizes), per_patch, strict=True
        )
    ]


def _undone(view: View, detected: Sequence[Candidates], size: tuple[int, int]) -> list[Candidates]:
    """The candidates that a view gives each patch, in the patch's frame."""
    boxes = undo_boxes(view, torch.cat([c.boxes for c in detected]), size).split([len(c.boxes) for c in detected])
    return [c._replace(boxes=b) for c, b in zip(detected, boxes, strict=True)]


def _masks(
    model: NucleusDetector, features: Pyramid, view: View, fused: Sequence[Fused], size: tuple[int, int]
) -> Tensor:
    """The masks that one view gives the fused boxes of all patches: float32 (sum N, M, M), turned back."""
    boxes = apply_boxes(view, torch.cat([f.boxes for f in fused]), size).split([len(f.boxes) for f in fused])
    return undo_masks(view, model.masks(features, list(boxes), [patch.class_index for patch in fused]))


def candidates(
    model: NucleusDetector, images: Tensor, features: Pyramid, limits: Limits, margin: int
) -> list[Candidates]:
    """Boxes of every patch in one view; a patch that reaches a limit is detected again in quarters.

    images: (B, 3, H, W) as the view shows them, features: theirs. Each quarter has the limits of a whole patch.
    """
    parts = quarters((images.shape[-2], images.shape[-1]), margin, side_step(model.architecture.upscale))
    whole = model.classify(features, model.propose(features, limits), limits)
    return [
        _in_quarters(model, image, parts, limits) if patch.saturated and parts else patch
        for image, patch in zip(images, whole, strict=True)
    ]


def _in_quarters(model: NucleusDetector, image: Tensor, parts: Sequence[Quarter], limits: Limits) -> Candidates:
    """One patch (3, H, W), quarter by quarter."""
    detected = []
    for part in parts:
        features = model.features(image[None, :, *part.window])
        detected += model.classify(features, model.propose(features, limits), limits)
    return join(parts, detected, limits.nms)
