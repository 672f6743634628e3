"""Convex hulls, measured: what GEOS finds for one after the other, and what follows from the definitions."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.segment import hulls

COORDINATES = st.one_of(
    st.integers(-4, 4).map(float),  # many on one line, on one circle, or equal
    st.integers(-300, 300).map(lambda px: px * 0.2494),  # as those of a slide's px in um
    st.floats(-1e3, 1e3).filter(lambda value: value == 0 or abs(value) > 1e-3),
)
SHAPES = st.lists(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=24), min_size=1, max_size=6)


def least_width(ring: np.ndarray) -> float:
    """By the definition: over the edges the least of the distance to the farthest vertex."""
    edges = np.roll(ring, -1, axis=0) - ring
    across = np.stack([-edges[:, 1], edges[:, 0]], axis=1) / np.hypot(*edges.T)[:, None]
    return float(np.abs(((ring[None] - ring[:, None]) * across[:, None]).sum(2)).max(1).min())


@given(SHAPES)
def test_circles_are_those_of_geos(shapes: list[list[tuple[float, float]]]) -> None:
    """Around points of any number, on a line, on a circle, or equal."""
    xy, counts = np.array([xy for shape in shapes for xy in shape]), np.array([len(shape) for shape in shapes])
    expected = shapely.minimum_bounding_radius([shapely.MultiPoint(shape) for shape in shapes])
    np.testing.assert_allclose(hulls.smallest_circles(xy, counts), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("corners", [4, 6, 12, 40])
def test_circles_that_grow_in_many_steps(corners: int) -> None:
    """Around points near a circle, each step goes through other ones of the last: all of its cases come up."""
    rng = np.random.default_rng(corners)
    angle = rng.uniform(0, 2 * np.pi, (3000, corners, 1))
    points = np.concatenate([np.cos(angle), np.sin(angle)], axis=2) * rng.uniform(0.9, 1, angle.shape)
    expected = shapely.minimum_bounding_radius(shapely.multipoints(points))
    found = hulls.smallest_circles(points.reshape(-1, 2), np.full(len(points), corners))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(SHAPES, st.booleans())
def test_areas_and_widths_are_those_of_the_definitions(shapes: list[list[tuple[float, float]]], reverse: bool) -> None:
    """Whichever way a hull turns, and whatever is measured beside it."""
    polygons = np.array([shapely.convex_hull(shapely.MultiPoint(shape)) for shape in shapes])
    polygons = polygons[shapely.area(polygons) > 1e-3 * shapely.length(polygons)]  # no needles: those are below
    xy, counts = hulls.convex_hulls(polygons)
    rings = np.split(xy, np.cumsum(counts)[:-1]) if len(counts) else []
    if reverse:
        xy = np.concatenate([np.zeros((0, 2)), *(ring[::-1] for ring in rings)])
    if len(counts):
        np.testing.assert_allclose(hulls.areas(xy, counts), shapely.area(polygons), rtol=1e-9)
        expected = [least_width(ring) for ring in rings]
        np.testing.assert_allclose(hulls.least_widths(xy, counts), expected, rtol=1e-9)


def test_the_vertices_of_hulls() -> None:
    """In order, each once; none of an empty polygon."""
    bent = shapely.Polygon([(0, 0), (4, 0), (4, 1), (1, 1), (1, 4), (0, 4)])
    polygons = np.array([shapely.Polygon(), bent, shapely.Polygon(), shapely.box(0, 0, 1, 2), shapely.Polygon()])
    xy, counts = hulls.convex_hulls(polygons)
    assert counts.tolist() == [0, 5, 0, 4, 0]
    assert shapely.Polygon(xy[:5]).equals(shapely.convex_hull(bent))
    assert shapely.Polygon(xy[5:]).equals(polygons[3])
    none, counts = hulls.convex_hulls(np.array([], dtype=object))
    assert none.shape == (0, 2)
    assert counts.shape == (0,)


@pytest.mark.parametrize("corners", [3, 4, 5, 6, 64, 1001])
def test_a_regular_polygon(corners: int) -> None:
    """All its vertices lie on the circle. Its width is twice the inner radius, or that and the outer one."""
    angle = np.arange(corners) / corners * 2 * np.pi + 0.3
    xy, counts = np.stack([np.cos(angle), np.sin(angle)], axis=1) * 7 + 1000, np.array([corners])
    inner = 7 * np.cos(np.pi / corners)
    np.testing.assert_allclose(hulls.smallest_circles(xy, counts), 7, rtol=1e-9)
    np.testing.assert_allclose(hulls.least_widths(xy, counts), inner * 2 if corners % 2 == 0 else inner + 7, rtol=1e-9)
    np.testing.assert_allclose(hulls.areas(xy, counts), corners / 2 * 49 * np.sin(2 * np.pi / corners), rtol=1e-6)


def test_a_needle_is_as_long_and_as_thin_as_it_is() -> None:
    """A triangle of 1,000 by a millionth; and three points that only rounding keeps off a line."""
    needle = np.array([(0, 0), (1000, 0), (400, 1e-6)])
    bent = np.array([(0, 0), (0.1, 0.3), (0.2, 0.6 + 1e-16)])
    xy, counts = np.concatenate([needle, bent]), np.array([3, 3])
    np.testing.assert_allclose(hulls.smallest_circles(xy, counts), [500, np.hypot(0.1, 0.3)], rtol=1e-9)
    np.testing.assert_allclose(hulls.least_widths(needle, counts[:1]), 1e-6, rtol=1e-6)


def test_a_hull_is_measured_by_its_own_vertices() -> None:
    """However many come before it, here each beside one that turns so little at its first vertex that it rounds off."""
    bent = np.array([(5, 3 - 1e-12), (10, 3), (5, 20), (0, 3.1), (1, 3)])
    oblong = np.array([(0, 0), (7, 0), (7, 3), (0, 3)])
    xy, counts = np.tile(np.concatenate([bent, oblong]), (10_000, 1)), np.array([5, 4] * 10_000)
    np.testing.assert_allclose(hulls.least_widths(xy, counts)[::2], least_width(bent), rtol=1e-9)
    np.testing.assert_allclose(hulls.least_widths(xy, counts)[1::2], 3, rtol=1e-9)
