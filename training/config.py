"""Every setting of training and its default: the only place where one is written."""

import math
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from pipeline.config import require

# The groups of flags in --help, the common ones first.
DATA = Group("Data", sort_key=1)
OUTPUT = Group("Output", sort_key=2)
SCHEDULE = Group("Schedule", sort_key=3)
OPTIMISER = Group("Optimiser", sort_key=4)
AUGMENTATION = Group("Crops and augmentation", sort_key=5)
MACHINE = Group("Machine", sort_key=6)
NETWORK = Group("Network", sort_key=7)


UNTRAINED = ("imagenet", "random")  # values of `init` that are no weights of a detector


@dataclass(frozen=True)
class Training:
    """How the detector is trained. Defaults suit two CPU cores; model cards say what the shipped weights had."""

    steps: Annotated[int, Parameter(group=SCHEDULE)] = 4000
    "Optimiser steps, 2 a second on two CPU cores; 0: as many as `minutes` allow, which then decide the learning rate."
    minutes: Annotated[float, Parameter(group=SCHEDULE)] = 0.0
    "Stop after so many minutes, to be continued by the same command; 0: stop at the last step only. See `steps`."
    init: Annotated[str, Parameter(group=SCHEDULE)] = "imagenet"
    "Weights to start from: imagenet (the backbone only; needs nightslide[train]), random, shipped ones, or a file."
    keep: Annotated[float, Parameter(group=SCHEDULE)] = 0.0
    "Share of the weights of `init` in those that are written: half for few images, so that others still do well."
    by_class: Annotated[bool, Parameter(group=SCHEDULE, negative="")] = False
    "Tell the classes of the datasets apart; without it all nuclei are of one class, Nucleus, which most data allows."
    hold_out: Annotated[int, Parameter(group=SCHEDULE)] = 2
    "Images of each dataset that are not trained on (by the seed), to score the weights; few, as data is scarce."
    save_every: Annotated[int, Parameter(group=SCHEDULE)] = 250
    "Steps between checkpoints, weights and held-out scores: a few minutes on a CPU."

    rate: Annotated[float, Parameter(group=OPTIMISER)] = 8e-4
    "Highest learning rate (AdamW), of all but the pretrained layers; 6e-4 was used to continue from `nuclei`."
    warmup: Annotated[int, Parameter(group=OPTIMISER)] = 200
    "Steps in which the learning rate rises from 0, so that new layers do not spoil the pretrained ones; then cosine."
    decay: Annotated[float, Parameter(group=OPTIMISER)] = 0.02
    "Weight decay (AdamW), the usual order of magnitude for fine-tuning."
    average: Annotated[float, Parameter(group=OPTIMISER)] = 0.998
    "Decay per step of the running average of the weights, which is what is saved: it spans about 500 steps."
    batch: Annotated[int, Parameter(group=OPTIMISER)] = 4
    "Crops per step, of each process."
    seed: Annotated[int, Parameter(group=OPTIMISER)] = 0
    "Seed of all that is random: the same seed and steps on the same machine give the same weights."

    crop_px: Annotated[int, Parameter(group=AUGMENTATION)] = 192
    "Side of a training crop, in work pixels: 48 um at 0.25 um, tens of nuclei."
    strength: Annotated[float, Parameter(group=AUGMENTATION)] = 1.0
    "Strength of the stain, brightness and elastic augmentation, 0 (none) to 2."
    shrink: Annotated[float, Parameter(group=AUGMENTATION)] = 0.5
    "Least factor by which a crop's nuclei are resized, up to 1: half, for lymphocytes and crowded glands are small."
    enlarge: Annotated[float, Parameter(group=AUGMENTATION)] = 1.4
    "Largest factor by which a crop's nuclei are resized, 1 or more; factors are log-uniform from `shrink` to it."
    gamma: Annotated[float, Parameter(group=AUGMENTATION)] = 0.1
    "Deviation of the logarithm of a crop's gamma: scanners differ by a tenth or so; 0: none."
    normalise: Annotated[float, Parameter(group=AUGMENTATION)] = 0.7
    "Share of crops, 0 to 1, that are first moved towards the stain of another training image, beside `strength`."
    mix: Annotated[float, Parameter(group=AUGMENTATION)] = 1.0
    "How much of the way to that stain may be left out, at random: 1, all of it: every stain in between; 0: nothing."
    macenko: Annotated[float, Parameter(group=AUGMENTATION)] = 0.5
    "Share of those crops, 0 to 1, that Macenko's method moves; Reinhard's the others: they err in different ways."
    rescan: Annotated[float, Parameter(group=AUGMENTATION)] = 0.4
    "Share of crops, 0 to 1, that are reduced to 0.2 to 0.5 um per pixel, and enlarged again: scanners of 20x to 40x."
    sharpen: Annotated[float, Parameter(group=AUGMENTATION)] = 0.4
    "Share of those crops, 0 to 1, that are sharpened at that scale, as many scanners do, with halos along edges."
    recompress: Annotated[float, Parameter(group=AUGMENTATION)] = 0.5
    "Share of those crops, 0 to 1, that are compressed as JPEG at that scale, once or twice: most slides are."
    paste: Annotated[float, Parameter(group=AUGMENTATION)] = 0.3
    "Share of crops, 0 to 1, that get nuclei of another image, most of them beside one: crowds are scarce in the data."

    device: Annotated[str, Parameter(group=MACHINE)] = "auto"
    "cpu, cuda, cuda:N, or auto: the GPU if there is one."
    loaders: Annotated[int, Parameter(group=MACHINE)] = 1
    "Processes that prepare crops, 0: the training process itself; one keeps up with a CPU, a GPU needs more."
    score: Annotated[float | None, Parameter(group=OUTPUT)] = None
    "Score threshold that the weights state, for `run` to use; without it that of `init`, or the network's default."
    licence: Annotated[str, Parameter(group=OUTPUT)] = ""
    "Terms of use, kept in the weights file and shown where it is used; without it, those of `init`."

    def __post_init__(self) -> None:
        _check_schedule(self)
        require(
            self.steps > 0 or self.minutes > 0,
            f"steps={self.steps}, minutes={self.minutes:g}: need one of both above 0",
        )
        require(self.decay >= 0, f"decay={self.decay}: need 0 or more")
        require(0 <= self.strength <= 2, f"strength={self.strength}: need 0 to 2")
        require(0 < self.shrink <= 1, f"shrink={self.shrink}: need more than 0, up to 1")
        require(self.enlarge >= 1, f"enlarge={self.enlarge}: need 1 or more")
        require(self.gamma >= 0, f"gamma={self.gamma}: need 0 or more")
        for name in ("normalise", "mix", "macenko", "rescan", "sharpen", "recompress", "paste"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)}: need a share, 0 to 1")
        require(0 <= self.keep < 1, f"keep={self.keep}: need 0 or more, under 1")
        require(
            self.keep == 0 or self.init not in UNTRAINED,
            f"keep={self.keep}: need trained weights to start from, such as --init nuclei, not {self.init}",
        )
        require(0 <= self.average < 1, f"average={self.average}: need 0 or more, under 1")
        require(self.score is None or 0 < self.score < 1, f"score={self.score}: need more than 0, below 1")
        require(self.hold_out >= 0, f"hold_out={self.hold_out}: need 0 or more")
        require(self.loaders >= 0, f"loaders={self.loaders}: need 0 or more")


