"""Every setting and its default: the only place where a default is written.

The command line and the TOML file are derived from these dataclasses. `Settings` is what a run does to
its slides, and its `digest` names that; `Execution` is how the work is scheduled, and never changes a result.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter, Token

from pipeline.errors import ConfigError
from pipeline.text import printable

# The headings of --help, in their order.
COMMON = Group("Common options", sort_key=1)
TISSUE, TILING, STAIN, DETECTOR, STITCHING, REGIONS, EXPORT, EXECUTION = (
    Group(name, sort_key=number)
    for number, name in enumerate(
        ("Tissue", "Tiling", "Stain", "Detector", "Stitching", "Regions", "Export", "Execution"), 2
    )
)
NO_NEGATIVE = Parameter(negative="")  # a flag or a list without its --no-... or --empty-...

STRIDES = (4, 8, 16, 32)  # of the feature maps, in enlarged px

# How far what lies around a nucleus changes its detection, in enlarged px: measured by workflows/benchmarks/tilings.py
CONTEXT_PX = 192

# How far the views but the first are shifted, px: no multiple of a stride, so that anchors lie elsewhere on the nuclei.
VIEW_SHIFT_PX = 5


def side_step(upscale: float = 1.0) -> int:
    """The px that an image's side must be a multiple of, so that enlarged it is one of the coarsest stride.

    The feature maps of other sides are rounded to whole pixels, which displaces their anchors from the image.
    """
    ratio = Fraction(upscale).limit_denominator(1000)
    return math.lcm(STRIDES[-1] * ratio.denominator, ratio.numerator) // ratio.numerator


def grid_step(upscale: float) -> int:
    """The px that tiles, margins and trimmed patches are multiples of, for a detector that enlarges by `upscale`."""
    return math.lcm(side_step(), side_step(upscale))


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)


def _require_mpp(value: float) -> None:
    """Of a working scale."""
    require(0.05 <= value <= 5, f"mpp={value}: need 0.05 to 5 um per pixel")


def _no_effect(settings: Any, name: str, where: str) -> str:
    """The warning of a field whose value changes nothing."""
    return f"{name.replace('_', '-')}={getattr(settings, name)} has no effect {where}"


def check_device_name(name: str) -> None:
    """Raise ConfigError for what is no name of a device, there or not."""
    require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None, f"device={name!r}: need cpu, cuda, cuda:N or auto")


Artefacts = Literal["flag", "skip", "off"]


@dataclass(frozen=True)
class Tissue:
    """Tissue detection. Only nuclei inside the tissue mask are reported."""

    thumbnail_mpp: float = 8.0
    "Scale at which tissue is detected, micrometres per pixel."
    min_area_um2: float = 10_000.0
    "Pieces of tissue smaller than this are ignored, um2."
    margin_um: float = 40.0
    "How far the tissue mask is extended, um, to include nuclei at the edge of the tissue."
    everywhere: Annotated[bool, NO_NEGATIVE] = False
    "Take the whole slide as tissue (fields of view, regions cut out by hand)."
    artefacts: Annotated[Artefacts, Parameter(name=["--tissue.artefacts", "--artefacts"], group=COMMON)] = "flag"
    "Pen, folds, bubbles, edges of coverslips, blur: flag the nuclei in them, skip what they cover, or off: do not look for them."

    def __post_init__(self) -> None:
        require(1 <= self.thumbnail_mpp <= 100, f"thumbnail-mpp={self.thumbnail_mpp}: need 1 to 100 um")
        require(self.min_area_um2 >= 0, f"min-area-um2={self.min_area_um2}: need 0 or more")
        require(0 <= self.margin_um <= 10_000, f"margin-um={self.margin_um}: need 0 to 10000 um")


@dataclass(frozen=True)
class Tiling:
    """The grid of tiles, in work pixels. `plan_slide` checks the margin against nuclei and views."""

    mpp: float = 0.0
    "Working scale, micrometres per pixel: every slide is resampled to it; 0: that of the weights, which it must be near."
    tile: int = 1280
    "Side of a tile with its border, px at the working scale."
    margin: int = 128
    "Border read around each tile's core, px: what the detector needs to see around a nucleus (128 px), and the largest nucleus."
    block: int = 3
    "Blocks of this many by this many tiles are stored, scheduled and resumed together."

    def __post_init__(self) -> None:
        if self.mpp:
            _require_mpp(self.mpp)
        require(
            self.tile % side_step() == 0 and self.tile > 0,
            f"tile={self.tile}: need a positive multiple of {side_step()}, and with the shipped weights one of "
            f"{grid_step(Architecture().upscale)}, as they enlarge what they see",
        )
        require(
            0 <= 2 * self.margin < self.tile,
            f"margin={self.margin} leaves no core in a tile of {self.tile} px: need 2 * margin < tile",
        )
        require(self.block >= 1, f"block={self.block}: need 1 or more")


StainMethod = Literal["none", "reinhard", "macenko", "dcgmm"]
StainSetting = Literal[StainMethod, "auto"]


@dataclass(frozen=True)
class Stain:
    """Stain normalisation, fitted once per slide and applied on the detector's device."""

    method: Annotated[StainSetting, Parameter(name=["--stain.method", "--stain"], group=COMMON)] = "auto"
    "Stain normalisation method, fitted once per slide; auto: macenko where that raises the mean score of the detections, else none."
    patches: Annotated[int, Parameter(name="--stain.patches")] = 64
    "Number of tissue regions of 256 x 256 px that the stain is fitted on."
    weights: Annotated[str, Parameter(name="--stain.weights")] = "stain"
    "Network of the method dcgmm: name of shipped weights, or a .safetensors file."
    template: Annotated[str, Parameter(name="--stain.template")] = ""
    "Slide or image whose stain is the target; without it, a typical image of the training sets."
    weights_sha256: Annotated[str, Parameter(name="--stain.weights-sha256")] = ""
    "SHA-256 that the network's file must have; a run sets it for its workers."
    template_sha256: Annotated[str, Parameter(name="--stain.template-sha256")] = ""
    "SHA-256 that the template's file must have; a run sets it for its workers."

    def __post_init__(self) -> None:
        require(self.patches >= 1, f"patches={self.patches}: need 1 or more")
        require(
            not self.template or self.method != "none",
            f"stain.template={self.template} has no effect without stain normalisation: "
            f"need --stain {', '.join(typing.get_args(StainSetting)[1:])}",
        )

    @property
    def fitted(self) -> StainMethod:
        """The method by which a slide's stain is fitted."""
        return "macenko" if self.method == "auto" else self.method


