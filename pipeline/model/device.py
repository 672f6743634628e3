"""The device that computes, and its precision."""

import threading
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import Detector, check_device_name
from pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of a name: cpu, cuda, cuda:N, or auto, the GPU if there is one. Raises ConfigError otherwise."""
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}: this machine shows {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where this device multiplies in it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX).

    Where it is only emulated (T4, V100) it is slower than float32, which is then chosen.
    """
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    capable = _cuda_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if capable else torch.float32


def _cuda_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # torch asks of the current device
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx"))


_computing = threading.Lock()


def device_lock() -> threading.Lock:
    """The lock of this process's device: to be held while computing on it."""
    return _computing


def computes_on(detector: Detector) -> str:
    """Kind of device and precision of a detector here, such as "cpu bfloat16": they decide the last bits of results."""
    device = choose_device(detector.device)
    return f"{device.type} {str(choose_precision(detector.precision, device)).removeprefix('torch.')}"
