"""The demo's score, and what it says where it cannot write."""

from pathlib import Path

import numpy as np
import pytest
import shapely

from pipeline.config import Settings
from pipeline.demo import match, run_demo
from pipeline.errors import ConfigError, RunError


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
