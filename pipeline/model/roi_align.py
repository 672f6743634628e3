"""RoIAlign as one sparse product: every bin of every RoI is a weighted sum of rows of one feature table.

torchvision's RoIAlign takes features plane by plane, on one thread in its backward pass, which is slow on a CPU.
Here the maps of all levels and images are one table of pixels by channels, and a bin is a bag of 16 rows: four samples
of four corners. The results are torchvision's (aligned=False, two samples a side); a test compares them.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.device import count_up

SAMPLES = 2  # along each side of a bin
_BINS_AT_ONCE = 1 << 21  # each has 16 rows and weights: 256 MiB


class FeatureTable(NamedTuple):
    """Feature maps of a batch: the pixels of all levels, level after level, image after image, row after row."""

    pixels: Tensor  # (sum of B * h * w, C)
    images: int
    shapes: tuple[tuple[int, int], ...]  # height and width of each level's maps, finest first

    @classmethod
    def of(cls, maps: Sequence[Tensor], dtype: torch.dtype | None = None) -> "FeatureTable":
        """maps: of each level, (B, C, h, w); best in channels_last. dtype: of the table, by default theirs."""
        rows = [m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]
        if dtype in (None, rows[0].dtype):
            pixels = torch.cat(rows)
        else:  # in one pass; training needs no other dtype, and could not derive this
            pixels = rows[0].new_empty((sum(map(len, rows)), rows[0].shape[1]), dtype=dtype)
            torch.cat(rows, out=pixels)
        return cls(pixels, len(maps[0]), tuple((m.shape[2], m.shape[3]) for m in maps))

    def maps(self) -> list[Tensor]:
        """Of each level (B, C, h, w), in channels_last; the same memory."""
        rows = self.pixels.split([self.images * height * width for height, width in self.shapes])
        return [
            r.view(self.images, *shape, self.pixels.shape[1]).permute(0, 3, 1, 2)
            for r, shape in zip(rows, self.shapes, strict=True)
        ]

    def layout(self, strides: tuple[int, ...]) -> Tensor:
        """Of each level, int32 (L, 5): width, height, stride, pixels of a map, first row in the table."""
        return _layout(self.shapes, self.images, strides, self.pixels.device)


def flatten_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes of each image, (N, 4) -> those of all, (sum N, 4), and the index of each one's image, int32 (sum N,)."""
    numbers = count_up(len(boxes), boxes[0].device).split(1)
    image = torch.cat([number.expand(len(b)) for number, b in zip(numbers, boxes, strict=True)])
    return torch.cat(list(boxes)), image


class RoIPool(nn.Module):
    """Pools boxes from the pyramid level of their size (Lin et al. 2017, equation 1) to a grid of `size` x `size`.

    What torchvision's MultiScaleRoIAlign does.
    """

    def __init__(self, size: int, strides: Sequence[int], canonical_px: float, canonical_level: int) -> None:
        super().__init__()
        self.size, self.strides = size, tuple(strides)
        self.canonical_px, self.canonical_level = canonical_px, canonical_level

    def forward(self, table: FeatureTable, rois: Tensor, image: Tensor) -> Tensor:
        """rois: float32 (R, 4) in image px; image: int32 (R,), of each -> (R, C, size, size), in the table's dtype."""
        step = _BINS_AT_ONCE // self.size**2
        parts = [
            F.embedding_bag(bags, table.pixels, per_sample_weights=weights.to(table.pixels.dtype), mode="sum")
            for bags, weights in map(functools.partial(self._bags, table), rois.split(step), image.split(step))
        ]
        pooled = parts[0] if len(parts) == 1 else torch.cat(parts)
        return pooled.view(len(rois), self.size, self.size, table.pixels.shape[1]).permute(0, 3, 1, 2)

    def _bags(self, table: FeatureTable, rois: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the table that each bin sums, int32, and their weights: both (R * size * size, 16)."""
        level = table.layout(self.strides)[self.levels(rois)]  # (R, 5)
        width, _, stride, area, start = level.unbind(1)
        first = start + image * area  # row of the map's first pixel
        scaled = rois / stride[:, None]
        indices, weights = _corners(scaled[:, :2], scaled[:, 2:], self.size, level[:, :2])  # (R, 2, size, 4)
        (columns, rows), (column_weights, row_weights) = indices.unbind(1), weights.unbind(1)
        lines = first[:, None, None] + rows * width[:, None, None]
        bags = lines[:, :, None, :, None] + columns[:, None, :, None, :]
        both = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        return bags.view(-1, (2 * SAMPLES) ** 2), both.view(-1, (2 * SAMPLES) ** 2)

    def levels(self, rois: Tensor) -> Tensor:
        """Index of the pyramid level that each box (R, 4) is pooled from: int64 (R,)."""
        area = (rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])
        first = math.log2(self.strides[0]) - self.canonical_level
        return torch.bucketize(area, _least_areas(first, self.canonical_px, len(self.strides), rois.device), right=True)


@functools.lru_cache(maxsize=64)
def _least_areas(first: float, canonical_px: float, levels: int, device: torch.device) -> Tensor:
    """The least area of a box, px2, that is pooled from each level but the first: float32 (L - 1,).

    first: of the first level, log2 of its side over `canonical_px`. A side that is less by a millionth counts, too, as
    in torchvision. Made once per network and device.
    """
    areas = [(canonical_px * 2 ** (first + level - 1e-6)) ** 2 for level in range(1, levels)]
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.tensor(areas, dtype=torch.float32).to(device)


@functools.lru_cache(maxsize=512)
def _layout(shapes: tuple[tuple[int, int], ...], images: int, strides: tuple[int, ...], device: torch.device) -> Tensor:
    """`FeatureTable.layout`, made once per size and device."""
    rows, start = [], 0
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows.append((width, height, stride, width * height, start))
        start += images * width * height
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.tensor(rows, dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=64)
def _samples(size: int, device: torch.device) -> Tensor:
    """Where a side is sampled, in units of the distance of samples: float32 (size * SAMPLES,). Made once per device."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.arange(0.5, size * SAMPLES, device=device)


def _corners(low: Tensor, high: Tensor, size: int, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Along both axes, the pixels that each bin of [low, high) (R, 2) reads: indices and weights (R, 2, size, 4).

    extent: of the maps, int32 (R, 2), px. Samples beyond the map by more than a pixel count as zero, nearer ones as
    the edge: torchvision's rule.
    """
    step = (high - low).clamp(min=1) / (size * SAMPLES)
    at = low[..., None] + _samples(size, low.device) * step[..., None]
    inside = (at >= -1) & (at <= extent[..., None])
    last = extent[..., None] - 1
    at = torch.minimum(at.clamp(min=0), last)
    near = at.int()
    far = torch.minimum(near + 1, last)
    beyond = at - near  # weight of the far pixel
    both = (torch.stack([near, far], 3), torch.stack([1 - beyond, beyond], 3) * (inside / SAMPLES)[..., None])
    indices, weights = (x.view(len(low), 2, size, 2 * SAMPLES) for x in both)
    return indices, weights
