"""Measures: known answers worked out by hand, laws that hold for any pair of label maps, pycocotools' AP."""

import contextlib
import io
import itertools
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import cKDTree

from pipeline.segment.polygons import from_masks, rasterise
from training import measures
from training.measures import (
    COUNTS,
    MEASURES,
    NO_RANKING,
    Detections,
    Overlap,
    Scores,
    aji_plus_sums,
    aji_sums,
    average_precision,
    compare,
    compare_detections,
    hausdorff,
    mean,
    measure,
    overlap,
    overlap_apart,
    pool,
    rank,
    score,
    select,
    tally,
)

maps = arrays(np.int32, (6, 7), elements=st.sampled_from([0, 0, 1, 2, 5, 900]))
RATIOS = tuple(name for name in MEASURES if name not in ("hausdorff_um", "ap", "ap50", "ap75", "class_accuracy"))


def squares(*corners: tuple[int, int, int]) -> np.ndarray:
    """A 20 x 20 map with labelled 4 x 4 squares at (row, column, label)."""
    labels = np.zeros((20, 20), np.int32)
    for row, column, label in corners:
        labels[row : row + 4, column : column + 4] = label
    return labels


def ratios(scores: Scores) -> tuple[float, ...]:
    return tuple(getattr(scores, name) for name in RATIOS)


def squares_found(*corners: tuple[float, float, float], class_index: tuple[int, ...] = ()) -> Detections:
    """Detections that are 4 x 4 squares at (row, column), with scores."""
    shapes = np.array([shapely.box(c, r, c + 4, r + 4) for r, c, _ in corners], object)
    scores = np.array([s for *_, s in corners], float)
    return Detections(shapes, scores, np.array(class_index or [0] * len(corners), np.int64))


# ------------------------------------------------------------------------------------------- known answers


def test_nothing_and_nothing_is_perfect_nothing_against_something_is_worst() -> None:
    empty, one = squares(), squares((2, 2, 7))
    assert ratios(score(empty, empty)) == (1.0,) * len(RATIOS)
    for scores in (score(empty, one), score(one, empty)):
        assert ratios(scores) == (0.0,) * len(RATIOS)
        assert np.isnan(scores.hausdorff_um)


def test_a_shift_by_one_pixel() -> None:
    """Two squares, one detected exactly, one shifted by a pixel: 12 of 16 pixels shared, IoU 12/20."""
    scores = score(squares((1, 1, 1), (10, 10, 2)), squares((1, 1, 4), (10, 11, 9)), um_per_px=0.5)
    assert (scores.dice, scores.pixel_precision, scores.pixel_recall) == (28 / 32, 28 / 32, 28 / 32)
    assert (scores.aji, scores.aji_plus) == (28 / 36, 28 / 36)
    assert (scores.dq, scores.f1) == (1, 1)
    assert scores.sq == scores.pq == (1 + 12 / 20) / 2
    assert scores.hausdorff_um == (0 + 1) / 2 * 0.5


def test_a_false_positive_and_a_miss() -> None:
    """Two nuclei, one detected exactly; another detection lies elsewhere."""
    scores = score(squares((1, 1, 1), (10, 10, 2)), squares((1, 1, 1), (1, 12, 3)))
    assert scores.aji == scores.aji_plus == 16 / (16 + 16 + 16)
    assert (scores.dq, scores.sq, scores.pq) == (0.5, 1.0, 0.5)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert (scores.images, scores.annotated, scores.detected) == (1, 2, 2)


def test_one_detection_that_covers_two_nuclei() -> None:
    """AJI lets both take it, so it stands in the union twice; AJI+ gives it to one of them."""
    truth = squares((1, 1, 1), (1, 5, 2))
    scores = score(truth, np.where(truth > 0, 3, 0))
    assert scores.aji == (16 + 16) / (32 + 32)
    assert scores.aji_plus == 16 / (16 + 32)
    assert (scores.dq, scores.sq, scores.pq) == (0, 0, 0)  # an IoU of exactly one half is no hit
    assert (scores.precision, scores.recall) == (0, 0)
    assert scores.dice == 1
    assert np.isnan(scores.hausdorff_um)


