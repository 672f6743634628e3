"""This machine: its cores, its GPUs, and the worker processes that fit them.

One of the three files that import Dask, beside `local_cluster` and `scheduler`: it knows how many cores we may use.
"""

import functools
import os
from typing import NamedTuple

from pipeline.archive.workers.processes import ask
from pipeline.config import Execution
from pipeline.errors import ConfigError
from pipeline.model.device import count_gpus, device_kind, has_gpu_driver


class WorkerSpec(NamedTuple):
    """A worker process of this machine."""

    threads: int
    resources: dict[str, float]
    environment: dict[str, str]
    memory: int  # its share of the machine's, at which it is restarted


def worker_specs(workers: int, cores: int, gpus: list[str]) -> list[WorkerSpec]:
    """The worker processes of a machine: those that detect, and others beside them, which need no torch.

    workers: processes that do not detect, 0: as many as the cores can use; gpus: as CUDA_VISIBLE_DEVICES names them.
    One process detects on every GPU, which are fed by all cores that are left; without one, eight cores have one.
    A process that detects may take more memory than one that does not: on a GPU, it holds CUDA's libraries and batches.
    """
    if gpus:
        beside = workers or max(1, cores - len(gpus))
        detecting = [_detecting({"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1"}, memory=4) for gpu in gpus]
        return detecting + [_beside(1)] * beside
    count = max(1, cores // 8)
    beside = workers or count
    # none is visible: with --gpus 0, those of the machine would be computed on all the same
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, cores // count))}
    detecting = [_detecting(environment, memory=2)] * count
    return detecting + [_beside(min(4, max(1, cores // beside)))] * beside


def _detecting(environment: dict[str, str], memory: int) -> WorkerSpec:
    return WorkerSpec(2, {"GPU": 1}, environment, memory)


def _beside(threads: int) -> WorkerSpec:
    return WorkerSpec(threads, {"CPU": threads}, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, 1)


def count_cores() -> int:
    from dask.system import CPU_COUNT  # respects affinity and control groups

    return int(CPU_COUNT)


def usable_gpus(execution: Execution, device: str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them.

    Raises ConfigError for those that are not there, and for a device that is one where none is to be used.
    """
    count = 0 if device == "cpu" or not has_gpu_driver() else _count_gpus(execution.cluster)
    device_kind(device, count)
    if execution.gpus > count:
        raise ConfigError(f"gpus={execution.gpus}: this machine has {count} to use with --detector.device {device}")
    if execution.gpus == 0 and count and (device != "auto" or not execution.cluster):
        # a device that is named, or this process, which may have looked for GPUs already
        raise ConfigError(f"gpus=0, but with --detector.device {device} one is used: need --detector.device cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    if count and ":" in device:
        return [",".join(names)]  # one process that sees all of them and finds its own by number
    return names[: count if execution.gpus < 0 else execution.gpus]


@functools.cache
def _count_gpus(apart: bool) -> int:
    return ask(apart, count_gpus)
