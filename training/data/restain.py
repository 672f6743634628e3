"""Crops in the stains of other training images, and in stains between them."""

import contextlib
import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import StainError
from pipeline.model.fitted_stain import TEMPLATE, FittedStain, Normalisation
from pipeline.model.stain import Normaliser
from pipeline.model.stain_fit import fit
from training.config import Training

MOST_GAIN = 1.5
VECTORS = {"haematoxylin", "eosin"}  # numbers of Macenko's method, unit vectors
_ALIKE = math.cos(math.radians(20))  # Kumar's images are within 17 degrees of the typical one, DSB's purple ones beyond

Stains = tuple[FittedStain | None, FittedStain | None]  # of one method, the crop's own and another


def fit_image(image: NDArray[np.uint8], method: str) -> FittedStain | None:
    """The stain of an image (h, w, 3); None for one without enough stained tissue, which is then left as it is.

    None, too, where Macenko's vectors are not those of haematoxylin and eosin: in an image of one stain the second is
    noise, and moving to it gives colours that no slide has.
    """
    with contextlib.suppress(StainError):
        fitted = fit(image[None], np.ones((1, *image.shape[:2]), bool), method)
        typical = TEMPLATE[method].numbers
        if all(np.dot(fitted.numbers[name], typical[name]) > _ALIKE for name in VECTORS & typical.keys()):
            return fitted
    return None


def choose_method(training: Training, rng: np.random.Generator) -> str:
    return "macenko" if training.macenko and rng.random() < training.macenko else "reinhard"


def restain(
    image: NDArray[np.uint8], stains: Stains, training: Training, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The image (h, w, 3) moved towards another stain: all the way, or with `mix` a random part of it."""
    way = 1 - training.mix * rng.random() if training.mix else 1.0
    source, target = stains
    if source is None or target is None:
        return image
    light = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2).float() / 255
    normaliser = Normaliser(Normalisation(source, between(source, target, way)))
    moved: NDArray[np.uint8] = (normaliser(light)[0] * 255).round().byte().numpy()
    return np.ascontiguousarray(moved.transpose(1, 2, 0))


def between(source: FittedStain, target: FittedStain, way: float) -> FittedStain:
    """The stain at `way` (0 to 1) from source to target, both of one method: numbers are interpolated.

    Glass gets brighter, not darker: some sets are underexposed, and slides are not. Macenko's vectors are of length 1
    again. Spreads (Reinhard's deviations, Macenko's strengths) change by at most MOST_GAIN either way: more would show
    the noise of the image.
    Law: `source` at 0, within rounding.
    """
    numbers = {}
    for name, values in source.numbers.items():
        start, end = np.array(values), np.array(target.numbers[name])
        if name == "white":
            end = np.maximum(start, end)
        if name in ("deviation", "strength"):
            end = end.clip(start / MOST_GAIN, start * MOST_GAIN)
        mixed = start + way * (end - start)
        if name in VECTORS:
            mixed /= np.linalg.norm(mixed)
        numbers[name] = tuple(mixed.tolist())
    return FittedStain(source.method, numbers)