@dataclass(frozen=True)
class Detector:
    """The detector's weights, thresholds and limits, and where it runs."""

    weights: Annotated[str, Parameter(name=["--detector.weights", "--weights"], group=COMMON)] = "nuclei"
    "Name of shipped weights (`nightslide doctor` lists them), or a .safetensors file."
    views: Annotated[Literal[1, 2, 4, 8], Parameter(name=["--detector.views", "--views"], group=COMMON)] = 1
    "Test-time-augmentation views per patch (flips, quarter-turns, shifts), fused by overlap with votes."
    score: float | None = None
    "Detections below this (fused) score are dropped; without it, below the one that the weights state as theirs."
    nms: float = 0.3
    "Boxes of one tile, or of several views, that overlap by more than this IoU are one nucleus."
    overlap: float = 0.5
    "Outlines of one tile that share at least this part of the smaller one's area are one nucleus."
    objectness: float = 0.85
    "Region proposals below this objectness are dropped early; lower it for weights of a short training, which are less certain."
    proposals_per_mm2: int = 92_000
    "Most region proposals per mm2 of a patch, 6,000 in a tile of 1024 px at 0.25 um: more than three times instances-per-mm2."
    anchors_per_proposal: int = 2
    "Anchors of a pyramid level that enter the proposals' NMS, per proposal: with too few, clear nuclei displace others."
    instances_per_mm2: int = 30_000
    "Most nuclei per mm2 of a patch; one that reaches it is detected in quarters, and reported if they reach it too."
    batch: int = 0
    "Patches per inference; 0: 1 on a CPU, and a block's on a GPU, or fewer where its memory does not suffice."
    device: Annotated[str, Parameter(group=COMMON)] = "auto"
    "Where the detector runs: cpu, cuda, cuda:N, or auto, the GPU if there is one."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Floating-point format of the network; auto: bfloat16 where the device computes in it, else float32."
    weights_sha256: str = ""
    "SHA-256 that the file of the weights must have; a run sets it for its workers."

    def __post_init__(self) -> None:
        require(self.score is None or 0 <= self.score < 1, f"score={self.score}: need 0 <= score < 1")
        require(0 < self.nms < 1, f"nms={self.nms}: need 0 < nms < 1")
        require(0 < self.overlap <= 1, f"overlap={self.overlap}: need 0 < overlap <= 1")
        require(0 <= self.objectness < 1, f"objectness={self.objectness}: need 0 <= objectness < 1")
        for name in ("proposals_per_mm2", "instances_per_mm2"):
            value = getattr(self, name)
            require(0 < value <= 1e7, f"{name.replace('_', '-')}={value}: need more than 0, to 1e7")
        require(self.anchors_per_proposal >= 1, f"anchors-per-proposal={self.anchors_per_proposal}: need 1 or more")
        require(self.batch >= 0, f"batch={self.batch}: need 0 (automatic) or more")
        check_device_name(self.device)

    @property
    def largest_shift_px(self) -> int:
        """How far its views move a patch, along either axis."""
        return VIEW_SHIFT_PX if self.views > 1 else 0


