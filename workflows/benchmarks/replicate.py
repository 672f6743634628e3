"""Write a large slide: the level-0 pixels of another one, repeated, as a tiled pyramidal BigTIFF of JPEG tiles.

    python workflows/benchmarks/replicate.py CMU-1-Small-Region.svs giant.tif --across 20 --down 15

No more than a row of tiles is held in memory, however large the slide: the image is periodic, so a tile of any level is
cut from a few rows of the source. Levels shrink by 4, each pixel the mean of those that it covers. The tags are
written here because tifffile takes no encoded JPEG tiles unless it has a JPEG encoder of its own.
"""

import argparse
import math
import struct
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slides.errors import NightslideError
from slides.geometry import Size
from slides.slide import open_slide

TILE = 512
SHRINK = 4
SMALLEST_PX = 4096  # a level with a longer side gets another below it
QUALITY = 85

SHORT, RATIONAL, LONG8 = 3, 5, 16  # types of a TIFF tag's values

Pixels = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("out", type=Path, help="a new .tif")
    parser.add_argument("--across", type=int, default=20, help="copies side by side (%(default)s)")
    parser.add_argument("--down", type=int, default=15, help="copies one below the other (%(default)s)")
    given = parser.parse_args()
    with open_slide(given.slide) as slide:
        mpp = slide.scale.x
        frame = slide.frame(mpp)
        source = slide.read(frame.box, frame)
    height, width = source.shape[:2]
    size = Size(width * given.across, height * given.down)
    with given.out.open("xb") as file:
        write(file, source, size, mpp)
    print(f"{given.out}: {size.width} x {size.height} px, {given.out.stat().st_size / 1e9:.2f} GB")


def write(file: BinaryIO, source: Pixels, size: Size, mpp: float) -> None:
    """Write `source` (uint8 (h, w, 3)), repeated to `size` level-0 px of `mpp`, and its smaller levels."""
    file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))  # BigTIFF; the last number: where the first level's tags are
    link = file.tell() - 8
    scale = 1
    while True:
        level = Size(size.width // scale, size.height // scale)
        offsets, counts = [], []
        for tile in tiles(source, scale, level):
            offsets.append(file.tell())
            counts.append(file.write(tile))
        link = write_tags(file, link, tags(level, scale, mpp), (offsets, counts))
        if max(level) <= SMALLEST_PX:
            return
        scale *= SHRINK


def tiles(source: Pixels, scale: int, level: Size) -> Iterator[bytes]:
    """The JPEG tiles of a level, row by row; what hangs over its edge goes on with the pattern.

    scale: level-0 px per level px.
    """
    height, width = source.shape[:2]
    wide = np.tile(source, (1, math.lcm(width, scale) // width, 1))  # repeats after whole pixels of the level, too
    for top in range(0, level.height, TILE):
        rows = np.arange(top * scale, (top + TILE) * scale).reshape(scale, TILE)
        band = np.concatenate([np.asarray(Image.fromarray(wide[part % height]).reduce(scale)) for part in rows])
        for left in range(0, level.width, TILE):
            columns = np.arange(left, left + TILE) % band.shape[1]
            encoded = BytesIO()
            Image.fromarray(band[:, columns]).save(encoded, "JPEG", quality=QUALITY, subsampling="4:4:4")
            yield encoded.getvalue()


def tags(level: Size, scale: int, mpp: float) -> list[tuple[int, int, int, int]]:
    """(tag, type, number of values, values) of a level, but for where its tiles are; TIFF 6.0."""
    per_cm = 10**9 | round(mpp * scale * 1e5) << 32
    return [
        (254, LONG8, 1, int(scale > 1)),  # NewSubfileType: a smaller version of another
        (256, LONG8, 1, level.width),
        (257, LONG8, 1, level.height),
        (258, SHORT, 3, 8 | 8 << 16 | 8 << 32),  # BitsPerSample
        (259, SHORT, 1, 7),  # Compression: JPEG
        (262, SHORT, 1, 6),  # PhotometricInterpretation: YCbCr
        (277, SHORT, 1, 3),  # SamplesPerPixel
        (282, RATIONAL, 1, per_cm),
        (283, RATIONAL, 1, per_cm),
        (296, SHORT, 1, 3),  # ResolutionUnit: centimetre
        (322, LONG8, 1, TILE),
        (323, LONG8, 1, TILE),
        (530, SHORT, 2, 1 | 1 << 16),  # YCbCrSubSampling: none
    ]


def write_tags(
    file: BinaryIO, link: int, known: list[tuple[int, int, int, int]], where: tuple[list[int], list[int]]
) -> int:
    """Write a level's tags at the end, and where they are at `link`. Returns where the next level's `link` is.

    where: the tiles' offsets and sizes in bytes.
    """
    for tag, numbers in zip((324, 325), where, strict=True):  # TileOffsets, TileByteCounts
        known.append((tag, LONG8, len(numbers), file.tell() if len(numbers) > 1 else numbers[0]))
        file.write(struct.pack(f"<{len(numbers)}Q", *numbers))
    here = file.tell()
    file.write(struct.pack("<Q", len(known)) + b"".join(struct.pack("<HHQQ", *tag) for tag in sorted(known)))
    file.write(struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", here))
    return file.seek(0, 2) - 8


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"replicate: {error}", file=sys.stderr)
        sys.exit(2)
