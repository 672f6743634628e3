"""The trainer of dcgmm's network lowers its loss, stops, continues as if it had not, and brings a template."""

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import StainArchitecture
from pipeline.errors import AnnotationError, ConfigError, StainError
from pipeline.model import dcgmm
from pipeline.model.fitted_stain import read_template
from pipeline.model.stain_fit import fit
from pipeline.model.weights import read_notes
from training.config import StainTraining
from training.data.sample import NO_CLASSES, Dataset, LabelledImage, Sample
from training.fit import learning_rate
from training.fit_stain import fit_stain, typical_stain

TINY = StainArchitecture(channels=(4, 8))
QUICK = StainTraining(steps=4, batch=2, crop_px=64, warmup=2, device="cpu", save_every=1)


def picture(seed: int) -> np.ndarray:
    """uint8 (96, 96, 3): dark purple discs in pink, with glass at the top."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96]
    density = np.full((96, 96, 3), (0.1, 0.4, 0.25)) * rng.uniform(0.7, 1.4)
    for row, column in rng.integers(0, 96, (12, 2)):
        density[(y - row) ** 2 + (x - column) ** 2 < 36] = (0.9, 1.0, 0.5)
    density[:12] = 0
    return (255 * np.exp(-density) + rng.normal(0, 2, density.shape)).clip(0, 255).astype(np.uint8)


def read(seed: int) -> LabelledImage:
    labels = np.zeros((96, 96), np.int32)
    return LabelledImage(picture(seed), labels, np.zeros(0, np.int64))


def read_white() -> LabelledImage:
    return LabelledImage(np.full((96, 96, 3), 250, np.uint8), np.zeros((96, 96), np.int32), np.zeros(0, np.int64))


IMAGES = [Sample(str(seed), "", 0.25, partial(read, seed)) for seed in range(3)]
SET = Dataset("discs", tuple(IMAGES), NO_CLASSES)
WHITE = Sample("white", "", 0.25, read_white)


def silent(_line: str) -> None:
    """What the trainer says is not wanted."""


def test_the_loss_falls(tmp_path: Path) -> None:
    weights = fit_stain([SET], tmp_path, dataclasses.replace(QUICK, steps=60, save_every=60), TINY, say=silent)
    with (tmp_path / "losses.csv").open() as file:
        losses = [float(row["bound"]) for row in csv.DictReader(file)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert dcgmm.load(weights).architecture == TINY
    assert json.loads(read_notes(weights)["recipe"])["steps"] == 60


def test_weights_without_a_checkpoint_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "stain.safetensors").write_bytes(b"of another training")
    with pytest.raises(ConfigError, match=r"stain\.safetensors is there already, without its checkpoint to continue"):
        fit_stain([SET], tmp_path, QUICK, TINY, say=silent)
    assert (tmp_path / "stain.safetensors").read_bytes() == b"of another training"


def test_it_continues_exactly(tmp_path: Path) -> None:
    """Law: stopped and continued, the weights and the template are those of an uninterrupted training."""
    whole = fit_stain([SET], tmp_path / "whole", QUICK, TINY, say=silent)
    for _ in range(2):  # a step each
        fit_stain([SET], tmp_path / "parts", dataclasses.replace(QUICK, minutes=1e-9), TINY, say=silent)
    parts = fit_stain([SET], tmp_path / "parts", QUICK, TINY, say=silent)
    first, second = dcgmm.load(whole).state_dict(), dcgmm.load(parts).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_template(whole) == read_template(parts)


def test_another_architecture_does_not_continue(tmp_path: Path) -> None:
    fit_stain([SET], tmp_path, QUICK, TINY, say=silent)
    with pytest.raises(ConfigError, match=r"architecture.channels=\[4, 8\], not \[4, 6\]: .* another --out"):
        fit_stain([SET], tmp_path, QUICK, StainArchitecture(channels=(4, 6)), say=silent)


def test_another_recipe_does_not_continue(tmp_path: Path) -> None:
    fit_stain([SET], tmp_path, QUICK, TINY, say=silent)
    with pytest.raises(ConfigError, match=r"steps=4, not 5: .* another --out"):
        fit_stain([SET], tmp_path, dataclasses.replace(QUICK, steps=5), TINY, say=silent)


def test_other_images_do_not_continue(tmp_path: Path) -> None:
    """Neither more of them nor as many others, nor others of the same names.

    The weights would be of the first, the template of the others.
    """
    fit_stain([SET._replace(images=tuple(IMAGES[:2]))], tmp_path, QUICK, TINY, say=silent)
    for images, message in (
        (IMAGES, "data={'discs': 2}, not {'discs': 3}: .* another --out"),
        (IMAGES[1:], "other images, .*, in discs: .* another --out"),
        ([IMAGES[0], IMAGES[1]._replace(read=IMAGES[2].read)], "other pixels of the same images, .*, in discs: "),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_stain([SET._replace(images=tuple(images))], tmp_path, QUICK, TINY, say=silent)


def test_another_order_of_the_datasets_does_not_continue(tmp_path: Path) -> None:
    """Its crops would be of other datasets than those of an uninterrupted training."""
    sets = [SET, SET._replace(name="others", images=tuple(IMAGES[::-1]))]
    fit_stain(sets, tmp_path, dataclasses.replace(QUICK, minutes=1e-9), TINY, say=silent)
    with pytest.raises(ConfigError, match=r"data_order=\['discs', 'others'\], not \['others', 'discs'\]: continue it"):
        fit_stain(sets[::-1], tmp_path, QUICK, TINY, say=silent)
    fit_stain(sets, tmp_path, QUICK, TINY, say=silent)


def test_the_template_is_the_median_of_single_fits() -> None:
    target = typical_stain([IMAGES[:2], IMAGES[2:], [WHITE]], "macenko", 0.25)
    fits = [fit(picture(s)[None], np.ones((1, 96, 96), bool), "macenko").numbers for s in range(3)]
    for name in ("haematoxylin", "eosin", "strength"):
        assert target.numbers[name] == pytest.approx(np.median([f[name] for f in fits], axis=0), abs=1e-6)
    assert target.numbers["white"] == (1, 1, 1)


def test_a_template_can_be_given(tmp_path: Path) -> None:
    Image.fromarray(np.tile(picture(9), (3, 3, 1))).save(tmp_path / "mine.png")
    mine = fit_stain([SET], tmp_path / "a", QUICK, TINY, template=tmp_path / "mine.png", say=silent)
    typical_one = fit_stain([SET], tmp_path / "b", QUICK, TINY, say=silent)
    assert read_template(mine) != read_template(typical_one)
    assert read_template(mine).numbers["white"] != (1, 1, 1)  # its own glass
    Image.new("RGB", (300, 300), "white").save(tmp_path / "white.png")
    with pytest.raises(StainError, match="need"):
        fit_stain([SET], tmp_path / "c", QUICK, TINY, template=tmp_path / "white.png", say=silent)
    assert not (tmp_path / "c").exists(), "it was refused only after the training"


def test_images_without_a_stain_are_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    fit_stain([SET._replace(images=(*IMAGES, WHITE))], tmp_path / "some", QUICK, TINY, say=said.append)
    assert said[0].startswith("1 of 4 images left out")
    with pytest.raises(AnnotationError, match="shows a stain"):
        fit_stain([SET._replace(images=(WHITE,))], tmp_path / "none", QUICK, TINY, say=silent)


def test_an_image_of_less_than_a_pixel_at_the_working_scale_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    narrow = LabelledImage(picture(0)[:1, :2], np.zeros((1, 2), np.int32), np.zeros(0, np.int64))
    images = (*IMAGES, Sample("narrow", "", 0.06, lambda: narrow))
    fit_stain([SET._replace(images=images)], tmp_path, QUICK, TINY, say=said.append)
    assert said[0].startswith("1 of 4 images left out")


def test_the_rate_warms_up_and_falls() -> None:
    training = StainTraining(steps=100, warmup=10)
    rates = [learning_rate(step, training) for step in range(1, 101)]
    assert max(rates) == rates[9] == pytest.approx(training.rate)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(training.rate / 100)
