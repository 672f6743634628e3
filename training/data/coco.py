"""COCO JSON in and out: the one form of annotations that most other tools read.

Masks are run lengths, column by column, background first (Lin et al. 2014; `maskApi.c` of pycocotools). Here
they are decoded in numpy: the C code does not check the lengths that a file states.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import AnnotationError
from pipeline.files import committed, remove, write_json
from pipeline.segment.polygons import Ints, count_within
from training.data.sample import (
    DATASET_FILE,
    SPLITS_FILE,
    Catalogue,
    Conversion,
    Dataset,
    Entry,
    LabelledImage,
    Metadata,
    class_names,
    known_classes,
    outlined_image,
    paint_white,
    read_image,
    read_json_file,
    relative_name,
)

_LARGEST_SIDE_PX = 32_768


class _ImageEntry(NamedTuple):
    """An entry of `images`."""

    path: Path
    height: int
    width: int
    mpp: float | None
    group: str | None


def coco(data: Path, metadata: Metadata) -> Catalogue | None:
    """A JSON file with `images` and `annotations`, in the folder or in its annotations/, or that file itself.

    Images lie beside it, in images/ beside it, or so one folder up; those of instances_<part>.json also in <part>/ of
    these, as CVAT exports them, and COCO itself is laid out. An annotation is a nucleus, in one part or
    several: polygons or run lengths, compressed or not, drawn by pycocotools' own rule. Crowds (iscrowd) stand
    for no single nucleus: as in COCO they are ignored, so they are painted white, but for nuclei in them, and
    counted, unless all are crowds, as CVAT writes masks. Categories are the classes, in the order of their numbers.
    `mpp` and `group` of an image are read if they are there; `write_coco` writes them.
    """
    files = [data] if data.is_file() else sorted(p for q in ("*.json", "annotations/*.json") for p in data.glob(q))
    others = (DATASET_FILE, SPLITS_FILE)
    readable = [
        (path, content)
        for path in files
        if path.suffix.lower() == ".json"
        and (path == data or not path.name.startswith("."))  # hidden ones are macOS's, or an editor's
        and path.name not in others
        and _is_coco(content := read_json_file(path))
    ]
    if not readable:
        return None
    if len(readable) > 1:
        raise AnnotationError(
            f"{data} holds {len(readable)} COCO files, {readable[0][0]} and {readable[1][0]}: give one of them"
        )
    ((source, content),) = readable
    try:
        return _catalogue(content, source, metadata)
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise AnnotationError(
            f"{source} is not in COCO's form ({type(error).__name__}: {error}): export it again"
        ) from error


def write_coco(dataset: Dataset, path: Path) -> Conversion:
    """A dataset -> COCO JSON at `path` with compressed run lengths, and its images as PNG in images/ beside it.

    Categories are numbered from 1 in the order of the classes; `mpp` and `group` stand in each image's entry.
    Law: read back, the dataset is the same but for its name. A file that exists is complete. Raises AnnotationError
    where there are such files already.
    """
    if path.exists() or ((path.parent / "images").is_dir() and any((path.parent / "images").iterdir())):
        raise AnnotationError(
            f"{path.parent} holds {path.name} or images already: need a new folder, so that none is replaced"
        )
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    try:
        return _write(dataset, path)
    except BaseException:  # also when interrupted: the images that are written would be in the way of another try
        remove(path.parent / "images")
        raise


def _write(dataset: Dataset, path: Path) -> Conversion:
    images: list[dict[str, Any]] = []
    nuclei: list[dict[str, Any]] = []
    contested, lost = 0, 0
    for number, sample in enumerate(dataset.images, 1):
        read = known_classes(sample)
        name = f"images/{sample.id}.png"
        with committed(path.parent / name) as part:
            Image.fromarray(read.image).save(part)
        height, width = read.labels.shape
        images.append(
            {"id": number, "file_name": name, "width": width, "height": height}
            | {"mpp": sample.mpp, "group": sample.group}
        )
        nuclei += [
            {"id": len(nuclei) + i, "image_id": number, "category_id": kind, "iscrowd": 0} | shape
            for i, (kind, shape) in enumerate(zip(read.class_index.tolist(), _encoded(read.labels), strict=True), 1)
        ]
        contested, lost = contested + read.contested_px, lost + read.lost
    content = {
        "info": {"description": dataset.name},
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(dataset.classes, 1)],
        "annotations": nuclei,
    }
    write_json(path, content)
    return Conversion(len(images), len(nuclei), contested, lost)


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(k), list) for k in ("images", "annotations"))


def _catalogue(content: Mapping[str, Any], source: Path, metadata: Metadata) -> Catalogue:
    of_id = {entry["id"]: _image_entry(entry, source) for entry in content["images"]}
    if len(of_id) < len(content["images"]):
        raise AnnotationError(f"{source} gives two images the same id: need one for each")
    listed_categories = sorted(content.get("categories", ()), key=lambda c: c["id"])
    categories = {c["id"]: c["name"] for c in listed_categories}
    if len(categories) < len(listed_categories):
        raise AnnotationError(f"{source} gives two categories the same id: need one for each")
    names = tuple(categories.values())
    if not names or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
        raise AnnotationError(f"{source} names the categories {list(names)}: need one or more, each with its own name")
    if metadata.classes:
        names = class_names(names, metadata, source)
    masks: dict[Any, list[bytes]] = {id_: [] for id_ in of_id}
    crowds: dict[Any, list[bytes]] = {id_: [] for id_ in of_id}
    class_index: dict[Any, list[int]] = {id_: [] for id_ in of_id}
    skipped: Counter[str] = Counter()
    only_crowds = all(entry.get("iscrowd") for entry in content["annotations"])
    for entry in content["annotations"]:
        where = f"{source}, annotation {entry.get('id')}"
        if entry["image_id"] not in of_id or entry["category_id"] not in categories:
            raise AnnotationError(
                f"{where} is of image {entry['image_id']} and category {entry['category_id']}: need ones that it lists"
            )
        listed = of_id[entry["image_id"]]
        mask = _compressed(entry.get("segmentation"), listed.height, listed.width, where)
        if not _counts(mask)[1::2].any():
            skipped["outside the image, or too small to have a pixel"] += 1
            continue
        if entry.get("iscrowd") and not only_crowds:
            skipped["a crowd (iscrowd), which is no single nucleus: the area is painted white"] += 1
            crowds[entry["image_id"]].append(mask)
            continue
        masks[entry["image_id"]].append(mask)
        class_index[entry["image_id"]].append(names.index(categories[entry["category_id"]]) + 1)
    return Catalogue(
        tuple(
            Entry(
                listed.path.stem,
                partial(_read, listed, masks[id_], crowds[id_], np.array(class_index[id_], np.int64), source),
                listed.path,
                listed.mpp,
                listed.group,
            )
            for id_, listed in of_id.items()
        ),
        names,
        skipped,
    )


def _image_entry(entry: Mapping[str, Any], source: Path) -> _ImageEntry:
    height, width = entry["height"], entry["width"]
    if not all(type(side) is int and 0 < side <= _LARGEST_SIDE_PX for side in (height, width)):
        raise AnnotationError(f"{source}: an image of {width!r} x {height!r} px: need 1 to {_LARGEST_SIDE_PX}")
    name = relative_name(entry["file_name"], source)
    part = source.stem.removeprefix("instances_")
    folders = ("", "images", f"images/{part}", part)
    places = [up / folder / name for up in (source.parent, source.parent.parent) for folder in folders]
    path = next((p for p in places if os.path.isfile(p)), None)  # False also for names that no file can have
    if path is None:
        raise AnnotationError(
            f"{source}: there is no image {str(name)[:200]}: need it beside the file, or in images/ there"
        )
    mpp, group = entry.get("mpp"), entry.get("group")
    return _ImageEntry(
        path,
        height,
        width,
        float(mpp) if isinstance(mpp, int | float) and not isinstance(mpp, bool) else None,
        group if isinstance(group, str) else None,
    )


def _read(
    listed: _ImageEntry, masks: Sequence[bytes], crowds: Sequence[bytes], class_index: Ints, source: Path
) -> LabelledImage:
    """Paint the masks in their order: a later one has the pixels that it shares with an earlier one."""
    image = read_image(listed.path)
    if image.shape[:2] != (listed.height, listed.width):
        raise AnnotationError(
            f"{listed.path} is {image.shape[1]} x {image.shape[0]} px, {source} says {listed.width} x "
            f"{listed.height}: need the image that was annotated"
        )
    columns = np.zeros(listed.width * listed.height, np.int32)
    claims = np.zeros(len(columns), np.uint8)
    for number, mask in enumerate(masks, 1):
        at = _pixels(mask)
        columns[at] = number
        claims[at] = np.minimum(claims[at], 1) + 1
    ignored = np.zeros(len(columns), bool)
    for mask in crowds:
        ignored[_pixels(mask)] = True
    shape = listed.width, listed.height
    labels = columns.reshape(shape).T
    image = paint_white(image, ignored.reshape(shape).T, labels)
    return outlined_image(image, labels, class_index, int((claims > 1).sum()))


def _pixels(mask: bytes) -> Ints:
    """Where a mask is: the numbers of its pixels, column by column."""
    counts = _counts(mask)
    ends = np.cumsum(counts)
    lengths = counts[1::2]
    starts = ends[: 2 * len(lengths) : 2]
    return starts.repeat(lengths) + count_within(lengths)


def _compressed(segmentation: Any, height: int, width: int, where: str) -> bytes:
    """A segmentation as COCO has it -> compressed run lengths that cover the image. Raises AnnotationError."""
    from pycocotools import mask

    if isinstance(segmentation, list) and segmentation:
        for ring in segmentation:
            _check_ring(ring, height, width, where)
        return bytes(mask.merge(mask.frPyObjects(segmentation, height, width))["counts"])
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise AnnotationError(
            f"{where} has no outline for an image of {width} x {height} px: need polygons, or run lengths with "
            f"size [{height}, {width}]"
        )
    stated = segmentation.get("counts")
    if isinstance(stated, str):
        text = stated.encode("ascii", "replace")
        counts = _counts(text)
    elif isinstance(stated, list) and all(type(c) is int and 0 <= c <= height * width for c in stated):
        text, counts = b"", np.array(stated, np.int64)
    else:
        raise AnnotationError(f"{where}: counts are {str(stated)[:40]}: need text, or whole numbers from 0")
    if (counts < 0).any() or counts.sum() != height * width:
        raise AnnotationError(
            f"{where}: its run lengths cover {counts.sum()} px of an image of {height * width}: need all of them"
        )
    return text or _text(counts.tolist(), height, width)


def _text(counts: list[int], height: int, width: int) -> bytes:
    """Run lengths -> compressed run lengths, with two empty pairs after them.

    pycocotools reserves six characters a number and none for the end of the text: where every number takes six, which
    those from 2^24 on do, it writes beyond its memory. Of the empty pairs the last takes two characters.
    """
    from pycocotools import mask

    return bytes(mask.frPyObjects({"size": [height, width], "counts": [*counts, 0, 0, 0, 0]}, height, width)["counts"])


def _check_ring(ring: Any, height: int, width: int, where: str) -> None:
    """Raise AnnotationError for what is no ring x0 y0 x1 y1 ..., or lies further outside than the image is wide."""
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2 or any(type(v) not in (int, float) for v in ring):
        raise AnnotationError(
            f"{where}: a polygon is {str(ring)[:40]}: need x0, y0, x1, y1, ... of three points or more"
        )
    xy = np.array(ring, np.float64).reshape(-1, 2)
    size = np.array([width, height])
    if not (np.isfinite(xy) & (xy >= -size) & (xy <= 2 * size)).all():
        raise AnnotationError(
            f"{where}: a polygon spans {xy.min(0).tolist()} to {xy.max(0).tolist()}, "
            f"its image is {width} x {height} px: need the image that it was drawn on"
        )


def _counts(text: bytes) -> Ints:
    """Compressed run lengths -> run lengths; one that no encoder writes gives a negative one.

    `rleFrString` of pycocotools: every character holds five bits, low ones first, and whether more follow; the
    last one's highest bit is the sign. From the fourth on, a number is the difference from the last but one.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(codes) or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        return np.array([-1])
    last = (codes & 32) == 0
    number = np.cumsum(last) - last
    first = np.flatnonzero(np.r_[True, last[:-1]])
    place = np.arange(len(codes)) - first[number]
    if place.max() > 6:  # 35 bits: more than any image needs
        return np.array([-1])
    values = np.bincount(number, ((codes & 31) << 5 * place).astype(np.float64)).astype(np.int64)
    values -= np.where(codes[last] & 16, 1 << 5 * (place[last] + 1), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _encoded(labels: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Label map with numbers 1..N -> segmentation, area and bbox of each nucleus."""
    from pycocotools import mask

    height, width = labels.shape
    columns = labels.T.ravel()
    starts = np.flatnonzero(np.r_[True, columns[1:] != columns[:-1]])
    ends = np.r_[starts[1:], len(columns)]
    owner = columns[starts]
    order = np.argsort(owner, kind="stable")
    order = order[owner[order] > 0]
    starts, ends, owner = starts[order], ends[order], owner[order]
    encoded = []
    for runs in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1) if len(owner) else ():
        edges = np.r_[0, np.stack([starts[runs], ends[runs]], 1).ravel(), height * width]
        rle = mask.frPyObjects({"size": [height, width], "counts": np.diff(edges).tolist()}, height, width)
        encoded.append(
            {
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
                "area": int((ends[runs] - starts[runs]).sum()),
                "bbox": mask.toBbox(rle).tolist(),
            }
        )
    return encoded
