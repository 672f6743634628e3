"""Where tasks run: in a loop, on threads, or on a Dask cluster. The only file that imports Dask.

A task is a function of paths and numbers that returns a small record; pixels never pass through here. Tasks for
the detector ask for half of the resource GPU, so that two of them share one and the next block is read while this
one computes; the others ask for the resource CPU. Where no worker offers a resource, nobody asks for it.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

from pipeline.config import Execution
from pipeline.errors import ClusterLost, ConfigError, WorkersDied

_ASK_AGAIN_S = 5.0  # how old the answer to "what do the workers offer" may be
_SILENT_S = 11  # after which a scheduler whose machine acknowledges nothing is lost: the least that Dask takes


# ------------------------------------------------------------------------------------------------ executors


class Executor(Protocol):
    """Where tasks run. `dashboard`: address of its web page, or empty."""

    dashboard: str

    @property
    def detectors(self) -> int:
        """How many devices can detect at once, now; 0 where no worker is left that could."""

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]: ...

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """Call a function once in every process that tasks may go to; who raised, and what."""


async def run_task(executor: Executor, on_device: bool, function: Callable[..., Any], *args: Any) -> Any:
    """What the task returns. Raises what it raises; ClusterLost, WorkersDied."""
    future = executor.submit(on_device, function, *args)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # nobody here has cancelled it, so Dask has: it cancels what a lost scheduler held
        raise ClusterLost("the Dask scheduler is gone; the same command continues what it held") from None
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # of distributed, which is not imported where it cannot come from
            raise WorkersDied(
                f"several worker processes died in {function.__name__}: out of memory (raise --memory-limit, or choose "
                f"a smaller --tiling.block), or a file that crashes its reader"
            ) from None
        raise


class Loop:
    """Tasks one after the other, in the caller's thread."""

    dashboard, detectors = "", 1

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        return []

    def submit(self, _on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class Threads(Loop):
    """Threads of this process: `beside` for the processor, two that take turns on the device."""

    def __init__(self, beside: ThreadPoolExecutor, device: ThreadPoolExecutor) -> None:
        self._beside, self._device = beside, device

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return (self._device if on_device else self._beside).submit(function, *args)


class Cluster:
    """The workers of a `dask.distributed.Client`, as they come and go."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asked, self._offered = float("-inf"), {"GPU": 0.0, "CPU": 0.0, "workers": 0.0}
        self._known: set[str] = set()  # workers on which `run_on_new_workers` has run
        serves = "dashboard" in client.scheduler_info(n_workers=0).get("services", {})
        self.dashboard: str = client.dashboard_link if serves else ""

    def _offers(self) -> dict[str, float]:
        if time.monotonic() - self._asked > _ASK_AGAIN_S:
            workers = self._workers().values()
            offered = {name: sum(w.get("resources", {}).get(name, 0) for w in workers) for name in ("GPU", "CPU")}
            self._asked, self._offered = time.monotonic(), {**offered, "workers": len(workers)}
        return self._offered

    def _workers(self) -> dict[str, Any]:
        workers: dict[str, Any] = self._client.scheduler_info(n_workers=-1).get("workers", {})
        return workers

    @property
    def detectors(self) -> int:
        offers = self._offers()
        return int(offers["GPU"] if offers["CPU"] else offers["GPU"] or offers["workers"])

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        new = [address for address in self._workers() if address not in self._known]
        self._known.update(new)
        answers = self._client.run(function, *args, workers=new, on_error="return") if new else {}
        return [f"the worker at {address} {answer}" for address, answer in answers.items() if answer is not None]

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        offers = self._offers()
        # workers with GPUs may be late, or away: where others say that they are for the processor, they are waited for
        resources = {"GPU": 0.5} if on_device else {"CPU": 1}
        if not (offers["CPU"] or (on_device and offers["GPU"])):
            resources = {}
        future: Future[Any] = self._client.get_executor(pure=False, resources=resources).submit(function, *args)
        return future


def _has_bokeh() -> bool:
    from importlib.util import find_spec

    return find_spec("bokeh") is not None


@contextmanager
def open_executor(execution: Execution, device: str = "auto", client: Any = None) -> Iterator[Executor]:
    """The executor of a run: the cluster of a client, one that is running, one of this machine, or this process.

    device: as in `Detector`; decides whether this machine's GPUs are used.
    client: a `dask.distributed.Client`, which is left as it is.
    Raises ConfigError for a scheduler that cannot be reached, or GPUs that are not there.
    """
    with ExitStack() as stack:
        if client is not None:
            yield Cluster(client)
        elif execution.scheduler or execution.scheduler_file:
            yield Cluster(stack.enter_context(_connect(execution)))
        elif execution.cluster:
            yield Cluster(stack.enter_context(_start(execution, device)))
        elif execution.workers == 1:
            yield Loop()
        else:
            beside = stack.enter_context(_threads(execution.workers or min(4, _cores())))
            yield Threads(beside, stack.enter_context(_threads(2)))


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish their task, and start no other, when the run is interrupted."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _connect(execution: Execution) -> Iterator[Any]:
    import dask
    from distributed import Client

    where = execution.scheduler or execution.scheduler_file
    known = {"address": execution.scheduler} if execution.scheduler else {"scheduler_file": execution.scheduler_file}
    if execution.scheduler_file and not os.path.exists(execution.scheduler_file):
        raise ConfigError(f"scheduler-file={where} does not exist: need the file of `dask scheduler --scheduler-file`")
    try:
        with dask.config.set({"distributed.comm.timeouts.tcp": f"{_SILENT_S}s"}):
            client = Client(**known, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {where}: {error}") from error
    # that the scheduler is gone is said in one line, by `run_task`
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with client:
        yield client


# -------------------------------------------------------------------------------------------- this machine


class WorkerSpec(NamedTuple):
    """A worker process of this machine."""

    threads: int
    resources: dict[str, float]
    environment: dict[str, str]


def worker_specs(workers: int, cores: int, gpus: list[str]) -> list[WorkerSpec]:
    """The worker processes of a machine: one for every GPU, and others for the processor.

    workers: processes for the processor, 0: as many as the cores can use; gpus: as CUDA_VISIBLE_DEVICES names them.
    A GPU is fed by at most six processes. Without one, every process computes too, one for eight cores.
    """
    if gpus:
        beside = workers or max(1, min(cores - len(gpus), 6 * len(gpus)))
        computing = [WorkerSpec(2, {"GPU": 1}, {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1"}) for gpu in gpus]
        return computing + [WorkerSpec(1, {"CPU": 1}, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})] * beside
    count = workers or max(1, cores // 8)
    share = max(1, cores // count)
    beside = min(4, share)
    return [WorkerSpec(2 + beside, {"GPU": 1, "CPU": beside}, {"OMP_NUM_THREADS": str(share)})] * count


@contextmanager
def _start(execution: Execution, device: str) -> Iterator[Any]:
    """A client of a cluster on this machine, which ends with it."""
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.worker_memory import parse_memory_limit

    chosen = worker_specs(execution.workers, _cores(), _gpus(execution, device))
    limit = parse_memory_limit(execution.memory_limit, 1, len(chosen), logger=logging.getLogger(__name__))
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                "nthreads": spec.threads,
                "resources": spec.resources,
                "env": spec.environment,
                "memory_limit": limit,
                "host": "127.0.0.1",  # else its ports are open to the network, without authentication
                "dashboard": False,
                "silence_logs": logging.CRITICAL,  # a task that fails is a row of the ledger
            },
        }
        for number, spec in enumerate(chosen)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "dashboard": _has_bokeh(), "dashboard_address": "127.0.0.1:0"},
    }
    quiet = {
        "distributed.worker.memory.target": False,  # Dask could spill records only, which are small
        "distributed.worker.memory.spill": False,
        # Dask has its workers give memory back at once; a detector on the processor then takes twice as long
        "distributed.nanny.pre-spawn-environ": {},
        "logging": {"distributed": "error"},
    }
    with (
        dask.config.set(quiet),
        SpecCluster(workers, scheduler, name="nightslide", silence_logs=logging.ERROR) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(len(chosen), timeout=120)
        yield client


def _cores() -> int:
    from dask.system import CPU_COUNT  # minds affinity and control groups

    return int(CPU_COUNT)


def _gpus(execution: Execution, device: str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if device.startswith(("auto", "cuda")) else 0
    if execution.gpus > count:
        raise ConfigError(f"gpus={execution.gpus}: this machine has {count} to use with --detector.device {device}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    if count and ":" in device:
        return [",".join(names)]  # one process that sees all of them and finds its own by number
    return names[: count if execution.gpus < 0 else execution.gpus]
