"""QuPath's GeoJSON, written as QuPath writes it, gives the nuclei that were drawn."""

import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from nuclei_tables import append
from pipeline.config import Export
from pipeline.errors import AnnotationError
from pipeline.segment import export, geojson, tables
from pipeline.segment.polygons import from_masks, rasterise
from slides.geometry import Box, Size
from training.data import qupath
from training.data.datasets import read_dataset
from training.data.sample import Dataset, LabelledImage

RGB = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
MAPS = arrays(np.uint8, (12, 12), elements=st.sampled_from([0, 0, 1, 2, 3]))


def only(found: Dataset) -> LabelledImage:
    (sample,) = found.images
    return LabelledImage(*pickle.loads(pickle.dumps(sample)).read())


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB).save(path)
    return path


def feature(outline: Any, name: str | None = None, kind: str = "detection", **more: Any) -> dict[str, Any]:
    classification = {} if name is None else {"classification": {"name": name, "color": [1, 2, 3]}}
    geometry = json.loads(shapely.to_geojson(outline))
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind, **classification}} | more


def outlines(labels: NDArray[np.uint8]) -> tuple[list[int], Any]:
    numbers = np.unique(labels[labels > 0])
    boxes = np.tile(np.array([0, 0, *labels.shape[::-1]], float), (len(numbers), 1))
    return numbers.tolist(), from_masks(labels == numbers[:, None, None], boxes, level=0.5)


