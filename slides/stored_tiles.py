"""The JPEG tiles of a TIFF level, decoded without OpenSlide: the same pixels in a fifth of its time.

OpenSlide paints every tile into a region of 32 bits a pixel, which is then taken apart again; that takes longer than
the decoding. Here the bytes of a tile go to libjpeg-turbo, and its RGB into the region.

Only what is simple is read here: tiles of a regular grid, each a whole JPEG of three channels. Everything else, what is
missing or damaged too, is left to OpenSlide.
"""

import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from slides.geometry import Box, Size, cells

Pixels = NDArray[np.uint8]

# OpenSlide's names of formats whose levels are such grids, at the places at which OpenSlide shows them.
VENDORS = frozenset(("aperio", "generic-tiff", "philips"))

# Decoded tiles that a process keeps, bytes: a few rows of those in a block's region, which is read piece by piece.
_CACHE_BYTES = 2**25

# Pixels and bytes of one tile: larger ones are left to OpenSlide.
_LARGEST_TILE_PX = 2**22
_LARGEST_TILE_BYTES = 2**24

# Smaller versions of a picture that are looked at: pyramids halve, so 16 of them end at a pixel.
_MOST_VERSIONS = 16

_JPEG, _RGB, _YCBCR = 7, 2, 6  # values of the tags Compression and PhotometricInterpretation
_COLOURS = {_RGB: "RGB", _YCBCR: "YCbCr"}  # simplejpeg's names

_numbers = itertools.count()

