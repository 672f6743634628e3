"""Numeric arrays of MATLAB files, level 5, which are MATLAB's -v6 and -v7.

After "MAT-File Format", The MathWorks, chapter 1. scipy's reader is not used, as a damaged file can crash the whole
process with it; here every stated size is checked against the bytes of the file.
"""

import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import AnnotationError

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)  # double, single, and whole numbers of 8 to 64 bits
_OTHER_CLASSES = {1: "a cell array", 2: "a structure", 3: "an object", 4: "text", 5: "a sparse array"}
_HEADER_BYTES = 128
_LARGEST_BYTES = 2**30  # of one array, unpacked


def read_mat(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays called `names` that a file has, each (rows, columns, ...); imaginary parts are left out.

    Raises AnnotationError for a file that is damaged or of another level, and for an array that is not numeric.
    """
    try:
        content = path.read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER_BYTES])
        if b"MATLAB 7.3" in content[:16]:
            raise AnnotationError(f"{path} is a MATLAB 7.3 file: save it with -v7")
        if order is None:
            raise AnnotationError(f"{path} is not a MATLAB file of level 5: save it with -v7")
        return dict(_arrays(memoryview(content)[_HEADER_BYTES:], order, names))
    except AnnotationError:
        raise
    except TypeError as error:
        raise AnnotationError(
            f"{path}: {error}: need a full array of numbers, as full(...) and cell2mat(...) give in MATLAB"
        ) from error
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise AnnotationError(f"{path} is a damaged MATLAB file ({error}): copy it again") from error


def _arrays(
    content: memoryview, order: str, names: Collection[str], unpacked_already: bool = False
) -> Iterator[tuple[str, NDArray[Any]]]:
    for kind, data in _elements(content, order):
        if kind == _COMPRESSED:
            if unpacked_already:
                raise ValueError("a compressed array within another")
            unpacker = zlib.decompressobj()
            unpacked = memoryview(unpacker.decompress(data, _LARGEST_BYTES))
            if not unpacker.eof:
                raise ValueError(f"an array of more than {_LARGEST_BYTES} bytes, or cut off")
            yield from _arrays(unpacked, order, names, unpacked_already=True)
        elif kind == _MATRIX:
            parts = _elements(data, order)
            flags, shape, name = (bytes(part) for _, part in _take(parts, 3))
            if (called := name.decode("ascii", "replace")) not in names:
                continue
            if (class_ := struct.unpack_from(order + "I", flags)[0] & 0xFF) not in _NUMERIC_CLASSES:
                raise TypeError(f"{called} is {_OTHER_CLASSES.get(class_, 'no array of numbers')}")
            ((stored, numbers),) = _take(parts, 1)
            if stored not in _NUMBERS:
                raise ValueError(f"{called} is stored as type {stored}")
            # A copy, in this machine's byte order; reshape checks that the numbers are as many as is said.
            values = np.frombuffer(numbers, np.dtype(order + _NUMBERS[stored]))
            sides = np.frombuffer(shape, np.dtype(order + "i4")).tolist()
            if min(sides, default=-1) < 0:
                raise ValueError(f"{called} has the size {sides}")
            yield called, values.astype(values.dtype.newbyteorder("=")).reshape(sides, order="F")


def _take(parts: Iterator[tuple[int, memoryview]], count: int) -> list[tuple[int, memoryview]]:
    taken = [part for _, part in zip(range(count), parts, strict=False)]
    if len(taken) < count:
        raise ValueError("an array without its parts")
    return taken


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, data) of a row of data elements. Those of up to four bytes share the eight of their tag."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        stop = start + size
        if stop > len(content) or (start == at + 4 and size > 4):
            raise ValueError(f"{size} bytes are announced at byte {at}, {len(content) - start} are there")
        yield kind, content[start:stop]
        # All but compressed elements are padded to eight bytes.
        at = at + 8 if start == at + 4 else stop if kind == _COMPRESSED else stop + -stop % 8
