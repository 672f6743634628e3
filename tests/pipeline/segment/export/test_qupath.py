"""What was exported reads back equal, and QuPath's reader would take every feature of it."""

import dataclasses
import json
import math
import uuid
import zipfile
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nuclei_tables import PROVENANCE, append, blobs, write, write_not_finite
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export import qupath
from pipeline.segment.export.exported import Exported
from pipeline.segment.polygons import solid

NAMES = {
    "score": "Detection probability",
    "votes": "Votes",
    "area_um2": "Area µm^2",
    "perimeter_um": "Length µm",
    "circularity": "Circularity",
    "solidity": "Solidity",
    "max_diameter_um": "Max diameter µm",
    "min_diameter_um": "Min diameter µm",
    "major_axis_um": "Major axis µm",
    "minor_axis_um": "Minor axis µm",
    "haematoxylin": "Hematoxylin: Mean",
    "haematoxylin_median": "Hematoxylin: Median",
    "haematoxylin_min": "Hematoxylin: Min",
    "haematoxylin_max": "Hematoxylin: Max",
    "haematoxylin_sd": "Hematoxylin: Std.Dev.",
    "eosin": "Eosin: Mean",
    "eosin_median": "Eosin: Median",
    "eosin_min": "Eosin: Min",
    "eosin_max": "Eosin: Max",
    "eosin_sd": "Eosin: Std.Dev.",
    "class_score": "Class probability",
}


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def check_feature(feature: dict[str, Any]) -> None:
    """Everything that QuPath's reader requires of a feature, strictly."""
    cell = "nucleusGeometry" in feature
    assert list(feature) == ["type", "id", "geometry", *(["nucleusGeometry"] if cell else []), "properties"]
    assert feature["type"] == "Feature"
    assert str(uuid.UUID(feature["id"])) == feature["id"]
    for geometry in (feature["geometry"], feature.get("nucleusGeometry", feature["geometry"])):
        assert list(geometry) == ["type", "coordinates"]
        assert geometry["type"] == "Polygon"
        for ring in geometry["coordinates"]:
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
            assert all(len(vertex) == 2 for vertex in ring)
            assert all(math.isfinite(v) and round(v, 2) == v for vertex in ring for v in vertex)
        outline = shapely.geometry.shape(geometry)
        assert outline.is_valid
        assert outline.area > 0
    properties = feature["properties"]
    assert properties["objectType"] == ("cell" if cell else "detection")
    assert sorted(properties["classification"]) == ["color", "name"]
    name, colour = properties["classification"]["name"], properties["classification"]["color"]
    assert tuple(colour) == PROVENANCE.colours[name]
    assert all(isinstance(v, int | float) and math.isfinite(v) for v in properties["measurements"].values())
    assert "id" not in properties["measurements"]


def check_zip(path: Path, shard: int = 50_000) -> list[dict[str, Any]]:
    """All rules of the zip. Returns its features."""
    features = []
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()
        for member in archive.infolist():
            assert member.filename.endswith(".geojson")
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            text = archive.read(member).decode()
            assert "null" not in text
            collection = json.loads(text, parse_constant=refuse)
            assert list(collection) == ["type", "features"]
            assert collection["type"] == "FeatureCollection"
            assert len(collection["features"]) <= shard
            lines = [line for line in text.splitlines() if line.startswith('{"type":"Feature",')]
            assert [json.loads(line.removesuffix(",")) for line in lines] == collection["features"]
            features += collection["features"]
    assert len({feature["id"] for feature in features}) == len(features)
    for feature in features:
        check_feature(feature)
    return features


@pytest.mark.parametrize("crop", [True, False])
def test_what_was_exported_reads_back_equal(tmp_path, crop):
    """Law: outlines, classes and measurements read back from the zip are those of the table."""
    shapes = blobs(60)
    nuclei = write(tmp_path / "nuclei.parquet", shapes)
    done = qupath.write_qupath(nuclei, tmp_path / "n.zip", Export(crop=crop))
    assert done == Exported(60, 0, 0)
    features, rows = check_zip(tmp_path / "n.zip"), tables.read_nuclei(nuclei)
    assert [f["id"] for f in features] == rows["id"].to_pylist()
    assert [f["properties"]["classification"]["name"] for f in features] == rows["class"].to_pylist()
    for feature, shape in zip(features, shapes, strict=True):
        back = shapely.get_coordinates(shapely.geometry.shape(feature["geometry"]))
        moved = shapely.get_coordinates(shape) - np.array([100, 250]) * crop
        np.testing.assert_allclose(back, moved, atol=0.005 + 1e-9)
    measured = [f["properties"]["measurements"] for f in features]
    assert {tuple(m) for m in measured} == {(*NAMES.values(), "In artefact")}
    for column, name in NAMES.items():
        np.testing.assert_array_equal(np.array([m[name] for m in measured], np.float32), rows[column])


