"""The plan of a slide: its scale, tissue, artefacts, grid and stain. Made once, before tiling; kept on disk."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
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
from pipeline.segment.job import Part
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
    parts: tuple[Part, ...] | None = None  # the slide's other files, where they are known

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles whose core holds tissue, block by block."""
        return tuple(t for block in range(self.grid.blocks) for t in self.of_block(block))

    def of_block(self, block: int) -> tuple[Tile, ...]:
        return tuple(t for t in self.grid.tiles_of(block) if self.tissue.any_in(t.core))

    def trimmed(self, tile: Tile) -> Box:
        """The part of a tile's patch that the detector is given, work px: the core's tissue and the margin around it.

        It is that of the whole slide's tissue also where a run is restricted to regions: a nucleus then looks the same
        to the detector, with regions or without, and has the same outline.
        """
        return trim(tile, self.whole_tissue.bounds_in(tile.core), self.grid, self.step)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that hold tissue."""
        return tuple(b for b in range(self.grid.blocks) if self.of_block(b))

    @property
    def skipped_tiles(self) -> int:
        """Tiles that artefacts cover wholly, where these are skipped."""
        every = (t for b in range(self.grid.blocks) for t in self.grid.tiles_of(b))
        return sum(self.artefacts.tissue.any_in(t.core) and not self.tissue.any_in(t.core) for t in every)


def plan_slide(slide: Slide, settings: Settings, regions: RegionFile | None = None) -> Plan:
    """The plan of a slide. Reads a thumbnail, the texture below its tissue and, to fit its stain, a few regions.

    regions: to which it is restricted. Its stain is that of the whole slide all the same: so nuclei are those that
    the whole slide would have there.

    Raises GridError where the margin is too small for the largest nucleus and the views' shifts, WeightsError where a
    file of the stain normalisation has other content than the settings say or there are no weights of the detector, and
    what `read_regions` raises.
    """
    frame = slide.frame(settings.tiling.mpp)
    grid = _grid(frame.size, settings)
    artefacts, glass, found = find_tissue_and_artefacts(slide, settings.tissue, settings.tiling.mpp)
    clean = artefacts.clean_tissue()
    stained = clean if clean.mask.any() else artefacts.tissue
    normalisation, unfitted = _normalisation(slide, stained, settings)
    step = grid_step(detector_architecture(find_weights(settings.detector.weights)).upscale)
    undecided = settings.stain.method == "auto" and normalisation.source.method != "none"
    whole_tissue = reported_tissue(artefacts, settings)
    restricted: tuple[str, ...] = ()
    without_tissue = NO_TISSUE
    if regions is not None:
        drawn = read_regions(regions, slide.bounds)
        artefacts = artefacts._replace(tissue=drawn.restrict(artefacts.tissue))
        restricted = (_restriction(drawn, regions, settings),)
        without_tissue = _nothing_in(drawn, slide, regions, found=bool(whole_tissue.area_mm2))
    tissue = reported_tissue(artefacts, settings)
    notes = (
        *_scale_notes(slide, tissue.frame.mpp, settings),
        *restricted,
        *_left_out(slide),
        *found,
        *unfitted,
        *_tissue_notes(artefacts, tissue, without_tissue),
    )
    return Plan(
        quick_hash=slide.quick_hash,
        vendor=slide.vendor,
        scale=slide.scale,
        size=slide.size,
        bounds=slide.bounds,
        frame=frame,
        grid=grid,
        step=step,
        tissue=tissue,
        whole_tissue=whole_tissue,
        artefacts=artefacts,
        glass=glass,
        normalisation=normalisation,
        has_icc=slide.has_icc,
        notes=notes,
        trials=stain_trial.squares(stained, step) if undecided else (),
    )


def _grid(size: Size, settings: Settings) -> TileGrid:
    """The grid of a slide of this size, work px. Raises GridError where its margin is too small."""
    tiling = settings.tiling
    grid = TileGrid(size, tiling.tile, tiling.margin, tiling.block)
    # all of a block is written and read, the white beside a small slide, too
    grid = replace(grid, block=min(tiling.block, max(grid.rows, grid.cols)))
    check_margin(
        tiling.margin,
        settings.stitching.max_diameter_um / tiling.mpp,
        settings.stitching.tolerance_px,
        settings.detector.largest_shift_px,
    )
    return grid


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


# --------------------------------------------------------------------------------------------------- notes


def _scale_notes(slide: Slide, tissue_mpp: float, settings: Settings) -> Iterator[str]:
    """Notes on a scale that is forced, or may be wrong; tissue_mpp: at which the tissue was detected."""
    if tissue_mpp > (wanted := max(settings.tissue.thumbnail_mpp, settings.tiling.mpp)):
        yield f"{_LARGER_THAN_GLASS}: tissue was detected at {tissue_mpp:g} µm/px, not {wanted:g}"
    if slide.scale.source == FORCED:
        yield f"its scale is {slide.scale.x:g} µm/px by --force-mpp, whatever it states"


def _left_out(slide: Slide) -> Iterator[str]:
    """A note on levels of the slide that show something else."""
    if slide.odd_levels:
        sizes = [" x ".join(map(str, slide.levels[level].size)) for level in slide.odd_levels]
        yield f"a level of {' and one of '.join(sizes)} px is of another shape: not read from"


def _restriction(drawn: SlideRegions, file: RegionFile, settings: Settings) -> str:
    """To which regions the slide is restricted."""
    judged = "" if settings.tissue.artefacts == "off" else ", and blur is judged within them"
    return f"restricted to {drawn.describe_chosen(file.path)}{judged}"


def _tissue_notes(artefacts: ArtefactMap, tissue: TissueMap, without_tissue: str) -> Iterator[str]:
    """A note where there is no tissue to report nuclei in; without_tissue: what it says where none was found at all."""
    if tissue.area_mm2:
        return
    if artefacts.tissue.area_mm2:
        yield "artefacts cover all tissue: --artefacts flag reports the nuclei there, too"
    else:
        yield without_tissue


def _nothing_in(drawn: SlideRegions, slide: Slide, file: RegionFile, *, found: bool) -> str:
    """Why no tissue lies in regions. found: whether there is tissue elsewhere."""
    if not shapely.intersects(shapely.box(*slide.bounds), drawn.polygons).any():
        return (
            f"the regions lie outside the slide ({slide.bounds.width} x {slide.bounds.height} px): are they another "
            f"slide's, or is it {file.other_flag}?"
        )
    return "no tissue lies in the regions" if found else NO_TISSUE


# ----------------------------------------------------------------------------------------------- on disk


class _Form(NamedTuple):
    """How plan.json stores a field of a plan: `write` turns it into what JSON can hold, `read` turns that back."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _as_it_is(value: Any) -> Any:
    return value