@dataclass(frozen=True)
class Stitching:
    """How the instances of overlapping tiles become one set of nuclei."""

    max_diameter_um: float = 24.0
    "Largest nucleus that must not be cut at a seam, um; --tiling.margin is checked against it."
    tolerance_px: float = 2.0
    "A tile also keeps nuclei centred up to this many px outside its core, as two tiles may predict a nucleus a little apart."
    iou: float = 0.3
    "Nuclei of different tiles that overlap by at least this IoU are duplicates."
    simplify_px: float = 0.25
    "Tolerance of the simplification of outlines (Douglas and Peucker), px at the working scale; 0 keeps every vertex."

    def __post_init__(self) -> None:
        require(
            0 < self.max_diameter_um <= 10_000, f"max-diameter-um={self.max_diameter_um}: need more than 0, to 10000 um"
        )
        require(0 <= self.tolerance_px <= 1000, f"tolerance-px={self.tolerance_px}: need 0 to 1000 px")
        require(0 < self.iou <= 1, f"iou={self.iou}: need 0 < iou <= 1")
        require(0 <= self.simplify_px <= 100, f"simplify-px={self.simplify_px}: need 0 to 100 px")


@dataclass(frozen=True)
class Regions:
    """Annotations of QuPath's, in which nuclei are measured, or to which a run is restricted."""

    folder: Annotated[str, Parameter(name=["--regions.folder", "--regions"], group=COMMON)] = ""
    "Folder of regions drawn in QuPath: GeoJSON files named after the slides, such as case7.svs.geojson. Nuclei are measured in them, and a run is restricted to them."
    crop: Annotated[bool, Parameter(name="--regions.crop", negative="--regions.no-crop")] = True
    "Coordinates of the regions are relative to the slide's bounds, to which QuPath's OpenSlide reader crops; else to the corner of the whole slide."


ExportFormat = Literal[
    "qupath",
    "csv",
    "spatialdata",
    "h5ad",
    "ngff",
    "dsa",
    "dicom",
    "density",
]


