"""The progress of a run: a live line on a terminal, plain lines elsewhere, and a log file of them.

The log is `logs/<YYYYmmdd-HHMMSS>-<host>-<pid>.log` in the run's folder, one a process, as several runs may share it.
"""

import contextlib
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.text import one_line, printable

_RECENT_S = 300.0  # the speed is averaged over this time,
_RECENT_BLOCKS = 8  # and over at least so many blocks: on a slow machine one takes minutes

# ------------------------------------------------------------------------------------------------- the estimate


class Mark(NamedTuple):
    """How much was done at a point in time."""

    when_s: float
    mm2: float  # done since the start


class Estimate(NamedTuple):
    """Tissue still to be processed, and the time that it will take."""

    mm2_left: float
    seconds_left: float


def speed(marks: Sequence[Mark], now_s: float) -> float:
    """mm2 per second from the first mark to now; 0 where none has passed. marks: oldest first."""
    if not marks or now_s <= marks[0].when_s:
        return 0.0
    return (marks[-1].mm2 - marks[0].mm2) / (now_s - marks[0].when_s)


def estimate(known_mm2: float, not_started: int, mean_mm2: float, mm2_per_s: float) -> Estimate | None:
    """The rest of a run; None where no speed is known.

    known_mm2: of the remaining blocks of started slides; not_started: number of slides; mean_mm2: of a planned slide.
    """
    if mm2_per_s <= 0:
        return None
    left = known_mm2 + not_started * mean_mm2
    return Estimate(left, left / mm2_per_s)


def clock_time(seconds_left: float, now: datetime) -> str:
    """The time of the end, with the day where it is not today: `03:10`, `Sun 03:10`, `2026-11-30 03:10`."""
    end = now + timedelta(seconds=seconds_left)
    days = (end.date() - now.date()).days
    return end.strftime("%H:%M" if days == 0 else "%a %H:%M" if days < 7 else "%Y-%m-%d %H:%M")


# ---------------------------------------------------------------------------------------------------- the counts


@dataclass
class _Totals:
    """The state of a run, in numbers."""

    slides: int
    ended: int = 0
    failed: int = 0
    blocks: int = 0
    done_mm2: float = 0.0
    planned_mm2: float = 0.0  # of all blocks of started slides, without those of failed ones
    slides_mm2: list[float] = field(default_factory=list)  # of each planned slide
    in_progress: dict[str, float] = field(default_factory=dict)  # the share of each in `planned_mm2`
    marks: deque[Mark] = field(default_factory=deque)  # the recent ones

    def start(self, slide: str, blocks: int, mm2: float, now_s: float) -> None:
        if not self.marks:
            self.marks.append(Mark(now_s, 0.0))
        self.slides_mm2.append(mm2)
        self.in_progress[slide] = mm2 if blocks else 0.0
        self.planned_mm2 += self.in_progress[slide]

    def block(self, mm2: float, now_s: float) -> None:
        self.blocks += 1
        self.done_mm2 += mm2
        self.marks.append(Mark(now_s, self.done_mm2))
        while len(self.marks) > _RECENT_BLOCKS + 1 and self.marks[1].when_s <= now_s - _RECENT_S:
            self.marks.popleft()

    def end(self, slide: str, failed: bool) -> None:
        self.ended += 1
        self.failed += failed
        mm2 = self.in_progress.pop(slide, 0.0)
        if failed:
            self.planned_mm2 -= mm2

    def estimate(self, now_s: float) -> Estimate | None:
        # the finished blocks of a failed slide stay in `done_mm2`: an error of less than a slide for each failure
        known = max(0.0, self.planned_mm2 - self.done_mm2)
        not_started = self.slides - self.ended - len(self.in_progress)
        return estimate(known, not_started, fmean(self.slides_mm2 or [0.0]), speed(self.marks, now_s))

    def line(self, now_s: float, now: datetime) -> str:
        """The state in a line, the most important first, as a narrow terminal cuts the end:

        `12/300 slides, 1 failed, ends about 03:10; 847 blocks, 512.3 of about 9800 mm2, 0.840 mm2/s`
        """
        slides = f"{self.ended}/{self.slides} slides" + (f", {self.failed} failed" if self.failed else "")
        ahead = self.estimate(now_s)
        if ahead is None:
            return f"{slides}; {self.blocks} blocks, {self.done_mm2:.1f} mm2"
        return (
            f"{slides}, ends about {clock_time(ahead.seconds_left, now)}; {self.blocks} blocks, {self.done_mm2:.1f} "
            f"of about {self.done_mm2 + ahead.mm2_left:.0f} mm2, {speed(self.marks, now_s):.3f} mm2/s"
        )


