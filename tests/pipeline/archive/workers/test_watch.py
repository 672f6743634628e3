"""What changes at an executor is said once, and that no task ends."""

from contextlib import ExitStack

from pipeline.archive.workers.executors import Loop
from pipeline.archive.workers.watch import ExecutorWatch, TaskWatch


class Changing(Loop):
    detectors, silent = 1, False


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
    gone = [f"tcp://node{number}:1" for number in range(9)]
    for ended in (1, 1, 3, 9):
        executor.ended = tuple(gone[:ended])
        lines += watch.ended_workers()
    assert [line.partition(";")[0] for line in lines] == [
        "1 worker process ended during the run (tcp://node0:1)",
        "2 worker processes ended during the run (tcp://node1:1, tcp://node2:1)",
        f"6 worker processes ended during the run ({', '.join(gone[3:8])}, ...)",
    ]


def test_that_no_task_ends_is_said_every_twenty_minutes() -> None:
    now = [1000.0]
    watch, tasks = TaskWatch(lambda: now[0]), ExitStack()

    def said_after(minutes: float) -> list[str]:
        now[0] += minutes * 60
        return list(watch.silence())

    assert said_after(100) == []  # nothing runs
    tasks.enter_context(watch.running("plan", "a"))
    assert said_after(19) == []
    with watch.running("detect", "b"):
        assert said_after(2)[0].startswith("nothing was done for 20 min: plan of a, begun 21 min ago, and 1 other task")
        assert said_after(19) == []
    assert said_after(19) == []  # since one ended
    (line,) = said_after(1)
    assert "plan of a, begun 60 min ago, did not end" in line
    tasks.close()
    assert said_after(100) == []
