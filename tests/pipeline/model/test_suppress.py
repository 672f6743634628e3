"""Non-maximum suppression over a batch is that of each patch and level alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from pipeline.model import suppress
from pretend_cuda import PretendedCuda


@given(
    st.integers(0, 2**31),
    st.integers(0, 300),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.sampled_from([0, -40]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_it_is_that_of_each_patch_and_level(
    seed: int, count: int, patches: int, levels: int, least: int, on_gpu: bool, crowded: bool
) -> None:
    """Law: on a CPU and on a GPU, also of boxes left of the edge and above; best first, and patch by patch."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 60 + least
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=draw) * 20], 1)
    scores = torch.randperm(count, generator=draw) / 300
    patch = torch.randint(patches, (count,), generator=draw).sort().values
    level = torch.randint(levels, (count,), generator=draw)
    expected: list[int] = []
    counts = []
    for number in range(patches):
        rows = [torch.where((patch == number) & (level == one))[0] for one in range(levels)]
        kept = torch.cat([r[nms(boxes[r], scores[r], 0.4)] for r in rows])
        expected += kept[scores[kept].argsort(descending=True)].tolist()
        counts.append(len(kept))
    columns = (boxes, scores, patch, level)
    with pytest.MonkeyPatch.context() as patched, PretendedCuda():
        patched.setattr(suppress, "_BOXES_AT_ONCE", 60 if crowded else 1000)
        boxes, scores, patch, level = (t.to("cuda") if on_gpu else t for t in columns)
        keep, sizes = suppress.suppress(boxes, scores, patch, patches, level=level if levels > 1 else None, iou=0.4)
        assert keep.device.type == ("cuda" if on_gpu else "cpu")
        assert keep.tolist() == expected
    assert sizes == counts


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(0, 300))
@settings(max_examples=40)
def test_of_equal_scores_the_first_is_the_best_whatever_else_there_is(seed: int, count: int, others: int) -> None:
    """Law: on a CPU, boxes far away change neither which are kept nor their order."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count + others, 2, generator=draw) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(len(corner), 2, generator=draw) * 20], 1)
    near = torch.randperm(len(boxes), generator=draw) < count
    boxes[~near] += 1000
    scores = torch.randint(1, 4, (len(boxes),), generator=draw) / 4
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    together, _ = suppress.suppress(boxes, scores, zeros, 1, iou=0.4)
    alone, _ = suppress.suppress(boxes[near], scores[near], zeros[near], 1, iou=0.4)
    assert torch.equal(together[near[together]], torch.where(near)[0][alone])
