"""The breakdown of misses and false detections: known answers on painted maps, and laws for any pair of maps."""

import json
import math

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training import breakdown
from training.breakdown import FALSE, HIT, MISSES, Breakdown, Rows, break_down, causes, count, join, reliability
from training.measures import Detections, overlap

maps = arrays(np.int32, (6, 7), elements=st.sampled_from([0, 0, 1, 2, 3, 4]))


def box(labels: np.ndarray, x0: int, y0: int, x1: int, y1: int, value: int) -> None:
    labels[y0:y1, x0:x1] = value


def named(truth: np.ndarray, detected: np.ndarray) -> tuple[list[str], list[str]]:
    """Causes of the nuclei and detections, by name."""
    miss, false = causes(overlap(truth, detected))
    return (
        ["hit" if i == HIT else list(MISSES)[i] for i in miss],
        ["hit" if i == HIT else list(FALSE)[i] for i in false],
    )


def rows_of(truth: np.ndarray, boxes: list[tuple[int, int, int, int]], scores: list[float], mpp: float = 1.0) -> Rows:
    shapes = np.array([shapely.box(*b) for b in boxes], object)
    detected = Detections(shapes, np.array(scores, float), np.zeros(len(boxes), np.int64))
    return break_down(truth, detected, overlap(truth, detected.paint((truth.shape[0], truth.shape[1]))), mpp)


# ------------------------------------------------------------------------------------------- known answers


def test_a_detection_around_two_nuclei_is_a_merger() -> None:
    """The larger of the two may be hit all the same: then it is no miss, and the detection not false."""
    truth, detected = np.zeros((2, 20, 40), np.int32)
    box(truth, 2, 2, 10, 10, 1)
    box(truth, 10, 2, 18, 10, 2)
    box(detected, 2, 2, 18, 10, 1)
    assert named(truth, detected) == (["merged", "merged"], ["merger"])
    truth[truth == 2] = 0
    box(truth, 10, 2, 13, 10, 2)
    box(detected, 2, 2, 13, 10, 1)
    detected[:, 13:] = 0
    assert named(truth, detected) == (["hit", "merged"], ["hit"])


def test_two_detections_in_a_nucleus_are_parts_of_it() -> None:
    truth, detected = np.zeros((2, 20, 40), np.int32)
    box(truth, 2, 2, 18, 10, 1)
    box(detected, 2, 2, 10, 10, 1)
    box(detected, 10, 2, 18, 10, 2)
    assert named(truth, detected) == (["split"], ["part", "part"])  # an IoU of exactly one half is no hit
    detected[:, 10] = 1
    assert named(truth, detected) == (["hit"], ["hit", "part"])


@pytest.mark.parametrize(
    ("width", "miss", "false"),
    [(9, "hit", "hit"), (6, "outline", "outline"), (3, "slight", "part"), (1, "none", "part")],
)
def test_a_detection_that_is_too_small(width: int, miss: str, false: str) -> None:
    truth, detected = np.zeros((2, 20, 40), np.int32)
    box(truth, 2, 2, 18, 10, 1)
    box(detected, 2, 2, 2 + width, 10, 1)
    assert named(truth, detected) == ([miss], [false])


def test_a_detection_that_is_too_large_or_beside() -> None:
    truth, detected = np.zeros((2, 20, 40), np.int32)
    box(truth, 2, 2, 6, 10, 1)
    box(detected, 2, 2, 12, 10, 1)
    assert named(truth, detected) == (["outline"], ["outline"])
    box(detected, 2, 2, 20, 10, 1)
    assert named(truth, detected) == (["slight"], ["slight"])
    detected[:, :6] = 0
    assert named(truth, detected) == (["none"], ["nothing"])


