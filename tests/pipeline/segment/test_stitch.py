"""Invisible tiling: whatever the tiles, an oracle detector's objects come out once each, and as they are."""

import numpy as np
import pytest
import shapely
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipeline.segment.stitch import (
    anchored_outside,
    claim,
    mask_nms,
    overhang,
    reaches,
    resolve,
    seam_candidates,
    touching,
)
from slides.geometry import Box, Size
from slides.grid import TileGrid

RADIUS = 12.0  # of the largest object: furthest point from its centroid
TOLERANCE = 2.0


def objects(seed: int, size: Size, count: int) -> np.ndarray:
    """Up to `count` ellipses inside the frame that do not touch each other; vertices in 1/64 px."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    kept: list[shapely.Polygon] = []
    for _ in range(count):
        major = rng.uniform(5, RADIUS - 0.5)
        minor = rng.uniform(max(4, major / 2), major)
        turn = rng.uniform(0, np.pi)
        ring = np.stack([major * np.cos(angle), minor * np.sin(angle)], axis=1)
        ring = ring @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        shape = shapely.Polygon(np.round((ring + rng.uniform(0, size)) * 64) / 64)
        inside = shapely.box(0, 0, *size).contains(shape)
        if inside and not any(shape.distance(other) < 3 for other in kept):
            kept.append(shape)
    return np.array(kept, dtype=object)


def centroids(shapes: np.ndarray) -> np.ndarray:
    centre = shapely.centroid(shapes)
    return np.stack([shapely.get_x(centre), shapely.get_y(centre)], axis=1)


class Claimed:
    """What all tiles of a grid claim of an oracle's objects: parallel arrays."""

    def __init__(self, truth: np.ndarray, grid: TileGrid, jitter: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shapes, tiles, cores, touch = [], [], [], []
        for index in range(grid.rows * grid.cols):
            tile = grid.tile_at(*divmod(index, grid.cols))
            seen = truth
            if jitter:
                shifts = rng.uniform(-jitter, jitter, (len(truth), 1, 2))
                pairs = zip(truth, shifts, strict=True)
                moved = [shapely.transform(p, lambda xy, by=by: xy + by) for p, by in pairs]
                seen = np.array(moved, dtype=object)
            frame = shapely.box(*tile.read)
            cut = ~shapely.contains_properly(frame, seen)
            seen = seen.copy()
            seen[cut] = shapely.intersection(seen[cut], frame)
            seen = seen[~shapely.is_empty(seen) & (shapely.area(seen) > 0)]
            mine = seen[claim(centroids(seen), tile.core, tolerance=TOLERANCE)]
            shapes.extend(mine)
            tiles.extend([index] * len(mine))
            cores.extend([tile.core] * len(mine))
            touch.append(touching(shapely.bounds(mine).reshape(-1, 4), tile.read, grid.size))
        self.shapes = np.array(shapes, dtype=object)
        self.tile = np.array(tiles, dtype=np.int64)
        self.cores = np.array(cores, dtype=np.float64).reshape(-1, 4)
        self.bounds = shapely.bounds(self.shapes).reshape(-1, 4)
        self.touching = int(np.concatenate(touch).sum())


sizes = st.builds(Size, st.integers(30, 220), st.integers(30, 220))
margins = st.integers(int(RADIUS + TOLERANCE) + 1, 30)


def grids(draw, size: Size, margin: int) -> TileGrid:
    return TileGrid(size, 2 * margin + draw(st.integers(8, 120)), margin, draw(st.integers(1, 3)))


@st.composite
def layouts(draw) -> tuple[np.ndarray, TileGrid]:
    size = draw(sizes)
    return objects(draw(st.integers(0, 10_000)), size, 60), grids(draw, size, draw(margins))


def spelt(shapes: np.ndarray) -> list[bytes]:
    return sorted(shapely.to_wkb(shapes))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_an_exact_oracle_s_objects_come_out_as_they_are(layout):
    """Law: the set of outlines is the truth, whatever tile, margin and size."""
    truth, grid = layout
    claimed = Claimed(truth, grid)
    keep = resolve(claimed.shapes, claimed.tile, np.ones(len(claimed.tile)), iou=0.3)
    assert spelt(claimed.shapes[keep]) == spelt(truth)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 10_000))
