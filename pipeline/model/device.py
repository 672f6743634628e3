"""The device that computes, and its precision. torch is loaded by what asks it: not every process needs it."""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.config import Detector, check_device_name
from pipeline.errors import ConfigError, DeviceLost
from pipeline.text import one_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def device_kind(name: str, gpus: int) -> Literal["cpu", "cuda"]:
    """What a device's name (cpu, cuda, cuda:N or auto, the GPU if there is one) means where there are so many GPUs.

    Raises ConfigError for another name, and for a GPU that is not there.
    """
    check_device_name(name)
    if name == "cpu" or (name == "auto" and not gpus):
        return "cpu"
    if name != "auto" and int(name.partition(":")[2] or 0) >= gpus:
        raise ConfigError(f"device={name!r}: this machine shows {gpus} CUDA devices; use cpu or auto")
    return "cuda"


def choose_device(name: str) -> "torch.device":
    """The device of a name, on this machine. Raises ConfigError as `device_kind` does."""
    import torch

    kind = device_kind(name, _gpus_of_torch())
    return torch.device(kind if name == "auto" else name)


def count_gpus() -> int:
    """GPUs that torch can use here, counted without torch where there is no driver of any."""
    return _gpus_of_torch() if has_gpu_driver() else 0


def has_gpu_driver() -> bool:
    """Whether this machine may have a GPU; False on a Linux without the driver of one, NVIDIA's or AMD's."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _gpus_of_torch() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_precision(name: str, device: "torch.device") -> "torch.dtype":
    """'auto' is bfloat16 where this device multiplies in it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX).

    Where it is only emulated (T4, V100) it is slower than float32, which is then chosen.
    """
    import torch

    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    capable = _cuda_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if capable else torch.float32


def autocast(device: "torch.device", precision: "torch.dtype") -> "torch.autocast":
    """The context in which a network on a device computes in this precision."""
    import torch

    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def _cuda_has_bfloat16(device: "torch.device") -> bool:
    import torch

    with torch.cuda.device(device):  # torch asks of the current device
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_has_bfloat16() -> bool:
    import torch

    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx"))


@functools.cache
def kernels_problem(device: "torch.device") -> str | None:
    """Why `gpu_kernels` cannot be used on a device; None where they were tried there and give what they should."""
    if device.type != "cuda":
        return "they are for GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import torch

        from pipeline.model import gpu_kernels

        with torch.autocast(device.type, enabled=False):  # a caller may compute in another precision
            gpu_kernels.check(device, (torch.float32, *([torch.bfloat16] if _cuda_has_bfloat16(device) else [])))
    except Exception as error:  # whatever a driver, a compiler or a disk does not do
        return one_line(error)
    return None


_computing = threading.Lock()


def compute(device: str, function: Callable[[], T]) -> T:
    """What `function` returns, or raises; one at a time in this process. device: as in `choose_device`.

    For a GPU it is called in the same thread every time. PyTorch keeps the plans of cuDNN's convolutions by thread, and
    to plan a network for one more thread, or one more size of its input, took two seconds on an H200.
    Raises DeviceLost where the function failed because the GPU has.
    """
    with _computing:
        if device == "cpu" or device_kind(device, count_gpus()) == "cpu":
            return function()
        return _thread_of_gpu().submit(_on_gpu, choose_device(device), function).result()


def _on_gpu(device: "torch.device", function: Callable[[], T]) -> T:
    """What `function` returns, or raises. Raises DeviceLost where it failed because the GPU has."""
    import torch

    try:
        return function()
    except RuntimeError as error:
        try:
            torch.cuda.synchronize(device)  # after an error of the GPU itself CUDA refuses all that a process asks
        except RuntimeError as lost:
            raise DeviceLost(
                f"the GPU {device} has failed ({str(lost).splitlines()[0]}): look at nvidia-smi and the system's log; "
                f"the same command continues, with --gpus or CUDA_VISIBLE_DEVICES on others"
            ) from error
        raise


def start_download(values: "torch.Tensor") -> "Callable[[], torch.Tensor]":
    """Have a tensor copied to the host once it is computed. What is returned waits for the copy, and gives it.

    Until then the GPU may be given more to do, and the memory of `values` may be used again. The values of a CPU are
    given as they are. What is returned raises DeviceLost where the GPU has failed meanwhile.
    """
    import torch

    device = values.device
    if device.type == "cpu":
        return lambda: values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    # of the stream that computes; a thread that waits for it leaves its core to others
    copied = torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))

    def downloaded() -> torch.Tensor:
        _on_gpu(device, copied.synchronize)
        return copy

    return downloaded


@functools.cache
def _thread_of_gpu() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "gpu")


def computes_on(detector: Detector) -> str:
    """Kind of device and precision of a detector here, such as "cpu bfloat16": they decide the last bits of results.

    And whether a GPU detects without our kernels, which is slower, and gives other last bits.
    """
    device = choose_device(detector.device)
    kind = f"{device.type} {str(choose_precision(detector.precision, device)).removeprefix('torch.')}"
    return f"{kind} without Triton" if device.type == "cuda" and kernels_problem(device) else kind


@functools.lru_cache(maxsize=256)
def count_up(count: int, device: "torch.device") -> "torch.Tensor":
    """0, 1, 2, ...: int32 (count,), made once per device, as the GPU is asked for nothing then."""
    import torch

    with torch.inference_mode():  # whatever the caller's mode is: it outlives that
        return torch.arange(count, dtype=torch.int32, device=device)
