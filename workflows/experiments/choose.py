"""Choose the score threshold and NMS on the images that were held out of training; never on test images.

    python workflows/experiments/choose.py --data DIR --split train --weights FILE [--views N] [other settings]

The held-out images are those that the trainer of the weights put aside: its recipe, in the weights file, says how
many and by which seed. With --unseen it is all images given, of sets that the weights were not trained on. For each
NMS there is one inference, at the lowest of the scores; the other scores only drop detections of it. With one view
that is what `nightslide run` gives at that score; with several it comes near, since boxes below half the score do not
enter the fusion there. Prints a markdown table; the best PQ is bold.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pipeline.config import Detector, Execution, Settings
from pipeline.errors import ConfigError
from pipeline.model.weights import find_weights, read_notes
from pipeline.text import counted
from slides.errors import NightslideError
from training.cli import Datasets, EvaluationExecution, Flat, Scales, Splits
from training.data.datasets import requested_sets
from training.evaluate import EvaluationSet, gather, known_images, predict, read_detections, results_of, whole_images
from training.fit import split_held_out
from training.measures import Scores, compare, mean, measure, tally

Several = Parameter(negative="")
SHOWN = {"pq": "PQ", "aji": "AJI", "dq": "DQ = F1", "sq": "SQ", "dice": "Dice", "precision": "P", "recall": "R"}

app = App(help=__doc__, help_format="plaintext")


def held_out(images: EvaluationSet, weights: str, name: str) -> EvaluationSet:
    """The images of the dataset of that name that the training of `weights` did not use.

    The file names them; an older one states how many images there were, of which they are drawn again. Raises
    ConfigError for none, where the images are others than those of the training, and for a mean of several trainings
    that does not say what all of them held out.
    """
    notes = read_notes(find_weights(weights))
    if "recipe" not in notes:
        raise ConfigError(f"{weights} does not state how it was trained: need a file written by 'nightslide train'")
    recipe = json.loads(notes["recipe"])
    if name not in (counts := json.loads(notes.get("data", "{}"))):
        raise ConfigError(
            f"{weights} was trained on {', '.join(counts) or 'unknown data'}, not on {name}: give --unseen"
        )
    if "held_out" in notes or "mean_of" in notes:
        named = json.loads(notes.get("held_out", "{}")).get(name)
        if named is None:
            raise ConfigError(
                f"{weights} does not state which images of {name} were held out of all its trainings: need weights "
                f"that do, or images that it was not trained on, with --unseen"
            )
        if not named:
            raise ConfigError(
                f"{weights} was trained without held-out images: need a training with --hold-out 1 or more"
            )
        found = tuple(m for m in images.images if m.sample.id in named)
        if len(found) < len(named):
            raise ConfigError(f"{name} lacks some of the images that were held out: need the --split of the training")
        return images._replace(images=found)
    if counts[name] != len(images.images):
        raise ConfigError(
            f"{weights} was trained on {counts[name]} images of {name}, not on {len(images.images)}: need the --split "
            f"of the training"
        )
    _, aside = split_held_out([m.sample for m in images.images], recipe["hold_out"], recipe["seed"])
    if not aside:
        raise ConfigError(f"{weights} was trained without held-out images: need a training with --hold-out 1 or more")
    ids = {a.id for a in aside}
    return images._replace(images=tuple(m for m in images.images if m.sample.id in ids))


def check_unseen(images: EvaluationSet, weights: str) -> None:
    """Raise ConfigError where the weights state that they were trained on some of the images, under whatever name."""
    if known := known_images(images, weights):
        raise ConfigError(
            f"{weights} was trained on {counted(len(known), 'image')} of these {len(images.images)}, such as "
            f"{known[0]}: need images that it was not trained on"
        )


def grid(images: EvaluationSet, settings: Settings, scores: tuple[float, ...], execution: Execution) -> list[Scores]:
    """Image means at every score threshold, from one inference at the lowest."""
    at_lowest = replace(settings, detector=replace(settings.detector, score=min(scores)))
    tallies: list[list[Scores]] = [[] for _ in scores]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = predict(images.images, folder, at_lowest, execution, lambda line: print(line, file=sys.stderr))
        for image, row in zip(images.images, rows, strict=True):
            labels = image.sample.read().labels
            found = read_detections(results_of(folder, row))
            for of_score, score in zip(tallies, scores, strict=True):
                painted = found.above(score).paint((labels.shape[0], labels.shape[1]))
                of_score.append(measure(tally(compare(labels, painted, image.sample.mpp))))
    return [mean(of_score) for of_score in tallies]


@app.default
def choose(
    *,
    data: Datasets,
    split: Splits = (),
    unseen: Annotated[bool, Parameter(negative="")] = False,
    mpp: Scales = (),
    nms: Annotated[tuple[float, ...], Several] = (),
    score: Annotated[tuple[float, ...], Several] = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8),
    settings: Annotated[Settings, Flat] = Settings(),
    execution: Annotated[EvaluationExecution, Flat] = EvaluationExecution(),
) -> int:
    """Score a grid of thresholds on held-out images; --data, --split and --mpp as they were given to `train`.

    Parameters
    ----------
    unseen
        The weights were trained on none of these images: take them all.
    nms
        Values of --detector.nms, an inference each; the setting's own without it.
    score
        Values of --detector.score.
    """
    settings = whole_images(settings)
    requested = requested_sets(data, split, mpp)
    sets = [gather([s.data], s.splits, [s.mpp] if s.mpp else []) for s in requested]
    each = (
        sets
        if unseen
        else [held_out(of, settings.detector.weights, s.name) for s, of in zip(requested, sets, strict=True)]
    )
    images = EvaluationSet(tuple(image for c in each for image in c.images), ())
    check_unseen(images, settings.detector.weights)
    cells: dict[tuple[float, float], Scores] = {}
    for value in nms or (settings.detector.nms,):
        chosen: Detector = replace(settings.detector, nms=value)
        for at, scores in zip(score, grid(images, replace(settings, detector=chosen), score, execution), strict=True):
            cells[value, at] = scores
    best = max(cells, key=lambda key: cells[key].pq)
    print(f"`{shlex.join(['python', *sys.argv])}`\n")
    print(f"Image means over {', '.join(m.name for m in images.images)}, which were not trained on:\n")
    print("| NMS | score | " + " | ".join(SHOWN.values()) + " |\n" + "| --- " * (2 + len(SHOWN)) + "|")
    for (value, at), scores in cells.items():
        line = [f"{value:g}", f"{at:g}", *(f"{getattr(scores, name):.3f}" for name in SHOWN)]
        print("| " + " | ".join(f"**{cell}**" if (value, at) == best else cell for cell in line) + " |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"choose: {error}", file=sys.stderr)
        sys.exit(2)