def test_predictions_that_differ_by_a_pixel_are_counted_once(layout, seed):
    """Every tile sees every object up to 1 px elsewhere, with a score of its own."""
    truth, grid = layout
    claimed = Claimed(truth, grid, jitter=1.0, seed=seed)
    score = np.random.default_rng(seed).random(len(claimed.tile))
    outside = anchored_outside(centroids(claimed.shapes), claimed.cores, grid.size)
    keep = resolve(claimed.shapes, claimed.tile, score, iou=0.3, outside=outside)
    assert keep.sum() == len(truth)
    assert shapely.STRtree(claimed.shapes[keep]).query(truth, predicate="intersects").shape[1] == len(truth)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(40, 80))
def test_a_margin_too_small_is_reported(seed, margin, stride):
    """Either the result is the truth, or some claimed instance touches a read edge."""
    size = Size(200, 160)
    truth = objects(seed, size, 60)
    claimed = Claimed(truth, TileGrid(size, stride + 2 * margin, margin, 2))
    keep = resolve(claimed.shapes, claimed.tile, np.ones(len(claimed.tile)), iou=0.3)
    assert spelt(claimed.shapes[keep]) == spelt(truth) or claimed.touching > 0


def test_a_margin_too_small_harms_and_says_so():
    """Not vacuous: without margin, objects at seams are cut."""
    size = Size(200, 160)
    truth = objects(7, size, 60)
    claimed = Claimed(truth, TileGrid(size, 50, 0, 2))
    keep = resolve(claimed.shapes, claimed.tile, np.ones(len(claimed.tile)), iou=0.3)
    assert spelt(claimed.shapes[keep]) != spelt(truth)
    assert claimed.touching > 0


