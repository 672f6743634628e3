"""`nightslide evaluate`: segments a dataset's images by the code of `nightslide run`, then scores the result.

`training.measures` defines the measures; here they are taken over every image, over the images of a split, a group or
a dataset together, and over all of them; each both as the mean over images and pooled.
"""

import csv
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.archive.run import run
from pipeline.config import Execution, Settings
from pipeline.errors import AnnotationError, ConfigError
from pipeline.files import committed, read_json, refuse_folder
from pipeline.layout import RunFolder
from pipeline.model.weights import detector_architecture, find_weights, trained_pixels
from pipeline.segment import arrow, tables
from pipeline.segment.record import LOOK, SlideRecord
from pipeline.text import counted
from training import breakdown
from training.breakdown import Breakdown, Rows
from training.checkpoint import pixels_digest
from training.data.datasets import read_dataset, requested_sets
from training.data.sample import Dataset, LabelledImage, Sample, describe_lost
from training.measures import (
    Detections,
    Scores,
    Tally,
    compare_detections,
    mean,
    measure,
    pool,
    tally,
)
from training.pictures import draw

_LARGEST_LABEL = np.iinfo(np.uint16).max


# ------------------------------------------------------------------------------------------------ what to score


class EvaluationImage(NamedTuple):
    """An annotated image, and the splits, group and dataset that it is scored with."""

    name: str  # its id; with the dataset's name before it where there are several
    sample: Sample
    within: tuple[tuple[str, str], ...]  # ("split", "test"), ("group", "bladder"), ("data", "kumar"); see `gather`


class EvaluationSet(NamedTuple):
    """The images of one evaluation, and the classes that all their datasets have; () without classes."""

    images: tuple[EvaluationImage, ...]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # lines: why annotated objects are not used, and what looks wrong with them


def gather(data: Sequence[Path], splits: Sequence[str] = (), mpp: Sequence[float] = ()) -> EvaluationSet:
    """The images of datasets, of the named splits or all; `splits`, `mpp`: see `training.data.datasets`.

    An image is within its `group` (organ, patient), if it has one; within its `split`, or several, where several
    are named for its dataset; and within its `data` where there are several. Raises AnnotationError.
    """
    # every split by itself, so that each image knows its splits
    requested = requested_sets(data, splits, mpp)
    parts = [
        [(split, read_dataset(one.data, [split] if split else (), one.mpp)) for split in one.splits or [""]]
        for one in requested
    ]
    images = [image for part in parts for image in _images_of(part, len(data) > 1)]
    if not images:
        raise AnnotationError(f"{', '.join(map(str, data))}: no images in {', '.join(splits)}: need at least one")
    classes = {part[0][1].classes for part in parts}
    same = classes.pop() if len(classes) == 1 else ()
    whole = [  # of all its splits together
        part[0][1] if len(part) == 1 else read_dataset(one.data, one.splits, one.mpp)
        for one, part in zip(requested, parts, strict=True)
    ]
    skipped = [line for dataset in whole for line in (*dataset.describe_skipped(), *dataset.describe_nuclei())]
    if not same and any(len(part[0][1].classes) > 1 for part in parts):
        skipped.append("classes are not scored, as the datasets do not have the same: score them one by one")
    return EvaluationSet(tuple(images), same if len(same) > 1 else (), tuple(skipped))


def known_images(images: EvaluationSet, weights: str) -> list[str]:
    """The names of the images that weights, by name or file, were trained on, whatever they were called there.

    By their pixels, so every image is read; none of weights that do not state them. Raises WeightsError.
    """
    known = trained_pixels(find_weights(weights))
    return [image.name for image in images.images if known and pixels_digest(image.sample.read().image) in known]


def whole_images(settings: Settings) -> Settings:
    """The settings with all of every image as tissue: the images of a dataset are fields of view, pale ones too."""
    return replace(settings, tissue=replace(settings.tissue, everywhere=True))