def test_one_class_has_no_probability_of_its_own(tmp_path):
    provenance = dataclasses.replace(PROVENANCE, colours={"Nucleus": (200, 30, 30)})
    qupath.write_qupath(write(tmp_path / "nuclei.parquet", blobs(3), 0, provenance), tmp_path / "n.zip", Export())
    for feature in check_zip(tmp_path / "n.zip"):
        assert list(feature["properties"]["measurements"]) == [*list(NAMES.values())[:-1], "In artefact"]


def test_nuclei_in_artefacts_can_be_told(tmp_path):
    """By a number, as measurements are: which kind it is, the annotation around them says."""
    nuclei = tmp_path / "nuclei.parquet"
    stains, kinds = np.full((3, len(tables.STAINS)), 0.5), ["", "pen", ""]
    with tables.NucleiWriter(nuclei, PROVENANCE) as writer:
        ones = np.ones(3, dtype=int)
        append(writer, blobs(3), class_name=["Nucleus"] * 3, score=ones, votes=ones, stains=stains, artefact=kinds)
    for options in (Export(), Export(cells=3.0)):
        qupath.write_qupath(nuclei, tmp_path / "n.zip", options)
        assert [f["properties"]["measurements"]["In artefact"] for f in check_zip(tmp_path / "n.zip")] == [0, 1, 0]


def test_geopandas_opens_a_shard(tmp_path):
    shapes = blobs(5)
    qupath.write_qupath(write(tmp_path / "nuclei.parquet", shapes), tmp_path / "n.zip", Export(crop=False))
    with zipfile.ZipFile(tmp_path / "n.zip") as archive:
        archive.extract("nuclei-00000.geojson", tmp_path)
    frame = geopandas.GeoDataFrame.from_features(json.loads((tmp_path / "nuclei-00000.geojson").read_text()))
    assert frame.geometry.geom_equals_exact(geopandas.GeoSeries(shapes), 0.01).all()


def needle(x: float, y: float, length: float, width: float) -> shapely.Polygon:
    return shapely.Polygon([(x, y), (x + length, y + width / 3), (x + length * 0.7, y + width)])


NASTY = {
    "sliver": needle(300, 400, 50, 0.004),
    "turned sliver": needle(300.004, 400.003, 0.009, 90),
    "speck": shapely.box(500.001, 500.001, 500.004, 500.004),
    "speck of one hundredth": shapely.box(500.0, 500.0, 500.011, 500.011),
    "pinched by rounding": shapely.Polygon(
        [(0, 0), (10, 0), (10, 10), (5.001, 5), (0, 10), (0, 9), (5, 4.998), (10, 9.9), (9, 0.5), (0, 0.5)]
    ).buffer(0),
    "hour glass": shapely.Polygon([(0, 0), (10, 0), (5.002, 5), (10, 10), (0, 10), (4.998, 5)]),
    "comb": shapely.Polygon([(0, 0), (20, 0), *((20 - i, (5, 0.003)[i % 2]) for i in range(20)), (0, 5)]).buffer(0),
    "huge": shapely.Point(60_000, 70_000).buffer(50_000, 500),
    "far outside": shapely.box(3e6 + 0.123, 2e6, 3e6 + 9.5, 2e6 + 9.5),
    "over the corner of the bounds": shapely.box(94.5, 242.75, 103, 254),
    "over the corner of the slide": shapely.box(-5.5, -7.25, 3, 4),
    "in two parts within the slide": shapely.box(-9, 600, 4, 640) - shapely.box(-1, 610, 5, 625),
    "many on one spot": shapely.Point(700, 700).buffer(0.02, 100),
}


