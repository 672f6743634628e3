"""Pictures of an evaluation: image, annotations and detections side by side."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline.files import committed
from training.measures import Labels, overlap

Colour = tuple[int, int, int]

# visible on pink, on purple and on glass, and distinct for the colour-blind
HIT, MISSED, FALSE = (0, 235, 90), (255, 220, 0), (0, 80, 255)
_LEAST_PX = 700  # smaller images are enlarged by whole factors
_GAP, _LINE = 8, 28


class Panel(NamedTuple):
    pixels: NDArray[np.uint8]
    caption: tuple[tuple[str, Colour], ...]  # words in the colours of the outlines


def draw(image: NDArray[np.uint8], truth: Labels, detected: Labels, path: Path) -> None:
    """Write a PNG of three panels, with a legend below each.

    image: uint8 (h, w, 3); truth, detected: label maps (h, w)
    Annotated nuclei are hit (IoU > .5) or missed, detections hit or false.
    """
    pairs = overlap(truth, detected)
    factor = max(1, math.ceil(_LEAST_PX / max(truth.shape)))
    hit = pairs.truth_ids[pairs.truth[pairs.hit]]
    right = pairs.detected_ids[pairs.detected[pairs.hit]]
    hits, missed, false = len(hit), len(pairs.truth_ids) - len(hit), len(pairs.detected_ids) - len(right)
    panels = (
        Panel(_enlarge(image, factor), (("image", (60, 60, 60)),)),
        Panel(
            _outlined(image, truth, hit, MISSED, factor),
            ((f"annotated: hit {hits}", HIT), (f"missed {missed}", MISSED)),
        ),
        Panel(
            _outlined(image, detected, right, FALSE, factor),
            ((f"detected: hit {hits}", HIT), (f"false {false}", FALSE)),
        ),
    )
    with committed(path) as part:
        _side_by_side(panels).save(part, "PNG")


def _enlarge(array: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _outlined(
    image: NDArray[np.uint8], labels: Labels, hits: NDArray[np.int64], other: Colour, factor: int
) -> NDArray[np.uint8]:
    """The image, enlarged, with the nuclei's outlines along their inner edge: one pixel wide, two if enlarged."""
    shown = _enlarge(image, factor)
    large = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    width = 3 if factor == 1 else 5
    edge = (large > 0) & (ndimage.maximum_filter(large, width) != ndimage.minimum_filter(large, width))
    is_hit = np.isin(large, hits)
    shown[edge & is_hit] = HIT
    shown[edge & ~is_hit] = other
    return shown


def _side_by_side(panels: tuple[Panel, ...]) -> Image.Image:
    height, width = panels[0].pixels.shape[:2]
    sheet = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height + _LINE), (255, 255, 255))
    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for number, panel in enumerate(panels):
        x = number * (width + _GAP)
        sheet.paste(Image.fromarray(panel.pixels), (x, 0))
        for words, colour in panel.caption:
            # a swatch, since bright words on white cannot be read
            write.rectangle((x + 2, height + 7, x + 16, height + 21), fill=colour, outline=(90, 90, 90))
            write.text((x + 22, height + 5), words, fill=(0, 0, 0), font=font)
            x += 34 + int(write.textlength(words, font=font))
    return sheet