def test_sizes_neighbours_ratio_and_scores_of_two_images() -> None:
    """Worked out by hand, at 0.25 um per px: squares of 8, 16 and 32 px are 4, 16 and 64 um2."""
    truth = np.zeros((64, 128), np.int32)
    box(truth, 0, 0, 8, 8, 1)  # 4 um2; its centre is 3 um from the next one's
    box(truth, 8, 0, 24, 16, 2)  # 16 um2
    box(truth, 80, 20, 112, 52, 3)  # 64 um2, alone
    first = rows_of(truth, [(8, 0, 24, 16), (80, 20, 112, 44), (0, 56, 8, 64)], [0.95, 0.91, 0.3], 0.25)
    second = rows_of(np.zeros((8, 8), np.int32), [(0, 0, 8, 8)], [1.0], 0.25)
    counts = count(join([first, second]))
    sizes, crowding = (
        {name: tuple(part) for name, part in parts.items() if part.annotated or part.detected}
        for parts in (counts.sizes, counts.crowding)
    )
    assert sizes == {
        "3.12 to 6.25 um2 (50 to 100 px)": (1, 0, 2, 0),
        "12.5 to 25 um2 (200 to 400 px)": (1, 1, 1, 1),
        "25 to 50 um2 (400 to 800 px)": (0, 0, 1, 1),
        "50 um2 and more": (1, 1, 0, 0),
    }
    assert crowding == {"0": (1, 1, 4, 2), "1 to 2": (2, 1, 0, 0)}
    assert counts.misses == {"merged": 0, "split": 0, "outline": 0, "slight": 0, "none": 1}
    assert counts.false == {"merger": 0, "part": 0, "outline": 0, "slight": 0, "nothing": 2}
    assert counts.area_ratio == (0.8125, 0.875, 0.9375)  # quartiles of 1 and .75
    assert counts.scores["0.3 to 0.4"] == (1, 0.3, 0.0)
    top = counts.scores["0.9 to 1"]  # 1 belongs to the last bin
    assert top.detected == 3
    assert top.share_right == pytest.approx(2 / 3)
    assert top.mean_score == pytest.approx(2.86 / 3)
    assert counts.calibration_error == pytest.approx((0.3 + abs(2.86 - 2)) / 4)


def test_scores_that_say_how_many_are_right_have_no_error() -> None:
    score = np.repeat([0.25, 0.75], 4)
    right = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    assert reliability(score, right)[1] == 0
    assert reliability(score, ~right)[1] == 0.5
    assert math.isnan(reliability(np.zeros(0), np.zeros(0, bool))[1])


def test_what_is_painted_over_is_not_counted() -> None:
    """As in the measures: a detection that has no pixel of its own is none."""
    rows = rows_of(np.zeros((8, 8), np.int32), [(0, 0, 8, 8), (2, 2, 4, 4)], [0.9, 0.8])
    assert rows.score.tolist() == [0.9]


# ---------------------------------------------------------------------------------------------------- laws


def of_maps(truth: np.ndarray, detected: np.ndarray) -> tuple[Rows, Breakdown]:
    """Detections are the pixels of `detected`, so some have several parts."""
    ids = np.unique(detected[detected > 0])
    squares = [[shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(detected == i)] for i in ids]
    shapes = np.array([shapely.union_all(s) for s in squares], object)
    found = Detections(shapes, np.linspace(0.9, 0.1, len(ids)), np.zeros(len(ids), np.int64))
    rows = break_down(truth, found, overlap(truth, found.paint((6, 7))), 0.25)
    return rows, count(rows)


@given(maps, maps)
def test_every_nucleus_and_detection_is_counted_once(truth: np.ndarray, detected: np.ndarray) -> None:
    """Law: causes sum to the misses and the false detections, sizes, crowding and score bins to all; hits are PQ's."""
    rows, counts = of_maps(truth, detected)
    hits = int((rows.miss == HIT).sum())
    assert hits == int((rows.false == HIT).sum()) == len(rows.area_ratio)
    assert sum(counts.misses.values()) == len(rows.miss) - hits
    assert sum(counts.false.values()) == len(rows.false) - hits
    for parts in (counts.sizes, counts.crowding):
        sums = np.array([tuple(part) for part in parts.values()]).sum(0)
        assert sums.tolist() == [len(rows.miss), hits, len(rows.false), hits]
    assert sum(b.detected for b in counts.scores.values()) == len(rows.false)
    assert 0 <= (0 if math.isnan(counts.calibration_error) else counts.calibration_error) <= 1


@given(maps, maps)
def test_numbers_of_labels_do_not_matter(truth: np.ndarray, detected: np.ndarray) -> None:
    renumbered = np.array([0, 40, 7, 300, 2])
    for again in (causes(overlap(renumbered[truth], detected)), causes(overlap(truth, renumbered[detected]))):
        for before, after in zip(causes(overlap(truth, detected)), again, strict=True):
            assert sorted(before) == sorted(after)


@given(maps, maps)
def test_it_can_be_written(truth: np.ndarray, detected: np.ndarray) -> None:
    """Law: JSON without NaN, and tables of a width each, also where there is nothing."""
    _, counts = of_maps(truth, detected)
    json.dumps(breakdown.as_json(counts), allow_nan=False)
    for table in breakdown.markdown(counts).split("\n\n")[:-1]:
        assert len({line.count("|") for line in table.splitlines()}) == 1
