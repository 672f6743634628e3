"""The scale of a slide, from what its file states and what is given for it."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.errors import ScaleUnknown
from slides.scale import BY_DEFAULT, GivenScale, Scale, find_scale

SLIDE, SILENT = Path("slide.svs"), GivenScale(default_mpp=1.0)


def by_scanner(x: object, y: object) -> dict[str, str]:
    return {"openslide.vendor": "aperio", "openslide.mpp-x": str(x), "openslide.mpp-y": str(y)}


def by_tags(x: object, y: object, unit: str = "centimeter") -> dict[str, str]:
    """Pixels per unit."""
    return {"tiff.ResolutionUnit": unit, "tiff.XResolution": str(x), "tiff.YResolution": str(y)}


@given(st.floats(0.06, 4.9), st.sampled_from([("inch", 25_400), ("centimeter", 10_000)]))
def test_tags_state_pixels_per_inch_or_centimetre(mpp: float, unit: tuple[str, int]) -> None:
    name, um = unit
    x, y, source = find_scale(SLIDE, by_tags(um / mpp, um / mpp, name), GivenScale(mpp_source="not asked for"))
    assert (x, y) == pytest.approx((mpp, mpp), rel=1e-12)
    assert source == "tiff resolution"


@pytest.mark.parametrize(
    "properties",
    [
        {},
        by_tags(0, 40_000),
        by_tags(40_000, 0),
        by_tags(-40_000, 40_000),
        by_tags(40_000, "nan"),
        by_tags("40,000", 40_000),
        by_tags(40_000, 40_000, "none"),
        by_scanner("0,25", 0.25),
        by_scanner(0.25, ""),
        by_scanner(0.25, 1000),
        {"openslide.vendor": "aperio", "openslide.mpp-x": "0.25"},
    ],
)
def test_what_states_no_scale_gets_the_one_by_default_and_is_refused_without(properties: dict[str, str]) -> None:
    assert find_scale(SLIDE, properties, SILENT) == (1.0, 1.0, BY_DEFAULT)
    with pytest.raises(ScaleUnknown, match=r"slide\.svs states .*: pass --mpp"):
        find_scale(SLIDE, properties, GivenScale())


@pytest.mark.parametrize("wrong", ["0.25", True, np.True_, -1, 0, float("nan"), 1000, [0.25], b"1", 0.25j])
@pytest.mark.parametrize("field", ["mpp", "default_mpp"])
def test_what_is_given_must_be_a_number_that_a_microscope_can_have_made(field: str, wrong: Any) -> None:
    with pytest.raises(ScaleUnknown, match=re.escape(f"mpp={wrong!r} for slide.svs: need 0.05 to 5")):
        find_scale(SLIDE, {}, GivenScale()._replace(**{field: wrong}))


@pytest.mark.parametrize("number", [0.25, np.float32(0.25), np.float64(0.25), np.int64(1), 1, Fraction(1, 4)])
def test_numbers_of_any_kind_become_floats(number: Any) -> None:
    for given_scale in (GivenScale(mpp=number), GivenScale(default_mpp=number)):
        x, y, _ = find_scale(SLIDE, {}, given_scale)
        assert (type(x), type(y), x, y) == (float, float, number, number)


@given(st.floats(0.05, 5.0))
def test_a_scanner_is_believed_before_the_tags_which_a_generic_tiff_only_repeats(mpp: float) -> None:
    properties = {**by_tags(20_000, 20_000), **by_scanner(mpp, mpp)}
    assert find_scale(SLIDE, properties, SILENT) == (mpp, mpp, "metadata")
    generic = {**properties, "openslide.vendor": "generic-tiff"}
    assert find_scale(SLIDE, generic, SILENT) == (0.5, 0.5, "tiff resolution")


@pytest.mark.parametrize("mpp", [0.05, 5.0])
def test_the_limits_of_what_is_believed_are_believed(mpp: float) -> None:
    assert find_scale(SLIDE, by_scanner(mpp, mpp), GivenScale()) == (mpp, mpp, "metadata")
    assert find_scale(SLIDE, {}, GivenScale(mpp)) == (mpp, mpp, "given")


def test_axes_may_differ_by_two_percent_and_no_more() -> None:
    """Either of them may be the larger one; tables have the mean, to six digits."""
    for pair in ((1.0, 1.02), (1.02, 1.0)):
        scale = find_scale(SLIDE, by_scanner(*pair), SILENT)
        assert scale[:2] == pair
        assert scale.mean == 1.01
    assert Scale(0.25000012, 0.2500013, "metadata").mean == 0.250001
    for pair in ((1.0, 1.021), (1.021, 1.0)):
        with pytest.raises(ScaleUnknown, match="need square pixels, within 2 %"):
            find_scale(SLIDE, by_scanner(*pair), SILENT)