def test_one_nucleus_split_in_two() -> None:
    """A 4 x 4 nucleus detected as 12 and 4 pixels: the larger part is a hit of IoU 12/16, the smaller one is false."""
    truth = squares((1, 1, 1))
    detected = truth.copy()
    detected[4, 1:5] = 2
    scores = score(truth, detected)
    assert scores.aji == scores.aji_plus == 12 / (16 + 4)
    assert (scores.precision, scores.recall, scores.f1) == (1 / 2, 1, 2 / 3)
    assert (scores.sq, scores.pq) == (12 / 16, 2 / 3 * 12 / 16)
    assert scores.dice == 1
    assert scores.hausdorff_um == 1  # from the last row of the nucleus to the row above


def test_aji_and_aji_plus_part_ways_either_way() -> None:
    """Nucleus A (16 px) shares 8 px with P, B (4 px) 4 px with P, and A 4 px with Q (4 px).

    IoU: A,P 8/20; B,P 4/12; A,Q 4/16. AJI: A and B both take P, Q is left over: (8 + 4) / (20 + 12 + 4). The
    matching takes B,P and A,Q, summed IoU .583 instead of .4: (4 + 4) / (16 + 4 + 12 + 4 - 8).
    """
    truth, detected = np.zeros((8, 8), np.int32), np.zeros((8, 8), np.int32)
    truth[:2], truth[2, :4] = 1, 2
    detected[1], detected[2, :4], detected[0, :4] = 1, 1, 2
    assert aji_sums(overlap(truth, detected)) == (12, 36)
    assert aji_plus_sums(overlap(truth, detected)) == (8, 28)


def test_hausdorff_of_a_spike() -> None:
    """A 4 x 4 square, detected with a row of three pixels more: the spike's tip lies 3 px from the square."""
    truth = squares((5, 5, 8))
    detected = truth.copy()
    detected[6, 9:12] = 8
    assert hausdorff(truth, detected, overlap(truth, detected)).tolist() == [3.0]


def test_pooled_and_mean_by_hand() -> None:
    """Image one: 1 of 1 detected. Image two: 1 of 3, and a false one; areas are equal, so ratios are of counts."""
    first = tally(compare(squares((1, 1, 1)), squares((1, 1, 1)), 1))
    second = tally(compare(squares((1, 1, 1), (8, 8, 2), (14, 14, 3)), squares((1, 1, 1), (1, 12, 9)), 1))
    averaged, pooled = mean([measure(first), measure(second)]), measure(pool([first, second]))
    assert averaged.aji == pytest.approx((1 + 1 / 4) / 2)
    assert pooled.aji == pooled.aji_plus == 2 / 5
    assert averaged.f1 == pytest.approx((1 + 2 / 5) / 2)
    assert pooled.f1 == pooled.pq == 4 / 7
    assert (averaged.recall, pooled.recall) == ((1 + 1 / 3) / 2, 2 / 4)
    for scores in (averaged, pooled):
        assert (scores.images, scores.annotated, scores.detected) == (2, 4, 3)


def test_a_measure_without_meaning_is_left_out_of_the_mean() -> None:
    """The second image has no hit, so no Hausdorff distance: the mean is the first one's."""
    truth, shifted = squares((2, 2, 1)), squares((2, 3, 1))
    both = mean([score(truth, shifted), score(truth, squares())])
    assert both.hausdorff_um == 1
    assert both.dice == pytest.approx(12 / 16 / 2)


