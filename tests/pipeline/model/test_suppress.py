"""Non-maximum suppression over a batch is that of each patch and level alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from pipeline.model import suppress
from pretend_cuda import PretendedCuda


@given(st.integers(0, 2**31), st.integers(0, 300), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_it_is_that_of_each_patch_and_level(seed: int, count: int, patches: int, on_gpu: bool, crowded: bool) -> None:
    """Law: on a CPU and on a GPU, together and patch by patch; best first, and patch by patch."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=draw) * 20], 1)
    scores = torch.randperm(count, generator=draw) / 300
    patch = torch.randint(patches, (count,), generator=draw).sort().values
    level = torch.randint(3, (count,), generator=draw)
    expected: list[int] = []
    counts = []
    for number in range(patches):
        rows = [torch.where((patch == number) & (level == one))[0] for one in range(3)]
        kept = torch.cat([r[nms(boxes[r], scores[r], 0.4)] for r in rows])
        expected += kept[scores[kept].argsort(descending=True)].tolist()
        counts.append(len(kept))
    given_ = (boxes, scores, patch, level)
    with pytest.MonkeyPatch.context() as patched, PretendedCuda():
        patched.setattr(suppress, "_BOXES_AT_ONCE", 10 if crowded else 1000)
        there = [t.to("cuda") for t in given_] if on_gpu else given_
        keep, sizes = suppress.suppress(*there, patches, iou=0.4)  # type: ignore[misc]
        assert keep.device.type == ("cuda" if on_gpu else "cpu")
        assert keep.tolist() == expected
    assert sizes == counts
