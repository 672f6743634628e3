"""Where tasks run: in a loop, on threads, or on a Dask cluster. The only file that imports Dask.

A task is a function of paths and numbers that returns a small record; pixels never pass through here. Items
flow through a list of steps, the next step of an item as soon as its last one is done, and no more than a
window of items is in flight, which bounds memory and scratch space.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from pipeline.config import Running

_LOOK_UP_S = 0.5  # how often a flow looks whether it is to stop


class Pools(NamedTuple):
    """Two places for tasks: beside the detector, and on it."""

    cpu: Executor
    device: Executor


class Step(NamedTuple):
    """One function of an item's way. It gets the item's arguments and what the step before returned."""

    function: Callable[..., Any]
    on_device: bool


class Outcome(NamedTuple):
    """What became of an item: the last step's record, or the error that stopped it."""

    item: tuple[Any, ...]
    record: Any
    error: Exception | None


class Loop(Executor):
    """Tasks one after the other, in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def pools(running: Running, client: Any = None) -> Iterator[Pools]:
    """The pools of a run: a Dask client's workers where one is given or named, else threads of this process.

    client: a `dask.distributed.Client`; where its workers offer the resource GPU, detection asks for it.
    With `running.workers` = 1 and no client, everything runs in a loop.
    """
    with ExitStack() as stack:
        if client is None and running.scheduler:
            client = stack.enter_context(_connect(running.scheduler))
        if client is not None:
            resources = {"GPU": 1} if _offers_gpu(client) else {}
            cpu = client.get_executor(pure=False)
            device = client.get_executor(pure=False, resources=resources) if resources else cpu
            yield Pools(cpu, device)
            return
        workers = running.workers or min(4, os.cpu_count() or 1)
        if workers == 1:
            yield Pools(Loop(), Loop())
            return
        cpu = stack.enter_context(_threads(workers))
        yield Pools(cpu, stack.enter_context(_threads(1)))


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Threads that finish what they are at, and begin nothing more, when the run is interrupted."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


def _connect(address: str) -> Any:
    from distributed import Client

    return Client(address, set_as_default=False)  # type: ignore[no-untyped-call]


def _offers_gpu(client: Any) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(worker.get("resources", {}).get("GPU") for worker in workers)


def flow(
    places: Pools,
    items: Iterable[tuple[Any, ...]],
    steps: Sequence[Step],
    window: int,
    stop: threading.Event | None = None,
) -> Iterator[Outcome]:
    """Send every item through the steps; outcomes come as they are done, in any order.

    At most `window` items are in flight, and `items` is read no further than that. An item that fails stops
    alone. Once `stop` is set no item is begun and none goes to its next step.
    """
    waiting = iter(items)
    running: dict[Future[Any], tuple[tuple[Any, ...], int]] = {}

    def submit(item: tuple[Any, ...], index: int, *previous: Any) -> None:
        step = steps[index]
        pool = places.device if step.on_device else places.cpu
        running[pool.submit(step.function, *item, *previous)] = item, index

    def fill() -> None:
        while len(running) < window and not (stop and stop.is_set()):
            item = next(waiting, None)
            if item is None:
                return
            submit(item, 0)

    fill()
    while running:
        done, _ = wait(running, timeout=_LOOK_UP_S, return_when=FIRST_COMPLETED)
        if stop and stop.is_set():  # what has not begun never will; what has begun ends and is kept
            for future in [f for f in running if f not in done and f.cancel()]:
                del running[future]
        for future in done:
            item, index = running.pop(future)
            error = future.exception()
            if isinstance(error, Exception) or index + 1 == len(steps):
                record = None if error else future.result()
                yield Outcome(item, record, error if isinstance(error, Exception) else None)
            elif not (stop and stop.is_set()):
                submit(item, index + 1, *([] if future.result() is None else [future.result()]))
        fill()
