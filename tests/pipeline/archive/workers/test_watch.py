"""What changes at an executor is said once."""

from pipeline.archive.workers.executors import Loop
from pipeline.archive.workers.watch import ExecutorWatch


class Changing(Loop):
    detectors, silent, ended = 1, False, 0


def test_nothing_is_said_of_an_executor_that_stays_as_it_is() -> None:
    watch = ExecutorWatch(Loop())
    assert [*watch.detectors(), *watch.scheduler(), *watch.ended_workers()] == []


def test_every_change_is_said_once() -> None:
    executor = Changing()
    watch = ExecutorWatch(executor)
    said, lines = list[int](), list[str]()
    for detectors in (0, 0, 2, 0):
        executor.detectors = detectors
        said.append(len(list(watch.detectors())))
    assert said == [1, 0, 0, 1]
    for silent in (True, True, False, False):
        executor.silent = silent
        lines += watch.scheduler()
    assert lines == [
        "the Dask scheduler does not answer (suspended?): waiting for it",
        "the Dask scheduler answers again",
    ]
    lines.clear()
    for ended in (1, 1, 3):
        executor.ended = ended
        lines += watch.ended_workers()
    assert [line.split(" ended")[0] for line in lines] == ["1 worker process", "2 worker processes"]
