"""How a run starts other processes: its script is not run again, torch stays in them, Ctrl-C does not reach them."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import RunError

T = TypeVar("T")

GUARD = (
    'a script that calls `run` needs `if __name__ == "__main__":` before what it does, or `Execution(cluster=False)`'
)


def stop_in_a_starting_worker() -> None:
    """End this process if it is a worker that is being started: it imports the script, and came to the same call."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # until its script is imported
        raise SystemExit(f"nightslide: {GUARD}: each worker process imports it")


def ask(apart: bool, function: Callable[..., T], *args: Any) -> T:
    """What a function that loads torch returns or raises: called in a process of its own (`apart`), or here.

    A process that only distributes work is half the size without torch. Raises RunError where that process is killed.
    """
    if not apart:
        return function(*args)
    with _one_process() as pool:
        try:
            with interrupts_kept_from_children():
                future = pool.submit(function, *args)
            return future.result()
        except BrokenProcessPool as error:
            raise RunError("a process that loads torch ended early: need about 0.5 GB of free memory for it") from error


def ask_each(function: Callable[..., T], questions: Sequence[tuple[Any, ...]], processes: int) -> Iterator[T | None]:
    """What a function returns for each of these arguments, in their order; None where the process that was asked dies.

    So a file that crashes its reader costs no more than its own answer.
    """
    count = min(processes, len(questions)) or 1
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
    for _ in range(count):
        idle.put(_one_process())

    def answer(question: tuple[Any, ...]) -> T | None:
        pool = idle.get()
        try:
            with interrupts_kept_from_children():
                future = pool.submit(function, *question)
            return future.result()
        except BrokenProcessPool:  # which has this question alone
            pool.shutdown()
            pool = _one_process()
            return None
        finally:
            idle.put(pool)

    with ThreadPoolExecutor(count) as threads:
        try:
            yield from threads.map(answer, questions)
        finally:
            threads.shutdown(cancel_futures=True)
            for _ in range(count):
                idle.get().shutdown()


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def interrupts_kept_from_children() -> Iterator[None]:
    """Of processes that are started by threads which are made in this block: a terminal tells them, too, of Ctrl-C, and
    of its end.

    They are this process's to end. Threads and processes inherit which signals are blocked where they are made.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()  # Python unblocks SIGINT again in the thread that starts it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
