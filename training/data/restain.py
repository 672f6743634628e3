"""Crops in the stains of other training images, and in stains between them."""

import contextlib
import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import StainError
from pipeline.model.stain import FittedStain, Normalisation, Normaliser, fit
from training.config import Training

Stains = tuple[FittedStain | None, FittedStain | None]  # of one method, the crop's own and another


def fit_image(image: NDArray[np.uint8], method: str) -> FittedStain | None:
    """The stain of an image (h, w, 3); None for one without enough stained tissue, which is then left as it is."""
    with contextlib.suppress(StainError):
        return fit(image[None], np.ones((1, *image.shape[:2]), bool), method)
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
    light = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    normaliser = Normaliser(Normalisation(source, between(source, target, way)))
    moved: NDArray[np.uint8] = (normaliser(light)[0] * 255).round().byte().numpy()
    return np.ascontiguousarray(moved.transpose(1, 2, 0))


def between(source: FittedStain, target: FittedStain, way: float) -> FittedStain:
    """The stain at `way` (0 to 1) from source to target, both of one method: numbers are interpolated.

    Macenko's vectors are of length 1 again. Law: `source` at 0, `target` at 1, within rounding.
    """
    numbers = {
        name: tuple(a + way * (b - a) for a, b in zip(values, target.numbers[name], strict=True))
        for name, values in source.numbers.items()
    }
    for name in {"haematoxylin", "eosin"} & numbers.keys():
        length = math.hypot(*numbers[name])
        numbers[name] = tuple(v / length for v in numbers[name])
    return FittedStain(source.method, numbers)