def _tuple_of(kind: Callable[..., Any]) -> _Form:
    """The form of a NamedTuple, which JSON holds as a list."""
    return _Form(_as_it_is, lambda values: kind(*values))


def _frame(stored: list[Any]) -> Frame:
    size, mpp, to_slide = stored
    return Frame(Size(*size), mpp, Affine(*to_slide))


_PLAIN = _Form(_as_it_is, _as_it_is)
_LIST = _Form(_as_it_is, tuple)

# Every field of a plan but the three maps (tissue, whole_tissue, artefacts), which are masks in tissue.npz.
_FORMS: Mapping[str, _Form] = {
    "quick_hash": _PLAIN,
    "vendor": _PLAIN,
    "scale": _tuple_of(Scale),
    "size": _tuple_of(Size),
    "bounds": _tuple_of(Box),
    "frame": _Form(_as_it_is, _frame),
    "grid": _Form(asdict, lambda grid: TileGrid(**{**grid, "size": Size(*grid["size"])})),
    "step": _PLAIN,
    "glass": _PLAIN,
    "normalisation": _Form(Normalisation.to_json, Normalisation.from_json),
    "has_icc": _PLAIN,
    "notes": _LIST,
    "trials": _Form(_as_it_is, lambda boxes: tuple(Box(*box) for box in boxes)),
    "trial_scores": _Form(_as_it_is, lambda scores: None if scores is None else tuple(scores)),
    "trial_work": _Form(StageRecord.to_json, StageRecord.from_json),
    "file": _LIST,
    "overwrite": _PLAIN,
    "parts": _Form(_as_it_is, lambda parts: None if parts is None else tuple(Part(*part) for part in parts)),
}


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
    fields = {name: form.write(getattr(plan, name)) for name, form in _FORMS.items()}
    files.write_checked_json(folder.plan, {"digest": digest, "tissue_frame": plan.tissue.frame, **fields})


def load_plan(folder: SlideFolder, digest: str) -> Plan | None:
    """The plan that `write_plan` wrote; None where it is missing, damaged, or made with other settings.

    Raises OSError where it is there and cannot be read: without a plan, all work on the slide is removed.
    """
    content = files.read_checked_json_if_there(folder.plan)
    if content is None or content["digest"] != digest or files.read_checked_if_there(folder.tissue) is None:
        return None
    fields = {name: form.read(content[name]) for name, form in _FORMS.items() if name in content}
    tissue_frame = _frame(content["tissue_frame"])
    with np.load(folder.tissue, allow_pickle=False) as masks:
        names = ("tissue", "whole_tissue", "detected")
        tissue, whole_tissue, detected = (TissueMap(masks[name], tissue_frame, fields["frame"]) for name in names)
        artefacts = ArtefactMap(masks["artefacts"], detected)
    return Plan(**fields, tissue=tissue, whole_tissue=whole_tissue, artefacts=artefacts)


def read_plan(folder: SlideFolder, digest: str) -> Plan:
    """The same, read once per process. Raises ScratchLost where it is missing or damaged."""
    try:
        return _read_plan(folder, digest, files.stamp(folder.plan))
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
