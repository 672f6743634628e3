"""Train dcgmm's network on images without annotations: one loop, the whole state in one checkpoint."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import Stain, StainArchitecture, Tissue
from pipeline.errors import AnnotationError, StainError
from pipeline.files import committed
from pipeline.model import dcgmm, stain, stain_fit
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.deterministic import pointwise
from pipeline.model.device import choose_device
from pipeline.model.fitted_stain import FittedStain
from pipeline.segment.slide_stain import fit_template
from training import checkpoint
from training.config import StainTraining
from training.data.sample import Dataset, Sample
from training.fit import learning_rate
from training.monitor import LOG_EVERY, LOSSES_FILE, append_row

WEIGHTS_FILE = "stain.safetensors"
TEMPLATE_IMAGES = 32  # of each set
LEAST_TISSUE = 0.05  # share of a crop, below which it shows too little stain to learn from

_NO_STAIN = "no image of the data shows a stain: need H&E-stained tissue in colour"


class StainImage(NamedTuple):
    """A training image at the working scale, with its white and its density."""

    pixels: NDArray[np.uint8]  # (h, w, 3)
    white: tuple[float, ...]
    level: float  # mean density of its tissue


def fit_stain(
    datasets: Sequence[Dataset],
    out: Path,
    training: StainTraining,
    architecture: StainArchitecture,
    template: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on the images of `datasets`, drawn with equal probabilities; continues from a checkpoint in `out`.

    template: the slide or image that `--stain dcgmm` normalises to, unless --stain.template names another; without it,
    the typical one of the training images.
    Writes to `out`: checkpoint/ (parameters, optimiser, step), losses.csv, and stain.safetensors (half precision, with
    the template). Returns the latter's path. Raises AnnotationError where no image shows a stain, StainError and
    SlideError where the template does not, ConfigError for a checkpoint of another recipe and for weights without one.
    """
    sets = [dataset.images for dataset in datasets]
    if not all(sets):
        raise AnnotationError("a dataset has no images in its split: need at least one of each")
    if template is not None and not template.exists():
        raise AnnotationError(f"{template}: there is no such file to take as the template")
    if template is not None:  # now, not after the training: a network that has learnt nothing refuses the same images
        _fit_template(template, _as_saved(ClusterNet(architecture)))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.refuse_other_weights(out / WEIGHTS_FILE)
    images = [_stain_images(samples, architecture.mpp, training.crop_px, say) for samples in sets]
    pixels = (checkpoint.digest(image.pixels.tobytes() for image in of_set) for of_set in images)
    learnt = {dataset.name: digest for dataset, digest in zip(datasets, pixels, strict=True)}
    images = [of_set for of_set in images if of_set]
    if not images:
        raise AnnotationError(_NO_STAIN)
    torch.manual_seed(training.seed)
    network = ClusterNet(architecture).to(choose_device(training.device))
    recipe = {
        **asdict(training),
        **checkpoint.architecture_fields(architecture),
        **checkpoint.data_fields(datasets),
        "pixels": learnt,
    }
    step = _train(network, images, out, training, recipe, say)
    saved = _as_saved(network)
    if template is None:
        target = typical_stain(sets, "dcgmm", architecture.mpp, saved)
    else:
        target = _fit_template(template, saved)
    notes = {"recipe": json.dumps(asdict(training)), "step": str(step), "template": json.dumps(target.to_json())}
    with committed(out / WEIGHTS_FILE) as part:
        dcgmm.save(network, part, notes)
    say(f"stopped at step {step} of {training.steps}: {out / WEIGHTS_FILE}")
    return out / WEIGHTS_FILE


def _fit_template(template: Path, network: ClusterNet) -> FittedStain:
    """The stain of a slide or an image, by this network. Raises StainError and SlideError where it has none."""
    return fit_template(template, Stain(method="dcgmm"), Tissue(), network.architecture.mpp, network)


def _train(
    network: ClusterNet,
    images: Sequence[Sequence[StainImage]],
    out: Path,
    training: StainTraining,
    recipe: Mapping[str, object],
    say: Callable[[str], None],
) -> int:
    """Run the schedule, or its rest, or as much as the minutes allow; the last step."""
    device, floor = next(network.parameters()).device, network.architecture.floor
    optimiser = torch.optim.Adam(network.parameters(), lr=training.rate)
    first, _ = checkpoint.resume(out / checkpoint.FOLDER, network, {}, optimiser, recipe)
    started, since, step, losses = time.monotonic(), time.monotonic(), first, []
    for step in range(first + 1, training.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, training)
        density, hsd, tissue = (t.to(device) for t in _batch(images, training, step))
        loss = dcgmm.bound(hsd, network(density), tissue, floor).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        stop = step == training.steps or 0 < training.minutes <= (time.monotonic() - started) / 60
        if stop or len(losses) == LOG_EVERY:
            seconds = (time.monotonic() - since) / len(losses)
            append_row(out / LOSSES_FILE, {"step": step, "bound": float(np.mean(losses)), "seconds": seconds})
            say(f"step {step}/{training.steps}  bound {np.mean(losses):.4f}")
            losses, since = [], time.monotonic()
        if stop or step % training.save_every == 0:
            checkpoint.save(out / checkpoint.FOLDER, network, {}, optimiser, step, recipe)
        if stop:
            break
    return step


