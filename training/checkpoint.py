"""The whole state of a training, on disk: parameters, their average, the optimiser, the step.

A checkpoint is a folder of safetensors files of at most PART_BYTES, so that a training can move to another
machine through narrow doors; a new one replaces the old in one rename.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError

PART_BYTES = 12 * 2**20


def save(
    folder: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    recipe: Mapping[str, object],
) -> None:
    """Write a checkpoint. Adam's moments are kept in bfloat16, in memory too from here on.

    Half the file, and what goes on and what is continued elsewhere still do the same bit for bit.
    """
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"average.{k}": v for k, v in average.items()}
    for index, entry in optimiser.state_dict()["state"].items():
        for name, value in entry.items():
            if value.ndim:
                value.copy_(value.bfloat16())
            state[f"optimiser.{index}.{name}"] = value.bfloat16() if value.ndim else value
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    names = []
    for number, part in enumerate(_parts(state)):
        names.append(f"{number:02}.safetensors")
        whole = {k: v.detach().cpu().clone().contiguous() for k, v in part.items()}
        (new / names[-1]).write_bytes(safetensors.torch.save(whole))
    (new / "state.json").write_text(json.dumps({"step": step, "parts": names, "recipe": recipe}, indent=1))
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def resume(folder: Path, model: nn.Module, average: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state back, and return its step; 0 without a checkpoint.

    Raises WeightsError for one that is not whole, or of another architecture.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    if not folder.exists():
        return 0
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        step, parts = int(content["step"]), [folder / Path(str(name)).name for name in content["parts"]]
        tensors = {k: v for part in parts for k, v in safetensors.torch.load_file(part).items()}
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name in average:
            average[name].copy_(tensors[f"average.{name}"])
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{folder} cannot be continued from ({error}): need the checkpoint of a training of this network, "
            f"or another --out"
        ) from error
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value.float()
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return step


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
