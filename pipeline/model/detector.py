"""Mask R-CNN for nuclei: torchvision's parts on a timm backbone, for many small objects.

torchvision's defaults suit COCO: 100 detections, a resize to 800 px, anchors of 32 px and more, and masks
pasted into full images. Here a patch is enlarged by a stated factor and nothing else, anchors have the size of
nuclei, the limits follow from density, and masks stay on their M x M grid until they are polygons.
"""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork

from pipeline.config import STRIDES, Architecture, Detector, Sampling
from pipeline.errors import ConfigError, WeightsError
from pipeline.model import tensors, weights
from pipeline.model.deterministic import pad_rows, sigmoid, topk, upsample
from pipeline.model.device import count_up
from pipeline.model.losses import (
    Sampled,
    Targets,
    box_losses,
    likely_labels,
    mask_loss,
    proposal_losses,
    sample_proposals,
)
from pipeline.model.roi_align import FeatureTable, RoIPool, flatten_boxes
from pipeline.model.suppress import suppress

LEVELS = ("0", "1", "2", "3")  # torchvision names feature maps by strings
_LEAST_SIDE_PX = 2  # of a box in enlarged px: a thinner one is no nucleus
SMALL_PX = 3 * STRIDES[-1]  # side of an image that shows how a network is made: the coarsest map has 3 x 3 pixels
_LEAST_PROPOSALS, _LEAST_INSTANCES = 200, 100  # the limits of the smallest patches, which may be all nuclei
# Where proposals reach their limit, and more than one in so many becomes an instance, others may have been left out.
_PROPOSALS_PER_INSTANCE = 3


class Limits(NamedTuple):
    """How much one patch may hold, and which of it is kept."""

    anchors: int  # per pyramid level, the best, that enter the NMS of the proposals
    objectness: float  # lowest of a proposal
    proposals: int
    instances: int
    score: float  # lowest of an instance in one view
    nms: float  # IoU above which two boxes are one nucleus

    @classmethod
    def of_patch(cls, settings: Detector, size: tuple[int, int], mpp: float) -> "Limits":
        """The limits of a patch of this height and width, px: the densities of the settings times its area.

        The settings have a score threshold: that of their weights, where the user gave none (`as_weights_state`).
        """
        assert settings.score is not None
        area_mm2 = size[0] * size[1] * (mpp / 1000) ** 2
        proposals = max(_LEAST_PROPOSALS, round(settings.proposals_per_mm2 * area_mm2))
        return cls(
            anchors=settings.anchors_per_proposal * proposals,
            objectness=settings.objectness,
            proposals=proposals,
            instances=max(_LEAST_INSTANCES, round(settings.instances_per_mm2 * area_mm2)),
            score=settings.score,
            nms=settings.nms,
        )


class Pyramid(NamedTuple):
    """Feature maps of a batch, and the size of the images that they are of."""

    maps: list[Tensor]  # of each stride of config.STRIDES (B, C, h, w), in the precision of autocast
    table: FeatureTable  # the same to pool from; on a GPU the same memory, else in float32
    size: tuple[int, int]  # height and width of the enlarged images, px


