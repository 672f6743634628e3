"""Losses of a training step: what each anchor, proposal and mask should have been.

They are those of torchvision's RegionProposalNetwork and RoIHeads, with their matchers and samplers, without the passes
over whole images that took most of the time: the overlap of anchors with nuclei is the product of overlaps along x and
y, offsets are encoded for the sampled anchors only, and masks are cut from one map of all nuclei.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher, encode_boxes
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from pipeline.model.roi_align import flatten_boxes

UNKNOWN = 1 << 20  # the label of a nucleus of whatever class; larger than any class
_BETA = 1 / 9  # offsets that are off by more have a linear loss; torchvision's
_WINDOWS = (32, 64, 128)  # sides, px, in which masks are cut out; larger ones from the whole image
_PIXELS_AT_ONCE = 1 << 21  # of masks in float32: 8 MiB, which stay in a processor's cache


class Targets(NamedTuple):
    """The nuclei of a batch of images (S, S), in pixels of the network's input."""

    boxes: list[Tensor]  # of each image, float32 (N, 4)
    labels: list[Tensor]  # int64 (N,), the class from 1, or UNKNOWN
    nuclei: Tensor  # int32 (B, S, S): 0 background, i + 1 the nucleus of box i
    regions: Tensor  # uint8 (B, S, S): 0 background, 1 inside a nucleus, 2 its edge


class Sampled(NamedTuple):
    """The proposals of all images that the box head learns from."""

    boxes: Tensor  # float32 (P, 4)
    image: Tensor  # int32 (P,), ascending
    labels: Tensor  # int64 (P,), the class, 0 the background, or UNKNOWN
    nucleus: Tensor  # int64 (P,): number in its image, from 0, of the nucleus that the proposal overlaps most
    matched: Tensor  # float32 (P, 4): that nucleus's box


# --------------------------------------------------------------------------------------------------- proposals


