"""PatchStore: the patches of a slide in one Zarr group on disk, block by block.

    regions   uint8   (block rows, block cols, side, side, 3)   one chunk a block: what its tiles read, else white
    lost      float32 (rows, cols)                              share of the tile's core that could not be decoded
    done      uint8   (block rows, block cols, 40)              written last: size and checksum of the rest of a block

`rows` and `cols` are padded to whole blocks. Patches are windows of their block's region, as those of neighbours share
their margins: copies of their own would hold a third more. The group's attributes hold the configuration's digest and
the grid. Any Zarr v3 reader reads it. Nothing is compressed, so a file holds the bytes of an array: this module
writes and reads them in one go, and what is checked is what is used, even if another process writes.

Nothing here is synced to the disk. After a power cut or a disk fault a block may not match its checksum; it then
counts as never written, and is made again from the slide.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from slides.errors import GridError, StoreMismatch
from slides.geometry import Frame, Size
from slides.grid import Tile, TileGrid, read_box
from slides.partial import partial_path, replace
from slides.slide import Slide
from slides.stored import Pixels

_WHITE = 255

# A block's entry in `done`: bytes of its region; sha256 of the store's metadata, the region's CRC-32 and the lost
# shares. A sha256 of the region would take longer than writing it.
_MARK = struct.Struct("<Q32s")
_LARGEST_METADATA = 2**20  # bytes; ours has a few kB

Shares = NDArray[np.float32]


class _Files(NamedTuple):
    """What a block's files hold, as bytes; nothing where there is none, because all values are the fill value."""

    region: Pixels  # uint8 (side * side * 3,) or (0,)
    lost: Pixels  # uint8, of little-endian float32 (block * block,) or (0,)


class _Names(NamedTuple):
    """A block's files, relative to the store."""

    region: str
    lost: str
    mark: str


def _names(row: int, col: int) -> _Names:
    """Zarr's names for the files of the block in this row and column of blocks."""
    return _Names(f"regions/c/{row}/{col}/0/0/0", f"lost/c/{row}/{col}", f"done/c/{row}/{col}/0")


