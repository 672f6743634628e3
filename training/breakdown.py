"""Where detections go wrong: by size, by crowding, by cause; and how many of each score are right.

An image gives a row for each annotated nucleus and each detection (`break_down`); the rows of images are joined
(`join`) and counted (`count`). All are of the label map in which each pixel belongs to one detection, as PQ and AJI.

A detection *covers* a nucleus that has more than half of its pixels in it, and *lies in* a nucleus that holds more
than half of the detection's.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from pipeline.segment.polygons import Bools, Floats, Ints, centroids
from training.measures import Detections, Labels, Overlap

NEIGHBOUR_UM = 10.0  # between centroids
PX_UM2 = 0.25**2  # sizes are also given in pixels of 0.25 um, as in the literature
AREA_EDGES_UM2 = tuple(px * PX_UM2 for px in (50, 100, 200, 400, 800))
NEIGHBOUR_EDGES = (1, 3, 5, 8)
SCORE_BINS = 10

OUTLINE_IOU, SLIGHT_IOU = 0.3, 0.1  # at the first the object was detected, and its outline is off

MISSES = {
    "merged": "covered by a detection that covers two or more nuclei",
    "split": "two or more detections lie in it",
    "outline": f"best IoU {OUTLINE_IOU} to .5",
    "slight": f"best IoU {SLIGHT_IOU} to {OUTLINE_IOU}",
    "none": "no detection near",
}
"Why a nucleus was missed: the first that holds."

FALSE = {
    "merger": "covers two or more nuclei",
    "part": f"lies in a nucleus, and so does another, or its IoU is below {OUTLINE_IOU}",
    "outline": f"best IoU {OUTLINE_IOU} to .5",
    "slight": f"best IoU {SLIGHT_IOU} to {OUTLINE_IOU}",
    "nothing": "no nucleus near",
}
"Why a detection is false: the first that holds."

HIT = -1  # in place of a cause


class Rows(NamedTuple):
    """T annotated nuclei, F detections and H hits of one image or several."""

    truth_um2: Floats  # (T,) areas
    truth_neighbours: Ints  # (T,) other annotated nuclei within NEIGHBOUR_UM
    miss: Ints  # (T,) index into MISSES, or HIT
    detected_um2: Floats  # (F,)
    detected_neighbours: Ints  # (F,) other detections within NEIGHBOUR_UM
    false: Ints  # (F,) index into FALSE, or HIT
    score: Floats  # (F,)
    area_ratio: Floats  # (H,) of hits: the area detected to the area annotated


def break_down(truth: Labels, detected: Detections, pairs: Overlap, um_per_px: float) -> Rows:
    """The rows of an image.

    truth: (h, w) with labels 1..N; pairs: `measures.overlap` of it with the painted detections
    """
    centres = _centres(truth, pairs.truth_ids) * um_per_px
    painted = pairs.detected_ids - 1
    hit = pairs.hit
    ratio = pairs.detected_px[pairs.detected[hit]] / pairs.truth_px[pairs.truth[hit]]
    miss, false = causes(pairs)
    um2_per_px = np.float64(um_per_px**2)
    return Rows(
        pairs.truth_px * um2_per_px,
        _neighbours(centres),
        miss,
        pairs.detected_px * um2_per_px,
        _neighbours(centroids(detected.polygons[painted]) * um_per_px),
        false,
        detected.scores[painted],
        ratio,
    )


def causes(pairs: Overlap) -> tuple[Ints, Ints]:
    """Why each nucleus (T,) was missed, and why each detection (F,) is false: indices into MISSES and FALSE, or HIT."""
    nuclei, detections = len(pairs.truth_px), len(pairs.detected_px)
    covers = 2 * pairs.shared > pairs.truth_px[pairs.truth]  # a nucleus is covered by one detection at most
    lies_in = 2 * pairs.shared > pairs.detected_px[pairs.detected]  # a detection lies in one nucleus at most
    merger = np.bincount(pairs.detected[covers], minlength=detections) >= 2
    merged = _any(pairs.truth[covers & merger[pairs.detected]], nuclei)
    split = np.bincount(pairs.truth[lies_in], minlength=nuclei) >= 2
    part = _any(pairs.detected[lies_in & (split[pairs.truth] | (pairs.iou < OUTLINE_IOU))], detections)
    miss = _first([merged, split, *_by_iou(pairs, pairs.truth, nuclei)])
    false = _first([merger, part, *_by_iou(pairs, pairs.detected, detections)])
    miss[pairs.truth[pairs.hit]] = HIT
    false[pairs.detected[pairs.hit]] = HIT
    return miss, false


def _by_iou(pairs: Overlap, owner: Ints, count: int) -> tuple[Bools, Bools, Bools]:
    best = np.zeros(count)
    np.maximum.at(best, owner, pairs.iou)
    return best >= OUTLINE_IOU, best >= SLIGHT_IOU, np.ones(count, bool)


def _any(owner: Ints, count: int) -> Bools:
    return np.bincount(owner, minlength=count) > 0


def _first(holds: Sequence[Bools]) -> Ints:
    """Index of the first that holds, (N,); the last always does."""
    return np.asarray(np.argmax(np.stack(holds), 0))


def _centres(labels: Labels, ids: Ints) -> Floats:
    """Centroids (T, 2), x y px, of the nuclei `ids` of a label map."""
    row, column = np.nonzero(labels)
    index = np.searchsorted(ids, labels[row, column])
    count = np.bincount(index, minlength=len(ids))
    sums = [np.bincount(index, at + 0.5, minlength=len(ids)) for at in (column, row)]
    return np.stack(sums, 1) / count[:, None]


def _neighbours(centres: Floats) -> Ints:
    """How many others lie within NEIGHBOUR_UM of each of the points (N, 2), um."""
    if not len(centres):
        return np.zeros(0, np.int64)
    within = cKDTree(centres).query_ball_point(centres, NEIGHBOUR_UM, return_length=True)
    return np.asarray(within, np.int64) - 1


def join(images: Sequence[Rows]) -> Rows:
    """The rows of several images, at least one."""
    return Rows(*(np.concatenate(columns) for columns in zip(*images, strict=True)))


# ---------------------------------------------------------------------------------------------------- counts


class Part(NamedTuple):
    """Nuclei and detections of one size, or of one crowding."""

    annotated: int
    hit: int  # of those annotated
    detected: int
    right: int  # of those detected

    @property
    def recall(self) -> float:
        return self.hit / self.annotated if self.annotated else math.nan

    @property
    def precision(self) -> float:
        return self.right / self.detected if self.detected else math.nan


class ScoreBin(NamedTuple):
    """Detections of similar score, and how many of them are right."""

    detected: int
    mean_score: float  # NaN where there are none
    share_right: float


class Breakdown(NamedTuple):
    """The counts. Laws: parts of each kind sum to all nuclei and detections; causes to misses and false detections."""

    sizes: Mapping[str, Part]
    crowding: Mapping[str, Part]
    misses: Mapping[str, int]  # by cause
    false: Mapping[str, int]  # by cause
    area_ratio: tuple[float, float, float]  # of the hits: quartiles; NaN without hits
    scores: Mapping[str, ScoreBin]
    calibration_error: float
    "Expected calibration error: mean of |mean score - share right| over bins, weighted by their detections."


def count(rows: Rows) -> Breakdown:
    """Rows -> counts."""
    hit, right = rows.miss == HIT, rows.false == HIT
    of_truth, of_detected = (np.digitize(areas, AREA_EDGES_UM2) for areas in (rows.truth_um2, rows.detected_um2))
    around_truth, around_detected = (
        np.digitize(n, NEIGHBOUR_EDGES) for n in (rows.truth_neighbours, rows.detected_neighbours)
    )
    scores, error = reliability(rows.score, right)
    return Breakdown(
        _parts(_size_names(), of_truth, of_detected, hit, right),
        _parts(_crowding_names(), around_truth, around_detected, hit, right),
        dict(zip(MISSES, np.bincount(rows.miss[~hit], minlength=len(MISSES)).tolist(), strict=True)),
        dict(zip(FALSE, np.bincount(rows.false[~right], minlength=len(FALSE)).tolist(), strict=True)),
        _quartiles(rows.area_ratio),
        scores,
        error,
    )


def reliability(score: Floats, right: Bools) -> tuple[dict[str, ScoreBin], float]:
    """Scores (F,) in 0..1 by bins of equal width, and the expected calibration error: Guo et al. 2017 (ICML).

    The error is NaN without detections.
    """
    index = np.minimum((score * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
    number = np.bincount(index, minlength=SCORE_BINS)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(index, v, minlength=SCORE_BINS) / number for v in (score, right))
    names = [f"{b / SCORE_BINS:g} to {(b + 1) / SCORE_BINS:g}" for b in range(SCORE_BINS)]
    bins = zip(number.tolist(), mean.tolist(), share.tolist(), strict=True)
    error = np.nansum(number * np.abs(mean - share)) / len(score) if len(score) else math.nan
    return dict(zip(names, map(ScoreBin._make, bins), strict=True)), float(error)


def _parts(names: Sequence[str], truth: Ints, detected: Ints, hit: Bools, right: Bools) -> dict[str, Part]:
    counts = (np.bincount(i, minlength=len(names)).tolist() for i in (truth, truth[hit], detected, detected[right]))
    return dict(zip(names, map(Part._make, zip(*counts, strict=True)), strict=True))


def _size_names() -> list[str]:
    """Of the ranges between AREA_EDGES_UM2."""
    um2, px = ([f"{edge / unit:.3g}" for edge in AREA_EDGES_UM2] for unit in (1, PX_UM2))
    between = [f"{a} to {b} um2 ({c} to {d} px)" for a, b, c, d in zip(um2, um2[1:], px, px[1:], strict=False)]
    return [f"below {um2[0]} um2 ({px[0]} px)", *between, f"{um2[-1]} um2 and more"]


def _crowding_names() -> list[str]:
    """Of the ranges between NEIGHBOUR_EDGES, which are whole numbers."""
    names = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in itertools.pairwise((0, *NEIGHBOUR_EDGES))]
    return [*names, f"{NEIGHBOUR_EDGES[-1]} and more"]


def _quartiles(values: Floats) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else (math.nan,) * 3
    return float(low), float(middle), float(high)


# ------------------------------------------------------------------------------------------------- reporting


def as_json(counts: Breakdown) -> dict[str, Any]:
    """The content for a JSON file; what has no value is null."""
    parts = {
        kind: {
            name: {**part._asdict(), "recall": _or_none(part.recall), "precision": _or_none(part.precision)}
            for name, part in getattr(counts, kind).items()
        }
        for kind in ("sizes", "crowding")
    }
    return {
        **parts,
        "misses": dict(counts.misses),
        "false": dict(counts.false),
        "area_ratio_quartiles": [_or_none(v) for v in counts.area_ratio],
        "scores": {
            name: {
                "detected": b.detected,
                "mean_score": _or_none(b.mean_score),
                "share_right": _or_none(b.share_right),
            }
            for name, b in counts.scores.items()
        },
        "calibration_error": _or_none(counts.calibration_error),
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def markdown(counts: Breakdown) -> str:
    """The counts as tables."""
    tables = [
        _part_table("area", counts.sizes),
        _part_table(f"neighbours within {NEIGHBOUR_UM:g} um", counts.crowding),
        _cause_table("missed nuclei", counts.misses, MISSES),
        _cause_table("false detections", counts.false, FALSE),
        _table(
            ("score", "detected", "mean score", "share right"),
            [(n, b.detected, _cell(b.mean_score), _cell(b.share_right)) for n, b in counts.scores.items()],
        ),
        f"Expected calibration error {_cell(counts.calibration_error)}. "
        f"Area of hits, detected to annotated, quartiles: {', '.join(map(_cell, counts.area_ratio))}.",
    ]
    return "\n\n".join(tables)


def _part_table(kind: str, parts: Mapping[str, Part]) -> str:
    return _table(
        (kind, "annotated", "recall", "detected", "precision"),
        [(name, p.annotated, _cell(p.recall), p.detected, _cell(p.precision)) for name, p in parts.items()],
    )


def _cause_table(kind: str, number: Mapping[str, int], meaning: Mapping[str, str]) -> str:
    total = sum(number.values())
    rows = [(name, meaning[name], n, _cell(n / total if total else math.nan)) for name, n in number.items()]
    return _table((kind, "", "number", "share"), [*rows, ("all", "", total, "")])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
