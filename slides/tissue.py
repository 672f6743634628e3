"""Tissue detection on a thumbnail, and queries on the resulting mask."""

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import scipy  # loads ndimage where it is first used: who reads a mask does without
from numpy.typing import ArrayLike, NDArray

from slides.geometry import Box, Frame

T = TypeVar("T", bound=np.generic)

# The hue of anything darker is noise: intensities are held above this, so densities below -ln(20/255) = 2.5.
_DARKEST = 20.0

# H&E absorbs green most: eosin spares red, haematoxylin spares blue. Tissue is where the density in green is
# above the smaller of the other two by this much. White, grey and black are not, however bright or uneven.
_STAINED = 0.05

# Blue and green ink absorb red more than green; haematoxylin hardly does.
_INK_RED_TO_GREEN = 1.2

# Red ink is strong, spares red, and absorbs blue nearly as much as green; eosin absorbs half as much.
_RED_INK_DENSITY, _RED_INK_BLUE_TO_GREEN, _RED_INK_RED_TO_GREEN = 0.6, 0.8, 0.3

# Black ink, and what some scanners write outside their bounds: dense in all colours, and grey.
_BLACK_DENSITY, _BLACK_SPREAD = 1.0, 0.25

# A slide whose colours never differ by more grey levels is in grey: its tissue is where the density varies by this much
# (standard deviation) within so many um. Glass does not, however grey or uneven.
_GREY, _GREY_VARIATION, _GREY_UM = 8.0, 0.04, 40.0

# Ink comes in strokes. What is smaller is pigment or a fold, or blood if it is red, and part of the tissue.
_STROKE_UM2, _RED_STROKE_UM2 = 6_000.0, 40_000.0

# Width of the blurred edge of a stroke.
_RIM_UM = 24.0

# Vessels, ducts and fat belong to the tissue around them; larger holes are glass.
_HOLE_UM2 = 100_000.0

# Pixels that are processed at a time where that needs many bytes for each.
_STRIP_PX = 2**22

# Clean glass is nearly neutral: a tint up to this many grey levels is that of the illumination, and is removed.
_TINT = 14.0


class TissueMap(NamedTuple):
    """Where a slide's tissue is, queried in work px.

    mask: bool (h, w), a pixel of `frame` each; work: the frame of the points and boxes in queries.
    """

    mask: NDArray[np.bool_]
    frame: Frame
    work: Frame

    def contains(self, work_xy: ArrayLike) -> NDArray[np.bool_]:
        """work_xy: (N, 2) work px. Returns bool (N,): on tissue. Outside the mask is no tissue."""
        return self.look_up(self.mask, work_xy)

    def look_up(self, values: NDArray[T], work_xy: ArrayLike) -> NDArray[T]:
        """values: (h, w), a pixel of `frame` each; work_xy: (N, 2) work px. Returns (N,): those there, 0 outside."""
        points = np.asarray(work_xy, np.float64).reshape(-1, 2)
        x, y = np.floor(points * self.per_work_px).astype(np.int64).T
        height, width = values.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = np.zeros(len(points), values.dtype)
        found[inside] = values[y[inside], x[inside]]
        return found

    def any_in(self, box: Box) -> bool:
        """Whether any tissue touches `box` (work px). An empty box holds none."""
        return bool(box.area and self.mask[self._pixels(box)].any())

    def bounds_in(self, box: Box) -> Box:
        """The smallest box, work px, that holds what of the tissue lies in `box`; empty where there is none."""
        rows, columns = self._pixels(box)
        y, x = np.nonzero(self.mask[rows, columns])
        if not box.area or not y.size:
            return Box(box.x0, box.y0, box.x0, box.y0)
        side = 1 / self.per_work_px
        low = math.floor((columns.start + x.min()) * side), math.floor((rows.start + y.min()) * side)
        high = math.ceil((columns.start + x.max() + 1) * side), math.ceil((rows.start + y.max() + 1) * side)
        return Box(*low, *high).intersect(box)

    def _pixels(self, box: Box) -> tuple[slice, slice]:
        """Rows and columns of the mask's pixels that `box` (work px) touches."""
        scale = self.per_work_px
        x0, y0 = max(0, math.floor(box.x0 * scale)), max(0, math.floor(box.y0 * scale))
        x1, y1 = max(0, math.ceil(box.x1 * scale)), max(0, math.ceil(box.y1 * scale))
        return slice(y0, y1), slice(x0, x1)

    @property
    def area_mm2(self) -> float:
        return float(self.mask.sum()) * self.frame.mpp**2 / 1e6

    @property
    def per_work_px(self) -> float:
        """Pixels of the mask to one work px, along a side."""
        return self.work.mpp / self.frame.mpp


