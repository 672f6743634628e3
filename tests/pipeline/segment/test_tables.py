"""A file that exists is complete; what is written reads back; the same rows are the same bytes."""

import dataclasses
import json
import os
import uuid
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import dataset

from nuclei_tables import append
from pipeline import files
from pipeline.model import instances
from pipeline.segment import tables
from pipeline.segment.polygons import measure
from slides.geometry import Box, Size
from slides.grid import Tile

PROVENANCE = tables.Provenance(
    slide="4f0c",
    um_per_px=(0.25, 0.5),
    size=Size(6000, 7000),
    bounds=Box(100, 200, 5000, 6000),
    digest="d1",
    colours={"Nucleus": (200, 30, 30), "Lymphocyte": (0, 128, 255)},
)


def squares(count: int, seed: int = 0) -> np.ndarray:
    corner = np.random.default_rng(seed).uniform(200, 4000, (2, count))
    return np.asarray(shapely.box(*corner, *(corner + 20)), dtype=object).reshape(-1)


def rest(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "class_name": [("Nucleus", "Lymphocyte")[k] for k in rng.integers(0, 2, count)],
        "score": rng.random(count),
        "votes": rng.integers(1, 9, count),
        "stains": rng.random((count, len(tables.STAINS))),
    }


def write(path, shapes, columns, cuts=()) -> None:
    with tables.NucleiWriter(path, PROVENANCE) as writer:
        for part in np.split(np.arange(len(shapes)), cuts):
            columns_of_part: dict[str, Any] = {name: np.asarray(values)[part] for name, values in columns.items()}
            append(writer, shapes[part], **columns_of_part)


# -------------------------------------------------------------------------------------------- instances


def rows_of(row: int, col: int, count: int) -> pa.Table:
    rng = np.random.default_rng(row * 10 + col)
    found = instances.empty(28)._replace(
        scores=rng.random(count, dtype=np.float32),
        votes=rng.integers(1, 9, count),
        class_index=rng.integers(0, 3, count),
        class_scores=rng.random(count, dtype=np.float32),
        stain_density=rng.random((count, 2, len(instances.STATISTICS)), dtype=np.float32),
    )
    tile = Tile(row, col, Box(0, 0, 10, 10), Box(-1, -1, 11, 11))
    return tables.instance_rows(tile, squares(count, row * 10 + col), found)


def test_instances_read_back_as_they_were(tmp_path):
    path = tmp_path / "000001.parquet"
    rows = pa.concat_tables([rows_of(2, 3, 5), rows_of(2, 4, 0), rows_of(3, 3, 2)])
    record = {"block": 1, "nuclei": 7, "lost_mm2": 0.25}
    tables.write_instances(path, rows, record)
    back = tables.read_instances(path)
    assert back.schema.remove_metadata() == tables.INSTANCES
    assert back.equals(rows)
    assert files.read_checked(path) == record
    expected = np.concatenate([squares(5, 23), squares(2, 33)])
    assert (tables.geometry(back) == expected).all()
    assert back["tile_row"].to_pylist() == [2] * 5 + [3] * 2


def test_bounds_are_read_without_polygons(tmp_path):
    path = tmp_path / "a.parquet"
    tables.write_instances(path, rows_of(0, 1, 9), {})
    back = tables.read_instances(path, ["tile_row", "x0", "y0", "x1", "y1"])
    assert back.column_names == ["tile_row", "x0", "y0", "x1", "y1"]
    np.testing.assert_array_equal(tables.bounds(back), shapely.bounds(squares(9, 1)))


def test_a_block_without_instances_has_its_record(tmp_path):
    path = tmp_path / "a.parquet"
    tables.write_instances(path, rows_of(0, 0, 0), {"nuclei": 0})
    assert files.read_checked(path) == {"nuclei": 0}
    assert tables.geometry(tables.read_instances(path)).shape == (0,)
    assert tables.bounds(tables.read_instances(path)).shape == (0, 4)


