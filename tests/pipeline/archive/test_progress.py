"""The progress of a run on a terminal, without one, and in the log."""

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.archive.progress import Estimate, Mark, Progress, clock_time, estimate, speed

STAMPED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (.*)$")


class Clock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=140)


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def log_of(out: Path) -> list[str]:
    """The lines of the one log, without their stamps."""
    (path,) = (out / "logs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-.+-\d+\.log", path.name)
    found = [STAMPED.match(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(found)
    return [match[1] for match in found if match]


# ------------------------------------------------------------------------------------------------- the estimate


def test_an_estimate_of_known_numbers() -> None:
    assert estimate(known_mm2=30, not_started=2, mean_mm2=10, mm2_per_s=0.5) == Estimate(50, 100)
    assert estimate(known_mm2=0, not_started=0, mean_mm2=10, mm2_per_s=0.5) == Estimate(0, 0)
    assert estimate(known_mm2=30, not_started=2, mean_mm2=10, mm2_per_s=0) is None


def test_speed_is_that_since_the_first_mark() -> None:
    assert speed([], 5) == 0
    assert speed([Mark(5, 0)], 5) == 0
    assert speed([Mark(0, 2), Mark(10, 6)], 20) == pytest.approx(0.2), "also while nothing more is done"


@given(st.floats(0.01, 100), st.floats(0, 1000), st.integers(0, 1000), st.floats(0, 100))
def test_work_at_the_estimated_speed_ends_when_estimated(
    rate: float, known: float, not_started: int, mean: float
) -> None:
    """Law: after half of the time half of the work is left."""
    whole = estimate(known, not_started, mean, rate)
    assert whole is not None
    half = estimate(whole.mm2_left - rate * whole.seconds_left / 2, 0, mean, rate)
    assert half is not None
    assert half.seconds_left == pytest.approx(whole.seconds_left / 2, abs=1e-6)


def test_the_end_is_shown_with_its_day_if_that_is_not_today() -> None:
    evening = datetime(2026, 11, 21, 22, 30)
    assert clock_time(60 * 60, evening) == "23:30"
    assert clock_time(4 * 60 * 60 + 40 * 60, evening) == f"{datetime(2026, 11, 22):%a} 03:10"
    assert clock_time(9 * 24 * 60 * 60, evening) == "2026-11-30 22:30"


def test_the_line_counts_slides_blocks_and_what_is_left(tmp_path: Path, plain: Console) -> None:
    clock = Clock()
    progress = Progress(tmp_path / "logs", 6, console=plain, clock=clock)

    def line() -> str:
        return re.sub(r"about (\w+ )?\d\d:\d\d;", "about TIME;", progress.line())

    progress.ended("done before", failed=False)
    assert line() == "1/6 slides; 0 blocks, 0.0 mm2"
    progress.started("a", blocks=4, mm2=8)
    progress.started("b", blocks=5, mm2=20)
    progress.started("stitched only", blocks=0, mm2=2)
    clock.now += 10
    assert line() == "1/6 slides; 0 blocks, 0.0 mm2", "no speed, no estimate"
    for _ in range(4):
        progress.block(2)
    progress.ended("a", failed=False)
    # 20 mm2 of b, nothing of the stitched one, and 2 slides of 10 mm2
    assert line() == "2/6 slides, ends about TIME; 4 blocks, 8.0 of about 48 mm2, 0.800 mm2/s"
    progress.ended("b", failed=True)
    assert line() == "3/6 slides, 1 failed, ends about TIME; 4 blocks, 8.0 of about 28 mm2, 0.800 mm2/s"
    progress.ended("never started", failed=True)
    assert line() == "4/6 slides, 2 failed, ends about TIME; 4 blocks, 8.0 of about 18 mm2, 0.800 mm2/s"


def test_the_speed_follows_the_last_minutes(tmp_path: Path, plain: Console) -> None:
    clock = Clock()
    progress = Progress(tmp_path / "logs", 1, console=plain, clock=clock)
    progress.started("a", blocks=1000, mm2=1000)
    for seconds, rate in ((1, "1.000"), (10, "0.100"), (2, "0.500"), (100, "0.010")):
        for _ in range(310 // seconds + 8):
            clock.now += seconds
            progress.block(1)
        assert f" mm2, {rate} mm2/s" in progress.line()


# ------------------------------------------------------------------------------------------------------ display


def test_on_a_terminal_there_is_a_live_line_and_lines_above_it(tmp_path: Path, terminal: Console) -> None:
    clock = Clock()
    with Progress(tmp_path / "logs", 3, console=terminal, clock=clock) as progress:
        progress.started("a", blocks=2, mm2=4)
        clock.now += 8
        progress.block(2)
        progress.say("a [bold]name[/bold]: 12 nuclei\n    in two lines")
    shown = written(terminal)
    assert "0/3 slides; 0 blocks, 0.0 mm2" in shown
    assert re.search(r"0/3 slides, ends about .*:\d\d; 1 blocks, 2.0 of about 12 mm2, 0.250 mm2/s", shown)
    assert "a [bold]name[/bold]: 12 nuclei\n    in two lines\n" in shown
    assert "\x1b[" in shown


def test_without_a_terminal_there_are_plain_lines(
    tmp_path: Path, plain: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tmp_path / "logs", 1, console=plain) as progress:
        progress.say("first\nsecond")
        progress.started("a", blocks=2, mm2=4)
        progress.block(2)
        progress.ended("a", failed=True)
    assert capsys.readouterr() == ("first\nsecond\n", "")
    assert written(plain) == ""


def test_lines_go_where_they_are_wanted(tmp_path: Path, terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with Progress(tmp_path / "logs", 1, lines.append, console=terminal) as progress:
        progress.say("one")
    assert lines == ["one"] == log_of(tmp_path)
    assert written(terminal) == "" == capsys.readouterr().out


def test_the_log_holds_every_line_with_its_time(tmp_path: Path, plain: Console) -> None:
    with Progress(tmp_path / "logs", 2, console=plain) as progress:
        progress.say("first\n    second")
        progress.started("a/\u00e4 \u75c5.svs", blocks=2, mm2=4)
        progress.ended("b", failed=True)
    assert log_of(tmp_path) == [
        "first",
        "    second",
        "a/\u00e4 \u75c5.svs: started, 2 blocks, 4.00 mm2",
        "1/2 slides, 1 failed; 0 blocks, 0.0 mm2",
    ]


def test_names_that_are_no_text_are_said(
    tmp_path: Path, plain: Console, terminal: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's name of bytes that are not UTF-8."""
    for console in (plain, terminal):
        with Progress(tmp_path / str(console.is_terminal) / "logs", 1, console=console) as progress:
            progress.say("caf\udce9.svs")
        assert log_of(tmp_path / str(console.is_terminal)) == ["caf\\udce9.svs"]
    assert capsys.readouterr().out == "caf\\udce9.svs\n"
    assert "caf\\udce9.svs" in written(terminal)


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, plain: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()  # where the folder should be
    with Progress(tmp_path / "out" / "logs", 1, console=plain) as progress:
        progress.say("one")
        progress.say("two")
        (tmp_path / "out").unlink()
        (tmp_path / "out" / "logs").mkdir(parents=True)
        progress.say("three")
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\n"
    assert re.fullmatch(r"WARNING: the log cannot be written, the run goes on: .*\n", printed.err)
    assert log_of(tmp_path / "out") == ["three"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the live line's thread may end
def test_a_terminal_that_is_gone_stops_nothing(
    tmp_path: Path, terminal: Console, plain: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_text: str) -> int:
        raise OSError(5, "Input/output error")

    with Progress(tmp_path / "a" / "logs", 1, console=terminal) as progress:
        monkeypatch.setattr(terminal.file, "write", gone)
        progress.say("one")
    with Progress(tmp_path / "b" / "logs", 1, console=plain) as progress:
        monkeypatch.setattr("sys.stdout", terminal.file)
        progress.say("one")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") == ["one"]


def test_many_threads_lose_no_count_and_no_line(tmp_path: Path, terminal: Console) -> None:
    """Law: the counts do not depend on which thread reports when, and no thread blocks on the live line."""
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for step in range(25):
            name = f"{number}-{step}"
            progress.started(name, blocks=1, mm2=0.5)
            progress.block(0.5)
            progress.say(f"{name} is done")
            progress.ended(name, failed=step == 0)

    with Progress(tmp_path / "logs", 100, console=terminal) as progress, ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert progress.line().startswith("100/100 slides, 4 failed")
    assert "; 100 blocks, 50.0 of about 50 mm2, " in progress.line()
    said = [line for line in log_of(tmp_path) if line.endswith("is done")]
    assert sorted(said) == sorted(f"{number}-{step} is done" for number in range(4) for step in range(25))
