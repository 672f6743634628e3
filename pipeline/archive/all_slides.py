"""All slides of a command: which is next, which is tried again, which waits for another run.

A coroutine a slide, all in one event loop: `leased_slides` has what it does. The work itself is done where
`workers.execution.open_executor` says.
"""

import asyncio
import time

from pipeline.archive.command import Command
from pipeline.archive.failures import first_error
from pipeline.archive.inputs.sources import Source
from pipeline.archive.inputs.staging import Staging
from pipeline.archive.known import KnownSlides
from pipeline.archive.lease import Leases
from pipeline.archive.leased_slides import LeasedSlides
from pipeline.archive.manifest import check_worker, versions
from pipeline.archive.progress import Progress, SaidErrors
from pipeline.archive.slide_records import SlideRecords
from pipeline.archive.slide_stages import SlideStages
from pipeline.archive.slots import FairSlots
from pipeline.archive.stream import Stream
from pipeline.archive.workers.executors import Executor
from pipeline.archive.workers.watch import ExecutorWatch
from pipeline.errors import WorkersDied
from pipeline.segment.record import SlideRecord, StageRecord
from pipeline.segment.stages import Detect

_POLL_S = 5.0  # between checks of a slide that another run holds, and of the workers
_PATIENCE_S = 30.0  # for which a slide that another run holds is waited for without a word


class AllSlides:
    """The slides of a command, processed in one event loop.

    records: what became of them
    """

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
        self._command, self._executor, self._leases = command, executor, leases
        self._progress, self._staging = progress, staging
        known = KnownSlides(command.folder, command.settings, command.overwrite)
        self.records = SlideRecords(command, known, progress)
        self._stream = Stream(executor, command.execution.window)
        self._open = FairSlots(self._open_slides())
        self._stages = SlideStages(executor, self._stream, progress, detect)
        self._slides = LeasedSlides(command, known, self._stages, leases, staging, self.records, progress)
        self._suspects: list[tuple[Source, WorkersDied]] = []  # slides in whose tasks worker processes died

    @property
    def work(self) -> StageRecord:
        """What this run did by block or on a device."""
        return self._stages.work

    def check_workers(self, *, retire: bool) -> list[str]:
        """What is wrong with workers that are new, a line each. retire: end those that are no use."""
        stage = self._staging.folder if self._staging else None
        run_json = self._command.folder.run_json
        return self._executor.run_on_new_workers(check_worker, versions(), run_json, stage, retire=retire)

    async def process(self) -> None:
        """Process every slide of the archive. Raises ClusterLost."""
        await self.records.warn_of_others()
        await self.records.write_ledger()  # for the report and the viewer
        watchers = [asyncio.create_task(watch()) for watch in (self.records.keep_ledger, self._watch_workers)]
        try:
            async with asyncio.TaskGroup() as slides:
                for source in self._command.archive.sources:
                    slides.create_task(self._first(source))
            await self._again()
        except ExceptionGroup as group:
            raise first_error(group) from None
        finally:
            self.records.end_all()
            for watcher in watchers:
                watcher.cancel()

    def stop(self) -> None:
        """From any thread: give all slides back, and start no other."""
        self._slides.stop()

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
                self._progress.say(f"{source.name}: {error}; tried once more, with no other slide beside it")
                try:
                    await self._slide(source)
                    continue
                except WorkersDied as died:
                    error = died
            self.records.end(source.name, await self._slides.fail(source, error))

    async def _slide(self, source: Source) -> None:
        """Try a slide until it has its record: where another run has it, after waiting for that."""
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
            holder = await asyncio.to_thread(self._leases.holder, self._command.folder.slide(source.name).path)
            if holder and not self._command.execution.wait:  # where nobody has it by now, it is tried again
                record = SlideRecord(source.name, "locked", f"by {holder}")
                break
            since = time.monotonic() if since is None else since
            if holder and not told and time.monotonic() - since > _PATIENCE_S:
                told = True
                self._progress.say(f"{source.name}: waiting for {holder}, which has this slide; --no-wait leaves it")
            await asyncio.sleep(_POLL_S)
        self.records.end(source.name, record)

    def _open_slides(self) -> int:
        """Slides that are held at a time: the next ones are planned and tiled when a detector is free.

        No more than the blocks in flight ask for, as other runs could process the others; one where one is in flight.
        """
        return 2 * self._stream.size - 1

    async def _watch_workers(self) -> None:
        """Follow the number of detectors, check workers that join, and say what changes."""
        watch, errors = ExecutorWatch(self._executor), SaidErrors(self._progress, "checking the workers")
        while True:
            await asyncio.sleep(_POLL_S)
            with errors:
                self._stream.slots.size, self._open.size = self._stream.size, self._open_slides()
                for warning in (*watch.detectors(), *watch.scheduler(), *self._stages.tasks.silence()):
                    self._progress.say(f"WARNING: {warning}")
                # a worker that fails at every task is soon free for the next: it would get them all
                problems = await asyncio.to_thread(self.check_workers, retire=True)
                for warning in (*problems, *watch.ended_workers()):
                    self._progress.say(f"WARNING: {warning}")
