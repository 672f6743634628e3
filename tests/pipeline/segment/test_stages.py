"""What the stages of a block leave behind: what the next one needs, no more, and again where some of it was lost."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive.manifest import resolve
from pipeline.config import Settings
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches, select
from pipeline.segment import stages
from pipeline.segment.job import Job
from pipeline.segment.plan import read_plan
from pipeline.segment.record import StageRecord
from slides.patches import PatchStore
from slides.scale import GivenScale

BLOCK = 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A slide that is planned."""
    paint(tmp_path / "discs.png", 0)
    job = Job(tmp_path / "discs.png", SlideFolder(tmp_path / "out"), resolve(chosen()), GivenScale(0.25))
    stages.make_plan(job)
    return job


def is_stored(job: Job) -> bool:
    return PatchStore.create(job.folder.patches, read_plan(job.folder, job.digest).grid, job.digest).is_done(BLOCK)


def test_a_block_leaves_what_the_next_stage_needs(job: Job) -> None:
    """So scratch space is bounded: patches go when they are detected, predictions when they are outlined."""
    focus, predictions = job.folder.focus(BLOCK), job.folder.predictions(BLOCK)
    record = stages.tile_block(job, BLOCK, StageRecord())
    assert (is_stored(job), focus.exists(), predictions.exists()) == (True, True, False)
    record = stages.detect_block(job, BLOCK, record, oracle.detect)
    assert (is_stored(job), focus.exists(), predictions.exists()) == (False, True, True)
    record = stages.outline_block(job, BLOCK, StageRecord())  # as after a restart: the others' work is in the file
    assert {"tile", "detect", "outline"} <= record.seconds.keys()
    assert (is_stored(job), focus.exists(), predictions.exists()) == (False, False, False)
    assert not any(predictions.parent.iterdir())
    assert stages.block_record(job, BLOCK) == record


def test_what_is_done_of_a_block_is_not_done_again(job: Job) -> None:
    """After a restart no part of the slide is read, or given to the detector, a second time."""

    def not_asked(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        raise AssertionError("it was detected before")

    record = stages.tile_block(job, BLOCK, StageRecord())
    job.source.unlink()
    stages.tile_block(job, BLOCK, record)
    record = stages.detect_block(job, BLOCK, record, oracle.detect)
    for _ in range(2):
        assert stages.tile_block(job, BLOCK, record) == record
        assert stages.detect_block(job, BLOCK, record, not_asked) == record
        assert not is_stored(job)
        record = stages.outline_block(job, BLOCK, record)


def test_what_is_lost_of_a_block_is_made_again(job: Job) -> None:
    """A power cut may take any file that was not synced."""
    record = stages.tile_block(job, BLOCK, StageRecord())
    focus = job.folder.focus(BLOCK).read_bytes()
    job.folder.focus(BLOCK).unlink()
    record = stages.tile_block(job, BLOCK, record)
    assert job.folder.focus(BLOCK).read_bytes() == focus
    stages.detect_block(job, BLOCK, record, oracle.detect)
    before = job.folder.predictions(BLOCK).read_bytes()
    job.folder.focus(BLOCK).unlink()
    stages.detect_block(job, BLOCK, record, oracle.detect)
    assert job.folder.focus(BLOCK).read_bytes() == focus
    assert len(job.folder.predictions(BLOCK).read_bytes()) == len(before)  # they hold seconds, too


def test_a_slide_that_is_taken_up_again_is_swept(job: Job) -> None:
    """Of what killed processes left half-written."""
    places = [job.folder.path, job.folder.work, *(f(BLOCK).parent for f in (job.folder.focus, job.folder.instances))]
    for place in places:
        (place / ".partial-of-a-killed-process").touch()
    stages.make_plan(job)
    assert not [file for place in places for file in place.glob(".partial*")]


@pytest.mark.parametrize(("before", "after"), [((700, 10, 10), (50_000, 10, 10)), ((0, 10, 10), (0, 10, 10))])
def test_python_seldom_looks_for_garbage_while_outlines_are_made(
    job: Job, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    """And never where it was told so."""
    record = stages.detect_block(job, BLOCK, stages.tile_block(job, BLOCK, StageRecord()), oracle.detect)
    usual = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        stages.outline_block(job, BLOCK, record)
        assert gc.get_threshold() == after
    finally:
        gc.set_threshold(*usual)


def test_a_nucleus_keeps_its_outline_where_others_are_not_detected(job: Job) -> None:
    """Law: in all its bytes, as its id follows from them. Of masks in 256 levels, as a network gives them."""
    found: list[HostInstances] = []

    def grey(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        for instances in oracle.detect(patches, normalisation, settings):
            levels = np.random.default_rng(0).integers(128, 256, instances.mask_probs.shape)
            found.append(instances._replace(mask_probs=(instances.mask_probs * levels).astype(np.uint8)))
            yield found[-1]

    stages.detect_block(job, BLOCK, stages.tile_block(job, BLOCK, StageRecord()), grey)
    plan = read_plan(job.folder, job.digest)
    outlines: dict[str, list[bytes]] = {"all": [], "fewer": []}
    for tile, instances in zip(plan.of_block(BLOCK), found, strict=True):
        last = select(instances, np.arange(len(instances.boxes) // 2, len(instances.boxes)))
        for which, some in (("all", instances), ("fewer", last)):
            rows, _ = stages.outline(some, tile, plan, job.settings)
            outlines[which] += rows["geometry"].to_pylist()
    assert len(outlines["all"]) > len(outlines["fewer"]) > 3
    assert set(outlines["all"]).issuperset(outlines["fewer"])
