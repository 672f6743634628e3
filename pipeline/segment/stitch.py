"""Distinct, claim and resolve: the instances of overlapping tiles -> each nucleus once.

Of a tile's own instances those that lie on each other are one nucleus. A tile claims what is anchored in its core or
within a tolerance of it, so that a nucleus at a seam is claimed by at least one tile though their predictions differ;
of those claimed by several tiles one is kept. What a tile claims of another's core is a outside there, and needs that
tile or a third as its witness: else a seam, where two are asked, would show more of what a detector is unsure of.
Nothing is merged, and instances of one tile are not compared again: that tile saw both. All coordinates are work px.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.segment.polygons import Floats, Ints, Polygons
from slides.geometry import Box, Size

Bools = NDArray[np.bool_]

# An outline that its patch cut off ends up to half a mask cell, and the tolerance of `simplify`, short of the
# edge: 2 px for the largest nuclei.
_SHORT_PX = 2.0


def mask_nms(polygons: Polygons, score: NDArray[np.floating], *, share: float) -> Bools:
    """Of outlines of one tile that lie on each other, keep the best: a nucleus and its half, or two and their union.

    Their boxes need not overlap by enough for non-maximum suppression to see it.
    polygons: object (N,), valid or empty; score: float (N,); share: 0 < share <= 1, of the smaller one's area
    Returns bool (N,): what shares so much with a better one that stays is out. Best first as in `resolve`.
    Laws: the order of the instances does not change which outlines stay; what lies on nothing stays.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: need 0 < share <= 1")
    first, outline = _outlines(polygons, score)
    area = shapely.area(polygons[first])
    i, j, shared = _intersecting(polygons[first])
    on = shared >= share * np.minimum(area[i], area[j])
    stays = np.ones(len(first), dtype=bool)
    for better, worse in zip(i[on].tolist(), j[on].tolist(), strict=True):
        if stays[better]:
            stays[worse] = False
    # of equal outlines the first in the tile's order stands for all
    return np.asarray(stays[outline] & (np.arange(len(outline)) == first[outline]) | shapely.is_empty(polygons))


def claim(anchors: Floats, core: Box, *, tolerance: float) -> Bools:
    """Which instances a tile takes for its own.

    anchors: float64 (N, 2), x y: a point of each instance that does not depend on the tile (its centroid)
    Returns bool (N,): in the half-open `core` grown by `tolerance` px; NaN is claimed by nobody.
    Law: if two tiles' anchors of an object differ by at most `tolerance`, at least one tile claims it; at
    tolerance 0 and no difference, exactly one.
    """
    x, y = anchors.T
    across = (core.x0 - tolerance <= x) & (x < core.x1 + tolerance)
    down = (core.y0 - tolerance <= y) & (y < core.y1 + tolerance)
    return np.asarray(across & down)


def touching(bounds: Floats, read: Box, slide: Size) -> Bools:
    """Which instances reach an edge of what their tile read, where the slide goes on: they may be cut off.

    bounds: float64 (N, 4), x0 y0 x1 y1; within 2 px of the edge is touching
    slide: size of the work frame; an edge of `read` on or beyond the slide's own cuts nothing
    Returns bool (N,). A claimed instance that touches says that the margin is too small for it.
    """
    x0, y0, x1, y1 = bounds.T
    left = (read.x0 > 0) & (x0 <= read.x0 + _SHORT_PX)
    upper = (read.y0 > 0) & (y0 <= read.y0 + _SHORT_PX)
    right = (read.x1 < slide.width) & (x1 >= read.x1 - _SHORT_PX)
    lower = (read.y1 < slide.height) & (y1 >= read.y1 - _SHORT_PX)
    return np.asarray(left | upper | right | lower)


def overhang(bounds: Floats, cores: NDArray[np.number]) -> Floats:
    """How far each instance reaches out of its tile's core, in px; negative: how far inside it stays.

    bounds, cores: (N, 4), x0 y0 x1 y1, the core of each instance's own tile. Returns float64 (N,).
    """
    out = np.concatenate([cores[:, :2] - bounds[:, :2], bounds[:, 2:] - cores[:, 2:]], axis=1)
    return np.asarray(out.max(axis=1), dtype=np.float64)


