"""All stages of one slide, from the plan to slide.json: in which order, and what of it is done block by block."""

import asyncio
import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline.archive.failures import first_error
from pipeline.archive.progress import Progress
from pipeline.archive.stream import Stream, Waits
from pipeline.archive.workers.executors import Executor, run_task
from pipeline.archive.workers.watch import TaskWatch
from pipeline.errors import RunError, ScratchLost
from pipeline.segment import attempts, finished
from pipeline.segment.attempts import Attempt
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan, read_plan
from pipeline.segment.record import SlideRecord, StageRecord
from pipeline.segment.stages import STAGES, Detect, Stage, block_record, prepare_detector

_ATTEMPTS = 3  # at a slide whose scratch is damaged while it is processed


class SlideStages:
    """Processes slides, of which several share the stream. Used by one event loop.

    work: what was done by block or on a device, of all slides until now; tasks: those that run
    """

    def __init__(self, executor: Executor, stream: Stream, progress: Progress, detect: Detect | None) -> None:
        """detect: replaces the detector, in tests."""
        self._executor, self._stream, self._progress, self._detect = executor, stream, progress, detect
        self.work = StageRecord()
        self.tasks = TaskWatch()
        self._prepared = detect is not None

    async def process(self, name: str, job: Job) -> SlideRecord:
        """All stages of a slide; again where scratch is damaged or disappears: what is whole is not done again.

        A former owner that was suspended may remove work, and files being written, before it learns that it lost the
        lease.
        """
        started, began, before = time.time(), time.monotonic(), list[Attempt]()
        await asyncio.to_thread(_check_space, job, self._stream.most)
        if not self._prepared:
            self._prepared = True
            await asyncio.to_thread(self._executor.prepare, prepare_detector, job.settings)
        for attempt in range(_ATTEMPTS):
            try:
                work, before = await self._stages(name, job, started)
                break
            except* (ScratchLost, FileNotFoundError) as lost:
                error = first_error(lost)
                if attempt == _ATTEMPTS - 1 and isinstance(error, ScratchLost):
                    error = RunError(f"{error}, again and again: is the disk sound?")
                if attempt == _ATTEMPTS - 1:
                    raise error from None
        plan = await asyncio.to_thread(read_plan, job.folder, job.digest)
        record = SlideRecord(
            name,
            "done",
            mpp=plan.scale.mean,
            mpp_source=plan.scale.source,
            tiles=len(plan.tiles),
            stain=plan.normalisation.source.method,
            work=work,
            attempts=(*before, (started, started + time.monotonic() - began)),  # the clock may have been set
        )
        with self.tasks.running("end", name):
            complete: SlideRecord = await run_task(self._executor, False, finished.finish_slide, job, record)
        return complete

    async def _stages(self, name: str, job: Job, started: float) -> tuple[StageRecord, list[Attempt]]:
        """The stages in their order; those that are done block by block follow each other for every block.

        started: when this attempt began, seconds since 1970. Returns the work, and the attempts before.
        """
        work, before = StageRecord(), list[Attempt]()
        for per_block, group in itertools.groupby(STAGES, key=lambda stage: stage.per_block):
            if per_block:
                plan = await asyncio.to_thread(read_plan, job.folder, job.digest)
                before = await asyncio.to_thread(attempts.begin, job.folder, started)
                work += await self._blocks(name, job, tuple(group), plan)
            else:
                for stage in (stage for stage in group if stage.needed(job.settings)):
                    work += await self._slide_stage(name, stage, job)
        return work, before

    async def _slide_stage(self, name: str, stage: Stage, job: Job) -> StageRecord:
        """A stage of the whole slide."""
        if not stage.on_device:
            return await self._task(name, stage, job)
        waited: Waits = defaultdict(float)
        record = await self._in_stream(name, stage, waited, StageRecord(), job)
        record += StageRecord(waited=waited)
        self.work += record
        return record

    async def _blocks(self, name: str, job: Job, stages: Sequence[Stage], plan: Plan) -> StageRecord:
        """All blocks of a slide, each when it gets a slot."""
        blocks = plan.blocks
        known = await asyncio.to_thread(lambda: {block: block_record(job, block) for block in blocks})
        left = sum(record is None for record in known.values())
        mm2 = plan.tissue.area_mm2 / max(1, len(blocks))  # of a block, on average
        self._progress.started(name, left, mm2 * left)

        async def one(block: int) -> StageRecord:
            record = known[block] or StageRecord()
            if known[block] is None:
                waited: Waits = defaultdict(float)
                for stage in stages:
                    record = await self._in_stream(name, stage, waited, record, job, block, record)
                record += StageRecord(waited=waited)
                self.work += record
                self._progress.block(mm2)
            return record

        tasks = []
        async with asyncio.TaskGroup() as group:
            for number, block in enumerate(blocks):
                await self._stream.slots.take(len(blocks) - number)
                tasks.append(group.create_task(one(block)))
                tasks[-1].add_done_callback(lambda _: self._stream.slots.give_back())
        return sum((task.result() for task in tasks), StageRecord())

    async def _in_stream(
        self, name: str, stage: Stage, waited: Waits, before: StageRecord, *arguments: Any
    ) -> StageRecord:
        """What a stage gives for these arguments. waited: as in `Stream.inside`; before: the record until then."""
        with self._stream.inside(stage, waited) as took:
            record = await self._task(name, stage, *arguments, *self._stand_in(stage))
            took(record.seconds.get(stage.name, 0.0) - before.seconds.get(stage.name, 0.0))
        return record

    async def _task(self, name: str, stage: Stage, *arguments: Any) -> StageRecord:
        with self.tasks.running(stage.name, name):
            record: StageRecord = await run_task(self._executor, stage.on_device, stage.run, *arguments)
        return record

    def _stand_in(self, stage: Stage) -> tuple[Detect, ...]:
        """The last argument of a stage that takes a stand-in for the detector, where there is one."""
        return (self._detect,) if stage.on_device and self._detect is not None else ()


def _check_space(job: Job, window: int) -> None:
    """Raise RunError where the disk cannot hold the blocks in flight, before the slide is started."""
    tiling = job.settings.tiling
    needed = 2 * window * (tiling.block * tiling.tile) ** 2 * 3
    free = shutil.disk_usage(job.folder.path).free
    if free < needed:
        raise RunError(
            f"{free / 1e9:.2f} GB are free in {job.folder.path.parent}, {needed / 1e9:.2f} GB are needed for the "
            f"blocks in flight: free some space, or give a smaller --tiling.block{' or --window' * (window > 1)}, and "
            f"run the same command again"
        )
