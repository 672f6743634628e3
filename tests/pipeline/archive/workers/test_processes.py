"""What loads torch is asked in a process of its own, or here."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.archive.workers.processes import ask, ask_each, interrupts_kept_from_children
from pipeline.errors import RunError


def double(x: int) -> int:
    if x == 13:
        raise ValueError("thirteen")
    return 2 * x


@pytest.mark.parametrize("apart", [True, False])
def test_a_question_is_answered_here_or_in_another_process(apart: bool) -> None:
    """The same answer, the same error; and torch, which the other process may load, stays there."""
    assert ask(apart, double, 3) == 6
    assert (ask(apart, os.getpid) == os.getpid()) != apart
    with pytest.raises(ValueError, match="thirteen"):
        ask(apart, double, 13)


def test_a_process_that_is_killed_before_it_answers_is_said() -> None:
    with pytest.raises(RunError, match="ended early: need about"):
        ask(True, os._exit, 1)


def end(exit_status: int) -> int:
    """Answers 0 with itself; any other number ends its process."""
    if exit_status:
        os._exit(exit_status)
    return exit_status


@pytest.mark.parametrize("processes", [1, 3])
def test_a_question_that_ends_its_process_costs_no_other_answer(processes: int) -> None:
    assert list(ask_each(end, [(status,) for status in (1, 0, 0, 2, 3, 0)], processes)) == [None, 0, 0, None, None, 0]
    assert list(ask_each(end, [], processes)) == []
    with pytest.raises(ValueError, match="thirteen"):
        list(ask_each(double, [(1,), (13,), (2,)], processes))


def meet(own: str, other: str) -> bool:
    """Whether another process has come while this one waits for it."""
    Path(own).touch()
    until = time.monotonic() + 60
    while not Path(other).exists() and time.monotonic() < until:
        time.sleep(0.02)
    return Path(other).exists()


def test_several_questions_are_asked_at_once(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert list(ask_each(meet, [(a, b), (b, a)], 2)) == [True, True]


def note(folder: str, number: int) -> None:
    (Path(folder) / str(number)).touch()
    time.sleep(0.05)


def test_when_no_more_answers_are_wanted_no_more_is_asked_and_the_processes_end(tmp_path: Path) -> None:
    """As when `plan` of many slides is interrupted."""
    before = set(multiprocessing.active_children())
    answers = ask_each(note, [(str(tmp_path), number) for number in range(60)], 2)
    next(answers)
    assert len(set(multiprocessing.active_children()) - before) == 2
    answers.close()  # type: ignore[attr-defined] # a generator
    assert set(multiprocessing.active_children()) == before
    assert len(list(tmp_path.iterdir())) < 60


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_signals_of_a_terminal_are_blocked_only_while_processes_are_started() -> None:
    """Else Ctrl-C would not end the command itself."""

    def blocked() -> set[signal.Signals]:
        return {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}

    def started() -> None:
        with interrupts_kept_from_children():
            assert blocked() == before | {signal.SIGINT, signal.SIGHUP}
            raise KeyError("one that does not start")

    before = blocked()
    with pytest.raises(KeyError, match="does not start"):
        started()
    assert blocked() == before
