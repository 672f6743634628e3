"""Nuclei -> cells: every nucleus grows by a distance, and neighbours divide what both would reach.

A cell depends on its nucleus and on the nuclei within twice the distance, and on no other, so a slide can be done in
parts.
"""

from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.segment import tables
from pipeline.segment.polygons import Floats, Ints, Polygons

_AT_ONCE = 4096  # nuclei that are divided from their neighbours in one call
_QUADRANT = 4  # segments of a quarter of a circle: corners grow by 98 % of the distance or more


def expand(nuclei: Polygons, wanted: NDArray[np.bool_], distance: float) -> Polygons:
    """The cells of some nuclei.

    nuclei: object (N,), valid Polygons without holes, in any unit; in one order, whichever of them are there
    wanted: bool (N,), which cells to make. The other nuclei are neighbours: all within 2 * distance must be there
    distance: how far a nucleus grows, in that unit
    Returns object (wanted.sum(),), Polygons, rarely with holes. Where two nuclei would reach the same place, it is
    divided along the line that halves the shortest way between them.
    Law: a cell contains its nucleus and lies within `distance` of it; two cells overlap only where their nuclei do.
    """
    grown = shapely.buffer(nuclei, distance, quad_segs=_QUADRANT)
    tree = shapely.STRtree(grown)
    own = np.flatnonzero(wanted)
    parts = np.split(own, np.arange(_AT_ONCE, len(own), _AT_ONCE))
    cells: Polygons = np.concatenate([_without_neighbours(nuclei, grown, tree, part) for part in parts])
    return cells


def _without_neighbours(nuclei: Polygons, grown: Polygons, tree: shapely.STRtree, own: Ints) -> Polygons:
    """What the nuclei with the indices `own` grow to, less what goes to their neighbours: object (len(own),)."""
    cell, other = tree.query(grown[own], predicate="intersects")
    order = np.lexsort((other, cell))
    order = order[own[cell[order]] != other[order]]
    cell, other = cell[order], other[order]
    taken = _share(nuclei, grown, own[cell], other)
    cells: Polygons = grown[own]
    turn = np.arange(len(cell)) - np.searchsorted(cell, cell)
    for number in range(turn.max(initial=-1) + 1):
        now = turn == number
        cells[cell[now]] = shapely.difference(cells[cell[now]], taken[now])
    return _around(nuclei[own], cells)


def _share(nuclei: Polygons, grown: Polygons, own: Ints, other: Ints) -> Polygons:
    """What of its neighbour's growth a nucleus may not have: object (P,), for pairs of indices own, other (P,)."""
    half = _half_plane(nuclei, grown, own, other)
    share: Polygons = shapely.intersection(grown[other], half)
    # An outline that is not convex may cross the line: what lies beyond stays with its own nucleus.
    crossing = np.flatnonzero(~shapely.covers(half, nuclei[other]))
    share[crossing] = shapely.union(share[crossing], nuclei[other[crossing]])
    crossing = np.flatnonzero(shapely.intersects(share, nuclei[own]))
    share[crossing] = shapely.difference(share[crossing], nuclei[own[crossing]])
    mixed = shapely.get_type_id(share) == shapely.GeometryType.GEOMETRYCOLLECTION
    share[mixed] = shapely.buffer(share[mixed], 0)  # without lines and points
    return share


def _half_plane(nuclei: Polygons, grown: Polygons, own: Ints, other: Ints) -> Polygons:
    """Squares on the other nucleus' side of the line between two nuclei, as large as both can reach: object (P,)."""
    first, second = np.minimum(own, other), np.maximum(own, other)  # the same line for both of a pair
    ends = shapely.get_coordinates(shapely.shortest_line(nuclei[first], nuclei[second])).reshape(-1, 2, 2)
    overlap = (ends[:, 0] == ends[:, 1]).all(1)
    for end, index in enumerate((first, second)):
        ends[overlap, end] = shapely.get_coordinates(shapely.centroid(nuclei[index[overlap]]))
    way = ends[:, 1] - ends[:, 0]
    way[(way == 0).all(1)] = 1, 0
    way /= np.hypot(*way.T)[:, None]
    low, high = (np.stack([b[:, :2], b[:, 2:]]) for b in (shapely.bounds(grown[own]), shapely.bounds(grown[other])))
    reach = np.hypot(*(np.maximum(low[1], high[1]) - np.minimum(low[0], high[0])).T)[:, None]
    across = reach * np.stack([-way[:, 1], way[:, 0]], 1)
    along = reach * np.where((own == first)[:, None], way, -way)
    middle = ends.mean(1)
    corners = [middle - across, middle + across, middle + across + along, middle - across + along]
    return np.asarray(shapely.polygons(np.stack(corners, 1)), dtype=object).reshape(-1)


def _around(nuclei: Polygons, cells: Polygons) -> Polygons:
    """Of each cell the part that its nucleus lies in."""
    several = np.flatnonzero(shapely.get_type_id(cells) != shapely.GeometryType.POLYGON)
    parts, owner = shapely.get_parts(shapely.union(cells[several], nuclei[several]), return_index=True)
    common = shapely.area(shapely.intersection(parts, nuclei[several[owner]]))
    order = np.lexsort((-common, owner))
    owners, best = np.unique(owner[order], return_index=True)
    cells[several[owners]] = parts[order][best]
    return cells


def cells_of(nuclei: Path, bounds: Floats, part: slice, distance_um: float) -> Polygons:
    """The cells of some rows of nuclei.parquet, with the neighbours that they have in others.

    bounds: `read_bounds` of the file; part: of its rows, a step of 1
    Returns object (rows,), Polygons, slide px.
    """
    scale = np.array(tables.read_provenance(nuclei).um_per_px)
    low, high = bounds[:, :2] * scale, bounds[:, 2:] * scale
    around = shapely.box(*(low[part] - 2 * distance_um).T, *(high[part] + 2 * distance_um).T)
    x0, y0, x1, y1 = shapely.total_bounds(around)
    near = (low < (x1, y1)).all(1) & (high > (x0, y0)).all(1)
    near[part] = False
    candidates = np.flatnonzero(near)
    touching = shapely.STRtree(around).query(shapely.box(*low[candidates].T, *high[candidates].T))[0]
    rows = np.union1d(candidates[touching], np.arange(len(bounds))[part])
    outlines = tables.geometry(tables.take_nuclei(nuclei, rows, ["geometry"]))
    wanted = (rows >= part.start) & (rows < part.stop)
    cells = expand(shapely.transform(outlines, lambda xy: xy * scale), wanted, distance_um)
    return np.asarray(shapely.transform(cells, lambda xy: xy / scale), dtype=object)


def read_bounds(nuclei: Path) -> Floats:
    """float64 (N, 4), x0 y0 x1 y1 of every outline of nuclei.parquet, slide px."""
    parts = [rows["bbox"].combine_chunks().flatten() for rows in tables.iter_nuclei(nuclei, ["bbox"])]
    return np.concatenate([np.empty((0, 4)), *(np.stack(sides, 1) for sides in parts)])
