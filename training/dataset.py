"""Training crops with their targets, each determined by the seed and its number alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from training import augment
from training.annotations import Annotated, read_image, read_labels

MIN_AREA_PX = 24  # specks, and slivers at the crop's edge, teach nothing


class Crop(NamedTuple):
    """image: float32 (3, S, S) in 0..1 at the crop's size; targets in the same pixels."""

    image: Tensor
    boxes: Tensor  # float32 (N, 4)
    labels: Tensor  # int64 (N,), 1-based
    masks: Tensor  # uint8 (N, S, S)


class Crops(Dataset[Crop]):
    """An endless deck: crop number i is the same in every process and after every resume.

    Sets are drawn evenly, then images evenly within a set, whatever their number and size.
    """

    def __init__(self, sets: Sequence[Sequence[Annotated]], side: int, mpp: float, strength: float, seed: int) -> None:
        self.sets = [[(read_image(a), read_labels(a), a.mpp) for a in annotated] for annotated in sets]
        self.side, self.mpp, self.strength, self.seed = side, mpp, strength, seed

    def __getitem__(self, number: int) -> Crop:
        rng = np.random.default_rng((self.seed, number))
        members = self.sets[int(rng.integers(len(self.sets)))]
        image, labels, mpp = members[int(rng.integers(len(members)))]
        image, labels = augment.crop(image, labels, mpp / self.mpp, self.side, rng)
        image = augment.recolour(image, self.strength, rng)
        return Crop(torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255, *targets(labels))


def targets(labels: NDArray[np.int32]) -> tuple[Tensor, Tensor, Tensor]:
    """Instance map (S, S) -> boxes (N, 4), labels (N,), masks (N, S, S); N may be 0."""
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    ids = ids[areas >= MIN_AREA_PX]
    masks = labels[None] == ids[:, None, None]  # (N, S, S)
    columns, rows = masks.any(1), masks.any(2)  # (N, S) each
    side = labels.shape[0]
    boxes = np.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            side - columns[:, ::-1].argmax(1),
            side - rows[:, ::-1].argmax(1),
        ],
        1,
    )
    return (
        torch.from_numpy(boxes.astype(np.float32)).reshape(-1, 4),
        torch.ones(len(ids), dtype=torch.int64),
        torch.from_numpy(masks.astype(np.uint8)),
    )
