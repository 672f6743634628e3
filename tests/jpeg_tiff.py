"""Writes tiled TIFF files of JPEG tiles, as scanners and converters do."""

import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

_TYPES = {"H": 3, "I": 4, "B": 7, "b": 2}  # SHORT, LONG, UNDEFINED, ASCII
_RGB, _YCBCR = 2, 6
_SUBSAMPLING = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


class Level(NamedTuple):
    """A level: pixels uint8 (h, w, 3); tile (width, height); how its tiles are encoded.

    rgb: colours are stored as they are; tables: the tables that all tiles share are stored once; replaced: streams that
    stand in place of those of some tiles, by their numbers; reduced: marked as a smaller version of the first level;
    description: what the directory says of it; smaller: versions that the directory refers to
    (SubIFDs), as OME-TIFF does; strip: stored as one strip in place of tiles.
    """

    pixels: np.ndarray
    tile: tuple[int, int] = (64, 64)
    rgb: bool = False
    subsampling: str = "4:4:4"
    tables: bool = False
    replaced: dict[int, bytes] = {}  # noqa: RUF012 - never changed
    photometric: int = 0  # 0: as the tiles are stored
    reduced: bool = False
    description: str = ""
    smaller: tuple["Level", ...] = ()
    strip: bool = False


def write(path: Path, *levels: Level) -> Path:
    """A TIFF of these levels, which states no resolution."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        link = 4
        for level in levels:
            here = _write_level(file, level)
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<I", here))
            link = end - 4
            file.seek(end)
    return path


def _write_level(file: BinaryIO, level: Level) -> int:
    """Write the tiles and the directory of a level, after those of its smaller versions; returns where that is."""
    smaller = [_write_level(file, version) for version in level.smaller]
    streams = [_encoded(piece, level) for piece in ([level.pixels] if level.strip else _tiles(level))]
    tables, streams = _split(streams) if level.tables else (b"", streams)
    for index, stream in level.replaced.items():
        streams[index] = stream
    offsets = []
    for stream in streams:
        offsets.append(file.tell() if stream else 0)
        file.write(stream + b"\0" * (len(stream) % 2))
    return _write_tags(file, level, offsets, [len(stream) for stream in streams], tables, smaller)


def encode(pixels: np.ndarray, *, rgb: bool = False, subsampling: str = "4:4:4") -> bytes:
    """One JPEG stream of uint8 (h, w, 3)."""
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, subsampling=subsampling, keep_rgb=rgb)
    return stream.getvalue()


def _encoded(pixels: np.ndarray, level: Level) -> bytes:
    return encode(pixels, rgb=level.rgb, subsampling=level.subsampling)


def _tiles(level: Level) -> list[np.ndarray]:
    """The level's tiles, whole, row by row; beyond its edge the last pixels are repeated."""
    height, width = level.pixels.shape[:2]
    across, down = -(-width // level.tile[0]), -(-height // level.tile[1])
    beyond = (0, down * level.tile[1] - height), (0, across * level.tile[0] - width), (0, 0)
    padded = np.pad(level.pixels, beyond, mode="edge")
    rows = [padded[y : y + level.tile[1]] for y in range(0, padded.shape[0], level.tile[1])]
    return [row[:, x : x + level.tile[0]] for row in rows for x in range(0, padded.shape[1], level.tile[0])]


def _split(streams: list[bytes]) -> tuple[bytes, list[bytes]]:
    """The quantisation and Huffman tables of all streams, which are equal, as a stream; and the streams without."""
    tables, bare = b"", []
    for stream in streams:
        at, kept, found = 2, b"\xff\xd8", b""
        while stream[at + 1] != 0xDA:  # start of scan
            length = 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
            if stream[at + 1] in (0xDB, 0xC4):
                found += stream[at : at + length]
            else:
                kept += stream[at : at + length]
            at += length
        assert tables in (b"", found)
        tables = found
        bare.append(kept + stream[at:])
    return b"\xff\xd8" + tables + b"\xff\xd9", bare


def _write_tags(
    file: BinaryIO, level: Level, offsets: list[int], lengths: list[int], tables: bytes, smaller: list[int]
) -> int:
    """Write the level's directory; returns where it is. The link to the next one is its last four bytes."""
    height, width = level.pixels.shape[:2]
    values: dict[int, tuple[str, list[int]]] = {
        254: ("I", [int(level.reduced)]),
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8, 8, 8]),
        259: ("H", [7]),
        262: ("H", [level.photometric or (_RGB if level.rgb else _YCBCR)]),
        277: ("H", [3]),
        284: ("H", [1]),
    }
    if level.strip:
        values |= {273: ("I", offsets), 278: ("I", [height]), 279: ("I", lengths)}
    else:
        values |= {322: ("I", [level.tile[0]]), 323: ("I", [level.tile[1]]), 324: ("I", offsets), 325: ("I", lengths)}
    if level.description:
        values[270] = ("b", np.frombuffer(level.description.encode() + b"\0", np.int8).tolist())
    if tables:
        values[347] = ("B", list(tables))
    if smaller:
        values[330] = ("I", smaller)
    if not level.rgb:
        values[530] = ("H", list(_SUBSAMPLING[level.subsampling]))
    entries = b""
    for tag, (code, numbers) in sorted(values.items()):
        content = struct.pack(f"<{len(numbers)}{code}", *numbers)
        if len(content) > 4:
            at = file.tell()
            file.write(content + b"\0" * (len(content) % 2))
            content = struct.pack("<I", at)
        entries += struct.pack("<HHI", tag, _TYPES[code], len(numbers)) + content.ljust(4, b"\0")
    here = file.tell()
    file.write(struct.pack("<H", len(values)) + entries + struct.pack("<I", 0))
    return here
