"""A slide of any scanner: its scale, its bounds, and its pixels at any resolution.

Three kinds of pixels: slide px (level 0), level px (only in here), and the px of a frame, which covers the bounds at
a chosen mpp. `Slide.frame` makes frames.
"""

import functools
import hashlib
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Self, TypeVar

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from slides.errors import (
    RegionUnreadable,
    ScaleUnknown,
    SlideError,
    SlideNotFound,
    SlideTooLarge,
    SlideUnreadable,
    SlideUnsupported,
)
from slides.geometry import Affine, Box, Frame, Size

T = TypeVar("T", bound=np.generic)
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Window = tuple[float, float, float, float]  # x0 y0 x1 y1, px of the array that it is a part of

# Micrometres per pixel that a microscope can have made; OpenSlide reports 1000 for a TIFF without resolution.
BELIEVABLE_MPP = (0.05, 5.0)

# Scales along x and y that differ by more are an error in the metadata: scanners' pixels are square.
_LARGEST_ASPECT = 1.02

# Pixels of a stored tile, which OpenSlide decodes whole, at four bytes each.
_LARGEST_TILE_PX = 2**26

# Pixels of a thumbnail: 46 x 46 mm at 8 um, or a glass of 26 x 76 mm. Finding tissue takes 32 bytes for each: 1 GB.
_LARGEST_THUMBNAIL_PX = 2**25

# Level px that are read in one call for display, at four bytes each.
_MOST_FOR_DISPLAY_PX = 2**23

# Level px along a side of one pixel that is read; with the filter's reach this is 200 MB.
_COARSEST = 1024

# Decoded tiles that OpenSlide keeps: a few rows of those in a block's region, which is read in one go.
_CACHE_BYTES = 2**25

# In the errors of OpenSlide and libtiff for sound files that use a feature which is not implemented.
_UNSUPPORTED = re.compile("unsupported|not supported|not configured|not implemented|can ?not handle", re.IGNORECASE)
_CONVERT = "convert it to a tiled pyramidal TIFF"

# Side of the region that is read in one call, level px: it bounds the memory and changes no pixel.
_CHUNK = 2048

# Side of what is resampled in one call, px of the frame. Whole cells of a fixed lattice are resampled and then cut to
# the box, because the filter's weights depend, in their last bits, on where the call starts and ends.
_CELL = 128

# Side of the cells in which a damaged region is decoded, level px, where the slide does not state its tiles.
_USUAL_TILE = 256

# Pillow's bicubic filter reaches 2 pixels, of the coarser raster, to either side; the third covers rounding.
_REACH = 3

# Suffixes of slide formats that OpenSlide does not read.
_FORMATS_NOT_READ = frozenset((".ets", ".isyntax", ".kfb", ".lif", ".mds", ".nd2", ".oir", ".sdpc", ".vsi"))

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_MICROMETRES = {"inch": 25400.0, "centimeter": 10000.0}
_WHITE = 255


class Level(NamedTuple):
    """One level of the pyramid: its size, level px, and level-0 px per level px as OpenSlide counts them."""

    size: Size
    downsample: float


BY_DEFAULT, FORCED = "default by --mpp", "forced by --force-mpp"  # sources of a scale


class GivenScale(NamedTuple):
    """What a user states of a slide's scale, um/px at level 0: the arguments of `open_slide`."""

    mpp: float | None = None
    mpp_source: str = "given"
    default_mpp: float | None = None


class Scale(NamedTuple):
    """Micrometres per pixel at level 0, and where they come from.

    source: `metadata`, `tiff resolution`, BY_DEFAULT (given for slides that state nothing), or what the caller of
    `open_slide` named: `manifest`, FORCED, `given`.
    """

    x: float
    y: float
    source: str