def test_instances_are_the_same_bytes_however_tables_were_joined(tmp_path):
    parts = [rows_of(0, 0, 4), rows_of(0, 1, 3), rows_of(1, 1, 6)]
    tables.write_instances(tmp_path / "a", pa.concat_tables(parts), {"n": 1})
    joined = pa.concat_tables([pa.concat_tables(parts[:2]).combine_chunks(), parts[2]])
    tables.write_instances(tmp_path / "b", joined, {"n": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ------------------------------------------------------------------------------------------- detections


def test_nuclei_read_back_as_they_were(tmp_path):
    path, shapes, columns = tmp_path / "nuclei.parquet", squares(30), rest(30)
    write(path, shapes, columns)
    back = tables.read_nuclei(path)
    assert back.schema.remove_metadata() == tables.NUCLEI
    assert (tables.geometry(back) == shapes).all()
    assert back["class"].to_pylist() == columns["class_name"]
    np.testing.assert_array_equal(back["score"], columns["score"].astype(np.float32))
    np.testing.assert_array_equal(back["votes"], columns["votes"])
    for name, values in zip(tables.STAINS, columns["stains"].T, strict=True):
        np.testing.assert_array_equal(back[name], values.astype(np.float32))
    shape = measure(shapes, PROVENANCE.um_per_px)
    np.testing.assert_array_equal(back["area_um2"], shape.area_um2)
    for name in ("minor_axis_um", "solidity", "max_diameter_um", "min_diameter_um"):
        np.testing.assert_array_equal(back[name], getattr(shape, name))
    np.testing.assert_array_equal(back["centroid_y"], shape.centroid[:, 1])
    assert tables.read_provenance(path) == PROVENANCE
    assert tables.read_nuclei(path, ["id", "score"]).column_names == ["id", "score"]


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_bytes_do_not_depend_on_how_detections_were_handed_over(tmp_path_factory, count, cuts):
    folder = tmp_path_factory.mktemp("cuts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_ROW_GROUP", 16)
        write(folder / "whole", squares(count), rest(count))
        write(folder / "cut", squares(count), rest(count), sorted(cuts))
    assert (folder / "whole").read_bytes() == (folder / "cut").read_bytes()
    groups = [rows.num_rows for rows in tables.iter_nuclei(folder / "cut")]
    assert groups == [16] * (count // 16) + [count % 16] * (count % 16 > 0)


def test_geopandas_opens_it(tmp_path):
    path, shapes = tmp_path / "nuclei.parquet", squares(12)
    write(path, shapes, rest(12))
    frame = geopandas.read_parquet(path)
    assert list(frame.columns) == tables.NUCLEI.names
    assert frame.crs is None
    assert (frame.geometry.values == shapes).all()
    np.testing.assert_allclose(frame.total_bounds, shapely.total_bounds(shapes))


def test_geopandas_reads_the_nuclei_of_a_region(tmp_path, monkeypatch):
    """And nothing of the row groups that do not reach into it."""
    monkeypatch.setattr(tables, "_ROW_GROUP", 16)
    path, shapes = tmp_path / "nuclei.parquet", squares(90)
    shapes = shapes[np.argsort(shapely.bounds(shapes)[:, 1])]
    write(path, shapes, rest(90))
    region = shapely.box(500, 1000, 2500, 1500)
    inside = shapely.intersects(shapes, region)
    assert 0 < inside.sum() < 30
    frame = geopandas.read_parquet(path, bbox=region.bounds)
    assert list(frame.columns) == tables.NUCLEI.names
    assert frame.geometry.tolist() == shapes[inside].tolist()
    (file,) = dataset.dataset(path).get_fragments()
    x, y = pc.field("bbox", "xmin") <= 2500, pc.field("bbox", "ymin") <= 1500
    touched = x & y & (pc.field("bbox", "xmax") >= 500) & (pc.field("bbox", "ymax") >= 1000)
    assert 1 <= len(file.split_by_row_group(touched)) <= 3 < file.metadata.num_row_groups


def test_a_table_that_was_read_is_written_as_geoparquet_again(tmp_path):
    """Its metadata names no column that it has not: neither the bounds nor, where they were left out, the outlines."""
    write(tmp_path / "nuclei.parquet", squares(9), rest(9))
    nuclei = tables.read_nuclei(tmp_path / "nuclei.parquet")
    pq.write_table(nuclei.slice(0, 5), tmp_path / "some.parquet")
    assert len(geopandas.read_parquet(tmp_path / "some.parquet")) == 5
    assert (
        "covering"
        not in json.loads(pq.read_metadata(tmp_path / "some.parquet").metadata[b"geo"])["columns"]["geometry"]
    )
    pq.write_table(tables.read_nuclei(tmp_path / "nuclei.parquet", ["id"]), tmp_path / "ids.parquet")
    assert b"geo" not in pq.read_metadata(tmp_path / "ids.parquet").metadata


def test_its_metadata_is_geoparquet_1_1(tmp_path):
    path, shapes = tmp_path / "nuclei.parquet", squares(12)
    write(path, shapes, rest(12), [5])
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["primary_column"] == "geometry"
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["crs"] is None
    np.testing.assert_array_equal(column["bbox"], shapely.total_bounds(shapes))
    assert column["covering"] == {"bbox": {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}}
    stored = pq.read_table(path, columns=["bbox"])["bbox"].combine_chunks().flatten()
    np.testing.assert_array_equal(np.stack(stored, axis=1), shapely.bounds(shapes))


def test_a_slide_without_nuclei_has_a_table(tmp_path):
    path = tmp_path / "nuclei.parquet"
    write(path, squares(0), rest(0))
    assert tables.read_nuclei(path).num_rows == 0
    assert len(geopandas.read_parquet(path)) == 0
    assert len(geopandas.read_parquet(path, bbox=(0, 0, 9, 9))) == 0
    assert tables.read_provenance(path) == PROVENANCE


def test_ids_are_uuids_of_slide_and_polygon(tmp_path):
    shapes = squares(20)
    write(tmp_path / "a", shapes, rest(20))
    write(tmp_path / "b", shapes[::-1], rest(20, seed=1))
    ids = tables.read_nuclei(tmp_path / "a", ["id"])["id"].to_pylist()
    assert len(set(ids)) == 20
    assert all(str(uuid.UUID(one)) == one and uuid.UUID(one).version == 5 for one in ids)
    assert tables.read_nuclei(tmp_path / "b", ["id"])["id"].to_pylist() == ids[::-1]


def test_ids_are_those_of_every_version(tmp_path):
    """Tables that others have made are joined by them."""
    square = shapely.Polygon([(200, 300), (220, 300), (220, 320), (200, 320)])
    write(tmp_path / "a", np.array([square]), rest(1))
    assert tables.read_nuclei(tmp_path / "a", ["id"])["id"].to_pylist() == ["5fdb23e8-a2ea-5bd3-a440-ed73ee0a44c6"]


def test_a_check_between_groups_ends_with_its_block(tmp_path):
    """The thread goes on with another slide, whose lease is another one."""
    write(tmp_path / "a", squares(3), rest(3))
    checks = []
    with tables.checked_between_groups(lambda: checks.append(1)):
        assert [rows.num_rows for rows in tables.iter_nuclei(tmp_path / "a")] == [3]
    assert [rows.num_rows for rows in tables.iter_nuclei(tmp_path / "a")] == [3]
    assert checks == [1]


def test_other_slides_have_other_ids(tmp_path):
    ids = []
    for slide in ("one", "two"):
        provenance = tables.Provenance(slide, (1, 1), Size(9, 9), Box(0, 0, 9, 9), "", PROVENANCE.colours)
        with tables.NucleiWriter(tmp_path / slide, provenance) as writer:
            append(writer, squares(3), **rest(3))
        ids += tables.read_nuclei(tmp_path / slide, ["id"])["id"].to_pylist()
    assert len(set(ids)) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        shapely.Polygon(),
        shapely.MultiPolygon([shapely.box(0, 0, 1, 1)]),
        shapely.box(0, 0, 9, 9).difference(shapely.box(2, 2, 3, 3)),
    ],
)
def test_what_is_not_a_solid_polygon_is_refused_and_nothing_is_left(tmp_path, wrong):
    shapes = squares(3)
    shapes[1] = wrong
    with pytest.raises(ValueError, match=r"detection 1 is .*polygons\.solid"):
        write(tmp_path / "nuclei.parquet", shapes, rest(3))
    assert os.listdir(tmp_path) == []


def test_a_class_without_a_colour_is_refused(tmp_path):
    columns = rest(2) | {"class_name": ["Nucleus", "Mitosis"]}
    with pytest.raises(ValueError, match="class 'Mitosis' has no colour"):
        write(tmp_path / "nuclei.parquet", squares(2), columns)


def _of_before(path) -> pa.Table:
    kept = {key: value for key, value in pq.read_metadata(path).metadata.items() if key != b"ARROW:schema"}
    return pq.read_table(path).drop_columns("class_score").replace_schema_metadata(kept)


def test_a_table_of_before_has_certain_classes(tmp_path):
    """The first versions wrote no class_score: it is certain where there was one class, and else not known."""
    write(tmp_path / "several.parquet", squares(9), rest(9))
    older = _of_before(tmp_path / "several.parquet")
    pq.write_table(older, tmp_path / "several.parquet")
    of_several = tables.read_nuclei(tmp_path / "several.parquet", ["class_score"])["class_score"].to_numpy()
    assert np.isnan(of_several).tolist() == [True] * 9
    one = dataclasses.replace(PROVENANCE, colours={"Nucleus": (200, 30, 30)})
    with tables.NucleiWriter(tmp_path / "nuclei.parquet", one) as writer:
        append(writer, squares(9), **{**rest(9), "class_name": ["Nucleus"] * 9})
    older = _of_before(tmp_path / "nuclei.parquet")
    pq.write_table(older, tmp_path / "older.parquet", row_group_size=4)
    whole = tables.read_nuclei(tmp_path / "older.parquet")
    groups = pa.concat_tables(tables.iter_nuclei(tmp_path / "older.parquet"))
    some = tables.take_nuclei(tmp_path / "older.parquet", np.array([2, 7]))
    for rows in (whole, groups, some):
        assert rows.schema.names == tables.NUCLEI.names
        assert set(rows["class_score"].to_pylist()) == {1.0}
    assert some["id"].to_pylist() == [older["id"][2].as_py(), older["id"][7].as_py()]
    assert tables.read_nuclei(tmp_path / "older.parquet", ["score"]).column_names == ["score"]
