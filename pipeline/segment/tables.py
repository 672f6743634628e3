"""The tables on disk: the instances of a block, the nuclei of a slide. Parquet, compressed with zstd.

Equal rows in equal order give equal bytes, in however many parts they were written.
"""

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pipeline import files
from pipeline.files import committed
from pipeline.model.instances import STATISTICS, HostInstances
from pipeline.segment import arrow
from pipeline.segment.polygons import Floats, Ints, Polygons, measure
from slides.geometry import Box, Size
from slides.grid import Tile

STAINS = tuple(
    stain if statistic == "mean" else f"{stain}_{statistic}"
    for stain in ("haematoxylin", "eosin")
    for statistic in STATISTICS
)
"Columns of the stains' densities, log10, of a nucleus; the mean has the name of its stain."

INSTANCES = pa.schema(
    [
        ("tile_row", pa.int32()),
        ("tile_col", pa.int32()),
        ("geometry", pa.binary()),  # WKB Polygon, work px
        ("x0", pa.float64()),  # its bounds, work px, so that candidates at seams are found without decoding polygons
        ("y0", pa.float64()),
        ("x1", pa.float64()),
        ("y1", pa.float64()),
        ("score", pa.float32()),
        ("votes", pa.uint8()),
        ("class_index", pa.uint8()),  # index of the class
        ("class_score", pa.float32()),
        *((name, pa.float32()) for name in STAINS),
    ]
)

NUCLEI = pa.schema(
    [
        ("id", pa.string()),  # dashed UUID
        ("geometry", pa.binary()),  # WKB Polygon, slide px
        ("class", pa.string()),
        ("artefact", pa.string()),  # in which its centroid lies: one of slides.artefacts.KINDS; else empty
        ("score", pa.float32()),
        ("votes", pa.uint8()),
        ("area_um2", pa.float32()),
        ("perimeter_um", pa.float32()),
        ("circularity", pa.float32()),
        ("major_axis_um", pa.float32()),
        ("minor_axis_um", pa.float32()),
        ("haematoxylin", pa.float32()),
        ("eosin", pa.float32()),
        ("centroid_x", pa.float64()),  # slide px
        ("centroid_y", pa.float64()),
        ("solidity", pa.float32()),
        ("max_diameter_um", pa.float32()),
        ("min_diameter_um", pa.float32()),
        *((name, pa.float32()) for name in STAINS if "_" in name),
        ("class_score", pa.float32()),  # the probability of the class for what is a nucleus; 1 where there is one class
    ]
)

_BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
_STORED = NUCLEI.append(pa.field("bbox", _BBOX))
"""What nuclei.parquet holds: `NUCLEI`, and the bounds of each outline, slide px, which GeoParquet calls its covering:
other programs read the nuclei of a region by them, and no others (`geopandas.read_parquet(path, bbox=...)`)."""

_KEY, GEO = b"nightslide", b"geo"  # name our JSON in a file's metadata, and that of GeoParquet
_ROW_GROUP = 50_000
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nightslide.nuclei")


# ------------------------------------------------------------------------------------ instances, per block


def instance_rows(tile: Tile, outlines: Polygons, instances: HostInstances) -> pa.Table:
    """The instances that a tile claimed, as rows of `INSTANCES`.

    outlines: object (N,) of Polygons, work px, of the N instances
    """
    rows, columns = np.full(len(outlines), tile.row), np.full(len(outlines), tile.col)
    bounds = shapely.bounds(outlines).reshape(-1, 4)
    stains = instances.stain_density.reshape(len(outlines), len(STAINS))
    measured = (instances.scores, instances.votes, instances.class_index, instances.class_scores, *stains.T)
    values = [rows, columns, _wkb(outlines), *bounds.T, *measured]
    return pa.table([arrow.array(v, f.type) for v, f in zip(values, INSTANCES, strict=True)], schema=INSTANCES)


def write_instances(path: Path, rows: pa.Table, record: dict[str, Any]) -> None:
    """Commit a block's instances, with a checksum and its record: anything that JSON holds, such as counts."""
    with files.checked(path, record) as partial:
        rows = rows.cast(INSTANCES).combine_chunks().replace_schema_metadata()
        pq.write_table(rows, partial, compression="zstd")


