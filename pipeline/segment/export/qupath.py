"""nuclei.parquet -> nuclei.geojson.zip: GeoJSON as QuPath 0.5 to 0.8 reads it.

Text is put together column by column in Arrow, not object by object.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment.export.exported import Exported, finite, origin
from pipeline.segment.polygons import Polygons, solid
from pipeline.segment.tables import NUCLEI, Provenance, geometry, iter_nuclei, read_provenance

# A million detections load into QuPath in 2 GB as shards of this size, and need 12 GB in one file.
_SHARD = 50_000

# The names that QuPath gives to its own measurements, where it has the same. The micro sign is escaped, so
# that no reader can guess the encoding wrong.
_MEASUREMENTS = {
    "score": "Detection probability",
    "votes": "Votes",
    "area_um2": "Area \\u00b5m^2",
    "perimeter_um": "Perimeter \\u00b5m",
    "circularity": "Circularity",
    "major_axis_um": "Major axis \\u00b5m",
    "minor_axis_um": "Minor axis \\u00b5m",
    "haematoxylin": "Hematoxylin OD mean",
    "eosin": "Eosin OD mean",
}


def write_qupath(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a zip of GeoJSON files of at most 50,000 detections each.

    Coordinates are slide px with two decimals; from the corner of the slide's bounds if `options.crop`, as that is
    where QuPath's OpenSlide reader puts the origin. Every feature has a dashed UUID, one closed valid
    Polygon, a class with a colour, and finite measurements (others are left out): QuPath refuses a whole file
    for less.
    """
    provenance = read_provenance(nuclei)
    total = np.zeros(3, dtype=np.int64)
    with committed(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        for number, rows in enumerate(_shards(nuclei)):
            outlines, changed = _printable(geometry(rows), origin(provenance, options.crop))
            left = ~shapely.is_empty(outlines)
            features = _features(rows.filter(left), outlines[left], provenance)
            _add(archive, f"nuclei-{number:05d}.geojson", features)
            total += left.sum(), (changed & left).sum(), (~left).sum()
    return Exported(*total.tolist())


def _shards(nuclei: Path) -> Iterator[pa.Table]:
    """The table in slices of at most _SHARD rows; one empty slice if none, as a zip needs a file."""
    shard = None
    for group in iter_nuclei(nuclei):
        for first in range(0, group.num_rows, _SHARD):
            shard = group[first : first + _SHARD]
            yield shard
    if shard is None:
        yield NUCLEI.empty_table()


def _printable(polygons: Polygons, corner: tuple[float, float]) -> tuple[Polygons, NDArray[np.bool_]]:
    """Outlines as they are written: in hundredths of a pixel, whole numbers, valid.

    polygons: object (N,), slide px; corner: the origin of the export, slide px (x, y)
    Returns object (N,), some of them empty, and bool (N,), which were repaired: rounding can make an outline touch or
    cross itself. Such a one is made valid on the grid of hundredths, and its largest part is kept.
    """
    hundredths = shapely.transform(polygons, lambda xy: np.rint((xy - corner) * 100))
    broken = ~shapely.is_valid(hundredths)
    repaired = shapely.set_precision(shapely.make_valid(hundredths[broken]), 1.0)
    hundredths[broken] = solid(repaired)
    return hundredths, broken


def _features(rows: pa.Table, outlines: Polygons, provenance: Provenance) -> pa.Array:
    """One line of GeoJSON, string (N,), for each row of `NUCLEI` and its outline in hundredths."""
    colours = sorted(provenance.colours.items())
    classes = {name: json.dumps({"name": name, "color": colour}) for name, colour in colours}
    known = pa.array(list(classes), pa.string())
    classification = pa.array(list(classes.values()), pa.string()).take(pc.index_in(rows["class"], known))
    return pc.binary_join_element_wise(
        '{"type":"Feature","id":"',
        rows["id"],
        '","geometry":{"type":"Polygon","coordinates":[[',
        _rings(outlines),
        ']]},"properties":{"objectType":"detection","classification":',
        classification,
        ',"measurements":{',
        _measurements(rows),
        "}}}",
        "",
    )


def _rings(outlines: Polygons) -> pa.Array:
    """Vertices of every exterior ring, closed: "[x,y],[x,y],..." in px. string (N,)"""
    xy, polygon = shapely.get_coordinates(shapely.get_exterior_ring(outlines), return_index=True)
    x, y = (pc.cast(pa.array(axis), pa.string()) for axis in (xy / 100).T)
    vertices = pc.binary_join_element_wise("[", x, ",", y, "]", "")
    starts = np.searchsorted(polygon, np.arange(len(outlines) + 1)).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(starts, vertices), ",")


def _measurements(rows: pa.Table) -> pa.Array:
    """ "name":number, ... of every row; a number that is not finite is left out. string (N,)"""
    items = []
    for column, name in _MEASUREMENTS.items():
        number = pc.cast(finite(rows[column]), pa.string())
        items.append(pc.binary_join_element_wise(f'"{name}":', number, ""))
    return pc.binary_join_element_wise(*items, ",", null_handling="skip")


def _add(archive: zipfile.ZipFile, name: str, features: pa.ChunkedArray) -> None:
    """A FeatureCollection, one feature a line; its bytes do not depend on the day or the system."""
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
    text = '{"type":"FeatureCollection","features":[\n' + ",\n".join(features.to_pylist()) + "\n]}\n"
    archive.writestr(member, text.encode(), compresslevel=1)
