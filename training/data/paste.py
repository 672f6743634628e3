"""Copy-paste of nuclei between crops (Ghiasi et al. 2021), which makes crowds and nuclei that touch.

Pasted nuclei lie below those that are there, as in a section of some thickness: no nucleus of the crop loses a pixel.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.model.stain_fit import TISSUE_OD
from training.data.sample import LabelledImage

MOST = 24  # nuclei pasted into a crop
HIDDEN = 0.15  # largest part of a pasted nucleus that may lie below others
BESIDE = 0.75  # share that is pasted beside a nucleus; the others lie anywhere on tissue
LEAST_PX, LARGEST_PX = 40, 4000  # area of the nuclei that are pasted
_EDGE_PX = 1.2  # deviation of the Gaussian that softens a pasted edge: about as sharp as optics show one
_PAD_PX = 4  # of softened edge around a nucleus
_GAINS = (0.6, 1.5)  # of contrast and of light, when colours are matched
_LEAST_CONTRAST = 0.1  # of density, as a distance in three channels, between nuclei and what lies around them
_DENSITY = -np.log((np.arange(256) + 1) / 256)  # natural optical density of a uint8

_TRIES = 5  # of random places

Box = tuple[slice, slice]  # rows, columns


class Nucleus(NamedTuple):
    """A nucleus to paste, with _PAD_PX of its surroundings on all sides."""

    pixels: NDArray[np.uint8]  # (h, w, 3)
    mask: NDArray[np.bool_]  # (h, w)
    around: NDArray[np.bool_]  # (h, w), where the donor has no nucleus
    class_index: int


class Colours(NamedTuple):
    """An affine map of optical densities, row vectors."""

    matrix: NDArray[np.float64]  # (3, 3)
    offset: NDArray[np.float64]  # (3,)
    least: NDArray[np.float64]  # (3,), below which no density falls

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Pixels (h, w, 3) -> the same in these colours, 0 to 255, not rounded."""
        densities = np.maximum(_DENSITY[pixels] @ self.matrix + self.offset, self.least)
        return (256 * np.exp(-densities) - 1).clip(0, 255)


def paste(crop: LabelledImage, donor: LabelledImage, rng: np.random.Generator) -> LabelledImage:
    """The crop with up to MOST nuclei of the donor crop, in colours like those of its own nuclei.

    Law: labels of the crop stay; the new nuclei have the next numbers, are of one part each (4-connected), and their
    classes follow in class_index. A crop without nuclei, whose colours they would need, stays as it is.
    """
    colours = _matching_colours(crop, donor)
    if colours is None:
        return crop
    crop = crop._replace(image=crop.image.copy(), labels=crop.labels.copy())
    boxes = [box for box in ndimage.find_objects(crop.labels) if box is not None]
    classes = crop.class_index.tolist()
    for nucleus in _whole_nuclei(donor, int(rng.integers(1, MOST + 1)), rng):
        place = _place(nucleus.mask, crop, boxes, rng)
        if place is None:
            continue
        free = crop.labels[place] == 0
        visible = nucleus.mask & free
        _blend(crop.image[place], colours.of(nucleus.pixels), visible, free & nucleus.around)
        classes.append(nucleus.class_index)
        crop.labels[place][visible] = len(classes)
        boxes.append(place)
    return crop._replace(class_index=np.array(classes, np.int64))


def _matching_colours(crop: LabelledImage, donor: LabelledImage) -> Colours | None:
    """Colours in which the donor's nuclei, and what lies around them, look like the crop's on the mean.

    None where one of both has no nuclei, or nothing around them.
    """
    wanted, given = _mean_densities(crop), _mean_densities(donor)
    if wanted is None or given is None:
        return None
    contrast, contrast_to = given[0] - given[1], wanted[0] - wanted[1]
    length = max(float(np.linalg.norm(contrast)), _LEAST_CONTRAST)
    length_to = max(float(np.linalg.norm(contrast_to)), _LEAST_CONTRAST)
    contrast_to *= np.clip(length_to, _GAINS[0] * length, _GAINS[1] * length) / length_to
    # along the contrast of the donor, densities are mapped to that of the crop; across it, their variation is kept
    matrix = np.eye(3) + np.outer(contrast, contrast_to - contrast) / length**2
    return Colours(matrix, wanted[0] - given[0] @ matrix, wanted.min(0))


