"""The pixels that a slide's file holds, level by level, whichever library decodes them."""

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide
from numpy.typing import NDArray

from slides.errors import RegionUnreadable
from slides.geometry import Box, Size, cells
from slides.opening import Picture, check_levels, check_samples, on_white, open_handle, stated_tile
from slides.stored_tiles import VENDORS, StoredTiles

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# Side of the region that OpenSlide reads in one call, level px: it bounds the memory and changes no pixel.
CHUNK = 2048

# Side of the cells in which a damaged region is decoded, level px, where the slide does not state its tiles.
_USUAL_TILE = 256

# Stored tiles that must be what OpenSlide gives before a level is read without it, and how many are tried for that.
_ENOUGH_ALIKE, _MOST_COMPARED = 4, 49

_WHITE = 255


class Level(NamedTuple):
    """One level of the pyramid: its size, level px, and level-0 px per level px as OpenSlide counts them."""

    size: Size
    downsample: float


class StoredPixels:
    """The levels of a slide's file and their pixels. Safe to share between threads and with forked children.

    properties (OpenSlide's), vendor (`image` for a plain picture), levels: OpenSlide's, then those that it passes over.
    OpenSlide's handles are not shared: each thread of each process has its own, opened on first use.
    Raises SlideNotFound, SlideUnreadable, SlideUnsupported, SlideTooLarge.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: dict[tuple[int, int], openslide.OpenSlide | Picture] = {}
        self._tiles: dict[int, StoredTiles | None] = {}
        handle = self._handle()
        self.properties: Mapping[str, str] = dict(handle.properties)  # the handle may be dropped later
        self.vendor = self.properties.get("openslide.vendor", "image")
        self.levels = tuple(
            Level(Size(*size), downsample)
            for size, downsample in zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        )
        check_samples(path, self.properties)
        check_levels(path, self.properties, [level.size for level in self.levels])
        self._tile_sizes = tuple(_tile_size(self.properties, level) for level in range(len(self.levels)))
        self._passed_over: dict[int, StoredTiles] = {}
        for tiles in self._find_passed_over():
            self._passed_over[len(self.levels)] = tiles
            self.levels += (Level(tiles.size, self.levels[0].size.width / tiles.size.width),)
            self._tile_sizes += (tiles.tile,)

    def close(self) -> None:
        """Close this process's handles, which no other thread may be using. Reading again opens new ones."""
        for key in [key for key in self._handles if key[0] == os.getpid()]:
            self._handles.pop(key).close()
        self._tiles.clear()

    def read(self, level: int, box: Box, *, strict: bool) -> tuple[Pixels, Mask]:
        """The pixels of `box` (px of the level, inside it), on white: uint8 (h, w, 3), and bool (h, w): lost.

        Each pixel is the same whichever box it is read in. OpenSlide is asked for a corner in level-0 px;
        where the downsample is fractional, that corner falls between level pixels and the region is shifted
        by a part of a pixel. There every read starts at a corner of a fixed lattice.
        strict: raises RegionUnreadable; else what cannot be decoded is white and lost.
        """
        pixels = np.empty((box.height, box.width, 3), np.uint8)
        lost = np.zeros((box.height, box.width), np.bool_)
        whole, tiles = self._is_whole(level), self._stored_tiles(level)
        parts: Iterable[Box]
        if tiles is not None:
            parts = tiles.read(box, pixels)
        else:
            side = self._chunk_sides(level) if whole else (CHUNK, CHUNK)
            parts = (cell.intersect(box) for cell in cells(box, side, lattice=True))
        for part in parts:
            x, y = part.corner if whole else (part.x0 // CHUNK * CHUNK, part.y0 // CHUNK * CHUNK)
            place = part.within(box.corner)
            try:
                pixels[place] = self._from_openslide(level, Box(x, y, part.x1, part.y1))[part.within((x, y))]
            except RegionUnreadable:
                if strict:
                    raise
                pixels[place], lost[place] = self._tile_by_tile(level, part)
        return pixels, lost

    def region(self, level: int, box: Box) -> Pixels:
        """As `read` with strict: uint8 (h, w, 3). Where OpenSlide reads the level it is asked once, for just this box.

        So pixels of a level with a fractional downsample may differ by a part of a pixel.
        """
        if self._stored_tiles(level) is None:
            return self._from_openslide(level, box)
        return self.read(level, box, strict=True)[0]

    def _is_whole(self, level: int) -> bool:
        """Whether level-0 px per level px is a whole number."""
        return float(self.levels[level].downsample).is_integer()

    def _chunk_sides(self, level: int) -> tuple[int, int]:
        """Sides of a chunk of whole stored tiles: none is then decoded for two chunks."""
        width, height = self._tile_sizes[level]
        return CHUNK // width * width, CHUNK // height * height

    def _tile_by_tile(self, level: int, box: Box) -> tuple[Pixels, Mask]:
        """What OpenSlide can decode of a damaged region, one stored tile at a time; as `read`."""
        pixels, lost = blank(box)
        for tile in cells(box, self._tile_sizes[level], lattice=True):
            part = tile.intersect(box)
            place = part.within(box.corner)
            try:
                pixels[place] = self._from_openslide(level, part)
            except RegionUnreadable:
                lost[place] = True
        return pixels, lost

    def _stored_tiles(self, level: int) -> StoredTiles | None:
        """The tiles of a level, if they can be decoded without OpenSlide."""
        if level in self._passed_over:
            return self._passed_over[level]
        if level not in self._tiles:
            self._tiles[level] = self._find_stored_tiles(level)
        return self._tiles.get(level)

    def _find_passed_over(self) -> tuple[StoredTiles, ...]:
        """The levels of an OME-TIFF that OpenSlide passes over, where the first can be decoded without it, too."""
        if self.vendor != "generic-tiff" or len(self.levels) > 1:
            return ()
        smaller = StoredTiles.smaller_versions(self.path, self.levels[0].size)
        return smaller if smaller and self._stored_tiles(0) else ()

    def _find_stored_tiles(self, level: int) -> StoredTiles | None:
        """As `_stored_tiles`: where those that are compared are what OpenSlide gives.

        Not where the downsample is fractional: OpenSlide shifts such a level by a part of a pixel.
        """
        if self.vendor not in VENDORS or not self._is_whole(level):
            return None
        tiles = StoredTiles.find(self.path, self.levels[level].size, self._tile_sizes[level])
        if tiles is None:
            return None
        compared = 0
        for box in tiles.boxes(_MOST_COMPARED):
            pixels = np.empty((box.height, box.width, 3), np.uint8)
            if tiles.read(box, pixels):
                continue
            try:
                if not np.array_equal(pixels, self._from_openslide(level, box)):
                    return None
            except RegionUnreadable:
                continue
            compared += 1
            if compared == _ENOUGH_ALIKE:
                break
        return tiles if compared else None

    def _from_openslide(self, level: int, box: Box) -> Pixels:
        """One call to OpenSlide: `box` in level px, uint8 (h, w, 3). Raises RegionUnreadable."""
        location = self._location(level, box)
        if level in self._passed_over:
            raise self._unreadable(level, box, "a damaged tile")
        handle = self._handle()
        if isinstance(handle, Picture):
            return handle.pixels[box.within((0, 0))]
        try:
            image = handle.read_region(location, level, box.size)
        except openslide.OpenSlideError as error:
            # After an error OpenSlide refuses everything else: drop the handle, the next read opens another.
            self._handles.pop((os.getpid(), threading.get_ident())).close()
            raise self._unreadable(level, box, str(error)) from error
        return on_white(image)

    def _location(self, level: int, box: Box) -> tuple[int, int]:
        """Where a box of a level starts, level-0 px, as OpenSlide takes it."""
        downsample = self.levels[level].downsample
        return round(box.x0 * downsample), round(box.y0 * downsample)

    def _unreadable(self, level: int, box: Box, complaint: str) -> RegionUnreadable:
        return RegionUnreadable(
            f"{self.path}: {box.width} x {box.height} px at {self._location(level, box)} of level {level} cannot be "
            f"decoded ({complaint}): the file is damaged there; copy it again, or continue without this region"
        )

    def _handle(self) -> openslide.OpenSlide | Picture:
        """This thread's handle, opened if need be; a forked child opens its own.

        A plain picture is decoded as a whole, so all threads of a process share it; nothing changes its pixels.
        """
        process = os.getpid()
        shared = self._handles.get((process, 0))
        if shared is not None:
            return shared
        key = (process, threading.get_ident())
        if key not in self._handles:
            handle = open_handle(self.path)
            key = (process, 0) if isinstance(handle, Picture) else key
            return self._handles.setdefault(key, handle)
        return self._handles[key]


def blank(box: Box) -> tuple[Pixels, Mask]:
    """Nothing but white, uint8 (h, w, 3), of which nothing is lost, bool (h, w)."""
    return np.full((box.height, box.width, 3), _WHITE, np.uint8), np.zeros((box.height, box.width), np.bool_)


def _tile_size(properties: Mapping[str, str], level: int) -> Size:
    """Size of the cells in which a damaged level is read and lost, level px."""
    width, height = stated = stated_tile(properties, level)
    # Strips, and whole levels stored as one tile, are too large to be lost as a whole.
    return stated if 64 <= min(width, height) <= max(width, height) <= CHUNK else Size(_USUAL_TILE, _USUAL_TILE)
