"""Runs that fail: each error is a clear line of the ledger, affects nothing else, and can be corrected."""

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from oracle import chosen, files, paint
from pipeline.archive import all_slides, slide_stages
from pipeline.archive import run as archive_run
from pipeline.archive.lease import Leases
from pipeline.archive.ledger import read_ledger
from pipeline.archive.manifest import open_run, resolve
from pipeline.archive.run import run
from pipeline.archive.stream import Stream
from pipeline.archive.workers import watch
from pipeline.archive.workers.executors import Loop, Threads, open_threads
from pipeline.config import Execution, Settings
from pipeline.errors import RunError, ScratchLost
from pipeline.layout import RunFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches, concat
from pipeline.segment import predictions, stages
from pipeline.segment.job import Job
from pipeline.segment.record import SlideRecord, StageRecord

ONE = Execution(cluster=False, workers=1)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        paint(folder / f"{name}.png", seed)
        os.utime(folder / f"{name}.png", (1_700_000_000, 1_700_000_000))
    (folder / "list.csv").write_text("path\na.png\nb.png\n")
    return folder


def segment(archive: Path, out: Path, execution: Execution = ONE, **more: Any) -> dict[str, SlideRecord]:
    more = {"detect": oracle.detect, "say": lambda line: None, **more}
    rows = run([archive / "list.csv"], out, chosen(), execution, mpp=0.25, **more)
    return {row.slide: row for row in rows}


