"""An annotated image in memory and on disk, and the functions that all readers of annotations use.

A reader lists what a folder holds (`Catalogue`) without reading pixels; `training.data.datasets.read_dataset` adds
scale, group and splits, and returns a `Dataset`. Every file is checked before it is used.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.segment.geojson import parse_json
from pipeline.text import counted, counted_nuclei
from slides.errors import NightslideError, ScaleUnknown, SlideError
from slides.geometry import Box, Size
from slides.slide import open_slide

DATASET_FILE, SPLITS_FILE = "dataset.json", "splits.json"
SUFFIXES = frozenset([".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"])
NO_CLASSES = ("Nucleus",)

MOST_CLASSES = 255  # where they are numbers, as in an 8-bit map

# Numbers of nuclei index a table, so a stray 4294967295 must not ask for its gigabytes.
_LARGEST_NUMBER = 2**24 - 1

# Median area of an image's nuclei, um2. In 203 images of five open sets it is 4.4 to 132, most often 13 to 25: a scale
# that is wrong by a factor of four is noticed.
_USUAL_UM2 = 4.0, 200.0

# Separate pieces for each nucleus of the first images: in 164 images of three open sets never more than 1. In a mask,
# which has one number for all nuclei, they are as many as the nuclei.
_MOST_PIECES = 1.5

# No nucleus has fifty times the area of the usual one, of ten or more: in 328 images of five open sets it is up to 13.
FEWEST_TO_COMPARE, LARGEST_TO_MEDIAN = 10, 50

_READ_FIRST = 3  # images, to see whether nuclei are as nuclei are

_WHITE = 255  # of glass

# Pixels are taken as stored: read at the scale that the slide is opened with, no slide is resampled.
_AS_STORED = 1.0


class LabelledImage(NamedTuple):
    """The pixels of an image and its annotated nuclei."""

    image: NDArray[np.uint8]  # (h, w, 3), RGB
    labels: NDArray[np.int32]  # (h, w): 0 background, 1..N, every number one nucleus, in one part or several
    class_index: NDArray[np.int64]  # (N,): index into the dataset's classes, from 1, of nucleus i + 1; 0: not known
    contested_px: int = 0  # pixels in several outlines: they belong to the last one
    lost: int = 0  # outlines without a pixel of their own: below later ones, too small, or outside the image


class Sample(NamedTuple):
    """One annotated image, not yet read. Pickles, so that it can go to loader processes."""

    id: str  # unique within the dataset
    group: str  # organ, patient or laboratory; "" where unknown
    mpp: float
    read: Callable[[], LabelledImage]
    image: Path | None = None  # the file of its pixels, where that is known


class Dataset(NamedTuple):
    """Its images, sorted by id, and the names of its classes, at least one."""

    name: str
    images: tuple[Sample, ...]
    classes: tuple[str, ...]
    skipped: Mapping[str, int] = MappingProxyType({})  # annotated objects that are not used, by reason
    overridden: tuple[str, ...] = ()  # images that state another mpp than the user, who is believed
    unread: tuple[str, ...] = ()  # lines: annotations of other forms, and images without any, in the same folder

    def describe_skipped(self) -> list[str]:
        """Lines: `unread`, the reasons for which objects were skipped, classes that may be one, scales; if any."""
        lines = [f"{self.name}: {line}" for line in self.unread]
        lines += [
            f"{self.name}: {counted(count, 'object')} skipped: {reason}" for reason, count in self.skipped.items()
        ]
        alike: dict[str, list[str]] = {}
        for name in self.classes:
            alike.setdefault(name.strip().casefold(), []).append(name)
        for names in (names for names in alike.values() if len(names) > 1):
            lines.append(
                f"{self.name}: the classes '{names[0]}' and '{names[1]}' are two: "
                f"'merge' in {DATASET_FILE} makes them one"
            )
        if self.overridden:
            lines.append(
                f"{self.name}: --mpp is used in place of what {counted(len(self.overridden), 'image')} "
                f"{'states' if len(self.overridden) == 1 else 'state'}, such as {self.overridden[0]}: leave --mpp out "
                f"if that is right"
            )
        return lines

    def describe_nuclei(self) -> list[str]:
        """Lines where nuclei of the first images are improbable: of another scale, one far too large, or in pieces."""
        from scipy import ndimage

        annotated, pieces = list[tuple[Sample, NDArray[np.int64]]](), 0  # images, and the pixels of each nucleus
        for image in self.images[:_READ_FIRST]:
            try:
                labels = image.read().labels
            except (OSError, NightslideError):  # said where the image is used
                break
            if labels.any():
                annotated.append((image, np.bincount(labels.ravel())[1:]))
                pieces += ndimage.label(labels, structure=np.ones((3, 3)))[1]
        lines = [line for image, px in annotated[:1] for line in _describe_size(image, px)]
        lines += [line for image, px in annotated for line in _describe_largest(image, px)][:1]
        if pieces > _MOST_PIECES * (nuclei := sum(len(px) for _, px in annotated)):
            lines.append(
                f"the first images have {counted_nuclei(nuclei)} in {pieces} separate pieces: need another number for "
                f"each nucleus; are they masks of 0 and 1?"
            )
        return [f"{self.name}: {line}" for line in lines]


def _describe_size(image: Sample, px: NDArray[np.int64]) -> list[str]:
    """A line where the median of an image's nuclei is no size of nuclei."""
    area, (low, high) = float(np.median(px)) * image.mpp**2, _USUAL_UM2
    said = f"{area:,.1f} um2 at {image.mpp:g} um/px; {low:g} to {high:g} um2 is usual: is the scale right?"
    return [] if low <= area <= high else [f"nuclei of '{image.id}' have a median of {said}"]


