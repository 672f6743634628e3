"""Reader of QuPath's GeoJSON exports: which of their objects are nuclei, which are images, and what is ignored.

Checked against what QuPath 0.2 to 0.7 writes: plain, compressed by itself (.zip, .geojson.gz), or by us (.geojson.zip).
Files are read in memory, never unpacked to disk, and up to a bound.
"""

import gzip
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.archive.search import SUFFIXES as SLIDES
from pipeline.segment.polygons import Polygons, rasterise
from slides.geometry import Box, Size
from training.data.outlines import Outlines, check_near, class_index_of, image_of, images_near, paint
from training.data.sample import (
    NO_CLASSES,
    SUFFIXES,
    AnnotationError,
    Catalogue,
    Entry,
    LabelledImage,
    Metadata,
    class_names,
    image_size,
    labelled_image,
    nearby,
    parse_json,
    read_image,
)

# A field of 8192 px is 4 mm2 at 0.25 um and a quarter of a GB of labels: larger ones are not annotated by hand.
_LARGEST_FIELD_PX = 8192
_LARGEST_UNPACKED = 2**30  # bytes of text in a compressed file: about a million nuclei, at 1.1 kB each
_LARGEST_PX = 10_000_000  # of any slide; the geometry of larger numbers overflows

_PLAIN, _GZIP, _ZIP = ".geojson", ".geojson.gz", ".zip"
_TYPES = ("annotation", "detection", "cell")
_REGIONS = ("region", "training", "validation", "test")
_WHITE = 255  # of glass


class Objects(NamedTuple):
    """The objects of an export that have an area on the default plane, in the file's order. Parallel."""

    types: NDArray[np.str_]  # one of _TYPES
    classes: NDArray[np.str_]  # "" for none
    polygons: Polygons  # px from the corner of the slide's bounds


class Drawing(NamedTuple):
    """The objects of an export by their meaning."""

    nuclei: Outlines
    regions: Polygons  # rectangles, each an image
    ignored: Polygons  # areas of ignored classes
    skipped: Counter[str]  # objects that are none of these, and ignored ones, by reason


def qupath(data: Path, metadata: Metadata) -> Catalogue | None:
    """<image>.geojson, .geojson.gz, .geojson.zip or .zip of QuPath with the image or slide of that name.

    Detections, cells (the nucleus of them) and annotations with an area are nuclei; their classification is the
    class. Regions are rectangles drawn as annotations: of class Region*, Training, Validation or Test, or of no
    class, around the centre of another object and not inside a region. With regions, every region is an image,
    <image>_1 and so on, and nothing else is read; without, the whole image is one, if it is small enough for a
    person to have outlined every nucleus in it. Coordinates are px from the corner of the slide's bounds, on pixel
    edges.
    As in QuPath, a class whose name ends in * is ignored: its content is not annotated, so it is painted
    white in the image, but for annotated nuclei, and neither training nor evaluation counts what is in it.
    Skipped and counted: annotations around other nuclei, which are areas; cells without an outline of the nucleus,
    objects without an area, those of another plane than z = 0, t = 0, and what lies outside every region.
    """
    files = [data] if data.is_file() else nearby(data)
    drawings = [(p, name, _drawing(p)) for p in files if (name := _image_name(p, given=p == data))]
    if not drawings:
        return None
    names = class_names((c for *_, drawing in drawings for c in drawing.nuclei.classes), metadata, data)
    images = images_near(data, SUFFIXES | SLIDES)
    entries: list[Entry] = []
    skipped: Counter[str] = Counter()
    for path, name, drawing in drawings:
        image = image_of(name, path, images)
        size = image_size(image)
        polygons = drawing.nuclei.polygons
        check_near(polygons, size, path)
        index = class_index_of(drawing.nuclei.classes, names)
        used = np.zeros(len(polygons), bool)
        for number, box in enumerate(_fields(drawing.regions, size, path, image), 1):
            inside = _touching(polygons, box)
            used |= inside
            ignored = drawing.ignored[_touching(drawing.ignored, box)]
            read = partial(_read_field, image, box, Outlines(polygons[inside], ()), index[inside], ignored)
            entries.append(Entry(f"{image.stem}_{number}" if len(drawing.regions) else image.stem, read, image))
        skipped += drawing.skipped
        skipped["outside every region, or outside the image"] += int((~used).sum())
    return Catalogue(tuple(entries), names, dict(+skipped))


def _read_field(
    image: Path, box: Box, nuclei: Outlines, class_index: NDArray[np.int64], ignored: Polygons
) -> LabelledImage:
    """A part of an image with its nuclei; ignored areas are white."""
    shape = (box.height, box.width)
    labels, contested = paint(_moved(nuclei.polygons, box), shape)
    colours = read_image(image, box)
    if len(ignored):
        colours = colours.copy()
        colours[(rasterise(_moved(ignored, box), shape) > 0) & (labels == 0)] = _WHITE
    return labelled_image(colours, labels, class_index, contested)