def test_a_slide_that_changes_between_runs_is_refused_and_its_results_stay(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    before = files(out / "a")
    os.utime(archive / "a.png")  # only copied, say: the same slide
    assert segment(archive, out)["a"].status == "done before"
    paint(archive / "a.png", 2)
    rows = segment(archive, out)
    assert rows["a"].status == "done otherwise"
    assert "is not the file that these results are of" in rows["a"].cause
    assert rows["b"].status == "done before"
    assert files(out / "a") == before
    assert segment(archive, out, Execution(cluster=False, workers=1, overwrite=True))["a"].status == "done"
    assert files(out / "a") != before
    assert not (out / "a" / "failure.json").exists()


def test_a_slide_that_changes_while_its_work_is_half_done_is_refused(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slide_stages, "STAGES", without_stitching())
        assert segment(archive, out)["a"].cause == "stitching failed"
    assert list((out / "a" / "work" / "instances").glob("*.parquet"))
    paint(archive / "a.png", 2)
    rows = segment(archive, out)
    assert "is not the file this work was started on" in rows["a"].cause
    assert rows["b"].status == "done"


def test_half_done_work_at_another_scale_is_refused(archive: Path, tmp_path: Path) -> None:
    """Its nuclei are in pixels of the scale that it was begun at."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slide_stages, "STAGES", without_stitching())
        segment(archive, out)
    (row, *_) = run([archive / "a.png"], out, chosen(), ONE, mpp=0.26, detect=oracle.detect, say=lambda line: None)
    assert "work was started at 0.25 um/px (default by --mpp), now it has 0.26" in row.cause
    assert (out / "a" / "failure.json").exists()
    assert segment(archive, out)["a"].status == "done"
    assert not (out / "a" / "failure.json").exists()


def without_stitching() -> tuple[stages.Stage, ...]:
    """The stages, of which stitching fails."""

    def fail(*_: Any) -> StageRecord:
        raise RuntimeError("stitching failed")

    return tuple(stage._replace(run=fail) if stage.name == "stitch" else stage for stage in stages.STAGES)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ScratchLost("block 3 is damaged"), "block 3 is damaged, again and again: is the disk sound?"),
        (FileNotFoundError(errno.ENOENT, "gone", "a.parquet"), "[Errno 2] gone: 'a.parquet'"),
        (RuntimeError("no scratch"), "no scratch"),
    ],
)
@pytest.mark.parametrize("lost", [2, 3])
def test_scratch_that_is_lost_is_made_again_and_at_the_third_time_the_slide_fails(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, error: Exception, cause: str
) -> None:
    """Law: any other error fails it at once."""
    tries: list[str] = []

    def stitch(job: Job) -> StageRecord:
        tries.append(job.folder.name)
        if tries.count("a") <= lost and job.folder.name == "a":
            raise error
        return stages.stitch_slide(job)

    again = (stage._replace(run=stitch) if stage.name == "stitch" else stage for stage in stages.STAGES)
    monkeypatch.setattr(slide_stages, "STAGES", tuple(again))
    rows = segment(archive, tmp_path / "out")
    is_lost = not isinstance(error, RuntimeError)
    assert tries.count("a") == (3 if is_lost else 1)
    assert (rows["a"].status, rows["a"].cause) == (("done", "") if is_lost and lost < 3 else ("failed", cause))
    assert rows["b"].status == "done"


def test_a_full_disk_is_reported_and_what_was_done_stays(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
        rows = segment(archive, out)
    assert {row.status for row in rows.values()} == {"failed"}
    assert "are needed for the blocks in flight: free some space" in rows["a"].cause

    wrote = predictions.write_predictions

    def full(path: Path, *arguments: Any) -> None:
        if "a" in path.parts and path.name == "000002.npz":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        wrote(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_predictions", full)
        rows = segment(archive, out)
    where = out / "a" / "work" / "predictions"
    assert rows["a"].cause == f"no space left in {where}: free some space, and run the same command again"
    assert rows["b"].status == "done"
    done = {path.name: path.stat().st_mtime_ns for path in (out / "a" / "work" / "instances").iterdir()}
    assert done
    resumed: list[str] = []

    def watched(path: Path, *arguments: Any) -> None:
        resumed.append(path.stem)
        wrote(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_predictions", watched)
        assert segment(archive, out)["a"].status == "done"
    assert resumed
    assert not {Path(name).stem for name in done} & set(resumed), "a block was done twice"


@pytest.mark.parametrize("stage", [stage.name for stage in stages.STAGES])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_whatever_stage_meets_it(
    stage: str, number: int, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: value, rule, remedy. Without a file's name it is the slide's folder; hidden causes count."""

    def fail(*_: Any) -> StageRecord:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("the library failed") from error

    failing = tuple(s._replace(run=fail, needed=lambda settings: True) if s.name == stage else s for s in stages.STAGES)
    monkeypatch.setattr(slide_stages, "STAGES", failing)
    rows = segment(archive, tmp_path / "out")
    remedy = "free some space, and run the same command again"
    assert rows["a"].cause == f"no space left in {tmp_path / 'out' / 'a'}: {remedy}"


def test_a_slides_folder_that_may_not_be_written_is_named_with_the_remedy(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another user: each such slide failed with the random name of a file that is not there."""
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.startswith(".lease-") and path.parent.name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    rows = segment(archive, tmp_path / "out")
    remedy = "make it a file or folder that may be read and written, and give the same command again"
    assert rows["a"].cause == f"{tmp_path / 'out' / 'a'}: Permission denied: {remedy}"
    assert rows["b"].status == "done"


def test_a_slides_folder_that_may_not_be_entered_costs_the_others_no_row(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: one slide cannot end a run. Until its turn there was no ledger, and after Ctrl-C no report."""
    look, said = Path.stat, list[str]()

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "a" and path.parent.parent.name == "out":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    run([archive / "list.csv"], tmp_path / "out", chosen(), ONE, mpp=0.25, say=said.append, detect=oracle.detect)
    assert not [line for line in said if "could not be written" in line]
    assert any(line.startswith("b: ") and "nuclei" in line for line in said)


def unreadable(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Files of these names cannot be read: the disk or the file server fails."""
    read = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)


def test_results_that_cannot_be_read_for_a_while_are_not_made_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They counted as missing, and were replaced: by those of another slide, too, where its file had changed."""
    out = tmp_path / "out"
    segment(archive, out)
    before = files(out / "a")
    paint(archive / "a.png", 2)
    with monkeypatch.context() as patched:
        unreadable(patched, "slide.json")
        rows = segment(archive, out)
    assert [row.status for row in rows.values()] == ["failed", "failed"]
    what = "Input/output error: look whether the disk or file server is in order"
    assert rows["a"].cause == f"{out / 'a' / 'slide.json'}: {what}, and give the same command again"
    assert files(out / "a") == before
    assert [row.status for row in segment(archive, out).values()] == ["done otherwise", "done before"]


def test_a_round_of_overwriting_that_cannot_be_read_is_not_replaced(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that it has done would be done again."""
    run_json = RunFolder(tmp_path / "out").run_json
    open_run(RunFolder(tmp_path / "out"), resolve(chosen()), overwrite=True)
    before = run_json.read_bytes()
    for overwrite in (True, False):
        with monkeypatch.context() as patched:
            unreadable(patched, "run.json")
            with pytest.raises(RunError, match="Input/output error"):
                segment(archive, tmp_path / "out", Execution(cluster=False, workers=1, overwrite=overwrite))
        assert run_json.read_bytes() == before


def test_a_slide_that_a_file_server_does_not_show_costs_neither_ledger_nor_report(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are not done, here as another run has it, it is asked at the end what has become of them."""
    out, stat = tmp_path / "out", Path.stat
    with Leases() as other:
        other.take(out / "a")

        def stale(path: Path, **options: Any) -> os.stat_result:
            if path == out / "a" / "failure.json" and (out / "b" / "slide.json").is_file():
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", stale)
        rows = segment(archive, out, Execution(cluster=False, workers=1, wait=False))
    assert [row.status for row in rows.values()] == ["locked", "done"]
    assert [row["status"] for row in read_ledger(RunFolder(out))] == ["locked", "done"]
    assert (out / "report.html").is_file()


def test_a_file_in_the_place_of_a_slides_folder_costs_the_others_no_row(archive: Path, tmp_path: Path) -> None:
    """Law: one slide cannot end a run. No ledger could be written, and the slide's cause had no remedy."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    said = list[str]()
    rows = segment(archive, tmp_path / "out", say=said.append)
    assert (rows["a"].status, rows["b"].status) == ("failed", "done")
    assert rows["a"].cause.startswith(f"{tmp_path / 'out' / 'a'}: File exists: move away the file that is in the place")
    assert "failed" in (tmp_path / "out" / "ledger.csv").read_text()
    assert not [line for line in said if "could not be written" in line]


def test_a_ledger_that_another_program_has_open_costs_no_report(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a spreadsheet on Windows has it."""
    out, said = tmp_path / "out", list[str]()

    def refuse(partial: Path, path: Path, replace: Callable[..., None] = os.replace) -> None:
        if path.name == "ledger.csv":
            raise PermissionError(errno.EACCES, "Access is denied", str(partial))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", refuse)
    rows = run([archive / "list.csv"], out, chosen(), ONE, mpp=0.25, say=said.append, detect=oracle.detect)
    assert [row.status for row in rows] == ["done", "done"]
    assert (out / "report.html").is_file()
    assert any(line.startswith(f"WARNING: ledger.csv could not be written: {out / 'ledger.csv'}: ") for line in said)


def test_an_output_folder_that_vanishes_ends_the_run_without_an_error(archive: Path, tmp_path: Path) -> None:
    out, away = tmp_path / "out", tmp_path / "away"

    def gone(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        if out.exists():
            out.rename(away)
        yield from oracle.detect(patches, normalisation, settings)

    rows = segment(archive, out, detect=gone)
    assert [row.status for row in rows.values()] == ["failed", "failed"]
    assert "is not there any more: put it back" in rows["b"].cause
    assert not out.exists()  # or what is put back would come to lie inside it
    away.rename(out)
    for lease in out.glob("*/.lease"):  # of a process that lives on: this one
        shutil.rmtree(lease)
    assert {row.status for row in segment(archive, out).values()} == {"done"}


def test_a_run_json_that_is_damaged_is_reported(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    written = (out / "run.json").read_text()
    digest = json.loads(written)["digest"]
    others = {"digest": "another", "settings": {"tiling": {}}}  # as of a version without the checksum
    damaged = [
        *("", "{}", "[1]", '{"digest": "a'),
        written.replace(digest, f"{digest[:-1]}x"),  # it was called one of other settings
        *(json.dumps({**others, name: value}) for name, value in (("settings", [1]), ("settings", {"tiling": 1}))),
        json.dumps({**others, "digest": digest, "versions": "x"}),
    ]
    for content in damaged:
        (out / "run.json").write_text(content)
        with pytest.raises(RunError, match=r"run\.json is damaged .* delete it"):
            segment(archive, out)
    (out / "a" / "slide.json").write_text("{")
    (out / "run.json").unlink()
    rows = segment(archive, out)
    assert (rows["a"].status, rows["b"].status) == ("done", "done before")


def test_overwriting_restarts_with_other_settings_even_half_done_work(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slide_stages, "STAGES", without_stitching())
        segment(archive, out)
    rows = run(
        [archive / "list.csv"],
        out,
        chosen(tile=64, block=1),
        Execution(cluster=False, workers=1, overwrite=True),
        mpp=0.25,
        say=lambda line: None,
        detect=oracle.detect,
    )
    assert [row.status for row in rows] == ["done", "done"]
    assert rows[0].tiles > 20


def test_a_slide_that_another_run_has_is_left_to_it(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Leases() as other:
        other.take(out.resolve() / "a")
        rows = segment(archive, out, Execution(cluster=False, workers=1, wait=False))
        assert (rows["a"].status, rows["b"].status) == ("locked", "done")
        assert str(os.getpid()) in rows["a"].cause
    assert segment(archive, out)["a"].status == "done"


def test_a_slide_that_another_run_gives_back_is_not_left_to_nobody(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called locked, by nobody, and the exit status was 0: each of two runs may have left it to the other."""
    out, holder = tmp_path / "out", Leases.holder
    monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
    with Leases() as other:
        other.take(out / "a")

        def given_back(leases: Leases, folder: Path) -> str:
            other.release(out / "a")
            return holder(leases, folder)

        monkeypatch.setattr(Leases, "holder", given_back)
        rows = segment(archive, out, Execution(cluster=False, workers=1, wait=False))
    assert [row.status for row in rows.values()] == ["done", "done"]


@pytest.mark.parametrize("wait", [True, False])
def test_results_that_cannot_be_written_for_a_moment_cost_no_slide(
    wait: bool, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease that could not be given back then was taken for another run's: with --no-wait the slide was left to
    ourselves, with exit status 0; else it was waited for, three minutes.
    """
    out, release, utime, unlink = tmp_path / "out", Leases.release, os.utime, Path.unlink
    away = [False]

    def refuse(path: Any) -> None:
        if away[0] and out in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def touches(path: Any, *given: Any) -> None:
        refuse(path)
        utime(path, *given)

    def unlinks(path: Path, *given: Any, **named: Any) -> None:
        refuse(path)
        unlink(path, *given, **named)

    def comes_back(leases: Leases, folder: Path) -> None:
        release(leases, folder)
        away[0] = False

    def goes_away(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        if not tried:
            tried.append(1)
            away[0] = True
        yield from oracle.detect(patches, normalisation, settings)

    tried = list[int]()
    monkeypatch.setattr(os, "utime", touches)
    monkeypatch.setattr(Path, "unlink", unlinks)
    monkeypatch.setattr(Leases, "release", comes_back)
    monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
    since = time.monotonic()
    one = Execution(cluster=False, workers=1, wait=wait)
    (row,) = run([archive / "a.png"], out, chosen(), one, mpp=0.25, say=lambda line: None, detect=goes_away)
    assert (row.status, row.cause) == ("done", "")
    assert time.monotonic() - since < 100


def test_a_slide_that_was_left_to_another_run_is_done_once_that_has_done_it(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, holder, asked = tmp_path / "out", Leases.holder, threading.Event()
    with Leases() as other:
        other.take(out.resolve() / "a")

        def asks(leases: Leases, folder: Path) -> str:
            who = holder(leases, folder)
            asked.set()
            return who

        def another_ends(*_: Any) -> None:  # before b, when a has been left to it
            if other.ours(out.resolve() / "a"):
                assert asked.wait(30)
                other.release(out.resolve() / "a")
                run([archive / "a.png"], out, chosen(), ONE, mpp=0.25, say=lambda line: None, detect=oracle.detect)

        monkeypatch.setattr(Leases, "holder", asks)
        monkeypatch.setattr(slide_stages, "_check_space", another_ends)
        rows = segment(archive, out, Execution(cluster=False, workers=1, wait=False))
    assert [row.status for row in rows.values()] == ["done", "done"]
    assert rows["a"].nuclei > 0


def test_a_slide_at_which_another_run_fails_meanwhile_is_not_tried_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cause is that of the other run; nobody says that it is done."""
    out, failed, said = tmp_path / "out", list[SlideRecord](), list[str]()

    def fails(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        raise RuntimeError("the other's error")

    def another_fails(*_: Any) -> None:  # while a is done, and b was not looked at since the start
        if not failed:
            failed.append(SlideRecord("b", "waiting"))
            (failed[0],) = run([archive / "b.png"], out, chosen(), ONE, mpp=0.25, say=lambda line: None, detect=fails)

    monkeypatch.setattr(slide_stages, "_check_space", another_fails)
    monkeypatch.setattr(all_slides.AllSlides, "_open_slides", lambda _: 1)
    rows = segment(archive, out, say=said.append)
    assert [row.status for row in rows.values()] == ["done", "failed"]
    assert rows["b"] == failed[0] == SlideRecord("b", "failed", "the other's error")
    assert not [line for line in said if line.startswith("b: ")]
    assert [row.status for row in segment(archive, out).values()] == ["done before", "done"]


class KilledWorker(Exception):
    """Named as Dask's error of a task that ended several workers."""


class OneWorker(Loop):
    """A worker process that dies of some slides so often, and takes what it does beside with it."""

    def __init__(self, deaths: dict[str, int]) -> None:
        self.deaths = deaths

    def submit(self, on_device: bool, function: Callable[..., Any], *args: Any) -> Future[Any]:
        name = args[0].folder.path.name
        if self.deaths.get(name, 0):
            self.deaths[name] -= 1
            died: Future[Any] = Future()
            died.set_exception(KilledWorker())
            return died
        return super().submit(on_device, function, *args)


@pytest.mark.parametrize(
    ("deaths", "left", "failed"),
    [
        ({"a": 9, "b": 1}, {"a": 7, "b": 0}, {"a"}),
        ({"a": 1, "b": 9}, {"a": 0, "b": 7}, {"b"}),
        ({"a": 9}, {"a": 8}, {"a"}),
        ({"a": 9, "b": 9}, {}, {"a", "b"}),
    ],
    ids=["one is sound", "the other is sound", "nobody else's doing", "both are bad"],
)
def test_a_slide_that_ends_its_workers_costs_no_other_slide(
    deaths: dict[str, int],
    left: dict[str, int],
    failed: set[str],
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law 13: what died beside a file that crashes its reader is done after all others, alone."""
    worker, said = OneWorker(dict(deaths)), list[str]()
    monkeypatch.setattr(archive_run, "open_executor", lambda *_: contextlib.nullcontext(worker))
    rows = segment(archive, tmp_path / "out", say=said.append)
    again = [line[0] for line in said if line.endswith("tried once more, with no other slide beside it")]
    assert sorted(again) == (sorted(deaths) if len(deaths) > 1 else [])
    assert {name for name, row in rows.items() if row.status == "failed"} == failed
    assert all(rows[name].status == "done" for name in rows.keys() - failed)
    assert all("worker processes died in make_plan" in rows[name].cause for name in failed)
    assert worker.deaths.items() >= left.items()
    assert not (tmp_path / "out" / "b" / "failure.json").exists() or "b" in failed


@pytest.mark.parametrize(("patience_s", "times"), [(0.1, 1), (60.0, 0)])
def test_who_has_a_slide_that_is_waited_for_is_said_once(
    patience_s: float, times: int, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where it is given back soon."""
    out, said, asked, holder = tmp_path / "out", list[str](), list[str](), Leases.holder
    monkeypatch.setattr(all_slides, "_PATIENCE_S", patience_s)
    monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
    with Leases() as other:
        other.take(out.resolve() / "a")

        def given_back_soon(leases: Leases, folder: Path) -> str:
            asked.append(holder(leases, folder))
            if len(asked) == 8:
                other.release(folder)
            return asked[-1]

        monkeypatch.setattr(Leases, "holder", given_back_soon)
        one = Execution(cluster=False, workers=1)
        (row,) = run([archive / "a.png"], out, chosen(), one, mpp=0.25, say=said.append, detect=oracle.detect)
    assert (row.status, len(asked)) == ("done", 8)
    lines = [line for line in said if line.startswith("a: waiting")]
    assert len(lines) == times
    whose = rf"a: waiting for .*process {os.getpid()}, which has this slide; --no-wait leaves it"
    assert all(re.search(whose, line) for line in lines)


@pytest.mark.parametrize("done", [False, True])
def test_an_error_of_a_slide_that_another_run_has_taken_over_means_nothing(
    done: bool, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That has changed its files: it has its lease now, or, where we took it over ourselves, has done it."""
    out, holder, taken = tmp_path / "out", Leases.holder, list[bool]()
    (archive / "list.csv").write_text("path\na.png\n")
    segment(archive, tmp_path / "other")
    monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
    with Leases() as other:

        def fails(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
            if not taken:
                taken.append(True)
                if done:
                    shutil.copytree(tmp_path / "other" / "a", out / "a", dirs_exist_ok=True)
                else:
                    shutil.rmtree(out / "a" / ".lease")
                    assert other.take(out / "a")
                raise RuntimeError("a file has changed")
            yield from oracle.detect(patches, normalisation, settings)

        def given_back(leases: Leases, folder: Path) -> str:
            other.release(out / "a")
            return holder(leases, folder)

        monkeypatch.setattr(Leases, "holder", given_back)
        row = segment(archive, out, detect=fails)["a"]
    assert (row.status, row.cause, taken) == ("done before" if done else "done", "", [True])
    assert not (out / "a" / "failure.json").exists()


def test_what_becomes_of_the_workers_is_followed_and_said(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number decides how many blocks are in flight; a worker that is no use is retired."""
    said, streams, followed = list[str](), list[Stream](), threading.Event()
    words = (
        "no worker offers the GPU",
        "does not answer",
        "1 worker process ended",
        "has another version; it is retired",
    )

    class Changing(Threads):
        looks = 0

        def run_on_new_workers(self, function: Callable[..., Any], *args: Any, retire: bool = False) -> list[str]:
            if not retire:
                return []
            self.looks += 1
            self.detectors, self.silent, self.ended = 6 if self.looks > 1 else 0, True, ("tcp://10.0.0.7:1",)
            return ["the worker at tcp://10.0.0.8:1 has another version; it is retired"]

    def stream(*given: Any) -> Stream:
        streams.append(Stream(*given))
        return streams[-1]

    def waits(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        until = time.monotonic() + 20
        while not followed.is_set():
            assert time.monotonic() < until, said
            if streams[0].slots.size == 2 + 2 * 6 and all(any(word in line for line in said) for word in words):
                followed.set()
            time.sleep(0.02)
        yield from oracle.detect(patches, normalisation, settings)

    monkeypatch.setattr(all_slides, "_POLL_S", 0.05)
    monkeypatch.setattr(all_slides, "Stream", stream)
    with open_threads(2) as pool:
        monkeypatch.setattr(archive_run, "open_executor", lambda *_: contextlib.nullcontext(Changing(pool, pool, 2)))
        rows = segment(archive, tmp_path / "out", detect=waits, say=said.append)
    assert [(row.status, row.cause) for row in rows.values()] == [("done", "")] * 2


def test_a_task_that_does_not_end_is_named(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk does not answer, or a file is read for ever: the others are done, and then it is said what is left."""
    said, named = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if "nothing was done for" in line:
            named.set()

    def never_ends(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        assert named.wait(60)
        yield from oracle.detect(patches, normalisation, settings)

    monkeypatch.setattr(watch, "_SILENCE_S", 0.5)
    monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
    rows = segment(archive, tmp_path / "out", Execution(cluster=False, workers=2), detect=never_ends, say=say)
    assert [row.status for row in rows.values()] == ["done", "done"]
    assert any(re.match(r"WARNING: nothing was done for 0 min: detect of [ab], begun", line) for line in said)


def test_an_error_of_the_look_at_the_workers_is_said_once_and_it_goes_on(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on nobody heard of workers that died, or joined."""
    said, looks, looked = list[str](), [0], threading.Event()

    def check(slides: all_slides.AllSlides, *, retire: bool) -> list[str]:
        looks[0] += retire
        if looks[0] == 4:
            looked.set()
        if retire:
            raise OSError(f"the scheduler hung up, look {looks[0]}") if looks[0] < 3 else KeyError("address")
        return []

    def waits(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        assert looked.wait(30)
        yield from oracle.detect(patches, normalisation, settings)

    monkeypatch.setattr(all_slides.AllSlides, "check_workers", check)
    monkeypatch.setattr(all_slides, "_POLL_S", 0.05)
    rows = segment(archive, tmp_path / "out", Execution(cluster=False, workers=2), detect=waits, say=said.append)
    assert [row.status for row in rows.values()] == ["done", "done"]
    assert [line for line in said if "checking the workers" in line] == [
        f"WARNING: checking the workers failed ({cause}); it is tried again, this is said once"
        for cause in ("OSError: the scheduler hung up, look 1", "KeyError: 'address'")
    ]


def test_what_the_device_had_no_memory_for_is_area_lost(archive: Path, tmp_path: Path) -> None:
    def small(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for number, found in enumerate(oracle.detect(patches, normalisation, settings)):
            nothing = {
                name: getattr(found, name)[:0]
                for name in ("boxes", "mask_probs", "scores", "class_index", "class_scores", "votes", "stain_density")
            }
            yield found if number else found._replace(**nothing, lost=True)

    row = segment(archive, tmp_path / "out", detect=small)["a"]
    tile = (128 - 2 * 20) * 0.25e-3
    # 5 x 4 tiles in blocks of 2 x 2: the first of each of the six blocks, the last column and row clipped
    assert row.work.counts.area_lost_mm2 == pytest.approx(
        sum(
            min(tile, 410 * 0.25e-3 - x * tile) * min(tile, 330 * 0.25e-3 - y * tile) for x in (0, 2, 4) for y in (0, 2)
        ),
        abs=1e-6,
    )
    assert 0 < row.nuclei < segment(archive, tmp_path / "whole")["a"].nuclei


def test_a_mask_that_covers_nothing_is_no_nucleus(archive: Path, tmp_path: Path) -> None:
    """A box whose soft mask is nowhere above a half has no outline: it is left out, and the slide goes on."""

    def faint(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for found in oracle.detect(patches, normalisation, settings):
            blank = HostInstances(
                boxes=np.array([[50, 50, 70, 70]], np.float32),
                mask_probs=np.zeros((1, 20, 20), bool),
                scores=np.array([0.9], np.float32),
                class_index=np.zeros(1, np.int64),
                class_scores=np.ones(1, np.float32),
                votes=np.ones(1, np.int64),
                stain_density=np.zeros((1, 2, 5), np.float32),
            )
            yield concat([found, blank])

    expected = segment(archive, tmp_path / "whole")["a"].nuclei
    row = segment(archive, tmp_path / "out", detect=faint)["a"]
    assert (row.status, row.nuclei) == ("done", expected)
    assert oracle.outlines(tmp_path / "out" / "a") == oracle.outlines(tmp_path / "whole" / "a")


def test_a_missing_slide_of_a_manifest_is_a_line_of_the_ledger(archive: Path, tmp_path: Path) -> None:
    (archive / "list.csv").write_text("path\na.png\nnowhere.png\n")
    rows = segment(archive, tmp_path / "out")
    assert rows["a"].status == "done"
    assert (rows["nowhere"].status, "nowhere.png" in rows["nowhere"].cause) == ("failed", True)
    assert json.loads((tmp_path / "out" / "nowhere" / "failure.json").read_text())["cause"] == rows["nowhere"].cause


def test_names_that_cannot_be_resolved_are_slides_that_fail(archive: Path, tmp_path: Path) -> None:
    """Law: one slide cannot end a run. Links in a circle, names that no file system takes, a file as a folder."""
    (archive / "loop.svs").symlink_to("loop.svs")
    (archive / "there.svs").symlink_to("back.svs")
    (archive / "back.svs").symlink_to("there.svs")
    too_long = ("x" * 300 + ".svs", "/".join(["y" * 200] * 25) + "/y.svs")
    listed = ["a.png", "loop.svs", *too_long, "a.png/b.svs", "b.png"]
    (archive / "list.csv").write_text("\n".join(["path", *listed]))
    out = tmp_path / "out"
    rows = run([archive, archive / "list.csv"], out, chosen(), ONE, mpp=0.25, say=lambda _: None, detect=oracle.detect)
    assert {row.slide for row in rows if row.status == "done"} == {"a", "b"}
    failed = {row.slide: row.cause for row in rows if row.status == "failed"}
    assert len(failed) == 6
    assert "is a link to loop.svs, which does not exist" in failed["loop"]
    assert all("which does not exist" in failed[name] for name in ("there", "back"))
    assert all("does not exist: restore it" in cause for name, cause in failed.items() if name[0] in "xy")
    assert (out / "ledger.csv").exists()
    assert (out / "report.html").exists()


# ------------------------------------------------------------------------------------ links among the results

LINKS = ["a", "a/work", "a/work/instances", "a/nuclei.geojson.zip", "a/nuclei.parquet", "a/.lease", "a/failure.json"]


@pytest.mark.parametrize("link", LINKS)
def test_nothing_is_written_through_a_link_among_the_results(link: str, archive: Path, tmp_path: Path) -> None:
    """Law: who can plant a link in the output folder cannot have the run write, or remove, elsewhere."""
    out, elsewhere = tmp_path / "out", tmp_path / "locked"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere / "precious" if "." in link[1:] and "lease" not in link else elsewhere)
    for execution in (ONE, Execution(cluster=False, workers=1, overwrite=True)):
        rows = segment(archive, out, execution)
        assert (rows["a"].status, rows["b"].status) == ("failed", "done")
        assert f"{link} is a symbolic link, through which nothing is written: remove it" in rows["a"].cause
        assert [path.name for path in elsewhere.iterdir()] == ["precious"]
        assert (elsewhere / "precious").read_text() == "precious"
    (out / link).unlink()
    assert segment(archive, out)["a"].status == "done"


def test_a_link_above_a_slides_folder_is_refused_and_the_out_folder_may_be_one(archive: Path, tmp_path: Path) -> None:
    (archive / "site").mkdir()
    paint(archive / "site" / "c.png", 0)
    (archive / "list.csv").write_text("path\na.png\nsite/c.png\n")
    out, real, elsewhere = tmp_path / "out", tmp_path / "real", tmp_path / "locked"
    for folder in (real, elsewhere):
        folder.mkdir()
    out.symlink_to(real)
    (out / "site").symlink_to(elsewhere)
    rows = segment(archive, out)
    assert (rows["a"].status, rows["site/c"].status) == ("done", "failed")
    assert "out/site is a symbolic link" in rows["site/c"].cause
    assert not list(elsewhere.iterdir())


def test_links_that_lead_out_of_the_input_are_said_in_the_first_lines(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (archive / "a.png").rename(archive / "a.tif")
    (archive / "link").symlink_to(tmp_path / "other")
    said: list[str] = []
    run([archive], tmp_path / "out", chosen(), ONE, mpp=0.25, say=said.append, detect=oracle.detect)
    (place,) = (number for number, line in enumerate(said) if "out of" in line)
    assert f"WARNING: 1 link leads out of {archive}: not followed, give --follow-links" in said[place]
    assert place < 4


def test_it_runs_where_an_event_loop_runs_already(archive: Path, tmp_path: Path) -> None:
    """A notebook's cell is called from a running loop."""

    async def cell() -> dict[str, SlideRecord]:
        return segment(archive, tmp_path / "out")

    assert {row.status for row in asyncio.run(cell()).values()} == {"done"}


def test_a_client_is_used_and_left_as_it_was(archive: Path, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert {row.status for row in segment(archive, tmp_path / "out", client=client).values()} == {"done"}
        assert client.status == "running"
    assert not list((tmp_path / "out" / "a").glob(".lease*"))