class PatchStore:
    """Blocks of patches, each written in one go. Made by `PatchStore.create`.

    Laws: a block reads back as it was written, or not at all, whenever a process or the machine was stopped, however
    the files are damaged, and however many processes write the block at the same time. Different blocks touch
    different files.
    """

    def __init__(self, path: Path, grid: TileGrid, digest: str) -> None:
        self.path = path
        self.grid = grid
        # The metadata name the configuration and the codecs: what was encoded otherwise does not count as done.
        self._metadata_hash = hashlib.sha256(b"".join(_metadata(grid, digest).values())).digest()

    @classmethod
    def create(cls, path: Path, grid: TileGrid, digest: str) -> "PatchStore":
        """The store at `path`, made if there is none yet; safe in several processes at once.

        digest: identifies the configuration that decides the pixels.
        Metadata that are damaged or missing are written again; blocks of another configuration never read as done.
        Raises StoreMismatch where the store on disk has another digest or another grid.
        """
        path = Path(path)
        stated = _stated_identity(path)
        for name, wanted in _identity(grid, digest).items():
            if stated and stated[name] != wanted:
                raise StoreMismatch(
                    f"{path} was made with {name} {stated[name]}, this run has {wanted}: "
                    f"continue with the old configuration, or remove the store"
                )
        store = cls(path, grid, digest)
        for name, content in _metadata(grid, digest).items():
            if _content(path / name, len(content)).tobytes() != content:
                store._replace(name, np.frombuffer(content, np.uint8))
        return store

    def is_done(self, block: int) -> bool:
        """Whether the block has been written and is whole. Reads all of it."""
        return self._files(block) is not None

    def write(self, block: int, tiles: tuple[Tile, ...], region: Pixels, lost: Shares) -> None:
        """Store what `cut` returned for some tiles of a block, or all. Safe to repeat.

        region: uint8 (side, side, 3), white where none of them reads; lost: float32 (n,), in the order of `tiles`.
        """
        rows, cols = self._within(block, tiles)
        all_lost = np.zeros((self.grid.block, self.grid.block), "<f4")
        all_lost[rows, cols] = lost
        files = _Files(_stored(region, _WHITE), _stored(all_lost, 0))
        names = _names(*self.grid.block_place(block))
        self._replace(names.region, files.region)
        self._replace(names.lost, files.lost)
        self._replace(names.mark, np.frombuffer(self._mark(files), np.uint8))

    def read(self, block: int, tiles: tuple[Tile, ...]) -> tuple[list[Pixels], Shares] | None:
        """Patches of some tiles of a block, each uint8 (tile, tile, 3), and their lost shares, float32 (n,).

        The patches are windows of one array: whoever changes a pixel changes it in the neighbours.
        None where the block is not done: never written, discarded, damaged, or just being replaced.
        """
        rows, cols = self._within(block, tiles)
        files = self._files(block)
        if files is None:
            return None
        side, grid = block_side(self.grid), self.grid
        region = files.region if files.region.size else np.full(side * side * 3, _WHITE, np.uint8)
        lost = files.lost if files.lost.size else np.zeros(grid.block * grid.block * 4, np.uint8)
        region, shares = region.reshape(side, side, 3), lost.view("<f4").reshape(grid.block, grid.block)
        return self.windows(block, tiles, region), shares[rows, cols]

    def windows(self, block: int, tiles: tuple[Tile, ...], region: Pixels) -> list[Pixels]:
        """The patches of some tiles of a block, each uint8 (tile, tile, 3), as windows of its region."""
        rows, cols = self._within(block, tiles)
        stride, tile = self.grid.stride, self.grid.tile
        corners = zip((rows * stride).tolist(), (cols * stride).tolist(), strict=True)
        return [region[y : y + tile, x : x + tile] for y, x in corners]

    def discard(self, block: int) -> None:
        """Delete the block's patches, so that the store stays small. The block is not done any more."""
        names = _names(*self.grid.block_place(block))
        for name in (names.mark, names.region, names.lost):
            _remove(self.path / name)

    def _files(self, block: int) -> _Files | None:
        """The block's files, if they match its entry in `done`; else None."""
        names = _names(*self.grid.block_place(block))
        mark = _content(self.path / names.mark, _MARK.size).tobytes()
        if len(mark) != _MARK.size:
            return None
        region_bytes, lost_bytes = _MARK.unpack(mark)[0], self.grid.block**2 * 4
        if region_bytes not in (0, block_side(self.grid) ** 2 * 3):
            return None
        files = _Files(_content(self.path / names.region, region_bytes), _content(self.path / names.lost, lost_bytes))
        return files if self._mark(files) == mark else None

    def _mark(self, files: _Files) -> bytes:
        """The entry in `done` of a block with these files."""
        digest = hashlib.sha256(self._metadata_hash)
        digest.update(zlib.crc32(files.region.data).to_bytes(4, "little"))
        digest.update(files.lost.data)
        return _MARK.pack(files.region.size, digest.digest())

    def _replace(self, name: str, content: Pixels) -> None:
        """Make `content` the file of that name in one rename: a reader gets the old bytes or the new.

        It is written beside the store first (`partial_path`).
        """
        file = self.path / name
        if not content.size:
            _remove(file)
            return
        partial = partial_path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content.data)
            if file.is_dir():
                _remove(file)
            replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def _within(self, block: int, tiles: tuple[Tile, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of tiles inside their block. Raises GridError for a tile of another block."""
        for tile in tiles:
            if self.grid.block_of(tile.row, tile.col) != block:
                raise GridError(f"tile ({tile.row}, {tile.col}) is not in block {block}: one block at a time")
        places = np.array([(tile.row, tile.col) for tile in tiles], np.intp).reshape(-1, 2)
        rows, cols = (places % self.grid.block).T
        return rows, cols


def block_side(grid: TileGrid) -> int:
    """Side of the region that the tiles of a whole block read, work px."""
    return grid.block * grid.stride + 2 * grid.margin


def cut(slide: Slide, tiles: tuple[Tile, ...], grid: TileGrid, frame: Frame) -> tuple[Pixels, Shares]:
    """What some tiles of one block read, from one reading of the slide.

    frame: the work frame, which `grid` covers.
    Returns uint8 (side, side, 3), the block's region: white outside the slide, where it cannot be decoded, and where
    none of the tiles is near; and float32 (n,), the share of each core that cannot be decoded.
    """
    side, shares = block_side(grid), np.zeros(len(tiles), np.float32)
    if not tiles:
        return np.full((side, side, 3), _WHITE, np.uint8), shares
    needed = read_box(tiles)
    pixels, lost = slide.read_decodable(needed, frame)
    if lost.any():
        shares[:] = [lost[tile.core.within(needed.corner)].mean() for tile in tiles]
    if needed.size == (side, side):
        return pixels, shares
    region = np.full((side, side, 3), _WHITE, np.uint8)
    first = tiles[0]
    block_x, block_y = (place % grid.block * grid.stride for place in (first.col, first.row))
    region[needed.within((first.read.x0 - block_x, first.read.y0 - block_y))] = pixels
    return region, shares


def _stored(array: NDArray[Any], fill: int) -> Pixels:
    """The bytes of an array, not copied where they are in order; none where all values are `fill`."""
    if (array == fill).all():
        return np.zeros(0, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _content(file: Path, most: int) -> Pixels:
    """All bytes of a file, in a new array; none where it is missing, has more than `most`, or the disk gives none.

    A damaged file may be of any size.
    """
    try:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            content = np.empty(size if size <= most else 0, np.uint8)
            filled = 0
            while filled < content.size and (count := stream.readinto(content[filled:].data)):
                filled += count
            return content[:filled]
    except OSError:
        return np.zeros(0, np.uint8)


def _remove(file: Path) -> None:
    """Remove a file, there or not, or what a damaged disk has in its place: a folder."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        if not file.is_dir():
            raise
        shutil.rmtree(file)


def _make_arrays(files: dict[str, Buffer], grid: TileGrid, attributes: dict[str, Any], shape: tuple[int, int]) -> None:
    """The metadata of a store of `shape` blocks (down, across), stored in `files`."""
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    (down, across), block, side = shape, grid.block, block_side(grid)
    group.create_array(
        "regions",
        shape=(down, across, side, side, 3),
        chunks=(1, 1, side, side, 3),
        dtype=np.uint8,
        fill_value=_WHITE,
        compressors=None,
        dimension_names=("block_row", "block_col", "y", "x", "channel"),
    )
    group.create_array(
        "lost",
        shape=(down * block, across * block),
        chunks=(block, block),
        dtype="<f4",
        fill_value=0.0,
        compressors=None,
    )
    group.create_array(
        "done", shape=(*shape, _MARK.size), chunks=(1, 1, _MARK.size), dtype=np.uint8, fill_value=0, compressors=None
    )


@functools.lru_cache(maxsize=8)
def _metadata(grid: TileGrid, digest: str) -> dict[str, bytes]:
    """The files of a store without blocks, by their names."""
    files: dict[str, Buffer] = {}
    identity = _identity(grid, digest)
    _make_arrays(files, grid, {**identity, "sha256": _checksum(identity)}, grid.block_shape)
    return {name: content.to_bytes() for name, content in files.items()}


def _identity(grid: TileGrid, digest: str) -> dict[str, Any]:
    """What decides a store's patches, as its attributes record it."""
    numbers = dataclasses.asdict(grid)
    size = Size(*numbers.pop("size"))
    return {"digest": digest, "grid": {"width": size.width, "height": size.height, **numbers}}


def _stated_identity(path: Path) -> dict[str, Any] | None:
    """The identity that the store on disk records; None where there is no store, or its attributes are damaged."""
    try:
        attributes = json.loads(_content(path / "zarr.json", _LARGEST_METADATA).tobytes())["attributes"]
        identity = {name: attributes[name] for name in ("digest", "grid")}
        return identity if attributes["sha256"] == _checksum(identity) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checksum(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
