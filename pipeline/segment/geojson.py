"""Reader of QuPath's GeoJSON: the objects that have an area, whatever they are used for.

Checked against what QuPath 0.2 to 0.7 writes: plain, compressed by itself (.zip, .geojson.gz), or by us (.geojson.zip).
Files are read in memory, never unpacked to disk, and up to a bound.
"""

import gzip
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.errors import AnnotationError
from pipeline.segment.polygons import Polygons

_LARGEST_UNPACKED = 2**30  # bytes of text in a compressed file: about a million nuclei, at 1.1 kB each
_LARGEST_PX = 10_000_000  # of any slide; the geometry of larger numbers overflows

# Characters of a name or class. In memory every class of a file takes what the longest one does, and the csv module
# does not read a longer cell than 131,072 characters.
_LONGEST_NAME = 1000

_NO_AREA = "an outline without an area"  # why an object is skipped

_PLAIN, _GZIP, _ZIP = ".geojson", ".geojson.gz", ".zip"
_SUFFIXES = (_PLAIN + _ZIP, _GZIP, _PLAIN, _ZIP)  # the longer of two that fit comes first
TYPES = ("annotation", "detection", "cell")
"Of the objects that are read."

_TYPES_BY_ID = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tma_core",
    "PathRootObject": "root",
}


class Objects(NamedTuple):
    """The objects of an export that have an area on the default plane, in the file's order. Parallel."""

    types: NDArray[np.str_]  # one of TYPES
    classes: NDArray[np.str_]  # "" for none
    names: NDArray[np.object_]  # str, "" for none
    polygons: Polygons  # as drawn, valid or not; px from the corner of the slide's bounds


def read_objects(path: Path, wanted: Collection[str] = TYPES) -> tuple[Objects, Counter[str]]:
    """The usable objects of an export, and how many others there are, by reason. Raises AnnotationError.

    wanted: some of TYPES.
    Not usable are cells without an outline of the nucleus, objects without an area, and those of another plane than
    z = 0, t = 0. The outline of a cell is that of its nucleus.
    """
    types, classes, names, geometries = [], [], [], []
    skipped: Counter[str] = Counter()
    for number, feature in enumerate(_features(path), 1):
        try:
            properties = feature.get("properties") or {}
            # QuPath 0.3 wrote object_type, and 0.2 had the type in the id
            old = properties.get("object_type") or _TYPES_BY_ID.get(feature.get("id"), "annotation")
            type_ = str(properties.get("objectType", old)).lower()
            geometry = feature.get("nucleusGeometry") if type_ == "cell" else feature["geometry"]
            geometry = _without_collection(geometry) if type_ in wanted else None
            reason = _reason_to_skip(type_, geometry) if type_ in wanted else f"of type {type_}"
            class_ = _class_of(properties.get("classification"))
            name = str(properties.get("name") or "")
        except (AttributeError, KeyError, TypeError) as error:
            raise AnnotationError(
                f"{path}: object {number} is no GeoJSON feature: export it again from QuPath"
            ) from error
        if reason:
            skipped[reason] += 1
            continue
        if (length := max(len(name), len(class_))) > _LONGEST_NAME:
            raise AnnotationError(
                f"{path}: object {number} has a name or class of {length:,} characters: need at most "
                f"{_LONGEST_NAME:,}; shorten it in QuPath and export it again"
            )
        types.append(type_)
        classes.append(class_)
        names.append(name)
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
    skipped[_NO_AREA] += int((~real).sum())
    return Objects(
        np.array(types, np.str_)[real], np.array(classes, np.str_)[real], np.array(names, object)[real], polygons[real]
    ), skipped


def image_name(path: Path, given: bool) -> str:
    """The name of the image that an export belongs to: its own without the suffix. Empty for other files.

    given: the user named this file; in a folder a .zip may be anything, and is an export if it holds .geojson files,
    or cannot be read: then `read_objects` says so.
    """
    suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None or (suffix == _ZIP and not given and not _may_hold_geojson(path)):
        return ""
    return path.name[: -len(suffix)]


def _without_collection(geometry: Any) -> Any:
    """The polygons in a GeometryCollection, as QuPath takes them: lines and points are left out. Others as they are."""
    if geometry is None or geometry["type"] != "GeometryCollection":
        return geometry
    polygons: list[Any] = []
    waiting = [geometry]
    while waiting:
        part = waiting.pop()
        if part["type"] == "GeometryCollection":
            waiting += part["geometries"][::-1]
        elif part["type"] in ("Polygon", "MultiPolygon"):
            polygons += part["coordinates"] if part["type"] == "MultiPolygon" else [part["coordinates"]]
    return {"type": "MultiPolygon", "coordinates": polygons, "plane": geometry.get("plane")}


def _reason_to_skip(type_: str, geometry: Any) -> str:
    """Why an object cannot be used; empty if it can."""
    if type_ == "cell" and geometry is None:
        return "a cell without an outline of its nucleus"
    if geometry is None or geometry["type"] not in ("Polygon", "MultiPolygon"):
        return _NO_AREA
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
    """The features of a FeatureCollection, a list, one feature, or of all files of a zip, and those beneath them."""
    for name, text in _texts(path):
        content = parse_json(text, name, constants=True)  # before 0.5 QuPath wrote measurements that are NaN so
        if isinstance(content, dict):
            content = content.get("features", [content])
        if not isinstance(content, list):
            raise AnnotationError(f"{name} holds no list of features: export it again from QuPath as GeoJSON")
        yield from _with_children(content)


def _with_children(features: list[Any]) -> Iterator[Any]:
    """Features, each followed by those beneath it: scripts can have QuPath write a hierarchy."""
    waiting = features[::-1]
    while waiting:
        feature = waiting.pop()
        yield feature
        properties = feature.get("properties") if isinstance(feature, dict) else None
        if isinstance(properties, dict):
            children = properties.get("childObjects", properties.get("children"))  # QuPath reads either
            waiting += children[::-1] if isinstance(children, list) else []


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
        raise AnnotationError(f"{path} cannot be read ({error}): export it again, or remove it") from error


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
    """Those that are not hidden: macOS adds a `__MACOSX/._<name>` of its own to each file of an archive."""
    named = ((m, m.filename.rpartition("/")[2].lower()) for m in archive.infolist())
    return [m for m, name in named if name.endswith(_PLAIN) and not name.startswith(".")]


def _read_up_to(file: IO[bytes] | gzip.GzipFile, most: int, path: Path) -> bytes:
    """All of an unpacked file. Raises AnnotationError for more than `most` bytes, whatever its header states."""
    text = file.read(most + 1)
    if len(text) > most:
        raise AnnotationError(
            f"{path} unpacks to more than {_LARGEST_UNPACKED} bytes: need at most that; export fewer objects"
        )
    return text


def _may_hold_geojson(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(_geojson_in(archive))
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return True


def parse_json(text: bytes, name: str, *, constants: bool = False) -> Any:
    """JSON in `text`, the content of the file `name`. Raises AnnotationError.

    constants: NaN and Infinity, which JSON has not, are None; else they are refused.
    """

    def constant(value: str) -> None:
        if not constants:
            raise ValueError(f"it holds {value}")

    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{name} is not JSON ({error}): export it again") from error