@dataclass(frozen=True)
class Export:
    """The files that are made from nuclei.parquet for other programs."""

    formats: Annotated[
        tuple[ExportFormat, ...], Parameter(negative="", show_default=lambda names: ", ".join(names))
    ] = ("qupath",)
    """Files to write beside nuclei.parquet; repeat the flag for several:
    qupath (nuclei.geojson.zip),
    csv (nuclei.csv),
    spatialdata (nuclei.spatialdata.zarr),
    h5ad (nuclei.h5ad, for AnnData),
    ngff (nuclei.ome.zarr, for napari),
    dsa (nuclei.dsa, for the Digital Slide Archive),
    dicom (nuclei.dicom),
    density (density/)."""
    crop: bool = True
    "Coordinates relative to the slide's bounds, to which QuPath's OpenSlide reader crops; else to the corner of the whole slide."
    cells: float = 0.0
    "qupath: grow every nucleus by so many um into a cell, never into another; 0: the nuclei themselves."
    dicom_reference: Annotated[str, Parameter(name=["--export.dicom-reference", "--dicom-reference"])] = ""
    "dicom: folder with a DICOM copy of every slide that is not DICOM itself, as SLIDE.dcm or in a folder SLIDE, by its name in the results; without it, the slides must be DICOM."
    density_um: float = 100.0
    "density: side of the squares into which the slide is divided, um."

    def __post_init__(self) -> None:
        require(0 <= self.cells <= 50, f"cells={self.cells}: need 0 to 50 um")
        require(10 <= self.density_um <= 10_000, f"density-um={self.density_um}: need 10 to 10000 um")

    @property
    def unused(self) -> tuple[str, ...]:
        """What was chosen and changes nothing, a line each."""
        of_format = {"cells": "qupath", "dicom_reference": "dicom", "density_um": "density"}
        return tuple(
            _no_effect(self, name, f"without the format {needed}")
            for name, needed in of_format.items()
            if getattr(self, name) != getattr(Export, name) and needed not in self.formats
        )


WORK_FORMAT = 12
"Version of the files in a slide's work folder: raised with every change after which older ones must not be continued."

# Tables of `Settings` that are no part of its digest: exports are made from nuclei.parquet again and again, and regions
# are part of the digest of each slide, `pipeline.segment.job.Job.digest`.
UNDIGESTED = ("export", "regions")


