"""Training crops with their targets, each determined by the seed and its number alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils import data

from pipeline.errors import AnnotationError
from pipeline.model.fitted_stain import FittedStain
from pipeline.model.losses import UNKNOWN
from pipeline.text import counted
from training.config import Training
from training.data import augment
from training.data.paste import paste
from training.data.restain import choose_method, fit_image, restain
from training.data.sample import Dataset, LabelledImage, Sample

EDGE_PX = 3  # of the crop: two at the working scale
MIN_AREA_PX = 24  # smaller pieces, as the crop's edge cuts them off, are background


class Crop(NamedTuple):
    """image: uint8 (3, S, S) at the crop's size; targets in the same pixels."""

    image: Tensor
    boxes: Tensor  # float32 (N, 4)
    labels: Tensor  # int64 (N,), the class from 1, or UNKNOWN
    nuclei: Tensor  # int32 (S, S): 0 background, i + 1 the nucleus of box i
    regions: Tensor  # uint8 (S, S): 0 background, 1 inside a nucleus, 2 its edge


class Batch(NamedTuple):
    """Crops as a training step takes them: in few tensors, so that there is little to upload."""

    images: Tensor  # uint8 (B, 3, S, S)
    boxes: Tensor  # float32 (sum N, 4), crop after crop
    labels: Tensor  # int64 (sum N,)
    nuclei: Tensor  # int32 (B, S, S), the numbers of each crop from 1
    regions: Tensor  # uint8 (B, S, S)
    counts: list[int]  # N of each crop


def collate(crops: Sequence[Crop]) -> Batch:
    """The crops one after another."""
    images, boxes, labels, nuclei, regions = zip(*crops, strict=True)
    counts = [len(b) for b in boxes]
    batch = Batch(
        torch.stack(images), torch.cat(boxes), torch.cat(labels), torch.stack(nuclei), torch.stack(regions), counts
    )
    if data.get_worker_info() is not None:
        # Else it is when a thread sends them: where there is no room, that fails, and the training waits for ever.
        for part in batch[:-1]:
            part.share_memory_()
    return batch


class TrainingImage:
    """A training image in memory, with its stains, fitted when they are first asked for."""

    def __init__(self, sample: Sample, classes: bool) -> None:
        """classes: whether its dataset tells classes apart; else those of its nuclei are not known."""
        self.labelled, self.mpp = sample.read(), sample.mpp
        if not classes:
            self.labelled = self.labelled._replace(class_index=np.zeros_like(self.labelled.class_index))
        self._stains: dict[str, FittedStain | None] = {}

    def stain(self, method: str) -> FittedStain | None:
        if method not in self._stains:
            self._stains[method] = fit_image(self.labelled.image, method)
        return self._stains[method]


class Crops(data.Dataset[Crop]):
    """Random crops without end: crop number i is the same in every process and after every resume.

    A dataset is drawn with a probability proportional to the square root of its number of nuclei, so that large ones
    count for more and small ones are not lost; then a group (organ, patient) with equal probabilities, then one of
    its images.
    side, mpp: of the crops as the network is given them
    Raises AnnotationError for a dataset without a nucleus.
    """

    def __init__(self, datasets: Sequence[Dataset], side: int, mpp: float, training: Training) -> None:
        self.side, self.mpp, self.training = side, mpp, training
        self.sets: list[list[list[TrainingImage]]] = []  # set -> group -> image
        for dataset in datasets:
            groups: dict[str, list[TrainingImage]] = {}
            classes = len(dataset.classes) > 1
            for sample in dataset.images:
                groups.setdefault(sample.group, []).append(TrainingImage(sample, classes))
            self.sets.append(list(groups.values()))
        nuclei = [sum(len(image.labelled.class_index) for g in groups for image in g) for groups in self.sets]
        if 0 in nuclei:
            empty = datasets[nuclei.index(0)]
            images = counted(len(empty.images), "training image")
            raise AnnotationError(
                f"{empty.name}: 0 nuclei in its {images}: need at least one; check the "
                f"annotations and their classes, or leave this dataset out"
            )
        roots = np.sqrt(nuclei)
        self.probabilities = roots / roots.sum()

    def __getitem__(self, number: int) -> Crop:
        rng = np.random.default_rng((self.training.seed, number))
        training, drawn = self.training, self._draw(rng)
        crop, mpp = self._cut(drawn, rng)
        if training.paste and rng.random() < training.paste:
            crop = paste(crop, self._cut(self._draw(rng), rng)[0], rng)
        image = crop.image
        if training.normalise and rng.random() < training.normalise:
            other, method = self._draw(rng), choose_method(training, rng)
            image = restain(image, (drawn.stain(method), other.stain(method)), training, rng)
        image = augment.recolour(image, training, rng)
        if training.rescan and rng.random() < training.rescan:
            image = augment.rescan(image, mpp, training, rng)
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        class_index = np.where(crop.class_index, crop.class_index, UNKNOWN)
        if not training.by_class:
            class_index = np.ones_like(class_index)
        return Crop(pixels, *targets(crop.labels, class_index), torch.from_numpy(regions(crop.labels)))

    def _cut(self, drawn: TrainingImage, rng: np.random.Generator) -> tuple[LabelledImage, float]:
        """A random square of an image at the crops' size; um of tissue per pixel of it."""
        labelled, zoom = drawn.labelled, drawn.mpp / self.mpp
        factor = augment.size_factor(self.side / (zoom * min(labelled.labels.shape)), self.training, rng)
        image, labels = augment.crop(
            labelled.image, labelled.labels, zoom * factor, self.side, self.training.strength, rng
        )
        return labelled._replace(image=image, labels=labels), self.mpp / factor

    def _draw(self, rng: np.random.Generator) -> TrainingImage:
        groups = self.sets[int(rng.choice(len(self.sets), p=self.probabilities))]
        group = groups[int(rng.integers(len(groups)))]
        return group[int(rng.integers(len(group)))]


def targets(labels: NDArray[np.int32], class_index: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Instance map (S, S) -> boxes (N, 4), labels (N,), and the map (S, S) with numbers from 1 to N; N may be 0.

    class_index[i - 1]: class of nucleus i, from 1, or UNKNOWN
    """
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    ids = np.flatnonzero(areas >= MIN_AREA_PX)
    number = np.zeros(len(areas), np.int32)
    number[ids] = np.arange(1, 1 + len(ids))
    nuclei = number[labels]
    windows = ndimage.find_objects(nuclei)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in windows], np.float32)
    return (
        torch.from_numpy(boxes).reshape(-1, 4),
        torch.from_numpy(class_index[ids - 1]),
        torch.from_numpy(nuclei),
    )


def regions(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Instance map (S, S) -> 0 background, 1 inside a nucleus, 2 within EDGE_PX of another nucleus or background."""
    width = 2 * EDGE_PX + 1
    edge = ndimage.maximum_filter(labels, width) != ndimage.minimum_filter(labels, width)
    classes: NDArray[np.uint8] = (labels > 0).astype(np.uint8)
    classes[(labels > 0) & edge] = 2
    return classes
