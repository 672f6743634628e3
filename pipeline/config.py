"""Every setting and its default: the only place where a default is written.

The command line and the TOML file are derived from these dataclasses. `Settings` is what a run does to
its slides, and its `digest` names that; `Execution` is how the work is scheduled, and never changes a result.
"""

import dataclasses
import hashlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter, Token

from pipeline.errors import ConfigError

STRIDES = (4, 8, 16, 32)  # of the feature maps, in enlarged px; sides are multiples of the last


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class Tissue:
    """Where to look. Nuclei are reported inside the tissue mask only, so the tiling cannot show."""

    thumbnail_mpp: float = 8.0
    "Scale of the thumbnail that the tissue is found on, in micrometres per pixel."
    min_area_um2: float = 10_000.0
    "Specks of tissue smaller than this are glass."
    margin_um: float = 40.0
    "How far the mask is grown, so that nuclei at the edge of the tissue are inside."
    everywhere: bool = False
    "Take the whole slide for tissue (fields of view, regions cut out by hand)."

    def __post_init__(self) -> None:
        require(1 <= self.thumbnail_mpp <= 100, f"thumbnail-mpp={self.thumbnail_mpp}: need 1 to 100 um")
        require(self.min_area_um2 >= 0, f"min-area-um2={self.min_area_um2}: need 0 or more")
        require(self.margin_um >= 0, f"margin-um={self.margin_um}: need 0 or more")


@dataclass(frozen=True)
class Tiling:
    """The grid, in work pixels. `pipeline.segment.plan.plan_slide` checks the margin against nuclei and views."""

    mpp: float = 0.25
    "Working scale, in micrometres per pixel; every slide is resampled to it."
    tile: int = 1024
    "Side of a patch."
    margin: int = 64
    "What a patch sees beyond what its tile owns: half the largest nucleus, the seam's tolerance, the shift."
    block: int = 4
    "A block is block x block tiles: one shard, one task, the unit of resume."

    def __post_init__(self) -> None:
        require(0.05 <= self.mpp <= 5, f"mpp={self.mpp}: need 0.05 to 5 um per pixel")
        require(
            self.tile % STRIDES[-1] == 0 and self.tile > 0,
            f"tile={self.tile}: need a positive multiple of {STRIDES[-1]}",
        )
        require(
            0 <= 2 * self.margin < self.tile,
            f"margin={self.margin} leaves no core in a tile of {self.tile} px: need 2 * margin < tile",
        )
        require(self.block >= 1, f"block={self.block}: need 1 or more")


@dataclass(frozen=True)
class Stain:
    method: Annotated[
        Literal["none", "reinhard", "macenko", "dcgmm"], Parameter(name=["--stain.method", "--stain"])
    ] = "none"
    "Stain normalisation, fitted once per slide and applied on the device."
    patches: Annotated[int, Parameter(name="--stain.patches")] = 64
    "How many tissue regions of 256 x 256 px the fit pools."
    weights: Annotated[str, Parameter(name="--stain.weights")] = "stain"
    "The network of dcgmm: name of shipped weights, or a .safetensors file."
    template: Annotated[str, Parameter(name="--stain.template")] = ""
    "A slide or an image to normalise to; without it, a typical image of the training sets."

    def __post_init__(self) -> None:
        require(self.patches >= 1, f"patches={self.patches}: need 1 or more")


@dataclass(frozen=True)
class Detector:
    weights: Annotated[str, Parameter(name=["--detector.weights", "--weights"])] = "nuclei"
    "Name of shipped weights, or a .safetensors file."
    views: Annotated[Literal[1, 2, 4, 8], Parameter(name=["--detector.views", "--views"])] = 1
    "Test-time-augmentation views per patch (flips, quarter-turns, shifts), fused by overlap with votes."
    score: float = 0.5
    "Detections below this (fused) score are dropped."
    nms: float = 0.3
    "Boxes of one tile, or of several views, that overlap by more than this IoU are one nucleus."
    overlap: float = 0.5
    "Outlines of one tile that share more than this part of the smaller one's area are one nucleus."
    proposals_per_mm2: int = 92_000
    "The most region proposals kept, per area of a patch: 6,000 in a tile of 1024 px at 0.25 um; few where little is."
    instances_per_mm2: int = 30_000
    "The most nuclei a patch may hold; a patch that reaches it is split in four and reported."
    batch: int = 0
    "Patches per inference; 0 chooses 1 on a CPU and 8 on a GPU."
    device: str = "auto"
    "cpu, cuda, cuda:N, or auto: the GPU if there is one."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "auto: bfloat16 where the device computes in it, else float32."

    def __post_init__(self) -> None:
        require(0 <= self.score < 1, f"score={self.score}: need 0 <= score < 1")
        require(0 < self.nms < 1, f"nms={self.nms}: need 0 < nms < 1")
        require(0 < self.overlap <= 1, f"overlap={self.overlap}: need 0 < overlap <= 1")
        require(self.proposals_per_mm2 > 0, f"proposals-per-mm2={self.proposals_per_mm2}: need more than 0")
        require(self.instances_per_mm2 > 0, f"instances-per-mm2={self.instances_per_mm2}: need more than 0")
        require(self.batch >= 0, f"batch={self.batch}: need 0 (automatic) or more")


