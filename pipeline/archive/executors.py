"""Where tasks run: in a loop, on threads, or on a Dask cluster. The only file that imports Dask.

A task is a function of paths and numbers that returns a small record; pixels never pass through here. Tasks for
the detector ask for half of the resource GPU, so that two of them share one and the next block is read while this
one computes; the others ask for the resource CPU. A resource that no worker offers is not asked for.
"""

import asyncio
import functools
import ipaddress
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeline.config import Execution
from pipeline.errors import ClusterLost, ConfigError, RunError, WorkersDied
from pipeline.model.allocator import ENVIRONMENT, keep_few_prepared_layers, keep_freed_memory
from pipeline.model.device import choose_device, count_gpus, device_kind, has_gpu_driver

T = TypeVar("T")

_ASK_AGAIN_S = 5.0  # for how long the resources that the workers offer are cached
_ANSWER_S = 5.0  # for how long an answer of the scheduler is waited for
_SILENT_S = 11  # after which a scheduler whose machine acknowledges nothing is lost: the shortest that Dask permits


# ------------------------------------------------------------------------------------------------ executors


class Executor(Protocol):
    """Where tasks run. `dashboard`: address of its web page, `warning`: what is unsafe about it; each may be empty.

    silent: its scheduler did not answer when it was last asked, though its machine may: suspended, perhaps.
    ended: how many of the worker processes that `run_on_new_workers` knew were not there when it was last called.
    """

    dashboard: str
    warning: str
    silent: bool
    ended: int

    @property
    def detectors(self) -> int:
        """How many devices can detect at once, now; 0 where no worker is left that could."""

    @property
    def feeders(self) -> int:
        """How many tasks of the CPU can run at once, now."""

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]: ...

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """Call a function once in every process that runs tasks. Returns a line for each in which it raised."""


async def run_task(executor: Executor, on_device: bool, function: Callable[..., Any], *args: Any) -> Any:
    """What the task returns. Raises what it raises; ClusterLost, WorkersDied."""
    future = executor.submit(on_device, function, *args)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # not cancelled by this process, so by Dask, which cancels the tasks of a lost scheduler
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

    dashboard, warning, detectors, feeders, silent, ended = "", "", 1, 1, False, 0

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
    """Threads of this process: `beside` for tasks of the CPU, two that take turns on the device."""

    def __init__(self, beside: ThreadPoolExecutor, device: ThreadPoolExecutor, feeders: int) -> None:
        """feeders: threads of `beside`."""
        self._beside, self._device, self.feeders = beside, device, feeders

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return (self._device if on_device else self._beside).submit(function, *args)


class Cluster:
    """The workers of a `dask.distributed.Client`, as they come and go."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asked, self._offered = float("-inf"), {"GPU": 0.0, "CPU": 0.0, "workers": 0.0}
        self.silent, self.ended = False, 0
        self._known: set[str] = set()  # workers on which `run_on_new_workers` has run
        scheduler = client.scheduler_info(n_workers=0)
        self.dashboard: str = client.dashboard_link if "dashboard" in scheduler.get("services", {}) else ""
        self.warning = exposed(scheduler.get("address", ""))

    def _offers(self) -> dict[str, float]:
        if time.monotonic() - self._asked > _ASK_AGAIN_S:
            workers = self._workers()
            self._asked = time.monotonic()
            if workers is None:
                return self._offered
            resources = [worker.get("resources", {}) for worker in workers.values()]
            offered = {name: sum(each.get(name, 0) for each in resources) for name in ("GPU", "CPU")}
            self._offered = {**offered, "workers": len(workers)}
        return self._offered

    def _workers(self) -> dict[str, Any] | None:
        """The workers by their addresses; None where the scheduler does not answer in time."""
        ask = self._client.scheduler.identity
        try:
            answer = self._client.sync(ask, callback_timeout=_ANSWER_S)
        except TimeoutError:
            self.silent = True
            return None
        self.silent = False
        workers: dict[str, Any] = answer.get("workers", {})
        return workers

    @property
    def detectors(self) -> int:
        offers = self._offers()
        return int(offers["GPU"] if offers["CPU"] else offers["GPU"] or offers["workers"])

    @property
    def feeders(self) -> int:
        offers = self._offers()
        return int(offers["CPU"] or offers["workers"])

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any) -> list[str]:
        if (workers := self._workers()) is not None:
            self.ended += len(self._known - workers.keys())
            self._known &= workers.keys()
        new = [address for address in workers or () if address not in self._known]
        self._known.update(new)
        answers = self._client.run(function, *args, workers=new, on_error="return") if new else {}
        return [f"the worker at {address} {answer}" for address, answer in answers.items() if answer is not None]

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        offers = self._offers()
        # workers with GPUs may be late, or away: where others offer the resource CPU, these are waited for
        resources = {"GPU": 0.5} if on_device else {"CPU": 1}
        if not (offers["CPU"] or (on_device and offers["GPU"])):
            resources = {}
        future: Future[Any] = self._client.get_executor(pure=False, resources=resources).submit(function, *args)
        return future


def exposed(address: str) -> str:
    """A warning where a scheduler's address is open to a network without encryption; else empty."""
    protocol, _, place = address.partition("://")
    if protocol in ("tls", "wss", "inproc") or not place:
        return ""
    try:
        here = ipaddress.ip_address(place.rsplit(":", 1)[0].strip("[]")).is_loopback
    except ValueError:  # a name
        here = place.startswith("localhost:")
    if here:
        return ""
    return (
        f"the scheduler at {address} is reached without TLS: whoever can reach its port, or a worker's, can run code "
        f"there as you. Keep it to a network that you trust, or use TLS, with files of `nightslide certificates`"
    )