# ------------------------------------------------------------------------------------------------------ display


class Progress:
    """Shows and logs the state of a run. Thread-safe; errors of the terminal or the log do not stop the run."""

    def __init__(
        self,
        logs: Path,
        slides: int,
        say: Callable[[str], None] | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """say: where lines go, instead of the terminal; console: instead of stderr; clock: seconds, monotonic."""
        self._say = say
        self._console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self._clock = clock
        self._totals = _Totals(slides)
        self._lock = threading.Lock()  # of the totals
        self._log = _LogFile(logs)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._log.open()
        if self._say is None and self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """One line, or several, for the person at the terminal and for the log; made printable."""
        line = printable(line)
        self._log.write(line)
        if self._say is not None:
            self._say(line)
            return
        with contextlib.suppress(OSError):  # a terminal that is gone
            if self._live is not None:
                self._console.out(_writable(line, self._console.encoding), highlight=False)
            else:
                sys.stdout.write(f"{_writable(line, sys.stdout.encoding)}\n")  # in one piece: others write, too
                sys.stdout.flush()

    def started(self, slide: str, blocks: int, mm2: float) -> None:
        """The plan of a slide is known: so many blocks to do, with so much tissue together."""
        with self._lock:
            self._totals.start(slide, blocks, mm2, self._clock())
        self._log.write(f"{slide}: started, {blocks} blocks, {mm2:.2f} mm2")

    def block(self, mm2: float) -> None:
        """A block is done."""
        with self._lock:
            self._totals.block(mm2, self._clock())

    def ended(self, slide: str, failed: bool) -> None:
        """A slide is done or has failed, also without having started."""
        with self._lock:
            self._totals.end(slide, failed)
        self._log.write(self.line())

    def line(self) -> str:
        """Where the run stands."""
        with self._lock:
            return self._totals.line(self._clock(), datetime.now())

    def _render(self) -> Text:
        return Text(self.line(), style="red" if self._totals.failed else "", no_wrap=True, overflow="ellipsis")


class _LogFile:
    """Lines with time stamps. Opened for each line, so that logging continues after an outage of the file server."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{datetime.now():%Y%m%d-%H%M%S}-{platform.node()}-{os.getpid()}.log"
        self._lock = threading.Lock()
        self._warned = False

    def open(self) -> None:
        with self._forgiving():
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: str) -> None:
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        text = "".join(f"{stamp} {part}\n" for part in line.splitlines())
        with self._lock, self._forgiving(), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                with contextlib.suppress(OSError):
                    print(f"WARNING: the log cannot be written, the run goes on: {error}", file=sys.stderr)


def _writable(line: str, encoding: str | None) -> str:
    """The line with characters that the encoding lacks as escapes, such as bytes of a file's name."""
    encoding = encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


class SaidErrors:
    """A context for each step of what goes on beside the slides: no error of a step ends it, each kind is said once."""

    def __init__(self, progress: Progress, what: str) -> None:
        """what: has failed, for the message."""
        self._progress, self._what = progress, what
        self._said: set[type[BaseException]] = set()

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if type(error) not in self._said:
            self._said.add(type(error))
            cause = f"{type(error).__name__}: {one_line(error)}"
            self._progress.say(f"WARNING: {self._what} failed ({cause}); it is tried again, this is said once")
        return True
