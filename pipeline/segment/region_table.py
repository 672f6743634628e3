"""Nuclei of a finished slide, measured region by region. Nothing but its tables and outlines is read."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.layout import SlideFolder
from pipeline.segment import annotations, arrow, tables
from pipeline.segment.finished import check_as_written, remedy
from pipeline.segment.geojson import read_objects
from pipeline.segment.polygons import Floats, Ints, Polygons
from pipeline.segment.record import read_slide_json
from pipeline.segment.regions import RegionFile, SlideRegions, contained, read_regions
from pipeline.text import counted
from slides.errors import NightslideError
from slides.geometry import Box

_STATISTICS, _QUARTILES = ("mean", "q25", "median", "q75"), (0.25, 0.5, 0.75)

_PLACE = ("centroid_x", "centroid_y")
_ARTEFACT = "artefact"  # the column with the kind of artefact that a nucleus lies in, empty where in none


class RegionTable(NamedTuple):
    """What was measured in the regions of a slide."""

    regions: SlideRegions
    rows: list[dict[str, Any]]  # a row for each region, in the order of its file
    notes: tuple[str, ...]  # what a reader of the rows should know


def measure_regions(slide: SlideFolder, file: RegionFile) -> RegionTable:
    """Count and measure the nuclei in each region of a finished slide.

    Columns: region (its name), class, area_mm2, tissue_mm2 (of what was segmented; NaN where it is not known), nuclei
    (all whose centroid lies in the region, half-open), nuclei_in_artefacts, per_mm2 (of tissue), count_CLASS,
    fraction_CLASS, and of every measurement in nuclei.parquet its mean, q25, median and q75. Tissue is counted without
    artefacts, so per_mm2 and all that follows are of the nuclei outside of artefacts; but for counts NaN where there
    are none.
    Memory holds one column of the table, and four bytes for each nucleus in each region.
    Law: counts and areas of regions that partition a slide sum to those of the slide.
    Raises AnnotationError for regions or outlines that cannot be read, RunError for a table or outlines that are not as
    they were written.
    """
    check_as_written(slide, slide.nuclei, slide.tissue_annotation, slide.artefact_annotations)
    provenance = tables.read_provenance(slide.nuclei)
    regions = read_regions(file, provenance.bounds)
    inside = _members(slide.nuclei, regions.polygons)
    kept = _outside_artefacts(slide.nuclei, inside)
    segmented, notes = _segmented(slide, regions, file, provenance.bounds)
    notes = (*_off_the_slide(regions, file, provenance.bounds), *notes)
    if missing := _missing_outlines(slide):
        segmented = np.full(len(regions.polygons), None)
        notes += tuple(f"mm2 of tissue are not known, as {path.name} is missing: {remedy(path)}" for path in missing)
    tissue_px = _tissue_px(slide, segmented, provenance.bounds)
    mm2 = math.prod(provenance.um_per_px) / 1e6  # of a px
    counts = np.array([len(rows) for rows in kept])
    columns: dict[str, Iterable[Any]] = {
        "region": regions.names,
        "class": regions.classes,
        "area_mm2": shapely.area(regions.polygons) * mm2,
        "tissue_mm2": tissue_px * mm2,
        "nuclei": [len(rows) for rows in inside],
        "nuclei_in_artefacts": [len(rows) - len(clean) for rows, clean in zip(inside, kept, strict=True)],
        "per_mm2": counts / np.where(tissue_px > 0, tissue_px * mm2, np.nan),
        **_by_class(slide.nuclei, kept, sorted(provenance.colours)),
        **_statistics(slide.nuclei, kept, several_classes=len(provenance.colours) > 1),
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return RegionTable(regions, rows, notes)


def _off_the_slide(regions: SlideRegions, file: RegionFile, bounds: Box) -> tuple[str, ...]:
    """What to say of regions that share no point with the slide: they may be in another frame, or of another slide.

    regions: of `file`; bounds: of the slide, slide px
    """
    beyond = int(np.count_nonzero(~shapely.intersects(shapely.box(*bounds), regions.polygons)))
    if not beyond:
        return ()
    which = f"{beyond} of {counted(len(regions.names), 'region')} {'lies' if beyond == 1 else 'lie'}"
    return (
        f"{which} outside the slide ({bounds.width} x {bounds.height} px): were they drawn on another one, or is it "
        f"{file.other_flag}?",
    )


# ------------------------------------------------------------------------------------------------- nuclei


def _members(nuclei: Path, polygons: Polygons) -> list[Ints]:
    """Rows of the nuclei in each region, ascending."""
    members: list[list[NDArray[np.int32]]] = [[np.zeros(0, np.int32)] for _ in polygons]
    first = 0
    for rows in tables.iter_nuclei(nuclei, _PLACE):
        if rows.num_rows == 0:  # a row group without rows, as pyarrow writes it for a table without
            continue
        xy = np.stack([arrow.values(rows[name]) for name in _PLACE], 1)
        # neighbours stand together in a table, so most of many regions lie apart from all nuclei of a row group
        extent = shapely.box(*np.fmin.reduce(xy), *np.fmax.reduce(xy))
        for number in np.flatnonzero(shapely.intersects(polygons, extent)):
            members[number].append((first + contained(polygons[number], xy)).astype(np.int32))
        first += rows.num_rows
    return [np.concatenate(parts) for parts in members]


def _outside_artefacts(nuclei: Path, members: list[Ints]) -> list[Ints]:
    """Of these rows those that lie in no artefact: all, in tables of versions that detected none."""
    if _ARTEFACT not in pq.read_schema(nuclei).names:
        return members
    kind = tables.read_nuclei(nuclei, [_ARTEFACT])[_ARTEFACT]
    clean = ~arrow.filled(kind)
    return [rows[clean[rows]] for rows in members]


def _by_class(nuclei: Path, members: Sequence[Ints], classes: Sequence[str]) -> dict[str, Iterable[Any]]:
    """How many nuclei of each class are in each region, and their share, which is NaN where there are no nuclei."""
    index = arrow.values(arrow.index(tables.read_nuclei(nuclei, ["class"])["class"], classes))
    counts = np.array([np.bincount(index[rows], minlength=len(classes)) for rows in members]).T  # (classes, regions)
    total = counts.sum(0)
    shares = counts / np.where(total > 0, total, np.nan)
    return {
        **{f"count_{name}": count.tolist() for name, count in zip(classes, counts, strict=True)},
        **{f"fraction_{name}": share for name, share in zip(classes, shares, strict=True)},
    }


def _statistics(nuclei: Path, members: Sequence[Ints], *, several_classes: bool) -> dict[str, Floats]:
    """Mean and quartiles of every measurement in each region; values that are not finite do not count."""
    columns: dict[str, Floats] = {}
    for field in pq.read_schema(nuclei):
        if field.name == "class_score" and not several_classes:
            continue
        if field.name in _PLACE or not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            continue
        values = arrow.values(tables.read_nuclei(nuclei, [field.name])[field.name])
        described = np.array([_describe(values[rows]) for rows in members])  # (regions, statistics)
        columns |= {f"{field.name}_{name}": column for name, column in zip(_STATISTICS, described.T, strict=True)}
    return columns


def _describe(values: NDArray[Any]) -> list[float]:
    """The numbers of _STATISTICS; NaN for no value."""
    values = values[np.isfinite(values)]
    if not len(values):
        return [np.nan] * len(_STATISTICS)
    return [float(values.mean(dtype=np.float64)), *np.quantile(values, _QUARTILES).tolist()]


# ------------------------------------------------------------------------------------------------- tissue


def _segmented(
    slide: SlideFolder, regions: SlideRegions, file: RegionFile, bounds: Box
) -> tuple[Polygons, tuple[str, ...]]:
    """The part of each region that was segmented, object (N,), None where that is not known; and what to say of it.

    regions: of `file`; bounds: of the slide, slide px. A run may have been restricted to the regions of another file.
    Raises AnnotationError where slide.json, which says so, is damaged.
    """
    content = read_slide_json(slide)
    if content is None and slide.slide_json.exists():
        raise AnnotationError(
            f"{slide.slide_json} is damaged, which says what was segmented: {remedy(slide.slide_json)}"
        )
    before = RegionFile.from_json((content or {}).get("regions"))
    if before is None:
        return regions.polygons, ()
    only = f"only what {before.path} says was segmented"
    if file[1:] == before[1:]:  # wherever it lies now
        return regions.within(regions.polygons), ()
    try:
        parts = read_regions(before, bounds).within(regions.polygons)
    except (NightslideError, OSError):
        note = f"{only}, and that file is gone or was changed: put it back, else mm2 of tissue are not known"
        return np.full(len(regions.polygons), None), (note,)
    beyond = int(np.count_nonzero(shapely.area(parts) < 0.999 * shapely.area(regions.polygons)))
    if not beyond:
        return parts, ()
    which = f"{beyond} of {counted(len(parts), 'region')} {'reaches' if beyond == 1 else 'reach'} beyond that"
    return parts, (f"{only}: {which}; no nuclei are known there, and mm2 of tissue are of what was segmented",)


def _missing_outlines(slide: SlideFolder) -> list[Path]:
    """The files without which the area of tissue is not known, and which are not there any more."""
    written = (read_slide_json(slide) or {}).get("files", {})
    needed = [slide.tissue_annotation]
    if slide.artefact_annotations.name in written:  # a run may not have looked for artefacts
        needed.append(slide.artefact_annotations)
    return [path for path in needed if not path.exists()]


def _tissue_px(slide: SlideFolder, regions: Polygons, bounds: Box) -> Floats:
    """The area of tissue without artefacts in each region, float64 (N,), px; NaN where a region is not known.

    regions: object (N,), slide px, None where one is not known; bounds: of the slide
    """
    if any(region is None for region in regions):
        return np.full(len(regions), np.nan)
    tissue = _outlines(slide.tissue_annotation, bounds)
    shared = _shared_px(regions, tissue)
    if not slide.artefact_annotations.exists():
        return shared
    # kinds of artefacts may overlap each other, pieces of tissue do not
    artefacts = shapely.get_parts(shapely.union_all(_outlines(slide.artefact_annotations, bounds)))
    artefact, piece = shapely.STRtree(tissue).query(artefacts)
    # in parts: two that share a line and an area give a geometry of both, on which older versions of GEOS raise
    without = shapely.get_parts(shapely.intersection(artefacts[artefact], tissue[piece]))
    return np.maximum(shared - _shared_px(regions, without), 0.0)


def _outlines(path: Path, bounds: Box) -> Polygons:
    """The areas in a file of ours, piece by piece: object (N,), slide px."""
    start = annotations.origin(path, bounds)
    polygons = read_objects(path)[0].polygons
    broken = ~shapely.is_valid(polygons)
    polygons[broken] = shapely.make_valid(polygons[broken])
    pieces: Polygons = shapely.get_parts(shapely.transform(polygons, lambda xy: xy + start))
    return pieces


def _shared_px(regions: Polygons, pieces: Polygons) -> Floats:
    """The area that each region shares with pieces that do not overlap: float64 (N,), px."""
    region, piece = shapely.STRtree(pieces).query(regions)
    shared = shapely.area(shapely.intersection(regions[region], pieces[piece]))
    return np.bincount(region, shared, len(regions)).astype(np.float64)  # int where nothing is shared
