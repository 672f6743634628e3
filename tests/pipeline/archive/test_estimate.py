"""What `plan` says of a slide before the run: its tissue, or why there will be none."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import oracle
from pipeline.archive import estimate
from pipeline.archive.estimate import estimate_slide, estimate_slides
from pipeline.archive.inputs.sources import Source
from pipeline.archive.run import run
from pipeline.config import Execution, Settings, Stain, Tissue
from pipeline.segment.record import NO_TISSUE
from slides.scale import GivenScale


def source(path: Path, side: int, level: int = 128) -> Source:
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)
    return Source(path, path.stem, GivenScale(default_mpp=0.25))


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_slide_without_colour_is_noted_before_the_run(tmp_path: Path, level: int) -> None:
    """Law: nothing is silent: a grey, black or white slide would end with 0 nuclei."""
    grey = source(tmp_path / "grey.png", 2000, level)
    estimate = estimate_slide(grey, Settings(), 42.0)
    assert (estimate.problem, estimate.tissue_mm2, estimate.notes) == ("", 0, (NO_TISSUE,))
    everywhere = dataclasses.replace(Settings(), tissue=Tissue(everywhere=True))
    assert estimate_slide(grey, everywhere, 42.0).notes == ()


def test_a_field_of_view_smaller_than_any_tissue_is_taken_whole(tmp_path: Path) -> None:
    small, large = source(tmp_path / "small.png", 390), source(tmp_path / "large.png", 410)  # 97.5 and 102.5 um
    assert estimate_slide(small, Settings(), 42.0).tissue_mm2 == pytest.approx(0.0975**2, rel=0.2)  # whole px of 8 um
    assert estimate_slide(large, Settings(), 42.0).tissue_mm2 == 0


def test_the_scale_is_that_of_the_ledger(tmp_path: Path) -> None:
    """Of a slide whose pixels are not quite square, as a scanner may state them."""
    path = tmp_path / "oblong.tif"
    Image.new("RGB", (300, 300), "white").save(path, dpi=(25400 / 0.25, 25400 / 0.254))
    (row,) = run([path], tmp_path / "out", oracle.chosen(), Execution(cluster=False), say=print, detect=oracle.detect)
    estimated = estimate_slide(Source(path, "oblong", GivenScale()), oracle.chosen(), 42.0)
    assert (estimated.mpp, estimated.mpp_source) == (row.mpp, row.mpp_source)
    assert row.mpp == pytest.approx(0.252, abs=1e-5)


def test_a_template_is_nothing_to_an_estimate(tmp_path: Path) -> None:
    settings = dataclasses.replace(Settings(), stain=Stain(method="macenko", template="nowhere.png"))
    assert estimate_slide(source(tmp_path / "a.png", 390), settings, 42.0).problem == ""


def crash(given: Source, _: Settings, __: float) -> estimate.SlideEstimate:
    """Stands for the estimate of a slide of which one crashes its reader."""
    if given.name == "bad":
        os.abort()
    return estimate.SlideEstimate(given.name, "", 0.25, "given", 1.0, 1, 0.0, 0.0)


def test_a_slide_that_crashes_its_reader_is_one_that_will_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 13: and those after it are estimated."""
    monkeypatch.setattr(estimate, "estimate_slide", crash)
    slides = [Source(tmp_path, name, GivenScale()) for name in ("a", "bad", "c")]
    problems = [each.problem for each in estimate_slides(slides, Settings(), 42.0, apart=True)]
    assert problems == ["", estimate._CRASHED, ""]
