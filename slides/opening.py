"""The file of a slide -> OpenSlide's handle of it, or what is wrong with the file."""

import functools
import os
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from slides.errors import SlideError, SlideNotFound, SlideTooLarge, SlideUnreadable, SlideUnsupported
from slides.geometry import Size
from slides.ome import read_ome

# Pixels of a stored tile, which OpenSlide decodes whole, at four bytes each.
_LARGEST_TILE_PX = 2**26

# Decoded tiles that OpenSlide keeps: a few rows of those in a block's region, which is read in one go.
_CACHE_BYTES = 2**25

# In the errors of OpenSlide and libtiff for sound files that use a feature which is not implemented.
UNSUPPORTED = re.compile("unsupported|not supported|not configured|not implemented|can ?not handle", re.IGNORECASE)
CONVERT = "convert it to a tiled pyramidal TIFF"

# Suffixes of slide formats that OpenSlide does not read.
_FORMATS_NOT_READ = frozenset((".ets", ".isyntax", ".kfb", ".lif", ".mds", ".nd2", ".oir", ".sdpc", ".vsi"))

_WHITE = 255

# Pixels of a plain image that are converted at a time: for more, every strip is given new memory by the system, which
# takes up to eight times as long as converting it.
_STRIP_PX = 2**16

# Pillow turns a TIFF as its tag Orientation (TIFF 6.0, section 8) says. Bio-Formats and ImageIO, by which QuPath reads
# such files, do not: it is turned back to how it is stored, so that the outlines fit there.
_ORIENTATION = 274
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


@functools.cache
def _cache(_pid: int) -> openslide.OpenSlideCache:
    """Decoded tiles of all slides that a process has open: else OpenSlide keeps as many for every handle."""
    return openslide.OpenSlideCache(_CACHE_BYTES)


def open_handle(path: Path) -> "openslide.OpenSlide | Picture":
    """OpenSlide's handle, or a plain image.

    Raises SlideNotFound, SlideUnreadable, SlideUnsupported, SlideTooLarge.
    """
    if not path.is_file():
        raise SlideNotFound(f"{path}: {'a folder: need a file in it' if path.is_dir() else 'there is no such file'}")
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(_cache(os.getpid()))
        return handle
    except openslide.OpenSlideUnsupportedFormatError as error:
        if complaint := _reason_unreadable(path):
            raise SlideUnreadable(f"{path} {complaint}") from error
        return _open_picture(path)
    except openslide.OpenSlideError as error:
        if UNSUPPORTED.search(str(error)) or _is_czi(path):
            raise unsupported(path, str(error)) from error
        raise SlideUnreadable(f"{path} is damaged or incomplete: {_explained(path, str(error))}") from error


def unsupported(path: Path, complaint: str) -> SlideError:
    """The error for a file that other programs may read; where they do not either, it is damaged after all."""
    return SlideUnsupported(
        f"{path} is in a format that OpenSlide {openslide.__library_version__} does not read ({complaint}): "
        f"{CONVERT}; if no other program opens it, copy it again"
    )


def _is_czi(path: Path) -> bool:
    """Whether it is a Zeiss CZI, of whose many forms OpenSlide reads a few; the rest it calls damaged."""
    with path.open("rb") as file:
        return file.read(10) == b"ZISRAWFILE"


def _open_picture(path: Path) -> "Picture":
    """A plain image as a slide of one level. Raises SlideUnreadable, SlideUnsupported, SlideTooLarge."""
    try:
        with open_quietly(path) as picture:
            count, mode = getattr(picture, "n_frames", 1), picture.mode
            # Of several images the first may be a label: then it is a slide in a format that OpenSlide lacks.
            if count == 1 and ";16" in str(getattr(picture, "tile", "")):  # how Pillow reads it, into 8
                raise SlideUnsupported(_too_deep(path, 16))
            if count == 1 and mode in _EIGHT_BIT_MODES:
                return Picture(picture)
    except UnidentifiedImageError as error:
        if path.suffix.lower() in _FORMATS_NOT_READ or _is_czi(path):
            raise unsupported(path, path.suffix) from error
        raise SlideUnreadable(f"{path} is not a slide: OpenSlide and Pillow know no such format") from error
    except Image.DecompressionBombError as error:
        raise SlideTooLarge(f"{path}: {error}: {CONVERT}") from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        raise SlideUnreadable(f"{path} is a damaged image ({error}): copy it again") from error
    raise SlideUnsupported(
        f"{path} holds {count} image(s) of mode {mode} in no format that OpenSlide knows: "
        f"need a slide, or one image of 8 bits a channel; {CONVERT}"
    )


