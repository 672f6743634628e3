"""The tissue and the artefacts of a slide as annotations for QuPath: tissue.geojson and artefacts.geojson.

`origin_px` of a file is where its coordinates start, slide px: at the corner of the slide's bounds, to which QuPath's
OpenSlide reader crops, or at that of the whole slide. Files of older versions, which lack it, start at the first.
"""

import json
import uuid
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import AnnotationError
from slides.artefacts import KINDS, ArtefactMap
from slides.geometry import Box, Frame
from slides.tissue import TissueMap

TISSUE_COLOUR = (0, 130, 60)
KIND_COLOURS = dict(
    zip(KINDS, ((30, 60, 220), (150, 60, 170), (0, 170, 200), (240, 140, 0), (120, 120, 120)), strict=True)
)

TISSUE = "Tissue"
ARTEFACTS = {kind: f"Artefact: {kind}" for kind in KINDS}
"Classes of the annotations."

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "nightslide.annotations")


def write_tissue(path: Path, slide: str, tissue: TissueMap, bounds: Box, crop: bool) -> None:
    """Commit the tissue as one locked annotation of class "Tissue", or as none where there is no tissue.

    slide: its quick hash; bounds: slide px; crop: as `Export.crop`, coordinates from the corner of the bounds
    """
    shape = outline(tissue.mask, tissue.frame, bounds, crop)
    _write(path, [_feature(slide, TISSUE, TISSUE_COLOUR, shape, locked=True)], _origin(bounds, crop))


def write_artefacts(path: Path, slide: str, artefacts: ArtefactMap, bounds: Box, crop: bool) -> None:
    """Commit an annotation for each kind of artefact that is there, of the class "Artefact: KIND"; else as above."""
    features = []
    for number, kind in enumerate(KINDS, 1):
        shape = outline(artefacts.kinds == number, artefacts.tissue.frame, bounds, crop)
        features.append(_feature(slide, ARTEFACTS[kind], KIND_COLOURS[kind], shape, locked=False))
    _write(path, features, _origin(bounds, crop))


def origin(path: Path, bounds: Box) -> tuple[int, int]:
    """Where the coordinates of a file start, slide px; bounds: of the slide.

    Raises AnnotationError where it is missing or damaged.
    """
    return _content(path, bounds)[1]


def features_from(path: Path, start: tuple[int, int], bounds: Box) -> list[dict[str, Any]]:
    """The features of a file, with coordinates from `start`, slide px. Raises AnnotationError as `origin`."""
    features, (x, y) = _content(path, bounds)
    by = (x - start[0], y - start[1])
    try:
        for feature in features:
            geometry = feature["geometry"]
            geometry["coordinates"] = _moved(geometry["coordinates"], by)
    except (TypeError, KeyError, ValueError, IndexError, RecursionError) as error:
        raise _damaged(path, error) from error
    return features


def place(path: Path, bounds: Box, crop: bool) -> bool:
    """Have the coordinates of a file start as `crop` says. Returns whether they did not."""
    start = _origin(bounds, crop)
    if origin(path, bounds) == start:
        return False
    _write(path, [*features_from(path, start, bounds)], start)
    return True


def _content(path: Path, bounds: Box) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    content = files.read_json(path) or {}
    try:
        x, y = content.get("origin_px", bounds.corner)
        return list(content["features"]), (int(x), int(y))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> AnnotationError:
    return AnnotationError(
        f"{path} is not as it was written ({error!r}): put the file back, or run the slide again with --overwrite"
    )


def _moved(coordinates: Any, by: tuple[int, int]) -> Any:
    """Coordinates of GeoJSON, however deep they lie, in hundredths of a px."""
    if isinstance(coordinates[0], list):
        return [_moved(inner, by) for inner in coordinates]
    return [round(at + step, 2) for at, step in zip(coordinates, by, strict=True)]


def _origin(bounds: Box, crop: bool) -> tuple[int, int]:
    return bounds.corner if crop else (0, 0)


def outline(mask: NDArray[np.bool_], frame: Frame, bounds: Box, crop: bool) -> shapely.Geometry:
    """A mask on a frame as a valid Polygon or MultiPolygon, slide px, with holes; empty where nothing is left.

    mask: bool (h, w), a pixel of `frame` each. It is clipped to `bounds` (slide px) and, if `crop`, counted from there.
    Law: the centre of a pixel lies inside exactly where the mask holds.
    """
    if not mask.any():
        return shapely.Polygon()
    generator = contourpy.contour_generator(
        z=np.pad(mask, 1).astype(np.float64), fill_type=contourpy.FillType.ChunkCombinedOffsetOffset
    )
    filled: Any = generator.filled(0.5, np.inf)
    points, rings, parts = (chunk[0] for chunk in filled)
    # the padding shifts by a pixel, and pixels have their centres at halves
    slide_xy = frame.to_slide.apply(points - 0.5)
    polygons = shapely.from_ragged_array(shapely.GeometryType.POLYGON, slide_xy, (rings, parts))
    clipped = shapely.intersection(shapely.multipolygons(polygons), shapely.box(*bounds))
    corner = np.array(_origin(bounds, crop), float)
    placed = shapely.make_valid(shapely.transform(clipped, lambda xy: np.round(xy - corner, 2)))
    # what touches the edge of the bounds in a line or a point has no area
    areal = [part for part in shapely.get_parts(shapely.get_parts(placed)) if part.geom_type == "Polygon"]
    return areal[0] if len(areal) == 1 else shapely.multipolygons(np.array(areal, dtype=object))


def _feature(
    slide: str, name: str, colour: tuple[int, int, int], shape: shapely.Geometry, *, locked: bool
) -> dict[str, Any] | None:
    """A feature as QuPath reads it; None of an empty shape. The same slide gives the same identifier."""
    if shape.is_empty:
        return None
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, f"{slide} {name}")),
        "geometry": json.loads(shapely.to_geojson(shape)),
        "properties": {
            "objectType": "annotation",
            "isLocked": locked,
            "classification": {"name": name, "color": list(colour)},
        },
    }


def _write(path: Path, features: list[dict[str, Any] | None], start: tuple[int, int]) -> None:
    head = f'{{"type":"FeatureCollection","origin_px":{json.dumps(start)},"features":['
    lines = ",\n".join(json.dumps(feature) for feature in features if feature is not None)
    with files.committed(path) as part:
        part.write_text(f"{head}\n{lines}\n]}}\n", encoding="utf-8")
