"""Rules that choose a slide's score threshold or stain normalisation, each scored on images that were not trained on.

    python workflows/experiments/rules.py --data DIR --weights FILE
    python workflows/experiments/rules.py --data DIR --folds OUT [--images N]

DIR: the sets of leave_one_out.py. With --weights the images are those that the trainer put aside, and all of a set
that the weights' recipe does not name; with --folds those of each set are detected by the weights that
leave_one_out.py trained without it. Of kumar only the split `train` is used. One inference for each stain, with one
view and a low score; what a rule must know it learns from the other sets, each of which counts the same.
Prints markdown tables: how many detections of each score are right, then PQ / AJI as image means of every rule for
the threshold and for the stain; their last rows choose by the truth, so that no rule can do better.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from choose import check_unseen, held_out
from cyclopts import App
from leave_one_out import SETS, some
from scipy.stats import spearmanr

from pipeline.config import Detector, Execution, Settings, Stain, StainMethod
from pipeline.files import read_json
from pipeline.model.fitted_stain import TEMPLATE
from pipeline.model.weights import detector_architecture, find_weights, read_notes
from pipeline.segment.polygons import Bools, Floats
from slides.errors import NightslideError
from training.breakdown import AREA_EDGES_UM2, reliability
from training.evaluate import EvaluationSet, gather, predict, read_detections, results_of, whole_images
from training.measures import Overlap, aji_sums, overlap, select

LOWEST_SCORE = 0.05
GRID = np.arange(0.05, 0.96, 0.05)
LEAST_HAEMATOXYLIN = 0.8  # of the template's: paler slides would be amplified

app = App(help=__doc__, help_format="plaintext")


class Detected(NamedTuple):
    """An image and its F detections of LOWEST_SCORE and more."""

    pairs: Overlap
    score: Floats  # (F,)
    size: Floats  # (F,) index of the size class
    right: Bools  # (F,)
    haematoxylin: float  # strength by Macenko's fit, to the template's; NaN where none was fitted
    threshold: float  # the score that the weights state


Sets = Mapping[str, Sequence[Detected]]
Rule = Callable[[Detected], Bools]  # which detections to keep


# --------------------------------------------------------------------------------------------------- detections


def detect(images: EvaluationSet, weights: str, method: StainMethod) -> list[Detected]:
    detector = Detector(weights=weights, score=LOWEST_SCORE)
    stated = detector_architecture(find_weights(weights)).score
    settings = whole_images(replace(Settings(), detector=detector, stain=Stain(method=method)))
    detected = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = predict(images.images, folder, settings, Execution(cluster=False), lambda line: None)
        for image, row in zip(images.images, rows, strict=True):
            nuclei, labels = results_of(folder, row), image.sample.read().labels
            detections = read_detections(nuclei)
            pairs = overlap(labels, detections.paint((labels.shape[0], labels.shape[1])))
            size = np.digitize(pairs.detected_px * image.sample.mpp**2, AREA_EDGES_UM2).astype(np.float64)
            right = np.isin(np.arange(len(size)), pairs.detected[pairs.hit])
            fitted = (read_json(nuclei.parent / "slide.json") or {})["stain"]
            strength = fitted["numbers"]["strength"][0] if fitted["method"] == "macenko" else np.nan
            relative = strength / TEMPLATE["macenko"].numbers["strength"][0]
            detected.append(Detected(pairs, detections.scores[pairs.detected_ids - 1], size, right, relative, stated))
    return detected


def unseen(name: str, data: Path, weights: str) -> EvaluationSet:
    """The images of a set that the weights were not trained on. Raises ConfigError where they are not known."""
    images = gather([data / name], SETS[name].splits, [SETS[name].mpp])
    trained = json.loads(read_notes(find_weights(weights)).get("data", "{}"))
    images = held_out(images, weights, name) if name in trained else images
    check_unseen(images, weights)
    return images


def scores(image: Detected, kept: Bools) -> tuple[float, float]:
    """(PQ, AJI) of an image of which only some detections are kept."""
    pairs = select(image.pairs, np.ones(len(image.pairs.truth_px), bool), kept)
    total = len(pairs.truth_px) + len(pairs.detected_px)
    shared, union = aji_sums(pairs)
    return 2 * pairs.iou[pairs.hit].sum() / total if total else 1.0, shared / union if union else 1.0


# ------------------------------------------------------------------------------------------- score thresholds


def reliability_table(sets: Sets) -> str:
    """Of the detections of each range of scores, the share that is right, and how many they are."""
    table: dict[str, list[str]] = {}
    for images in sets.values():
        score, right = (np.concatenate([getattr(image, name) for image in images]) for name in ("score", "right"))
        bins, error = reliability(score, right)
        for name, counted in bins.items():
            share = f"{counted.share_right:.2f} " if counted.detected else ""
            table.setdefault(name, []).append(f"{share}({counted.detected})")
        table.setdefault("expected calibration error", []).append(f"{error:.2f}")
    return markdown(["share right (detections), by score", *sets], table)


def above(score: float, image: Detected) -> Bools:
    return np.asarray(image.score >= score)


def features(image: Detected, by_size: bool) -> Floats:
    odds = np.log(image.score / (1 - image.score).clip(1e-4))
    classes = [image.size == i for i in range(len(AREA_EDGES_UM2) + 1)] if by_size else [np.ones(len(odds))]
    return np.stack([odds, *classes], 1)


def calibrate(sets: Sequence[Sequence[Detected]], by_size: bool) -> Callable[[Detected], Floats]:
    """Logistic regression of being right on the log odds of the score (Platt 1999), with an intercept a size class.

    Newton's method; every set has the same weight; a slight ridge, for size classes that hardly occur.
    """
    x = np.concatenate([features(image, by_size) for images in sets for image in images])
    right = np.concatenate([image.right for images in sets for image in images])
    totals = [sum(len(image.right) for image in images) for images in sets]
    weight = np.repeat(1000 / len(sets) / np.array(totals), totals)
    beta = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ beta))
        slope = x.T @ (weight * (right - p)) - 0.02 * beta
        beta += np.linalg.solve((x * (weight * p * (1 - p))[:, None]).T @ x + 0.02 * np.eye(len(beta)), slope)
    return lambda image: np.asarray(1 / (1 + np.exp(-features(image, by_size) @ beta)))


def likely(probability: Callable[[Detected], Floats], least: float, image: Detected) -> Bools:
    return probability(image) >= least


def most_expected_f1(probability: Callable[[Detected], Floats], detected: float, image: Detected) -> Bools:
    """Those above the threshold of the highest expected F1 of this image.

    detected: the share of all nuclei that has a detection of LOWEST_SCORE or more, in the sets calibrated on
    """
    p = probability(image)
    falling = np.sort(p)[::-1]
    expected = 2 * np.cumsum(falling) / (np.arange(1, len(p) + 1) + falling.sum() / detected)
    return np.asarray(p >= falling[expected.argmax()]) if len(p) else np.zeros(0, bool)


def by_truth(image: Detected) -> Bools:
    """The score threshold of the highest PQ + AJI."""
    return above(max(GRID, key=lambda t: sum(scores(image, above(t, image)))), image)


def threshold_rules(others: Sequence[Sequence[Detected]]) -> dict[str, Rule]:
    """Rules by name, with what they learn from other sets."""
    rules: dict[str, Rule] = {f"score {t:g}": partial(above, t) for t in (0.3, 0.4, 0.5, 0.6, 0.7)}
    every = [image for images in others for image in images]
    share = sum(image.right.sum() for image in every) / sum(len(image.pairs.truth_px) for image in every)
    for name, by_size in (("score", False), ("score and size", True)):
        probability = calibrate(others, by_size)
        for t in (0.3, 0.4, 0.5):
            rules[f"probability by {name}, {t:g}"] = partial(likely, probability, t)
        rules[f"expected F1 by {name}"] = partial(most_expected_f1, probability, share)
    return {**rules, "by the truth": by_truth}


def threshold_table(sets: Sets) -> str:
    table: dict[str, dict[str, Floats]] = {}
    for name, images in sets.items():
        for rule, kept in threshold_rules([others for other, others in sets.items() if other != name]).items():
            table.setdefault(rule, {})[name] = np.mean([scores(image, kept(image)) for image in images], 0)
    return rules_table("score threshold, no stain normalisation", table)


# ------------------------------------------------------------------------------------------------------- stains


def certainty(image: Detected) -> float:
    """Mean score of what is detected at the weights' threshold."""
    kept = image.score[image.score >= image.threshold]
    return float(kept.mean()) if len(kept) else 0


