"""Mask R-CNN for nuclei: torchvision's parts on a timm backbone, tuned to many small objects.

torchvision's defaults suit COCO: 100 detections, a resize to 800 px, anchors of 32 px and more, and masks
pasted into full images. Here a patch is enlarged by a stated factor and nothing else, anchors are nuclei's,
the caps follow from density, and masks stay on their M x M grid until they are polygons.
"""

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from pipeline.config import Architecture, ConfigError, build

LEVELS = ("0", "1", "2", "3")  # strides 4, 8, 16, 32; torchvision names feature maps by strings
RATIOS = (0.5, 1.0, 2.0)
LEAST_OBJECTNESS = 0.05  # of a proposal that is worth a look


class WeightsError(ConfigError):
    """A weights file that is missing, damaged, not ours, or of another architecture."""


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
        backbone: Any = timm.create_model(architecture.backbone, features_only=True, out_indices=(1, 2, 3, 4))
        self.backbone = backbone
        # the pretrained maps have a deviation of about 10: without a norm layer the loss is NaN in a few steps
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)
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
            box_roi_pool=MultiScaleRoIAlign(LEVELS, 7, 2, canonical_scale=64, canonical_level=3),
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
            mask_roi_pool=MultiScaleRoIAlign(
                LEVELS, architecture.mask_size // 2, 2, canonical_scale=64, canonical_level=3
            ),
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
            images = F.interpolate(images, scale_factor=self.architecture.upscale, mode="bilinear", align_corners=False)
        return self._maps(images)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(images)
        pyramid = self.pyramid(OrderedDict(zip(LEVELS, maps, strict=True)))
        return {level: map_.float() for level, map_ in pyramid.items()}  # RoIAlign wants float32, in each head

    def propose(self, features: Mapping[str, Tensor], side: tuple[int, int], caps: Caps) -> list[Tensor]:
        """Region proposals of each image, (P, 4) in enlarged px, at most caps.proposals; few where little is."""
        self.rpn.score_thresh = LEAST_OBJECTNESS  # in training every proposal teaches
        self.rpn._pre_nms_top_n = {"training": 1500, "testing": caps.proposals}
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
        """Proposals -> boxes with class and score, after class-agnostic NMS, in patch px."""
        heads = self.roi_heads
        pooled = heads.box_roi_pool(dict(features), proposals, [side] * len(proposals))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        counts = [len(p) for p in proposals]
        decoded = heads.box_coder.decode(deltas, proposals).split(counts)  # (P, 1 + K, 4) each
        probabilities = logits.softmax(-1).split(counts)  # (P, 1 + K) each
        found = []
        for boxes, chances, offered in zip(decoded, probabilities, counts, strict=True):
            best, klass = chances[:, 1:].max(1)
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
        logits = heads.mask_predictor(heads.mask_head(pooled))  # (sum N, 1 + K, M, M)
        klass = torch.cat(classes) + 1
        chosen = logits[torch.arange(len(logits), device=logits.device), klass]  # (sum N, M, M)
        return list(chosen.float().sigmoid().split([len(b) for b in boxes]))

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a training step, on crops that were cut at the enlarged scale: (B, 3, S, S) in 0..1.

        targets, in the crops' own pixels: boxes float32 (N, 4), labels int64 (N,) 1-based, masks uint8 (N, S, S).
        """
        features = self._maps(images)
        self.rpn.score_thresh = 0.0
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        _, head_losses = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **head_losses}

    def side(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """(height, width) of an image after the enlargement."""
        return int(shape[0] * self.architecture.upscale), int(shape[1] * self.architecture.upscale)


class _ProposalHead(RPNHead):  # type: ignore[misc] # torchvision is not typed
    """Under autocast torchvision would compute boxes, and the targets of training, in bfloat16's 8 bits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class _BoxHead(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, pooled: Tensor) -> Tensor:  # (P, C, 7, 7) -> (P, hidden)
        out: Tensor = self.layers(pooled.flatten(1))
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


def shipped() -> tuple[str, ...]:
    """Names of the weights that come with the package."""
    folder = resources.files("pipeline") / "weights"
    return tuple(
        sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir() if f.name.endswith(".safetensors"))
    )


def find_weights(name: str) -> Path:
    """Path of shipped weights by name, or of a file. Raises WeightsError when there is neither."""
    if name in shipped():
        return Path(str(resources.files("pipeline") / "weights" / f"{name}.safetensors"))
    path = Path(name)
    if not path.is_file():
        raise WeightsError(
            f"no weights '{name}': need a .safetensors file or one of the shipped names ({', '.join(shipped())})"
        )
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(model: NucleusDetector, path: Path, notes: Mapping[str, str]) -> None:
    """Half-precision safetensors with the architecture, notes and a checksum of the tensors inside."""
    tensors = {
        name: (t.detach().cpu().half() if t.is_floating_point() else t.detach().cpu()).clone().contiguous()
        for name, t in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    metadata = {
        **notes,
        "architecture": json.dumps(dataclasses.asdict(model.architecture)),
        "sha256": _content_sha256({k: v.flatten() for k, v in tensors.items()}),
    }
    safetensors.torch.save_file(tensors, path, metadata)


def read_notes(path: Path) -> dict[str, str]:
    """The text a weights file carries: architecture, checksum, recipe, licence."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from error


def read_architecture(path: Path) -> Architecture:
    """What a weights file says of its network. Raises WeightsError where it says nothing, or nonsense."""
    notes = read_notes(path)
    if "architecture" not in notes or "sha256" not in notes:
        raise WeightsError(f"{path} holds no Nightslide detector: need a file written by 'nightslide train'")
    try:
        return build(Architecture, json.loads(notes["architecture"]), f"{path}: architecture")
    except ValueError as error:  # ConfigError and JSONDecodeError
        raise WeightsError(f"{path} names no architecture that can be built: {error}") from error


def load_weights(path: Path) -> NucleusDetector:
    """The detector that a weights file holds, in float32, ready for inference.

    Raises WeightsError where the file is damaged (checksum), not a Nightslide file, or does not fit the
    architecture that it names. Nothing is unpickled.
    """
    architecture, checksum = read_architecture(path), read_notes(path)["sha256"]
    tensors = safetensors.torch.load_file(path)
    if _content_sha256({k: v.flatten() for k, v in tensors.items()}) != checksum:
        raise WeightsError(f"{path} is damaged: its tensors do not match their checksum; download or copy it again")
    try:
        model = NucleusDetector(architecture)
        missing, unknown = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} does not fit the architecture it names: {error}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise WeightsError(f"{path} does not fit its architecture: missing {missing[:3]}, unknown {list(unknown)[:3]}")
    return model.eval().to(memory_format=torch.channels_last)


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU if there is one. Raises WeightsError's cousin ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: need cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}: this machine shows {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the device multiplies in it (CUDA, CPUs with AVX512-BF16 or AMX), else float32."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    capable = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if capable else torch.float32


def _cpu_has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx"))
