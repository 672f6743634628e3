"""Annotations drawn as pixels: label maps, also as Cellpose names them, TNBC's masks, the arrays of PanNuke and CoNIC,
the MATLAB files of CoNSeP and Lizard.

Every reader takes a folder and the content of its dataset.json, and lists the images; None: not this form.
A pixel that two layers mark belongs to the later one.
"""

import csv
import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from pipeline.errors import AnnotationError
from pipeline.files import committed, remove, write_json
from slides.opening import as_stored, open_quietly
from training.data.mat5 import read_mat
from training.data.sample import (
    DATASET_FILE,
    MOST_CLASSES,
    NO_CLASSES,
    SUFFIXES,
    Catalogue,
    Conversion,
    Dataset,
    Entry,
    LabelledImage,
    Metadata,
    by_stem,
    class_numbers,
    known_classes,
    labelled_image,
    pair_up,
    read_image,
    subfolder,
    whole_numbers,
)

_MAPS = (".png", ".tif", ".tiff")
_MOST_NUCLEI = 65_535  # of a 16-bit map
_PIECES_OF_A_MASK = 10  # of one number, where there is no other: nobody annotates one nucleus so

# Where this tag of a TIFF is 0, white is 0 (TIFF 6.0, section 8): ImageJ writes it with masks that it shows black on
# white. Pillow inverts numbers of 8 bits then.
_PHOTOMETRIC = 262

# What Pillow raises for a damaged picture; those from the fourth on for pages after the first.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error)

# The order of masks.npy in PanNuke (Gamper et al. 2020); the last channel is the background.
_PANNUKE = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
# The classes 1 to 6 of labels.npy in CoNIC (Graham et al. 2021), in the order of the columns of its counts.csv.
_CONIC = ("Neutrophil", "Epithelial", "Lymphocyte", "Plasma", "Eosinophil", "Connective")

# What Cellpose trains on, and how the names of files end that it writes beside an image.
_MASKS, _IMG, _PICKLED = "_masks", "_img", "_seg.npy"
_COMPUTED = ("_cp_masks", "_cp_outlines", "_cp_output", "_flows", "_outlines")


def folder(data: Path, metadata: Metadata) -> Catalogue | None:
    """images/<id>.png with labels/<id>.png, an instance map; classes/<id>.png, a class per pixel, if there are classes.

    A nucleus is of the class that most of its pixels have; background (0) does not count.
    """
    images, labels, classes = (subfolder(data, name) for name in ("images", "labels", "classes"))
    if images is None or labels is None:
        return None
    pairs = pair_up(by_stem(images.iterdir()), by_stem(labels.iterdir(), _MAPS), data, _MAPS)
    if classes is None:
        if len(metadata.classes) > 1:
            raise AnnotationError(
                f"{DATASET_FILE} names {len(metadata.classes)} classes, but there is no {data / 'classes'}/<id>.png: "
                f"need the class of every nucleus"
            )
        entries = [Entry(id_, partial(_read_maps, image, map_), image) for id_, image, map_ in pairs]
        return Catalogue(tuple(entries), metadata.classes or NO_CLASSES)
    maps = pair_up(by_stem(images.iterdir()), by_stem(classes.iterdir(), _MAPS), classes, _MAPS)
    largest = max((int(_read_map(path).max()) for _, _, path in maps), default=0)
    return Catalogue(
        tuple(
            Entry(id_, partial(_read_maps, image, map_, class_map), image)
            for (id_, image, map_), (_, _, class_map) in zip(pairs, maps, strict=True)
        ),
        class_numbers(largest, metadata, classes),
    )


def write_folder(dataset: Dataset, folder: Path) -> Conversion:
    """A dataset -> images/ and labels/ (PNG), classes/ if there are several, and dataset.json, written last.

    Law: read back, the dataset is the same but for its name. Raises AnnotationError for a folder that holds
    images already, and for more nuclei or classes than the files can number.
    """
    if any(p.is_dir() and any(p.iterdir()) for p in (folder / "images", folder / "labels", folder / "classes")):
        raise AnnotationError(f"{folder} holds images already: need a new folder, so that two datasets do not mix")
    if len(dataset.classes) > MOST_CLASSES:
        raise AnnotationError(f"{dataset.name} has {len(dataset.classes)} classes: need up to {MOST_CLASSES}")
    folders = ("images", "labels", "classes") if len(dataset.classes) > 1 else ("images", "labels")
    for name in folders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        return _write_maps(dataset, folder, folders)
    except BaseException:  # also when interrupted: what is written by half would be taken for a dataset
        for name in folders:
            remove(folder / name)
        raise


