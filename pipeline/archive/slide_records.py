"""What became of the slides of a command: in the ledger while it runs, in the ledger and the report at its end."""

import asyncio
import contextlib
import time
from pathlib import Path

from pipeline import files
from pipeline.archive import ledger
from pipeline.archive.command import Command
from pipeline.archive.known import KnownSlides
from pipeline.archive.progress import Progress, SaidErrors
from pipeline.report.page import write_report
from pipeline.segment.record import SlideRecord

_POLL_S = 5.0  # between looks at whether the ledger is to be written again
_LEDGER_SHARE = 20  # times as long as the ledger takes to write passes before the next: it looks at every slide


class SlideRecords:
    """A record for every slide of a command, and those of the slides that other commands have left in the folder."""

    def __init__(self, command: Command, known: KnownSlides, progress: Progress) -> None:
        self._command, self._known, self._progress = command, known, progress
        self._begun: set[str] = set()  # slides whose stages have begun
        self._own: dict[str, SlideRecord] = {}
        self._ended = False

    async def warn_of_others(self) -> None:
        """Where a file has results by another name, which another command has left in the folder, say so."""
        names = (await asyncio.to_thread(self._others)).names
        for source in self._command.archive.sources if names else ():
            if (name := names.get(source.files.place)) is not None and not (source.skip or source.problem):
                self._progress.say(
                    f"WARNING: {source.name}: its file has results as {name}, by a command that was given another "
                    f"folder: all its nuclei will be there twice"
                )

    def _others(self) -> ledger.OtherSlides:
        """What other commands have left in the folder until now: those that run beside this one, too."""
        return self._known.others({source.name for source in self._command.archive.sources})

    def begin(self, name: str) -> None:
        """The stages of a slide begin."""
        self._begun.add(name)

    def end(self, name: str, record: SlideRecord) -> None:
        """A slide has come to its end, for this command."""
        self._own[name] = record
        self._progress.ended(name, failed=record.status == "failed")

    def end_all(self) -> None:
        """No slide is worked at any more: those that have begun are interrupted."""
        self._ended = True

    def all(self) -> list[SlideRecord]:
        """A record for every slide of the command, whatever became of it."""
        return [self._record(source.name) for source in self._command.archive.sources]

    def _record(self, name: str) -> SlideRecord:
        own = self._own.get(name)
        if own is not None and own.status != "locked":
            return own
        with contextlib.suppress(OSError):  # a file server that does not answer for one slide
            if (elsewhere := self._known.elsewhere(name)) is not None:
                return elsewhere
        begun = "interrupted" if self._ended else "unfinished"  # which it stays where this process is killed
        return own or SlideRecord(name, begun if name in self._begun else "waiting")

    async def keep_ledger(self) -> None:
        """Write the ledger again whenever a slide has begun or ended since, but not all the time."""
        written, due = (0, 0), 0.0
        errors = SaidErrors(self._progress, f"writing {self._command.folder.ledger.name}")
        while True:
            await asyncio.sleep(_POLL_S)
            state = len(self._begun), len(self._own)
            if state != written and time.monotonic() >= due:
                started = time.monotonic()
                with errors:
                    await self.write_ledger()
                    written = state
                due = time.monotonic() + _LEDGER_SHARE * (time.monotonic() - started)

    async def write_ledger(self) -> None:
        """Of all slides as they are now; where it cannot be written the run goes on."""
        run = self._command.folder
        try:
            await asyncio.to_thread(lambda: ledger.write_ledger(run, [*self.all(), *self._others().records]))
        except OSError as error:
            self._progress.say(_not_written(run.ledger, error))

    def publish(self) -> list[SlideRecord]:
        """Write the ledger and the report, each whatever becomes of the other, and say what a reader should know.

        A full disk, a missing folder, or a file that another program has open, is a warning and no error. Returns
        the records of the command's slides as they are written.
        """
        run, own = self._command.folder, self.all()
        records = [*own, *self._others().records]
        rows = [ledger.row_of(record) for record in records]
        if warning := ledger.mixed_computation(rows):
            self._progress.say(f"WARNING: {warning}")
        if self._command.settings.stain.method == "auto" and (stains := ledger.mixed_stains(rows)):
            self._progress.say(stains)
        try:
            ledger.write_ledger(run, records)
        except OSError as error:
            self._progress.say(_not_written(run.ledger, error))
        try:
            self._progress.say(f"report: {write_report(run, rows)}")
        except OSError as error:
            self._progress.say(_not_written(run.report, error))
        return own


def _not_written(file: Path, error: OSError) -> str:
    return f"WARNING: {file.name} could not be written: {files.refusal(error) or error}"
