"""The whole way on slides whose nuclei are known: what comes out depends on the slide and on nothing else.

Every nucleus is painted in a colour of its own, and the oracle, in the detector's place, reads the colours
back: reading, tiling, storing, claiming, stitching and export are the real ones.
"""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import stages, tables
from pipeline.archive import RunError, find_slides
from pipeline.config import ConfigError, Running, Settings, Stitching, Tiling, Tissue
from pipeline.demo import match
from pipeline.inference import Found
from pipeline.plan import Plan
from pipeline.run import run

HEIGHT, WIDTH, RADIUS = 330, 410, 9
ONE = Running(workers=1)


def oracle(patches: np.ndarray, plan: Plan, settings: Settings) -> Iterator[Found]:
    """Instances of patches that show every nucleus in a colour of its own, on white. Stands for the detector."""
    for patch in patches:
        number = patch.astype(np.int64) @ np.array([1, 256, 65536])
        ids = np.unique(number[number != 0xFFFFFF])
        side = 2 * RADIUS + 2
        boxes, masks = np.zeros((len(ids), 4), np.float32), np.zeros((len(ids), side, side), bool)
        for i, id_ in enumerate(ids):
            y, x = np.nonzero(number == id_)
            masks[i, y - y.min(), x - x.min()] = True
            boxes[i] = x.min(), y.min(), x.min() + side, y.min() + side
        yield Found(
            boxes,
            masks,
            (0.5 + ids % 97 / 200).astype(np.float32),
            np.zeros(len(ids), np.int64),
            np.ones(len(ids), np.int64),
            np.zeros((len(ids), 2), np.float32),
            False,
        )


def paint(path: Path, seed: int) -> int:
    """A slide of discs that do not touch, and how many."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centres: list[tuple[float, float]] = []
    for _ in range(400):
        cy, cx = rng.uniform(3, HEIGHT - 3), rng.uniform(3, WIDTH - 3)
        if all((cy - b) ** 2 + (cx - a) ** 2 > (2 * RADIUS + 2) ** 2 for b, a in centres):
            centres.append((cy, cx))
            number = len(centres) * 1009
            inside = (y + 0.5 - cy) ** 2 + (x + 0.5 - cx) ** 2 < rng.uniform(4, RADIUS) ** 2
            image[inside] = number % 256, number // 256 % 256, number // 65536
    Image.fromarray(image).save(path)
    return len(centres)


def chosen(tile: int = 128, margin: int = 20, block: int = 2) -> Settings:
    return Settings(
        tissue=Tissue(everywhere=True),
        tiling=Tiling(tile=tile, margin=margin, block=block),
        stitching=Stitching(max_diameter_um=2 * RADIUS * 0.25, simplify_px=0.0),
    )


def segment(slide: Path, out: Path, settings: Settings, running: Running = ONE, client: Any = None) -> Path:
    (row,) = run([slide], out, settings, running, mpp=0.25, client=client, say=lambda line: None)
    assert row.status == "done", row.cause
    return out / slide.stem


def outlines(folder: Path) -> set[bytes]:
    polygons = tables.geometry(tables.read_nuclei(folder / "nuclei.parquet"))
    return {shapely.to_wkb(p) for p in shapely.normalize(polygons)}


@pytest.fixture(autouse=True)
def _oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "detect_patches", oracle)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("slide") / "discs.png"
    return path, paint(path, 0)


@pytest.fixture(scope="module")
def expected(slide: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one tile that holds the whole slide, in a loop."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stages, "detect_patches", oracle)
        return segment(slide[0], tmp_path_factory.mktemp("whole"), chosen(tile=512))


@given(
    tile=st.sampled_from([64, 96, 128, 160, 224]),
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
    found = segment(path, tmp_path_factory.mktemp("tiled"), chosen(tile, margin, block), Running(workers=workers))
    assert len(outlines(expected)) == count
    assert outlines(found) == outlines(expected)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("nuclei.parquet", "nuclei.geojson.zip", "overlay.jpg")}


def test_loop_threads_and_dask_write_the_same_bytes(slide: tuple[Path, int], tmp_path: Path) -> None:
    """Law: loop, threads, Dask: the same bytes."""
    from distributed import Client, LocalCluster

    loop = files(segment(slide[0], tmp_path / "loop", chosen()))
    assert files(segment(slide[0], tmp_path / "threads", chosen(), Running(workers=4, window=3))) == loop
    with (
        LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert files(segment(slide[0], tmp_path / "dask", chosen(), Running(), client)) == loop


RUNNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_run
from pipeline import stages
from pipeline.run import run
def slow(*arguments):
    for found in test_run.oracle(*arguments):
        time.sleep(0.05)
        yield found
stages.detect_patches = slow
print("ready", flush=True)
run([Path({slide!r})], Path({out!r}), test_run.chosen(), test_run.Running(workers=2, window=2), mpp=0.25)
"""