@st.composite
def crowds(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping squares, exact copies among them, in two to four tiles side by side; few scores: ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tiles, count = draw(st.integers(2, 4)), draw(st.integers(0, 30))
    corner = rng.integers(0, 15, (count, 2)) * (tiles, 2)
    side = rng.integers(3, 9, (count, 2))
    twice = rng.random(count) < 0.3
    corner, side = np.concatenate([corner, corner[twice]]), np.concatenate([side, side[twice]])
    score = rng.integers(1, 4, len(corner)) / 4
    score[count:] = score[:count][twice]
    tile = rng.integers(0, tiles, len(corner))
    cores = np.stack([tile * 15, tile * 0, tile * 15 + 15, tile * 0 + 40], axis=1).astype(float)
    shapes = np.asarray(shapely.box(*corner.T, *(corner + side).T), dtype=object).reshape(-1)
    return shapes, tile, score, cores


def kept(shapes, tile, score, keep) -> list[tuple[bytes, float]]:
    return sorted(zip(shapely.to_wkb(shapes[keep]), score[keep].tolist(), strict=True))


@settings(deadline=None)
@given(crowds(), st.randoms(use_true_random=False), st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_neither_order_nor_tile_numbers_matter(crowd, random, iou):
    shapes, tile, score, _ = crowd
    keep = resolve(shapes, tile, score, iou=iou)
    order = np.array(random.sample(range(len(shapes)), len(shapes)), dtype=int)
    np.testing.assert_array_equal(resolve(shapes[order], tile[order], score[order], iou=iou), keep[order])
    copied = len(set(shapely.to_wkb(shapes))) < len(shapes)
    names = np.array(random.sample(range(1000), 4))
    renumbered = resolve(shapes, names[tile], score, iou=iou)
    if not copied:
        np.testing.assert_array_equal(renumbered, keep)
    assert set(kept(shapes, tile, score, renumbered)) == set(kept(shapes, tile, score, keep))


@settings(deadline=None)
@given(crowds(), st.sampled_from([0.1, 0.3, 0.6]))
def test_what_is_kept_has_no_duplicate_and_what_is_dropped_has_a_better_one(crowd, iou):
    shapes, tile, score, _ = crowd
    keep = resolve(shapes, tile, score, iou=iou)
    outline = list(zip(shapely.to_wkb(shapes), score.tolist(), strict=True))
    tiles = {one: {t for t, other in zip(tile, outline, strict=True) if other == one} for one in outline}
    for i in range(len(shapes)):
        shared = shapely.area(shapely.intersection(shapes, shapes[i]))
        overlaps = shared / (shapely.area(shapes) + shapes[i].area - shared) >= iou
        duplicates = np.flatnonzero(keep & overlaps & (tile != tile[i]))
        if keep[i]:
            assert all(tiles[outline[i]] & tiles[outline[j]] for j in duplicates if outline[i] != outline[j])
            assert all(outline[i] != outline[j] for j in duplicates)
        else:
            assert (score[duplicates] >= score[i]).any()


@settings(deadline=None)
@given(crowds(), st.sampled_from([0.1, 0.3, 0.6]))
def test_candidates_alone_are_resolved_as_all(crowd, iou):
    """Given the largest overhang, the others have no duplicates: memory is bounded by the seams."""
    shapes, tile, score, cores = crowd
    bounds = shapely.bounds(shapes).reshape(-1, 4)
    reach = max(0.0, overhang(bounds, cores).max(initial=0))
    near = seam_candidates(bounds, cores, reach)
    keep = np.ones(len(shapes), dtype=bool)
    keep[near] = resolve(shapes[near], tile[near], score[near], iou=iou)
    np.testing.assert_array_equal(keep, resolve(shapes, tile, score, iou=iou))


@settings(max_examples=20, deadline=None)
@given(layouts())
def test_candidates_are_those_at_seams(layout):
    truth, grid = layout
    claimed = Claimed(truth, grid)
    reach = float(overhang(claimed.bounds, claimed.cores).max(initial=0))
    near = seam_candidates(claimed.bounds, claimed.cores, reach)
    copies = np.array([spelt(claimed.shapes).count(w) for w in shapely.to_wkb(claimed.shapes)])
    assert near[copies > 1].all()
    deep = (claimed.bounds[:, :2] > claimed.cores[:, :2] + reach).all(axis=1)
    deep &= (claimed.bounds[:, 2:] < claimed.cores[:, 2:] - reach).all(axis=1)
    assert not near[deep].any()


def squares(*corners: tuple[float, float, float, float]) -> np.ndarray:
    return np.array([shapely.box(*c) for c in corners], dtype=object)


def test_the_better_of_two_tiles_is_kept_and_both_neighbours_of_one_tile():
    shapes = squares((0, 0, 10, 10), (1, 0, 11, 10), (2, 0, 12, 10))
    score = np.array([0.9, 0.8, 0.7])
    assert resolve(shapes, np.array([1, 2, 2]), score, iou=0.3).tolist() == [True, False, False]
    assert resolve(shapes, np.array([5, 5, 5]), score, iou=0.3).tolist() == [True, True, True]


def test_of_equal_copies_one_is_kept():
    shapes = squares((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 10))
    assert resolve(shapes, np.array([3, 1, 2]), np.full(3, 0.5), iou=0.3).tolist() == [False, True, False]


def test_a_copy_does_not_exclude_what_another_copy_s_tile_has_beside_it():
    """P in tiles A and B, Q beside it in A only: one tile that has both keeps both, and so do two."""
    p, q = (0, 0, 10, 10), (4, 0, 14, 10)
    keep = resolve(squares(p, p, q), np.array([0, 1, 0]), np.array([0.9, 0.9, 0.5]), iou=0.3)
    assert keep.sum() == 2
    assert keep[2]


def test_what_is_dropped_excludes_nothing():
    shapes = squares((0, 0, 10, 10), (5, 0, 15, 10), (10, 0, 20, 10))
    keep = resolve(shapes, np.array([0, 1, 2]), np.array([0.9, 0.8, 0.7]), iou=0.3)
    assert keep.tolist() == [True, False, True]


def test_the_overlap_is_an_iou():
    shapes = squares((0, 0, 10, 10), (5, 0, 15, 10))  # IoU 1/3
    tile, score = np.array([0, 1]), np.array([0.5, 0.5])
    assert resolve(shapes, tile, score, iou=0.33).sum() == 1
    assert resolve(shapes, tile, score, iou=0.34).sum() == 2


def test_empty_polygons_and_no_polygons():
    empty = np.array([shapely.Polygon(), shapely.Polygon()], dtype=object)
    assert resolve(empty, np.array([0, 0]), np.ones(2), iou=0.3).all()
    assert resolve(empty[:0], np.array([], dtype=int), np.ones(0), iou=0.3).shape == (0,)


@pytest.mark.parametrize("iou", [0.0, 1.5])
def test_an_overlap_out_of_range_is_refused(iou):
    with pytest.raises(ValueError, match="need 0 < iou <= 1"):
        resolve(squares((0, 0, 1, 1)), np.array([0]), np.ones(1), iou=iou)


coordinate = st.floats(-50, 150, allow_nan=False)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=20), st.integers(20, 60))
@example([(0.0, 0.0), (40.0, 20.0), (79.0, 79.0)], 40)
def test_without_tolerance_every_anchor_has_one_owner(anchors, stride):
    grid = TileGrid(Size(80, 80), stride + 10, 5, 1)
    xy = np.array(anchors, dtype=float).reshape(-1, 2)
    tiles = [grid.tile_at(row, col) for row in range(grid.rows) for col in range(grid.cols)]
    claims = np.array([claim(xy, tile.core, tolerance=0) for tile in tiles])
    owners = claims.sum(axis=0)
    inside = ((xy >= 0) & (xy < 80)).all(axis=1)
    np.testing.assert_array_equal(owners, inside)


