"""The label images, read by Zarr, ome-zarr-models, and ome-zarr-py and napari's reader where they are installed.

These two are no packages of the development group: the one replaces python-dateutil by an older one, the other brings
seventy packages. Their tests:

    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 uv run --isolated --with ome-zarr --with napari-ome-zarr pytest \\
        tests/pipeline/segment/export/test_ngff.py
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import zarr
from shapely.affinity import translate

from nuclei_tables import PROVENANCE, blobs, write
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export import ngff
from pipeline.segment.export.exported import Exported
from pipeline.segment.export.ngff import write_ngff
from pipeline.segment.polygons import rasterise
from slides.geometry import Box, Size

SLIDE = dataclasses.replace(PROVENANCE, um_per_px=(0.25, 0.5), size=Size(1100, 901), bounds=Box(37, 11, 1000, 890))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small slide has several shards, levels and row groups."""
    monkeypatch.setattr(ngff, "_SHARD", 128)
    monkeypatch.setattr(ngff, "_CHUNK", 64)
    monkeypatch.setattr(tables, "_ROW_GROUP", 7)


def scattered(count: int, seed: int = 0) -> np.ndarray:
    """Blobs that overlap each other and the edges of the slide; the last one hides behind the first."""
    rng = np.random.default_rng(seed)
    shapes = blobs(count, seed)
    shifts = rng.uniform(-5, (1105, 906), (count, 2)) - shapely.get_coordinates(shapely.centroid(shapes))
    moved = [translate(shape, *shift) for shape, shift in zip(shapes, shifts, strict=True)]
    return np.array([*moved[:-1], moved[0]], dtype=object)


def image(path: Path) -> tuple[list[np.ndarray], list[dict[str, Any]], dict[str, Any]]:
    """Pixels and transformations (by type) of every level, and all attributes."""
    group = zarr.open_group(path, mode="r")
    ome: Any = group.attrs["ome"]
    datasets = ome["multiscales"][0]["datasets"]
    transformations = [{t["type"]: np.array(t[t["type"]]) for t in d["coordinateTransformations"]} for d in datasets]
    return [np.asarray(group[d["path"]]) for d in datasets], transformations, ome


@pytest.mark.parametrize("crop", [True, False])
def test_a_pixel_has_the_row_of_the_nucleus_that_its_centre_lies_in(tmp_path: Path, crop: bool) -> None:
    """Law: by the project's own rule, whatever the shards; and its class in the second image."""
    shapes = scattered(60)
    nuclei = write(tmp_path / "nuclei.parquet", shapes, provenance=SLIDE)
    exported = write_ngff(nuclei, tmp_path / "n.ome.zarr", Export(crop=crop))
    box = SLIDE.bounds if crop else Box(0, 0, *SLIDE.size)
    expected = rasterise(shapely.transform(shapes, lambda xy: xy - box[:2]), (box.height, box.width))
    levels, _, _ = image(tmp_path / "n.ome.zarr")
    assert levels[0].dtype == np.uint32
    np.testing.assert_array_equal(levels[0], expected)
    seen = len(np.unique(expected)) - 1
    assert 40 < seen < 60
    assert exported == Exported(seen, dropped=60 - seen)
    names = np.array(["", *tables.read_nuclei(nuclei)["class"].to_pylist()])
    classes, _, ome = image(tmp_path / "n.ome.zarr" / "labels" / "classes")
    key = {p["label-value"]: p["class"] for p in ome["image-label"]["properties"]} | {0: ""}
    assert classes[0].dtype == np.uint8
    for level, of_class in zip(levels, classes, strict=True):
        np.testing.assert_array_equal(np.vectorize(key.get)(of_class), names[level])


def test_every_level_shows_the_labels_at_their_place(tmp_path: Path) -> None:
    """Law: a pixel of any level has the label that level 0 has at the same place in micrometres."""
    write_ngff(write(tmp_path / "nuclei.parquet", scattered(200), provenance=SLIDE), tmp_path / "z", Export(crop=False))
    levels, transformations, _ = image(tmp_path / "z")
    assert [level.shape for level in levels] == [(901, 1100), (450, 550), (225, 275), (113, 137), (56, 69), (28, 34)]
    np.testing.assert_array_equal(transformations[0]["scale"], (0.5, 0.25))  # y x
    np.testing.assert_array_equal(transformations[0]["translation"], (0, 0))
    for number, (level, place) in enumerate(zip(levels, transformations, strict=True)):
        np.testing.assert_array_equal(place["scale"], np.array([0.5, 0.25]) * 2**number)
        index = [
            (np.arange(side) * place["scale"][axis] + place["translation"][axis]) / transformations[0]["scale"][axis]
            for axis, side in enumerate(level.shape)
        ]
        rows, columns = (i.astype(int) for i in index)
        np.testing.assert_array_equal(rows, index[0])  # the centre of a pixel of level 0, and not between two
        np.testing.assert_array_equal(level, levels[0][np.ix_(rows, columns)])
        # and what is taken for 2**number pixels lies in their middle, within half a pixel
        middle = (2**number - 1) / 2
        assert abs(rows[0] - middle) <= 0.5


