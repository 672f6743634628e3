"""A synthetic H&E slide whose nuclei are known exactly: the demo's slide and the tests' truth.

Densities of the two stains are painted, then imaged: Beer-Lambert in optical density (Ruifrok and
Johnston, Anal Quant Cytol Histol 23:291, 2001), the blur of the optics, the noise of the camera. One pixel is
meant to be 0.25 um; all lengths in here are slide px unless they say um.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from slides.geometry import Box, Size

Field = NDArray[np.float32]

_MPP = 0.25

# Coarse fields (tissue, nests, lumens) are made at one pixel in 8.
_COARSE = 8

# Natural optical density of one unit of stain in red, green, blue: near Ruifrok's haematoxylin, and an eosin
# that absorbs blue too, as measured inside and outside the nuclei of public H&E images.
_HAEMATOXYLIN = (0.62, 0.74, 0.4)
_EOSIN = (0.22, 0.82, 0.46)
_PEN = (1.9, 1.3, 0.35)
_GLASS = (243.0, 242.0, 245.0)

# Standard deviations: the optics, slide px; the camera, grey levels.
_BLUR, _NOISE = 0.75, 1.6

# Side of the periodic textures, from which every fine structure is taken.
_TEXTURE = 1024

# Side of a stored tile.
_TILE = 256

_VERTICES = 64


class Phantom(NamedTuple):
    """A picture of a slide and its truth.

    image: uint8 (h, w, 3); labels: int32 (h, w), 0 is no nucleus; polygons: float64 (n, 2) slide px each,
    open rings, polygon i outlines label i + 1.
    Laws: the same size and seed give the same phantom; a pixel has a label exactly when its centre lies in
    that label's polygon, to a tenth of a pixel (the outline's chords); nuclei touch but never overlap.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int32]
    polygons: tuple[NDArray[np.float64], ...]


class _Kind(NamedTuple):
    """Appearance of one type of nucleus. Pairs are ranges; lengths in um."""

    length: tuple[float, float]  # the long diameter
    aspect: tuple[float, float]  # short over long
    bend: float  # sag of the long axis, in half-lengths
    wobble: float  # irregularity of the outline, in radii
    lobes: float  # depth of a waist, in radii
    stain: tuple[float, float]  # haematoxylin
    hollow: float  # how much paler the inside is than the rim
    grain: float  # contrast of the chromatin
    nucleoli: int  # at most


_EPITHELIAL = _Kind((7.0, 12.0), (0.62, 0.95), 0.08, 0.035, 0.0, (0.85, 1.5), 0.42, 0.26, 2)
_LARGE = _Kind((11.0, 14.0), (0.65, 0.9), 0.1, 0.05, 0.0, (0.8, 1.3), 0.45, 0.28, 3)
_LYMPHOCYTE = _Kind((4.6, 6.6), (0.8, 1.0), 0.0, 0.03, 0.0, (1.5, 2.1), 0.06, 0.22, 0)
_SPINDLE = _Kind((8.0, 14.0), (0.24, 0.42), 0.35, 0.04, 0.0, (1.1, 1.8), 0.12, 0.2, 0)
_LOBED = _Kind((6.5, 8.5), (0.5, 0.65), 0.3, 0.03, 0.28, (1.5, 2.1), 0.05, 0.15, 0)


class _Scene(NamedTuple):
    """Where is what, in coarse fields (h / 8, w / 8). Fibres run along the level lines of `across`."""

    tissue: NDArray[np.bool_]
    nest: NDArray[np.bool_]
    lumen: NDArray[np.bool_]
    across: Field
    along: Field


class _Nucleus(NamedTuple):
    """A placed nucleus: the box it was computed in, the radius there in units of its outline, what it is."""

    box: Box
    rho: Field
    radius: float
    kind: _Kind
    outline: NDArray[np.float64]


def draw(size: Size, seed: int) -> Phantom:
    """Draw a section on glass: nests of epithelium with lumens, fibrous stroma, lymphocytes, a pen mark.

    size: px at 0.25 um, 256 x 256 at least for anything to be there. 4000 x 3000 takes a few seconds.
    """
    size = Size(*size)
    rng = np.random.default_rng(seed)
    scene = _scene(size, rng)
    nuclei, labels = _place(scene, size, rng)
    haematoxylin, eosin = _background(scene, labels, rng)
    _paint(nuclei, haematoxylin, eosin, rng)
    pen = _pen(size, rng)
    return Phantom(_photograph(haematoxylin, eosin, pen, rng), labels, tuple(nucleus.outline for nucleus in nuclei))


