"""Convex hulls of many shapes at once, and their measurements, in a few passes over all vertices.

Vertices are float64 (V, 2), those of one hull after those of the other; counts, int64 (N,), is how many each has.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDING = 1e-12  # relative: what lies so little outside a circle lies on it
_AROUND = np.array([[0, 1, 1], [0, 2, 2], [0, 3, 3], [0, 1, 2], [0, 1, 3], [0, 2, 3]])  # circles of `_around_four`


def convex_hulls(polygons: NDArray[np.object_]) -> tuple[Floats, Ints]:
    """The vertices of each polygon's convex hull, in order, each once; none of an empty one. And how many each has."""
    xy, owner = shapely.get_coordinates(shapely.convex_hull(polygons), return_index=True)
    again = np.zeros(len(xy), dtype=bool)  # the first vertex, which a ring ends with
    again[:-1] = owner[1:] != owner[:-1]
    again[-1:] = True
    return xy[~again], np.bincount(owner[~again], minlength=len(polygons))


def areas(xy: Floats, counts: Ints) -> Floats:
    """The area of each hull: float64 (N,); each has a vertex at least."""
    return np.abs(np.add.reduceat(_cross(xy, xy[_neighbours(counts)[1]]), _first(counts))) / 2


def smallest_circles(xy: Floats, counts: Ints) -> Floats:
    """The radius of the smallest circle around each hull: float64 (N,); each has a vertex at least.

    The circle passes through two or three vertices. One through two is found first, then one around these and the
    vertex farthest outside, and so on: each is larger than the one before, and none is larger than the circle sought.
    """
    start = xy[_first(counts)]
    end = xy[_farthest(xy, counts, start)[0]]
    through = np.stack([start, end, end], axis=1)  # (N, 3, 2)
    centre, squared = (start + end) / 2, _squared(start - end) / 4
    growing, left = np.arange(len(counts)), xy  # hulls that may need a larger circle, and their vertices
    while len(growing):
        vertex, distance = _farthest(left, counts[growing], centre[growing])
        outside = distance > squared[growing] * (1 + _ROUNDING)
        four = np.concatenate([left[vertex[outside], None], through[growing[outside]]], axis=1)
        found = _around_four(four)
        larger = found[2] > squared[growing[outside]]  # else rounding is all that is left
        outside[outside] = larger
        left, growing = left[outside.repeat(counts[growing])], growing[outside]
        for known, better in zip((through, centre, squared), found, strict=True):
            known[growing] = better[larger]
    return np.sqrt(squared)


def _farthest(xy: Floats, counts: Ints, points: Floats) -> tuple[Ints, Floats]:
    """Of each hull's vertices the one farthest from a point: its index in `xy`, and its distance squared."""
    owner = np.arange(len(counts)).repeat(counts)
    squared = _squared(xy - points[owner])
    most = np.maximum.reduceat(squared, _first(counts))
    farthest, index = np.flatnonzero(squared == most[owner]), np.zeros(len(counts), dtype=np.int64)
    index[owner[farthest]] = farthest
    return index, most


def _around_four(points: Floats) -> tuple[Floats, Floats, Floats]:
    """The smallest circle through the first of four points, and through one or two others, that holds all.

    points: (N, 4, 2), of which some may be equal
    Returns the points that it passes through (N, 3, 2), its centre (N, 2) and its radius squared (N,).
    """
    others = points[:, 1:] - points[:, :1]
    a, b = others[:, [0, 0, 1]], others[:, [1, 2, 2]]
    aa, bb = _squared(a)[..., None], _squared(b)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):  # of three in a line
        of_three = ((b * aa - a * bb) / (2 * _cross(a, b))[..., None])[..., ::-1] * (1, -1)
    centres = np.concatenate([others / 2, of_three], axis=1)  # (N, 6, 2), seen from the first point
    squared = _squared(centres)
    for other in others.transpose(1, 0, 2):  # a circle too small for one is made larger, and is not the smallest
        squared = np.maximum(squared, _squared(centres - other[:, None]))
    squared[np.isnan(squared)] = np.inf
    rows, best = np.arange(len(points)), squared.argmin(axis=1)
    return points[rows[:, None], _AROUND[best]], centres[rows, best] + points[:, 0], squared[rows, best]


def least_widths(xy: Floats, counts: Ints) -> Floats:
    """The least distance between two parallel lines that enclose each hull: float64 (N,); each has an area.

    One of the two lines runs along an edge (Houle & Toussaint 1988); the other passes through the vertex farthest from
    that, where the outline has turned by half a turn since.
    """
    first, owner = _first(counts), np.arange(len(counts)).repeat(counts)
    before, after = _neighbours(counts)
    edge = xy[after] - xy
    turn = np.abs(np.arctan2(_cross(edge[before], edge), np.einsum("ij,ij->i", edge[before], edge)))
    turned = np.cumsum(turn) / (2 * np.pi)
    turned -= turned[first].repeat(counts)  # since the hull's first edge, in whole turns
    farthest = np.searchsorted(owner + turned.clip(0, 1 - _ROUNDING), owner + (turned + 0.5) % 1)
    inside = (first[owner] <= farthest) & (farthest < (first + counts)[owner])
    farthest = np.where(inside, farthest, first[owner])  # a whole turn is none, and rounds to either
    # Rounding can choose the wrong end of an edge that is parallel to this one.
    candidates = (before[farthest], farthest, after[farthest])
    distance = np.max([np.abs(_cross(edge, xy[vertex] - xy)) for vertex in candidates], axis=0)
    return np.minimum.reduceat(distance / np.sqrt(_squared(edge)), first)


def _first(counts: Ints) -> Ints:
    """The index of each hull's first vertex."""
    return np.cumsum(counts) - counts


def _neighbours(counts: Ints) -> tuple[Ints, Ints]:
    """For each vertex the index of the one before it in its hull, and of the one after it."""
    index, first = np.arange(counts.sum()), _first(counts)
    before, after = index - 1, index + 1
    before[first], after[first + counts - 1] = first + counts - 1, first
    return before, after


def _squared(vectors: Floats) -> Floats:
    return np.asarray(np.einsum("...i,...i->...", vectors, vectors))


def _cross(a: Floats, b: Floats) -> Floats:
    return np.asarray(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])