def test_centroids_agree_with_the_table(tmp_path: Path) -> None:
    """A pixel's centre is half a pixel from the edge where slide px start."""
    disc = shapely.Point(400.3, 300.8).buffer(30)
    nuclei = write(tmp_path / "nuclei.parquet", np.array([disc]), provenance=SLIDE)
    write_ngff(nuclei, tmp_path / "z", Export(crop=False))
    levels, transformations, _ = image(tmp_path / "z")
    for number in (0, 1, 2):
        at = np.argwhere(levels[number] == 1).mean(axis=0)
        um = at * transformations[number]["scale"] + transformations[number]["translation"]
        np.testing.assert_allclose(um, (np.array([300.8, 400.3]) - 0.5) * (0.5, 0.25), atol=0.02 * 4**number)


def test_there_is_no_file_where_there_is_no_nucleus(tmp_path: Path) -> None:
    write_ngff(write(tmp_path / "nuclei.parquet", blobs(0), provenance=SLIDE), tmp_path / "none", Export())
    assert not image(tmp_path / "none")[0][0].any()
    assert {path.name for path in (tmp_path / "none").rglob("*") if path.is_file()} == {"zarr.json"}
    one = np.array([shapely.box(300, 300, 310, 310)], dtype=object)
    write_ngff(write(tmp_path / "nuclei.parquet", one, provenance=SLIDE), tmp_path / "one", Export(crop=False))
    written = [path for path in (tmp_path / "one" / "0").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "one" / "0").as_posix() for path in written} == {"zarr.json", "c/2/2"}


def test_a_nucleus_over_four_shards_is_whole(tmp_path: Path) -> None:
    square = np.array([shapely.box(120, 120, 140, 140)], dtype=object)
    write_ngff(write(tmp_path / "nuclei.parquet", square, provenance=SLIDE), tmp_path / "z", Export(crop=False))
    level = image(tmp_path / "z")[0][0]
    assert (level == 1).sum() == 400
    assert (level[120:140, 120:140] == 1).all()


def test_a_long_slide_has_no_level_without_pixels(tmp_path: Path) -> None:
    narrow = dataclasses.replace(SLIDE, size=Size(3000, 3), bounds=Box(0, 0, 3000, 3))
    write_ngff(write(tmp_path / "nuclei.parquet", blobs(0), provenance=narrow), tmp_path / "z", Export())
    assert [level.shape for level in image(tmp_path / "z")[0]] == [(3, 3000), (1, 1500), (1, 750)]


# ------------------------------------------------------------------------------------------- other readers


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_ngff(write(tmp_path / "nuclei.parquet", scattered(30), provenance=SLIDE), tmp_path / "n.ome.zarr", Export())
    return tmp_path / "n.ome.zarr"


def test_ome_zarr_models_validates_both_images(labels: Path) -> None:
    models = pytest.importorskip(
        "ome_zarr_models", reason="ome-zarr-models, of the development group, is not installed"
    )
    from ome_zarr_models.v05.image_label import ImageLabel
    from ome_zarr_models.v05.labels import Labels

    assert Labels.from_zarr(zarr.open_group(labels / "labels", mode="r")).ome_attributes.labels == ["classes"]
    for path in (labels, labels / "labels" / "classes"):
        read = models.open_ome_zarr(zarr.open_group(path, mode="r"))
        assert isinstance(read, ImageLabel)
        assert read.ome_attributes.version == "0.5"
    assert [colour.rgba for colour in read.ome_attributes.image_label.colors] == [
        (200, 30, 30, 255),
        (0, 128, 255, 255),
    ]


def test_ome_zarr_py_opens_both_images(labels: Path) -> None:
    pytest.importorskip("ome_zarr", reason="ome-zarr is not installed")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Label, Multiscales, Reader

    images = [node for node in Reader(parse_url(labels))() if node.load(Multiscales)]
    assert [node.metadata["name"] for node in images] == ["nuclei", "classes"]
    for node, folder in zip(images, (labels, labels / "labels" / "classes"), strict=True):
        assert node.load(Label)
        for read, written in zip(node.data, image(folder)[0], strict=True):
            np.testing.assert_array_equal(read.compute(), written)


@pytest.mark.filterwarnings("default")  # of the packages that napari imports
def test_napari_opens_both_images_as_labels(labels: Path) -> None:
    pytest.importorskip("napari_ome_zarr", reason="napari-ome-zarr is not installed")
    from napari_ome_zarr import napari_get_reader

    layers = napari_get_reader(str(labels))(str(labels))
    assert [kind for _, _, kind in layers] == ["labels", "labels"]
    for levels, about, _ in layers:
        assert [level.shape for level in levels] == [level.shape for level in image(labels)[0]]
        assert (about["scale"], about["units"]) == ([0.5, 0.25], ("micrometer", "micrometer"))