@dataclass(frozen=True)
class StainTraining:
    """How dcgmm's network is trained. Defaults are those of the shipped network, minutes on a CPU."""

    steps: Annotated[int, Parameter(group=SCHEDULE)] = 1000
    "Optimiser steps of the whole schedule: two minutes on one CPU thread."
    minutes: Annotated[float, Parameter(group=SCHEDULE)] = 0.0
    "Stop after so many minutes, to be continued by the same command; 0: stop at the last step only."
    save_every: Annotated[int, Parameter(group=SCHEDULE)] = 250
    "Steps between checkpoints: about half a minute on a CPU."

    rate: Annotated[float, Parameter(group=OPTIMISER)] = 3e-3
    "Highest learning rate (Adam); the network is small and starts from random weights."
    warmup: Annotated[int, Parameter(group=OPTIMISER)] = 50
    "Steps in which the learning rate rises from 0, so that no cluster is lost at the start; then cosine."
    batch: Annotated[int, Parameter(group=OPTIMISER)] = 16
    "Crops per step: enough for several stains in a step."
    seed: Annotated[int, Parameter(group=OPTIMISER)] = 0
    "Seed of all that is random: the same seed on the same machine gives the same weights."

    crop_px: Annotated[int, Parameter(group=AUGMENTATION)] = 128
    "Side of a training crop, in work pixels: enough for nuclei, stroma and glass; a mixture is fitted to every crop."

    device: Annotated[str, Parameter(group=MACHINE)] = "auto"
    "cpu, cuda, cuda:N, or auto: the GPU if there is one."

    def __post_init__(self) -> None:
        _check_schedule(self)
        require(self.steps >= 1, f"steps={self.steps}: need 1 or more")


def _check_schedule(training: Training | StainTraining) -> None:
    for name in ("batch", "save_every"):
        require(getattr(training, name) >= 1, f"{name}={getattr(training, name)}: need 1 or more")
    for name in ("steps", "minutes", "warmup", "seed"):
        require(getattr(training, name) >= 0, f"{name}={getattr(training, name)}: need 0 or more")
    for name, value in vars(training).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name}={value}: need a finite number")
    require(training.seed < 2**31, f"seed={training.seed}: need less than {2**31}")
    require(training.crop_px >= 32, f"crop_px={training.crop_px}: need 32 or more")
    require(training.rate > 0, f"rate={training.rate}: need more than 0")
