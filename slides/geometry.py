"""Sizes, boxes, and frames: pixel grids over a slide, each with its scale and its affine to the slide.

x right, y down. Boxes are half-open. Points are `(x, y)`, arrays are `(y, x)`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Size(NamedTuple):
    """Extent in pixels; the frame is that of whatever holds it."""

    width: int
    height: int


class Box(NamedTuple):
    """Half-open rectangle of pixels: `x0 <= x < x1`, `y0 <= y < y1`. Methods never give a negative size."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def corner(self) -> tuple[int, int]:
        """The upper left one, x y."""
        return self.x0, self.y0

    @property
    def area(self) -> int:
        """Pixels inside; 0 exactly when the box is empty."""
        return self.width * self.height

    def intersect(self, other: "Box") -> "Box":
        """The pixels in both. Disjoint boxes give an empty box, never a negative one."""
        x0, y0 = max(self.x0, other.x0), max(self.y0, other.y0)
        return Box(x0, y0, max(x0, min(self.x1, other.x1)), max(y0, min(self.y1, other.y1)))

    def shift(self, dx: int, dy: int) -> "Box":
        """The same box, moved."""
        return Box(self.x0 + dx, self.y0 + dy, self.x1 + dx, self.y1 + dy)

    def within(self, corner: tuple[int, int]) -> tuple[slice, slice]:
        """Index `(rows, columns)` of this box in an array whose first pixel lies at `corner` (x, y)."""
        x, y = corner
        return slice(self.y0 - y, self.y1 - y), slice(self.x0 - x, self.x1 - x)


def cells(box: Box, side: tuple[int, int], *, lattice: bool = False) -> Iterator[Box]:
    """Cut `box` into rectangles of at most `side` (width, height), row by row.

    lattice: they are whole and start at multiples of `side`, so that the outer ones hang over the box.
    """
    width, height = side
    left, top = (box.x0 // width * width, box.y0 // height * height) if lattice else box.corner
    for y in range(top, box.y1, height):
        for x in range(left, box.x1, width):
            cell = Box(x, y, x + width, y + height)
            yield cell if lattice else cell.intersect(box)


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds every one of `boxes`, of which there is at least one."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return Box(min(x0), min(y0), max(x1), max(y1))


class Affine(NamedTuple):
    """Pixels of one frame -> pixels of another: `xy * scale + offset`, axis by axis.

    Law: `invert(apply(xy)) == xy` within rounding, and the other way round.
    """

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def apply(self, xy: ArrayLike) -> NDArray[np.float64]:
        """xy: (..., 2). Returns float64 (..., 2), px of the other frame."""
        points = np.asarray(xy, dtype=np.float64)
        return points * (self.scale_x, self.scale_y) + (self.offset_x, self.offset_y)

    def invert(self, xy: ArrayLike) -> NDArray[np.float64]:
        """xy: (..., 2), px of the other frame. Returns float64 (..., 2)."""
        points = np.asarray(xy, dtype=np.float64)
        return (points - (self.offset_x, self.offset_y)) / (self.scale_x, self.scale_y)


class Frame(NamedTuple):
    """A pixel grid over a slide's bounds, from their top-left corner. Made by `Slide.frame`.

    size: px; mpp: micrometres per px; to_slide: px of this frame -> slide px (level 0).
    The last row and column may hang over the bounds by less than a pixel.
    """

    size: Size
    mpp: float
    to_slide: Affine

    @property
    def box(self) -> Box:
        """All of it."""
        return Box(0, 0, *self.size)