def tissue_mask(
    thumbnail: NDArray[np.uint8], mpp: float, *, min_area_um2: float, margin_um: float
) -> NDArray[np.bool_]:
    """The mask of H&E-stained tissue, extended by a margin.

    thumbnail: uint8 (h, w, 3) at `mpp` micrometres per pixel, 4 to 16 or so.
    min_area_um2: smaller pieces are dirt; margin_um: the mask is grown by this much, so that the nuclei at
    the tissue's edge are in.
    Returns bool (h, w). Holes are kept out only where they are larger than 0.1 mm2
    or open to the edge of the picture.

    Stain is recognised by its colour, not by its darkness: so uneven glass, grey glass and black borders are left
    out, and pale tissue is kept. Strokes of blue, green, red or black ink are left out. On a slide in grey tissue is
    recognised by its texture. The rules are explained at the constants of this module.
    """
    if not thumbnail.size:
        return np.zeros(thumbnail.shape[:2], np.bool_)
    density = densities(thumbnail)
    red, green, blue = density
    if is_grey(thumbnail):
        strokes, tissue = np.zeros(red.shape, np.bool_), _varied(green, mpp)
    else:
        strokes = ink(density, mpp)
        tissue = (green - np.minimum(red, blue) > _STAINED) & ~strokes
    # Pieces nearer to each other than the margin count as one.
    tissue = shrunk(grown(tissue, margin_um / mpp), margin_um / mpp) & ~strokes
    tissue = filled(tissue, _HOLE_UM2 / mpp**2) & ~strokes
    tissue = without_small(tissue, min_area_um2 / mpp**2)
    return grown(tissue, margin_um / mpp)


def is_grey(thumbnail: NDArray[np.uint8]) -> bool:
    """Whether a thumbnail, uint8 (h, w, 3), is without colour."""
    return bool(np.ptp(_smoothed(thumbnail), axis=2).max() <= _GREY)


