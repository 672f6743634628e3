"""`nightslide evaluate`: a dataset's images down the very path that `nightslide run` takes, then scored.

What the measures are is said in `training.measures`; here is what they are taken over: every image, the images of
a split, a group or a dataset together, and all of them; each both as the mean over images and pooled.
"""

import csv
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.archive.run import run
from pipeline.config import Execution, Settings
from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment import tables
from pipeline.segment.record import SlideRecord
from training.data.datasets import Annotated, AnnotationError, Annotations, Pixels, find, named_sets
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


class Member(NamedTuple):
    """An annotated image, and which sums it belongs to."""

    name: str  # its id; with the dataset's name before it where there are several
    annotated: Annotated
    within: tuple[tuple[str, str], ...]  # ("split", "test"), ("group", "bladder"), ("data", "kumar"); see `gather`


class Collection(NamedTuple):
    """The images of one evaluation, and the classes that all their datasets have; () without classes."""

    members: tuple[Member, ...]
    classes: tuple[str, ...]


def gather(data: Sequence[Path], splits: Sequence[str] = (), mpp: Sequence[float] = ()) -> Collection:
    """The images of datasets, of the named splits or all; `splits`, `mpp`: see `training.data.datasets`.

    An image is within its `group` (organ, patient), if it has one; within its `split`, or several, where several
    are named for its dataset; and within its `data` where there are several. Raises AnnotationError.
    """
    # every split by itself, so that each image knows its splits
    parts = [
        [(split, find(one.data, [split] if split else (), one.mpp)) for split in one.splits or [""]]
        for one in named_sets(data, splits, mpp)
    ]
    members = [member for part in parts for member in _members(part, len(data) > 1)]
    if not members:
        raise AnnotationError(f"{', '.join(map(str, data))}: no images in {', '.join(splits)}: need at least one")
    classes = {part[0][1].classes for part in parts}
    same = classes.pop() if len(classes) == 1 else ()
    return Collection(tuple(members), same if len(same) > 1 else ())


def _members(parts: Sequence[tuple[str, Annotations]], several: bool) -> Iterator[Member]:
    """The images of one dataset, each once, given by split; `several`: there are other datasets."""
    name = parts[0][1].name
    splits: dict[str, list[str]] = {}
    images: dict[str, Annotated] = {}
    for split, annotations in parts:
        for annotated in annotations.images:
            images[annotated.id] = annotated
            splits.setdefault(annotated.id, []).append(split)
    for id_, annotated in sorted(images.items()):
        within = [("data", name)] if several else []
        within += [("split", split) for split in splits[id_]] if len(parts) > 1 else []
        within += [("group", annotated.group)] if annotated.group else []
        yield Member(f"{name}/{id_}" if several else id_, annotated, tuple(within))


# --------------------------------------------------------------------------------------------------- predicting


def predict(
    members: Sequence[Member], folder: Path, settings: Settings, execution: Execution, say: Callable[[str], None]
) -> list[SlideRecord]:
    """Segment every image through `pipeline.archive.run`, as a slide of its own: the ledger's rows, in that order.

    Whatever an image was stored in, it is handed over as a lossless PNG in `folder`, and its scale with it in a
    manifest; the results lie in `folder`/run/<SlideRecord.slide>. Raises AnnotationError for an image that failed.
    """
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "mpp"])
        for number, member in enumerate(members):
            # the number keeps names apart and in order, the rest is for whoever watches
            name = f"{number:06}-{re.sub(r'[^A-Za-z0-9-]+', '_', member.name)[-80:]}.png"
            Image.fromarray(member.annotated.read().image).save(folder / name, compress_level=1)
            writer.writerow([name, repr(member.annotated.mpp)])
    rows = run([manifest], folder / "run", settings, execution, say=say)
    for member, row in zip(members, rows, strict=True):
        if not row.status.startswith("done"):
            raise AnnotationError(f"{member.name} could not be segmented: {row.cause or row.status}")
    return rows


def read_detections(nuclei: Path, classes: Sequence[str] = ()) -> Detections:
    """nuclei.parquet of an image, best first; detections of equal score in the file's order."""
    table = tables.read_nuclei(nuclei, ["geometry", "class", "score"])
    scores = table["score"].to_numpy().astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    number = {name: i for i, name in enumerate(classes, 1)}
    kinds = np.array([number.get(name, 0) for name in table["class"].to_pylist()], np.int64)
    return Detections(tables.geometry(table)[order], scores[order], kinds[order])


# ------------------------------------------------------------------------------------------------------ scoring


class Summary(NamedTuple):
    """Several images together."""

    mean: Scores  # over images
    pooled: Scores  # sums over all images, then divided


class Evaluation(NamedTuple):
    """All there is to say of one evaluation."""

    about: dict[str, Any]  # what JSON holds: settings and their digest, weights, images, seconds
    images: dict[str, Scores]
    image_classes: dict[str, dict[str, Scores]]  # by image, then class; only those that it has or was given
    within: dict[str, dict[str, Summary]]  # "split", "group", "data" -> name -> summary
    overall: Summary
    classes: dict[str, Summary]
    over_classes: Summary | None  # mean over the classes that occur


class Kept(NamedTuple):
    """Folders for what is kept of the images; None: not kept."""

    labels: Path | None = None  # predicted label maps
    pictures: Path | None = None  # image, annotations, detections side by side


