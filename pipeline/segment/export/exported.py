"""What the formats share: the counts of an export, parts of a table, the origin of coordinates, outlines, numbers."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from pipeline.config import Export
from pipeline.segment.polygons import Floats, Ints, Polygons
from pipeline.segment.tables import Provenance, iter_nuclei
from pipeline.text import counted, counted_nuclei
from slides.geometry import Box, Size


class Exported(NamedTuple):
    """How many nuclei of a table were written; printed as `2,418 nuclei (3 outlines repaired, 0 dropped)`."""

    written: int
    changed: int = 0  # of those written, how many outlines needed more than rounding to be valid
    dropped: int = 0  # nothing was left of them at the precision of the format

    def __str__(self) -> str:
        return f"{counted_nuclei(self.written)} ({counted(self.changed, 'outline')} repaired, {self.dropped:,} dropped)"


class Writer(Protocol):
    """nuclei.parquet -> the file or folder `out`, committed when it is complete (`pipeline.files.committed`)."""

    def __call__(self, nuclei: Path, out: Path, options: Export) -> Exported: ...


class Check(Protocol):
    """Raises a NightslideError, before inference, where the format cannot be written for a slide.

    name: of the slide's folder; size and bounds: of the slide, in slide px.
    """

    def __call__(self, name: str, size: Size, bounds: Box, options: Export) -> object: ...


class Format(NamedTuple):
    """A format: what writes it, and the fields of `Export` that its content depends on."""

    write: Writer
    options: tuple[str, ...]
    package: str = ""
    "A package that it needs beside those of the default installation."
    extra: str = ""
    "The extra of this project that installs it."
    check: Check | None = None


class Rings(NamedTuple):
    """Outlines without their closing vertices, one after another."""

    vertices: NDArray[Any]  # (V, 2) x y
    starts: Ints  # (N + 1,): outline i has the vertices from starts[i] to starts[i + 1]


def shown(provenance: Provenance, crop: bool) -> Box:
    """What the other program shows of the slide, slide px: its bounds if `crop`, else all of it."""
    return provenance.bounds if crop else Box(0, 0, *provenance.size)


def origin(provenance: Provenance, crop: bool) -> tuple[float, float]:
    """Where the exported coordinates start, slide px (x, y): at the corner of what is shown."""
    corner = shown(provenance, crop)
    return float(corner.x0), float(corner.y0)


def finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with null for NaN and infinity; whole numbers and text as they are."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_finite(column), column, pa.nulls(1, column.type)[0])


def shards(nuclei: Path, row_groups: int) -> Iterator[pa.Table]:
    """The rows of nuclei.parquet, so many row groups (of at most 50,000 rows) at a time; none where it has no rows."""
    groups = iter_nuclei(nuclei)
    while part := list(itertools.islice(groups, row_groups)):
        yield pa.concat_tables(part)


def open_rings(polygons: Polygons, place: Callable[[Floats], NDArray[Any]]) -> Rings:
    """Outlines for formats that close them themselves.

    polygons: object (N,) of Polygons without holes, not empty
    place: float64 (V, 2), slide px -> the coordinates that are written. Of neighbouring vertices that it rounds to the
    same place one is left, so an outline may end up with fewer than three.
    """
    xy, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    placed = place(xy)
    # the last vertex of a ring repeats its first
    kept = np.append((owner[1:] == owner[:-1]) & (placed[1:] != placed[:-1]).any(axis=1), np.False_)
    return Rings(placed[kept], np.searchsorted(owner[kept], np.arange(len(polygons) + 1)))
