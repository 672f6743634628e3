"""nuclei.parquet -> nuclei.csv: a table for spreadsheets and statistics programs, without outlines."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment import arrow
from pipeline.segment.export.exported import Exported, finite, origin
from pipeline.segment.tables import NUCLEI, iter_nuclei, read_provenance
from pipeline.text import csv_cell


def write_csv(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> CSV in UTF-8, a row a nucleus: id, centroid, class, measurements.

    Columns are named as in nuclei.parquet; the centroid is in slide px, from the corner of the slide's bounds
    if `options.crop`, so that it fits the QuPath export. A value that is not finite is left empty. A class that a
    spreadsheet would evaluate, such as +, has an apostrophe in front (`csv_cell`).
    """
    provenance = read_provenance(nuclei)
    x, y = arrow.numbers(np.array(origin(provenance, options.crop)))  # scalars of Arrow
    classes = list(provenance.colours)
    class_cells = arrow.text([str(csv_cell(name)) for name in classes])
    first = ["id", "centroid_x", "centroid_y"]
    order = [*first, *(name for name in NUCLEI.names if name not in (*first, "geometry"))]
    schema = pa.schema([NUCLEI.field(name) for name in order])
    written = 0
    quoting = pyarrow.csv.WriteOptions(quoting_style="needed")
    with (
        committed(out) as partial,
        partial.open("wb") as stream,  # by itself the writer leaves it open, and Windows renames no open file
        pyarrow.csv.CSVWriter(stream, schema, write_options=quoting) as file,
    ):
        for rows in iter_nuclei(nuclei, order):
            changed = {
                "centroid_x": pc.subtract(rows["centroid_x"], x),
                "centroid_y": pc.subtract(rows["centroid_y"], y),
                "class": class_cells.take(arrow.index(rows["class"], classes)),
            }
            columns = [finite(changed.get(name, rows[name])) for name in order]
            file.write_table(pa.table(columns, schema=schema))
            written += rows.num_rows
    return Exported(written)
