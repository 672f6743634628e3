"""`--stain auto`: a stand-in for the detector scores higher with or without normalisation, and a run follows it."""

import csv
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from PIL import Image

from pipeline.archive.run import run
from pipeline.config import Execution, Settings, Stain, Stitching, Tiling, Tissue
from pipeline.errors import SlideChanged
from pipeline.layout import RunFolder
from pipeline.model.fitted_stain import UNCHANGED, Normalisation
from pipeline.model.instances import HostInstances, Patches, empty
from pipeline.segment import stages, stain_trial, tables
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan, plan_slide, read_plan, write_plan
from pipeline.segment.regions import RegionFile
from pipeline.segment.slide_stain import spread
from pipeline.segment.stages import Detect
from slides.geometry import Affine, Frame, Size
from slides.scale import GivenScale
from slides.slide import open_slide
from slides.tissue import TissueMap

ROOT = Path(stain_trial.__file__).parents[2]
SAME = Affine(1.0, 1.0, 0.0, 0.0)


def chosen(method: Any = "auto", tile: int = 256) -> Settings:
    return Settings(
        tissue=Tissue(everywhere=True),
        tiling=Tiling(mpp=0.25, tile=tile, margin=64, block=1),
        stain=Stain(method=method, patches=8),
        stitching=Stitching(max_diameter_um=10),
    )


def scoring(
    scores: dict[str, float], patches: Patches, normalisation: Normalisation, settings: Settings
) -> Iterator[HostInstances]:
    """One nucleus in the middle of every patch, with the score of the stain normalisation; none for a score of 0."""
    score = scores[normalisation.source.method]
    for side in (len(patch) for patch in patches):
        one = empty(8)._replace(
            boxes=np.array([[side / 2 - 4, side / 2 - 4, side / 2 + 4, side / 2 + 4]], np.float32),
            mask_probs=np.full((1, 8, 8), 255, np.uint8),
            scores=np.array([score], np.float32),
            class_index=np.zeros(1, np.int64),
            class_scores=np.ones(1, np.float32),
            votes=np.ones(1, np.int64),
            stain_density=np.zeros((1, 2, 5), np.float32),
        )
        yield one if score else empty(8)


