"""The demo's score, and what it says where it cannot write."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely

from pipeline import demo
from pipeline.archive.known import DONE_OTHERWISE
from pipeline.config import Settings
from pipeline.demo import match, run_demo
from pipeline.errors import ConfigError, RunError
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord
from slides.geometry import Size


def test_matching_counts_each_nucleus_once() -> None:
    true = np.array([shapely.box(0, 0, 10, 10), shapely.box(20, 0, 30, 10)], object)
    detected = np.array([shapely.box(1, 0, 11, 10), shapely.box(0, 0, 9, 10), shapely.box(50, 0, 60, 10)], object)
    scores = match(detected, true)
    assert (scores.matched, scores.detected, scores.true) == (1, 3, 2)
    assert (scores.precision, scores.recall, scores.f1) == (1 / 3, 1 / 2, 2 / 5)


def test_without_nuclei_there_is_no_division_by_zero() -> None:
    none = np.array([], object)
    assert match(none, none) == (0, 0, 0)
    assert (match(none, none).precision, match(none, none).recall, match(none, none).f1) == (0, 0, 0)


def test_a_seed_below_0_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed=-1: need 0 or more"):
        run_demo(tmp_path / "out", -1, Settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_place_of_the_output_folder_is_wrong_usage(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made a folder"):
        run_demo(tmp_path / out, 0, Settings())


@pytest.mark.parametrize(
    ("status", "exported", "ends_with", "scored", "dragged"),
    [
        ("done", True, 0, True, True),
        ("done before", False, 0, True, False),
        (DONE_OTHERWISE, True, 1, False, False),
        ("failed", False, 1, False, False),
    ],
)
def test_what_it_says_is_of_the_slide_that_it_has_drawn_and_of_files_that_are_there(
    status: str,
    exported: bool,
    ends_with: int,
    scored: bool,
    dragged: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Results of another slide, as a former version drew it, have another truth; other formats no file for QuPath."""
    none = np.array([], object)
    monkeypatch.setattr(demo, "SIZE", Size(256, 256))
    monkeypatch.setattr(demo, "run", lambda *_, **__: [SlideRecord("phantom-0", status)])
    monkeypatch.setattr(demo, "tables", SimpleNamespace(read_nuclei=lambda *_: none, geometry=lambda table: table))
    if exported:
        file = RunFolder(tmp_path / "results").slide("phantom-0").export("qupath")
        file.parent.mkdir(parents=True)
        file.touch()
    assert run_demo(tmp_path, 0, Settings()) == ends_with
    out = capsys.readouterr().out
    assert ("against the truth" in out, "in QuPath open" in out) == (scored, dragged)
