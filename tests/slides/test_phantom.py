"""The phantom: its truth is exact, its picture looks like H&E to arithmetic, its file to OpenSlide."""

from pathlib import Path

import numpy as np
import pytest
import shapely

from slides.geometry import Box, Size
from slides.phantom import Phantom, draw, write
from slides.slide import open_slide


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return draw(Size(1100, 900), 11)


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = draw(Size(400, 300), 1), draw(Size(400, 300), 1), draw(Size(400, 300), 2)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, other.image)


def test_shapes_and_counts(phantom: Phantom) -> None:
    assert phantom.image.shape == (900, 1100, 3)
    assert phantom.image.dtype == np.uint8
    assert phantom.labels.shape == (900, 1100)
    assert phantom.labels.dtype == np.int32
    assert set(np.unique(phantom.labels)) == set(range(len(phantom.polygons) + 1))
    assert len(phantom.polygons) > 60


def test_polygons_outline_the_labels(phantom: Phantom) -> None:
    """A pixel has the label when its centre is in the polygon; only centres on the outline may differ."""
    y, x = np.mgrid[:900, :1100] + 0.5
    for i, ring in enumerate(phantom.polygons):
        polygon = shapely.Polygon(ring)
        assert polygon.is_valid
        x0, y0, x1, y1 = (int(side) for side in polygon.buffer(3).bounds)
        place = np.s_[max(y0, 0) : y1, max(x0, 0) : x1]
        centres = shapely.points(x[place], y[place])
        differ = shapely.contains(polygon, centres) != (phantom.labels[place] == i + 1)
        assert shapely.distance(polygon.boundary, centres[differ]).max(initial=0) < 0.1
        assert (phantom.labels == i + 1).sum() == (phantom.labels[place] == i + 1).sum()


def test_sizes_are_those_of_nuclei_and_some_touch(phantom: Phantom) -> None:
    areas = np.bincount(phantom.labels.ravel())[1:]
    diameters_um = 2 * np.sqrt(areas / np.pi) * 0.25
    assert diameters_um.min() > 3
    assert diameters_um.max() < 15
    assert np.ptp(np.percentile(diameters_um, [10, 90])) > 2
    right, left = phantom.labels[:, 1:], phantom.labels[:, :-1]
    assert ((right != left) & (right > 0) & (left > 0)).any()


def test_nuclei_are_bluer_and_denser_than_their_surroundings(phantom: Phantom) -> None:
    density = -np.log(np.maximum(phantom.image, 1) / 245.0)
    inside, outside = density[phantom.labels > 0].mean(axis=0), density[phantom.labels == 0].mean(axis=0)
    assert inside[0] > 2 * outside[0]  # haematoxylin takes red
    assert inside[1] > inside[2]  # both stains take green most
    assert 0.5 < inside[0] < 1.6


def test_there_is_glass_and_ink(phantom: Phantom) -> None:
    assert (phantom.image.min(axis=2) > 230).mean() > 0.1
    blue = (phantom.image[..., 2] > 90) & (phantom.image[..., 0] < 70) & (phantom.labels == 0)
    assert blue[-250:, -250:].sum() > 1000
    assert not phantom.labels[blue].any()


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_openslide_opens_the_file(tmp_path: Path, phantom: Phantom, mpp: float) -> None:
    write(tmp_path / "phantom.tif", phantom, mpp)
    with open_slide(tmp_path / "phantom.tif") as slide:
        assert (slide.vendor, slide.size) == ("generic-tiff", Size(1100, 900))
        assert slide.scale.source == "tiff resolution"
        assert slide.scale.x == pytest.approx(mpp, rel=1e-6)
        assert [level.size for level in slide.levels] == [Size(1100, 900), Size(275, 225)]
        assert np.array_equal(slide.read(Box(0, 0, 1100, 900), slide.frame(slide.scale.x)), phantom.image)


@pytest.mark.parametrize("size", [Size(64, 64), Size(300, 90)])
def test_small_phantoms_are_drawn_too(size: Size) -> None:
    phantom = draw(size, 3)
    assert phantom.image.shape[:2] == (size.height, size.width)
    assert phantom.labels.max(initial=0) == len(phantom.polygons)
