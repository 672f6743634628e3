"""A run over an archive: which slide is next, which are done already, which failed.

A coroutine a slide, all in one event loop; the work itself is done where `execution.open_executor` says. Slides are
leased, so that several runs may share one output folder.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.archive import ledger
from pipeline.archive.execution import check_execution, open_executor, starts_processes
from pipeline.archive.executors import Executor, run_task
from pipeline.archive.failures import explained, first_error, write_failure
from pipeline.archive.known import DONE_OTHERWISE, KnownSlides
from pipeline.archive.lease import Leases
from pipeline.archive.manifest import (
    check_seams,
    check_worker,
    end_overwriting,
    open_run,
    resolve,
    versions,
)
from pipeline.archive.processes import ask, stop_in_a_starting_worker
from pipeline.archive.progress import Progress
from pipeline.archive.region_files import region_file, with_regions
from pipeline.archive.slots import FairSlots
from pipeline.archive.sources import Archive, Inputs, Source, find_slides
from pipeline.archive.staging import Room, Staging
from pipeline.archive.stream import Stream, Waits
from pipeline.config import Execution, Settings, require_kind
from pipeline.errors import ClusterLost, LeaseLost, RunError, ScratchLost
from pipeline.layout import RunFolder, SlideFolder
from pipeline.model.weights import licence
from pipeline.report.page import write_report
from pipeline.segment import attempts, finished
from pipeline.segment.attempts import Attempt
from pipeline.segment.export import check_formats
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan, read_plan
from pipeline.segment.record import SlideRecord, StageRecord, device_use
from pipeline.segment.slide_stain import template_stain
from pipeline.segment.stages import STAGES, Detect, Stage, block_record, remove_work
from pipeline.text import counted, one_line

_SIGNAL_S = 0.2  # until a signal is noticed
_POLL_S = 5.0  # between checks of a slide that another run holds, of the workers, and of the ledger
_LEDGER_SHARE = 20  # times as long as the ledger takes to write passes before the next: it looks at every slide
_PATIENCE_S = 30.0  # for which a slide that another run holds is waited for without a word
_ATTEMPTS = 3  # at a slide whose scratch is damaged while it is processed


def run(
    inputs: Inputs,
    out: str | os.PathLike[str],
    settings: Settings = Settings(),
    execution: Execution = Execution(),
    *,
    mpp: float | None = None,
    force_mpp: float | None = None,
    client: Any = None,
    say: Callable[[str], None] | None = None,
    detect: Detect | None = None,
) -> list[SlideRecord]:
    """Segment every slide and write the results under `out`; what became of each slide is returned.

    mpp: micrometres per pixel at level 0, for slides that do not state it; force_mpp: for all, whatever they state.
    client: a `dask.distributed.Client` whose workers see the same files, instead of the cluster that `execution` asks
    for. That one starts processes: a script that calls `run` needs `if __name__ == "__main__":`, a notebook nothing.
    say: takes the lines that would go to the terminal. detect: replaces the detector, in tests.
    What is done is kept: a second call continues at the block. A slide that fails does not stop the others.
    Raises RunError, WeightsError, StainError or ConfigError before anything is started; ClusterLost.
    """
    require_kind("settings", settings, Settings)
    require_kind("execution", execution, Execution)
    if starts_processes(execution, client):
        stop_in_a_starting_worker()
    folder = RunFolder(Path(out).absolute())
    archive = find_slides(
        inputs,
        folder.path,
        mpp=mpp,
        force_mpp=force_mpp,
        follow_links=execution.follow_links,
        urls=bool(execution.stage),
    )
    archive = with_regions(archive, settings.regions)
    settings = resolve(settings)
    check_formats(settings.export.formats)
    seams = check_seams(settings) if detect is None else ()
    _check_computing(settings, execution, client)
    opened = open_run(folder, settings, execution.overwrite)
    with Progress(folder.logs, len(archive.sources), say) as progress:
        found = f"{counted(len(archive.sources), 'slide')}, {counted(archive.skipped, 'other file')} skipped"
        progress.say(f"{found}; results in {out}")
        weights = Path(settings.detector.weights)
        if terms := licence(weights):
            progress.say(f"weights {weights.stem}: {terms}")
        for warning in (*seams, *opened.warnings, *archive.unread):
            progress.say(f"WARNING: {warning}")
        with (
            open_executor(execution, settings.detector.device, client) as executor,
            Leases() as leases,
            _staging(execution, leases) as staging,
        ):
            if executor.dashboard:
                progress.say(f"dashboard: {executor.dashboard}")
            if executor.warning:
                progress.say(f"WARNING: {executor.warning}")
            work = ArchiveRun(
                archive, folder, settings, execution, executor, leases, progress, detect, staging, opened.overwrite
            )
            return _carry_out(work)


def _check_computing(settings: Settings, execution: Execution, client: Any) -> None:
    """Raise ConfigError for devices or a scheduler that are no use, and what `template_stain` raises.

    settings: resolved
    """
    if client is None:
        check_execution(execution, settings.detector.device)
    # a template that shows no stain is refused, too; without a file it is known
    apart = bool(settings.stain.template) and starts_processes(execution, client)
    ask(apart, template_stain, settings.stain, settings.tissue, settings.tiling.mpp)


def _completes_round(statuses: Collection[str]) -> bool:
    """Whether a command that ends so leaves nothing of its round of --overwrite to the next one.

    Slides that another run holds are still of the round; so are those that failed, of a full disk perhaps, while others
    were done. Where a command did none, those that fail will go on failing.
    """
    return "locked" not in statuses and not {"done", "failed"} <= set(statuses)


def _staging(execution: Execution, leases: Leases) -> contextlib.AbstractContextManager[Staging | None]:
    if not execution.stage:
        return contextlib.nullcontext()
    return Staging(Path(execution.stage).absolute(), execution.stage_space_bytes, leases)


def _carry_out(work: "ArchiveRun") -> list[SlideRecord]:
    """Process all slides; the ledger and the report are written, however that ends. Raises RunError, ClusterLost."""
    for problem in work.check_workers():
        raise RunError(problem)
    try:
        _in_a_thread(work.process, work.stop)
        if _completes_round({record.status for record in work.records()}):
            end_overwriting(work.folder, work.overwrite)
        if use := device_use(work.work):
            work.progress.say(use)
    finally:
        records = work.records()
        chosen_stains = work.settings.stain.method == "auto"
        _publish(work.folder, work.of_the_folder(records), work.progress, chosen_stains=chosen_stains)
    return records


def _in_a_thread(work: Callable[[], Any], stop: Callable[[], None]) -> None:
    """Run a coroutine to its end in a loop of its own: a notebook's thread has one already.

    Ctrl-C calls `stop`, for the tasks that cannot be cancelled, and cancels the coroutine. Then it is waited for.
    """
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        started.append((asyncio.get_running_loop(), task))
        await work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        try:
            # A signal that the kernel gives another thread does not wake this one, whose turn it is to handle it.
            while not wait([future], _SIGNAL_S).done:
                pass
            future.result()
        except KeyboardInterrupt:
            stop()
            if not future.done() and started:
                loop, task = started[0]
                loop.call_soon_threadsafe(task.cancel)
            raise


def _publish(folder: RunFolder, records: Sequence[SlideRecord], progress: Progress, *, chosen_stains: bool) -> None:
    """Write the ledger and the report. A full disk or a missing folder is a warning, and no error.

    chosen_stains: whether each slide's stain normalisation was chosen by itself; then it is said how often which.
    """
    rows = [ledger.row_of(record) for record in records]
    if warning := ledger.mixed_computation(rows):
        progress.say(f"WARNING: {warning}")
    if chosen_stains and (stains := ledger.mixed_stains(rows)):
        progress.say(stains)
    try:
        ledger.write_ledger(folder, records)
        progress.say(f"report: {write_report(folder, rows)}")
    except OSError as error:
        progress.say(f"WARNING: ledger.csv and report.html could not be written: {error}")


@dataclass
class ArchiveRun:
    """The state of a run, owned by its event loop."""

    archive: Archive
    folder: RunFolder
    settings: Settings
    execution: Execution
    executor: Executor
    leases: Leases
    progress: Progress
    detect: Detect | None = None
    staging: Staging | None = None
    overwrite: str = ""  # as in `Job`
    work: StageRecord = field(default_factory=StageRecord)  # of what this run did by block or on a device
    done: dict[str, SlideRecord] = field(default_factory=dict)
    others: list[SlideRecord] = field(default_factory=list)  # what other commands have left in the folder
    started: set[str] = field(default_factory=set)
    stopped: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.known = KnownSlides(self.folder, self.settings, self.overwrite)

    async def process(self) -> None:
        """Process every slide of the archive."""
        own = {source.name for source in self.archive.sources}
        self.others, names = await asyncio.to_thread(self.known.others, own)
        for source in self.archive.sources if names else ():
            place = source.place if source.remote else os.path.realpath(source.path)
            if (name := names.get(place)) is not None and not (source.skip or source.problem):
                self.progress.say(
                    f"WARNING: {source.name}: its file has results as {name}, by a command that was given another "
                    f"folder: all its nuclei will be there twice"
                )
        self.stream = Stream(self.executor, self.execution.window)
        self.open = FairSlots(self._open_slides())
        await self._write_ledger()  # for the report and the viewer
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as slides:
                for source in self.archive.sources:
                    slides.create_task(self._slide(source))
        except ExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self.ended = True
            watch.cancel()

    def stop(self) -> None:
        """From any thread: give all slides back, and start no other. Tasks stop when they ask for their lease."""
        self.stopped = True
        self.leases.release_all()

    def check_workers(self) -> list[str]:
        """What is wrong with workers that are new, a line each."""
        stage = self.staging.folder if self.staging else None
        return self.executor.run_on_new_workers(check_worker, versions(), self.folder.run_json, stage)

    def records(self) -> list[SlideRecord]:
        """A record for every slide of the archive, whatever became of it."""
        return [self._record(source.name) for source in self.archive.sources]

    def _record(self, name: str) -> SlideRecord:
        own = self.done.get(name)
        if own is not None and own.status != "locked":
            return own
        if (elsewhere := self.known.elsewhere(name)) is not None:
            return elsewhere
        begun = "interrupted" if self.ended else "unfinished"  # which it stays where this process is killed
        return own or SlideRecord(name, begun if name in self.started else "waiting")

    def of_the_folder(self, records: list[SlideRecord]) -> list[SlideRecord]:
        """These, and those of the slides that other commands have left in the folder."""
        return [*records, *self.others]

    def _open_slides(self) -> int:
        """Slides that are held at a time: the next ones are planned and tiled when a detector is free.

        No more than the blocks in flight ask for, as other runs could process the others; one where one is in flight.
        """
        return 2 * self.stream.size - 1

    async def _watch(self) -> None:
        """Check workers that join, follow the number of detectors, and keep the ledger up to date."""
        written, detectors, silent, ended, due = (0, 0), 1, False, 0, 0.0
        while True:
            await asyncio.sleep(_POLL_S)
            if (state := (len(self.started), len(self.done))) != written and time.monotonic() >= due:
                written, started = state, time.monotonic()
                await self._write_ledger()
                due = time.monotonic() + _LEDGER_SHARE * (time.monotonic() - started)
            self.stream.slots.size, self.open.size = self.stream.size, self._open_slides()
            if self.executor.detectors == 0 < detectors:
                self.progress.say(
                    "WARNING: no worker offers the GPU resource: start one with --resources GPU=1; waiting"
                )
            detectors = self.executor.detectors
            if self.executor.silent != silent:
                silent = self.executor.silent
                said = "does not answer (suspended?): waiting for it" if silent else "answers again"
                self.progress.say(f"WARNING: the Dask scheduler {said}")
            for problem in await asyncio.to_thread(self.check_workers):
                self.progress.say(f"WARNING: {problem}")
            if (lost := self.executor.ended - ended) > 0:
                ended += lost
                self.progress.say(
                    f"WARNING: {counted(lost, 'worker process', 'worker processes')} ended during the run; unfinished "
                    f"work is done again. If nobody ended them: is there memory enough?"
                )

    async def _write_ledger(self) -> None:
        """Of all slides as they are now; where it cannot be written the run goes on."""
        try:
            await asyncio.to_thread(lambda: ledger.write_ledger(self.folder, self.of_the_folder(self.records())))
        except OSError as error:
            self.progress.say(f"WARNING: ledger.csv could not be written: {error}")

    # ------------------------------------------------------------------------------------------- one slide

    async def _slide(self, source: Source) -> None:
        folder, told, since = self.folder.slide(source.name), False, None
        while True:
            await self.open.take(0)
            try:
                record = await self._attempt(source, folder)
            finally:
                self.open.give_back()
            if record is not None:
                break
            if self.stopped:  # a task group in which a task fails forgets that it was cancelled
                raise asyncio.CancelledError
            holder = await asyncio.to_thread(self.leases.holder, folder.path)
            if not self.execution.wait:
                record = SlideRecord(source.name, "locked", f"by {holder}")
                break
            since = time.monotonic() if since is None else since
            if holder and not told and time.monotonic() - since > _PATIENCE_S:
                told = True
                self.progress.say(f"{source.name}: waiting for {holder}, which has this slide; --no-wait leaves it")
            await asyncio.sleep(_POLL_S)
        self.done[source.name] = record
        self.progress.ended(source.name, failed=record.status == "failed")

    async def _attempt(self, source: Source, folder: SlideFolder) -> SlideRecord | None:
        """The slide's record, whatever happens to it; None where another run has it."""
        try:
            if source.skip:
                known = await asyncio.to_thread(self.known.finished, source.name)
                return known or SlideRecord(source.name, "skipped", source.skip)
            # of os.path, as pathlib refuses links in a circle
            regions = await asyncio.to_thread(region_file, source, self.settings.regions)
            path = Path(os.path.realpath(source.path))
            job = Job(path, folder, self.settings, source.scale, regions, overwrite=self.overwrite)
            known = await asyncio.to_thread(self._known, source, job)
            if known is not None:
                return known
            if self.staging is None:
                return await self._leased(source, job)
            async with self.staging.room(source.files) as room:
                return await self._leased(source, job, room)
        except Exception as raised:
            error = first_error(raised)
            if isinstance(error, ClusterLost):
                raise error from None
            if isinstance(error, LeaseLost):
                return None
            error = explained(error, self.folder, folder)
            if self.staging is not None:
                error = self.staging.of_original(error, source.place)
            record = await asyncio.to_thread(self._failed, source, error)
            self.progress.say(f"{source.name}: FAILED: {record.cause}")
            return record

    def _failed(self, source: Source, error: Exception) -> SlideRecord:
        """The record of a slide that failed, noted in its folder; not where a link would lead elsewhere."""
        if any(self.folder.links(source.name)):
            return SlideRecord(source.name, "failed", one_line(error))
        return write_failure(self.folder.slide(source.name), source.name, source.place, error)

    def _known(self, source: Source, job: Job) -> SlideRecord | None:
        """As `KnownSlides.look`; of a slide that is done, what it lacks is made."""
        record = self.known.look(source, job)
        if record is not None and record.status == DONE_OTHERWISE:
            self.progress.say(f"{source.name}: NOT DONE AGAIN: {record.cause}")
        elif record is not None and record.done:
            self._complete(source.name, job)
            self.progress.say(f"{source.name}: done before, {record.nuclei:,} nuclei")
        return record

    def _complete(self, name: str, job: Job) -> None:
        """Make the exports that a finished slide lacks, and remove what a killed run left beside it."""
        folder = job.folder
        leftovers = [*folder.all_discarded_work(), *folder.path.glob(folder.lease.name)]
        untidy = leftovers or (folder.work.exists() and not self.execution.keep_work)
        stale = finished.stale_exports(folder, job.settings.export)
        if not (untidy or stale) or not self.leases.take(folder.path):
            return
        try:
            if made := finished.refresh_exports(folder, job.settings.export):
                self.progress.say(f"{name}: {', '.join(made)} made from {folder.nuclei.name}")
            if not self.execution.keep_work:
                remove_work(job)
        finally:
            self.leases.release(folder.path)

    async def _leased(self, source: Source, job: Job, room: Room | None = None) -> SlideRecord | None:
        """Take the slide and do it, in its room if it is to be copied first; None where another run has it."""
        if self.stopped or not await asyncio.to_thread(self.leases.take, job.folder.path):
            return None
        try:
            known = await asyncio.to_thread(self._known, source, job)  # it may have ended before we took it
            job = dataclasses.replace(job, lease=self.leases.file(job.folder.path))
            if known is None and room is not None:
                job = await self._copied(source, job, room)
                known = await asyncio.to_thread(self._known, source, job)
            return known or await self._owned(source, job)
        finally:
            await asyncio.to_thread(self.leases.release, job.folder.path)

    async def _copied(self, source: Source, job: Job, room: Room) -> Job:
        """The job on a copy of its slide."""
        assert self.staging is not None
        since = time.perf_counter()
        job = await self.staging.copy(source.files, room, job)
        took = time.perf_counter() - since
        self.progress.say(f"{source.name}: copied, {room.bytes / 1e9:.2f} GB in {took:.1f} s")
        return job

    async def _owned(self, source: Source, job: Job) -> SlideRecord | None:
        """The record of a slide, which is ours, after all stages; None where another run has taken it over."""
        try:
            self.started.add(source.name)
            record = await self._segment(source.name, job)
            if self.overwrite:
                self.folder.regions.unlink(missing_ok=True)  # it has rows of this slide as it was
            self.progress.say(ledger.terminal_lines(record))
            return record
        except Exception as error:
            # whoever has taken the slide over has changed its files: an error of ours means nothing then
            if isinstance(first_error(error), ClusterLost) or not await asyncio.to_thread(self._is_taken_over, job):
                raise
            return None

    def _is_taken_over(self, job: Job) -> bool:
        """Whether a slide that we took is another run's now, or was done by one that we took it from."""
        return not self.leases.ours(job.folder.path) or self.known.is_done(job)

    async def _segment(self, name: str, job: Job) -> SlideRecord:
        """All stages of a slide; again where scratch is damaged or disappears: what is whole is not done again.

        A former owner that was suspended may remove work, and files being written, before it learns that it lost the
        lease.
        """
        started, before = time.time(), list[Attempt]()
        await asyncio.to_thread(_check_space, job, self.stream.most)
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
            mpp=round((plan.scale.x + plan.scale.y) / 2, 6),
            mpp_source=plan.scale.source,
            tissue_mm2=round(plan.tissue.area_mm2, 4),
            tiles=len(plan.tiles),
            stain=plan.normalisation.source.method,
            work=work,
            attempts=(*before, (started, time.time())),
        )
        complete: SlideRecord = await run_task(self.executor, False, finished.finish_slide, job, record)
        job.folder.failure_json.unlink(missing_ok=True)
        if not self.execution.keep_work:
            await asyncio.to_thread(remove_work, job)
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
                    work += await self._slide_stage(stage, job)
        return work, before

    async def _slide_stage(self, stage: Stage, job: Job) -> StageRecord:
        """A stage of the whole slide."""
        if not stage.on_device:
            record: StageRecord = await run_task(self.executor, False, stage.run, job)
            return record
        waited: Waits = defaultdict(float)
        record = await self._in_stream(stage, waited, StageRecord(), job)
        record += StageRecord(waited=waited)
        self.work += record
        return record

    async def _blocks(self, name: str, job: Job, stages: Sequence[Stage], plan: Plan) -> StageRecord:
        """All blocks of a slide, each when it gets a slot."""
        blocks = plan.blocks
        known = await asyncio.to_thread(lambda: {block: block_record(job, block) for block in blocks})
        left = sum(record is None for record in known.values())
        mm2 = plan.tissue.area_mm2 / max(1, len(blocks))  # of a block, on average
        self.progress.started(name, left, mm2 * left)

        async def one(block: int) -> StageRecord:
            record = known[block] or StageRecord()
            if known[block] is None:
                waited: Waits = defaultdict(float)
                for stage in stages:
                    record = await self._in_stream(stage, waited, record, job, block, record)
                record += StageRecord(waited=waited)
                self.work += record
                self.progress.block(mm2)
            return record

        tasks = []
        async with asyncio.TaskGroup() as group:
            for number, block in enumerate(blocks):
                await self.stream.slots.take(len(blocks) - number)
                tasks.append(group.create_task(one(block)))
                tasks[-1].add_done_callback(lambda _: self.stream.slots.give_back())
        return sum((task.result() for task in tasks), StageRecord())

    async def _in_stream(self, stage: Stage, waited: Waits, before: StageRecord, *arguments: Any) -> StageRecord:
        """What a stage gives for these arguments. waited: as in `Stream.inside`; before: the record until then."""
        with self.stream.inside(stage, waited) as took:
            record: StageRecord = await run_task(
                self.executor, stage.on_device, stage.run, *arguments, *self._stand_in(stage)
            )
            took(record.seconds.get(stage.name, 0.0) - before.seconds.get(stage.name, 0.0))
        return record

    def _stand_in(self, stage: Stage) -> tuple[Detect, ...]:
        """The last argument of a stage that takes a stand-in for the detector, where there is one."""
        return (self.detect,) if stage.on_device and self.detect is not None else ()


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
