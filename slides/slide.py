"""A slide of any scanner: its scale, its bounds, and its pixels at any resolution.

Three kinds of pixels: slide px (level 0), level px (only in here), and the px of a frame, which covers the bounds at
a chosen mpp. `Slide.frame` makes frames.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slides.errors import RegionUnreadable, SlideError, SlideTooLarge, SlideUnreadable
from slides.geometry import Affine, Box, Frame, Size, cells
from slides.opening import CONVERT, UNSUPPORTED, unsupported
from slides.scale import GivenScale, find_scale
from slides.stored import CHUNK, Mask, Pixels, StoredPixels, blank

T = TypeVar("T", bound=np.generic)
Window = tuple[float, float, float, float]  # x0 y0 x1 y1, px of the array that it is a part of

# Pixels of a thumbnail: 46 x 46 mm at 8 um, or a glass of 26 x 76 mm. Finding tissue takes 32 bytes for each: 1 GB.
_LARGEST_THUMBNAIL_PX = 2**25

# Level px that are read in one call for display, at four bytes each.
_MOST_FOR_DISPLAY_PX = 2**23

# Level px along a side of one pixel that is read; with the filter's reach this is 200 MB.
_COARSEST = 1024

# Side of what is resampled in one call, px of the frame. Whole cells of a fixed lattice are resampled and then cut to
# the box, because the filter's weights depend, in their last bits, on where the call starts and ends.
_CELL = 128

# Pillow's bicubic filter reaches 2 pixels, of the coarser raster, to either side; the third covers rounding.
_REACH = 3


class Slide:
    """A readable slide of known scale, as `open_slide` gives it; safe to share between threads, fork and pickle.

    path, vendor (`image` for a plain picture), size (level 0), bounds (slide px; what the scanner recorded),
    levels, scale, quick_hash (identifies the file), has_icc (recorded only: colours are left as stored),
    odd_levels (numbers of levels of another shape than the slide's, such as a label: they are not read from).
    """

    def __init__(self, path: str | os.PathLike[str], given: GivenScale) -> None:
        self.path = Path(path)
        self._given = given
        self._stored = StoredPixels(self.path)
        properties = self._stored.properties
        self.vendor = self._stored.vendor
        self.levels = self._stored.levels
        self.size = self.levels[0].size
        self.odd_levels = tuple(i for i, level in enumerate(self.levels) if not _shows_the_same(level.size, self.size))
        self.bounds = _bounds(properties, self.size)
        self.has_icc = "openslide.icc-size" in properties
        self.quick_hash: str = properties.get("openslide.quickhash-1") or _file_hash(self.path)
        # Before the scale: a damaged file must be reported as damaged, whether or not it states a scale.
        self._check_readable()
        self.scale = find_scale(self.path, properties, given)

    def __reduce__(self) -> tuple[type["Slide"], tuple[Path, GivenScale]]:
        return Slide, (self.path, self._given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's handles, which no other thread may be using. Reading again opens new ones."""
        self._stored.close()

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
            pixels = _padded(self._stored.region(level, stored), stored, source)
        except RegionUnreadable:
            return self.read_decodable(box, frame)[0]
        shown, _ = blank(box)
        resized = Image.fromarray(pixels).resize(inside.size, Image.Resampling.BICUBIC, box=window, reducing_gap=2.0)
        shown[inside.within(box.corner)] = np.asarray(resized)
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
                f"{self.levels[level].size.height:,} px to make a thumbnail from: {CONVERT}"
            )
        inside = box.intersect(frame.box)
        if not inside.area:
            return blank(box)
        if _needs_no_filter(to_level):
            read = self._read_source(level, self._source(inside, to_level)[0], strict=strict)
        else:
            read = self._resampled(level, inside, frame.box, to_level, strict=strict)
        if inside == box:
            return read
        pixels, lost = blank(box)
        place = inside.within(box.corner)
        pixels[place], lost[place] = read
        return pixels, lost

    def _resampled(self, level: int, inside: Box, whole: Box, to_level: Affine, *, strict: bool) -> tuple[Pixels, Mask]:
        """`inside`, a part of the frame's box `whole`, from whole cells of a fixed lattice, read in chunks."""
        fit = int(CHUNK / max(1.0, to_level.scale_x, to_level.scale_y))  # px whose source is one chunk
        cell_side = max(1, min(_CELL, fit))
        group_side = max(1, fit // cell_side) * cell_side
        pixels = np.empty((inside.height, inside.width, 3), np.uint8)
        lost = np.zeros((inside.height, inside.width), np.bool_)
        for group in cells(_snapped(inside, cell_side).intersect(whole), (group_side, group_side)):
            source, _ = self._source(group, to_level)
            stored, undecoded = self._read_source(level, source, strict=strict)
            image, some_lost = Image.fromarray(stored), undecoded.any()
            for cell in cells(group, (cell_side, cell_side)):
                around, window = self._source(cell, to_level)
                piece = image.crop(around.shift(-source.x0, -source.y0))
                piece = piece.resize(cell.size, Image.Resampling.BICUBIC, box=window)
                part = cell.intersect(inside)
                pixels[part.within(inside.corner)] = np.asarray(piece)[part.within(cell.corner)]
                if some_lost:
                    nearest = undecoded[around.within(source.corner)][_nearest(window, cell.size)]
                    lost[part.within(inside.corner)] = nearest[part.within(cell.corner)]
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
        """As `StoredPixels.read`, for a `source` that may hang over the bounds: the edge pixels are repeated."""
        stored = source.intersect(self._level_bounds(level))
        pixels, lost = self._stored.read(level, stored, strict=strict)
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
        """The bounds in px of a level: all pixels that show a part of them."""
        x, y = self._level_ratio(level)
        x0, y0 = math.floor(self.bounds.x0 / x), math.floor(self.bounds.y0 / y)
        x1, y1 = math.ceil(self.bounds.x1 / x), math.ceil(self.bounds.y1 / y)
        return Box(x0, y0, x1, y1).intersect(Box(0, 0, *self.levels[level].size))

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
                    self._stored.region(level, Box(x, y, x + 1, y + 1))
                    return
                except RegionUnreadable as error:
                    cause = error
        if cause is not None and UNSUPPORTED.search(str(cause.__cause__)):
            raise unsupported(self.path, str(cause.__cause__)) from cause
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
    Raises SlideError for what is no path; SlideNotFound, SlideUnreadable, SlideUnsupported, SlideTooLarge; and
    ScaleUnknown, once the slide has proved readable, where no scale is known, where one that is given lies outside
    0.05-5 um, and where those that the slide states along x and y differ by more than 2 %.
    """
    if not (isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str)):
        raise SlideError(f"path={path!r}: need that of a slide, as text or as a path")
    return Slide(path, GivenScale(mpp, mpp_source, default_mpp))


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


def _file_hash(path: Path) -> str:
    """sha256 of the file's size, first and last MiB: identifies a file that OpenSlide gives no quickhash."""
    size, mib = path.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(mib))
        file.seek(max(0, size - mib))
        digest.update(file.read(mib))
    return digest.hexdigest()


def _snapped(box: Box, side: int) -> Box:
    """The box grown outwards to multiples of `side`."""
    x0, y0 = box.x0 // side * side, box.y0 // side * side
    return Box(x0, y0, -(-box.x1 // side) * side, -(-box.y1 // side) * side)


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
