"""RoI pooling gives torchvision's numbers, forward and backward."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign

from pipeline.model.roi_align import FeatureTable, RoIPool, flatten_boxes

STRIDES = (4, 8, 16, 32)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 20), st.sampled_from([1, 7, 14]))
@settings(max_examples=30, deadline=None)
def test_it_is_torchvisions_roi_align(seed: int, images: int, count: int, size: int) -> None:
    """Law: the same values and gradients as MultiScaleRoIAlign, for boxes of every size, beyond the edge too."""
    draw = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(images, 5, 96 // s, 128 // s, generator=draw, dtype=torch.float64).requires_grad_() for s in STRIDES
    ]
    boxes = []
    for _ in range(images):
        corner = torch.rand(count, 2, generator=draw, dtype=torch.float64) * 140 - 10
        side = 10 ** (torch.rand(count, 2, generator=draw, dtype=torch.float64) * 3.2 - 0.3)
        boxes.append(torch.cat([corner, corner + side], 1))
    features = {str(i): m for i, m in enumerate(maps)}
    reference = MultiScaleRoIAlign(list(features), size, 2, canonical_scale=64, canonical_level=3)
    reference.scales, reference.map_levels = None, None
    expected = reference(features, boxes, [(96, 128)] * images)
    pool = RoIPool(size, STRIDES, canonical_px=64, canonical_level=3)
    pooled = pool(FeatureTable.of(maps, torch.float64), *flatten_boxes(boxes))
    assert pooled.shape == (images * count, 5, size, size)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-9)
    if count:
        weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
        for ours, theirs in zip(
            torch.autograd.grad(pooled, maps, weight), torch.autograd.grad(expected, maps, weight), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
