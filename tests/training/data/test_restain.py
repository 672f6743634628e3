"""Stains between images: the ends are those of the images, and only H&E is moved to."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.model.fitted_stain import FittedStain
from training.config import Training
from training.data.restain import MOST_GAIN, between, fit_image, restain

HAEMATOXYLIN, EOSIN = np.array([0.55, 0.74, 0.39]), np.array([0.12, 0.84, 0.53])


def stained(strength: float, second: NDArray[np.float64] = EOSIN, seed: int = 0) -> NDArray[np.uint8]:
    """Cells of 4 px with random amounts of two stains, on glass in a corner."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0, strength, (48, 48, 2)) * (1, 0.6)
    amounts[:8, :8] = 0
    light = np.exp(-amounts @ np.stack([HAEMATOXYLIN, second]))
    image: NDArray[np.uint8] = (255 * light).round().astype(np.uint8).repeat(4, 0).repeat(4, 1)
    return image


def fitted(image: NDArray[np.uint8], method: str) -> FittedStain:
    stain = fit_image(image, method)
    assert stain is not None
    return stain


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_stain_between_two_ends_at_both(method: str) -> None:
    weak, strong = fitted(stained(1.4), method), fitted(stained(1.9, seed=1), method)
    for way, end in ((0, weak), (1, strong)):
        mixed = between(weak, strong, way)
        for name, numbers in end.numbers.items():
            assert mixed.numbers[name] == pytest.approx(numbers, abs=1e-5)
    FittedStain.from_json(between(weak, strong, 0.5).to_json())


@given(st.floats(0, 1), st.floats(0.01, 100))
def test_spreads_change_by_no_more_than_noise_bears(way: float, times: float) -> None:
    source = FittedStain("reinhard", {"white": (1.0,) * 3, "mean": (0.0,) * 3, "deviation": (0.2,) * 3})
    target = FittedStain("reinhard", {"white": (0.5,) * 3, "mean": (-1.0,) * 3, "deviation": (0.2 * times,) * 3})
    mixed = between(source, target, way).numbers
    assert max(mixed["deviation"]) <= 0.2 * MOST_GAIN * 1.000001
    assert min(mixed["deviation"]) >= 0.2 / MOST_GAIN / 1.000001
    assert mixed["white"] == source.numbers["white"]  # never darker
    assert between(target, source, 1.0).numbers["white"] == source.numbers["white"]


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_an_image_is_moved_to_another_stain_or_a_part_of_the_way(method: str) -> None:
    weak, strong = stained(1.4), stained(1.9, seed=1)
    stains = (fitted(weak, method), fitted(strong, method))
    whole = dataclasses.replace(Training(), mix=0.0)
    moved = restain(weak, stains, whole, np.random.default_rng(0))
    assert moved.shape == weak.shape
    assert moved.dtype == np.uint8
    assert moved.mean() == pytest.approx(strong.mean(), abs=3)
    parts = [restain(weak, stains, Training(), np.random.default_rng(seed)).mean() for seed in range(8)]
    assert strong.mean() - 3 < min(parts) < max(parts) < weak.mean() + 1
    assert max(parts) - min(parts) > 5
    own = restain(weak, (stains[0], stains[0]), Training(), np.random.default_rng(0))
    assert np.abs(own.astype(int) - weak).max() <= 1
    np.testing.assert_array_equal(restain(weak, (stains[0], None), whole, np.random.default_rng(0)), weak)


def test_an_image_without_eosin_is_not_moved_by_macenko() -> None:
    blue = np.array([0.75, 0.6, 0.25])
    assert fit_image(stained(1.4), "macenko") is not None
    assert fit_image(stained(1.4, blue), "macenko") is None
    assert fit_image(np.full((64, 64, 3), 255, np.uint8), "reinhard") is None
