"""The plan of a slide: its scale, tissue, artefacts, grid and stain. Made once, before tiling; kept on disk."""

import functools
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import shapely

from pipeline import files
from pipeline.config import Settings, grid_step
from pipeline.errors import ScratchLost, StainError
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import UNCHANGED, Normalisation
from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment import stain_trial
from pipeline.segment.record import NO_TISSUE, StageRecord
from pipeline.segment.regions import RegionFile, SlideRegions, read_regions
from pipeline.segment.slide_stain import fit_slide, network_of, template_stain
from pipeline.segment.tissue_map import find_tissue_and_artefacts
from slides.artefacts import ArtefactMap
from slides.geometry import Affine, Box, Frame, Size
from slides.grid import Tile, TileGrid, check_margin, trim
from slides.scale import FORCED, Scale
from slides.slide import Slide
from slides.tissue import TissueMap

_LARGER_THAN_GLASS = "the slide is larger than any glass, so its scale may be wrong"


class Plan(NamedTuple):
    """What later stages need to know of a slide."""

    quick_hash: str
    vendor: str
    scale: Scale
    size: Size
    bounds: Box  # slide px
    frame: Frame  # work px
    grid: TileGrid
    step: int  # `config.grid_step` of the detector
    tissue: TissueMap  # in which nuclei are reported
    whole_tissue: TissueMap  # the same without the restriction to regions
    artefacts: ArtefactMap  # that a thumbnail shows: blur is known when all patches were read
    glass: float  # grey level of clean glass in green
    normalisation: Normalisation
    has_icc: bool  # the pixels are taken as stored; the profile is not applied
    notes: tuple[str, ...]  # warnings, such as why it is not normalised
    trials: tuple[Box, ...] = ()  # work px: where the normalisation is to be tried; () once it is chosen or dropped
    trial_scores: tuple[float, float] | None = None  # the mean scores without and with it, where it was tried
    trial_work: StageRecord = StageRecord()  # what that took
    file: tuple[int, int] = (0, 0)  # bytes and mtime (ns) of the slide's own file
    overwrite: str = ""  # as in `Job`

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles whose core holds tissue, block by block."""
        return tuple(t for block in range(self.grid.blocks) for t in self.of_block(block))

    def of_block(self, block: int) -> tuple[Tile, ...]:
        return tuple(t for t in self.grid.tiles_of(block) if self.tissue.any_in(t.core))

    def trimmed(self, tile: Tile) -> Box:
        """The part of a tile's patch that the detector is given, work px: the core's tissue and the margin around it.

        It does not depend on regions, so that these change no nucleus.
        """
        return trim(tile, self.whole_tissue.bounds_in(tile.core), self.grid.margin, self.step)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that hold tissue."""
        return tuple(b for b in range(self.grid.blocks) if self.of_block(b))

    @property
    def skipped_tiles(self) -> int:
        """Tiles that artefacts cover wholly, where these are skipped."""
        every = (t for b in range(self.grid.blocks) for t in self.grid.tiles_of(b))
        return sum(self.artefacts.tissue.any_in(t.core) and not self.tissue.any_in(t.core) for t in every)


def _left_out(slide: Slide) -> tuple[str, ...]:
    """A note on levels of the slide that show something else."""
    sizes = [" x ".join(map(str, slide.levels[level].size)) for level in slide.odd_levels]
    return (f"a level of {' and one of '.join(sizes)} px is of another shape: not read from",) if sizes else ()