def check_execution(execution: Execution, device: str) -> None:
    """Raise ConfigError for what `open_executor` would refuse without asking a scheduler: nothing is started."""
    if execution.scheduler or execution.scheduler_file:
        _security(execution, _address(execution))
    else:
        _gpus(execution, device)  # one that is not there is refused now, not slide by slide


def starts_processes(execution: Execution, client: Any = None) -> bool:
    """Whether `open_executor` of the same arguments does: a script that calls it must be prepared for that."""
    return client is None and execution.cluster and not (execution.scheduler or execution.scheduler_file)


_GUARD = (
    'a script that calls `run` needs `if __name__ == "__main__":` before what it does, or `Execution(cluster=False)`'
)


def stop_in_a_starting_worker() -> None:
    """End this process if it is a worker that is being started: it imports the script, and came to the same call."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # until its script is imported
        raise SystemExit(f"nightslide: {_GUARD}: each worker process imports it")


def ask(apart: bool, function: Callable[..., T], *args: Any) -> T:
    """What a function that loads torch returns or raises: called in a process of its own (`apart`), or here.

    A process that only distributes work is half the size without torch. Raises RunError where that process is killed.
    """
    if not apart:
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            with _interrupts_kept_from_children():
                future = pool.submit(function, *args)
            return future.result()
        except BrokenProcessPool as error:
            raise RunError("a process that loads torch ended early: need about 0.5 GB of free memory for it") from error


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
            _use_this_process(device)
            yield Loop()
        else:
            _use_this_process(device)
            feeders = execution.workers or min(4, _cores())
            beside, on_device = (stack.enter_context(_threads(count)) for count in (feeders, 2))
            yield Threads(beside, on_device, feeders)


def _use_this_process(device: str) -> None:
    """Prepare this process for the detector, before it has other threads."""
    if choose_device(device).type == "cpu":
        keep_freed_memory()
        keep_few_prepared_layers()


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

    address = _address(execution)
    security = _security(execution, address)
    try:
        with dask.config.set({"distributed.comm.timeouts.tcp": f"{_SILENT_S}s"}):
            client = Client(address, security=security, set_as_default=False)
    except (OSError, ValueError) as error:
        hint = "; is it started, and with TLS? then give tls://... and the three --tls- flags"
        if address.startswith("tls://"):
            hint = "; are its certificates of the same authority as yours?"
        raise ConfigError(f"no Dask scheduler answers at {address}: {error}{hint}") from error
    # `run_task` reports a lost scheduler in one line
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with client:
        yield client


def _address(execution: Execution) -> str:
    """The address of the scheduler that is named, or whose file is."""
    if execution.scheduler:
        return execution.scheduler
    file, remedy = execution.scheduler_file, "need the file of `dask scheduler --scheduler-file`"
    if not os.path.exists(file):
        raise ConfigError(f"scheduler-file={file} does not exist: {remedy}")
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"scheduler-file={file} holds no address: {remedy}") from error


def _security(execution: Execution, address: str) -> Any:
    """Dask's settings of TLS for a scheduler at `address`: the given files, or those of Dask's configuration.

    Raises ConfigError where files and address do not go together, and for files that are not there or no use.
    """
    from distributed import Security

    given = execution.tls if any(execution.tls.values()) else {}
    encrypted = address.startswith(("tls://", "wss://"))
    if given and not encrypted:
        raise ConfigError(f"TLS files for a scheduler at {address}: need one that was started with them, at tls://")
    for name, file in given.items():
        if not os.path.isfile(file):
            raise ConfigError(
                f"{name.replace('_', '-')}={file} does not exist: need a file of `nightslide certificates`"
            )
    of_client = {name.replace("tls_", "tls_client_") if name != "tls_ca_file" else name: f for name, f in given.items()}
    security: Any = Security(**of_client)
    if not encrypted:
        return security
    if not (security.tls_ca_file and security.tls_client_cert and security.tls_client_key):
        raise ConfigError(
            f"scheduler={address} without its certificates: need --tls-ca-file, --tls-cert and --tls-key, "
            f"the files that the scheduler was started with"
        )
    try:
        security.get_connection_args("client")
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(file) for file in of_client.values()) or "those of Dask's configuration"
        raise ConfigError(f"TLS files {files} cannot be used ({error}): need certificates and key in PEM") from error
    return security


# -------------------------------------------------------------------------------------------- this machine


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
    detecting = [_detecting({"OMP_NUM_THREADS": str(max(1, cores // count))}, memory=2)] * count
    return detecting + [_beside(min(4, max(1, cores // beside)))] * beside


def _detecting(environment: dict[str, str], memory: int) -> WorkerSpec:
    return WorkerSpec(2, {"GPU": 1}, environment, memory)


def _beside(threads: int) -> WorkerSpec:
    return WorkerSpec(threads, {"CPU": threads}, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, 1)


@contextmanager
def _start(execution: Execution, device: str) -> Iterator[Any]:
    """A client of a cluster on this machine, which ends with it."""
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.worker_memory import parse_memory_limit

    gpus = _gpus(execution, device)
    chosen = worker_specs(execution.workers, _cores(), gpus)
    log, whole = logging.getLogger(__name__), sum(spec.memory for spec in chosen)
    limits = [parse_memory_limit(execution.memory_limit, spec.memory, whole, logger=log) for spec in chosen]
    workers = {
        number: {
            "cls": Nanny,
            "options": {
                "nthreads": spec.threads,
                "resources": spec.resources,
                "env": spec.environment,
                "memory_limit": limits[number],
                "host": "127.0.0.1",  # else its ports are open to the network, without authentication
                "dashboard": False,
                "silence_logs": logging.CRITICAL,  # a task that fails is a row of the ledger
            },
        }
        for number, spec in enumerate(chosen)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "dashboard": True, "dashboard_address": "127.0.0.1:0"},
    }
    quiet = {
        "distributed.worker.memory.target": False,  # Dask could spill records only, which are small
        "distributed.worker.memory.spill": False,
        # read before Python starts; beside a GPU, workers cut and outline: their threads would keep 8 arenas a core
        "distributed.nanny.pre-spawn-environ": {"MALLOC_ARENA_MAX": "2"} if gpus else ENVIRONMENT,
        "logging": {"distributed": "error"},
    }
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(quiet))
        with _interrupts_kept_from_children():
            try:
                cluster = SpecCluster(workers, scheduler, name="nightslide", silence_logs=logging.ERROR)
            except RuntimeError as error:
                raise RunError(f"the worker processes do not start ({error}): {_GUARD}") from None
            stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        client.wait_for_workers(len(chosen), timeout=120)
        yield client


@contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """Of processes that are started by threads which are made in this block: a terminal sends Ctrl-C to them, too.

    They are this process's to end. Threads and processes inherit which signals are blocked where they are made.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # Python unblocks the signal again in the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    from dask.system import CPU_COUNT  # respects affinity and control groups

    return int(CPU_COUNT)


def _gpus(execution: Execution, device: str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them. Raises ConfigError for those that are not there."""
    count = 0 if device == "cpu" or not has_gpu_driver() else _count_gpus(execution.cluster)
    device_kind(device, count)
    if execution.gpus > count:
        raise ConfigError(f"gpus={execution.gpus}: this machine has {count} to use with --detector.device {device}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    if count and ":" in device:
        return [",".join(names)]  # one process that sees all of them and finds its own by number
    return names[: count if execution.gpus < 0 else execution.gpus]


@functools.cache
def _count_gpus(apart: bool) -> int:
    return ask(apart, count_gpus)
