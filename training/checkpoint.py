"""The whole state of a training on disk: parameters, their running average, the optimiser, the step, the recipe.

A checkpoint is a folder of safetensors files of at most PART_BYTES, small enough for transfers with a limit on the
size of a file; a new one replaces the old one by renaming.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import Architecture, StainArchitecture
from pipeline.errors import ConfigError, WeightsError
from pipeline.files import committed, read_json, remove, write_json
from slides.partial import replace
from training.data.sample import Dataset

FOLDER = "checkpoint"
PART_BYTES = 12 * 2**20

# A training may be continued with other values of these: they do not decide what is learnt. But `minutes` do where they
# take the place of a number of steps.
MAY_DIFFER = frozenset(["minutes", "device", "loaders", "save_every", "licence", "score", "architecture.score"])

_DIGESTED = {  # of each dataset, and of weights, only a digest is known
    "images": "other images, or other scales (--mpp) or groups of the same",
    "annotations": "other annotations of the same images",
    "pixels": "other pixels of the same images, or other ignored areas",
    "kept": "other weights to keep a share of",
}

_STATE = "state.json"


def save(
    folder: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    recipe: Mapping[str, object],
    seconds: float = 0.0,
) -> None:
    """Write a checkpoint, after so many seconds of training: all in full precision, so that saving changes nothing."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"average.{k}": v for k, v in average.items()}
    for index, entry in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{index}.{name}": value for name, value in entry.items()}
    new, old = folder.with_name(folder.name + ".new"), _previous(folder)
    with committed(new) as partial:
        partial.mkdir(parents=True)
        names = []
        for number, part in enumerate(_parts(state)):
            names.append(f"{number:02}.safetensors")
            whole = {k: v.detach().cpu().clone().contiguous() for k, v in part.items()}
            (partial / names[-1]).write_bytes(safetensors.torch.save(whole))
        write_json(partial / _STATE, {"step": step, "seconds": seconds, "parts": names, "recipe": recipe})
    if folder.exists():
        remove(old)  # what a process that was killed while it removed it has left
        replace(folder, old)
    replace(new, folder)
    remove(old)


def refuse_other_weights(weights: Path) -> None:
    """Raise ConfigError for weights where a training will write its own, and no checkpoint beside them."""
    folder = weights.with_name(FOLDER)
    if weights.exists() and not folder.exists() and not _previous(folder).exists():
        raise ConfigError(
            f"{weights} is there already, without its {FOLDER} to continue from: move it away, or choose another --out"
        )


def resume(
    folder: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    recipe: Mapping[str, object],
) -> tuple[int, float]:
    """Load a checkpoint's state, and return its step and its seconds of training; 0 without a checkpoint.

    Raises ConfigError where the checkpoint's recipe differs from `recipe` in more than MAY_DIFFER, WeightsError for a
    checkpoint that is damaged or of another architecture.
    """
    old = _previous(folder)
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    if not folder.exists():
        return 0, 0.0
    try:
        content = _read_state(folder)
        _check_recipe(folder, content.get("recipe", {}), recipe)
        step, seconds = int(content["step"]), float(content.get("seconds", 0))
        if step < 0 or not 0 <= seconds < float("inf"):
            raise ValueError(f"step {step}, {seconds} seconds")
        parts = [folder / Path(str(name)).name for name in content["parts"]]
        # read, not mapped: while the optimiser has a mapped tensor Windows neither renames nor removes its file
        tensors = {k: v for part in parts for k, v in safetensors.torch.load(part.read_bytes()).items()}
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name in average:
            average[name].copy_(tensors[f"average.{name}"])
        state = _moments(tensors, optimiser)
    except ConfigError:
        raise
    except (
        OSError,
        ValueError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        SafetensorError,
    ) as error:
        raise WeightsError(
            f"{folder} cannot be continued ({error}): need the checkpoint of a training of this network, "
            f"or another --out"
        ) from error
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return step, seconds


def _moments(tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state, in the memory order of its parameters: a fused step takes both pixel by pixel."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            moment = torch.empty_like(parameters[int(index)]).copy_(value) if value.ndim else value.float()
            state.setdefault(int(index), {})[name] = moment
    return state


def architecture_fields(architecture: Architecture | StainArchitecture) -> dict[str, object]:
    """What a recipe states of the network: each field by itself, so that a difference is named by its field."""
    return {f"architecture.{field}": value for field, value in dataclasses.asdict(architecture).items()}


def data_fields(datasets: Sequence[Dataset]) -> dict[str, object]:
    """What a recipe states of its data: of each dataset the number of images, and a digest of which they are.

    And their order, which decides from which one a random number draws: two objects of JSON are equal in any order.
    """
    which = {d.name: json.dumps([[image.id, image.mpp, image.group] for image in d.images]) for d in datasets}
    return {
        "data": {d.name: len(d.images) for d in datasets},
        "data_order": [d.name for d in datasets],
        "images": {name: digest([images.encode()]) for name, images in which.items()},
    }


def pixels_digest(image: NDArray[np.uint8]) -> str:
    """By which weights name an image that they were trained on (`trained_pixels`), whatever it is called."""
    return digest([image.tobytes()])


def digest(parts: Iterable[bytes]) -> str:
    """Of all the parts, one after another."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()[:16]


def _previous(folder: Path) -> Path:
    """Where the old checkpoint is while a new one takes its place."""
    return folder.with_name(folder.name + ".old")


def _read_state(folder: Path) -> dict[str, Any]:
    content = read_json(folder / _STATE)
    if content is None:
        raise ValueError(f"{_STATE} is missing or damaged")
    return content


def _check_recipe(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, object]) -> None:
    """Raise ConfigError where two recipes differ in what decides the weights.

    Only what both of them state is compared: an older version may have recorded less.
    """
    stated = json.loads(json.dumps(wanted))  # as it would be read back
    free = MAY_DIFFER if stated.get("steps") else MAY_DIFFER - {"minutes"}
    shared = [name for name in stated if name in saved and name not in free]
    if different := [name for name in shared if saved[name] != stated[name]]:
        name = different[0]
        what = f"{name}={saved[name]!r}, not {stated[name]!r}"
        if name in _DIGESTED:
            changed = ", ".join(one for one in stated[name] if saved[name].get(one) != stated[name][one])
            what = f"{_DIGESTED[name]}, in {changed}"
        raise ConfigError(
            f"{folder} is of a training with {what}: continue it with the recipe "
            f"that it was started with, or start another training with another --out"
        )


def _parts(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, cut where a part would grow beyond PART_BYTES."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, value in state.items():
        if part and size + value.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = value
        size += value.nbytes
    yield part
