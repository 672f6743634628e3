"""Train dcgmm's network: no labels, only images; one loop, the whole state in one checkpoint."""

import contextlib
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import Stain, StainArchitecture, Tissue
from pipeline.errors import StainError
from pipeline.files import committed
from pipeline.model import dcgmm, stain
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.deterministic import pointwise
from pipeline.model.device import choose_device
from pipeline.segment.slide_stain import fit_template
from training import checkpoint
from training.config import StainTraining
from training.data.datasets import Annotated, AnnotationError
from training.fit import rate_at

TEMPLATE_IMAGES = 32  # of each set
LEAST_TISSUE = 0.05  # share of a crop, below which it says nothing of stains
LOG_EVERY = 20


class Field(NamedTuple):
    """An image to learn from, at the working scale, with what was found out about its stain."""

    pixels: NDArray[np.uint8]  # (h, w, 3)
    white: tuple[float, ...]
    level: float  # mean density of its tissue


def fit_stain(
    sets: Sequence[Sequence[Annotated]],
    out: Path,
    training: StainTraining,
    architecture: StainArchitecture,
    template: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on the images of `sets`, drawn from evenly, and write weights; continues from a checkpoint in `out`.

    template: the slide or image that `--stain dcgmm` normalises to, unless it is told otherwise; without it, the
    typical one of the training images.
    Writes to `out`: checkpoint (parameters, optimiser, step), losses.csv, and stain.safetensors
    (half precision, with the template). Returns the latter's path. Raises AnnotationError where no image tells a
    stain, StainError and SlideError where the template does not.
    """
    out.mkdir(parents=True, exist_ok=True)
    fields = [_fields(images, architecture.mpp, training.crop_px, say) for images in sets]
    fields = [members for members in fields if members]
    if not fields:
        raise AnnotationError("no image of the data tells a stain: need H&E-stained tissue in colour")
    device = choose_device(training.device)
    torch.manual_seed(training.seed)
    network = ClusterNet(architecture).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=training.rate)
    first = checkpoint.resume(out / "checkpoint", network, {}, optimiser)
    began, since, step, losses = time.monotonic(), time.monotonic(), first, []
    for step in range(first + 1, training.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, training)
        density, hsd, tissue = (t.to(device) for t in _batch(fields, training, step))
        loss = dcgmm.bound(hsd, network(density), tissue, architecture.floor).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        stop = step == training.steps or 0 < training.minutes <= (time.monotonic() - began) / 60
        if stop or len(losses) == LOG_EVERY:
            _log(out / "losses.csv", step, float(np.mean(losses)), (time.monotonic() - since) / len(losses))
            say(f"step {step}/{training.steps}  bound {np.mean(losses):.4f}")
            losses, since = [], time.monotonic()
        if stop or step % training.save_every == 0:
            checkpoint.save(out / "checkpoint", network, {}, optimiser, step, asdict(training))
        if stop:
            break
    saved = _as_saved(network)
    if template is None:
        target = typical(sets, "dcgmm", architecture.mpp, saved)
    else:
        target = fit_template(template, Stain(method="dcgmm"), Tissue(), architecture.mpp, saved)
    notes = {"recipe": json.dumps(asdict(training)), "step": str(step), "template": json.dumps(target.to_json())}
    with committed(out / "stain.safetensors") as path:
        dcgmm.save(network, path, notes)
    say(f"stopped at step {step} of {training.steps}: {out / 'stain.safetensors'}")
    return out / "stain.safetensors"


def _fields(images: Sequence[Annotated], mpp: float, least_px: int, say: Callable[[str], None]) -> list[Field]:
    """The images at the working scale; those that are too small or tell no stain are left out, and counted."""
    found = []
    for annotated in images:
        pixels = _at_scale(annotated, mpp)
        if min(pixels.shape[:2]) < least_px:
            continue
        try:
            taken = stain.sample(pixels[None], np.ones((1, *pixels.shape[:2]), bool))
        except StainError:
            continue
        found.append(Field(pixels, taken.white, stain.density_level(taken.cells)))
    if len(found) < len(images):
        say(f"{len(images) - len(found)} of {len(images)} images left out: under {least_px} px, or without a stain")
    return found


def _batch(fields: Sequence[Sequence[Field]], training: StainTraining, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of a step, the same after every resume: relative density (B, 1, S, S), HSD (B, 3, S, S), tissue.

    Sets are drawn evenly, then images evenly within a set. Crops without tissue say nothing, and are drawn again.
    """
    rng, side = np.random.default_rng((training.seed, step)), training.crop_px
    density: list[Tensor] = []
    hsd: list[Tensor] = []
    tissue: list[Tensor] = []
    while len(hsd) < training.batch:
        members = fields[int(rng.integers(len(fields)))]
        field = members[int(rng.integers(len(members)))]
        y, x = (int(rng.integers(n - side + 1)) for n in field.pixels.shape[:2])
        crop = np.rot90(field.pixels[y : y + side, x : x + side], int(rng.integers(4)))
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        light = torch.from_numpy(crop.transpose(2, 0, 1).copy()).float()[None] / 255
        light = light / light.new_tensor(field.white)[:, None, None]
        colours = dcgmm.to_hsd(stain.optical_density(light).clamp(min=0))
        stained = colours[:, :1] > stain.TISSUE_OD
        if stained.float().mean() >= LEAST_TISSUE or rng.random() < 0.02:  # an image may have next to none
            density.append(colours[:, :1] / field.level)
            hsd.append(colours)
            tissue.append(stained)
    return torch.cat(density), torch.cat(hsd), torch.cat(tissue)


def typical(
    sets: Sequence[Sequence[Annotated]], method: str, mpp: float, network: ClusterNet | None = None
) -> stain.FittedStain:
    """The stain of the typical image, to normalise to: images are fitted alone, as slides are, and of every number
    the median is taken; up to 32 of each set, spread evenly. The glass is white.

    Pooled they would give a target of wider colours than any slide has. Images that tell no stain are left out.
    Raises AnnotationError where none tells one.
    """
    fits = []
    for images in sets:
        for index in np.unique(np.linspace(0, len(images) - 1, TEMPLATE_IMAGES).astype(int)):
            pixels = _at_scale(images[index], mpp)[None]
            with contextlib.suppress(StainError):
                fits.append(stain.fit(pixels, np.ones(pixels.shape[:3], bool), method, network).numbers)
    if not fits:
        raise AnnotationError("no image of the data tells a stain: need H&E-stained tissue in colour")
    medians = {name: np.median([numbers[name] for numbers in fits], axis=0).round(6).tolist() for name in fits[0]}
    return stain.FittedStain.from_json({"method": method, "numbers": {**medians, "white": [1.0, 1.0, 1.0]}})


def _at_scale(annotated: Annotated, mpp: float) -> NDArray[np.uint8]:
    """The image at the working scale, uint8 (h, w, 3)."""
    image, zoom = Image.fromarray(annotated.read().image), annotated.mpp / mpp
    size = round(image.width * zoom), round(image.height * zoom)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _as_saved(network: ClusterNet) -> ClusterNet:
    """The network as it will be read from its file: in half precision, on the CPU."""
    saved = ClusterNet(network.architecture)
    saved.load_state_dict({k: v.cpu().half().float() for k, v in network.state_dict().items()})
    return pointwise(saved.eval().requires_grad_(False))


def _log(path: Path, step: int, loss: float, seconds: float) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "bound", "seconds"])
        writer.writerow([step, f"{loss:.4f}", f"{seconds:.3f}"])
