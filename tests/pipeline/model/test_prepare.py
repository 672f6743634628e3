"""A detector prepared for inference computes what it did before."""

import copy
import dataclasses

import pytest
import torch

from pipeline.config import Architecture
from pipeline.model.detector import NucleusDetector
from pipeline.model.prepare import fold, slice_widest, widen_kernels
from pipeline.model.weights import detector_architecture, find_weights

TINY = Architecture(channels=16, box_hidden=16, mask_channels=8, mask_layers=1)


@pytest.mark.parametrize(("backbone", "left"), [(TINY.backbone, 0), ("res2net50_26w_4s", 0), ("densenet121", 1)])
def test_folded_batch_norms_change_nothing(backbone: str, left: int) -> None:
    """Law: features before and after folding agree within rounding, with statistics that are not those of a new net.

    Also where norms come in another order than the convolutions before them, or norm sums, which keep theirs.
    """
    torch.manual_seed(1)
    model = NucleusDetector(dataclasses.replace(TINY, backbone=backbone))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model.double().eval().features(images).table.maps()
        folded = fold(model).features(images).table.maps()
    assert min(sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()), 1) == left
    for before, after in zip(expected, folded, strict=True):
        assert before.std() > 0.01
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_norm_of_what_was_changed_in_place_is_not_folded() -> None:
    """Law: the same features, whatever changes a convolution's output before the norm takes it."""
    torch.manual_seed(1)
    model = NucleusDetector(TINY).double().eval()
    norm = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(3),))
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model.features(images).table.pixels
        assert torch.allclose(fold(model).features(images).table.pixels, expected, atol=1e-5)
    assert norm in list(model.modules())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_wider_kernels_change_nothing(precision: torch.dtype) -> None:
    """Law: the same bits as with TensorFlow's padding, which the shipped backbone has with kernels of 3 and of 5 px."""
    torch.manual_seed(1)
    model = fold(NucleusDetector(TINY).eval())
    wide = widen_kernels(copy.deepcopy(model))
    sizes = {m.kernel_size for m in wide.modules() if isinstance(m, torch.nn.Conv2d)}
    assert {(4, 4), (6, 6)} <= sizes
    images = torch.rand(1, 3, 128, 192)
    with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        assert torch.equal(wide.features(images).table.pixels, model.features(images).table.pixels)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_widest_map_in_slices_is_the_same(precision: torch.dtype) -> None:
    """Law: the same bits, for the shipped backbone, whose block of 96 channels is computed in three parts."""
    torch.manual_seed(1)
    architecture = detector_architecture(find_weights("nuclei"))
    model = widen_kernels(fold(NucleusDetector(architecture).eval()))
    sliced = slice_widest(copy.deepcopy(model))
    changed = [n for n, _ in sliced.backbone.named_modules() if n not in dict(model.backbone.named_modules())]
    assert {name.partition(".block")[0] for name in changed} == {"blocks.1.0"}
    images = torch.rand(1, 3, 128, 192)
    with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        assert torch.equal(sliced.features(images).table.pixels, model.features(images).table.pixels)
