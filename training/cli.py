"""`nightslide train` and `nightslide evaluate`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.config import Architecture, Running, Settings, Training

Flat = Parameter(name="*")


def train(
    *,
    data: Annotated[list[Path], Parameter(negative="")],
    out: Path,
    split: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    mpp: float = 0.25,
    training: Annotated[Training, Flat] = Training(),
    architecture: Annotated[Architecture, Parameter(name="architecture")] = Architecture(),
) -> int:
    """Train the detector on a dataset folder (images/, labels/, splits.json), and write its weights.

    Parameters
    ----------
    data
        A dataset folder; repeated, the sets are drawn from evenly.
    out
        Folder of checkpoint and weights; the same command continues from the checkpoint.
    split
        Names of splits to train on, from the folder's splits.json; repeated for several; all images without it.
    mpp
        Micrometres per pixel of the images.
    """
    from training.annotations import find
    from training.fit import fit

    fit([find(folder, split, mpp) for folder in data], out, training, architecture)
    return 0


def evaluate(
    *,
    data: Path,
    split: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    mpp: float = 0.25,
    json: Path | None = None,
    save_labels: Path | None = None,
    settings: Annotated[Settings, Flat] = Settings(),
    running: Annotated[Running, Flat] = Running(),
) -> int:
    """Segment a dataset's images as `run` would, and score the result against its labels.

    Parameters
    ----------
    data
        A dataset folder: images/, labels/ and, for splits, splits.json.
    split
        Names of splits to score; repeated for several; all images without it.
    mpp
        Micrometres per pixel of the images.
    json
        File for the scores.
    save_labels
        Folder for the predicted label maps (uint16 PNG), to score with another tool.
    """
    from dataclasses import replace

    from training.annotations import find
    from training.evaluate import as_json, report
    from training.evaluate import evaluate as score_images

    # the fields of view of a dataset are all tissue, pale ones too
    settings = replace(settings, tissue=replace(settings.tissue, everywhere=True))
    scores = score_images(find(data, split, mpp), settings, running, save_labels=save_labels)
    print(report(scores))
    if json is not None:
        json.write_text(as_json(scores), encoding="utf-8")
    return 0