def _images_of(parts: Sequence[tuple[str, Dataset]], several: bool) -> Iterator[EvaluationImage]:
    """The images of one dataset, each once, given by split; `several`: there are other datasets."""
    name = parts[0][1].name
    splits: dict[str, list[str]] = {}
    images: dict[str, Sample] = {}
    for split, dataset in parts:
        for sample in dataset.images:
            images[sample.id] = sample
            splits.setdefault(sample.id, []).append(split)
    for id_, sample in sorted(images.items()):
        within = [("data", name)] if several else []
        within += [("split", split) for split in splits[id_]] if len(parts) > 1 else []
        within += [("group", sample.group)] if sample.group else []
        yield EvaluationImage(f"{name}/{id_}" if several else id_, sample, tuple(within))


# --------------------------------------------------------------------------------------------------- predicting


def predict(
    images: Sequence[EvaluationImage],
    folder: Path,
    settings: Settings,
    execution: Execution,
    say: Callable[[str], None],
) -> list[SlideRecord]:
    """Segment every image through `pipeline.archive.run`, as a slide of its own: the ledger's rows, in that order.

    Whatever an image was stored in, it is handed over as a lossless PNG in `folder`, and its scale with it in a
    manifest; `results_of` says where the results are, and nothing else does. Raises AnnotationError for an image that
    failed.
    """
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "mpp"])
        for number, image in enumerate(images):
            # the number makes names unique and keeps their order, the rest is for the user
            name = f"{number:06}-{re.sub(r'[^A-Za-z0-9-]+', '_', image.name)[-80:]}.png"
            with committed(folder / name, synced=False) as part:
                Image.fromarray(image.sample.read().image).save(part, compress_level=1)
            writer.writerow([name, repr(image.sample.mpp)])
    results = _run_folder(folder).path

    def pass_on(line: str) -> None:  # but for what names the results: they are gone when the user could look
        if line.startswith("WARNING") or str(results) not in line:
            say(line.replace(LOOK, ""))

    rows = run([manifest], results, settings, execution, say=pass_on)
    for image, row in zip(images, rows, strict=True):
        if not row.done:
            raise AnnotationError(f"{image.name} could not be segmented: {row.cause or row.status}")
    return rows


def results_of(folder: Path, row: SlideRecord) -> Path:
    """The nuclei of an image, where `predict` was given `folder` and returned `row`."""
    return _run_folder(folder).slide(row.slide).nuclei


def _run_folder(folder: Path) -> RunFolder:
    """The results, in the folder of `predict`."""
    return RunFolder(folder / "run")


def read_detections(nuclei: Path, classes: Sequence[str] = ()) -> Detections:
    """nuclei.parquet of an image, best first; detections of equal score in the file's order."""
    table = tables.read_nuclei(nuclei, ["geometry", "class", "score"])
    scores = arrow.values(table["score"]).astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    number = {name: i for i, name in enumerate(classes, 1)}
    class_index = np.array([number.get(name, 0) for name in table["class"].to_pylist()], np.int64)
    return Detections(tables.geometry(table)[order], scores[order], class_index[order])


# ------------------------------------------------------------------------------------------------------ scoring


class Summary(NamedTuple):
    """Several images together."""

    mean: Scores  # over images
    pooled: Scores  # sums over all images, then divided


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    about: dict[str, Any]  # of the run: settings and their digest, weights, images, seconds
    images: dict[str, Scores]
    image_classes: dict[str, dict[str, Scores]]  # by image, then class; only those that are annotated or detected in it
    within: dict[str, dict[str, Summary]]  # "split", "group", "data" -> name -> summary
    overall: Summary
    classes: dict[str, Summary]
    over_classes: Summary | None  # mean over the classes that occur
    breakdown: Breakdown
    breakdown_within: dict[str, dict[str, Breakdown]]  # as `within`


