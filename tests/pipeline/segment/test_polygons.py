"""Outlines are the masks they came from; a solid polygon is one; measures are those of known shapes."""

import re

import numpy as np
import pytest
import shapely
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.segment.polygons import from_masks, measure, rasterise, simplify, solid


def array(*shapes: shapely.Geometry) -> np.ndarray:
    out = np.empty(len(shapes), dtype=object)
    out[:] = shapes
    return out


def unit_boxes(count: int, side: int) -> np.ndarray:
    return np.tile(np.array([0, 0, side, side], dtype=np.float32), (count, 1))


def masks(most: int = 9) -> st.SearchStrategy[np.ndarray]:
    """bool (N, M, M): from empty through noise, with holes, islands and corners that touch, to full."""
    shape = st.tuples(st.integers(0, 5), st.integers(1, most)).map(lambda s: (s[0], s[1], s[1]))
    return shape.flatmap(lambda s: hnp.arrays(bool, s))


@given(masks(), st.sampled_from([np.float32, np.bool_]), st.sampled_from([0.25, 0.5, 0.75]))
@example(np.array([[[0, 1], [1, 0]]], dtype=bool), np.bool_, 0.25)
@example(np.array([[[1, 0], [0, 1]]], dtype=bool), np.float32, 0.5)
@example(np.ones((1, 1, 1), dtype=bool), np.float32, 0.5)
@example(np.pad(~np.eye(3, dtype=bool), 1, constant_values=True)[None], np.bool_, 0.5)
def test_rasterising_the_outline_gives_the_mask_back(mask, kind, level):
    """Law: for every binary mask, given as probabilities or as bool, and at any level."""
    outlines = from_masks(mask.astype(kind), unit_boxes(len(mask), mask.shape[1]), level=level)
    for outline, expected in zip(outlines, mask, strict=True):
        np.testing.assert_array_equal(rasterise(array(outline), expected.shape), expected)


@given(
    st.one_of(
        hnp.arrays(np.float32, (4, 6, 6), elements=st.floats(0, 1, width=16)),
        hnp.arrays(np.float32, (4, 6, 6), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),  # of the level itself
        hnp.arrays(np.uint8, (4, 6, 6)),
        hnp.arrays(np.bool_, (4, 6, 6)),
    ),
    st.integers(0, 3),
)
def test_a_mask_is_outlined_alone_as_among_others(mask_probs, alone):
    """To the last digit: nuclei are known by the bytes of their outlines."""
    boxes = np.array([[0, 0, 6, 6], [10, 0, 40, 20], [-5, 3, 1, 4], [7.5, 7, 8, 30]], dtype=np.float32)
    together = from_masks(mask_probs, boxes, level=0.5)
    single = from_masks(mask_probs[alone : alone + 1], boxes[alone : alone + 1], level=0.5)
    assert together[alone].wkb == single[0].wkb


@given(hnp.arrays(np.uint8, (3, 5, 5)), st.sampled_from([0.25, 0.5, 0.75]))
def test_a_mask_in_256_levels_is_outlined_as_its_probabilities(levels, level):
    coarse = from_masks(levels, unit_boxes(3, 5), level=level)
    fine = from_masks((levels / 255).astype(np.float64), unit_boxes(3, 5), level=level)
    assert list(shapely.is_empty(coarse)) == list(shapely.is_empty(fine))
    assert shapely.equals_exact(coarse, fine, 1e-6).all()


@given(hnp.arrays(np.float32, (3, 5, 5), elements=st.floats(0, 1, width=16)), st.sampled_from([0.5, 0.75]))
def test_outlines_stay_in_their_boxes(mask_probs, level):
    boxes = np.array([[0, 0, 5, 5], [10, 20, 40, 30], [-7, -3, -1, 9]], dtype=np.float32)
    outlines = from_masks(mask_probs, boxes, level=level)
    assert list(shapely.is_empty(outlines)) == list((mask_probs <= level).all(axis=(1, 2)))
    full = ~shapely.is_empty(outlines)
    bounds = shapely.bounds(outlines[full])
    assert (bounds[:, :2] >= boxes[full, :2] - 1e-9).all()
    assert (bounds[:, 2:] <= boxes[full, 2:] + 1e-9).all()