def _varied(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Where the density, float32 (h, w), varies as that of tissue does: bool (h, w)."""
    side = 2 * round(_GREY_UM / mpp / 2) + 1
    mean, of_squares = (scipy.ndimage.uniform_filter(values, side, mode="nearest") for values in (density, density**2))
    varied: NDArray[np.bool_] = of_squares - mean**2 > _GREY_VARIATION**2
    return varied


def densities(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical densities, -ln(I / glass), of a slightly smoothed thumbnail. float32 (3, h, w)."""
    smooth = _smoothed(thumbnail)
    colour = _glass(smooth)
    density = np.maximum(smooth, _DARKEST, out=smooth)  # in place, as are the next: a copy takes 12 bytes a pixel
    density /= colour
    np.negative(np.log(density, out=density), out=density)
    return density.transpose(2, 0, 1)


def glass(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The colour of clean glass on a thumbnail, float32 (3,)."""
    return _glass(_smoothed(thumbnail))


def _smoothed(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Compression leaves blocks of false colour around edges; one pixel of blur takes them out.
    smooth = thumbnail.astype(np.float32)
    scipy.ndimage.gaussian_filter(smooth, (1.0, 1.0, 0.0), mode="nearest", output=smooth)
    return smooth


def _glass(smooth: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour of glass from the brightest twentieth of a smoothed picture.

    Where that is no bright, nearly neutral colour, there is no glass in the picture: then it is white.
    """
    darkest_channel = smooth.min(axis=2)
    lit = darkest_channel[darkest_channel > _DARKEST]
    if not lit.size:
        return np.full(3, 255, np.float32)
    brightest = smooth[darkest_channel >= np.percentile(lit, 95, overwrite_input=True)]
    colour: NDArray[np.float32] = np.median(brightest, axis=0).astype(np.float32)
    if colour.min() < 150 or np.ptp(colour) > _TINT:
        return np.full(3, 255, np.float32)
    return colour


def ink(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Pen strokes and black borders, with their blurred edges: bool (h, w). density: float32 (3, h, w)."""
    cool, red_ink = ink_colours(density)
    strokes = without_small(cool, _STROKE_UM2 / mpp**2) | without_small(red_ink, _RED_STROKE_UM2 / mpp**2)
    return grown(strokes, _RIM_UM / mpp)


def ink_colours(density: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the colour is that of blue, green or black ink, and where that of red ink: bool (h, w) each."""
    red, green, blue = density
    blue_or_green = (red > _INK_RED_TO_GREEN * green) & (red > _STAINED)
    red_ink = (blue > _RED_INK_BLUE_TO_GREEN * green) & (red < _RED_INK_RED_TO_GREEN * green)
    spread = density.max(axis=0) - density.min(axis=0)
    black = (density.min(axis=0) > _BLACK_DENSITY) & (spread < _BLACK_SPREAD * density.max(axis=0))
    return blue_or_green | black, red_ink & (green > _RED_INK_DENSITY)


def grown(mask: NDArray[np.bool_], by_px: float) -> NDArray[np.bool_]:
    """All pixels within `by_px` of the mask."""
    if not mask.any():
        return mask
    grown = np.empty_like(mask)
    reach = math.ceil(by_px) + 1  # rows; what is further away is not within `by_px` in any case
    for first, last in _strips(mask.shape, least=reach):
        top = max(0, first - reach)
        strip = mask[top : last + reach]
        near = scipy.ndimage.distance_transform_edt(~strip) <= by_px if strip.any() else strip
        grown[first:last] = near[first - top : last - top]
    return grown


def shrunk(mask: NDArray[np.bool_], by_px: float) -> NDArray[np.bool_]:
    """All pixels further than `by_px` from what is not the mask. The picture's edge takes nothing away."""
    return ~grown(~mask, by_px)


def filled(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """The mask without its holes under `area_px` pixels. What is open to the picture's edge is no hole."""
    labels, _ = scipy.ndimage.label(np.pad(~mask, 1, constant_values=True))
    small = _sizes(labels) < area_px
    small[labels[0, 0]] = False
    filled: NDArray[np.bool_] = mask | small[labels][1:-1, 1:-1]
    return filled


def without_small(mask: NDArray[np.bool_], area_px: float) -> NDArray[np.bool_]:
    """The mask's pieces of at least `area_px` pixels; pieces touch by sides or corners."""
    labels, _ = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    large = _sizes(labels) >= area_px
    large[0] = False
    kept: NDArray[np.bool_] = large[labels]
    return kept


def _sizes(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Pixels of each label, in strips, as `np.bincount` copies its input to integers of 8 bytes."""
    count = int(labels.max(initial=0)) + 1
    sizes = np.zeros(count, np.int64)
    for first, last in _strips(labels.shape):
        sizes += np.bincount(labels[first:last].ravel(), minlength=count)
    return sizes


def _strips(shape: tuple[int, ...], least: int = 1) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of strips of at least so many rows, of about _STRIP_PX pixels."""
    height, width = shape
    rows = max(least, _STRIP_PX // max(1, width))
    for first in range(0, height, rows):
        yield first, min(first + rows, height)
