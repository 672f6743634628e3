"""Augmentation of training crops: the variation that staining, scanners and sectioning bring."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.config import Training

# Ruifrok & Johnston 2001: optical densities of haematoxylin, eosin and the residual, in rows, normalised
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED /= np.linalg.norm(HED, axis=1, keepdims=True)
RGB_FROM_HED = HED.astype(np.float32)
HED_FROM_RGB = np.linalg.inv(HED).astype(np.float32)
_DENSITIES = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # of each intensity

SCANNED_MPP = (0.2, 0.5)  # um per pixel of scanners that call it 40x and 20x


def crop(
    image: NDArray[np.uint8],
    labels: NDArray[np.int32],
    zoom: float,
    side: int,
    strength: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """A random square of the image, turned, flipped, bent, resampled by `zoom` to `side` px.

    Labels are resampled by the nearest pixel. Images smaller than the crop are padded by white.
    strength: 0 bends nothing, 1 three crops in ten
    """
    source = max(8, round(side / zoom))
    short_y, short_x = (max(0, source - n) for n in labels.shape)
    if short_y or short_x:
        image = np.pad(image, ((0, short_y), (0, short_x), (0, 0)), constant_values=255)
        labels = np.pad(labels, ((0, short_y), (0, short_x)))
    y = int(rng.integers(0, labels.shape[0] - source + 1))
    x = int(rng.integers(0, labels.shape[1] - source + 1))
    window = (slice(y, y + source), slice(x, x + source))
    pixels = Image.fromarray(np.ascontiguousarray(image[window]))
    map_ = Image.fromarray(np.ascontiguousarray(labels[window]))
    if rng.random() < 0.3 * strength:
        mesh = bend(source, side, rng)
        pixels = pixels.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
        map_ = map_.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.NEAREST)
    else:
        pixels = pixels.resize((side, side), Image.Resampling.BICUBIC)
        map_ = map_.resize((side, side), Image.Resampling.NEAREST)
    turned, turned_labels = np.asarray(pixels), np.asarray(map_)
    if rng.random() < 0.5:
        turned, turned_labels = turned[:, ::-1], turned_labels[:, ::-1]
    turns = int(rng.integers(4))
    return np.rot90(turned, turns), np.rot90(turned_labels, turns)


def size_factor(least: float, training: Training, rng: np.random.Generator) -> float:
    """By which factor a crop's nuclei are resized, for they vary in size between organs and scanners: log-uniform.

    least: the factor at which the whole image is the crop. A small image is shrunk less, if at all, so that it fills
    the crop: no tissue ends in a straight line with white behind it.
    """
    shrink = max(training.shrink, min(1.0, least))
    return math.exp(rng.uniform(math.log(shrink), math.log(training.enlarge)))


def bend(source: int, side: int, rng: np.random.Generator) -> list[tuple[tuple[int, int, int, int], tuple[float, ...]]]:
    """A mesh for Pillow that shifts the knots of a grid at random: sectioning stretches the tissue.

    Maps a square of `side` px onto one of `source` px; inner knots move by up to a fifth of a cell, so that
    no cell folds over, and the outline stays.
    """
    cells = 6  # along a side
    knots = np.linspace(0, source, cells + 1)
    grid = np.stack(np.meshgrid(knots, knots), -1)  # (cells + 1, cells + 1, 2), x y in source px
    grid[1:-1, 1:-1] += rng.uniform(-0.2, 0.2, (cells - 1, cells - 1, 2)) * source / cells
    edges = np.linspace(0, side, cells + 1).round().astype(int)
    return [
        (
            (int(edges[c]), int(edges[r]), int(edges[c + 1]), int(edges[r + 1])),
            # the corners of a cell as Pillow wants them: upper left, lower left, lower right, upper right
            tuple(grid[[r, r + 1, r + 1, r], [c, c, c + 1, c + 1]].ravel().tolist()),
        )
        for r in range(cells)
        for c in range(cells)
    ]


def recolour(image: NDArray[np.uint8], training: Training, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random stain, brightness, blur, noise and compression, as laboratories differ in them. uint8 (h, w, 3).

    The stain moves in Ruifrok's colour space: each density is scaled and shifted (Tellez et al. 2018). All of them
    scaled by one factor is a gamma.
    """
    strength = training.strength
    density = _DENSITIES.take(image) @ HED_FROM_RGB
    density *= rng.normal(1, 0.22 * strength, 3).clip(0.4, 1.8).astype(np.float32)
    density += rng.normal(0, 0.04 * strength, 3).astype(np.float32)
    if training.gamma:
        density *= math.exp(rng.normal(0, training.gamma))
    light = np.exp(-density @ RGB_FROM_HED)
    light = (light - 0.5) * rng.normal(1, 0.12 * strength) + 0.5 + rng.normal(0, 0.04 * strength)
    light *= rng.normal(1, 0.04 * strength, 3).astype(np.float32)
    pixels = Image.fromarray((light.clip(0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.25:
        pixels = pixels.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.3))))
    recoloured = np.asarray(pixels)
    if rng.random() < 0.2:
        noise = rng.normal(0, rng.uniform(2, 8), recoloured.shape)
        recoloured = (recoloured + noise).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        return compress(recoloured, int(rng.integers(35, 90)))
    return recoloured


def rescan(image: NDArray[np.uint8], mpp: float, training: Training, rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image as another scanner would have given it: coarser, sharpened, compressed. uint8 (h, h, 3).

    mpp: um of the tissue per pixel of the image
    Reduced (antialiased) to a scale of SCANNED_MPP, log-uniform, and enlarged to the same number of pixels in the
    end; sharpening and the blocks of JPEG are of the scanner's pixels, as in slides.
    """
    side = len(image)
    finest, coarsest = map(math.log, SCANNED_MPP)
    scanned_side = min(side, round(side * mpp / math.exp(rng.uniform(finest, coarsest))))
    scanned = Image.fromarray(image).resize((scanned_side, scanned_side), Image.Resampling.BOX)
    if rng.random() < training.sharpen:
        scanned = scanned.filter(
            ImageFilter.UnsharpMask(float(rng.uniform(0.5, 2)), int(rng.integers(50, 200)), threshold=0)
        )
    if rng.random() < training.recompress:
        for _ in range(int(rng.integers(1, 3))):
            scanned = Image.fromarray(_compress_off_grid(np.asarray(scanned), rng))
    return np.asarray(scanned.resize((side, side), Image.Resampling.BICUBIC))


def _compress_off_grid(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """JPEG of random quality and resolution of chroma; the blocks begin anywhere, as in a part of a slide."""
    y, x = (int(n) for n in rng.integers(0, 16, 2))  # blocks of chroma at half resolution are 16 px wide
    around = np.pad(image, ((y, 0), (x, 0), (0, 0)), mode="edge")
    return compress(around, int(rng.integers(40, 95)), int(rng.integers(3)))[y:, x:]


def compress(image: NDArray[np.uint8], quality: int, subsampling: int = 2) -> NDArray[np.uint8]:
    """The image after JPEG compression of this quality, which scanners use. uint8 (h, w, 3).

    subsampling: of chroma, as Pillow counts: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0
    """
    with io.BytesIO() as buffer:
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        return np.asarray(Image.open(buffer))