def _describe_largest(image: Sample, px: NDArray[np.int64]) -> list[str]:
    """A line where one of an image's nuclei is far larger than the others."""
    largest, median = int(px.max()), float(np.median(px))
    if len(px) < FEWEST_TO_COMPARE or largest <= LARGEST_TO_MEDIAN * median:
        return []
    said = f"{largest:,} px, {largest / median:,.0f} times the median of its nuclei"
    return [f"a nucleus of '{image.id}' has {said}: is it the background, which needs the number 0, or an area?"]


def describe_lost(name: str, lost: int) -> list[str]:
    """A line where outlines of a dataset or an image have no pixel of their own; none where all have."""
    reason = "without a pixel of its own: below later ones, too small, or outside the image"
    return [f"{name}: {counted(lost, 'object')} skipped: {reason}"] if lost else []


class Metadata(NamedTuple):
    """The content of dataset.json, which overrides what the annotation files say."""

    mpp: Mapping[str, float]  # by id; "" is for all others
    classes: tuple[str, ...]  # empty: as the source says
    groups: Mapping[str, str]
    merge: Mapping[str, str | None] = MappingProxyType({})  # other names of classes; None: not known


class Entry(NamedTuple):
    """An annotated image as its source describes it."""

    id: str
    read: Callable[[], LabelledImage]
    image: Path | None = None  # a file that may state the scale
    mpp: float | None = None  # what the annotation states
    group: str | None = None