STAIN_RULES: dict[str, Callable[[Detected, Detected], bool]] = {
    "never": lambda none, macenko: False,
    "always": lambda none, macenko: True,
    f"haematoxylin at least {LEAST_HAEMATOXYLIN:g} of the template's": (
        lambda none, macenko: macenko.haematoxylin >= LEAST_HAEMATOXYLIN
    ),
    "the mean score rises": lambda none, macenko: certainty(macenko) > certainty(none),
    "by the truth": lambda none, macenko: sum(at_default(macenko)) > sum(at_default(none)),
}


def at_default(image: Detected) -> tuple[float, float]:
    return scores(image, above(image.threshold, image))


def stain_table(none: Sets, macenko: Sets) -> str:
    table = {
        rule: {
            name: np.mean(
                [at_default(m if choose(n, m) else n) for n, m in zip(none[name], macenko[name], strict=True)], 0
            )
            for name in none
        }
        for rule, choose in STAIN_RULES.items()
    }
    return rules_table("macenko, at the score that the weights state", table)


def rank_correlation(none: Sequence[Detected], macenko: Sequence[Detected]) -> str:
    """Of the change of the mean score with the change of PQ, over the images of a set (Spearman)."""
    pairs = list(zip(none, macenko, strict=True))
    correlation = spearmanr(
        [certainty(m) - certainty(n) for n, m in pairs], [at_default(m)[0] - at_default(n)[0] for n, m in pairs]
    )
    return f"{correlation.statistic:.2f} (p = {correlation.pvalue:.3f}, {len(pairs)} images)"