def test_claiming_reaches_the_tolerance_and_no_further():
    xy = np.array([[8.0, 15], [7.9, 15], [21.9, 15], [22, 15], [15, np.nan]])
    for anchors in (xy, xy[:, ::-1]):
        assert claim(anchors, Box(10, 10, 20, 20), tolerance=2.0).tolist() == [True, False, True, False, False]


def test_only_edges_inside_the_slide_cut():
    slide, read = Size(100, 100), Box(40, -10, 110, 60)
    boxes = [[40, 20, 50, 30], [60, -10, 70, 5], [100, 20, 110, 30], [60, 50, 70, 60], [60, 20, 70, 30]]
    bounds = np.array(boxes, dtype=float)
    expected = [True, False, False, True, False]
    assert touching(bounds, read, slide).tolist() == expected
    assert touching(bounds[:, [1, 0, 3, 2]], Box(-10, 40, 60, 110), slide).tolist() == expected


def test_the_edges_of_the_slide_cut_nothing_and_others_cut_what_ends_near_them():
    """A patch of the upper part, which touches three edges of the slide; mirrored and turned, any three."""
    bounds = np.array([[0, 0, 100, 58], [0, 0, 100, 57.9], [0, 2, 100, 40], [40, 0, 50, 60]])
    patch, slide = np.array([0, 0, 100, 60]), Size(100, 100)
    for mirror in (False, True):
        for turn in ([0, 1, 2, 3], [1, 0, 3, 2]):
            shown = [((100 - at)[..., [2, 3, 0, 1]] if mirror else at)[..., turn] for at in (bounds, patch)]
            assert touching(shown[0], Box(*shown[1].tolist()), slide).tolist() == [True, False, False, True]
    assert not touching(bounds, Box(*patch.tolist()), Size(100, 60)).any()


def test_a_duplicate_deep_inside_its_core_is_a_candidate():
    """As deep as the other tile's instance reaches into that core, less the overlap."""
    shapes, cores = squares((26, 15, 40, 25), (35, 15, 41, 25)), np.array([[0, 0, 30, 40], [30, 0, 60, 40]])
    bounds, tile, score = shapely.bounds(shapes), np.array([0, 1]), np.array([0.9, 0.8])
    near = seam_candidates(bounds, cores, overhang(bounds, cores).max())
    assert near.all()
    assert resolve(shapes[near], tile[near], score[near], iou=0.3).tolist() == [True, False]


