"""Annotated images in, one dataset form out, whatever the source.

A dataset is a folder, or one annotation file with its images near it, in one of `FORMS`. Beside them may lie
    splits.json    {"train": [id, ...], "test": [...]}; see `named_splits`
    dataset.json   {"mpp": 0.25 or {id: 0.25}, "classes": ["Tumour", ...], "groups": {id: "bladder"}}; all optional,
                   and each has the last word over what the source says (but --mpp over all)
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slides.slide import BELIEVABLE_MPP
from training.data.coco import coco, write_coco
from training.data.label_maps import folder, matlab, pannuke, tnbc, write_folder
from training.data.outlines import aperio, qupath
from training.data.sample import (
    Annotated,
    AnnotationError,
    Annotations,
    Described,
    Item,
    Listing,
    Pixels,
    Written,
    read_json,
    stated_mpp,
)

__all__ = [
    "FORMS",
    "Annotated",
    "AnnotationError",
    "Annotations",
    "Pixels",
    "Written",
    "find",
    "find_all",
    "named_sets",
    "named_splits",
    "write_coco",
    "write_folder",
]


class Form(NamedTuple):
    name: str
    needs: str
    reader: Callable[[Path, Described], Listing | None]


# The first one that fits a folder is taken.
FORMS = (
    Form("MATLAB", "Images/<id>.png with Labels/<id>.mat", matlab),
    Form("label maps", "images/<id>.png with labels/<id>.png", folder),
    Form("TNBC", "Slide_01/<id>.png with GT_01/<id>.png", tnbc),
    Form("PanNuke", "images.npy with masks.npy", pannuke),
    Form("Aperio XML", "<id>.xml with <id>.tif", aperio),
    Form("QuPath GeoJSON", "<image>.geojson with its image or slide", qupath),
    Form("COCO", "a .json with its images", coco),
)


def find(data: Path, splits: Sequence[str] = (), mpp: float | None = None) -> Annotations:
    """The images of a dataset, of the named splits or all, sorted by id.

    mpp: micrometres per pixel; else as dataset.json says, else the annotation, else the image's metadata or
    resolution tags, if believable. Nothing is guessed.
    Raises AnnotationError for what is in no known form, incomplete or contradictory, for an unknown split (it
    lists the right ones), and for an unknown scale.
    """
    if not data.exists():
        raise AnnotationError(f"{data} does not exist: need a dataset's folder, or an annotation file")
    beside = data.parent if data.is_file() else data
    described = _described(beside / "dataset.json")
    items = {}
    listing = _listing(data, described)
    for item in listing.items:
        if item.id in items:
            raise AnnotationError(f"{data} has two images called '{item.id}': need one name for each")
        items[item.id] = item
    if strange := sorted({*described.groups, *described.mpp} - {"", *items}):
        raise AnnotationError(f"{beside / 'dataset.json'} speaks of '{strange[0]}', which is no image of {data}")
    images = tuple(
        Annotated(
            id_,
            described.groups.get(id_, group_of(id_) if items[id_].group is None else items[id_].group or ""),
            _scale(items[id_], described, mpp, data),
            items[id_].read,
        )
        for id_ in _chosen(items, splits, beside, data)
    )
    return Annotations(_name(data), images, listing.classes)


def find_all(data: Sequence[Path], splits: Sequence[str] = (), mpp: Sequence[float] = ()) -> list[Annotations]:
    """Several datasets, each as `find` gives it; see `named_sets`."""
    return [find(one.data, one.splits, one.mpp) for one in named_sets(data, splits, mpp)]


class Named(NamedTuple):
    """A dataset among others, not yet looked for."""

    name: str
    data: Path
    splits: tuple[str, ...]  # (): all of it
    mpp: float | None


def named_sets(data: Sequence[Path], splits: Sequence[str] = (), mpp: Sequence[float] = ()) -> list[Named]:
    """Datasets with their names, what is wanted of them, and their scales. Raises AnnotationError.

    splits: `NAME` is a split that every dataset must have, `DATASET:NAME` one of the dataset of that folder name;
    a dataset that no split is named for is taken whole
    mpp: none (as the datasets say), one for all, or one for each, in order
    """
    if len(mpp) not in (0, 1, len(data)):
        raise AnnotationError(f"{len(mpp)} values of mpp for {len(data)} datasets: need none, one, or one for each")
    scales = list(mpp) if len(mpp) == len(data) else [mpp[0] if mpp else None] * len(data)
    names = [_name(folder) for folder in data]
    if len(set(names)) < len(names):
        raise AnnotationError(f"datasets called {', '.join(names)}: need a different name for each folder")
    for split in splits:
        if split.rpartition(":")[0] not in ("", *names):
            raise AnnotationError(
                f"split '{split}' is of no dataset: need NAME, or one of {', '.join(names)} before ':'"
            )
    return [
        Named(name, folder, tuple(s.removeprefix(f"{name}:") for s in splits if s.rpartition(":")[0] in ("", name)), at)
        for name, folder, at in zip(names, data, scales, strict=True)
    ]


def _name(data: Path) -> str:
    return data.stem if data.is_file() else data.resolve().name


def group_of(id_: str) -> str:
    """What the name of an image says of its group.

    A TCGA barcode: its tissue source site, `TCGA-G9`, which stands for one laboratory and one organ.
    Else the name without its last number, where that is set apart: `human_bladder_01` -> `human_bladder`,
    `03_2` -> `03`. Else nothing, "".
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
    content = read_json(path)
    named = dict(_walk(content, "")) if isinstance(content, dict) else {}
    if not named:
        raise AnnotationError(f"{path} names no splits: need a JSON object, name -> list of ids")
    return named


