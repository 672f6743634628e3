"""Pen, folds, bubbles and coverslip edges on a slide, from its thumbnail and the texture below it.

Everything is judged in cells, the pixels of the tissue's thumbnail (8 um), by measures of HistoQC's kind (Janowczyk et
al., JCO Clin Cancer Inform 3, 2019): the share of each colour in the optical density, darkness, and low variance, which
is read at a quarter of the cell (2 um per pixel). What is dark and what is smooth is judged by the slide's own tissue.
"""

from typing import NamedTuple

import numpy as np
import scipy  # loads ndimage where it is first used: who reads a mask does without
from numpy.typing import ArrayLike, NDArray

from slides.geometry import Box, Frame
from slides.slide import Slide
from slides.stored import Mask
from slides.tissue import TissueMap, densities, glass, grown, ink_colours, is_grey, without_small

KINDS = ("pen", "fold", "bubble", "coverslip edge", "blur")
"Names of the kinds; in an `ArtefactMap` kind i is the number i + 1."
PEN, FOLD, BUBBLE, COVERSLIP, BLUR = range(1, len(KINDS) + 1)

Floats = NDArray[np.float32]

# Pixels along a side of a cell at which texture is measured: 2 um in a cell of 8 um.
_PARTS = 4

# Side of what is read in one go, cells: 512 x 512 px.
_READ = 128

# Cells paler than this, in every colour, are glass, and their texture is not read.
_GLASS_DENSITY = 0.06

# Of the tissue, only cells denser than this in green say what is usual: it has a margin and gaps.
_LEAST_STAIN = 0.1

# Blue and green ink absorb red more than green. Haematoxylin does not, but how near it comes differs between slides:
# ink is what exceeds the slide's own tissue by 15 %.
_COLD_RANGE, _COLD_OF_TISSUE, _COLD_DENSITY = (0.9, 1.2), 1.15, 0.3

# Blue and purple ink absorb less blue than haematoxylin, whose shares of red, green and blue in the density are .33 .43
# .24, and than the slide's own tissue. Where they cover tissue they are denser than it, and dark or smoother.
_VIOLET_RED, _VIOLET_BLUE, _VIOLET_OF_TISSUE, _VIOLET_DENSITY = 0.18, 0.215, 0.02, 0.5
_COVERED, _SMOOTHER = 1.3, 0.5

# Eosin has shares of .13 .53 .34, red pens of .06 .53 .41; blood may have either, but is nowhere smooth.
_WARM_RED, _WARM_BLUE, _WARM_DENSITY, _WARM_UM2, _WARM_SMOOTH = 0.12, 0.37, 0.3, 40_000.0, 0.04

# DAB and melanin absorb blue most, too: shares .17 .35 .48. Yellow ink hardly absorbs anything else.
_YELLOW_RED, _YELLOW_BLUE, _YELLOW_DENSITY = 0.2, 0.55, 0.3

# Purple ink has the colour of haematoxylin, and no texture: nuclei give tissue a relative deviation of .1 and more
# within a cell. Muscle, colloid and mucin may be as smooth, but are pink (a red share under .2) or pale.
_SMOOTH, _SMOOTH_OF_TISSUE, _PURPLE_RED, _PURPLE_GREEN, _PURPLE_DENSITY = 0.05, 0.3, 0.2, 0.62, 0.35

# On a slide in grey, ink is what is smooth and as dense as this.
_GREY_INK_DENSITY = 0.5

# The pale parts of a stroke have this share of the density that is needed where it is recognised.
_PALE = 0.4

# A cell and its neighbours have a palest spot. In clean tissue that is hardly ever as dark as the mean of the tissue
# around (up to 1.4 times the slide's median, lest wide strokes hide themselves); where two layers of tissue, or tissue
# and ink, lie above each other, it is. They continue a little where it is less dark.
_DARK, _CONTINUED, _SURROUNDINGS_UM, _DENSEST = 1.3, 1.05, 600.0, 1.4

# Lines in the colour of a shadow: the edge of the coverslip, the outline of a bubble.
_SHADOW_DENSITY, _SHADOW_GREEN, _SHADOW_SPREAD = 0.12, 0.38, 0.12

# The smallest of each kind: pigment, dust and specks of stain are smaller.
_PEN_UM2, _FOLD_UM2, _BUBBLE_UM2 = 6_000.0, 1_200.0, 20_000.0

# An edge of a coverslip is at least so long, and narrower than a stroke of a black pen; its ellipse is so much longer
# than wide. Pieces of shadow below the last are not looked at.
_EDGE_UM, _EDGE_WIDTH_UM, _STRAIGHT, _SHADOW_UM = 400.0, 150.0, 0.15, 150.0

