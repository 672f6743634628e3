"""Kernels in Triton for what takes cuDNN and PyTorch several passes over a map.

This file is imported where they are used only: PyTorch comes with Triton on Linux. That compiles a kernel when it is
first called, for which it needs a C compiler, keeps it in a folder of the user's, and runs it on the current device, as
PyTorch's operators do not.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torchvision.ops import nms

_PIXELS, _CHANNELS, _BOXES = 32, 32, 64  # that one program computes at a time


def check(device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Compare all kernels with what they take the place of, on a device and for maps of these dtypes.

    Raises where one does not work there.
    """
    for dtype in dtypes:
        _check_maps(device, dtype)
    corners, sizes = torch.linspace(0, 30, 300).frac().reshape(2, 150) * 40, (100, 0, 50)
    boxes, starts = torch.cat([corners, corners + 9]), torch.tensor([0, 100, 100, 150], dtype=torch.int32)
    best_first = [torch.arange(size, 0, -1.0) for size in sizes]
    kept = [nms(*group, 0.5).tolist() for group in zip(boxes.T.split(sizes), best_first, strict=True)]
    expected = torch.zeros(150, dtype=torch.bool)
    expected[kept[0] + [100 + n for n in kept[2]]] = True
    if not torch.equal(suppress(boxes.to(device), starts.to(device), 0.5).cpu(), expected):
        raise ArithmeticError("suppress is wrong")


def _check_maps(device: torch.device, dtype: torch.dtype) -> None:
    """What is expected is computed on the CPU, in float32: a GPU's libraries may round to fewer bits."""
    x = torch.linspace(-3, 9, 2 * 40 * 10 * 36).reshape(2, 40, 10, 36).to(dtype)
    weight, bias = torch.linspace(-1, 1, 360).reshape(40, 1, 3, 3).to(dtype), torch.linspace(-2, 2, 40).to(dtype)
    there, bias_there = x.to(device, memory_format=torch.channels_last), bias.to(device)
    by_pixel = weight[:, 0].permute(1, 2, 0).contiguous().to(device)
    x, weight, bias = x.float(), weight.float(), bias.float()
    small = F.conv2d(F.pad(x.clamp(0, 6), (0, 1, 0, 1)), weight, bias, stride=2, groups=40).clamp(0)
    got = depthwise(there, by_pixel, bias_there, (5, 18), (0, 0), 2, 6.0, math.inf)
    of_got = F.interpolate(got.cpu().float(), scale_factor=2.0)
    results = {
        "depthwise": (got, small),
        "add_bias": (add_bias(there.clone(), bias_there, 6.0), (x + bias[:, None, None]).clamp(0, 6)),
        "add_doubled": (add_doubled(there.clone(), got), x + of_got),
    }
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # a rounding of bfloat16 is up to 0.8 %
    for name, (given, expected) in results.items():
        if not torch.allclose(given.cpu().float(), expected, rtol=tolerance, atol=tolerance):
            raise ArithmeticError(f"{name} is wrong by up to {(given.cpu() - expected).abs().max():g}, in {dtype}")


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    before: tuple[int, int],
    stride: int,
    limit_in: float | None,
    limit_out: float | None,
) -> Tensor:
    """A convolution channel by channel, of activations that were not applied yet: (B, C, H, W) -> (B, C, *size).

    x: in channels_last; weight: (K, K, C); bias: (C,)
    before: how many rows of zeros lie above x, and how many columns left of it; there are as many on the other sides as
    `size` asks for
    limit_in, limit_out: x, and the result, are clamped to 0 and this; None: they are not. Computed in float32.
    """
    images, channels, height, width = x.shape
    out = torch.empty((images, *size, channels), dtype=x.dtype, device=x.device)
    grid = (images * size[0], triton.cdiv(size[1], _PIXELS), triton.cdiv(channels, _CHANNELS))
    maps = (x, weight, bias, out)
    numbers = (height, width, channels, *size, *before)
    limits = (limit_in is not None, limit_in or 0.0, limit_out is not None, limit_out or 0.0)
    with torch.cuda.device_of(x):
        _depthwise[grid](*maps, *numbers, stride, len(weight), *limits, _PIXELS, _CHANNELS, enable_fp_fusion=True)
    return out.permute(0, 3, 1, 2)


