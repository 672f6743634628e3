"""Reads from the header of a DICOM file whether it belongs to a slide, and to which.

A DICOM slide is a series: a file for each level, for the label, the overview and the thumbnail, all in one folder.
OpenSlide opens any of them and finds the others; this reads a few hundred bytes of each, so that an archive of ten
thousand files is sorted in seconds.

Source: DICOM PS3.10, 7.1 (preamble and meta information) and PS3.5, 7.1 and 7.5 (elements, sequences).
"""

import struct
from typing import IO, NamedTuple

from slides.errors import SlideUnreadable

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage, PS3.4, B.5
_IMPLICIT_VR = "1.2.840.10008.1.2"

_SOP_CLASS, _SYNTAX = 0x00020002, 0x00020010  # of the meta information, group 2, always explicit
_IMAGE_TYPE, _SERIES = 0x00080008, 0x0020000E
_FIRST_TAG = 0x00080000  # no element but those of the meta information has a lower one
_ITEM_END, _SEQUENCE_END = 0xFFFEE00D, 0xFFFEE0DD

_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_UNDEFINED = 0xFFFFFFFF
_LONGEST_TEXT = 1024  # a UID has 64 characters, four code strings have 67


class Header(NamedTuple):
    """What identifies a file of a slide: its series, which is the slide, and whether it is one of the levels."""

    series: str
    is_level: bool


class _Element(NamedTuple):
    tag: int
    length: int  # bytes, or _UNDEFINED
    explicit: bool  # whether what it holds has explicit value representations


def read_header(file: IO[bytes], name: object) -> Header | None:
    """The series of a DICOM file of a slide, read from its start; None for any other file. name: for messages.

    Raises OSError; SlideUnreadable where the header names a slide's class and then is truncated or malformed.
    """
    if file.read(132)[128:] != b"DICM":
        return None
    try:
        meta = _texts(file, explicit=True, wanted=(_SOP_CLASS, _SYNTAX))
        if meta.get(_SOP_CLASS) != WHOLE_SLIDE:
            return None
        _skip_meta(file)
        stated = _texts(file, explicit=meta.get(_SYNTAX) != _IMPLICIT_VR, wanted=(_IMAGE_TYPE, _SERIES))
        kind = stated[_IMAGE_TYPE].split("\\")
        return Header(stated[_SERIES], is_level=kind[2:3] == ["VOLUME"])
    except (EOFError, KeyError, ValueError, RecursionError) as error:
        raise SlideUnreadable(f"{name} is a DICOM file with a damaged header: copy it again") from error


def _texts(file: IO[bytes], *, explicit: bool, wanted: tuple[int, int]) -> dict[int, str]:
    """The wanted elements, in ascending order, of those that follow; the file is then read up to the last of them."""
    texts: dict[int, str] = {}
    tag = 0
    while tag < wanted[-1]:
        before = tag
        tag, length, inside = _element(file, explicit)
        if tag <= before:
            raise ValueError(f"element {tag:08x} after {before:08x}: elements ascend")
        if tag not in wanted:
            _skip(file, length, inside)
        elif length <= _LONGEST_TEXT:
            texts[tag] = _bytes(file, length).decode("ascii").rstrip("\0 ")
        else:
            raise ValueError(f"element {tag:08x} of {length} bytes: need at most {_LONGEST_TEXT}")
    return texts


def _skip_meta(file: IO[bytes]) -> None:
    """Skip the rest of the meta information."""
    while (head := _bytes(file, 2)) == b"\2\0":
        file.seek(-len(head), 1)
        _, length, explicit = _element(file, explicit=True)
        _skip(file, length, explicit)
    file.seek(-len(head), 1)


def _element(file: IO[bytes], explicit: bool) -> _Element:
    """The next tag, the length of its value, and how to read that. Delimiters never have a value representation."""
    head = _bytes(file, 8)
    group, number = struct.unpack("<HH", head[:4])
    tag, kind = group << 16 | number, head[4:6]
    if not explicit or group == 0xFFFE:
        return _Element(tag, struct.unpack("<I", head[4:])[0], explicit)
    if kind in _LONG:
        # what is of unknown representation and undefined length is written as implicit, PS3.5, 6.2.2
        return _Element(tag, struct.unpack("<I", _bytes(file, 4))[0], kind != b"UN")
    return _Element(tag, struct.unpack("<H", head[6:])[0], explicit)


def _skip(file: IO[bytes], length: int, explicit: bool) -> None:
    """Skip a value; one of undefined length is a sequence of items, or an item of elements, with an end mark."""
    if length != _UNDEFINED:
        file.seek(length, 1)
        return
    while True:
        tag, inner, inside = _element(file, explicit)
        if tag in (_ITEM_END, _SEQUENCE_END):
            return
        if tag < _FIRST_TAG:
            raise ValueError(f"element {tag:08x} in a sequence: need {_FIRST_TAG:08x} or more")
        _skip(file, inner, inside)


def _bytes(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise EOFError(f"{len(content)} of {count} bytes")
    return content