def _write_maps(dataset: Dataset, folder: Path, folders: Sequence[str]) -> Conversion:
    nuclei, contested, lost = 0, 0, 0
    for sample in dataset.images:
        read = known_classes(sample)
        if len(read.class_index) > _MOST_NUCLEI:
            raise AnnotationError(
                f"'{sample.id}' has {len(read.class_index)} nuclei, a 16-bit map numbers {_MOST_NUCLEI}: "
                f"write COCO JSON"
            )
        classes = np.r_[0, read.class_index].astype(np.uint8)[read.labels]
        maps = dict(zip(folders, (read.image, read.labels.astype(np.uint16), classes), strict=False))
        for name, values in maps.items():
            with committed(folder / name / f"{sample.id}.png") as part:
                Image.fromarray(values).save(part)
        nuclei, contested = nuclei + len(read.class_index), contested + read.contested_px
        lost += read.lost
    metadata = {
        "mpp": {a.id: a.mpp for a in dataset.images},
        "classes": dataset.classes,
        "groups": {a.id: a.group for a in dataset.images},
    }
    write_json(folder / DATASET_FILE, metadata)
    return Conversion(len(dataset.images), nuclei, contested, lost)


def tnbc(data: Path, metadata: Metadata) -> Catalogue | None:
    """Slide_01/<id>.png with GT_01/<id>.png, as TNBC (Naylor et al. 2019) is published.

    A mask of one value besides 0 is binary: its nuclei are the components that touch, corners included.
    One of several values is an instance map.
    """
    slides, truths = _numbered(data, "slide"), _numbered(data, "gt")
    if not slides or not truths:
        return None
    if odd := sorted(slides.keys() ^ truths.keys()):
        raise AnnotationError(f"{data} has no {'GT' if odd[0] in slides else 'Slide'}_{odd[0]}: need both")
    entries = []
    for number, slide in sorted(slides.items()):
        pairs = pair_up(by_stem(slide.iterdir()), by_stem(truths[number].iterdir(), _MAPS), slide, _MAPS)
        entries += [Entry(id_, partial(_read_mask, image, mask), image) for id_, image, mask in pairs]
    return Catalogue(tuple(entries), metadata.classes or NO_CLASSES)


def matlab(data: Path, metadata: Metadata) -> Catalogue | None:
    """Images/<id>.png with Labels/<id>.mat, as CoNSeP and CPM are published, and Lizard once its images lie together.

    A .mat holds `inst_map`, and for classes `type_map` (a class per pixel), or `inst_type` or `class` (a class per
    nucleus, in rising order of their numbers, or in the order of the numbers in `id`).
    """
    images, labels = subfolder(data, "images"), subfolder(data, "labels")
    if images is None or labels is None or not (annotated := by_stem(labels.iterdir(), [".mat"])):
        return None
    pairs = pair_up(by_stem(images.iterdir()), annotated, data, [".mat"])
    if metadata.classes:
        classes = metadata.classes
    else:
        largest = max(int(_load(path)[1].max(initial=0)) for _, _, path in pairs)
        classes = class_numbers(largest, metadata, labels)
    return Catalogue(
        tuple(Entry(id_, partial(_read_matlab, image, path, len(classes)), image) for id_, image, path in pairs),
        classes,
    )


def pannuke(data: Path, metadata: Metadata) -> Catalogue | None:
    """images.npy (N, h, w, 3) with masks.npy (N, h, w, classes + 1), beside it or as the folds are published.

    A fold is published as images/fold1/images.npy and types.npy with masks/fold1/masks.npy. Each channel of the
    masks is an instance map of one class; the last is the background and not read. types.npy, the tissue of
    every image, is its group. Arrays are memory-mapped, never unpickled.
    """
    entries: list[Entry] = []
    classes = metadata.classes or _PANNUKE
    for images in _image_arrays(data):
        if _is_conic(images):
            continue
        masks = _masks_of(images, data)
        pictures, layers = _mapped(images), _mapped(masks)
        if pictures.dtype.kind not in "uif" or layers.dtype.kind not in "uif":
            raise AnnotationError(
                f"{images} is {pictures.dtype}, {masks} {layers.dtype}: need numbers, another one for each nucleus"
            )
        if (
            not pictures.size
            or pictures.ndim != 4
            or pictures.shape[3] != 3
            or layers.shape != (*pictures.shape[:3], len(classes) + 1)
        ):
            raise AnnotationError(
                f"{images} is {pictures.shape}, {masks} {layers.shape}: need (N, height, width, 3) and "
                f"(N, height, width, {len(classes) + 1}), a channel for each of {', '.join(classes)}, and background"
            )
        types = _mapped(images.with_name("types.npy")) if images.with_name("types.npy").is_file() else None
        if types is not None and (types.dtype.kind != "U" or types.shape != pictures.shape[:1]):
            raise AnnotationError(
                f"types.npy beside {images} is {types.dtype} {types.shape}: need {len(pictures)} texts"
            )
        prefix = "" if images.parent == data else f"{images.parent.name}_"
        entries += [
            Entry(
                f"{prefix}{i:05d}",
                partial(_read_pannuke, images, masks, i),
                group=None if types is None else str(types[i]),
            )
            for i in range(len(pictures))
        ]
    return Catalogue(tuple(entries), classes) if entries else None


