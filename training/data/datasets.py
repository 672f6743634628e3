"""Reads a dataset of annotated images in any of several forms: recognises its form, scale, groups and splits.

A dataset is a folder, or one annotation file with its images near it, in one of `FORMS`. Optional files beside them:
    splits.json    {"train": [id, ...], "test": [...]}; see `named_splits`
    dataset.json   {"mpp": 0.25 or {id: 0.25}, "classes": ["Tumour", ...], "groups": {id: "bladder"},
                    "merge": {"Muscle": "Connective", "Other": null}}; all optional;
                   each overrides what the source says, and --mpp overrides all. `merge` gives classes other names,
                   several one name, or none (null): the class of such a nucleus is not known. Merged classes are
                   sorted by name, so that those of two sets are in the same order
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.text import counted
from slides.scale import NEED_MPP, is_believable
from training.data.coco import coco
from training.data.label_maps import cellpose, conic, folder, matlab, pannuke, tnbc
from training.data.outlines import aperio
from training.data.qupath import qupath
from training.data.sample import (
    DATASET_FILE,
    SPLITS_FILE,
    Catalogue,
    Dataset,
    Entry,
    LabelledImage,
    Metadata,
    Sample,
    read_json_file,
    stated_mpp,
)


class Form(NamedTuple):
    """A form that datasets come in."""

    name: str
    needs: str  # the files it is recognised by
    reader: Callable[[Path, Metadata], Catalogue | None]


_NAMED = 5  # of the images without annotations

# Scales that differ by less are the same: x and y of a slide may differ as much.
_SAME_SCALE = 0.02

# The first one that fits a folder is taken; the others are said.
FORMS = (
    Form("MATLAB", "Images/<id>.png with Labels/<id>.mat", matlab),
    Form("label maps", "images/<id>.png with labels/<id>.png", folder),
    Form("TNBC", "Slide_01/<id>.png with GT_01/<id>.png", tnbc),
    Form("PanNuke", "images.npy with masks.npy", pannuke),
    Form("CoNIC", "images.npy with labels.npy", conic),
    Form("Aperio XML", "<id>.xml with <id>.tif", aperio),
    Form("QuPath GeoJSON", "<image>.geojson, .geojson.gz or .zip with its image or slide", qupath),
    Form("COCO", "a .json with its images", coco),
    Form("Cellpose", "<id>.png with <id>_masks.png", cellpose),
)


def read_dataset(data: Path, splits: Sequence[str] = (), mpp: float | None = None) -> Dataset:
    """The images of a dataset, of the named splits or all, sorted by id.

    mpp: micrometres per pixel; else as dataset.json says, else the annotation, else the image's metadata or
    resolution tags, if believable. Nothing is guessed.
    Raises AnnotationError for what is in no known form, incomplete or contradictory, for an unknown split (it
    lists the right ones), and for an unknown scale.
    """
    if not data.exists():
        raise AnnotationError(f"{data} does not exist: need a dataset's folder, or an annotation file")
    beside = data.parent if data.is_file() else data
    metadata = _read_metadata(beside / DATASET_FILE)
    entries = {}
    catalogue, unread = _catalogue(data, metadata)
    for entry in catalogue.entries:
        if entry.id in entries:
            raise AnnotationError(f"{data} has two images called '{entry.id}': need one name for each")
        entries[entry.id] = entry
    strange = sorted({*metadata.groups, *metadata.mpp} - {"", *entries})
    if strange and not data.is_file():  # beside one file there may be others
        raise AnnotationError(
            f"{beside / DATASET_FILE} names '{strange[0]}', which is no image of {data}: need the names of its images"
        )
    classes, number = _merged(catalogue.classes, metadata.merge, beside)
    images = tuple(
        Sample(
            id_,
            metadata.groups.get(id_, group_of(id_) if entries[id_].group is None else entries[id_].group or ""),
            _scale(entries[id_], metadata, mpp, data),
            partial(_renumbered, entries[id_].read, number) if metadata.merge else entries[id_].read,
            entries[id_].image,
        )
        for id_ in _chosen(entries, splits, beside, data)
    )
    overridden = () if mpp is None else _overridden([entries[image.id] for image in images], metadata, mpp)
    return Dataset(_name(data), images, classes, catalogue.skipped, overridden, (*unread, *_bare(catalogue.bare)))


def _bare(images: Sequence[Path]) -> list[str]:
    """A line that names images without annotations, the first of many; none where all have some."""
    if not images:
        return []
    named = ", ".join(path.name for path in images[:_NAMED]) + (", ..." if len(images) > _NAMED else "")
    what = (
        f"{counted(len(images), 'image')} without annotations {'is' if len(images) == 1 else 'are'} not read: {named}"
    )
    return [f"{what}; an image without nuclei needs an empty annotation file"]


def _merged(
    classes: tuple[str, ...], merge: Mapping[str, str | None], beside: Path
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of classes as `merge` renames them, and the new number, or 0, of each number from 0 on."""
    if strange := [name for name in merge if name not in classes]:
        raise AnnotationError(
            f"{beside / DATASET_FILE} merges '{strange[0]}', which is no class of this dataset: need some of "
            f"{', '.join(classes)}"
        )
    renamed = [merge.get(name, name) for name in classes]
    names = tuple(sorted({name for name in renamed if name is not None})) if merge else classes
    if not names:
        raise AnnotationError(f"{beside / DATASET_FILE} merges every class into null: need one that is known")
    return names, np.array([0, *(0 if name is None else 1 + names.index(name) for name in renamed)], np.int64)