def check_nasty(folder: Path, shapes: list[shapely.Geometry], crop: bool) -> Exported:
    made = solid(np.array(shapes, dtype=object))
    made = made[~shapely.is_empty(made)]
    _, first = np.unique(shapely.to_wkb(made), return_index=True)  # equal polygons have equal ids
    made = made[np.sort(first)]
    nuclei = write(folder / "nuclei.parquet", made)
    done = qupath.write_qupath(nuclei, folder / "n.zip", Export(crop=crop))
    features = check_zip(folder / "n.zip")
    assert len(features) == done.written
    assert done.written + done.dropped == len(made)
    assert done.changed <= done.written
    where = {one: i for i, one in enumerate(tables.read_nuclei(nuclei)["id"].to_pylist())}
    corner, other = np.array([100, 250]) * crop, 0
    image = shapely.box(100, 250, 5000, 6000) if crop else shapely.box(0, 0, 6000, 7000)
    for feature in features:
        original = made[where[feature["id"]]]
        back = shapely.transform(shapely.geometry.shape(feature["geometry"]), lambda xy: xy + corner)
        assert image.contains(back)
        assert original.buffer(0.02).contains(back)
        if image.contains(original):
            other += shapely.hausdorff_distance(back.boundary, original.boundary) > 0.01
    assert other <= done.changed
    return done


@pytest.mark.parametrize("crop", [True, False])
def test_qupath_takes_nasty_polygons(tmp_path, crop):
    shapes = [shapely.transform(shape, lambda xy: xy + np.array([200, 300])) for shape in NASTY.values()]
    done = check_nasty(tmp_path, [*NASTY.values(), *shapes], crop)
    assert done.changed > 0
    assert done.dropped > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.03, 0.1, 1.0, 30.0]), st.integers(3, 25))
@example(0, 0.01, 3)
def test_qupath_takes_any_polygon(tmp_path_factory, seed, size, count):
    """Rings that cross themselves, made solid, at sizes where rounding destroys them."""
    rng = np.random.default_rng(seed)
    rings = [shapely.Polygon(rng.normal(300, size, (count, 2))) for _ in range(8)]
    check_nasty(tmp_path_factory.mktemp("any"), rings, crop=True)


def test_what_rounding_breaks_keeps_its_largest_part(tmp_path):
    """Two squares, 4 and 3 px, joined by a bridge that is narrower than the rounding; of a speck nothing is kept."""
    bridge = shapely.box(3, 1.996, 8, 1.9999)
    shape = shapely.union_all([shapely.box(0, 0, 4, 4), bridge, shapely.box(7, 0, 10, 3)])
    assert shape.geom_type == "Polygon"
    nuclei = write(tmp_path / "nuclei.parquet", np.array([shape, NASTY["speck"]]))
    done = qupath.write_qupath(nuclei, tmp_path / "n.zip", Export(crop=False))
    assert done == Exported(1, 1, 1), "what is dropped does not count as repaired"
    (feature,) = check_zip(tmp_path / "n.zip")
    assert shapely.geometry.shape(feature["geometry"]).equals(shapely.box(0, 0, 4, 4))


def test_outlines_end_at_the_edge_of_the_image(tmp_path):
    """Of a nucleus over the edge, what is in the image is left, of one outside of it nothing; no other changes."""
    shapes = np.array([shapely.box(4990, 300, 5010.5, 320), shapely.box(5001, 300, 5010, 310), blobs(1)[0]])
    nuclei = write(tmp_path / "nuclei.parquet", shapes)
    assert qupath.write_qupath(nuclei, tmp_path / "n.zip", Export()) == Exported(2, 0, 1)
    cut_off, whole = (shapely.geometry.shape(f["geometry"]) for f in check_zip(tmp_path / "n.zip"))
    assert cut_off.equals(shapely.box(4890, 50, 4900, 70))
    assert whole.area == pytest.approx(shapes[2].area, rel=1e-3)
    assert qupath.write_qupath(nuclei, tmp_path / "n.zip", Export(crop=False)) == Exported(3)