def plan_slide(slide: Slide, settings: Settings, regions: RegionFile | None = None) -> Plan:
    """The plan of a slide. Reads a thumbnail and, to fit its stain, a few regions.

    regions: to which it is restricted. Its stain is that of the whole slide all the same: so nuclei are those that
    the whole slide would have there.

    Raises GridError where the margin is too small for the largest nucleus and the views' shifts, WeightsError where a
    file of the stain normalisation has other content than the settings say or there are no weights of the detector, and
    what `read_regions` raises.
    """
    tiling = settings.tiling
    frame = slide.frame(tiling.mpp)
    grid = TileGrid(frame.size, tiling.tile, tiling.margin, tiling.block)
    check_margin(
        tiling.margin,
        settings.stitching.max_diameter_um / tiling.mpp,
        settings.stitching.tolerance_px,
        settings.detector.largest_shift_px,
    )
    artefacts, glass, notes = find_tissue_and_artefacts(slide, settings.tissue, tiling.mpp)
    clean = artefacts.clean_tissue()
    stained = clean if clean.mask.any() else artefacts.tissue
    normalisation, unfitted = _normalisation(slide, stained, settings)
    step = grid_step(detector_architecture(find_weights(settings.detector.weights)).upscale)
    undecided = settings.stain.method == "auto" and normalisation.source.method != "none"
    notes = (*_left_out(slide), *notes, *unfitted)
    whole_tissue = reported_tissue(artefacts, settings)
    if regions is not None:
        drawn = read_regions(regions, slide.bounds)
        artefacts = artefacts._replace(tissue=drawn.restrict(artefacts.tissue))
        judged = "" if settings.tissue.artefacts == "off" else ", and blur is judged within them"
        notes = (f"restricted to {drawn.describe_chosen(regions.path)}{judged}", *notes)
    tissue = reported_tissue(artefacts, settings)
    if artefacts.tissue.area_mm2 and not tissue.area_mm2:
        notes = (*notes, "artefacts cover all tissue: --artefacts flag reports the nuclei there, too")
    elif not tissue.area_mm2:
        found = bool(whole_tissue.area_mm2)
        notes = (*notes, NO_TISSUE if regions is None else _nothing_in(drawn, slide, regions, found=found))
    if slide.scale.source == FORCED:
        notes = (f"its scale is {slide.scale.x:g} µm/px by --force-mpp, whatever it states", *notes)
    if tissue.frame.mpp > (wanted := max(settings.tissue.thumbnail_mpp, tiling.mpp)):
        notes = (f"{_LARGER_THAN_GLASS}: tissue was detected at {tissue.frame.mpp:g} µm/px, not {wanted:g}", *notes)
    return Plan(
        slide.quick_hash,
        slide.vendor,
        slide.scale,
        slide.size,
        slide.bounds,
        frame,
        grid,
        step,
        tissue,
        whole_tissue,
        artefacts,
        glass,
        normalisation,
        slide.has_icc,
        notes,
        stain_trial.squares(stained, step) if undecided else (),
    )


def _nothing_in(drawn: SlideRegions, slide: Slide, file: RegionFile, *, found: bool) -> str:
    """Why no tissue lies in regions. found: whether there is tissue elsewhere."""
    if not shapely.intersects(shapely.box(*slide.bounds), drawn.polygons).any():
        flag = "--regions.no-crop" if file.crop else "--regions.crop"
        return (
            f"the regions lie outside the slide ({slide.bounds.width} x {slide.bounds.height} px): are they another "
            f"slide's, or is it {flag}?"
        )
    return "no tissue lies in the regions" if found else NO_TISSUE


def reported_tissue(artefacts: ArtefactMap, settings: Settings) -> TissueMap:
    """The tissue in which nuclei are reported: all of it, or without artefacts where these are skipped.

    artefacts: that are known so far; blur is known when all patches were read
    """
    return artefacts.clean_tissue() if settings.tissue.artefacts == "skip" else artefacts.tissue


def _normalisation(slide: Slide, tissue: TissueMap, settings: Settings) -> tuple[Normalisation, tuple[str, ...]]:
    """How the slide is normalised; and a note where it cannot be, although the settings ask for it."""
    if settings.stain.method == "none":
        return UNCHANGED, ()
    target = template_stain(settings.stain, settings.tissue, settings.tiling.mpp)
    network = network_of(settings.stain)
    try:
        fitted = fit_slide(slide, tissue, settings.stain, network)
    except StainError as error:
        return UNCHANGED, (f"not normalised: {error}",)
    return Normalisation(fitted, target), ()


