"""`nightslide train`, `evaluate`, `fit-stain` and `convert`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.config import Architecture, Execution, Settings, StainArchitecture
from training.config import StainTraining, Training

Flat = Parameter(name="*")
Splits = Annotated[tuple[str, ...], Parameter(negative="")]
Scales = Annotated[tuple[float, ...], Parameter(negative="")]


def train(
    *,
    data: Annotated[list[Path], Parameter(negative="")],
    out: Path,
    split: Splits = (),
    mpp: Scales = (),
    training: Annotated[Training, Flat] = Training(),
    architecture: Annotated[Architecture, Parameter(name="architecture")] = Architecture(),
) -> int:
    """Train the detector on annotated images, and write its weights.

    Parameters
    ----------
    data
        A dataset: label maps, Aperio XML, COCO, QuPath GeoJSON, TNBC, PanNuke or MATLAB; repeated for several,
        which are drawn from in proportion to the root of their nuclei.
    out
        Folder of checkpoint, weights, curves and pictures; the same command continues from the checkpoint.
    split
        Names of splits to train on, or DATASET:NAME; repeated for several; all images without it.
    mpp
        Micrometres per pixel of the images, if they do not say; once, or once for each dataset.
    """
    from training.data.datasets import find_all
    from training.fit import fit

    fit(find_all(data, split, mpp), out, training, architecture)
    return 0


def convert(
    *,
    data: Path,
    out: Path,
    split: Splits = (),
    mpp: float | None = None,
) -> int:
    """Write a dataset of any form that `train` reads as label maps (a folder), or as COCO JSON (out ends in .json).

    Parameters
    ----------
    data
        A dataset.
    out
        A new folder, or a new .json file; its images go to a folder beside it.
    split
        Names of splits to convert; repeated for several; all images without it.
    mpp
        Micrometres per pixel of the images, if they do not say.
    """
    from training.data.datasets import find, write_coco, write_folder

    annotations = find(data, split, mpp)
    written = write_coco(annotations, out) if out.suffix == ".json" else write_folder(annotations, out)
    print(
        f"{out}: {written.images} images, {written.nuclei} nuclei; {written.contested_px} px were claimed by several "
        f"nuclei: the last one has them"
    )
    return 0


def evaluate(
    *,
    data: Annotated[list[Path], Parameter(negative="")],
    split: Splits = (),
    mpp: Scales = (),
    json: Path | None = None,
    save_labels: Path | None = None,
    pictures: Path | None = None,
    per_image: Annotated[bool, Parameter(negative="")] = False,
    settings: Annotated[Settings, Flat] = Settings(),
    execution: Annotated[Execution, Flat] = Execution(cluster=False),
) -> int:
    """Segment a dataset's images as `run` would, and score the result against its annotations.

    Parameters
    ----------
    data
        A dataset, in any form that `train` reads; repeated, they are also scored together.
    split
        Names of splits to score, or DATASET:NAME; repeated, each is scored and all together; all images without it.
    mpp
        Micrometres per pixel of the images, if they do not say; once, or once for each dataset.
    json
        File for all scores, of every image too, with settings, weights and this command.
    save_labels
        Folder for the predicted label maps (uint16 PNG), to score with another tool.
    pictures
        Folder for pictures: image, annotations, detections side by side; what was hit, missed and false.
    per_image
        Print a line for every image, too.
    """
    import shlex
    import sys
    from dataclasses import replace

    from pipeline.files import committed
    from training.evaluate import Kept, as_json, gather, report
    from training.evaluate import evaluate as score_images

    # the fields of view of a dataset are all tissue, pale ones too
    settings = replace(settings, tissue=replace(settings.tissue, everywhere=True))
    collection = gather(data, split, mpp)
    scores = score_images(
        collection,
        settings,
        execution,
        kept=Kept(save_labels, pictures),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(report(scores, per_image=per_image))
    if json is not None:
        with committed(json) as part:
            part.write_text(as_json(scores, collection.members, shlex.join(["nightslide", *sys.argv[1:]])), "utf-8")
    return 0


def fit_stain(
    *,
    data: Annotated[list[Path], Parameter(negative="")],
    out: Path,
    split: Splits = (),
    mpp: Scales = (),
    template: Path | None = None,
    training: Annotated[StainTraining, Flat] = StainTraining(),
    architecture: Annotated[StainArchitecture, Parameter(name="architecture")] = StainArchitecture(),
) -> int:
    """Train the network of `--stain dcgmm` on a dataset's images, and write its weights. Annotations are not used.

    Parameters
    ----------
    data
        A dataset, in any form that `train` reads; repeated, the sets are drawn from evenly.
    out
        Folder of checkpoint and weights; the same command continues from the checkpoint.
    split
        Names of splits to train on; repeated for several; all images without it.
    mpp
        Micrometres per pixel of the images, if they do not say; once, or once for each dataset.
    template
        The slide or image whose stain is to be normalised to; the typical training image without it.
    """
    from training.data.datasets import find_all
    from training.fit_stain import fit_stain as fit

    fit([found.images for found in find_all(data, split, mpp)], out, training, architecture, template)
    return 0