@settings(max_examples=40)
@example(labels=np.ones((12, 12), np.uint8), kind="annotation", form="collection")  # a nucleus that is a rectangle
@given(
    labels=MAPS,
    kind=st.sampled_from(["detection", "annotation", "cell"]),
    form=st.sampled_from(["collection", "list", "zip"]),
)
def test_exports_of_qupath_read_back(
    labels: NDArray[np.uint8], kind: str, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parts and holes are kept; classes go by name; objects without one are of class Nucleus.

    An ignored area is white but for its nuclei, and what is no nucleus is counted.
    """
    folder = tmp_path_factory.mktemp("qupath")
    picture(folder / "case.7.png")
    numbers, drawn = outlines(labels)
    names = [None, "Tumour", "Immune: CD8"]
    features = [feature(p, names[n - 1], kind) for n, p in zip(numbers, drawn, strict=True)]
    for cell in features if kind == "cell" else ():
        cell |= {
            "nucleusGeometry": cell["geometry"],
            "geometry": json.loads(shapely.to_geojson(shapely.box(0, 0, 9, 9))),
        }
    features.append(feature(shapely.Point(3, 3), "Tumour", "annotation"))
    features.append(feature(shapely.box(0, 0, 9, 9), "Ignore*", "annotation"))
    features.append(feature(shapely.box(0, 0, 9, 9), None, "tile"))
    if form == "zip":
        with zipfile.ZipFile(folder / "case.7.geojson.zip", "w") as archive:
            for number in range(0, len(features), 2):
                archive.writestr(f"{number}.geojson", json.dumps({"features": features[number : number + 2]}))
    else:
        content = {"type": "FeatureCollection", "features": features} if form == "collection" else features
        (folder / "case.7.geojson").write_text(json.dumps(content))
    found = read_dataset(folder, mpp=0.25)
    read = only(found)
    assert found.images[0].id == "case.7"
    np.testing.assert_array_equal(read.labels, np.searchsorted(np.r_[0, numbers], labels))
    assert [found.classes[k - 1] for k in read.class_index] == [names[n - 1] or "Nucleus" for n in numbers]
    ignored = np.zeros((12, 12), bool)
    ignored[:9, :9] = labels[:9, :9] == 0
    np.testing.assert_array_equal(read.image, np.where(ignored[..., None], 255, RGB))
    assert found.skipped == {
        "an outline without an area": 1,
        "of type tile": 1,
        "of an ignored class, whose name ends in *: the area is painted white": 1,
    }


def test_a_cell_is_its_nucleus_and_old_exports_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    cell = feature(shapely.box(0, 0, 9, 9), None, "cell")
    cell["nucleusGeometry"] = json.loads(shapely.to_geojson(shapely.box(2, 2, 5, 5)))
    derived = feature(shapely.box(6, 0, 8, 1))
    derived["properties"] = {"object_type": "detection", "classification": {"names": ["Tumor", "Positive"]}}
    (tmp_path / "x.png.geojson").write_text(json.dumps([cell, derived]))
    found = read_dataset(tmp_path, mpp=0.25)
    read = only(found)
    assert np.bincount(read.labels.ravel()).tolist() == [144 - 11, 9, 2]
    assert [found.classes[k - 1] for k in read.class_index] == ["Nucleus", "Tumor: Positive"]


@pytest.mark.parametrize("name", ["Region*", "training", "Validation", "Test", None])
def test_regions_are_images_of_their_own(name: str | None, tmp_path: Path) -> None:
    """Law: a region shows what the whole image shows there."""
    picture(tmp_path / "x.png")
    nuclei = [shapely.box(1, 1, 4, 4), shapely.box(3, 5, 7, 9), shapely.box(9, 9, 12, 12)]
    fields = [shapely.box(0.2, 0.3, 5.8, 6.4), shapely.box(8, 6, 14, 12)]
    features = [feature(f, name, "annotation") for f in fields] + [feature(n) for n in nuclei]
    (tmp_path / "x.geojson").write_text(json.dumps(features))
    found = read_dataset(tmp_path, mpp=0.25)
    whole = rasterise(np.array(nuclei, dtype=object), (12, 12))
    assert [(a.id, a.group) for a in found.images] == [("x_1", "x"), ("x_2", "x")]
    for sample, (x0, y0, x1, y1) in zip(found.images, [(0, 0, 6, 6), (8, 6, 12, 12)], strict=True):
        read = sample.read()
        np.testing.assert_array_equal(read.image, RGB[y0:y1, x0:x1])
        part = whole[y0:y1, x0:x1]
        np.testing.assert_array_equal(read.labels, np.searchsorted(np.unique(np.r_[0, part.ravel()]), part))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"features": 3}', "holds no list of features"),
        ("[3]", "object 1 is no GeoJSON feature"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}}]', "an outline is no polygon"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[["a", 0]]]}}]', "an outline is no polygon"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, NaN]]]}}]', "an outline is no polygon"),
        (json.dumps([feature(shapely.box(0, 0, 1e9, 1))]), "reaches beyond 10000000 px"),
        (json.dumps([feature(shapely.box(0, 0, 50, 1))]), "spans 0, 0, 50, 1, its image is 12 x 12 px"),
        (json.dumps([feature(shapely.Point(3, 3).buffer(2), "Region*", "annotation")]), "a region is no rectangle"),
        (
            json.dumps([feature(shapely.box(20, 20, 22, 22), "Region*", "annotation")]),
            "a region lies outside x.png, .* delete it",
        ),
        (json.dumps([feature(shapely.box(0, 0, 1, 1)) | {"properties": {"classification": {"name": 3}}}]), "object 1"),
    ],
)
def test_bad_geojson_is_named(content: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "x.geojson").write_text(content)
    with pytest.raises(AnnotationError, match=message):
        read_dataset(tmp_path, mpp=0.25)


def test_bad_zips_are_named(tmp_path: Path) -> None:
    """Also one of many, whose image would be left out, if it was passed over."""
    picture(tmp_path / "x.png")
    save_gzip(tmp_path / "y", json.dumps([feature(shapely.box(2, 2, 5, 5))]))
    picture(tmp_path / "y.png")
    for name in ("x.zip", "x.geojson.zip"):
        path = tmp_path / name
        path.write_bytes(b"nothing")
        with pytest.raises(AnnotationError, match=rf"{name} cannot be read .*: export it again, or remove it"):
            read_dataset(tmp_path, mpp=0.25)
        path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(AnnotationError, match=r"holds 0 .geojson files: need one or more"):
        read_dataset(tmp_path, mpp=0.25)


def save_zip(path: Path, text: str) -> None:
    """As QuPath 0.5 to 0.7 do: one entry, named after the file."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}.geojson", text)


