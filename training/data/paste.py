"""Copy-paste of nuclei between crops (Ghiasi et al. 2021), which makes crowds and nuclei that touch.

Pasted nuclei lie below those that are there, as in a section of some thickness: no nucleus of the crop loses a pixel.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.data.sample import LabelledImage

MOST = 24  # nuclei pasted into a crop
HIDDEN = 0.15  # largest part of a pasted nucleus that may lie below others
BESIDE = 0.75  # share that is pasted beside a nucleus; the others lie anywhere on tissue
LEAST_PX, LARGEST_PX = 40, 4000  # area of the nuclei that are pasted
_EDGE_PX = 1.2  # deviation of the Gaussian that softens a pasted edge: about as sharp as optics show one
_PAD_PX = 4  # of softened edge around a nucleus
_TISSUE_OD = 0.15  # as in the fitting of stains
_GAINS = (0.6, 1.5)  # of contrast, when colours are matched
_LEAST_CONTRAST = 0.05  # of density between nuclei and what lies around them
_DENSITY = -np.log((np.arange(256) + 1) / 256)  # natural optical density of a uint8

_TRIES = 5  # of random places

Box = tuple[slice, slice]  # rows, columns


class Nucleus(NamedTuple):
    """A nucleus to paste, with _PAD_PX of its surroundings on all sides."""

    pixels: NDArray[np.uint8]  # (h, w, 3)
    mask: NDArray[np.bool_]  # (h, w)
    around: NDArray[np.bool_]  # (h, w), where the donor has no nucleus
    class_index: int


def paste(crop: LabelledImage, donor: LabelledImage, rng: np.random.Generator) -> LabelledImage:
    """The crop with up to MOST nuclei of the donor crop, in colours like those of its own nuclei.

    Law: labels of the crop stay; the new nuclei have the next numbers, are of one part each (4-connected), and their
    classes follow in class_index. A crop without nuclei, whose colours they would need, stays as it is.
    """
    table = _matching_colours(crop, donor)
    if table is None:
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
        _blend(crop.image[place], table[range(3), nucleus.pixels], visible, free & nucleus.around)
        classes.append(nucleus.class_index)
        crop.labels[place][visible] = len(classes)
        boxes.append(place)
    return crop._replace(class_index=np.array(classes, np.int64))


def _matching_colours(crop: LabelledImage, donor: LabelledImage) -> NDArray[np.float32] | None:
    """Values (3, 256) for the donor's, by channel: the mean densities of its nuclei, and of what lies around them,
    become those of the crop's. Nothing gets brighter than what lies around the crop's nuclei.

    None where one of them has no nuclei, or nothing around them.
    """
    wanted, given = _mean_densities(crop), _mean_densities(donor)
    if wanted is None or given is None:
        return None
    (nuclei_to, around_to), (nuclei, around) = wanted, given
    contrast = np.maximum(nuclei - around, _LEAST_CONTRAST)
    gain = ((nuclei_to - around_to) / contrast).clip(*_GAINS)
    density = gain[:, None] * (_DENSITY - nuclei[:, None]) + nuclei_to[:, None]
    density = np.maximum(density, np.minimum(nuclei_to, around_to)[:, None])
    values: NDArray[np.float32] = (256 * np.exp(-density) - 1).clip(0, 255).astype(np.float32)
    return values


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
    """Where in the crop a nucleus comes to lie on tissue, almost free and in one part; None where no place was seen."""
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
        if _DENSITY[crop.image[place][visible]].mean() > _TISSUE_OD:
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
    image: NDArray[np.uint8], nucleus: NDArray[np.float32], visible: NDArray[np.bool_], free: NDArray[np.bool_]
) -> None:
    """Paint the visible part of a nucleus into an image (h, w, 3), in place, with a soft edge.

    free: (h, w), where neither the image nor the donor has a nucleus. Towards its outline, the nucleus is shifted by
    the difference of the backgrounds there, so that no rim of its old background remains.
    """
    mask = visible.astype(np.float32)
    share, inner = (ndimage.gaussian_filter(mask, deviation)[..., None] for deviation in (_EDGE_PX, 2 * _EDGE_PX))
    if free.any():
        nucleus = nucleus + (1 - inner) * (image[free].mean(0) - nucleus[free].mean(0))
    image[:] = (image + share * (nucleus - image)).round().clip(0, 255).astype(np.uint8)
