"""Slides that are copied to a disk first: the same bytes, never more space than allowed, nothing left behind."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest

import oracle
from oracle import chosen, files, paint
from pipeline.archive import lease
from pipeline.archive import run as archive_run
from pipeline.archive.inputs import staging
from pipeline.archive.inputs.staging import LocalSlide, Room, Staging
from pipeline.archive.lease import Leases
from pipeline.archive.manifest import check_worker, versions
from pipeline.config import Execution
from pipeline.errors import ConfigError, LeaseLost, RunError, SlideChanged
from pipeline.layout import SlideFolder
from pipeline.model.instances import HostInstances, empty
from pipeline.segment.job import Job, Part
from slides.errors import SlideTooLarge, SlideUnreadable
from slides.scale import GivenScale

ROOT = Path(oracle.__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
SLIDES = 3
THREADS = Execution(cluster=False, workers=3)

run = functools.partial(archive_run.run, mpp=0.25, detect=oracle.detect)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for seed in range(SLIDES):
        paint(folder / f"{seed}.png", seed)
    (folder / "list.csv").write_text("path\n" + "".join(f"{seed}.png\n" for seed in range(SLIDES)))
    return folder


@pytest.fixture(scope="module")
def in_place(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("in_place")
    rows = run([archive / "list.csv"], out, chosen(), THREADS, say=lambda line: None)
    assert [row.status for row in rows] == ["done"] * SLIDES
    return out


def results(out: Path) -> dict[str, Any]:
    """All results, and of slide.json what does not depend on the time."""
    content: dict[str, Any] = {}
    for seed in range(SLIDES):
        about = json.loads((out / str(seed) / "slide.json").read_text())
        timed = ("record", "summary", "sha256")
        content[str(seed)] = files(out / str(seed)), {k: v for k, v in about.items() if k not in timed}
    return content


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


@pytest.mark.parametrize("cluster", [False, True])
def test_staged_slides_give_the_same_bytes_within_the_space(
    archive: Path, in_place: Path, tmp_path: Path, cluster: bool
) -> None:
    """Law: results, and the place, size and date of the slide in them, are those of slides that are read in place."""
    from distributed import Client, LocalCluster

    stage = tmp_path / "stage"
    largest = max((archive / f"{seed}.png").stat().st_size for seed in range(SLIDES))
    execution = dataclasses.replace(THREADS, stage=str(stage), stage_space=f"{1.5 * largest / 1e6:.4f}MB")
    sizes: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            with contextlib.suppress(FileNotFoundError):  # of a file that was just renamed or removed
                sizes.append(size_of(stage))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        if cluster:
            with (
                LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0") as made,
                Client(made, set_as_default=False) as client,
            ):
                rows = run([archive / "list.csv"], tmp_path / "out", chosen(), execution, client=client, say=print)
        else:
            rows = run([archive / "list.csv"], tmp_path / "out", chosen(), execution, say=print)
    finally:
        ended.set()
        watcher.join()
    assert [row.status for row in rows] == ["done"] * SLIDES
    assert results(tmp_path / "out") == results(in_place)
    leases = 1000  # bytes of the file in .lease
    assert largest * 0.9 < max(sizes) < execution.stage_space_bytes + leases
    assert list(stage.iterdir()) == []


def no_nuclei(patches: Any, normalisation: Any, settings: Any) -> Iterator[HostInstances]:
    for _ in patches:
        yield empty(20)


def test_a_mirax_slide_is_staged_with_its_folder(shared: Path, tmp_path: Path) -> None:
    slide = shared / "slides" / "mirax-sparse.mrxs"
    execution = dataclasses.replace(THREADS, stage=str(tmp_path / "stage"))
    settings = chosen(tile=512)
    for out, how in (("in_place", THREADS), ("staged", execution)):
        (row,) = archive_run.run([slide], tmp_path / out, settings, how, say=print, detect=no_nuclei)
        assert row.status == "done", row.cause
    assert files(tmp_path / "staged" / "mirax-sparse") == files(tmp_path / "in_place" / "mirax-sparse")


def test_a_slide_that_fails_leaves_no_copy_and_stops_no_other(archive: Path, tmp_path: Path) -> None:
    """Among them one that is larger than the space, whose cause names it."""
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    (tmp_path / "large.svs").write_bytes(bytes(2_000_000))
    stage = tmp_path / "stage"
    execution = dataclasses.replace(THREADS, stage=str(stage), stage_space="1MB")
    inputs = [archive / "0.png", tmp_path / "broken.svs", tmp_path / "large.svs"]
    rows = {row.slide: row for row in run(inputs, tmp_path / "out", chosen(), execution, say=print)}
    assert rows["0"].status == "done"
    assert rows["broken"].status == rows["large"].status == "failed"
    assert "is not a slide" in rows["broken"].cause
    assert rows["large"].cause == "the slide has 0.002 GB in 1 file, --stage-space is 0.001 GB: raise it"
    assert list(stage.iterdir()) == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_stage_that_is_removed_during_a_run_is_the_cause_and_not_made_again(
    archive: Path, in_place: Path, tmp_path: Path, whole: bool
) -> None:
    """The cause said that the slide's own file was not there, and later copies lay in a folder without a lease."""
    stage = tmp_path / "stage"

    def remove(patches: Any, normalisation: Any, settings: Any) -> Iterator[HostInstances]:
        for folder in [stage] if whole else list(stage.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        yield from oracle.detect(patches, normalisation, settings)

    largest = max((archive / f"{seed}.png").stat().st_size for seed in range(SLIDES))
    execution = dataclasses.replace(THREADS, workers=1, stage=str(stage), stage_space=f"{1.5 * largest / 1e6:.4f}MB")
    rows = archive_run.run([archive / "list.csv"], tmp_path / "out", chosen(), execution, mpp=0.25, detect=remove)
    why = f"in --stage {stage} was removed during the run: give the same command again"
    causes = sorted(row.cause for row in rows)
    assert causes == [f"the copy of this slide {why}", *[f"the folder of this run {why}"] * (SLIDES - 1)]
    assert stage.exists() != whole
    assert not list(stage.glob("*"))
    rows = run([archive / "list.csv"], tmp_path / "out", chosen(), execution, say=print)
    assert [row.status for row in rows] == ["done"] * SLIDES
    assert results(tmp_path / "out") == results(in_place)


def command(archive: Path, out: Path, stage: Path, seconds: float) -> subprocess.Popen[str]:
    flags = ["--mpp", "0.25", "--tissue.everywhere", "--tiling.tile", "128", "--tiling.margin", "20"]
    flags += ["--tiling.block", "2", "--stitching.max-diameter-um", "4.5", "--stitching.simplify-px", "0"]
    flags += ["--stain", "none"]
    flags += ["--no-cluster", "--workers", "3", "--stage", str(stage)]
    code = "import sys, oracle; oracle.command(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(archive / "list.csv"), "--out", str(out), *flags],
        env={**os.environ, "PYTHONPATH": PATHS, oracle.SECONDS: str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_after_kill_9_the_same_command_removes_what_is_left_and_gives_the_same_bytes(
    archive: Path, in_place: Path, tmp_path: Path
) -> None:
    out, stage = tmp_path / "out", tmp_path / "stage"
    keep = stage / "nightslide-of-somebody"
    keep.mkdir(parents=True)
    with command(archive, out, stage, seconds=0.3) as doomed:
        try:
            while not list(out.glob("*/work/instances/*.parquet")):
                assert doomed.poll() is None
                time.sleep(0.02)
        finally:
            doomed.send_signal(signal.SIGKILL)
            doomed.communicate()
    left = set(stage.glob(".nightslide-stage-*"))
    assert len(left) == 1
    assert size_of(stage) > 10_000
    resumed = command(archive, out, stage, seconds=0)
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert results(out) == results(in_place)
    assert list(stage.iterdir()) == [keep]


def test_sigterm_removes_the_copies(archive: Path, tmp_path: Path) -> None:
    out, stage = tmp_path / "out", tmp_path / "stage"
    with command(archive, out, stage, seconds=2) as doomed:
        try:
            while not list(out.glob("*/work/patches.zarr/done/c/*/*/*")):
                assert doomed.poll() is None
                time.sleep(0.02)
            assert len(list(stage.iterdir())) == 1
            doomed.send_signal(signal.SIGTERM)
            said, _ = doomed.communicate(timeout=120)
        finally:
            doomed.kill()
    assert doomed.returncode == 130, said
    assert list(stage.iterdir()) == []


def test_the_folder_of_a_run_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    (stage / ".nightslide-stage-linked").mkdir(parents=True)
    (tmp_path / "of_a_user").mkdir()
    link = stage / f".nightslide-stage-{'0' * 32}"
    link.symlink_to(tmp_path / "of_a_user")
    dead = stage / f".nightslide-stage-{'1' * 32}"
    dead.mkdir()
    with Leases() as ours, Leases() as theirs, Staging(stage, 10, ours) as mine, Staging(stage, 10, theirs) as other:
        assert mine.folder.is_dir()
        assert other.folder.is_dir()
        assert mine.folder.stat().st_mode & 0o77 == 0  # nobody else may look at the slides
        assert link.is_symlink()
        assert not dead.exists()
    assert sorted(path.name for path in stage.iterdir()) == [link.name, ".nightslide-stage-linked"]


def test_what_a_killed_run_left_is_removed_from_a_disk_that_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lease can be written there before: the same command ended, until somebody removed the folder by hand."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.archive.inputs.staging import Staging\n"
        "from pipeline.archive.lease import Leases\n"
        "with Leases() as leases, Staging(Path(sys.argv[1]), 10, leases):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".nightslide-stage-*")
    stage = lease._stage

    def write(staged: Path, token: str) -> int:
        if left.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staged))
        return stage(staged, token)

    monkeypatch.setattr(lease, "_stage", write)
    with Leases() as leases, Staging(tmp_path, 10, leases) as staged:
        assert not left.exists()
        assert staged.folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_has_no_space_from_the_start_is_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(staged: Path, token: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staged))

    monkeypatch.setattr(lease, "_stage", write)
    with pytest.raises(OSError, match="No space left"), Leases() as leases, Staging(tmp_path, 10, leases):
        pass
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the copy