def save_gzip(path: Path, text: str) -> None:
    path.with_suffix(".geojson.gz").write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("save", [save_zip, save_gzip])
def test_what_qupath_compresses_is_read(save: Callable[[Path, str], None], tmp_path: Path) -> None:
    """In a folder, beside other archives, and when the file itself is named."""
    picture(tmp_path / "x.png")
    save(tmp_path / "x", json.dumps({"features": [feature(shapely.box(2, 2, 5, 5))]}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("notes.txt", "no annotations")
    (export,) = [p for p in tmp_path.iterdir() if p.name in ("x.zip", "x.geojson.gz")]
    for data in (tmp_path, export):
        assert (only(read_dataset(data, mpp=0.25)).labels > 0).sum() == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["x.png", "other.zip", export.name])


def test_what_macos_adds_to_an_archive_is_no_export(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.geojson", json.dumps([feature(shapely.box(2, 2, 5, 5))]))
        archive.writestr("__MACOSX/._x.geojson", b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert (only(read_dataset(tmp_path, mpp=0.25)).labels > 0).sum() == 9


@pytest.mark.parametrize("save", [save_zip, save_gzip])
def test_a_file_that_unpacks_without_end_is_refused(
    save: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "x.png")
    save(tmp_path / "x", " " * 100_000 + "[]")
    assert max(p.stat().st_size for p in tmp_path.iterdir()) < 2000
    monkeypatch.setattr(geojson, "_LARGEST_UNPACKED", 50_000)
    with pytest.raises(AnnotationError, match="unpacks to more than 50000 bytes: need at most that"):
        read_dataset(tmp_path, mpp=0.25)
    monkeypatch.setattr(geojson, "_LARGEST_UNPACKED", 100_002)
    assert read_dataset(tmp_path, mpp=0.25).images[0].read().labels.max() == 0


def test_damaged_compressed_files_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    whole = gzip.compress(b"[]" + b" " * 1000)
    for content in (b"nothing", whole[:-12], whole[:15] + b"\xff\xff" + whole[17:]):
        (tmp_path / "x.geojson.gz").write_bytes(content)
        with pytest.raises(AnnotationError, match="cannot be read"):
            read_dataset(tmp_path, mpp=0.25)


def test_names_inside_a_zip_lead_nowhere(tmp_path: Path) -> None:
    """Nothing is written, whatever the entries are called."""
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "x.png")
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w") as archive:
        for name in ("../out.geojson", "/tmp/nightslide-out.geojson"):
            archive.writestr(name, json.dumps([feature(shapely.box(2, 2, 5, 5))]))
    only(read_dataset(tmp_path / "in", mpp=0.25))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert not Path("/tmp/nightslide-out.geojson").exists()


def test_a_cell_without_a_nucleus_is_skipped_and_counted(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "x.geojson").write_text(json.dumps([feature(shapely.box(0, 0, 9, 9), None, "cell")] * 2))
    found = read_dataset(tmp_path, mpp=0.25)
    assert only(found).labels.max() == 0
    assert found.skipped == {"a cell without an outline of its nucleus": 2}
    assert found.describe_skipped() == [f"{tmp_path.name}: 2 objects skipped: a cell without an outline of its nucleus"]


@pytest.mark.parametrize("name", ["Ignore*", "Necrosis*", "Tumor: Blurred*"])
def test_a_class_that_ends_in_a_star_is_ignored(name: str, tmp_path: Path) -> None:
    """Its area shows neither nuclei nor background: it is white, but for nuclei that are annotated there."""
    picture(tmp_path / "x.png")
    drawn = [feature(shapely.box(0, 0, 6, 6), name, "annotation"), feature(shapely.box(2, 2, 4, 4), "Tumor")]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    found = read_dataset(tmp_path, mpp=0.25)
    read = only(found)
    assert found.classes == ("Tumor",)
    assert (read.labels > 0).sum() == 4
    assert (read.image[:6, :6][read.labels[:6, :6] == 0] == 255).all()
    np.testing.assert_array_equal(read.image[2:4, 2:4], RGB[2:4, 2:4])
    np.testing.assert_array_equal(read.image[6:], RGB[6:])
    assert sum(found.skipped.values()) == 1


def test_an_ignored_area_is_masked_in_every_region(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    drawn = [feature(shapely.box(0, 0, 6, 12), "Region*", "annotation"), feature(shapely.box(4, 2, 9, 4), "Dirt*")]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    read = only(read_dataset(tmp_path, mpp=0.25))
    expected = RGB[:, :6].copy()
    expected[2:4, 4:6] = 255
    np.testing.assert_array_equal(read.image, expected)


@pytest.mark.parametrize("outer", ["Region*", None])
def test_an_unclassified_rectangle_inside_a_region_is_no_second_image(outer: str | None, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    drawn = [
        feature(shapely.box(2, 2, 8, 8), None, "annotation"),
        feature(shapely.box(0, 0, 12, 12), outer, "annotation"),
        feature(shapely.box(3, 3, 5, 5)),
    ]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    found = read_dataset(tmp_path, mpp=0.25)
    read = only(found)
    assert read.image.shape == (12, 12, 3)
    assert (read.labels > 0).sum() == 4
    assert found.skipped == {"unclassified rectangle inside a region": 1}


@settings(max_examples=60)
@given(
    drawn=st.lists(
        st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 6)] * 2, st.sampled_from(["", "A", "Region", "Ignore*"])),
        max_size=25,
    )
)
def test_regions_are_those_of_the_definition(drawn: list[tuple[int, int, int, int, str]]) -> None:
    """By comparing every rectangle with every other: those around other centres and in no region, the outer ones first.

    Law: those that touch a box are found in the order of the file.
    """
    corners = [(x, y, x + w, y + h) for x, y, w, h, _ in drawn]
    polygons, classes = shapely.box(*np.array(corners, float).reshape(-1, 4).T), [one[4] for one in drawn]
    regions = {i for i, class_ in enumerate(classes) if class_ == "Region"}
    surplus: set[int] = set()
    for i in sorted(range(len(drawn)), key=lambda i: -shapely.area(polygons[i])):
        (x0, y0, x1, y1), others = corners[i], [c for c, k in zip(corners, classes, strict=True) if k != "Ignore*"]
        around = sum(2 * x0 < a + c < 2 * x1 and 2 * y0 < b + d < 2 * y1 for a, b, c, d in others)
        if classes[i] == "" and around > 1:
            inside = any(
                corners[r][0] <= x0 and corners[r][1] <= y0 and corners[r][2] >= x1 and corners[r][3] >= y1
                for r in regions
            )
            (surplus if inside else regions).add(i)
    objects = geojson.Objects(
        np.array(["annotation"] * len(drawn), np.str_),
        np.array(classes, np.str_),
        np.array([""] * len(drawn)),
        polygons,
    )
    found = qupath._regions(objects, Path("x.geojson"))
    assert [set(np.flatnonzero(f).tolist()) for f in found] == [regions, surplus]
    touching = qupath._touching(shapely.STRtree(polygons), Box(2, 3, 5, 6)).tolist()
    assert touching == [i for i, (x0, y0, x1, y1) in enumerate(corners) if x0 < 5 and y0 < 6 and x1 > 2 and y1 > 3]


@pytest.mark.parametrize("kind", ["annotation", "detection", "cell"])
def test_only_the_default_plane_is_read(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    drawn = [feature(shapely.box(x, 1, x + 3, 4), None, kind) for x in (0, 4, 8)]
    for one, plane in zip(drawn, [{"c": -1, "z": 0, "t": 0}, {"c": -1, "z": 1, "t": 0}, {"z": 0, "t": 2}], strict=True):
        one["geometry"]["plane"] = plane
        if kind == "cell":
            one["nucleusGeometry"] = one["geometry"]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    found = read_dataset(tmp_path, mpp=0.25)
    assert np.argwhere(only(found).labels).max(0).tolist() == [3, 2]
    assert found.skipped == {"on another plane than z = 0, t = 0": 2}


def test_what_lies_outside_every_region_is_counted(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    drawn = [feature(shapely.box(0, 0, 6, 6), "Region*", "annotation"), feature(shapely.box(8, 8, 9, 9))]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    assert read_dataset(tmp_path, mpp=0.25).skipped == {"outside every region, or outside the image": 1}


def test_images_without_annotations_are_named(tmp_path: Path) -> None:
    """Nobody has annotated them yet, or their file has another name. An export without objects is an annotation."""
    (tmp_path / "a.png.geojson").write_text(json.dumps([feature(shapely.box(2, 2, 6, 6))]))
    (tmp_path / "b.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    assert read_dataset(tmp_path, mpp=0.25).describe_skipped() == []
    picture(tmp_path / "more" / "c.png")
    found = read_dataset(tmp_path, mpp=0.25)
    assert [image.id for image in found.images] == ["a", "b"]
    assert found.describe_skipped() == [
        f"{tmp_path.name}: 1 image without annotations is not read: c.png; an image without nuclei needs an empty "
        "annotation file"
    ]
    for name in "edfgh":
        picture(tmp_path / f"{name}.png")
    (line,) = read_dataset(tmp_path, mpp=0.25).describe_skipped()
    assert "6 images without annotations are not read: d.png, e.png, f.png, g.png, h.png, ...; " in line
    assert read_dataset(tmp_path / "b.geojson", mpp=0.25).describe_skipped() == []  # that image alone is asked for


def test_classes_that_differ_in_case_are_named(tmp_path: Path) -> None:
    """They are typed by hand, and would be learnt, and scored, as two. `merge` makes them one."""
    names = ["Tumor", "tumor ", "Immune", "Stroma"]
    drawn = [feature(shapely.box(x, 2, x + 2, 4), name) for x, name in zip((0, 3, 6, 9), names, strict=True)]
    (tmp_path / "a.geojson").write_text(json.dumps(drawn))
    picture(tmp_path / "a.png")
    found = read_dataset(tmp_path, mpp=0.25)
    assert found.describe_skipped() == [
        f"{tmp_path.name}: the classes 'Tumor' and 'tumor ' are two: 'merge' in dataset.json makes them one"
    ]
    (tmp_path / "dataset.json").write_text('{"merge": {"tumor ": "Tumor"}}')
    assert read_dataset(tmp_path, mpp=0.25).describe_skipped() == []


def test_a_slide_needs_regions(tmp_path: Path) -> None:
    Image.new("L", (9000, 10)).save(tmp_path / "x.png")
    (tmp_path / "x.geojson").write_text(json.dumps([feature(shapely.box(2, 2, 5, 5))]))
    with pytest.raises(
        AnnotationError, match=r"x.png without a region is 9000 x 10 px: need rectangles of class Region"
    ):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "x.geojson").write_text(json.dumps([feature(shapely.box(0, 0, 9000, 5), "Region*", "annotation")]))
    with pytest.raises(AnnotationError, match="a region of 9000 x 5 px: need rectangles of class Region"):
        read_dataset(tmp_path, mpp=0.25)


def test_areas_around_nuclei_are_no_nuclei(tmp_path: Path) -> None:
    """What import.groovy adds beside the nuclei, and a tumour that a person drew; a nucleus may lie in another one."""
    picture(tmp_path / "x.png")
    around = shapely.MultiPolygon([shapely.box(0, 0, 5, 5).buffer(0.4), shapely.box(8, 8, 9, 9)])
    drawn = [
        feature(around, "Tissue", "annotation"),
        feature(shapely.box(7, 1, 9, 4).buffer(0.4), "Artefact: pen", "annotation"),
        feature(shapely.box(0, 0, 6, 6).buffer(0.4), "Tumor", "annotation"),
        feature(shapely.box(1, 1, 2, 2)),
        feature(shapely.box(3, 3, 4, 4), "Tumor", "annotation"),
        feature(shapely.box(7, 7, 10, 10).buffer(0.4), None, "annotation"),
        feature(shapely.box(8, 8, 9, 9)),
    ]
    (tmp_path / "x.geojson").write_text(json.dumps(drawn))
    found = read_dataset(tmp_path, mpp=0.25)
    assert len(np.unique(only(found).labels)) == 1 + 4
    assert found.skipped == {
        "an area: Tissue, Artefact, or an annotation around two or more nuclei, or far larger than they are": 3
    }


def test_an_annotation_far_larger_than_nuclei_is_an_area_whatever_is_in_it(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    nuclei = [feature(shapely.box(x, 0.0, x + 1, 1.0), "Tumor", "annotation") for x in range(10)]
    empty = feature(shapely.box(2, 3, 11, 11), "Stroma", "annotation")
    (tmp_path / "x.geojson").write_text(json.dumps([*nuclei, empty]))
    found = read_dataset(tmp_path, mpp=0.25)
    assert found.classes == ("Tumor",)
    assert len(only(found).class_index) == 10
    assert sum(found.skipped.values()) == 1


@pytest.mark.parametrize("cells", [0.0, 0.5])
def test_what_we_export_can_be_corrected_in_qupath_and_read(tmp_path: Path, cells: float) -> None:
    """nuclei.geojson.zip, named after its image, is read as it was written; of cells, the nuclei."""
    _, drawn = outlines(np.kron(np.array([[1, 0], [2, 3]], np.uint8), np.ones((6, 6), np.uint8)).astype(np.uint8))
    provenance = tables.Provenance("s", (0.25, 0.25), Size(12, 12), Box(0, 0, 12, 12), "d", {"Nucleus": (200, 30, 30)})
    with tables.NucleiWriter(tmp_path / "n.parquet", provenance) as writer:
        append(
            writer,
            drawn,
            class_name=["Nucleus"] * 3,
            score=np.ones(3),
            votes=np.ones(3, int),
            stains=np.zeros((3, len(tables.STAINS))),
        )
    export.write_qupath(tmp_path / "n.parquet", tmp_path / "x.geojson.zip", Export(cells=cells))
    picture(tmp_path / "x.png")
    expected = rasterise(shapely.from_wkb(tables.read_nuclei(tmp_path / "n.parquet")["geometry"].to_pylist()), (12, 12))
    np.testing.assert_array_equal(only(read_dataset(tmp_path, mpp=0.25)).labels, expected)


@pytest.mark.parametrize("name", ["leica-offset-region.scn", "CMU-1-Small-Region.svs"])
def test_regions_of_real_slides_are_read_where_qupath_drew_them(name: str, shared: Path, tmp_path: Path) -> None:
    """Coordinates are px from the corner of the slide's bounds; the scale is the slide's."""
    slide = shared / "slides" / name
    os.symlink(slide, tmp_path / name)
    drawn = [
        feature(shapely.box(400, 900, 528, 1000), "Region*", "annotation"),
        feature(shapely.box(410, 950, 420, 960)),
    ]
    (tmp_path / f"{slide.stem}.geojson").write_text(json.dumps(drawn))
    (sample,) = read_dataset(tmp_path).images
    read = sample.read()
    with openslide.OpenSlide(slide) as handle:
        x, y = (int(handle.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
        pixels = np.asarray(handle.read_region((x + 400, y + 900), 0, (128, 100)).convert("RGB"))
        assert sample.mpp == pytest.approx(float(handle.properties["openslide.mpp-x"]))
    assert (name[0] == "l") == bool(x)
    np.testing.assert_array_equal(read.image, pixels)
    assert np.argwhere(read.labels == 1).min(0).tolist() == [50, 10]
    assert (read.labels > 0).sum() == 100
