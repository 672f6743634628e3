"""Operations that give the same bits on a CPU whatever the number of threads; elsewhere they are torch's own.

On a CPU torch chooses between kernels, and splits sums, by how many threads there are. Each function here avoids
one such choice, and says which. The number of threads does not reach a GPU: there each is the plain operation.

Law: on a CPU, the same bits on one thread and on several.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_LEAST_ROWS = 64  # of a matrix product that is not split
_DILATION = 2


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    """Every pixel's channels times a matrix: (B, C, H, W), (R, C) -> (B, R, H, W), in the dtype of the images.

    A convolution with a kernel of one pixel. Dilation changes nothing about such a kernel, but without it torch
    takes a kernel of its own on one thread, which adds in another order than the library it calls on several.
    """
    matrix = matrix.to(images)
    if _on_cpu(images):
        return F.conv2d(images, matrix[:, :, None, None], dilation=_DILATION)
    return torch.einsum("rc,bchw->brhw", matrix, images)  # not a convolution: on a GPU those round to TF32


def pointwise(module: M) -> M:
    """Dilate, in place, every convolution of `module` whose kernel is one pixel and whose weights are on a CPU.

    The reason is that of `mix_channels`; call it after the module was moved to its device. Returns the module.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and _on_cpu(layer.weight):
            layer.dilation = (_DILATION, _DILATION)
    return module


def upsample(images: Tensor, factor: float) -> Tensor:
    """Images (B, C, H, W) enlarged by `factor` with bilinear interpolation; a factor below 1 shrinks, antialiased.

    `antialias` changes nothing when enlarging, but without it torch adds in another order on one thread.
    """
    antialias = _on_cpu(images) or factor < 1
    return F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=antialias)


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax over `dim`. torch's own, over a dimension other than the last, depends on the number of threads."""
    if not _on_cpu(logits):
        return logits.softmax(dim)
    weights = (logits - logits.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). torch's own rounds the last few elements of each thread's part in another way."""
    return 1 / (1 + (-x).exp()) if _on_cpu(x) else x.sigmoid()


def pad_rows(rows: Tensor) -> Tensor:
    """Rows (N, ...) with rows of zeros appended, up to 64; the caller takes the first N of what it computes.

    Products of fewer rows are split along the sum, by the number of threads.
    """
    missing = _LEAST_ROWS - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if _on_cpu(rows) and missing > 0 else rows
