"""A slide of a run from the look at its results to its record: by which run it is done, and whether it is at all.

Several runs may share an output folder, so a slide is leased before it is processed, which `slide_stages` does.
"""

import asyncio
import dataclasses
import os
import time
from pathlib import Path

from pipeline.archive import ledger
from pipeline.archive.command import Command
from pipeline.archive.failures import explained, first_error, write_failure
from pipeline.archive.inputs.region_files import region_file
from pipeline.archive.inputs.sources import Source
from pipeline.archive.inputs.staging import Room, Staging
from pipeline.archive.known import DONE_OTHERWISE, KnownSlides
from pipeline.archive.lease import Leases
from pipeline.archive.progress import Progress
from pipeline.archive.slide_records import SlideRecords
from pipeline.archive.slide_stages import SlideStages
from pipeline.errors import ClusterLost, LeaseLost, WorkersDied
from pipeline.segment import finished
from pipeline.segment.job import Job
from pipeline.segment.record import SlideRecord
from pipeline.segment.stages import remove_work
from pipeline.segment.tables import checked_between_groups
from pipeline.text import counted_nuclei, one_line


class LeasedSlides:
    """Attempts at slides, several at a time. Used by one event loop.

    stopped: no other is started
    """

    def __init__(
        self,
        command: Command,
        known: KnownSlides,
        stages: SlideStages,
        leases: Leases,
        staging: Staging | None,
        records: SlideRecords,
        progress: Progress,
    ) -> None:
        self._command, self._known, self._stages = command, known, stages
        self._leases, self._staging, self._records, self._progress = leases, staging, records, progress
        self.stopped = False

    def stop(self) -> None:
        """From any thread: give all slides back, and start no other. Tasks stop when they ask for their lease."""
        self.stopped = True
        self._leases.release_all()

    async def attempt(self, source: Source) -> SlideRecord | None:
        """The slide's record, whatever happens to it; None where another run has it.

        Raises ClusterLost; WorkersDied, of which another slide may be the cause.
        """
        folder = self._command.folder.slide(source.name)
        try:
            if source.skip:
                return await asyncio.to_thread(self._known.left_out, source)
            # of os.path, as pathlib refuses links in a circle
            regions = await asyncio.to_thread(region_file, source, self._command.settings.regions)
            path = Path(os.path.realpath(source.path))
            job = Job(path, folder, self._command.settings, source.scale, regions, overwrite=self._command.overwrite)
            known = await asyncio.to_thread(self._look, source, job)
            if known is not None:
                return known
            if self._staging is None:
                return await self._leased(source, job)
            async with self._staging.room(source.files) as room:
                return await self._leased(source, job, room)
        except Exception as raised:
            error = first_error(raised)
            if isinstance(error, ClusterLost | WorkersDied):
                raise error from None
            if isinstance(error, LeaseLost):
                return None
            error = explained(error, self._command.folder, folder)
            if self._staging is not None:
                error = self._staging.of_original(error, source.place)
            return await self.fail(source, error)

    async def fail(self, source: Source, error: Exception) -> SlideRecord:
        """The record of a slide that failed, which is said."""
        record = await asyncio.to_thread(self._failed, source, error)
        self._progress.say(f"{source.name}: FAILED: {record.cause}")
        return record

    def _failed(self, source: Source, error: Exception) -> SlideRecord:
        """The record of a slide that failed, noted in its folder.

        Not where a link would lead elsewhere, nor where the run's folder was removed: what is put back there, or
        mounted, would meet a new one.
        """
        run = self._command.folder
        if not os.path.exists(run.run_json) or any(run.links(source.name)):
            return SlideRecord(source.name, "failed", one_line(error))
        return write_failure(run.slide(source.name), source.name, source.place, error)

    def _look(self, source: Source, job: Job) -> SlideRecord | None:
        """As `KnownSlides.look`; of a slide that is done, what it lacks is made."""
        record = self._known.look(source, job)
        if record is not None and record.status == DONE_OTHERWISE:
            self._progress.say(f"{source.name}: NOT DONE AGAIN: {record.cause}")
        elif record is not None and record.done:
            self._complete(source.name, job)
            missing = finished.missing_results(job.folder)
            record = dataclasses.replace(record, remarks=(*missing, *record.remarks))
            lines = [f"{source.name}: done before, {counted_nuclei(record.nuclei)}"]
            self._progress.say("\n".join([*lines, *(f"    WARNING: {problem}" for problem in missing)]))
        return record

    def _complete(self, name: str, job: Job) -> None:
        """Make the exports that a finished slide lacks, and remove what a killed run left beside it."""
        folder = job.folder
        leftovers = [*folder.all_discarded_work(), *folder.half_written(), *folder.path.glob(folder.lease.name)]
        untidy = leftovers or (folder.work.exists() and not self._command.execution.keep_work)
        stale = finished.stale_exports(folder, job.settings.export)
        if not (untidy or stale) or not self._leases.take(folder.path):
            return
        try:
            job = dataclasses.replace(job, lease=self._leases.file(folder.path))
            with checked_between_groups(job.check_lease):
                made = finished.refresh_exports(folder, job.settings.export)
            finished.remove_half_written(folder)
            if made:
                self._progress.say(f"{name}: {', '.join(made)} made from {folder.nuclei.name}")
            if not self._command.execution.keep_work:
                remove_work(job)
        finally:
            self._leases.release(folder.path)

    async def _leased(self, source: Source, job: Job, room: Room | None = None) -> SlideRecord | None:
        """Take the slide and do it, in its room if it is to be copied first; None where another run has it."""
        if self.stopped or not await asyncio.to_thread(self._leases.take, job.folder.path):
            return None
        try:
            known = await asyncio.to_thread(self._look, source, job)  # it may have ended before we took it
            job = dataclasses.replace(job, lease=self._leases.file(job.folder.path))
            if known is None and room is not None:
                job = await self._copied(source, job, room)
                known = await asyncio.to_thread(self._look, source, job)
            return known or await self._owned(source, job)
        finally:
            await asyncio.to_thread(self._leases.release, job.folder.path)

    async def _copied(self, source: Source, job: Job, room: Room) -> Job:
        """The job on a copy of its slide."""
        assert self._staging is not None
        since = time.perf_counter()
        job = await self._staging.copy(source.files, room, job)
        took = time.perf_counter() - since
        self._progress.say(f"{source.name}: copied, {room.bytes / 1e9:.2f} GB in {took:.1f} s")
        return job

    async def _owned(self, source: Source, job: Job) -> SlideRecord | None:
        """The record of a slide, which is ours, after all stages; None where another run has taken it over."""
        try:
            self._records.begin(source.name)
            if not self._command.overwrite and job.folder.slide_json.exists():  # else it would be done
                file = job.folder.slide_json.name
                self._progress.say(f"WARNING: {source.name}: {file} is damaged, so the slide is done again")
            record = await self._stages.process(source.name, job)
            job.folder.failure_json.unlink(missing_ok=True)
            if not self._command.execution.keep_work:
                await asyncio.to_thread(remove_work, job)
            if self._command.overwrite:
                self._command.folder.regions.unlink(missing_ok=True)  # it has rows of this slide as it was
            self._progress.say(ledger.terminal_lines(record))
            return record
        except Exception as error:
            # whoever has taken the slide over has changed its files: an error of ours means nothing then
            if isinstance(first_error(error), ClusterLost) or not await asyncio.to_thread(self._is_taken_over, job):
                raise
            return None

    def _is_taken_over(self, job: Job) -> bool:
        """Whether a slide that we took is another run's now, or was done by one that we took it from."""
        return not self._leases.ours(job.folder.path) or self._known.is_done(job)
