"""The trainer learns, stops, and continues as if it had never stopped."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import Architecture, Training
from pipeline.detector import Caps, WeightsError, load_weights
from training.annotations import Annotated, AnnotationError, find, read_labels
from training.dataset import Crops, targets
from training.fit import fit, rate_at, split_off

TINY = Architecture(
    channels=16,
    upscale=1.0,
    box_hidden=32,
    mask_channels=16,
    mask_layers=1,
    anchors=((12,), (24,), (48,), (96,)),
)
QUICK = Training(
    steps=40,
    batch=2,
    crop_px=96,
    rate=2e-3,
    warmup=5,
    strength=0.0,
    average=0.5,
    hold_out=0,
    init="imagenet",
    loaders=0,
    device="cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of dark discs on a bright ground."""
    folder = tmp_path_factory.mktemp("discs")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    for name in ("a", "b"):
        labels = np.zeros((128, 128), np.int32)
        centres = [(r, c) for r in range(16, 128, 32) for c in range(16, 128, 32)]
        for number, (row, column) in enumerate(centres, 1):
            labels[(y - row) ** 2 + (x - column) ** 2 < rng.integers(7, 13) ** 2] = number
        image = np.where(labels[..., None] > 0, (90, 50, 140), (235, 190, 215)) + rng.normal(0, 4, (128, 128, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "labels" / f"{name}.png")
    (folder / "splits.json").write_text('{"train": ["a"], "test": ["b"]}')
    return folder


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(2)


def test_the_trainer_overfits_a_few_tiles(data: Path, tmp_path: Path) -> None:
    """Law: it learns what it is shown; all 16 discs of an image are found, and little else."""
    images = find(data, [], 0.25)
    weights = fit([images], tmp_path, dataclasses.replace(QUICK, steps=90), TINY, say=lambda line: None)
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    total = [sum(float(r[k]) for k in r if k.startswith("loss_")) for r in rows]
    assert total[-1] < 0.5 * total[0]
    model = load_weights(weights)
    pixels = torch.from_numpy(np.asarray(Image.open(images[0].image)).copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        features, limits = model.features(pixels), Caps(200, 100)
        (found,) = model.classify(features, model.propose(features, (128, 128), limits), (128, 128), limits, 0.5, 0.4)
    assert 14 <= len(found.boxes) <= 20


def test_it_continues_exactly(data: Path, tmp_path: Path) -> None:
    """Law: stopped after some steps and continued, the weights are those of an uninterrupted training."""
    images = find(data, ["train"], 0.25)
    settings = dataclasses.replace(QUICK, steps=4)
    whole = fit([images], tmp_path / "whole", settings, TINY, say=lambda line: None)
    fit([images], tmp_path / "parts", dataclasses.replace(settings, minutes=1e-9), TINY, say=lambda line: None)
    assert not (tmp_path / "parts" / "losses.csv").exists()  # it stopped after the first step
    parts = fit([images], tmp_path / "parts", settings, TINY, say=lambda line: None)
    first, second = load_weights(whole).state_dict(), load_weights(parts).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_crops_are_the_same_in_every_process(data: Path) -> None:
    images = find(data, [], 0.25)
    first, second = (Crops([images], 64, 0.25, 1.0, seed=3) for _ in range(2))
    for number in (0, 7, 10**6):
        assert torch.equal(first[number].image, second[number].image)
        assert torch.equal(first[number].masks, second[number].masks)
    assert not torch.equal(first[0].image, first[1].image)


def test_targets_box_every_instance_and_leave_out_specks() -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[2:9, 5:15], labels[20:30, 20:24], labels[0, 0] = 4, 70, 9
    boxes, classes, masks = targets(labels)
    assert boxes.tolist() == [[5, 2, 15, 9], [20, 20, 24, 30]]
    assert classes.tolist() == [1, 1]
    assert masks.sum((1, 2)).tolist() == [70, 40]
    assert targets(np.zeros((8, 8), np.int32))[0].shape == (0, 4)


def test_the_rate_warms_up_and_falls() -> None:
    rates = [rate_at(step, QUICK) for step in range(1, QUICK.steps + 1)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(QUICK.rate)
    assert rates[-1] == pytest.approx(QUICK.rate / 100)


def test_held_out_images_are_never_trained_on(data: Path) -> None:
    images = [Annotated(str(i), data, data, 0.25) for i in range(9)]
    trained, held = split_off(images, 2, seed=0)
    assert len(held) == 2
    assert sorted(a.id for a in trained + held) == [str(i) for i in range(9)]
    assert split_off(images, 2, seed=0) == (trained, held)


def test_bad_datasets_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no split 'trian': its splits are train, test"):
        find(data, ["trian"], 0.25)
    with pytest.raises(AnnotationError, match="holds no images"):
        find(tmp_path, [], 0.25)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "x.png")
    with pytest.raises(AnnotationError, match="'x' has no labels"):
        find(tmp_path, [], 0.25)
    Image.new("I;16", (7, 8)).save(tmp_path / "labels" / "x.png")
    with pytest.raises(AnnotationError, match="need one label per pixel"):
        read_labels(find(tmp_path, [], 0.25)[0])


def test_weights_to_start_from_must_exist(data: Path, tmp_path: Path) -> None:
    with pytest.raises((WeightsError, FileNotFoundError)):
        fit([find(data, [], 0.25)], tmp_path, dataclasses.replace(QUICK, init="nowhere.safetensors"), TINY)
