"""The tensors of a weights file: written from a network, and read into one."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError
from pipeline.model.weights import NOTES_SHA256, notes_sha256, read_notes

M = TypeVar("M", bound=nn.Module)

_REMEDY = "download or copy it again"


def save(network: nn.Module, architecture: Any, path: Path, notes: Mapping[str, str]) -> None:
    """Write a network's tensors in half precision, with its architecture (a dataclass) and notes.

    Raises WeightsError where one is not finite, or not in half precision.
    Law: equal tensors and notes give equal bytes.
    """
    tensors = {
        name: (t.detach().cpu().half() if t.is_floating_point() else t.detach().cpu()).clone().contiguous()
        for name, t in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    if (name := _not_finite(tensors)) is not None:
        raise WeightsError(
            f"{name} is not finite in half precision (below {torch.finfo(torch.half).max:g}): its training went wrong; "
            f"train again, with a lower --rate"
        )
    metadata = {
        **notes,
        "architecture": json.dumps(dataclasses.asdict(architecture)),
        "sha256": _tensors_sha256(tensors),
    }
    metadata[NOTES_SHA256] = notes_sha256(metadata)
    # save_file would make a file that its owner alone may read
    path.write_bytes(_in_order(safetensors.torch.save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with the entries of its header sorted: the library writes notes in an order of chance.

    The file is the header's length (8 bytes), the header in JSON, filled up with spaces to 8 bytes, and the tensors.
    """
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:stop]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[stop:]


def load_into(build: Callable[[], M], path: Path) -> M:
    """A network with the file's tensors, in float32, ready for inference; `build` makes it.

    Raises WeightsError where the file is damaged (checksum) or does not fit the network. That is looked at before the
    network takes any memory: a file may name one of any size.
    """
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
    with safetensors.safe_open(path, "pt") as file:
        stated = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    if differing := [name for name in wanted.keys() & stated.keys() if wanted[name] != stated[name]]:
        name = min(differing)
        raise WeightsError(
            f"{path} does not fit the architecture it names: {name} has the shape {stated[name]}, not {wanted[name]}; "
            f"{_REMEDY}"
        )
    missing = sorted(name for name in wanted.keys() - stated.keys() if not name.endswith("num_batches_tracked"))
    unknown = sorted(stated.keys() - wanted.keys())
    if missing or unknown:
        raise WeightsError(
            f"{path} does not fit the architecture it names: missing {missing[:3]}, unknown {unknown[:3]}; {_REMEDY}"
        )
    network = build()
    tensors = safetensors.torch.load_file(path)
    if _tensors_sha256(tensors) != read_notes(path).get("sha256"):
        raise WeightsError(f"{path} is damaged: its tensors do not match their checksum; {_REMEDY}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if (wrong := _not_finite(tensors)) is not None:
        raise WeightsError(f"{path} holds values in {wrong} that are not finite: train it anew, or take other weights")
    network.load_state_dict(tensors, strict=False)
    return network.eval()


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite."""
    return next((name for name in sorted(tensors) if not torch.isfinite(tensors[name]).all()), None)


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
