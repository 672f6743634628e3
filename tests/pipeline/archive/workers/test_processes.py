"""What loads torch is asked in a process of its own, or here."""

import os

import pytest

from pipeline.archive.workers.processes import ask, ask_each
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


def test_a_question_that_ends_its_process_costs_no_other_answer() -> None:
    assert list(ask_each(end, [(status,) for status in (1, 0, 0, 2, 3, 0)])) == [None, 0, 0, None, None, 0]
    with pytest.raises(ValueError, match="thirteen"):
        list(ask_each(double, [(13,)]))
