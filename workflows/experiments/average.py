"""The mean of weights files that come from one another: a "model soup" (Wortsman et al. 2022).

    python workflows/experiments/average.py OUT FILE-OR-NAME... [--plus AFTER --minus BEFORE]
        [--score SCORE] [--licence TEXT]

Every tensor becomes the mean of the files' tensors. They must have the same architecture, but for the score threshold
and the order of the classes, and one must have been trained from another, or all from the same weights: else the mean
is of no use. The new file states the licences of all, if no other is given, the data of all, what all of them held out
of it, for `choose.py`, and the recipe of the last one. One file alone gets another threshold or licence so.

--plus and --minus add what a training of relatives has changed: "task arithmetic" (Ilharco et al. 2023). Their tensors
need the same shapes; where they know one class, all classes get its change.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import ConfigError, WeightsError
from pipeline.files import committed, refuse_folder
from pipeline.model.detector import load_weights, save_weights
from pipeline.model.weights import NOTES_PIXELS, find_weights, licence, read_notes, trained_pixels
from training.fit import with_classes


def average(
    files: list[Path], out: Path, terms: str = "", score: float = 0.0, change: tuple[Path, Path] | None = None
) -> None:
    """Write the mean of `files` to `out`, whose folder is made.

    score: the threshold that the new file states; 0: that of the first
    change: weights before and after a training, whose difference is added
    Raises WeightsError where they differ in architecture, ConfigError for another score and where `out` is a folder,
    OSError where it cannot be written.
    """
    refuse_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    models = [load_weights(file) for file in files]
    score = score or models[0].architecture.score
    classes = models[0].architecture.classes
    states = [model.state_dict() for model in models]
    for number, model in enumerate(models):
        own = model.architecture.classes
        if sorted(own) == sorted(classes):
            states[number] = with_classes(states[number], own, classes)
            model.architecture = dataclasses.replace(model.architecture, classes=classes)
        model.architecture = dataclasses.replace(model.architecture, score=score)
    first = dataclasses.asdict(models[0].architecture)
    for file, model in zip(files, models, strict=True):
        theirs = dataclasses.asdict(model.architecture)
        if differing := [
            f"{name} {theirs[name]}, not {value}" for name, value in first.items() if theirs[name] != value
        ]:
            raise WeightsError(f"the files differ in architecture, {file} has {'; '.join(differing)}: need the same")
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    if change:
        mean = _changed(mean, *(_of_classes(file, classes) for file in change))
    models[0].load_state_dict(mean)
    every = [*files, *(change or ())]
    kept = ("recipe", *(["held_out", "step", "mean_of"] if len(every) == 1 else []))
    last = read_notes(files[-1])
    notes: dict[str, str] = {name: last[name] for name in kept if name in last}
    data = [json.loads(read_notes(file).get("data", "{}")) for file in every]
    notes["data"] = json.dumps({name: count for of_file in data for name, count in of_file.items()})
    if pixels := frozenset[str]().union(*map(trained_pixels, every)):
        notes[NOTES_PIXELS] = " ".join(sorted(pixels))
    if len(every) > 1:
        notes["held_out"] = json.dumps(_held_out(every, data))
    if len(files) > 1:
        notes["mean_of"] = json.dumps([read_notes(file)["sha256"] for file in files])
    if change:
        notes["changed_by"] = json.dumps([read_notes(file)["sha256"] for file in change])
    if terms := terms or "; ".join(dict.fromkeys(filter(None, map(licence, every)))):
        notes["licence"] = terms
    with committed(out) as part:
        save_weights(models[0], part, notes)


def _held_out(files: list[Path], data: list[dict[str, int]]) -> dict[str, list[str]]:
    """The images that all trainings held out of each set; a set is left out where one of those on it does not say.

    data: the sets of each file, by name
    """
    stated = [json.loads(read_notes(file).get("held_out", "{}")) for file in files]
    held_out = {}
    for name in dict.fromkeys(name for of_file in data for name in of_file):
        aside = [of_file.get(name) for of_file, sets in zip(stated, data, strict=True) if name in sets]
        if None not in aside:
            held_out[name] = [image for image in aside[0] if all(image in other for other in aside)]
    return held_out


def _of_classes(file: Path, classes: tuple[str, ...]) -> dict[str, Tensor]:
    model = load_weights(file)
    return with_classes(model.state_dict(), model.architecture.classes, classes)


def _changed(of: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `of` with the difference of two others; variances, which must stay above 0, with their ratio."""
    for other in (before, after):
        if {k: v.shape for k, v in of.items()} != {k: v.shape for k, v in other.items()}:
            raise WeightsError(
                "--plus and --minus differ in their tensors from the other weights: need the same shapes"
            )
    changed = {k: v + (after[k] - before[k]) if v.is_floating_point() else v for k, v in of.items()}
    for name in (name for name in of if name.endswith("running_var")):
        changed[name] = of[name] * (after[name] + 1e-6) / (before[name] + 1e-6)
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", nargs="+", help="names of shipped weights, or .safetensors files")
    parser.add_argument("--plus", help="weights after a training, what it has changed is added")
    parser.add_argument("--minus", help="weights before that training")
    parser.add_argument("--score", type=float, default=0.0, help="threshold to state (that of the first file)")
    parser.add_argument("--licence", default="", help="what others may do with the mean")
    arguments = parser.parse_args()
    if bool(arguments.plus) != bool(arguments.minus):
        parser.error("--plus and --minus belong together")
    try:
        change = (find_weights(arguments.minus), find_weights(arguments.plus)) if arguments.plus else None
        files = [find_weights(w) for w in arguments.weights]
        average(files, arguments.out, arguments.licence, arguments.score, change)
    except (ConfigError, WeightsError, OSError) as error:
        print(f"average: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
