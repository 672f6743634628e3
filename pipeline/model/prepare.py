"""A detector made faster for inference, in place: with the same features, to the bit or within rounding."""

from collections import Counter
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.model.detector import SMALL_PX, NucleusDetector


def fold(model: NucleusDetector) -> NucleusDetector:
    """Fold every batch norm into the convolution that feeds it, in place: for inference only, which it makes faster.

    A network may register its layers in any order, so a small image is passed through it to see which convolution each
    norm takes its input from. A norm whose input is no convolution's output, such as a sum, stays as it is.
    Law: the folded model gives the same features, within rounding.
    """
    pairs = _normed_convolutions(model)
    for name, norm in list(model.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d) or norm not in pairs:
            continue
        convolution, mean, variance = pairs[norm], norm.running_mean, norm.running_var
        assert mean is not None  # a batch norm without statistics cannot be saved, let alone loaded
        assert variance is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        # timm's norm layers carry the activation that follows
        model.set_submodule(name, getattr(norm, "act", nn.Identity()))
    return model.to(memory_format=torch.channels_last)


def _normed_convolutions(model: NucleusDetector) -> dict[nn.Module, nn.Conv2d]:
    """Batch norms of the feature maps, each with the convolution whose output it takes, where both are used once."""
    made: list[tuple[Tensor, int, nn.Conv2d]] = []  # held, so that no other tensor gets the identity of one
    pairs: list[tuple[nn.Module, nn.Conv2d]] = []

    def give(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made.append((output, output._version, module))

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for output, version, convolution in made:
            if output is inputs[0] and output._version == version:  # else it was changed in place meanwhile
                pairs.append((module, convolution))

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(give) for layer in convolutions]
    hooks += [norm.register_forward_pre_hook(take) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version
            model.maps(torch.zeros(1, 3, SMALL_PX, SMALL_PX, dtype=convolutions[0].weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter([convolution for _, _, convolution in made] + [norm for norm, _ in pairs])
    return {norm: convolution for norm, convolution in pairs if uses[norm] == uses[convolution] == 1}


def widen_kernels(model: NucleusDetector) -> NucleusDetector:
    """Give convolutions that pad one side of their input more than the other a wider kernel, in place: for a CPU.

    With a stride of 2, TensorFlow pads unevenly; timm imitates that by copying the input, and these inputs are the
    largest maps of all. A kernel with an additional first row and column of zeros needs even padding, which is done
    without a copy, and computes the same. On a GPU it was not tried.
    Law: the same bits, for images whose sides are multiples of the coarsest stride.
    """
    for name, module in list(model.named_modules()):
        size = module.kernel_size[0] if isinstance(module, Conv2dSame) else 0
        if size % 2 and (module.kernel_size, module.stride, module.dilation) == ((size, size), (2, 2), (1, 1)):
            wide = nn.Conv2d(
                module.in_channels, module.out_channels, size + 1, stride=2, padding=size // 2, groups=module.groups
            )
            wide.weight, wide.bias = nn.Parameter(F.pad(module.weight.detach(), (1, 0, 1, 0))), module.bias
            model.set_submodule(name, wide)
    return model.to(memory_format=torch.channels_last)


def slice_widest(model: NucleusDetector) -> NucleusDetector:
    """Have the block of timm's with the widest map compute it a few channels at a time, in place: for a CPU.

    The block multiplies the channels before it halves their resolution; in between, the map of a patch of 1280 px would
    take 177 MB. The model must have been folded.
    Law: the same bits.
    """
    for name, module in model.backbone.named_modules():
        if type(module) is InvertedResidual and _Sliced.fits(module):
            model.backbone.set_submodule(name, _Sliced(module))
            break  # the next ones have three eighths of its size, or less
    return model


class _Sliced(nn.Module):
    """A folded block that expands its channels, halves the resolution of each, and projects them."""

    CHANNELS = 32  # at a time

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.block = block

    @staticmethod
    def fits(block: InvertedResidual) -> bool:
        """Whether a block does that and no more; its batch norms, which differ by channel, were folded."""
        conv, others = block.conv_dw, (block.conv_s2d, block.aa, block.se)
        by_channel = (*block.bn1.parameters(), *block.bn2.parameters())
        return bool(
            type(conv) is nn.Conv2d
            and conv.stride == (2, 2)
            and conv.groups == conv.in_channels
            and not block.has_skip
            and not by_channel
            and all(other is None or isinstance(other, nn.Identity) for other in others)
        )

    def forward(self, x: Tensor) -> Tensor:
        block, parts = self.block, []
        for first in range(0, block.conv_dw.in_channels, self.CHANNELS):
            some = slice(first, first + self.CHANNELS)
            wide = block.bn1(_convolve(block.conv_pw, x, some))
            parts.append(block.bn2(_convolve(block.conv_dw, wide, some)))
        del wide
        return cast(Tensor, block.bn3(block.conv_pwl(torch.cat(parts, 1))))


def _convolve(conv: nn.Conv2d, x: Tensor, some: slice) -> Tensor:
    """Some of the output channels of a convolution; of one that is channel by channel, from as many inputs."""
    weight, bias = conv.weight[some], None if conv.bias is None else conv.bias[some]
    groups = 1 if conv.groups == 1 else len(weight)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