def _walk(content: Mapping[str, Any], at: str) -> Iterator[tuple[str, list[str]]]:
    lists = {k: v for k, v in content.items() if isinstance(v, list) and all(isinstance(i, str) for i in v)}
    yield from ((at + name, ids) for name, ids in lists.items())
    if at and lists:
        yield at.rstrip("/"), [i for ids in lists.values() for i in ids]
        for name, ids in lists.items():
            yield f"{at}not-{name}", [i for other in lists.values() for i in other if i not in ids]
    for name, inner in content.items():
        if isinstance(inner, dict):
            yield from _walk(inner, f"{at}{name}/")


def _listing(data: Path, described: Described) -> Listing:
    """What the first form that fits finds. Raises AnnotationError."""
    for form in FORMS:
        try:
            listing = form.reader(data, described)
        except AnnotationError as error:
            raise AnnotationError(f"{data}, read as {form.name}: {error}") from error
        if listing is not None and listing.items:
            return listing
    known = "; ".join(f"{form.needs} ({form.name})" for form in FORMS)
    raise AnnotationError(f"{data} holds no images in a form that is known here: need one of {known}")


def _chosen(items: Mapping[str, Item], splits: Sequence[str], beside: Path, data: Path) -> list[str]:
    """Ids of the splits, sorted; all without splits."""
    if not splits:
        return sorted(items)
    named = named_splits(beside / "splits.json")
    if unknown := [s for s in splits if s not in named]:
        raise AnnotationError(f"{data} has no split '{unknown[0]}': its splits are {', '.join(named)}")
    chosen = sorted({i for s in splits for i in named[s]})
    if missing := [i for i in chosen if i not in items]:
        raise AnnotationError(f"{data}: '{missing[0]}' of splits.json has no image: need each in the dataset")
    return chosen


def _scale(item: Item, described: Described, mpp: float | None, data: Path) -> float:
    """The first of user, dataset.json, annotation, image. Raises AnnotationError where none is believable."""
    low, high = BELIEVABLE_MPP
    said = mpp if mpp is not None else described.mpp.get(item.id, described.mpp.get(""))
    if said is not None:
        if not low <= said <= high:
            raise AnnotationError(f"mpp={said:g} for '{item.id}': need {low:g} to {high:g} micrometres per pixel")
        return said
    if item.mpp is not None and low <= item.mpp <= high:
        return item.mpp
    if item.picture is None or (stated := stated_mpp(item.picture)) is None:
        raise AnnotationError(f"{data}: '{item.id}' states no resolution: pass --mpp (micrometres per pixel)")
    return stated


def _described(path: Path) -> Described:
    """dataset.json, or nothing where there is none. Raises AnnotationError."""
    if not path.is_file():
        return Described({}, (), {})
    content = read_json(path)
    if not isinstance(content, dict) or (strange := content.keys() - Described._fields):
        what = f"'{min(strange)}'" if isinstance(content, dict) else "no object"
        raise AnnotationError(f"{path} holds {what}: need an object with {', '.join(Described._fields)}, all optional")
    mpp, classes, groups = (
        content.get(name, empty) for name, empty in (("mpp", {}), ("classes", None), ("groups", {}))
    )
    mpp = {"": mpp} if isinstance(mpp, int | float) else mpp
    if not isinstance(mpp, dict) or not all(type(v) in (int, float) for v in mpp.values()):
        raise AnnotationError(f"{path}: mpp is {mpp!r}: need a number, or one for each id")
    if classes is not None and not (
        isinstance(classes, list) and classes and all(isinstance(c, str) and c for c in classes)
    ):
        raise AnnotationError(f"{path}: classes is {classes!r}: need a list of names, at least one")
    if len(set(classes or ())) < len(classes or ()):
        raise AnnotationError(f"{path}: classes names one twice: need different names")
    if not isinstance(groups, dict) or not all(isinstance(g, str) for g in groups.values()):
        raise AnnotationError(f"{path}: groups is {groups!r}: need the name of a group for each id")
    return Described({k: float(v) for k, v in mpp.items()}, tuple(classes or ()), groups)