def test_average_precision_by_hand() -> None:
    """Two nuclei; detected are the first exactly (.9), nothing (.8), the second shifted, IoU 12/20 (.7).

    At .5 to .6 precision is 1 up to recall .5 (51 of the 101 recalls), then 2/3; from .65 on 1 up to recall .5,
    then 0.
    """
    truth = squares((1, 1, 1), (10, 10, 2))
    detections = squares_found((1, 1, 0.9), (1, 12, 0.8), (10, 11, 0.7))
    scores = measure(tally(compare_detections(truth, np.ones(2, np.int64), detections, 1.0)[0]))
    assert scores.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert scores.ap75 == pytest.approx(51 / 101)
    assert scores.ap == pytest.approx((3 * scores.ap50 + 7 * scores.ap75) / 10)


def test_ap_is_of_masks_before_they_are_painted() -> None:
    """Two detections share 8 of 16 pixels: painting leaves the second 8, too few; for AP it keeps its 16."""
    truth = squares((1, 1, 1), (12, 12, 2))
    detections = squares_found((1, 3, 0.9), (1, 1, 0.8))  # the better one is two columns off
    scores = measure(tally(compare_detections(truth, np.ones(2, np.int64), detections, 1.0)[0]))
    assert scores.f1 == 0
    assert scores.ap50 == pytest.approx(51 * (1 / 2) / 101)  # second in rank, right: precision 1/2 up to recall 1/2


def test_ap_has_no_meaning_without_annotations_and_is_zero_without_detections() -> None:
    none = Detections(np.zeros(0, object), np.zeros(0), np.zeros(0, np.int64))
    empty = compare_detections(squares(), np.zeros(0, np.int64), squares_found((1, 1, 0.5)), 1.0)[0]
    missed = compare_detections(squares((1, 1, 1)), np.ones(1, np.int64), none, 1.0)[0]
    assert np.isnan(measure(tally(empty)).ap)
    assert measure(tally(missed)).ap == 0


def test_classes_by_hand() -> None:
    """Nuclei of classes 1, 1, 2; all detected exactly, the second one called 2: one false, one missed."""
    truth = squares((1, 1, 1), (8, 8, 2), (15, 15, 3))
    detections = squares_found((1, 1, 0.9), (8, 8, 0.8), (15, 15, 0.7), class_index=(1, 2, 2))
    whole, (first, second, third) = compare_detections(truth, np.array([1, 1, 2]), detections, 1.0, classes=3)
    scores = measure(tally(whole))
    assert (scores.pq, scores.class_accuracy) == (1, 2 / 3)
    one, two = measure(tally(first)), measure(tally(second))
    assert (one.precision, one.recall, one.f1, one.sq, one.pq) == (1, 1 / 2, 2 / 3, 1, 2 / 3)
    assert (two.precision, two.recall, two.f1) == (1 / 2, 1, 2 / 3)
    assert one.ap50 == pytest.approx(51 / 101)  # recall .5 at most
    assert two.ap50 == pytest.approx(1 / 2)  # the right one is second in rank
    assert (one.aji, two.aji) == (16 / 32, 16 / 32)
    assert tally(third)._replace(ranking=NO_RANKING) == pool([])._replace(images=1, ranking=NO_RANKING)


def test_a_nucleus_of_no_known_class_counts_for_none() -> None:
    """What is detected of it is neither right nor wrong within a class, in any ranking; what touches it may be."""
    truth = squares((1, 1, 1), (8, 8, 2), (15, 15, 3), (15, 1, 4))
    detections = squares_found(
        (1, 1, 0.7), (8, 8, 0.9), (15, 15, 0.8), (15, 4, 0.6), (15, 1, 0.5), class_index=(1, 1, 2, 3, 0)
    )
    whole, (first, second, third) = compare_detections(truth, np.array([1, 0, 2, 0]), detections, 1.0, classes=3)
    scores = measure(tally(whole))
    assert (scores.recall, scores.class_accuracy) == (1, 1)
    for one in (measure(tally(first)), measure(tally(second))):
        assert (one.precision, one.recall, one.pq) == (1, 1, 1)
        assert one.ap50 == pytest.approx(1)
    assert measure(tally(third)).detected == len(third.ranking.scores) == 1


