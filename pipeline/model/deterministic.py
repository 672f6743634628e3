"""Operations that give the same bits on a CPU whatever the number of threads; elsewhere they are torch's own.

On a CPU torch chooses between kernels, and splits sums, by how many threads there are. Each function here avoids
one such choice, and says which. The number of threads does not reach a GPU: there each is the plain operation.

Law: on a CPU, the same bits on one thread and on several.
"""

from fractions import Fraction
from typing import Any, TypeVar

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
    takes a kernel of its own on one thread, which adds in another order than the library it calls on several. Of
    images that lie channel after channel, that library takes a kernel that is 20 times as slow.
    """
    matrix = matrix.to(images)
    if _on_cpu(images):
        images = images.contiguous(memory_format=torch.channels_last)
        return F.conv2d(images, matrix[:, :, None, None], dilation=_DILATION)
    # not a convolution: on a GPU those round to TF32; nor a product of matrices, which for two rows and three channels
    # took 2.9 of the 70 ms that a batch took an H200
    mixed = images[:, :1] * matrix[:, 0, None, None]
    for number in range(1, matrix.shape[1]):
        mixed = torch.addcmul(mixed, images[:, number, None], matrix[:, number, None, None])
    return mixed


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

    Law: what is enlarged from the same pixels is the same bits, wherever they lie in the image, so that a nucleus
    looks alike in every tile. torch rounds the position of every pixel to float32, at each in another way; in bfloat16
    that changes the feature maps by .3 %. When shrinking, `antialias` has torch add in one order on any number of
    threads.
    """
    if factor < 1:
        return F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
    ratio = Fraction(factor).limit_denominator(1000)
    return _enlarge(_enlarge(images, -2, ratio), -1, ratio)


def _enlarge(images: Tensor, dim: int, ratio: Fraction) -> Tensor:
    """Images enlarged along `dim`, counted from the last: every `ratio.denominator` px become `ratio.numerator`.

    The centre of pixel i lies at (i + 1/2) / ratio - 1/2 of the image, so the weights repeat with the numerator.
    """
    many, few = ratio.numerator, ratio.denominator
    length = images.shape[dim]
    others: Any = [slice(None)] * (-dim - 1)
    groups = -(-length // few)
    span = (groups - 1) * few + 1
    edges = images.narrow(dim, 0, 1), images.narrow(dim, length - 1, 1)
    padded = torch.cat([edges[0], images, *[edges[1]] * (1 + groups * few - length)], dim)
    parts = []
    for i in range(many):
        first, rest = divmod((2 * i + 1) * few - many, 2 * many)
        low, high = (padded[..., at : at + span : few, *others] for at in (1 + first, 2 + first))
        parts.append(torch.lerp(low, high, rest / (2 * many)))
    return torch.stack(parts, dim).flatten(dim - 1, dim).narrow(dim, 0, int(length * ratio))


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax over `dim`. torch's own, over a dimension other than the last, depends on the number of threads."""
    if not _on_cpu(logits):
        return logits.softmax(dim)
    weights = (logits - logits.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). torch's own rounds the last few elements of each thread's part in another way."""
    return 1 / (1 + (-x).exp()) if _on_cpu(x) else x.sigmoid()


def topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of values (B, N), and their indices: (B, count), on a CPU in order of the index.

    torch's own brings equal ones, of which bfloat16 has many, into an order that depends on the length of the row. What
    is sorted stably afterwards keeps the order of the index, which is the same in every patch.
    """
    best, index = values.topk(count, 1, sorted=not _on_cpu(values))
    if _on_cpu(values):
        index = index.sort(1).values
        best = values.gather(1, index)
    return best, index


def pad_rows(rows: Tensor) -> Tensor:
    """Rows (N, ...) with rows of zeros appended, up to 64; the caller takes the first N of what it computes.

    Products of fewer rows are split along the sum, by the number of threads.
    """
    missing = _LEAST_ROWS - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if _on_cpu(rows) and missing > 0 else rows