def conic(data: Path, metadata: Metadata) -> Catalogue | None:
    """images.npy (N, h, w, 3) with labels.npy (N, h, w, 2) beside it, as CoNIC (Graham et al. 2021) is published.

    The first channel of the labels is an instance map, the second a class per pixel. patch_info.csv, if it is there,
    has the name of every image, such as consep_1-0000: the image of Lizard that it was cut from is its group.
    counts.csv, which follows from the labels, is not read. Arrays are memory-mapped, never unpickled.
    """
    entries: list[Entry] = []
    classes = metadata.classes or _CONIC
    for images in filter(_is_conic, _image_arrays(data)):
        labels = images.with_name("labels.npy")
        pictures, maps = _mapped(images), _mapped(labels)
        if pictures.dtype.kind not in "uif" or maps.dtype.kind not in "uif":
            raise AnnotationError(
                f"{images} is {pictures.dtype}, {labels} {maps.dtype}: need numbers, another one for each nucleus"
            )
        if not pictures.size or pictures.ndim != 4 or pictures.shape[3] != 3 or maps.shape != (*pictures.shape[:3], 2):
            raise AnnotationError(
                f"{images} is {pictures.shape}, {labels} {maps.shape}: need (N, height, width, 3) and "
                f"(N, height, width, 2), a map of nuclei and one of their classes"
            )
        names = _patch_names(images.with_name("patch_info.csv"), len(pictures))
        prefix = "" if images.parent == data else f"{images.parent.name}_"
        entries += [
            Entry(f"{prefix}{i:05d}", partial(_read_conic, images, labels, i, len(classes)), group=name)
            for i, name in enumerate(names)
        ]
    return Catalogue(tuple(entries), classes) if entries else None


def cellpose(data: Path, metadata: Metadata) -> Catalogue | None:
    """<id>.png or <id>_img.png with <id>_masks.png, an instance map, as Cellpose trains on; also in folders.

    What Cellpose has computed itself (<id>_cp_masks.png, <id>_flows.tif, ...) is passed over, and so is <id>_seg.npy
    where there are masks: it would have to be unpickled. Raises AnnotationError where there is nothing else.
    """
    entries: list[Entry] = []
    pickled = 0
    for place in (data, *sorted(p for p in data.glob("*") if p.is_dir() and not p.name.startswith("."))):
        prefix = "" if place == data else f"{place.name}_"
        pairs, beside = _cellpose_pairs(place)
        pickled += beside
        entries += [Entry(f"{prefix}{id_}", partial(_read_maps, image, map_), image) for id_, image, map_ in pairs]
    if not entries:
        return None
    if len(metadata.classes) > 1:
        raise AnnotationError(
            f"{DATASET_FILE} names {len(metadata.classes)} classes, but masks of Cellpose have none: need one class"
        )
    reason = f"<id>{_PICKLED}, which is never unpickled: its {_MASKS} are read"
    return Catalogue(tuple(entries), metadata.classes or NO_CLASSES, {reason: pickled} if pickled else {})