class Slide:
    """A readable slide of known scale. Made by `open_slide`; safe to share between threads, fork and pickle.

    path, vendor (`image` for a plain picture), size (level 0), bounds (slide px; what the scanner recorded),
    levels, scale, quick_hash (identifies the file), has_icc (recorded only: colours are left as stored),
    odd_levels (numbers of levels of another shape than the slide's, such as a label: they are not read from).
    OpenSlide's handles are not shared: each thread of each process has its own, opened on first use.
    """

    def __init__(self, path: str | os.PathLike[str], given: GivenScale) -> None:
        self.path = Path(path)
        self._given = given
        self._handles: dict[tuple[int, int], openslide.AbstractSlide] = {}
        handle = self._handle()
        properties = dict(handle.properties)  # the handle may be dropped below
        self.vendor: str = properties.get("openslide.vendor", "image")
        self.size = Size(*handle.dimensions)
        self.levels = tuple(
            Level(Size(*size), downsample)
            for size, downsample in zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        )
        self.odd_levels = tuple(i for i, level in enumerate(self.levels) if not _shows_the_same(level.size, self.size))
        self.bounds = _bounds(properties, self.size)
        self._tile_sizes = tuple(_tile_size(properties, level) for level in range(len(self.levels)))
        self.has_icc = "openslide.icc-size" in properties
        self.quick_hash: str = properties.get("openslide.quickhash-1") or _file_hash(self.path)
        _check_tiles(self.path, properties, len(self.levels))
        # Before the scale: a damaged file must be reported as damaged, whether or not it states a scale.
        self._check_readable()
        self.scale = _scale(self.path, properties, given)

    def __reduce__(self) -> tuple[type["Slide"], tuple[Path, GivenScale]]:
        return Slide, (self.path, self._given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's handles. Reading again opens new ones."""
        for key in [key for key in self._handles if key[0] == os.getpid()]:
            self._handles.pop(key).close()

    def frame(self, mpp: float) -> Frame:
        """The pixel grid over `bounds` at `mpp` micrometres per pixel."""
        ratio_x, ratio_y = mpp / self.scale.x, mpp / self.scale.y
        # A ratio such as 0.5/0.4999999 must not add a column for the rounding of a division.
        size = Size(
            max(1, math.ceil(self.bounds.width / ratio_x - 1e-6)),
            max(1, math.ceil(self.bounds.height / ratio_y - 1e-6)),
        )
        return Frame(size, mpp, Affine(ratio_x, ratio_y, float(self.bounds.x0), float(self.bounds.y0)))

    def thumbnail_frame(self, mpp: float) -> Frame:
        """The frame at `mpp`, or else the finest coarser one, by doubling, of which there is a thumbnail."""
        frame = self.frame(mpp)
        while frame.box.area > _LARGEST_THUMBNAIL_PX:
            frame = self.frame(2 * frame.mpp)
        return frame

    def read(self, box: Box, frame: Frame) -> Pixels:
        """The pixels of `box` (px of `frame`). Returns uint8 (h, w, 3), RGB.

        White outside the frame; transparent areas are blended on white; resampled from the best level
        with an antialiasing bicubic filter. Raises RegionUnreadable; SlideTooLarge where a pixel of the frame is
        made of more than 1024 x 1024 stored ones.
        Law: the pixels do not depend on the box: a part read on its own is, bit for bit, a part of the whole.
        """
        return self._pixels(box, frame, strict=True)[0]

    def read_decodable(self, box: Box, frame: Frame) -> tuple[Pixels, Mask]:
        """Like `read`, but what cannot be decoded is white: uint8 (h, w, 3), and bool (h, w): lost.

        What is lost is lost by the slide's own stored tiles where it states their size, else by 256 px of the
        level that is read from; the neighbours of a damaged tile are kept.
        """
        return self._pixels(box, frame, strict=False)

    def read_for_display(self, box: Box, frame: Frame) -> Pixels:
        """Like `read_decodable`, several times as fast, for the eye: uint8 (h, w, 3).

        The slide is asked once, for just these pixels, so they may differ by a part of a level px from what is read in
        another box. A box that is made of very many stored pixels, or of damaged ones, is read by `read_decodable`.
        """
        level, inside = self._best_level(frame), box.intersect(frame.box)
        source, window = self._source(inside, self._to_level(frame, level))
        stored = source.intersect(self._level_bounds(level))
        if not inside.area or not 0 < stored.area <= _MOST_FOR_DISPLAY_PX:
            return self.read_decodable(box, frame)[0]
        try:
            pixels = _padded(self._region(level, stored), stored, source)
        except RegionUnreadable:
            return self.read_decodable(box, frame)[0]
        shown = np.full((box.height, box.width, 3), _WHITE, np.uint8)
        resized = Image.fromarray(pixels).resize(inside.size, Image.Resampling.BICUBIC, box=window, reducing_gap=2.0)
        shown[inside.within((box.x0, box.y0))] = np.asarray(resized)
        return shown

    def thumbnail(self, frame: Frame) -> Pixels:
        """All of a coarse frame. uint8 (h, w, 3); what cannot be decoded is white.

        Raises SlideTooLarge for a frame that is larger than `thumbnail_frame` gives.
        """
        width, height = frame.size
        if frame.box.area > _LARGEST_THUMBNAIL_PX:
            raise SlideTooLarge(
                f"{self.path} is {width:,} x {height:,} px at {frame.mpp:g} um/px: need at most "
                f"{_LARGEST_THUMBNAIL_PX:,} px in a thumbnail; choose a coarser frame"
            )
        return self.read_decodable(frame.box, frame)[0]

    def _pixels(self, box: Box, frame: Frame, *, strict: bool) -> tuple[Pixels, Mask]:
        """`read` and `read_decodable`: whole cells of a fixed lattice, read from the slide in chunks."""
        level = self._best_level(frame)
        to_level = self._to_level(frame, level)
        if max(to_level.scale_x, to_level.scale_y) > _COARSEST:
            raise SlideTooLarge(
                f"{self.path} has no level coarser than {self.levels[level].size.width:,} x "
                f"{self.levels[level].size.height:,} px to make a thumbnail from: {_CONVERT}"
            )
        inside = box.intersect(frame.box)
        if not inside.area:
            return _blank(box)
        if _needs_no_filter(to_level):
            read = self._read_source(level, self._source(inside, to_level)[0], strict=strict)
        else:
            read = self._resampled(level, inside, frame.box, to_level, strict=strict)
        if inside == box:
            return read
        pixels, lost = _blank(box)
        place = inside.within((box.x0, box.y0))
        pixels[place], lost[place] = read
        return pixels, lost

    def _resampled(self, level: int, inside: Box, whole: Box, to_level: Affine, *, strict: bool) -> tuple[Pixels, Mask]:
        """`inside`, a part of the frame's box `whole`, from whole cells of a fixed lattice, read in chunks."""
        fit = int(_CHUNK / max(1.0, to_level.scale_x, to_level.scale_y))  # px whose source is one chunk
        cell_side = max(1, min(_CELL, fit))
        group_side = max(1, fit // cell_side) * cell_side
        pixels = np.empty((inside.height, inside.width, 3), np.uint8)
        lost = np.zeros((inside.height, inside.width), np.bool_)
        for group in _cells(_snapped(inside, cell_side).intersect(whole), (group_side, group_side)):
            source, _ = self._source(group, to_level)
            stored, undecoded = self._read_source(level, source, strict=strict)
            image, resampled = Image.fromarray(stored), Image.new("RGB", group.size)
            for cell in _cells(group, (cell_side, cell_side)):
                around, window = self._source(cell, to_level)
                piece = image.crop(around.shift(-source.x0, -source.y0))
                piece = piece.resize(cell.size, Image.Resampling.BICUBIC, box=window)
                resampled.paste(piece, (cell.x0 - group.x0, cell.y0 - group.y0))
                at = around.within((source.x0, source.y0))
                if undecoded[at].any():
                    part = cell.intersect(inside)
                    nearest = undecoded[at][_nearest(window, cell.size)]
                    lost[part.within(inside[:2])] = nearest[part.within(cell[:2])]
            part = group.intersect(inside)
            pixels[part.within(inside[:2])] = np.asarray(resampled)[part.within(group[:2])]
        return pixels, lost

    def _source(self, piece: Box, to_level: Affine) -> tuple[Box, Window]:
        """Where `piece` (px of a frame) comes from: level px with the filter's reach; its exact edges in there."""
        (x0, y0), (x1, y1) = to_level.apply([piece[:2], piece[2:]]).tolist()
        # Pixels that are neither scaled nor shifted need no filter.
        reach_x = 0 if (to_level.scale_x, x0 % 1) == (1, 0) else _REACH * max(1.0, to_level.scale_x)
        reach_y = 0 if (to_level.scale_y, y0 % 1) == (1, 0) else _REACH * max(1.0, to_level.scale_y)
        left, top = math.floor(x0 - reach_x), math.floor(y0 - reach_y)
        source = Box(left, top, math.ceil(x1 + reach_x), math.ceil(y1 + reach_y))
        return source, (x0 - left, y0 - top, x1 - left, y1 - top)

    def _read_source(self, level: int, source: Box, *, strict: bool) -> tuple[Pixels, Mask]:
        """As `_read_level`, for a `source` that may hang over the bounds: the edge pixels are repeated."""
        stored = source.intersect(self._level_bounds(level))
        pixels, lost = self._read_level(level, stored, strict=strict)
        return _padded(pixels, stored, source), _padded(lost, stored, source)

    def _best_level(self, frame: Frame) -> int:
        """The coarsest level that is not coarser than the frame; level 0 where all are.

        With a tolerance of 1 %: pyramids round their sizes, and 4.0006 is meant to be 4.
        """
        wanted = min(frame.to_slide.scale_x, frame.to_slide.scale_y) * 1.01
        fine_enough = [
            i for i, level in enumerate(self.levels) if level.downsample <= wanted and i not in self.odd_levels
        ]
        return max(fine_enough, key=lambda i: self.levels[i].downsample, default=0)

    def _to_level(self, frame: Frame, level: int) -> Affine:
        """Px of the frame -> px of a level."""
        x, y = self._level_ratio(level)
        affine = frame.to_slide
        return Affine(affine.scale_x / x, affine.scale_y / y, affine.offset_x / x, affine.offset_y / y)

    def _level_ratio(self, level: int) -> tuple[float, float]:
        """Level-0 px per px of a level, along x and y: OpenSlide's `downsample` is the mean of the two."""
        width, height = self.levels[level].size
        return self.size.width / width, self.size.height / height

    def _level_bounds(self, level: int) -> Box:
        """The bounds in px of a level, whole pixels, at least one."""
        x, y = self._level_ratio(level)
        x0, y0 = math.floor(self.bounds.x0 / x), math.floor(self.bounds.y0 / y)
        x1, y1 = math.ceil(self.bounds.x1 / x), math.ceil(self.bounds.y1 / y)
        return Box(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)).intersect(Box(0, 0, *self.levels[level].size))

    def _read_level(self, level: int, box: Box, *, strict: bool) -> tuple[Pixels, Mask]:
        """Stored pixels of a level (`box` in level px), on white: uint8 (h, w, 3), and bool (h, w): lost.

        Each pixel is the same whichever box it is read in. OpenSlide is asked for a corner in level-0 px;
        where the downsample is fractional, that corner falls between level pixels and the region is shifted
        by a part of a pixel. There every read starts at a corner of a fixed lattice.
        strict: raises RegionUnreadable; else what cannot be decoded is white and lost.
        """
        whole = float(self.levels[level].downsample).is_integer()
        side = self._chunk_sides(level) if whole else (_CHUNK, _CHUNK)
        pixels = np.empty((box.height, box.width, 3), np.uint8)
        lost = np.zeros((box.height, box.width), np.bool_)
        for cell in _cells(box, side, lattice=True):
            part = cell.intersect(box)
            corner = (part.x0, part.y0) if whole else (cell.x0, cell.y0)
            place = part.within((box.x0, box.y0))
            try:
                pixels[place] = self._region(level, Box(*corner, part.x1, part.y1))[part.within(corner)]
            except RegionUnreadable:
                if strict:
                    raise
                pixels[place], lost[place] = self._stored_tiles(level, part)
        return pixels, lost

    def _chunk_sides(self, level: int) -> tuple[int, int]:
        """Sides of a chunk of whole stored tiles: none is then decoded for two chunks."""
        width, height = self._tile_sizes[level]
        return _CHUNK // width * width, _CHUNK // height * height

    def _stored_tiles(self, level: int, box: Box) -> tuple[Pixels, Mask]:
        """What can be decoded of a damaged region, one stored tile at a time; as `_read_level`."""
        pixels, lost = _blank(box)
        for tile in _cells(box, self._tile_sizes[level], lattice=True):
            part = tile.intersect(box)
            place = part.within((box.x0, box.y0))
            try:
                pixels[place] = self._region(level, part)
            except RegionUnreadable:
                lost[place] = True
        return pixels, lost

    def _region(self, level: int, box: Box) -> Pixels:
        """One call to OpenSlide: `box` in level px, uint8 (h, w, 3). Raises RegionUnreadable."""
        downsample = self.levels[level].downsample
        location = (round(box.x0 * downsample), round(box.y0 * downsample))
        try:
            image = self._handle().read_region(location, level, box.size)
        except openslide.OpenSlideError as error:
            # After an error OpenSlide refuses everything else: drop the handle, the next read opens another.
            self._handles.pop((os.getpid(), threading.get_ident())).close()
            raise RegionUnreadable(
                f"{self.path}: {box.width} x {box.height} px at {location} of level {level} cannot be "
                f"decoded ({error}): the file is damaged there; copy it again, or continue without this region"
            ) from error
        return _on_white(image)

    def _handle(self) -> openslide.AbstractSlide:
        """This thread's handle, opened if need be; a forked child opens its own.

        A plain picture is decoded as a whole, so all threads of a process share it; nothing changes its pixels.
        """
        process = os.getpid()
        shared = self._handles.get((process, 0))
        if shared is not None:
            return shared
        key = (process, threading.get_ident())
        if key not in self._handles:
            handle = _open_handle(self.path)
            key = (process, 0) if isinstance(handle, _Picture) else key
            return self._handles.setdefault(key, handle)
        return self._handles[key]

    def _check_readable(self) -> None:
        """Raise SlideUnreadable if none of 49 pixels spread over the coarsest level and level 0 decodes.

        SlideUnsupported where that is because of how they are compressed.
        """
        cause: RegionUnreadable | None = None
        coarsest = max(level for level in range(len(self.levels)) if level not in self.odd_levels)
        for level in dict.fromkeys((coarsest, 0)):
            bounds = self._level_bounds(level)
            # From the middle outwards: on a sound slide the first read succeeds.
            for row, col in sorted(np.ndindex(7, 7), key=lambda place: abs(place[0] - 3) + abs(place[1] - 3)):
                x = bounds.x0 + (2 * col + 1) * bounds.width // 14
                y = bounds.y0 + (2 * row + 1) * bounds.height // 14
                try:
                    self._region(level, Box(x, y, x + 1, y + 1))
                    return
                except RegionUnreadable as error:
                    cause = error
        if cause is not None and _UNSUPPORTED.search(str(cause.__cause__)):
            raise _unsupported(self.path, str(cause.__cause__)) from cause
        raise SlideUnreadable(f"{self.path} opens, but nothing in it can be read: copy it again") from cause


def open_slide(
    path: str | os.PathLike[str],
    *,
    mpp: float | None = None,
    mpp_source: str = "given",
    default_mpp: float | None = None,
) -> Slide:
    """Open a slide, or a plain PNG, JPEG, WebP, BMP or single-image TIFF as a slide of one level.

    Its scale, micrometres per pixel at level 0, is the first of: `mpp`; the slide's metadata; its TIFF resolution
    tags; `default_mpp`. `Slide.scale.source` says which; for `mpp` it is `mpp_source`. A stated value
    outside 0.05-5 um counts as unknown.
    Raises SlideNotFound, SlideUnreadable, SlideUnsupported, SlideTooLarge; and ScaleUnknown, once the slide has
    proved readable, where no scale is known, where one that is given lies outside 0.05-5 um, and where those that
    the slide states along x and y differ by more than 2 %.
    """
    return Slide(path, GivenScale(mpp, mpp_source, default_mpp))


@functools.cache
def _cache(_pid: int) -> openslide.OpenSlideCache:
    """Decoded tiles of all slides that a process has open: else OpenSlide keeps as many for every handle."""
    return openslide.OpenSlideCache(_CACHE_BYTES)


def _open_handle(path: Path) -> openslide.AbstractSlide:
    """OpenSlide's handle, or a plain image's with the same interface.

    Raises SlideNotFound, SlideUnreadable, SlideUnsupported, SlideTooLarge.
    """
    if not path.is_file():
        raise SlideNotFound(f"{path}: there is no such file")
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(_cache(os.getpid()))
        return handle
    except openslide.OpenSlideUnsupportedFormatError as error:
        if complaint := _reason_unreadable(path):
            raise SlideUnreadable(f"{path} {complaint}") from error
        return _open_picture(path)
    except openslide.OpenSlideError as error:
        if _UNSUPPORTED.search(str(error)) or _is_czi(path):
            raise _unsupported(path, str(error)) from error
        raise SlideUnreadable(f"{path} is damaged or incomplete: {_explained(path, str(error))}") from error


def _unsupported(path: Path, complaint: str) -> SlideError:
    """The error for a file that other programs may read; where they do not either, it is damaged after all."""
    return SlideUnsupported(
        f"{path} is in a format that OpenSlide {openslide.__library_version__} does not read ({complaint}): "
        f"{_CONVERT}; if no other program opens it, copy it again"
    )


def _is_czi(path: Path) -> bool:
    """Whether it is a Zeiss CZI, of whose many forms OpenSlide reads a few; the rest it calls damaged."""
    with path.open("rb") as file:
        return file.read(10) == b"ZISRAWFILE"


def _open_picture(path: Path) -> openslide.ImageSlide:
    """A plain image as a slide of one level. Raises SlideUnreadable, SlideUnsupported, SlideTooLarge."""
    try:
        with _open_quietly(path) as picture:
            count, mode = getattr(picture, "n_frames", 1), picture.mode
            # Of several images the first may be a label: then it is a slide in a format that OpenSlide lacks.
            if count == 1 and mode in _EIGHT_BIT_MODES:
                return _Picture(picture)
    except UnidentifiedImageError as error:
        if path.suffix.lower() in _FORMATS_NOT_READ or _is_czi(path):
            raise _unsupported(path, path.suffix) from error
        raise SlideUnreadable(f"{path} is not a slide: OpenSlide and Pillow know no such format") from error
    except Image.DecompressionBombError as error:
        raise SlideTooLarge(f"{path}: {error}: {_CONVERT}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SlideUnreadable(f"{path} is a damaged image ({error}): copy it again") from error
    raise SlideUnsupported(
        f"{path} holds {count} image(s) of mode {mode} in no format that OpenSlide knows: "
        f"need a slide, or one image of 8 bits a channel; {_CONVERT}"
    )


def _open_quietly(path: Path) -> Image.Image:
    """A picture, not decoded yet. Pillow warns of half as many pixels as it refuses; these are fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=["PNG", "JPEG", "WEBP", "BMP", "TIFF"])


class _Picture(openslide.ImageSlide):
    """A plain image that states its TIFF resolution and colour profile in OpenSlide's properties."""

    def __init__(self, picture: Image.Image) -> None:
        tags = getattr(picture, "tag_v2", {})
        unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2), "none")
        resolution = {"tiff.XResolution": tags.get(282), "tiff.YResolution": tags.get(283)}
        self._stated = {name: str(float(value)) for name, value in resolution.items() if value}
        self._stated["tiff.ResolutionUnit"] = unit
        if profile := picture.info.get("icc_profile"):
            self._stated["openslide.icc-size"] = str(len(profile))
        super().__init__(picture.convert("RGBA"))

    @property
    def properties(self) -> Mapping[str, str]:
        return self._stated


