"""Regions: which points lie in them, what is mended, and what of a slide they select."""

import gzip
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import AnnotationError, SlideChanged
from pipeline.segment.regions import RegionFile, SlideRegions, contained, in_any, read_regions
from slides.geometry import Affine, Box, Frame, Size
from slides.tissue import TissueMap

BOUNDS = Box(100, 250, 5000, 6000)


def feature(outline: Any, name: str = "", class_: str = "", kind: str = "annotation") -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if name:
        properties["name"] = name
    if class_:
        properties["classification"] = {"name": class_, "color": [200, 0, 0]}
    return {"type": "Feature", "geometry": json.loads(shapely.to_geojson(outline)), "properties": properties}


def write(path: Path, *features: dict[str, Any]) -> RegionFile:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return RegionFile.of(path, crop=True)


def regions(*outlines: Any, classes: tuple[str, ...] | None = None) -> SlideRegions:
    names = tuple(map(str, range(len(outlines))))
    return SlideRegions(names, classes or ("",) * len(outlines), np.array(outlines, dtype=object))


# ------------------------------------------------------------------------------------------ points in regions

SMALL = st.integers(0, 12)
POINTS = st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=60)


def triangles(corners: list[tuple[int, int]], flip: list[bool]) -> list[Any]:
    """A triangulation of a square of 12 px around some points, each ring in one direction or the other."""
    frame = [(0, 0), (12, 0), (12, 12), (0, 12)]
    parts = shapely.get_parts(shapely.delaunay_triangles(shapely.multipoints([*frame, *corners])))
    return [shapely.reverse(part) if flip[k % len(flip)] else part for k, part in enumerate(parts)]


@given(POINTS, POINTS, st.lists(st.booleans(), min_size=1))
def test_every_point_of_a_partition_lies_in_exactly_one_region(
    corners: list[tuple[int, int]], points: list[tuple[int, int]], flip: list[bool]
) -> None:
    """Law, also for points on borders and corners, whatever the direction and the slope of the borders."""
    middles = [((ax + bx) / 2, (ay + by) / 2) for (ax, ay), (bx, by) in itertools.pairwise(corners)]
    xy = np.array([*points, *corners, *middles], float)
    times = np.zeros(len(xy), int)
    for part in triangles(corners, flip):
        times[contained(part, xy)] += 1
    within = (xy < 12).all(1)  # half-open: what lies on the right or lower border of the whole belongs to none
    np.testing.assert_array_equal(times, within.astype(int))


@given(POINTS, st.integers(1, 11), st.integers(1, 11))
def test_quarters_sum_to_the_whole(points: list[tuple[int, int]], across: int, down: int) -> None:
    xy = np.array(points, float)
    quarters = [
        shapely.box(x0, y0, x1, y1) for x0, x1 in ((0, across), (across, 13)) for y0, y1 in ((0, down), (down, 13))
    ]
    assert sum(len(contained(quarter, xy)) for quarter in quarters) == len(points)


def test_left_and_upper_borders_are_in_right_and_lower_ones_out() -> None:
    xy = np.array([(2, 3), (5, 3), (2, 7), (5, 7), (2, 5), (5, 5), (3, 3), (3, 7), (3, 5)], float)
    assert contained(shapely.box(2, 3, 5, 7), xy).tolist() == [0, 4, 6, 8]


def test_holes_and_parts_count() -> None:
    ring = shapely.Polygon([(0, 0), (9, 0), (9, 9), (0, 9)], [[(3, 3), (6, 3), (6, 6), (3, 6)]])
    both = shapely.MultiPolygon([ring, shapely.box(20, 20, 30, 30)])
    xy = np.array([(1, 1), (4, 4), (3, 4), (6, 4), (25, 25), (15, 15)], float)
    assert contained(both, xy).tolist() == [0, 3, 4]  # the hole's left border is out, its right one in
    assert contained(both, np.zeros((0, 2))).tolist() == []


# ------------------------------------------------------------------------------------------------- the file


def test_regions_are_annotations_moved_to_the_slide(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.geojson",
        feature(shapely.box(0, 0, 10, 10), "left", "Tumor"),
        feature(shapely.Point(3, 3), "point"),
        feature(shapely.box(1, 1, 2, 2), kind="detection"),
        feature(shapely.box(10, 0, 20, 10)),
    )
    drawn = read_regions(file, BOUNDS)
    assert (drawn.names, drawn.classes) == (("left", "2"), ("Tumor", ""))
    assert shapely.bounds(drawn.polygons).tolist() == [[100, 250, 110, 260], [110, 250, 120, 260]]
    assert (drawn.mended, drawn.skipped) == (0, 2)
    assert drawn.describe(file.path) == "2 regions of x.geojson (2 other objects left out)"
    whole = read_regions(file._replace(crop=False), BOUNDS)
    assert shapely.bounds(whole.polygons)[0].tolist() == [0, 0, 10, 10]


