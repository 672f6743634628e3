"""What the folder of results says of a slide: done before, done or failed in another run meanwhile, or still to do."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipeline import files
from pipeline.archive import ledger
from pipeline.archive.failures import read_failure
from pipeline.archive.inputs.sources import IN_MANIFEST, Source
from pipeline.archive.manifest import check_run
from pipeline.config import Settings
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.segment import finished
from pipeline.segment.job import Job, Part
from pipeline.segment.record import SlideRecord, read_record, read_slide_json
from pipeline.text import one_line
from slides.errors import NightslideError, SlideNotFound
from slides.scale import BY_DEFAULT, FORCED

BY_SIZE_ALONE = "taken as done by its size alone, as its server states neither date nor tag"
"A remark."

DONE_OTHERWISE = "done otherwise"
"The status of a slide whose results are kept, though the command asked for others, or its file is another: see cause."


class KnownSlides:
    """What is known of slides without processing them, as several commands on one folder leave it."""

    def __init__(self, folder: RunFolder, settings: Settings, overwrite: str) -> None:
        """overwrite: as in `Job`; results of other rounds are to be made again."""
        self._folder, self._settings, self._overwrite = folder, settings, overwrite
        self._failures_ns: dict[str, int | None] = {}  # mtime of failure.json as each slide was first looked at

    def look(self, source: Source, job: Job) -> SlideRecord | None:
        """The record of a slide that is done, or at which another run has failed meanwhile; None for one that is to do.

        Raises RunError for a slide that must not be processed, and for results that are damaged; OSError for those
        that cannot be read now. Those that are whole, but not of this job, are DONE_OTHERWISE.
        """
        if source.problem:
            if (record := self.finished(source.name)) is not None:
                return _otherwise(record, source.problem)
            raise RunError(source.problem)
        self._folder.run_json.stat()  # an output folder that was removed is not made again
        check_run(self._folder, self._settings)
        for link in self._folder.links(source.name):
            raise RunError(f"{link} is a symbolic link, through which nothing is written: remove it")
        content = files.read_json_if_there(job.folder.slide_json)
        if content is None or not self._counts(content):
            return self._failed(source.name)
        for damage in finished.damaged_results(job.folder, content, thorough=False):
            raise RunError(damage)
        record = read_record(content, source.name)
        try:
            if not self._is_of(job, source, record, content):
                return None
        except NightslideError as error:  # such as a slide of another name
            return _otherwise(record, one_line(error))
        job.folder.failure_json.unlink(missing_ok=True)  # of a command that was refused
        guessed = source.remote is not None and not (content.get("source_mtime_ns") or content.get("source_etag"))
        remarks = (*([BY_SIZE_ALONE] if guessed else []), *record.remarks)
        return dataclasses.replace(record, status="done before", remarks=remarks)

    def _is_of(self, job: Job, source: Source, record: SlideRecord, content: Mapping[str, Any]) -> bool:
        """Whether results are of this job; False where that is not known yet. Raises SlideError or RunError if not."""
        if content["digest"] != job.digest:
            raise RunError(
                f"{job.folder.path} holds results of other {finished.difference(job, content)}: "
                f"choose another --out, or give --overwrite"
            )
        uncopied = source.remote is not None and job.original is None  # it is copied where only its content tells
        if uncopied and _has_its_own_scale_again(record, job):
            return False
        _check_scale(record, job)
        then = finished.known_parts(content)
        parts_unchanged = finished.are_unchanged(_parts(source, job, then), then)
        if finished.is_unchanged(job.original or source.files.origin(), content) and parts_unchanged:
            return True
        if uncopied:
            return False
        finished.check_same_source(job.source, content)
        if lost := record.work.counts.area_lost_mm2:
            raise RunError(
                f"the file has changed since it was done, when {lost:.3g} mm2 of it could not be read: "
                f"give --overwrite to do it again, or put the old file back"
            )
        return True

    def is_done(self, job: Job) -> bool:
        """Whether a slide has results that are not to be made again, whoever made them."""
        content = files.read_json(job.folder.slide_json)
        return content is not None and self._counts(content)

    def elsewhere(self, name: str) -> SlideRecord | None:
        """The record of a slide that another run has finished, or failed at; the results are not looked at."""
        content = read_slide_json(self._folder.slide(name))
        if content is None:
            return self._failed(name)
        return read_record(content, name) if self._counts(content) else None

    def left_out(self, source: Source) -> SlideRecord:
        """The record of a slide that the command skips: done before, where it has results to be kept.

        Raises RunError where these are damaged.
        """
        folder = self._folder.slide(source.name)
        content = read_slide_json(folder)
        if content is None or not self._counts(content):
            return SlideRecord(source.name, "skipped", source.skip)
        for damage in finished.damaged_results(folder, content, thorough=False):
            raise RunError(damage)
        folder.failure_json.unlink(missing_ok=True)  # of a command that met the damage
        return dataclasses.replace(read_record(content, source.name), status="done before")

    def finished(self, name: str) -> SlideRecord | None:
        """The record of a slide that has results which are not to be made again; they are not looked at."""
        content = read_slide_json(self._folder.slide(name))
        return read_record(content, name) if content is not None and self._counts(content) else None

    def others(self, own: Collection[str]) -> ledger.OtherSlides:
        """The slides that other commands have left in the folder, all but those of these names."""
        return ledger.other_slides(self._folder, own, self._settings)

    def _counts(self, content: Mapping[str, Any]) -> bool:
        """Whether results are not to be made again: with --overwrite those of its round, by this command or another."""
        return not self._overwrite or content.get("overwrite") == self._overwrite

    def _failed(self, name: str) -> SlideRecord | None:
        """The record of a slide at which another run has failed since it was first looked at, which may be now.

        A failure from before is tried again. Times are only compared for being the same: the clocks of machines differ.
        """
        folder = self._folder.slide(name)
        written = files.mtime_ns(folder.failure_json)
        before = self._failures_ns.setdefault(name, written)
        return read_failure(folder, name) if written not in (None, before) else None


def _otherwise(record: SlideRecord, cause: str) -> SlideRecord:
    """The record of results that are kept, with the reason why those that were asked for are not made."""
    remarks = (f"not done again: {cause}", *record.remarks)
    return dataclasses.replace(record, status=DONE_OTHERWISE, cause=cause, remarks=remarks)


def _parts(source: Source, job: Job, known: Iterable[Part]) -> dict[str, Part]:
    """Those of these files of a slide that are there, as they are now, by their names. Raises SlideError, OSError."""
    if job.original is not None:
        return {part.name: part for part in job.original.parts or ()}
    now = {}
    for part in known:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, SlideNotFound):
            now[part.name] = source.files.part(part.name)
    return now


def _has_its_own_scale_again(record: SlideRecord, job: Job) -> bool:
    """Whether a slide was done at a scale that was given for it, whatever it states, and now none is given so."""
    return record.mpp_source in (FORCED, IN_MANIFEST) and job.scale.mpp is None


def _check_scale(record: SlideRecord, job: Job) -> None:
    """Raise RunError where a slide was done at another scale than it has now: as is given, or as it states."""
    now = job.scale.mpp
    if now is None and record.mpp_source == BY_DEFAULT:
        now = job.scale.default_mpp
    if _has_its_own_scale_again(record, job):
        now = finished.own_mpp(job)
    if now is not None and record.mpp != round(now, 6):
        raise RunError(f"it was done at mpp={record.mpp}, now mpp={now:g}: choose another --out, or --overwrite")
