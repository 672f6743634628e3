"""Micrometres per pixel of a slide, and where they come from."""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from slides.errors import ScaleUnknown
from slides.ome import read_ome

# Micrometres per pixel that a microscope can have made; OpenSlide reports 1000 for a TIFF without resolution.
_LEAST_MPP, _LARGEST_MPP = 0.05, 5.0
NEED_MPP = f"need {_LEAST_MPP:g} to {_LARGEST_MPP:g} micrometres per pixel"

# Scales along x and y that differ by more are an error in the metadata: scanners' pixels are square.
_LARGEST_ASPECT = 1.02

_MICROMETRES = {"inch": 25400.0, "centimeter": 10000.0}

BY_DEFAULT, FORCED = "default by --mpp", "forced by --force-mpp"  # sources of a scale


class GivenScale(NamedTuple):
    """What a user states of a slide's scale, um/px at level 0: the arguments of `open_slide`."""

    mpp: float | None = None
    mpp_source: str = "given"
    default_mpp: float | None = None


class Scale(NamedTuple):
    """Micrometres per pixel at level 0, and where they come from.

    source: `metadata`, `tiff resolution`, BY_DEFAULT (given for slides that state nothing), or what the caller of
    `open_slide` named: `manifest`, FORCED, `given`.
    """

    x: float
    y: float
    source: str

    @property
    def mean(self) -> float:
        """Of both axes, to six digits after the point: the one number that tables have."""
        return round((self.x + self.y) / 2, 6)


def is_believable(mpp: object) -> bool:
    """Whether it is a number of micrometres per pixel that a microscope can have made; else messages say NEED_MPP."""
    return isinstance(mpp, Real) and not isinstance(mpp, bool) and _LEAST_MPP <= float(mpp) <= _LARGEST_MPP


def find_scale(path: Path, properties: Mapping[str, str], given: GivenScale) -> Scale:
    """The scale of a slide of these OpenSlide properties, by the rule of `slide.open_slide`. Raises ScaleUnknown."""
    mpp, mpp_source, default_mpp = given
    for value in (mpp, default_mpp):
        if value is not None and not is_believable(value):
            raise ScaleUnknown(f"mpp={value!r} for {path}: {NEED_MPP}")
    if mpp is not None:
        return Scale(float(mpp), float(mpp), mpp_source)  # JSON knows no numbers of numpy
    stated = (_stated_scale(properties), _resolution_scale(properties))
    for x, y, source in filter(None, stated):
        if not (is_believable(x) and is_believable(y)):
            continue
        if max(x, y) > _LARGEST_ASPECT * min(x, y):
            raise ScaleUnknown(
                f"{path} states {x:g} x {y:g} um/px ({source}): need square pixels, within 2 %; give its mpp in a "
                f"manifest or by --force-mpp, or resample it to square pixels"
            )
        return Scale(x, y, source)
    if default_mpp is not None:
        return Scale(float(default_mpp), float(default_mpp), BY_DEFAULT)
    wrong = next((value for scale in stated if scale for value in scale[:2] if not is_believable(value)), None)
    said = "no resolution" if wrong is None else f"{wrong:g} um/px, not between {_LEAST_MPP:g} and {_LARGEST_MPP:g}"
    raise ScaleUnknown(f"{path} states {said}: pass --mpp (micrometres per pixel at level 0)")


def _stated_scale(properties: Mapping[str, str]) -> Scale | None:
    """What OME's XML or the scanner states; nothing of other generic TIFFs, whose resolution tags OpenSlide repeats."""
    if ome := read_ome(properties.get("tiff.ImageDescription", "")):
        return Scale(*ome.mpp, "metadata") if ome.mpp else None
    if properties.get("openslide.vendor") == "generic-tiff":
        return None
    try:
        x, y = float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None
    return Scale(x, y, "metadata")


def _resolution_scale(properties: Mapping[str, str]) -> Scale | None:
    """TIFF resolution tags: pixels per unit -> micrometres per pixel."""
    try:
        unit = _MICROMETRES[properties["tiff.ResolutionUnit"]]
        x, y = float(properties["tiff.XResolution"]), float(properties["tiff.YResolution"])
    except (KeyError, ValueError):
        return None
    return Scale(unit / x, unit / y, "tiff resolution") if x > 0 and y > 0 else None
