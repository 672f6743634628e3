"""Where tasks run: what every executor offers, and those without Dask, a loop and threads.

A task is a function of paths and numbers that returns a small record; pixels never pass through here. The executor on a
Dask cluster is in `cluster`; which one a run gets is decided in `execution`.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from pipeline.errors import ClusterLost, WorkersDied


class Executor(Protocol):
    """Where tasks run. `dashboard`: address of its web page, `warning`: what is unsafe about it; each may be empty.

    silent: its scheduler did not answer when it was last asked, though its machine may: suspended, perhaps.
    ended: the addresses of worker processes that `run_on_new_workers` knew and, when it was called, were not there.
    """

    dashboard: str
    warning: str
    silent: bool
    ended: tuple[str, ...]

    @property
    def detectors(self) -> int:
        """How many devices can detect at once, now; 0 where no worker is left that could."""

    @property
    def feeders(self) -> int:
        """How many tasks of the CPU can run at once, now."""

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]: ...

    def prepare(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in every process that detects, beside its tasks. Nobody waits for it, or learns of errors."""

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any, retire: bool = False) -> list[str]:
        """Call a function once in every process that runs tasks. Returns a line for each in which it raised.

        retire: end those in which it raised RunError; else they go on taking tasks.
        """


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

    dashboard, warning, detectors, feeders, silent = "", "", 1, 1, False
    ended: tuple[str, ...] = ()

    def run_on_new_workers(self, function: Callable[..., Any], *args: Any, retire: bool = False) -> list[str]:
        return []

    def prepare(self, function: Callable[..., Any], *args: Any) -> None:
        """Nothing: here the first task would wait for it."""

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

    def prepare(self, function: Callable[..., Any], *args: Any) -> None:
        self._device.submit(function, *args)

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        return (self._device if on_device else self._beside).submit(function, *args)


@contextmanager
def open_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish their task, and start no other, when the run is interrupted."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
