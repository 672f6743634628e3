"""Measures: known answers by hand, and laws that hold for any pair of label maps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.evaluate import aji, aji_plus, dice, mean, overlap, panoptic, score

maps = arrays(np.int32, (6, 7), elements=st.sampled_from([0, 0, 1, 2, 5, 900]))


def squares(*corners: tuple[int, int, int]) -> np.ndarray:
    """A 20 x 20 map with labelled 4 x 4 squares at (row, column, label)."""
    labels = np.zeros((20, 20), np.int32)
    for row, column, label in corners:
        labels[row : row + 4, column : column + 4] = label
    return labels


@given(maps)
def test_a_map_against_itself_is_perfect(labels: np.ndarray) -> None:
    scores = score(labels, labels)
    assert scores[:9] == (1.0,) * 9
    assert scores.annotated == scores.found


@given(maps, maps)
def test_measures_are_bounded_and_do_not_depend_on_the_numbers_of_labels(a: np.ndarray, b: np.ndarray) -> None:
    # in the same order: of two predictions that a nucleus overlaps equally, AJI takes the first
    renumbered = np.where(b == 0, 0, 7 * b + 3)
    first, second = score(a, b), score(a, renumbered)
    assert tuple(first) == pytest.approx(tuple(second))
    assert all(0 <= value <= 1 for value in first[:9])
    assert first.aji_plus <= first.dice + 1e-12


def test_nothing_and_nothing_is_perfect_nothing_against_something_is_worst() -> None:
    empty, one = squares(), squares((2, 2, 7))
    assert score(empty, empty)[:9] == (1.0,) * 9
    for scores in (score(empty, one), score(one, empty)):
        assert (scores.dice, scores.aji, scores.aji_plus, scores.dq, scores.pq) == (0, 0, 0, 0, 0)


def test_a_shift_by_one_pixel() -> None:
    """Two squares, one found exactly, one shifted by a pixel: 12 of 16 pixels shared, IoU 12/20."""
    truth, found = squares((1, 1, 1), (10, 10, 2)), squares((1, 1, 4), (10, 11, 9))
    pairs = overlap(truth, found)
    assert dice(truth, found) == pytest.approx(2 * 28 / 64)
    assert aji(pairs) == pytest.approx(28 / 36)
    assert aji_plus(pairs) == pytest.approx(28 / 36)
    dq, sq = panoptic(pairs)
    assert dq == 1
    assert sq == pytest.approx((1 + 12 / 20) / 2)


def test_a_false_positive_and_a_miss() -> None:
    truth, found = squares((1, 1, 1), (10, 10, 2)), squares((1, 1, 1), (1, 12, 3))
    pairs = overlap(truth, found)
    assert aji(pairs) == pytest.approx(16 / (16 + 16 + 16))
    dq, sq = panoptic(pairs)
    assert (dq, sq) == (0.5, 1.0)
    scores = score(truth, found)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)


def test_one_prediction_that_covers_two_nuclei() -> None:
    """AJI lets both take it, so it stands in the union twice; AJI+ gives it to one of them."""
    truth = squares((1, 1, 1), (1, 5, 2))
    found = np.where(truth > 0, 3, 0).astype(np.int32)
    pairs = overlap(truth, found)
    assert aji(pairs) == pytest.approx((16 + 16) / (32 + 32))
    assert aji_plus(pairs) == pytest.approx(16 / (16 + 32))
    assert panoptic(pairs)[0] == 0  # IoU of exactly one half is no match
    assert dice(truth, found) == 1


def test_a_mean_is_over_images_and_counts_are_summed() -> None:
    both = mean([score(squares((1, 1, 1)), squares((1, 1, 1))), score(squares((1, 1, 1)), squares())])
    assert (both.aji, both.annotated, both.found) == (0.5, 2, 1)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="need the same shape"):
        overlap(np.zeros((3, 4), np.int32), np.zeros((4, 3), np.int32))
