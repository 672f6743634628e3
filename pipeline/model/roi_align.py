"""RoIAlign as one sparse product: every bin of every RoI is a weighted sum of rows of one feature table.

torchvision's RoIAlign takes features plane by plane, on one thread in its backward pass, which is slow on a CPU.
Here the maps of all levels and images are one
table of pixels by channels, and a bin is a bag of 16 rows: four samples of four corners. The results are
torchvision's (aligned=False, two samples a side); a test compares them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 2  # along each side of a bin


class RoIPool(nn.Module):
    """Pools boxes from the pyramid level of their size (Lin et al. 2017, equation 1) to a grid of `size` x `size`.

    Called like torchvision's MultiScaleRoIAlign, whose place it takes in RoIHeads.
    """

    def __init__(self, size: int, strides: Sequence[int], canonical_px: float, canonical_level: int) -> None:
        super().__init__()
        self.size, self.strides = size, tuple(strides)
        self.canonical_px, self.canonical_level = canonical_px, canonical_level

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], sides: Sequence[tuple[int, int]]
    ) -> Tensor:
        """features: level -> float32 (B, C, h, w); boxes: B tensors (N, 4) in image px -> (sum N, C, size, size).

        `sides`, of the images, are part of torchvision's call and not used: the stride of every level is known.
        """
        maps = list(features.values())
        rois = torch.cat(list(boxes))  # (R, 4)
        image = torch.cat([b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)])
        heights, widths = (rois.new_tensor([m.shape[d] for m in maps], dtype=torch.int64) for d in (2, 3))
        starts = F.pad((maps[0].shape[0] * heights * widths).cumsum(0), (1, 0))[:-1]  # of each level in the table
        level = self.levels(rois)
        height, width = heights[level], widths[level]
        first = starts[level] + image * height * width  # (R,) row of the map's first pixel
        scaled = rois / rois.new_tensor(self.strides)[level, None]
        rows, row_weights = _corners(scaled[:, 1], scaled[:, 3], self.size, height)  # (R, size, 4)
        columns, column_weights = _corners(scaled[:, 0], scaled[:, 2], self.size, width)
        lines = (first[:, None, None] + rows * width[:, None, None])[:, :, None, :, None]
        bags = (lines + columns[:, None, :, None, :]).flatten(0, 2).flatten(1).int()  # (R * size * size, 16)
        weights = (row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]).flatten(0, 2).flatten(1)
        table = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps])  # (pixels, C)
        pooled = F.embedding_bag(bags, table, per_sample_weights=weights.to(table.dtype), mode="sum")
        return pooled.view(len(rois), self.size, self.size, table.shape[1]).permute(0, 3, 1, 2)

    def levels(self, rois: Tensor) -> Tensor:
        """Index of the pyramid level that each box (R, 4) is pooled from: int64 (R,)."""
        side = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        lowest = math.log2(self.strides[0])
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_px) + 1e-6) - lowest
        return level.clamp(0, len(self.strides) - 1).long()


def _corners(low: Tensor, high: Tensor, size: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis, the pixels that each bin of [low, high) (R,) reads: indices and weights (R, size, 4).

    Samples beyond the map by more than a pixel count as zero, nearer ones as the edge: torchvision's rule.
    """
    step = (high - low).clamp(min=1) / (size * SAMPLES)
    at = low[:, None] + (torch.arange(size * SAMPLES, device=low.device) + 0.5) * step[:, None]
    inside = (at >= -1) & (at <= length[:, None])
    at, last = at.clamp(min=0), length[:, None] - 1
    near = torch.minimum(at.long(), last)
    far = torch.minimum(near + 1, last)
    beyond = torch.where(near >= last, 0.0, at - near)  # weight of the far pixel
    both = (torch.stack([near, far], 2), torch.stack([1 - beyond, beyond], 2) * (inside / SAMPLES)[..., None])
    indices, weights = (x.view(len(low), size, 2 * SAMPLES) for x in both)
    return indices, weights