def _reason_unreadable(path: Path) -> str | None:
    """What is wrong with a file, as the end of a sentence that starts with its path; None if nothing is known."""
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes): copy it again"
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        return f"lacks its data: copy the folder {path.stem!r} beside it"
    try:
        with path.open("rb") as file:
            beyond = _directory_beyond(file, size)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if beyond is not None:
        return f"is truncated: it has {size} bytes, its directory is at byte {beyond}; copy it again"
    return None


def _directory_beyond(file: IO[bytes], size: int) -> int | None:
    """Offset of the first TIFF directory beyond the end of the file; None if all are there, or no TIFF.

    TIFF 6.0, section 2, and BigTIFF: byte order, 42 or 43, offset of the first directory; each directory is a
    count, its entries, and the offset of the next.
    """
    head = file.read(16).ljust(16, b"\0")
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or (version := struct.unpack(order + "H", head[2:4])[0]) not in (42, 43):
        return None
    start, count_code, entry, offset_code = (4, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
    offset: int = struct.unpack_from(order + offset_code, head, start)[0]
    visited: set[int] = set()
    while offset and offset not in visited:
        visited.add(offset)
        if offset >= size:
            return offset
        file.seek(offset)
        count_bytes = file.read(struct.calcsize(count_code))
        if len(count_bytes) < struct.calcsize(count_code):
            return offset
        after = file.tell() + entry * int(struct.unpack(order + count_code, count_bytes)[0])
        if after + struct.calcsize(offset_code) > size:
            return offset
        file.seek(after)
        offset = struct.unpack(order + offset_code, file.read(struct.calcsize(offset_code)))[0]
    return None


def _explained(path: Path, complaint: str) -> str:
    """OpenSlide's complaint; a missing part of a slide of several files is named, with the remedy."""
    if "No such file" not in complaint:
        return f"{complaint}; copy it again"
    missing = os.path.relpath(complaint.rpartition("open ")[2].partition(": No such file")[0], path.parent)
    return f"its part {missing} is missing; copy everything that belongs to {path.name} beside it"


def _bounds(properties: Mapping[str, str], size: Size) -> Box:
    """The part of the slide that was scanned, slide px: `openslide.bounds-*`, else everything."""
    whole = Box(0, 0, *size)
    try:
        sides = ("x", "y", "width", "height")
        x, y, width, height = (int(properties[f"openslide.bounds-{side}"]) for side in sides)
    except (KeyError, ValueError):
        return whole
    inside = Box(x, y, x + width, y + height).intersect(whole)
    return inside if inside.area else whole


def _shows_the_same(level: Size, slide: Size) -> bool:
    """Whether a level has the shape of the slide: within 2 %, or a pixel that was rounded."""
    x, y = slide.width / level.width, slide.height / level.height
    return abs(x - y) <= max(x, y) * max(0.02, 1.5 / min(level))


def _scale(path: Path, properties: Mapping[str, str], given: GivenScale) -> Scale:
    """The scale by the rule of `open_slide`. Raises ScaleUnknown."""
    low, high = BELIEVABLE_MPP
    mpp, mpp_source, default_mpp = given
    for value in (mpp, default_mpp):
        if value is not None and not low <= value <= high:
            raise ScaleUnknown(f"mpp={value:g} for {path}: need {low:g} to {high:g} micrometres per pixel")
    if mpp is not None:
        return Scale(mpp, mpp, mpp_source)
    stated = (_stated_scale(properties), _resolution_scale(properties))
    for x, y, source in filter(None, stated):
        if not low <= min(x, y) <= max(x, y) <= high:
            continue
        if max(x, y) > _LARGEST_ASPECT * min(x, y):
            raise ScaleUnknown(
                f"{path} states {x:g} x {y:g} um/px ({source}): need square pixels, within 2 %; give its mpp in a "
                f"manifest or by --force-mpp, or resample it to square pixels"
            )
        return Scale(x, y, source)
    if default_mpp is not None:
        return Scale(default_mpp, default_mpp, BY_DEFAULT)
    said = next((f"{s.x:g} um/px, not between {low:g} and {high:g}" for s in stated if s), "no resolution")
    raise ScaleUnknown(f"{path} states {said}: pass --mpp (micrometres per pixel at level 0)")


def _stated_scale(properties: Mapping[str, str]) -> Scale | None:
    """What the scanner wrote; nothing for a generic TIFF, where OpenSlide repeats the resolution tags."""
    if properties.get("openslide.vendor") == "generic-tiff":
        return None
    try:
        x, y = float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None
    return Scale(x, y, "metadata")


def _resolution_scale(properties: Mapping[str, str]) -> Scale | None:
    """TIFF resolution tags: pixels per unit -> micrometres per pixel."""
    try:
        unit = _MICROMETRES[properties["tiff.ResolutionUnit"]]
        x, y = float(properties["tiff.XResolution"]), float(properties["tiff.YResolution"])
    except (KeyError, ValueError):
        return None
    return Scale(unit / x, unit / y, "tiff resolution") if x > 0 and y > 0 else None


def _file_hash(path: Path) -> str:
    """sha256 of the file's size, first and last MiB: identifies a file that OpenSlide gives no quickhash."""
    size, mib = path.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(mib))
        file.seek(max(0, size - mib))
        digest.update(file.read(mib))
    return digest.hexdigest()


