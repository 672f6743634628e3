"""Text from outside is harmless where it is printed."""

import os
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.text import duration, one_line, printable, shell_command

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
unsafe = st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])


@given(st.text(st.one_of(st.characters(), unsafe)))
@example("slide\u202egpj.svs")
@example("\r")
@example("\x1b[31m\u2066\u200b\ufeff\u2028\udce9\U000e0041")
def test_what_is_printed_neither_commands_nor_hides(text: str) -> None:
    """Law: no control, format or line separator is left but line ends and tabs, and all else is as it was."""
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\n\t"} & UNSAFE
    assert printable(shown) == shown
    if not {unicodedata.category(c) for c in text if c not in "\n\t"} & UNSAFE:
        assert shown == text
    assert len(one_line(ValueError(text)).splitlines()) == 1


def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of Windows knows no single quotes."""
    command = ["QuPath", "-p", "C:\\my results\\project.qpproj"]
    assert shell_command(command) == "QuPath -p 'C:\\my results\\project.qpproj'"
    monkeypatch.setattr(os, "name", "nt")
    assert shell_command(command) == 'QuPath -p "C:\\my results\\project.qpproj"'


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.0 s"), (11.24, "11.2 s"), (540, "9 min"), (7200, "2.0 h"), (4.6e6, "1,277.8 h"), (float("nan"), "?")],
)
def test_a_time_is_given_in_the_unit_that_suits_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_long_message_keeps_its_start_and_its_remedy() -> None:
    shown = one_line(ValueError(f"case7.mrxs: {'x' * 200_000}: copy it again"))
    assert len(shown) == 2005
    assert shown.startswith("case7.mrxs: xxx")
    assert shown.endswith("xxx: copy it again")
    assert one_line(ValueError("x" * 2000)) == "x" * 2000
