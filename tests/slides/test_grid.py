"""Laws of the tile grid: who owns what, who reads what."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slides.errors import GridError
from slides.geometry import Box, Size
from slides.grid import Tile, TileGrid, check_margin, read_box, trim


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    margin = draw(st.integers(0, 12))
    stride = draw(st.integers(1, 40))
    size = Size(draw(st.integers(1, 9 * stride)), draw(st.integers(1, 9 * stride)))
    return TileGrid(size, stride + 2 * margin, margin, draw(st.integers(1, 5)))


def _tiles(grid: TileGrid) -> list[Tile]:
    return [tile for block in range(grid.blocks) for tile in grid.tiles_of(block)]


@given(grids())
@example(TileGrid(Size(1, 1), 1, 0, 1))
def test_cores_partition_the_frame(grid: TileGrid) -> None:
    owners = np.zeros((grid.size.height, grid.size.width), int)
    for tile in _tiles(grid):
        assert tile.core.area > 0
        owners[tile.core.within((0, 0))] += 1
    assert (owners == 1).all()


@given(grids())
def test_every_read_is_one_tile_and_holds_its_core_a_margin_inside(grid: TileGrid) -> None:
    for tile in _tiles(grid):
        assert tile.read.size == Size(grid.tile, grid.tile)
        inner = Box(tile.read.x0, tile.read.y0, tile.read.x1 - 2 * grid.margin, tile.read.y1 - 2 * grid.margin)
        assert inner.shift(grid.margin, grid.margin).intersect(Box(0, 0, *grid.size)) == tile.core
        assert (tile.core.x0, tile.core.y0) == (tile.read.x0 + grid.margin, tile.read.y0 + grid.margin)


@given(grids())
def test_every_tile_is_in_exactly_one_block(grid: TileGrid) -> None:
    places = [(tile.row, tile.col) for tile in _tiles(grid)]
    assert sorted(places) == [(row, col) for row in range(grid.rows) for col in range(grid.cols)]
    for block in range(grid.blocks):
        tiles = grid.tiles_of(block)
        assert {grid.block_of(tile.row, tile.col) for tile in tiles} == {block}
        assert [tile[:2] for tile in tiles] == sorted(tile[:2] for tile in tiles)
        assert len(tiles) <= grid.block**2
        assert all(tile.read.intersect(read_box(tiles)) == tile.read for tile in tiles)


@given(grids(), st.integers(1, 16), st.data())
def test_a_trimmed_patch_holds_the_tissue_and_a_margin_and_keeps_the_phase(
    grid: TileGrid, step: int, data: st.DataObject
) -> None:
    """Law: all of patch and slide within the margin of the tissue; edges at steps from the corner; no more."""
    tile = data.draw(st.sampled_from(_tiles(grid)))
    core, read = tile.core, tile.read
    x0, y0 = data.draw(st.integers(core.x0, core.x1 - 1)), data.draw(st.integers(core.y0, core.y1 - 1))
    tissue = Box(x0, y0, data.draw(st.integers(x0 + 1, core.x1)), data.draw(st.integers(y0 + 1, core.y1)))
    kept = trim(tile, tissue, grid, step)
    shown = Box(*(v - grid.margin for v in tissue[:2]), *(v + grid.margin for v in tissue[2:]))
    wanted = shown.intersect(read).intersect(Box(0, 0, *grid.size))
    assert kept.intersect(read) == kept
    assert wanted.intersect(kept) == wanted
    for at, first, last, need in zip(kept, read[:2] * 2, read[2:] * 2, wanted, strict=True):
        assert (at - first) % step == 0 or at == last
        assert abs(at - need) < step


def test_a_known_trimmed_patch() -> None:
    """Tissue in the middle of a core: its columns are cut, its rows are all within the margin of it."""
    grid = TileGrid(Size(4096, 4096), 1280, 128, 3)
    tile = grid.tile_at(1, 1)
    assert tile.read == Box(896, 896, 2176, 2176)
    assert trim(tile, Box(1400, 1030, 1500, 2040), grid, 64) == Box(1216, 896, 1664, 2176)


def test_a_patch_ends_where_the_slide_does() -> None:
    """But for what fills its last 64 px, as a detector takes no fewer."""
    grid = TileGrid(Size(1000, 704), 1280, 128, 3)
    assert trim(grid.tile_at(0, 0), Box(0, 0, 1000, 704), grid, 64) == Box(0, 0, 1024, 704)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((Size(9, 9), 1024, 600, 1), "margin=600 leaves no core in a tile of 1024 px: need 2 * margin <"),
        ((Size(9, 9), 16, 8, 1), "margin=8 leaves no core in a tile of 16 px: need 2 * margin <"),
        ((Size(10, 10), 64, -1, 1), "margin=-1: need margin >= 0"),
        ((Size(10, 10), 64, 8, 0), "block=0: need at least 1"),
        ((Size(0, 10), 64, 8, 1), "size=0 x 10 px is empty"),
    ],
)
def test_numbers_that_make_no_grid(numbers: tuple[Size, int, int, int], message: str) -> None:
    with pytest.raises(GridError) as raised:
        TileGrid(*numbers)
    assert message in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_outside_the_grid() -> None:
    grid = TileGrid(Size(100, 140), 64, 8, 2)
    assert grid.tile_at(2, 2).core == Box(96, 96, 100, 140)
    for row, col in ((0, 3), (3, 0), (0, -1), (-1, 0)):
        with pytest.raises(GridError, match=rf"tile \({row}, {col}\) is outside a grid of 3 x 3 tiles"):
            grid.tile_at(row, col)
    for block in (4, -1):
        with pytest.raises(GridError, match="need 0 <= block < 4"):
            grid.tiles_of(block)


def test_a_known_grid() -> None:
    grid = TileGrid(Size(100, 60), 64, 8, 2)
    assert (grid.stride, grid.rows, grid.cols, grid.blocks, grid.block_shape) == (48, 2, 3, 2, (1, 2))
    assert grid.tile_at(1, 2) == (1, 2, Box(96, 48, 100, 60), Box(88, 40, 152, 104))


@given(st.integers(0, 200), st.floats(0, 200), st.floats(0, 10), st.floats(0, 20))
def test_the_margin_rule(margin: int, diameter: float, tolerance: float, shift: float) -> None:
    if margin >= diameter / 2 + tolerance + shift:
        check_margin(margin, diameter, tolerance, shift)
    else:
        with pytest.raises(GridError, match=f"margin={margin} cuts objects"):
            check_margin(margin, diameter, tolerance, shift)
