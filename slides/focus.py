"""How sharp a slide is, in cells of a fixed lattice, from the patches that are read anyway.

Sums of squared Laplacians of green at two scales, 0.5 and 1 um per pixel of a slide at 0.25, are whole numbers: cores
partition the slide, so their sums over the cores do not depend on the tiling, to the last bit.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slides.geometry import Box, Size, union
from slides.grid import Tile

Sums = NDArray[np.int64]

# Side of a cell: it holds some nuclei, and optics blur areas that are larger.
_CELL_UM = 64.0

# Pixels, of two work px each, that the coarser Laplacian reaches around a pixel.
_REACH = 3

# Sharpness is the root of the mean squared coarser Laplacian, in units of the mean darkness: the finer one is mostly
# noise where a slide is blurred. The slide's own is the 75th percentile of its cells, at least 1: of the sharp slides
# that were measured it was 1.4 to 3. One cell in 200 had less than .22 of it; after a Gaussian blur of 2 um half of
# them had less than .11, of 1 um .31 and a ratio of .3 between the scales, where sharp cells had .42 and more.
_QUANTILE, _LEAST_OWN = 75, 1.0
_BLURRED, _DOUBTFUL, _FINE_TO_COARSE = 0.15, 0.35, 0.41

# Cells less dark than this, in grey levels below glass, are judged no more than those that are half outside the cores.
_DARKNESS = 15.0


class Focus(NamedTuple):
    """Sums over the cells that some tiles touch.

    corner: column and row of the first cell; sums: int64 (h, w, 4), of each cell the pixels, their grey levels and the
    squares of the finer and the coarser Laplacian. A pixel is 2 x 2 work px, a grey level is the sum of the four.
    """

    corner: tuple[int, int]
    sums: Sums


def to_json(focus: Focus) -> dict[str, Any]:
    return {"corner": focus.corner, "sums": focus.sums.tolist()}


def from_json(content: Mapping[str, Any]) -> Focus:
    """What `to_json` gave."""
    column, row = content["corner"]
    return Focus((column, row), np.array(content["sums"], np.int64))


def cell_px(mpp: float) -> int:
    """Side of a cell, work px at `mpp` um per pixel: an even number."""
    return 2 * max(1, round(_CELL_UM / mpp / 2))


def measure(patches: Iterable[NDArray[np.uint8]], tiles: tuple[Tile, ...], size: Size, mpp: float) -> Focus:
    """The sums over the cores of some tiles.

    patches: each uint8 (tile, tile, 3), of the tiles in their order; size: of the work frame, whose scale is `mpp`
    Law: added over any tiles that partition the slide they are the same, for a margin of 8 px and more.
    """
    side = cell_px(mpp)
    cores = union([tile.core for tile in tiles]) if tiles else Box(0, 0, 0, 0)
    left, top = cores.x0 // side, cores.y0 // side
    sums = np.zeros((-(-cores.y1 // side) - top, -(-cores.x1 // side) - left, 4), np.int64)
    for patch, tile in zip(patches, tiles, strict=True):
        core = Box(*tile.core.corner, min(tile.core.x1, size.width // 2 * 2), min(tile.core.y1, size.height // 2 * 2))
        if core.area:
            x, y = core.x0 // side, core.y0 // side
            measures = _measures(patch, core, tile.read)
            _clear_edges(measures[1:], core, size)
            part = _by_cell(measures, core, side)
            sums[y - top : y - top + part.shape[0], x - left : x - left + part.shape[1]] += part
    return Focus((left, top), sums)


def _measures(patch: NDArray[np.uint8], core: Box, read: Box) -> NDArray[np.int32]:
    """Grey levels and the two squared Laplacians in a core: int32 (3, h, w), a pixel of 2 x 2 work px each."""
    around = Box(core.x0 - 2 * _REACH, core.y0 - 2 * _REACH, core.x1 + 2 * _REACH, core.y1 + 2 * _REACH).intersect(read)
    # from an even pixel on, in whole pairs
    x0, y0 = around.x0 + around.x0 % 2, around.y0 + around.y0 % 2
    pairs = Box(x0, y0, x0 + (around.x1 - x0) // 2 * 2, y0 + (around.y1 - y0) // 2 * 2)
    green = patch[pairs.within(read.corner)][..., 1]
    rows = np.add(green[::2], green[1::2], dtype=np.int16)
    grey = rows[:, ::2] + rows[:, 1::2]  # the sums below fit int16: at most 16 * 4 * 255
    missing = (
        (_REACH - (core.y0 - pairs.y0) // 2, _REACH - (pairs.y1 - core.y1) // 2),
        (_REACH - (core.x0 - pairs.x0) // 2, _REACH - (pairs.x1 - core.x1) // 2),
    )
    grey = np.pad(grey, missing, mode="edge")
    smooth = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    smooth = (smooth[:, :-2] + 2 * smooth[:, 1:-1] + smooth[:, 2:]) >> 4
    inner = grey[_REACH:-_REACH, _REACH:-_REACH]
    finer = _laplacian(grey[_REACH - 1 : 1 - _REACH, _REACH - 1 : 1 - _REACH], 1)
    measures = np.empty((3, *inner.shape), np.int32)
    measures[0] = inner
    for squares, laplacian in zip(measures[1:], (finer, _laplacian(smooth, 2)), strict=True):
        np.square(laplacian, out=squares, dtype=np.int32)
    return measures


def _clear_edges(laplacians: NDArray[np.int32], core: Box, size: Size) -> None:
    """Set to 0 what reaches over the edge of the slide, beyond which all is white."""
    for axis, low, high, extent in ((1, core.y0, core.y1, size.height), (2, core.x0, core.x1, size.width)):
        at = np.arange(low // 2, high // 2)
        outside = np.flatnonzero((at < _REACH) | (at >= extent // 2 - _REACH))
        np.moveaxis(laplacians, axis, 0)[outside] = 0


def _laplacian(grey: NDArray[np.int16], step: int) -> NDArray[np.int16]:
    """Four times a pixel, less those `step` away on each side; of all that have these."""
    middle = slice(step, -step)
    beside = grey[middle, : -2 * step] + grey[middle, 2 * step :] + grey[: -2 * step, middle] + grey[2 * step :, middle]
    return 4 * grey[middle, middle] - beside


def _by_cell(measures: NDArray[np.int32], core: Box, side: int) -> Sums:
    """Counts and sums of (3, h, w) over the cells that a core touches: int64 (rows, columns, 4)."""
    starts = []
    for low, high in ((core.y0, core.y1), (core.x0, core.x1)):
        edges = np.arange(low // side * side, high, side)
        starts.append((np.maximum(edges, low) - low) // 2)
    # along rows first: the other way takes five times as long
    sums = np.add.reduceat(np.add.reduceat(measures, starts[1], axis=2, dtype=np.int64), starts[0], axis=1)
    heights, widths = (np.diff(first, append=extent) for first, extent in zip(starts, measures.shape[1:], strict=True))
    return np.concatenate([np.outer(heights, widths)[None], sums]).transpose(1, 2, 0)


def add(parts: list[Focus]) -> Focus:
    """The sums of all parts, over all their cells."""
    parts = [part for part in parts if part.sums.size]
    if not parts:
        return Focus((0, 0), np.zeros((0, 0, 4), np.int64))
    boxes = [Box(*p.corner, p.corner[0] + p.sums.shape[1], p.corner[1] + p.sums.shape[0]) for p in parts]
    whole = union(boxes)
    sums = np.zeros((whole.height, whole.width, 4), np.int64)
    for box, part in zip(boxes, parts, strict=True):
        sums[box.within(whole.corner)] += part.sums
    return Focus(whole.corner, sums)


def blurred(sums: Sums, glass: float, mpp: float) -> NDArray[np.bool_]:
    """Which cells are out of focus, bool (h, w), compared with the slide's own: the sums are those of all its tiles.

    glass: grey level of clean glass in green
    """
    count = sums[..., 0]
    pixels = np.maximum(count, 1)
    grey, fine, coarse = (sums[..., i] / pixels for i in (1, 2, 3))
    darkness = glass - grey / 4
    judged = (darkness > _DARKNESS) & (2 * count > (cell_px(mpp) // 2) ** 2)
    sharpness = np.sqrt(coarse) / np.maximum(darkness, _DARKNESS)
    own = max(_LEAST_OWN, float(np.percentile(sharpness[judged], _QUANTILE)) if judged.any() else 0.0)
    dull = np.sqrt(fine) < _FINE_TO_COARSE * np.sqrt(coarse)
    blurry: NDArray[np.bool_] = judged & ((sharpness < _BLURRED * own) | ((sharpness < _DOUBTFUL * own) & dull))
    return blurry
