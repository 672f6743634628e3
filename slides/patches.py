"""PatchStore: the patches of a slide in one Zarr group on disk, block by block.

    patches   uint8   (rows, cols, tile, tile, 3)        one chunk a patch, one shard a block, else white
    lost      float32 (rows, cols)                       share of the tile's core that could not be decoded
    done      uint8   (block rows, block cols, 40)       one chunk a block, written last: size and checksum of the rest

`rows` and `cols` are padded to whole blocks. The group's attributes hold the configuration's digest and the
grid. Any Zarr v3 reader reads it. This module reads and writes whole files, each in one go, and has Zarr encode and
decode them in memory: the bytes that are checked are those that are decoded, even if another process writes.

Nothing here is synced to the disk. After a power cut or a disk fault a block may not match its checksum; it then
counts as never written, and is made again from the slide.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from slides.errors import GridError, StoreMismatch
from slides.geometry import Frame, Size
from slides.grid import Tile, TileGrid, read_box
from slides.partial import partial_path
from slides.slide import Slide

_WHITE = 255

# H&E compresses only 1.2-1.3 times; higher levels cost seconds and save nothing.
_COMPRESSION = 1

# A block's entry in `done`: bytes of its shard; sha256 of the store's metadata, the shard and the lost shares.
_MARK = struct.Struct("<Q32s")


class _Files(NamedTuple):
    """A block's files, encoded; empty where Zarr leaves none, because all values are the fill value."""

    shard: bytes
    lost: bytes


class _Names(NamedTuple):
    """A block's files, relative to the store."""

    shard: str
    lost: str
    mark: str


def _names(row: int, col: int) -> _Names:
    """Zarr's names for the files of the block in this row and column of blocks."""
    return _Names(f"patches/c/{row}/{col}/0/0/0", f"lost/c/{row}/{col}", f"done/c/{row}/{col}/0")


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
            if _content(path / name) != content:
                store._replace(name, content)
        return store

    def is_done(self, block: int) -> bool:
        """Whether the block has been written and is whole. Reads all of it."""
        return self._files(block) is not None

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
        files = _encode(self.grid, all_patches, all_lost)
        names = _names(*self.grid.block_place(block))
        self._replace(names.shard, files.shard)
        self._replace(names.lost, files.lost)
        self._replace(names.mark, self._mark(files))

    def read(self, block: int, tiles: tuple[Tile, ...]) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """Patches of some tiles of a block, uint8 (n, tile, tile, 3), and their lost shares, float32 (n,).

        None where the block is not done: never written, discarded, damaged, or just being replaced.
        """
        rows, cols = self._within(block, tiles)
        files = self._files(block)
        if files is None:
            return None
        patches, lost = _decode(self.grid, files)
        return patches[rows, cols], lost[rows, cols]

    def discard(self, block: int) -> None:
        """Delete the block's patches, so that the store stays small. The block is not done any more."""
        names = _names(*self.grid.block_place(block))
        for name in (names.mark, names.shard, names.lost):
            (self.path / name).unlink(missing_ok=True)

    def _files(self, block: int) -> _Files | None:
        """The block's files, if they match its entry in `done`; else None."""
        names = _names(*self.grid.block_place(block))
        mark = _content(self.path / names.mark)
        if len(mark) != _MARK.size:
            return None
        files = _Files(_content(self.path / names.shard), _content(self.path / names.lost))
        return files if self._mark(files) == mark else None

    def _mark(self, files: _Files) -> bytes:
        """The entry in `done` of a block with these files."""
        digest = hashlib.sha256(self._metadata_hash)
        digest.update(files.shard)
        digest.update(files.lost)
        return _MARK.pack(len(files.shard), digest.digest())

    def _replace(self, name: str, content: bytes) -> None:
        """Make `content` the file of that name in one rename: a reader gets the old bytes or the new.

        It is written beside the store first (`partial_path`).
        """
        file = self.path / name
        if not content:
            file.unlink(missing_ok=True)
            return
        partial = partial_path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, file)
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


def _content(file: Path) -> bytes:
    """All bytes of a file; none where it is missing, or the disk does not give them."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _make_arrays(files: dict[str, Buffer], grid: TileGrid, attributes: dict[str, Any], shape: tuple[int, int]) -> Any:
    """A store of `shape` blocks (down, across) in memory; its files are stored in `files`. Returns the Zarr group."""
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=attributes)
    down, across = shape
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
    group.create_array(
        "done", shape=(*shape, _MARK.size), chunks=(1, 1, _MARK.size), dtype=np.uint8, fill_value=0, compressors=None
    )
    return group


def _encode(grid: TileGrid, patches: NDArray[np.uint8], lost: NDArray[np.float32]) -> _Files:
    """uint8 (block, block, tile, tile, 3) and float32 (block, block) -> a block's files."""
    files: dict[str, Buffer] = {}
    group = _make_arrays(files, grid, {}, (1, 1))
    group["patches"][...] = patches
    group["lost"][...] = lost
    names = _names(0, 0)
    return _Files(*(files[name].to_bytes() if name in files else b"" for name in (names.shard, names.lost)))


def _decode(grid: TileGrid, content: _Files) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Undo `_encode`."""
    files: dict[str, Buffer] = {}
    group = _make_arrays(files, grid, {}, (1, 1))
    for name, encoded in zip(_names(0, 0), content, strict=False):
        if encoded:
            files[name] = cpu.Buffer.from_bytes(encoded)
    return np.asarray(group["patches"][...]), np.asarray(group["lost"][...])


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
        attributes = json.loads(_content(path / "zarr.json"))["attributes"]
        identity = {name: attributes[name] for name in ("digest", "grid")}
        return identity if attributes["sha256"] == _checksum(identity) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checksum(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
