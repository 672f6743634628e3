"""The pictures of a slide: thumbnail.jpg with its tissue and tiles, overlay.jpg with its nuclei."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline import files
from pipeline.segment import tables
from pipeline.segment.annotations import KIND_COLOURS, TISSUE_COLOUR
from slides.artefacts import KINDS, ArtefactMap
from slides.geometry import Frame
from slides.grid import Tile
from slides.tissue import TissueMap

_TILE = (60, 60, 160)

UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)
"What Pillow raises for a damaged picture; the last where its header states any size."


def draw_plan(
    picture: NDArray[np.uint8],
    frame: Frame,
    artefacts: ArtefactMap,
    tissue: TissueMap,
    tiles: Iterable[Tile],
    path: Path,
) -> None:
    """thumbnail.jpg: the tissue's outline, artefacts in their colours, and the cores of the tiles that are processed.

    picture: uint8 (h, w, 3), all of `frame`; tissue: in which nuclei are reported
    """
    height, width = picture.shape[:2]
    rows, columns = (
        np.minimum(((np.arange(side) + 0.5) * frame.mpp / tissue.frame.mpp).astype(int), last - 1)
        for side, last in zip((height, width), tissue.mask.shape, strict=True)
    )
    inside = tissue.mask[rows[:, None], columns]  # (h, w)
    shown = picture.copy()
    shown[~inside] = 255 - (255 - shown[~inside]) // 2  # outside the tissue paler
    kinds = artefacts.kinds[rows[:, None], columns]
    for number, kind in enumerate(KINDS, 1):
        shown[kinds == number] = (shown[kinds == number] + np.array(KIND_COLOURS[kind])) // 2
    edge = inside.copy()
    edge[1:-1, 1:-1] &= ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])
    shown[edge] = TISSUE_COLOUR
    image = Image.fromarray(shown)
    draw = ImageDraw.Draw(image)
    for tile in tiles:
        draw.rectangle(tuple(v * tissue.work.mpp / frame.mpp for v in tile.core), outline=_TILE)
    _save(image, path)


def draw_overlay(picture: NDArray[np.uint8], frame: Frame, nuclei: Path, path: Path) -> None:
    """overlay.jpg: the outline of every nucleus in its class's colour.

    picture: uint8 (h, w, 3), all of `frame`
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    colours = tables.read_provenance(nuclei).colours
    for rows in tables.iter_nuclei(nuclei, ["geometry", "class"]):
        rings = shapely.get_exterior_ring(tables.geometry(rows))
        slide_xy, owner = shapely.get_coordinates(rings, return_index=True)
        xy = frame.to_slide.invert(slide_xy)
        outlines = np.split(xy, np.flatnonzero(np.diff(owner)) + 1)
        for outline, name in zip(outlines, rows["class"].to_pylist(), strict=True) if len(owner) else ():
            draw.line(outline.ravel().tolist(), fill=colours[name])
    _save(image, path)


def reduced(path: Path, most_px: tuple[int, int]) -> Image.Image | None:
    """A picture of a slide that fits into `most_px` (width, height); None where it cannot be read."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            image.draft("RGB", (2 * most_px[0], 2 * most_px[1]))  # decodes an eighth of a JPEG: fast
            small = image.convert("RGB")
    except UNREADABLE:
        return None
    small.thumbnail(most_px)
    return small


def _save(image: Image.Image, path: Path) -> None:
    with files.committed(path) as part:
        image.save(part, "JPEG", quality=88)