def test_numbers_need_not_follow_each_other_and_a_number_may_have_several_parts() -> None:
    truth, detected = squares((1, 1, 40_000), (10, 10, 40_000), (1, 10, 7)), squares((1, 1, 3), (10, 10, 3))
    scores = score(truth, detected)
    assert (scores.annotated, scores.detected) == (2, 1)
    assert (scores.recall, scores.sq, scores.hausdorff_um) == (1 / 2, 1, 0)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="need the same shape"):
        overlap(np.zeros((3, 4), np.int32), np.zeros((4, 3), np.int32))


# ---------------------------------------------------------------------------------------------------- laws


@given(maps)
def test_a_map_against_itself_is_perfect(labels: np.ndarray) -> None:
    scores = score(labels, labels)
    assert ratios(scores) == (1.0,) * len(RATIOS)
    assert scores.annotated == scores.detected == len(np.unique(labels[labels > 0]))
    assert scores.hausdorff_um == 0 if scores.detected else np.isnan(scores.hausdorff_um)


@given(maps, maps)
@example(np.eye(6, 7, dtype=np.int32), np.zeros((6, 7), np.int32))
def test_measures_are_bounded_and_agree_with_each_other(truth: np.ndarray, detected: np.ndarray) -> None:
    s = score(truth, detected)
    assert all(0 <= value <= 1 for value in ratios(s))
    assert s.pq == s.dq * s.sq
    assert s.dq == s.f1
    # AJI+ pairs pixels of nuclei, Dice / (2 - Dice) all nuclear pixels
    assert s.aji_plus <= s.dice / (2 - s.dice) + 1e-12


@given(maps, maps)
def test_of_one_image_pooled_and_mean_are_the_image(truth: np.ndarray, detected: np.ndarray) -> None:
    sums = tally(compare(truth, detected, 0.25))
    np.testing.assert_equal(measure(pool([sums]))._asdict(), measure(sums)._asdict())
    np.testing.assert_equal(mean([measure(sums)])._asdict(), measure(sums)._asdict())


def tied(pairs: Overlap) -> bool:
    """A nucleus has two detections of the same IoU and area: AJI must take one, and takes the lower number."""
    keys = np.stack([pairs.truth, pairs.iou, pairs.shared], 1)
    return len(np.unique(keys, axis=0)) < len(keys)


@given(maps, maps, st.permutations([1, 2, 5, 900]), st.permutations([1, 2, 5, 900]))
def test_the_numbers_of_labels_do_not_matter(
    truth: np.ndarray, detected: np.ndarray, first: list[int], second: list[int]
) -> None:
    assume(not tied(overlap(truth, detected)))
    renamed = [
        np.select([labels == i for i in (1, 2, 5, 900)], names)
        for labels, names in ((truth, first), (detected, [n * 3 for n in second]))
    ]
    expected = score(truth, detected)._asdict()
    assert score(renamed[0], renamed[1])._asdict() == pytest.approx(expected, nan_ok=True)


@given(maps, maps)
def test_transposing_both_maps_changes_nothing(truth: np.ndarray, detected: np.ndarray) -> None:
    np.testing.assert_equal(score(truth.T, detected.T)._asdict(), score(truth, detected)._asdict())


@given(maps, maps)
def test_what_is_symmetric_is_symmetric(a: np.ndarray, b: np.ndarray) -> None:
    """Truth and detected exchanged: precision becomes recall; Dice, AJI+, PQ and Hausdorff stay. AJI need not."""
    forth, back = score(a, b), score(b, a)
    assert (forth.precision, forth.pixel_precision) == (back.recall, back.pixel_recall)
    for name in ("dice", "aji_plus", "dq", "sq", "pq", "hausdorff_um"):
        assert getattr(forth, name) == pytest.approx(getattr(back, name), nan_ok=True), name


