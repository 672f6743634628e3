from typing import NamedTuple
from collections.abc import Mapping, Sequence
import torch
from torch import Tensor
from torchvision.ops import nms
from pipeline.config import Detection
from pipeline.detector import Candidates, Caps, NucleusDetector
from pipeline.views import View, apply, apply_boxes, undo_boxes, undo_masks
class Fused(NamedTuple):
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    votes: Tensor
def fuse(boxes,scores,classes,*,iou): return Fused(boxes[0],scores[0],classes[0],torch.ones_like(classes[0]))


class Instances(NamedTuple):
    """What one patch holds, seen in every view, in patch px, best first."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,)
    classes: Tensor  # int64 (N,), 0-based
    votes: Tensor  # int64 (N,)
    soft: Tensor  # float32 (N, M, M): the views' mean, the grid spans the box
    saturated: bool  # a cap was reached even after the patch was split: nuclei may be missing


def infer(
    model: NucleusDetector, images: Tensor, chosen: Sequence[View], detection: Detection, limits: Caps, margin: int
) -> list[Instances]:
    """Detect in every view, fuse the boxes, and average the masks that each view gives the fused boxes.

    images: float32 (B, 3, T, T) in 0..1, square patches; `margin` px of them belong to their neighbours too.
    A box stands with its mean score over all views, so what few views see must be certain there. In one view
    nothing is fused. Runs under the caller's autocast and inference mode.
    """
    side = images.shape[-1]
    pyramids, seen = [], []
    for view in chosen:
        features = model.features(apply(view, images))
        pyramids.append(features)
        # what a view alone would drop can still be carried by the others
        found = candidates(model, apply(view, images), features, detection, limits, margin, len(chosen))
        seen.append([c._replace(boxes=undo_boxes(view, c.boxes, side)) for c in found])
    fused = [_fuse_patch(views_of_patch, detection) for views_of_patch in zip(*seen, strict=True)]
    boxes, classes = [f.boxes for f in fused], [f.classes for f in fused]
    counts = [len(b) for b in boxes]
    total = torch.zeros(())
    for view, features in zip(chosen, pyramids, strict=True):
        moved = [apply_boxes(view, b, side) for b in boxes]
        soft = torch.cat(model.masks(features, moved, classes, model.side((side, side))))
        total = total.to(soft.device) + undo_masks(view, soft)
    masks = (total / len(chosen)).split(counts)
    return [
        Instances(f.boxes, f.scores, f.classes, f.votes, m, any(c.saturated for c in patch))
        for f, m, patch in zip(fused, masks, zip(*seen, strict=True), strict=True)
    ]


def _fuse_patch(seen: Sequence[Candidates], detection: Detection) -> Fused:
    """One patch's boxes from all its views, those whose mean score suffices."""
    fused = fuse([c.boxes for c in seen], [c.scores for c in seen], [c.classes for c in seen], iou=detection.nms)
    keep = fused.scores >= detection.score
    return Fused(*(values[keep] for values in fused))


def candidates(
    model: NucleusDetector, images: Tensor, features: Mapping[str, Tensor], detection: Detection, limits: Caps,
    margin: int, views: int,
) -> list[Candidates]:
    """Boxes of every patch in one view; a patch whose caps are reached is looked at again in four parts."""
    side = model.side(images.shape[-2:])
    floor = detection.score if views == 1 else detection.score / 2
    found = model.classify(features, model.propose(features, side, limits), side, limits, floor, detection.nms)
    return [
        _in_quarters(model, image[None], detection, limits, margin, floor) if one.saturated else one
        for image, one in zip(images, found, strict=True)
    ]


def _in_quarters(
    model: NucleusDetector, image: Tensor, detection: Detection, limits: Caps, margin: int, floor: float
) -> Candidates:
    """The four quarters of a crowded patch, each with the caps of a whole one, and `margin` px of its neighbours.

    A quarter owns the boxes whose centre lies in it; what two of them claim, a last NMS settles.
    """
    size, half = image.shape[-1], image.shape[-1] // 2
    parts = []
    for top in (0, 1):
        for left in (0, 1):
            x, y = left * (half - margin), top * (half - margin)
            piece = image[:, :, y : y + half + margin, x : x + half + margin]
            side, features = model.side(piece.shape[-2:]), model.features(piece)
            (part,) = model.classify(features, model.propose(features, side, limits), side, limits, floor, detection.nms)
            boxes = part.boxes + part.boxes.new_tensor([x, y, x, y])
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            mine = ((centre[:, 0] >= half) == bool(left)) & ((centre[:, 1] >= half) == bool(top))
            parts.append(part._replace(boxes=boxes[mine], scores=part.scores[mine], classes=part.classes[mine]))
    boxes, scores, classes = (torch.cat([getattr(p, name) for p in parts]) for name in ("boxes", "scores", "classes"))
    keep = nms(boxes, scores, detection.nms)
    return Candidates(boxes[keep], scores[keep], classes[keep], any(p.saturated for p in parts))
