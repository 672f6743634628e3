"""Fusion: one view is itself, the order of views does not matter, votes count views."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, nms, roi_align

from pipeline.config import Architecture, Detector
from pipeline.model import fuse as fuse_module
from pipeline.model.detector import Candidates, Limits, NucleusDetector, Pyramid
from pipeline.model.fuse import _best_leader, fuse, infer
from pipeline.model.views import choose_views
from pretend_cuda import PretendedCuda

# coarse numbers, so that ties in scores and overlaps are common
coordinates = st.integers(-5, 12)  # a shifted view sees nuclei beyond the edge
boxes_ = st.tuples(
    coordinates,
    coordinates,
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.integers(0, 1),
)
one_view = st.lists(boxes_, max_size=6)


def tensors(view: Sequence[tuple[float, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = torch.tensor(view, dtype=torch.float32).reshape(-1, 6)
    boxes = torch.stack([table[:, 0], table[:, 1], table[:, 0] + table[:, 2], table[:, 1] + table[:, 3]], 1)
    return boxes, table[:, 4], table[:, 5].long(), 0.5 + table[:, 2] / 16


EVERY = Limits.of_patch(Detector(score=0, nms=0.4, objectness=0.3), (128, 128), 0.25)


def seen(by_view: Sequence[Sequence[tuple[float, ...]]], device: str = "cpu") -> list[Candidates]:
    columns = (tuple(column.to(device) for column in tensors(view)) for view in by_view)
    return [Candidates(boxes, scores, classes, certain, False) for boxes, scores, classes, certain in columns]


def fused(by_view: Sequence[Sequence[tuple[float, ...]]]) -> tuple[Tensor, ...]:
    (result,) = fuse([seen(by_view)], EVERY, 2)
    return result


@given(one_view)
def test_one_view_is_returned_as_it_is(view: list[tuple[float, ...]]) -> None:
    """Law: fusing one view changes nothing."""
    boxes, scores, classes, certain = tensors(view)
    fused_boxes, fused_scores, class_index, class_scores, votes = fused([view])
    assert torch.equal(fused_boxes, boxes)
    assert torch.equal(fused_scores, scores)
    assert torch.equal(class_index, classes)
    assert torch.equal(class_scores, certain)
    assert votes.tolist() == [1] * len(view)


@given(st.lists(st.lists(one_view, min_size=3, max_size=3), min_size=2, max_size=4), st.sampled_from(["cpu", "cuda"]))
@example([[[(-5, 0, 6, 6, 0.75, 0)], [], []], [[(12, 0, 8, 6, 0.5, 0)], [], []]] * 2, "cuda")
@settings(max_examples=40)
def test_patches_of_a_batch_do_not_show(patches: list[list[list[tuple[float, ...]]]], device: str) -> None:
    """Law: bitwise the same alone and in a batch."""
    with PretendedCuda():
        batch = [[c.cpu() for c in patch] for patch in fuse([seen(p, device) for p in patches], EVERY, 2)]
    for together, patch in zip(batch, patches, strict=True):
        for a, b in zip(together, fused(patch), strict=True):
            assert torch.equal(a, b)


@given(st.lists(one_view, min_size=3, max_size=3))
@settings(max_examples=60)
def test_the_order_of_views_does_not_matter(by_view: list[list[tuple[float, ...]]]) -> None:
    """Law: bitwise the same for every permutation of the views."""
    first = fused(by_view)
    for permutation in itertools.permutations(by_view):
        for a, b in zip(first, fused(list(permutation)), strict=True):
            assert torch.equal(a, b)


@given(st.lists(one_view, min_size=2, max_size=4))
def test_votes_are_views_and_scores_are_means(by_view: list[list[tuple[float, ...]]]) -> None:
    result = fused(by_view)
    assert ((result[4] >= 1) & (result[4] <= len(by_view))).all()
    assert (result[1] <= 0.75 * result[4] / len(by_view) + 1e-6).all()
    assert ((result[3] >= 0) & (result[3] <= 1)).all()
    assert (result[1].diff() <= 0).all()


def test_copies_of_a_view_agree() -> None:
    view = [(0, 0, 6, 6, 0.75, 0), (20, 20, 5, 5, 0.5, 1)]
    boxes, scores, classes, certain, votes = fused([view] * 4)
    assert torch.equal(boxes, tensors(view)[0])
    assert torch.equal(scores, tensors(view)[1])
    assert classes.tolist() == [0, 1]
    torch.testing.assert_close(certain, tensors(view)[3])
    assert votes.tolist() == [4, 4]
    (kept,) = fuse([seen([view] * 4)], EVERY._replace(score=0.5), 2)
    assert kept.scores.tolist() == [0.75, 0.5], "at least the score"


def test_known_answer() -> None:
    """Two views see one nucleus a pixel apart, and give it other classes; a third sees another one only."""
    views = [[(0, 0, 6, 6, 0.75, 0)], [(1, 0, 6, 6, 0.25, 1)], [(50, 0, 8, 8, 0.5, 0)]]
    boxes, scores, classes, certain, votes = fused(views)
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0, 6.25, 6], [50, 0, 58, 8]]))
    torch.testing.assert_close(scores, torch.tensor([1 / 3, 1 / 6]))
    assert classes.tolist() == [0, 0]
    torch.testing.assert_close(certain, torch.tensor([0.75 * (0.5 + 6 / 16), 1.0]))
    assert votes.tolist() == [2, 1]


@pytest.fixture(scope="module")
def tiny() -> NucleusDetector:
    torch.manual_seed(0)
    return NucleusDetector(Architecture(channels=16, box_hidden=16, mask_channels=8, mask_layers=1)).eval()


def limits(proposals: int, instances: int, score: float) -> Limits:
    every = Limits.of_patch(Detector(score=score, objectness=0.3), (128, 128), 0.25)
    return every._replace(anchors=2 * proposals, proposals=proposals, instances=instances)


def test_inference_in_several_views_gives_instances_in_the_patch(tiny: NucleusDetector) -> None:
    room = limits(40, 30, score=0.01)
    with torch.inference_mode():
        images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        detected = infer(tiny, images, choose_views(4), room, 16)
        swapped = infer(tiny, images.flip(0), choose_views(4), room, 16)
    for instances, other in zip(detected, reversed(swapped), strict=True):
        assert instances.mask_probs.shape == (len(instances.boxes), 28, 28)
        assert (instances.scores >= room.score).all()
        torch.testing.assert_close(instances.boxes, other.boxes, atol=1e-3, rtol=1e-3)


class Exact:
    """In the detector's place: sees a nucleus on black where it is, and its mask is what the image shows there.

    Each view is as certain as `scores` says, and shows the mask as brightly; the third one reaches a limit.
    """

    architecture = Architecture(upscale=1.0, mask_size=6)

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.views = scores, list[Tensor]()

    def features(self, images: Tensor) -> Any:
        self.views.append(images)
        return Pyramid([images], cast(Any, (images, len(self.views) - 1)), (48, 64))

    def propose(self, features: Any, _: Limits) -> Any:
        return features.table

    def classify(self, _: Any, proposals: Any, limits: Limits) -> list[Candidates]:
        images, number = proposals
        y, x = torch.where(images[0, 0] > 0)
        boxes = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()[None]
        score = torch.tensor([self.scores[number]])
        enough, class_index = score >= limits.score, torch.zeros(1, dtype=torch.int64)
        return [Candidates(boxes[enough], score[enough], class_index[enough], score[enough], number == 2)]

    def masks(self, features: Any, boxes: list[Tensor], _: Any) -> Tensor:
        images, number = features.table
        shown = roi_align(images[:, :1], boxes, 6, sampling_ratio=1, aligned=True)[:, 0]
        return torch.mul(shown, self.scores[number])


@pytest.mark.parametrize("scores", [(0.9, 0.3, 0.6, 0.6), (0.9, 0.3, 0.6, 0.6, 0.7, 0.5, 0.8, 0.6)])
def test_a_fused_nucleus_is_the_mean_of_its_views(scores: tuple[float, ...]) -> None:
    """Law: its mask too, turned back, whatever its shape; in one view alone it may have half the score that it needs.

    The patch may hold more where one of the views does.
    """
    shape = 0.1 + torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(1, 3, 48, 64)
    image[..., 10:16, 31:37] = shape
    mean = sum(scores) / len(scores)
    model: Any = Exact(scores)
    (patch,) = infer(model, image, choose_views(len(scores)), limits(40, 30, score=0.55), 16)
    assert patch.boxes.tolist() == [[31, 10, 37, 16]]
    assert patch.votes.tolist() == [len(scores)]
    assert patch.scores.tolist() == pytest.approx([mean])
    torch.testing.assert_close(patch.mask_probs[0], mean * shape)
    assert patch.saturated


@pytest.mark.parametrize(("score", "votes"), [(0.25, 3), (0.3, 4)])
def test_a_view_counts_that_gives_half_the_score_which_is_needed(score: float, votes: int) -> None:
    """However many views there are: less is no detection."""
    image = torch.zeros(1, 3, 48, 64)
    image[..., 10:16, 31:37] = 0.5
    model: Any = Exact((0.9, score, 0.9, 0.9))
    (patch,) = infer(model, image, choose_views(4), limits(40, 30, score=0.55), 16)
    assert patch.votes.tolist() == [votes]


@pytest.mark.parametrize(("score", "found"), [(0.5, 0), (0.55, 1)])
def test_a_single_view_needs_the_whole_score(score: float, found: int) -> None:
    image = torch.zeros(1, 3, 48, 64)
    image[..., 10:16, 31:37] = 0.5
    model: Any = Exact((score,))
    (patch,) = infer(model, image, choose_views(1), limits(40, 30, score=0.55), 16)
    assert len(patch.boxes) == found


def test_a_saturated_patch_is_detected_in_quarters(tiny: NucleusDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few boxes a whole patch is full; its quarters together may hold four times as many."""
    divided, in_quarters = [], fuse_module._in_quarters

    def counted(*given: Any) -> Candidates:
        divided.append(given)
        return in_quarters(*given)

    monkeypatch.setattr(fuse_module, "_in_quarters", counted)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        (roomy,) = infer(tiny, image, choose_views(1), limits(10_000, 10_000, score=0.001), 32)
        assert (roomy.saturated, len(divided)) == (False, 0)
        (crowded,) = infer(tiny, image, choose_views(1), limits(200, 10, score=0.001), 32)
    assert (crowded.saturated, len(divided)) == (True, 1)
    assert 10 < len(crowded.boxes) <= 40


