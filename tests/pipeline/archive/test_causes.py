"""What is said of an error of a slide, where something can be done about it."""

import errno
from pathlib import Path

import pytest

from pipeline.archive.failures import explained, read_failure, write_failure
from pipeline.layout import RunFolder


def caused(error: Exception, cause: BaseException | None = None, context: BaseException | None = None) -> Exception:
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full", "/disk/scratch/x.npz"), "no space left in /disk/scratch: free some space"),
        (OSError(errno.EDQUOT, "full", b"/disk/scratch/x.npz"), "no space left in /disk/scratch: free some space"),
        (OSError(errno.ENOSPC, "full"), "no space left in {slide}: free some space"),
        (caused(ValueError("zarr"), cause=OSError(errno.ENOSPC, "full")), "no space left in {slide}: "),
        (caused(ValueError("zarr"), context=OSError(errno.ENOSPC, "full")), "no space left in {slide}: "),
        (OSError(errno.EACCES, "no", "/disk/x"), "/disk/x: Permission denied: make it a file or folder that may be"),
        (caused(ValueError("zarr"), cause=OSError(errno.EACCES, "no", "/disk/x")), "zarr"),
        (OSError(errno.ENOENT, "gone", "/disk/x"), "[Errno 2] gone: '/disk/x'"),
        (ValueError("odd"), "odd"),
    ],
)
def test_the_remedy_of_an_error_is_said(tmp_path: Path, error: Exception, said: str) -> None:
    run = RunFolder(tmp_path)
    slide = run.slide("a")
    run.run_json.touch()
    assert str(explained(error, run, slide)).startswith(said.format(slide=slide.path))
    run.run_json.unlink()  # whatever the error looks like
    assert str(explained(error, run, slide)).startswith(f"{run.path} is not there any more: put it back")


def test_a_failure_reads_back_and_one_that_is_damaged_has_no_cause(tmp_path: Path) -> None:
    """Law: it is noted whether the slide's folder is there or not, and again."""
    slide = RunFolder(tmp_path).slide("2024/a")
    for cause in ("first", "second"):
        written = write_failure(slide, "2024/a", "a.svs", ValueError(cause))
        assert read_failure(slide, "2024/a") == written
        assert written.cause == cause
    slide.failure_json.write_text("{")
    assert read_failure(slide, "2024/a").cause == ""
