"""Crop number i is one crop: in every process, in any order, and however often it is asked for."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from training.config import Training
from training.data.crops import Crop, Crops
from training.data.sample import Dataset, LabelledImage, Sample, labelled_image

ALL = replace(Training(), seed=3, normalise=1.0, rescan=1.0, sharpen=1.0, recompress=1.0, paste=1.0, by_class=True)
OFF = replace(ALL, gamma=0.0, normalise=0.0, rescan=0.0, paste=0.0)


def read(seed: int, side: int, number: int) -> LabelledImage:
    """Purple discs on pink with noise; every nucleus of class `number`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for nucleus, (cy, cx) in enumerate(rng.uniform(0, side, (25, 2)), 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(20, 80)] = nucleus
    image = np.array([(225, 180, 215), (110, 70, 160)])[np.minimum(labels, 1)] + rng.normal(0, 12, (side, side, 3))
    return labelled_image(image.clip(0, 255).astype(np.uint8), labels, np.full(25, number))


def dataset(number: int, side: int) -> Dataset:
    images = tuple(Sample(str(i), str(i), 0.25, partial(read, 10 * number + i, side, number)) for i in range(3))
    return Dataset(f"set {number}", images, ("Round", "Other"))


def crops(training: Training) -> Crops:
    return Crops([dataset(1, 200), dataset(2, 120)], 96, 0.25, training)


def assert_same(a: Crop, b: Crop) -> None:
    for name, ours, theirs in zip(Crop._fields, a, b, strict=True):
        assert torch.equal(ours, theirs), name


def test_crops_do_not_depend_on_which_were_made_before() -> None:
    """Stains are fitted when they are first needed: that may not show."""
    first, second = crops(ALL), crops(ALL)
    made = [first[i] for i in range(12)]
    for number in reversed(range(12)):
        assert_same(made[number], second[number])
    assert any(not torch.equal(made[0].image, made[i].image) for i in range(1, 12))


@pytest.mark.parametrize("training", [ALL, OFF])
def test_a_crop_is_what_the_network_expects(training: Training) -> None:
    for number in range(12):
        crop = crops(training)[number]
        assert (crop.image.shape, crop.image.dtype) == ((3, 96, 96), torch.uint8)
        assert len(crop.boxes) == len(crop.labels)
        assert set(crop.nuclei.unique().tolist()) - {0} == set(range(1, 1 + len(crop.boxes)))
        assert set(crop.labels.tolist()) <= {1, 2}


def test_pasted_nuclei_keep_their_class() -> None:
    """Each image has nuclei of one class only: with others pasted, crops have both; the class stays otherwise."""
    mixed = [len(set(crops(ALL)[i].labels.tolist())) for i in range(12)]
    assert max(mixed) == 2
    assert {len(set(crops(OFF)[i].labels.tolist())) for i in range(12)} == {1}
    of_one = crops(replace(ALL, by_class=False))
    assert {label for i in range(12) for label in of_one[i].labels.tolist()} == {1}


@pytest.mark.parametrize(
    ("off", "without"),
    [
        (replace(ALL, normalise=0.0), replace(ALL, normalise=0.0, mix=0.0, macenko=0.0)),
        (replace(ALL, rescan=0.0), replace(ALL, rescan=0.0, sharpen=0.0, recompress=0.0)),
    ],
)
def test_a_share_of_none_leaves_what_belongs_to_it_out(off: Training, without: Training) -> None:
    for number in range(4):
        assert_same(crops(off)[number], crops(without)[number])
        assert not torch.equal(crops(ALL)[number].image, crops(off)[number].image)