@triton.jit
def _clamp(values, LIMIT: tl.constexpr):
    """To 0 and a limit; NaN stays NaN, as with PyTorch."""
    values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "above", "left"])
def _depthwise(
    x,
    weight,
    bias,
    out,
    height,
    width,
    channels,
    out_height,
    out_width,
    above,
    left,
    STRIDE: tl.constexpr,
    SIDE: tl.constexpr,
    CLAMP_IN: tl.constexpr,
    LIMIT_IN: tl.constexpr,
    CLAMP_OUT: tl.constexpr,
    LIMIT_OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some pixels of one row, and some channels of theirs."""
    image, row = tl.program_id(0) // out_height, tl.program_id(0) % out_height
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    own = channel < channels
    total = tl.full((PIXELS, CHANNELS), 0.0, tl.float32) + tl.load(bias + channel, own, 0.0).to(tl.float32)[None, :]
    for y in tl.static_range(SIDE):
        at_y = row * STRIDE + y - above
        line = x + (image * height + at_y).to(tl.int64) * width * channels  # maps may have more than 2^31 values
        end = tl.where((at_y >= 0) & (at_y < height), width, 0)  # a row beyond the map has no pixels
        for x_ in tl.static_range(SIDE):
            at_x = column * STRIDE + x_ - left
            there = ((at_x >= 0) & (at_x < end))[:, None] & own[None, :]
            values = tl.load(line + at_x[:, None] * channels + channel[None, :], there, 0.0).to(tl.float32)
            if CLAMP_IN:
                values = _clamp(values, LIMIT_IN)
            factor = tl.load(weight + (y * SIDE + x_) * channels + channel, own, 0.0).to(tl.float32)
            total += values * factor[None, :]
    if CLAMP_OUT:
        total = _clamp(total, LIMIT_OUT)
    place = out + tl.program_id(0).to(tl.int64) * out_width * channels
    tl.store(place + column[:, None] * channels + channel[None, :], total, (column < out_width)[:, None] & own[None, :])


def add_bias(x: Tensor, bias: Tensor, limit: float | None) -> Tensor:
    """Adds to each channel its bias, in place, and clamps the sum to 0 and `limit`, unless that is None.

    x: (B, C, H, W) in channels_last; bias: (C,). The same bits as with PyTorch's operators.
    """
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, _CHANNELS))
    if pixels:
        with torch.cuda.device_of(x):
            _add_bias[grid](x, bias, pixels, channels, limit is not None, limit or 0.0, _PIXELS, _CHANNELS)
    return x


@triton.jit(do_not_specialize=["pixels"])
def _add_bias(
    x,
    bias,
    pixels,
    channels,
    CLAMP: tl.constexpr,
    LIMIT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some pixels, and some channels of theirs."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own, place = channel < channels, x + pixel[:, None] * channels + channel[None, :]
    there = (pixel < pixels)[:, None] & own[None, :]
    total = tl.load(place, there, 0.0).to(tl.float32) + tl.load(bias + channel, own, 0.0).to(tl.float32)[None, :]
    if CLAMP:
        # PyTorch rounds before it clamps; that is the same, as the limits are numbers of bfloat16
        total = _clamp(total, LIMIT)
    tl.store(place, total, there)


def add_doubled(x: Tensor, smaller: Tensor) -> Tensor:
    """Adds a map of half the sides to another in place, each of its pixels to four.

    x: (B, C, 2 h, 2 w), smaller: (B, C, h, w), both in channels_last
    """
    images, channels, height, width = x.shape
    grid = (images * height, triton.cdiv(width, _PIXELS), triton.cdiv(channels, _CHANNELS))
    with torch.cuda.device_of(x):
        _add_doubled[grid](x, smaller, width, channels, _PIXELS, _CHANNELS)
    return x


@triton.jit(do_not_specialize=["width"])
def _add_doubled(
    x,
    smaller,
    width,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some pixels of one row, and some channels of theirs. Heights are even, so rows of all images are pairs."""
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    there = (column < width)[:, None] & (channel < channels)[None, :]
    place = x + tl.program_id(0).to(tl.int64) * width * channels + column[:, None] * channels + channel[None, :]
    other = smaller + (tl.program_id(0) // 2).to(tl.int64) * (width // 2) * channels
    added = tl.load(other + (column // 2)[:, None] * channels + channel[None, :], there, 0.0)
    tl.store(place, tl.load(place, there, 0.0).to(tl.float32) + added.to(tl.float32), there)


def suppress(boxes: Tensor, starts: Tensor, iou: float) -> Tensor:
    """Non-maximum suppression in each of several groups: bool (N,), the boxes that no better one of theirs overlaps.

    boxes: float32 (4, N), rows x0, y0, x1, y1: group after group, the best of each first
    starts: int32 (groups + 1,), where each group starts, and N
    iou: above it the worse of two boxes is dropped, as in `torchvision.ops.nms`
    """
    keep = torch.ones(boxes.shape[1], dtype=torch.int8, device=boxes.device)
    with torch.cuda.device_of(boxes):
        _suppress[(len(starts) - 1,)](boxes, starts, keep, boxes.shape[1], iou, _BOXES, num_warps=8)
    return keep.bool()


@triton.jit(do_not_specialize=["count"])
def _suppress(boxes, starts, keep, count, iou, BOXES: tl.constexpr):
    """A group: some boxes at a time, of which those are found that stay; they drop others among all that follow."""
    start, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    step = tl.arange(0, BOXES)
    for first in range(start, end, BOXES):
        at, own = first + step, first + step < end
        x0, y0 = tl.load(boxes + at, own, 0.0), tl.load(boxes + count + at, own, 0.0)
        x1, y1 = tl.load(boxes + 2 * count + at, own, 0.0), tl.load(boxes + 3 * count + at, own, 0.0)
        area = (x1 - x0) * (y1 - y0)
        alive = tl.load(keep + at, own, 0).to(tl.int32)
        kept = alive
        for later in range(first, end, BOXES):
            by, there = later + step, later + step < end
            left, top = tl.load(boxes + by, there, 0.0), tl.load(boxes + count + by, there, 0.0)
            right, bottom = tl.load(boxes + 2 * count + by, there, 0.0), tl.load(boxes + 3 * count + by, there, 0.0)
            across = tl.minimum(x1[None, :], right[:, None]) - tl.maximum(x0[None, :], left[:, None])
            down = tl.minimum(y1[None, :], bottom[:, None]) - tl.maximum(y0[None, :], top[:, None])
            shared = tl.maximum(across, 0.0) * tl.maximum(down, 0.0)
            whole = area[None, :] + ((right - left) * (bottom - top))[:, None] - shared
            overlap = tl.div_rn(shared, tl.maximum(whole, 1e-30))  # the union of empty boxes is 0
            over = ((overlap > iou) & (at[None, :] < by[:, None])).to(tl.int32)  # (those, these)
            if later == first:
                # a box stays unless a better one that stays overlaps it: true of all once nothing changes any more
                changed = 1
                while changed > 0:
                    now = alive * (1 - tl.max(over * kept[None, :], 1))
                    changed = tl.sum(tl.abs(now - kept), 0)
                    kept = now
                tl.store(keep + by, kept.to(tl.int8), there)
            else:
                before = tl.load(keep + by, there, 0).to(tl.int32)
                tl.store(keep + by, (before * (1 - tl.max(over * kept[None, :], 1))).to(tl.int8), there)
        tl.debug_barrier()  # the next ones read what was stored
