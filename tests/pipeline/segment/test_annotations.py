"""Masks become polygons that hold exactly their pixels, in GeoJSON as QuPath reads it."""

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import AnnotationError
from pipeline.segment.annotations import origin, outline, place, write_artefacts, write_tissue
from slides.artefacts import KINDS, ArtefactMap
from slides.geometry import Affine, Box, Frame, Size
from slides.tissue import TissueMap

BOUNDS = Box(100, 250, 900, 730)
FRAME = Frame(Size(25, 15), 8.0, Affine(32.0, 32.0, 100.0, 250.0))
WORK = Frame(Size(800, 480), 0.25, Affine(1.0, 1.0, 100.0, 250.0))


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
@settings(max_examples=40)
def test_a_pixel_is_in_the_mask_where_its_centre_is_in_the_polygon(seed: int, share: float) -> None:
    """Law: for any mask, with holes, touching corners and pieces at the edge."""
    mask = np.random.default_rng(seed).random((15, 25)) < share
    shape = outline(mask, FRAME, BOUNDS, crop=False)
    x, y = np.meshgrid(np.arange(25) + 0.5, np.arange(15) + 0.5)
    centres = FRAME.to_slide.apply(np.stack([x, y], -1))
    assert shape.is_valid
    assert (shapely.contains_xy(shape, centres[..., 0], centres[..., 1]) == mask).all()
    assert shape.geom_type in ("Polygon", "MultiPolygon")


def test_what_hangs_over_the_bounds_is_cut_and_coordinates_count_from_their_corner() -> None:
    bounds = Box(100, 250, 895, 727)
    shape = outline(np.ones((15, 25), bool), FRAME, bounds, crop=True)
    assert shape.bounds == (0, 0, 795, 477)
    whole = outline(np.ones((15, 25), bool), FRAME, bounds, crop=False)
    assert whole.bounds == pytest.approx(bounds)
    assert outline(np.zeros((15, 25), bool), FRAME, bounds, crop=True).is_empty
    corner = np.zeros((15, 25), bool)
    corner[-1, -1] = True
    assert outline(corner, FRAME, Box(100, 250, 876, 706), crop=True).is_empty  # it touches the bounds in a point


def test_tissue_and_artefacts_are_annotations(tmp_path: Path) -> None:
    mask, kinds = np.ones((15, 25), bool), np.zeros((15, 25), np.uint8)
    mask[5:8, 5:8] = False
    kinds[2:4, 2:9], kinds[10:12, 3:5], kinds[10:12, 20:22] = 1, 5, 5
    tissue = TissueMap(mask, FRAME, WORK)
    write_tissue(tmp_path / "tissue.geojson", "hash", tissue, BOUNDS, crop=True)
    write_artefacts(tmp_path / "artefacts.geojson", "hash", ArtefactMap(kinds, tissue), BOUNDS, crop=True)
    (locked,) = json.loads((tmp_path / "tissue.geojson").read_text())["features"]
    assert locked["properties"]["isLocked"] is True
    assert locked["properties"]["objectType"] == "annotation"
    assert locked["properties"]["classification"]["name"] == "Tissue"
    assert len(locked["geometry"]["coordinates"]) == 2  # a ring, and the hole
    pen, blur = json.loads((tmp_path / "artefacts.geojson").read_text())["features"]
    assert [f["properties"]["classification"]["name"] for f in (pen, blur)] == [
        "Artefact: pen",
        f"Artefact: {KINDS[4]}",
    ]
    assert all(len(f["properties"]["classification"]["color"]) == 3 for f in (pen, blur))
    assert (pen["geometry"]["type"], blur["geometry"]["type"]) == ("Polygon", "MultiPolygon")
    assert len({f["id"] for f in (locked, pen, blur)}) == 3
    read = geopandas.read_file(tmp_path / "artefacts.geojson")
    assert read.geometry.is_valid.all()
    assert read.geometry[0].area == pytest.approx(14 * 32**2, rel=0.05)


def test_no_tissue_is_a_collection_without_features(tmp_path: Path) -> None:
    tissue = TissueMap(np.zeros((15, 25), bool), FRAME, WORK)
    write_tissue(tmp_path / "tissue.geojson", "hash", tissue, BOUNDS, crop=True)
    empty = {"type": "FeatureCollection", "origin_px": [100, 250], "features": []}
    assert json.loads((tmp_path / "tissue.geojson").read_text()) == empty


@given(seed=st.integers(0, 2**32 - 1), crop=st.booleans())
@settings(max_examples=20)
def test_outlines_with_another_origin_are_those_that_are_written_with_it(
    seed: int, crop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: to the byte; with the origin that it has already a file stays as it is."""
    folder = tmp_path_factory.mktemp("annotations")
    tissue = TissueMap(np.random.default_rng(seed).random((15, 25)) < 0.5, FRAME, WORK)
    write_tissue(folder / "a.geojson", "hash", tissue, BOUNDS, crop=crop)
    write_tissue(folder / "b.geojson", "hash", tissue, BOUNDS, crop=not crop)
    assert not place(folder / "a.geojson", BOUNDS, crop=crop)
    assert place(folder / "a.geojson", BOUNDS, crop=not crop)
    assert (folder / "a.geojson").read_bytes() == (folder / "b.geojson").read_bytes()
    assert origin(folder / "a.geojson", BOUNDS) == ((0, 0) if crop else (100, 250))


@pytest.mark.parametrize("text", ["", "[]", '{"features": 3}', '{"features": [3]}', '{"features": [{"geometry": {}}]}'])
def test_a_damaged_file_of_outlines_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tissue.geojson").write_text(text)
    with pytest.raises(AnnotationError, match=r"tissue\.geojson is not as it was written .* --overwrite"):
        place(tmp_path / "tissue.geojson", BOUNDS, crop=False)
    assert (tmp_path / "tissue.geojson").read_text() == text