def open_quietly(path: Path) -> Image.Image:
    """A picture, not decoded yet. Pillow warns of half as many pixels as it refuses; these are fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=["PNG", "JPEG", "WEBP", "BMP", "TIFF"])


def as_stored(picture: Image.Image) -> Image.Image:
    """A picture, decoded, not turned."""
    orientation = getattr(picture, "tag_v2", {}).get(_ORIENTATION)  # which loading removes
    picture.load()
    return picture.transpose(_TURN_BACK[orientation]) if orientation in _TURN_BACK else picture


class Picture:
    """A plain image, decoded as a whole, with what is asked of OpenSlide's handles.

    pixels: uint8 (h, w, 3), on white
    properties: its TIFF resolution, description and colour profile, by OpenSlide's names
    """

    level_downsamples = (1.0,)

    def __init__(self, picture: Image.Image) -> None:
        tags = getattr(picture, "tag_v2", {})
        unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2), "none")
        resolution = {"tiff.XResolution": tags.get(282), "tiff.YResolution": tags.get(283)}
        self.properties = {name: str(float(value)) for name, value in resolution.items() if value}
        self.properties["tiff.ResolutionUnit"] = unit
        # Pillow takes it for Latin-1; OME's XML is UTF-8.
        self.properties["tiff.ImageDescription"] = (
            str(tags.get(270, "")).encode("latin-1", "replace").decode(errors="replace")
        )
        if profile := picture.info.get("icc_profile"):
            self.properties["openslide.icc-size"] = str(len(profile))
        picture = as_stored(picture)
        self.level_dimensions = (picture.size,)
        self.pixels = _on_white_in_strips(picture)

    def close(self) -> None:
        """There is no file to close."""


def _on_white_in_strips(picture: Image.Image) -> NDArray[np.uint8]:
    """A decoded picture of any mode: uint8 (h, w, 3). The forms in between would take several times the memory."""
    width, height = picture.size
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _STRIP_PX // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        if picture.has_transparency_data:
            pixels[top : top + rows] = on_white(strip.convert("RGBA"))
        else:
            pixels[top : top + rows] = np.asarray(strip.convert("RGB"))
    return pixels


def on_white(image: Image.Image) -> NDArray[np.uint8]:
    """RGBA, straight alpha -> uint8 (h, w, 3), blended on white."""
    rgba = np.asarray(image)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        # a copy of `rgb` takes five times as long
        return np.frombuffer(image.tobytes("raw", "RGB"), np.uint8).reshape(rgb.shape)
    # At most 255 * 255 + 127: fits 16 bits.
    weight = alpha.astype(np.uint16)
    return ((rgb * weight + _WHITE * (255 - weight) + 127) // 255).astype(np.uint8)


def _reason_unreadable(path: Path) -> str | None:
    """What is wrong with a file, as the end of a sentence that starts with its path; None if nothing is known."""
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes): copy it again"
    try:
        if path.suffix.lower() == ".mrxs" and (complaint := _reason_no_mirax(path)):
            return complaint
        with path.open("rb") as file:
            beyond = _directory_beyond(file, size)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if beyond is not None:
        return f"is truncated: it has {size} bytes, its directory is at byte {beyond}; copy it again"
    return None


def _reason_no_mirax(path: Path) -> str | None:
    """Why OpenSlide does not know a .mrxs file, which is a picture that must not be taken for the slide. See above."""
    folder = path.with_suffix("")
    if not folder.is_dir():
        return f"lacks its data: copy the folder {path.stem!r} beside it"
    if not (folder / "Slidedat.ini").is_file():
        return f"lacks its data, as there is no Slidedat.ini in {path.stem!r}: copy that folder again"
    if path.suffix != ".mrxs":
        return f"has a suffix by which OpenSlide does not know MIRAX: call it {path.stem}.mrxs"
    return None


def _directory_beyond(file: IO[bytes], size: int) -> int | None:
    """Offset of the first TIFF directory beyond the end of the file; None if all are there, or no TIFF.

    TIFF 6.0, section 2, and BigTIFF: byte order, 42 or 43, offset of the first directory; each directory is a
    count, its entries, and the offset of the next.
    """
    head = file.read(16).ljust(16, b"\0")
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or (version := struct.unpack(order + "H", head[2:4])[0]) not in (42, 43):
        return None
    start, count_code, entry, offset_code = (4, "H", 12, "I") if version == 42 else (8, "Q", 20, "Q")
    offset: int = struct.unpack_from(order + offset_code, head, start)[0]
    visited: set[int] = set()
    while offset and offset not in visited:
        visited.add(offset)
        if offset >= size:
            return offset
        file.seek(offset)
        count_bytes = file.read(struct.calcsize(count_code))
        if len(count_bytes) < struct.calcsize(count_code):
            return offset
        after = file.tell() + entry * int(struct.unpack(order + count_code, count_bytes)[0])
        if after + struct.calcsize(offset_code) > size:
            return offset
        file.seek(after)
        offset = struct.unpack(order + offset_code, file.read(struct.calcsize(offset_code)))[0]
    return None


def _explained(path: Path, complaint: str) -> str:
    """OpenSlide's complaint; a missing part of a slide of several files is named, with the remedy."""
    if "No such file" not in complaint:
        return f"{complaint}; copy it again"
    missing = os.path.relpath(complaint.partition("open ")[2].partition(": No such file")[0], path.parent)
    return f"its part {missing} is missing; copy everything that belongs to {path.name} beside it"