# Their boxes are looked at until these are together so many times the slide: a hatched drawing would take hours.
_SHADOW_BOXES = 10

# Strokes and edges are wider than what is recognised of them.
_RIM_UM = 24.0


class ArtefactMap(NamedTuple):
    """Where a slide has artefacts, queried in work px.

    kinds: uint8 (h, w), 0 or the number of a kind in each pixel of the tissue's frame; tissue: as detected
    """

    kinds: NDArray[np.uint8]
    tissue: TissueMap

    def at(self, work_xy: ArrayLike) -> NDArray[np.uint8]:
        """work_xy: (N, 2) work px. Returns uint8 (N,), the number of a kind, or 0."""
        return self.tissue.look_up(self.kinds, work_xy)

    def tissue_mm2(self) -> dict[str, float]:
        """The tissue's area that each kind covers."""
        counts = np.bincount(self.kinds[self.tissue.mask], minlength=len(KINDS) + 1)[1:]
        return {kind: float(n) * self.tissue.frame.mpp**2 / 1e6 for kind, n in zip(KINDS, counts, strict=True)}

    def with_blur(self, blurred: Mask, corner: tuple[int, int], cell_px: int) -> "ArtefactMap":
        """The map with blur in cells of `cell_px` work px, the first of which is `corner`; other kinds stay.

        blurred: bool (h, w), of `focus.blurred`
        """
        kinds, size = self.kinds.copy(), cell_px * self.tissue.per_work_px
        places = []
        for extent, first, cells in zip(kinds.shape, corner[::-1], blurred.shape, strict=True):
            cell = ((np.arange(extent) + 0.5) / size).astype(int) - first
            known = np.flatnonzero((cell >= 0) & (cell < cells))
            places.append((known, cell[known]))
        (rows, in_rows), (columns, in_columns) = places
        part = kinds[np.ix_(rows, columns)]
        blurry = blurred[np.ix_(in_rows, in_columns)] & self.tissue.mask[np.ix_(rows, columns)]
        kinds[np.ix_(rows, columns)] = np.where(blurry & (part == 0), BLUR, part)
        return self._replace(kinds=kinds)

    def clean_tissue(self) -> TissueMap:
        """The tissue that no artefact covers."""
        return self.tissue._replace(mask=self.tissue.mask & (self.kinds == 0))


class Texture(NamedTuple):
    """What a thumbnail does not show of its pixels, from the optical density in green of their parts.

    deviation: float32 (h, w), the standard deviation within a pixel; palest: float32 (h, w), the density of the palest
    part. Both are 0 where they were not read; of a slide that has no finer pixels the deviation is 1.
    """

    deviation: Floats
    palest: Floats