def proposal_losses(
    rpn: RegionProposalNetwork,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    grids: Sequence[Tensor],
    boxes: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Losses of objectness and offsets, of a sample of the anchors.

    logits, deltas: of each level, (B, A, h, w) and (B, A * 4, h, w)
    grids: anchors of each level, (h, w, A, 4), whose x does not depend on the row, nor y on the column
    boxes: of the nuclei of each image, (N, 4)
    """
    with torch.no_grad():
        nucleus = match_anchors(boxes, grids, rpn.proposal_matcher)  # (B, sum h * w * A)
        sample = rpn.fg_bg_sampler(list(torch.where(nucleus >= 0, 1, nucleus + 1)))
        positive, negative = (torch.where(torch.stack(chosen)) for chosen in sample)  # image, anchor
        matched = pad_sequence(list(boxes), batch_first=True)[positive[0], nucleus[positive]]
        every = torch.cat([grid.flatten(0, 2) for grid in grids])
        offsets = encode_boxes(matched, every[positive[1]], rpn.box_coder.weights)
    score = torch.cat([s.permute(0, 2, 3, 1).flatten(1) for s in logits], 1)
    delta = torch.cat([d.permute(0, 2, 3, 1).reshape(len(d), -1, 4) for d in deltas], 1)
    scores = torch.cat([score[positive], score[negative]]).float()
    truth = torch.zeros_like(scores)
    truth[: len(matched)] = 1
    off = F.smooth_l1_loss(delta[positive].float(), offsets, beta=_BETA, reduction="sum")
    return {
        "loss_objectness": F.binary_cross_entropy_with_logits(scores, truth),
        "loss_rpn_box_reg": off / len(scores),
    }


def match_anchors(boxes: Sequence[Tensor], grids: Sequence[Tensor], matcher: Matcher) -> Tensor:
    """The nucleus of each anchor: its number in its image, -1 for the background, -2 for neither.

    boxes: of the nuclei of each image, (N, 4); grids: as in `proposal_losses`
    Returns int64 (B, sum h * w * A).
    It is what torchvision's Matcher gives for the matrix of IoU, low-quality matches included: the anchors that overlap
    a nucleus most are positive, however little they overlap it. On a CPU images are compared one by one, so that each
    matrix fits into the cache; on a GPU together, because there a call costs more than the work in it.
    """
    if boxes[0].device.type == "cpu":
        return torch.cat([_match(b[None], torch.ones(1, len(b), dtype=torch.bool), grids, matcher) for b in boxes])
    padded = pad_sequence(list(boxes), batch_first=True)  # (B, N, 4)
    there = pad_sequence([torch.ones_like(b[:, 0], dtype=torch.bool) for b in boxes], batch_first=True)
    return _match(padded, there, grids, matcher)


def _match(boxes: Tensor, there: Tensor, grids: Sequence[Tensor], matcher: Matcher) -> Tensor:
    """`match_anchors` of boxes (B, N, 4), of which those that are not `there`, bool (B, N), are only padding."""
    if boxes.shape[1] == 0:
        anchors = sum(g[..., 0].numel() for g in grids)
        return boxes.new_full((len(boxes), anchors), matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
    overlaps = [_grid_iou(boxes, grid) for grid in grids]  # each (B, N, h * w * A)
    most = torch.stack([o.amax(2) for o in overlaps]).amax(0)  # (B, N), of each nucleus
    most = most.where(there, torch.inf)  # of padding, none
    best = torch.cat([(o == most[..., None]).any(1) for o in overlaps], 1)
    iou, nearest = (torch.cat(columns, 1) for columns in zip(*(o.max(1) for o in overlaps), strict=True))
    doubtful = torch.where(iou < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS)
    return torch.where(best | (iou >= matcher.high_threshold), nearest, doubtful)


def _grid_iou(boxes: Tensor, grid: Tensor) -> Tensor:
    """IoU of boxes (B, N, 4) with the anchors (h, w, A, 4) of a level: (B, N, h * w * A); the bits of torchvision's."""
    columns, rows = grid[0, :, :, 0::2], grid[:, 0, :, 1::2]  # x (w, A, 2), y (h, A, 2)
    across, down = _shared(boxes[..., 0::2], columns), _shared(boxes[..., 1::2], rows)  # (B, N, w, A), (B, N, h, A)
    shared = across[:, :, None] * down[:, :, :, None]  # (B, N, h, w, A)
    sides = boxes[..., 2:] - boxes[..., :2]
    anchor_area = (columns[..., 1] - columns[..., 0]) * (rows[..., 1] - rows[..., 0])[:, None]
    area = (sides[..., 0] * sides[..., 1])[..., None, None, None] + anchor_area
    return shared.div_(area.sub_(shared)).flatten(2)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """Length that intervals a (B, N, 2) and b (w, A, 2) share: (B, N, w, A)."""
    a = a[:, :, None, None]
    return (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)


# ------------------------------------------------------------------------------------------------- box and mask


@torch.no_grad()
def sample_proposals(heads: RoIHeads, proposals: Sequence[Tensor], targets: Targets) -> Sampled:
    """Of the proposals of each image (P, 4), and its nuclei's own boxes, those that the box head learns from."""
    offered = [torch.cat(both) for both in zip(proposals, targets.boxes, strict=True)]
    nucleus, labels = heads.assign_targets_to_proposals(offered, targets.boxes, targets.labels)
    chosen = heads.subsample(labels)
    boxes, image = flatten_boxes([b[i] for b, i in zip(offered, chosen, strict=True)])
    number = torch.cat([n[i] for n, i in zip(nucleus, chosen, strict=True)])
    matched = torch.cat([_at(b, n[i]) for b, n, i in zip(targets.boxes, nucleus, chosen, strict=True)])
    return Sampled(boxes, image, torch.cat([x[i] for x, i in zip(labels, chosen, strict=True)]), number, matched)


def _at(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes[index], and zeros where there is no box."""
    return boxes[index] if len(boxes) else boxes.new_zeros(len(index), 4)


def likely_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 (P,): labels, where they are UNKNOWN the likeliest class. logits: (P, 1 + K)."""
    return torch.where(labels == UNKNOWN, logits[:, 1:].argmax(1) + 1, labels)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy; what is UNKNOWN should be a nucleus, of whatever class. logits: (P, 1 + K); labels: (P,)."""
    if logits.shape[1] == 2:
        return F.cross_entropy(logits, labels.clamp(max=1))
    likelihood = logits.float().log_softmax(1)  # autocast does so in cross_entropy
    unknown = labels == UNKNOWN
    of_class = likelihood.gather(1, labels.masked_fill(unknown, 0)[:, None])[:, 0]
    return -torch.where(unknown, likelihood[:, 1:].logsumexp(1), of_class).mean()


def box_losses(
    heads: RoIHeads, logits: Tensor, deltas: Tensor, sampled: Sampled, positive: Tensor
) -> dict[str, Tensor]:
    """Losses of class and offsets. logits: (P, 1 + K); deltas: (P, (1 + K) * 4); positive: indices, int64."""
    offsets = encode_boxes(sampled.matched[positive], sampled.boxes[positive], heads.box_coder.weights)
    deltas = deltas.view(*logits.shape, 4)[positive, likely_labels(logits, sampled.labels)[positive]]
    off = F.smooth_l1_loss(deltas, offsets, beta=_BETA, reduction="sum")
    return {
        "loss_classifier": classification_loss(logits, sampled.labels),
        "loss_box_reg": off / len(logits),
    }


def mask_loss(logits: Tensor, sampled: Sampled, nuclei: Tensor) -> Tensor:
    """Loss of the masks of positive proposals, of the class that each should have.

    logits: (R, 1 + K, M, M); sampled: those R; nuclei: int32 (B, S, S), as in Targets
    """
    if len(logits) == 0:
        return logits.sum() * 0
    truth = mask_targets(sampled, nuclei, logits.shape[-1])
    each = torch.arange(len(logits), device=logits.device)
    return F.binary_cross_entropy_with_logits(logits[each, sampled.labels].float(), truth)


@torch.no_grad()
def mask_targets(sampled: Sampled, nuclei: Tensor, size: int) -> Tensor:
    """The part of its nucleus in each proposal, on a grid of `size` x `size`: float32 (R, size, size), 0 to 1.

    As torchvision's roi_align (not `aligned`, as many samples as a bin has pixels) of the nucleus's mask. A bin's mean
    over a grid of bilinear samples is a weighted sum of rows of a weighted sum of columns: two products of matrices.
    Proposals of about one size are cut out together, in windows that hold them.
    """
    side, longest = nuclei.shape[-1], (sampled.boxes[:, 2:] - sampled.boxes[:, :2]).amax(1)
    windows = [w for w in _WINDOWS if w < side]
    within = torch.stack([(longest <= w - 3).sum() for w in windows] or [longest.new_zeros(())])
    order = longest.argsort()
    parts = []
    for window, part in zip([*windows, side], order.tensor_split(within.tolist()[: len(windows)]), strict=True):
        for some in part.split(max(1, _PIXELS_AT_ONCE // window**2)):
            parts.append(_cut(Sampled(*(column[some] for column in sampled)), nuclei, size, window))
    return torch.cat(parts)[order.argsort()]


def _cut(sampled: Sampled, nuclei: Tensor, size: int, window: int) -> Tensor:
    """`mask_targets` of proposals that fit into a window of this side."""
    side = nuclei.shape[-1]
    start = sampled.boxes[:, :2].long().clamp(0, side - window)  # (R, 2), x y
    x, y = (start[..., None] + torch.arange(window, device=start.device)).unbind(1)  # (R, window) each
    pixel = (sampled.image[:, None] * side + y)[:, :, None] * side + x[:, None]  # (R, window, window)
    inside = nuclei.flatten()[pixel] == (sampled.nucleus + 1)[:, None, None]
    columns, rows = (_bin_weights(sampled.boxes[:, i::2], start[:, i], size, window, side) for i in (0, 1))
    return rows @ inside.to(rows) @ columns.mT


def _bin_weights(extent: Tensor, start: Tensor, size: int, window: int, side: int) -> Tensor:
    """Weights in bins of the pixels of windows, along one axis: float32 (R, size, window).

    extent: of the boxes, (R, 2) from and to, px; start: int64 (R,), of the windows; side: of the image
    """
    low, length = extent[:, :1], (extent[:, 1:] - extent[:, :1]).clamp(min=1)  # (R, 1)
    step = length / size
    samples = step.ceil()  # of a bin
    number = torch.arange(math.ceil(window / size), device=extent.device)
    within = (number + 0.5) * (step / samples)  # (R, G)
    at = (low + torch.arange(size, device=extent.device) * step)[..., None] + within[:, None]  # (R, size, G)
    weight = ((number < samples)[:, None] & (at >= -1) & (at <= side)) / samples[..., None]
    at = at.clamp(0, side - 1)
    near = at.long().clamp(max=side - 2)
    far_weight = (at - near) * weight
    near = (near - start[:, None, None]).clamp(0, window - 2)  # samples beyond the last, of no weight, may lie outside
    weights = extent.new_zeros(len(extent), size, window)
    return weights.scatter_add_(2, near, weight - far_weight).scatter_add_(2, near + 1, far_weight)