def _cellpose_pairs(place: Path) -> tuple[list[tuple[str, Path, Path]], int]:
    """(id, image, masks) of Cellpose's in a folder, sorted, and how many pickled files lie there.

    Raises AnnotationError for an image or masks without the other.
    """
    files = [path for path in place.glob("*") if not path.stem.endswith(_COMPUTED)]
    maps = by_stem((path for path in files if path.stem.endswith(_MASKS)), _MAPS)
    maps = {stem.removesuffix(_MASKS): path for stem, path in maps.items()}
    pickled = sorted(p for p in files if p.name.endswith(_PICKLED) and not p.name.startswith("."))
    never = f"is never unpickled: save the masks as PNG or TIFF in Cellpose, and name them <id>{_MASKS}"
    if not maps and pickled:
        raise AnnotationError(f"{pickled[0]} holds Python objects, so it {never}")
    images: dict[str, Path] = {}
    for stem, path in by_stem(path for path in files if maps and not path.stem.endswith(_MASKS)).items():
        id_ = stem if stem in maps else stem.removesuffix(_IMG)
        if id_ in images:
            raise AnnotationError(f"'{id_}' is both {images[id_]} and {path}: need one")
        images[id_] = path
    for id_ in sorted(maps.keys() - images.keys()):
        raise AnnotationError(f"{maps[id_]} has no image: need {id_} or {id_}{_IMG} in {', '.join(sorted(SUFFIXES))}")
    for id_ in sorted(images.keys() - maps.keys()):
        unread = images[id_].with_name(f"{images[id_].stem}{_PICKLED}")
        why = f", as {unread} {never}" if unread in pickled else f": need {id_}{_MASKS} in {', '.join(_MAPS)}"
        raise AnnotationError(f"{images[id_]} has no masks{why}")
    return [(id_, images[id_], maps[id_]) for id_ in sorted(maps)], len(pickled)


def _read_maps(image: Path, labels: Path, classes: Path | None = None) -> LabelledImage:
    labels_ = _read_map(labels)
    _check_no_mask(labels_, str(labels))
    class_index = None if classes is None else _majority(labels_, _read_map(classes), str(classes))
    return _named(labels, read_image(image), labels_, class_index)


def _check_no_mask(labels: NDArray[np.int32], source: str) -> None:
    """Raise AnnotationError where many pieces have one number, and there is no other."""
    values = np.unique(labels)
    if len(values) - (values[0] == 0) == 1 and (pieces := int(_pieces(labels).max())) >= _PIECES_OF_A_MASK:
        raise AnnotationError(
            f"{source} is a mask: its {pieces} pieces have one number, {values[-1]}: need another number for each "
            f"nucleus"
        )


def _read_mask(image: Path, mask: Path) -> LabelledImage:
    labels = _read_map(mask)
    if (values := np.unique(labels)).size - (values[0] == 0) == 1:
        labels = _pieces(labels)
    return _named(mask, read_image(image), labels, None)


def _pieces(mask: NDArray[np.int32]) -> NDArray[np.int32]:
    """The components of what is not 0, numbered; those that touch at a corner are one."""
    from scipy import ndimage

    pieces: NDArray[np.int32] = ndimage.label(mask, structure=np.ones((3, 3)))[0]
    return pieces


def _read_matlab(image: Path, path: Path, classes: int) -> LabelledImage:
    labels, class_index = _load(path)
    _check_no_mask(labels, f"{path}: inst_map")
    pixels = np.bincount(labels.ravel())
    if class_index.size and ((class_index < 1) | (class_index > classes))[pixels[1:] > 0].any():
        raise AnnotationError(f"{path} has a nucleus of class 0 or above {classes}: need 1 to {classes} for each")
    return _named(path, read_image(image), labels, class_index if class_index.size else None)


def _read_pannuke(images: Path, masks: Path, index: int) -> LabelledImage:
    image = _colours(images, index)
    layers = np.asarray(_mapped(masks)[index, ..., :-1])
    labels, class_index = np.zeros(layers.shape[:2], np.int32), [np.empty(0, np.int64)]
    try:
        for channel in range(layers.shape[2]):
            layer = whole_numbers(layers[..., channel])
            _check_no_mask(layer, f"channel {channel}")
            labels = np.where(layer > 0, layer + sum(map(len, class_index)), labels)
            class_index.append(np.full(int(layer.max()), channel + 1))
    except AnnotationError as error:
        raise AnnotationError(f"{masks}[{index}]: {error}") from error
    contested = int(((layers > 0).sum(2) > 1).sum())
    return labelled_image(image, labels, np.concatenate(class_index), contested)


