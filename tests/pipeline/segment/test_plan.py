"""The plan of a slide."""

import dataclasses
from pathlib import Path

import pytest

from oracle import HEIGHT, WIDTH, chosen, paint
from pipeline.config import Tissue
from pipeline.segment.plan import plan_slide
from slides import slide as slide_module
from slides.slide import open_slide


def test_the_thumbnail_of_a_slide_larger_than_any_glass_is_coarser_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a slide is processed in bounded memory: it is not refused."""
    paint(tmp_path / "discs.png", 0)
    settings = dataclasses.replace(chosen(), tissue=Tissue(everywhere=True, thumbnail_mpp=1.0))
    with open_slide(tmp_path / "discs.png", mpp=0.25) as slide:
        usual = plan_slide(slide, settings)
        assert (usual.tissue.frame.mpp, usual.notes) == (1.0, ())
        monkeypatch.setattr(slide_module, "_LARGEST_THUMBNAIL_PX", HEIGHT * WIDTH // 16 // 5)
        plan = plan_slide(slide, settings)
    assert plan.tissue.frame.mpp == 4.0
    assert plan.notes == (
        "the slide is larger than any glass, so its scale may be wrong: tissue was detected at 4 µm/px, not 1",
    )
    assert plan.tiles == usual.tiles
