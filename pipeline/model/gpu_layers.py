"""The layers of a folded detector, made faster for a GPU, in place.

There a pass over a map takes about as long as a convolution with a kernel of one pixel, and bias, activation and
padding take a pass each. So such a convolution becomes a matrix product, which adds its bias on the way; the others get
bias and activation in one pass; depthwise ones are one kernel with their padding and the activations before and after
them; and the maps of the pyramid are added in one pass. All but the first need Triton (`gpu_kernels`); without it these
layers stay as they are.

cuDNN plans its convolutions anew for each size of their input. Of the 66 of the shipped detector it has 10 left.

Backbone and pyramid of nine patches of 1280 px on an H200 (PyTorch 2.11): 47.6 ms as they were, 40.9 ms with products,
23.7 ms with the bias and depthwise kernels, too; the pyramid's was not measured.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pipeline.model.detector import NucleusDetector
from pipeline.model.device import kernels_problem


def use_gpu_layers(model: NucleusDetector, device: torch.device) -> NucleusDetector:
    """Have a folded model compute in the fastest way that there is on a device, to which it is moved afterwards.

    Law: the same features, within rounding.
    """
    if kernels_problem(device) is None:
        use_kernels(model)
    for name, module in list(model.named_modules()):
        if _is_product(module):
            model.set_submodule(name, _PixelProduct(module))
    return model


def use_kernels(model: NucleusDetector) -> NucleusDetector:
    """The part of `use_gpu_layers` that needs Triton."""
    for block in list(model.backbone.modules()):
        if type(block) in (InvertedResidual, DepthwiseSeparableConv) and _is_depthwise(block.conv_dw):
            before, after = ("bn1", "bn2") if type(block) is InvertedResidual else (None, "bn1")
            limit_in = _take_limit(block, before) if before and block.conv_s2d is None else None
            block.conv_dw = _Depthwise(block.conv_dw, limit_in, _take_limit(block, after))
    for parent, name, activation in list(_biased(model)):
        setattr(parent, name, _Biased(getattr(parent, name), _take_limit(parent, activation) if activation else None))
    model.pyramid = _Pyramid(model.pyramid)
    return model


# ------------------------------------------------------------------------------------------- which layers


def _is_product(module: nn.Module) -> bool:
    """Whether a module is a convolution whose output pixels each depend on one input pixel, and on all its channels."""
    if type(module) not in (nn.Conv2d, Conv2dSame):
        return False
    assert isinstance(module, nn.Conv2d)
    alone = module.kernel_size == module.stride == (1, 1) and module.groups == 1
    return alone and module.padding in ((0, 0), "same", "valid")


def _is_depthwise(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv2d, Conv2dSame):
        return False
    assert isinstance(module, nn.Conv2d)
    square = module.kernel_size[0] == module.kernel_size[1] and module.stride[0] == module.stride[1]
    by_channel = module.groups == module.in_channels == module.out_channels
    plain = module.dilation == (1, 1) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return square and by_channel and plain and module.bias is not None


def _biased(model: NucleusDetector) -> Iterator[tuple[nn.Module, str, str | None]]:
    """Convolutions with a bias: the module that has one, its name there, and that of the activation that follows it."""
    if type(model.backbone) is EfficientNetFeatures and model.backbone.conv_stem.bias is not None:
        yield model.backbone, "conv_stem", "bn1"
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            layers = [(name, layer) for name, layer in module.named_children() if type(layer) is not nn.Identity]
            for (name, layer), (after, activation) in zip(layers, [*layers[1:], ("", nn.Identity())], strict=False):
                if type(layer) in (nn.Conv2d, Conv2dSame) and layer.bias is not None and not _is_product(layer):
                    yield module, name, after if _limit(activation) is not None else None


def _take_limit(parent: nn.Module, name: str) -> float | None:
    """The limit of an activation, which is removed; None, and it stays, where it is another one."""
    limit = _limit(getattr(parent, name))
    if limit is not None:
        setattr(parent, name, nn.Identity())
    return limit


def _limit(activation: nn.Module) -> float | None:
    """What an activation clamps values to, above 0; None where it is none that only clamps."""
    return {nn.ReLU: math.inf, nn.ReLU6: 6.0}.get(type(activation))


# -------------------------------------------------------------------------------------------------- layers


class _PixelProduct(nn.Module):
    """A convolution with a kernel of one pixel, as a product of matrices."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(convolution.weight.detach().flatten(1)), convolution.bias

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, R, H, W)
        pixels = x.permute(0, 2, 3, 1)
        # of two dimensions, as only then the bias is added by the product
        rows = F.linear(pixels.reshape(-1, x.shape[1]), self.weight, self.bias)
        return rows.view(*pixels.shape[:3], len(self.weight)).permute(0, 3, 1, 2)


class _Biased(nn.Module):
    """A convolution, whose bias and activation are one pass. limit: as in `gpu_kernels`."""

    def __init__(self, convolution: nn.Conv2d, limit: float | None) -> None:
        super().__init__()
        self.bias, convolution.bias = convolution.bias, None
        self.convolution, self.limit = convolution, limit

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, R, h, w)
        from pipeline.model import gpu_kernels

        assert self.bias is not None
        out: Tensor = self.convolution(x)
        return gpu_kernels.add_bias(out.contiguous(memory_format=torch.channels_last), self.bias, self.limit)


class _Depthwise(nn.Module):
    """A convolution channel by channel, with the activations before and after it. Limits: as in `gpu_kernels`."""

    def __init__(self, convolution: Any, limit_in: float | None, limit_out: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach()[:, 0].permute(1, 2, 0).contiguous())  # (K, K, C)
        self.bias, self.limits, self.stride = convolution.bias, (limit_in, limit_out), convolution.stride[0]
        self.padding = None if isinstance(convolution, Conv2dSame) else convolution.padding

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, h, w)
        from pipeline.model import gpu_kernels

        side, stride, (height, width) = len(self.weight), self.stride, x.shape[-2:]
        if self.padding is None:  # as TensorFlow pads: less above and on the left, where it is uneven
            size = (-(-height // stride), -(-width // stride))
            before = tuple(get_same_padding(length, side, stride, 1) // 2 for length in (height, width))
        else:
            before = self.padding
            size = tuple((n + 2 * pad - side) // stride + 1 for n, pad in zip((height, width), before, strict=True))
        x = x.contiguous(memory_format=torch.channels_last)
        return gpu_kernels.depthwise(x, self.weight, self.bias, size, before, stride, *self.limits)


class _Pyramid(nn.Module):
    """torchvision's FeaturePyramidNetwork, which adds each map to the next finer one in one pass."""

    def __init__(self, pyramid: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.inner_blocks, self.layer_blocks = pyramid.inner_blocks, pyramid.layer_blocks

    def forward(self, maps: dict[str, Tensor]) -> OrderedDict[str, Tensor]:  # of each level (B, C, h, w), finest first
        from pipeline.model import gpu_kernels

        inner = [block(m) for block, m in zip(self.inner_blocks, maps.values(), strict=True)]
        for finer, coarser in zip(inner[-2::-1], inner[:0:-1], strict=True):
            if finer.shape[-2:] == (2 * coarser.shape[-2], 2 * coarser.shape[-1]):
                gpu_kernels.add_doubled(finer, coarser)
            else:
                finer += F.interpolate(coarser, finer.shape[-2:])
        out = [block(m) for block, m in zip(self.layer_blocks, inner, strict=True)]
        return OrderedDict(zip(maps, out, strict=True))
