"""Annotations drawn as outlines: the functions that their readers use, and the reader of Aperio ImageScope's XML.

A reader takes a folder, or one file beside its image, and the content of dataset.json, and lists the images;
None: not this form. Where outlines overlap, the later one in the file has the pixels.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.segment.polygons import Polygons, rasterise
from slides.geometry import Size
from training.data.sample import (
    NO_CLASSES,
    SUFFIXES,
    Catalogue,
    Entry,
    LabelledImage,
    Metadata,
    class_names,
    nearby,
    outlined_image,
    read_image,
)

# Vertices in the Kumar set's files are centres of pixels, and a centre on the outline is inside: so they are
# moved by half a pixel, and by next to nothing in eight directions, as `rasterise` leaves out right and lower edges.
_CENTRES = tuple(
    (0.5 + 1e-6 * x, 0.5 + 1e-6 * y) for a in (-1, 1) for b in (-1, 1) for x, y in ((a, 2 * b), (2 * a, b))
)
_EDGES = ((0.0, 0.0),)

_OF_MAPS = ("labels", "classes")  # folders; see `training.data.label_maps.folder`

Shifts = tuple[tuple[float, float], ...]


class Outlines(NamedTuple):
    """The nuclei drawn in one file, in its order. Parallel."""

    polygons: Polygons  # px of the image as it is stored
    classes: tuple[str, ...]


def paint(polygons: Polygons, shape: tuple[int, int], shifts: Shifts = _EDGES) -> tuple[NDArray[np.int32], int]:
    """Label map, int32 (h, w), of polygons in px of the map, and the number of pixels inside several of them.

    Pixel (row, col) gets i + 1 if its centre lies in polygon i (even-odd) moved by one of `shifts`; a pixel
    inside several belongs to the last one.
    """
    moved = [shapely.transform(polygons, lambda xy, by=by: xy + by) for by in shifts]
    copies = np.stack(moved, axis=1).ravel()
    first, last = rasterise(copies, shape), rasterise(copies[::-1], shape)
    last = np.where(last > 0, len(copies) + 1 - last, 0)
    first, last = -(-first // len(shifts)), -(-last // len(shifts))
    return last.astype(np.int32), int((first != last).sum())


def aperio(data: Path, metadata: Metadata) -> Catalogue | None:
    """<id>.xml of Aperio ImageScope with an image of the same name, as Kumar, MoNuSeg and MoNuSAC are published.

    They lie beside each other or in folders of `data`. Every region is a nucleus, but for negative ones and
    those of less than three vertices, which are skipped and counted. A layer's name is its class; MoNuSAC names
    its first attribute instead. Vertices are centres of pixels.
    Law: on the Kumar set the result is the label map that comes with it, but for a pixel in a thousand (Dice .999).
    """
    files = [data] if data.is_file() else nearby(data)
    parsed = [(p, _parse_xml(p)) for p in files if p.suffix.lower() == ".xml"]
    skipped: Counter[str] = Counter()
    drawn = [(path, root, _layers(root, path, skipped)) for path, root in parsed if root.tag == "Annotations"]
    if not drawn:
        return None
    names = class_names((c for *_, outlines in drawn for c in outlines.classes), metadata, data)
    images = images_near(data, SUFFIXES)
    entries = []
    for path, root, outlines in drawn:
        image = image_of(path.stem, path, images)
        read = partial(_read_aperio, image, path, outlines.polygons, class_index_of(outlines.classes, names))
        entries.append(Entry(path.stem, read, image, _number(root.get("MicronsPerPixel"))))
    return Catalogue(tuple(entries), names, skipped, without_annotations(data, images, entries))


def _read_aperio(image: Path, source: Path, polygons: Polygons, class_index: NDArray[np.int64]) -> LabelledImage:
    colours = read_image(image)
    height, width = colours.shape[:2]
    check_near(polygons, Size(width, height), source)
    labels, contested = paint(polygons, (height, width), _CENTRES)
    return outlined_image(colours, labels, class_index, contested)


def check_near(polygons: Polygons, size: Size, source: Path) -> None:
    """Raise AnnotationError for an outline that is further outside than the image is wide: of another image."""
    x0, y0, x1, y1 = shapely.bounds(polygons).T
    astray = (x0 < -size.width) | (y0 < -size.height) | (x1 > 2 * size.width) | (y1 > 2 * size.height)
    if astray.any():
        span = ", ".join(f"{v:g}" for v in shapely.bounds(polygons[astray][0]))
        raise AnnotationError(
            f"{source}: an outline spans {span}, its image is {size.width} x {size.height} px: "
            f"need the image that it was drawn on"
        )


def class_index_of(classes: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Index from 1 into `names` of every class, as LabelledImage has it."""
    return np.array([names.index(c) + 1 for c in classes], np.int64)


def images_near(data: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Images near `data` by their name, with suffix and without; not label maps, which have the names of images."""
    by_name: dict[str, list[Path]] = {}
    for path in nearby(data.parent if data.is_file() else data):
        if path.suffix.lower() in suffixes and path.is_file() and path.parent.name.lower() not in _OF_MAPS:
            for name in (path.stem, path.name):
                by_name.setdefault(name, []).append(path)
    return by_name


def image_of(stem: str, source: Path, images: Mapping[str, Sequence[Path]]) -> Path:
    """The one image that belongs to an annotation file. Raises AnnotationError for none or several."""
    match images.get(stem, ()):
        case [path]:
            return path
        case []:
            raise AnnotationError(
                f"{source} has no image: need {stem}.tif, .png or the like beside it or in a folder there"
            )
        case several:
            raise AnnotationError(f"{source} has {len(several)} images, {several[0]} and {several[1]}: need one")


def without_annotations(data: Path, images: Mapping[str, Sequence[Path]], entries: Sequence[Entry]) -> tuple[Path, ...]:
    """The images near a folder `data` that no annotation file belongs to, sorted; of one file none are expected."""
    annotated = {entry.image for entry in entries}
    return () if data.is_file() else tuple(sorted({p for paths in images.values() for p in paths} - annotated))


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. A document type is refused: it is what entities that never end are declared in."""
    try:
        content = path.read_bytes()
        if b"<!DOCTYPE" not in content.replace(b"\0", b""):
            return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{path} is not a readable XML file ({error}): export it again") from error
    raise AnnotationError(f"{path} declares a document type, which ImageScope does not: export it again")


def _layers(root: ElementTree.Element, path: Path, skipped: Counter[str]) -> Outlines:
    """The regions of every layer, in the file's order; others are counted in `skipped`."""
    outlines, classes = [], []
    for layer in root.iter("Annotation"):
        for region in layer.iter("Region"):
            vertices = [(_number(v.get("X")), _number(v.get("Y"))) for v in region.iter("Vertex")]
            if len(vertices) < 3 or region.get("NegativeROA") == "1":
                skipped["fewer than three vertices" if len(vertices) < 3 else "a negative region"] += 1
                continue
            xy = np.array(vertices, np.float64)  # a coordinate that is no number becomes NaN
            if not np.isfinite(xy).all():
                raise AnnotationError(
                    f"{path}: region {region.get('Id')} has a vertex without X or Y: need finite numbers"
                )
            outlines.append(shapely.Polygon(xy))
            classes.append(_layer_name(layer))
    return Outlines(np.array(outlines, dtype=object), tuple(classes))


def _layer_name(layer: ElementTree.Element) -> str:
    attribute = layer.find("Attributes/Attribute")
    label = "" if attribute is None else attribute.get("Name", "")
    return layer.get("Name", "") or (label if label != "Description" else "") or NO_CLASSES[0]
