"""Annotations drawn as outlines: Aperio ImageScope XML and QuPath GeoJSON.

Every reader takes a folder, or one file beside its image, and what dataset.json says, and lists the images;
None: not this form. Where outlines overlap, the later one in the file has the pixels.
"""

import json
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.archive.search import SUFFIXES as SLIDES
from pipeline.segment.polygons import Polygons, rasterise
from slides.geometry import Box, Size
from training.data.sample import (
    NO_CLASSES,
    SUFFIXES,
    AnnotationError,
    Described,
    Item,
    Listing,
    Pixels,
    class_names,
    frame,
    nearby,
    parse_json,
    pixels,
    read_image,
)

# Vertices in the Kumar set's files are centres of pixels, and a centre on the outline is inside: so they are
# moved by half a pixel, and by next to nothing in eight directions, as `rasterise` leaves out right and lower edges.
_CENTRES = tuple(
    (0.5 + 1e-6 * x, 0.5 + 1e-6 * y) for a in (-1, 1) for b in (-1, 1) for x, y in ((a, 2 * b), (2 * a, b))
)
_EDGES = ((0.0, 0.0),)

# A field of 8192 px is 4 mm2 at 0.25 um and a quarter of a GB of labels: more was not drawn by hand.
_LARGEST_FIELD_PX = 8192
_LARGEST_UNZIPPED = 2**31
_LARGEST_PX = 10_000_000  # of any slide; the geometry of larger numbers overflows

_ZIPPED, _PLAIN = ".geojson.zip", ".geojson"
_NUCLEI = ("annotation", "detection", "cell")
_REGIONS = ("region", "training", "validation", "test")

Shifts = tuple[tuple[float, float], ...]


class Outlines(NamedTuple):
    """What one file draws, in its order. Parallel."""

    polygons: Polygons  # px of the image as it is stored
    classes: tuple[str, ...]


