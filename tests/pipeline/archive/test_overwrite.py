"""--overwrite does every slide again, once, and loses none: whatever fails, stops it, or runs beside it."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import oracle
import pipeline
from oracle import chosen, files, paint
from pipeline import files as files_module
from pipeline.archive import all_slides, slide_stages
from pipeline.archive import run as archive_run
from pipeline.archive.all_slides import AllSlides
from pipeline.archive.lease import Leases
from pipeline.archive.ledger import read_ledger
from pipeline.archive.manifest import resolve
from pipeline.archive.verify import verify_results
from pipeline.cli import main
from pipeline.config import Execution, Export, Regions, Settings, Stain
from pipeline.errors import ClusterLost, ExportFailed, LeaseLost, RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches
from pipeline.segment import finished, stages
from pipeline.segment import job as job_module
from pipeline.segment.export import Exported
from pipeline.segment.job import Job
from pipeline.segment.record import SlideRecord, StageRecord
from slides.patches import cut
from slides.scale import GivenScale

ONE = Execution(cluster=False, workers=1)
AGAIN = dataclasses.replace(ONE, overwrite=True)


def with_iou(iou: float) -> Settings:
    """Settings that differ in their digest and in nothing that these slides show."""
    return dataclasses.replace(chosen(), stitching=dataclasses.replace(chosen().stitching, iou=iou))


def segment(
    slides: Path, out: Path, settings: Settings = chosen(), execution: Execution = ONE, detect: Any = oracle.detect
) -> dict[str, SlideRecord]:
    rows = archive_run.run([slides], out, settings, execution, mpp=0.25, say=lambda line: None, detect=detect)
    return {row.slide: row for row in rows}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        paint(folder / f"{name}.tif", seed)
    return folder


def digests(out: Path) -> list[str]:
    return [json.loads((out / name / "slide.json").read_text())["digest"] for name in "ab"]


def test_a_slide_that_cannot_be_done_again_keeps_its_results(archive: Path, tmp_path: Path) -> None:
    """Its file is truncated now; for the other one, the detector fails."""
    out = tmp_path / "out"
    segment(archive, out)
    before = {name: files(out / name) for name in "ab"}
    (archive / "a.tif").write_bytes((archive / "a.tif").read_bytes()[:5000])

    def fails(*_: Any) -> Iterator[HostInstances]:
        raise RuntimeError("no")

    rows = segment(archive, out, execution=AGAIN, detect=fails)
    assert [row.status for row in rows.values()] == ["failed", "failed"]
    assert {name: files(out / name) for name in "ab"} == before
    assert all(not problems for _, problems in verify_results(out))


def unreadable(path: Path, **_: Any) -> str:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_what_was_measured_of_slides_as_they_were_is_removed(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    RunFolder(out).regions.write_text("rows of a and b")
    segment(archive, out)
    assert RunFolder(out).regions.exists()
    segment(archive, out, execution=AGAIN)
    assert not RunFolder(out).regions.exists()


def test_a_stage_that_runs_twice_removes_nothing_new(archive: Path, tmp_path: Path) -> None:
    """Dask may start a task again, whose worker seemed lost: it may come to its end when the slide is done."""
    out, kept = tmp_path / "out", dataclasses.replace(AGAIN, keep_work=True)
    segment(archive, out)
    segment(archive, out, execution=kept)
    manifest, source = resolve(chosen()), archive / "a.tif"
    overwrite = json.loads((out / "a" / "slide.json").read_text())["overwrite"]
    assert overwrite
    before = (out / "a" / "slide.json").read_bytes()
    job = Job(source, RunFolder(out).slide("a"), manifest, GivenScale(default_mpp=0.25), overwrite=overwrite)
    stages.stitch_slide(job)
    assert (out / "a" / "slide.json").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", unreadable)
        with pytest.raises(OSError, match="Input/output error"):
            stages._remove_results(job)
    assert (out / "a" / "slide.json").read_bytes() == before
    assert all(not problems for _, problems in verify_results(out))


@pytest.mark.parametrize("frozen_in", ["read_json_if_there", "remove"])
def test_a_worker_that_is_frozen_while_it_removes_results_leaves_the_new_ones(
    frozen_in: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine or file server answers again when another worker has done the slide, which was given back."""
    out = tmp_path / "out"
    segment(archive, out)
    folder = RunFolder(out).slide("a")
    goes_on = getattr(files_module, frozen_in)
    with Leases() as leases:
        assert leases.take(folder.path)
        lease = leases.file(folder.path)
        job = Job(archive / "a.tif", folder, resolve(chosen()), GivenScale(), lease=lease, overwrite="a round")

        def is_frozen(path: Path) -> Any:
            found = goes_on(path)
            leases.release(folder.path)
            return found

        monkeypatch.setattr(files_module, frozen_in, is_frozen)
        monkeypatch.setattr(job_module, "LEASE_CHECK_S", 0.0)
        with pytest.raises(LeaseLost):
            stages._remove_results(job)
    monkeypatch.undo()
    assert folder.nuclei.exists()
    assert folder.slide_json.exists() == (frozen_in == "read_json_if_there")


