"""nuclei.parquet -> the files of other programs. A format is a module here, an entry of `FORMATS` and of `EXPORTS`.

Tables are read row group by row group, so memory does not grow with the slide; equal tables give equal bytes.
"""

from collections.abc import Mapping

from pipeline.config import ExportFormat
from pipeline.segment.export.csv_table import write_csv
from pipeline.segment.export.exported import Exported, Format
from pipeline.segment.export.qupath import write_qupath

__all__ = ["FORMATS", "Exported", "write_csv", "write_qupath"]

FORMATS: Mapping[ExportFormat, Format] = {
    "qupath": Format(write_qupath, options=("crop",)),
    "csv": Format(write_csv, options=("crop",)),
}
"By name; `pipeline.layout.EXPORTS` names the file or folder of each."
