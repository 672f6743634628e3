"""Leave one set out: train on all open sets but one, score on that one, for each of them in turn.

    python workflows/experiments/leave_one_out.py --data DIR --out OUT --steps N [other flags of nightslide train]

DIR holds nuinsseg, tnbc, consep_train, dsb2018_tissue and kumar. Of kumar only the split `train` is used, for training
and for scoring: its test images choose nothing. Every fold is trained by the recipe of the shipped weights, but for the
flags that are given, and scored with one view, the default stain normalisation and thresholds. OUT gets a folder
for each training, and a JSON file of all scores, breakdown included, for each fold. The same command continues: a fold
that has its file is not done again, a training that was interrupted goes on from its checkpoint. Prints a markdown
table, with the mean over the sets; on the way, how long every fold took.
"""

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import App, Parameter

from pipeline.config import Architecture, Detector, Execution, Settings, build
from pipeline.errors import ConfigError
from pipeline.files import read_json, write_json
from pipeline.model.weights import find_weights, read_notes
from slides.errors import NightslideError
from training.cli import Flat, Network
from training.config import UNTRAINED, Training
from training.data.datasets import read_datasets
from training.evaluate import EvaluationSet, as_json, evaluate, gather, known_images, whole_images
from training.fit import fit, split_held_out


class OpenSet(NamedTuple):
    """How a set is used, for training and for scoring."""

    mpp: float
    splits: tuple[str, ...] = ()  # (): all images


SETS = {
    "nuinsseg": OpenSet(0.16),
    "tnbc": OpenSet(0.25),
    "consep_train": OpenSet(0.25),
    "dsb2018_tissue": OpenSet(0.25),
    "kumar": OpenSet(0.25, ("train",)),
}
SHOWN = {"pq": "PQ", "aji": "AJI", "f1": "DQ = F1", "sq": "SQ", "dice": "Dice", "precision": "P", "recall": "R"}
Several = Parameter(negative="")

app = App(help=__doc__, help_format="plaintext")


@dataclasses.dataclass(frozen=True)
class Fold:
    """What decides a fold's scores; kept in its file, so that a finished fold is not taken for another one."""

    left_out: str
    images: int  # scored at most; 0: all
    objectness: float
    training: Training
    architecture: Architecture

    def plain(self) -> Any:
        return json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists, as in a file


def run_fold(fold: Fold, data: Path, out: Path) -> None:
    """Train without a set, score on it, write `out`/<set>.json; that only once the training has done all its steps."""
    started = time.monotonic()
    others = [name for name in SETS if name != fold.left_out]
    splits = [f"{name}:{split}" for name in others for split in SETS[name].splits]
    sets = read_datasets([data / name for name in others], splits, [SETS[name].mpp for name in others])
    of = SETS[fold.left_out]
    left_out = gather([data / fold.left_out], of.splits, [of.mpp])
    _check_unseen(fold, left_out)
    weights = fit(sets, out / fold.left_out, fold.training, fold.architecture)
    wanted = fold.training.steps
    if (done := int(read_notes(weights).get("step", wanted))) < wanted:
        print(f"{fold.left_out}: stopped at step {done} of {wanted}; the same command continues", file=sys.stderr)
        return
    trained = time.monotonic()
    images = some(left_out, fold.images, fold.training.seed)
    settings = Settings(detector=Detector(weights=str(weights), objectness=fold.objectness))
    scores = evaluate(images, whole_images(settings), Execution(cluster=False))
    seconds = {"training_seconds": round(trained - started), "scoring_seconds": round(time.monotonic() - trained)}
    content = as_json(scores, images.images, shlex.join(["python", *sys.argv]))
    write_json(out / f"{fold.left_out}.json", {**content, **seconds, "fold": fold.plain()})


def _check_unseen(fold: Fold, left_out: EvaluationSet) -> None:
    """Raise ConfigError for a training that begins from weights which know the set that is left out."""
    init = fold.training.init
    if init in UNTRAINED:
        return
    named = fold.left_out in json.loads(read_notes(find_weights(init)).get("data", "{}"))
    if named or known_images(left_out, init):  # under another name, or in weights of before, which state no pixels
        raise ConfigError(
            f"--init {init} was trained on {fold.left_out}: need weights that have not seen what is left out"
        )


def some(images: EvaluationSet, number: int, seed: int) -> EvaluationSet:
    """`number` of the images, by the seed; all where it is 0."""
    if not 0 < number < len(images.images):
        return images
    _, chosen = split_held_out([image.sample for image in images.images], number, seed)
    ids = {sample.id for sample in chosen}
    return images._replace(images=tuple(image for image in images.images if image.sample.id in ids))


def table(folds: dict[str, Any]) -> str:
    """Image means of every fold, and their mean over the sets."""
    rows = {name: [content["overall"]["image_mean"][m] for m in SHOWN] for name, content in folds.items()}
    means = [sum(column) / len(column) for column in zip(*rows.values(), strict=True)]
    head = ["left out", "images", *SHOWN.values(), "minutes of training and scoring"]
    lines = [head, ["---"] * len(head)]
    for name, content in folds.items():
        minutes = "{} + {}".format(*(f"{content[f'{kind}_seconds'] / 60:.1f}" for kind in ("training", "scoring")))
        lines.append([name, str(content["images"]), *(f"{v:.3f}" for v in rows[name]), minutes])
    lines.append([f"**mean of {len(folds)} sets**", "", *(f"**{v:.3f}**" for v in means), ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _same(fold: Fold, stated: Any) -> bool:
    """Whether a file is of a fold; what it does not state, for it is older, has the default."""
    try:
        return build(Fold, stated, "fold") == fold
    except ConfigError:
        return False


@app.default
def leave_one_out(
    *,
    data: Path,
    out: Path,
    images: int = 0,
    sets: Annotated[tuple[str, ...], Several] = tuple(SETS),
    objectness: float = Detector.objectness,
    training: Annotated[Training, Flat] = Training(),
    architecture: Annotated[Architecture, Network] = Architecture(),
) -> int:
    """The table of all folds.

    Parameters
    ----------
    images
        Score at most so many images of a set, drawn by --seed; 0: all.
    sets
        Leave out only these; the others are trained on all the same.
    objectness
        --detector.objectness of the scoring: lower it for very short trainings, which are less certain.
    """
    if unknown := set(sets) - SETS.keys():
        raise ConfigError(f"no set '{min(unknown)}': need some of {', '.join(SETS)}")
    out.mkdir(parents=True, exist_ok=True)
    folds = {}
    for name in sets:
        fold = Fold(name, images, objectness, training, architecture)
        file = out / f"{name}.json"
        if not file.exists():
            run_fold(fold, data, out)
        if not file.exists():  # its training was stopped
            continue
        folds[name] = content = read_json(file) or {}
        if not _same(fold, content.get("fold")):
            raise ConfigError(f"{file} is of another recipe, or damaged: give the same flags, or choose another --out")
        seconds = content["training_seconds"] + content["scoring_seconds"]
        print(f"{name}: {seconds / 60:.1f} minutes", file=sys.stderr)
    if folds:
        print(f"`{shlex.join(['python', *sys.argv])}`\n\n{table(folds)}")
    return 0 if len(folds) == len(sets) else 1


if __name__ == "__main__":
    try:
        sys.exit(app())
    except NightslideError as error:
        print(f"leave_one_out: {error}", file=sys.stderr)
        sys.exit(2)