def test_an_invalid_region_is_mended_and_counted(tmp_path: Path) -> None:
    """What a line encloses that crosses itself belongs to the region."""
    bow_tie = shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 4)])
    loop = shapely.Polygon([(0, 0), (10, 0), (10, 10), (4, 10), (4, 4), (14, 4), (14, 8), (0, 8)])
    line = shapely.Polygon([(0, 0), (1, 1), (2, 2)])  # of which nothing is left
    drawn_there = (bow_tie, loop, shapely.box(0, 0, 1, 1), line)
    file = write(tmp_path / "x.geojson", *map(feature, drawn_there))
    drawn = read_regions(file, Box(0, 0, 50, 50))
    assert (drawn.mended, drawn.skipped) == (2, 1)
    assert shapely.is_valid(drawn.polygons).all()
    assert shapely.area(drawn.polygons[0]) == 8
    assert drawn.describe(file.path) == "3 regions of x.geojson (2 invalid ones mended, 1 other object left out)"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is not JSON"),
        ("[]", "holds no region: need annotations with an area"),
        (json.dumps([feature(shapely.Point(1, 1))]), "holds no region"),
        (json.dumps([feature(shapely.Polygon([(0, 0), (1, 1), (2, 2)]))]), "holds no region"),
        ('{"features": 3}', "holds no list of features"),
    ],
)
def test_a_file_without_regions_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.geojson"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=said) as raised:
        read_regions(RegionFile.of(path, crop=True), BOUNDS)
    assert str(path) in str(raised.value)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "x.geojson", feature(shapely.box(0, 0, 10, 10)))
    write(tmp_path / "x.geojson", feature(shapely.box(0, 0, 11, 10)))
    with pytest.raises(SlideChanged, match="was changed while its slide was processed"):
        read_regions(file, BOUNDS)
    (tmp_path / "x.geojson").unlink()
    with pytest.raises(AnnotationError, match="cannot be read"):
        RegionFile.of(file.path, crop=True)


def test_what_qupath_compresses_is_read(tmp_path: Path) -> None:
    text = json.dumps([feature(shapely.box(0, 0, 10, 10))])
    (tmp_path / "x.geojson.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.geojson", text)
    for name in ("x.geojson.gz", "x.zip"):
        assert len(read_regions(RegionFile.of(tmp_path / name, crop=True), BOUNDS).names) == 1


# ---------------------------------------------------------------------------------------- what is selected

INNER, OUTER, LEFT_OUT = shapely.box(10, 10, 20, 20), shapely.box(0, 0, 30, 30), shapely.box(5, 5, 12, 12)
PROBES = np.array([(15, 15), (25, 25), (11, 11), (6, 6), (50, 50)], float)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (regions(INNER), [True, False, True, False, False]),
        (regions(INNER, OUTER), [True, True, True, True, False]),
        (regions(OUTER, LEFT_OUT, classes=("Tumor", "Ignore*")), [True, True, False, False, False]),
        (regions(LEFT_OUT, classes=("Necrosis*",)), [True, True, False, False, True]),
        (regions(INNER, classes=("Region*",)), [True, False, True, False, False]),
        (regions(INNER, OUTER, classes=("Tumor", "Tissue")), [True, False, True, False, False]),
        (regions(LEFT_OUT, OUTER, classes=("Artefact: pen", "")), [True, True, True, True, False]),
        (regions(INNER, classes=("Tissue",)), [True, False, True, False, False]),
        (regions(INNER, OUTER, classes=("Tumor", "Artefact-free stroma")), [True, True, True, True, False]),
    ],
)
def test_a_run_is_restricted_to_regions_without_ignored_areas(drawn: SlideRegions, expected: list[bool]) -> None:
    assert drawn.select(PROBES).tolist() == expected


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("Tumor", "", "Tumor"), "3 regions of x.geojson"),
        (("Tumor", "Ignore*", "Tissue"), "1 region of x.geojson (1 ignored, 1 of the classes Tissue and Artefact not"),
        (("Artefact: pen", "Artefact-free", "Tumor"), "2 regions of x.geojson (1 of the classes Tissue and Artefact"),
        (("Ignore*",) * 3, "what lies outside of 3 regions of x.geojson, of ignored classes"),
    ],
)
def test_a_note_says_how_many_regions_a_run_is_restricted_to(classes: tuple[str, ...], words: str) -> None:
    assert regions(INNER, OUTER, LEFT_OUT, classes=classes).describe_chosen(Path("x.geojson")).startswith(words)


def test_a_note_is_one_line_of_text_whatever_the_file_is_called() -> None:
    """The ledger holds it, and the terminal shows it."""
    note = regions(INNER).describe_chosen(Path("caf\udce9 1\n2.geojson"))
    assert note == r"1 region of caf\udce9 1 2.geojson"


