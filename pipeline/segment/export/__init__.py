"""nuclei.parquet -> the files of other programs. A format is a module here and an entry of `FORMATS`.

Tables are read row group by row group, so memory does not grow with the slide; equal tables give equal bytes.
"""

from collections.abc import Mapping

from pipeline.config import ExportFormat
from pipeline.segment.export.csv_table import write_csv
from pipeline.segment.export.exported import Exported, Writer
from pipeline.segment.export.qupath import write_qupath

__all__ = ["FORMATS", "Exported", "write_csv", "write_qupath"]

FORMATS: Mapping[ExportFormat, Writer] = {"qupath": write_qupath, "csv": write_csv}
"What writes the file of a format; `pipeline.layout.EXPORTS` names that file."
