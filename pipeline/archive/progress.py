"""What is seen while a run goes on: a live line on a terminal, plain lines elsewhere, and a log file of them.

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

from pipeline.text import printable

_RECENT_S = 300.0  # the speed is that of so long,
_RECENT_BLOCKS = 8  # and of so many blocks at least: on a slow machine one takes minutes

# ------------------------------------------------------------------------------------------------- the estimate


class Mark(NamedTuple):
    """How far a run was at a moment."""

    when_s: float
    mm2: float  # done since the beginning


class Estimate(NamedTuple):
    """How long a run will go on."""

    mm2_left: float
    seconds_left: float


def speed(marks: Sequence[Mark], now_s: float) -> float:
    """mm2 per second from the first mark to now; 0 where none has passed. marks: oldest first."""
    if not marks or now_s <= marks[0].when_s:
        return 0.0
    return (marks[-1].mm2 - marks[0].mm2) / (now_s - marks[0].when_s)


def estimate(known_mm2: float, unseen: int, mean_mm2: float, mm2_per_s: float) -> Estimate | None:
    """What is left and how long it takes; None where no speed is known.

    known_mm2: of the blocks still to do; unseen: slides not yet started; mean_mm2: a slide, of those seen so far.
    """
    if mm2_per_s <= 0:
        return None
    left = known_mm2 + unseen * mean_mm2
    return Estimate(left, left / mm2_per_s)


def clock_time(seconds_left: float, now: datetime) -> str:
    """When that is, with the day where it is another one: `03:10`, `Sun 03:10`, `2026-11-30 03:10`."""
    end = now + timedelta(seconds=seconds_left)
    days = (end.date() - now.date()).days
    return end.strftime("%H:%M" if days == 0 else "%a %H:%M" if days < 7 else "%Y-%m-%d %H:%M")


# ---------------------------------------------------------------------------------------------------- the counts


@dataclass
class _Counts:
    """What is known of a run so far."""

    slides: int
    ended: int = 0
    failed: int = 0
    blocks: int = 0
    done_mm2: float = 0.0
    planned_mm2: float = 0.0  # of all blocks that were to do, but for those of slides that failed
    seen: list[float] = field(default_factory=list)  # mm2 of every slide whose plan is known
    under_way: dict[str, float] = field(default_factory=dict)  # what a slide adds to `planned_mm2`
    marks: deque[Mark] = field(default_factory=deque)  # of the recent past

    def begin(self, slide: str, blocks: int, mm2: float, now_s: float) -> None:
        if not self.marks:
            self.marks.append(Mark(now_s, 0.0))
        self.seen.append(mm2)
        self.under_way[slide] = mm2 if blocks else 0.0
        self.planned_mm2 += self.under_way[slide]

    def block(self, mm2: float, now_s: float) -> None:
        self.blocks += 1
        self.done_mm2 += mm2
        self.marks.append(Mark(now_s, self.done_mm2))
        while len(self.marks) > _RECENT_BLOCKS + 1 and self.marks[1].when_s <= now_s - _RECENT_S:
            self.marks.popleft()

    def end(self, slide: str, failed: bool) -> None:
        self.ended += 1
        self.failed += failed
        mm2 = self.under_way.pop(slide, 0.0)
        if failed:
            self.planned_mm2 -= mm2

    def estimate(self, now_s: float) -> Estimate | None:
        # what a slide had done before it failed counts for the others: an error of less than one slide a failure
        known = max(0.0, self.planned_mm2 - self.done_mm2)
        unseen = self.slides - self.ended - len(self.under_way)
        return estimate(known, unseen, fmean(self.seen or [0.0]), speed(self.marks, now_s))

    def line(self, now_s: float, now: datetime) -> str:
        """What matters most comes first, as a narrow terminal cuts the line:

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


# -------------------------------------------------------------------------------------------------- what is seen


class Progress:
    """The counts of a run, shown; to be called from any thread, and never the reason why a run stops."""

    def __init__(
        self,
        logs: Path,
        slides: int,
        say: Callable[[str], None] | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """say: where lines go, instead of the terminal; console: instead of stderr; clock: seconds, never set back."""
        self._say = say
        self._console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self._clock = clock
        self._counts = _Counts(slides)
        self._lock = threading.Lock()  # of the counts
        self._log = _Log(logs)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
                print(_writable(line, sys.stdout.encoding), flush=True)

    def started(self, slide: str, blocks: int, mm2: float) -> None:
        """The plan of a slide is known: so many blocks to do, with so much tissue together."""
        with self._lock:
            self._counts.begin(slide, blocks, mm2, self._clock())
        self._log.write(f"{slide}: started, {blocks} blocks, {mm2:.2f} mm2")

    def block(self, mm2: float) -> None:
        """A block is done."""
        with self._lock:
            self._counts.block(mm2, self._clock())

    def ended(self, slide: str, failed: bool) -> None:
        """A slide is done or has failed, also without having started."""
        with self._lock:
            self._counts.end(slide, failed)
        self._log.write(self.line())

    def line(self) -> str:
        """Where the run stands."""
        with self._lock:
            return self._counts.line(self._clock(), datetime.now())

    def _render(self) -> Text:
        return Text(self.line(), style="red" if self._counts.failed else "", no_wrap=True, overflow="ellipsis")


class _Log:
    """Lines with time stamps. Opened anew for each of them: a file server that comes back finds us writing."""

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
    """With what the encoding lacks as escapes: a file's name may be no text at all."""
    encoding = encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)