@given(
    st.lists(st.tuples(*[st.floats(0, 90)] * 2, *[st.floats(0.1, 40)] * 2), min_size=1, max_size=4),
    st.lists(st.sampled_from(["", "Tumor", "Ignore*"]), min_size=4, max_size=4),
)
def test_the_restricted_mask_holds_every_point_that_is_selected(
    boxes: list[tuple[float, float, float, float]], classes: list[str]
) -> None:
    """Law: so no nucleus is lost to the mask's pixels of 8 px; and little is processed for nothing."""
    drawn = regions(*[shapely.box(x, y, x + w, y + h) for x, y, w, h in boxes], classes=tuple(classes[: len(boxes)]))
    work = Frame(Size(120, 96), 0.25, Affine(1, 1, 0, 0))
    tissue = TissueMap(np.arange(180).reshape(12, 15) % 7 > 0, Frame(Size(15, 12), 2.0, Affine(8, 8, 0, 0)), work)
    restricted = drawn.restrict(tissue)
    assert not restricted.mask[~tissue.mask].any()
    y, x = np.mgrid[0:96:0.5, 0:120:0.5] + 0.01
    xy = np.stack([x.ravel(), y.ravel()], 1)
    selected = drawn.select(xy)
    np.testing.assert_array_equal(restricted.contains(xy[selected]), tissue.contains(xy[selected]))
    ignored = shapely.union_all(shapely.buffer(drawn.polygons[drawn.ignored], -14.0))
    assert not restricted.contains(xy[shapely.contains_xy(ignored, *xy.T)]).any()
    near = shapely.union_all(shapely.buffer(drawn.polygons[~drawn.ignored], 14.0)) if not drawn.ignored.all() else None
    if near is not None:
        assert not restricted.contains(xy[~shapely.intersects_xy(near, *xy.T)]).any()


@given(
    st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 8)] * 2), min_size=1, max_size=8),
    st.lists(st.sampled_from(["", "Tumor", "Ignore*", "Tissue"]), min_size=8, max_size=8),
)
def test_the_part_of_a_polygon_that_is_selected(boxes: list[tuple[int, int, int, int]], classes: list[str]) -> None:
    """Law: of every pixel it covers, that whose centre is in the polygon and selected; whichever others are near."""
    outlines = [shapely.box(x, y, x + w, y + h) for x, y, w, h in boxes]
    drawn = regions(*outlines, classes=tuple(classes[: len(boxes)]))
    polygons = np.array([*outlines, shapely.box(0, 0, 28, 28), shapely.box(40, 40, 41, 41)], dtype=object)
    parts = drawn.within(polygons)
    y, x = np.mgrid[0:42, 0:42] + 0.5
    selected = drawn.select(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)
    for polygon, part in zip(polygons, parts, strict=True):
        np.testing.assert_array_equal(shapely.contains_xy(part, x, y), shapely.contains_xy(polygon, x, y) & selected)
        assert part.is_valid
    assert drawn.within(polygons[:0]).shape == (0,)


def test_outlines_along_pixels_are_simplified_before_they_are_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As QuPath's thresholder and wand draw them: growing 100,000 steps took 176 s and 1 GB."""
    radius, grow = 12_500, shapely.buffer
    x = np.arange(radius + 1)
    y = np.floor(np.sqrt(radius**2 - x**2))
    steps = np.stack([np.stack([x[:-1], x[1:]], 1).ravel(), np.repeat(y[:-1], 2)], 1)  # in one quadrant
    ring = np.concatenate([steps, (steps * [1, -1])[::-1], steps * [-1, -1], (steps * [-1, 1])[::-1]])
    stepped = shapely.make_valid(shapely.Polygon(ring + 13_000))
    smooth = grow(shapely.Point(13_000, 13_000), radius, quad_segs=200)
    work = Frame(Size(26_000, 26_000), 0.25, Affine(1, 1, 0, 0))
    tissue = TissueMap(np.ones((1625, 1625), bool), Frame(Size(1625, 1625), 4.0, Affine(16, 16, 0, 0)), work)

    def buffer(polygons: Any, distance: float) -> Any:
        assert shapely.get_num_coordinates(polygons).sum() < 1000
        return grow(polygons, distance)

    monkeypatch.setattr(shapely, "buffer", buffer)
    kept, expected = (regions(outline).restrict(tissue).mask for outline in (stepped, smooth))
    assert np.count_nonzero(kept ^ expected) < 0.002 * np.count_nonzero(expected)


def test_in_any_is_the_union() -> None:
    assert in_any([INNER, LEFT_OUT], PROBES).tolist() == [True, False, True, True, False]
    assert not in_any([], PROBES).any()
