"""Where tasks run: in a loop, on threads, or on a Dask cluster. The only file that imports Dask.

A task is a function of paths and numbers that returns a small record; pixels never pass through here. Tasks for
the detector ask for half of the resource GPU, so that two of them share one and the next block is read while this
one computes; the others ask for the resource CPU. Where no worker offers a resource, nobody asks for it.
"""

import asyncio
import heapq
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


# --------------------------------------------------------------------------------------------------- places


class Executor(Protocol):
    """Where tasks run. `detectors`: how many detections can be computed at once, now; `dashboard`: its address."""

    dashboard: str

    @property
    def detectors(self) -> int:
        """0 where no worker is left that could."""

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]: ...

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """Call a function once in every process that tasks may go to; who raised, and what."""


async def run_task(places: Executor, on_device: bool, function: Callable[..., Any], *args: Any) -> Any:
    """The task's record. Raises what it raises; ClusterLost."""
    future = places.submit(on_device, function, *args)
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
                f"several worker processes died of {function.__name__}{args[1:]}: for want of memory (--memory-limit, "
                f"a smaller --tiling.block), or of a file that crashes its reader"
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
        self._known: set[str] = set()  # workers that have been introduced
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
def places(execution: Execution, device: str = "auto", client: Any = None) -> Iterator[Executor]:
    """Where the tasks of a run are done: on a client's cluster, on a running one, on one of this machine, or here.

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
    """Threads that finish what they are at, and begin nothing more, when the run is interrupted."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _connect(execution: Execution) -> Iterator[Any]:
    from distributed import Client

    where = execution.scheduler or execution.scheduler_file
    known = {"address": execution.scheduler} if execution.scheduler else {"scheduler_file": execution.scheduler_file}
    if execution.scheduler_file and not os.path.exists(execution.scheduler_file):
        raise ConfigError(f"scheduler-file={where} does not exist: need the file of `dask scheduler --scheduler-file`")
    try:
        client = Client(**known, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Dask scheduler answers at {where}: {error}") from error
    # when the scheduler is gone we say so ourselves, in a line
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
                "dashboard": False,
                "silence_logs": logging.CRITICAL,  # a task that fails is a line of the ledger
            },
        }
        for number, spec in enumerate(chosen)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "dashboard": _has_bokeh(), "dashboard_address": "127.0.0.1:0"},
    }
    quiet = {
        "distributed.worker.memory.target": False,  # nothing that Dask could spill is large
        "distributed.worker.memory.spill": False,
        # Dask has its workers give memory back at once; a detector on the processor then takes twice as long
        "distributed.nanny.pre-spawn-environ": {},
        "logging": {"distributed": "error"},
    }
    with (
        dask.config.set(quiet),
        SpecCluster(workers, scheduler, name="nightslide", silence_logs=logging.ERROR) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
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


# ---------------------------------------------------------------------------------------------------- turns


class FairSlots:
    """At most `size` blocks in flight, over all slides. Who has the least left to do is next.

    So a small slide overtakes a large one, and the last large slide has all the turns. Used by one event loop.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken, self._number = 0, 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    async def take(self, left: int) -> None:
        """Wait for a turn; `left`: blocks that its slide has to do. Give it back by `give_back`."""
        self._number += 1
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (left, self._number, mine))
        self._next()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        self._taken -= 1
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._taken < self.size or self._waiting[0][2].done()):
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():  # else cancelled
                self._taken += 1
                turn.set_result(None)
