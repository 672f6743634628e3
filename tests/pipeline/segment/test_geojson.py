"""QuPath's objects as they are read; tests/training/data/test_qupath.py has files that are damaged or hostile."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import shapely

from pipeline.errors import AnnotationError
from pipeline.segment.geojson import image_name, read_objects

SQUARE, HOLED = shapely.box(0, 0, 4, 4), shapely.box(0, 0, 9, 9) - shapely.box(3, 3, 5, 5)


def feature(outline: Any, kind: str | None, plane: dict[str, int] | None = None, **properties: Any) -> dict[str, Any]:
    geometry = json.loads(shapely.to_geojson(outline)) | ({"plane": plane} if plane else {})
    kinds = {} if kind is None else {"objectType": kind}
    return {"type": "Feature", "geometry": geometry, "properties": {**kinds, **properties}}


def save(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_types_classes_names_and_outlines_are_read(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.geojson",
        feature(HOLED, "annotation", name="front", classification={"name": "Tumor", "color": [1, 2, 3]}),
        feature(SQUARE, "detection", classification={"names": ["Tumor", "Positive"]}),
        feature(SQUARE, None),  # without a type it is an annotation
    )
    objects, skipped = read_objects(path)
    assert objects.types.tolist() == ["annotation", "detection", "annotation"]
    assert objects.classes.tolist() == ["Tumor", "Tumor: Positive", ""]
    assert objects.names.tolist() == ["front", "", ""]
    assert shapely.equals(objects.polygons, [HOLED, SQUARE, SQUARE]).all()
    assert not +skipped


def test_the_type_in_the_id_is_read(tmp_path: Path) -> None:
    """As QuPath 0.2 wrote it; a type among the properties comes first, and later ids say nothing."""
    nucleus = {"nucleusGeometry": json.loads(shapely.to_geojson(SQUARE))}
    path = save(
        tmp_path / "x.geojson",
        feature(HOLED, None) | nucleus | {"id": "PathCellObject"},
        feature(SQUARE, None) | {"id": "PathDetectionObject"},
        feature(SQUARE, None) | {"id": "PathAnnotationObject"},
        feature(SQUARE, "detection") | {"id": "PathCellObject"},
        feature(SQUARE, None) | {"id": 7},
        feature(HOLED, None) | {"id": "TMACoreObject"},
    )
    objects, skipped = read_objects(path)
    assert objects.types.tolist() == ["cell", "detection", "annotation", "detection", "annotation"]
    assert shapely.equals(objects.polygons, SQUARE).all()
    assert +skipped == {"of type tma_core": 1}


@pytest.mark.parametrize("name", ["childObjects", "children"])
def test_objects_beneath_others_are_read(name: str, tmp_path: Path) -> None:
    """As QuPath writes a hierarchy where a script asks for it; the order is that of the file."""
    inner, middle, outer = (feature(SQUARE, "detection", name=n) for n in ("inner", "middle", "outer"))
    middle["properties"][name] = [inner]
    outer["properties"][name] = [middle, feature(SQUARE, "detection", name="other")]
    objects, _ = read_objects(save(tmp_path / "x.geojson", outer, feature(SQUARE, "annotation", name="last")))
    assert objects.names.tolist() == ["outer", "middle", "inner", "other", "last"]


def test_an_object_without_a_place_is_counted(tmp_path: Path) -> None:
    """RFC 7946 calls it an unlocated feature."""
    unlocated = {"type": "Feature", "geometry": None, "properties": {"objectType": "annotation"}}
    objects, skipped = read_objects(save(tmp_path / "x.geojson", unlocated, feature(SQUARE, "annotation")))
    assert len(objects.polygons) == 1
    assert +skipped == {"an outline without an area": 1}
    with pytest.raises(AnnotationError, match="object 2 is no GeoJSON feature"):
        read_objects(save(tmp_path / "x.geojson", unlocated, {"type": "Feature", "properties": {}}))


@pytest.mark.parametrize("kind", ["annotation", "cell"])
def test_the_polygons_of_a_collection_are_read(kind: str, tmp_path: Path) -> None:
    """QuPath takes them, too, and leaves out the lines and points beside them; parts and holes are kept."""
    far, line = shapely.box(20, 0, 24, 4), shapely.LineString([(0, 0), (30, 30)])
    nested = shapely.GeometryCollection([shapely.MultiPolygon([far]), shapely.Point(1, 1)])
    outlines = [
        shapely.GeometryCollection([line, HOLED, nested]),
        shapely.GeometryCollection([SQUARE, line]),
        shapely.GeometryCollection([line]),
        shapely.GeometryCollection(),
    ]
    objects = [feature(outline, kind) for outline in (*outlines, SQUARE)]
    objects += [feature(outlines[0], kind, plane={"z": 1})]
    for cell in objects if kind == "cell" else ():
        cell["nucleusGeometry"] = cell["geometry"]
    read, skipped = read_objects(save(tmp_path / "x.geojson", *objects))
    assert shapely.equals(read.polygons, [shapely.MultiPolygon([HOLED, far]), SQUARE, SQUARE]).all()
    assert +skipped == {"an outline without an area": 2, "on another plane than z = 0, t = 0": 1}
    for geometry in ({"type": "GeometryCollection"}, {"type": "GeometryCollection", "geometries": [7]}):
        cell = {**objects[0], "geometry": geometry, "nucleusGeometry": geometry}
        with pytest.raises(AnnotationError, match="object 1 is no GeoJSON feature"):
            read_objects(save(tmp_path / "x.geojson", cell))


@pytest.mark.parametrize("properties", [{"name": "n" * 1001}, {"classification": {"name": "c" * 1001}}])
def test_a_name_that_is_too_long_is_refused(properties: dict[str, Any], tmp_path: Path) -> None:
    """A class of 100,000 characters among 20,000 objects took 15 GB, and a name as long ended every `measure`."""
    path = save(tmp_path / "x.geojson", feature(SQUARE, "annotation"), feature(SQUARE, "annotation", **properties))
    with pytest.raises(AnnotationError, match="object 2 has a name or class of 1,001 characters: need at most 1,000"):
        read_objects(path)
    longest = save(tmp_path / "x.geojson", feature(SQUARE, "annotation", name="n" * 1000))
    assert read_objects(longest)[0].names.tolist() == ["n" * 1000]


def test_only_wanted_types_are_read_and_the_others_counted(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.geojson",
        feature(SQUARE, "annotation"),
        feature(SQUARE, "detection"),
        feature(SQUARE, "tile"),
        feature(shapely.Point(1, 1), "annotation"),
        feature(SQUARE, "annotation", plane={"z": 2, "t": 0}),
    )
    objects, skipped = read_objects(path, ("annotation",))
    assert objects.types.tolist() == ["annotation"]
    assert +skipped == {
        "of type detection": 1,
        "of type tile": 1,
        "an outline without an area": 1,
        "on another plane than z = 0, t = 0": 1,
    }


def test_a_file_without_objects_is_empty(tmp_path: Path) -> None:
    objects, _ = read_objects(save(tmp_path / "x.geojson"))
    assert [len(column) for column in objects] == [0, 0, 0, 0]
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_objects(tmp_path / "nowhere.geojson")


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("case.7.geojson", "case.7"),
        ("x.svs.GEOJSON", "x.svs"),
        ("x.geojson.gz", "x"),
        ("x.geojson.zip", "x"),
        ("x.gz", ""),
        ("x.json", ""),
        ("x.svs", ""),
    ],
)
def test_the_image_is_named_by_the_file(tmp_path: Path, name: str, image: str) -> None:
    assert image_name(tmp_path / name, given=False) == image


def test_a_zip_is_an_export_if_it_holds_one_or_is_given(tmp_path: Path) -> None:
    for name, member in (("x.zip", "x.geojson"), ("y.zip", "notes.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, "[]")
    assert image_name(tmp_path / "x.zip", given=False) == "x"
    assert image_name(tmp_path / "y.zip", given=False) == ""
    assert image_name(tmp_path / "y.zip", given=True) == "y"


def test_measurements_that_are_not_finite_do_no_harm(tmp_path: Path) -> None:
    """QuPath 0.2 to 0.4 writes them as bare NaN and Infinity, as of cells that have no haematoxylin."""
    path = save(tmp_path / "x.geojson", feature(SQUARE, "detection", measurements={"a": float("nan"), "b": -1e999}))
    assert "NaN" in path.read_text()
    assert "-Infinity" in path.read_text()
    objects, skipped = read_objects(path)
    assert (len(objects.polygons), +skipped) == (1, {})