def rules_table(what: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    cells = {rule: [*per_set.values(), np.mean(list(per_set.values()), 0)] for rule, per_set in table.items()}
    rows = {rule: [f"{pq:.3f} / {aji:.3f}" for pq, aji in values] for rule, values in cells.items()}
    return markdown([what, *next(iter(table.values())), "mean of sets"], rows)


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@app.default
def compare_rules(*, data: Path, weights: str = Detector.weights, folds: Path | None = None, images: int = 0) -> int:
    """All tables.

    Parameters
    ----------
    folds
        The --out of leave_one_out.py, whose weights are used in place of --weights.
    images
        At most so many images of a set; 0: all.
    """
    sets = {}
    for name in SETS:  # what is missing is said now, not after hours
        own = str(folds / name / "nuclei.safetensors") if folds else weights
        find_weights(own)
        of_set = gather([data / name], SETS[name].splits, [SETS[name].mpp]) if folds else unseen(name, data, own)
        sets[name] = own, some(of_set, images, 0)
    detected: dict[StainMethod, dict[str, list[Detected]]] = {"none": {}, "macenko": {}}
    counts = []
    for name, (own, chosen) in sets.items():
        for method, of_sets in detected.items():
            print(f"{name}, {method}: {len(chosen.images)} images", file=sys.stderr)
            of_sets[name] = detect(chosen, own, method)
        nuclei = sum(len(image.pairs.truth_px) for image in detected["none"][name])
        counts.append(f"{name} {len(chosen.images)} ({nuclei})")
    print(f"`{shlex.join(['python', *sys.argv])}`\n\nImages (nuclei): {', '.join(counts)}.\n")
    none, macenko = detected["none"], detected["macenko"]
    print(f"{reliability_table(none)}\n\n{threshold_table(none)}\n\n{stain_table(none, macenko)}")
    for name in (name for name in SETS if len(none[name]) >= 10):
        print(f"\n{name}: rank correlation of mean score and PQ, {rank_correlation(none[name], macenko[name])}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"rules: {error}", file=sys.stderr)
        sys.exit(2)
