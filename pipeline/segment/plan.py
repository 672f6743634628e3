"""The plan of a slide: what it is, where its tissue lies, how it is stained. Made once, before tiling; kept on disk."""

import functools
import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import files
from pipeline.config import Settings
from pipeline.errors import StainError
from pipeline.model import dcgmm, stain, views
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.device import choose_device
from pipeline.model.weights import find_weights
from slides.errors import ScaleUnknown, SlideNotFound
from slides.geometry import Affine, Box, Frame, Size
from slides.grid import Tile, TileGrid, check_margin
from slides.slide import Scale, Slide, open_slide
from slides.tissue import TissueMap, tissue_mask


class Plan(NamedTuple):
    """What a slide is and where its tissue lies."""

    quick_hash: str
    vendor: str
    scale: Scale
    size: Size
    bounds: Box  # slide px
    frame: Frame  # work px
    grid: TileGrid
    tissue: TissueMap
    stain: stain.FittedStain
    target: stain.FittedStain  # what it is normalised to
    has_icc: bool  # the pixels are taken as stored; the profile is not applied
    stain_note: str  # why the slide is not normalised although it was asked for; empty otherwise

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles whose core holds tissue, block by block."""
        return tuple(t for block in range(self.grid.blocks) for t in self.of_block(block))

    def of_block(self, block: int) -> tuple[Tile, ...]:
        return tuple(t for t in self.grid.tiles_of(block) if self.tissue.any_in(t.core))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that hold tissue."""
        return tuple(b for b in range(self.grid.blocks) if self.of_block(b))


def plan_slide(slide: Slide, settings: Settings) -> Plan:
    """The plan of a slide. Reads a thumbnail and, to fit its stain, a few regions.

    Raises GridError where the margin is too small for the largest nucleus and the views' shifts.
    """
    tiling = settings.tiling
    frame = slide.frame(tiling.mpp)
    grid = TileGrid(frame.size, tiling.tile, tiling.margin, tiling.block)
    check_margin(
        tiling.margin,
        settings.stitching.max_diameter_um / tiling.mpp,
        settings.stitching.tolerance_px,
        views.largest_shift(settings.detector.views),
    )
    tissue = _find_tissue(slide, settings)
    target, note = stain_target(settings), ""
    try:
        fitted = _fit_stain(slide, tissue, settings, stain_network(settings))
    except StainError as error:
        fitted = target = stain.TEMPLATE["none"]
        note = str(error)
    return Plan(
        slide.quick_hash,
        slide.vendor,
        slide.scale,
        slide.size,
        slide.bounds,
        frame,
        grid,
        tissue,
        fitted,
        target,
        slide.has_icc,
        note,
    )


def picture_frame(slide: Slide, plan: Plan, longest_px: int) -> Frame:
    """The frame whose longer side has so many pixels, never finer than the work frame."""
    return slide.frame(plan.frame.mpp * max(1.0, max(plan.frame.size) / longest_px))


def _find_tissue(slide: Slide, settings: Settings) -> TissueMap:
    work = slide.frame(settings.tiling.mpp)
    frame = slide.frame(max(settings.tissue.thumbnail_mpp, work.mpp))
    thumbnail = slide.thumbnail(frame)
    if settings.tissue.everywhere:
        return TissueMap(np.ones(thumbnail.shape[:2], bool), frame, work)
    area, margin = settings.tissue.min_area_um2, settings.tissue.margin_um
    return TissueMap(tissue_mask(thumbnail, frame.mpp, min_area_um2=area, margin_um=margin), frame, work)


def _fit_stain(slide: Slide, tissue: TissueMap, settings: Settings, network: ClusterNet | None) -> stain.FittedStain:
    """The slide's stain from regions spread evenly over its tissue. Raises StainError where it cannot be told."""
    method = settings.stain.method
    if method == "none":
        return stain.TEMPLATE["none"]
    rows, columns = np.nonzero(tissue.mask)
    if not len(rows):
        raise StainError("no tissue was found to fit the stain on")
    chosen = np.unique(np.linspace(0, len(rows) - 1, settings.stain.patches).astype(int))
    ratio, side = tissue.frame.mpp / tissue.work.mpp, 256
    size = tissue.work.size
    regions, masks = [], []
    for index in chosen:
        x, y = int((columns[index] + 0.5) * ratio) - side // 2, int((rows[index] + 0.5) * ratio) - side // 2
        # whatever hangs over the edge is white that no lamp has lit
        x, y = (max(0, min(corner, extent - side)) for corner, extent in ((x, size.width), (y, size.height)))
        pixels, lost = slide.read_decodable(Box(x, y, x + side, y + side), tissue.work)
        lost[max(0, size.height - y) :], lost[:, max(0, size.width - x) :] = True, True
        regions.append(pixels)
        masks.append(~lost)
    return stain.fit(np.stack(regions), np.stack(masks), method, network)


