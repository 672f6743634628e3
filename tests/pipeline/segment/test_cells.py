"""Cells contain their nuclei, do not overlap, and do not depend on how a slide is divided."""

import dataclasses

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nuclei_tables import PROVENANCE, blobs, write
from pipeline.segment import cells, tables
from pipeline.segment.cells import cells_of, expand, read_bounds
from pipeline.segment.polygons import solid


def crowd(seed: int, count: int, side: float) -> np.ndarray:
    """Outlines of any shape: stars with bays, many of which touch or overlap others; some are there twice."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    spokes = rng.uniform(1, 9, (count, 12, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    shapes = solid(shapely.polygons((rng.uniform(0, side, (count, 1, 2)) + spokes).round(rng.integers(0, 3))))
    shapes = shapes[~shapely.is_empty(shapes)]
    return np.concatenate([shapes, shapes[: rng.integers(0, 2)]])


def everything(shapes: np.ndarray, distance: float) -> np.ndarray:
    return expand(shapes, np.ones(len(shapes), bool), distance)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.sampled_from([20.0, 60.0, 300.0]), st.floats(0.1, 20))
@example(0, 40, 60.0, 5.0)
def test_cells_are_disjoint_and_around_their_nuclei(seed, count, side, distance):
    """Law: also of nuclei that touch or have bays; where two nuclei overlap, their cells do, and nowhere else."""
    nuclei = crowd(seed, count, side)
    made = everything(nuclei, distance)
    assert (shapely.get_type_id(made) == shapely.GeometryType.POLYGON).all()
    assert shapely.is_valid(made).all()
    assert shapely.area(shapely.difference(nuclei, made)).max(initial=0) < 1e-6
    reach = shapely.buffer(nuclei, distance * (1 + 1e-6), quad_segs=64)
    assert shapely.area(shapely.difference(made, reach)).max(initial=0) < 1e-3 * distance
    one, two = shapely.STRtree(made).query(made, predicate="intersects")
    one, two = one[one < two], two[one < two]
    common = shapely.area(shapely.intersection(made[one], made[two]))
    of_nuclei = shapely.area(shapely.intersection(nuclei[one], nuclei[two]))
    assert (common - of_nuclei).max(initial=0) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_a_cell_depends_on_its_neighbours_alone(seed, parts):
    """Law: with all nuclei within twice the distance, and whatever else is there, the same cell."""
    nuclei, distance = crowd(seed, 60, 120.0), 4.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_AT_ONCE", 7)
        whole = everything(nuclei, distance)
    for part in np.array_split(np.random.default_rng(seed).permutation(len(nuclei)), parts):
        near = np.flatnonzero((shapely.distance(nuclei[:, None], nuclei[part]) <= 2 * distance).any(1))
        made = expand(nuclei[near], np.isin(near, part), distance)
        assert shapely.equals_exact(made, whole[np.sort(part)], 0).all()


def test_two_discs_meet_halfway() -> None:
    """Discs of radius 3, 4 apart: the cells end at the middle, and elsewhere at the distance."""
    left, right = everything(np.array([shapely.Point(0, 0).buffer(3), shapely.Point(10, 0).buffer(3)]), 5.0)
    np.testing.assert_allclose(left.bounds, (-8, -8, 5, 8), atol=0.01)
    np.testing.assert_allclose(right.bounds, (5, -8, 18, 8), atol=0.01)
    (alone,) = everything(np.array([shapely.Point(0, 0).buffer(3)]), 5.0)
    assert alone.area == pytest.approx(np.pi * 64, rel=0.02)


def test_two_discs_that_overlap_divide_at_the_middle_of_their_centres() -> None:
    below, above = everything(np.array([shapely.Point(0, 0).buffer(3), shapely.Point(0, 4).buffer(3)]), 5.0)
    at = shapely.points([(7, 1.9), (7, 2.1)])
    assert shapely.covers(below, at).tolist() == [True, False]
    assert shapely.covers(above, at).tolist() == [False, True]


@pytest.mark.parametrize(("group", "um_per_px"), [(4, (0.25, 0.25)), (16, (0.25, 0.5)), (1000, (0.5, 0.25))])
def test_cells_do_not_depend_on_row_groups_and_parts(tmp_path, monkeypatch, group, um_per_px):
    """And grow by micrometres, where a pixel is no square too."""
    monkeypatch.setattr(tables, "_ROW_GROUP", group)
    shapes = np.concatenate([blobs(30), blobs(30, seed=1)])
    shapes = shapely.transform(shapes, lambda xy: xy / 5)  # so that they are close together
    path = write(tmp_path / "nuclei.parquet", shapes, provenance=dataclasses.replace(PROVENANCE, um_per_px=um_per_px))
    bounds = read_bounds(path)
    np.testing.assert_array_equal(bounds, shapely.bounds(shapes))
    in_um = shapely.transform(shapes, lambda xy: xy * um_per_px)
    whole = shapely.transform(everything(in_um, 2.0), lambda xy: xy / um_per_px)
    parts = [cells_of(path, bounds, slice(first, min(first + 9, 60)), 2.0) for first in range(0, 60, 9)]
    assert shapely.equals_exact(np.concatenate(parts), whole, 0).all()


def test_a_slide_without_nuclei_has_no_cells(tmp_path):
    assert read_bounds(write(tmp_path / "nuclei.parquet", blobs(0))).shape == (0, 4)
    assert len(everything(blobs(0), 5.0)) == 0
