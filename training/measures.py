"""Measures of detections against annotated nuclei: label maps -> overlaps -> sums -> ratios. Pure functions.

Label maps are int (h, w), 0 = background, one positive number per nucleus, not necessarily contiguous; x right, y down.
Every measure is a ratio of sums (`Tally`), so an image, and any number of images pooled, take the same way: `pool`
adds the sums before anything is divided, `mean` averages the ratios of images.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pipeline.segment.polygons import Bools, Floats, Ints, Polygons, rasterise

Labels = NDArray[np.integer[Any]]

HIT_IOU = 0.5  # more than this is a hit; such a pair is the only one of both its members (Kirillov et al. 2019)
COCO_IOUS = np.linspace(0.5, 0.95, 10)  # of pycocotools' COCOeval, whose rules `rank` and `average_precision` keep
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
_MOSAIC_PX = 1 << 24  # pixels of detections drawn apart at once: 64 MiB of labels


# ------------------------------------------------------------------------------------------------- overlaps


class Overlap(NamedTuple):
    """Which annotated nucleus shares pixels with which detection: T nuclei, F detections, P pairs that share any.

    Sparse, so that a whole slide fits: P is about as many as there are nuclei.
    """

    truth_ids: Ints  # (T,) rising numbers in the map
    detected_ids: Ints  # (F,)
    truth_px: Ints  # (T,) areas
    detected_px: Ints  # (F,)
    truth: Ints  # (P,) index of the nucleus, rising
    detected: Ints  # (P,) index of the detection, rising within a nucleus
    shared: Ints  # (P,) pixels of both

    @property
    def iou(self) -> Floats:
        """(P,) intersection over union, in (0, 1]."""
        return np.asarray(self.shared / (self.truth_px[self.truth] + self.detected_px[self.detected] - self.shared))

    @property
    def hit(self) -> Bools:
        """(P,) IoU above .5: no nucleus and no detection is in two of these, where no pixel is in two detections."""
        return np.asarray(self.iou > HIT_IOU)


def overlap(truth: Labels, detected: Labels) -> Overlap:
    """Areas and shared pixels of two label maps (h, w). Raises ValueError where their shapes differ."""
    if truth.shape != detected.shape:
        raise ValueError(f"label maps of {truth.shape} and {detected.shape}: need the same shape")
    truth_ids, truth_px = np.unique(truth[truth > 0], return_counts=True)
    detected_ids, detected_px = np.unique(detected[detected > 0], return_counts=True)
    both = (truth > 0) & (detected > 0)
    return Overlap(
        truth_ids.astype(np.int64),
        detected_ids.astype(np.int64),
        truth_px.astype(np.int64),
        detected_px.astype(np.int64),
        *_pairs(np.searchsorted(truth_ids, truth[both]), np.searchsorted(detected_ids, detected[both])),
    )


def overlap_apart(truth: Labels, polygons: Polygons) -> Overlap:
    """Areas and shared pixels of a label map (h, w) and detections that may lie over each other.

    polygons: object (F,), in the map's pixels; a detection owns every pixel in the map whose centre it covers,
    other detections or not. `detected_ids` are 1..F; a detection outside the map has no pixels.
    Law: where no two detections share a pixel this is `overlap` with their rasterised map.
    """
    truth_ids, truth_px = np.unique(truth[truth > 0], return_counts=True)
    detected_px, parts = np.zeros(len(polygons), np.int64), []
    for part in _mosaics(polygons):
        row, column, owner = _pixels(polygons[part])
        inside = (row >= 0) & (row < truth.shape[0]) & (column >= 0) & (column < truth.shape[1])
        row, column, owner = row[inside], column[inside], owner[inside] + part.start
        detected_px += np.bincount(owner, minlength=len(polygons))
        under = truth[row, column]
        parts.append(_pairs(np.searchsorted(truth_ids, under[under > 0]), owner[under > 0]))
    pairs = np.concatenate([np.zeros((3, 0), np.int64), *parts], axis=1)
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    ids = np.arange(1, len(polygons) + 1)
    return Overlap(truth_ids.astype(np.int64), ids, truth_px.astype(np.int64), detected_px, *pairs)


def _pairs(truth: NDArray[Any], detected: NDArray[Any]) -> tuple[Ints, Ints, Ints]:
    """Indices of nucleus and detection of every shared pixel -> each pair once, and how often it occurred."""
    width = int(detected.max(initial=0)) + 1
    codes, shared = np.unique(truth.astype(np.int64) * width + detected, return_counts=True)
    return codes // width, codes % width, shared.astype(np.int64)


def _mosaics(polygons: Polygons) -> list[slice]:
    """Slices of neighbours whose mosaics (see `_pixels`) have about _MOSAIC_PX pixels at most."""
    extent = np.nan_to_num(shapely.bounds(polygons)).reshape(-1, 4)
    sides = extent[:, 2:] - extent[:, :2] + 2
    area = np.cumsum(sides[:, 1] * sides[:, 0].max(initial=0))
    cuts = (np.flatnonzero(np.diff(area // _MOSAIC_PX)) + 1).tolist()
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(polygons)], strict=True) if a < b]


def _pixels(polygons: Polygons) -> tuple[Ints, Ints, Ints]:
    """Every pixel of every polygon: row, column, index of the polygon, each (M,).

    The polygons are moved apart by whole pixels, one below the other, and drawn as one map.
    """
    extent = np.nan_to_num(shapely.bounds(polygons)).reshape(-1, 4)
    low, high = np.floor(extent[:, :2]), np.ceil(extent[:, 2:])
    width, heights = int((high - low)[:, 0].max(initial=0)), (high - low)[:, 1]
    top = np.cumsum(heights) - heights
    shift = np.stack([-low[:, 0], top - low[:, 1]], axis=1)  # (F, 2) x y
    xy, owner = shapely.get_coordinates(polygons, return_index=True)
    apart = shapely.set_coordinates(polygons.copy(), xy + shift[owner])
    drawn = rasterise(apart, (int(heights.sum()), width))
    row, column = np.nonzero(drawn)
    index = drawn[row, column].astype(np.int64) - 1
    return row - shift[index, 1].astype(np.int64), column - shift[index, 0].astype(np.int64), index


def select(pairs: Overlap, truth: Bools, detected: Bools) -> Overlap:
    """Only some of the nuclei (T,) and detections (F,), as if the others were in neither map."""
    kept = truth[pairs.truth] & detected[pairs.detected]
    return Overlap(
        pairs.truth_ids[truth],
        pairs.detected_ids[detected],
        pairs.truth_px[truth],
        pairs.detected_px[detected],
        (np.cumsum(truth) - 1)[pairs.truth[kept]],
        (np.cumsum(detected) - 1)[pairs.detected[kept]],
        pairs.shared[kept],
    )


# ------------------------------------------------------------------------------------------- parts of a tally


def aji_sums(pairs: Overlap) -> tuple[int, int]:
    """(intersection, union) of the aggregated Jaccard index: Kumar et al. 2017 (IEEE TMI 36:1550), algorithm 1.

    Every annotated nucleus takes the detection of highest IoU, which several may take; a nucleus that nothing
    overlaps, and a detection that none took, count in full in the union. Of two detections of equal IoU the
    one that shares more is taken, then the one of the lower number.
    """
    order = np.lexsort((pairs.detected, -pairs.shared, -pairs.iou, pairs.truth))
    best = order[np.unique(pairs.truth[order], return_index=True)[1]]
    taken = np.unique(pairs.detected[best])
    shared = int(pairs.shared[best].sum())
    # all nuclei, and what the takers got besides what they share
    union = pairs.truth_px.sum() + pairs.detected_px[pairs.detected[best]].sum() - shared
    return shared, int(union + pairs.detected_px.sum() - pairs.detected_px[taken].sum())


def aji_plus_sums(pairs: Overlap) -> tuple[int, int]:
    """(intersection, union) of AJI+: Graham et al. 2019 (Medical Image Analysis 58:101563).

    As AJI, but one to one, by the matching of the largest summed IoU, so that nothing is counted twice; of several
    such matchings the one that shares most pixels, so the numbers of the labels do not matter.
    """
    shared = int(pairs.shared[_matching(pairs)].sum())
    return shared, int(pairs.truth_px.sum() + pairs.detected_px.sum()) - shared


def _matching(pairs: Overlap) -> Ints:
    """The pairs (M,) of the best one-to-one matching, solved clump by clump: most clumps are a single pair."""
    count, nuclei = len(pairs.truth), len(pairs.truth_px)
    size = nuclei + len(pairs.detected_px)
    graph = coo_array((np.ones(count), (pairs.truth, nuclei + pairs.detected)), shape=(size, size))
    clump = connected_components(graph, directed=False)[1][pairs.truth]  # (P,)
    gain = pairs.iou + 1e-6 * pairs.shared / max(1, pairs.shared.sum())  # the second term decides ties only
    order = np.argsort(clump, kind="stable")
    starts = np.flatnonzero(np.diff(clump[order], prepend=-1))
    sizes = np.diff(starts, append=count)
    chosen = [order[starts[sizes == 1]]]
    for start, length in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        members = order[start : start + length]
        rows, row = np.unique(pairs.truth[members], return_inverse=True)
        columns, column = np.unique(pairs.detected[members], return_inverse=True)
        gains, place = np.zeros((len(rows), len(columns))), np.full((len(rows), len(columns)), -1)
        gains[row, column], place[row, column] = gain[members], members
        picked = place[linear_sum_assignment(gains, maximize=True)]
        chosen.append(picked[picked >= 0])
    return np.concatenate(chosen).astype(np.int64)


def hausdorff(truth: Labels, detected: Labels, pairs: Overlap) -> Floats:
    """Hausdorff distance (P,) in px of every hit, NaN for the other pairs.

    Huttenlocher, Klanderman and Rucklidge 1993 (IEEE PAMI 15:850): H(A, B) = max(h(A, B), h(B, A)) with
    h(A, B) = max over a in A of min over b in B of |a - b|; the maximum itself, no percentile. A and B are the
    centres of the boundary pixels, those with one of their four neighbours outside the nucleus (or the image).
    Exact; H(A, B) == H(B, A).
    """
    hits = np.flatnonzero(pairs.hit)
    a = _boundary(truth, pairs.truth_ids[pairs.truth[hits]])
    b = _boundary(detected, pairs.detected_ids[pairs.detected[hits]])
    far = np.full(len(pairs.truth), np.nan)
    far[hits] = 0.0
    for points, others in ((a, b), (b, a)):
        if len(points):
            # pairs lie on planes farther apart than any two pixels, so the nearest point is of the same pair
            nearest, _ = cKDTree(others).query(points)
            np.maximum.at(far, hits[(points[:, 2] / sum(truth.shape)).astype(int)], nearest)
    return far


def _boundary(labels: Labels, ids: Ints) -> Floats:
    """Boundary pixels of the nuclei `ids` (N,), each listed once: (M, 3) row, column, plane, a plane per nucleus."""
    padded = np.pad(labels, 1, constant_values=-1)
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    rows, columns = np.nonzero(np.logical_or.reduce([labels != n for n in neighbours]) & (labels > 0))
    wanted = np.isin(labels[rows, columns], ids)
    rows, columns = rows[wanted], columns[wanted]
    order = np.argsort(ids)
    plane = order[np.searchsorted(ids, labels[rows, columns], sorter=order)]
    return np.stack([rows, columns, plane * sum(labels.shape)], axis=1).astype(np.float64)


class Ranking(NamedTuple):
    """D detections with their scores, and at which of COCO's IoUs each is right; `truth` nuclei there were."""

    scores: Floats  # (D,)
    right: Bools  # (D, 10)
    truth: int