class Candidates(NamedTuple):
    """Boxes of one patch that survived non-maximum suppression, in patch px, best first."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,)
    class_index: Tensor  # int64 (N,), from 0
    class_scores: Tensor  # float32 (N,), the probability of the class for what is a nucleus
    saturated: bool  # a limit was reached: nuclei may be missing


class NucleusDetector(nn.Module):
    """Mask R-CNN in four steps, so that the boxes of several views can be fused before any mask is made.

    `features` -> `propose` -> `classify` -> `masks`; training calls the module itself and gets the losses.
    Images are float32 (B, 3, H, W) in 0..1, boxes in patch px (before the enlargement).
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.channels
        self.backbone = backbone = _backbone(architecture.backbone)
        # the pretrained maps have large values: without a norm layer the loss becomes NaN in a few steps
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)
        self.semantic = _Semantic(channels, architecture.semantic) if architecture.semantic else None
        self.rpn = _proposal_network(architecture)
        self.roi_heads = _heads(architecture)

    def features(self, images: Tensor) -> Pyramid:
        """images: (B, 3, H, W) in 0..1 -> feature maps of the enlarged images."""
        enlarged = upsample(images, self.architecture.upscale) if self.architecture.upscale != 1 else images
        size, inputs = _size(enlarged), _inputs(enlarged)
        del enlarged  # it would occupy as much as a map while these are made
        maps = list(self.maps(inputs)[0].values())
        # pooling in bfloat16 is slow on a CPU
        table = FeatureTable.of(maps, torch.float32 if images.device.type == "cpu" else None)
        return Pyramid(table.maps() if table.pixels.dtype == maps[0].dtype else maps, table, size)

    def maps(self, inputs: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Feature maps of `_inputs`, and the semantic branch's at the finest: (B, architecture.semantic, h, w)."""
        maps = self.backbone(inputs)
        pyramid = self.pyramid(OrderedDict(zip(LEVELS, maps, strict=True)))
        semantic = None
        if self.semantic is not None:
            pyramid[LEVELS[0]], semantic = self.semantic(pyramid[LEVELS[0]])
        return pyramid, semantic

    def propose(self, features: Pyramid, limits: Limits) -> list[Tensor]:
        """Region proposals of each image, (P, 4) in enlarged px, best first, within the limits; the best anchors only.

        What torchvision's RegionProposalNetwork does, for all images together.
        """
        logits, deltas = self.rpn.head(features.maps)
        return self._proposals([_peaks(score) for score in logits], deltas, features, limits)

    def _proposals(self, logits: list[Tensor], deltas: list[Tensor], features: Pyramid, limits: Limits) -> list[Tensor]:
        """logits, deltas: of each level, (B, A, h, w) and (B, A * 4, h, w)."""
        objectness, offsets, anchors = [], [], []
        for score, delta, grid in zip(logits, deltas, self._anchor_grids(features.table), strict=True):
            score = score.permute(0, 2, 3, 1).flatten(1)  # (B, h * w * A)
            delta = delta.permute(0, 2, 3, 1).reshape(*score.shape, 4)
            best, index = topk(score, min(limits.anchors, score.shape[1]))  # (B, n)
            objectness.append(best)
            offsets.append(delta.gather(1, index[..., None].expand(-1, -1, 4)))
            anchors.append(grid.flatten(0, 2)[index])
        numbers = count_up(len(anchors), features.table.pixels.device).split(1)
        level = torch.cat([number.expand(some.shape[1]) for number, some in zip(numbers, anchors, strict=True)])
        boxes = _decode(torch.cat(offsets, 1).float(), torch.cat(anchors, 1), self.rpn.box_coder)  # (B, N, 4)
        boxes = _clip(boxes, features.size)
        scores = torch.cat(objectness, 1).float().sigmoid()
        wide = (boxes[..., 2:] - boxes[..., :2] >= self.rpn.min_size).all(-1)
        image, at = torch.where(wide & (scores >= limits.objectness))
        boxes, scores = boxes[image, at], scores[image, at]
        images, iou = features.table.images, self.rpn.nms_thresh
        keep, counts = suppress(boxes, scores, image, images, level=level[at], iou=iou)
        return [b[: limits.proposals] for b in boxes[keep].split(counts)]

    def _anchor_grids(self, table: FeatureTable) -> list[Tensor]:
        """All anchors of the maps of a table, in px of their images: of each level, float32 (h, w, A, 4)."""
        return _anchor_grids(self.rpn.anchor_generator, table.shapes, table.pixels.device)

    def classify(self, features: Pyramid, proposals: list[Tensor], limits: Limits) -> list[Candidates]:
        """Proposals -> boxes with class and score, after class-agnostic NMS, in patch px.

        The score is the probability of being a nucleus, of whatever class: doubt between two classes does not lower it.
        The score of the class is its share in that probability.
        """
        heads = self.roi_heads
        rois, image = flatten_boxes(proposals)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features.table, rois, image)))
        classes = logits.softmax(-1)  # (P, 1 + K)
        scores, (best, class_index) = classes[:, 1:].sum(1), classes[:, 1:].max(1)
        class_scores = best / scores.clamp(min=torch.finfo(scores.dtype).tiny)
        deltas = _of_class(deltas.view(*logits.shape, 4), class_index)  # (P, 4)
        boxes = _clip(_decode(deltas, rois, heads.box_coder), features.size)
        shorter = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        likely = torch.where((scores >= limits.score) & (shorter >= _LEAST_SIDE_PX))[0]
        boxes, scores, class_index, class_scores, image = (
            column[likely] for column in (boxes, scores, class_index, class_scores, image)
        )
        keep, counts = suppress(boxes, scores, image, len(proposals), iou=limits.nms)
        boxes = boxes[keep] / self.architecture.upscale
        columns = (c.split(counts) for c in (boxes, scores[keep], class_index[keep], class_scores[keep]))
        most = limits.instances
        return [
            Candidates(b[:most], s[:most], c[:most], p[:most], _saturated(len(b), len(offered), limits))
            for b, s, c, p, offered in zip(*columns, proposals, strict=True)
        ]

    def masks(self, features: Pyramid, boxes: list[Tensor], class_index: list[Tensor]) -> Tensor:
        """Mask probabilities float32 (sum N, M, M) of all images' boxes (patch px): the grid spans the box."""
        heads = self.roi_heads
        rois, image = flatten_boxes(boxes)
        # torchvision samples the masks it trains on half a pixel beyond their boxes (RoIAlign without `aligned`)
        pooled = heads.mask_roi_pool(features.table, rois * self.architecture.upscale - 0.5, image)
        logits = heads.mask_predictor(heads.mask_head(_convolvable(pad_rows(pooled))))[: len(pooled)]
        return sigmoid(_of_class(logits, torch.cat(class_index)).float())

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Losses of a training step, on crops that were cut at the enlarged scale: (B, 3, S, S) in 0..1."""
        levels, semantic = self.maps(_inputs(images))
        maps = list(levels.values())
        logits, deltas = self.rpn.head(maps)
        features = Pyramid(maps, FeatureTable.of([m.float() for m in maps], torch.float32), _size(images))
        losses = proposal_losses(self.rpn, logits, deltas, self._anchor_grids(features.table), targets.boxes)
        with torch.no_grad():  # neither head learns from where the proposals are
            proposals = self._proposals(logits, deltas, features, _limits(self.architecture.sampling))
        losses |= self._head_losses(features, proposals, targets)
        if self.semantic is not None and semantic is not None:
            losses["loss_semantic"] = self.semantic.loss(semantic, targets.regions)
        return losses

    def _head_losses(self, features: Pyramid, proposals: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        heads = self.roi_heads
        sampled = sample_proposals(heads, proposals, targets)
        pooled = heads.box_roi_pool(features.table, sampled.boxes, sampled.image)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        positive = torch.where(sampled.labels > 0)[0]
        losses = box_losses(heads, logits, deltas, sampled, positive)
        masked = Sampled(*(column[positive] for column in sampled))
        masked = masked._replace(labels=likely_labels(logits[positive], masked.labels))
        pooled = heads.mask_roi_pool(features.table, masked.boxes, masked.image)
        logits = heads.mask_predictor(heads.mask_head(_convolvable(pooled)))[: len(pooled)]
        return {**losses, "loss_mask": mask_loss(logits, masked, targets.nuclei)}


def _limits(sampling: Sampling) -> Limits:
    """Of the proposals in training."""
    return Limits(
        anchors=sampling.before_nms, objectness=0.0, proposals=sampling.after_nms, instances=0, score=0.0, nms=1.0
    )


def _inputs(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 -> -1..1, in the precision and layout in which the backbone computes."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    return (images * 2 - 1).to(dtype, memory_format=torch.channels_last)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _saturated(kept: int, offered: int, limits: Limits) -> bool:
    """Whether a patch may hold more nuclei than were kept: a limit, of the instances or of the proposals, was reached.

    kept: boxes that survived non-maximum suppression; offered: proposals that they come from
    """
    return kept > limits.instances or (
        offered >= limits.proposals and kept > limits.proposals // _PROPOSALS_PER_INSTANCE
    )


@functools.lru_cache(maxsize=8)
def _anchor_grids(generator: AnchorGenerator, maps: tuple[tuple[int, int], ...], device: torch.device) -> list[Tensor]:
    """`NucleusDetector._anchor_grids` for maps of these heights and widths. Made once per network, size and device."""
    grids = []
    with torch.inference_mode():  # whatever the caller's mode is: they outlive that
        for shapes, (height, width), stride in zip(generator.cell_anchors, maps, STRIDES, strict=True):
            y, x = (torch.arange(n) * stride for n in (height, width))
            corner = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)  # (h, w, 2)
            grids.append((shapes.float().cpu() + corner.repeat(1, 1, 2)[:, :, None]).to(device))
    return grids


def _peaks(logits: Tensor) -> Tensor:
    """Objectness (B, A, h, w) of the anchors that no neighbour of the same shape exceeds; of all others -inf.

    An anchor beside a better one gives nearly the same proposal, which NMS would drop later. When such anchors are left
    out first, a usual patch stays below the limits, so what is proposed for a nucleus does not depend on what else its
    patch holds.
    """
    return logits.where(logits == _largest_around(logits), -torch.inf)


def _largest_around(values: Tensor) -> Tensor:
    """The largest of each 3 x 3 pixels (B, A, h, w). On a CPU torch's pooling takes 40 times as long as this."""
    if values.device.type != "cpu":
        return F.max_pool2d(values, 3, 1, 1)
    for dim in (-1, -2):
        count, largest = values.shape[dim] - 1, values.clone()
        low, high = largest.narrow(dim, 0, count), largest.narrow(dim, 1, count)
        torch.maximum(low, values.narrow(dim, 1, count), out=low)
        torch.maximum(high, values.narrow(dim, 0, count), out=high)
        values = largest
    return values


