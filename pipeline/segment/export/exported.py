"""What the formats share: the counts of an export, the origin of coordinates, numbers that are not finite."""

from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Export
from pipeline.segment.tables import Provenance


class Exported(NamedTuple):
    """How many nuclei of a table were written; printed as `2,418 nuclei (3 outlines repaired, 0 dropped)`."""

    written: int
    changed: int = 0  # of those written, how many outlines needed more than rounding to be valid
    dropped: int = 0  # nothing was left of them at the precision of the format

    def __str__(self) -> str:
        return f"{self.written:,} nuclei ({self.changed:,} outlines repaired, {self.dropped:,} dropped)"


class Writer(Protocol):
    """nuclei.parquet -> the file or folder `out`, committed when it is complete (`pipeline.files.committed`)."""

    def __call__(self, nuclei: Path, out: Path, options: Export) -> Exported: ...


class Format(NamedTuple):
    """A format: what writes it, and the fields of `Export` that its content depends on."""

    write: Writer
    options: tuple[str, ...]
    package: str = ""
    "A package that it needs beside those of the default installation."
    extra: str = ""
    "The extra of this project that installs it."


def origin(provenance: Provenance, crop: bool) -> tuple[float, float]:
    """Where the exported coordinates start, slide px (x, y): the corner of the slide's bounds if `crop`, else 0, 0."""
    return (float(provenance.bounds.x0), float(provenance.bounds.y0)) if crop else (0.0, 0.0)


def finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with null for NaN and infinity; whole numbers and text as they are."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