def _renumbered(read: Callable[[], LabelledImage], number: NDArray[np.int64]) -> LabelledImage:
    labelled = read()
    return labelled._replace(class_index=number[labelled.class_index])


def read_datasets(data: Sequence[Path], splits: Sequence[str], mpp: Sequence[float]) -> list[Dataset]:
    """Several datasets, each as `read_dataset` gives it; see `requested_sets`."""
    return [read_dataset(one.data, one.splits, one.mpp) for one in requested_sets(data, splits, mpp)]


class RequestedSet(NamedTuple):
    """One of the datasets that a user asks for, not yet read."""

    name: str
    data: Path
    splits: tuple[str, ...]  # (): all of it
    mpp: float | None


def requested_sets(data: Sequence[Path], splits: Sequence[str] = (), mpp: Sequence[float] = ()) -> list[RequestedSet]:
    """Which splits and scale a user asks for of each dataset. Raises AnnotationError.

    splits: `NAME` is a split that every dataset must have, `DATASET:NAME` one of the dataset of that folder name;
    a dataset that no split is named for is taken whole
    mpp: none (as the datasets say), one for all, or one for each, in order
    """
    if len(mpp) not in (0, 1, len(data)):
        of = f"{len(mpp)} values of mpp for {counted(len(data), 'dataset')}"
        raise AnnotationError(f"{of}: need none, one, or one for each")
    scales = list(mpp) if len(mpp) == len(data) else [mpp[0] if mpp else None] * len(data)
    names = [_name(folder) for folder in data]
    if len(set(names)) < len(names):
        raise AnnotationError(f"datasets called {', '.join(names)}: need a different name for each folder")
    for split in splits:
        if split.rpartition(":")[0] not in ("", *names):
            raise AnnotationError(
                f"split '{split}' is of no dataset: need NAME, or one of {', '.join(names)} before ':'"
            )
    of_each = [tuple(s.removeprefix(f"{n}:") for s in splits if s.rpartition(":")[0] in ("", n)) for n in names]
    return [RequestedSet(*one) for one in zip(names, data, of_each, scales, strict=True)]


def _name(data: Path) -> str:
    if data.is_file():
        return data.stem
    own = data.absolute().name  # of a link, that of the link
    return data.resolve().name if own in ("", "..") else own


def group_of(id_: str) -> str:
    """The group in the name of an image.

    A TCGA barcode: its tissue source site, `TCGA-G9`, which stands for one laboratory and one organ.
    Else the name without its last number, where that is set apart: `human_bladder_01` -> `human_bladder`,
    `03_2` -> `03`. Else "".
    """
    if barcode := re.match(r"TCGA-[A-Z0-9]{2}(?=-)", id_):
        return barcode[0]
    numbered = re.fullmatch(r"(.*[^-_. ])[-_. ]+\d+", id_)
    return numbered[1] if numbered else ""


def named_splits(path: Path) -> dict[str, list[str]]:
    """Splits by name, of a splits.json: an object of lists of ids.

    Lists in an inner object are folds of one another: {"bns": {"01": [...], "02": [...]}} gives `bns` (all of
    them), `bns/01`, `bns/02`, and their complements `bns/not-01`, `bns/not-02` to train on.
    """
    content = read_json_file(path)
    named = dict(_walk(content, "")) if isinstance(content, dict) else {}
    if not named:
        raise AnnotationError(f"{path} names no splits: need a JSON object, name -> list of ids")
    return named


def _walk(content: Mapping[str, Any], at: str) -> Iterator[tuple[str, list[str]]]:
    lists = {k: v for k, v in content.items() if isinstance(v, list)}
    for name, ids in lists.items():
        if odd := [i for i in ids if not isinstance(i, str)]:
            raise AnnotationError(f"{SPLITS_FILE}: '{at}{name}' holds {odd[0]!r}: need ids of images, which are text")
    yield from ((at + name, ids) for name, ids in lists.items())
    if at and lists:
        yield at.rstrip("/"), [i for ids in lists.values() for i in ids]
        for name, ids in lists.items():
            fold = set(ids)
            yield f"{at}not-{name}", [i for other in lists.values() for i in other if i not in fold]
    for name, inner in content.items():
        if isinstance(inner, dict):
            yield from _walk(inner, f"{at}{name}/")