def test_a_slide_that_is_exported_meanwhile_is_done_again(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    exported: list[Path] = []

    def exports(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        if not exported:
            exported.append(out)
            with pytest.raises(ExportFailed, match=r"/a: a run is working on it \(.*process \d+\)"):
                pipeline.export(out, ["csv"])
        yield from oracle.detect(patches, normalisation, settings)

    rows = segment(archive, out, with_iou(0.4), AGAIN, exports)
    assert [row.status for row in rows.values()] == ["done", "done"]
    assert digests(out) == [json.loads((out / "run.json").read_text())["digest"]] * 2
    assert exported


@pytest.mark.parametrize("by", ["run", "export"])
def test_an_export_that_is_frozen_does_not_describe_what_others_have_made_meanwhile(
    by: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop sleeps, and a run with --overwrite takes the slide over: slide.json stays that run's."""
    out, write_exports, frozen = tmp_path / "out", finished.write_exports, list[bytes]()
    segment(archive, out)
    slide_json = out / "a" / "slide.json"

    def is_frozen(folder: SlideFolder, *given: Any) -> dict[str, Exported]:
        written = write_exports(folder, *given)
        if folder.lease.parent.name == "a" and not frozen:  # the slides are exported in any order
            shutil.rmtree(folder.lease)
            content = files_module.with_checksum({**json.loads(slide_json.read_text()), "overwrite": "of another"})
            files_module.write_json(slide_json, content)
            frozen.append(slide_json.read_bytes())
        return written

    monkeypatch.setattr(finished, "write_exports", is_frozen)
    if by == "export":
        with pytest.raises(ExportFailed, match="a: another process has taken this slide over"):
            pipeline.export(out / "a", ["csv"])
        assert [slide_json.read_bytes()] == frozen
    else:
        monkeypatch.setattr(all_slides, "_POLL_S", 0.1)
        rows = segment(archive, out, dataclasses.replace(chosen(), export=Export(formats=("qupath", "csv"))))
        assert [row.status for row in rows.values()] == ["done before"] * 2
        assert json.loads(slide_json.read_text())["overwrite"] == "of another"


def test_an_interrupted_round_continues_and_a_finished_one_does_not(archive: Path, tmp_path: Path) -> None:
    """The same command does what is left, block by block; after the end it does everything again."""
    out, patches_seen, limit = tmp_path / "out", [0], [0.0]
    segment(archive, out)

    def interrupted(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for found in oracle.detect(patches, normalisation, settings):
            patches_seen[0] += 1
            if patches_seen[0] > limit[0]:
                raise ClusterLost
            yield found

    def count(limited_to: float) -> int:
        limit[0], patches_seen[0] = limited_to, 0
        with contextlib.suppress(ClusterLost):
            segment(archive, out, with_iou(0.4), AGAIN, interrupted)
        return patches_seen[0]

    whole = 2 * 20  # 5 x 4 tiles a slide
    assert 30 < count(30) < whole
    assert 10 <= count(np.inf) <= 25, "the slide that is done, and whole blocks of the other one, are not done again"
    assert digests(out) == [json.loads((out / "run.json").read_text())["digest"]] * 2
    assert count(np.inf) == whole


def test_a_round_goes_on_while_another_run_has_slides_of_it(archive: Path, tmp_path: Path) -> None:
    """As of several jobs with --no-wait: one that starts when another has ended does nothing again."""
    out, leaving = tmp_path / "out", dataclasses.replace(AGAIN, wait=False)
    segment(archive, out)
    with Leases() as other:
        assert other.take(out / "a")
        rows = segment(archive, out, execution=leaving)
        assert [row.status for row in rows.values()] == ["locked", "done"]
    rows = segment(archive, out, execution=leaving)
    assert [row.status for row in rows.values()] == ["done", "done before"]
    rows = segment(archive, out, execution=leaving)
    assert [row.status for row in rows.values()] == ["done", "done"]


@pytest.mark.parametrize("name", ["slide.json", "failure.json"])
def test_what_a_wrong_clock_has_dated_is_not_new(name: str, archive: Path, tmp_path: Path) -> None:
    out, tomorrow = tmp_path / "out", 4_000_000_000
    segment(archive, out)
    if name == "failure.json":
        shutil.rmtree(out / "a")
        (out / "a").mkdir()
        (out / "a" / name).write_text('{"cause": "of yesterday"}')
    os.utime(out / "a" / name, (tomorrow, tomorrow))
    rows = segment(archive, out, execution=AGAIN)
    assert [row.status for row in rows.values()] == ["done", "done"]
    assert not (out / "a" / "failure.json").exists()


def test_two_runs_with_other_settings_do_not_mix(archive: Path, tmp_path: Path) -> None:
    """The second one starts when the first has nothing to show yet: the first one stops at its next slide."""
    out = tmp_path / "out"
    second: list[dict[str, SlideRecord]] = []

    def starts_another(*_: Any) -> None:
        if not second:
            second.append({})
            shutil.rmtree(out / "a" / ".lease")  # it was not there yet
            second[0] = segment(archive / "b.tif", out, with_iou(0.4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_stages, "_check_space", starts_another)
        patch.setattr(AllSlides, "_open_slides", lambda _: 1)
        first = segment(archive, out)
    assert [row.status for row in second[0].values()] == ["done"]
    assert "another run was started" in first["b"].cause


# ---------------------------------------------------------------------------------------------- what is in the ledger


def test_the_ledger_has_the_slides_of_all_commands(archive: Path, tmp_path: Path) -> None:
    """Done, failed, or done before --overwrite with other settings."""
    out = tmp_path / "out"
    (archive / "c.tif").write_bytes(b"no picture")
    segment(archive / "a.tif", out)
    segment(archive / "c.tif", out)
    assert list(segment(archive / "b.tif", out)) == ["b"]
    rows = {row["slide"]: row for row in read_ledger(RunFolder(out))}
    assert {name: row["status"] for name, row in rows.items()} == {"a": "done", "b": "done", "c": "failed"}
    assert "no such format" in rows["c"]["cause"]
    segment(archive / "b.tif", out, with_iou(0.4), AGAIN)
    rows = {row["slide"]: row for row in read_ledger(RunFolder(out))}
    assert rows["a"]["remarks"].startswith("done with other settings than the folder's")
    assert not rows["b"]["remarks"].startswith("done with other settings")


def test_the_ledger_knows_what_another_run_has_done_meanwhile(archive: Path, tmp_path: Path) -> None:
    """As one of several commands on one folder sees it, before it comes to that slide."""
    out, seen = tmp_path / "out", list[list[tuple[str, str]]]()
    started: list[AllSlides] = []
    process = AllSlides.process

    async def noted(slides: AllSlides) -> None:
        started.append(slides)
        await process(slides)

    def starts_another(*_: Any) -> None:
        if len(started) == 1 and not seen:
            segment(archive / "b.tif", out)
            seen.append([(record.slide, record.status) for record in started[0].records.all()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllSlides, "process", noted)
        patch.setattr(slide_stages, "_check_space", starts_another)
        patch.setattr(AllSlides, "_open_slides", lambda _: 1)
        rows = segment(archive, out)
    assert seen[0] == [("a", "unfinished"), ("b", "done")]
    assert [row.status for row in rows.values()] == ["done", "done before"]


def test_the_ledger_has_the_slides_of_a_command_that_ran_beside_this_one(archive: Path, tmp_path: Path) -> None:
    """Of commands that work on slides of their own, the one that ended last left out those of the others."""
    out, beside = tmp_path / "out", list[dict[str, SlideRecord]]()

    def starts_another(*_: Any) -> None:
        if not beside:
            beside.append({})
            beside[0] = segment(archive / "b.tif", out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_stages, "_check_space", starts_another)
        assert list(segment(archive / "a.tif", out)) == ["a"]
    assert list(beside[0]) == ["b"]
    assert [(row["slide"], row["status"]) for row in read_ledger(RunFolder(out))] == [("a", "done"), ("b", "done")]
    assert '"b/overlay.jpg"' in (out / "report.html").read_text()


def test_seconds_and_attempts_outlast_an_interruption(archive: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", [0]

    def slow(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for found in oracle.detect(patches, normalisation, settings):
            seen[0] += 1
            if seen[0] == 14:
                raise ClusterLost
            time.sleep(0.05)
            yield found

    with pytest.raises(ClusterLost):
        segment(archive / "a.tif", out, detect=slow)
    record = segment(archive / "a.tif", out, detect=slow)["a"]
    (first, interrupted), (again, ended) = record.attempts
    assert first < interrupted <= again < ended
    assert interrupted - first >= 0.05 * 8, "two blocks of four patches were finished"
    assert record.elapsed_seconds == pytest.approx(interrupted - first + ended - again, abs=0.002)
    assert record.elapsed_seconds >= 0.9 * record.work.seconds["detect"]


@pytest.mark.parametrize("hours", [-6, 6])
def test_a_clock_that_is_set_during_a_run_changes_no_duration(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """The ledger had negative seconds, or hours that nobody waited."""
    clock = time.time

    def setting(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        monkeypatch.setattr(time, "time", lambda: clock() + hours * 3600)
        return oracle.detect(patches, normalisation, settings)

    record = segment(archive / "a.tif", tmp_path / "out", detect=setting)["a"]
    assert 0 < record.elapsed_seconds < 3600


# ----------------------------------------------------------------------------------------- slides that have changed


def test_a_file_that_is_repaired_is_not_taken_for_the_damaged_one(archive: Path, tmp_path: Path) -> None:
    """Whether its results are finished or half done: what could not be read of it may be readable now."""
    slide, out = archive / "a.tif", tmp_path / "out"
    segment(slide, out)
    content = json.loads((out / "a" / "slide.json").read_text())
    content["record"]["work"]["counts"]["area_lost_mm2"] = 0.01
    del content["sha256"]
    (out / "a" / "slide.json").write_text(json.dumps(content))
    assert segment(slide, out)["a"].status == "done before"
    os.utime(slide)
    assert "0.01 mm2 of it could not be read: give --overwrite" in segment(slide, out)["a"].cause
    assert segment(slide, out, execution=AGAIN)["a"].status == "done"


def test_a_slide_that_was_replaced_is_not_read_from_the_former_file(archive: Path, tmp_path: Path) -> None:
    """A notebook, and the workers of a cluster that outlives a run, had it open still."""
    slide, other = archive / "a.tif", tmp_path / "other.tif"
    paint(other, seed=9)
    expected = segment(other, tmp_path / "expected")["other"].nuclei
    assert segment(slide, tmp_path / "out")["a"].nuclei != expected
    os.replace(other, slide)
    assert segment(slide, tmp_path / "out", execution=AGAIN)["a"].nuclei == expected


@pytest.mark.parametrize("stage", ["stain", "tile", "detect", "export"])
def test_a_slide_that_is_replaced_during_a_run_is_refused(archive: Path, tmp_path: Path, stage: str) -> None:
    """Law: results show one slide. They had nuclei of both, and the next run said that nothing was amiss."""
    slide, other, out = archive / "a.tif", archive / "b.tif", tmp_path / "out"
    expected = segment(other, tmp_path / "expected")["b"].nuclei

    def replacing(run: Callable[..., Any], *arguments: Any) -> Any:
        """Before the slide is opened in the stage; in `detect`, while other blocks are still to be tiled."""
        if other.exists():
            os.replace(other, slide)
        return run(*arguments)

    replaced = tuple(
        s._replace(run=functools.partial(replacing, s.run)) if s.name == stage else s for s in stages.STAGES
    )
    settings = dataclasses.replace(chosen(), stain=Stain(method="auto")) if stage == "stain" else chosen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_stages, "STAGES", replaced)
        row = segment(slide, out, settings)["a"]
    assert (row.status, "is not the file this work was started on" in row.cause) == ("failed", True)
    assert not (out / "a" / "slide.json").exists()
    assert "is not the file" in segment(slide, out, settings)["a"].cause, "nor is it continued"
    assert segment(slide, out, chosen(), AGAIN)["a"].nuclei == expected


def test_a_slide_that_is_replaced_while_a_block_is_read_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(*arguments: Any) -> Any:
        if (archive / "b.tif").exists():
            os.replace(archive / "b.tif", archive / "a.tif")
        return cut(*arguments)

    monkeypatch.setattr(stages, "cut", replacing)
    whole = chosen(block=8)  # all is one block: no other one is read after it
    assert "is not the file this work was started on" in segment(archive / "a.tif", tmp_path / "out", whole)["a"].cause


def test_a_file_that_grows_during_a_run_is_not_taken_for_the_whole_one(archive: Path, tmp_path: Path) -> None:
    """One that is still being copied into the archive: what was not there yet is area lost, and may be read now."""
    slide, out = archive / "a.tif", tmp_path / "out"

    def changes(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        os.utime(slide, (1_700_000_000, 1_700_000_000))
        for found in oracle.detect(patches, normalisation, settings):
            yield found._replace(lost=True)

    row = segment(slide, out, detect=changes)["a"]
    assert (row.status, row.work.counts.area_lost_mm2 > 0) == ("done", True)
    assert "of it could not be read: give --overwrite to do it again" in segment(slide, out)["a"].cause


def test_overwriting_goes_on_with_a_slide_that_has_changed_since_it_was_begun(archive: Path, tmp_path: Path) -> None:
    """It was refused with the remedy to give --overwrite, which was given, as long as other slides were done."""
    out, slide = tmp_path / "out", archive / "a.tif"

    def fails(job: Job) -> StageRecord:
        if job.source == slide:
            raise RuntimeError("no")
        return stages.stitch_slide(job)

    failing = tuple(s._replace(run=fails) if s.name == "stitch" else s for s in stages.STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide_stages, "STAGES", failing)
        rows = segment(archive, out, execution=AGAIN)
    assert [row.status for row in rows.values()] == ["failed", "done"]
    paint(slide, seed=9)
    expected = segment(slide, tmp_path / "expected")["a"].nuclei
    row = segment(archive, out, execution=AGAIN)["a"]
    assert (row.status, row.nuclei) == ("done", expected), row.cause


def test_half_done_work_of_a_file_that_has_changed_is_begun_again(archive: Path, tmp_path: Path) -> None:
    slide, out, seen = archive / "a.tif", tmp_path / "out", [0]

    def interrupted(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for found in oracle.detect(patches, normalisation, settings):
            seen[0] += 1
            if seen[0] == 14:
                raise ClusterLost
            yield found

    with pytest.raises(ClusterLost):
        segment(slide, out, detect=interrupted)
    os.utime(slide)
    assert segment(slide, out, detect=interrupted)["a"].status == "done"
    assert seen[0] == 14 + 20


def test_a_scale_that_is_not_forced_any_more_is_noticed(archive: Path, tmp_path: Path) -> None:
    slide, out = archive / "a.tif", tmp_path / "out"
    Image.open(slide).save(slide, resolution=39_000, resolution_unit=3)  # a centimetre: 0.256 um

    def again(**scale: float) -> SlideRecord:
        (row,) = archive_run.run([slide], out, chosen(), ONE, say=lambda line: None, detect=oracle.detect, **scale)
        return row

    row = again(force_mpp=0.25)
    assert row.status == "done", row.cause
    assert again().cause.startswith("it was done at mpp=0.25, now mpp=0.256")
    assert again(force_mpp=0.25).status == "done before"
    assert not (out / "a" / "failure.json").exists(), "the refusal is over"
    paint(slide, seed=0)  # which states none
    out = tmp_path / "silent"
    assert again(force_mpp=0.25).status == "done"
    assert again(mpp=0.26).cause.startswith("it was done at mpp=0.25, now mpp=0.26")
    assert [again(**same).status for same in ({"mpp": 0.25}, {})] == ["done before"] * 2
    out = tmp_path / "by default"
    assert again(mpp=0.25).status == "done"
    assert again(force_mpp=0.26).cause.startswith("it was done at mpp=0.25, now mpp=0.26")
    assert again(force_mpp=0.25).status == "done before"


# ------------------------------------------------------------------------------------------------------------ exports


def test_one_damaged_table_stops_no_other_export(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    (out / "a" / "nuclei.parquet").write_bytes(b"PAR1")
    with pytest.raises(ExportFailed) as failed:
        pipeline.export(out, ["csv"])
    words = (
        r"\S+/a/nuclei\.parquet could not be exported: nuclei\.parquet has 4 bytes, was written with [\d,]+: put the"
    )
    assert re.fullmatch(f"{words} file back, or run the slide again with --overwrite", str(failed.value))
    assert (out / "b" / "nuclei.csv").exists()
    assert not (out / "a" / "nuclei.csv").exists()


def test_finished_slides_without_a_table_are_named(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: nothing is silent, be it the table that is gone or the slide's whole folder."""
    out = tmp_path / "out"
    segment(archive, out)
    (out / "a" / "nuclei.parquet").unlink()
    table = "not exported: a: nuclei.parquet is missing: put the file back, or run the slide again with --overwrite"
    with pytest.warns(UserWarning, match=table):
        assert pipeline.export(out, ["csv"]).keys() == {out / "b" / "nuclei.csv"}
    shutil.rmtree(out / "b")
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(out)])
    folder = "slide.json is missing, though ledger.csv says that the slide is done: the same run command does it again"
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"WARNING: {table}", f"WARNING: not exported: b: {folder}"]
    assert "holds no nuclei.parquet" in said[2]


def test_a_full_disk_is_a_failed_export(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no wrong usage, and no class of Python's is named."""
    out = tmp_path / "out"
    segment(archive, out)
    capsys.readouterr()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr("pipeline.files._sync", full)
    with pytest.raises(SystemExit, match="1"):
        main(["export", str(out / "a"), "--formats", "csv"])
    assert capsys.readouterr().err == (
        f"nightslide: {out}/a/nuclei.parquet could not be exported: {out}/a/nuclei.csv: No space left on device: "
        f"free some space there, and give the same command again\n"
    )


def test_an_export_waits_for_no_run(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segment(archive, out)
    with Leases() as leases:
        assert leases.take(out / "a")
        with pytest.raises(ExportFailed, match="a run is working on it"):
            pipeline.export(out, ["csv"])
    assert (out / "b" / "nuclei.csv").exists()
    assert not (out / "a" / "nuclei.csv").exists()
    pipeline.export(out, ["csv"])
    assert all(not problems for _, problems in verify_results(out))


def test_a_command_that_wants_other_results_leaves_those_that_are_there_in_the_ledger(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows, the report and `verify` still know them; the command says what it did not do, and fails."""
    out = tmp_path / "out"
    monkeypatch.setattr(archive_run, "run", functools.partial(archive_run.run, detect=oracle.detect))
    nuclei = {name: row.nuclei for name, row in segment(archive, out).items()}
    flags = "--mpp 0.26 --no-cluster --workers 1 --tissue.everywhere --tiling.tile 128 --tiling.margin 20 --stain none"
    flags += " --tiling.mpp 0.25 --tiling.block 2 --stitching.max-diameter-um 4.5 --stitching.simplify-px 0"
    with pytest.raises(SystemExit) as ended:
        main(["run", str(archive), "--out", str(out), *flags.split()])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "2 of 2 slides done" in said.out
    assert "a: NOT DONE AGAIN: it was done at mpp=0.25, now mpp=0.26" in said.out
    assert said.err.count("not done again: ") == 2
    rows = read_ledger(RunFolder(out))
    assert [(row["status"], row["nuclei"]) for row in rows] == [("done otherwise", nuclei[name]) for name in "ab"]
    assert all("was done at mpp=0.25, now mpp=0.26" in row["remarks"] for row in rows)
    assert not list(out.glob("*/failure.json"))
    shutil.rmtree(out / "b")
    assert [bool(problems) for _, problems in verify_results(out)] == [False, True]
    assert segment(archive, out)["a"].status == "done before"


def test_the_ledger_is_there_before_the_first_slide_is_done(archive: Path, tmp_path: Path) -> None:
    """For the report and the viewer, which also says so where it is not yet; nothing is called interrupted."""
    out, seen = tmp_path / "out", list[list[str]]()

    def looks(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        seen.append([row["status"] for row in read_ledger(RunFolder(out))])
        yield from oracle.detect(patches, normalisation, settings)

    segment(archive, out, detect=looks)
    assert seen[0] in (["unfinished", "waiting"], ["waiting", "waiting"])
    assert {status for statuses in seen for status in statuses} <= {"unfinished", "waiting", "done"}
    (out / "ledger.csv").unlink()
    with pytest.raises(RunError, match="where a run has just been started, try again in a moment"):
        read_ledger(RunFolder(out))
    with pytest.raises(RunError, match="need the --out folder of a run"):
        read_ledger(RunFolder(archive))


def test_a_slide_that_has_results_under_another_name_is_named(archive: Path, tmp_path: Path) -> None:
    """Given by itself, it loses the folder in its name: the folder of results would have it twice, in silence."""
    (archive / "site").mkdir()
    (archive / "b.tif").rename(archive / "site" / "b.tif")
    out, said = tmp_path / "out", list[str]()
    assert list(segment(archive, out)) == ["a", "site/b"]
    for slides in (archive / "site" / "b.tif", archive):
        archive_run.run([slides], out, chosen(), ONE, mpp=0.25, say=said.append, detect=oracle.detect)
    (line, *_) = twice = [line for line in said if "there twice" in line]
    assert line.startswith("WARNING: b: its file has results as site/b, by a command")
    assert len(twice) == 2, "and the other way round"


def test_a_slide_that_cannot_be_looked_for_keeps_its_row(archive: Path, tmp_path: Path) -> None:
    """A manifest names it, but its file is gone; or regions are given, and none for it."""
    out, manifest = tmp_path / "out", archive / "list.csv"
    manifest.write_text("path\na.tif\nb.tif\n")
    nuclei = {name: row.nuclei for name, row in segment(manifest, out).items()}
    (archive / "b.tif").rename(tmp_path / "away.tif")
    b = segment(manifest, out)["b"]
    assert (b.status, b.nuclei) == ("done otherwise", nuclei["b"])
    assert "does not exist" in b.cause
    assert not (out / "b" / "failure.json").exists()
    (tmp_path / "away.tif").rename(archive / "b.tif")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "a.geojson").write_text("[]")
    regions = dataclasses.replace(chosen(), regions=Regions(str(tmp_path / "drawn")))
    b = segment(manifest, out, regions)["b"]
    assert (b.status, b.nuclei) == ("done before", nuclei["b"])


def test_a_round_goes_on_with_the_slides_that_failed(archive: Path, tmp_path: Path) -> None:
    """The same command, once the cause is gone, does them alone; once it does none, the round has ended."""
    out = tmp_path / "out"
    segment(archive, out)

    def statuses() -> list[str]:
        return [row.status for row in segment(archive, out, execution=AGAIN).values()]

    whole = (archive / "a.tif").read_bytes()
    (archive / "a.tif").write_bytes(whole[:5000])
    assert statuses() == ["failed", "done"]
    (archive / "a.tif").write_bytes(whole)
    assert statuses() == ["done", "done before"]
    assert statuses() == ["done", "done"]
    (archive / "a.tif").write_bytes(whole[:5000])
    assert [statuses() for _ in range(3)] == [["failed", "done"], ["failed", "done before"], ["failed", "done"]]