@pytest.mark.parametrize("crop", [True, False])
def test_cells_hold_their_nuclei(tmp_path, crop, monkeypatch):
    """Ids, classes and nuclei are those of the export without cells; measurements have QuPath's names for cells."""
    shapes = np.concatenate([blobs(60), [shapely.box(102, 251, 112, 261)]])
    nuclei = write(tmp_path / "nuclei.parquet", shapes)
    qupath.write_qupath(nuclei, tmp_path / "n.zip", Export(crop=crop))
    done = qupath.write_qupath(nuclei, tmp_path / "c.zip", Export(crop=crop, cells=3.0))
    assert done == Exported(61, 0, 0)
    detections, cells = check_zip(tmp_path / "n.zip"), check_zip(tmp_path / "c.zip")
    assert [c["nucleusGeometry"] for c in cells] == [d["geometry"] for d in detections]
    image = shapely.box(0, 0, *((4900, 5750) if crop else (6000, 7000)))
    for cell, detection in zip(cells, detections, strict=True):
        assert cell["id"] == detection["id"]
        outline, nucleus = (shapely.geometry.shape(cell[name]) for name in ("geometry", "nucleusGeometry"))
        assert outline.buffer(0.02).contains(nucleus)
        assert nucleus.buffer(12.02, quad_segs=64).contains(outline)
        assert image.contains(outline)
        own, given = cell["properties"]["measurements"], detection["properties"]["measurements"]
        assert own["Nucleus: Area µm^2"] == given["Area µm^2"]
        assert own["Eosin: Nucleus: Std.Dev."] == given["Eosin: Std.Dev."]
        assert own["Detection probability"] == given["Detection probability"]
        assert own["Cell: Area µm^2"] == pytest.approx(outline.area / 16, rel=1e-5)
        assert own["Nucleus/Cell area ratio"] == pytest.approx(given["Area µm^2"] / own["Cell: Area µm^2"], rel=1e-5)
    monkeypatch.setattr(qupath, "_SHARD", 7)
    qupath.write_qupath(nuclei, tmp_path / "s.zip", Export(crop=crop, cells=3.0))
    assert check_zip(tmp_path / "s.zip", shard=7) == cells


def test_cells_are_measured_in_um_along_each_axis(tmp_path):
    """Of a slide whose px are twice as high as wide."""
    provenance = dataclasses.replace(PROVENANCE, um_per_px=(0.2, 0.4))
    nuclei = write(tmp_path / "nuclei.parquet", np.array([shapely.box(700, 700, 740, 710)]), 0, provenance)
    qupath.write_qupath(nuclei, tmp_path / "c.zip", Export(cells=3.0))
    (cell,) = check_zip(tmp_path / "c.zip")
    outline = shapely.transform(shapely.geometry.shape(cell["geometry"]), lambda xy: xy * provenance.um_per_px)
    measured = cell["properties"]["measurements"]
    assert measured["Cell: Length µm"] == pytest.approx(outline.length, rel=1e-5)
    assert measured["Cell: Length µm"] == pytest.approx(2 * (8 + 4) + 2 * np.pi * 3, rel=0.01)


def test_a_hole_of_a_cell_is_written(tmp_path):
    """A nucleus within the bay of another one: the cell of the outer one goes around the inner one's."""
    bay = shapely.Point(700, 700).buffer(30) - shapely.Point(700, 700).buffer(26) - shapely.box(699, 670, 701, 700)
    nuclei = write(tmp_path / "nuclei.parquet", np.array([bay, shapely.Point(700, 700).buffer(4)]))
    qupath.write_qupath(nuclei, tmp_path / "c.zip", Export(cells=4.0))
    outer, inner = (shapely.geometry.shape(f["geometry"]) for f in check_zip(tmp_path / "c.zip"))
    assert len(outer.interiors) == 1
    assert outer.intersection(inner).area < 0.1 < inner.area


def test_shards_are_bounded_and_hold_everything(tmp_path, monkeypatch):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(23))
    qupath.write_qupath(nuclei, tmp_path / "one.zip", Export())
    monkeypatch.setattr(qupath, "_SHARD", 10)
    qupath.write_qupath(nuclei, tmp_path / "three.zip", Export())
    with zipfile.ZipFile(tmp_path / "three.zip") as archive:
        assert archive.namelist() == [f"nuclei-0000{i}.geojson" for i in range(3)]
    assert check_zip(tmp_path / "three.zip", shard=10) == check_zip(tmp_path / "one.zip")


def test_a_slide_without_nuclei_exports(tmp_path):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(0))
    assert qupath.write_qupath(nuclei, tmp_path / "n.zip", Export()) == Exported(0)
    assert check_zip(tmp_path / "n.zip") == []


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    qupath.write_qupath(write_not_finite(tmp_path / "nuclei.parquet"), tmp_path / "n.zip", Export())
    measured = [f["properties"]["measurements"] for f in check_zip(tmp_path / "n.zip")]
    assert ["Eosin: Mean" in m for m in measured] == [False, True, False]
    assert ["Detection probability" in m for m in measured] == [True, False, True]
