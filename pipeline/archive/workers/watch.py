"""What changes at an executor while a run goes on, in words."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.archive.workers.executors import Executor
from pipeline.text import counted

_SHOWN = 5  # worker processes in a message
_SILENCE_S = 20 * 60.0  # in which no task ended, until that is said


class TaskWatch:
    """The tasks that run. Used by one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._running: dict[object, tuple[float, str]] = {}  # when each began, and which it is
        self._since = clock()  # when the last one ended, or it was last said that none did

    @contextmanager
    def running(self, stage: str, slide: str) -> Iterator[None]:
        """While a task of a stage of a slide is with the executor."""
        task = object()
        if not self._running:
            self._since = self._clock()
        self._running[task] = self._clock(), f"{stage} of {slide}"
        try:
            yield
        finally:
            del self._running[task]
            self._since = self._clock()

    def silence(self) -> Iterator[str]:
        """No task has ended for long, nor was that said: which began first."""
        if not self._running or self._clock() - self._since < _SILENCE_S:
            return
        self._since = self._clock()
        began, first = min(self._running.values())
        others = f" and {counted(len(self._running) - 1, 'other task')}" if len(self._running) > 1 else ""
        yield (
            f"nothing was done for {_SILENCE_S / 60:.0f} min: {first}, begun {(self._since - began) / 60:.0f} min ago,"
            f"{others} did not end. Does a disk not answer, or is a file read for ever? Ctrl-C keeps what is done"
        )


class ExecutorWatch:
    """Says what is new since it was last asked: each function gives warnings of one kind."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._detectors, self._silent, self._ended = 1, False, 0  # as they were then, and how many had ended

    def detectors(self) -> Iterator[str]:
        """No worker is left that could detect."""
        before, self._detectors = self._detectors, self._executor.detectors
        if self._detectors == 0 < before:
            yield "no worker offers the GPU resource: start one with --resources GPU=1; waiting"

    def scheduler(self) -> Iterator[str]:
        """The scheduler has fallen silent, or answers again."""
        before, self._silent = self._silent, self._executor.silent
        if self._silent != before:
            said = "does not answer (suspended?): waiting for it" if self._silent else "answers again"
            yield f"the Dask scheduler {said}"

    def ended_workers(self) -> Iterator[str]:
        """Worker processes are gone, as `run_on_new_workers` has found."""
        lost = self._executor.ended[self._ended :]
        self._ended += len(lost)
        if lost:
            shown = ", ".join(lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
            yield (
                f"{counted(len(lost), 'worker process', 'worker processes')} ended during the run ({shown}); "
                f"unfinished work is done again. If nobody ended them: is there memory enough?"
            )
