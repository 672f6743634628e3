"""Gradients of depthwise convolutions are torch's."""

import copy

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from training.depthwise import use_fast_gradients


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [11, 12])
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_values_and_gradients_are_torchs(kind: type[nn.Conv2d], size: int, stride: int, side: int) -> None:
    """Law: the same output and gradients, also where the last pixels are beyond the last kernel."""
    torch.manual_seed(0)
    plain = kind(6, 6, size, stride, padding=size // 2, groups=6, bias=False).double()
    fast = copy.deepcopy(plain)
    use_fast_gradients(fast)
    x = torch.rand(2, 6, side, side, dtype=torch.float64).to(memory_format=torch.channels_last)

    def values(layer: nn.Conv2d) -> list[Tensor]:
        given = x.clone().requires_grad_()
        out: Tensor = layer(given)
        return [out, *torch.autograd.grad(out.pow(2).sum(), [given, layer.weight])]

    for ours, theirs in zip(values(fast), values(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_the_precision_is_that_of_the_input() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    use_fast_gradients(layer)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.rand(1, 4, 8, 8).bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_other_convolutions_are_left_alone() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 3, dilation=2, groups=4))
    use_fast_gradients(layers)
    assert not any("forward" in vars(layer) for layer in layers)