def _mean_densities(crop: LabelledImage) -> NDArray[np.float64] | None:
    """Optical densities (2, 3): of the nuclei, and of what lies around them."""
    inside = crop.labels > 0
    around = ndimage.maximum_filter(inside, 2 * _PAD_PX + 1) & ~inside
    parts = [crop.image[inside], crop.image[around]]  # (n, 3) each
    if min(map(len, parts)) < LEAST_PX:
        return None
    counts = [[np.bincount(channel, minlength=256) for channel in part.T] for part in parts]
    means: NDArray[np.float64] = np.array(counts) @ _DENSITY / [[len(part)] for part in parts]
    return means


def _whole_nuclei(donor: LabelledImage, most: int, rng: np.random.Generator) -> Iterator[Nucleus]:
    """Up to `most` nuclei of one part that lie inside the donor with their surroundings, in random order."""
    boxes = dict(enumerate(ndimage.find_objects(donor.labels), 1))
    present = [number for number, box in boxes.items() if box is not None]
    for number in rng.permutation(present).tolist():
        rows, columns = (slice(s.start - _PAD_PX, s.stop + _PAD_PX) for s in boxes[number])
        if min(rows.start, columns.start) < 0 or max(rows.stop, columns.stop) > len(donor.labels):
            continue
        labels = donor.labels[rows, columns]
        mask = labels == number
        if LEAST_PX <= mask.sum() <= LARGEST_PX and ndimage.label(mask)[1] == 1:
            yield Nucleus(donor.image[rows, columns], mask, labels == 0, int(donor.class_index[number - 1]))
            most -= 1
        if not most:
            return


def _place(mask: NDArray[np.bool_], crop: LabelledImage, boxes: Sequence[Box], rng: np.random.Generator) -> Box | None:
    """Where in the crop a nucleus comes to lie on tissue, almost free and in one part; None where it cannot."""
    side, area, least = len(crop.labels), mask.sum(), 1 - rng.uniform(0, HIDDEN)
    if rng.random() < BESIDE:
        corners = _outwards(boxes[int(rng.integers(len(boxes)))], mask.shape, rng)
    else:
        corners = rng.integers(0, [max(1, side - n + 1) for n in mask.shape], (_TRIES, 2))
    for y, x in corners:
        place = (slice(int(y), int(y) + mask.shape[0]), slice(int(x), int(x) + mask.shape[1]))
        if min(y, x) < 0 or max(place[0].stop, place[1].stop) > side:
            continue
        visible = mask & (crop.labels[place] == 0)
        if visible.sum() < least * area or ndimage.label(visible)[1] != 1:
            continue
        if _DENSITY[crop.image[place][visible]].mean() > TISSUE_OD:
            return place
    return None


def _outwards(box: Box, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
    """Corners (n, 2), y x, of places for an array of `shape` on a ray from the middle of a nucleus: the first that is
    free is where both touch."""
    angle = rng.uniform(0, 2 * math.pi)
    distances = np.arange(4, max(s.stop - s.start for s in box) / 2 + max(shape) / 2 + 8, 1.5)
    middle = np.array([(s.start + s.stop - n) / 2 for s, n in zip(box, shape, strict=True)])
    corners: NDArray[np.int64] = (middle + distances[:, None] * (math.sin(angle), math.cos(angle))).round().astype(int)
    return corners


def _blend(
    image: NDArray[np.uint8], nucleus: NDArray[np.float64], visible: NDArray[np.bool_], free: NDArray[np.bool_]
) -> None:
    """Paint the visible part of a nucleus into an image (h, w, 3), in place, with a soft edge.

    free: (h, w), where neither the image nor the donor has a nucleus. Towards its outline, the nucleus takes the
    light of its new background in place of the old one's, so that no rim of that remains.
    """
    mask = visible.astype(np.float32)
    share, inner = (ndimage.gaussian_filter(mask, deviation)[..., None] for deviation in (_EDGE_PX, 2 * _EDGE_PX))
    if free.any():
        change = (image[free].mean(0) + 1) / (nucleus[free].mean(0) + 1)
        nucleus = nucleus * change.clip(*_GAINS) ** (1 - inner)
    image[:] = (image + share * (nucleus - image)).round().clip(0, 255).astype(np.uint8)
