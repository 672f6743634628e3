"""nuclei.parquet -> nuclei.spatialdata.zarr: outlines and measurements as spatialdata 0.5 and later reads them.

Zarr v3; the versions are those of spatialdata's formats: container 0.2, shapes 0.3, tables 0.2.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import DTypeLike

from pipeline.config import Export
from pipeline.files import committed
from pipeline.segment.export.anndata_table import CHUNK, Group, annotation, write_table
from pipeline.segment.export.exported import Exported
from pipeline.segment.tables import GEO, iter_nuclei, read_provenance, without_covering


def write_spatialdata(nuclei: Path, out: Path, options: Export) -> Exported:
    """nuclei.parquet -> a Zarr store that `spatialdata.read_zarr` opens.

    shapes/nuclei: the outlines, by the table's `instance_id`; slide px from the corner of the whole slide, which is
    the coordinate system "global", and um in "micrometres". Left out without nuclei: spatialdata refuses empty shapes.
    tables/nuclei_table: see `write_table`
    """
    software = f"nightslide {metadata.version('nightslide')}"
    attributes: dict[str, Any] = {"spatialdata_attrs": {"version": "0.2", "spatialdata_software_version": software}}
    with committed(out) as partial:
        root = zarr.open_group(partial, mode="w-", zarr_format=3, attributes=attributes)
        shapes, table = root.create_group("shapes"), root.create_group("tables").create_group("nuclei_table")
        total = write_table(Group(table, _create), nuclei)
        about = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
        table.attrs.update(about | annotation(total))
        if total:
            shapes.create_group("nuclei", attributes=_shapes(read_provenance(nuclei).um_per_px))
            _write_outlines(nuclei, partial / "shapes" / "nuclei" / "shapes.parquet")
    return Exported(total)


def _create(group: zarr.Group, name: str, shape: tuple[int, ...], kind: DTypeLike) -> Any:
    return group.create_array(name, shape=shape, dtype=kind, chunks=(CHUNK, *shape[1:])[: len(shape)])


def _shapes(um_per_px: tuple[float, float]) -> dict[str, Any]:
    """The attributes of the shapes: what they are, and where."""
    axes = [{"name": name, "type": "space", "unit": "unit"} for name in "xy"]
    slide = {"name": "xy", "axes": axes}
    return {
        "encoding-type": "ngff:shapes",
        "axes": ["x", "y"],
        "coordinateTransformations": [
            {"type": "identity", "input": slide, "output": {"name": "global", "axes": axes}},
            {"type": "scale", "scale": um_per_px, "input": slide, "output": {"name": "micrometres", "axes": axes}},
        ],
        "spatialdata_attrs": {"version": "0.3"},
    }


def _write_outlines(nuclei: Path, out: Path) -> None:
    """The outlines as GeoParquet 1.1, with the metadata by which pandas makes `instance_id` the index."""
    geo = without_covering(pq.read_metadata(nuclei).metadata[GEO])
    index = {"name": "instance_id", "pandas_type": "int64", "numpy_type": "int64"}
    outline = {"name": "geometry", "pandas_type": "bytes", "numpy_type": "object"}
    columns = [{**column, "field_name": column["name"], "metadata": None} for column in (outline, index)]
    pandas = {"index_columns": ["instance_id"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    schema = pa.schema(
        [("geometry", pa.binary()), ("instance_id", pa.int64())],
        metadata={GEO: geo, b"pandas": json.dumps(pandas).encode()},
    )
    first = 1
    with pq.ParquetWriter(out, schema, compression="zstd", use_dictionary=False) as file:
        for rows in iter_nuclei(nuclei, ["geometry"]):
            numbers = pa.array(np.arange(first, first + rows.num_rows))
            file.write_table(rows.append_column("instance_id", numbers).cast(schema))
            first += rows.num_rows
