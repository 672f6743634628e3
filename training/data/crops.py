"""Training crops with their targets, each determined by the seed and its number alone."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.errors import StainError
from pipeline.model.stain import FittedStain, Normalisation, Normaliser, fit
from training.config import Training
from training.data import augment
from training.data.datasets import Annotated, Pixels

EDGE_PX = 3  # of the crop: two at the working scale
MIN_AREA_PX = 24  # specks, and slivers at the crop's edge, teach nothing


class Crop(NamedTuple):
    """image: float32 (3, S, S) in 0..1 at the crop's size; targets in the same pixels."""

    image: Tensor
    boxes: Tensor  # float32 (N, 4)
    labels: Tensor  # int64 (N,), 1-based
    masks: Tensor  # uint8 (N, S, S)
    regions: Tensor  # uint8 (S, S): 0 background, 1 inside a nucleus, 2 its edge


class Member(NamedTuple):
    """A training image, read, with its stain if it has one that can be told."""

    pixels: Pixels
    mpp: float
    stain: FittedStain | None


class Crops(Dataset[Crop]):
    """An endless deck: crop number i is the same in every process and after every resume.

    A set is drawn in proportion to the root of its nuclei, so that a large one leads and a small one is
    still seen; then evenly a group (organ, patient), then evenly one of its images.
    side, mpp: of the crops as the network sees them
    """

    def __init__(self, sets: Sequence[Sequence[Annotated]], side: int, mpp: float, training: Training) -> None:
        self.side, self.mpp, self.training = side, mpp, training
        self.sets: list[list[list[Member]]] = []  # set -> group -> image
        for images in sets:
            groups: dict[str, list[Member]] = {}
            for annotated in images:
                groups.setdefault(annotated.group, []).append(_member(annotated, training))
            self.sets.append(list(groups.values()))
        roots = np.sqrt([sum(len(m.pixels.kinds) for g in groups for m in g) for groups in self.sets])
        self.chances = roots / roots.sum()

    def __getitem__(self, number: int) -> Crop:
        rng = np.random.default_rng((self.training.seed, number))
        member = self._draw(rng)
        pixels = member.pixels
        zoom, strength = member.mpp / self.mpp, self.training.strength
        image, labels = augment.crop(pixels.image, pixels.labels, zoom, self.side, strength, rng)
        if self.training.normalise and rng.random() < self.training.normalise:
            image = _restain(image, member.stain, self._draw(rng).stain)
        image = augment.recolour(image, strength, rng)
        light = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
        kinds = pixels.kinds if self.training.by_class else np.ones_like(pixels.kinds)
        return Crop(light, *targets(labels, kinds), torch.from_numpy(regions(labels)))

    def _draw(self, rng: np.random.Generator) -> Member:
        groups = self.sets[int(rng.choice(len(self.sets), p=self.chances))]
        group = groups[int(rng.integers(len(groups)))]
        return group[int(rng.integers(len(group)))]


def _member(annotated: Annotated, training: Training) -> Member:
    pixels, found = annotated.read(), None
    if training.normalise:
        # an image without enough stained tissue has no stain, and is then left as it is
        with contextlib.suppress(StainError):
            found = fit(pixels.image[None], np.ones((1, *pixels.labels.shape), bool), "reinhard")
    return Member(pixels, annotated.mpp, found)


def _restain(image: NDArray[np.uint8], source: FittedStain | None, target: FittedStain | None) -> NDArray[np.uint8]:
    if source is None or target is None:
        return image
    light = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255
    normaliser = Normaliser(Normalisation(source, target))
    moved: NDArray[np.uint8] = (normaliser(light)[0] * 255).round().byte().numpy()
    return np.ascontiguousarray(moved.transpose(1, 2, 0))


def targets(labels: NDArray[np.int32], kinds: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Instance map (S, S) -> boxes (N, 4), labels (N,), masks (N, S, S); N may be 0. kinds[i - 1] is the class of i."""
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    ids = ids[areas >= MIN_AREA_PX]
    masks = labels[None] == ids[:, None, None]  # (N, S, S)
    columns, rows = masks.any(1), masks.any(2)  # (N, S) each
    side = labels.shape[0]
    boxes = np.stack(
        [columns.argmax(1), rows.argmax(1), side - columns[:, ::-1].argmax(1), side - rows[:, ::-1].argmax(1)], 1
    )
    return (
        torch.from_numpy(boxes.astype(np.float32)).reshape(-1, 4),
        torch.from_numpy(kinds[ids - 1]),
        torch.from_numpy(masks.astype(np.uint8)),
    )


def regions(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Instance map (S, S) -> 0 background, 1 inside a nucleus, 2 within EDGE_PX of another nucleus or background."""
    width = 2 * EDGE_PX + 1
    edge = ndimage.maximum_filter(labels, width) != ndimage.minimum_filter(labels, width)
    found: NDArray[np.uint8] = (labels > 0).astype(np.uint8)
    found[(labels > 0) & edge] = 2
    return found