@dataclass(frozen=True)
class Settings:
    """What is done to a slide. Equal settings and weights give equal results, whatever the scheduling."""

    tissue: Annotated[Tissue, Parameter(group=TISSUE)] = field(default_factory=Tissue)
    tiling: Annotated[Tiling, Parameter(group=TILING)] = field(default_factory=Tiling)
    # "*": else --stain would stand for the table, and could not be given with --stain.patches and the like
    stain: Annotated[Stain, Parameter(name="*", group=STAIN)] = field(default_factory=Stain)
    detector: Annotated[Detector, Parameter(group=DETECTOR)] = field(default_factory=Detector)
    stitching: Annotated[Stitching, Parameter(group=STITCHING)] = field(default_factory=Stitching)
    # "*": else --regions would stand for the table
    regions: Annotated[Regions, Parameter(name="*", group=REGIONS)] = field(default_factory=Regions)
    export: Annotated[Export, Parameter(group=EXPORT)] = field(default_factory=Export)

    @property
    def unused(self) -> tuple[str, ...]:
        """What was chosen and changes nothing, a line each; of settings as they were given, before they are resolved."""
        lines = list(self.export.unused)
        if self.stain.weights != Stain.weights and self.stain.method != "dcgmm":
            lines.append(_no_effect(self.stain, "weights", "on the stain without --stain dcgmm"))
        if not self.regions.crop and not self.regions.folder:
            lines.append("regions.no-crop has no effect without --regions")
        return tuple(lines)

    @functools.cached_property  # every slide of an archive asks for it several times
    def digest(self) -> str:
        """Names everything that nuclei.parquet depends on: no device, batch, export, and of files the content only.

        The checksums of the files are part of the settings once `pipeline.archive.manifest.resolve` has set them.
        """
        content = dataclasses.asdict(self)
        for table in UNDIGESTED:
            del content[table]
        for name in ("device", "batch", "weights"):
            del content["detector"][name]
        for name in ("weights", "template"):
            del content["stain"][name]
        content["format"] = WORK_FORMAT
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Execution:
    """How the work is scheduled; none of it changes a result."""

    workers: int = 0
    "Worker processes that read, tile, outline and export, beside those that detect, or threads with --no-cluster; 0: as many as this machine can use."
    gpus: int = -1
    "GPUs of this machine to use, one process each; -1: all; 0: none, but the CPU."
    memory_limit: str = "auto"
    "Memory at which a worker process is restarted, such as 8GB, at least 1GB; auto: its share of this machine's, twice as much for one that detects, four times on a GPU."
    cluster: bool = True
    "Start worker processes on this machine, so that the crash of one is survived; --no-cluster: work in threads of one process."
    scheduler: str = ""
    "Address of a running Dask scheduler to use instead (tcp://host:8786, tls://host:8786); its workers must see the same files."
    scheduler_file: str = ""
    "The same, from the file that `dask scheduler --scheduler-file` wrote."
    tls_ca_file: str = ""
    "For a scheduler at tls://: certificate of the authority that signed the others, such as ca.pem of `nightslide certificates`."
    tls_cert: str = ""
    "For a scheduler at tls://: certificate of this command, such as cert.pem."
    tls_key: str = ""
    "For a scheduler at tls://: private key of that certificate, such as key.pem."
    stage: str = ""
    "Folder on a local disk into which each slide is copied before it is read, and removed after; needed for URLs."
    stage_space: str = "100GB"
    "Space that these copies may take, such as 500GB or 2TB; slides wait until there is room, and larger ones fail."
    window: int = 0
    "Blocks in flight over all slides, which bounds memory and scratch space; 0: as many as keep the detectors busy."
    wait: bool = True
    "Wait for slides that another run with the same --out is processing, and take over if it dies; --no-wait: leave them to it."
    keep_work: Annotated[bool, NO_NEGATIVE] = False
    "Keep the work folder of finished slides: the plan, and the instances of each block; patches go once they are detected in."
    overwrite: Annotated[bool, NO_NEGATIVE] = False
    "Process slides again that have results, and replace these."
    follow_links: Annotated[bool, NO_NEGATIVE] = False
    "Follow symbolic links in the input folders that lead out of them, too."

    def __post_init__(self) -> None:
        require(0 <= self.workers <= 1024, f"workers={self.workers}: need 0 (automatic) to 1024")
        require(self.gpus >= -1, f"gpus={self.gpus}: need -1 (all) or more")
        require(
            self.cluster or self.gpus <= 1,
            f"gpus={self.gpus} with --no-cluster: one process detects on one GPU; need --cluster, or --gpus 1",
        )
        require(self.window >= 0, f"window={self.window}: need 0 (automatic) or more")
        require(
            not (self.scheduler and self.scheduler_file),
            f"scheduler={self.scheduler} and scheduler-file={self.scheduler_file}: need one of them",
        )
        require(
            not self.scheduler or _ADDRESS.fullmatch(self.scheduler) is not None,
            f"scheduler={self.scheduler!r}: need an address such as tcp://host:8786 or tls://host:8786",
        )
        missing = [f"--{name.replace('_', '-')}" for name, value in self.tls.items() if not value]
        require(len(missing) in (0, len(self.tls)), f"TLS without {', '.join(missing)}: need all three files")
        require(
            bool(missing) or bool(self.scheduler or self.scheduler_file),
            "TLS files without a scheduler: need --scheduler tls://host:8786 or --scheduler-file; worker processes that "
            "are started on this machine are not reached from the network",
        )
        require(
            self.memory_limit == "auto" or _bytes(self.memory_limit) >= 1e9,
            f"memory-limit={self.memory_limit!r}: need auto, or 1GB or more, such as 8GB",
        )

        require(
            self.stage_space_bytes > 0, f"stage-space={self.stage_space!r}: need a size such as 100GB, 500GiB or 2TB"
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """What was chosen and changes nothing, a line each."""
        chosen = [
            name for name in ("workers", "gpus", "memory_limit") if getattr(self, name) != getattr(Execution, name)
        ]
        lines = []
        if self.scheduler or self.scheduler_file:
            lines = [_no_effect(self, name, "with a scheduler, which has its workers") for name in chosen]
        elif not self.cluster:  # --workers is the number of threads, and --gpus 0 is refused where there are any
            lines = [_no_effect(self, name, "with --no-cluster") for name in chosen if name == "memory_limit"]
        if self.stage_space != Execution.stage_space and not self.stage:
            lines.append(_no_effect(self, "stage_space", "without --stage"))
        return tuple(lines)

    @property
    def stage_space_bytes(self) -> float:
        return _bytes(self.stage_space)

    @property
    def tls(self) -> dict[str, str]:
        """The three files of TLS by the names of their settings, each empty where it is not given."""
        return {name: getattr(self, name) for name in ("tls_ca_file", "tls_cert", "tls_key")}


_ADDRESS = re.compile(r"[a-z]+://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):\d{1,5}")


def _bytes(size: str) -> float:
    """A size such as 8GB or 512 MiB in bytes; 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT])(i?)B", size)
    if match is None:
        return 0.0
    return float(match[1]) * float(1024 if match[3] else 1000) ** ("kMGT".index(match[2]) + 1)


def _levels(_: Any, tokens: Sequence[Token]) -> tuple[tuple[int, ...], ...]:
    """Anchors as written on the command line: sides separated by commas, levels by slashes."""
    value = tokens[0].value
    require(re.fullmatch(r"[0-9,/]+", value) is not None, f"anchors={value!r}: need sides such as 18,30/44,64")
    return tuple(tuple(int(side) for side in level.split(",") if side) for level in value.split("/"))


def _as_levels(levels: Any) -> str:
    return "/".join(",".join(map(str, sides)) for sides in levels)


@dataclass(frozen=True)
class Sampling:
    """What a training step learns from: which boxes are positive, which negative, and how many. Inference ignores it."""

    anchor_positive_iou: float = 0.6
    "Anchors that overlap a nucleus by this IoU are positive; torchvision's 0.7 leaves small nuclei with few."
    anchor_negative_iou: float = 0.3
    "Anchors that overlap no nucleus by this IoU are negative; those in between are left out of the loss."
    anchors: int = 256
    "Anchors per image in the loss of the proposals."
    anchors_positive: float = 0.5
    "Largest share of them that is positive."
    proposal_positive_iou: float = 0.5
    "Proposals that overlap a nucleus by this IoU are positive for the box head."
    proposal_negative_iou: float = 0.4
    "Proposals that overlap no nucleus by this IoU are negative; in between annotators disagree too, so they are left out."
    proposals: int = 192
    "Proposals per image in the loss of the box head; torchvision's 512 are for larger images than a crop."
    proposals_positive: float = 0.35
    "Largest share of them that is positive; more than torchvision's 0.25, as crops are full of nuclei."
    before_nms: int = 1500
    "Anchors per pyramid level that enter the proposals' NMS."
    after_nms: int = 1000
    "Proposals per image that leave it."

    def __post_init__(self) -> None:
        for kind in ("anchor", "proposal"):
            low, high = getattr(self, f"{kind}_negative_iou"), getattr(self, f"{kind}_positive_iou")
            require(
                0 < low <= high <= 1,
                f"{kind}_negative_iou={low}, {kind}_positive_iou={high}: need 0 < negative <= positive <= 1",
            )
            share = getattr(self, f"{kind}s_positive")
            require(0 < share <= 1, f"{kind}s_positive={share}: need more than 0, to 1")
        for name in ("anchors", "proposals", "before_nms", "after_nms"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need 1 or more")


@dataclass(frozen=True)
class Architecture:
    """Shape of the detector and what it was trained on; stored in the weights file, which so builds its own network."""

    backbone: str = "tf_efficientnet_lite0"
    "A timm model with feature maps at strides 4, 8, 16 and 32."
    channels: int = 96
    "Channels of the feature pyramid."
    upscale: float = 1.5
    "How much a patch is enlarged before the backbone: small nuclei need more pixels than the working scale gives them."
    anchors: Annotated[
        tuple[tuple[int, ...], ...],
        Parameter(converter=_levels, n_tokens=1, negative="", show_default=_as_levels, metavar="SIDES"),
    ] = ((18, 30), (44, 64), (92, 132), (190, 270))
    "Anchor sides per pyramid level, finest first, in upscaled pixels: 12 to 180 work pixels, 3 to 45 um at 0.25."
    ratios: Annotated[tuple[float, ...], Parameter(negative="")] = (0.5, 1.0, 2.0)
    "Height over width of the anchors of every side."
    proposal_nms: float = 0.7
    "Of region proposals that overlap by more than this IoU the best is kept; touching nuclei overlap by less."
    semantic: int = 64
    "Channels of the branch that classifies every pixel as background, nucleus or edge; 0 leaves it out."
    box_pool: int = 7
    "Side of the grid to which the features of a proposal are pooled for the box head."
    box_hidden: int = 256
    "Units in each of the two layers of the box head."
    canonical_px: float = 64.0
    "Boxes of this side and more, in upscaled pixels, are pooled from canonical-level; with each doubling, one coarser."
    canonical_level: int = 3
    "log2 of that level's stride: at 3 a box of 64 px covers 8 pixels of its map, about the 7 that are pooled."
    mask_channels: int = 64
    "Channels of the mask head."
    mask_layers: int = 3
    "Convolutions of the mask head before it doubles the resolution."
    mask_size: int = 28
    "Side of the grid that a mask is predicted on, whatever the size of its box."
    mpp: float = 0.25
    "Working scale it is trained for, in micrometres per pixel."
    score: Annotated[float, Parameter(parse=False)] = 0.6  # `train` has the flag --score
    "The score threshold that suits it: what `--detector.score` is where it is not given."
    classes: Annotated[tuple[str, ...], Parameter(negative="")] = ("Nucleus",)
    "Names of the classes, in the order of the class index."
    sampling: Sampling = field(default_factory=Sampling)
    "What its training learns from; changes nothing about the network's shape."

    def __post_init__(self) -> None:
        # timm takes "hf-hub:owner/model" for a model to download, "local-dir:" for a folder to read
        require(
            re.fullmatch(r"\w+", self.backbone) is not None,
            f"backbone={self.backbone!r}: need a timm model's name, without that of its weights: resnet18, not resnet18.a1_in1k",
        )
        for name, least in {
            "channels": 1,
            "box_pool": 1,
            "box_hidden": 1,
            "canonical_level": 0,
            "mask_channels": 1,
            "mask_layers": 1,
            "semantic": 0,
        }.items():
            value = getattr(self, name)
            most = {"mask_layers": 16, "box_pool": 64}.get(name, 4096)
            require(least <= value <= most, f"{name}={value}: need {least} to {most}")
        require(0.25 <= self.upscale <= 8, f"upscale={self.upscale}: need 0.25 to 8")
        require(
            len(self.anchors) == len(STRIDES)
            and len({len(sides) for sides in self.anchors}) == 1
            and all(1 <= side <= 4096 for sides in self.anchors for side in sides)
            and len(self.anchors[0]) > 0,
            f"anchors={_as_levels(self.anchors)}: need four levels of as many sides each, 1 to 4096 px",
        )
        require(
            0 < len(self.ratios) <= 16 and all(0 < ratio <= 16 for ratio in self.ratios),
            f"ratios={self.ratios}: need 1 to 16 of them, each more than 0, to 16",
        )
        require(0 < self.proposal_nms < 1, f"proposal_nms={self.proposal_nms}: need 0 < proposal_nms < 1")
        require(0 < self.canonical_px <= 4096, f"canonical_px={self.canonical_px}: need more than 0, to 4096 px")
        require(
            self.mask_size % 2 == 0 and 4 <= self.mask_size <= 128,
            f"mask_size={self.mask_size}: need an even number, 4 to 128",
        )
        _require_mpp(self.mpp)
        require(0 < self.score < 1, f"score={self.score}: need more than 0, below 1")
        require(
            len(self.classes) > 0 and len(set(self.classes)) == len(self.classes) and all(self.classes),
            f"classes={self.classes}: need one or more, with different names",
        )
        # they are shown by a terminal
        require(
            all(printable(name) == name and not {*"\n\t"} & {*name} for name in self.classes),
            f"classes={self.classes}: need names of a line each, without control characters",
        )


@dataclass(frozen=True)
class StainArchitecture:
    """Shape of dcgmm's network; it travels inside the weights file."""

    clusters: int = 3
    "Gaussians of the mixture."
    channels: Annotated[tuple[int, ...], Parameter(negative="")] = (8, 16, 32)
    "Channels of the U-Net's levels, finest first; each level halves the resolution."
    floor: float = 0.03
    "Least standard deviation of a Gaussian, so that none collapses onto a few pixels."
    mpp: float = 0.25
    "Working scale it was trained at."

    def __post_init__(self) -> None:
        require(2 <= self.clusters <= 8, f"clusters={self.clusters}: need 2 to 8")
        require(
            1 <= len(self.channels) <= 5 and all(1 <= count <= 4096 for count in self.channels),
            f"channels={self.channels}: need 1 to 5 levels, of 1 to 4096 channels each",
        )
        require(0 < self.floor <= 10, f"floor={self.floor}: need more than 0, to 10")
        _require_mpp(self.mpp)


T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: need a TOML file of settings") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): need a TOML file of settings") from error
    except (ValueError, RecursionError) as error:  # also of thousands of digits or brackets
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from error


