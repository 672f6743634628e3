"""Why a slide failed: in words, and in its failure.json, where other runs on the same folder read it."""

import os
import traceback
from pathlib import Path

from pipeline import files
from pipeline.errors import RunError
from pipeline.files import FULL_DISK
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.record import SlideRecord
from pipeline.text import one_line, printable


def first_error(error: BaseException) -> Exception:
    """The first exception in the groups that task groups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def explained(error: Exception, run: RunFolder, slide: SlideFolder) -> Exception:
    """What to do about an error of a slide, where the run's folder is gone, a disk is full or a file is refused.

    Else the error itself.
    """
    if not os.path.exists(run.run_json):  # whatever it looks like
        return RunError(f"{run.path} is not there any more: put it back, and run the same command again")
    if (full := _full_disk(error, slide.path)) is not None:
        return RunError(f"no space left in {full}: free some space, and run the same command again")
    if isinstance(error, OSError) and (refused := files.refusal(error)):
        return RunError(refused)
    return error


def _full_disk(error: BaseException, written: Path) -> Path | None:
    """The folder in which no space, or no quota, was left, where that was the cause; `written`: where we write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return Path(os.fsdecode(cause.filename)).parent if isinstance(cause.filename, str | bytes) else written
        cause = cause.__cause__ or cause.__context__
    return None


def write_failure(folder: SlideFolder, name: str, source: str, error: BaseException) -> SlideRecord:
    """Note in the slide's folder, where it can be written, why it failed. Returns its record."""
    cause = one_line(error)
    trace = [printable(line) for line in traceback.format_exception(error)]
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        files.write_json(folder.failure_json, {"source": printable(source), "cause": cause, "traceback": trace})
    except OSError:
        pass  # a full disk or a missing folder may itself be the cause, which is in the record
    return SlideRecord(name, "failed", cause)


def read_failure(folder: SlideFolder, name: str) -> SlideRecord:
    """The failure that is noted in the slide's folder."""
    return SlideRecord(name, "failed", str((files.read_json(folder.failure_json) or {}).get("cause", "")))
