"""Every setting of training and its default: the only place where one is written."""

from dataclasses import dataclass

from pipeline.config import require


@dataclass(frozen=True)
class Training:
    """How the weights come to be."""

    steps: int = 4000
    "Optimiser steps of the whole schedule (warm-up, then cosine)."
    minutes: float = 0.0
    "Stop cleanly after so many minutes, to be continued by the same command; 0: only at the last step."
    batch: int = 4
    crop_px: int = 192
    "Side of a training crop, in work pixels."
    rate: float = 8e-4
    "Highest learning rate (AdamW)."
    warmup: int = 200
    decay: float = 0.02
    strength: float = 1.0
    "Of the stain, brightness, blur, compression and elastic augmentation; 0 is none."
    normalise: float = 0.0
    "Share of crops that are first normalised to the stain of another training image."
    by_class: bool = False
    "Tell the sets' classes apart; without it there is one, Nucleus."
    average: float = 0.998
    "Decay of the running average of the weights, which is what is saved."
    hold_out: int = 2
    "Training images kept aside (the last of a seeded shuffle), for thresholds and curves."
    init: str = "imagenet"
    "Weights to start from: imagenet (the backbone only; needs nightslide[train]), random, shipped ones, or a file."
    licence: str = ""
    "What others may do with the weights: kept in the file (that of `init`, if it is not given), said where it is used."
    seed: int = 0
    device: str = "auto"
    loaders: int = 1
    "Processes that prepare crops."
    save_every: int = 250

    def __post_init__(self) -> None:
        _check_schedule(self)
        require(self.decay >= 0, f"decay={self.decay}: need 0 or more")
        require(0 <= self.strength <= 2, f"strength={self.strength}: need 0 to 2")
        require(0 <= self.normalise <= 1, f"normalise={self.normalise}: need a share, 0 to 1")
        require(0 <= self.average < 1, f"average={self.average}: need 0 or more, under 1")
        require(self.hold_out >= 0, f"hold_out={self.hold_out}: need 0 or more")
        require(self.loaders >= 0, f"loaders={self.loaders}: need 0 or more")


@dataclass(frozen=True)
class StainTraining:
    """How dcgmm's network comes to be."""

    steps: int = 1000
    "Optimiser steps of the whole schedule (warm-up, then cosine)."
    minutes: float = 0.0
    "Stop cleanly after so many minutes, to be continued by the same command; 0: only at the last step."
    batch: int = 16
    crop_px: int = 128
    "Side of a training crop, in work pixels; every crop has a mixture of its own."
    rate: float = 3e-3
    "Highest learning rate (Adam)."
    warmup: int = 50
    seed: int = 0
    device: str = "auto"
    save_every: int = 250

    def __post_init__(self) -> None:
        _check_schedule(self)


def _check_schedule(training: Training | StainTraining) -> None:
    for name in ("steps", "batch", "save_every"):
        require(getattr(training, name) >= 1, f"{name}={getattr(training, name)}: need 1 or more")
    for name in ("minutes", "warmup", "seed"):
        require(getattr(training, name) >= 0, f"{name}={getattr(training, name)}: need 0 or more")
    require(training.crop_px >= 32, f"crop_px={training.crop_px}: need 32 or more")
    require(training.rate > 0, f"rate={training.rate}: need more than 0")