NO_RANKING = Ranking(np.zeros(0), np.zeros((0, len(COCO_IOUS)), bool), 0)


def rank(pairs: Overlap, scores: Floats) -> Ranking:
    """Match detections in falling order of score as pycocotools' COCOeval.evaluateImg does.

    pairs: of masks that may lie over each other (`overlap_apart`); scores: (F,)
    At every IoU each detection takes the nucleus of highest IoU that is still free, of equal ones the last; no
    limit on detections, no area ranges, no crowds.
    """
    right = np.zeros((len(scores), len(COCO_IOUS)), bool)
    free = np.ones((len(pairs.truth_px), len(COCO_IOUS)), bool)
    iou = pairs.iou
    near = np.flatnonzero(iou >= COCO_IOUS[0])
    near = near[np.lexsort((-pairs.truth[near], -iou[near], pairs.detected[near], -scores[pairs.detected[near]]))]
    for pair in near:
        nucleus, detection = pairs.truth[pair], pairs.detected[pair]
        taken = free[nucleus] & ~right[detection] & (iou[pair] >= COCO_IOUS)
        right[detection] |= taken
        free[nucleus] &= ~taken
    return Ranking(scores, right, len(pairs.truth_px))


def average_precision(ranking: Ranking) -> Floats:
    """AP (10,) at every one of COCO_IOUS: Lin et al. 2014, as in pycocotools' COCOeval.accumulate.

    Precision, made monotone from the right, at 101 recalls, averaged. NaN where nothing is annotated.
    """
    if not ranking.truth:
        return np.full(len(COCO_IOUS), np.nan)
    right = ranking.right[np.argsort(-ranking.scores, kind="stable")]  # (D, 10)
    hits = np.cumsum(right, axis=0)
    recall = hits / ranking.truth
    precision = hits / (np.arange(1, len(right) + 1)[:, None] + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    envelope = np.concatenate([envelope, np.zeros((1, len(COCO_IOUS)))])  # recalls that are never reached
    places = [np.searchsorted(recall[:, i], COCO_RECALLS, side="left") for i in range(len(COCO_IOUS))]
    return np.array([envelope[place, i].mean() for i, place in enumerate(places)])


# ------------------------------------------------------------------------------------------------ an image


class Detections(NamedTuple):
    """What was detected in an image, best first."""

    polygons: Polygons  # object (D,), image px
    scores: Floats  # (D,) falling
    class_index: Ints  # (D,) 1-based index of the class, 0: none of the dataset's

    def above(self, score: float) -> "Detections":
        """Those of at least this score."""
        kept = self.scores >= score
        return Detections(self.polygons[kept], self.scores[kept], self.class_index[kept])

    def paint(self, shape: tuple[int, int]) -> NDArray[np.int32]:
        """Label map (h, w), i + 1 for detection i: painted in falling order of score, each pixel once."""
        return rasterise(self.polygons, shape)


class Comparison(NamedTuple):
    """One image: how annotated nuclei and detections lie over each other, and of which class they are."""

    painted: Overlap  # each pixel belongs to one detection at most
    distance_um: Floats  # (P,) Hausdorff distance of the hits of `painted`, NaN for other pairs
    truth_class: Ints  # (T,) 1-based index of the class, 0: unknown
    detected_class: Ints  # (F,) of `painted`
    ranking: Ranking  # of the whole masks, before painting


def compare(truth: Labels, detected: Labels, um_per_px: float) -> Comparison:
    """Two label maps (h, w), without classes and scores: class accuracy and AP are then undefined."""
    pairs = overlap(truth, detected)
    return Comparison(
        pairs,
        hausdorff(truth, detected, pairs) * um_per_px,
        np.zeros(len(pairs.truth_ids), np.int64),
        np.zeros(len(pairs.detected_ids), np.int64),
        NO_RANKING,
    )


def compare_detections(
    truth: Labels, class_index: Ints, detected: Detections, um_per_px: float, classes: int = 0
) -> tuple[Comparison, tuple[Comparison, ...]]:
    """The annotations of an image against its detections: over all nuclei, and for each of `classes` alone.

    truth: (h, w) with labels 1..N
    class_index: (N,) 1-based index of the class of nucleus i + 1, 0 where it is not known
    A class is compared as if the other classes were in neither map, nor what was detected of nuclei of no known class
    (IoU above .5). So its PQ, pooled over images and averaged over classes, is the mPQ+ of Graham et al. 2021 (CoNIC,
    arXiv:2111.14485).
    """
    apart = overlap_apart(truth, detected.polygons)
    plain = compare(truth, detected.paint((truth.shape[0], truth.shape[1])), um_per_px)
    whole = plain._replace(ranking=rank(apart, detected.scores))
    if not classes:
        return whole, ()
    annotated = class_index[whole.painted.truth_ids - 1]
    whole = whole._replace(truth_class=annotated, detected_class=detected.class_index[whole.painted.detected_ids - 1])
    return whole, tuple(_of_class(whole, apart, detected, k) for k in range(1, classes + 1))


def _of_class(whole: Comparison, apart: Overlap, detected: Detections, kind: int) -> Comparison:
    pairs, truth = whole.painted, whole.truth_class == kind
    painted = (whole.detected_class == kind) & ~_of_unknown_class(pairs, whole.truth_class)
    kept = truth[pairs.truth] & painted[pairs.detected]
    chosen = (detected.class_index == kind) & ~_of_unknown_class(apart, whole.truth_class)
    return Comparison(
        select(pairs, truth, painted),
        whole.distance_um[kept],
        np.zeros(truth.sum(), np.int64),  # within a class there is no confusion to speak of
        np.zeros(painted.sum(), np.int64),
        rank(select(apart, truth, chosen), detected.scores[chosen]),
    )


def _of_unknown_class(pairs: Overlap, truth_class: Ints) -> Bools:
    """bool (F,): the detections of nuclei whose class is not known."""
    hits = np.zeros(len(pairs.detected_ids), bool)
    hits[pairs.detected[(truth_class[pairs.truth] == 0) & (pairs.iou > HIT_IOU)]] = True
    return hits


# ------------------------------------------------------------------------------------------ sums and ratios


class Tally(NamedTuple):
    """Sums over one image or many; what every measure is divided from."""

    images: int
    truth: int  # annotated nuclei
    detected: int  # detections that have a pixel of their own
    truth_px: int
    detected_px: int
    shared_px: int
    hits: int  # pairs of IoU > .5
    hit_iou: float  # sum over hits
    hit_um: float  # sum of their Hausdorff distances
    hits_classed: int  # hits where a class is annotated
    hits_same_class: int  # hits where it is the detection's
    aji: tuple[int, int]  # intersection, union
    aji_plus: tuple[int, int]
    ranking: Ranking


def tally(image: Comparison) -> Tally:
    """The sums of one image."""
    pairs, hit = image.painted, image.painted.hit
    annotated, detected = image.truth_class[pairs.truth[hit]], image.detected_class[pairs.detected[hit]]
    return Tally(
        images=1,
        truth=len(pairs.truth_px),
        detected=len(pairs.detected_px),
        truth_px=int(pairs.truth_px.sum()),
        detected_px=int(pairs.detected_px.sum()),
        shared_px=int(pairs.shared.sum()),
        hits=int(hit.sum()),
        hit_iou=float(pairs.iou[hit].sum()),
        hit_um=float(image.distance_um[hit].sum()),
        hits_classed=int((annotated > 0).sum()),
        hits_same_class=int(((annotated > 0) & (annotated == detected)).sum()),
        aji=aji_sums(pairs),
        aji_plus=aji_plus_sums(pairs),
        ranking=image.ranking,
    )


def pool(tallies: Sequence[Tally]) -> Tally:
    """The sums of several images together. Law: of one image, itself."""
    rankings = [t.ranking for t in tallies]
    sums = {
        name: sum(getattr(t, name) for t in tallies)
        for name in Tally._fields
        if name not in ("aji", "aji_plus", "ranking")
    }
    return Tally(
        **sums,
        aji=(sum(t.aji[0] for t in tallies), sum(t.aji[1] for t in tallies)),
        aji_plus=(sum(t.aji_plus[0] for t in tallies), sum(t.aji_plus[1] for t in tallies)),
        ranking=Ranking(
            np.concatenate([NO_RANKING.scores, *(r.scores for r in rankings)]),
            np.concatenate([NO_RANKING.right, *(r.right for r in rankings)]),
            sum(r.truth for r in rankings),
        ),
    )


class Scores(NamedTuple):
    """The measures, 0..1 and higher is better, but for `hausdorff_um`; then how many nuclei they are of.

    Nothing annotated and nothing detected is 1, one without the other 0. NaN where a measure has no meaning:
    hausdorff_um without a hit, class_accuracy without classes, AP without annotations or scores.
    """

    dice: float
    "Of nuclear pixels, whichever nucleus they belong to: 2 |A & B| / (|A| + |B|) (Dice 1945)."
    pixel_precision: float
    "|A & B| / |detected pixels|."
    pixel_recall: float
    "|A & B| / |annotated pixels|."
    precision: float
    "Of objects: hits / detected; a hit is a pair of IoU > .5, which is unique on both sides."
    recall: float
    "hits / annotated."
    f1: float
    "2 hits / (annotated + detected)."
    aji: float
    "Aggregated Jaccard index, see `aji_sums`."
    aji_plus: float
    "See `aji_plus_sums`."
    dq: float
    "Detector quality, Kirillov et al. 2019 (CVPR), 'recognition quality' there: the same number as f1."
    sq: float
    "Segmentation quality: mean IoU of the hits; 0 if there is none."
    pq: float
    "Panoptic quality: dq * sq. Of an image and of a pool; a mean of images averages it like any other."
    hausdorff_um: float
    "Mean Hausdorff distance of the hits, see `hausdorff`; lower is better, and misses do not show in it."
    ap: float
    "COCO's mask AP: mean over the IoUs .5, .55, ... .95, see `average_precision`."
    ap50: float
    ap75: float
    class_accuracy: float
    "Of the hits, how many have the annotated class."
    images: int
    annotated: int
    detected: int


COUNTS = ("images", "annotated", "detected")
MEASURES = tuple(name for name in Scores._fields if name not in COUNTS)


def measure(sums: Tally) -> Scores:
    """The ratios of a tally, of an image or of a pool of images."""
    nothing = not sums.truth and not sums.detected

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else float(nothing)

    f1 = ratio(2 * sums.hits, sums.truth + sums.detected)
    sq = ratio(sums.hit_iou, sums.hits)
    precisions = average_precision(sums.ranking)
    return Scores(
        dice=ratio(2 * sums.shared_px, sums.truth_px + sums.detected_px),
        pixel_precision=ratio(sums.shared_px, sums.detected_px),
        pixel_recall=ratio(sums.shared_px, sums.truth_px),
        precision=ratio(sums.hits, sums.detected),
        recall=ratio(sums.hits, sums.truth),
        f1=f1,
        aji=ratio(*sums.aji),
        aji_plus=ratio(*sums.aji_plus),
        dq=f1,
        sq=sq,
        pq=f1 * sq,
        hausdorff_um=sums.hit_um / sums.hits if sums.hits else math.nan,
        ap=float(precisions.mean()),
        ap50=float(precisions[0]),
        ap75=float(precisions[5]),
        class_accuracy=sums.hits_same_class / sums.hits_classed if sums.hits_classed else math.nan,
        images=sums.images,
        annotated=sums.truth,
        detected=sums.detected,
    )


def score(truth: Labels, detected: Labels, um_per_px: float = 1.0) -> Scores:
    """Every measure of two label maps that needs neither scores nor classes."""
    return measure(tally(compare(truth, detected, um_per_px)))


def mean(scores: Sequence[Scores]) -> Scores:
    """Every measure averaged over the images where it has a meaning; counts are summed."""
    means = {}
    for name in MEASURES:
        values = [v for v in (getattr(s, name) for s in scores) if not math.isnan(v)]
        means[name] = sum(values) / len(values) if values else math.nan
    images, annotated, detected = (sum(getattr(s, name) for s in scores) for name in COUNTS)
    return Scores(**means, images=images, annotated=annotated, detected=detected)
