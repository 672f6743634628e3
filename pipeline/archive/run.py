"""A run over an archive: who is next, what is there already, what failed.

A coroutine a slide, all in one event loop; the work itself is done where `schedule.places` says. Slides are leased,
so that several runs may share one output folder.
"""

import asyncio
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.archive import ledger
from pipeline.archive.executors import Executor, FairSlots, places, run_task
from pipeline.archive.lease import LEASE, Leases
from pipeline.archive.ledger import Row
from pipeline.archive.manifest import RUN, check_worker, settle, versions
from pipeline.archive.progress import Progress
from pipeline.archive.sources import Archive, Source, find_slides
from pipeline.config import Execution, Settings
from pipeline.errors import ClusterLost, RunError
from pipeline.model.weights import licence
from pipeline.report.page import write_report
from pipeline.segment import stages
from pipeline.segment.plan import read_plan
from pipeline.segment.stages import BlockRecord, Job

_LOOK_S = 5.0  # between looks at a slide that another run holds, at the workers, at the ledger


def run(
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    execution: Execution,
    *,
    mpp: float | None = None,
    client: Any = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Segment every slide and write the results of DESIGN's layout under `out`; the ledger is returned.

    client: a `dask.distributed.Client` whose workers see the same files, instead of the cluster that `execution` asks
    for. That one starts processes: a script that calls `run` needs `if __name__ == "__main__":`, a notebook nothing.
    say: where lines go, instead of the terminal.
    What is done is kept: a second call continues at the block. A slide that fails does not stop the others.
    Raises RunError, WeightsError or ConfigError before anything is begun; ClusterLost.
    """
    archive = find_slides(inputs, out, mpp)
    settings, digest = settle(settings, out, execution.overwrite)
    with Progress(out, len(archive.sources), say) as progress:
        progress.say(f"{len(archive.sources)} slides, {archive.skipped} other files skipped; results in {out}")
        if terms := licence(Path(settings.detector.weights)):
            progress.say(f"weights {Path(settings.detector.weights).stem}: {terms}")
        for unread in archive.unread:
            progress.say(f"WARNING: {unread}")
        with places(execution, settings.detector.device, client) as where, Leases() as leases:
            if where.dashboard:
                progress.say(f"dashboard: {where.dashboard}")
            for problem in where.run_on_new_workers(check_worker, out.resolve() / RUN, versions()):
                raise RunError(problem)
            night = ArchiveRun(archive, out.resolve(), settings, digest, execution, where, leases, progress)
            try:
                _in_a_thread(night.work)
                if night.device.seconds:
                    progress.say(night.device.busy(where.detectors))
            finally:
                rows = night.settled()
                _publish(out, rows, progress)
    return rows


def _in_a_thread(work: Callable[[], Any]) -> None:
    """Run a coroutine to its end in a loop of its own: a notebook's thread has one already. Ctrl-C cancels it."""
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        begun.append((asyncio.get_running_loop(), task))
        await work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        try:
            future.result()
        except KeyboardInterrupt:
            if not future.done() and begun:
                loop, task = begun[0]
                loop.call_soon_threadsafe(task.cancel)
            raise


def _publish(out: Path, rows: Sequence[Row], progress: Progress) -> None:
    """The ledger and the report. A full disk or a folder that is gone is said, and changes nothing else."""
    try:
        ledger.write_ledger(out, rows)
        progress.say(f"report: {write_report(out, [asdict(row) for row in rows])}")
    except OSError as error:
        progress.say(f"WARNING: ledger.csv and report.html could not be written: {error}")


# -------------------------------------------------------------------------------------------------- the night


@dataclass
class _Device:
    """How well the detectors were fed: from the first block that was ready for them to the last that they gave back."""

    begun: float = float("inf")
    ended: float = 0.0
    seconds: float = 0.0

    def busy(self, detectors: int) -> str:
        span = max(1e-9, (self.ended - self.begun) * max(1, detectors))
        return f"the detector computed {min(1.0, self.seconds / span):.0%} of the time"


@dataclass
class ArchiveRun:
    """The state of a run, owned by its event loop."""

    archive: Archive
    out: Path
    settings: Settings
    digest: str
    execution: Execution
    where: Executor
    leases: Leases
    progress: Progress
    device: _Device = field(default_factory=_Device)
    rows: dict[str, Row] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    async def work(self) -> None:
        """Every slide to its row."""
        self.since_ns = files.now_ns(self.out)
        self.turns = FairSlots(self._window())
        # enough slides are begun that the next ones are planned and tiled when a detector is free; of one block in
        # flight it follows that one slide is held at a time
        self.open = asyncio.Semaphore(2 * self._window() - 1)
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as slides:
                for source in self.archive.sources:
                    slides.create_task(self._slide(source))
        except ExceptionGroup as group:
            raise _first(group) from None
        finally:
            watch.cancel()

    def settled(self) -> list[Row]:
        """A row for every slide of the archive, whatever became of it."""
        left = {True: "interrupted", False: "waiting"}
        return [self.rows.get(s.name) or Row(s.name, left[s.name in self.begun]) for s in self.archive.sources]

    def _window(self) -> int:
        return self.execution.window or 2 + 2 * max(1, self.where.detectors)

    async def _watch(self) -> None:
        """Follow the workers that come and go, and keep the ledger up to date."""
        written, detectors = 0, 1
        while True:
            await asyncio.sleep(_LOOK_S)
            self.turns.size = self._window()
            if self.where.detectors == 0 < detectors:
                self.progress.say(
                    "WARNING: no worker is there to detect; waiting (one without a GPU offers GPU=1, too)"
                )
            detectors = self.where.detectors
            for problem in await asyncio.to_thread(
                self.where.run_on_new_workers, check_worker, self.out / RUN, versions()
            ):
                self.progress.say(f"WARNING: {problem}")
            if len(self.rows) > written:
                written = len(self.rows)
                try:
                    await asyncio.to_thread(ledger.write_ledger, self.out, self.settled())
                except OSError as error:
                    self.progress.say(f"WARNING: ledger.csv could not be written: {error}")

    async def _slide(self, source: Source) -> None:
        job = Job(source.path.resolve(), self.out / source.name, self.settings, self.digest, source.mpp)
        while True:
            async with self.open:
                row = await self._attempt(source, job)
            if row is not None:
                break
            if not self.execution.wait:
                row = Row(source.name, "elsewhere", f"{self.leases.holder(job.folder)} is at it")
                break
            await asyncio.sleep(_LOOK_S)
        self.rows[source.name] = dataclasses.replace(row, slide=source.name)
        self.progress.ended(source.name, failed=row.status == "failed")

    async def _attempt(self, source: Source, job: Job) -> Row | None:
        """The slide's row, whatever happens to it; None where another run is at it."""
        try:
            known = await asyncio.to_thread(self._known, source, job)
            if known is not None:
                await asyncio.to_thread(self._tidy, job)
                return known
            if not await asyncio.to_thread(self.leases.take, job.folder):
                return None
            try:
                known = await asyncio.to_thread(self._known, source, job)  # it may have ended before we took it
                if known is None:
                    if self.execution.overwrite:
                        await asyncio.to_thread(_remove_results, job)
                    self.begun.add(source.name)
                    known = await self._segment(source.name, job)
                    self.progress.say(ledger.summary(dataclasses.replace(known, slide=source.name)))
                return known
            finally:
                await asyncio.to_thread(self.leases.release, job.folder)
        except ClusterLost:
            raise
        except Exception as raised:
            error = _first(raised)
            if isinstance(error, ClusterLost):
                raise error from None
            if not (self.out / RUN).exists():  # whatever it looks like
                error = RunError(f"{self.out} is not there any more: put it back, and run the same command again")
            row = await asyncio.to_thread(ledger.write_failure, job.folder, source.path, error)
            self.progress.say(f"{source.name}: FAILED: {row.cause}")
            return row

    def _known(self, source: Source, job: Job) -> Row | None:
        """The row of a slide that is done, or that another run has failed at since this one began."""
        if source.problem:
            raise RunError(source.problem)
        (self.out / RUN).stat()  # an output folder that is gone is not made anew
        content = ledger.read_slide(job.folder)
        if content is not None and self.execution.overwrite:
            if (job.folder / ledger.SLIDE).stat().st_mtime_ns > self.since_ns:
                return ledger.row_of(content)  # another run, also told to overwrite, has just done it
        elif content is not None and content.get("digest") == job.digest:
            row = ledger.row_of(content)
            if job.mpp is not None and row.mpp != round(job.mpp, 6):
                raise RunError(f"it was done at mpp={row.mpp}, now mpp={job.mpp}: choose another --out, or --overwrite")
            stages.check_same(job.source, content)
            self.progress.say(f"{source.name}: done before, {row.nuclei:,} nuclei")
            return dataclasses.replace(row, status="done before")
        return ledger.read_failure(job.folder, self.since_ns)

    def _tidy(self, job: Job) -> None:
        """Remove what a run that was killed in its last moment left beside a slide that it had finished."""
        left = [*job.folder.glob(".work-*"), *job.folder.glob(LEASE)]
        if (left or (job.work.exists() and not self.execution.keep_work)) and self.leases.take(job.folder):
            if not self.execution.keep_work:
                stages.clear(job)
            self.leases.release(job.folder)

    async def _segment(self, name: str, job: Job) -> Row:
        began = time.perf_counter()
        await asyncio.to_thread(_check_space, job, self._window())
        blocks = await run_task(self.where, False, stages.begin, job)
        plan = await asyncio.to_thread(read_plan, job.work)
        planned = time.perf_counter()
        left = {block for block in blocks if not job.instances(block).exists()}
        self.progress.begun(name, len(left), plan.tissue.area_mm2 * len(left) / max(1, len(blocks)))
        records = await self._blocks(job, blocks, left, plan.tissue.area_mm2 / max(1, len(blocks)))
        detected = time.perf_counter()
        stitched = await run_task(self.where, False, stages.stitch_slide, job)
        exported_from = time.perf_counter()
        exported = await run_task(self.where, False, stages.export_slide, job)
        ended = time.perf_counter()
        row = Row(
            "",
            "done",
            mpp=round((plan.scale.x + plan.scale.y) / 2, 6),
            mpp_source=plan.scale.source,
            tissue_mm2=round(plan.tissue.area_mm2, 4),
            tiles=len(plan.tiles),
            nuclei=stitched.nuclei,
            seconds_plan=round(planned - began, 3),
            seconds_tile=round(sum(r.tile_seconds for r in records), 3),
            seconds_detect=round(sum(r.device_seconds for r in records), 3),
            seconds_outline=round(sum(r.outline_seconds for r in records), 3),
            seconds_stitch=round(exported_from - detected, 3),
            seconds_export=round(ended - exported_from, 3),
            seconds=round(ended - began, 3),
            area_lost_mm2=round(sum(r.lost_mm2 for r in records), 6),
            saturated_tiles=sum(r.saturated for r in records),
            quartered_tiles=sum(r.quartered for r in records),
            touching_nuclei=sum(r.touching for r in records),
            seam_duplicates=stitched.dropped,
            export_changed=exported.changed,
            export_dropped=exported.dropped,
            note=plan.stain_note,
        )
        if not await asyncio.to_thread(self.leases.ours, job.folder):
            raise RunError("its lease was lost while this process was suspended: the same command takes it up again")
        await asyncio.to_thread(stages.finish, job, plan, {"ledger": asdict(row), "findings": exported.findings})
        (job.folder / ledger.FAILURE).unlink(missing_ok=True)
        if not self.execution.keep_work:
            await asyncio.to_thread(stages.clear, job)
        return row

    async def _blocks(self, job: Job, blocks: Sequence[int], left: AbstractSet[int], mm2: float) -> list[BlockRecord]:
        """All blocks of a slide, each when its turn comes; their records in the blocks' order.

        left: those that have no instances yet; mm2: tissue of a block, on average.
        """

        async def one(block: int) -> BlockRecord:
            if block in left:
                seconds = await run_task(self.where, False, stages.tile_block, job, block)
                self.device.begun = min(self.device.begun, time.monotonic())
                await run_task(self.where, True, stages.detect_block, job, block, seconds)
                self.device.ended = time.monotonic()
            record: BlockRecord = await run_task(self.where, False, stages.outline_block, job, block)
            if block in left:
                self.device.seconds += record.device_seconds
                self.progress.block(mm2)
            return record

        tasks = []
        async with asyncio.TaskGroup() as group:
            for number, block in enumerate(blocks):
                await self.turns.take(len(blocks) - number)
                tasks.append(group.create_task(one(block)))
                tasks[-1].add_done_callback(lambda _: self.turns.give_back())
        return [task.result() for task in tasks]


def _first(error: Exception) -> Exception:
    """The cause itself, out of the groups that task groups make."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _check_space(job: Job, window: int) -> None:
    """Raise RunError where the disk cannot hold the blocks in flight: better now than in the middle."""
    tiling = job.settings.tiling
    needed = 2 * window * (tiling.block * tiling.tile) ** 2 * 3
    free = shutil.disk_usage(job.folder).free
    if free < needed:
        raise RunError(
            f"{free / 1e9:.2f} GB are free in {job.folder.parent}, {needed / 1e9:.2f} GB are needed for the blocks in "
            f"flight: free some space, or lower --window, and run the same command again"
        )


def _remove_results(job: Job) -> None:
    """Whatever an earlier run made of the slide, with other settings perhaps; its lease is ours."""
    for name in ("work", *RESULTS):
        path = job.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


RESULTS = (ledger.SLIDE, "thumbnail.jpg", "overlay.jpg", "nuclei.parquet", "nuclei.geojson.zip", "nuclei.csv")
