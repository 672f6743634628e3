"""Files that are damaged between or during runs: scratch is made again, results are named, nothing else is lost."""

import dataclasses
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle import chosen, files, paint
from pipeline import api
from pipeline import files as pipeline_files
from pipeline.archive import all_slides
from pipeline.archive import run as archive_run
from pipeline.archive.lease import Leases
from pipeline.archive.ledger import mixed_computation, row_of
from pipeline.config import Execution, Export, Settings, Stain
from pipeline.errors import LeaseLost, RunError, ScratchLost, SlideChanged
from pipeline.layout import RunFolder, SlideFolder
from pipeline.model.instances import HostInstances
from pipeline.segment import job as job_module
from pipeline.segment import stages, tables
from pipeline.segment.finished import finish_slide
from pipeline.segment.job import Job
from pipeline.segment.plan import read_plan
from pipeline.segment.record import SlideRecord, StageRecord
from slides.patches import PatchStore
from slides.scale import GivenScale

ROOT = Path(oracle.__file__).parents[1]
ONE = Execution(cluster=False, workers=1)
KEEP = dataclasses.replace(ONE, keep_work=True)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "discs.png"
    paint(path, 0)
    return path


def segment(slide: Path, out: Path, settings: Settings | None = None, execution: Execution = ONE) -> SlideRecord:
    (record,) = archive_run.run(
        [slide], out, settings or chosen(), execution, mpp=0.25, say=lambda line: None, detect=oracle.detect
    )
    return record


