"""QuPath's GeoJSON exports as a dataset: which of their objects are nuclei, which are images, and what is ignored."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipeline.archive.inputs.search import SUFFIXES as SLIDES
from pipeline.errors import AnnotationError
from pipeline.segment.annotations import TISSUE
from pipeline.segment.geojson import Objects, image_name, read_objects
from pipeline.segment.polygons import Polygons, rasterise
from slides.geometry import Box, Size
from training.data.outlines import (
    Outlines,
    check_near,
    class_index_of,
    image_of,
    images_near,
    paint,
    without_annotations,
)
from training.data.sample import (
    FEWEST_TO_COMPARE,
    LARGEST_TO_MEDIAN,
    NO_CLASSES,
    SUFFIXES,
    Catalogue,
    Entry,
    LabelledImage,
    Metadata,
    class_names,
    image_size,
    nearby,
    outlined_image,
    paint_white,
    read_image,
)

# A field of 8192 px is 4 mm2 at 0.25 um and a quarter of a GB of labels: larger ones are not annotated by hand.
_LARGEST_FIELD_PX = 8192
_AREA = "an area: Tissue, Artefact, or an annotation around two or more nuclei, or far larger than they are"
_REGIONS = ("region", "training", "validation", "test")


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
    drawings = [(p, name, _drawing(p)) for p in files if (name := image_name(p, given=p == data))]
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
        nuclei, areas = shapely.STRtree(polygons), shapely.STRtree(drawing.ignored)
        for number, box in enumerate(_fields(drawing.regions, size, path, image), 1):
            inside = _touching(nuclei, box)
            used[inside] = True
            ignored = drawing.ignored[_touching(areas, box)]
            read = partial(_read_field, image, box, Outlines(polygons[inside], ()), index[inside], ignored)
            entries.append(Entry(f"{image.stem}_{number}" if len(drawing.regions) else image.stem, read, image))
        skipped += drawing.skipped
        skipped["outside every region, or outside the image"] += int((~used).sum())
    return Catalogue(tuple(entries), names, dict(+skipped), without_annotations(data, images, entries))


def _read_field(
    image: Path, box: Box, nuclei: Outlines, class_index: NDArray[np.int64], ignored: Polygons
) -> LabelledImage:
    """A part of an image with its nuclei; ignored areas are white."""
    shape = (box.height, box.width)
    labels, contested = paint(_moved(nuclei.polygons, box), shape)
    colours = read_image(image, box)
    colours = paint_white(colours, rasterise(_moved(ignored, box), shape) > 0, labels)
    return outlined_image(colours, labels, class_index, contested)


def _moved(polygons: Polygons, box: Box) -> Polygons:
    """From px of the image to px of `box`."""
    moved: Polygons = shapely.transform(polygons, lambda xy: xy - box.corner)
    return moved


def _touching(polygons: shapely.STRtree, box: Box) -> NDArray[np.int64]:
    """Which polygons have a part of their bounds inside the box, in their order: the later one has a pixel."""
    near = np.sort(polygons.query(shapely.box(*box)))
    x0, y0, x1, y1 = shapely.bounds(polygons.geometries[near]).reshape(-1, 4).T
    return np.asarray(near[(x0 < box.x1) & (y0 < box.y1) & (x1 > box.x0) & (y1 > box.y0)])


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
            raise AnnotationError(
                f"{path}: a region lies outside {image.name}, {size.width} x {size.height} px: need regions within the "
                f"image that they were drawn on; delete it in QuPath and export again"
            )
    return boxes


# ---------------------------------------------------------------------------------------------- what objects mean


def _drawing(path: Path) -> Drawing:
    """The nuclei, regions and ignored areas of an export. Raises AnnotationError."""
    objects, skipped = read_objects(path)
    classes, polygons = objects.classes, objects.polygons
    region, surplus = _regions(objects, path)
    ignored = ~region & ~surplus & np.strings.endswith(classes, "*")
    skipped["unclassified rectangle inside a region"] += int(surplus.sum())
    skipped["of an ignored class, whose name ends in *: the area is painted white"] += int(ignored.sum())
    nuclei = ~region & ~surplus & ~ignored
    areas = _areas(objects, nuclei)
    skipped[_AREA] += int(areas.sum())
    nuclei &= ~areas
    named = tuple(c or NO_CLASSES[0] for c in classes[nuclei].tolist())
    return Drawing(Outlines(polygons[nuclei], named), polygons[region], polygons[ignored], skipped)


def _areas(objects: Objects, nuclei: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Annotations that are areas, such as tissue or a tumour: bool (N,). nuclei: bool (N,), what may be a nucleus."""
    types, classes, _, polygons = objects
    annotations = np.flatnonzero(nuclei & (types == "annotation"))
    others = np.flatnonzero(nuclei)
    around, inside = shapely.STRtree(polygons[others]).query(polygons[annotations], predicate="contains")
    around = around[annotations[around] != others[inside]]
    areas = np.zeros(len(polygons), bool)
    areas[annotations] = np.bincount(around, minlength=len(annotations)) > 1
    sizes = shapely.area(polygons)
    if len(others) >= FEWEST_TO_COMPARE:  # else nobody knows how large nuclei are
        areas[annotations] |= sizes[annotations] > LARGEST_TO_MEDIAN * np.median(sizes[others])
    # ours, which an export of a whole image holds, too, and whatever else somebody calls an artefact
    ours = (classes == TISSUE) | np.strings.startswith(classes, "Artefact")
    areas |= ours & nuclei & (types == "annotation")
    return areas


def _regions(objects: Objects, path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which objects are regions, and which are unclassified rectangles inside one; see `qupath`."""
    types, classes, _, polygons = objects
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    annotation = types == "annotation"
    region = annotation & np.isin([c.rstrip("*").lower() for c in classes], _REGIONS)
    surplus = np.zeros(len(polygons), bool)
    rectangle = shapely.equals(polygons, shapely.box(*bounds.T)) if len(polygons) else region
    if (region & ~rectangle).any():
        raise AnnotationError(f"{path}: a region is no rectangle: draw it with QuPath's rectangle tool")
    unclassified = annotation & rectangle & (classes == "")
    # an ignored area makes no region of the nucleus around it
    points = shapely.centroid(polygons[~np.strings.endswith(classes, "*")])
    centres, points = shapely.get_coordinates(points), shapely.STRtree(points)
    rectangles = np.flatnonzero(region | unclassified)
    boxes = shapely.STRtree(polygons[rectangles])
    outer_first = np.argsort(-shapely.area(polygons), kind="stable")
    for i in outer_first[unclassified[outer_first]]:
        near = centres[points.query(polygons[i])]
        if ((near > bounds[i, :2]) & (near < bounds[i, 2:])).all(1).sum() > 1:  # its own centre is one
            outer = rectangles[boxes.query(polygons[i])]
            outer = bounds[outer[region[outer]]]
            surplus[i] = ((outer[:, :2] <= bounds[i, :2]) & (outer[:, 2:] >= bounds[i, 2:])).all(1).any()
            region[i] = not surplus[i]
    return region, surplus
