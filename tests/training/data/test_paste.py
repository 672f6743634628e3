"""Copy-paste of nuclei: what is there stays; what comes is whole, numbered, classed, and coloured like the crop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from training.data.paste import HIDDEN, LEAST_PX, MOST, paste
from training.data.sample import LabelledImage

SIDE = 96
PINK, PURPLE = (225, 180, 215), (110, 70, 160)


def tissue(seed: int, nuclei: int, colours: tuple[tuple[int, ...], ...] = (PINK, PURPLE)) -> LabelledImage:
    """Discs of different sizes, some cut by the edge or by others, in two colours with noise; of classes 1 to 4."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    labels = np.zeros((SIDE, SIDE), np.int32)
    for number in range(1, nuclei + 1):
        cy, cx, radius = *rng.uniform(0, SIDE, 2), rng.uniform(3, 12)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = number
    image = np.array(colours)[(labels > 0).astype(int)] + rng.normal(0, 5, (SIDE, SIDE, 3))
    return LabelledImage(image.clip(0, 255).astype(np.uint8), labels, rng.integers(1, 5, nuclei))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(0, 12))
def test_the_crop_keeps_its_nuclei_and_gets_whole_ones(seed: int, there: int, given_: int) -> None:
    """Numbers and classes agree, each pasted nucleus is one part, and nothing else changes its label."""
    crop, donor = tissue(seed, there), tissue(seed + 1, given_)
    before = [array.copy() for array in (*crop[:3], *donor[:3])]
    pasted = paste(crop, donor, np.random.default_rng(seed))
    for array, copy in zip((*crop[:3], *donor[:3]), before, strict=True):
        np.testing.assert_array_equal(array, copy)

    for name in ("image", "labels"):
        after, array = getattr(pasted, name), getattr(crop, name)
        assert (after.shape, after.dtype) == (array.shape, array.dtype)
    assert pasted.class_index.dtype == np.int64
    new = pasted.labels > there
    np.testing.assert_array_equal(pasted.labels[~new], crop.labels[~new])
    assert not crop.labels[new].any()
    count = len(pasted.class_index) - there
    assert 0 <= count <= min(MOST, given_)
    assert set(np.unique(pasted.labels[new])) == set(range(there + 1, there + count + 1))
    np.testing.assert_array_equal(pasted.class_index[:there], crop.class_index)
    areas = np.bincount(donor.labels.ravel(), minlength=given_ + 1)[1:]
    for number in range(there + 1, there + count + 1):
        mask = pasted.labels == number
        assert ndimage.label(mask)[1] == 1
        # a nucleus of the donor, of this class, of which at least so much is visible
        of_class = areas[donor.class_index == pasted.class_index[number - 1]]
        assert any((1 - HIDDEN) * area <= mask.sum() <= area for area in of_class if area >= LEAST_PX)
    # far from what came, nothing changes
    far = ndimage.distance_transform_edt(~new) > 8 if new.any() else np.ones_like(new)
    np.testing.assert_array_equal(pasted.image[far], crop.image[far])
    if not there:
        assert not count


def test_most_nuclei_are_pasted_so_that_they_touch_another() -> None:
    touching = total = 0
    for seed in range(20):
        crop = tissue(seed, 3)
        pasted = paste(crop, tissue(seed + 100, 12), np.random.default_rng(seed))
        for number in range(4, len(pasted.class_index) + 1):
            mask = pasted.labels == number
            near = ndimage.binary_dilation(mask, iterations=2) & ~mask
            touching += bool(pasted.labels[near].any())
            total += 1
    assert total > 40
    assert touching > 0.6 * total


def test_pasted_nuclei_take_the_colours_of_the_crop() -> None:
    """Without a rim of their old surroundings, however unlike those are."""
    crop = tissue(0, 4)
    donor = tissue(1, 12, ((250, 250, 240), (60, 30, 120)))
    pasted = paste(crop, donor, np.random.default_rng(2))
    new = pasted.labels > 4
    assert new.any()
    inside = ndimage.binary_erosion(new, iterations=2)
    assert np.abs(pasted.image[inside].mean(0) - PURPLE).max() < 20
    around = ndimage.binary_dilation(new, iterations=4) & (pasted.labels == 0)
    assert pasted.image[around].max(0).tolist() <= (crop.image[crop.labels == 0].max(0) + 12).tolist()


def test_nothing_is_pasted_on_glass() -> None:
    crop = tissue(0, 2, ((250, 250, 250), PURPLE))
    for seed in range(10):
        pasted = paste(crop, tissue(1, 12), np.random.default_rng(seed))
        assert len(pasted.class_index) == 2
