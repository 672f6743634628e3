"""Normalisation to the same stain changes nothing; to another one, it gives that stain; nonsense is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.stain import TEMPLATE, Stain, StainError, fit, hed, normalise

METHODS = ("none", "reinhard", "macenko")


def painted(seed: int, haematoxylin: tuple[float, ...], eosin: tuple[float, ...]) -> np.ndarray:
    """uint8 (1, 160, 160, 3): Beer and Lambert's law for two stains of random amounts, in flat 4 x 4 cells."""
    rng = np.random.default_rng(seed)
    vectors = np.array([haematoxylin, eosin])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # mostly one of the two stains, as in tissue, sometimes both
    amounts = rng.gamma(2, 0.4, (40, 40, 2)) * rng.permuted(np.broadcast_to([1.0, 0.05], (40, 40, 2)), axis=-1)
    cells = (np.exp(-amounts @ vectors)[None] * 255).round().astype(np.uint8)
    return cells.repeat(4, axis=1).repeat(4, axis=2)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


PURPLE, PINK = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
BLUE, ORANGE = (0.75, 0.60, 0.28), (0.10, 0.85, 0.52)
EVERYWHERE = np.ones((1, 160, 160), bool)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_to_the_same_stain_nothing_changes(method: str, seed: int) -> None:
    """Law: normalise(x, s, s) == x within rounding, for any x, also far from what was fitted."""
    source = fit(painted(seed, PURPLE, PINK), EVERYWHERE, method)
    any_image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    any_image[0, :, 0, 0], any_image[0, :, 0, 1] = 0, 1  # black and white
    torch.testing.assert_close(normalise(any_image, source, source), any_image, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_white_stays_white_and_values_stay_in_range(method: str) -> None:
    source = fit(painted(1, BLUE, ORANGE), EVERYWHERE, method)
    image = torch.ones(1, 3, 8, 8)
    image[..., 4:] = torch.rand(1, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    out = normalise(image, source, TEMPLATE[method])
    torch.testing.assert_close(out[..., :4], image[..., :4], atol=2 / 255, rtol=0)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_normalised_image_has_the_targets_stain(method: str) -> None:
    """What was painted in one pair of stains is fitted, after the transfer, as the other pair."""
    source_pixels, target_pixels = painted(2, BLUE, ORANGE), painted(3, PURPLE, PINK)
    source, target = fit(source_pixels, EVERYWHERE, method), fit(target_pixels, EVERYWHERE, method)
    moved = normalise(tensor(source_pixels), source, target)
    again = fit((moved.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), EVERYWHERE, method)

    def distance(a: Stain, b: Stain) -> float:
        return sum(float(np.abs(np.subtract(a.numbers[k], b.numbers[k])).sum()) for k in a.numbers)

    assert distance(again, target) < 0.35 * distance(source, target)


def test_macenko_finds_the_stains_that_were_painted() -> None:
    found = fit(painted(4, PURPLE, PINK), EVERYWHERE, "macenko").numbers
    for name, vector in (("haematoxylin", PURPLE), ("eosin", PINK)):
        cosine = np.dot(found[name], vector) / np.linalg.norm(vector)
        assert np.degrees(np.arccos(min(1.0, cosine))) < 5, name


@pytest.mark.parametrize("method", METHODS)
def test_a_stain_survives_json(method: str) -> None:
    stain = fit(painted(5, PURPLE, PINK), EVERYWHERE, method)
    assert Stain.from_json(json.loads(json.dumps(stain.to_json()))) == stain


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
@pytest.mark.parametrize("colour", [(255, 255, 255), (128, 128, 128), (200, 40, 200)])
def test_pixels_that_tell_no_stain_are_refused(method: str, colour: tuple[int, int, int]) -> None:
    pixels = np.broadcast_to(np.array(colour, np.uint8), (1, 160, 160, 3)).copy()
    with pytest.raises(StainError, match="need"):
        fit(pixels, EVERYWHERE, method)


def test_misuse_is_named() -> None:
    pixels = painted(6, PURPLE, PINK)
    with pytest.raises(StainError, match="need one of none, reinhard, macenko"):
        fit(pixels, EVERYWHERE, "vahadane?")
    with pytest.raises(StainError, match="need"):
        fit(pixels, EVERYWHERE[:, 1:], "macenko")
    with pytest.raises(StainError, match="need stains of one method"):
        normalise(tensor(pixels), TEMPLATE["none"], TEMPLATE["macenko"])
    with pytest.raises(StainError):
        Stain.from_json({"method": "macenko", "numbers": {"strength": [1, float("nan")]}})


def test_densities_of_pure_stains() -> None:
    """A pixel of one unit of a stain has density 1 of it and 0 of the other."""
    vectors = np.array([(0.65111, 0.70119, 0.29049), (0.2159, 0.8012, 0.5581)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pixels = torch.tensor(10.0**-vectors, dtype=torch.float32).T.reshape(1, 3, 1, 2)
    torch.testing.assert_close(hed(pixels)[0, :, 0], torch.eye(2), atol=1e-4, rtol=0)


def test_glass_is_kept() -> None:
    """Glass that is not quite white takes no colour, however pale the slide it is on."""
    glass = torch.full((1, 3, 4, 4), 248 / 255)
    for method in METHODS:
        pale = fit(255 - (255 - painted(7, BLUE, ORANGE)) // 2, EVERYWHERE, method)
        torch.testing.assert_close(normalise(glass, pale, TEMPLATE[method]), glass, atol=0.5 / 255, rtol=0)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_there_and_back(method: str) -> None:
    """Law: what was moved to another stain and back is what it was, where nothing was cut off at white."""
    source, target = (fit(painted(s, PURPLE, PINK), EVERYWHERE, method) for s in (8, 9))
    image = 0.1 + 0.5 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    back = normalise(normalise(image, source, target), target, source)
    torch.testing.assert_close(back, image, atol=1e-3, rtol=0)


def test_the_template_is_what_the_training_images_give(shared: Path) -> None:
    data = shared / "data" / "kumar"
    names = json.loads((data / "splits.json").read_text())["train"]
    images = [np.array(Image.open(data / "images" / f"{n}.webp").convert("RGB"))[None] for n in names]
    for method, stain in TEMPLATE.items():
        fits = [fit(image, np.ones(image.shape[:3], bool), method).numbers for image in images]
        for name, values in stain.numbers.items():
            assert np.median([f[name] for f in fits], axis=0) == pytest.approx(values, abs=1e-4), (method, name)
