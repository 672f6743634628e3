"""The store reads back equal, by zarr, geopandas and anndata, which are what spatialdata reads it with, and by itself.

spatialdata is no package of the development group: on Python 3.11 it would replace Dask by an older one. Its test:

    uv run --isolated --python 3.12 --with spatialdata --with squidpy pytest \\
        tests/pipeline/segment/export/test_spatialdata.py
"""

import dataclasses
import json
import re
from pathlib import Path

import anndata
import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from nuclei_tables import PROVENANCE, blobs, write
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export.anndata_table import write_h5ad
from pipeline.segment.export.exported import Exported
from pipeline.segment.export.spatialdata import write_spatialdata

README = Path(__file__).parents[4] / "README.md"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of 45 nuclei of a slide with pixels of 0.25 x 0.5 um, beside its nuclei.parquet of three row groups."""
    monkeypatch.setattr(tables, "_ROW_GROUP", 20)
    slide = dataclasses.replace(PROVENANCE, um_per_px=(0.25, 0.5))
    nuclei = write(tmp_path / "nuclei.parquet", blobs(45), provenance=slide)
    assert write_spatialdata(nuclei, tmp_path / "n.zarr", Export(crop=True)) == Exported(45)
    write_h5ad(nuclei, tmp_path / "n.h5ad", Export())
    return tmp_path / "n.zarr"


@pytest.fixture
def empty(tmp_path):
    """A store of no nuclei, beside its nuclei.parquet."""
    nuclei = write(tmp_path / "nuclei.parquet", blobs(0))
    assert write_spatialdata(nuclei, tmp_path / "n.zarr", Export()) == Exported(0)
    return tmp_path / "n.zarr"


def attributes(group):
    """Of a group of Zarr v3, as they are stored."""
    content = json.loads((group / "zarr.json").read_text())
    assert content["zarr_format"] == 3
    assert "consolidated_metadata" not in content
    return content["attributes"]


def axes(name):
    return {"name": name, "axes": [{"name": axis, "type": "space", "unit": "unit"} for axis in "xy"]}


def test_its_attributes_are_those_of_spatialdata(store):
    assert attributes(store)["spatialdata_attrs"].pop("version") == "0.2"
    assert attributes(store)["spatialdata_attrs"]["spatialdata_software_version"].startswith("nightslide ")
    shapes = attributes(store / "shapes" / "nuclei")
    assert shapes["encoding-type"] == "ngff:shapes"
    assert shapes["axes"] == ["x", "y"]
    assert shapes["spatialdata_attrs"] == {"version": "0.3"}
    assert shapes["coordinateTransformations"] == [
        {"type": "identity", "input": axes("xy"), "output": axes("global")},
        {"type": "scale", "scale": [0.25, 0.5], "input": axes("xy"), "output": axes("micrometres")},
    ]
    assert attributes(store / "tables" / "nuclei_table") == {
        "encoding-type": "anndata",
        "encoding-version": "0.1.0",
        "spatialdata-encoding-type": "ngff:regions_table",
        "region": "nuclei",
        "region_key": "region",
        "instance_key": "instance_id",
        "version": "0.2",
    }


def test_geopandas_reads_the_outlines_back(store):
    """By the numbers that the table has; in slide px, whatever the slide's bounds."""
    path = store / "shapes" / "nuclei" / "shapes.parquet"
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    shapes, nuclei = geopandas.read_parquet(path), geopandas.read_parquet(store.parent / "nuclei.parquet")
    assert geo["version"] == "1.1.0"
    np.testing.assert_array_equal(geo["columns"]["geometry"]["bbox"], nuclei.total_bounds)
    assert list(shapes.columns) == ["geometry"]
    assert shapes.crs is None
    assert shapes.index.name == "instance_id"
    assert shapes.index.tolist() == list(range(1, 46))
    assert shapes.geometry.tolist() == nuclei.geometry.tolist()
    assert pq.ParquetFile(path).num_row_groups == 3


