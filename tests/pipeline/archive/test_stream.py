"""The blocks in flight: a model of a run in which work is waiting, by a clock that jumps to the next event."""

import asyncio
import random
import selectors
from collections import defaultdict
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.archive.stream import Stream, Waits
from pipeline.segment.record import DETECTING, WAITS, StageRecord, device_use
from pipeline.segment.stages import STAGES

TILE, DETECT, OUTLINE = (stage for stage in STAGES if stage.per_block)
MM2 = 0.6  # of tissue in a block of nine tiles


class _Jumping(selectors.DefaultSelector):
    """Nothing to wait for but time: it passes at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


def simulate(work: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that does nothing but sleep, in no time."""
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


class Machine:
    """A number of devices, each with two tasks that share it, and feeders."""

    dashboard, warning, silent = "", "", False
    ended: tuple[str, ...] = ()

    def __init__(self, detectors: int, feeders: int) -> None:
        self.detectors, self.feeders = detectors, feeders
        self.at_device, self.device = asyncio.Semaphore(2 * detectors), asyncio.Semaphore(detectors)
        self.feeder = asyncio.Semaphore(feeders)

    def submit(self, *_: Any) -> Future[Any]:
        raise NotImplementedError

    def prepare(self, *_: Any) -> None:
        raise NotImplementedError

    def run_on_new_workers(self, *_: Any, retire: bool = False) -> list[str]:
        raise NotImplementedError

    async def feed(self, seconds: float) -> None:
        async with self.feeder:
            await asyncio.sleep(seconds)

    async def detect(self, seconds: float, reading: float) -> None:
        async with self.at_device:
            await asyncio.sleep(reading)
            async with self.device:
                await asyncio.sleep(seconds)


class Costs:
    """Seconds per mm2 of tissue, as `workflows/benchmarks/feed.py` gave them, but for the detector, and the plan."""

    tile, reading, detect, outline, rest = 0.48, 0.07, 0.1, 0.17, 0.26
    plan = 1.0  # seconds a slide


async def archive(machine: Machine, window: int, slides: int, costs: Any = Costs) -> tuple[StageRecord, float, Stream]:
    """Slides of 150 blocks of different sizes. Returns what was done, how long it took, and the stream."""
    clock = asyncio.get_running_loop().time
    stream = Stream(machine, window, clock)
    total, rng, busy = StageRecord(), random.Random(0), [float("inf"), 0.0]

    async def block(mm2: float) -> None:
        nonlocal total
        waited: Waits = defaultdict(float)
        with stream.inside(TILE, waited) as took:
            await machine.feed(costs.tile * mm2)
            took(costs.tile * mm2)
        with stream.inside(DETECT, waited) as took:
            busy[0] = min(busy[0], clock())
            await machine.detect(costs.detect * mm2, costs.reading * mm2)
            took(costs.detect * mm2)
            busy[1] = clock()
        with stream.inside(OUTLINE, waited) as took:
            await machine.feed(costs.outline * mm2)
            took(costs.outline * mm2)
        total += StageRecord({"detect": costs.detect * mm2}, waited=waited)

    async def slide(started: asyncio.Semaphore) -> None:
        async with started:
            blocks = [MM2 * rng.uniform(0.2, 1) for _ in range(150)]
            await machine.feed(costs.plan)
            async with asyncio.TaskGroup() as group:
                for number, mm2 in enumerate(blocks):
                    await stream.slots.take(len(blocks) - number)
                    group.create_task(block(mm2)).add_done_callback(lambda _: stream.slots.give_back())
            await machine.feed(costs.rest * sum(blocks))

    started = asyncio.Semaphore(2 * stream.most - 1)
    await asyncio.gather(*(slide(started) for _ in range(slides)))
    return total, busy[1] - busy[0], stream


def modelled(detectors: int, feeders: int, window: int = 0, slides: int = 6, **costs: float) -> Any:
    """What `archive` returns, for costs other than the usual ones."""
    done: list[Any] = []

    async def work() -> None:
        done.extend(await archive(Machine(detectors, feeders), window, slides, type("Other", (Costs,), costs)))

    simulate(work())
    return done


def test_a_device_of_a_tenth_of_a_second_per_mm2_is_busy_on_sixteen_cores() -> None:
    """Law: more than 90 % of the time, with the window that follows from what the stages take."""
    work, span, stream = modelled(detectors=1, feeders=15)
    assert work.seconds["detect"] / span > 0.9
    assert stream.size <= stream.most == 19


