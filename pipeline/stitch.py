"""Claim and resolve: the instances of overlapping tiles -> each nucleus once.

A tile claims what is anchored in its core or within a tolerance of it, so that a nucleus at a seam is claimed
by at least one tile though their predictions differ; of those claimed by several tiles one is kept. Nothing is
merged, and instances of one tile are never compared: that tile saw both. All coordinates are work px.
"""

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.polygons import Floats, Ints, Polygons
from slides.geometry import Box, Size

Bools = NDArray[np.bool_]


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


def touching(bounds: Floats, read: Box, slide: Size, *, within: float) -> Bools:
    """Which instances reach an edge of what their tile read, where the slide goes on: they may be cut off.

    bounds: float64 (N, 4), x0 y0 x1 y1; `within`: so many px from the edge count as touching
    slide: size of the work frame; an edge of `read` on or beyond the slide's own cuts nothing
    Returns bool (N,). A claimed instance that touches says that the margin is too small for it.
    """
    x0, y0, x1, y1 = bounds.T
    left = (read.x0 > 0) & (x0 <= read.x0 + within)
    upper = (read.y0 > 0) & (y0 <= read.y0 + within)
    right = (read.x1 < slide.width) & (x1 >= read.x1 - within)
    lower = (read.y1 < slide.height) & (y1 >= read.y1 - within)
    return np.asarray(left | upper | right | lower)


def overhang(bounds: Floats, cores: NDArray[np.number]) -> Floats:
    """How far each instance reaches out of its tile's core, in px; 0 if it lies inside.

    bounds, cores: (N, 4), x0 y0 x1 y1, the core of each instance's own tile. Returns float64 (N,).
    """
    out = np.concatenate([cores[:, :2] - bounds[:, :2], bounds[:, 2:] - cores[:, 2:]], axis=1)
    return np.asarray(out.max(axis=1, initial=0), dtype=np.float64)


def seam_candidates(bounds: Floats, cores: NDArray[np.number], reach: float) -> Bools:
    """Which instances can have a rival in another tile: those nearer than `reach` to their core's border.

    bounds, cores: (N, 4) as for `overhang`; `reach`: at least the largest overhang of the slide
    Returns bool (N,).
    Law: `resolve` of the candidates alone decides as `resolve` of all, and keeps every other. A rival belongs
    to a core beside this one and reaches out of it by no more than `reach`, so where the two overlap is less
    than `reach` from this core's border, or outside it.
    """
    return overhang(bounds, cores) + reach > _depth(bounds, cores)


def _depth(bounds: Floats, cores: NDArray[np.number]) -> Floats:
    return bounds