@pytest.mark.parametrize(("upscale", "side"), [(1.0, 160), (1.5, 192), (2.0, 160)])
def test_quarters_fit_the_strides_of_any_enlargement(
    upscale: float, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch of 256 px with a margin of 32: a quarter reads 160 px, or the next that enlarges to a multiple of 32."""
    architecture = Architecture(upscale=upscale, channels=16, box_hidden=16, mask_channels=8, mask_layers=1)
    torch.manual_seed(0)
    model, sides = NucleusDetector(architecture).eval(), []
    features = model.features

    def watched(images: Tensor) -> Pyramid:
        sides.append(images.shape[-1])
        return features(images)

    monkeypatch.setattr(model, "features", watched)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        (crowded,) = infer(model, image, choose_views(1), limits(200, 10, score=0.001), 32)
    assert crowded.saturated
    assert sides == [256, *[side] * 4]


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_the_best_leader_is_the_one_of_the_whole_matrix(seed: int) -> None:
    """Looking only at the leaders near in x gives what a search of all of them gives."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(1500, 2, generator=random) * 200
    boxes = torch.cat([corner, corner + 4 + 20 * torch.rand(1500, 2, generator=random)], 1)
    leaders = boxes[nms(boxes, torch.arange(1500.0).flip(0), 0.3).sort().values]
    assert torch.equal(_best_leader(boxes, leaders), box_iou(boxes, leaders).argmax(1))