def test_anndata_reads_the_table_of_nuclei_h5ad(store):
    table = anndata.read_zarr(store / "tables" / "nuclei_table")
    same = anndata.read_h5ad(store.parent / "n.h5ad")
    assert table.obs.equals(same.obs)
    np.testing.assert_array_equal(table.X, same.X)
    np.testing.assert_array_equal(table.obsm["spatial"], same.obsm["spatial"])
    assert table.var_names.equals(same.var_names)
    assert table.uns["spatialdata_attrs"] == same.uns["spatialdata_attrs"]
    assert table.uns["class_colors"].tolist() == same.uns["class_colors"].tolist()


def test_every_group_of_the_hierarchy_is_found(store):
    members = dict(zarr.open_group(store, mode="r").members(max_depth=1))
    assert sorted(members) == ["shapes", "shapes/nuclei", "tables", "tables/nuclei_table"]


def test_a_slide_without_nuclei_has_an_empty_table_that_annotates_nothing(empty):
    """spatialdata refuses empty shapes, and a table of shapes that are not there."""
    assert [path.name for path in (empty / "shapes").iterdir()] == ["zarr.json"]
    assert "region" not in attributes(empty / "tables" / "nuclei_table")
    table = anndata.read_zarr(empty / "tables" / "nuclei_table")
    assert table.shape == (0, 18)
    assert "spatialdata_attrs" not in table.uns


# ------------------------------------------------------------------------------------- by spatialdata itself


@pytest.mark.filterwarnings("default")  # of spatialdata and its many dependencies
def test_spatialdata_reads_it(store, tmp_path):
    spatialdata = pytest.importorskip("spatialdata", reason="spatialdata is not installed: see the head of this file")
    data = spatialdata.read_zarr(store)
    shapes, table = data.shapes["nuclei"], data["nuclei_table"]
    assert sorted(data.coordinate_systems) == ["global", "micrometres"]
    in_um = spatialdata.transform(shapes, to_coordinate_system="micrometres")
    np.testing.assert_allclose(in_um.area, table[:, "area_um2"].X[:, 0], rtol=1e-4)
    assert spatialdata.match_table_to_element(data, "nuclei", "nuclei_table").obs.equals(table.obs)
    joined, rows = spatialdata.join_spatialelement_table(
        sdata=data, spatial_element_names="nuclei", table_name="nuclei_table", how="inner"
    )
    assert joined["nuclei"].index.tolist() == rows.obs["instance_id"].tolist() == list(range(1, 46))
    limits = {"min_coordinate": [300, 300], "max_coordinate": [2000, 2000], "target_coordinate_system": "global"}
    part = spatialdata.bounding_box_query(data, axes=("x", "y"), **limits)
    assert 0 < len(part["nuclei"]) == part["nuclei_table"].n_obs < 45
    data.write(tmp_path / "again.zarr")
    again = spatialdata.read_zarr(tmp_path / "again.zarr")
    assert again["nuclei_table"].obs.equals(table.obs)
    assert again["nuclei"].equals(shapes)


@pytest.mark.filterwarnings("default")
def test_spatialdata_reads_a_slide_without_nuclei(empty):
    spatialdata = pytest.importorskip("spatialdata", reason="spatialdata is not installed: see the head of this file")
    data = spatialdata.read_zarr(empty)
    assert data["nuclei_table"].n_obs == 0
    assert not data.shapes


@pytest.mark.filterwarnings("default")
def test_the_readme_s_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("squidpy", reason="squidpy is not installed: see the head of this file")
    folder = tmp_path / "results" / "case7"
    folder.mkdir(parents=True)
    nuclei = write(folder / "nuclei.parquet", blobs(200))
    write_spatialdata(nuclei, folder / "nuclei.spatialdata.zarr", Export())
    write_h5ad(nuclei, folder / "nuclei.h5ad", Export())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    _, example, _ = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