class Catalogue(NamedTuple):
    """What a reader lists of a dataset."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...] = NO_CLASSES
    skipped: Mapping[str, int] = MappingProxyType({})  # annotated objects that are not used, by reason
    bare: tuple[Path, ...] = ()  # images beside the others that have no annotations


class Conversion(NamedTuple):
    """Counts of what a writer wrote."""

    images: int
    nuclei: int
    contested_px: int  # where nuclei overlapped in the source; the later one has the pixel
    lost: int  # nuclei of the source that have no pixel of their own


def known_classes(sample: Sample) -> LabelledImage:
    """The image of a sample, to be written. Raises AnnotationError where the class of a nucleus is not known."""
    read = sample.read()
    if not read.class_index.all():
        raise AnnotationError(
            f"'{sample.id}' has nuclei of no known class, which the form cannot state: leave 'merge' out of "
            f"{DATASET_FILE}, or give them a class there"
        )
    return read


def labelled_image(
    image: NDArray[np.uint8], labels: NDArray[Any], class_index: NDArray[np.int64] | None, contested_px: int = 0
) -> LabelledImage:
    """Check a label map, and number its nuclei 1 to N without gaps.

    labels: (h, w), whole numbers of any dtype, gaps allowed
    class_index: class of nucleus n at n - 1, for every n up to the largest in `labels`; None: all are of class 1
    Raises AnnotationError for maps of another size than the image, and for values that are no label.
    Law: two pixels get the same number exactly if they had the same number; order is kept.
    """
    labels = whole_numbers(labels)
    if labels.shape != image.shape[:2]:
        raise AnnotationError(
            f"the labels are {labels.shape}, the image is {image.shape[:2]}: need one label per pixel"
        )
    present = np.bincount(labels.ravel()) > 0
    present[0] = False
    number = np.cumsum(present, dtype=np.int32)
    number[~present] = 0
    old = np.flatnonzero(present)
    kept = np.ones(len(old), np.int64) if class_index is None else class_index[old - 1]
    return LabelledImage(image, number[labels], kept, contested_px)


def outlined_image(
    image: NDArray[np.uint8], labels: NDArray[Any], class_index: NDArray[np.int64], contested_px: int
) -> LabelledImage:
    """As `labelled_image`, of a map in which every number up to that of the last class is an outline."""
    read = labelled_image(image, labels, class_index, contested_px)
    return read._replace(lost=len(class_index) - len(read.class_index))


def paint_white(image: NDArray[np.uint8], ignored: NDArray[np.bool_], labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The image with areas that are not annotated as white as glass, but for annotated nuclei in them.

    image: (h, w, 3); ignored: (h, w); labels: (h, w)
    So that neither training nor evaluation counts what is there.
    """
    return np.where((ignored & (labels == 0))[..., None], np.uint8(_WHITE), image)


def whole_numbers(labels: NDArray[Any]) -> NDArray[np.int32]:
    """A map (h, w) of any dtype -> int32. Raises AnnotationError for values that no instance map can hold."""
    if labels.ndim != 2 or not labels.size:
        raise AnnotationError(f"the labels are an array of {labels.shape}: need (height, width), one label per pixel")
    if not np.issubdtype(labels.dtype, np.number) and labels.dtype != bool:
        raise AnnotationError(f"the labels are of type {labels.dtype}: need whole numbers")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        raise AnnotationError("the labels hold fractions or NaN: need whole numbers, 0 for the background")
    low, high = labels.min(), labels.max()
    if not 0 <= low <= high <= _LARGEST_NUMBER:
        raise AnnotationError(f"the labels go from {low} to {high}: need 0 to {_LARGEST_NUMBER}")
    return labels.astype(np.int32)


def read_image(path: Path, box: Box | None = None) -> NDArray[np.uint8]:
    """RGB uint8 (h, w, 3), as stored; `box`: a part of a slide, px from the corner of its bounds.

    Law: the same pixels that `nightslide run` reads. Raises AnnotationError.
    """
    try:
        with open_slide(path, mpp=_AS_STORED) as slide:
            frame = slide.frame(_AS_STORED)
            return slide.read(box or frame.box, frame)
    except SlideError as error:
        raise AnnotationError(str(error)) from error


def image_size(path: Path) -> Size:
    """The size of an image, or of a slide's bounds. Raises AnnotationError."""
    try:
        with open_slide(path, mpp=_AS_STORED) as slide:
            return slide.bounds.size
    except SlideError as error:
        raise AnnotationError(str(error)) from error