def _read_conic(images: Path, labels: Path, index: int, classes: int) -> LabelledImage:
    image, maps = _colours(images, index), np.asarray(_mapped(labels)[index])
    try:
        nuclei, types = (whole_numbers(maps[..., channel]) for channel in range(2))
        _check_no_mask(nuclei, "channel 0")
        class_index = _majority(nuclei, types, "channel 1")
        if class_index.max(initial=0) > classes:
            raise AnnotationError(f"channel 1 has a nucleus of class {class_index.max()}: need 1 to {classes}")
        return labelled_image(image, nuclei, class_index)
    except AnnotationError as error:
        raise AnnotationError(f"{labels}[{index}]: {error}") from error


def _colours(images: Path, index: int) -> NDArray[np.uint8]:
    """An image of an array (N, h, w, 3) of any numbers from 0 to 255. Raises AnnotationError for others."""
    image = np.asarray(_mapped(images)[index])
    scaled = image.dtype.kind == "f" and 0 < image.max() <= 1
    if scaled or not (np.isfinite(image) & (image >= 0) & (image <= 255)).all():
        raise AnnotationError(f"{images}[{index}] goes from {image.min()} to {image.max()}: need colours of 0 to 255")
    colours: NDArray[np.uint8] = np.rint(image).astype(np.uint8)
    return colours


def _named(
    source: Path, image: NDArray[np.uint8], labels: NDArray[Any], class_index: NDArray[np.int64] | None
) -> LabelledImage:
    """As `labelled_image`; an error names the file `source`."""
    try:
        return labelled_image(image, labels, class_index)
    except AnnotationError as error:
        raise AnnotationError(f"{source}: {error}") from error


def _read_map(path: Path) -> NDArray[np.int32]:
    """An image of one channel (or of equal ones) as numbers, int32 (h, w)."""
    try:
        with open_quietly(path) as image:
            inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            deep = ";16" in str(getattr(image, "tile", ""))  # how Pillow reads it; colours into 8 bits
            values = np.asarray(as_stored(image))
            sizes = [frame.size for frame in ImageSequence.Iterator(image)]
    except Image.DecompressionBombError as error:
        raise AnnotationError(f"{path} is too large ({error}): cut the image and its map into parts") from error
    except _UNREADABLE as error:
        raise AnnotationError(
            f"{path} is not a readable image ({error}): copy it again, or save it as PNG or TIFF of 8, 16 or 32 bits"
        ) from error
    if (pages := sizes.count(sizes[0])) > 1:  # smaller ones are reduced copies
        raise AnnotationError(f"{path} has {pages} pages of one size, of which one would be read: need one")
    if deep and values.ndim == 3:
        raise AnnotationError(f"{path} has 16 bits a channel, of which 8 would be read: save it with one channel, grey")
    if inverted and values.dtype in (np.uint8, bool):
        values = ~values
    if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]  # a mask that a painting program saved in colour
    try:
        return whole_numbers(values)
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error


def _majority(labels: NDArray[np.int32], values: NDArray[np.int32], source: str) -> NDArray[np.int64]:
    """Class of nucleus n at n - 1: what most of its pixels say in `values`, 0 apart; `source` names these in errors.

    Raises AnnotationError where none of them says a class.
    """
    if values.shape != labels.shape:
        raise AnnotationError(f"{source} is {values.shape}, the labels {labels.shape}: need one class per pixel")
    count, width = int(labels.max()) + 1, int(values.max()) + 1
    if width > MOST_CLASSES + 1:
        raise AnnotationError(f"{source} goes up to {width - 1}: need classes of 1 to {MOST_CLASSES}")
    ids, row = np.unique(labels, return_inverse=True)  # numbers may be large, and few
    votes = np.bincount(row.ravel() * np.int64(width) + values.ravel(), minlength=len(ids) * width)
    table, nuclei = votes.reshape(len(ids), width)[ids > 0], ids[ids > 0]
    if (bare := ~table[:, 1:].any(1)).any():
        raise AnnotationError(f"{source} gives nucleus {nuclei[bare.argmax()]} no class: need 1 or more on its pixels")
    of_nuclei = np.zeros(count - 1, np.int64)
    of_nuclei[nuclei - 1] = table[:, 1:].argmax(1) + 1 if len(nuclei) else 0
    return of_nuclei


def _numbered(data: Path, name: str) -> dict[str, Path]:
    """Folders called <name>_<number>, by number."""
    named = [(p, re.fullmatch(rf"{name}_(\d+)", p.name, re.IGNORECASE)) for p in data.glob("*") if p.is_dir()]
    return {match[1]: path for path, match in named if match}


