"""Mask probabilities -> polygons, and operations on polygons: repair, simplification, rasterising, measurements.

All are functions over arrays: a thousand masks are outlined in one call, a million vertices measured in one pass.
x right, y down; vertices on pixel edges, so that a pixel (row, col) covers [col, col + 1) x [row, row + 1).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import contourpy
import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.segment import hulls

Polygons = NDArray[np.object_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_MOSAIC_CELLS = 1 << 22  # float64 cells outlined in one call: 32 MiB
_MOSAIC_ROWS = 1 << 13  # whose coordinates are made together
_PAINTED_PX = 1 << 22  # pixels listed at once when rasterising: 32 MiB an index


def from_masks(mask_probs: NDArray[Any], boxes: NDArray[np.floating], *, level: float) -> Polygons:
    """Outline every mask at `level`, in the frame of `boxes`.

    mask_probs: float32 (N, M, M), probabilities at the centres of an M x M grid of cells stretched over each box, or
        uint8, 255 times as much. Outside the box they are 0; outlines are interpolated between cell centres (marching
        squares).
        bool (N, M, M) instead is outlined along cell edges: a mask of one pixel is a unit square
    boxes: float32 (N, 4), x0 y0 x1 y1
    level: 0 < level < 1
    Returns object (N,), Polygon or MultiPolygon with holes, with all parts; POLYGON EMPTY where nothing
    exceeds `level`. Outlines never cross themselves but may touch themselves at a point; see `solid`.
    Raises ValueError for a level out of range or arrays that do not fit together.
    Laws: for a binary mask in a box of M x M px, `rasterise` of the polygon gives the mask back. An outline does not
    depend, not in its last digit, on the other masks.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: need 0 < level < 1")
    if mask_probs.ndim != 3 or mask_probs.shape[1] != mask_probs.shape[2] or boxes.shape != (len(mask_probs), 4):
        raise ValueError(f"masks {mask_probs.shape}, boxes {boxes.shape}: need (N, M, M) and (N, 4)")
    outlines = np.full(len(mask_probs), shapely.Polygon(), dtype=object)
    at_once = max(1, _MOSAIC_CELLS // (mask_probs.shape[1] + 1) ** 2)
    for first in range(0, len(mask_probs), at_once):
        part = slice(first, first + at_once)
        outlines[part] = _outline(mask_probs[part], boxes[part].astype(np.float64), level)
    return outlines


def _outline(mask_probs: NDArray[Any], boxes: Floats, level: float) -> Polygons:
    """`from_masks` for as many masks as one mosaic holds."""
    count, side = mask_probs.shape[:2]
    # A bool mask is sampled at both edges of every cell instead of its centre, so outlines run along edges.
    samples = 2 if mask_probs.dtype == bool else 1
    step = side * samples + 1  # one row of zeros between neighbours
    mosaic = np.zeros((count * step + 1, step + 1))  # masks stacked in one column
    rows = mosaic[1:].reshape(count, step, step + 1)
    rows[:, :-1, 1:-1] = mask_probs if samples == 1 else mask_probs.repeat(2, axis=1).repeat(2, axis=2)
    x, y = _coordinates(mosaic.shape[1], -(-len(mosaic) // _MOSAIC_ROWS))
    generator = contourpy.contour_generator(
        x=x[: len(mosaic)],
        y=y[: len(mosaic)],
        z=mosaic,
        name="serial",
        fill_type=contourpy.FillType.ChunkCombinedOffsetOffset,
    )
    level *= 255 if mask_probs.dtype == np.uint8 else 1
    filled: Any = generator.filled(level, np.inf)
    points, ring_starts, part_starts = (chunk[0] for chunk in filled)
    if points is None:
        return np.full(count, shapely.Polygon(), dtype=object)
    # A ring lies strictly between the rows of zeros around its mask, so any point of it tells which mask it is of.
    owner = (points[ring_starts[part_starts[:-1]], 1] // step).astype(np.int64)
    point_owner = owner.repeat(np.diff(ring_starts[part_starts]))
    above = point_owner * step  # rows of the mosaic before the mask's own
    if samples == 1:
        cells = _crossings(points, above, mosaic, level) - 0.5  # from the box's corner
    else:
        cells = np.stack([points[:, 0], points[:, 1] - above], axis=1) // 2
    corner, extent = boxes[point_owner, :2], boxes[point_owner, 2:] - boxes[point_owner, :2]
    parts = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, corner + cells * (extent / side), (ring_starts, part_starts)
    )
    return _gather(parts if samples == 1 else shapely.remove_repeated_points(parts), owner, count)


def _crossings(points: Floats, above: Ints, mosaic: Floats, level: float) -> Floats:
    """Where an outline crosses the edges of a grid, found again from the two values of each edge.

    contourpy rounds to the digits that the row of the mosaic leaves, so an outline depended on what is above its mask.
    points: float64 (P, 2), x y in the mosaic, each on an edge; above: int64 (P,), rows that are not counted
    mosaic: float64 (rows, columns). Returns float64 (P, 2).
    """
    x, y = points.T
    column, row = np.rint(x), np.rint(y)
    across = np.abs(x - column) >= np.abs(y - row)  # between two columns; else between two rows
    column, row = np.where(across, np.floor(x), column), np.where(across, row, np.floor(y))
    values, width = mosaic.reshape(-1), mosaic.shape[1]
    start = (row * width + column).astype(np.int64)
    at_start, at_end = values[start], values[start + np.where(across, 1, width)]
    rise = np.where(at_end == at_start, np.inf, at_end - at_start)  # where it passes through a corner of the grid
    share = (level - at_start) / rise
    return np.stack([column + across * share, row - above + ~across * share], axis=1)


@functools.lru_cache(maxsize=1)
def _coordinates(width: int, parts: int) -> tuple[Floats, Floats]:
    """x and y of the cells of a mosaic, each (parts * _MOSAIC_ROWS, width). Made once for mosaics of about one size."""
    x, y = np.meshgrid(np.arange(width, dtype=float), np.arange(parts * _MOSAIC_ROWS, dtype=float))
    return x, y


def _gather(parts: Polygons, owner: Ints, count: int) -> Polygons:
    """Polygons -> (count,): the only part of its owner, a MultiPolygon of several, or POLYGON EMPTY."""
    gathered = np.full(count, shapely.Polygon(), dtype=object)
    order = np.argsort(owner, kind="stable")
    parts, owner = parts[order], owner[order]
    several = np.bincount(owner, minlength=count)[owner] > 1
    gathered[owner[~several]] = parts[~several]
    if several.any():
        owners, compact = np.unique(owner[several], return_inverse=True)
        gathered[owners] = shapely.multipolygons(parts[several], indices=compact)
    return gathered


def solid(polygons: Polygons) -> Polygons:
    """Each geometry as one polygon without holes: made valid, holes filled, the largest part kept.

    polygons: object (N,), any polygonal geometry in any frame, valid or not
    Returns object (N,) of valid Polygons without holes; empty where no area is left.
    Law: solid(solid(p)) == solid(p).
    """
    result = np.array(polygons, dtype=object)
    valid = shapely.is_valid(result)
    whole = valid & (shapely.get_type_id(result) == shapely.GeometryType.POLYGON)
    others = np.flatnonzero(~whole | (shapely.get_num_interior_rings(result) > 0))  # few
    result[others[~valid[others]]] = shapely.make_valid(result[others[~valid[others]]])
    result[others] = _largest_part(result[others])
    return result


def _largest_part(geometries: Polygons) -> Polygons:
    """The largest polygon of each valid geometry, its holes filled; empty where it has none."""
    # make_valid may answer with a collection that holds a MultiPolygon: two levels of parts.
    outer_parts, outer_owner = shapely.get_parts(geometries, return_index=True)
    parts, inner_owner = shapely.get_parts(outer_parts, return_index=True)
    owner = outer_owner[inner_owner]
    areal = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    owner, filled = owner[areal], shapely.polygons(shapely.get_exterior_ring(parts[areal]))
    order = np.lexsort((-shapely.area(filled), owner))
    owners, largest = np.unique(owner[order], return_index=True)
    result = np.full(len(geometries), shapely.Polygon(), dtype=object)
    result[owners] = filled[order][largest]
    return result


def centroids(polygons: Polygons) -> Floats:
    """Centres of area, float64 (N, 2), x y; NaN for an empty polygon, for which newer GEOS raises instead."""
    centres, owner = shapely.get_coordinates(shapely.centroid(polygons), return_index=True)
    result = np.full((len(polygons), 2), np.nan)
    result[owner] = centres
    return result


def simplify(polygons: Polygons, tolerance_px: float) -> Polygons:
    """Outlines with fewer vertices; none is dropped that lies further than `tolerance_px` from the new outline.

    polygons: object (N,), valid. Douglas and Peucker (1973); tolerance 0 drops what lies on a straight line.
    GEOS may drop the vertex where a ring starts too: beside it the outline can stray by twice the tolerance.
    Returns object (N,), valid, same frame, with as many holes as before; only an empty polygon is simplified to an
    empty one.
    """
    quick = shapely.simplify(polygons, tolerance_px, preserve_topology=False)
    simplified = np.array(quick, dtype=object)
    # Much faster than keeping the topology of all, which few outlines need. A new outline that crosses itself is
    # repaired by GEOS: it is valid, and may have a hole, several parts or none.
    damaged = shapely.is_empty(simplified)
    damaged |= shapely.get_type_id(simplified) != shapely.get_type_id(polygons)
    damaged |= shapely.get_num_interior_rings(simplified) != shapely.get_num_interior_rings(polygons)
    simplified[damaged] = shapely.simplify(polygons[damaged], tolerance_px, preserve_topology=True)
    return simplified


class _Edges(NamedTuple):
    """Every edge of an array of polygons, ring after ring."""

    start: Floats  # (E, 2) x y
    end: Floats  # (E, 2)
    ring: Ints  # (E,) index of its ring
    owner: Ints  # (R,) index of the polygon of each ring
    hole: Bools  # (R,) a ring inside its polygon


def _edges(polygons: Polygons) -> _Edges:
    """Edges of Polygons and MultiPolygons; those of an empty one are none."""
    parts, part_owner = shapely.get_parts(polygons, return_index=True)
    rings, ring_part = shapely.get_rings(parts, return_index=True)
    xy, vertex_ring = shapely.get_coordinates(rings, return_index=True)
    inside = vertex_ring[1:] == vertex_ring[:-1]
    hole = np.concatenate([[False], ring_part[1:] == ring_part[:-1]])[: len(rings)]  # the exterior is first
    return _Edges(xy[:-1][inside], xy[1:][inside], vertex_ring[1:][inside], part_owner[ring_part], hole)


def rasterise(polygons: Polygons, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Label map of polygons: pixel (row, col) gets i + 1 if its centre lies in polygon i, 0 if in none.

    polygons: object (N,), frame of the map, the first having precedence where they overlap.
    shape: (height, width)
    Returns int32 (height, width). Inside is even-odd and half-open (a centre on a left or upper outline is
    in, on a right or lower one out), so that polygons which share an edge share no pixel and leave none.
    """
    labels = np.zeros(shape[0] * shape[1], dtype=np.int32)
    # From the last to the first, so that earlier polygons overwrite later ones.
    for part in reversed(list(_batches(polygons, shape))):
        owner, row, first, stop = _spans(polygons[part], shape)
        order = np.argsort(-owner, kind="stable")
        owner, row, first, length = owner[order], row[order], first[order], (stop - first)[order]
        labels[(row * shape[1] + first).repeat(length) + count_within(length)] = (part.start + 1 + owner).repeat(length)
    return labels.reshape(shape)


def _batches(polygons: Polygons, shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of the polygons whose boxes in the map sum to about _PAINTED_PX pixels."""
    boxes = np.nan_to_num(shapely.bounds(polygons)).clip(0, [shape[1], shape[0]] * 2)
    painted = np.cumsum((boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1))
    cuts = np.flatnonzero(np.diff(painted // _PAINTED_PX)) + 1
    for first, stop in zip([0, *cuts], [*cuts, len(polygons)], strict=True):
        yield slice(int(first), int(stop))


def _spans(polygons: Polygons, shape: tuple[int, int]) -> tuple[Ints, Ints, Ints, Ints]:
    """Scan lines through pixel centres -> (polygon, row, first column, stop column), clipped to the map."""
    edges = _edges(polygons)
    downward = (edges.start[:, 1] <= edges.end[:, 1])[:, None]
    # The same end first in whichever direction an edge runs: polygons that share it cross a row at one x.
    upper, lower = np.where(downward, edges.start, edges.end), np.where(downward, edges.end, edges.start)
    # A row is crossed when upper y <= row + 0.5 < lower y.
    top, bottom = (np.ceil(end[:, 1] - 0.5).clip(0, shape[0]).astype(np.int64) for end in (upper, lower))
    crossed = bottom - top
    edge = np.arange(len(crossed)).repeat(crossed)
    row = top.repeat(crossed) + count_within(crossed)
    run, rise = (lower - upper)[edge].T
    x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * (run / rise)
    owner = edges.owner[edges.ring[edge]]
    order = np.lexsort((x, row, owner))
    # Rings are closed, so every polygon crosses a row an even number of times: enter, leave, enter, leave.
    enter, leave = order[::2], order[1::2]
    first, stop = (np.ceil(x[i] - 0.5).clip(0, shape[1]).astype(np.int64) for i in (enter, leave))
    return owner[enter], row[enter], first, stop


def count_within(counts: Ints) -> Ints:
    """0, 1, ... n - 1 within each group of n, one group after another: int64 (counts.sum(),)."""
    return np.asarray(np.arange(counts.sum()) - (np.cumsum(counts) - counts).repeat(counts))


class Measures(NamedTuple):
    """Measurements of shapes; parallel arrays (N,), zeros for an empty polygon."""

    area_um2: NDArray[np.float32]
    perimeter_um: NDArray[np.float32]
    circularity: NDArray[np.float32]  # 4 pi area / perimeter^2: 1 for a disc
    major_axis_um: NDArray[np.float32]  # of the ellipse with the same second moments, end to end
    minor_axis_um: NDArray[np.float32]
    solidity: NDArray[np.float32]  # share of the convex hull
    max_diameter_um: NDArray[np.float32]  # of the smallest circle around it: QuPath's "Max diameter"
    min_diameter_um: NDArray[np.float32]  # least distance between two parallel lines around it: Feret's minimum
    centroid: Floats  # (N, 2) x y in px, NaN for an empty polygon


def measure(polygons: Polygons, um_per_px: tuple[float, float]) -> Measures:
    """Measure every polygon: Green's theorem on its edges, and its convex hull; no pixels.

    polygons: object (N,), valid, any frame; um_per_px: (x, y) of that frame
    The moments are those of Steger (1996), "On the calculation of arbitrary moments of polygons".
    """
    edges, count = _edges(polygons), len(polygons)
    scale = np.asarray(um_per_px, dtype=np.float64)
    corner = shapely.bounds(polygons)[:, :2]  # small numbers keep their digits
    owner = edges.owner[edges.ring]
    (x0, y0), (x1, y1) = (((end - corner[owner]) * scale).T for end in (edges.start, edges.end))
    cross = x0 * y1 - x1 * y0
    turn = np.sign(np.bincount(edges.ring, cross, len(edges.owner)))
    cross *= np.where(edges.hole, -turn, turn)[edges.ring]  # outer rings add, holes subtract, however they turn

    def total(per_edge: Floats) -> Floats:
        return np.bincount(owner, per_edge, count).astype(np.float64)  # int where there is no edge

    area = total(cross) / 2
    some = np.where(area > 0, area, np.nan)
    mean_x, mean_y = total((x0 + x1) * cross) / 6 / some, total((y0 + y1) * cross) / 6 / some
    var_x = total((x0 * x0 + x0 * x1 + x1 * x1) * cross) / 12 / some - mean_x**2
    var_y = total((y0 * y0 + y0 * y1 + y1 * y1) * cross) / 12 / some - mean_y**2
    cov = total((x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) * cross) / 24 / some - mean_x * mean_y
    mean, spread = (var_x + var_y) / 2, np.hypot((var_x - var_y) / 2, cov)
    perimeter = total(np.hypot(x1 - x0, y1 - y0))
    hull_area, max_diameter, min_diameter = _measure_hulls(polygons, corner, scale)

    def column(values: Floats) -> NDArray[np.float32]:
        return np.nan_to_num(values).astype(np.float32)

    return Measures(
        area_um2=column(area),
        perimeter_um=column(perimeter),
        circularity=column(4 * np.pi * area / np.where(perimeter > 0, perimeter, np.nan) ** 2),
        major_axis_um=column(4 * np.sqrt(np.maximum(mean + spread, 0))),
        minor_axis_um=column(4 * np.sqrt(np.maximum(mean - spread, 0))),
        solidity=column(area / np.where(hull_area > 0, hull_area, np.nan)),
        max_diameter_um=column(max_diameter),
        min_diameter_um=column(min_diameter),
        centroid=np.stack([mean_x, mean_y], axis=1) / scale + corner,
    )


def _measure_hulls(polygons: Polygons, corner: Floats, scale: Floats) -> Floats:
    """Of each convex hull the area, and the diameters of `Measures`: float64 (3, N), 0 where there is none.

    corner: (N, 2), from which vertices are counted, px; scale: um per px
    """
    xy, counts = hulls.convex_hulls(polygons)
    xy = (xy - corner.repeat(counts, axis=0)) * scale
    measured = np.zeros((3, len(polygons)))
    some = counts > 0
    measured[:2, some] = hulls.areas(xy, counts[some]), 2 * hulls.smallest_circles(xy, counts[some])
    wide = measured[0] > 0
    measured[2, wide] = hulls.least_widths(xy[wide.repeat(counts)], counts[wide])
    return measured