# tifffile reports oddities of a file as log messages; OpenSlide has opened that file, so they do not matter.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class StoredTiles:
    """The tiles of one level; `size` and `tile` in level px. Made by `StoredTiles.find`; safe to share between threads.

    Law: what `read` fills in is what OpenSlide gives for the same pixels, bit for bit. `StoredPixels` compares some
    tiles before it relies on that.
    """

    def __init__(self, path: Path, size: Size, page: tifffile.TiffPage) -> None:
        self.size = size
        self.tile = Size(page.tilewidth, page.tilelength)
        self._across = -(-size.width // self.tile.width)
        self._offsets = np.asarray(page.dataoffsets, np.int64)
        self._lengths = np.asarray(page.databytecounts, np.int64)
        self._colours = _COLOURS[page.photometric]
        self._head = _head(page.photometric == _YCBCR, page.jpegtables)
        self._path = path
        self._number = next(_numbers)

    @classmethod
    def find(cls, path: Path, size: Size, tile: Size) -> Self | None:
        """The tiles of the level of that size, stored in such tiles, of the TIFF at `path`; None where it has none.

        None, too, where several levels of the file have that size, as of several focal planes, however they are stored:
        only OpenSlide knows which it shows. And where an earlier level lacks tiles: OpenSlide then shows parts of an
        Aperio slide's next levels from the earlier one, though their tiles are there.
        """
        try:
            with tifffile.TiffFile(path) as file:
                levels = [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
                alike = [i for i, page in enumerate(levels) if (page.imagewidth, page.imagelength) == size]
                if len(alike) != 1 or any(0 in page.databytecounts for page in levels[: alike[0]]):
                    return None
                page = levels[alike[0]]
                return cls(path, size, page) if _is_readable(page, size, tile) else None
        except Exception:  # whatever tifffile makes of a strange directory: OpenSlide has its own reader
            return None

    @classmethod
    def smaller_versions(cls, path: Path, size: Size) -> tuple[Self, ...]:
        """The smaller versions of the TIFF's first picture, of that size, that its directory refers to; largest first.

        OME-TIFF keeps its pyramid in these (the tag SubIFDs), and OpenSlide passes them over. Those that are not read
        here are left out.
        """
        try:
            with tifffile.TiffFile(path) as file:
                found = []
                for page in itertools.islice(file.pages.first.pages or (), _MOST_VERSIONS):
                    if not isinstance(page, tifffile.TiffPage) or not page.is_tiled:
                        continue
                    own, tile = Size(page.imagewidth, page.imagelength), Size(page.tilewidth, page.tilelength)
                    smaller = 0 < own.width < size.width and 0 < own.height < size.height
                    if smaller and _is_readable(page, own, tile):
                        found.append(cls(path, own, page))
        except Exception:  # as in `find`
            return ()
        return tuple(sorted(found, key=lambda version: version.size, reverse=True))

    def boxes(self, most: int) -> Iterator[Box]:
        """Where some of the tiles lie, spread over the level, as are the first four: the box of each, level px."""
        spread = np.linspace(0, len(self._offsets) - 1, most + 2).round().astype(int)[1:-1].tolist()
        step = -(-most // 4)
        for index in dict.fromkeys(index for start in range(step) for index in spread[start::step]):
            yield self._box(index)

    def read(self, box: Box, pixels: Pixels) -> list[Box]:
        """Fill `pixels`, uint8 (h, w, 3), with those of `box` (level px, inside the level), RGB.

        Returns the parts of the box that OpenSlide must read. The file is not kept open, nor is it by OpenSlide: so
        any number of slides can be open.
        """
        try:
            with self._path.open("rb", buffering=0) as file:
                return self._read(file, box, pixels)
        except OSError:  # whatever is wrong with the file: OpenSlide says it
            return [cell.intersect(box) for cell in cells(box, self.tile, lattice=True)]

    def _read(self, file: FileIO, box: Box, pixels: Pixels) -> list[Box]:
        """As `read`, from the open file, which no other thread has."""
        left = []
        recent, room = _recent(os.getpid()), np.empty((self.tile.height, self.tile.width, 3), np.uint8)
        for cell in cells(box, self.tile, lattice=True):
            index = cell.y0 // self.tile.height * self._across + cell.x0 // self.tile.width
            part = cell.intersect(box)
            tile = recent.get((self._number, index))
            if tile is None:
                # Nobody needs what lies inside the box again soon; at its edge the neighbours do.
                inside = part == cell
                tile = self._decode(file, index, room if inside else np.empty_like(room))
                if tile is None:
                    left.append(part)
                    continue
                if not inside:
                    recent.put((self._number, index), tile)
            pixels[part.within(box.corner)] = tile[part.within(cell.corner)]
        return left

    def _box(self, index: int) -> Box:
        row, col = divmod(index, self._across)
        width, height = self.tile
        return Box(col * width, row * height, (col + 1) * width, (row + 1) * height).intersect(Box(0, 0, *self.size))

    def _decode(self, file: FileIO, index: int, room: Pixels) -> Pixels | None:
        """A whole tile, decoded into `room`, uint8 (tile height, tile width, 3); None where that cannot be done."""
        offset, length = int(self._offsets[index]), int(self._lengths[index])
        if not (offset > 0 and 4 <= length <= _LARGEST_TILE_BYTES):
            return None
        file.seek(offset)  # `os.pread` is missing on Windows
        data = file.read(length)
        if len(data) < length or data[:2] != b"\xff\xd8":
            return None
        data = self._head + data[2:]
        try:
            # A damaged header may state any size, which would be allocated. A tile's own markers may state other
            # colours than the level's directory, which is what OpenSlide goes by.
            if simplejpeg.decode_jpeg_header(data)[:3] != (self.tile.height, self.tile.width, self._colours):
                return None
            simplejpeg.decode_jpeg(data, buffer=room)
        except ValueError:  # of libjpeg-turbo; its warnings count as errors, as they do in OpenSlide
            return None
        return room


class _Recent:
    """Decoded tiles, those last used, of at most so many bytes. Safe to share between threads."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._tiles: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> Pixels | None:
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: tuple[int, int], tile: Pixels) -> None:
        with self._lock:
            if key not in self._tiles:  # another thread may have decoded it meanwhile
                self._tiles[key] = tile
                self._bytes += tile.nbytes
            while self._bytes > self._most_bytes:
                self._bytes -= self._tiles.popitem(last=False)[1].nbytes


@cache
def _recent(_pid: int) -> _Recent:
    """Of all slides that a process has open. A forked process has its own, as another thread may hold the lock."""
    return _Recent(_CACHE_BYTES)


def _is_readable(page: tifffile.TiffPage, size: Size, tile: Size) -> bool:
    """Whether the tiles of a directory of the TIFF, a level of that size, are of that size and are read here."""
    tiles = -(-size.width // tile.width) * -(-size.height // tile.height)
    return (
        (page.tilewidth, page.tilelength) == tile
        and tile.width * tile.height <= _LARGEST_TILE_PX
        and page.compression == _JPEG
        and page.photometric in _COLOURS
        and (page.samplesperpixel, page.bitspersample, page.planarconfig) == (3, 8, 1)
        and len(page.dataoffsets) == len(page.databytecounts) == tiles
        and _holds_only_tables(page.jpegtables)
    )


def _holds_only_tables(stream: bytes | None) -> bool:
    """Whether an abbreviated JPEG stream, if there is one, holds quantisation and Huffman tables and nothing else.

    A restart interval in it would be in force for the tiles, but OpenSlide's decoder forgets it where a tile starts.
    """
    if stream is None:
        return True
    at = 2
    while stream[at : at + 2] in (b"\xff\xdb", b"\xff\xc4"):
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return stream[:2] == b"\xff\xd8" and stream[at:] == b"\xff\xd9"


def _head(ycbcr: bool, tables: bytes | None) -> bytes:
    """What a tile's stream starts with: Adobe's marker, which says how colours are stored, and the level's tables.

    TIFF Technical Note 2: the tables are an abbreviated JPEG stream, whose markers belong before those of a tile.
    """
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([ycbcr])
    return b"\xff\xd8" + adobe + (tables[2:-2] if tables else b"")