def _catalogue(data: Path, metadata: Metadata) -> tuple[Catalogue, tuple[str, ...]]:
    """The catalogue of the first form that fits, and a line for each other one that fits, too. Raises AnnotationError.

    What is not read may be damaged, or lack images: it is passed over.
    """
    for at, form in enumerate(FORMS):
        try:
            catalogue = form.reader(data, metadata)
        except AnnotationError as error:
            raise AnnotationError(f"{data}, read as {form.name}: {error}") from error
        if catalogue is not None and catalogue.entries:
            return catalogue, tuple(_unread(data, metadata, form, FORMS[at + 1 :]))
    known = "; ".join(f"{form.needs} ({form.name})" for form in FORMS)
    raise AnnotationError(f"{data} holds no images in a form that is known here: need one of {known}")


def _unread(data: Path, metadata: Metadata, read: Form, others: Sequence[Form]) -> Iterator[str]:
    for form in others:
        try:
            catalogue = form.reader(data, metadata)
        except AnnotationError:
            continue
        if catalogue is not None and catalogue.entries:
            yield (
                f"read as {read.name} ({read.needs}); {form.name} of {counted(len(catalogue.entries), 'image')}, which "
                f"lies there too, is not read: keep each form in a folder of its own"
            )


def _chosen(entries: Mapping[str, Entry], splits: Sequence[str], beside: Path, data: Path) -> list[str]:
    """Ids of the splits, sorted; all without splits."""
    if not splits:
        return sorted(entries)
    named = named_splits(beside / SPLITS_FILE)
    if unknown := [s for s in splits if s not in named]:
        raise AnnotationError(f"{data} has no split '{unknown[0]}': its splits are {', '.join(named)}")
    chosen = sorted({i for s in splits for i in named[s]})
    if missing := [i for i in chosen if i not in entries]:
        raise AnnotationError(f"{data}: '{missing[0]}' of {SPLITS_FILE} has no image: need each in the dataset")
    return chosen


def _scale(entry: Entry, metadata: Metadata, mpp: float | None, data: Path) -> float:
    """The first of user, dataset.json, annotation, image. Raises AnnotationError where none is believable."""
    said = mpp if mpp is not None else metadata.mpp.get(entry.id, metadata.mpp.get(""))
    if said is not None:
        if not is_believable(said):
            raise AnnotationError(f"{data}: mpp={said:g} for '{entry.id}': {NEED_MPP}")
        return said
    if (stated := _stated_scale(entry, metadata)) is None:
        raise AnnotationError(f"{data}: '{entry.id}' states no resolution: pass --mpp (micrometres per pixel)")
    return stated


def _stated_scale(entry: Entry, metadata: Metadata) -> float | None:
    """The first of dataset.json, annotation, image; None where none is believable."""
    for said in (metadata.mpp.get(entry.id, metadata.mpp.get("")), entry.mpp):
        if said is not None and is_believable(said):
            return said
    return None if entry.image is None else stated_mpp(entry.image)


def _overridden(entries: Sequence[Entry], metadata: Metadata, mpp: float) -> tuple[str, ...]:
    """The images, with their scale, that state another one than `mpp`."""
    found = []
    for entry in entries:
        try:
            stated = _stated_scale(entry, metadata)
        except AnnotationError:  # it may state a scale that is refused, and be read with the user's
            continue
        if stated is not None and abs(stated / mpp - 1) > _SAME_SCALE:
            found.append(f"'{entry.id}' ({stated:g})")
    return tuple(found)


def _read_metadata(path: Path) -> Metadata:
    """The content of dataset.json, empty where there is none. Raises AnnotationError."""
    if not path.is_file():
        return Metadata({}, (), {})
    content = read_json_file(path)
    if not isinstance(content, dict) or (strange := content.keys() - Metadata._fields):
        what = f"'{min(strange)}'" if isinstance(content, dict) else "no object"
        raise AnnotationError(f"{path} holds {what}: need an object with {', '.join(Metadata._fields)}, all optional")
    mpp, classes, groups, merge = (
        content.get(name, empty) for name, empty in (("mpp", {}), ("classes", None), ("groups", {}), ("merge", {}))
    )
    mpp = {"": mpp} if isinstance(mpp, int | float) else mpp
    if not isinstance(mpp, dict) or not all(
        type(v) is float or (type(v) is int and abs(v) <= sys.float_info.max) for v in mpp.values()
    ):
        raise AnnotationError(f"{path}: mpp is {mpp!r}: need a number, or one for each id")
    if classes is not None and not (
        isinstance(classes, list) and classes and all(isinstance(c, str) and c for c in classes)
    ):
        raise AnnotationError(f"{path}: classes is {classes!r}: need a list of names, at least one")
    if len(set(classes or ())) < len(classes or ()):
        raise AnnotationError(f"{path}: classes names one twice: need different names")
    if not isinstance(groups, dict) or not all(isinstance(g, str) for g in groups.values()):
        raise AnnotationError(f"{path}: groups is {groups!r}: need the name of a group for each id")
    if not isinstance(merge, dict) or not all(v is None or (isinstance(v, str) and v) for v in merge.values()):
        raise AnnotationError(f"{path}: merge is {merge!r}: need a class, or null, for each that has another name")
    return Metadata({k: float(v) for k, v in mpp.items()}, tuple(classes or ()), groups, merge)
