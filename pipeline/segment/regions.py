"""Regions: areas of a slide that somebody drew in QuPath, to measure nuclei in or to restrict a run to.

A point belongs to a region by a half-open rule, as a pixel does in `polygons.rasterise`: on a left or upper border it
is in, on a right or lower one out. So regions that share a border share no point of it and leave none.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely

from pipeline import files
from pipeline.errors import AnnotationError, SlideChanged
from pipeline.segment.annotations import ARTEFACTS, TISSUE
from pipeline.segment.geojson import read_objects
from pipeline.segment.polygons import Bools, Floats, Ints, Polygons, rasterise
from pipeline.text import counted, printable
from slides.geometry import Box
from slides.tissue import TissueMap

_AREAL = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)

# A pixel that a region touches has its centre within half a diagonal, .707 px, of it. The rest is for tiles whose core
# ends there: they may claim nuclei in the region, too.
_REACH_PX = 1.0
# Outlines are simplified by this, which moves them by less than .2 px: to grow 100,000 steps along pixels, as QuPath's
# thresholder draws them, takes minutes and 1 GB.
_DETAIL_PX = 0.1


class RegionFile(NamedTuple):
    """The file of a slide's regions: it is sent with every task of a run that is restricted to them."""

    path: Path
    crop: bool  # coordinates start at the corner of the slide's bounds, else at that of the whole slide
    sha256: str  # of its content

    @classmethod
    def of(cls, path: Path, crop: bool) -> "RegionFile":
        """The file as it is now. Raises AnnotationError where it cannot be read."""
        try:
            return cls(path, crop, files.file_sha256(path))
        except OSError as error:
            raise AnnotationError(f"{path} cannot be read ({error.strerror or error}): export it again") from error

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "RegionFile | None":
        """As `to_json` gave it; None of none."""
        return None if content is None else cls(Path(content["path"]), content["crop"], content["sha256"])

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "path": str(self.path)}

    @property
    def other_flag(self) -> str:
        """The flag with which coordinates start at the other corner."""
        return "--regions.no-crop" if self.crop else "--regions.crop"


class SlideRegions(NamedTuple):
    """The regions of a slide, in the order of their file. Parallel."""

    names: tuple[str, ...]  # as in QuPath; of those without one their number in the file, from 1
    classes: tuple[str, ...]  # "" for none
    polygons: Polygons  # valid Polygons and MultiPolygons, slide px
    mended: int = 0  # how many of them were invalid, as an outline that crosses itself
    skipped: int = 0  # objects in the file that are no regions: detections, points, lines

    @property
    def ignored(self) -> Bools:
        """Which are of a class that QuPath ignores: its name ends in *, and it is not Region*."""
        return np.array([name.endswith("*") and name.lower() != "region*" for name in self.classes], bool)

    @property
    def chosen(self) -> Bools:
        """Which are those that a restricted run processes: not ignored ones, nor tissue and artefacts beside others.

        These two are annotations of ours, which an export of a whole image from QuPath holds, too.
        """
        ours = np.isin(self.classes, [TISSUE, *ARTEFACTS.values()])
        drawn = ~self.ignored & ~ours
        return drawn if drawn.any() else ~self.ignored

    def select(self, slide_xy: Floats) -> Bools:
        """Which points a run that is restricted to these regions processes: bool (N,).

        slide_xy: float64 (N, 2), slide px
        They lie in a chosen region, and in none of an ignored class; with ignored ones only, outside of those.
        """
        chosen = self.chosen
        inside = in_any(self.polygons[chosen], slide_xy) if chosen.any() else np.ones(len(slide_xy), bool)
        return inside & ~in_any(self.polygons[self.ignored], slide_xy)

    def within(self, polygons: Polygons) -> Polygons:
        """The part of each polygon in which `select` takes points: object (N,), as of `areal`; all in slide px."""
        taken = shapely.intersection(polygons, _union_near(polygons, self.polygons[self.chosen]))
        left = taken if self.chosen.any() else polygons
        return areal(shapely.difference(left, _union_near(left, self.polygons[self.ignored])))

    def restrict(self, tissue: TissueMap) -> TissueMap:
        """The tissue in pixels that hold a point which `select` takes, and in a few beside them."""
        in_mask_px = shapely.simplify(shapely.transform(self.polygons, tissue.frame.to_slide.invert), _DETAIL_PX)
        kept = np.ones(tissue.mask.shape, bool)
        if self.chosen.any():
            kept = rasterise(shapely.buffer(in_mask_px[self.chosen], _REACH_PX), tissue.mask.shape) > 0
        kept &= rasterise(shapely.buffer(in_mask_px[self.ignored], -_REACH_PX), tissue.mask.shape) == 0
        return tissue._replace(mask=tissue.mask & kept)

    def describe(self, path: Path) -> str:
        """The regions in words, such as `3 regions of case7.geojson (1 invalid one mended)`."""
        return self._in_words(path, len(self.names), [])

    def describe_chosen(self, path: Path) -> str:
        """The same of a run that is restricted to them, such as `1 region of case7.geojson (2 ignored)`."""
        chosen, ignored = int(self.chosen.sum()), int(self.ignored.sum())
        if not chosen:
            return f"what lies outside of {self._in_words(path, ignored, [])}, of ignored classes"
        own = len(self.names) - chosen - ignored
        remarks = [f"{ignored} ignored"] if ignored else []
        remarks += [f"{own} of the classes {TISSUE} and Artefact not counted"] if own else []
        return self._in_words(path, chosen, remarks)

    def _in_words(self, path: Path, count: int, remarks: list[str]) -> str:
        remarks += [f"{counted(self.mended, 'invalid one')} mended"] if self.mended else []
        remarks += [f"{counted(self.skipped, 'other object')} left out"] if self.skipped else []
        name = " ".join(printable(path.name).split())  # of a file: any bytes, and line ends
        return f"{counted(count, 'region')} of {name}" + (f" ({', '.join(remarks)})" if remarks else "")


