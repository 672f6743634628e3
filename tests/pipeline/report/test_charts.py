"""Pictures for the report: well-formed, to scale, and nothing from outside is taken for markup."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import charts

HOSTILE = '<b title="x">&'


def attributes(svg: str, tag: str, name: str) -> list[float]:
    return [float(e.attrib[name]) for e in ElementTree.fromstring(svg).iter(tag)]


@given(st.lists(st.integers(0, 10**7), max_size=60))
def test_a_histogram_fills_its_height_and_no_more(counts):
    svg = charts.histogram(counts, HOSTILE)
    (path,) = ElementTree.fromstring(svg).iter("path")
    heights = [24 - float(v) for v in re.findall(r"V([\d.]+)h", path.attrib["d"])]
    assert len(heights) == len(counts)
    assert max(heights, default=0) == pytest.approx(23 if any(counts) else 0, abs=0.06)
    assert ElementTree.fromstring(svg).findtext("title") == HOSTILE


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6))
def test_stacked_parts_fill_the_whole(values):
    parts = {f"part {i}": value for i, value in enumerate(values)}
    svg = charts.stacked(parts, HOSTILE)
    if not sum(values):
        assert svg == ""
        return
    widths = attributes(svg, "rect", "width")
    assert widths == pytest.approx([100 * v / sum(values) for v in values], abs=0.01)
    assert sum(widths) == pytest.approx(100, abs=0.1)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5)), min_size=1, max_size=17))
def test_ratios_stay_in_the_picture_above_and_below_the_line_at_one(pairs):
    points = [charts.Ratio(f"{i} <", ratio, error) for i, (ratio, error) in enumerate(pairs)]
    svg = charts.ratios(points, 2, HOSTILE)
    tree = ElementTree.fromstring(svg)
    one = next(float(re.findall(r"[\d.]+", p.attrib["d"])[1]) for p in tree.iter("path") if p.attrib["class"] == "one")
    heights = attributes(svg, "circle", "cy")
    assert len(heights) == len(points)
    for (ratio, _), at in zip(pairs, heights, strict=True):
        assert 0 <= at <= 250
        assert (at - one) * (ratio - 1) <= 0.2 * abs(ratio - 1)


def test_dots_are_links_at_their_place():
    dots = [
        charts.Dot(30, 100, HOSTILE, "#slide-0", False),
        charts.Dot(40, 1000, "b", "#slide-1", True),
        charts.Dot(50, 10_000, "c", "#slide-2", False),
    ]
    svg = charts.scatter(dots, "area <µm²>", "density")
    tree = ElementTree.fromstring(svg)
    assert [a.attrib["href"] for a in tree.iter("a")] == ["#slide-0", "#slide-2", "#slide-1"]  # the outlier on top
    x, y = attributes(svg, "circle", "cx"), attributes(svg, "circle", "cy")
    assert x[2] - x[0] == pytest.approx(x[1] - x[2], abs=0.2)
    assert y[0] - y[2] == pytest.approx(y[2] - y[1], abs=0.2)  # decades are equal steps upwards
    assert "1,000" in [t.text for t in tree.iter("text")]
    assert HOSTILE in [t.text for t in tree.iter("title")]


@pytest.mark.parametrize("densities", [(2678, 2933), (2934, 2935), (0.021, 0.022), (900, 1100), (3, 4_000_000)])
def test_the_scale_upwards_has_numbers_however_alike_the_slides_are(densities):
    svg = charts.scatter([charts.Dot(30 + i, v, "a", "#a", False) for i, v in enumerate(densities)], "x", "y")
    left = [t.text for t in ElementTree.fromstring(svg).iter("text") if t.attrib.get("text-anchor") == "end"]
    assert len(set(left)) == len(left) >= 2


def test_one_dot_is_enough():
    svg = charts.scatter([charts.Dot(0.0, 1.0, "a", "#a", False)], "x", "y")
    assert len(attributes(svg, "circle", "cx")) == 1