def seam_candidates(bounds: Floats, cores: NDArray[np.number], reach: float) -> Bools:
    """Which instances can have a rival in another tile: those nearer than `reach` to their core's border.

    bounds, cores: (N, 4) as for `overhang`; `reach`: at least the largest overhang of the slide, at least 0
    Returns bool (N,).
    Law: `resolve` of the candidates alone decides as `resolve` of all, which keeps every other. A rival
    belongs to a core beside this one and reaches out of that by no more than `reach`, so what the two share
    lies less than `reach` inside this core's border, or outside it.
    """
    return np.asarray(overhang(bounds, cores) > -reach)


def anchored_outside(anchors: Floats, cores: NDArray[np.number], grid: Size) -> Bools:
    """Which instances are anchored outside their tile's core; the outer cores of the grid end nowhere.

    anchors: float64 (N, 2), x y; cores: (N, 4), x0 y0 x1 y1, not clipped to the slide; grid: px that all cores cover
    """
    (x, y), (x0, y0, x1, y1) = anchors.T, cores.T
    left, upper = (x < x0) & (x0 > 0), (y < y0) & (y0 > 0)
    right, lower = (x >= x1) & (x1 < grid.width), (y >= y1) & (y1 < grid.height)
    return np.asarray(left | upper | right | lower)


def resolve(
    polygons: Polygons, tile: Ints, score: NDArray[np.floating], *, iou: float, outside: Bools | None = None
) -> Bools:
    """Of instances of different tiles that are one nucleus, keep the best.

    polygons: object (N,), valid; tile: int (N,), any numbers that tell tiles apart; score: float (N,)
    iou: 0 < iou <= 1; two polygons that overlap by so much are one nucleus
    outside: bool (N,), of `anchored_outside`: such a one goes unless another tile saw it, too; None: nobody is
    Returns bool (N,), what stays. Best first: by score, then area, then the bytes of the outline.
    Laws: neither the order of the instances nor the numbers of the tiles change which outlines stay. Of equal
    copies in several tiles one stays or none. Two instances that one tile saw side by side both stay or go
    for other reasons. Where each tile finds what it finds by chance, nuclei are as dense at the seams as elsewhere.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou}: need 0 < iou <= 1")
    # Equal copies act as one outline: else it would be chance which copy, hence which tile, meets the others.
    first, outline = _outlines(polygons, score)
    better, worse = _overlapping(polygons[first], iou)
    rivals = ~_seen_together(better, worse, outline, tile)
    stays = np.ones(len(first), dtype=bool)
    if outside is not None:
        copies = np.bincount(outline, minlength=len(first))
        stays = (np.bincount(outline, ~outside, len(first)) > 0) | (copies > 1)
        stays[better[rivals]] = stays[worse[rivals]] = True
    # In order of the better one, so that its own fate is settled when it decides over others.
    for winner, loser in zip(better[rivals].tolist(), worse[rivals].tolist(), strict=True):
        if stays[winner]:
            stays[loser] = False
    lowest = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(lowest, outline, tile)
    return np.asarray(stays[outline] & (tile == lowest[outline]))


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


def _seen_together(i: Ints, j: Ints, outline: Ints, tile: Ints) -> Bools:
    """Of pairs of outlines, which are both among the instances of some tile."""
    _, tile = np.unique(tile, return_inverse=True)
    tiles = tile.max(initial=0) + 1
    seen = np.unique(outline * tiles + tile)  # every (outline, tile) there is, by outline
    start, stop = np.searchsorted(seen, i * tiles), np.searchsorted(seen, (i + 1) * tiles)
    pair = np.arange(len(i)).repeat(stop - start)
    nth = np.arange(len(pair)) - (np.cumsum(stop - start) - (stop - start)).repeat(stop - start)
    tile_of_i = seen[start.repeat(stop - start) + nth] % tiles
    both = np.isin(j[pair] * tiles + tile_of_i, seen)
    return np.bincount(pair, both, len(i)) > 0
