"""Normalisation to the same stain changes nothing; to another one, it gives that stain; nonsense is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Stain, StainArchitecture
from pipeline.errors import StainError, WeightsError
from pipeline.model import dcgmm, load
from pipeline.model.fitted_stain import METHODS, TEMPLATE, FittedStain, Normalisation, read_template
from pipeline.model.stain import Normaliser, he_density
from pipeline.model.stain_fit import fit, sample, white_point
from pipeline.model.weights import find_weights
from pretend_cuda import PretendedCuda

MOVING = METHODS[1:]
NETWORKS = {"dcgmm": load.stain_network(Stain(method="dcgmm"))}  # the other methods have none
TARGETS = {**TEMPLATE, "dcgmm": read_template(find_weights("stain"))}


def painted(seed: int, haematoxylin: tuple[float, ...], eosin: tuple[float, ...], glass: float = 0.0) -> np.ndarray:
    """uint8 (1, 160, 160, 3): Beer and Lambert's law for two stains of random amounts, in flat 4 x 4 cells.

    glass: the share of the picture, at its top, that is white.
    """
    rng = np.random.default_rng(seed)
    vectors = np.array([haematoxylin, eosin])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # mostly one of the two stains, as in tissue, sometimes both
    amounts = rng.gamma(2, 0.4, (40, 40, 2)) * rng.permuted(np.broadcast_to([1.0, 0.05], (40, 40, 2)), axis=-1)
    amounts[: round(40 * glass)] = 0
    cells: np.ndarray = (np.exp(-amounts @ vectors)[None] * 255).round().astype(np.uint8)
    enlarged: np.ndarray = cells.repeat(4, axis=1).repeat(4, axis=2)
    return enlarged


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def fitted(pixels: np.ndarray, method: str) -> FittedStain:
    return fit(pixels, np.ones(pixels.shape[:3], bool), method, NETWORKS.get(method))


def normalised(images: torch.Tensor, source: FittedStain, target: FittedStain) -> torch.Tensor:
    out: torch.Tensor = Normaliser(Normalisation(source, target), NETWORKS.get(source.method))(images)
    return out


PURPLE, PINK = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
BLUE, ORANGE = (0.75, 0.60, 0.28), (0.10, 0.85, 0.52)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_to_the_same_stain_nothing_changes(method: str, seed: int) -> None:
    """Law: Normaliser(Normalisation(s, s))(x) == x within rounding, for any x, also far from what was fitted."""
    source = fitted(painted(seed, PURPLE, PINK), method)
    any_image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    any_image[0, :, 0, 0], any_image[0, :, 0, 1] = 0, 1  # black and white
    torch.testing.assert_close(normalised(any_image, source, source), any_image, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_white_stays_white_and_values_stay_in_range(method: str) -> None:
    source = fitted(painted(1, BLUE, ORANGE), method)
    image = torch.ones(1, 3, 8, 8)
    image[..., 4:] = torch.rand(1, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    out = normalised(image, source, TARGETS[method])
    torch.testing.assert_close(out[..., :4], image[..., :4], atol=2 / 255, rtol=0)
    assert out.min() >= 0
    assert out.max() <= 1


@given(seed=st.integers(0, 1000), times=st.floats(0.6, 1.8))
@settings(max_examples=15)
def test_how_strongly_a_slide_is_stained_does_not_matter(seed: int, times: float) -> None:
    """Law: with dcgmm, of densities so many times as high the clusters' are too; the normalised picture is the same."""
    network, source = NETWORKS["dcgmm"], fitted(painted(13, BLUE, ORANGE, glass=0.1), "dcgmm")
    assert network is not None
    image = 0.2 + 0.45 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    density = -image.log().permute(0, 2, 3, 1).numpy()
    tissue = np.ones((1, 32, 32), bool)
    one, other = (dcgmm.fit(d, tissue, float(d.mean()), network) for d in (density, density * np.float32(times)))
    torch.testing.assert_close(other.share, one.share, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.mean, one.mean * torch.tensor([times, 1, 1]), atol=1e-5, rtol=1e-4)
    scaled = {name: np.reshape(source.numbers[name], (-1, 3)) * (times, 1, 1) for name in ("mean", "deviation")}
    numbers = {name: tuple(values.flatten().tolist()) for name, values in scaled.items()}
    stronger = FittedStain("dcgmm", {**source.numbers, **numbers, "density": (source.numbers["density"][0] * times,)})
    expected = normalised(image, source, TARGETS["dcgmm"])
    torch.testing.assert_close(normalised(image**times, stronger, TARGETS["dcgmm"]), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", MOVING)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_what_cannot_be_read_is_not_fitted(method: str, seed: int) -> None:
    """Law: whatever stands there instead, a whole region or single pixels; dcgmm's network looks around each pixel."""
    rng = np.random.default_rng(seed)
    pixels = np.concatenate([painted(seed, PURPLE, PINK), painted(seed + 1, PURPLE, PINK)])
    readable = rng.random(pixels.shape[:3]) > (0 if method == "dcgmm" else 0.02)
    readable[1] = False
    other = np.where(readable[..., None], pixels, rng.integers(0, 256, pixels.shape, np.uint8))
    network = NETWORKS.get(method)
    assert fit(other, readable, method, network) == fit(pixels, readable, method, network)


@pytest.mark.parametrize("method", MOVING)
def test_how_much_glass_there_is_does_not_matter(method: str) -> None:
    """Law: the stain is that of the tissue alone."""
    pixels = painted(16, PURPLE, PINK, glass=0.3)
    less = np.ones(pixels.shape[:3], bool)
    less[:, 8:48] = False
    assert fit(pixels, less, method, NETWORKS.get(method)) == fitted(pixels, method)


@pytest.mark.parametrize("method", MOVING)
def test_a_normalised_image_has_the_targets_stain(method: str) -> None:
    """What was painted in one pair of stains is fitted, after the transfer, as the other pair."""
    source_pixels, target_pixels = painted(2, BLUE, ORANGE, glass=0.1), painted(3, PURPLE, PINK, glass=0.1)
    source, target = fitted(source_pixels, method), fitted(target_pixels, method)
    moved = normalised(tensor(source_pixels), source, target)
    again = fitted((moved.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), method)

    def distance(a: FittedStain, b: FittedStain) -> float:
        return sum(float(np.abs(np.subtract(a.numbers[k], b.numbers[k])).sum()) for k in a.numbers if k != "share")

    assert distance(again, target) < 0.35 * distance(source, target)


def test_macenko_scales_each_stain_to_the_strength_of_the_target() -> None:
    """Of a slide in the target's colours, with twice the haematoxylin and three times the eosin."""
    target = TEMPLATE["macenko"]
    times = torch.tensor([2.0, 3.0])
    strength = tuple((torch.tensor(target.numbers["strength"]) * times).tolist())
    source = FittedStain("macenko", {**target.numbers, "strength": strength})
    vectors = torch.tensor([target.numbers["haematoxylin"], target.numbers["eosin"]])
    amounts = torch.tensor([[1.2, 0.6], [0.6, 1.5], [2.0, 0.3]])
    before, after = ((-(of @ vectors)).exp().T.reshape(1, 3, 1, 3) for of in (amounts, amounts / times))
    torch.testing.assert_close(Normaliser(Normalisation(source, target))(before), after, atol=1e-4, rtol=0)


def test_glass_is_kept_tissue_is_moved_and_between_them_half_is() -> None:
    """Optical densities, on the mean of the colours, of 0.03, 0.15 and 0.09; a slide with twice the template's."""
    target = TEMPLATE["macenko"]
    source = FittedStain("macenko", {**target.numbers, "strength": tuple(2 * s for s in target.numbers["strength"])})
    eosin = torch.tensor(target.numbers["eosin"])
    before = (-eosin / eosin.mean() * torch.tensor([[0.03], [0.15], [0.09]])).exp().T.reshape(1, 3, 1, 3)
    left = Normaliser(Normalisation(source, target))(before).log() / before.log()
    torch.testing.assert_close(left, torch.tensor([1, 0.5, 0.75]).expand_as(left), atol=1e-3, rtol=0)


def test_macenko_fits_the_stains_that_were_painted() -> None:
    numbers = fitted(painted(4, PURPLE, PINK, glass=0.1), "macenko").numbers
    for name, vector in (("haematoxylin", PURPLE), ("eosin", PINK)):
        cosine = np.dot(numbers[name], vector) / np.linalg.norm(vector)
        assert np.degrees(np.arccos(min(1.0, cosine))) < 5, name


def test_macenko_separates_stains_that_are_14_degrees_apart_and_not_9() -> None:
    """On either side of what they have in common it is half of that. 14 degrees are the least that H&E has."""
    purple, pink = (np.array(stain) / np.linalg.norm(stain) for stain in (PURPLE, PINK))
    numbers = fitted(painted(4, PURPLE, tuple(purple + 0.6 * pink), glass=0.1), "macenko").numbers
    apart = np.degrees(np.arccos(np.dot(numbers["haematoxylin"], numbers["eosin"])))
    assert apart == pytest.approx(14, abs=1.5)
    with pytest.raises(StainError, match="need 10 to separate two stains"):
        fitted(painted(4, PURPLE, tuple(purple + 0.3 * pink), glass=0.1), "macenko")


@pytest.mark.parametrize("method", METHODS)
def test_a_stain_survives_json(method: str) -> None:
    pixels = painted(5, PURPLE, PINK)
    pixels[:, :8, :8] = 0  # black is not infinitely dense
    stain = fitted(pixels, method)
    assert FittedStain.from_json(json.loads(json.dumps(stain.to_json()))) == stain


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
@pytest.mark.parametrize("colour", [(255, 255, 255), (128, 128, 128), (200, 40, 200)])
def test_pixels_that_show_no_stain_are_refused(method: str, colour: tuple[int, int, int]) -> None:
    pixels = np.broadcast_to(np.array(colour, np.uint8), (1, 160, 160, 3)).copy()
    with pytest.raises(StainError, match=r"need .* --stain none"):
        fitted(pixels, method)


@pytest.mark.parametrize(
    ("cx", "cy", "grey"), [(0.08, 0, True), (0, 0.08, True), (0.12, 0, False), (-0.12, 0, False), (0, -0.12, False)]
)
def test_tissue_that_is_grey_on_the_whole_is_refused(cx: float, cy: float, grey: bool) -> None:
    """Of a mean colour with these coordinates in the HSD colour space."""
    density = 0.7 * np.array([cx + 1, (2 - cx + 3**0.5 * cy) / 2, (2 - cx - 3**0.5 * cy) / 2])
    pixels = np.full((1, 160, 160, 3), 255, np.uint8)
    pixels[:, 16:] = (255 * np.exp(-density)).round()
    if grey:
        with pytest.raises(StainError, match="the tissue's mean colour is grey"):
            sample(pixels, np.ones((1, 160, 160), bool))
    else:
        assert len(sample(pixels, np.ones((1, 160, 160), bool)).cells) == 40 * 36


@pytest.mark.parametrize("method", METHODS)
def test_a_normalisation_survives_json_and_is_a_key(method: str) -> None:
    normalisation = Normalisation(fitted(painted(5, PURPLE, PINK), method), TARGETS[method])
    again = Normalisation.from_json(json.loads(json.dumps(normalisation.to_json())))
    assert again == normalisation
    assert {normalisation: 1}[again] == 1
    with pytest.raises(StainError, match="need a table of 'source' and 'target'"):
        Normalisation.from_json(normalisation.source.to_json())


def test_misuse_is_named() -> None:
    pixels = painted(6, PURPLE, PINK)
    with pytest.raises(StainError, match="need one of none, reinhard, macenko, dcgmm"):
        fitted(pixels, "vahadane?")
    with pytest.raises(StainError, match="need"):
        fit(pixels, np.ones((1, 159, 160), bool), "macenko")
    with pytest.raises(StainError, match="can be read: need"):
        fit(pixels, np.zeros((1, 160, 160), bool), "macenko")
    with pytest.raises(StainError, match="need stains of one method"):
        Normaliser(Normalisation(TEMPLATE["none"], TEMPLATE["macenko"]))
    for wrong in (float("nan"), 10**400):
        with pytest.raises(StainError):
            FittedStain.from_json({"method": "macenko", "numbers": {"strength": [1, wrong]}})


def test_dcgmm_wants_its_own_network_and_template() -> None:
    pixels = painted(6, PURPLE, PINK)
    with pytest.raises(StainError, match="dcgmm without its network"):
        fit(pixels, np.ones((1, 160, 160), bool), "dcgmm")
    with pytest.raises(StainError, match="dcgmm without its network"):
        Normaliser(Normalisation(TARGETS["dcgmm"], TARGETS["dcgmm"]))
    with pytest.raises(StainError, match="macenko with a network that it does not use"):
        fit(pixels, np.ones((1, 160, 160), bool), "macenko", NETWORKS["dcgmm"])
    with pytest.raises(StainError):
        FittedStain.from_json({"method": "dcgmm", "numbers": {"share": [0.5, 0.5]}})
    other = dcgmm.ClusterNet(StainArchitecture(clusters=4)).eval()
    with pytest.raises(StainError, match="need stains that were fitted with this network"):
        Normaliser(Normalisation(TARGETS["dcgmm"], TARGETS["dcgmm"]), other)
    with pytest.raises(WeightsError, match="names no template"):
        read_template(find_weights("nuclei"))


@pytest.mark.parametrize("method", METHODS)
def test_a_normaliser_lies_on_its_device_and_uploads_pixels_only(method: str) -> None:
    """Law: no tensor meets one of another device, and after the first batch constants are uploaded no more."""
    images = tensor(painted(15, BLUE, ORANGE))
    normalisation = Normalisation(fitted(painted(13, BLUE, ORANGE), method), TARGETS[method])
    network = NETWORKS.get(method)
    with torch.inference_mode(), PretendedCuda() as cuda:
        moved = None if network is None else copy.deepcopy(network).to("cuda:0")
        normaliser = Normaliser(normalisation, moved, "cuda:0")
        held = [*normaliser.buffers(), *normaliser.parameters()]
        assert all(t.device.type == "cuda" for t in held)
        assert bool(held) == (method != "none")
        before = len(cuda.uploads)
        batches = [normaliser(images.to("cuda:0")).cpu() for _ in range(2)]
        assert cuda.uploads[before:] == [tuple(images.shape)] * 2
    for batch in batches:
        torch.testing.assert_close(batch, normalised(images, *normalisation), atol=1e-5, rtol=1e-4)
    if network is not None:
        assert next(network.parameters()).device.type == "cpu"  # others fit with it


@pytest.mark.parametrize(
    "template",
    ["{", "[" * 100_000, "{}", json.dumps(TEMPLATE["macenko"].to_json())],
    ids=["cut", "deep", "no", "other"],
)
def test_a_file_whose_template_is_none_of_dcgmm_is_refused(template: str, tmp_path: Path) -> None:
    dcgmm.save(dcgmm.ClusterNet(StainArchitecture(channels=(4,))), tmp_path / "s.safetensors", {"template": template})
    with pytest.raises(WeightsError, match=r"need .*'nightslide fit-stain'"):
        read_template(tmp_path / "s.safetensors")


def test_densities_are_computed_on_the_device_and_upload_pixels_only() -> None:
    images = tensor(painted(15, BLUE, ORANGE))
    with PretendedCuda() as cuda:
        density = [he_density(images.to("cuda:0")).cpu() for _ in range(2)]
        assert cuda.uploads.count(tuple(images.shape)) == 2
        assert len(cuda.uploads) <= 3  # the matrix, once a process
    torch.testing.assert_close(density[1], he_density(images), atol=1e-5, rtol=1e-4)


def test_a_network_on_another_device_is_refused() -> None:
    """Instead of being moved, as others use it where it is."""
    normalisation = Normalisation(TARGETS["dcgmm"], TARGETS["dcgmm"])
    with pytest.raises(StainError, match=r"the network is not on meta.*need load\.stain_network for that device"):
        Normaliser(normalisation, NETWORKS["dcgmm"], "meta")


def test_densities_of_pure_stains() -> None:
    """A pixel of one unit of a stain has density 1 of it and 0 of the other."""
    vectors = np.array([(0.65111, 0.70119, 0.29049), (0.2159, 0.8012, 0.5581)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pixels = torch.tensor(10.0**-vectors, dtype=torch.float32).T.reshape(1, 3, 1, 2)
    torch.testing.assert_close(he_density(pixels)[0, :, 0], torch.eye(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", MOVING)
def test_glass_is_kept(method: str) -> None:
    """Glass takes no colour, however pale the slide it is on; its tint and shade become the template's."""
    pale = 255 - (255 - painted(7, BLUE, ORANGE, glass=0.1)) // 2
    dim = (pale * np.array([0.95, 0.97, 0.93])).round().astype(np.uint8)
    out = normalised(tensor(dim)[..., :4, :4], fitted(dim, method), TARGETS[method])
    torch.testing.assert_close(out, torch.ones_like(out), atol=1.5 / 255, rtol=0)


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("light", [(0.6, 0.6, 0.6), (0.9, 0.95, 0.88)])
def test_the_lamp_does_not_matter(method: str, light: tuple[float, float, float]) -> None:
    """Law: a slide in dimmer or tinted light is normalised to the same picture, but for the 8 bits it came in."""
    bright = painted(11, PURPLE, PINK, glass=0.1)
    dim = (bright * np.array(light)).round().astype(np.uint8)
    first, second = (normalised(tensor(p), fitted(p, method), TARGETS[method]) for p in (bright, dim))
    assert float((first - second).abs().mean()) < 2 / 255


def test_white_is_glass_where_there_is_any_and_else_the_brightest_channel() -> None:
    cells = np.full((1000, 3), 0.3)
    cells[:20] = 0.9, 0.88, 0.86
    assert white_point(cells) == pytest.approx((0.9, 0.88, 0.86))  # glass, with its tint
    cells[:20] = 0.9, 0.6, 0.7
    assert white_point(cells) == pytest.approx((0.9, 0.9, 0.9))  # eosin: its colour is kept
    cells[:20] = 0.4, 0.1, 0.3
    assert white_point(cells) == (0.5, 0.5, 0.5)  # a dark field is brightened twofold at most


def test_a_field_without_glass_is_not_made_white() -> None:
    """What is brightest in it keeps its colour: every channel is divided by the same."""
    pixels = np.minimum(painted(12, PURPLE, PINK), np.array([235, 150, 190])).astype(np.uint8)
    assert fitted(pixels, "macenko").numbers["white"] == pytest.approx((235 / 255,) * 3, abs=1e-3)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])  # dcgmm assigns clusters by the densities that it changes
def test_there_and_back(method: str) -> None:
    """Law: what was moved to another stain and back is what it was, where nothing was cut off at white."""
    source, target = (fitted(painted(s, PURPLE, PINK, glass=0.1), method) for s in (8, 9))
    image = 0.1 + 0.5 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    back = normalised(normalised(image, source, target), target, source)
    torch.testing.assert_close(back, image, atol=1e-3, rtol=0)


def test_a_pixel_depends_on_its_neighbourhood_only() -> None:
    """Law: with dcgmm a colour depends on what lies within the network's radius, so the tiling does not show."""
    network = NETWORKS["dcgmm"]
    assert network is not None
    source = fitted(painted(13, BLUE, ORANGE), "dcgmm")
    image = tensor(painted(14, BLUE, ORANGE))
    changed = image.clone()
    changed[..., 80:, :] = 0.2
    before, after = (normalised(i, source, TARGETS["dcgmm"]) for i in (image, changed))
    kept = 80 - network.radius_px
    torch.testing.assert_close(after[..., :kept, :], before[..., :kept, :], atol=1e-5, rtol=0)
    assert not torch.allclose(after[..., :80, :], before[..., :80, :], atol=1e-5)


def test_the_template_is_what_the_training_images_give(shared: Path) -> None:
    data = shared / "data" / "kumar"
    names = json.loads((data / "splits.json").read_text())["train"]
    images = [np.array(Image.open(data / "images" / f"{n}.webp").convert("RGB"))[None] for n in names]
    for method, stain in TEMPLATE.items():
        fits = [fitted(image, method).numbers for image in images]
        for name in set(stain.numbers) - {"white"}:
            median = np.median([f[name] for f in fits], axis=0)
            assert median == pytest.approx(stain.numbers[name], abs=1e-4), (method, name)
        assert stain.numbers.get("white", (1, 1, 1)) == (1, 1, 1)


def test_nuclei_of_different_laboratories_become_alike(shared: Path) -> None:
    """Their normalised median intensity varies less with dcgmm: dark, grey and pale images of three sets."""
    paths = [
        ("kumar", "TCGA-18-5592-01Z-00-DX1.webp"),
        ("kumar", "TCGA-49-4488-01Z-00-DX1.webp"),
        ("nuinsseg", "human_bladder_01.jpg"),
        ("nuinsseg", "human_oesophagus_05.jpg"),
        ("tnbc", "01_1.webp"),
        ("tnbc", "03_2.webp"),
    ]
    values: dict[str, list[float]] = {"none": [], "dcgmm": []}
    for folder, name in paths:
        pixels = np.array(Image.open(shared / "data" / folder / "images" / name).convert("RGB"))[None, :512, :512]
        labels = Image.open((shared / "data" / folder / "labels" / name).with_suffix(".png"))
        nuclei = np.array(labels)[:512, :512] > 0
        for method in values:
            moved = normalised(tensor(pixels), fitted(pixels, method), TARGETS[method])
            intensity = moved[0].mean(0).numpy()[nuclei]
            values[method].append(float(np.median(intensity) / np.percentile(intensity, 95)))
    assert np.std(values["dcgmm"]) < 0.7 * np.std(values["none"])
