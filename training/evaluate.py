"""Scores of predicted instances against annotated ones, after the very path that `nightslide run` takes.

Label maps are int (h, w), 0 = background, one integer per nucleus, not necessarily contiguous.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from pipeline import tables
from pipeline.config import Running, Settings
from pipeline.polygons import rasterise
from pipeline.run import run
from training.annotations import Annotated, AnnotationError, read_labels

Labels = NDArray[np.int32]


class Overlap(NamedTuple):
    """Which truth and which prediction share pixels, as areas in pixels."""

    shared: NDArray[np.int64]  # (T, P)
    truth: NDArray[np.int64]  # (T,)
    predicted: NDArray[np.int64]  # (P,)

    @property
    def iou(self) -> NDArray[np.float64]:
        """(T, P)"""
        union = self.truth[:, None] + self.predicted[None] - self.shared
        return np.asarray(self.shared / np.maximum(union, 1), np.float64)


class Scores(NamedTuple):
    """One image, or a mean over images. All in 0..1, higher is better; nothing annotated and found: 1."""

    dice: float
    aji: float
    aji_plus: float
    dq: float
    sq: float
    pq: float
    precision: float
    recall: float
    f1: float
    annotated: int
    found: int


def overlap(truth: Labels, predicted: Labels) -> Overlap:
    """Count shared pixels of every pair. Raises ValueError where the maps differ in shape."""
    if truth.shape != predicted.shape:
        raise ValueError(f"label maps of {truth.shape} and {predicted.shape}: need the same shape")
    truth_ids, truth_index = np.unique(truth, return_inverse=True)
    found_ids, found_index = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(truth_ids), len(found_ids)), np.int64)
    np.add.at(counts, (truth_index.ravel(), found_index.ravel()), 1)
    rows, columns = truth_ids != 0, found_ids != 0
    return Overlap(counts[np.ix_(rows, columns)], counts.sum(1)[rows], counts.sum(0)[columns])


def score(truth: Labels, predicted: Labels) -> Scores:
    """Every measure of one image."""
    pairs = overlap(truth, predicted)
    dq, sq = panoptic(pairs)
    hits = int((pairs.iou > 0.5).sum())
    # a pair above .5 is unique on both sides, so detection quality is the F1 at that threshold
    precision = hits / len(pairs.predicted) if len(pairs.predicted) else float(not len(pairs.truth))
    recall = hits / len(pairs.truth) if len(pairs.truth) else float(not len(pairs.predicted))
    return Scores(
        dice(truth, predicted),
        aji(pairs),
        aji_plus(pairs),
        dq,
        sq,
        dq * sq,
        precision,
        recall,
        dq,
        len(pairs.truth),
        len(pairs.predicted),
    )


def dice(truth: Labels, predicted: Labels) -> float:
    """Dice coefficient of the nuclear pixels, whichever nucleus they belong to."""
    both = int(((truth > 0) & (predicted > 0)).sum())
    total = int((truth > 0).sum() + (predicted > 0).sum())
    return 2 * both / total if total else 1.0


def aji(pairs: Overlap) -> float:
    """Aggregated Jaccard index of Kumar et al. 2017 (algorithm 1).

    Every annotated nucleus takes the prediction of highest IoU, which several may take; the predictions that
    none took count in full against the union.
    """
    if not len(pairs.truth) or not len(pairs.predicted):
        return float(len(pairs.truth) == len(pairs.predicted))
    best = pairs.iou.argmax(1)
    rows = np.arange(len(best))
    shared = pairs.shared[rows, best]
    hit = shared > 0
    union = np.where(hit, pairs.truth + pairs.predicted[best] - shared, pairs.truth).sum()
    unused = np.setdiff1d(np.arange(len(pairs.predicted)), best[hit])
    return float(shared.sum() / (union + pairs.predicted[unused].sum()))


def aji_plus(pairs: Overlap) -> float:
    """AJI with one-to-one matching of the largest summed IoU (Graham et al. 2019): nothing is taken twice."""
    from scipy.optimize import linear_sum_assignment

    if not len(pairs.truth) or not len(pairs.predicted):
        return float(len(pairs.truth) == len(pairs.predicted))
    rows, columns = linear_sum_assignment(-pairs.iou)
    hit = pairs.shared[rows, columns] > 0
    rows, columns = rows[hit], columns[hit]
    shared = pairs.shared[rows, columns].sum()
    # all areas, each matched pair's overlap once
    return float(shared / (pairs.truth.sum() + pairs.predicted.sum() - shared))


def panoptic(pairs: Overlap) -> tuple[float, float]:
    """(detection quality, segmentation quality) of Kirillov et al. 2019: matches are pairs of IoU > .5."""
    if not len(pairs.truth) and not len(pairs.predicted):
        return 1.0, 1.0
    matched = pairs.iou[pairs.iou > 0.5]
    dq = len(matched) / ((len(pairs.truth) + len(pairs.predicted)) / 2)
    return float(dq), float(matched.mean()) if len(matched) else 0.0


def mean(scores: Sequence[Scores]) -> Scores:
    """Mean over images; counts are summed."""
    means = dict(zip(Scores._fields, np.array(scores, float).mean(0).tolist(), strict=True))
    counts = {name: sum(getattr(s, name) for s in scores) for name in ("annotated", "found")}
    return Scores(**{**means, **counts})


def label_map(nuclei: Path, shape: tuple[int, int]) -> Labels:
    """nuclei.parquet of an image -> its label map: painted in falling order of score, each pixel once."""
    table = tables.read_nuclei(nuclei)
    order = np.argsort(-table["score"].to_numpy(), kind="stable")
    return rasterise(shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))[order], shape)


def predict(
    images: Sequence[Annotated],
    folder: Path,
    settings: Settings,
    running: Running,
    say: Callable[[str], None],
) -> dict[str, Labels]:
    """Label maps by image id, through `pipeline.run`: each image is a slide of its own, tissue everywhere."""
    scales = {a.mpp for a in images}
    if len(scales) != 1:
        raise AnnotationError(f"images of {len(scales)} scales in one evaluation: need one mpp")
    rows = run([a.image for a in images], folder, settings, running, mpp=scales.pop(), say=say)
    failed = [r for r in rows if not r.status.startswith("done")]
    if failed:
        raise AnnotationError(f"{failed[0].slide} could not be segmented: {failed[0].cause}")
    found = {}
    for annotated in images:
        with Image.open(annotated.image) as image:
            width, height = image.size
        found[annotated.id] = label_map(folder / annotated.id / "nuclei.parquet", (height, width))
    return found


def evaluate(
    images: Sequence[Annotated],
    settings: Settings,
    running: Running,
    *,
    save_labels: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Scores]:
    """Scores by image id. save_labels: a folder for the predicted label maps, uint16 PNG."""
    with tempfile.TemporaryDirectory() as folder:
        predicted = predict(images, Path(folder), settings, running, say)
    if save_labels is not None:
        save_labels.mkdir(parents=True, exist_ok=True)
        for id_, labels in predicted.items():
            Image.fromarray(labels.astype(np.uint16)).save(save_labels / f"{id_}.png")
    return {a.id: score(read_labels(a), predicted[a.id]) for a in images}


def report(scores: dict[str, Scores]) -> str:
    """A table for the terminal."""
    fields = ("dice", "aji", "aji_plus", "dq", "sq", "pq", "precision", "recall")
    width = max(len("mean over images"), *map(len, scores))
    lines = [f"{'image':{width}}  " + "  ".join(f"{f:>9}" for f in fields) + "  annotated  found"]
    for name, s in [*scores.items(), ("mean over images", mean(list(scores.values())))]:
        lines.append(
            f"{name:{width}}  " + "  ".join(f"{getattr(s, f):9.3f}" for f in fields) + f"  {s.annotated:9}  {s.found:5}"
        )
    return "\n".join(lines)


def as_json(scores: dict[str, Scores]) -> str:
    content = {
        "images": {k: v._asdict() for k, v in scores.items()},
        "mean": mean(list(scores.values()))._asdict(),
    }
    return json.dumps(content, indent=1)
