"""The table of AnnData reads back equal, by anndata; `test_spatialdata.py` has the same table in Zarr."""

import dataclasses
import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nuclei_tables import PROVENANCE, blobs, write
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export.anndata_table import write_h5ad
from pipeline.segment.export.exported import Exported

README = Path(__file__).parents[4] / "README.md"

MEASUREMENTS = [
    "area_um2",
    "perimeter_um",
    "circularity",
    "major_axis_um",
    "minor_axis_um",
    "haematoxylin",
    "eosin",
    "solidity",
    "max_diameter_um",
    "min_diameter_um",
    *(f"{stain}_{value}" for stain in ("haematoxylin", "eosin") for value in ("median", "min", "max", "sd")),
]


def check_table(table: anndata.AnnData, rows: pa.Table) -> None:
    """A table of AnnData holds what nuclei.parquet holds, but for the outlines."""
    count = rows.num_rows
    assert table.shape == (count, len(MEASUREMENTS))
    assert list(table.var_names) == MEASUREMENTS
    assert list(table.obs_names) == rows["id"].to_pylist()
    assert table.X.dtype == np.float32
    np.testing.assert_array_equal(table.X, np.stack([rows[name] for name in MEASUREMENTS], axis=1))
    assert table.obsm["spatial"].dtype == np.float64
    np.testing.assert_array_equal(table.obsm["spatial"], np.stack([rows["centroid_x"], rows["centroid_y"]], axis=1))

    assert list(table.obs.columns) == ["class", "artefact", "score", "votes", "class_score", "region", "instance_id"]
    assert table.obs["class"].tolist() == rows["class"].to_pylist()
    assert list(table.obs["class"].cat.categories) == list(PROVENANCE.colours)
    for name in ("score", "votes", "class_score"):
        np.testing.assert_array_equal(table.obs[name], rows[name])
    assert table.obs["region"].tolist() == ["nuclei"] * count
    assert list(table.obs["region"].cat.categories) == ["nuclei"]
    assert table.obs["instance_id"].tolist() == list(range(1, count + 1))

    assert list(table.uns["class_colors"]) == ["#c81e1e", "#0080ff"]
    origin = table.uns["nightslide"]
    assert (origin["slide"], origin["digest"]) == (PROVENANCE.slide, PROVENANCE.digest)
    assert origin["um_per_px"].tolist() == list(PROVENANCE.um_per_px)
    assert origin["size"].tolist() == list(PROVENANCE.size)
    assert origin["bounds"].tolist() == list(PROVENANCE.bounds)
    attributes = {"region": "nuclei", "region_key": "region", "instance_key": "instance_id"}
    assert table.uns.get("spatialdata_attrs") == (attributes if count else None)


def test_anndata_reads_the_table_back(tmp_path, monkeypatch):
    """In three row groups, the last not full; without regard to the bounds of the slide."""
    monkeypatch.setattr(tables, "_ROW_GROUP", 20)
    nuclei = write(tmp_path / "nuclei.parquet", blobs(45))
    assert write_h5ad(nuclei, tmp_path / "n.h5ad", Export(crop=True)) == Exported(45)
    check_table(anndata.read_h5ad(tmp_path / "n.h5ad"), tables.read_nuclei(nuclei))


def test_a_slide_without_nuclei_has_an_empty_table(tmp_path):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(0))
    assert write_h5ad(nuclei, tmp_path / "n.h5ad", Export()) == Exported(0)
    check_table(anndata.read_h5ad(tmp_path / "n.h5ad"), tables.read_nuclei(nuclei))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit for the size of files")
def test_a_file_that_cannot_be_written_to_its_end_is_the_systems_error(tmp_path):
    """h5py raised RuntimeError, which ended the export of all other slides; at its end the process crashed."""
    nuclei = write(tmp_path / "nuclei.parquet", blobs(45))
    write_h5ad(nuclei, tmp_path / "whole.h5ad", Export())
    size = (tmp_path / "whole.h5ad").stat().st_size
    code = f"""if True:
        import resource
        from pathlib import Path
        from pipeline.config import Export
        from pipeline.segment.export.anndata_table import write_h5ad

        for limit in range(0, {size}, {size // 8}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write_h5ad(Path({str(nuclei)!r}), Path({str(tmp_path / "n.h5ad")!r}), Export())
            except OSError as error:
                assert error.errno == {errno.EFBIG}, error
            else:
                raise AssertionError(limit)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nuclei.parquet", "whole.h5ad"]


def test_another_column_of_text_is_a_category(tmp_path):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(4))
    rows = pq.read_table(nuclei)
    place = rows.schema.get_field_index("artefact")
    rows = rows.set_column(place, "artefact", pa.array(["pen", None, "blur", "pen"]))
    pq.write_table(rows.replace_schema_metadata(pq.read_metadata(nuclei).metadata), nuclei)
    write_h5ad(nuclei, tmp_path / "n.h5ad", Export())
    column = anndata.read_h5ad(tmp_path / "n.h5ad").obs["artefact"]
    assert list(column.cat.categories) == ["blur", "pen"]
    assert column.cat.codes.tolist() == [1, -1, 0, 1]


def test_the_readme_joins_slides_in_um(tmp_path, monkeypatch):
    """Of slides with pixels of two sizes."""
    expected = []
    for name, um_per_px in (("case7", (0.25, 0.25)), ("case9", (0.5, 0.25))):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        slide = dataclasses.replace(PROVENANCE, slide=name, um_per_px=um_per_px)
        nuclei = write(folder / "nuclei.parquet", blobs(5), provenance=slide)
        write_h5ad(nuclei, folder / "nuclei.h5ad", Export())
        (folder / "slide.json").write_text(json.dumps({"um_per_px": um_per_px}), encoding="utf-8")
        rows = tables.read_nuclei(nuclei)
        expected += (np.stack([rows["centroid_x"], rows["centroid_y"]], axis=1) * um_per_px).tolist()
    monkeypatch.chdir(tmp_path)
    of_tables, _, example = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(of_tables, "README.md", "exec"), names)
    joined = names["nuclei"].sort_index(level="slide", sort_remaining=False)
    assert joined.index.get_level_values("slide").tolist() == ["case7"] * 5 + ["case9"] * 5
    np.testing.assert_allclose(joined[["x_um", "y_um"]], expected)
    exec(compile(example, "README.md", "exec"), names)
    assert names["nuclei"].obs["slide"].tolist() == ["case7"] * 5 + ["case9"] * 5
    np.testing.assert_allclose(names["nuclei"].obsm["spatial"], expected)
