"""The losses of a training step are torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import roi_align

from pipeline.config import Architecture
from pipeline.model.detector import NucleusDetector
from pipeline.model.losses import (
    UNKNOWN,
    Sampled,
    Targets,
    box_losses,
    classification_loss,
    likely_labels,
    mask_targets,
    match_anchors,
    proposal_losses,
    sample_proposals,
)
from pretend_cuda import PretendedCuda

SIDE, SHAPES = 160, ((40, 40), (20, 20), (10, 10), (5, 5))
MODEL = NucleusDetector(
    Architecture(channels=8, box_hidden=8, mask_channels=8, mask_layers=1, backbone="test_efficientnet")
).train()
NO_MAP = torch.zeros(0)


def boxes(count: int, least: float = 2) -> Tensor:
    """Inside an image of SIDE px."""
    corners = torch.rand(count, 2) * (SIDE - least)
    return torch.cat([corners, corners + least + torch.rand(count, 2) * (SIDE - least - corners)], 1)


@pytest.mark.parametrize("counts", [(3, 40), (5, 0), (0, 0)])
def test_losses_of_the_proposals_are_torchvisions(counts: tuple[int, ...]) -> None:
    """The same bits, with and without nuclei: the same anchors are sampled."""
    rpn, anchors_at = MODEL.rpn, 6
    torch.manual_seed(sum(counts))
    nuclei = [boxes(count) for count in counts]
    logits = [torch.randn(len(counts), anchors_at, *shape) for shape in SHAPES]
    deltas = [torch.randn(len(counts), anchors_at * 4, *shape) for shape in SHAPES]
    images = type("Images", (), {"tensors": torch.empty(len(counts), 1, SIDE, SIDE), "image_sizes": [(SIDE,) * 2] * 2})
    anchors = rpn.anchor_generator(images, logits)
    torch.manual_seed(1)
    labels, matched = rpn.assign_targets_to_anchors(anchors, [{"boxes": b} for b in nuclei])
    score = torch.cat([s.permute(0, 2, 3, 1).flatten(1) for s in logits], 1)
    delta = torch.cat([d.permute(0, 2, 3, 1).reshape(len(d), -1, 4) for d in deltas], 1).flatten(0, 1)
    expected = rpn.compute_loss(score, delta, labels, rpn.box_coder.encode(matched, anchors))
    torch.manual_seed(1)
    sizes = [anchors_at * height * width for height, width in SHAPES]
    grids = [a.view(*shape, anchors_at, 4) for a, shape in zip(anchors[0].split(sizes), SHAPES, strict=True)]
    losses = proposal_losses(rpn, logits, deltas, grids, nuclei)
    assert losses["loss_objectness"] == expected[0]
    assert losses["loss_rpn_box_reg"] == expected[1]


@given(st.integers(0, 2**31), st.lists(st.integers(0, 20), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_anchors_are_matched_alike_on_a_gpu(seed: int, counts: list[int]) -> None:
    """Law: of images together, padded to the most nuclei, and one by one."""
    torch.manual_seed(seed)
    rpn, nuclei = MODEL.rpn, [boxes(count) for count in counts]
    grids = []
    for shapes, (height, width) in zip(rpn.anchor_generator.cell_anchors, SHAPES, strict=True):
        y, x = (torch.arange(n) * (SIDE // height) for n in (height, width))
        corner = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
        grids.append(shapes + corner.repeat(1, 1, 2)[:, :, None])
    expected = match_anchors(nuclei, grids, rpn.proposal_matcher)
    with PretendedCuda():
        there = match_anchors([n.to("cuda") for n in nuclei], [g.to("cuda") for g in grids], rpn.proposal_matcher)
        assert there.device.type == "cuda"
        assert there.tolist() == expected.tolist()


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_a_nucleus_of_unknown_class_may_be_of_any(seed: int, count: int, classes: int) -> None:
    """Laws: known classes have the cross entropy; of an unknown one, the probabilities of all classes are added."""
    torch.manual_seed(seed)
    logits, labels = torch.randn(count, 1 + classes), torch.randint(0, 1 + classes, (count,))
    torch.testing.assert_close(classification_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    unknown = torch.full_like(labels, UNKNOWN)
    expected = -logits.softmax(1)[:, 1:].sum(1).log().mean()
    torch.testing.assert_close(classification_loss(logits, unknown), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(likely_labels(logits, labels), labels)
    assert torch.equal(likely_labels(logits, unknown), 1 + logits[:, 1:].argmax(1))


@pytest.mark.parametrize("counts", [(3, 40), (5, 0), (0, 0)])
def test_losses_of_the_boxes_are_torchvisions(counts: tuple[int, ...]) -> None:
    heads = MODEL.roi_heads
    torch.manual_seed(sum(counts))
    nuclei = [boxes(count) for count in counts]
    proposals = [torch.cat([boxes(300), (b + torch.randn_like(b)).clamp(0, SIDE)]) for b in nuclei]
    names = [torch.ones(count, dtype=torch.int64) for count in counts]
    dictionaries = [{"boxes": b, "labels": n, "masks": NO_MAP} for b, n in zip(nuclei, names, strict=True)]
    torch.manual_seed(1)
    chosen, nucleus, labels, offsets = heads.select_training_samples(list(proposals), dictionaries)
    torch.manual_seed(1)
    sampled = sample_proposals(heads, proposals, Targets(nuclei, names, NO_MAP, NO_MAP))
    assert torch.equal(sampled.boxes, torch.cat(chosen))
    assert torch.equal(sampled.nucleus, torch.cat(nucleus))
    assert torch.equal(sampled.labels, torch.cat(labels))
    assert torch.bincount(sampled.image, minlength=2).tolist() == [len(b) for b in chosen]
    logits, deltas = torch.randn(len(sampled.boxes), 2), torch.randn(len(sampled.boxes), 8)
    expected = fastrcnn_loss(logits, deltas, labels, offsets)
    losses = box_losses(heads, logits, deltas, sampled, torch.where(sampled.labels > 0)[0])
    assert (losses["loss_classifier"], losses["loss_box_reg"]) == expected


@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([1, 7, 28]))
@settings(max_examples=25, deadline=None)
def test_masks_of_proposals_are_torchvisions_roi_align(seed: int, count: int, size: int) -> None:
    """Law: the same values for boxes of every size and place, in images with and without room for a window."""
    torch.manual_seed(seed)
    side = int(torch.randint(20, SIDE, ()))
    nuclei = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, side // 4, side // 4), np.int32))
    nuclei = nuclei.repeat_interleave(4, 1).repeat_interleave(4, 2)
    side = nuclei.shape[-1]
    corners = torch.rand(count, 2) * side
    rois = torch.cat([corners, corners + torch.rand(count, 2) * (side - corners)], 1)
    image, number = torch.randint(0, 2, (count,)), torch.randint(0, 3, (count,))
    sampled = Sampled(rois, image.int(), torch.ones_like(number), number, rois)
    masks = torch.stack([(nuclei[i] == n + 1).float() for i, n in zip(image, number, strict=True)] or [nuclei[0] * 0.0])
    which = torch.arange(count, dtype=torch.float32)[:, None]
    expected = roi_align(masks[:, None], torch.cat([which, rois], 1), (size, size), 1.0)[:, 0]
    torch.testing.assert_close(mask_targets(sampled, nuclei, size), expected, rtol=0, atol=2e-5)