def _stated_tile(properties: Mapping[str, str], level: int) -> Size:
    """Size of the tiles in which a level is stored, level px; 0 x 0 where the slide does not state it."""
    width, height = (properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height"))
    return Size(*(int(value) if value.isdecimal() else 0 for value in (width, height)))


def _tile_size(properties: Mapping[str, str], level: int) -> Size:
    """Size of the cells in which a damaged level is read and lost, level px."""
    width, height = stated = _stated_tile(properties, level)
    # Strips, and whole levels stored as one tile, are too large to be lost as a whole.
    return stated if 64 <= min(width, height) <= max(width, height) <= _CHUNK else Size(_USUAL_TILE, _USUAL_TILE)


def _check_tiles(path: Path, properties: Mapping[str, str], levels: int) -> None:
    """Raise SlideTooLarge where OpenSlide would need gigabytes to decode one tile."""
    for level in range(levels):
        width, height = _stated_tile(properties, level)
        if width * height > _LARGEST_TILE_PX:
            raise SlideTooLarge(
                f"{path} is stored in tiles of {width:,} x {height:,} px: need at most {_LARGEST_TILE_PX:,} px; "
                f"{_CONVERT}, with tiles of 256 to 2048 px"
            )


def _cells(box: Box, side: tuple[int, int], *, lattice: bool = False) -> Iterator[Box]:
    """Cut `box` into rectangles of at most `side` (width, height), row by row.

    lattice: they are whole and start at multiples of `side`, so that the outer ones hang over the box.
    """
    width, height = side
    left, top = (box.x0 // width * width, box.y0 // height * height) if lattice else (box.x0, box.y0)
    for y in range(top, box.y1, height):
        for x in range(left, box.x1, width):
            cell = Box(x, y, x + width, y + height)
            yield cell if lattice else cell.intersect(box)


def _snapped(box: Box, side: int) -> Box:
    """The box grown outwards to multiples of `side`."""
    x0, y0 = box.x0 // side * side, box.y0 // side * side
    return Box(x0, y0, -(-box.x1 // side) * side, -(-box.y1 // side) * side)


def _blank(box: Box) -> tuple[Pixels, Mask]:
    """Nothing but white, uint8 (h, w, 3), of which nothing is lost, bool (h, w)."""
    return np.full((box.height, box.width, 3), _WHITE, np.uint8), np.zeros((box.height, box.width), np.bool_)


def _needs_no_filter(to_level: Affine) -> bool:
    """Whether every pixel of a frame is one of the level's."""
    return to_level[:2] == (1, 1) and to_level.offset_x.is_integer() and to_level.offset_y.is_integer()


def _nearest(window: Window, size: Size) -> tuple[NDArray[np.intp], ...]:
    """Index (rows, columns) of the pixels under the centres of `size` pixels stretched over `window`."""
    x0, y0, x1, y1 = window
    columns = x0 + (np.arange(size.width) + 0.5) * ((x1 - x0) / size.width)
    rows = y0 + (np.arange(size.height) + 0.5) * ((y1 - y0) / size.height)
    return np.ix_(np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp))


def _padded(array: NDArray[T], stored: Box, wanted: Box) -> NDArray[T]:
    """An array of the pixels of `stored`, (h, w) or (h, w, 3), grown to the larger box `wanted` by its edge pixels."""
    rows = stored.y0 - wanted.y0, wanted.y1 - stored.y1
    columns = stored.x0 - wanted.x0, wanted.x1 - stored.x1
    if not any(rows + columns):
        return array
    return np.pad(array, (rows, columns, (0, 0))[: array.ndim], mode="edge")


def _on_white(image: Image.Image) -> Pixels:
    """RGBA, straight alpha -> uint8 (h, w, 3), blended on white."""
    rgba = np.asarray(image)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        # a copy of `rgb` takes five times as long
        return np.frombuffer(image.tobytes("raw", "RGB"), np.uint8).reshape(rgb.shape)
    # At most 255 * 255 + 127: fits 16 bits.
    weight = alpha.astype(np.uint16)
    return ((rgb * weight + _WHITE * (255 - weight) + 127) // 255).astype(np.uint8)
