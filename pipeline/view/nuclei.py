"""The nuclei of a slide in the forms that a page draws: outlines by tile, counts by cell of a grid.

Positions are slide px from the corner of the slide's bounds, as everywhere in `pipeline.view`.

A tile of outlines, little-endian, with n nuclei that have v vertices in all:

    uint32                nuclei: n
    uint32                vertices: v
    float32               quantum: slide px
    uint32  (n)           row of the nucleus in nuclei.parquet
    float32 (n)           score
    uint32  (n + 1)       where its vertices start in the list below, and where the last one's end
    int16   (v, 2)        x, y from the middle of the tile, in quanta; no ring repeats its first vertex
    uint16  (n)           number of its class
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pipeline.errors import RunError
from pipeline.segment import arrow
from pipeline.segment.finished import remedy
from pipeline.segment.polygons import Polygons, count_within
from pipeline.segment.tables import geometry, iter_nuclei, read_nuclei, read_provenance
from pipeline.text import one_line

TILE_PX = 2048
"Side of a tile of outlines, slide px."

DENSITY_UM = 50.0
"Side of a cell of the density grid, micrometres; larger where the grid would have more than 1,024 cells along a side."

_MOST_CELLS = 1024
_SUBPIXELS = 16  # steps of a vertex within a slide px: 1/16 px is less than a screen shows
_FARTHEST_PX = 2**26  # from the corner of the bounds, so that positions in sixteenths fit 32 bits
_INT16 = 2**15 - 1
_NO_COLOUR = (128, 128, 128)


class NucleusTiles:
    """The nuclei of a nuclei.parquet, in memory: some 0.3 kB each. Nothing changes after it is made.

    Law: every nucleus is in exactly one tile and one cell, those that hold its centroid; a centroid outside the bounds
    counts for the nearest ones.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunError for a table that is damaged or not of Nightslide."""
        try:
            self._read(path)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException, shapely.GEOSException) as error:
            raise RunError(f"{path} cannot be read ({one_line(error)}): {remedy(path)}") from error

    def _read(self, path: Path) -> None:
        provenance = read_provenance(path)
        self.um_per_px = provenance.um_per_px
        self.size = provenance.bounds.size
        corner = np.array(provenance.bounds.corner, float)
        columns = [field.name for field in pq.read_schema(path) if not pa.types.is_nested(field.type)]
        tables, vertices, counts, bounds = [], [], [np.zeros(1, np.int64)], [np.zeros((0, 4))]
        for rows in iter_nuclei(path, columns):
            shapes = geometry(rows)
            xy, of_each = _vertices(shapes, corner)
            vertices.append(xy)
            counts.append(of_each)
            bounds.append(shapely.bounds(shapes) - np.tile(corner, 2))
            tables.append(rows.drop_columns(["geometry"]))
        self._table = pa.concat_tables(tables) if tables else read_nuclei(path, columns)
        self._vertices = np.concatenate([np.zeros((0, 2), np.int32), *vertices])  # sixteenths of a slide px
        self._starts = np.cumsum(np.concatenate(counts))  # (n + 1,), of the vertices of each nucleus
        self._scores = arrow.values(self._table["score"]).astype(np.float32)
        names = sorted(pc.unique(self._table["class"]).to_pylist())
        self.classes = {name: provenance.colours.get(name, _NO_COLOUR) for name in names}
        self._class_numbers = arrow.values(arrow.index(self._table["class"], list(self.classes))).astype(np.uint16)
        self._place(_centroids(self._table, corner), np.concatenate(bounds))

    def _place(self, centroids: NDArray[np.float64], bounds: NDArray[np.float64]) -> None:
        """Sort the nuclei into tiles and cells. centroids: float64 (n, 2); bounds: float64 (n, 4), x0 y0 x1 y1."""
        self.tiles = _grid(self.size, (TILE_PX, TILE_PX))
        tile = _numbers(centroids, (TILE_PX, TILE_PX), self.tiles)
        low = np.stack([tile % self.tiles[0], tile // self.tiles[0]], 1) * TILE_PX
        reach = np.concatenate([low - bounds[:, :2], bounds[:, 2:] - low - TILE_PX])
        self.overhang_px = math.ceil(np.max(reach, initial=0))
        self._by_tile = np.argsort(tile, kind="stable")
        self._tile_starts = np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=math.prod(self.tiles)))])
        um = np.array(self.size) * self.um_per_px
        side_um = max(DENSITY_UM, um.max() / _MOST_CELLS)
        self.cell_px = (side_um / self.um_per_px[0], side_um / self.um_per_px[1])
        self.cells = _grid(self.size, self.cell_px)
        self._cell = _numbers(centroids, self.cell_px, self.cells)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def class_counts(self) -> list[int]:
        """Nuclei of each class."""
        return [int(count) for count in np.bincount(self._class_numbers, minlength=len(self.classes))]

    def lowest_score(self) -> float:
        """Of all nuclei; 0 where there are none."""
        return float(self._scores.min()) if len(self) else 0.0

    def tile(self, col: int, row: int) -> bytes | None:
        """The outlines whose centroids lie in a tile, in the format above; None where there is no such tile."""
        if not (col < self.tiles[0] and row < self.tiles[1]):
            return None
        number = row * self.tiles[0] + col
        rows = self._by_tile[self._tile_starts[number] : self._tile_starts[number + 1]]
        lengths = self._starts[rows + 1] - self._starts[rows]
        first = np.concatenate([[0], np.cumsum(lengths)])
        place = self._starts[rows].repeat(lengths) + count_within(lengths)
        middle = (np.array([col, row]) * TILE_PX + TILE_PX // 2) * _SUBPIXELS
        xy = self._vertices[place] - middle
        coarser = max(1, -(-int(np.abs(xy).max(initial=0)) // _INT16))  # where an outline reaches far out of its tile
        parts: list[NDArray[Any]] = [
            np.array([len(rows), len(xy)], "<u4"),
            np.array([coarser / _SUBPIXELS], "<f4"),
            rows.astype("<u4"),
            self._scores[rows].astype("<f4"),
            first.astype("<u4"),
            np.rint(xy / coarser).astype("<i2"),
            self._class_numbers[rows].astype("<u2"),
        ]
        return b"".join(part.tobytes() for part in parts)

    def density(self, score: float, classes: Iterable[int]) -> NDArray[np.uint32]:
        """Nuclei of at least this score, of some classes by their numbers, in each cell. uint32 (rows, cols)."""
        shown = (self._scores >= np.float32(score)) & np.isin(self._class_numbers, list(classes))
        counts = np.bincount(self._cell[shown], minlength=math.prod(self.cells))
        return counts.astype(np.uint32).reshape(self.cells[::-1])

    def nucleus(self, row: int) -> dict[str, Any] | None:
        """All that the table has of a nucleus but its outline, by column; None where it has no such row."""
        if not row < len(self):
            return None
        values: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


def _vertices(shapes: Polygons, corner: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The vertices of outlines, each once: int32 (v, 2), sixteenths of a px from `corner`; and how many each has."""
    if shapely.get_num_interior_rings(shapes).any():
        raise ValueError("an outline has a hole")
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    xy -= corner
    if not (xy.min(initial=0) > -_FARTHEST_PX and xy.max(initial=0) < _FARTHEST_PX):
        raise ValueError(f"an outline is not within {_FARTHEST_PX} px of the slide")
    xy *= _SUBPIXELS
    once = np.diff(owner, append=-1) == 0  # all but the last vertex of a ring, which is its first one
    return np.rint(xy, out=xy).astype(np.int32)[once], np.bincount(owner[once], minlength=len(shapes))


def _centroids(rows: pa.Table, corner: NDArray[np.float64]) -> NDArray[np.float64]:
    centroids = np.stack([arrow.values(rows["centroid_x"]), arrow.values(rows["centroid_y"])], 1) - corner
    if not np.isfinite(centroids).all():
        raise ValueError("a centroid is not a number")
    return centroids


def _grid(size: tuple[int, int], side: tuple[float, float]) -> tuple[int, int]:
    """Columns and rows of cells of `side` (width, height) that cover `size`."""
    return math.ceil(size[0] / side[0]), math.ceil(size[1] / side[1])


def _numbers(xy: NDArray[np.float64], side: tuple[float, float], grid: tuple[int, int]) -> NDArray[np.int64]:
    """The cell that holds each point, row by row; for a point outside the grid the nearest one. int64 (n,)."""
    cells = np.clip(np.floor(xy / side), 0, np.array(grid) - 1).astype(np.int64)
    numbers: NDArray[np.int64] = cells[:, 1] * grid[0] + cells[:, 0]
    return numbers