def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(slide: tuple[Path, int], tmp_path: Path) -> None:
    """Law: kill -9, then the same command: the same bytes as an uninterrupted run, and no block done twice."""
    out = tmp_path / "killed"
    code = RUNNER.format(tests=str(Path(__file__).parent), slide=str(slide[0]), out=str(out))
    done_before: set[str] = set()
    for wait in (0.25, 0.6, 0.9):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
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


def test_other_settings_are_refused_and_both_are_shown(slide: tuple[Path, int], tmp_path: Path) -> None:
    segment(slide[0], tmp_path, chosen())
    with pytest.raises(RunError, match=r"tiling\.tile was 128, is 64"):
        run([slide[0]], tmp_path, chosen(tile=64), ONE, mpp=0.25)


def test_another_scale_or_one_the_weights_do_not_know_is_refused(slide: tuple[Path, int], tmp_path: Path) -> None:
    segment(slide[0], tmp_path, chosen())
    (row,) = run([slide[0]], tmp_path, chosen(), ONE, mpp=0.26, say=lambda line: None)
    assert row.status == "failed"
    assert "was done at mpp=0.25, now mpp=0.26" in row.cause
    coarse = dataclasses.replace(chosen(), tiling=Tiling(mpp=0.5, tile=128, margin=20))
    with pytest.raises(RunError, match=r"trained at 0\.25 um per pixel"):
        run([slide[0]], tmp_path / "coarse", coarse, ONE, mpp=0.25)


def test_results_are_as_designed(slide: tuple[Path, int], tmp_path: Path) -> None:
    folder = segment(slide[0], tmp_path, chosen())
    assert sorted(p.name for p in folder.iterdir()) == [
        "nuclei.geojson.zip",
        "nuclei.parquet",
        "overlay.jpg",
        "slide.json",
        "thumbnail.jpg",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["discs", "ledger.csv", "run.json"]
    with (tmp_path / "ledger.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], int(row["nuclei"]), row["mpp_source"]) == ("done", slide[1], "user")
    assert (
        json.loads((tmp_path / "run.json").read_text())["digest"]
        == json.loads((folder / "slide.json").read_text())["digest"]
    )
    with zipfile.ZipFile(folder / "nuclei.geojson.zip") as archive:
        features = [f for n in archive.namelist() for f in json.loads(archive.read(n))["features"]]
    assert len(features) == slide[1]


def test_nuclei_larger_than_the_margin_allows_are_counted(slide: tuple[Path, int], tmp_path: Path) -> None:
    """A margin too small for the nuclei is refused; where the user lies about their size, it is reported."""
    small = dataclasses.replace(chosen(tile=64, margin=3), stitching=Stitching(max_diameter_um=0.1, tolerance_px=1.0))
    (row,) = run([slide[0]], tmp_path, small, ONE, mpp=0.25, say=lambda line: None)
    assert row.touching_nuclei > 0
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
    assert "broken.svs" in (tmp_path / "out" / "errors.log").read_text()


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_slides_are_found_once_and_never_share_a_folder(tmp_path: Path) -> None:
    touch(*(tmp_path / n for n in ("a/x.svs", "b/x.svs", "a/x.tif", "a/X.NDPI", "x.txt")))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    archive = find_slides([tmp_path, tmp_path / "a", tmp_path / "a" / "x.svs"], tmp_path / "out")
    assert len(archive.sources) == 4
    names = [s.name.casefold() for s in archive.sources]
    assert len(set(names)) == 4
    assert archive.skipped == 1
    touch(tmp_path / "out" / "y.svs")
    assert len(find_slides([tmp_path], tmp_path / "out").sources) == 4


def test_manifests(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.svs", tmp_path / "s" / "b.svs")
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,mpp\ns/a.svs,0.5\ns/b.svs,\n")
    assert [(s.name, s.mpp) for s in find_slides([manifest], mpp=0.25).sources] == [("a", 0.5), ("b", 0.25)]
    manifest.write_text("path,mpp\ns/c.svs,0.5\n")
    with pytest.raises(RunError, match=r"line 2: 's/c.svs' does not exist"):
        find_slides([manifest])
    manifest.write_text("slide\ns/a.svs\n")
    with pytest.raises(RunError, match="need path"):
        find_slides([manifest])
    manifest.write_text("path,mpp\ns/a.svs,half\n")
    with pytest.raises(RunError, match="mpp='half' is not a number"):
        find_slides([manifest])


def test_inputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        find_slides([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="no slides in"):
        find_slides([tmp_path])
    with pytest.raises(ConfigError):
        Tiling(margin=600)


def test_matching_counts_each_nucleus_once() -> None:
    true = np.array([shapely.box(0, 0, 10, 10), shapely.box(20, 0, 30, 10)], object)
    found = np.array([shapely.box(1, 0, 11, 10), shapely.box(0, 0, 9, 10), shapely.box(50, 0, 60, 10)], object)
    scores = match(found, true)
    assert (scores.hits, scores.found, scores.true) == (1, 3, 2)
    assert (scores.precision, scores.recall, scores.f1) == (1 / 3, 1 / 2, 2 / 5)
