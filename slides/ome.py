"""What an OME-TIFF states of its picture, in the XML of its first directory's description.

The form is that of https://ome-model.readthedocs.io/en/stable/ome-tiff/specification.html.
"""

from typing import NamedTuple
from xml.etree import ElementTree

# Units of length of the OME model, in micrometres; others, such as `pixel`, say nothing. Mu has two code points.
_MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "in": 25400.0}


class OmePicture(NamedTuple):
    """The first picture of an OME-TIFF.

    mpp: micrometres per pixel along x and y, or None; channels: how many pictures of one channel each it is made of,
    1 for RGB
    """

    mpp: tuple[float, float] | None
    channels: int


def read_ome(description: str) -> OmePicture | None:
    """The picture that the description of a TIFF's first directory is about; None where it is not OME's XML.

    A document type is passed over with all that it is in: it is what entities that never end are declared in.
    """
    if "<OME" not in description[:4096] or "<!DOCTYPE" in description:
        return None
    try:
        pixels = ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except (ElementTree.ParseError, ValueError):
        return None
    if pixels is None:
        return None
    return OmePicture(_mpp(pixels), max(1, len(pixels.findall("{*}Channel"))))


def _mpp(pixels: ElementTree.Element) -> tuple[float, float] | None:
    try:
        x, y = (
            float(pixels.attrib[f"PhysicalSize{axis}"]) * _MICROMETRES[pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m")]
            for axis in "XY"
        )
    except (KeyError, ValueError):
        return None
    return x, y
