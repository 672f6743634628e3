"""A run over an archive: which slide is next, which are done already, which failed.

A coroutine a slide, all in one event loop: `leased_slides` has what it does. The work itself is done where
`execution.open_executor` says.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.archive import ledger
from pipeline.archive.command import Command
from pipeline.archive.failures import first_error
from pipeline.archive.known import KnownSlides
from pipeline.archive.lease import Leases
from pipeline.archive.leased_slides import LeasedSlides
from pipeline.archive.manifest import (
    check_seams,
    check_worker,
    end_overwriting,
    open_run,
    resolve,
    versions,
)
from pipeline.archive.progress import Progress
from pipeline.archive.region_files import with_regions
from pipeline.archive.slide_stages import SlideStages
from pipeline.archive.slots import FairSlots
from pipeline.archive.sources import Inputs, Source, find_slides
from pipeline.archive.staging import Staging
from pipeline.archive.stream import Stream
from pipeline.archive.workers.execution import check_execution, open_executor, starts_processes
from pipeline.archive.workers.executors import Executor
from pipeline.archive.workers.processes import ask, stop_in_a_starting_worker
from pipeline.archive.workers.watch import ExecutorWatch
from pipeline.config import Execution, Settings, checked
from pipeline.errors import RunError, WorkersDied
from pipeline.layout import RunFolder
from pipeline.model.weights import licence
from pipeline.report.page import write_report
from pipeline.segment.export import check_formats
from pipeline.segment.record import SlideRecord, StageRecord, device_use
from pipeline.segment.slide_stain import template_stain
from pipeline.segment.stages import Detect
from pipeline.text import counted

_SIGNAL_S = 0.2  # until a signal is noticed
_POLL_S = 5.0  # between checks of a slide that another run holds, of the workers, and of the ledger
_LEDGER_SHARE = 20  # times as long as the ledger takes to write passes before the next: it looks at every slide
_PATIENCE_S = 30.0  # for which a slide that another run holds is waited for without a word


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
    settings = checked("settings", settings, Settings)
    execution = checked("execution", execution, Execution)
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
            command = Command(archive, folder, settings, execution, opened.overwrite)
            return _carry_out(ArchiveRun(command, executor, leases, progress, detect, staging))


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
    for problem in work.check_workers(retire=False):
        raise RunError(problem)
    try:
        _in_a_thread(work.process, work.stop)
        if _completes_round({record.status for record in work.records()}):
            end_overwriting(work.command.folder, work.command.overwrite)
        if use := device_use(work.work):
            work.progress.say(use)
    finally:
        records = work.records()
        chosen_stains = work.command.settings.stain.method == "auto"
        _publish(work.command.folder, work.of_the_folder(records), work.progress, chosen_stains=chosen_stains)
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
        interrupted = told = False
        while not future.done():
            try:
                if interrupted and not told:
                    stop()
                    for loop, task in started:
                        with contextlib.suppress(RuntimeError):  # the loop has just ended
                            loop.call_soon_threadsafe(task.cancel)
                        told = True
                # A signal that the kernel gives another thread does not wake this one, whose turn it is to handle it.
                wait([future], _SIGNAL_S)
            except KeyboardInterrupt:  # also a second one, as a group of processes is sent, while the first is handled
                interrupted = True
        if interrupted:
            raise KeyboardInterrupt
        future.result()


def _publish(folder: RunFolder, records: Sequence[SlideRecord], progress: Progress, *, chosen_stains: bool) -> None:
    """Write the ledger and the report, each whatever becomes of the other. A full disk, a missing folder, or a file
    that another program has open, is a warning and no error.

    chosen_stains: whether each slide's stain normalisation was chosen by itself; then it is said how often which.
    """
    rows = [ledger.row_of(record) for record in records]
    if warning := ledger.mixed_computation(rows):
        progress.say(f"WARNING: {warning}")
    if chosen_stains and (stains := ledger.mixed_stains(rows)):
        progress.say(stains)
    try:
        ledger.write_ledger(folder, records)
    except OSError as error:
        progress.say(_not_written(folder.ledger, error))
    try:
        progress.say(f"report: {write_report(folder, rows)}")
    except OSError as error:
        progress.say(_not_written(folder.report, error))


def _not_written(file: Path, error: OSError) -> str:
    return f"WARNING: {file.name} could not be written: {files.refusal(error) or error}"


class ArchiveRun:
    """The slides of a command, and what becomes of them. Owned by one event loop."""

    def __init__(
        self,
        command: Command,
        executor: Executor,
        leases: Leases,
        progress: Progress,
        detect: Detect | None,
        staging: Staging | None,
    ) -> None:
        """detect: replaces the detector, in tests."""
        self.command, self.progress = command, progress
        self._executor, self._leases, self._staging = executor, leases, staging
        self._known = KnownSlides(command.folder, command.settings, command.overwrite)
        self._stream = Stream(executor, command.execution.window)
        self._open = FairSlots(self._open_slides())
        self._stages = SlideStages(executor, self._stream, progress, detect)
        self._slides = LeasedSlides(command, self._known, self._stages, leases, staging, progress)
        self._done: dict[str, SlideRecord] = {}
        self._suspects: list[tuple[Source, WorkersDied]] = []  # slides in whose tasks worker processes died
        self._others: list[SlideRecord] = []  # what other commands have left in the folder
        self._ended = False

    @property
    def work(self) -> StageRecord:
        """What this run did by block or on a device."""
        return self._stages.work

    async def process(self) -> None:
        """Process every slide of the archive."""
        own = {source.name for source in self.command.archive.sources}
        self._others, names = await asyncio.to_thread(self._known.others, own)
        for source in self.command.archive.sources if names else ():
            place = source.place if source.remote else os.path.realpath(source.path)
            if (name := names.get(place)) is not None and not (source.skip or source.problem):
                self.progress.say(
                    f"WARNING: {source.name}: its file has results as {name}, by a command that was given another "
                    f"folder: all its nuclei will be there twice"
                )
        await self._write_ledger()  # for the report and the viewer
        watchers = [asyncio.create_task(watch()) for watch in (self._keep_ledger, self._watch_workers)]
        try:
            async with asyncio.TaskGroup() as slides:
                for source in self.command.archive.sources:
                    slides.create_task(self._first(source))
            await self._again()
        except ExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self._ended = True
            for watcher in watchers:
                watcher.cancel()

    def stop(self) -> None:
        """From any thread: give all slides back, and start no other."""
        self._slides.stop()

    def check_workers(self, *, retire: bool) -> list[str]:
        """What is wrong with workers that are new, a line each. retire: end those that are no use."""
        stage = self._staging.folder if self._staging else None
        run_json = self.command.folder.run_json
        return self._executor.run_on_new_workers(check_worker, versions(), run_json, stage, retire=retire)

    def records(self) -> list[SlideRecord]:
        """A record for every slide of the archive, whatever became of it."""
        return [self._record(source.name) for source in self.command.archive.sources]

    def _record(self, name: str) -> SlideRecord:
        own = self._done.get(name)
        if own is not None and own.status != "locked":
            return own
        if (elsewhere := self._known.elsewhere(name)) is not None:
            return elsewhere
        begun = "interrupted" if self._ended else "unfinished"  # which it stays where this process is killed
        return own or SlideRecord(name, begun if name in self._slides.started else "waiting")

    def of_the_folder(self, records: list[SlideRecord]) -> list[SlideRecord]:
        """These, and those of the slides that other commands have left in the folder."""
        return [*records, *self._others]

    def _open_slides(self) -> int:
        """Slides that are held at a time: the next ones are planned and tiled when a detector is free.

        No more than the blocks in flight ask for, as other runs could process the others; one where one is in flight.
        """
        return 2 * self._stream.size - 1

    async def _keep_ledger(self) -> None:
        """Write the ledger again whenever a slide was started or done since, but not all the time."""
        written, due = (0, 0), 0.0
        while True:
            await asyncio.sleep(_POLL_S)
            state = len(self._slides.started), len(self._done)
            if state != written and time.monotonic() >= due:
                written, started = state, time.monotonic()
                await self._write_ledger()
                due = time.monotonic() + _LEDGER_SHARE * (time.monotonic() - started)

    async def _watch_workers(self) -> None:
        """Follow the number of detectors, check workers that join, and say what changes."""
        watch = ExecutorWatch(self._executor)
        while True:
            await asyncio.sleep(_POLL_S)
            self._stream.slots.size, self._open.size = self._stream.size, self._open_slides()
            for warning in (*watch.detectors(), *watch.scheduler()):
                self.progress.say(f"WARNING: {warning}")
            # a worker that fails at every task is soon free for the next: it would get them all
            problems = await asyncio.to_thread(self.check_workers, retire=True)
            for warning in (*problems, *watch.ended_workers()):
                self.progress.say(f"WARNING: {warning}")

    async def _write_ledger(self) -> None:
        """Of all slides as they are now; where it cannot be written the run goes on."""
        folder = self.command.folder
        try:
            await asyncio.to_thread(lambda: ledger.write_ledger(folder, self.of_the_folder(self.records())))
        except OSError as error:
            self.progress.say(_not_written(folder.ledger, error))

    async def _first(self, source: Source) -> None:
        """The first try of a slide."""
        try:
            await self._slide(source)
        except WorkersDied as error:
            self._suspects.append((source, error))

    async def _again(self) -> None:
        """Try slides in whose tasks worker processes died once more, one at a time, now that all others have ended.

        A file that ends the process which reads it ends what that does for other slides, too. Where only one slide is
        left so, it was no other's doing.
        """
        for source, error in self._suspects:
            if len(self._suspects) > 1:
                self.progress.say(f"{source.name}: {error}; tried once more, with no other slide beside it")
                try:
                    await self._slide(source)
                    continue
                except WorkersDied as died:
                    error = died
            self._end(source, await self._slides.fail(source, error))

    async def _slide(self, source: Source) -> None:
        told, since = False, None
        while True:
            await self._open.take(0)
            try:
                record = await self._slides.attempt(source)
            finally:
                self._open.give_back()
            if record is not None:
                break
            if self._slides.stopped:  # a task group in which a task fails forgets that it was cancelled
                raise asyncio.CancelledError
            holder = await asyncio.to_thread(self._leases.holder, self.command.folder.slide(source.name).path)
            if not self.command.execution.wait:
                record = SlideRecord(source.name, "locked", f"by {holder}")
                break
            since = time.monotonic() if since is None else since
            if holder and not told and time.monotonic() - since > _PATIENCE_S:
                told = True
                self.progress.say(f"{source.name}: waiting for {holder}, which has this slide; --no-wait leaves it")
            await asyncio.sleep(_POLL_S)
        self._end(source, record)

    def _end(self, source: Source, record: SlideRecord) -> None:
        self._done[source.name] = record
        self.progress.ended(source.name, failed=record.status == "failed")
