"""The whole way on slides whose nuclei are known: what comes out depends on the slide and on nothing else.

Every nucleus is painted in a colour of its own, and the oracle, in the detector's place, reads the colours
back: reading, tiling, storing, claiming, stitching and export are the real ones.
"""

import csv
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import oracle
from oracle import RADIUS, chosen, files, outlines, paint
from pipeline.archive import run as archive_run
from pipeline.archive.workers.executors import Loop
from pipeline.config import Execution, Export, ExportFormat, Settings, Stitching, Tiling, Tissue
from pipeline.errors import ConfigError, RunError
from pipeline.model import load
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches
from pipeline.segment import stages
from pipeline.segment.export import FORMATS
from slides.geometry import Frame
from slides.slide import Slide
from slides.stored import Pixels

ONE = Execution(cluster=False, workers=1)

run = functools.partial(archive_run.run, detect=oracle.detect)


def segment(slide: Path, out: Path, settings: Settings, execution: Execution = ONE, client: Any = None) -> Path:
    (row,) = run([slide], out, settings, execution, mpp=0.25, client=client, say=lambda line: None)
    assert row.status == "done", row.cause
    return out / slide.stem


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("slide") / "discs.png"
    return path, paint(path, 0)


@pytest.fixture(scope="module")
def expected(slide: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one tile that holds the whole slide, in a loop."""
    return segment(slide[0], tmp_path_factory.mktemp("whole"), chosen(tile=512))


@given(
    tile=st.sampled_from([64, 128, 192, 256, 320]),
    margin=st.integers(RADIUS + 3, 28),
    block=st.integers(1, 4),
    workers=st.sampled_from([1, 3]),
)
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_detections_do_not_depend_on_the_tiling(
    tile: int,
    margin: int,
    block: int,
    workers: int,
    slide: tuple[Path, int],
    expected: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Law: with an oracle, whatever the tile, margin, block, and number of workers: the same polygons."""
    path, count = slide
    found = segment(
        path, tmp_path_factory.mktemp("tiled"), chosen(tile, margin, block), Execution(cluster=False, workers=workers)
    )
    assert len(outlines(expected)) == count
    assert outlines(found) == outlines(expected)


def test_what_detects_is_prepared_once_with_the_first_slide(
    slide: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for what is done already, or for a stand-in."""
    prepared: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Loop, "prepare", lambda self, *call: prepared.append(call))
    segment(slide[0], tmp_path / "stand-in", chosen())
    assert prepared == []
    copy = tmp_path / "again.png"
    copy.write_bytes(slide[0].read_bytes())
    real = functools.partial(
        archive_run.run, settings=Settings(tissue=Tissue(everywhere=True)), execution=ONE, mpp=0.25
    )
    for _ in range(2):
        rows = real([slide[0], copy], tmp_path / "real", say=lambda line: None)
    assert [row.status for row in rows] == ["done before"] * 2
    ((function, settings),) = prepared
    assert function is stages.prepare_detector
    load._detectors._loaded.clear()
    function(settings)
    assert len(load._detectors._loaded) == 1


def test_loop_threads_and_dask_write_the_same_bytes(slide: tuple[Path, int], tmp_path: Path) -> None:
    """Law: loop, threads, Dask: the same bytes."""
    from distributed import Client, LocalCluster

    loop = files(segment(slide[0], tmp_path / "loop", chosen()))
    assert (
        files(segment(slide[0], tmp_path / "threads", chosen(), Execution(cluster=False, workers=4, window=3))) == loop
    )
    with (
        LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert files(segment(slide[0], tmp_path / "dask", chosen(), Execution(), client)) == loop


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import oracle
from pipeline.config import Execution
from pipeline.archive import run as archive_run
oracle.install()
print("ready", flush=True)
run([Path({slide!r})], Path({out!r}), oracle.chosen(), Execution(cluster=False, workers=2, window=2), mpp=0.25,
    detect=oracle.detect)
"""


def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(slide: tuple[Path, int], tmp_path: Path) -> None:
    """Law: kill -9, then the same command: the same bytes as an uninterrupted run, and no block done twice."""
    out = tmp_path / "killed"
    code = RUNNER.format(tests=str(Path(oracle.__file__).parent), slide=str(slide[0]), out=str(out))
    slow = {**os.environ, oracle.SECONDS: "0.05"}
    done_before: set[str] = set()
    for wait in (0.25, 0.6, 0.9):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=slow)
        assert process.stdout is not None
        process.stdout.readline()  # imports are over
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        finished = {p.name: p.stat().st_mtime_ns for p in (out / "discs" / "work" / "instances").glob("*.parquet")}
        assert done_before <= finished.keys() or not finished, "a block's result was lost"
        done_before = set(finished)
    resumed = files(segment(slide[0], out, chosen()))
    assert resumed == files(segment(slide[0], tmp_path / "whole", chosen()))


def test_a_finished_slide_is_not_done_again(slide: tuple[Path, int], tmp_path: Path) -> None:
    folder = segment(slide[0], tmp_path, chosen())
    before = (folder / "nuclei.parquet").stat().st_mtime_ns
    (row,) = run([slide[0]], tmp_path, chosen(), ONE, mpp=0.25, say=lambda line: None)
    assert row.status == "done before"
    assert row.nuclei == slide[1]
    assert (folder / "nuclei.parquet").stat().st_mtime_ns == before
    (row,) = run(
        [slide[0]],
        tmp_path,
        chosen(),
        dataclasses.replace(ONE, overwrite=True),
        mpp=0.25,
        say=lambda line: None,
    )
    assert row.status == "done"
    assert not (folder / "work").exists()


def test_results_that_are_folders_are_replaced(slide: tuple[Path, int], tmp_path: Path) -> None:
    def formats(name: ExportFormat) -> Settings:
        return dataclasses.replace(chosen(), export=Export(formats=(name,)))

    folder = segment(slide[0], tmp_path, formats("spatialdata"))
    assert (folder / "nuclei.spatialdata.zarr").is_dir()
    segment(slide[0], tmp_path, formats("csv"), dataclasses.replace(ONE, overwrite=True))
    assert sorted(p.name for p in folder.glob("nuclei.*")) == ["nuclei.csv", "nuclei.parquet"]


def test_a_format_whose_package_is_missing_is_refused_before_anything_is_started(
    slide: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "h5ad", FORMATS["h5ad"]._replace(package="no_such_package"))
    settings = dataclasses.replace(chosen(), export=Export(formats=("h5ad",)))
    with pytest.raises(ConfigError, match=r"pip install \"nightslide\[anndata\]\""):
        run([slide[0]], tmp_path / "out", settings, ONE, mpp=0.25)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_both_are_shown(slide: tuple[Path, int], tmp_path: Path) -> None:
    segment(slide[0], tmp_path, chosen())
    with pytest.raises(RunError, match=r"tiling\.tile was 128, is 64"):
        run([slide[0]], tmp_path, chosen(tile=64), ONE, mpp=0.25)


def test_another_scale_or_one_the_weights_do_not_know_is_refused(slide: tuple[Path, int], tmp_path: Path) -> None:
    segment(slide[0], tmp_path, chosen())
    (row,) = run([slide[0]], tmp_path, chosen(), ONE, mpp=0.26, say=lambda line: None)
    assert row.status == "done otherwise"
    assert "was done at mpp=0.25, now mpp=0.26" in row.cause
    coarse = dataclasses.replace(chosen(), tiling=Tiling(mpp=0.5, tile=128, margin=20))
    with pytest.raises(RunError, match=r"trained at 0\.25 um per pixel"):
        run([slide[0]], tmp_path / "coarse", coarse, ONE, mpp=0.25)


def test_results_are_as_designed(slide: tuple[Path, int], tmp_path: Path) -> None:
    folder = segment(slide[0], tmp_path, chosen())
    assert sorted(p.name for p in folder.iterdir()) == [
        "artefacts.geojson",
        "nuclei.geojson.zip",
        "nuclei.parquet",
        "overlay.jpg",
        "slide.json",
        "thumbnail.jpg",
        "tissue.geojson",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["discs", "ledger.csv", "logs", "report.html", "run.json"]
    with (tmp_path / "ledger.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], int(row["nuclei"]), row["mpp_source"]) == ("done", slide[1], "default by --mpp")
    assert (
        json.loads((tmp_path / "run.json").read_text())["digest"]
        == json.loads((folder / "slide.json").read_text())["digest"]
    )
    with zipfile.ZipFile(folder / "nuclei.geojson.zip") as archive:
        features = [f for n in archive.namelist() for f in json.loads(archive.read(n))["features"]]
    assert len(features) == slide[1]


@pytest.mark.parametrize(("small", "large", "reads"), [(1200, 3000, 1), (200, 400, 2), (200, 3000, 2)])
def test_one_reading_is_both_pictures_where_they_show_the_same_pixels(
    slide: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, large: int, reads: int
) -> None:
    """As those of every slide that is smaller than either; this one has 410 x 330 px."""
    monkeypatch.setattr(stages, "THUMBNAIL_PX", small)
    monkeypatch.setattr(stages, "OVERLAY_PX", large)
    read: list[Frame] = []
    thumbnail = Slide.thumbnail

    def counted(slide: Slide, frame: Frame) -> Pixels:
        read.append(frame)
        return thumbnail(slide, frame)

    monkeypatch.setattr(Slide, "thumbnail", counted)
    results = segment(slide[0], tmp_path / "out", chosen())
    assert len(read) == 1 + reads  # the first one is that of the plan
    for name, longest_px in (("thumbnail.jpg", small), ("overlay.jpg", large)):
        with Image.open(results / name) as picture:
            assert max(picture.size) == min(longest_px, 410)


def test_nuclei_larger_than_the_margin_allows_are_counted(slide: tuple[Path, int], tmp_path: Path) -> None:
    """A margin too small for the nuclei is refused; where the user lies about their size, it is reported."""
    small = dataclasses.replace(chosen(tile=64, margin=3), stitching=Stitching(max_diameter_um=0.1, tolerance_px=1.0))
    (row,) = run([slide[0]], tmp_path, small, ONE, mpp=0.25, say=lambda line: None)
    assert row.work.counts.touching_nuclei > 0
    refused = dataclasses.replace(chosen(), tiling=Tiling(tile=128, margin=10, block=2))
    (row,) = run([slide[0]], tmp_path / "refused", refused, ONE, mpp=0.25, say=lambda line: None)
    assert row.status == "failed"
    assert "margin=10" in row.cause


def test_a_slide_that_fails_does_not_stop_the_others(slide: tuple[Path, int], tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    (archive / "deep er").mkdir(parents=True)
    (archive / "broken.svs").write_bytes(b"")
    (archive / "notes.txt").write_text("no slide")
    (archive / "deep er" / "däs.png").write_bytes(slide[0].read_bytes())
    rows = run(
        [archive, archive / "deep er" / "däs.png"],
        tmp_path / "out",
        chosen(),
        ONE,
        mpp=0.25,
        say=lambda line: None,
    )
    assert [(r.slide, r.status) for r in rows] == [("broken", "failed"), ("däs", "done")]
    assert "broken.svs" in rows[0].cause
    failure = json.loads((tmp_path / "out" / "broken" / "failure.json").read_text())
    assert failure["cause"] == rows[0].cause
    assert "SlideUnreadable" in "".join(failure["traceback"])


def test_slides_that_are_not_needed_soon_are_left_to_other_runs(slide: tuple[Path, int], tmp_path: Path) -> None:
    """However many cores there are: those that are held follow the blocks that detectors ask for."""
    slides, out, held = [tmp_path / f"{number}.png" for number in range(10)], tmp_path / "out", list[int]()
    for path in slides:
        path.write_bytes(slide[0].read_bytes())

    def detect(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        if not held:
            held.append(0)
            time.sleep(0.5)  # in which all that are wanted are locked
            held.append(len(list(out.glob("*/.lease*"))))
        return oracle.detect(patches, normalisation, settings)

    execution = Execution(cluster=False, workers=16)
    rows = archive_run.run(slides, out, chosen(block=5), execution, mpp=0.25, say=lambda line: None, detect=detect)
    assert [row.status for row in rows] == ["done"] * 10
    assert 1 < held[1] < 10


def test_tiles_at_a_limit_and_tiles_in_quarters_are_counted_apart(slide: tuple[Path, int], tmp_path: Path) -> None:
    def detect(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for number, found in enumerate(oracle.detect(patches, normalisation, settings)):
            yield found._replace(saturated=number == 0, split=number > 0)

    (row,) = archive_run.run([slide[0]], tmp_path, chosen(block=9), ONE, mpp=0.25, detect=detect, say=lambda _: None)
    assert (row.work.counts.saturated_tiles, row.work.counts.split_tiles) == (1, row.tiles - 1)
    assert row.tiles > 5


def test_what_was_chosen_and_changes_nothing_is_said(slide: tuple[Path, int], tmp_path: Path) -> None:
    """Of the settings and of the execution, once, before the first slide."""
    lines: list[str] = []
    settings, execution = chosen(tile=256, margin=64, block=2), dataclasses.replace(ONE, stage_space="1TB")
    settings = dataclasses.replace(settings, export=Export(("csv",), cells=5))
    run([slide[0]], tmp_path, settings, execution, mpp=0.25, say=lines.append)
    unused = [line for line in lines if "has no effect" in line]
    assert unused == [
        "WARNING: cells=5.0 has no effect without the format qupath",
        "WARNING: stage-space=1TB has no effect without --stage",
    ]
    assert lines.index(unused[0]) < 3