def stated_mpp(path: Path) -> float | None:
    """um per pixel in a slide's metadata or an image's resolution tags; None without. Raises AnnotationError."""
    try:
        with open_slide(path) as slide:
            return slide.scale.x
    except ScaleUnknown:
        return None
    except SlideError as error:
        raise AnnotationError(str(error)) from error


def read_json_file(path: Path) -> Any:
    """The content of a JSON file. Raises AnnotationError for one that is not JSON; NaN and Infinity are not."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror}") from error


def subfolder(data: Path, name: str) -> Path | None:
    """The folder `name` in `data`, in whatever case it is written."""
    matching = [p for p in data.iterdir() if p.name.lower() == name and p.is_dir()] if data.is_dir() else []
    return min(matching, default=None)


def by_stem(paths: Iterable[Path], suffixes: Iterable[str] = SUFFIXES) -> dict[str, Path]:
    """Files by their name without suffix; not hidden ones. Raises AnnotationError for two of a name."""
    files: dict[str, Path] = {}
    for path in sorted(paths):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise AnnotationError(f"'{path.stem}' is both {files[path.stem]} and {path}: need one")
        files[path.stem] = path
    return files


def nearby(data: Path) -> list[Path]:
    """Files in a folder and in its folders, one level deep: as MoNuSeg's Tissue Images and Annotations lie."""
    return sorted(p for pattern in ("*", "*/*") for p in data.glob(pattern) if not p.name.startswith("."))


def pair_up(
    images: Mapping[str, Path], labels: Mapping[str, Path], where: Path, suffixes: Iterable[str]
) -> list[tuple[str, Path, Path]]:
    """(id, image, labels), sorted. Raises AnnotationError for an id that lacks one of them.

    suffixes: those that labels may have.
    """
    for id_ in sorted(images.keys() ^ labels.keys()):
        lacking, known = ("labels", suffixes) if id_ in images else ("image", SUFFIXES)
        raise AnnotationError(
            f"{where}: '{id_}' has no {lacking}: need a file of its name, in {', '.join(sorted(known))}"
        )
    return [(id_, images[id_], labels[id_]) for id_ in sorted(images)]


def relative_name(name: object, source: Path) -> PurePosixPath:
    """A file name that stands in the file `source`. Raises AnnotationError where it leads out of the folder."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if not path.name or path.is_absolute() or ".." in path.parts or set("\\:\0") & set(str(path)):
        raise AnnotationError(f"{source} names the file {name!r}: need a name within its folder, separated by '/'")
    return path


def class_names(annotated: Iterable[str], metadata: Metadata, source: Path) -> tuple[str, ...]:
    """The dataset's classes where objects are classed by name: dataset.json's, else the annotated ones, sorted."""
    names = sorted(set(annotated))
    if not metadata.classes:
        return tuple(names) or NO_CLASSES
    if strange := [n for n in names if n not in metadata.classes]:
        raise AnnotationError(
            f"{source} has objects of class '{strange[0]}', dataset.json names {', '.join(metadata.classes)}: "
            f"add it there"
        )
    return metadata.classes


def class_numbers(largest: int, metadata: Metadata, source: Path) -> tuple[str, ...]:
    """The dataset's classes where they are numbers, 1 to `largest`: dataset.json's names, else the numbers."""
    if largest > MOST_CLASSES:
        raise AnnotationError(
            f"{source} has objects of class {largest}: need classes of 1 to {MOST_CLASSES}; is it a map of nuclei?"
        )
    if not metadata.classes:
        return tuple(map(str, range(1, largest + 1))) or NO_CLASSES
    if largest > len(metadata.classes):
        raise AnnotationError(
            f"{source} has objects of class {largest}, dataset.json names {len(metadata.classes)} classes: "
            f"need a name for each"
        )
    return metadata.classes
