"""nuclei.parquet -> nuclei.geojson.zip: GeoJSON as QuPath 0.5 to 0.8 reads it.

Text is put together column by column in Arrow, not object by object.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from pipeline.config import Export
from pipeline.files import committed
from pipeline.model.instances import STATISTICS
from pipeline.segment import arrow
from pipeline.segment.cells import cells_of, read_bounds
from pipeline.segment.export.exported import Exported, finite, shown
from pipeline.segment.polygons import Polygons, measure, solid
from pipeline.segment.tables import NUCLEI, STAINS, Provenance, geometry, iter_nuclei, read_provenance
from slides.geometry import Box

# A million detections load into QuPath in 2 GB as shards of this size, and need 12 GB in one file.
_SHARD = 50_000

# The names that QuPath gives to its own measurements, where it has the same: those of its ObjectMeasurements, which
# StarDist and InstanSeg use too. The micro sign is escaped, so that no reader can guess the encoding wrong.
_MEASUREMENTS = {"score": "Detection probability", "votes": "Votes"}
_SHAPE = {
    "area_um2": "Area \\u00b5m^2",
    "perimeter_um": "Length \\u00b5m",
    "circularity": "Circularity",
    "solidity": "Solidity",
    "max_diameter_um": "Max diameter \\u00b5m",
    "min_diameter_um": "Min diameter \\u00b5m",
    "major_axis_um": "Major axis \\u00b5m",
    "minor_axis_um": "Minor axis \\u00b5m",
}
_STATISTICS = dict(zip(STATISTICS, ("Mean", "Median", "Min", "Max", "Std.Dev."), strict=True))
_STAIN_NAMES = {"haematoxylin": "Hematoxylin", "eosin": "Eosin"}

_HEAD, _TAIL = b'{"type":"FeatureCollection","features":[\n', b"\n]}\n"


class _Shard(NamedTuple):
    rows: pa.Table  # of `NUCLEI`
    cells: Polygons | None  # slide px; None where the nuclei themselves are exported


def write_qupath(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a zip of GeoJSON files of at most 50,000 detections, or cells, each.

    Coordinates are slide px with two decimals; from the corner of the slide's bounds if `options.crop`, as that is
    where QuPath's OpenSlide reader puts the origin. Outlines end at the edge of that image. Every feature has a dashed
    UUID, one closed valid Polygon, a class with a colour, and finite measurements (others are left out): QuPath refuses
    a whole file for less. A cell has the nucleus' id and class, and the nucleus within it.
    """
    provenance = read_provenance(nuclei)
    image = shown(provenance, options.crop)
    total = np.zeros(3, dtype=np.int64)
    with committed(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        for number, (rows, cells) in enumerate(_shards(nuclei, options.cells)):
            outlines, changed = _printable(geometry(rows), image)
            left = ~shapely.is_empty(outlines)
            around = None if cells is None else _printable_cells(cells, outlines, image)[left]
            features = _features(rows.filter(arrow.numbers(left)), outlines[left], around, provenance)
            _add(archive, f"nuclei-{number:05d}.geojson", features)
            total += left.sum(), (changed & left).sum(), (~left).sum()
    return Exported(*total.tolist())


def _shards(nuclei: Path, cells_um: float) -> Iterator[_Shard]:
    """The table in slices of at most _SHARD rows; one empty slice if none, as a zip needs a file."""
    bounds = read_bounds(nuclei) if cells_um else np.empty((0, 4))
    row = 0
    for group in iter_nuclei(nuclei):
        for first in range(0, group.num_rows, _SHARD):
            rows = group[first : first + _SHARD]
            part = slice(row, row + rows.num_rows)
            yield _Shard(rows, cells_of(nuclei, bounds, part, cells_um) if cells_um else None)
            row = part.stop
    if not row:
        yield _Shard(arrow.no_rows(NUCLEI), None)


def _printable(polygons: Polygons, image: Box) -> tuple[Polygons, NDArray[np.bool_]]:
    """Outlines as they are written: in hundredths of a pixel from the image's corner, whole numbers, valid, within it.

    polygons: object (N,), slide px; image: slide px
    Returns object (N,), some of them empty, and bool (N,), which were repaired: rounding can make an outline touch or
    cross itself. Such a one is made valid on the grid of hundredths, and its largest part is kept.
    """
    hundredths = shapely.transform(polygons, lambda xy: np.rint((xy - image.corner) * 100))
    broken = ~shapely.is_valid(hundredths)
    repaired = shapely.set_precision(shapely.make_valid(hundredths[broken]), 1.0)
    hundredths[broken] = solid(repaired)
    extent, end = shapely.bounds(hundredths).reshape(-1, 4), 100.0 * np.array(image.size)
    beyond = (extent[:, :2] < 0).any(1) | (extent[:, 2:] > end).any(1)
    within = shapely.intersection(hundredths[beyond], shapely.box(0, 0, *end))
    hundredths[beyond] = solid(shapely.set_precision(within, 1.0))
    return hundredths, broken


def _printable_cells(cells: Polygons, nuclei: Polygons, image: Box) -> Polygons:
    """Cells as they are written; the nucleus where rounding leaves nothing of a cell. object (N,)"""
    rounded, _ = _printable(cells, image)
    return np.where(shapely.is_empty(rounded), nuclei, rounded)


def _features(rows: pa.Table, nuclei: Polygons, cells: Polygons | None, provenance: Provenance) -> pa.Array:
    """One line of GeoJSON, string (N,), for each row of `NUCLEI`, its outline and its cell, in hundredths."""
    colours = sorted(provenance.colours.items())
    classes = {name: json.dumps({"name": name, "color": colour}) for name, colour in colours}
    classification = arrow.text(list(classes.values())).take(arrow.index(rows["class"], list(classes)))
    numbers = _measured(rows, "" if cells is None else "Nucleus: ")
    if len(classes) > 1:
        numbers["Class probability"] = rows["class_score"]
    numbers["In artefact"] = arrow.numbers(arrow.filled(rows["artefact"]).astype(np.uint8))  # a measurement is a number
    outlines: tuple[pa.Array | str, ...] = (_polygons(nuclei),)
    if cells is not None:
        outlines = (_polygons(cells), ',"nucleusGeometry":', _polygons(nuclei))
        numbers |= _measured_cells(cells, rows, provenance.um_per_px)
    return arrow.join(
        '{"type":"Feature","id":"',
        rows["id"],
        '","geometry":',
        *outlines,
        f',"properties":{{"objectType":"{"detection" if cells is None else "cell"}","classification":',
        classification,
        ',"measurements":{',
        _measurements(numbers),
        "}}}",
        "",
    )


def _polygons(polygons: Polygons) -> pa.Array:
    """GeoJSON of Polygons in hundredths: {"type":"Polygon","coordinates":[[[x,y],...],...]} in px. string (N,)"""
    rings, polygon = shapely.get_rings(polygons, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    x, y = (pc.cast(arrow.numbers(axis), pa.string()) for axis in (xy / 100).T)
    text = arrow.join("[", x, ",", y, "]", "")
    for owner, count in ((ring, len(rings)), (polygon, len(polygons))):
        starts = np.searchsorted(owner, np.arange(count + 1)).astype(np.int32)
        joined = pc.binary_join(pa.ListArray.from_arrays(arrow.numbers(starts), text), arrow.text([","])[0])
        text = arrow.join("[", joined, "]", "")
    return arrow.join('{"type":"Polygon","coordinates":', text, "}", "")


def _measured(rows: pa.Table, nucleus: str) -> dict[str, pa.ChunkedArray]:
    """The measurements of nuclei, by QuPath's names; nucleus: "Nucleus: " for those of cells, as QuPath has it."""
    shape = {nucleus + name: rows[column] for column, name in _SHAPE.items()}
    stains = {}
    for column in STAINS:
        stain, _, statistic = column.partition("_")
        stains[f"{_STAIN_NAMES[stain]}: {nucleus}{_STATISTICS[statistic or 'mean']}"] = rows[column]
    return {**{name: rows[column] for column, name in _MEASUREMENTS.items()}, **shape, **stains}


def _measured_cells(cells: Polygons, rows: pa.Table, um_per_px: tuple[float, float]) -> dict[str, pa.ChunkedArray]:
    """The measurements of the cells themselves, by QuPath's names. cells: in hundredths"""
    x, y = um_per_px
    measured = measure(cells, (x / 100, y / 100))
    shape = {f"Cell: {name}": pa.chunked_array([getattr(measured, column)]) for column, name in _SHAPE.items()}
    share = pc.divide(rows["area_um2"], pa.chunked_array([measured.area_um2]))
    return {**shape, "Nucleus/Cell area ratio": share}


def _measurements(numbers: Mapping[str, pa.ChunkedArray]) -> pa.Array:
    """ "name":number, ... of every row; a number that is not finite is left out. string (N,)"""
    items = (arrow.join(f'"{name}":', pc.cast(finite(column), pa.string()), "") for name, column in numbers.items())
    return arrow.join(*items, ",", null_handling="skip")


def _add(archive: zipfile.ZipFile, name: str, features: pa.ChunkedArray) -> None:
    """A FeatureCollection, one feature a line; its bytes do not depend on the day or the system."""
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
    every = pa.ListArray.from_arrays(arrow.numbers(np.array([0, len(features)], np.int32)), arrow.whole(features))
    lines = pc.binary_join(every, arrow.text([",\n"])[0])[0].as_buffer()
    archive.writestr(member, b"".join([_HEAD, lines, _TAIL]), compresslevel=1)
