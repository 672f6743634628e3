"""Depthwise convolutions whose backward pass is fast on a CPU.

oneDNN has no fast kernel for some of what the backward pass of a backbone asks for: the weights of kernels larger than
3 x 3, and in bfloat16 the inputs of strided convolutions, which take 10 to 50 times as long as they could. Here every
gradient is made of what it is fast at, with the same values within rounding.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

_PART = 3  # side of the kernels whose gradient oneDNN is fast at


def use_fast_gradients(model: nn.Module) -> None:
    """Have every depthwise convolution of a model on a CPU use `Depthwise`, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_depthwise(module):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _is_depthwise(module: nn.Conv2d) -> bool:
    alone = module.groups == module.in_channels == module.out_channels > 1 and module.bias is None
    square = module.kernel_size[0] == module.kernel_size[1] >= _PART and module.stride[0] == module.stride[1]
    return alone and square and module.dilation == (1, 1) and not isinstance(module.padding, str)


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    """In the precision of `x`, as autocast does it."""
    padding = int(module.padding[0])
    if isinstance(module, Conv2dSame):
        x, padding = pad_same(x, list(module.kernel_size), list(module.stride)), 0
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = Depthwise.apply(x, module.weight.to(x.dtype), module.stride[0], padding)
    return out


class Depthwise(torch.autograd.Function):
    """x: (B, C, H, W), weight: (C, 1, K, K), stride, padding -> (B, C, h, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_x = _of_input(gradient, weight, ctx.stride, ctx.padding, x.shape) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(gradient, x, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None


def _of_input(gradient: Tensor, weight: Tensor, stride: int, padding: int, shape: torch.Size) -> Tensor:
    """Gradient of the input: the convolution of the output's, spread over the input's pixels, by the turned kernel."""
    size = weight.shape[-1]
    if stride > 1:
        height, width = (n + 2 * padding - size + 1 for n in shape[2:])
        # in channels_last, which `new_zeros` cannot make
        spread = gradient.new_zeros(len(gradient), height, width, shape[1]).permute(0, 3, 1, 2)
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return F.conv2d(gradient, weight.flip(2, 3), None, 1, size - 1 - padding, groups=len(weight))


def _of_weight(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Gradient of the weights, in parts of 3 x 3 that cover the kernel; where they overlap they are the same."""
    if padding:
        x = F.pad(x, (padding,) * 4)
    size, groups = weight.shape[-1], len(weight)
    height, width = ((n - 1) * stride + _PART for n in gradient.shape[2:])
    starts = [*range(0, size - _PART, _PART), size - _PART]
    out, part = torch.empty_like(weight), weight.new_empty(groups, 1, _PART, _PART)
    for row in starts:
        for column in starts:
            seen = x[:, :, row : row + height, column : column + width]
            _, out[:, :, row : row + _PART, column : column + _PART], _ = torch.ops.aten.convolution_backward(
                gradient, seen, part, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], groups, [False, True, False]
            )
    return out