@dataclass(frozen=True)
class _File(Settings):
    """The tables of a TOML file."""

    execution: Execution = field(default_factory=Execution)


def check(content: dict[str, Any], path: Path) -> Settings:
    """The settings in the content of a TOML file, whose tables are the fields of `Settings`, and perhaps `execution`.

    Raises ConfigError for an unknown key (it lists the right ones), a wrong type or a value out of range.
    """
    whole = build(_File, content, where=str(path))
    return Settings(**{table.name: getattr(whole, table.name) for table in dataclasses.fields(Settings)})


def checked(name: str, value: T, kind: type[T]) -> T:
    """Settings that were made in Python, as strict as those of a TOML file, and with values of the same types.

    So 40 and 40.0 are one setting with one digest. Raises ConfigError, also for a parameter of another type, such as a
    dict for `Settings`.
    """
    require(isinstance(value, kind), f"{name}={value!r}: need a pipeline.{kind.__name__}")
    return build(kind, dataclasses.asdict(typing.cast(Any, value)), name)


def given_path(name: str, value: Any, need: str) -> Path:
    """A path that was given in Python. Raises ConfigError for what is none, and for "", which were the current folder.

    name: of the parameter; need: what it is a path of
    """
    is_path = isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)
    require(is_path, f"{name}={value!r}: need {need}, as text or as a path")
    require(os.fspath(value) != "", f"{name} is empty: need {need}; `.` is this folder")
    require("\0" not in os.fspath(value), f"{name}={value!r}: need {need}, which has no NUL character in it")
    return Path(value)


def build(kind: type[T], content: Any, where: str) -> T:
    """A dataclass from nested dicts, strictly: as `dataclasses.asdict` gave them, or JSON or TOML."""
    require(isinstance(content, dict), f"{where}: {content!r} is not a table of settings")
    hints = typing.get_type_hints(kind)
    for key in content:
        require(key in hints, f"{where}: unknown key '{key}'; the keys here are {', '.join(hints)}")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in content.items()}
    try:
        return kind(**values)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(
            any(value == option and type(value) is type(option) for option in options),
            f"{where}={value!r}: need one of {', '.join(map(str, options))}",
        )
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}={value!r}: need a list")
        if options[-1] is not Ellipsis:
            require(len(value) == len(options), f"{where}={value!r}: need {len(options)} values")
            return tuple(_convert(option, item, where) for option, item in zip(options, value, strict=True))
        return tuple(_convert(options[0], item, where) for item in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(o for o in options if o is not type(None)), value, where)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float and isinstance(value, float):
        return float(value)  # numpy has a type of its own
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= sys.float_info.max else math.inf if value > 0 else -math.inf  # as 1e400
    require(type(value) is hint, f"{where}={value!r}: need {hint.__name__}")
    return value