@pytest.mark.parametrize("detectors", [1, 2, 8])
def test_slow_detectors_have_few_blocks_in_flight(detectors: int) -> None:
    """Law: where one detects for longer than the rest takes, it has two blocks, and the disk a few more."""
    work, span, stream = modelled(detectors, 4 * detectors, detect=8.0)
    assert work.seconds["detect"] / detectors / span > 0.9
    assert stream.size <= 2 + 3 * detectors


@pytest.mark.parametrize(
    ("feeders", "window", "costs", "cause"),
    [
        (3, 0, {"outline": 0.02, "rest": 0.02}, "tile"),
        (3, 0, {"tile": 0.1, "outline": 0.9}, "outline"),
        (15, 0, {"reading": 0.5}, "disk"),
        (15, 3, {}, "window"),
        (1, 1, {"plan": 300.0}, "plan"),
    ],
)
def test_a_device_says_what_it_waits_for(feeders: int, window: int, costs: dict[str, Any], cause: str) -> None:
    """Law: all its time is computing, or on the account of a cause; the most is of the one that is short."""
    work, span, _ = modelled(1, feeders, window, **costs)
    idle = span - work.seconds["detect"]
    assert sum(work.waited.values()) == pytest.approx(idle, rel=0.02)
    assert max(WAITS, key=lambda name: work.waited.get(name, 0.0)) == cause
    assert work.waited[cause] > 0.5 * idle


@pytest.mark.parametrize(("window", "feeders"), [(0, 15), (20, 3)])
def test_a_window_is_waited_for_only_where_it_keeps_feeders_idle(window: int, feeders: int) -> None:
    """Not where none is given, nor where the few feeders are busy in any case."""
    work, _, _ = modelled(1, feeders, window)
    assert work.waited.get("window", 0.0) == 0
    assert sum(work.waited.values()) > 1


def test_a_window_that_is_given_holds_whatever_the_stages_take() -> None:
    _, _, worked = modelled(detectors=1, feeders=4, window=12, slides=1, detect=8.0)
    for stream in (Stream(Machine(1, 4), 12), worked):
        assert stream.size == stream.most == 12


def test_what_was_done_before_says_nothing_of_how_long_it_takes() -> None:
    """Law: stages that return at once, as their blocks were done, and stages of a whole slide change no window."""
    _, _, stream = modelled(detectors=1, feeders=15, slides=1)
    size = stream.size
    assert 4 < size < stream.most
    of_slides = next(stage for stage in STAGES if stage.on_device and not stage.per_block)
    for stage, seconds in [(DETECT, 0.0), (TILE, 0.0), (OUTLINE, 0.0), (of_slides, 100.0)]:
        for _ in range(30):
            with stream.inside(stage, defaultdict(float)) as took:
                took(seconds)
        assert stream.size == size


def test_the_use_of_the_device_is_said_in_a_line() -> None:
    busy = StageRecord({"detect": 88.0}, waited={"tile": 12.0, "disk": 0.4})
    said = "the detector computed 88% of the time, and was idle 12%: waiting for tiles; add CPU workers (--workers)"
    assert device_use(busy) == said
    on_cpu = StageRecord({"detect": 75.0}, computed_on=("cpu bfloat16",), waited={"tile": 5.0, "disk": 20.0})
    assert device_use(on_cpu) == (
        "the detector computed 75% of the time, and was idle 25%: "
        "20% reading the patches or writing the instances, 5% waiting for tiles"
    )
    assert device_use(StageRecord({"detect": 3.0})) == "the detector computed 100% of the time"
    assert device_use(StageRecord()) == ""


def test_a_record_without_waits_is_read() -> None:
    assert StageRecord.from_json({"seconds": {"tile": 1.0}}).waited == {}
    record = StageRecord(waited={"tile": 1.5})
    assert StageRecord.from_json(record.to_json()) == record


def test_what_computes_where_the_detector_does_is_its_work() -> None:
    assert tuple(stage.name for stage in STAGES if stage.on_device) == DETECTING
    assert device_use(StageRecord({"stain": 3.0, "detect": 5.0}, waited={"plan": 2.0})).startswith(
        "the detector computed 80% of the time"
    )