def test_equal_outlines_of_two_tiles_confirm_each_other():
    """Also where both are anchored outside; one that is there alone is dropped."""
    one, other = (0, 0, 10, 10), (40, 0, 50, 10)
    shapes, tile = squares(one, one, other), np.array([0, 1, 1])
    assert resolve(shapes, tile, np.full(3, 0.5), iou=0.3, outside=np.ones(3, bool)).tolist() == [True, False, False]


def test_overhang_is_signed():
    bounds = np.array([[12, 12, 18, 18], [8, 12, 18, 18], [12, 12, 18, 25]], dtype=float)
    assert overhang(bounds, np.tile([10, 10, 20, 20], (3, 1))).tolist() == [-2, 2, 5]


@given(st.integers(0, 1000))
def test_the_oracle_s_objects_are_within_the_radius(seed):
    """The layouts keep the condition under which the laws hold."""
    truth = objects(seed, Size(120, 120), 20)
    assume(len(truth))
    far = [np.hypot(*(shapely.get_coordinates(p) - centroids(np.array([p]))[0]).T).max() for p in truth]
    assert max(far) <= RADIUS


def test_uncertain_detections_are_as_dense_at_the_seams_as_elsewhere():
    """Law: two tiles that detect, each by chance, half of the nuclei, a little displaced."""
    rng = np.random.default_rng(0)
    grid = TileGrid(Size(400, 4000), tile=240, margin=20, block=1)  # a seam at x = 200, and across every 200 px
    centres = np.stack([rng.uniform(190, 210, 6000), rng.uniform(10, 3990, 6000)], 1)
    keep = shapely.STRtree(shapely.points(centres)).query(shapely.points(centres), predicate="dwithin", distance=2.5)
    crowded = np.unique(keep[1][keep[0] < keep[1]])
    centres = np.delete(centres, crowded, 0)
    shapes, tiles, cores = [], [], []
    for index in range(grid.rows * grid.cols):
        tile = grid.tile_at(*divmod(index, grid.cols))
        seen = centres[rng.random(len(centres)) < 0.5]
        seen = seen + rng.uniform(-0.5, 0.5, seen.shape)
        mine = seen[claim(seen, tile.core, tolerance=TOLERANCE)]
        shapes.append(shapely.buffer(shapely.points(mine), 1.2))
        tiles.append(np.full(len(mine), index))
        cores.append(np.tile(tile.core, (len(mine), 1)))
    polygons, tile_of, core_of = np.concatenate(shapes), np.concatenate(tiles), np.concatenate(cores)
    anchors = centroids(polygons)
    size = Size(grid.cols * grid.stride, grid.rows * grid.stride)
    scores = rng.random(len(polygons))

    def near_and_far(**more):
        stays = resolve(polygons, tile_of, scores, iou=0.3, **more)
        distance = np.abs(anchors[stays, 0] - 200)
        truth = np.abs(centres[:, 0] - 200)
        return [
            np.sum((a <= distance) & (distance < b)) / np.sum((a <= truth) & (truth < b)) for a, b in ((0, 2), (4, 8))
        ]

    near, far = near_and_far(outside=anchored_outside(anchors, core_of, size))
    error = (0.25 / np.sum(np.abs(centres[:, 0] - 200) < 2)) ** 0.5
    assert abs(near - 0.5) < 4 * error
    assert abs(far - 0.5) < 4 * error
    near, _ = near_and_far()
    assert near > 0.5 + 4 * error, "without confirmation by another tile more would be kept"


def test_only_borders_between_tiles_have_an_outside():
    cores = np.array([[0, 0, 100, 100]] * 5 + [[100, 100, 200, 200]] * 3)
    anchors = np.array([[-1, 5], [5, -1], [100, 5], [5, 100], [5, 5], [99.9, 150], [150, 201], [201, 150]])
    assert anchored_outside(anchors, cores, Size(200, 200)).tolist() == [
        False,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]


def discs(*circles: tuple[float, float, float]) -> np.ndarray:
    return np.array([shapely.Point(x, y).buffer(r) for x, y, r in circles], dtype=object)


