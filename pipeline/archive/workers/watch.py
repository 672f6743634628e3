"""What changes at an executor while a run goes on, in words."""

from collections.abc import Iterator

from pipeline.archive.workers.executors import Executor
from pipeline.text import counted


class ExecutorWatch:
    """Says what is new since it was last asked: each function gives warnings of one kind."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._detectors, self._silent, self._ended = 1, False, 0  # as they were then

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
        before, self._ended = self._ended, self._executor.ended
        if (lost := self._ended - before) > 0:
            yield (
                f"{counted(lost, 'worker process', 'worker processes')} ended during the run; unfinished "
                f"work is done again. If nobody ended them: is there memory enough?"
            )