@dataclass(frozen=True)
class Stitching:
    max_diameter_um: float = 24.0
    "The largest nucleus that seams must not cut; the margin is checked against it."
    tolerance_px: float = 2.0
    "Within this distance of its core a tile claims too: predictions of two tiles may differ by so much."
    iou: float = 0.3
    "Two detections of different tiles that overlap by this IoU are one nucleus."
    simplify_px: float = 0.25
    "Tolerance of the outlines' simplification (Douglas and Peucker), in work pixels; 0 keeps every vertex."

    def __post_init__(self) -> None:
        require(self.max_diameter_um > 0, f"max-diameter-um={self.max_diameter_um}: need more than 0")
        require(self.tolerance_px >= 0, f"tolerance-px={self.tolerance_px}: need 0 or more")
        require(0 < self.iou <= 1, f"iou={self.iou}: need 0 < iou <= 1")
        require(self.simplify_px >= 0, f"simplify-px={self.simplify_px}: need 0 or more")


@dataclass(frozen=True)
class Export:
    formats: tuple[Literal["qupath", "csv"], ...] = ("qupath",)
    "What is written beside nuclei.parquet: qupath (nuclei.geojson.zip), csv (nuclei.csv)."
    crop: bool = True
    "Subtract the slide's bounds, as QuPath's OpenSlide reader crops to them."


WORK_FORMAT = 3
"Of what lies in a slide's work folder: raised with every change that makes older ones wrong to continue from."


@dataclass(frozen=True)
class Settings:
    """What is done to a slide. Equal settings and weights give equal results, whatever the scheduling."""

    tissue: Tissue = field(default_factory=Tissue)
    tiling: Tiling = field(default_factory=Tiling)
    # "*": else --stain would stand for the table, and could not be given with --stain.patches and the like
    stain: Annotated[Stain, Parameter(name="*")] = field(default_factory=Stain)
    detector: Detector = field(default_factory=Detector)
    stitching: Stitching = field(default_factory=Stitching)
    export: Export = field(default_factory=Export)

    def digest(self, weights_sha256: str, stain_sha256: Mapping[str, str] = MappingProxyType({})) -> str:
        """Name of everything a result depends on: the settings but for device and batch, and the files' contents.

        stain_sha256: of the files that the stain normalisation reads, `weights` and `template`, where it does.
        """
        content = dataclasses.asdict(self)
        for scheduling in ("device", "batch", "weights"):
            del content["detector"][scheduling]
        for file in ("weights", "template"):
            del content["stain"][file]
        content["stain"].update(stain_sha256)
        content["format"] = WORK_FORMAT
        content["weights"] = weights_sha256
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Execution:
    """How the work is done; none of it changes a result."""

    workers: int = 0
    "Worker processes beside those of the GPUs, or threads with --no-cluster; 0: as many as this machine can use."
    gpus: int = -1
    "GPUs of this machine to use, a process each; -1: all."
    memory_limit: str = "auto"
    "Memory at which a worker process is stopped and begun anew, such as 8GB; auto: its share of the machine's."
    cluster: bool = True
    "Worker processes on this machine: what kills one is survived. Without: threads of this process; one is a loop."
    scheduler: str = ""
    "Address of a running Dask scheduler (tcp://host:8786) to work on instead; its workers see the same files."
    scheduler_file: str = ""
    "The same, from the file that `dask scheduler --scheduler-file` wrote."
    window: int = 0
    "Blocks in flight: it bounds memory and scratch space however large the slide; 0: two, and two a detector."
    wait: bool = True
    "Wait for slides that another run with the same --out is at, to take them over should it die."
    keep_work: bool = False
    "Keep the patches and instances of finished slides."
    overwrite: bool = False
    "Do slides again whose results exist."

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"workers={self.workers}: need 0 (automatic) or more")
        require(self.gpus >= -1, f"gpus={self.gpus}: need -1 (all) or more")
        require(self.window >= 0, f"window={self.window}: need 0 (automatic) or more")
        require(
            not (self.scheduler and self.scheduler_file),
            f"scheduler={self.scheduler} and scheduler-file={self.scheduler_file}: need one of them",
        )
        require(
            self.memory_limit == "auto" or re.fullmatch(r"[0-9.]+ *[kMGT]i?B", self.memory_limit) is not None,
            f"memory-limit={self.memory_limit!r}: need auto, or a size such as 8GB",
        )


def _levels(_: Any, tokens: Sequence[Token]) -> tuple[tuple[int, ...], ...]:
    """What the command line says of anchors: a level's sides by commas, levels by slashes."""
    value = tokens[0].value
    require(re.fullmatch(r"[0-9,/]+", value) is not None, f"anchors={value!r}: need sides such as 18,30/44,64")
    return tuple(tuple(int(side) for side in level.split(",") if side) for level in value.split("/"))


