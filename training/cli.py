"""`nightslide train`, `evaluate`, `fit-stain` and `convert`."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.config import EXECUTION, Architecture, Execution, Settings, StainArchitecture
from pipeline.errors import ConfigError
from pipeline.text import counted, counted_nuclei
from training.config import DATA, NETWORK, OUTPUT, StainTraining, Training

_MPP = "Micrometres per pixel of all images, whatever dataset.json and the files state; without it, what they state"

Datasets = Annotated[
    list[Path],
    Parameter(
        name="data",
        negative="",
        group=DATA,
        help="A dataset, a folder or an annotation file: label maps, Aperio XML, COCO, QuPath GeoJSON, TNBC, PanNuke, "
        "CoNIC, Cellpose or MATLAB. Repeat it for several.",
    ),
]
Splits = Annotated[
    tuple[str, ...],
    Parameter(
        name="split",
        negative="",
        group=DATA,
        show_default=False,
        help="A split of splits.json to use, NAME or DATASET:NAME. Repeat it for several; without it, all images.",
    ),
]
Scales = Annotated[
    tuple[float, ...],
    Parameter(
        name="mpp",
        negative="",
        group=DATA,
        show_default=False,
        help=f"{_MPP}; once, or once for each dataset.",
    ),
]


@dataclass(frozen=True)
class EvaluationExecution(Execution):
    """How `evaluate` schedules its work: in one process by default, as worker processes take seconds to start."""

    cluster: bool = False
    "Start worker processes on this machine, so that the crash of one is survived."


Flat = Parameter(name="*")
Network = Parameter(name="architecture", group=NETWORK)


def train(
    *,
    data: Datasets,
    out: Annotated[Path, Parameter(group=OUTPUT)],
    split: Splits = (),
    mpp: Scales = (),
    training: Annotated[Training, Flat] = Training(),
    architecture: Annotated[Architecture, Network] = Architecture(),
) -> int:
    """Train the detector on annotated images, and write its weights.

    Several datasets are drawn from in proportion to the square root of their numbers of nuclei.

    Parameters
    ----------
    out
        Folder of checkpoint, weights, curves and pictures; the same command continues from the checkpoint.
    """
    _share_the_cores()
    from training.data.datasets import read_datasets
    from training.data.sample import NO_CLASSES
    from training.fit import fit

    datasets = read_datasets(data, split, mpp)
    _make_folder(out)
    _warn(line for dataset in datasets for line in (*dataset.describe_skipped(), *dataset.describe_nuclei()))
    _warn(
        f"{dataset.name} has {counted(len(dataset.images), 'image')}: --hold-out {training.hold_out} leaves none to "
        f"train on, so {len(dataset.images) - 1} will be held out"
        for dataset in datasets
        if 0 < len(dataset.images) <= training.hold_out
    )
    if training.by_class:
        _warn(
            f'{dataset.name}: objects without a class are a class of their own, "{NO_CLASSES[0]}"; where they may be '
            f'of any, write "merge": {{"{NO_CLASSES[0]}": null}} into dataset.json'
            for dataset in datasets
            if len(dataset.classes) > 1 and NO_CLASSES[0] in dataset.classes
        )
    fit(datasets, out, training, architecture)
    return 0


def convert(
    *,
    data: Annotated[
        Path, Parameter(group=DATA, help="A dataset in any form that `train` reads: a folder or an annotation file.")
    ],
    out: Annotated[Path, Parameter(group=OUTPUT)],
    split: Splits = (),
    mpp: Annotated[float | None, Parameter(group=DATA, help=f"{_MPP}.")] = None,
) -> int:
    """Write a dataset again, in a form that other tools read: a folder of label maps, or COCO JSON.

    Parameters
    ----------
    out
        A new folder, for label maps; or a new file that ends in .json, for COCO, with its images in images/ beside it.
    """
    from training.data.coco import write_coco
    from training.data.datasets import read_dataset
    from training.data.label_maps import write_folder
    from training.data.sample import describe_lost

    dataset = read_dataset(data, split, mpp)
    _warn([*dataset.describe_skipped(), *dataset.describe_nuclei()])
    _make_folder(out.parent if out.suffix == ".json" else out)
    written = write_coco(dataset, out) if out.suffix == ".json" else write_folder(dataset, out)
    print(
        f"{out}: {counted(written.images, 'image')}, {counted_nuclei(written.nuclei)}; "
        f"{written.contested_px} px were inside several nuclei: they belong to the last one"
    )
    _warn(describe_lost(dataset.name, written.lost))
    if not written.nuclei:
        _warn([f"{data} holds no nucleus: need at least one to train; check the annotations and their classes"])
    return 0


def evaluate(
    *,
    data: Datasets,
    split: Splits = (),
    mpp: Scales = (),
    json: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    save_labels: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    pictures: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    per_image: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
    breakdown: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
    settings: Annotated[Settings, Flat] = Settings(),
    execution: Annotated[EvaluationExecution, Parameter(name="*", group=EXECUTION)] = EvaluationExecution(),
) -> int:
    """Segment a dataset's images as `run` would, and score the result against their annotations.

    All of every image is taken as tissue. Every split and every dataset is scored, and all of them together.

    Parameters
    ----------
    json
        File for all scores, also of every image, with settings, weights and this command.
    save_labels
        Folder for the predicted label maps (uint16 PNG), to score with another tool.
    pictures
        Folder for pictures: image, annotations and detections side by side, with hits, misses and false detections.
    per_image
        Print a line for every image, too.
    breakdown
        Print tables of each dataset, too: nuclei by size and crowding, misses and false detections by cause, and how
        many detections of each score are right. `json` always has them.
    """
    import shlex

    from pipeline.files import write_json
    from training.evaluate import (
        Outputs,
        as_json,
        check_outputs,
        check_scores,
        gather,
        report,
        report_breakdown,
        whole_images,
    )
    from training.evaluate import evaluate as score_images

    if json is not None:
        check_scores(json)
    images, outputs = gather(data, split, mpp), Outputs(save_labels, pictures)
    check_outputs(outputs, images.images, data)
    for folder in (save_labels, pictures, None if json is None else json.parent):
        if folder is not None:  # now, not when all images have been segmented
            _make_folder(folder)
    _warn(images.skipped)
    scores = score_images(
        images,
        whole_images(settings),
        execution,
        outputs=outputs,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(report(scores, per_image=per_image))
    if breakdown:
        print(f"\n{report_breakdown(scores)}")
    if json is not None:
        write_json(json, as_json(scores, images.images, shlex.join(["nightslide", *sys.argv[1:]])))
    return 0


def fit_stain(
    *,
    data: Datasets,
    out: Annotated[Path, Parameter(group=OUTPUT)],
    split: Splits = (),
    mpp: Scales = (),
    template: Annotated[Path | None, Parameter(group=DATA)] = None,
    training: Annotated[StainTraining, Flat] = StainTraining(),
    architecture: Annotated[StainArchitecture, Network] = StainArchitecture(),
) -> int:
    """Train the network of `--stain dcgmm` on a dataset's images, and write its weights.

    Annotations are not used. Several datasets are drawn from with equal probabilities.

    Parameters
    ----------
    out
        Folder of checkpoint and weights; the same command continues from the checkpoint.
    template
        The slide or image whose stain is to be normalised to; without it, the typical training image.
    """
    _share_the_cores()
    from training.data.datasets import read_datasets
    from training.fit_stain import fit_stain as fit

    datasets = read_datasets(data, split, mpp)
    _make_folder(out)
    fit(datasets, out, training, architecture, template)
    return 0


def _share_the_cores() -> None:
    """Have threads that wait for one another sleep after 20 us or so; GNU's OpenMP reads this once, when torch loads.

    By itself it lets them spin for milliseconds, which other processes could use: on two cores with a dozen processes a
    training step then takes five times as much of the processor, and as many more seconds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _make_folder(folder: Path) -> None:
    """Raises ConfigError for what cannot be a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made a folder: {error.strerror}; choose another") from error


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"WARNING: {line}", file=sys.stderr)