def read_texture(slide: Slide, frame: Frame, thumbnail: NDArray[np.uint8]) -> Texture:
    """The texture below the pixels of a thumbnail, uint8 (h, w, 3), of `frame`; glass is not read.

    Memory beside the result holds one piece of 512 x 512 px. Law: the pieces do not show in the result.
    """
    shape = thumbnail.shape[:2]
    texture = Texture(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    parts = min(_PARTS, int(frame.mpp / max(slide.scale[:2])))
    if parts < 2:  # the slide has no more pixels than the thumbnail: nothing counts as smooth
        texture.deviation[:] = 1
        return texture
    fine = slide.frame(frame.mpp / parts)
    busy = densities(thumbnail).max(axis=0) > _GLASS_DENSITY
    density = -np.log(np.maximum(np.arange(256, dtype=np.float32), 1) / glass(thumbnail)[1])
    for top in range(0, shape[0], _READ):
        for left in range(0, shape[1], _READ):
            place = slice(top, min(top + _READ, shape[0])), slice(left, min(left + _READ, shape[1]))
            if not busy[place].any():
                continue
            rows, columns = busy[place].shape
            box = Box(left * parts, top * parts, (left + columns) * parts, (top + rows) * parts)
            green = slide.read_decodable(box, fine)[0][..., 1]
            cells = density[green].reshape(rows, parts, columns, parts)
            texture.deviation[place] = cells.std(axis=(1, 3))
            texture.palest[place] = cells.min(axis=(1, 3))
    return texture


class Artefacts(NamedTuple):
    """kinds: uint8 (h, w), 0 or the number of a kind; bare_ink: bool (h, w), ink without the texture of tissue."""

    kinds: NDArray[np.uint8]
    bare_ink: Mask


def find_artefacts(thumbnail: NDArray[np.uint8], texture: Texture, tissue: Mask, mpp: float) -> Artefacts:
    """The artefacts in the pixels of a thumbnail.

    thumbnail: uint8 (h, w, 3) at `mpp` um per pixel; tissue: bool (h, w), of `tissue_mask`, which calibrates the rest
    """
    kinds = np.zeros(thumbnail.shape[:2], np.uint8)
    if not thumbnail.size:
        return Artefacts(kinds, kinds > 0)
    density = densities(thumbnail)
    own = _own(density, texture, tissue)
    dark = _darkness(density[1], texture, own, tissue, mpp)
    if is_grey(thumbnail):
        pen = coloured = _grey_pen(density, own, mpp)
    else:
        coloured = _coloured_pen(density, dark, own, mpp)
        cool_or_black = without_small(ink_colours(density)[0], _PEN_UM2 / mpp**2)
        pen = coloured | grown(cool_or_black, _RIM_UM / mpp)
    shadows = _shadows(density, coloured, mpp)
    kinds[_folds(density, dark, own, mpp) & tissue] = FOLD
    kinds[shadows.bubbles] = BUBBLE
    kinds[pen] = PEN
    kinds[grown(shadows.edges, _RIM_UM / mpp)] = COVERSLIP
    return Artefacts(kinds, (kinds == PEN) & own.smooth)


class _Own(NamedTuple):
    """What is usual in the slide's own tissue, and which cells are much smoother."""

    green: float  # median density
    red_to_green: float  # the highest usual ratio of densities
    blue_shares: tuple[float, float]  # the lowest and the highest usual share of the density
    texture_known: bool
    smooth: Mask  # (h, w)
    smoother: Mask  # (h, w), less strictly


def _own(density: NDArray[np.float32], texture: Texture, tissue: Mask) -> _Own:
    red, green, blue = density
    variance = scipy.ndimage.uniform_filter(np.square(texture.deviation), 5, mode="nearest")
    mean = np.maximum(scipy.ndimage.uniform_filter(green, 5, mode="nearest"), 0.05)
    relative = np.sqrt(np.maximum(variance, 0)) / mean
    known = bool(texture.palest.any())
    stained = tissue & (green > _LEAST_STAIN)
    if not stained.any():
        return _Own(np.inf, np.inf, (0.0, 0.0), known, relative < _SMOOTH, relative < _SMOOTH)
    median = float(np.median(relative[stained]))
    textured = stained & (relative >= median / 2)
    blue_share = blue[textured] / density[:, textured].sum(axis=0)
    return _Own(
        float(np.median(green[textured])),
        _usual(red[textured] / green[textured])[1],
        _usual(blue_share),
        known,
        relative < min(_SMOOTH, _SMOOTH_OF_TISSUE * median),
        relative < _SMOOTHER * median,
    )


def _usual(values: Floats) -> tuple[float, float]:
    """Two standard deviations either way by the quartiles, which ink on a quarter of the tissue does not move."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle - 3 * (middle - low)), float(middle + 3 * (high - middle))


def _darkness(green: Floats, texture: Texture, own: _Own, tissue: Mask, mpp: float) -> Floats:
    """How dark the palest spot around a cell is, float32 (h, w), relative to the tissue."""
    side = max(3, round(_SURROUNDINGS_UM / mpp))
    stained = tissue & (green > _LEAST_STAIN)
    share = scipy.ndimage.uniform_filter(stained.astype(np.float32), side, mode="nearest")
    around = scipy.ndimage.uniform_filter(np.where(stained, green, 0), side, mode="nearest") / np.maximum(share, 1e-3)
    usual = np.clip(around, own.green, _DENSEST * own.green)
    darkness: Floats = scipy.ndimage.minimum_filter(texture.palest, 3, mode="nearest") / usual
    return darkness


def _coloured_pen(density: NDArray[np.float32], dark: Floats, own: _Own, mpp: float) -> Mask:
    """Ink of every colour but black, with the blurred edges of its strokes."""
    red, green, blue = density
    whole = red + green + blue
    covering = (blue < (own.blue_shares[0] - _VIOLET_OF_TISSUE) * whole) & (red > _VIOLET_RED * whole)
    covering &= (green > _COVERED * own.green) & (own.smoother | (dark > _DARK))
    cool, warm = _ink_colours(density, own)
    strokes = without_small(cool | covering, _PEN_UM2 / mpp**2) | _partly_smooth(
        without_small(warm, _WARM_UM2 / mpp**2), own
    )
    pale = np.logical_or(*_ink_colours(density / _PALE, own))
    pen = scipy.ndimage.binary_propagation(
        strokes, mask=strokes | pale | (dark > _CONTINUED), structure=np.ones((3, 3))
    )
    return grown(pen, _RIM_UM / mpp)


def _grey_pen(density: NDArray[np.float32], own: _Own, mpp: float) -> Mask:
    """Ink on a slide in grey."""
    return grown(without_small(own.smooth & (density[1] > _GREY_INK_DENSITY), _PEN_UM2 / mpp**2), _RIM_UM / mpp)


def _partly_smooth(strokes: Mask, own: _Own) -> Mask:
    """The strokes that are smooth in a part of their area; all of them where no texture is known."""
    if not own.texture_known:
        return strokes
    labels, count = scipy.ndimage.label(strokes, structure=np.ones((3, 3)))
    smooth = scipy.ndimage.mean(own.smooth, labels, np.arange(count + 1)) >= _WARM_SMOOTH
    smooth[0] = False
    kept: Mask = smooth[labels]
    return kept


def _ink_colours(density: NDArray[np.float32], own: _Own) -> tuple[Mask, Mask]:
    """Where the colour is that of ink: in the second mask of red ink, which blood resembles, in the first of other."""
    red, green, blue = density
    whole = red + green + blue
    excess = np.clip(_COLD_OF_TISSUE * own.red_to_green, *_COLD_RANGE)
    cold = (red > excess * green) & (red > _COLD_DENSITY)
    violet = blue < min(_VIOLET_BLUE, own.blue_shares[0] - _VIOLET_OF_TISSUE) * whole
    violet &= (red > _VIOLET_RED * whole) & (green > _VIOLET_DENSITY)
    yellow = (red < _YELLOW_RED * whole) & (blue > _YELLOW_BLUE * whole) & (blue > _YELLOW_DENSITY)
    purple = (red > _PURPLE_RED * whole) & (green > _SHADOW_GREEN * whole) | (green > _PURPLE_GREEN * whole)
    purple &= own.smooth & (green > _PURPLE_DENSITY)
    warm = (red < _WARM_RED * whole) & (blue > _WARM_BLUE * whole) & (green > _WARM_DENSITY)
    return cold | violet | yellow | purple, warm


def _folds(density: NDArray[np.float32], dark: Floats, own: _Own, mpp: float) -> Mask:
    """Tissue that lies double: in its own colours, which blood absorbs more blue than."""
    alike = density[2] < (own.blue_shares[1] + _VIOLET_OF_TISSUE) * density.sum(axis=0)
    seeds = without_small(alike & (dark > _DARK), _FOLD_UM2 / mpp**2)
    rest = seeds | (alike & (dark > _CONTINUED))
    folds: Mask = scipy.ndimage.binary_dilation(seeds, np.ones((3, 3)), max(1, round(_RIM_UM / mpp)), mask=rest)
    return folds


class _Shadows(NamedTuple):
    edges: Mask
    bubbles: Mask


def _shadows(density: NDArray[np.float32], coloured_pen: Mask, mpp: float) -> _Shadows:
    """Edges of coverslips, which are long and narrow, and bubbles, whose outlines are closed and are filled here.

    The edges of coloured strokes over tissue may be grey, too.
    """
    whole = density.sum(axis=0)
    grey = (density[1] < _SHADOW_GREEN * whole) & (np.ptp(density, axis=0) < _SHADOW_SPREAD * whole)
    labels, _ = scipy.ndimage.label(grey & (whole > 3 * _SHADOW_DENSITY), structure=np.ones((3, 3)))
    edges, bubbles = np.zeros(labels.shape, np.bool_), np.zeros(labels.shape, np.bool_)
    left = _SHADOW_BOXES * labels.size
    for number, place in enumerate(scipy.ndimage.find_objects(labels), 1):
        if max(side.stop - side.start for side in place) * mpp < _SHADOW_UM:
            continue
        piece = labels[place] == number
        left -= piece.size
        if left < 0:
            break
        if coloured_pen[place][piece].mean() > 0.5:
            continue
        filled = scipy.ndimage.binary_fill_holes(piece)
        if (filled.sum() - piece.sum()) * mpp**2 > max(_BUBBLE_UM2, piece.sum() * mpp**2):
            bubbles[place] |= filled
        elif _is_edge(piece, mpp):
            edges[place] |= piece
    return _Shadows(edges, bubbles)


def _is_edge(piece: Mask, mpp: float) -> bool:
    """Whether a piece is long, straight and narrow: by the axes of an ellipse of equal moments."""
    points = np.argwhere(piece)
    if len(points) < 3:
        return False
    short, long = 4 * np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(points.T)), 0)) * mpp
    width = 2 * scipy.ndimage.distance_transform_edt(np.pad(piece, 1)).max() * mpp
    return bool(long > _EDGE_UM and short < _STRAIGHT * long and width < _EDGE_WIDTH_UM)
