"""What loads torch is asked in a process of its own, or here."""

import os

import pytest

from pipeline.archive.workers.processes import ask
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