def read_instances(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The instances of a block, all columns of `INSTANCES` or some; see `geometry` and `bounds`."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def bounds(rows: pa.Table) -> Floats:
    """float64 (N, 4), x0 y0 x1 y1 in work px, of rows of `INSTANCES`."""
    return np.stack([arrow.values(rows[name]) for name in ("x0", "y0", "x1", "y1")], axis=1)


def geometry(rows: pa.Table) -> Polygons:
    """object (N,) of Polygons: the geometry column of either table, in that table's frame."""
    decoded: Polygons = shapely.from_wkb(rows["geometry"].to_pylist())
    return decoded


def _wkb(polygons: Polygons) -> NDArray[np.object_]:
    encoded: NDArray[np.object_] = shapely.to_wkb(polygons, byte_order=1, flavor="iso")
    return encoded


# ------------------------------------------------------------------------------------ nuclei, per slide


@dataclass(frozen=True)
class Provenance:
    """Where a slide's nuclei come from, and what a reader needs to place and draw them."""

    slide: str
    "The slide's quick hash."
    um_per_px: tuple[float, float]
    "Micrometres per slide px, x and y."
    size: Size
    "Of the slide, in slide px."
    bounds: Box
    "Of the slide's scanned part, in slide px; QuPath's OpenSlide reader crops to it."
    digest: str
    "Of the settings and weights."
    colours: dict[str, tuple[int, int, int]]
    "Red, green, blue of every class, 0 to 255."


class NucleiWriter:
    """Stream a slide's nuclei to nuclei.parquet: GeoParquet 1.1, committed when the `with` block ends without error.

    Memory holds one row group. `id` is the UUID 5 (RFC 9562) of the slide and the polygon's bytes, so that a
    second run writes the same and other settings keep the ids of unchanged polygons.
    Law: the bytes depend only on the sequence of nuclei, not on how it was divided into calls of `write`.
    """

    def __init__(self, path: Path, provenance: Provenance) -> None:
        self._path = path
        self._provenance = provenance
        self._slide = uuid.uuid5(_NAMESPACE, provenance.slide).bytes
        self._pending = pa.Table.from_batches([], _STORED)
        self._extent = np.array([np.inf, np.inf, -np.inf, -np.inf])

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            partial = opening.enter_context(committed(self._path))
            self._file = opening.enter_context(
                pq.ParquetWriter(partial, _STORED, compression="zstd", use_dictionary=["class", "artefact"])
            )
            opening.push(self._finish)
            self._closing = opening.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def write(
        self,
        polygons: Polygons,
        *,
        class_name: Sequence[str],
        score: NDArray[np.floating],
        votes: NDArray[np.integer],
        stains: NDArray[np.floating],
        class_score: NDArray[np.floating],
        artefact: Sequence[str],
    ) -> None:
        """Append nuclei; the shape of each is measured here.

        polygons: object (N,), slide px, each a valid, non-empty Polygon without holes (`polygons.solid`)
        class_name: (N,) names; artefact: (N,) kinds, each empty where there is none
        stains: float (N, 10), in the order of `STAINS`; score, votes, class_score: (N,)
        Raises ValueError for any other geometry, and for a class that has no colour.
        """
        self._check(polygons, class_name)
        shapes, encoded = measure(polygons, self._provenance.um_per_px), _wkb(polygons)
        extent = shapely.bounds(polygons).reshape(-1, 4)
        columns = {
            "id": self._ids(encoded),
            "geometry": encoded,
            "class": list(class_name),
            "artefact": list(artefact),
            "score": score,
            "votes": votes,
            **shapes._asdict(),
            "centroid_x": shapes.centroid[:, 0],
            "centroid_y": shapes.centroid[:, 1],
            **dict(zip(STAINS, stains.T, strict=True)),
            "class_score": class_score,
            "bbox": pa.StructArray.from_arrays(list(map(arrow.numbers, extent.T)), fields=list(_BBOX)),
        }
        rows = pa.table([arrow.array(columns[f.name], f.type) for f in _STORED], schema=_STORED)
        np.minimum(self._extent[:2], extent[:, :2].min(axis=0, initial=np.inf), out=self._extent[:2])
        np.maximum(self._extent[2:], extent[:, 2:].max(axis=0, initial=-np.inf), out=self._extent[2:])
        self._pending = pa.concat_tables([self._pending, rows])
        while self._pending.num_rows >= _ROW_GROUP:
            self._flush()

    def _check(self, polygons: Polygons, class_name: Sequence[str]) -> None:
        whole = (shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(polygons)
        wrong = np.flatnonzero(~whole | (shapely.get_num_interior_rings(polygons) > 0))
        if len(wrong):
            raise ValueError(
                f"detection {wrong[0]} is {polygons[wrong[0]].wkt[:60]}: need a Polygon, not empty, without "
                f"holes; use polygons.solid and leave out what is empty"
            )
        colourless = set(class_name) - set(self._provenance.colours)
        if colourless:
            raise ValueError(f"class '{min(colourless)}' has no colour: name one in Provenance.colours")

    def _ids(self, encoded: NDArray[np.object_]) -> list[str]:
        # uuid.uuid5 takes bytes only from Python 3.12 on.
        digests = (hashlib.sha1(self._slide + polygon, usedforsecurity=False).digest() for polygon in encoded)
        return [str(uuid.UUID(bytes=digest[:16], version=5)) for digest in digests]

    def _flush(self) -> None:
        group, rest = self._pending[:_ROW_GROUP], self._pending[_ROW_GROUP:]
        # The boundaries of chunks would change the file's bytes.
        self._file.write_table(group.combine_chunks(), row_group_size=_ROW_GROUP)
        self._pending = rest.combine_chunks()

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._pending.num_rows:
            self._flush()
        column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
        column["covering"] = {"bbox": {side.name: ["bbox", side.name] for side in _BBOX}}
        if np.isfinite(self._extent).all():
            column["bbox"] = self._extent.tolist()
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        self._file.add_key_value_metadata({GEO: _json(geo), _KEY: _json(dataclasses.asdict(self._provenance))})


def read_nuclei(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All nuclei of a slide, all columns of `NUCLEI` or some; `geometry` decodes the outlines.

    With the outlines the table is GeoParquet, should it be written again.
    """
    with pq.ParquetFile(path) as file:
        rows = _complete(file, file.read(columns or NUCLEI.names), columns)
    metadata = dict(rows.schema.metadata or {})
    geo = metadata.pop(GEO, None)
    if geo is not None and "geometry" in rows.column_names:
        metadata[GEO] = without_covering(geo)
    return rows.replace_schema_metadata(metadata)


def without_covering(geo: bytes) -> bytes:
    """The metadata of GeoParquet for a table with the outlines of nuclei.parquet, and without their bounds."""
    content = json.loads(geo)
    content["columns"]["geometry"].pop("covering", None)  # tables of the first versions have none
    return _json(content)


def _complete(file: pq.ParquetFile, rows: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """The columns asked for. Tables of the first versions have no `class_score`: 1 of one class, NaN of several."""
    wanted = NUCLEI.names if columns is None else list(columns)
    if "class_score" in wanted and "class_score" not in rows.column_names:
        several = len(json.loads(file.metadata.metadata[_KEY])["colours"]) > 1
        score = np.full(rows.num_rows, np.nan if several else 1, np.float32)
        rows = rows.append_column(NUCLEI.field("class_score"), arrow.numbers(score))
    return rows.select(wanted)


_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


@contextlib.contextmanager
def checked_between_groups(check: Callable[[], None]) -> Iterator[None]:
    """While this lasts, `iter_nuclei` in this thread calls `check` before each row group.

    What `check` raises ends a long export, of any format, whose slide is not ours any more.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check_now() -> None:
    """The check of `checked_between_groups`, where that lasts."""
    _check.get()()


def iter_nuclei(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """As `read_nuclei`, a row group (at most 50,000 rows) at a time. Raises what the check between groups does."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            check_now()
            yield _complete(file, file.read_row_group(group, columns or NUCLEI.names), columns)


def take_nuclei(path: Path, rows: Ints, columns: Sequence[str] | None = None) -> pa.Table:
    """Some of the nuclei, in their order in the table; only row groups that hold one are read.

    rows: int64 (N,), numbers of rows from 0, ascending
    """
    with pq.ParquetFile(path) as file:
        taken, first = [arrow.no_rows(_STORED).select(columns or NUCLEI.names)], 0
        for group in range(file.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, stop)] - first
            if len(here):
                rows_here = _complete(file, file.read_row_group(group, columns or NUCLEI.names), columns)
                taken.append(rows_here.take(arrow.numbers(here)))
            first = stop
    return pa.concat_tables(taken)


def read_provenance(path: Path) -> Provenance:
    """Where the nuclei of nuclei.parquet come from; reads only the file's metadata."""
    content = json.loads(pq.read_metadata(path).metadata[_KEY])
    return Provenance(
        slide=content["slide"],
        um_per_px=(content["um_per_px"][0], content["um_per_px"][1]),
        size=Size(*content["size"]),
        bounds=Box(*content["bounds"]),
        digest=content["digest"],
        colours={name: (r, g, b) for name, (r, g, b) in content["colours"].items()},
    )


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
