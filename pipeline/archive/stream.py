"""The stream of blocks to the detectors: how many are in flight, and what a detector waits for.

A block in flight is tiled, at a detector, or outlined. More of them than keep every detector and every feeder (what
tiles and outlines) busy would only fill the disk.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.archive.slots import FairSlots
from pipeline.archive.workers.executors import Executor
from pipeline.segment.stages import Stage

_RECENT = 0.1  # weight of the latest block in the mean times
_SPARE = 2.0  # blocks in flight, in units of what would do if every block took the mean time

Waits = defaultdict[str, float]
"Seconds in which a detector had nothing to compute, by the cause, of `record.WAITS`."


class Stream:
    """The blocks in flight of a run. Used by one event loop.

    slots: a block takes one before its first stage, and gives it back after its last.
    """

    def __init__(self, executor: Executor, window: int, clock: Callable[[], float] = time.monotonic) -> None:
        """window: blocks in flight, 0: as many as the detectors need, by what they take; clock: seconds."""
        self._executor, self._window, self._clock = executor, window, clock
        self._inside: Counter[str] = Counter()  # blocks in each stage; "detector" for those on a device
        self._mean: dict[str, float] = {}  # seconds that a stage takes for a block
        self._since = clock()
        self._with_block = self._computed = 0.0  # detector seconds in which a block was there, and those of computing
        self._idle: Waits | None = None  # detector seconds without a block since one came, by cause
        self.slots = FairSlots(self.size)

    @property
    def most(self) -> int:
        """The most blocks that are ever in flight: two at every detector, one at every feeder, two in between."""
        return self._window or 2 + 2 * self._detectors + self._executor.feeders

    @property
    def size(self) -> int:
        """Blocks in flight now: two at every detector, and as many beside it as are fed while it does one."""
        fed = sum(seconds for stage, seconds in self._mean.items() if stage != "detector")
        if self._window or not self._mean.get("detector"):
            return self._window or 2 + 2 * self._detectors
        needed = math.ceil(_SPARE * self._detectors * fed / self._mean["detector"])
        return min(self.most, 2 * self._detectors + max(2, needed))

    @property
    def _detectors(self) -> int:
        return max(1, self._executor.detectors)

    @contextmanager
    def inside(self, stage: Stage, waited: Waits) -> Iterator[Callable[[float], None]]:
        """While a block is in a stage, or a slide on a device. Gives a function to call at the end, with its seconds.

        waited: of the block; what detectors waited for before they got it is added, and while they had it.
        """
        place = "detector" if stage.on_device else stage.name
        self._count_time()
        # a block that comes to an idle detector is read while that waits; others are read while it computes
        reading = self._lacking() if self._inside["detector"] < self._detectors else "disk"
        self._inside[place] += 1
        if stage.on_device:
            for cause, seconds in (self._idle or {}).items():
                waited[cause] += seconds
            self._idle = defaultdict(float)

        def took(seconds: float) -> None:
            if seconds and stage.per_block:  # without seconds it was done before
                self._mean[place] = _RECENT * seconds + (1 - _RECENT) * self._mean.get(place, seconds)
            if stage.on_device:
                self._count_time()
                self._computed += seconds
                waited[reading] += self._with_block - self._computed
                self._with_block = self._computed

        try:
            yield took
        finally:
            self._count_time()
            self._inside[place] -= 1
            self.slots.size = self.size

    def _count_time(self) -> None:
        """Add the time since the last call: of the detectors that had a block, and of those that lacked one."""
        now = self._clock()
        passed, self._since = now - self._since, now
        supplied = min(self._detectors, self._inside["detector"])
        self._with_block += supplied * passed
        if self._idle is not None:
            self._idle[self._lacking()] += (self._detectors - supplied) * passed

    def _lacking(self) -> str:
        """Why no other block is at a detector: one of `record.WAITS`."""
        beside = {stage: count for stage, count in self._inside.items() if stage != "detector" and count}
        if not beside:
            return "plan"
        fed = sum(beside.values())
        if self._window and fed + self._inside["detector"] >= self._window and fed < self._executor.feeders:
            return "window"
        return max(beside, key=lambda stage: beside[stage])
