"""Mask R-CNN for nuclei: torchvision's parts on a timm backbone, tuned to many small objects.

torchvision's defaults suit COCO: 100 detections, a resize to 800 px, anchors of 32 px and more, and masks
pasted into full images. Here a patch is enlarged by a stated factor and nothing else, anchors are nuclei's,
the caps follow from density, and masks stay on their M x M grid until they are polygons.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image

from pipeline.config import STRIDES, Architecture
from pipeline.errors import ConfigError, WeightsError
from pipeline.model import weights
from pipeline.model.deterministic import pad_rows, sigmoid, upsample
from pipeline.model.roi_align import RoIPool

LEVELS = ("0", "1", "2", "3")  # torchvision names feature maps by strings
RATIOS = (0.5, 1.0, 2.0)
LEAST_OBJECTNESS = 0.3  # of a proposal that is worth a look: of those below, next to none becomes a nucleus
# Every nucleus draws some ten anchors. Where no more of them enter the suppression than may leave it, the clearest
# nuclei of a crowded patch crowd out the others.
ANCHORS_PER_PROPOSAL = 2


class Caps(NamedTuple):
    """How much one patch may hold."""

    proposals: int
    instances: int


class Candidates(NamedTuple):
    """Boxes of one patch that survived non-maximum suppression, in patch px, best first."""

    boxes: Tensor  # float32 (N, 4)
    scores: Tensor  # float32 (N,)
    classes: Tensor  # int64 (N,), 0-based
    saturated: bool  # a cap was reached: nuclei may be missing


class NucleusDetector(nn.Module):
    """Mask R-CNN in four verbs, so that several views can share boxes before any mask is made.

    `features` -> `propose` -> `classify` -> `masks`; training calls the module itself and gets the losses.
    Images are float32 (B, 3, H, W) in 0..1, boxes in patch px (before the enlargement).
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.channels
        self.backbone = backbone = _backbone(architecture.backbone)
        # the pretrained maps have a deviation of about 10: without a norm layer the loss is NaN in a few steps
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)
        self.semantic = _Semantic(channels, architecture.semantic) if architecture.semantic else None
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(architecture.anchors, (RATIOS,) * len(architecture.anchors)),
            _ProposalHead(channels, len(RATIOS) * len(architecture.anchors[0])),
            fg_iou_thresh=0.6,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 1500, "testing": 1500},
            post_nms_top_n={"training": 1000, "testing": 1500},
            nms_thresh=0.7,
        )
        mask_layers: list[nn.Module] = []
        for layer in range(architecture.mask_layers):
            mask_layers += [
                nn.Conv2d(
                    architecture.mask_channels if layer else channels,
                    architecture.mask_channels,
                    3,
                    padding=1,
                ),
                nn.ReLU(inplace=True),
            ]
        self.roi_heads = RoIHeads(
            box_roi_pool=RoIPool(7, STRIDES, canonical_px=64, canonical_level=3),
            box_head=_BoxHead(channels * 49, architecture.box_hidden),
            box_predictor=_BoxPredictor(architecture.box_hidden, 1 + len(architecture.classes)),
            # a gap between what counts as nucleus and as background: in between, annotators disagree too
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.4,
            batch_size_per_image=192,
            positive_fraction=0.35,
            bbox_reg_weights=None,
            score_thresh=0.0,
            nms_thresh=0.5,
            detections_per_img=1,
            mask_roi_pool=RoIPool(architecture.mask_size // 2, STRIDES, canonical_px=64, canonical_level=3),
            mask_head=nn.Sequential(*mask_layers),
            mask_predictor=nn.Sequential(
                nn.ConvTranspose2d(architecture.mask_channels, architecture.mask_channels, 2, 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(architecture.mask_channels, 1 + len(architecture.classes), 1),
            ),
        )

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W) in 0..1 -> feature maps at strides 4 to 32 of the enlarged image."""
        if self.architecture.upscale != 1:
            images = upsample(images, self.architecture.upscale)
        return self._maps(images)[0]

    def _maps(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Feature maps, and what the semantic branch saw at the finest of them, (B, architecture.semantic, h, w)."""
        images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(images)
        pyramid = self.pyramid(OrderedDict(zip(LEVELS, maps, strict=True)))
        seen = None
        if self.semantic is not None:
            pyramid[LEVELS[0]], seen = self.semantic(pyramid[LEVELS[0]])
        return {level: map_.float() for level, map_ in pyramid.items()}, seen  # each head pools float32

    def propose(self, features: Mapping[str, Tensor], side: tuple[int, int], caps: Caps) -> list[Tensor]:
        """Region proposals of each image, (P, 4) in enlarged px, at most caps.proposals; few where little is."""
        self.rpn.score_thresh = LEAST_OBJECTNESS  # in training every proposal teaches
        self.rpn._pre_nms_top_n = {"training": 1500, "testing": ANCHORS_PER_PROPOSAL * caps.proposals}
        self.rpn._post_nms_top_n = {"training": 1000, "testing": caps.proposals}
        sizes = [side] * features["0"].shape[0]
        images = ImageList(features["0"].new_empty((len(sizes), 1, *side)), sizes)
        proposals: list[Tensor] = self.rpn(images, dict(features))[0]
        return proposals

    def classify(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        side: tuple[int, int],
        caps: Caps,
        score: float,
        nms: float,
    ) -> list[Candidates]:
        """Proposals -> boxes with class and score, after class-agnostic NMS, in patch px.

        The score is that of being a nucleus, of whatever class: one that could be of two is no less one.
        """
        heads = self.roi_heads
        pooled = heads.box_roi_pool(dict(features), proposals, [side] * len(proposals))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        counts = [len(p) for p in proposals]
        decoded = heads.box_coder.decode(deltas, proposals)
        # without any proposal torchvision leaves the boxes flat
        decoded = decoded.reshape(*logits.shape, 4).split(counts)  # (P, 1 + K, 4) each
        probabilities = logits.softmax(-1).split(counts)  # (P, 1 + K) each
        found = []
        for boxes, chances, offered in zip(decoded, probabilities, counts, strict=True):
            best, klass = chances[:, 1:].sum(1), chances[:, 1:].argmax(1)
            boxes = boxes[torch.arange(len(boxes), device=boxes.device), klass + 1]  # (P, 4)
            boxes = clip_boxes_to_image(boxes, side)
            width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
            keep = torch.where((best >= score) & (width >= 2) & (height >= 2))[0]
            keep = keep[batched_nms(boxes[keep], best[keep], torch.zeros_like(keep), nms)]
            saturated = (offered >= caps.proposals and len(keep) > caps.proposals // 3) or len(keep) > caps.instances
            keep = keep[: caps.instances]
            found.append(Candidates(boxes[keep] / self.architecture.upscale, best[keep], klass[keep], saturated))
        return found

    def masks(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        classes: list[Tensor],
        side: tuple[int, int],
    ) -> list[Tensor]:
        """Soft masks float32 (N, M, M) in 0..1 of each image's boxes (patch px): the grid spans the box."""
        heads = self.roi_heads
        # torchvision samples the masks it trains on half a pixel beyond their boxes (RoIAlign without `aligned`)
        enlarged = [b * self.architecture.upscale - 0.5 for b in boxes]
        pooled = heads.mask_roi_pool(dict(features), enlarged, [side] * len(boxes))
        logits = heads.mask_predictor(heads.mask_head(pad_rows(pooled)))[: len(pooled)]  # (sum N, 1 + K, M, M)
        klass = torch.cat(classes) + 1
        chosen = logits[torch.arange(len(logits), device=logits.device), klass]  # (sum N, M, M)
        soft = sigmoid(chosen.float())
        return list(torch.split(soft, [len(b) for b in boxes]))

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a training step, on crops that were cut at the enlarged scale: (B, 3, S, S) in 0..1.

        targets, in the crops' own pixels: boxes float32 (N, 4), labels int64 (N,) 1-based, masks uint8 (N, S, S),
        and for the semantic branch regions uint8 (S, S): 0 background, 1 inside a nucleus, 2 its edge.
        """
        features, seen = self._maps(images)
        self.rpn.score_thresh = 0.0
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        _, head_losses = self.roi_heads(features, proposals, sizes, targets)
        if self.semantic is not None and seen is not None:
            losses["loss_semantic"] = self.semantic.loss(seen, torch.stack([t["regions"] for t in targets]))
        return {**losses, **head_losses}

    def side(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """(height, width) of an image after the enlargement."""
        return int(shape[0] * self.architecture.upscale), int(shape[1] * self.architecture.upscale)


class _ProposalHead(RPNHead):  # type: ignore[misc] # torchvision is not typed
    """Under autocast torchvision would compute boxes, and the targets of training, in bfloat16's 8 bits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class _Semantic(nn.Module):
    """A look at every pixel before any at boxes: background, inside or edge of a nucleus.

    Dense supervision teaches the finest map much sooner than boxes do, and what it saw is added to that map, so
    that both heads see it (after Chen et al. 2019, hybrid task cascade; Zhang et al. 2018, Cell R-CNN, for nuclei).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.add = nn.Conv2d(hidden, channels, 1)
        self.score = nn.Conv2d(hidden, 3, 1)

    def forward(self, finest: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, h, w) -> the same, (B, hidden, h, w)
        seen = self.look(finest)
        return finest + self.add(seen), seen

    def loss(self, seen: Tensor, regions: Tensor) -> Tensor:
        """Cross entropy at the map's pixels; regions: uint8 (B, S, S), sampled at their centres."""
        step = regions.shape[-1] // seen.shape[-1]
        wanted = regions[:, step // 2 :: step, step // 2 :: step].long()
        return F.cross_entropy(self.score(seen).float(), wanted)


class _BoxHead(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, pooled: Tensor) -> Tensor:  # (P, C, 7, 7) -> (P, hidden)
        out: Tensor = self.layers(pad_rows(pooled.flatten(1)))[: len(pooled)]
        return out


class _BoxPredictor(nn.Module):
    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden, classes)
        self.offset = nn.Linear(hidden, classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (P, hidden) -> (P, classes), (P, classes * 4)
        return self.score(x).float(), self.offset(x).float()


def caps(side_px: int, mpp: float, proposals_per_mm2: int, instances_per_mm2: int) -> Caps:
    """What a square patch may hold, from densities per mm2."""
    area_mm2 = (side_px * mpp / 1000) ** 2
    return Caps(max(200, round(proposals_per_mm2 * area_mm2)), max(100, round(instances_per_mm2 * area_mm2)))


def save_weights(model: NucleusDetector, path: Path, notes: Mapping[str, str]) -> None:
    """Half-precision safetensors with the architecture, notes and a checksum of the tensors inside."""
    weights.save(model, model.architecture, path, notes)


def _backbone(name: str) -> Any:
    """timm's network with maps at STRIDES, untrained. Raises ConfigError where timm has no such one."""
    try:
        backbone: Any = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
    except (RuntimeError, IndexError) as error:
        raise ConfigError(f"backbone={name!r}: timm {timm.__version__} cannot build it ({error})") from error
    strides = tuple(backbone.feature_info.reduction())
    if strides != STRIDES:
        raise ConfigError(f"backbone={name!r} has maps at strides {strides}: need a model with {STRIDES}")
    return backbone


def load_weights(path: Path) -> NucleusDetector:
    """The detector that a weights file holds, in float32, ready for inference.

    Raises WeightsError where the file is damaged (checksum), not a Nightslide file, or does not fit the
    architecture that it names. Nothing is unpickled.
    """
    architecture = weights.detector_architecture(path)
    try:
        model = NucleusDetector(architecture)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} does not fit the architecture it names: {error}") from error
    return weights.load_into(model, path).to(memory_format=torch.channels_last)


def fold(model: NucleusDetector) -> NucleusDetector:
    """Fold every batch norm into the convolution that feeds it, in place: for inference only, a tenth less to do.

    Law: the folded model gives the same features, within rounding.
    """
    before: nn.Conv2d | None = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            before = module
        elif isinstance(module, nn.BatchNorm2d) and before is not None:
            mean, variance = module.running_mean, module.running_var
            assert mean is not None  # a batch norm without statistics cannot be saved, let alone loaded
            assert variance is not None
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, mean, variance, module.eps, module.weight, module.bias
            )
            parent, _, own = name.rpartition(".")
            # timm's norm layers carry the activation that follows
            setattr(model.get_submodule(parent), own, getattr(module, "act", nn.Identity()))
            before = None
    return model.to(memory_format=torch.channels_last)
