"""Runs a coroutine from a thread that may have an event loop already, so that Ctrl-C ends it in order."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

_SIGNAL_S = 0.2  # until a signal is noticed


def run_coroutine(work: Callable[[], Any], stop: Callable[[], None]) -> None:
    """Run a coroutine to its end in a loop of its own: a notebook's thread has one already.

    Ctrl-C calls `stop`, for the tasks that cannot be cancelled, and cancels the coroutine. Then it is waited for.
    """
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        started.append((asyncio.get_running_loop(), task))
        await work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        interrupted = told = False
        while not future.done():
            try:
                if interrupted and not told:
                    stop()
                    for loop, task in started:
                        with contextlib.suppress(RuntimeError):  # the loop has just ended
                            loop.call_soon_threadsafe(task.cancel)
                        told = True
                # A signal that the kernel gives another thread does not wake this one, whose turn it is to handle it.
                wait([future], _SIGNAL_S)
            except KeyboardInterrupt:  # also a second one, as a group of processes is sent, while the first is handled
                interrupted = True
        if interrupted:
            raise KeyboardInterrupt
        future.result()