def picture_frame(slide: Slide, plan: Plan, longest_px: int) -> Frame:
    """The frame whose longer side has so many pixels, never finer than the work frame."""
    return slide.frame(plan.frame.mpp * max(1.0, max(plan.frame.size) / longest_px))


def write_plan(plan: Plan, folder: SlideFolder, digest: str) -> None:
    """Commit work/plan.json and, before it, work/tissue.npz; digest: of the settings that it was made with."""
    with files.checked(folder.tissue, {}) as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            allow_pickle=False,
            tissue=plan.tissue.mask,
            whole_tissue=plan.whole_tissue.mask,
            detected=plan.artefacts.tissue.mask,
            artefacts=plan.artefacts.kinds,
        )
    content = {
        "digest": digest,
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "scale": plan.scale,
        "size": plan.size,
        "bounds": plan.bounds,
        "frame": plan.frame,
        "grid": asdict(plan.grid),
        "step": plan.step,
        "tissue_frame": plan.tissue.frame,
        "glass": plan.glass,
        "normalisation": plan.normalisation.to_json(),
        "has_icc": plan.has_icc,
        "notes": plan.notes,
        "trials": plan.trials,
        "trial_scores": plan.trial_scores,
        "trial_work": plan.trial_work.to_json(),
        "file": plan.file,
        "overwrite": plan.overwrite,
    }
    files.write_checked_json(folder.plan, content)


def load_plan(folder: SlideFolder, digest: str) -> Plan | None:
    """The plan that `write_plan` wrote; None where it is missing, damaged, or made with other settings."""
    content = files.read_checked_json(folder.plan)
    if content is None or content["digest"] != digest or files.read_checked(folder.tissue) is None:
        return None
    grid, frame = content["grid"], _frame(content["frame"])
    tissue_frame = _frame(content["tissue_frame"])
    with np.load(folder.tissue, allow_pickle=False) as masks:
        names = ("tissue", "whole_tissue", "detected")
        tissue, whole_tissue, detected = (TissueMap(masks[name], tissue_frame, frame) for name in names)
        artefacts = ArtefactMap(masks["artefacts"], detected)
    return Plan(
        content["quick_hash"],
        content["vendor"],
        Scale(*content["scale"]),
        Size(*content["size"]),
        Box(*content["bounds"]),
        frame,
        TileGrid(Size(*grid["size"]), grid["tile"], grid["margin"], grid["block"]),
        content["step"],
        tissue,
        whole_tissue,
        artefacts,
        content["glass"],
        Normalisation.from_json(content["normalisation"]),
        content["has_icc"],
        tuple(content["notes"]),
        tuple(Box(*box) for box in content["trials"]),
        None if content["trial_scores"] is None else (content["trial_scores"][0], content["trial_scores"][1]),
        StageRecord.from_json(content["trial_work"]),
        (content["file"][0], content["file"][1]),
        content["overwrite"],
    )


def _frame(stored: list[Any]) -> Frame:
    size, mpp, to_slide = stored
    return Frame(Size(*size), mpp, Affine(*to_slide))


def read_plan(folder: SlideFolder, digest: str) -> Plan:
    """The same, read once per process. Raises ScratchLost where it is missing or damaged."""
    try:
        stat = folder.plan.stat()
        return _read_plan(folder, digest, (stat.st_mtime_ns, stat.st_size, stat.st_ino))
    except FileNotFoundError:
        raise ScratchLost(f"{folder.plan} is missing") from None


def read_artefacts(folder: SlideFolder, plan: Plan) -> ArtefactMap:
    """All artefacts, as stitching left them. Raises ScratchLost where the file is missing or damaged."""
    if files.read_checked(folder.artefacts) is None:
        raise ScratchLost(f"{folder.artefacts} is missing or damaged")
    return plan.artefacts._replace(kinds=np.load(folder.artefacts, allow_pickle=False))


@functools.lru_cache(maxsize=32)
def _read_plan(folder: SlideFolder, digest: str, _file: tuple[int, ...]) -> Plan:
    plan = load_plan(folder, digest)
    if plan is None:
        raise ScratchLost(f"{folder.plan} or its tissue mask is damaged")
    return plan
