"""The instances of overlapping tiles -> each nucleus once.

1. `mask_nms`: of a tile's own instances whose outlines cover each other one is kept.
2. `claim`: a tile claims the instances anchored (by their centroid) in its core, or within a tolerance of it, so that
   a nucleus at a seam is claimed by at least one tile although the tiles' predictions differ.
3. `resolve`: of instances of different tiles that overlap one is kept. An instance anchored outside its tile's core is
   kept only if another tile confirms it: without that rule more uncertain detections would be kept beside seams, where
   two tiles may detect them, than elsewhere.

Nothing is merged, and instances of one tile are not compared again by `resolve`. All coordinates are work px.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.segment.polygons import Bools, Floats, Ints, Polygons, count_within
from slides.geometry import Box, Size

# The outline of a nucleus that is cut by its patch's edge ends up to half a mask cell, plus the tolerance of
# `simplify`, before that edge: 2 px for the largest nuclei.
_SHORT_PX = 2.0


def mask_nms(polygons: Polygons, score: NDArray[np.floating], *, share: float) -> Bools:
    """Of overlapping outlines of one tile keep the best: of a nucleus and its half, or of two nuclei and their union.

    The boxes of such outlines may overlap too little for non-maximum suppression.
    polygons: object (N,), valid or empty; score: float (N,); share: 0 < share <= 1, of the smaller one's area
    Returns bool (N,), what is kept: all but those that share at least `share` with a better one that is kept. Better
        is as in `resolve`.
    Laws: the order of the instances does not change which outlines are kept; what overlaps nothing is kept.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: need 0 < share <= 1")
    first, outline = _outlines(polygons, score)
    area = shapely.area(polygons[first])
    i, j, shared = _intersecting(polygons[first])
    duplicate = shared >= share * np.minimum(area[i], area[j])
    kept = np.ones(len(first), dtype=bool)
    for better, worse in zip(i[duplicate].tolist(), j[duplicate].tolist(), strict=True):
        if kept[better]:
            kept[worse] = False
    # of equal outlines the first one is kept
    return np.asarray(kept[outline] & (np.arange(len(outline)) == first[outline]) | shapely.is_empty(polygons))


def claim(anchors: Floats, core: Box, *, tolerance: float) -> Bools:
    """Which instances a tile claims.

    anchors: float64 (N, 2), x y: a point of each instance that does not depend on the tile (its centroid)
    Returns bool (N,): in the half-open `core` grown by `tolerance` px; NaN is never claimed.
    Law: if two tiles' anchors of an object differ by at most `tolerance`, at least one tile claims it; at
    tolerance 0 and no difference, exactly one.
    """
    x, y = anchors.T
    across = (core.x0 - tolerance <= x) & (x < core.x1 + tolerance)
    down = (core.y0 - tolerance <= y) & (y < core.y1 + tolerance)
    return np.asarray(across & down)


def reaches(boxes: NDArray[np.floating], core: Box, *, tolerance: float) -> Bools:
    """Which of a tile's instances decide what it claims; the others need no outline.

    boxes: (N, 4), x0 y0 x1 y1, each around its instance
    Returns bool (N,): those whose box meets the core grown by `tolerance` px, and what meets these, and so on.
    Law: `mask_nms` and `claim` of these alone claim what those of all claim.
    """
    grown = shapely.box(core.x0 - tolerance, core.y0 - tolerance, core.x1 + tolerance, core.y1 + tolerance)
    around = shapely.box(*np.asarray(boxes, np.float64).T)
    reached = shapely.intersects(around, grown)
    i, j = shapely.STRtree(around).query(around, predicate="intersects")
    while not reached[j[reached[i]]].all():
        reached[j[reached[i]]] = True
    return np.asarray(reached)


def touching(bounds: Floats, patch: Box, slide: Size) -> Bools:
    """Which instances reach an edge of their tile's patch inside the slide: they may be cut off.

    bounds: float64 (N, 4), x0 y0 x1 y1; within 2 px of the edge counts as touching
    slide: size of the work frame; an edge of `patch` on or beyond the slide's edge cuts nothing
    Returns bool (N,). For a claimed instance that touches the margin is too small.
    """
    x0, y0, x1, y1 = bounds.T
    left = (patch.x0 > 0) & (x0 <= patch.x0 + _SHORT_PX)
    upper = (patch.y0 > 0) & (y0 <= patch.y0 + _SHORT_PX)
    right = (patch.x1 < slide.width) & (x1 >= patch.x1 - _SHORT_PX)
    lower = (patch.y1 < slide.height) & (y1 >= patch.y1 - _SHORT_PX)
    return np.asarray(left | upper | right | lower)


def overhang(bounds: Floats, cores: NDArray[np.number]) -> Floats:
    """How far each instance extends beyond its tile's core, in px; negative: how far inside it ends.

    bounds, cores: (N, 4), x0 y0 x1 y1, the core of each instance's own tile. Returns float64 (N,).
    """
    out = np.concatenate([cores[:, :2] - bounds[:, :2], bounds[:, 2:] - cores[:, 2:]], axis=1)
    return np.asarray(out.max(axis=1), dtype=np.float64)


