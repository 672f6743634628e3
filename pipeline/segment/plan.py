"""What a slide is, where its tissue lies, how it is stained: decided once, before anything is cut, and kept on disk."""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import files
from pipeline.config import Settings
from pipeline.errors import StainError
from pipeline.model import load, stain, views
from pipeline.model.stain import Normalisation
from pipeline.segment.slide_stain import ANY_CONTENT, fit_slide, template_stain
from pipeline.segment.tissue_map import find_tissue
from slides.geometry import Affine, Box, Size
from slides.grid import Tile, TileGrid, check_margin
from slides.slide import Scale, Slide
from slides.tissue import TissueMap


class Plan(NamedTuple):
    """What a slide is and where its tissue lies."""

    quick_hash: str
    vendor: str
    scale: Scale
    size: Size
    bounds: Box  # slide px
    to_slide: Affine  # work -> slide
    grid: TileGrid
    tissue: TissueMap
    normalisation: Normalisation
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


def plan_slide(slide: Slide, settings: Settings, stain_sha256: Mapping[str, str] = ANY_CONTENT) -> Plan:
    """The plan of a slide. Reads a thumbnail and, to fit its stain, a few regions.

    stain_sha256: of the files that stain normalisation reads, as the run recorded them (`Settings.digest`)
    Raises GridError where the margin is too small for the largest nucleus and the views' shifts, WeightsError where a
    file of the stain normalisation has other content than recorded.
    """
    tiling = settings.tiling
    size, to_slide = slide.work(tiling.mpp)
    grid = TileGrid(size, tiling.tile, tiling.margin, tiling.block)
    check_margin(
        tiling.margin,
        settings.stitching.max_diameter_um / tiling.mpp,
        settings.stitching.tolerance_px,
        views.largest_shift(settings.detector.views),
    )
    tissue = find_tissue(slide, settings.tissue, tiling.mpp)
    normalisation, note = _normalisation(slide, tissue, settings, stain_sha256)
    return Plan(
        slide.quick_hash,
        slide.vendor,
        slide.scale,
        slide.size,
        slide.bounds,
        to_slide,
        grid,
        tissue,
        normalisation,
        slide.has_icc,
        note,
    )


def _normalisation(
    slide: Slide, tissue: TissueMap, settings: Settings, stain_sha256: Mapping[str, str]
) -> tuple[Normalisation, str]:
    """How the slide is normalised; and why it is not, although that was asked for (else empty)."""
    target = template_stain(settings.stain, settings.tissue, settings.tiling.mpp, stain_sha256)
    network = load.stain_network(settings.stain, recorded=stain_sha256.get("weights", ""))
    try:
        fitted = fit_slide(slide, tissue, settings.stain, network)
    except StainError as error:
        return Normalisation(stain.TEMPLATE["none"], stain.TEMPLATE["none"]), str(error)
    return Normalisation(fitted, target), ""


def picture_mpp(plan: Plan, longest_px: int) -> float:
    """The scale at which the slide's longest side has so many pixels, never finer than the work frame's."""
    return plan.tissue.work_mpp * max(1.0, max(plan.grid.size) / longest_px)


def write_plan(plan: Plan, work: Path) -> None:
    with files.committed(work / "tissue.npy") as path, path.open("wb") as file:
        np.save(file, plan.tissue.mask, allow_pickle=False)
    content = {
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "scale": plan.scale,
        "size": plan.size,
        "bounds": plan.bounds,
        "to_slide": plan.to_slide,
        "grid": asdict(plan.grid),
        "tissue": [plan.tissue.mpp, plan.tissue.work_mpp],
        "normalisation": plan.normalisation.to_json(),
        "has_icc": plan.has_icc,
        "stain_note": plan.stain_note,
    }
    with files.committed(work / "plan.json") as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


@functools.lru_cache(maxsize=32)
def _read_plan(work: Path, _changed_ns: int) -> Plan:
    content = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    grid = content["grid"]
    return Plan(
        content["quick_hash"],
        content["vendor"],
        Scale(*content["scale"]),
        Size(*content["size"]),
        Box(*content["bounds"]),
        Affine(*content["to_slide"]),
        TileGrid(Size(*grid["size"]), grid["tile"], grid["margin"], grid["block"]),
        TissueMap(np.load(work / "tissue.npy", allow_pickle=False), *content["tissue"]),
        Normalisation.from_json(content["normalisation"]),
        content["has_icc"],
        content["stain_note"],
    )


def read_plan(work: Path) -> Plan:
    """The plan that `write_plan` wrote; read once per process."""
    return _read_plan(work, (work / "plan.json").stat().st_mtime_ns)
