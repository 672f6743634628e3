"""PatchStore: the patches of a slide in one Zarr group on disk, block by block.

    patches   uint8   (rows, cols, tile, tile, 3)   one chunk a patch, one shard a block, else white
    lost      float32 (rows, cols)                  share of the tile's core that could not be decoded
    done      bool    (block rows, block cols)      one chunk a block, written last

`rows` and `cols` are padded to whole blocks. The group's attributes hold the configuration's digest and the
grid. Different blocks touch different files, so processes may write them at the same time.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from slides.errors import GridError, StoreMismatch
from slides.geometry import Frame, Size
from slides.grid import Tile, TileGrid, read_box
from slides.slide import Slide

_WHITE = 255

# H&E compresses only 1.2-1.3 times; higher levels cost seconds and save nothing.
_COMPRESSION = 1


class PatchStore:
    """Blocks of patches, each written in one go. Made by `PatchStore.create`.

    Law: a block that `is_done` reads back as it was written, whenever a process was killed.
    """

    def __init__(self, path: Path, grid: TileGrid, group: zarr.Group) -> None:
        self.path = path
        self.grid = grid
        self._patches: zarr.Array[Any] = _array(group, "patches")
        self._lost: zarr.Array[Any] = _array(group, "lost")
        self._done: zarr.Array[Any] = _array(group, "done")

    @classmethod
    def create(cls, path: Path, grid: TileGrid, digest: str) -> "PatchStore":
        """The store at `path`, made if there is none yet; safe in several processes at once.

        digest: identifies the configuration that decides the pixels.
        Raises StoreMismatch where the store on disk has another digest or another grid.
        """
        path = Path(path)
        identity = {"digest": digest, "grid": _as_json(grid)}
        if not path.exists():
            _make(path, grid, identity)
        try:
            group = zarr.open_group(path, mode="r+")
        except (FileNotFoundError, ValueError) as error:
            raise StoreMismatch(f"{path} is not a patch store: remove it or choose another folder") from error
        found = {name: group.attrs.get(name) for name in identity}
        for name, wanted in identity.items():
            if found[name] != wanted:
                raise StoreMismatch(
                    f"{path} was made with {name} {found[name]}, this run has {wanted}: "
                    f"go on with the old configuration, or remove the store"
                )
        return cls(path, grid, group)

    def is_done(self, block: int) -> bool:
        """Whether the block has been written, whole."""
        return bool(np.asarray(self._done[self.grid.block_place(block)]))

    def write(self, block: int, tiles: tuple[Tile, ...], patches: NDArray[np.uint8], lost: NDArray[np.float32]) -> None:
        """Store the patches of a block: of all its tiles or of some; the others become white. Safe to repeat.

        patches: uint8 (n, tile, tile, 3); lost: float32 (n,); both in the order of `tiles`.
        """
        rows, cols = self._within(block, tiles)
        side, tile = self.grid.block, self.grid.tile
        all_patches = np.full((side, side, tile, tile, 3), _WHITE, np.uint8)
        all_lost = np.zeros((side, side), np.float32)
        all_patches[rows, cols] = patches
        all_lost[rows, cols] = lost
        # Not done while the shard changes; the flag comes back last. Zarr would read an old shard: it goes.
        self.discard(block)
        self._patches[self._place(block)] = all_patches
        self._lost[self._place(block)] = all_lost
        self._done[self.grid.block_place(block)] = True

    def read(self, block: int, tiles: tuple[Tile, ...]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Patches of some tiles of a block, uint8 (n, tile, tile, 3), and their lost shares, float32 (n,)."""
        rows, cols = self._within(block, tiles)
        patches = np.asarray(self._patches[self._place(block)])
        lost = np.asarray(self._lost[self._place(block)])
        return patches[rows, cols], lost[rows, cols]

    def discard(self, block: int) -> None:
        """Delete the block's patches, so that the store stays small. The block is not done any more."""
        block_row, block_col = self.grid.block_place(block)
        self._done[block_row, block_col] = False
        shard = self._patches.metadata.encode_chunk_key((block_row, block_col, 0, 0, 0))
        (self.path / "patches" / shard).unlink(missing_ok=True)

    def _place(self, block: int) -> tuple[slice, slice]:
        """Index of a block in `patches` and `lost`."""
        row, col = (part * self.grid.block for part in self.grid.block_place(block))
        return slice(row, row + self.grid.block), slice(col, col + self.grid.block)

    def _within(self, block: int, tiles: tuple[Tile, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of tiles inside their block. Raises GridError for a tile of another block."""
        for tile in tiles:
            if self.grid.block_of(tile.row, tile.col) != block:
                raise GridError(f"tile ({tile.row}, {tile.col}) is not in block {block}: one block at a time")
        places = np.array([(tile.row, tile.col) for tile in tiles], np.intp).reshape(-1, 2)
        rows, cols = (places % self.grid.block).T
        return rows, cols


def cut(
    slide: Slide, tiles: tuple[Tile, ...], grid: TileGrid, frame: Frame
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The patches of some tiles (all of one block, say), from one reading of the region that holds them.

    frame: the work frame, which `grid` covers.
    Returns uint8 (n, tile, tile, 3), white outside the slide and where it cannot be decoded; and float32
    (n,), the share of each core that cannot.
    """
    patches = np.full((len(tiles), grid.tile, grid.tile, 3), _WHITE, np.uint8)
    shares = np.zeros(len(tiles), np.float32)
    if not tiles:
        return patches, shares
    region = read_box(tiles)
    corner = (region.x0, region.y0)
    pixels, lost = slide.read_decodable(region, frame)
    for i, tile in enumerate(tiles):
        patches[i] = pixels[tile.read.within(corner)]
        shares[i] = lost[tile.core.within(corner)].mean()
    return patches, shares


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise StoreMismatch(f"{group.store_path} has no array {name}: remove the store")
    return array


def _make(path: Path, grid: TileGrid, identity: dict[str, Any]) -> None:
    """Write an empty store beside `path` and rename it, so that a store that exists is complete."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(beside, zarr_format=3, attributes=identity)
    down, across = grid.block_shape
    rows, cols, tile = down * grid.block, across * grid.block, grid.tile
    group.create_array(
        "patches",
        shape=(rows, cols, tile, tile, 3),
        chunks=(1, 1, tile, tile, 3),
        shards=(grid.block, grid.block, tile, tile, 3),
        dtype=np.uint8,
        fill_value=_WHITE,
        compressors=ZstdCodec(level=_COMPRESSION),
        dimension_names=("row", "col", "y", "x", "channel"),
    )
    group.create_array("lost", shape=(rows, cols), chunks=(grid.block, grid.block), dtype=np.float32, fill_value=0.0)
    group.create_array("done", shape=(down, across), chunks=(1, 1), dtype=np.bool_, fill_value=False)
    try:
        beside.rename(path)
    except OSError:
        # Another process was first; its store is as good.
        shutil.rmtree(beside)
        if not path.exists():
            raise


def _as_json(grid: TileGrid) -> dict[str, int]:
    """The grid as it stands in the attributes."""
    numbers = dataclasses.asdict(grid)
    size = Size(*numbers.pop("size"))
    return {"width": size.width, "height": size.height, **numbers}