def test_of_outlines_that_cover_each_other_the_best_is_kept() -> None:
    whole, half, union, apart = (20.0, 20.0, 8.0), (16.0, 20.0, 3.0), (28.0, 20.0, 17.0), (60.0, 20.0, 8.0)
    shapes = discs(whole, half, union, apart)
    assert mask_nms(shapes, np.array([0.9, 0.8, 0.7, 0.6]), share=0.5).tolist() == [True, False, False, True]
    assert mask_nms(shapes, np.array([0.7, 0.8, 0.9, 0.6]), share=0.5).tolist() == [False, False, True, True]
    # what covers only an outline that is dropped is kept
    chain = discs((0, 0, 10), (12, 0, 10), (24, 0, 10))
    assert mask_nms(chain, np.array([0.9, 0.8, 0.7]), share=0.25).tolist() == [True, False, True]


def test_of_equal_outlines_in_a_tile_the_first_is_kept() -> None:
    shapes = squares((0, 0, 8, 8), (9, 0, 17, 8), (0, 0, 8, 8))
    assert mask_nms(shapes, np.full(3, 0.9), share=1.0).tolist() == [True, True, False]


def test_outlines_that_share_just_so_much_are_one() -> None:
    shapes = squares((0, 0, 16, 16), (4, 0, 12, 32))  # half of each
    assert mask_nms(shapes, np.array([0.8, 0.9]), share=0.5).tolist() == [False, True]
    assert mask_nms(shapes, np.array([0.8, 0.9]), share=0.6).all()


def test_neighbours_that_touch_and_empty_outlines_are_kept() -> None:
    shapes = np.array([*discs((20, 20, 8), (33, 20, 8)), shapely.Polygon(), shapely.Polygon()], dtype=object)
    assert mask_nms(shapes, np.array([0.9, 0.9, 0.5, 0.5]), share=0.5).all()
    assert mask_nms(shapes[:0], np.zeros(0), share=0.5).shape == (0,)
    with pytest.raises(ValueError, match="share=0: need 0 < share <= 1"):
        mask_nms(shapes, np.zeros(4), share=0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.sampled_from([0.3, 0.5, 1.0]))
@example(107694867, 18, 1.0)
def test_which_outlines_are_kept_does_not_depend_on_their_order(seed: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    shapes = discs(
        *zip(rng.integers(0, 60, count), rng.integers(0, 60, count), rng.integers(3, 12, count), strict=True)
    )
    score = rng.integers(5, 8, count) / 10  # with ties
    order = rng.permutation(count)
    stays = mask_nms(shapes, score, share=share)
    again = mask_nms(shapes[order], score[order], share=share)
    assert set(shapely.to_wkb(shapes[stays])) == set(shapely.to_wkb(shapes[order][again]))
    kept = shapes[stays]
    rounding = 1e-9  # the last bits of the area that two discs share depend on which is named first
    for i, one in enumerate(kept):
        for other in kept[:i]:
            assert one.intersection(other).area < share * min(one.area, other.area) + rounding
    for one in shapes[~stays]:
        assert any(one.intersection(k).area >= share * min(one.area, k.area) - rounding for k in kept)


def test_small_instances_within_the_tolerance_of_a_core_reach_it() -> None:
    boxes = np.array([[15, 7, 17, 9], [15, 21, 17, 23], [7, 15, 9, 17], [21, 15, 23, 17]])
    assert reaches(boxes, Box(10, 10, 20, 20), tolerance=2.0).all()
    assert not reaches(boxes, Box(10, 10, 20, 20), tolerance=0.5).any()


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_instances_that_do_not_reach_the_core_decide_nothing(seed: int, share: float) -> None:
    """Law: without them the tile claims the same; also where a chain of overlaps leads from them into the core."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 160, (60, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(2, 16, (60, 2))], 1)
    shapes, scores, core = shapely.box(*boxes.T), rng.choice([0.5, 0.6, 0.9], 60), Box(50, 50, 100, 100)

    def claimed(chosen: np.ndarray) -> np.ndarray:
        mine = claim(centroids(shapes[chosen]), core, tolerance=2)
        return chosen[mine & mask_nms(shapes[chosen], scores[chosen], share=share)]

    reaching = np.flatnonzero(reaches(boxes, core, tolerance=2))
    assert len(reaching) < 60
    np.testing.assert_array_equal(claimed(reaching), claimed(np.arange(60)))
