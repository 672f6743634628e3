"""nuclei.parquet -> the files of other programs. A format is a module here and an entry of `FORMATS`.

Tables are read row group by row group, so memory does not grow with the slide; equal tables give equal bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.config import Export
from pipeline.segment.export.csv_table import write_csv
from pipeline.segment.export.exported import Exported, Writer
from pipeline.segment.export.qupath import write_qupath

__all__ = ["FORMATS", "Exported", "Format", "write_csv", "write_formats", "write_qupath"]


class Format(NamedTuple):
    """A format that `--export.formats` names."""

    file: str  # its name in the slide's folder
    write: Writer


FORMATS: Mapping[str, Format] = {
    "qupath": Format("nuclei.geojson.zip", write_qupath),
    "csv": Format("nuclei.csv", write_csv),
}


def write_formats(folder: Path, export: Export) -> dict[str, Exported]:
    """Write the chosen formats of a slide beside its nuclei.parquet. Returns the counts by file name.

    folder: the slide's, as a run left it
    """
    chosen = [FORMATS[name] for name in export.formats]
    return {f.file: f.write(folder / "nuclei.parquet", folder / f.file, crop=export.crop) for f in chosen}
