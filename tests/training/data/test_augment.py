"""Sizes of nuclei and scanners."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from training.config import Training
from training.data.augment import compress, rescan, size_factor

PLAIN = dataclasses.replace(Training(), sharpen=0.0, recompress=0.0)


@given(st.integers(0, 10**6), st.floats(0.05, 4))
def test_nuclei_are_resized_within_the_range_that_the_image_allows(seed: int, least: float) -> None:
    """A large image has the whole range; one that the crop would exceed is never shrunk that far."""
    factor = size_factor(least, Training(), np.random.default_rng(seed))
    assert max(Training().shrink, min(1, least)) <= factor <= Training().enlarge


@given(st.integers(0, 10**6), st.floats(0.05, 0.6), st.floats(0, 1), st.floats(0, 1))
def test_another_scanner_keeps_size_and_type(seed: int, mpp: float, sharpen: float, recompress: float) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    training = dataclasses.replace(Training(), sharpen=sharpen, recompress=recompress)
    scanned = rescan(image, mpp, training, rng)
    assert scanned.shape == image.shape
    assert scanned.dtype == np.uint8


def test_a_coarse_scanner_loses_detail_and_no_light() -> None:
    image = np.random.default_rng(0).integers(100, 156, (96, 96, 3), dtype=np.uint8)
    for seed in range(8):
        coarse = rescan(image, 0.1, PLAIN, np.random.default_rng(seed))
        assert coarse.std() < 0.7 * image.std()
        assert abs(coarse.mean() - image.mean()) < 1
        # tissue that has no finer pixels than the scanner's stays as it is
        np.testing.assert_array_equal(rescan(image, 0.5, PLAIN, np.random.default_rng(seed)), image)


def test_sharpening_leaves_halos_along_edges() -> None:
    image = np.full((96, 96, 3), 200, np.uint8)
    image[:, 48:] = 100
    for seed in range(8):
        sharp = rescan(image, 0.5, dataclasses.replace(PLAIN, sharpen=1.0), np.random.default_rng(seed))
        assert sharp[48, 47].min() > 204
        assert sharp[48, 48].max() < 96
        assert sharp[48, [8, 88]].tolist() == [[200] * 3, [100] * 3]


def test_compression_at_half_resolution_smears_colour() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, ::2] = (200, 0, 0)
    image[:, 1::2] = (0, 0, 200)
    full, half = (compress(image, 95, subsampling) for subsampling in (0, 2))
    assert full[..., 0].std() > 3 * half[..., 0].std()
    assert ndimage.uniform_filter(half[..., 0], 9).std() < 10