def _load(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """inst_map, int32 (h, w), and the class of nucleus n at n - 1, empty where the file has no classes."""
    content = read_mat(path, ("inst_map", "type_map", "inst_type"))
    if "inst_map" not in content:
        raise AnnotationError(f"{path} holds no inst_map: need the map of nuclei by that name")
    try:
        labels = whole_numbers(content["inst_map"])
        if "type_map" in content:
            return labels, _majority(labels, whole_numbers(content["type_map"]), "type_map")
        if "inst_type" in content:
            return labels, _in_order(labels, _listed(content["inst_type"]), "inst_type")
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error
    return labels, _lizard(path, labels)


def _lizard(path: Path, labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Class of nucleus n at n - 1, empty where the file has none, as Lizard (Graham et al. 2021) states them."""
    content = read_mat(path, ("class", "id"))
    if "class" not in content:
        return np.empty(0, np.int64)
    try:
        types = _listed(content["class"])
        return _by_id(labels, types, _listed(content["id"])) if "id" in content else _in_order(labels, types, "class")
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error


def _listed(values: NDArray[Any]) -> NDArray[np.int32]:
    """A row or column of whole numbers; of an image without nuclei it is empty. Raises AnnotationError."""
    return whole_numbers(np.ravel(values)[None])[0] if values.size else np.empty(0, np.int32)


def _in_order(labels: NDArray[np.int32], types: NDArray[np.int32], name: str) -> NDArray[np.int64]:
    """Classes of the nuclei in rising order of their numbers -> class of nucleus n at n - 1."""
    numbers = np.flatnonzero(np.bincount(labels.ravel())[1:])
    if len(types) != len(numbers):
        raise AnnotationError(f"{name} has {len(types)} classes for {len(numbers)} nuclei: need one for each")
    class_index = np.zeros(int(labels.max()), np.int64)
    class_index[numbers] = types
    return class_index


def _by_id(labels: NDArray[np.int32], types: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Classes of the nuclei that have the numbers `ids` -> class of nucleus n at n - 1."""
    if len(types) != len(ids) or len(np.unique(ids)) < len(ids):
        raise AnnotationError(
            f"class has {len(types)} classes, id {len(np.unique(ids))} different numbers: need one class for each"
        )
    numbers = np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1
    if (bare := ~np.isin(numbers, ids)).any():
        raise AnnotationError(f"id lacks nucleus {numbers[bare][0]} of inst_map: need the class of each")
    class_index = np.zeros(max(int(labels.max()), int(ids.max(initial=0))) + 1, np.int64)
    class_index[ids] = types
    return class_index[1 : int(labels.max()) + 1]


def _image_arrays(data: Path) -> list[Path]:
    """Files images.npy in a folder, and up to three levels below it."""
    return sorted(path for depth in range(4) for path in data.glob("*/" * depth + "images.npy"))


def _is_conic(images: Path) -> bool:
    """Whether labels.npy lies beside images.npy, and no masks.npy, which would be PanNuke's."""
    return images.with_name("labels.npy").is_file() and not images.with_name("masks.npy").is_file()


def _patch_names(path: Path, count: int) -> list[str | None]:
    """The image of Lizard that each of CoNIC was cut from, of its patch_info.csv; None where there is no such file."""
    if not path.is_file():
        return [None] * count
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = [row["patch_info"] or "" for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise AnnotationError(f"{path} is no table with a column patch_info ({error}): copy it again") from error
    if len(names) != count:
        raise AnnotationError(f"{path} has {len(names)} rows for {count} images: need one for each")
    return [name.rpartition("-")[0] for name in names]


def _masks_of(images: Path, data: Path) -> Path:
    """masks.npy beside images.npy, or where 'masks' takes the place of 'images' in the path."""
    beside = images.with_name("masks.npy")
    parts = ["masks" if part.lower() == "images" else part for part in images.relative_to(data).parent.parts]
    published = data.joinpath(*parts) / "masks.npy"
    places = dict.fromkeys((beside, published))  # one where no folder is called images
    for masks in places:
        if masks.is_file():
            return masks
    raise AnnotationError(f"{images} has no masks: need {' or '.join(map(str, places))}")


def _mapped(path: Path) -> NDArray[Any]:
    """An .npy file, memory-mapped. Raises AnnotationError for what would have to be unpickled."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of a damaged header numpy lets the errors of Python's own parser through
        if "Python objects" in str(error):
            raise AnnotationError(
                f"{path} holds Python objects, which are never unpickled: save a plain array (texts as .astype(str))"
            ) from error
        raise AnnotationError(f"{path} is not a readable array ({error}): copy it again") from error