def _convolvable(rows: Tensor) -> Tensor:
    """Rows (N, C, H, W), on a GPU with rows of zeros appended; the caller takes the first N of what it computes.

    cuDNN plans a convolution anew for each number of rows, which takes 20 ms on an H200, and no two batches hold the
    same number of nuclei: so it is 0, a power of two from 64 on, or a multiple of 1024.
    """
    count = len(rows)
    if rows.device.type == "cpu" or count == 0:
        return rows
    wanted = -(-count // 1024) * 1024 if count > 1024 else max(64, 1 << (count - 1).bit_length())
    return F.pad(rows, (0, 0, 0, 0, 0, 0, 0, wanted - count))


def _of_class(values: Tensor, class_index: Tensor) -> Tensor:
    """Of each row, the values of its own class: (N, 1 + K, ...) -> (N, ...).

    values: of the background and of K classes; class_index: int64 (N,), the class of each row, from 0
    """
    if values.shape[1] == 2:
        return values[:, 1]
    index = class_index.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values[:, 1:].gather(1, index).squeeze(1)


def _decode(deltas: Tensor, anchors: Tensor, coder: BoxCoder) -> Tensor:
    """Boxes (..., 4) from their offsets to `anchors` (..., 4): as BoxCoder.decode, which uploads numbers."""
    sides = anchors[..., 2:] - anchors[..., :2]
    centres = torch.add(anchors[..., :2], sides, alpha=0.5)
    (across, _, wider, _) = coder.weights  # the same along x and y
    centres = deltas[..., :2] / across * sides + centres
    sides = (deltas[..., 2:] / wider).clamp(max=coder.bbox_xform_clip).exp() * sides
    return torch.cat([centres.sub(sides, alpha=0.5), centres.add(sides, alpha=0.5)], -1)


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of boxes (..., 4) that lies within an image of this height and width."""
    return boxes.clamp(*_bounds(size, boxes.device))


@functools.lru_cache(maxsize=64)
def _bounds(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and the largest coordinates of a box in an image, float32 (4,). Made once per size and device."""
    height, width = size
    with torch.inference_mode(False):  # they outlive the caller's mode
        largest = torch.tensor([width, height, width, height], dtype=torch.float32).to(device)
        return torch.zeros_like(largest), largest


def _proposal_network(architecture: Architecture) -> RegionProposalNetwork:
    sampling = architecture.sampling
    return RegionProposalNetwork(
        AnchorGenerator(architecture.anchors, (architecture.ratios,) * len(architecture.anchors)),
        RPNHead(architecture.channels, len(architecture.ratios) * len(architecture.anchors[0])),
        fg_iou_thresh=sampling.anchor_positive_iou,
        bg_iou_thresh=sampling.anchor_negative_iou,
        batch_size_per_image=sampling.anchors,
        positive_fraction=sampling.anchors_positive,
        # not used: see `_proposals`
        pre_nms_top_n={"training": sampling.before_nms, "testing": sampling.before_nms},
        post_nms_top_n={"training": sampling.after_nms, "testing": sampling.after_nms},
        nms_thresh=architecture.proposal_nms,
    )


def _heads(architecture: Architecture) -> RoIHeads:
    """The box head and the mask head."""
    channels, hidden, sampling = architecture.channels, architecture.mask_channels, architecture.sampling
    classes = 1 + len(architecture.classes)  # 0 is the background
    mask_layers: list[nn.Module] = []
    for layer in range(architecture.mask_layers):
        mask_layers += [nn.Conv2d(hidden if layer else channels, hidden, 3, padding=1), nn.ReLU(inplace=True)]
    return RoIHeads(
        box_roi_pool=_pool(architecture, architecture.box_pool),
        box_head=_BoxHead(channels * architecture.box_pool**2, architecture.box_hidden),
        box_predictor=_BoxPredictor(architecture.box_hidden, classes),
        fg_iou_thresh=sampling.proposal_positive_iou,
        bg_iou_thresh=sampling.proposal_negative_iou,
        batch_size_per_image=sampling.proposals,
        positive_fraction=sampling.proposals_positive,
        bbox_reg_weights=None,
        # of torchvision's inference, which `classify` takes the place of
        score_thresh=0.0,
        nms_thresh=1.0,
        detections_per_img=1,
        mask_roi_pool=_pool(architecture, architecture.mask_size // 2),
        mask_head=nn.Sequential(*mask_layers),
        mask_predictor=_MaskPredictor(
            nn.ConvTranspose2d(hidden, hidden, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(hidden, classes, 1)
        ),
    )


def _pool(architecture: Architecture, size: int) -> RoIPool:
    return RoIPool(size, STRIDES, architecture.canonical_px, architecture.canonical_level)


class _Semantic(nn.Module):
    """Classifies every pixel of the finest map, before any box, as background, inside or edge of a nucleus.

    Dense supervision trains the finest map much sooner than boxes do. The branch's features are added to that map, so
    that both heads use them (after Chen et al. 2019, hybrid task cascade; Zhang et al. 2018, Cell R-CNN, for nuclei).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.add = nn.Conv2d(hidden, channels, 1)
        self.score = nn.Conv2d(hidden, 3, 1)

    def forward(self, finest: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, h, w) -> the same, (B, hidden, h, w)
        features = self.look(finest)
        return finest + self.add(features), features

    def loss(self, features: Tensor, regions: Tensor) -> Tensor:
        """Cross entropy at the map's pixels; regions: uint8 (B, S, S), sampled at their centres."""
        step = regions.shape[-1] // features.shape[-1]
        truth = regions[:, step // 2 :: step, step // 2 :: step].long()
        return F.cross_entropy(self.score(features).float(), truth)


class _BoxHead(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, pooled: Tensor) -> Tensor:  # (P, C, 7, 7) -> (P, hidden)
        out: Tensor = self.layers(pad_rows(pooled.flatten(1)))[: len(pooled)]
        return out


class _MaskPredictor(nn.Sequential):
    """Doubles the resolution, and scores every class: (N, C, m, m) -> (N, classes, 2m, 2m).

    Training takes matrix products, which give the same values: on a CPU the backward pass of a transposed convolution
    takes many times as long. Kernels of 2 px, 2 px apart, do not overlap, so the four pixels that one becomes are four
    parts of a row until they have been scored.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            out: Tensor = super().forward(x)
            return out
        double, _, score = self
        assert isinstance(double, nn.ConvTranspose2d)
        assert isinstance(score, nn.Conv2d)
        assert double.bias is not None
        assert score.bias is not None
        count, channels, side, _ = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # (N * m * m, C)
        weight = double.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (C, H, 2, 2) -> (2 * 2 * H, C)
        hidden = F.relu(F.linear(rows, weight, double.bias.repeat(4)), inplace=True)
        scores = F.linear(hidden.view(-1, len(double.bias)), score.weight.flatten(1), score.bias)
        scores = scores.view(count, side, side, 2, 2, len(score.bias))
        return scores.permute(0, 5, 1, 3, 2, 4).reshape(count, len(score.bias), 2 * side, 2 * side)


class _BoxPredictor(nn.Module):
    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden, classes)
        self.offset = nn.Linear(hidden, classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (P, hidden) -> (P, classes), (P, classes * 4)
        return self.score(x).float(), self.offset(x).float()


def save_weights(model: NucleusDetector, path: Path, notes: Mapping[str, str]) -> None:
    """Half-precision safetensors with the architecture, notes and a checksum of the tensors inside."""
    tensors.save(model, model.architecture, path, notes)


def _backbone(name: str) -> Any:
    """timm's network with feature maps at STRIDES, untrained. Raises ConfigError where timm has none of that name."""
    return timm.create_model(name, features_only=True, out_indices=_maps_at_strides(name))


@functools.cache
def _maps_at_strides(name: str) -> tuple[int, ...]:
    """Which of the feature maps of timm's network of that name are those at STRIDES. Raises ConfigError.

    It is built and called without memory, as timm has networks for images of one size, or with maps in another order.
    """
    side = SMALL_PX
    try:
        with torch.device("meta"), torch.inference_mode():
            probe: Any = timm.create_model(name, features_only=True).eval()
            maps = [tuple(m.shape) for m in probe(torch.empty(1, 3, side, side))]
            channels, strides = probe.feature_info.channels(), probe.feature_info.reduction()
    except Exception as error:  # whatever a network of timm's does not do
        raise ConfigError(
            f"backbone={name!r}: timm {timm.__version__} cannot build it for images of any size ({error}): need a "
            f"model with feature maps at strides {STRIDES}"
        ) from error
    wanted = [(1, c, side // stride, side // stride) for c, stride in zip(channels, strides, strict=True)]
    if not set(STRIDES) <= set(strides) or maps != wanted:
        raise ConfigError(
            f"backbone={name!r} has maps at strides {tuple(strides)}, of shapes {maps} for {side} px: need a model "
            f"with {STRIDES}, channels first"
        )
    return tuple(strides.index(stride) for stride in STRIDES)


def load_weights(path: Path) -> NucleusDetector:
    """The detector that a weights file holds, in float32, ready for inference.

    Raises WeightsError where the file is damaged (checksum), not a Nightslide file, or does not fit the
    architecture that it names. Nothing is unpickled.
    """
    architecture = weights.detector_architecture(path)

    def build() -> NucleusDetector:
        try:
            return NucleusDetector(architecture)
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"{path} does not fit the architecture it names: {error}") from error

    return tensors.load_into(build, path).to(memory_format=torch.channels_last)