def test_many_masks_are_outlined_as_few(monkeypatch):
    """However many mosaics the masks are spread over."""
    mask_probs = np.random.default_rng(1).random((40, 7, 7)).astype(np.float32)
    once = from_masks(mask_probs, unit_boxes(40, 7), level=0.5)
    monkeypatch.setattr("pipeline.segment.polygons._MOSAIC_CELLS", 300)
    assert (shapely.to_wkb(from_masks(mask_probs, unit_boxes(40, 7), level=0.5)) == shapely.to_wkb(once)).all()


def test_a_tall_mosaic_has_coordinates_too():
    """More rows than are usually made at once, then few again."""
    mask_probs = np.random.default_rng(2).random((3000, 4, 4)).astype(np.float32)
    many = from_masks(mask_probs, unit_boxes(3000, 4), level=0.5)
    few = from_masks(mask_probs[-3:], unit_boxes(3, 4), level=0.5)
    assert (shapely.to_wkb(many[-3:]) == shapely.to_wkb(few)).all()


def test_a_pixel_is_a_unit_square():
    one = from_masks(np.ones((1, 1, 1), dtype=bool), np.array([[3, 4, 4, 5]], dtype=np.float32), level=0.5)
    assert one[0].equals(shapely.box(3, 4, 4, 5))


def test_vertices_are_interpolated_between_cell_centres():
    mask_probs = np.array([[[0.25, 1.0], [0.25, 1.0]]], dtype=np.float32)
    (outline,) = from_masks(mask_probs, np.array([[0, 0, 20, 20]], dtype=np.float32), level=0.5)
    left = 5 + 10 * (0.5 - 0.25) / (1 - 0.25)  # centres at 5 and 15
    assert outline.bounds == pytest.approx((left, 0, 20, 20))


def test_parts_and_holes_are_kept():
    mask = np.zeros((1, 7, 7), dtype=bool)
    mask[0, :5, :5] = True
    mask[0, 1:4, 1:4] = False
    mask[0, 2, 2] = mask[0, 6, 6] = True
    (outline,) = from_masks(mask, unit_boxes(1, 7), level=0.5)
    assert outline.geom_type == "MultiPolygon"
    assert outline.area == 16 + 1 + 1
    (one,) = solid(array(outline))
    assert one.equals(shapely.box(0, 0, 5, 5))


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0])
def test_a_level_out_of_range_is_refused(level):
    with pytest.raises(ValueError, match="need 0 < level < 1"):
        from_masks(np.zeros((1, 2, 2), dtype=np.float32), unit_boxes(1, 2), level=level)


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 3, 4), (1, 3)])
def test_arrays_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"masks {shape}, boxes (1, 4)")):
        from_masks(np.zeros(shape, dtype=np.float32), unit_boxes(1, 3), level=0.5)


@given(masks(), st.sampled_from([np.float32, np.bool_]))
def test_solid_is_one_valid_polygon_without_holes(mask, kind):
    outlines = from_masks(mask.astype(kind), unit_boxes(len(mask), mask.shape[1]), level=0.5)
    made = solid(outlines)
    assert (shapely.get_type_id(made) == shapely.GeometryType.POLYGON).all()
    assert shapely.is_valid(made).all()
    assert (shapely.get_num_interior_rings(made) == 0).all()
    assert list(shapely.is_empty(made)) == list(shapely.is_empty(outlines))
    assert all(again.equals(once) for again, once in zip(solid(made), made, strict=True))
    largest = [max((p.area for p in shapely.get_parts(shapely.make_valid(o))), default=0) for o in outlines]
    assert (shapely.area(made) >= np.array(largest) - 1e-9).all()