def _as_levels(levels: Any) -> str:
    return "/".join(",".join(map(str, sides)) for sides in levels)


@dataclass(frozen=True)
class Architecture:
    """Shape of the detector; it travels inside the weights file, so a file builds its own network."""

    backbone: str = "tf_efficientnet_lite0"
    "A timm model with feature maps at strides 4, 8, 16 and 32 (STRIDES)."
    channels: int = 96
    "Of the feature pyramid."
    upscale: float = 1.5
    "How much a patch is enlarged before the backbone."
    anchors: Annotated[
        tuple[tuple[int, ...], ...],
        Parameter(converter=_levels, n_tokens=1, negative="", show_default=_as_levels, metavar="SIDES"),
    ] = ((18, 30), (44, 64), (92, 132), (190, 270))
    "Anchor sides per pyramid level, finest first, in upscaled pixels: 12 to 180 work pixels, 3 to 45 um at 0.25."
    semantic: int = 64
    "Channels of the branch that sees every pixel before any box is made; 0: none."
    box_hidden: int = 256
    "Units of the box head's hidden layers."
    mask_channels: int = 64
    "Channels of the mask head: light, since torchvision's 256 are most of a detector's work."
    mask_layers: int = 3
    "Convolutions of the mask head."
    mask_size: int = 28
    "Side of a nucleus's mask, in px: 28 or 56, stretched over its box."
    mpp: float = 0.25
    "Working scale it was trained at, in um per pixel."
    classes: Annotated[tuple[str, ...], Parameter(negative="")] = ("Nucleus",)
    "Names of the classes; with --by-class they are those of the datasets."

    def __post_init__(self) -> None:
        # timm takes "hf-hub:owner/model" for a model to download, "local-dir:" for a folder to read
        require(
            re.fullmatch(r"\w+", self.backbone) is not None, f"backbone={self.backbone!r}: need a timm model's name"
        )
        for name, least in {
            "channels": 1,
            "box_hidden": 1,
            "mask_channels": 1,
            "mask_layers": 1,
            "semantic": 0,
        }.items():
            value = getattr(self, name)
            require(least <= value <= 4096, f"{name}={value}: need {least} to 4096")
        require(0.25 <= self.upscale <= 8, f"upscale={self.upscale}: need 0.25 to 8")
        require(
            len(self.anchors) == len(STRIDES)
            and len({len(sides) for sides in self.anchors}) == 1
            and all(1 <= side <= 4096 for sides in self.anchors for side in sides)
            and len(self.anchors[0]) > 0,
            f"anchors={_as_levels(self.anchors)}: need four levels of as many sides each, 1 to 4096 px",
        )
        require(
            self.mask_size % 2 == 0 and 4 <= self.mask_size <= 128,
            f"mask_size={self.mask_size}: need an even number, 4 to 128",
        )
        require(0 < self.mpp <= 10, f"mpp={self.mpp}: need more than 0, to 10 um")
        require(
            len(self.classes) > 0 and len(set(self.classes)) == len(self.classes) and all(self.classes),
            f"classes={self.classes}: need one or more, with different names",
        )


@dataclass(frozen=True)
class StainArchitecture:
    """Shape of dcgmm's network; it travels inside the weights file."""

    clusters: int = 3
    "Gaussians of the mixture."
    channels: Annotated[tuple[int, ...], Parameter(negative="")] = (8, 16, 32)
    "Of the U-Net's levels, finest first; each level halves the picture."
    floor: float = 0.03
    "Least standard deviation of a Gaussian, so that none collapses onto a few pixels."
    mpp: float = 0.25
    "Working scale it was trained at."

    def __post_init__(self) -> None:
        require(2 <= self.clusters <= 8, f"clusters={self.clusters}: need 2 to 8")
        require(
            1 <= len(self.channels) <= 5 and min(self.channels) > 0, f"channels={self.channels}: need 1 to 5 levels"
        )
        require(self.floor > 0, f"floor={self.floor}: need more than 0")


T = TypeVar("T")


def load(path: Path) -> Settings:
    """Settings from a TOML file, whose tables are the fields of `Settings`.

    Raises ConfigError for a file that is not TOML, an unknown key (it lists the right ones), a wrong type
    or a value out of range.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from error
    return build(Settings, content, where=str(path))


def build(kind: type[T], content: Any, where: str) -> T:
    """A dataclass from nested dicts, strictly: as `dataclasses.asdict` gave them, or JSON or TOML."""
    require(isinstance(content, dict), f"{where}: {content!r} is not a table of settings")
    hints = typing.get_type_hints(kind)
    for key in content:
        require(key in hints, f"{where}: unknown key '{key}'; the keys here are {', '.join(hints)}")
    try:
        return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in content.items()})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(
            value in options and not isinstance(value, bool),
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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, f"{where}={value!r}: need {hint.__name__}")
    return value
