"""A slide as Deep Zoom: JPEG tiles of a pyramid in which each level has half the side of the next one."""

import math
from io import BytesIO

from PIL import Image

from slides.geometry import Affine, Box, Frame, Size
from slides.slide import Slide

TILE_PX = 512
_QUALITY = 85


class DeepZoom:
    """The tiles of a slide's bounds. Safe to use from several threads, as `Slide` is.

    slide; size: of the bounds, slide px; levels: the coarsest one, which fits into one tile, and the finest one, which
    has slide px. Levels are numbered as Deep Zoom numbers them: level 0 would be one pixel.
    """

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.size = slide.bounds.size
        finest = math.ceil(math.log2(max(self.size)))
        self.levels = range(min(finest, int(math.log2(TILE_PX))), finest + 1)

    def tile(self, level: int, col: int, row: int) -> bytes | None:
        """A tile as JPEG; what cannot be decoded is white. None where there is no such tile. Raises SlideTooLarge."""
        if level not in self.levels:
            return None
        frame = self._frame(level)
        left, top = col * TILE_PX, row * TILE_PX
        box = Box(left, top, left + TILE_PX, top + TILE_PX).intersect(frame.box)
        if not box.area:
            return None
        file = BytesIO()
        Image.fromarray(self.slide.read_for_display(box, frame)).save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()

    def _frame(self, level: int) -> Frame:
        """The pixels of a level."""
        ratio = 2 ** (self.levels[-1] - level)  # slide px per px
        size = Size(-(-self.size.width // ratio), -(-self.size.height // ratio))
        corner = self.slide.bounds
        return Frame(size, self.slide.scale.x * ratio, Affine(ratio, ratio, float(corner.x0), float(corner.y0)))