def stain_files(settings: Settings) -> dict[str, Path]:
    """The files that this stain normalisation reads: `weights` of dcgmm's network, `template` where one is given.

    Raises WeightsError, SlideNotFound.
    """
    files = {"weights": find_weights(settings.stain.weights)} if settings.stain.method == "dcgmm" else {}
    if settings.stain.template and settings.stain.method != "none":
        files["template"] = Path(settings.stain.template).resolve()
        if not files["template"].is_file():
            raise SlideNotFound(f"{files['template']}: there is no such file to take as --stain.template")
    return files


def stain_network(settings: Settings) -> ClusterNet | None:
    """The network of dcgmm on the detector's device, loaded once per process, file and device; else None."""
    if settings.stain.method != "dcgmm":
        return None
    weights = find_weights(settings.stain.weights)
    with _loading:
        return _stain_network(weights, weights.stat().st_mtime_ns, settings.detector.device)


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _stain_network(weights: Path, _changed_ns: int, device_name: str) -> ClusterNet:
    return dcgmm.load(weights).to(choose_device(device_name))


def stain_target(settings: Settings) -> stain.FittedStain:
    """What slides are normalised to: the stain of --stain.template, or the one that comes with the method.

    Found once per process. Raises what `stain_files`, `fit_template` and `stain.read_template` raise.
    """
    return _stain_target(settings, tuple(path.stat().st_mtime_ns for path in stain_files(settings).values()))


@functools.lru_cache(maxsize=2)
def _stain_target(settings: Settings, _changed_ns: tuple[int, ...]) -> stain.FittedStain:
    files = stain_files(settings)
    if "template" in files:
        return fit_template(files["template"], settings, stain_network(settings))
    return stain.read_template(files["weights"]) if "weights" in files else stain.TEMPLATE[settings.stain.method]


def fit_template(path: Path, settings: Settings, network: ClusterNet | None) -> stain.FittedStain:
    """The stain of a slide or an image, fitted as a slide's is.

    A file that does not state its scale is taken at the working one: a stain hardly depends on it. Where no tissue
    is found it is a field of view, too small for that, and taken whole.
    Raises StainError where it tells no stain, SlideError where it cannot be read.
    """
    try:
        slide = open_slide(path)
    except ScaleUnknown:
        slide = open_slide(path, mpp=settings.tiling.mpp)
    with slide:
        tissue = _find_tissue(slide, settings)
        if not tissue.mask.any():
            tissue = tissue._replace(mask=~tissue.mask)
        return _fit_stain(slide, tissue, settings, network)


def write_plan(plan: Plan, work: Path) -> None:
    with files.committed(work / "tissue.npy") as path, path.open("wb") as file:
        np.save(file, plan.tissue.mask, allow_pickle=False)
    content = {
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "scale": plan.scale,
        "size": plan.size,
        "bounds": plan.bounds,
        "frame": plan.frame,
        "grid": asdict(plan.grid),
        "tissue_frame": plan.tissue.frame,
        "stain": plan.stain.to_json(),
        "target": plan.target.to_json(),
        "has_icc": plan.has_icc,
        "stain_note": plan.stain_note,
    }
    with files.committed(work / "plan.json") as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


@functools.lru_cache(maxsize=32)
def _read_plan(work: Path, _changed_ns: int) -> Plan:
    content = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    grid, frame = content["grid"], _frame(content["frame"])
    mask = np.load(work / "tissue.npy", allow_pickle=False)
    return Plan(
        content["quick_hash"],
        content["vendor"],
        Scale(*content["scale"]),
        Size(*content["size"]),
        Box(*content["bounds"]),
        frame,
        TileGrid(Size(*grid["size"]), grid["tile"], grid["margin"], grid["block"]),
        TissueMap(mask, _frame(content["tissue_frame"]), frame),
        stain.FittedStain.from_json(content["stain"]),
        stain.FittedStain.from_json(content["target"]),
        content["has_icc"],
        content["stain_note"],
    )


def _frame(stored: list[Any]) -> Frame:
    size, mpp, to_slide = stored
    return Frame(Size(*size), mpp, Affine(*to_slide))


def read_plan(work: Path) -> Plan:
    """The plan that `begin` wrote; read once per process."""
    return _read_plan(work, (work / "plan.json").stat().st_mtime_ns)