def test_solid_mends_what_crosses_itself_and_drops_what_has_no_area():
    bow_tie = shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 3)])
    line = shapely.Polygon([(0, 0), (5, 5), (0, 0), (0, 0)])
    made = solid(array(bow_tie, line, shapely.Polygon()))
    assert made[0].is_valid
    assert 0 < made[0].area < 4 * 4 / 2
    assert made[1].is_empty
    assert made[2].is_empty


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 1.0, 20.0]))
@example(50797, 1.0)
def test_simplified_outlines_are_valid_and_near(seed, tolerance):
    outlines = array(*(blob(np.random.default_rng(seed), 20) for _ in range(3)))
    simplified = simplify(outlines, tolerance)
    assert shapely.is_valid(simplified).all()
    assert not shapely.is_empty(simplified).any()
    assert (shapely.get_num_coordinates(simplified) <= shapely.get_num_coordinates(outlines)).all()
    for outline, fewer in zip(outlines, simplified, strict=True):
        vertices = shapely.points(shapely.get_coordinates(outline))
        assert shapely.distance(vertices, fewer.exterior).max() <= 2 * tolerance + 1e-9


def blob(rng: np.random.Generator, vertices: int) -> shapely.Polygon:
    """A star-shaped polygon somewhere in a map of 30 x 40."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    radius = rng.uniform(2, 12, (vertices, 1))
    return shapely.Polygon(rng.uniform(0, 35, 2) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_a_pixel_gets_the_first_polygon_that_holds_its_centre(seed, count):
    """Against shapely's own point-in-polygon, on shapes that hang over the map."""
    rng = np.random.default_rng(seed)
    shapes = array(*(shapely.make_valid(blob(rng, 12)) for _ in range(count)))
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5)
    expected = np.zeros((30, 40), dtype=np.int32)
    for label in range(count, 0, -1):
        expected[shapely.contains_xy(shapes[label - 1], x, y)] = label
    labels = rasterise(shapes, (30, 40))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)


@given(st.integers(0, 2**32 - 1))
def test_polygons_that_share_edges_share_no_pixel_and_leave_none(seed):
    """A triangulation with vertices on pixel centres, where the half-open rule decides, covers its square."""
    inner = np.random.default_rng(seed).integers(1, 20, (15, 2)) + 0.5
    corners = np.array([[0.5, 0.5], [20.5, 0.5], [0.5, 20.5], [20.5, 20.5]])
    points = shapely.multipoints(np.concatenate([corners, inner]))
    triangles = shapely.get_parts(shapely.delaunay_triangles(points))
    times = sum((rasterise(array(triangle), (22, 22)) for triangle in triangles), np.zeros((22, 22)))
    expected = np.zeros((22, 22))
    expected[:20, :20] = 1
    np.testing.assert_array_equal(times, expected)


def test_drawing_in_batches_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    shapes = solid(array(*(blob(rng, 9) for _ in range(30)), shapely.Polygon()))
    once = rasterise(shapes, (30, 40))
    monkeypatch.setattr("pipeline.segment.polygons._PAINTED_PX", 500)
    np.testing.assert_array_equal(rasterise(shapes, (30, 40)), once)


def test_nothing_draws_nothing():
    assert not rasterise(array(), (3, 4)).any()
    assert not rasterise(array(shapely.Polygon()), (3, 4)).any()