def _moved(polygons: Polygons, box: Box) -> Polygons:
    """From px of the image to px of `box`."""
    moved: Polygons = shapely.transform(polygons, lambda xy: xy - (box.x0, box.y0))
    return moved


def _touching(polygons: Polygons, box: Box) -> NDArray[np.bool_]:
    x0, y0, x1, y1 = shapely.bounds(polygons).reshape(-1, 4).T
    return np.asarray((x0 < box.x1) & (y0 < box.y1) & (x1 > box.x0) & (y1 > box.y0))


def _fields(regions: Polygons, size: Size, path: Path, image: Path) -> list[Box]:
    """What to read of an image: its regions, whole px, or all of it."""
    whole = Box(0, 0, *size)
    boxes = [Box(*b).intersect(whole) for b in np.rint(shapely.bounds(regions)).astype(int).tolist()] or [whole]
    for box in boxes:
        if max(box.size) > _LARGEST_FIELD_PX:
            raise AnnotationError(
                f"{path}: {'a region of' if len(regions) else image.name + ' without a region is'} {box.width} x "
                f"{box.height} px: need rectangles of class Region* around what is annotated, up to "
                f"{_LARGEST_FIELD_PX} px"
            )
        if not box.area:
            raise AnnotationError(f"{path}: a region lies outside {image.name}, {size.width} x {size.height} px")
    return boxes


# ---------------------------------------------------------------------------------------------- what objects mean


def _drawing(path: Path) -> Drawing:
    """The nuclei, regions and ignored areas of an export. Raises AnnotationError."""
    (_, classes, polygons), skipped = objects = _objects(path)
    region, surplus = _regions(objects[0], path)
    ignored = ~region & ~surplus & np.char.endswith(classes, "*")
    skipped["unclassified rectangle inside a region"] += int(surplus.sum())
    skipped["of an ignored class, whose name ends in *: the area is painted white"] += int(ignored.sum())
    nuclei = ~region & ~surplus & ~ignored
    areas = _areas(objects[0], nuclei)
    skipped["an area: Tissue, Artefact, or an annotation around two or more nuclei"] += int(areas.sum())
    nuclei &= ~areas
    named = tuple(c or NO_CLASSES[0] for c in classes[nuclei].tolist())
    return Drawing(Outlines(polygons[nuclei], named), polygons[region], polygons[ignored], skipped)