def stated_tile(properties: Mapping[str, str], level: int) -> Size:
    """Size of the tiles in which a level is stored, level px; 0 x 0 where the slide does not state it."""
    width, height = (properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height"))
    return Size(*(int(value) if value.isdecimal() else 0 for value in (width, height)))


def check_levels(path: Path, properties: Mapping[str, str], sizes: Sequence[Size]) -> None:
    """Raise SlideUnreadable for a level without pixels, SlideTooLarge for tiles that take gigabytes to decode.

    Sizes that OpenSlide computes from damaged metadata may be below zero.
    """
    for level, size in enumerate(sizes):
        if min(size) < 1:
            raise SlideUnreadable(
                f"{path} is damaged: its level {level} has {size.width:,} x {size.height:,} px, need 1 x 1 or more; "
                f"copy it again"
            )
        width, height = stated_tile(properties, level)
        if width * height > _LARGEST_TILE_PX:
            raise SlideTooLarge(
                f"{path} is stored in tiles of {width:,} x {height:,} px: need at most {_LARGEST_TILE_PX:,} px; "
                f"{CONVERT}, with tiles of 256 to 2048 px"
            )


def check_samples(path: Path, properties: Mapping[str, str]) -> None:
    """Raise SlideUnsupported for a generic TIFF of which OpenSlide shows only some channels, or some of their bits."""
    ome = read_ome(properties.get("tiff.ImageDescription", ""))
    if ome and ome.channels > 1:
        raise SlideUnsupported(
            f"{path} is an OME-TIFF of {ome.channels} channels, each a picture of its own: need RGB in one picture, as "
            f"`raw2ometiff --rgb` and QuPath write slides of H&E; {CONVERT}"
        )
    if properties.get("openslide.vendor") == "generic-tiff" and (bits := _bits(path)) > 8:
        raise SlideUnsupported(_too_deep(path, bits))


def _bits(path: Path) -> int:
    """Bits of a channel of a TIFF's first picture; 0 where that is not known."""
    try:
        with tifffile.TiffFile(path) as file:
            return int(file.pages.first.bitspersample)
    except Exception:  # whatever tifffile makes of a strange directory: OpenSlide has opened it
        return 0


def _too_deep(path: Path, bits: int) -> str:
    # of 12 bits in 16 the upper 8 would be nearly black
    return f"{path} has {bits} bits a channel: need 8; convert it, scaling the values that it uses to 0 to 255"