def test_an_ellipse_measures_what_it_is():
    """Semi-axes 10 and 4 px at 0.25 x 0.5 um, turned; then shifted far from the origin."""
    angle = np.linspace(0, 2 * np.pi, 2000)
    ring = np.stack([10 * np.cos(angle), 4 * np.sin(angle)], axis=1)
    turned = ring @ np.array([[np.cos(0.5), np.sin(0.5)], [-np.sin(0.5), np.cos(0.5)]])
    measured = measure(array(shapely.Polygon(turned + 200_000), shapely.Polygon(ring)), (0.25, 0.25))
    np.testing.assert_allclose(measured.area_um2, np.pi * 40 / 16, rtol=1e-4)
    np.testing.assert_allclose(measured.major_axis_um, 5, rtol=1e-4)
    np.testing.assert_allclose(measured.minor_axis_um, 2, rtol=1e-4)
    np.testing.assert_allclose(measured.centroid, [[200_000, 200_000], [0, 0]], atol=1e-6)
    stretched = measure(array(shapely.Polygon(ring)), (0.25, 0.5))
    assert stretched.major_axis_um[0] == pytest.approx(5, rel=1e-4)
    assert stretched.minor_axis_um[0] == pytest.approx(4, rel=1e-4)
    for one in (measured, stretched):
        np.testing.assert_allclose(one.max_diameter_um, one.major_axis_um, rtol=1e-3)
        np.testing.assert_allclose(one.min_diameter_um, one.minor_axis_um, rtol=1e-3)
        np.testing.assert_allclose(one.solidity, 1, rtol=1e-6)