def _areas(objects: Objects, nuclei: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Annotations that are areas, such as tissue or a tumour: bool (N,). nuclei: bool (N,), what may be a nucleus."""
    types, classes, polygons = objects
    annotations = np.flatnonzero(nuclei & (types == "annotation"))
    others = np.flatnonzero(nuclei)
    around, inside = shapely.STRtree(polygons[others]).query(polygons[annotations], predicate="contains")
    around = around[annotations[around] != others[inside]]
    areas = np.zeros(len(polygons), bool)
    areas[annotations] = np.bincount(around, minlength=len(annotations)) > 1
    ours = (classes == "Tissue") | np.char.startswith(classes, "Artefact")  # of workflows/qupath/import.groovy
    areas |= ours & nuclei & (types == "annotation")
    return areas


def _regions(objects: Objects, path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which objects are regions, and which are unclassified rectangles inside one; see `qupath`."""
    types, classes, polygons = objects
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    annotation = types == "annotation"
    region = annotation & np.isin([c.rstrip("*").lower() for c in classes], _REGIONS)
    surplus = np.zeros(len(polygons), bool)
    rectangle = shapely.equals(polygons, shapely.box(*bounds.T)) if len(polygons) else region
    if (region & ~rectangle).any():
        raise AnnotationError(f"{path}: a region is no rectangle: draw it with QuPath's rectangle tool")
    centres = shapely.get_coordinates(shapely.centroid(polygons))
    unclassified = np.flatnonzero(annotation & rectangle & (classes == ""))
    ignored = np.char.endswith(classes, "*")  # an ignored area makes no region of the nucleus around it
    for i in unclassified[np.argsort(-shapely.area(polygons[unclassified]), kind="stable")]:  # outer ones first
        around = ~ignored & (centres > bounds[i, :2]).all(1) & (centres < bounds[i, 2:]).all(1)
        if around.sum() > 1:  # its own centre is one
            inside = (bounds[region, :2] <= bounds[i, :2]).all(1) & (bounds[region, 2:] >= bounds[i, 2:]).all(1)
            surplus[i] = inside.any()
            region[i] = not surplus[i]
    return region, surplus


# ------------------------------------------------------------------------------------------------------- the file


def _objects(path: Path) -> tuple[Objects, Counter[str]]:
    """The usable objects of an export, and how many others there are, by reason. Raises AnnotationError."""
    types, classes, geometries = [], [], []
    skipped: Counter[str] = Counter()
    for number, feature in enumerate(_features(path)):
        try:
            properties = feature.get("properties") or {}
            # QuPath 0.2 wrote object_type
            type_ = str(properties.get("objectType", properties.get("object_type", "annotation"))).lower()
            geometry = feature.get("nucleusGeometry") if type_ == "cell" else feature["geometry"]
            reason = _reason_to_skip(type_, geometry)
            class_ = _class_of(properties.get("classification"))
        except (AttributeError, KeyError, TypeError) as error:
            raise AnnotationError(
                f"{path}: object {number} is no GeoJSON feature: export it again from QuPath"
            ) from error
        if reason:
            skipped[reason] += 1
            continue
        types.append(type_)
        classes.append(class_)
        geometries.append(json.dumps(geometry))
    try:
        polygons = np.asarray(shapely.from_geojson(np.array(geometries, dtype=object)), dtype=object)
    except shapely.errors.GEOSException as error:
        raise AnnotationError(f"{path}: an outline is no polygon ({error}): export it again from QuPath") from error
    if (np.abs(np.nan_to_num(shapely.bounds(polygons), nan=0.0)) > _LARGEST_PX).any():
        raise AnnotationError(
            f"{path}: an outline reaches beyond {_LARGEST_PX} px: need px of the image it was drawn on"
        )
    real = ~shapely.is_empty(polygons)
    skipped["an outline without an area"] += int((~real).sum())
    return Objects(np.array(types, np.str_)[real], np.array(classes, np.str_)[real], polygons[real]), skipped


def _reason_to_skip(type_: str, geometry: Any) -> str:
    """Why an object is no nucleus, region or ignored area; empty if it may be one."""
    if type_ not in _TYPES:
        return f"of type {type_}"
    if type_ == "cell" and geometry is None:
        return "a cell without an outline of its nucleus"
    if geometry["type"] not in ("Polygon", "MultiPolygon"):
        return "an outline without an area"
    plane = geometry.get("plane") or {}
    if plane.get("z", 0) != 0 or plane.get("t", 0) != 0:
        return "on another plane than z = 0, t = 0"
    return ""


def _class_of(content: Any) -> str:
    """QuPath's name of a class; parts of a derived one (`names`) are joined as QuPath shows them."""
    if not content:
        return ""
    name = content["name"] if "name" in content else ": ".join(content["names"])
    if not isinstance(name, str):
        raise TypeError(name)
    return name


def _features(path: Path) -> Iterator[Any]:
    """The features of a FeatureCollection, a list, a single feature, or of all files of a zip."""
    for name, text in _texts(path):
        content = parse_json(text, name)
        if isinstance(content, dict):
            content = content.get("features", [content])
        if not isinstance(content, list):
            raise AnnotationError(f"{name} holds no list of features: export it again from QuPath as GeoJSON")
        yield from content


def _texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a file, or of the .geojson files in a zip, in the order of their names."""
    try:
        if path.name.lower().endswith(_GZIP):
            with gzip.open(path) as file:
                yield str(path), _read_up_to(file, _LARGEST_UNPACKED, path)
        elif path.name.lower().endswith(_ZIP):
            yield from _zipped_texts(path)
        else:
            yield str(path), path.read_bytes()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise AnnotationError(f"{path} cannot be read ({error}): export it again") from error


def _zipped_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = sorted(_geojson_in(archive), key=lambda m: m.filename)
        if not members:
            raise AnnotationError(f"{path} holds 0 .geojson files: need one or more")
        left = _LARGEST_UNPACKED
        for member in members:
            with archive.open(member) as file:
                text = _read_up_to(file, left, path)
            left -= len(text)
            yield f"{path}/{member.filename}", text


def _geojson_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [m for m in archive.infolist() if m.filename.lower().endswith(_PLAIN)]


def _read_up_to(file: IO[bytes] | gzip.GzipFile, most: int, path: Path) -> bytes:
    """All of an unpacked file. Raises AnnotationError for more than `most` bytes, whatever its header states."""
    text = file.read(most + 1)
    if len(text) > most:
        raise AnnotationError(
            f"{path} unpacks to more than {_LARGEST_UNPACKED} bytes: need at most that; export fewer objects"
        )
    return text


def _image_name(path: Path, given: bool) -> str:
    """The name of the image that an export belongs to; empty for other files.

    given: the user named this file; in a folder a .zip may be anything, and is an export if it holds .geojson files.
    """
    suffix = next((s for s in (_PLAIN + _ZIP, _GZIP, _PLAIN, _ZIP) if path.name.lower().endswith(s)), None)
    if suffix is None or (suffix == _ZIP and not given and not _holds_geojson(path)):
        return ""
    return path.name[: -len(suffix)]


def _holds_geojson(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(_geojson_in(archive))
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False