def write(path: Path, phantom: Phantom, mpp: float = _MPP) -> None:
    """Write the picture as a tiled pyramidal TIFF (deflate, 256 px tiles, levels by 4) that OpenSlide opens.

    mpp: micrometres per pixel, stated in the resolution tags.
    """
    image = Image.fromarray(phantom.image)
    per_cm = 1e4 / mpp
    factor = 1
    with tifffile.TiffWriter(path) as tiff:
        while factor == 1 or max(image.size) / factor >= _TILE:
            tiff.write(
                np.asarray(image.reduce(factor)),
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="adobe_deflate",
                predictor=True,
                resolution=(per_cm / factor, per_cm / factor),
                resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1),
                metadata=None,
            )
            factor *= 4


def _scene(size: Size, rng: Generator) -> _Scene:
    """Lay out tissue, nests, lumens and the run of the fibres."""
    shape = -(-size.height // _COARSE), -(-size.width // _COARSE)
    v, u = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    ragged = 0.25 * _noise(shape, min(shape) / 2.5, rng) + 0.05 * _noise(shape, 9, rng)
    tissue = 1 - np.abs(u / 0.88) ** 2.6 - np.abs(v / 0.88) ** 2.6 + ragged > 0
    nest = tissue & (_noise(shape, 55, rng) + 0.4 * _noise(shape, 22, rng) > 0.1)
    deep = ndimage.binary_erosion(nest, iterations=4)
    lumen = (deep & (_noise(shape, 17, rng) > 1.35)) | (tissue & (_noise(shape, 24, rng) > 2.0))
    turn = rng.uniform(0, np.pi)
    y, x = np.indices(shape, np.float32) * _COARSE
    across = x * np.cos(turn) + y * np.sin(turn) + 110 * _noise(shape, 90, rng) + 14 * _noise(shape, 22, rng)
    along = y * np.cos(turn) - x * np.sin(turn) + 110 * _noise(shape, 90, rng)
    return _Scene(tissue, nest, lumen, across.astype(np.float32), along.astype(np.float32))


def _noise(shape: tuple[int, int], wavelength: float, rng: Generator) -> Field:
    """Smooth noise of mean 0 and deviation 1, float32, about `wavelength` pixels from hill to hill."""
    rows, cols = (int(side / wavelength * 2) + 3 for side in shape)
    seed = Image.fromarray(rng.standard_normal((rows, cols), np.float32))
    # The grid hangs over, so that it need not fit.
    window = (1, 1, 1 + shape[1] / wavelength * 2, 1 + shape[0] / wavelength * 2)
    smooth = np.asarray(seed.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=window))
    return smooth * np.float32(1 / 0.72)


def _texture(sigma: tuple[float, float], rng: Generator) -> Field:
    """Periodic noise (1024, 1024) of mean 0 and deviation 1, smoothed by `sigma` down and across."""
    grains = rng.standard_normal((_TEXTURE, _TEXTURE), np.float32)
    smooth = ndimage.gaussian_filter(grains, sigma, mode="wrap")
    texture: Field = smooth / smooth.std()
    return texture


def _spread(texture: Field, shape: tuple[int, int]) -> Field:
    """A periodic texture over a whole slide."""
    rows, cols = (np.arange(side) % _TEXTURE for side in shape)
    return texture[np.ix_(rows, cols)]


def _fine(coarse: NDArray[np.float32] | NDArray[np.bool_], shape: tuple[int, int]) -> Field:
    """A coarse field at slide px, float32, interpolated."""
    image = Image.fromarray(coarse.astype(np.float32))
    window = (0, 0, shape[1] / _COARSE, shape[0] / _COARSE)
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=window))


def _soft(where: NDArray[np.bool_], ragged: Field, sharpness: float) -> Field:
    """A coarse region at slide px: 1 inside, 0 outside, its border displaced by `ragged`."""
    return np.clip((_fine(where, ragged.shape) - 0.5 + 0.16 * ragged) * sharpness + 0.5, 0, 1)


class _Site(NamedTuple):
    """Where a nucleus may go. crowded: it is pushed away from here until it only touches the others."""

    x: float
    y: float
    kind: _Kind
    angle: float
    crowded: bool = False