def seam_candidates(bounds: Floats, cores: NDArray[np.number], reach: float) -> Bools:
    """Which instances can have a duplicate in another tile: those nearer than `reach` to their core's border.

    bounds, cores: (N, 4) as for `overhang`; `reach`: at least the largest overhang of the slide, at least 0
    Returns bool (N,).
    Law: `resolve` of the candidates alone decides as `resolve` of all, which keeps every other. A duplicate belongs
    to a neighbouring core and extends beyond that by no more than `reach`, so the overlap of the two lies less than
    `reach` inside this core's border, or outside it.
    """
    return np.asarray(overhang(bounds, cores) > -reach)


def anchored_outside(anchors: Floats, cores: NDArray[np.number], slide: Size) -> Bools:
    """Which instances are anchored outside their tile's core; a border on or beyond the slide's edge bounds nothing.

    anchors: float64 (N, 2), x y; cores: (N, 4), x0 y0 x1 y1; slide: size of the work frame
    """
    (x, y), (x0, y0, x1, y1) = anchors.T, cores.T
    left, upper = (x < x0) & (x0 > 0), (y < y0) & (y0 > 0)
    right, lower = (x >= x1) & (x1 < slide.width), (y >= y1) & (y1 < slide.height)
    return np.asarray(left | upper | right | lower)


def resolve(
    polygons: Polygons, tile: Ints, score: NDArray[np.floating], *, iou: float, outside: Bools | None = None
) -> Bools:
    """Of the instances of different tiles that are one nucleus, keep the best.

    polygons: object (N,), valid; tile: int (N,), any numbers that tell tiles apart; score: float (N,)
    iou: 0 < iou <= 1; two polygons that overlap by at least this are one nucleus
    outside: bool (N,), of `anchored_outside`: such an instance is dropped unless another tile confirms it, with an
        overlap of `iou` or an equal outline; None: none is outside
    Returns bool (N,), what is kept. Better is a higher score, then a larger area, then the bytes of the outline.
    Laws: neither the order of the instances nor the numbers of the tiles change which outlines are kept. Of equal
    copies in several tiles one is kept or none. Two instances of one tile never exclude each other. Where each tile
    detects a nucleus with the same chance, the density of nuclei beside the seams is that of elsewhere.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou}: need 0 < iou <= 1")
    # Equal copies count as one outline: else it would be chance which copy, and so which tile, is compared.
    first, outline = _outlines(polygons, score)
    better, worse = _overlapping(polygons[first], iou)
    duplicates = ~_in_one_tile(better, worse, outline, tile)
    kept = np.ones(len(first), dtype=bool)
    if outside is not None:
        copies = np.bincount(outline, minlength=len(first))
        kept = (np.bincount(outline, ~outside, len(first)) > 0) | (copies > 1)
        kept[better[duplicates]] = kept[worse[duplicates]] = True
    # In order of the better one, so that it is decided whether that is kept before it excludes others.
    for winner, loser in zip(better[duplicates].tolist(), worse[duplicates].tolist(), strict=True):
        if kept[winner]:
            kept[loser] = False
    lowest = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(lowest, outline, tile)
    return np.asarray(kept[outline] & (tile == lowest[outline]))


def _outlines(polygons: Polygons, score: NDArray[np.floating]) -> tuple[Ints, Ints]:
    """Distinct (outline, score), the best first -> an instance of each (K,), and which it is of each (N,)."""
    _, spelling = np.unique(shapely.to_wkb(polygons, byte_order=1), return_inverse=True)
    keys = np.stack([-score.astype(np.float64), -shapely.area(polygons), spelling], axis=1)
    _, first, outline = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, outline.reshape(-1)


def _overlapping(polygons: Polygons, iou: float) -> tuple[Ints, Ints]:
    """Pairs (i, j), i < j, whose intersection over union is at least `iou`; sorted."""
    i, j, shared = _intersecting(polygons)
    area = shapely.area(polygons)
    overlap = shared >= iou * (area[i] + area[j] - shared)
    return i[overlap], j[overlap]


def _intersecting(polygons: Polygons) -> tuple[Ints, Ints, Floats]:
    """Pairs (i, j), i < j, that meet, sorted, and the area that they share."""
    i, j = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    i, j = i[i < j], j[i < j]
    order = np.lexsort((j, i))
    i, j = i[order], j[order]
    return i, j, shapely.area(shapely.intersection(polygons[i], polygons[j]))


def _in_one_tile(i: Ints, j: Ints, outline: Ints, tile: Ints) -> Bools:
    """Of pairs of outlines, which are both among the instances of some tile."""
    _, tile = np.unique(tile, return_inverse=True)
    tiles = tile.max(initial=0) + 1
    present = np.unique(outline * tiles + tile)  # every (outline, tile) there is, by outline
    start, stop = np.searchsorted(present, i * tiles), np.searchsorted(present, (i + 1) * tiles)
    pair = np.arange(len(i)).repeat(stop - start)
    tile_of_i = present[start.repeat(stop - start) + count_within(stop - start)] % tiles
    both = np.isin(j[pair] * tiles + tile_of_i, present)
    return np.bincount(pair, both, len(i)) > 0