def copied(slide: Any, parts: list[Part], folder: Path, leased: Path | None = None) -> Room:
    room = Room(folder, parts)
    job = Job(room.file, SlideFolder(folder), chosen(), GivenScale(), lease=leased)
    staging._copy(slide, room, job)
    return room


def test_a_slide_that_changes_while_it_is_copied_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PIECE", 100)
    path = tmp_path / "x.svs"
    path.write_bytes(bytes(1000))
    slide = LocalSlide(path)
    parts = slide.parts()
    assert copied(slide, parts, tmp_path / "a").file.read_bytes() == bytes(1000)
    for number, content in enumerate((bytes(1100), bytes(900), bytes(1000))):
        path.write_bytes(content)
        os.utime(path, ns=(0, number))
        with pytest.raises(SlideChanged, match="changed while it was copied"):
            copied(slide, parts, tmp_path / str(number))
        assert size_of(tmp_path / str(number)) <= 1000
        assert not (tmp_path / str(number) / "slide").exists()


def test_copying_stops_when_the_lease_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.svs"
    path.write_bytes(bytes(1000))
    slide = LocalSlide(path)
    with pytest.raises(LeaseLost):
        copied(slide, slide.parts(), tmp_path / "copy", leased=tmp_path / "lost")


@pytest.mark.parametrize("name", ["../x.svs", "/etc/x.svs", "x/../../y.dat", "x\0.svs"])
def test_no_part_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.svs"
    path.write_bytes(b"1")
    with pytest.raises(SlideUnreadable, match="below the slide's folder"):
        copied(LocalSlide(path), [Part(name, 1, 0)], tmp_path / "copy")