def _sites(scene: _Scene, size: Size, rng: Generator) -> Iterator[_Site]:
    """Places for nuclei: cells side by side in the nests, scattered cells and clumps in the stroma."""
    spacing = 40.0
    for row in range(int(size.height / (spacing * 0.87))):
        for col in range(int(size.width / spacing)):
            x, y = np.array([col + 0.5 * (row % 2), row * 0.87]) * spacing + rng.normal(0, 5.5, 2)
            if _at(scene.nest, x, y) and rng.random() < 0.88:
                yield _Site(x, y, _LARGE if rng.random() < 0.07 else _EPITHELIAL, rng.uniform(0, np.pi))
    fibres = np.arctan2(np.gradient(scene.across, axis=1), -np.gradient(scene.across, axis=0))
    stroma = scene.tissue & ~scene.nest & ~scene.lumen
    places = np.argwhere(stroma)
    if not len(places):
        return
    area = len(places) * _COARSE**2
    kinds = (_SPINDLE, _LYMPHOCYTE, _EPITHELIAL, _LOBED)
    for i in rng.integers(len(places), size=area // 3000):
        y, x = (places[i] + rng.random(2)) * _COARSE
        kind = kinds[rng.choice(4, p=(0.62, 0.27, 0.07, 0.04))]
        angle = fibres[tuple(places[i])] + rng.normal(0, 0.25)
        yield _Site(x, y, kind, angle)
    for i in rng.integers(len(places), size=area // 90_000 + 1):
        y, x = (places[i] + rng.random(2)) * _COARSE
        for _ in range(rng.integers(3, 14)):
            yield _Site(x, y, _LYMPHOCYTE, rng.uniform(0, np.pi), crowded=True)


def _at(where: NDArray[np.bool_], x: float, y: float) -> bool:
    """Whether a coarse region holds a point (slide px)."""
    row, col = int(y // _COARSE), int(x // _COARSE)
    return 0 <= row < where.shape[0] and 0 <= col < where.shape[1] and bool(where[row, col])


def _place(scene: _Scene, size: Size, rng: Generator) -> tuple[list[_Nucleus], NDArray[np.int32]]:
    """Nuclei at the sites where there is room, and their label map."""
    labels = np.zeros((size.height, size.width), np.int32)
    solid = ndimage.binary_erosion(scene.tissue & ~scene.lumen, iterations=2)
    nuclei: list[_Nucleus] = []
    for site in _sites(scene, size, rng):
        heading = rng.uniform(0, 2 * np.pi)
        shape = _shape(site, rng)
        for step in range(30 if site.crowded else 1):
            x, y = site.x + 2.5 * step * np.cos(heading), site.y + 2.5 * step * np.sin(heading)
            nucleus = shape(x, y)
            if not all(_at(solid, *point) for point in nucleus.outline[::4]):
                break
            region = labels[nucleus.box.within((0, 0))]
            inside = nucleus.rho <= 1
            if nucleus.rho.shape == region.shape and inside.any() and not region[inside].any():
                nuclei.append(nucleus)
                region[inside] = len(nuclei)
                break
    return nuclei, labels


def _shape(site: _Site, rng: Generator) -> Callable[[float, float], _Nucleus]:
    """Draw the random shape of one nucleus; the function returned computes it around any centre (slide px).

    In its own frame a nucleus is an ellipse of half-lengths (a, b) whose radius varies with the angle, with a
    waist, and whose long axis sags: both directions are closed formulae, so outline and pixels agree.
    """
    kind = site.kind
    a = rng.uniform(*kind.length) / _MPP / 2
    b = a * rng.uniform(*kind.aspect)
    theta = np.arange(_VERTICES) * (2 * np.pi / _VERTICES)
    waves = sum(rng.normal() * 2 / k * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    radius = np.clip(1 + kind.wobble * waves, 0.7, 1.3) - kind.lobes * rng.random() * np.sin(theta) ** 6
    sag = kind.bend * a * rng.uniform(-1, 1)
    cos, sin = np.cos(site.angle), np.sin(site.angle)
    p = a * radius * np.cos(theta)
    q = b * radius * np.sin(theta) + sag * (p / a) ** 2
    ring = np.stack([p * cos - q * sin, p * sin + q * cos], axis=1)

    def around(x: float, y: float) -> _Nucleus:
        outline = ring + np.array((x, y))
        (x0, y0), (x1, y1) = np.floor(outline.min(axis=0)) - 4, np.ceil(outline.max(axis=0)) + 4
        box = Box(int(x0), int(y0), int(x1), int(y1))
        dx = np.arange(box.x0, box.x1) + 0.5 - x
        dy = (np.arange(box.y0, box.y1) + 0.5 - y)[:, None]
        along = (dx * cos + dy * sin) / a
        across = (dy * cos - dx * sin - sag * along**2) / b
        angle = np.arctan2(across, along)
        rho = np.hypot(along, across) / np.interp(angle, theta, radius, period=2 * np.pi)
        return _Nucleus(box, rho.astype(np.float32), float(np.sqrt(a * b)), kind, outline)

    return around


def _background(scene: _Scene, labels: NDArray[np.int32], rng: Generator) -> tuple[Field, Field]:
    """Haematoxylin and eosin of everything but the nuclei, float32 (h, w) each."""
    shape = labels.shape
    # Held below the strength at which it would tear scraps off the tissue.
    ragged = np.clip(_spread(_texture((3.5, 3.5), rng), shape) + _noise(shape, 45, rng), -2.5, 2.5)
    grain = _spread(_texture((1.3, 1.3), rng), shape)
    fibres = _fibres(scene, shape, rng)
    slow, slower = _noise(shape, 260, rng), _noise(shape, 900, rng)
    nest = _soft(scene.nest, ragged, 3)
    solid = _soft(scene.tissue & ~scene.lumen, ragged, 6)
    border, halo = _cells(labels, rng)
    # Bundles of collagen, split by pale clefts.
    clefts = 1 / (1 + np.exp(6 * (fibres + 1.1 + 0.35 * slow)))
    stroma = (0.78 + 0.17 * fibres + 0.07 * grain) * (1 - 0.75 * clefts)
    cytoplasm = 0.66 + 0.09 * grain + 0.1 * slow
    # Where cells have shrunk apart their borders are pale, elsewhere they are drawn.
    shrunk = np.clip(slower + 0.4 * slow, -0.3, 1)
    edges = 1 - 0.85 * border * shrunk
    eosin = (nest * cytoplasm * edges + (1 - nest) * stroma) * (1 + 0.1 * slower)
    haematoxylin = nest * (0.3 + 0.07 * grain + 0.08 * slow) * edges + (1 - nest) * (0.12 + 0.04 * fibres)
    keep = solid * (1 - halo)
    return np.maximum(haematoxylin, 0) * keep, np.maximum(eosin, 0) * keep


def _fibres(scene: _Scene, shape: tuple[int, int], rng: Generator) -> Field:
    """Fibres of several widths along the level lines of the scene, mean 0 and deviation about 1."""
    across, along = _fine(scene.across, shape), _fine(scene.along, shape)
    rows, cols = (across).astype(np.int32), (along * 0.5).astype(np.int32)
    texture = 0.75 * _texture((5.0, 22.0), rng) + 0.65 * _texture((1.7, 14.0), rng)
    return texture[rows % _TEXTURE, cols % _TEXTURE]


def _cells(labels: NDArray[np.int32], rng: Generator) -> tuple[Field, Field]:
    """Borders between cells, and pale halos around some nuclei: float32 (h, w) in 0..1.

    A cell is all that is nearer to its nucleus than to another, computed at a quarter of the size.
    """
    small = labels[::4, ::4]
    distance, nearest = ndimage.distance_transform_edt(small == 0, return_indices=True)
    owner = small[tuple(nearest)]
    border = np.zeros(owner.shape, np.float32)
    border[:, 1:] = owner[:, 1:] != owner[:, :-1]
    border[1:] = np.maximum(border[1:], owner[1:] != owner[:-1])
    border[distance > 12] = 0
    border = np.minimum(1.6 * ndimage.gaussian_filter(border, 0.6), 1)
    strength = np.clip(rng.normal(0.05, 0.3, int(labels.max(initial=0)) + 1), 0, 0.8)
    halo = strength[owner] * np.clip(1.8 - distance / 2, 0, 1) * (small == 0)
    size = (labels.shape[1], labels.shape[0])
    coarse = (Image.fromarray(field.astype(np.float32)) for field in (border, halo))
    wide = (np.clip(np.asarray(field.resize(size, Image.Resampling.BICUBIC)), 0, 1) for field in coarse)
    return next(wide), next(wide)


def _paint(nuclei: list[_Nucleus], haematoxylin: Field, eosin: Field, rng: Generator) -> None:
    """Lay the nuclei over the background, in place."""
    chromatin = 0.7 * _texture((2.6, 2.6), rng) + 0.7 * _texture((1.2, 1.2), rng)
    for nucleus in nuclei:
        kind, rho = nucleus.kind, nucleus.rho
        height, width = rho.shape
        y, x = rng.integers(0, _TEXTURE - 128, 2)
        grain = chromatin[y : y + height, x : x + width]
        stain = rng.uniform(*kind.stain)
        # Paler inside, a darker membrane at the rim, chromatin clumped all over.
        rim = np.clip((rho - 0.62) / 0.26, 0, 1)
        density = stain * (1 - kind.hollow * rng.uniform(0.4, 1) * (1 - rim) + kind.grain * grain)
        for _ in range(rng.integers(0, kind.nucleoli + 1)):
            density += 0.5 * stain * _spot(nucleus, rng)
        # How far out of focus it lies, px.
        softness = rng.uniform(0.7, 2.2)
        cover = np.clip((1 - rho) * nucleus.radius / softness + 0.5, 0, 1)
        place = nucleus.box.within((0, 0))
        haematoxylin[place] += cover * (np.maximum(density, 0.15) - haematoxylin[place])
        eosin[place] += cover * (rng.uniform(0.45, 0.85) - eosin[place])


def _spot(nucleus: _Nucleus, rng: Generator) -> Field:
    """A nucleolus somewhere in the inner half of a nucleus, over its box."""
    rows, cols = np.nonzero(nucleus.rho < 0.5)
    i = rng.integers(len(rows))
    y, x = np.indices(nucleus.rho.shape)
    distance2 = (y - rows[i]) ** 2 + (x - cols[i]) ** 2
    spot: Field = np.exp(-distance2 / (2 * rng.uniform(1.2, 2.4) ** 2)).astype(np.float32)
    return spot


def _pen(size: Size, rng: Generator) -> Field:
    """A stroke of a felt pen across the lower right corner of the glass: how much ink, float32 (h, w)."""
    t = np.linspace(0, 1, 200)[:, None]
    bezier = (1 - t) ** 2 * (0.84, 1.02) + 2 * t * (1 - t) * (0.985, 0.985) + t**2 * (1.01, 0.8)
    stroke = np.ones((-(-size.height // _COARSE), -(-size.width // _COARSE)), np.bool_)
    col, row = (bezier * (size.width / _COARSE, size.height / _COARSE)).astype(np.int64).T
    inside = (row < stroke.shape[0]) & (col < stroke.shape[1])
    stroke[row[inside], col[inside]] = False
    half_width = 0.028 * min(size) / _COARSE
    ink = np.clip((half_width - ndimage.distance_transform_edt(stroke)) * 0.6, 0, 1).astype(np.float32)
    return _fine(ink * (1 + 0.12 * _noise(ink.shape, 12, rng)), (size.height, size.width))


def _photograph(haematoxylin: Field, eosin: Field, pen: Field, rng: Generator) -> NDArray[np.uint8]:
    """Densities -> uint8 (h, w, 3): I = I0 exp(-sum of stain times its density), blurred, with noise."""
    shape = haematoxylin.shape
    fade = 1 + 0.08 * _noise(shape, 1200, rng)
    stains = [ndimage.gaussian_filter(stain * fade, _BLUR) for stain in (haematoxylin, eosin)]
    # Stain vectors vary between slides.
    vectors = [np.array(vector) * rng.normal(1, 0.05, 3) for vector in (_HAEMATOXYLIN, _EOSIN)]
    image = np.empty((*shape, 3), np.uint8)
    for channel in range(3):
        density = pen * np.float32(_PEN[channel])
        for stain, vector in zip(stains, vectors, strict=True):
            density += stain * np.float32(vector[channel])
        light = np.exp(-density) * np.float32(_GLASS[channel])
        light += np.float32(_NOISE) * rng.standard_normal(shape, np.float32)
        image[..., channel] = np.clip(light + 0.5, 0, 255)
    return image