def paint(polygons: Polygons, shape: tuple[int, int], shifts: Shifts = _EDGES) -> tuple[NDArray[np.int32], int]:
    """Label map, int32 (h, w), of polygons in px of the map, and the number of pixels that several claim.

    Pixel (row, col) gets i + 1 if its centre lies in polygon i (even-odd) moved by one of `shifts`; where
    several claim it, the later one has it.
    """
    moved = [shapely.transform(polygons, lambda xy, by=by: xy + by) for by in shifts]
    copies = np.stack(moved, axis=1).ravel()
    first, last = rasterise(copies, shape), rasterise(copies[::-1], shape)
    last = np.where(last > 0, len(copies) + 1 - last, 0)
    first, last = -(-first // len(shifts)), -(-last // len(shifts))
    return last.astype(np.int32), int((first != last).sum())


def aperio(data: Path, described: Described) -> Listing | None:
    """<id>.xml of Aperio ImageScope with an image of the same name, as Kumar, MoNuSeg and MoNuSAC are published.

    They lie beside each other or in folders of `data`. Every region is a nucleus, but for negative ones and
    those of less than three vertices. A layer's name is its class; MoNuSAC names its first attribute instead.
    Vertices are centres of pixels. Law: on the Kumar set the result is the label map that comes with it,
    but for a pixel in a thousand (Dice .999).
    """
    files = [data] if data.is_file() else nearby(data)
    parsed = [(p, _parse_xml(p)) for p in files if p.suffix.lower() == ".xml"]
    drawn = [(path, root, _layers(root, path)) for path, root in parsed if root.tag == "Annotations"]
    if not drawn:
        return None
    names = class_names((c for *_, outlines in drawn for c in outlines.classes), described, data)
    images = _pictures(data, SUFFIXES)
    items = []
    for path, root, outlines in drawn:
        image = _picture_of(path.stem, path, images)
        read = partial(_read_aperio, image, path, outlines.polygons, _kinds(outlines.classes, names))
        items.append(Item(path.stem, read, image, _number(root.get("MicronsPerPixel"))))
    return Listing(tuple(items), names)


def qupath(data: Path, described: Described) -> Listing | None:
    """<image>.geojson, or .geojson.zip, of QuPath with the image or slide of that name.

    Detections, cells (their nucleus, if it is there) and annotations with an area are nuclei; their classification
    is the class; objects of class Ignore* are passed over.
    Regions are rectangles drawn as annotations: of class Region*, Training, Validation or Test, or of no class
    and around the centre of another object. With regions, every region is an image, <image>_1 and so on, and
    nothing else is read; without, the whole image is one, if it is small enough for a person to have outlined
    every nucleus in it. Coordinates are px from the corner of the slide's bounds, on pixel edges.
    """
    files = [data] if data.is_file() else nearby(data)
    drawn = [(p, stem, *_sorted_out(p)) for p in files if (stem := _qupath_stem(p))]
    if not drawn:
        return None
    names = class_names((c for *_, outlines, _ in drawn for c in outlines.classes), described, data)
    images = _pictures(data, SUFFIXES | SLIDES)
    items = []
    for path, stem, outlines, regions in drawn:
        image = _picture_of(stem, path, images)
        size = frame(image)
        _check_near(outlines.polygons, size, path)
        kinds = _kinds(outlines.classes, names)
        x0, y0, x1, y1 = shapely.bounds(outlines.polygons).T
        for number, box in enumerate(_fields(regions, size, path, image), 1):
            there = (x0 < box.x1) & (y0 < box.y1) & (x1 > box.x0) & (y1 > box.y0)
            read = partial(_read_field, image, box, outlines.polygons[there], kinds[there])
            items.append(Item(f"{image.stem}_{number}" if len(regions) else image.stem, read, image))
    return Listing(tuple(items), names)


def _read_aperio(image: Path, source: Path, polygons: Polygons, kinds: NDArray[np.int64]) -> Pixels:
    colours = read_image(image)
    height, width = colours.shape[:2]
    _check_near(polygons, Size(width, height), source)
    labels, contested = paint(polygons, (height, width), _CENTRES)
    return pixels(colours, labels, kinds, contested)


def _read_field(image: Path, box: Box, polygons: Polygons, kinds: NDArray[np.int64]) -> Pixels:
    local = shapely.transform(polygons, lambda xy: xy - (box.x0, box.y0))
    labels, contested = paint(local, (box.height, box.width))
    return pixels(read_image(image, box), labels, kinds, contested)


def _check_near(polygons: Polygons, size: Size, source: Path) -> None:
    """Raise AnnotationError for an outline that is further outside than the image is wide: of another image."""
    x0, y0, x1, y1 = shapely.bounds(polygons).T
    astray = (x0 < -size.width) | (y0 < -size.height) | (x1 > 2 * size.width) | (y1 > 2 * size.height)
    if astray.any():
        found = ", ".join(f"{v:g}" for v in shapely.bounds(polygons[astray][0]))
        raise AnnotationError(
            f"{source}: an outline spans {found}, its image is {size.width} x {size.height} px: "
            f"need the image that it was drawn on"
        )


def _kinds(classes: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    return np.array([names.index(c) + 1 for c in classes], np.int64)


def _pictures(data: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Images near `data` by their name, with suffix and without."""
    found: dict[str, list[Path]] = {}
    for path in nearby(data.parent if data.is_file() else data):
        if path.suffix.lower() in suffixes and path.is_file():
            for name in (path.stem, path.name):
                found.setdefault(name, []).append(path)
    return found


def _picture_of(stem: str, source: Path, images: Mapping[str, Sequence[Path]]) -> Path:
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


def _layers(root: ElementTree.Element, path: Path) -> Outlines:
    """The regions of every layer, in the file's order."""
    outlines, classes = [], []
    for layer in root.iter("Annotation"):
        for region in layer.iter("Region"):
            vertices = [(_number(v.get("X")), _number(v.get("Y"))) for v in region.iter("Vertex")]
            if len(vertices) < 3 or region.get("NegativeROA") == "1":
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


def _qupath_stem(path: Path) -> str:
    """The name of the image that an export belongs to; empty for other files."""
    suffix = next((s for s in (_ZIPPED, _PLAIN) if path.name.lower().endswith(s)), None)
    return path.name[: -len(suffix)] if suffix else ""


def _sorted_out(path: Path) -> tuple[Outlines, Polygons]:
    """The nuclei of an export, and its regions, rectangles."""
    types, classes, polygons = _objects(path)
    bounds = shapely.bounds(polygons)
    annotation = types == "annotation"
    region = annotation & np.isin([c.rstrip("*").lower() for c in classes], _REGIONS)
    rectangle = shapely.equals(polygons, shapely.box(*bounds.T)) if len(polygons) else region
    if (region & ~rectangle).any():
        raise AnnotationError(f"{path}: a region is no rectangle: draw it with QuPath's rectangle tool")
    centres = shapely.get_coordinates(shapely.centroid(polygons))
    for i in np.flatnonzero(annotation & rectangle & (classes == "")):
        x0, y0, x1, y1 = bounds[i]
        around = (centres > (x0, y0)).all(1) & (centres < (x1, y1)).all(1)
        region[i] = around.sum() > 1  # its own centre is one
    kept = ~region & ~np.char.startswith(classes, "Ignore")
    named = tuple(c or NO_CLASSES[0] for c in classes[kept].tolist())
    return Outlines(polygons[kept], named), polygons[region]


def _fields(regions: Polygons, size: Size, path: Path, image: Path) -> list[Box]:
    """What to read of an image: its regions, whole px, or all of it."""
    frame_ = Box(0, 0, *size)
    boxes = [Box(*b).intersect(frame_) for b in np.rint(shapely.bounds(regions)).astype(int).tolist()] or [frame_]
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


def _objects(path: Path) -> tuple[NDArray[np.str_], NDArray[np.str_], Polygons]:
    """Types, class names ("" for none) and outlines of the objects that have an area. Parallel, in the file's order."""
    found: list[tuple[str, str]] = []
    geometries = []
    for number, feature in enumerate(_features(path)):
        try:
            properties = feature.get("properties") or {}
            # QuPath 0.2 wrote object_type
            kind = str(properties.get("objectType", properties.get("object_type", "annotation")))
            geometry = feature.get("nucleusGeometry") or feature["geometry"]
            areal = geometry["type"] in ("Polygon", "MultiPolygon")
            found_class = _classification(properties.get("classification"))
        except (AttributeError, KeyError, TypeError) as error:
            raise AnnotationError(
                f"{path}: object {number} is no GeoJSON feature: export it again from QuPath"
            ) from error
        if kind.lower() in _NUCLEI and areal:
            found.append((kind.lower(), found_class))
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
    types, classes = (np.array([f[i] for f in found], dtype=np.str_)[real] for i in (0, 1))
    return types, classes, polygons[real]


def _classification(content: Any) -> str:
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
        if not path.name.lower().endswith(_ZIPPED):
            yield str(path), path.read_bytes()
            return
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.lower().endswith(_PLAIN)]
            if not members or (size := sum(m.file_size for m in members)) > _LARGEST_UNZIPPED:
                raise AnnotationError(
                    f"{path} holds {len(members)} .geojson files"
                    + (f" of {size} bytes: need at most {_LARGEST_UNZIPPED}" if members else ": need one or more")
                )
            for member in sorted(members, key=lambda m: m.filename):
                yield f"{path}/{member.filename}", archive.read(member)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise AnnotationError(f"{path} cannot be read ({error}): export it again") from error