def test_a_rectangle_measures_what_it_is():
    """Rectangle a x b: axes 4 a / sqrt(12), 4 b / sqrt(12); a disc's circularity is 1, a square's pi / 4."""
    disc = shapely.Point(0, 0).buffer(9, 200)
    measured = measure(array(shapely.box(0, 0, 6, 2), shapely.box(5, 5, 8, 8), disc), (1, 1))
    np.testing.assert_allclose(measured.perimeter_um[:2], [16, 12])
    np.testing.assert_allclose(measured.major_axis_um[0], 24 / np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(measured.minor_axis_um[0], 8 / np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(measured.circularity[1:], [np.pi / 4, 1], rtol=1e-4)
    np.testing.assert_allclose(measured.max_diameter_um, [np.sqrt(40), np.sqrt(18), 18], rtol=1e-4)
    np.testing.assert_allclose(measured.min_diameter_um, [2, 3, 18], rtol=1e-4)


def test_a_triangle_and_an_l_measure_what_they_are():
    """The triangle 3, 4, 5 and an L of three unit squares, in um of 0.5 x 2 px."""
    triangle = shapely.Polygon([(0, 0), (4, 0), (0, 3)])
    angled = shapely.Polygon([(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)])
    shapes = shapely.transform(array(triangle, angled), lambda xy: xy / [0.5, 2] + 50_000)
    measured = measure(shapes, (0.5, 2))
    np.testing.assert_allclose(measured.solidity, [1, 3 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(measured.max_diameter_um, [5, np.sqrt(8)], rtol=1e-6)
    np.testing.assert_allclose(measured.min_diameter_um, [12 / 5, 2], rtol=1e-6)
    np.testing.assert_allclose(measured.centroid, shapely.get_coordinates(shapely.centroid(shapes)), rtol=0, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
def test_the_least_width_is_that_over_all_directions(seed, count):
    """However many polygons are measured at once."""
    rng = np.random.default_rng(seed)
    shapes = solid(shapely.polygons(rng.normal(300, 9, (5, count, 2))))
    angle = np.linspace(0, np.pi, 2000)
    across = np.stack([np.cos(angle), np.sin(angle)])
    expected = [np.ptp(shapely.get_coordinates(shape) @ across, axis=0).min() for shape in shapes]
    measured = measure(shapes, (1, 1)).min_diameter_um
    assert (measured <= np.array(expected) * (1 + 1e-6)).all()
    np.testing.assert_allclose(measured, expected, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(np.concatenate([measure(shapes[i : i + 1], (1, 1))[7] for i in range(5)]), measured)


@given(masks(), st.booleans())
def test_area_perimeter_and_centroid_are_shapely_s(mask, reverse):
    """On Multipolygons with holes, whichever way their rings turn."""
    outlines = from_masks(mask.astype(np.float32), unit_boxes(len(mask), mask.shape[1]), level=0.5)
    measured = measure(shapely.reverse(outlines) if reverse else outlines, (1, 1))
    np.testing.assert_allclose(measured.area_um2, shapely.area(outlines), rtol=1e-5)
    np.testing.assert_allclose(measured.perimeter_um, shapely.length(outlines), rtol=1e-5)
    full = ~shapely.is_empty(outlines)
    centre = shapely.get_coordinates(shapely.centroid(outlines[full]))
    np.testing.assert_allclose(measured.centroid[full], centre, atol=1e-6)
    assert np.isnan(measured.centroid[~full]).all()
    assert (measured.circularity <= 1).all()
    assert (measured.minor_axis_um <= measured.major_axis_um).all()


def test_empty_polygons_measure_zero_and_have_no_centroid():
    measured = measure(array(shapely.Polygon(), shapely.box(0, 0, 1, 1)), (1, 1))
    assert [float(values[0]) for values in measured[:-1]] == [0] * 8
    assert np.isnan(measured.centroid[0]).all()
    assert measured.area_um2[1] == 1
    assert all(len(values) == 0 for values in measure(array(), (1, 1)))


def test_an_outline_that_would_cross_itself_stays_one_polygon() -> None:
    """Regression: Douglas and Peucker make this one cross itself, and GEOS mends that by taking it apart."""
    ring = [
        *((3.287, 0.23), (3.401, 0.175), (4.157, 0.047), (4.913, 0.117), (5.123, 0.23), (5.35, 0.69), (5.668, 1.147)),
        *((5.671, 1.151), (5.89, 1.611), (6.424, 1.756), (7.18, 1.843), (7.936, 1.824), (8.39, 2.071), (7.936, 2.444)),
        *((7.576, 2.531), (7.18, 2.705), (6.721, 2.992), (7.18, 3.104), (7.597, 3.452), (7.936, 3.683), (8.229, 3.912)),
        *(
            (8.004, 4.372),
            (7.936, 4.403),
            (7.18, 4.462),
            (6.567, 4.372),
            (6.424, 4.338),
            (5.668, 4.068),
            (4.913, 4.118),
        ),
        *(
            (4.739, 4.372),
            (4.301, 4.833),
            (4.157, 4.892),
            (3.401, 4.871),
            (3.312, 4.833),
            (2.901, 4.372),
            (2.645, 4.231),
        ),
        *(
            (2.091, 3.912),
            (1.889, 3.784),
            (1.573, 3.452),
            (1.685, 2.992),
            (1.831, 2.531),
            (1.889, 2.439),
            (2.373, 2.071),
        ),
        *(
            (2.645, 2.001),
            (3.401, 1.987),
            (4.157, 2.053),
            (4.913, 1.719),
            (5.343, 1.611),
            (5.644, 1.151),
            (4.913, 1.087),
        ),
        *((4.157, 0.77), (4.042, 0.69), (3.401, 0.307)),
    ]
    before = np.array([shapely.Polygon(ring)], object)
    assert shapely.get_type_id(shapely.simplify(before, 0.25, preserve_topology=False))[0] == 6  # in parts
    (after,) = simplify(before, 0.25)
    assert after.geom_type == "Polygon"
    assert after.is_valid
    assert not after.interiors
    assert 0.9 < after.area / before[0].area < 1.1


def test_a_hole_smaller_than_the_tolerance_stays_a_hole() -> None:
    """GEOS drops such a ring, unless it keeps the topology; a larger hole and none are as they were."""
    disc = shapely.Point(10, 10).buffer(8, 16)
    before = array(*(disc.difference(shapely.box(10, 10, 10 + side, 10 + side)) for side in (0.1, 4.0)), disc)
    assert shapely.get_num_interior_rings(shapely.simplify(before, 0.25, preserve_topology=False)).tolist() == [0, 1, 0]
    after = simplify(before, 0.25)
    assert shapely.get_num_interior_rings(after).tolist() == [1, 1, 0]
    assert shapely.is_valid(after).all()