@pytest.mark.parametrize("name", ["..\\x.svs", "\\x.svs", "C:x.svs", "C:\\x.svs", "//server/share/x.svs"])
def test_no_part_is_written_outside_the_folder_of_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PurePath", PureWindowsPath)
    with pytest.raises(SlideUnreadable, match="below the slide's folder"):
        staging._inside(name)


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_an_error_names_the_slide_in_place_of_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    with Leases() as leases, Staging(tmp_path, 1, leases) as stage:
        said = separator.join([str(stage.folder), "0" * 32, "slide", "x.svs is damaged"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "sep", separator)
            error = stage.of_original(RunError(said), "/archive/x.svs")
    assert str(error) == separator.join(["/archive", "x.svs is damaged"])


def test_room_frees_the_space_of_files_that_a_worker_has_open(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_bytes(bytes(10))

    async def main() -> int:
        with Leases() as leases, Staging(tmp_path / "local" / "stage", 10, leases) as stage:
            async with stage.room(LocalSlide(tmp_path / "x.svs")) as room:
                room.file.parent.mkdir(parents=True)
                shutil.copyfile(tmp_path / "x.svs", room.file)
                handle = os.open(room.file, os.O_RDONLY)
            try:
                assert not room.folder.exists()
                return os.fstat(handle).st_size
            finally:
                os.close(handle)

    assert asyncio.run(main()) == 0


def test_a_full_disk_is_named(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalSlide, "pieces", full)
    stage = tmp_path / "stage"
    execution = dataclasses.replace(THREADS, stage=str(stage))
    (row,) = run([archive / "0.png"], tmp_path / "out", chosen(), execution, say=print)
    assert row.cause == f"no space left in {stage}: free some space, and run the same command again"


def test_a_slide_whose_disk_fails_is_named_and_not_the_staging_folder(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(slide: LocalSlide, part: Part) -> Iterator[bytes]:
        raise OSError(errno.EIO, "Input/output error", str(slide.path))

    monkeypatch.setattr(LocalSlide, "pieces", failing)
    execution = dataclasses.replace(THREADS, stage=str(tmp_path / "stage"))
    (row,) = run([archive / "0.png"], tmp_path / "out", chosen(), execution, say=print)
    assert row.status == "failed"
    assert str(archive / "0.png") in row.cause
    assert "stage" not in row.cause


def test_room_refuses_a_slide_that_never_fits(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_bytes(bytes(11))

    async def main() -> None:
        with Leases() as leases, Staging(tmp_path / "stage", 10, leases) as stage:
            async with stage.room(LocalSlide(tmp_path / "x.svs")):
                pass

    with pytest.raises(SlideTooLarge, match="--stage-space"):
        asyncio.run(main())


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_worker_that_does_not_see_the_copies_is_refused(tmp_path: Path) -> None:
    run_json = tmp_path / "run.json"
    run_json.touch()
    check_worker(versions(), run_json, tmp_path)
    check_worker(versions(), run_json, None)
    with pytest.raises(RunError, match="need a --stage folder that all workers share"):
        check_worker(versions(), run_json, tmp_path / "elsewhere")


def test_a_folder_that_cannot_be_written_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    execution = dataclasses.replace(THREADS, stage=str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"--stage .*file cannot be written"):
        run([archive / "0.png"], tmp_path / "out", chosen(), execution, say=print)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there: each slide failed when it was to be copied."""
    (tmp_path / "stage").mkdir()

    def touch(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    execution = dataclasses.replace(THREADS, stage=str(tmp_path / "stage"))
    with pytest.raises(RunError, match=r"--stage .*stage cannot be written \(Read-only file system\)"):
        run([archive / "0.png"], tmp_path / "out", chosen(), execution, say=print)


def test_a_slide_that_vanishes_before_it_is_copied_is_named(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its copy is neither: no file of the staging folder is in the cause."""
    slide = tmp_path / "x.png"
    slide.write_bytes((archive / "0.png").read_bytes())
    room = Staging.room

    def gone(staging: Staging, files: Any) -> Any:
        slide.unlink(missing_ok=True)
        return room(staging, files)

    monkeypatch.setattr(Staging, "room", gone)
    execution = dataclasses.replace(THREADS, stage=str(tmp_path / "stage"))
    (row,) = run([slide], tmp_path / "out", chosen(), execution, say=print)
    assert (row.status, row.cause) == ("failed", f"{slide}: there is no such file")


@pytest.mark.parametrize("size", ["", "many", "0GB", "-1GB", "100"])
def test_a_space_that_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="need a size such as 100GB"):
        Execution(stage_space=size)