@pytest.fixture(scope="module")
def whole(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    assert segment(slide, out).status == "done"
    return files(out / "discs")


def unfinished(slide: Path, out: Path) -> SlideFolder:
    """A slide of which half the blocks are outlined, one is detected, one is tiled, and stitching was never reached."""
    job = job_of(slide, out)
    stages.make_plan(job)
    blocks = read_plan(job.folder, job.digest).blocks
    for number, block in enumerate(blocks):
        record = stages.tile_block(job, block, StageRecord())
        if number < len(blocks) - 1:
            record = stages.detect_block(job, block, record, oracle.detect)
        if number < len(blocks) // 2:
            stages.outline_block(job, block, record)
    return job.folder


def job_of(slide: Path, out: Path) -> Job:
    from pipeline.archive.manifest import open_run, resolve

    manifest = resolve(chosen())
    run = RunFolder(out.absolute())
    open_run(run, manifest, overwrite=False)
    return Job(slide, run.slide("discs"), manifest, GivenScale(default_mpp=0.25))


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, rng: b"",
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "zeroed": lambda content, rng: bytes(len(content)),
    "flipped": lambda content, rng: _flipped(content, rng.randrange(8 * len(content))),
}


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_scratch_is_made_again(kind: str, slide: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Law: whatever happens to any file of the work folder between two runs, the same bytes come out."""
    prepared = unfinished(slide, tmp_path / "prepared").path.parent
    scratch = sorted(p.relative_to(prepared) for p in (prepared / "discs" / "work").rglob("*") if p.is_file())
    assert {p.suffix for p in scratch} >= {".json", ".npz", ".parquet", ".checksum"}
    rng = random.Random(kind)
    for number, path in enumerate(scratch):
        out = tmp_path / str(number)
        shutil.copytree(prepared, out)
        file = out / path
        file.write_bytes(DAMAGE[kind](file.read_bytes(), rng))
        record = segment(slide, out)
        assert record.status == "done", (path, record.cause)
        assert files(out / "discs") == whole, path
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("name", "number"),
    [("plan.json", errno.EIO), ("tissue.npz.checksum", errno.EACCES), ("tissue.npz", errno.ESTALE)],
)
def test_a_plan_that_cannot_be_read_for_a_while_costs_no_work(
    name: str, number: int, slide: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as missing, and all that was done of the slide was removed."""
    folder = unfinished(slide, tmp_path)
    before = {path: path.read_bytes() for path in sorted(folder.work.rglob("*")) if path.is_file()}

    def refusing(read: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == folder.work / name:
                raise OSError(number, os.strerror(number), str(path))
            return read(path, *arguments, **options)

        return refuse

    with monkeypatch.context() as patched:
        for reader in ("open", "read_text"):
            patched.setattr(Path, reader, refusing(getattr(Path, reader)))
        record = segment(slide, tmp_path)
    assert record.status == "failed"
    assert record.cause.startswith(f"{folder.work / name}: {os.strerror(number)}: ")
    assert {path: path.read_bytes() for path in before if path.exists()} == before
    assert segment(slide, tmp_path).status == "done"
    assert files(folder.path) == whole


def test_no_block_waits_for_the_disk(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scratch has checksums, so that it need not be synced; many disks take longer for that than for the bytes."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    job = job_of(slide, tmp_path)
    stages.make_plan(job)
    assert synced, "a plan is synced, as all other scratch depends on it"
    synced.clear()
    for block in read_plan(job.folder, job.digest).blocks:
        record = stages.detect_block(job, block, stages.tile_block(job, block, StageRecord()), oracle.detect)
        stages.outline_block(job, block, record)
    assert not synced
    stages.stitch_slide(job)
    assert synced, "a result is synced"


def test_scratch_that_is_damaged_while_a_run_goes_on_is_made_again(
    slide: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The last block to be detected empties the instances of the first: stitching notices."""
    out = tmp_path / "out"
    done: list[int] = []

    def detect(patches: Any, normalisation: Any, settings: Settings) -> Any:
        first = out / "discs" / "work" / "instances" / "000000.parquet"
        if first.exists() and not done:
            done.append(1)
            first.write_bytes(b"")
        yield from oracle.detect(patches, normalisation, settings)

    (record,) = archive_run.run([slide], out, chosen(), ONE, mpp=0.25, say=lambda line: None, detect=detect)
    assert (record.status, done) == ("done", [1])
    assert files(out / "discs") == whole


@pytest.mark.parametrize("method", ["none", "auto"])
def test_a_detector_computes_in_its_turn_and_prepares_before(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """In the trial of a stain, and in every block. It prepares before, and waits after, while another one computes."""
    job, inside, called, computed, waited = job_of(slide, tmp_path), [False], [], [], []
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, stain=Stain(method=method)))

    def compute(device: str, function: Any) -> Any:
        assert device == job.settings.detector.device
        inside[0] = True
        try:
            return function()
        finally:
            inside[0] = False

    def detect(patches: Any, normalisation: Any, settings: Settings) -> Any:
        called.append(inside[0])
        return queue(patches, normalisation, settings)

    def queue(patches: Any, normalisation: Any, settings: Settings) -> Any:
        computed.append(inside[0])
        for found in oracle.detect(patches, normalisation, settings):
            yield functools.partial(wait, found)

    def wait(found: HostInstances) -> HostInstances:
        waited.append(inside[0])
        return found

    monkeypatch.setattr(stages, "compute", compute)
    monkeypatch.setattr(stages, "_queue", lambda _: detect)
    stages.make_plan(job)
    stages.choose_stain(job)
    blocks = read_plan(job.folder, job.digest).blocks
    for block in blocks:
        stages.detect_block(job, block, stages.tile_block(job, block, StageRecord()))
    turns = len(blocks) + (2 if method == "auto" else 0)
    assert (called, computed, set(waited)) == ([False] * turns, [True] * turns, {False})


def test_outlining_twice_at_once_changes_nothing(slide: Path, tmp_path: Path) -> None:
    """Dask may run a task again while the first one still runs: the second to come finds the predictions gone."""
    job = job_of(slide, tmp_path)
    stages.make_plan(job)
    for block in read_plan(job.folder, job.digest).blocks:
        record = stages.detect_block(job, block, stages.tile_block(job, block, StageRecord()), oracle.detect)
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(stages.outline_block, [job] * 4, [block] * 4, [record] * 4))
        assert len({r.counts for r in records}) == 1
    with pytest.raises(ScratchLost, match="missing or damaged"):
        stages.outline_block(dataclasses.replace(job, folder=SlideFolder(tmp_path / "other")), 0, StageRecord())


def test_a_block_that_another_worker_completes_meanwhile_is_not_missed(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the looks that outlining takes at its files: these went as the record came."""
    job = job_of(slide, tmp_path)
    stages.make_plan(job)
    looks = ("read_predictions", "_focus", "block_record")
    for look, block in zip(looks, read_plan(job.folder, job.digest).blocks[:3], strict=True):
        record = stages.detect_block(job, block, stages.tile_block(job, block, StageRecord()), oracle.detect)
        outlined = functools.partial(stages.outline_block, job, block, record)
        with monkeypatch.context() as patched:
            patched.setattr(stages, look, _followed_by(outlined, getattr(stages, look), patched))
            counts = outlined().counts
        assert outlined().counts == counts


def _followed_by(other: Callable[[], Any], look: Callable[..., Any], patched: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`look`, after which `other` is done, in the first of its calls."""

    def followed(*arguments: Any) -> Any:
        found = look(*arguments)
        patched.undo()
        other()
        return found

    return followed


# ------------------------------------------------------------------------------------------------- results


def test_a_damaged_table_is_named_with_the_remedy(slide: Path, tmp_path: Path) -> None:
    assert segment(slide, tmp_path).status == "done"
    table = tmp_path / "discs" / "nuclei.parquet"
    size = table.stat().st_size
    for content in (b"", table.read_bytes()[:100]):
        table.write_bytes(content)
        record = segment(slide, tmp_path)
        assert record.status == "failed"
        assert f"nuclei.parquet has {len(content)} bytes, was written with {size:,}" in record.cause
        assert "--overwrite" in record.cause
    table.unlink()
    assert "nuclei.parquet is missing" in segment(slide, tmp_path).cause
    assert segment(slide, tmp_path, execution=dataclasses.replace(ONE, overwrite=True)).status == "done"


def test_a_folder_in_the_place_of_slide_json_is_named_with_the_remedy(slide: Path, tmp_path: Path) -> None:
    assert segment(slide, tmp_path).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    content = folder.slide_json.read_bytes()
    folder.slide_json.unlink()
    folder.slide_json.mkdir()
    assert segment(slide, tmp_path).cause == (
        f"{folder.slide_json}: Is a directory: move away the folder that is in the place of a file, and give the same "
        f"command again"
    )
    folder.slide_json.rmdir()
    folder.slide_json.write_bytes(content)
    assert segment(slide, tmp_path).status == "done before"


def test_what_is_lost_or_done_again_of_a_finished_slide_is_said(slide: Path, tmp_path: Path) -> None:
    """Law: nothing is silent. No run makes pictures again, and a slide.json that is no JSON costs all the work."""
    assert segment(slide, tmp_path).status == "done"
    folder, said = SlideFolder(tmp_path / "discs"), list[str]()
    run = functools.partial(archive_run.run, [slide], tmp_path, chosen(), ONE, mpp=0.25, say=said.append)
    folder.overlay.unlink()
    folder.export("qupath").unlink()
    (record,) = run(detect=oracle.detect)
    lost = "overlay.jpg is missing: put the file back, or run the slide again with --overwrite"
    assert record.status == "done before"
    assert record.remarks[0] == lost
    assert f"discs: done before, {record.nuclei} nuclei\n    WARNING: {lost}" in said
    assert not any("nuclei.geojson.zip is missing" in line for line in said), "it was made again"
    said.clear()
    folder.slide_json.write_bytes(folder.slide_json.read_bytes()[:-5])
    (record,) = run(detect=oracle.detect)
    assert record.status == "done"
    assert "WARNING: discs: slide.json is damaged, so the slide is done again" in said
    assert folder.overlay.exists()
    said.clear()
    (record,) = run(detect=oracle.detect)
    assert not any("WARNING: " in line and ("missing" in line or "damaged" in line) for line in said)


def test_a_damaged_table_makes_no_exports(slide: Path, tmp_path: Path) -> None:
    """Of the size that was written, so that no look notices: they were noted in slide.json as whole."""
    assert segment(slide, tmp_path).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    whole = folder.nuclei.read_bytes()
    folder.nuclei.write_bytes(_flipped(whole, 1))
    folder.export("qupath").unlink()
    record = segment(slide, tmp_path)
    assert record.status == "failed"
    assert record.cause.startswith("nuclei.parquet has other content than was written: put the file back, or run")
    assert not folder.export("qupath").exists()
    folder.nuclei.write_bytes(whole)
    assert segment(slide, tmp_path).status == "done before"
    assert folder.export("qupath").exists()


def test_exports_are_made_again_from_the_table(slide: Path, tmp_path: Path) -> None:
    """One that is missing or damaged, another format, other options: no inference, and the run is the same run."""
    assert segment(slide, tmp_path).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    table, geojson = folder.nuclei.stat().st_mtime_ns, folder.export("qupath").read_bytes()
    for content in (None, b"", geojson[:50]):
        folder.export("qupath").unlink()
        if content is not None:
            folder.export("qupath").write_bytes(content)
        assert segment(slide, tmp_path).status == "done before"
        assert folder.export("qupath").read_bytes() == geojson
    both = dataclasses.replace(chosen(), export=Export(formats=("qupath", "csv")))
    assert not folder.export("csv").exists()
    assert segment(slide, tmp_path, both).status == "done before"
    written = folder.export("csv").stat().st_mtime_ns
    assert len(folder.export("csv").read_text().splitlines()) == 1 + segment(slide, tmp_path, both).nuclei
    assert folder.export("csv").stat().st_mtime_ns == written, "what is as it should be is not made again"
    uncropped = dataclasses.replace(chosen(), export=Export(formats=("csv",), crop=False))
    assert segment(slide, tmp_path, uncropped).status == "done before"
    assert folder.export("csv").stat().st_mtime_ns > written
    assert folder.nuclei.stat().st_mtime_ns == table


@pytest.mark.parametrize(
    ("left", "keep"), [("work", False), ("work", True), (".work-abc", False), (".lease", False), (".lease", True)]
)
def test_what_a_killed_run_left_beside_results_is_removed(
    left: str, keep: bool, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its last file and its end. Work that is to be kept stays, and what another run has.

    The slide is given back at once, not at the end of the run; where nothing is left it is not taken.
    """
    assert segment(slide, tmp_path).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    whole = {path.name for path in folder.path.iterdir()}
    (folder.path / left).mkdir()
    if left != ".lease":
        (folder.path / left / "plan.json").write_text("{}")
        with Leases() as others:
            assert others.take(folder.path)
            assert segment(slide, tmp_path).status == "done before"
            assert (folder.path / left / "plan.json").exists()
    held: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "release_all", lambda leases: held.extend(leases._held))
        assert segment(slide, tmp_path, execution=KEEP if keep else ONE).status == "done before"
    assert not held
    kept = {left} if keep and left == "work" else set[str]()
    assert {path.name for path in folder.path.iterdir()} == whole | kept
    monkeypatch.delattr(Leases, "take")
    assert segment(slide, tmp_path, execution=KEEP if keep else ONE).status == "done before"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("again", ["export", "run"])
def test_what_a_killed_export_left_is_removed_by_the_next_command(again: str, slide: Path, tmp_path: Path) -> None:
    """It stayed for ever, and is as large as the export. Who writes without a lease, as `measure`, is not disturbed."""
    assert segment(slide, tmp_path).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    whole = {path.name for path in folder.path.iterdir()}
    code = (
        "import os, signal, sys\n"
        "from pipeline import api, files\n"
        "files._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "api.export(*sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), "spatialdata"], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folder.path.glob(".partial-*-nuclei.spatialdata.zarr"))) == 1
    others = {f".partial-0123456789ab-{name}" for name in ("regions.csv", "failure.json", "notes.txt")}
    for name in others:
        (folder.path / name).touch()
    if again == "export":
        api.export(tmp_path, "dsa")
    else:
        assert segment(slide, tmp_path).status == "done before"
    assert {path.name for path in folder.path.iterdir()} - {"nuclei.dsa"} == whole | others


def test_work_that_is_kept_stays_when_other_things_are_removed(slide: Path, tmp_path: Path) -> None:
    assert segment(slide, tmp_path, execution=KEEP).status == "done"
    folder = SlideFolder(tmp_path / "discs")
    folder.lease.mkdir()
    assert segment(slide, tmp_path, execution=KEEP).status == "done before"
    assert not folder.lease.exists()
    assert folder.work.exists()


# -------------------------------------------------------------------------------------------- the out folder


def test_results_of_other_settings_stay_when_run_json_is_gone(slide: Path, tmp_path: Path) -> None:
    assert segment(slide, tmp_path).status == "done"
    before = files(tmp_path / "discs")
    (tmp_path / "run.json").unlink()
    record = segment(slide, tmp_path, chosen(tile=64, block=1))
    assert record.status == "done otherwise"
    assert "holds results of other settings" in record.cause
    assert files(tmp_path / "discs") == before


def test_a_try_in_which_every_slide_failed_does_not_claim_the_folder(slide: Path, tmp_path: Path) -> None:
    refused = dataclasses.replace(chosen(), tiling=dataclasses.replace(chosen().tiling, margin=10))
    assert segment(slide, tmp_path, refused).status == "failed"
    assert segment(slide, tmp_path, chosen()).status == "done"
    with pytest.raises(RunError, match=r"other settings .*tiling\.margin was 20, is 10"):
        segment(slide, tmp_path, refused)


def test_a_killed_run_that_finished_no_slide_does_not_claim_the_folder(slide: Path, tmp_path: Path) -> None:
    """Its leases stay, where they are those of a run that goes on."""
    unfinished(slide, tmp_path)
    killed = (
        "import os, signal, sys; from pathlib import Path; from pipeline.archive.lease import Leases\n"
        "Leases().take(Path(sys.argv[1])), os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "discs")], check=False)
    assert (tmp_path / "discs" / ".lease").exists()
    assert segment(slide, tmp_path, chosen(tile=64, block=1)).status == "done"


def test_a_folder_in_which_another_run_goes_on_takes_no_other_settings(slide: Path, tmp_path: Path) -> None:
    unfinished(slide, tmp_path)
    with Leases() as others:
        assert others.take(tmp_path / "discs")
        with pytest.raises(RunError, match="other settings"):
            segment(slide, tmp_path, chosen(tile=64, block=1))


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nightslide"])
def test_an_out_folder_that_cannot_be_written_is_refused(slide: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written .* need a folder"):
        segment(slide, tmp_path / where)


def test_an_out_folder_that_cannot_be_written_any_more_is_refused(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slides would be called failed otherwise, though they are done. Who runs the tests may write everywhere."""
    segment(slide, tmp_path)
    before = files(tmp_path / "discs")

    def touch(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\): need a folder"):
        segment(slide, tmp_path)
    monkeypatch.undo()
    assert files(tmp_path / "discs") == before


# ----------------------------------------------------------------------------------------------- lost leases


def test_a_lost_lease_stops_the_slide_and_is_no_failure(
    slide: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the slide over in the middle: ours leaves it alone, and takes it up when it is free."""
    monkeypatch.setattr(all_slides, "_POLL_S", 0.05)
    out, calls = tmp_path / "out", []

    def detect(patches: Any, normalisation: Any, settings: Settings) -> Any:
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(out / "discs" / ".lease")  # as who finds it expired does
        yield from oracle.detect(patches, normalisation, settings)

    (record,) = archive_run.run([slide], out, chosen(), ONE, mpp=0.25, say=lambda line: None, detect=detect)
    assert record.status == "done"
    assert not (out / "discs" / "failure.json").exists()
    assert files(out / "discs") == whole


@pytest.mark.parametrize("lost", ["the work", "the lease and the work"])
def test_what_a_former_owner_removes_is_made_again(
    lost: str, slide: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended between asking for its lease and removing the work, or has just finished the slide."""
    monkeypatch.setattr(all_slides, "_POLL_S", 0.05)
    out, calls = tmp_path / "out", []

    def detect(patches: Any, normalisation: Any, settings: Settings) -> Any:
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(out / "discs" / "work")
            if "lease" in lost:
                shutil.rmtree(out / "discs" / ".lease")
        yield from oracle.detect(patches, normalisation, settings)

    said: list[str] = []
    (record,) = archive_run.run([slide], out, chosen(), ONE, mpp=0.25, say=said.append, detect=detect)
    assert record.status == "done"
    assert not any("FAILED" in line for line in said)
    assert files(out / "discs") == whole
    assert not (out / "discs" / "failure.json").exists()


def test_a_round_of_overwriting_continues_its_own_work_and_no_other(slide: Path, tmp_path: Path) -> None:
    """Work from before may be of another version; without --overwrite it is continued, whichever round it is of."""
    store = unfinished(slide, tmp_path).instances(0).parent
    job = job_of(slide, tmp_path)
    before = sorted(store.iterdir())
    stages.make_plan(job)
    assert sorted(store.iterdir()) == before != []
    first, second = (dataclasses.replace(job, overwrite=name) for name in ("first", "second"))
    stages.make_plan(first)
    assert not any(store.iterdir())
    unfinished(slide, tmp_path)
    for again, kept in ((first, True), (job, True), (second, False)):
        stages.make_plan(again)
        assert any(store.iterdir()) == kept
    unfinished(slide, tmp_path)
    rescaled = dataclasses.replace(second, scale=GivenScale(default_mpp=0.26))
    with pytest.raises(SlideChanged, match="give the same scale, or --overwrite"):
        stages.make_plan(dataclasses.replace(rescaled, overwrite=""))
    assert any(store.iterdir())
    stages.make_plan(rescaled)
    assert not any(store.iterdir())


def test_the_work_of_another_owner_is_not_removed(slide: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).slide("discs")
    with Leases() as leases:
        leases.take(folder.path)
        job = dataclasses.replace(job_of(slide, tmp_path), lease=leases.file(folder.path))
        stages.make_plan(job)
        shutil.rmtree(folder.lease)
        for removal in (stages.remove_work, stages.make_plan):
            with pytest.raises(LeaseLost):
                removal(job)
    assert read_plan(folder, job.digest)


def test_a_lease_that_is_lost_stops_a_block_between_two_patches(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "LEASE_CHECK_S", 0.0)
    folder = RunFolder(tmp_path).slide("discs")
    seen: list[int] = []

    def detect(patches: Any, normalisation: Any, settings: Settings) -> Any:
        for number, found in enumerate(oracle.detect(patches, normalisation, settings)):
            seen.append(number)
            if not number:
                shutil.rmtree(folder.lease)
                time.sleep(1.1)  # it is asked every second
            yield found

    with Leases() as leases:
        leases.take(folder.path)
        job = dataclasses.replace(job_of(slide, tmp_path), lease=leases.file(folder.path))
        stages.make_plan(job)
        block = read_plan(folder, job.digest).blocks[0]
        before = stages.tile_block(job, block, StageRecord())
        with pytest.raises(LeaseLost):
            stages.detect_block(job, block, before, detect)
    assert seen == [0]
    assert not folder.predictions(block).exists()


def test_a_lease_that_is_lost_stops_stitching_and_exports_before_their_end(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system kills soon after SIGTERM, and these take minutes on a very large slide."""
    monkeypatch.setattr(job_module, "LEASE_CHECK_S", 0.0)
    monkeypatch.setattr(tables, "_ROW_GROUP", 20)
    job = job_of(slide, tmp_path)
    stages.make_plan(job)
    blocks = read_plan(job.folder, job.digest).blocks
    for block in blocks:
        stages.outline_block(job, block, stages.detect_block(job, block, StageRecord(), oracle.detect))
    checks: list[int] = []
    lost_at = [0]

    def check_lease(_: Job) -> None:
        checks.append(1)
        if len(checks) == lost_at[0]:
            raise LeaseLost("taken over")

    monkeypatch.setattr(Job, "check_lease", check_lease)
    stitched, export = job.folder.nuclei, job.folder.export("qupath")
    record = SlideRecord("discs", "done", mpp=0.25)
    steps: list[tuple[Callable[[], Any], Path, int]] = [
        (lambda: stages.stitch_slide(job), stitched, 3 * len(blocks)),  # three passes over the blocks
        (lambda: stages.export_slide(job), export, 7),  # 138 nuclei in groups of 20
        (lambda: finish_slide(job, record), job.folder.slide_json, 14),
    ]
    for step, written, least in steps:
        for lost_at[0] in (1, 2, least):
            checks.clear()
            with pytest.raises(LeaseLost):
                step()
            assert not written.exists()
        lost_at[0] = 0
        step()
        assert written.exists()


def test_nothing_is_committed_without_the_lease(slide: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).slide("discs")
    with Leases() as leases:
        leases.take(folder.path)
        job = dataclasses.replace(job_of(slide, tmp_path), lease=leases.file(folder.path))
        stages.make_plan(job)
        block = read_plan(job.folder, job.digest).blocks[0]
        shutil.rmtree(folder.lease)
        with pytest.raises(LeaseLost, match="taken this slide over"):
            stages.tile_block(job, block, StageRecord())
    assert PatchStore.create(folder.patches, read_plan(job.folder, job.digest).grid, job.digest)
    assert not any((folder.patches / "patches").rglob("c/*"))


# ------------------------------------------------------------------------------------------------ said, not hidden


def test_a_mixture_of_machines_is_said() -> None:
    """Law: nothing is silent."""
    kinds = (("cpu bfloat16",), ("cpu float32",), ())
    rows = [row_of(SlideRecord(str(n), "done", work=StageRecord(computed_on=k))) for n, k in enumerate(kinds)]
    assert mixed_computation(rows[::2]) == ""
    assert "cpu bfloat16, and others on cpu float32" in mixed_computation(rows)


def test_a_resumed_run_with_other_versions_says_so(slide: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = functools.partial(archive_run.run, mpp=0.25, say=said.append, detect=oracle.detect)
    run([slide], tmp_path, chosen(), ONE)
    assert not any("versions changed" in line for line in said)
    content = json.loads((tmp_path / "run.json").read_text())
    content["versions"]["shapely"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(pipeline_files.with_checksum(content)))
    run([slide], tmp_path, chosen(), ONE)
    assert any("WARNING: versions changed" in line and "shapely 1.0 -> " in line for line in said)