def _stain_images(images: Sequence[Sample], mpp: float, least_px: int, say: Callable[[str], None]) -> list[StainImage]:
    """The images at the working scale; those that are too small or show no stain are left out, and counted."""
    usable = []
    for sample in images:
        pixels = _at_scale(sample, mpp)
        if min(pixels.shape[:2]) < least_px:
            continue
        try:
            taken = stain_fit.sample(pixels[None], np.ones((1, *pixels.shape[:2]), bool))
        except StainError:
            continue
        usable.append(StainImage(pixels, taken.white, stain_fit.density_level(taken.cells)))
    if len(usable) < len(images):
        left_out = len(images) - len(usable)
        say(f"{left_out} of {len(images)} images left out: smaller than {least_px} px, or without a stain")
    return usable


def _batch(images: Sequence[Sequence[StainImage]], training: StainTraining, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of a step, the same after every resume: relative density (B, 1, S, S), HSD (B, 3, S, S), tissue.

    A set is drawn, then one of its images, each with equal probabilities. Crops with little tissue are drawn again.
    """
    rng, side = np.random.default_rng((training.seed, step)), training.crop_px
    density: list[Tensor] = []
    hsd: list[Tensor] = []
    tissue: list[Tensor] = []
    while len(hsd) < training.batch:
        of_set = images[int(rng.integers(len(images)))]
        image = of_set[int(rng.integers(len(of_set)))]
        y, x = (int(rng.integers(n - side + 1)) for n in image.pixels.shape[:2])
        crop = np.rot90(image.pixels[y : y + side, x : x + side], int(rng.integers(4)))
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        light = torch.from_numpy(crop.transpose(2, 0, 1).copy()).float()[None] / 255
        light = light / light.new_tensor(image.white)[:, None, None]
        colours = dcgmm.to_hsd(stain.optical_density(light).clamp(min=0))
        stained = colours[:, :1] > stain_fit.TISSUE_OD
        if stained.float().mean() >= LEAST_TISSUE or rng.random() < 0.02:  # an image may have next to none
            density.append(colours[:, :1] / image.level)
            hsd.append(colours)
            tissue.append(stained)
    return torch.cat(density), torch.cat(hsd), torch.cat(tissue)


def typical_stain(
    sets: Sequence[Sequence[Sample]], method: str, mpp: float, network: ClusterNet | None = None
) -> FittedStain:
    """The stain of the typical image, to normalise to: the medians of the numbers of up to 32 images of each set,
    spread evenly and fitted one by one, as slides are. The glass is white.

    Pooled they would give a target of wider colours than any slide has. Images that show no stain are left out.
    Raises AnnotationError where none shows one.
    """
    fits = []
    for images in sets:
        for index in np.unique(np.linspace(0, len(images) - 1, TEMPLATE_IMAGES).astype(int)):
            pixels = _at_scale(images[index], mpp)[None]
            with contextlib.suppress(StainError):
                fits.append(stain_fit.fit(pixels, np.ones(pixels.shape[:3], bool), method, network).numbers)
    if not fits:
        raise AnnotationError(_NO_STAIN)
    medians = {name: np.median([numbers[name] for numbers in fits], axis=0).round(6).tolist() for name in fits[0]}
    return FittedStain.from_json({"method": method, "numbers": {**medians, "white": [1.0, 1.0, 1.0]}})


def _at_scale(sample: Sample, mpp: float) -> NDArray[np.uint8]:
    """The image at the working scale, uint8 (h, w, 3)."""
    image, zoom = Image.fromarray(sample.read().image), sample.mpp / mpp
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _as_saved(network: ClusterNet) -> ClusterNet:
    """The network as it will be read from its file: in half precision, on the CPU."""
    saved = ClusterNet(network.architecture)
    saved.load_state_dict({k: v.cpu().half().float() for k, v in network.state_dict().items()})
    return pointwise(saved.eval().requires_grad_(False))