def evaluate(
    collection: Collection,
    settings: Settings,
    execution: Execution,
    *,
    kept: Kept = Kept(),
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Segment and score a collection. Classes count where weights and datasets have some in common.

    Raises AnnotationError, and what `pipeline.archive.run.run` raises.
    """
    trained = detector_architecture(find_weights(settings.detector.weights)).classes
    classes = collection.classes if set(collection.classes) & set(trained) else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        rows = predict(collection.members, folder, settings, execution, say)
        seconds = time.perf_counter() - began
        judged, area_mm2 = [], 0.0
        for member, row in zip(collection.members, rows, strict=True):
            pixels = member.annotated.read()
            found = read_detections(folder / "run" / row.slide / "nuclei.parquet", classes)
            keep(kept, member.name, pixels, found.paint((pixels.labels.shape[0], pixels.labels.shape[1])))
            judged.append(judge(pixels, found, member.annotated.mpp, len(classes)))
            area_mm2 += pixels.labels.size * (member.annotated.mpp / 1000) ** 2
        about = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    about |= {"seconds": round(seconds, 2), "area_mm2": round(area_mm2, 4)}
    return summarise(collection.members, classes, judged, about)


class Judged(NamedTuple):
    """The sums of one image, over all nuclei and over every class."""

    whole: Tally
    classes: tuple[Tally, ...]


def judge(pixels: Pixels, found: Detections, mpp: float, classes: int) -> Judged:
    """Compare and count one image."""
    whole, apart = compare_detections(pixels.labels, pixels.kinds, found, mpp, classes)
    return Judged(tally(whole), tuple(map(tally, apart)))


def summary(tallies: Sequence[Tally]) -> Summary:
    return Summary(mean([measure(t) for t in tallies]), measure(pool(tallies)))


def summarise(
    members: Sequence[Member], classes: Sequence[str], judged: Sequence[Judged], about: dict[str, Any]
) -> Evaluation:
    """Sums of images -> every measure of every image, of every split, group and dataset, and of all."""
    within: dict[str, dict[str, list[Tally]]] = {}
    for member, image in zip(members, judged, strict=True):
        for kind, name in member.within:
            within.setdefault(kind, {}).setdefault(name, []).append(image.whole)
    # an image that neither has nor was given a class says nothing of it
    by_class = {
        name: [t for t in (image.classes[i] for image in judged) if t.truth or t.found]
        for i, name in enumerate(classes)
    }
    summaries = {name: summary(tallies) for name, tallies in by_class.items() if tallies}
    return Evaluation(
        about,
        {m.name: measure(j.whole) for m, j in zip(members, judged, strict=True)},
        {
            m.name: {c: measure(t) for c, t in zip(classes, j.classes, strict=True) if t.truth or t.found}
            for m, j in zip(members, judged, strict=True)
        },
        {kind: {n: summary(t) for n, t in sorted(named.items())} for kind, named in within.items()},
        summary([j.whole for j in judged]),
        summaries,
        Summary(*(mean(of) for of in zip(*summaries.values(), strict=True))) if summaries else None,
    )


def keep(kept: Kept, name: str, pixels: Pixels, found: NDArray[np.int32]) -> None:
    """Write what is wanted of one image. Raises AnnotationError for what cannot be written."""
    if kept.labels is not None:
        if found.max(initial=0) > _LARGEST_LABEL:
            raise AnnotationError(
                f"{name} holds {found.max():,} detections, a 16-bit label map {_LARGEST_LABEL:,}: "
                f"leave out --save-labels, or cut the image"
            )
        Image.fromarray(found.astype(np.uint16)).save(_inside(kept.labels, name))
    if kept.pictures is not None:
        draw(pixels.image, pixels.labels, found, _inside(kept.pictures, name))


def _inside(folder: Path, name: str) -> Path:
    """`folder`/<name>.png, its folder made. Raises AnnotationError for a name that would leave the folder."""
    path = folder / f"{name}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AnnotationError(f"image id '{name}' leads out of {folder}: need an id without '..'")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------------------------------------------- reporting


def as_json(evaluation: Evaluation, members: Sequence[Member], command: str) -> str:
    """Everything, and the command that made it. A measure without meaning is null."""
    about, detector = evaluation.about, evaluation.about["settings"]["detector"]
    content = {
        "command": command,
        "digest": about["digest"],
        "weights": Path(detector["weights"]).name,
        "views": about["settings"]["detector"]["views"],
        "stain": about["settings"]["stain"]["method"],
        "mpp": sorted({m.annotated.mpp for m in members}),
        "images": len(members),
        **{key: about[key] for key in ("weights_sha256", "seconds", "area_mm2")},
        "overall": _plain(evaluation.overall),
        "within": {k: {n: _plain(s) for n, s in named.items()} for k, named in evaluation.within.items()},
        "classes": {name: _plain(s) for name, s in evaluation.classes.items()},
        "mean_over_classes": _plain(evaluation.over_classes) if evaluation.over_classes else None,
        "per_image": {
            m.name: {
                "mpp": m.annotated.mpp,
                "within": [list(pair) for pair in m.within],
                **_plain(evaluation.images[m.name]),
                "classes": {c: _plain(s) for c, s in evaluation.image_classes[m.name].items()},
            }
            for m in members
        },
        "settings": about["settings"],
        "versions": about["versions"],
    }
    return json.dumps(content, indent=1, allow_nan=False)


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
    lines = [f"{'':{width}} images " + " ".join(f"{COLUMNS[m]:>5}" for m in shown) + " annotated   found"]
    for name, s in rows:
        cells = (f"{'-' if math.isnan(v) else f'{v:.3f}':>5}" for v in (getattr(s, m) for m in shown))
        lines.append(f"{name:{width}} {s.images:6} " + " ".join(cells) + f" {s.annotated:9} {s.found:7}")
    return "\n".join(lines)


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