def detector(**scores: float) -> Detect:
    return functools.partial(scoring, scores)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs of haematoxylin in eosin, 900 x 700 px, with a stripe of glass."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:700, :900]
    density = np.full((700, 900, 3), (0.1, 0.5, 0.25))
    for row, column in rng.integers(0, 700, (150, 2)):
        density[(y - row) ** 2 + (x - column) ** 2 < 80] = (0.9, 1.0, 0.5)
    density[:80] = 0
    path = tmp_path_factory.mktemp("slide") / "slide.png"
    Image.fromarray((230 * np.exp(-density) + rng.normal(0, 2, density.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return path


def segment(slide: Path, out: Path, wanted: Settings, detect: Detect) -> tuple[dict[str, Any], dict[str, str]]:
    """slide.json, and the row of the ledger."""
    execution = Execution(cluster=False, workers=1)
    (record,) = run([slide], out, wanted, execution, mpp=0.25, detect=detect, say=lambda line: None)
    assert record.status == "done", record.cause
    with (out / "ledger.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    return json.loads((out / slide.stem / "slide.json").read_text()), row


def planned(slide: Path, settings: Settings, regions: RegionFile | None = None) -> Plan:
    with open_slide(slide, mpp=0.25) as opened:
        return plan_slide(opened, settings, regions)


@pytest.mark.parametrize(
    ("scores", "method"),
    [
        ({"none": 0.8, "macenko": 0.9}, "macenko"),
        ({"none": 0.9, "macenko": 0.8}, "none"),
        ({"none": 0.8, "macenko": 0.8}, "none"),
        ({"none": 0.0, "macenko": 0.0}, "none"),
    ],
)
def test_the_detector_decides(slide: Path, tmp_path: Path, scores: dict[str, float], method: str) -> None:
    """Law: the nuclei are those of a run with the chosen method; the choice is in slide.json and in the ledger."""
    about, row = segment(slide, tmp_path / "auto", chosen(), detector(**scores))
    assert about["stain"]["method"] == about["stain_target"]["method"] == row["stain"] == method
    assert about["stain_trial_scores"] == [pytest.approx(scores["none"]), pytest.approx(scores["macenko"])]
    again, named = segment(slide, tmp_path / method, chosen(method), detector(**scores))
    assert again["stain"] == about["stain"]
    assert (again["stain_trial_scores"], named["stain"]) == (None, method)
    nuclei = [tables.read_nuclei(tmp_path / out / "slide" / "nuclei.parquet") for out in ("auto", method)]
    assert nuclei[0].equals(nuclei[1])
    assert bool(nuclei[0].num_rows) == any(scores.values())


def test_where_it_is_tried_depends_on_the_slide_alone(slide: Path, tmp_path: Path) -> None:
    """Law: not on the tiling, nor on the regions to which a run is restricted: their nuclei are the whole slide's."""
    squares = planned(slide, chosen()).trials
    assert 1 < len(squares) <= stain_trial.MOST
    for square in squares:
        assert square.size == (stain_trial.SIDE_PX, stain_trial.SIDE_PX)
        assert square.x0 >= 0 <= square.y0
        assert square.x1 <= 900
        assert square.y1 <= 700
    ring = [[500, 300], [600, 300], [600, 400], [500, 400], [500, 300]]
    area = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    drawn = tmp_path / "slide.geojson"
    drawn.write_text(json.dumps({"type": "FeatureCollection", "features": [area]}))
    assert planned(slide, chosen(tile=512)).trials == squares
    restricted = planned(slide, chosen(), RegionFile.of(drawn, crop=True))
    assert restricted.tissue.area_mm2 < 0.1 * planned(slide, chosen()).tissue.area_mm2
    assert restricted.trials == squares


@given(area_mm2=st.floats(0.001, 60), seed=st.integers(0, 9))
@checked(max_examples=30)
def test_a_large_slide_is_tried_in_a_few_places_and_a_small_one_in_a_tenth(area_mm2: float, seed: int) -> None:
    """Law: at most 4 million px, at most a tenth where that is a million px or more, and never more than there is."""
    side = math.ceil(math.sqrt(area_mm2) * 1000 / 8)  # of the mask, px of 8 um
    mask = np.random.default_rng(seed).random((side, side)) < 0.9
    tissue = TissueMap(mask, Frame(Size(side, side), 8.0, SAME), Frame(Size(side * 32, side * 32), 0.25, SAME))
    count, cover = len(stain_trial.squares(tissue, 64)), math.ceil(tissue.area_mm2 / 0.128**2)
    assert count == min(16, cover, max(4, math.ceil(tissue.area_mm2 / 0.128**2 / 10)))
    of_a_square = (min(512, math.ceil(side / 2) * 64) * 0.25e-3) ** 2  # mm2; a pixel of the mask is 32 work px
    assert stain_trial.inference_mm2(tissue, 64) == pytest.approx(2 * count * of_a_square)


@given(width=st.integers(1, 1500), height=st.integers(1, 1500), step=st.sampled_from([64, 128]))
@checked(max_examples=60)
def test_no_more_is_tried_than_a_small_image_has(width: int, height: int, step: int) -> None:
    """Law: squares lie in the image, or end within a step of its end; those in the image are of the usual size.

    Of an image of 256 x 256 px 512 x 512 were tried, twice, which took nine times as long as to detect in it.
    """
    mask = np.ones((math.ceil(height / 32), math.ceil(width / 32)), bool)
    frame = Frame(Size(mask.shape[1], mask.shape[0]), 8.0, SAME)
    tissue = TissueMap(mask, frame, Frame(Size(width, height), 0.25, SAME))
    squares = stain_trial.squares(tissue, step)
    assert squares
    for square in squares:
        assert square.x0 >= 0 <= square.y0
        for side, start, end, extent in zip(square.size, square[:2], square[2:], (width, height), strict=True):
            assert side == min(stain_trial.SIDE_PX, math.ceil(extent / step) * step)
            assert end <= extent or (start == 0 and end - extent < step)
    assert stain_trial.inference_mm2(tissue, step) == pytest.approx(2 * sum(s.area for s in squares) * 0.25**2 / 1e6)


def test_the_choice_does_not_depend_on_the_tiling_of_a_gpu(slide: Path, tmp_path: Path) -> None:
    """There, patches are filled up to the sizes of tiles: a trial has its own, whatever the run's, and one view."""
    seen: list[Settings] = []

    def recording(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        seen.append(settings)
        return detector(none=0.8, macenko=0.9)(patches, normalisation, settings)

    for tile in (256, 512):
        seen.clear()
        wanted = chosen(tile=tile)
        wanted = dataclasses.replace(wanted, detector=dataclasses.replace(wanted.detector, views=4))
        segment(slide, tmp_path / str(tile), wanted, recording)
        assert seen[0] == seen[1]
        assert (seen[0].tiling, seen[0].detector.views) == (Tiling(mpp=0.25, tile=1024), 1)
        assert {s.tiling.tile for s in seen[2:]} == {tile}


def test_a_slide_is_planned_without_torch(slide: Path) -> None:
    """Law: a process that plans and tiles, one for every core beside a GPU, need not load what detects."""
    code = (
        "import sys; from pathlib import Path; from pipeline.config import Settings, Tiling, Tissue; "
        "from pipeline.segment.plan import plan_slide; from slides.slide import open_slide\n"
        f"with open_slide(Path({str(slide)!r}), mpp=0.25) as opened:\n"
        "    plan = plan_slide(opened, Settings(tissue=Tissue(everywhere=True), tiling=Tiling(mpp=0.25)))\n"
        "print(plan.normalisation.source.method, len(plan.trials) > 0, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["macenko", "True", "False"]


@pytest.mark.parametrize("method", ["none", "macenko", "reinhard"])
def test_nothing_is_tried_where_the_method_is_named(slide: Path, method: str) -> None:
    """And no slide waits for the device before it is cut into tiles."""
    assert planned(slide, chosen(method)).trials == ()
    needed = [stage.name for stage in stages.STAGES if stage.needed(chosen(method))]
    assert needed == [stage.name for stage in stages.STAGES if stage.name != "stain"]
    assert all(stage.needed(chosen("auto")) for stage in stages.STAGES)


def test_a_slide_that_cannot_be_fitted_is_not_tried(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), (200, 200, 200)).save(tmp_path / "grey.png")
    plan = planned(tmp_path / "grey.png", chosen())
    assert (plan.normalisation, plan.trials) == (UNCHANGED, ())
    assert plan.notes[0].startswith("not normalised: ")


def test_it_is_decided_once(slide: Path, tmp_path: Path) -> None:
    """A run that is killed before the choice makes it again; after it, every process reads it from the plan."""
    folder = RunFolder(tmp_path).slide("slide")
    folder.path.mkdir()
    job = Job(slide, folder, chosen(), GivenScale(default_mpp=0.25))
    stages.make_plan(job)
    undecided = read_plan(folder, job.digest)
    stages.make_plan(job)
    assert read_plan(folder, job.digest).trials == undecided.trials != ()
    record = stages.choose_stain(job, detector(none=0.9, macenko=0.8))
    assert record.seconds.keys() == {"stain"}
    decided = read_plan(folder, job.digest)
    assert decided.normalisation == UNCHANGED
    stages.make_plan(job)
    assert stages.choose_stain(job, detector()) == record  # it asks no detector: this one knows no score
    assert read_plan(folder, job.digest).trial_scores == decided.trial_scores == (0.9, 0.8)


def test_what_another_worker_has_decided_meanwhile_stays(slide: Path, tmp_path: Path) -> None:
    """Blocks may follow its choice already. Where it is of another kind of device, it may have chosen otherwise."""
    job = Job(slide, RunFolder(tmp_path).slide("slide"), chosen(), GivenScale(default_mpp=0.25))
    stages.make_plan(job)

    def slower(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        plan = read_plan(job.folder, job.digest)
        write_plan(plan._replace(trials=(), trial_scores=(0.8, 0.9)), job.folder, job.digest)
        return detector(none=0.9, macenko=0.8)(patches, normalisation, settings)

    stages.choose_stain(job, slower)
    decided = read_plan(job.folder, job.digest)
    assert (decided.normalisation.source.method, decided.trial_scores) == ("macenko", (0.8, 0.9))


def test_another_file_in_the_place_of_the_slide_decides_nothing(slide: Path, tmp_path: Path) -> None:
    """Replaced since it was planned: the stain of all nuclei would be chosen by pixels of another slide."""
    own = tmp_path / "own.png"
    shutil.copy(slide, own)
    job = Job(own, RunFolder(tmp_path).slide("own"), chosen(), GivenScale(default_mpp=0.25))
    stages.make_plan(job)
    undecided = read_plan(job.folder, job.digest)
    with Image.open(slide) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(own)
    with pytest.raises(SlideChanged, match="is not the file this work was started on"):
        stages.choose_stain(job, detector(none=0.9, macenko=0.8))
    assert read_plan(job.folder, job.digest).trials == undecided.trials != ()


def test_a_plan_that_was_written_within_one_tick_of_the_clock_is_read_again(slide: Path, tmp_path: Path) -> None:
    """Time stamps of some network file systems are of whole seconds."""
    job = Job(slide, RunFolder(tmp_path).slide("slide"), chosen(), GivenScale(default_mpp=0.25))
    for stage in (lambda: stages.make_plan(job), lambda: stages.choose_stain(job, detector(none=0.9, macenko=0.8))):
        stage()
        os.utime(job.folder.plan, (1e9, 1e9))
        undecided = read_plan(job.folder, job.digest).trials
    assert undecided == ()


def test_where_nothing_is_detected_it_is_said(slide: Path, tmp_path: Path) -> None:
    about, _ = segment(slide, tmp_path, chosen(), detector(none=0.0, macenko=0.0))
    assert stain_trial.NOTHING_FOUND in str(about)


@given(width=st.integers(500, 4000), height=st.integers(500, 4000), count=st.sampled_from([4, 16, 64]))
def test_squares_are_spread_over_both_axes(width: int, height: int, count: int) -> None:
    """Law: of a field of any size, each half has some of them. Row by row, they may all lie in one column."""
    frame = Frame(Size(width, height), 0.25, SAME)
    tissue = TissueMap(np.ones((-(-height // 32), -(-width // 32)), bool), frame._replace(mpp=8.0), frame)
    boxes = spread(tissue, count, 16)
    for middle, positions in (
        (width / 2, [(b.x0 + b.x1) / 2 for b in boxes]),
        (height / 2, [(b.y0 + b.y1) / 2 for b in boxes]),
    ):
        assert min(positions) < middle < max(positions)


def test_one_view_is_tried(slide: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def detect(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        seen.append((settings.detector.views, patches[0].shape))
        return scoring({"none": 0.7, "macenko": 0.6}, patches, normalisation, settings)

    settings = chosen()
    several = dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, views=4))
    segment(slide, tmp_path, several, detect)
    assert seen[:2] == [(1, (512, 512, 3))] * 2
    assert {views for views, _ in seen[2:]} == {4}


def test_a_trial_is_no_time_in_which_the_detector_waits(slide: Path, tmp_path: Path) -> None:
    """That of a second slide, once the detector has had blocks of the first."""
    other = tmp_path / "other.png"
    other.write_bytes(slide.read_bytes())

    def slow(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        if len(patches[0]) == stain_trial.SIDE_PX:
            time.sleep(1.5)
        yield from detector(none=0.8, macenko=0.9)(patches, normalisation, settings)

    execution = Execution(cluster=False, workers=1, window=1)
    records = run([slide, other], tmp_path / "out", chosen(), execution, mpp=0.25, detect=slow, say=lambda line: None)
    for record in records:
        assert record.work.seconds["stain"] >= 3
        assert record.work.waited.get("plan", 0) < 3
