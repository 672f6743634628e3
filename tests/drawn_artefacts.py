"""Artefacts drawn over pixels of real slides, for the tests of what finds them."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from slides.artefacts import Artefacts, find_artefacts, read_texture
from slides.slide import open_slide
from slides.tissue import tissue_mask

CELL = 8.0  # um
INKS = {
    "black": (30, 30, 32),
    "blue": (35, 60, 165),
    "green": (30, 125, 70),
    "red": (205, 30, 50),
    "purple": (95, 35, 130),
    "yellow": (245, 215, 20),
}
SLIDES = {
    "CMU-1-Small-Region.svs": None,
    "TCGA-CR-7395-01A-01-TS1.svs": 0.5,
    "philips.tiff": None,
    "mirax-sparse.mrxs": None,
    "leica-offset-region.scn": None,
}


class Seen(NamedTuple):
    """What was detected on a picture, a pixel for each cell of 8 um."""

    found: Artefacts
    tissue: np.ndarray


def detect(path: Path, mpp: float | None = None) -> Seen:
    """Tissue and artefacts of a slide or picture; mpp: of one that states none."""
    with open_slide(path, default_mpp=mpp) as slide:
        frame = slide.frame(CELL)
        thumbnail = slide.thumbnail(frame)
        tissue = tissue_mask(thumbnail, CELL, min_area_um2=10_000, margin_um=40)
        return Seen(find_artefacts(thumbnail, read_texture(slide, frame, thumbnail), tissue, CELL), tissue)


def picture(slides: Path, name: str, mpp: float) -> np.ndarray:
    """All of a shared slide, uint8 (h, w, 3), at `mpp`."""
    with open_slide(slides / name, default_mpp=SLIDES[name]) as slide:
        return slide.thumbnail(slide.frame(mpp))


def compressed(image: np.ndarray, quality: int = 80) -> np.ndarray:
    """The picture after JPEG compression."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def stroke(shape: tuple[int, int], width_px: float, seed: int) -> np.ndarray:
    """How much ink a curved stroke of a felt pen leaves: float (h, w), about 1 inside, with soft edges and streaks."""
    rng = np.random.default_rng(seed)
    height, width = shape
    image = Image.new("L", (width, height))
    draw, t = ImageDraw.Draw(image), np.linspace(0, 1, 60)[:, None]
    a, b, c, d = rng.uniform(0.1, 0.9, (4, 2)) * (width, height)
    way = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
    draw.line([(x, y) for x, y in way.tolist()], fill=255, width=int(width_px), joint="curve")
    for x, y in way.tolist():
        draw.ellipse((x - width_px / 2, y - width_px / 2, x + width_px / 2, y + width_px / 2), fill=255)
    streaks = ndimage.zoom(
        ndimage.gaussian_filter(rng.standard_normal((height // 8 + 2, width // 8 + 2)), 3), 8, order=1
    )
    soft = ndimage.gaussian_filter(np.asarray(image, float) / 255, 2)
    amount: np.ndarray = soft * np.clip(1 + 0.1 * streaks[:height, :width] / streaks.std(), 0.6, 1.3)
    return amount


def inked(image: np.ndarray, ink: str, amount: np.ndarray, *, translucent: bool) -> np.ndarray:
    """A picture with ink over it; translucent: the densities add up, else the ink covers what is below."""
    amount, colour = np.clip(amount, 0, 1)[..., None], np.array(INKS[ink], float)
    over = image * (colour / 250) ** amount if translucent else image * (1 - amount) + colour * amount
    return compressed(np.clip(over, 0, 255).astype(np.uint8))


def in_cells(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask of a picture as a mask of its cells, bool."""
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