def read_regions(file: RegionFile, bounds: Box) -> SlideRegions:
    """The regions in a file of QuPath's: its annotations with an area, on the default plane.

    bounds: of the slide, slide px. An invalid outline is mended as QuPath does: the areas that it encloses are merged.
    Raises AnnotationError for a file that is no GeoJSON and for one without a region, SlideChanged where the content is
    another than `file` says.
    """
    objects, skipped = read_objects(file.path, ("annotation",))
    if files.file_sha256(file.path) != file.sha256:
        raise SlideChanged(f"{file.path} was changed while its slide was processed: run the same command again")
    corner = bounds.corner if file.crop else (0, 0)
    polygons = shapely.transform(objects.polygons, lambda xy: xy + corner)
    broken = ~shapely.is_valid(polygons)
    polygons[broken] = _mended(polygons[broken])
    real = ~shapely.is_empty(polygons)
    if not real.any():
        raise AnnotationError(f"{file.path} holds no region: need annotations with an area, exported from QuPath")
    names = [name or str(number) for number, name in enumerate(objects.names.tolist(), 1)]
    return SlideRegions(
        tuple(itertools.compress(names, real)),
        tuple(objects.classes[real].tolist()),
        polygons[real],
        int((broken & real).sum()),
        sum(skipped.values()) + int((~real).sum()),
    )


def _mended(polygons: Polygons) -> Polygons:
    """Invalid polygons made valid: object (N,), empty where no area is left."""
    return areal(shapely.make_valid(polygons, method="structure", keep_collapsed=False))


def areal(geometries: Polygons) -> Polygons:
    """Geometries without points and lines: object (N,), Polygons and MultiPolygons, empty where no area is left."""
    parts, owner = shapely.get_parts(geometries, return_index=True)
    has_area = np.isin(shapely.get_type_id(parts), _AREAL)
    groups = np.split(parts[has_area], np.searchsorted(owner[has_area], range(1, len(geometries))))
    return np.array([shapely.union_all(group) for group in groups[: len(geometries)]], dtype=object)


def _union_near(polygons: Polygons, regions: Polygons) -> Polygons:
    """The union of all regions, as far as each polygon meets it: object (N,), MultiPolygons, empty where none does.

    Of thousands of regions that lie apart, a polygon meets few: with all of them it would take seconds each hundred.
    """
    parts = shapely.get_parts(shapely.union_all(regions))
    polygon, part = shapely.STRtree(parts).query(polygons)
    near: Polygons = np.full(len(polygons), shapely.MultiPolygon(), dtype=object)
    order = np.lexsort((part, polygon))
    shapely.multipolygons(parts[part[order]], indices=polygon[order], out=near)
    return near


# ------------------------------------------------------------------------------------------ points in regions


def in_any(polygons: Iterable[shapely.Geometry], xy: Floats) -> Bools:
    """Which points lie in one of the polygons or in several, half-open: bool (N,)."""
    inside = np.zeros(len(xy), bool)
    for polygon in polygons:
        inside[contained(polygon, xy)] = True
    return inside


def contained(polygon: shapely.Geometry, xy: Floats) -> Ints:
    """Which points lie in a polygon, half-open: their indices, int64 (M,), ascending.

    polygon: a valid Polygon or MultiPolygon; xy: float64 (N, 2) of its frame
    Law: of polygons that partition an area and share their vertices, every point of it lies in exactly one.
    """
    x, y = xy.T
    x0, y0, x1, y1 = shapely.bounds(polygon)
    near = np.flatnonzero((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
    shapely.prepare(polygon)
    inside = shapely.contains_xy(polygon, x[near], y[near])  # exact; a point on the border is not contained
    outer = np.flatnonzero(~inside)
    border = outer[shapely.intersects_xy(polygon, x[near[outer]], y[near[outer]])]
    if len(border):
        inside[border] = _crosses_an_odd_number(polygon, xy[near[border]])
    return np.asarray(near[inside])


def _crosses_an_odd_number(polygon: shapely.Geometry, xy: Floats) -> Bools:
    """Whether the ray from each point to the left crosses an odd number of edges: bool (N,).

    An edge is crossed at a point where upper y <= y < lower y. It is taken from its upper end, in whichever direction a
    ring runs, so that polygons that share it agree.
    """
    rings = [shapely.get_coordinates(ring) for ring in shapely.get_rings(shapely.get_parts(polygon))]
    start, end = (np.concatenate([ring[k] for ring in rings]) for k in (slice(None, -1), slice(1, None)))
    downward = (start[:, 1] <= end[:, 1])[:, None]
    upper, lower = np.where(downward, start, end), np.where(downward, end, start)
    odd = np.zeros(len(xy), bool)
    for number, (x, y) in enumerate(xy):
        crossed = (upper[:, 1] <= y) & (y < lower[:, 1])
        (ux, uy), (lx, ly) = upper[crossed].T, lower[crossed].T
        odd[number] = np.count_nonzero(ux + (y - uy) * (lx - ux) / (ly - uy) <= x) % 2
    return odd