class Outputs(NamedTuple):
    """Folders for files of every image; None: not written."""

    labels: Path | None = None  # predicted label maps
    pictures: Path | None = None  # image, annotations, detections side by side


def evaluate(
    images: EvaluationSet,
    settings: Settings,
    execution: Execution,
    *,
    outputs: Outputs = Outputs(),
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Segment and score images. Classes count where the weights tell some of the datasets' apart.

    Raises AnnotationError, and what `pipeline.archive.run.run` raises.
    """
    trained = detector_architecture(find_weights(settings.detector.weights)).classes
    classes = images.classes if len(trained) > 1 and set(images.classes) & set(trained) else ()
    if len(trained) > 1 and images.classes and not classes:
        say(
            f"WARNING: classes are not scored, as the weights know {', '.join(trained)}, the annotations "
            f"{', '.join(images.classes)}: give these the names of those by 'merge' in dataset.json"
        )
    if strange := [name for name in classes if name not in trained]:
        say(
            f"WARNING: nothing is detected as {', '.join(strange)}, as the weights know {', '.join(trained)}: give "
            f"those the names of these, or none (null), by 'merge' in dataset.json"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        rows = predict(images.images, folder, settings, execution, say)
        seconds = time.perf_counter() - started
        tallies, area_mm2 = [], 0.0
        lost, known, trained_on = 0, trained_pixels(find_weights(settings.detector.weights)), list[str]()
        for image, row in zip(images.images, rows, strict=True):
            labelled = image.sample.read()
            lost += labelled.lost
            trained_on += [image.name] if pixels_digest(labelled.image) in known else []
            detections = read_detections(results_of(folder, row), classes)
            height, width = labelled.labels.shape
            write_outputs(outputs, image.name, labelled, detections.paint((height, width)))
            tallies.append(tally_image(labelled, detections, image.sample.mpp, len(classes)))
            area_mm2 += labelled.labels.size * (image.sample.mpp / 1000) ** 2
        for line in describe_lost("annotations", lost):
            say(f"WARNING: {line}")
        if trained_on:
            say(
                f"WARNING: the weights, or those that they began with, were trained on "
                f"{counted(len(trained_on), 'image')} of these {len(rows)}, such as {trained_on[0]}, under whatever "
                f"name: such scores are better than those of new images"
            )
        about = read_json(_run_folder(folder).run_json) or {}
    about |= {"seconds": round(seconds, 2), "area_mm2": round(area_mm2, 4)}
    return summarise(images.images, classes, tallies, about)


class ImageTallies(NamedTuple):
    """The sums of one image, over all nuclei and over every class; and a row for each nucleus and detection."""

    whole: Tally
    classes: tuple[Tally, ...]
    rows: Rows


def tally_image(labelled: LabelledImage, detections: Detections, mpp: float, classes: int) -> ImageTallies:
    """Compare and count one image."""
    whole, apart = compare_detections(labelled.labels, labelled.class_index, detections, mpp, classes)
    rows = breakdown.break_down(labelled.labels, detections, whole.painted, mpp)
    return ImageTallies(tally(whole), tuple(map(tally, apart)), rows)


def summarise(
    images: Sequence[EvaluationImage], classes: Sequence[str], tallies: Sequence[ImageTallies], about: dict[str, Any]
) -> Evaluation:
    """Sums of images -> every measure of every image, of every split, group and dataset, and of all."""
    within: dict[str, dict[str, list[ImageTallies]]] = {}
    for image, of_image in zip(images, tallies, strict=True):
        for kind, name in image.within:
            within.setdefault(kind, {}).setdefault(name, []).append(of_image)
    # a class counts in the images where it is annotated or detected
    by_class = {
        name: [t for t in (of_image.classes[i] for of_image in tallies) if t.truth or t.detected]
        for i, name in enumerate(classes)
    }
    summaries = {name: _summary(of_class) for name, of_class in by_class.items() if of_class}
    return Evaluation(
        about,
        {image.name: measure(of_image.whole) for image, of_image in zip(images, tallies, strict=True)},
        {
            image.name: {
                name: measure(t) for name, t in zip(classes, of_image.classes, strict=True) if t.truth or t.detected
            }
            for image, of_image in zip(images, tallies, strict=True)
        },
        {kind: {n: _summary([i.whole for i in t]) for n, t in sorted(named.items())} for kind, named in within.items()},
        _summary([of_image.whole for of_image in tallies]),
        summaries,
        _over_classes(summaries, len(tallies)) if summaries else None,
        _breakdown(tallies),
        {kind: {n: _breakdown(t) for n, t in sorted(named.items())} for kind, named in within.items()},
    )


def _over_classes(summaries: Mapping[str, Summary], images: int) -> Summary:
    """The mean over the classes; an image counts once, of whatever classes its nuclei are."""
    means = (mean(of) for of in zip(*summaries.values(), strict=True))
    return Summary(*(scores._replace(images=images) for scores in means))


def _summary(tallies: Sequence[Tally]) -> Summary:
    """The measures of several images together, each of which has a tally."""
    return Summary(mean([measure(t) for t in tallies]), measure(pool(tallies)))


def _breakdown(images: Sequence[ImageTallies]) -> Breakdown:
    return breakdown.count(breakdown.join([of_image.rows for of_image in images]))


def write_outputs(outputs: Outputs, name: str, labelled: LabelledImage, detected: NDArray[np.int32]) -> None:
    """Write label map and picture of one image. Raises AnnotationError for a map or name that cannot be written."""
    if outputs.labels is not None:
        if detected.max(initial=0) > _LARGEST_LABEL:
            raise AnnotationError(
                f"{name} holds {detected.max():,} detections, a 16-bit label map {_LARGEST_LABEL:,}: "
                f"leave out --save-labels, or cut the image"
            )
        with committed(_inside(outputs.labels, name)) as part:
            Image.fromarray(detected.astype(np.uint16)).save(part)
    if outputs.pictures is not None:
        draw(labelled.image, labelled.labels, detected, _inside(outputs.pictures, name))


def check_outputs(outputs: Outputs, images: Sequence[EvaluationImage], data: Sequence[Path]) -> None:
    """Raises ConfigError for one folder of both, for one in that of a dataset, whose next reader could take the files
    for images, and for a file that is an image of a dataset.
    """
    if outputs.labels and outputs.pictures and outputs.labels.resolve() == outputs.pictures.resolve():
        raise ConfigError(f"label maps and pictures in {outputs.labels} would have the same names: need two folders")
    of_data = [path if path.is_dir() else path.parent for path in data]
    own = {image.sample.image.resolve() for image in images if image.sample.image}  # also beside the folder of a file
    for folder in filter(None, outputs):
        inside = any(folder.resolve().is_relative_to(of.resolve()) for of in of_data)
        if inside or any((folder / f"{image.name}.png").resolve() in own for image in images):
            raise ConfigError(f"{folder} is in the folder of a dataset, or holds its images: choose another folder")


def check_scores(path: Path) -> None:
    """Raises ConfigError for a folder, or a file that is there and holds no scores: it may be one of annotations."""
    refuse_folder(path)
    if path.is_file() and path.stat().st_size and "overall" not in (read_json(path) or {}):
        raise ConfigError(f"{path} is there already, and holds no scores of `evaluate`: choose another name")


def _inside(folder: Path, name: str) -> Path:
    """`folder`/<name>.png, its folder made. Raises AnnotationError for a name that would leave the folder."""
    path = folder / f"{name}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AnnotationError(f"image id '{name}' leads out of {folder}: need an id without '..'")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------------------------------------------- reporting


def as_json(evaluation: Evaluation, images: Sequence[EvaluationImage], command: str) -> dict[str, Any]:
    """The content of --json: all scores, and the command that made them. A measure without meaning is null."""
    about, detector = evaluation.about, evaluation.about["settings"]["detector"]
    return {
        "command": command,
        "digest": about["digest"],
        "weights": Path(detector["weights"]).name,
        "views": about["settings"]["detector"]["views"],
        "stain": about["settings"]["stain"]["method"],
        "mpp": sorted({m.sample.mpp for m in images}),
        "images": len(images),
        **{key: about[key] for key in ("weights_sha256", "seconds", "area_mm2")},
        "overall": _plain(evaluation.overall),
        "within": {k: {n: _plain(s) for n, s in named.items()} for k, named in evaluation.within.items()},
        "classes": {name: _plain(s) for name, s in evaluation.classes.items()},
        "mean_over_classes": _plain(evaluation.over_classes) if evaluation.over_classes else None,
        "per_image": {
            m.name: {
                "mpp": m.sample.mpp,
                "within": [list(pair) for pair in m.within],
                **_plain(evaluation.images[m.name]),
                "classes": {c: _plain(s) for c, s in evaluation.image_classes[m.name].items()},
            }
            for m in images
        },
        "breakdown": {
            "overall": breakdown.as_json(evaluation.breakdown),
            "within": {
                kind: {n: breakdown.as_json(b) for n, b in named.items()}
                for kind, named in evaluation.breakdown_within.items()
            },
        },
        "settings": about["settings"],
        "versions": about["versions"],
    }


def _plain(of: Summary | Scores) -> dict[str, Any]:
    if isinstance(of, Summary):
        return {"image_mean": _plain(of.mean), "pooled": _plain(of.pooled)}
    values = of._asdict()
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


COLUMNS = {
    "dice": "Dice",
    "pixel_precision": "px-P",
    "pixel_recall": "px-R",
    "precision": "P",
    "recall": "R",
    "f1": "F1=DQ",
    "sq": "SQ",
    "pq": "PQ",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "hausdorff_um": "HD um",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "class_accuracy": "class",
}


def report(evaluation: Evaluation, *, per_image: bool = False) -> str:
    """A table for the terminal: images if wanted, the parts that have several images each, classes, then all."""
    rows = list(_rows(evaluation, per_image))
    width = max(len(name) for name, _ in rows)
    shown = [m for m in COLUMNS if not all(math.isnan(getattr(s, m)) for _, s in rows)]
    lines = [f"{'':{width}} images " + " ".join(f"{COLUMNS[m]:>5}" for m in shown) + " annotated detected"]
    for name, s in rows:
        cells = (f"{'-' if math.isnan(v) else f'{v:.3f}':>5}" for v in (getattr(s, m) for m in shown))
        lines.append(f"{name:{width}} {s.images:6} " + " ".join(cells) + f" {s.annotated:9} {s.detected:8}")
    return "\n".join(lines)


def report_breakdown(evaluation: Evaluation) -> str:
    """Markdown: of every dataset where there are several, then of all images."""
    named = {f"data {name}": b for name, b in evaluation.breakdown_within.get("data", {}).items()}
    parts = {**named, "all": evaluation.breakdown}
    return "\n\n".join(f"## {name}\n\n{breakdown.markdown(b)}" for name, b in parts.items())


def _rows(evaluation: Evaluation, per_image: bool) -> Iterator[tuple[str, Scores]]:
    if per_image:
        yield from evaluation.images.items()
    for kind, named in evaluation.within.items():
        # groups of about one image each would repeat the images
        if kind != "group" or 1 < len(named) <= len(evaluation.images) / 2:
            yield from ((f"{kind} {name}, image mean", s.mean) for name, s in named.items())
    yield from ((f"class {name}, pooled", s.pooled) for name, s in evaluation.classes.items())
    if evaluation.over_classes:
        yield "mean over classes, pooled", evaluation.over_classes.pooled
    yield "all, image mean", evaluation.overall.mean
    yield "all, pooled", evaluation.overall.pooled
