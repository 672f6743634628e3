"""The grid of tiles and blocks: the work pixels that each tile owns, and those that it reads.

Everything is in work pixels, from the top-left corner of the work frame.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slides.errors import GridError
from slides.geometry import Box, Size, union


class Tile(NamedTuple):
    """What is read for one inference, and the core that it owns. Work pixels, half-open.

    `read` is always `grid.tile` px square, so it may hang over the slide; `core` is clipped to the slide.
    """

    row: int
    col: int
    core: Box
    read: Box


@dataclass(frozen=True)
class TileGrid:
    """Tiles of `tile` px that share a border of `margin` px with their neighbours, in square blocks.

    size: the work frame, work px; block: tiles along one side of a block.
    Raises GridError where the numbers do not make a grid.
    Laws: cores partition the frame; every read is exactly one tile in size and holds its core `margin` px
    inside; every tile is in exactly one block.
    """

    size: Size
    tile: int
    margin: int
    block: int

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            width, height = self.size
            raise GridError(f"size={width} x {height} px is empty: need at least 1 x 1 px")
        if self.margin < 0:
            raise GridError(f"margin={self.margin}: need margin >= 0")
        if self.tile <= 2 * self.margin:
            raise GridError(f"margin={self.margin} leaves no core in a tile of {self.tile} px: need 2 * margin < tile")
        if self.block < 1:
            raise GridError(f"block={self.block}: need at least 1 tile along the side of a block")

    @property
    def stride(self) -> int:
        """Pixels from one core's corner to the next."""
        return self.tile - 2 * self.margin

    @property
    def rows(self) -> int:
        return -(-self.size.height // self.stride)

    @property
    def cols(self) -> int:
        return -(-self.size.width // self.stride)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Blocks down and across; the last ones may hold fewer than block x block tiles."""
        return -(-self.rows // self.block), -(-self.cols // self.block)

    @property
    def blocks(self) -> int:
        """How many blocks; they are numbered row by row from 0."""
        down, across = self.block_shape
        return down * across

    def tile_at(self, row: int, col: int) -> Tile:
        """The tile in this cell of the grid. Raises GridError outside it."""
        if not (0 <= row < self.rows and 0 <= col < self.cols):
            raise GridError(f"tile ({row}, {col}) is outside a grid of {self.rows} x {self.cols} tiles")
        x, y = col * self.stride, row * self.stride
        core = Box(x, y, min(x + self.stride, self.size.width), min(y + self.stride, self.size.height))
        corner_x, corner_y = x - self.margin, y - self.margin
        return Tile(row, col, core, Box(corner_x, corner_y, corner_x + self.tile, corner_y + self.tile))

    def block_of(self, row: int, col: int) -> int:
        """The block that holds the tile in this cell."""
        return row // self.block * self.block_shape[1] + col // self.block

    def block_place(self, block: int) -> tuple[int, int]:
        """Row and column of a block among the blocks. Raises GridError outside the grid."""
        if not 0 <= block < self.blocks:
            raise GridError(f"block {block} is outside the grid: need 0 <= block < {self.blocks}")
        return divmod(block, self.block_shape[1])

    def tiles_of(self, block: int) -> tuple[Tile, ...]:
        """The tiles of a block, row by row."""
        block_row, block_col = self.block_place(block)
        top, left = block_row * self.block, block_col * self.block
        return tuple(
            self.tile_at(row, col)
            for row in range(top, min(top + self.block, self.rows))
            for col in range(left, min(left + self.block, self.cols))
        )


def trim(tile: Tile, tissue: Box, grid: TileGrid, step: int) -> Box:
    """The part of a tile's patch that shows `tissue`, a part of its core, and the grid's margin around it: work px.

    Nothing beyond the slide is shown but what fills the last step: a detector was trained on crops of images, so it
    knows nuclei that the edge of its input cuts, and not those that end at a white border.
    Its edges lie at multiples of `step` px from the patch's corner, or are edges of the patch: so a detector's feature
    maps lie on the slide as those of the whole patch do.
    Law: it holds what lies in the patch, in the slide and within the margin of the tissue.
    """
    corner = np.array(tile.read.corner)
    low = np.maximum(np.array(tissue[:2]) - grid.margin, 0) - corner
    high = np.minimum(np.array(tissue[2:]) + grid.margin, grid.size) - corner
    low, high = low // step * step + corner, -(-high // step) * step + corner
    return Box(*low.tolist(), *high.tolist()).intersect(tile.read)


def read_box(tiles: tuple[Tile, ...]) -> Box:
    """The one region, work px, that holds the read of every tile given."""
    return union([tile.read for tile in tiles])


def check_margin(margin: int, max_diameter_px: float, tolerance_px: float, shift_px: float) -> None:
    """Raise GridError unless a tile reads the whole of every object that it may claim.

    All in work px. An object is claimed when its centroid is within `tolerance_px` of the core; it reaches
    half its diameter further, and a shifted view lacks `shift_px` at one edge.
    """
    needed = max_diameter_px / 2 + tolerance_px + shift_px
    if margin < needed:
        raise GridError(
            f"margin={margin} cuts objects of {max_diameter_px:g} px: need margin >= half the diameter + "
            f"tolerance {tolerance_px:g} + shift {shift_px:g} = {needed:g} px; "
            f"raise the margin or lower the largest diameter"
        )