@given(maps, maps)
def test_hausdorff_is_that_of_every_pair_by_itself(truth: np.ndarray, detected: np.ndarray) -> None:
    pairs = overlap(truth, detected)
    far = hausdorff(truth, detected, pairs)
    assert np.array_equal(np.isnan(far), ~pairs.hit)
    for i in np.flatnonzero(pairs.hit):
        a, b = (
            outline(labels == ids[k[i]])
            for labels, ids, k in (
                (truth, pairs.truth_ids, pairs.truth),
                (detected, pairs.detected_ids, pairs.detected),
            )
        )
        assert far[i] == max(cKDTree(b).query(a)[0].max(), cKDTree(a).query(b)[0].max())


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that have a neighbour outside, one by one."""
    inside = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    return np.array(
        [(r, c) for r, c in sorted(inside) if not {(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} <= inside]
    )


@given(maps, maps)
def test_aji_plus_is_the_best_matching_of_all(truth: np.ndarray, detected: np.ndarray) -> None:
    """Against trying every one-to-one matching; of those of the largest summed IoU, the largest shared area."""
    pairs = overlap(truth, detected)
    best = (0.0, 0)
    for count in range(len(pairs.truth) + 1):
        for chosen in map(list, itertools.combinations(range(len(pairs.truth)), count)):
            if len(set(pairs.truth[chosen])) == len(set(pairs.detected[chosen])) == count:
                best = max(best, (round(float(pairs.iou[chosen].sum()), 9), int(pairs.shared[chosen].sum())))
    assert aji_plus_sums(pairs)[0] == best[1]


@given(maps, maps, st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
def test_selecting_is_comparing_without_the_others(
    truth: np.ndarray, detected: np.ndarray, some: set[int], others: set[int]
) -> None:
    pairs = overlap(truth, detected)
    kept = [
        np.isin(np.arange(len(ids)), list(wanted))
        for ids, wanted in ((pairs.truth_ids, some), (pairs.detected_ids, others))
    ]
    alone = overlap(
        np.where(np.isin(truth, pairs.truth_ids[kept[0]]), truth, 0),
        np.where(np.isin(detected, pairs.detected_ids[kept[1]]), detected, 0),
    )
    for a, b in zip(select(pairs, *kept), alone, strict=True):
        assert np.array_equal(a, b)


# ------------------------------------------------------------------------------------------------ polygons


def outlines(labels: np.ndarray) -> np.ndarray:
    """A polygon for every number of a map, along pixel edges."""
    ids = np.unique(labels[labels > 0])
    side = max(labels.shape)
    masks = np.zeros((len(ids), side, side), bool)
    masks[:, : labels.shape[0], : labels.shape[1]] = labels[None] == ids[:, None, None]
    return from_masks(masks, np.tile([0.0, 0.0, side, side], (len(ids), 1)), level=0.5)


def test_of_equal_ious_the_detection_that_shares_more_is_taken() -> None:
    detected = np.zeros((20, 20), np.int32)
    detected[0, :4], detected[2:8, :4] = 1, 2
    pairs = overlap(squares((0, 0, 1)), detected)
    assert pairs.iou.tolist() == [0.25, 0.25]
    assert aji_sums(pairs) == aji_plus_sums(pairs) == (8, 16 + 4 + 24 - 8)


@given(maps, maps)
def test_apart_is_the_painted_map_where_nothing_overlaps(truth: np.ndarray, detected: np.ndarray) -> None:
    shapes = outlines(detected)
    painted = overlap(truth, rasterise(shapes, truth.shape))
    for a, b in zip(overlap_apart(truth, shapes), painted, strict=True):
        assert np.array_equal(a, b)


boxes = st.lists(st.tuples(st.integers(-3, 18), st.integers(-3, 18), st.sampled_from([0.9, 0.5, 0.5, 0.3])), max_size=6)


@given(boxes, st.sampled_from([measures._MOSAIC_PX, 30]), st.sampled_from([0, 0.4, 0.6]))
@example([(3, 3, 0.9), (3, 7, 0.5), (12, 12, 0.3)], 30, 0.6)
def test_detections_that_lie_over_each_other_keep_their_pixels(
    corners: list[tuple[int, int, float]], at_once_px: int, shift: float
) -> None:
    """However few are drawn at once, and wherever they lie between the pixels."""
    polygons = shapely.transform(squares_found(*corners).polygons, lambda xy: xy + shift)
    truth = squares((3, 3, 1), (3, 7, 2), (12, 12, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_MOSAIC_PX", at_once_px)
        pairs = overlap_apart(truth, polygons)
    masks = [rasterise(np.array([p], object), truth.shape) > 0 for p in polygons]
    assert pairs.detected_px.tolist() == [int(m.sum()) for m in masks]
    shared = {(int(pairs.truth_ids[t]), int(f)): int(n) for t, f, n in zip(*pairs[4:], strict=True)}
    expected = {(i, f): int((m & (truth == i)).sum()) for f, m in enumerate(masks) for i in (1, 2, 5)}
    assert shared == {key: n for key, n in expected.items() if n}


def test_a_detection_takes_one_of_two_nuclei_that_it_overlaps_by_half() -> None:
    """As pycocotools has it: an IoU of .5 is enough, the last of equal nuclei is taken, the other one stays free."""
    truth = squares((0, 0, 1), (0, 4, 2))
    shapes = np.array([shapely.box(0, 0, 8, 4), shapely.box(0, 0, 4, 4)], object)
    ranking = rank(overlap_apart(truth, shapes), np.array([0.9, 0.5]))
    assert ranking.right.tolist() == [[True] + [False] * 9, [True] * 10]


def coco_precisions(images: list[tuple[np.ndarray, Detections]]) -> np.ndarray:
    """AP at every IoU by pycocotools itself, without its limit of 100 detections."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encode(mask: np.ndarray) -> Any:
        return rle.encode(np.asfortranarray(mask.astype(np.uint8)))

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (truth, detections) in enumerate(images, 1):
        for label in np.unique(truth[truth > 0]):
            entry = {"segmentation": encode(truth == label), "area": float((truth == label).sum())}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, **entry}
            )
        for polygon, sure in zip(detections.polygons, detections.scores, strict=True):
            mask = encode(rasterise(np.array([polygon], object), truth.shape) > 0)
            results.append({"image_id": number, "category_id": 1, "segmentation": mask, "score": float(sure)})
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO()
        annotated.dataset = {
            "images": [{"id": n, "height": 20, "width": 20} for n in range(1, len(images) + 1)],
            "categories": [{"id": 1, "name": "Nucleus"}],
            "annotations": annotations,
        }
        annotated.createIndex()
        detected = annotated.loadRes(results)
        evaluation = COCOeval(annotated, detected, "segm")
        evaluation.params.maxDets = [10_000]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][:, :, 0, 0, 0].mean(1))


@settings(max_examples=60, deadline=None)
@given(st.lists(boxes.filter(bool), min_size=1, max_size=3))
@example([[(3, 3, 0.5), (3, 5, 0.5), (3, 4, 0.9)], [(12, 12, 0.5), (12, 12, 0.9)]])
def test_average_precision_is_that_of_pycocotools(corners: list[list[tuple[int, int, float]]]) -> None:
    truth = squares((3, 3, 1), (3, 7, 2), (12, 12, 5))
    images = [(truth, squares_found(*c)) for c in corners]
    sums = pool([tally(compare_detections(t, np.ones(5, np.int64), d, 1.0)[0]) for t, d in images])
    assert average_precision(sums.ranking) == pytest.approx(coco_precisions(images), abs=1e-12)


def test_every_field_is_a_measure_or_a_count() -> None:
    assert (*MEASURES, *COUNTS) == Scores._fields
    assert rank(overlap(squares((1, 1, 1)), squares((1, 1, 1))), np.ones(1)).right.all()
