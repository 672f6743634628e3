"""The detector's parts: shapes, limits, and weights files that load as what they state."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection.image_list import ImageList

from pipeline.config import STRIDES, Architecture, Detector, Sampling, side_step
from pipeline.errors import ConfigError, WeightsError
from pipeline.model import dcgmm, load, tensors
from pipeline.model.detector import (
    Limits,
    NucleusDetector,
    _convolvable,
    _largest_around,
    _MaskPredictor,
    _peaks,
    load_weights,
    save_weights,
)
from pipeline.model.losses import Sampled, mask_targets
from pipeline.model.roi_align import FeatureTable
from pipeline.model.weights import detector_architecture, find_weights, licence, read_notes, shipped

TINY = Architecture(channels=16, box_hidden=16, mask_channels=8, mask_layers=1)
LIMITS = Limits(anchors=100, objectness=0.3, proposals=50, instances=20, score=0.0, nms=0.5)


@pytest.fixture(scope="module")
def tiny() -> NucleusDetector:
    torch.manual_seed(0)
    return NucleusDetector(TINY).eval()


def test_boxes_are_inside_the_patch_and_masks_are_probabilities(tiny: NucleusDetector) -> None:
    with torch.inference_mode():
        features = tiny.features(torch.rand(2, 3, 96, 96))
        batch = tiny.classify(features, tiny.propose(features, LIMITS), LIMITS)
        every = tiny.masks(features, [c.boxes for c in batch], [c.class_index for c in batch])
        masks = every.split([len(c.boxes) for c in batch])
    assert features.size == (144, 144)
    for candidates, probabilities in zip(batch, masks, strict=True):
        assert 0 < len(candidates.boxes) <= LIMITS.instances
        assert candidates.boxes.min() >= 0
        assert candidates.boxes.max() <= 96
        assert (candidates.boxes[:, 2:] > candidates.boxes[:, :2]).all()
        assert (candidates.scores.diff() <= 0).all()
        assert probabilities.shape == (len(candidates.boxes), 28, 28)
        assert probabilities.min() >= 0
        assert probabilities.max() <= 1
        assert candidates.saturated == (len(candidates.boxes) == LIMITS.instances)


def test_no_proposals_give_no_boxes(tiny: NucleusDetector) -> None:
    """On glass there are no proposals: in none of the patches, or in one of them."""
    with torch.inference_mode():
        features = tiny.features(torch.rand(2, 3, 96, 96))
        nothing, some = torch.zeros(0, 4), tiny.propose(features, LIMITS)[1]
        for proposals, expected in (([nothing, nothing], False), ([nothing, some], True)):
            first, second = tiny.classify(features, proposals, LIMITS)
            assert first.boxes.shape == (0, 4)
            assert first.scores.shape == first.class_index.shape == (0,)
            assert not first.saturated
            assert (len(second.boxes) > 0) == expected


def test_no_boxes_give_no_masks(tiny: NucleusDetector) -> None:
    with torch.inference_mode():
        features = tiny.features(torch.rand(1, 3, 96, 96))
        masks = tiny.masks(features, [torch.empty(0, 4)], [torch.empty(0, dtype=torch.int64)])
    assert masks.shape == (0, 28, 28)


class Crowd(torch.nn.Module):
    """A proposal head with 50 nuclei, the first the clearest, of two anchors each; all other anchors see nothing.

    beside: how much less the second anchor of each sees.
    """

    def __init__(self, beside: float = 0.0) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, levels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        scores = [torch.full((1, 6, *level.shape[-2:]), -9.0) for level in levels]
        for nucleus in range(50):
            y, x = divmod(nucleus, 8)
            # squares of 18 px, 4 px apart: an IoU of .64; the next nucleus is 32 px away
            scores[0][0, 2, 8 * y + 2, 8 * x + 2 : 8 * x + 4] = 9 - nucleus / 10
            scores[0][0, 2, 8 * y + 2, 8 * x + 3] -= self.beside
        return scores, [torch.zeros(1, 24, *level.shape[-2:]) for level in levels]


@given(st.integers(0, 5000))
def test_a_gpu_convolves_few_numbers_of_rows(count: int) -> None:
    """No fewer than there are, and less than twice as many; on a CPU as many as there are."""
    there = len(_convolvable(torch.empty(count, 2, 1, 1, device="meta")))
    assert there in {0, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 5120}
    assert count <= there < max(2 * count, 65)
    assert len(_convolvable(torch.empty(count, 2, 1, 1))) == count


@pytest.mark.parametrize("count", [0, 3])
def test_masks_are_trained_as_they_are_predicted(count: int) -> None:
    """Law: the matrix products of training give the values and gradients of the layers that they stand for."""
    torch.manual_seed(0)
    predictor = _MaskPredictor(nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(6, 3, 1))
    features = torch.rand(count, 8, 5, 5)
    results = []
    for training in (False, True):
        given = features.clone().requires_grad_()
        logits = predictor.train(training)(given)
        gradients = torch.autograd.grad(logits.pow(3).sum(), [given, *predictor.parameters()])
        results.append([logits, *gradients])
    assert results[0][0].shape == (count, 3, 10, 10)
    torch.testing.assert_close(results[1], results[0])


def test_clear_nuclei_do_not_displace_the_others() -> None:
    """Each nucleus has several anchors: all must enter the NMS for 50 nuclei to get the 60 proposals there may be."""
    torch.manual_seed(0)
    model = NucleusDetector(TINY).eval()
    model.rpn.head = Crowd()
    model.rpn.nms_thresh = 0.5
    with torch.inference_mode():
        features = model.features(torch.zeros(1, 3, 192, 192))
        limits = LIMITS._replace(anchors=Detector().anchors_per_proposal * 60, proposals=60)
        (proposals,) = model.propose(features, limits)
    assert len(proposals) == 50


class Ties(torch.nn.Module):
    """Objectness of few values, many of them equal, which does not depend on the size of the patch."""

    def forward(self, levels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        every = torch.randint(1, 4, (1, 6, 128, 128), generator=torch.Generator().manual_seed(0)).bfloat16()
        scores = [every[..., : level.shape[2], : level.shape[3]] for level in levels]
        return scores, [torch.zeros(1, 24, *level.shape[-2:]) for level in levels]


def test_an_anchor_beside_a_better_one_proposes_nothing(tiny: NucleusDetector) -> None:
    """Two anchors see one nucleus, and overlap by less than what the suppression of proposals drops."""
    model = copy.deepcopy(tiny)
    model.rpn.head = Crowd(beside=1.0)
    limits = LIMITS._replace(objectness=0.9, proposals=100)
    with torch.inference_mode():
        (proposals,) = model.propose(model.features(torch.zeros(1, 3, 192, 192)), limits)
    assert len(proposals) == 50


class Fixed(nn.Module):
    """A box predictor whose scores are given, and which leaves proposals where they are."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits, torch.zeros(len(self.logits), 4 * self.logits.shape[1])


def test_boxes_are_classified_as_they_are_scored() -> None:
    """Doubt between two classes lowers the class's score alone; thin boxes are no nuclei; a limit may be met."""
    torch.manual_seed(0)
    model = NucleusDetector(dataclasses.replace(TINY, classes=("a", "b"), upscale=1.0)).eval()
    probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.1, 0.7], [0.2, 0.1, 0.7], [0.9, 0.1, 0.0]])
    model.roi_heads.box_predictor = Fixed((probabilities + 1e-9).log().tolist())
    proposals = torch.tensor([[4, 4, 20, 20], [40, 4, 60, 24], [4, 40, 5, 60], [40, 40, 60, 41], [4, 70, 20, 90]])
    limits = LIMITS._replace(score=0.3, instances=2)
    with torch.inference_mode():
        features = model.features(torch.zeros(1, 3, 96, 96))
        (some,) = model.classify(features, [proposals.float()], limits)
        (one,) = model.classify(features, [proposals.float()], limits._replace(instances=1))
    assert some.boxes.tolist() == proposals[:2].tolist()
    torch.testing.assert_close(some.scores, torch.tensor([0.9, 0.5]))
    assert some.class_index.tolist() == [0, 1]
    torch.testing.assert_close(some.class_scores, torch.tensor([0.6 / 0.9, 0.4 / 0.5]))
    assert (some.saturated, one.saturated, len(one.boxes)) == (False, True, 1)


class Learnt(nn.Module):
    """In the place of a mask head and its pool: gives each box what training would have it give, 40 or -40."""

    def __init__(self, nuclei: torch.Tensor) -> None:
        super().__init__()
        self.nuclei = nuclei

    def forward(self, _: Any, rois: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(rois), dtype=torch.int64)
        truth = mask_targets(Sampled(rois, image, zeros, zeros, rois), self.nuclei, 8)
        return (80 * truth - 40)[:, None].expand(-1, 2, -1, -1)


def test_a_mask_is_of_what_lies_in_its_box() -> None:
    """Law: where the head has learnt its targets, to the pixel."""
    torch.manual_seed(0)
    model = NucleusDetector(dataclasses.replace(TINY, upscale=2.0)).eval()
    enlarged = torch.randint(2, (1, 64, 64), dtype=torch.int32)  # at the scale that the network sees
    model.roi_heads.mask_roi_pool = Learnt(enlarged)
    model.roi_heads.mask_head = model.roi_heads.mask_predictor = nn.Identity()
    boxes = [torch.tensor([[x, y, x + 4, y + 4] for x, y in ((0.0, 1.0), (3.5, 7.0), (21.0, 28.0))])]
    with torch.inference_mode():
        masks = model.masks(model.features(torch.zeros(1, 3, 32, 32)), boxes, [torch.zeros(3, dtype=torch.int64)])
    for mask, (x, y, *_) in zip(masks, (2 * boxes[0]).int().tolist(), strict=True):
        assert torch.equal(mask.round().int(), enlarged[0, y : y + 8, x : x + 8])


def test_every_pixel_is_classified_by_what_lies_at_its_centre() -> None:
    """The branch is right, for certain, where it says what the regions show there; no other is looked at."""
    branch = NucleusDetector(TINY).semantic
    assert branch is not None
    branch.score = nn.Conv2d(3, 3, 1, bias=False)
    branch.score.weight.data = 50 * torch.eye(3)[..., None, None]
    regions = torch.randint(3, (2, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = F.one_hot(regions[:, 2::4, 2::4].long(), 3).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        assert float(branch.loss(features, regions)) < 1e-6


def test_equal_proposals_are_chosen_alike_in_every_patch() -> None:
    """What is proposed in one part does not depend on how far the patch reaches beyond it."""
    torch.manual_seed(0)
    model = NucleusDetector(TINY).eval()
    model.rpn.head = Ties()
    limits, proposed = LIMITS._replace(anchors=100_000, proposals=100_000, objectness=0.5), []
    with torch.inference_mode():
        for width in (256, 192):
            (proposals,) = model.propose(model.features(torch.zeros(1, 3, 128, width)), limits)
            proposed.append([box for box in proposals.tolist() if box[2] < 128])
    assert len(proposed[0]) > 30
    assert proposed[0] == proposed[1]


def test_the_interior_of_a_patch_does_not_depend_on_its_place() -> None:
    """Two tiles compute the same bits where both see all that the shipped network looks at, in bfloat16 too."""
    running = load.detector(Detector())
    image = torch.rand(1, 3, 960, 1024, generator=torch.Generator().manual_seed(0))
    step, reach = side_step(running.model.architecture.upscale), 384
    shift = 2 * step
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        whole, part = (running.model.features(i).table.maps() for i in (image, image[..., shift:, shift:]))
    for theirs, ours, stride in zip(whole, part, STRIDES, strict=True):
        at, inner = (round(px * running.model.architecture.upscale / stride) for px in (shift, reach))
        theirs = theirs[..., at:, at:]
        assert ours.shape == theirs.shape
        assert torch.equal(ours[..., inner:-inner, inner:-inner], theirs[..., inner:-inner, inner:-inner])
        assert inner < min(ours.shape[-2:]) / 2


def test_anchors_are_torchvision_s(tiny: NucleusDetector) -> None:
    """Of a rectangle, for every anchor of every level."""
    size, shapes = (96, 160), tuple((96 // stride, 160 // stride) for stride in STRIDES)
    maps = [torch.empty(1, 1, *shape) for shape in shapes]
    (expected,) = tiny.rpn.anchor_generator(ImageList(torch.empty(1, 3, *size), [size]), maps)
    table = FeatureTable.of(maps, torch.float32)
    assert torch.equal(torch.cat([grid.flatten(0, 2) for grid in tiny._anchor_grids(table)]), expected)


def test_anchors_beside_a_better_one_are_dropped() -> None:
    """Each shape of anchor by itself; equal neighbours stay."""
    logits = torch.full((1, 2, 5, 6), -9.0)
    logits[0, 0, 1, 1], logits[0, 0, 1, 2], logits[0, 0, 3, 4] = 3.0, 2.0, 1.0
    logits[0, 1, 1, 2] = logits[0, 1, 2, 3] = 0.5
    kept = [tuple(at) for at in (_peaks(logits) > -9).nonzero().tolist()]
    assert kept == [(0, 0, 1, 1), (0, 0, 3, 4), (0, 1, 1, 2), (0, 1, 2, 3)]


@given(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**31))
def test_the_largest_around_is_that_of_torch(shape: tuple[int, ...], seed: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    before = values.clone()
    assert torch.equal(_largest_around(values), F.max_pool2d(values, 3, 1, 1))
    assert torch.equal(values, before)


def test_limits_follow_the_area() -> None:
    settings = Detector(proposals_per_mm2=92_000, instances_per_mm2=30_000, anchors_per_proposal=2, score=0.4, nms=0.2)
    limits = Limits.of_patch(settings, (1024, 1024), 0.25)
    assert limits == Limits(anchors=12058, objectness=0.85, proposals=6029, instances=1966, score=0.4, nms=0.2)
    assert Limits.of_patch(settings, (2048, 2048), 0.25).proposals == pytest.approx(4 * 6029, abs=4)
    for long in ((512, 2048), (2048, 512)):
        assert Limits.of_patch(settings, long, 0.25) == limits


def test_weights_survive_a_round_trip(tiny: NucleusDetector, tmp_path: Path) -> None:
    """Law: what was saved loads equal, in half precision, and says its architecture."""
    file = tmp_path / "tiny.safetensors"
    save_weights(tiny, file, {"recipe": "none"})
    loaded = load_weights(file)
    assert detector_architecture(file) == TINY
    for name, value in tiny.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert not loaded.training


def test_files_older_than_a_setting_load_with_its_default(tiny: NucleusDetector, tmp_path: Path) -> None:
    """What a file does not state is as it was before there was a setting for it."""
    file = tmp_path / "tiny.safetensors"
    save_weights(tiny, file, {})
    notes, later = read_notes(file), {"ratios", "box_pool", "proposal_nms", "sampling", "score"}
    del notes["notes_sha256"]
    stated = {name: value for name, value in json.loads(notes["architecture"]).items() if name not in later}
    notes["architecture"] = json.dumps(stated)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, notes)
    architecture = detector_architecture(file)
    assert (architecture.ratios, architecture.box_pool, architecture.proposal_nms) == ((0.5, 1.0, 2.0), 7, 0.7)
    assert (architecture.sampling, architecture.score) == (Sampling(), 0.6)
    load_weights(file)


def test_a_damaged_file_is_refused(tiny: NucleusDetector, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    save_weights(tiny, file, {})
    content = bytearray(file.read_bytes())
    content[-100] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="do not match their checksum"):
        load_weights(file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights(file)


def test_notes_that_were_changed_are_refused(tiny: NucleusDetector, tmp_path: Path) -> None:
    """The architecture decides the result as the tensors do; older files have no checksum of it."""
    file = tmp_path / "tiny.safetensors"
    save_weights(tiny, file, {})
    notes, content = read_notes(file), safetensors.torch.load_file(file)
    notes["architecture"] = notes["architecture"].replace(f'"upscale": {TINY.upscale}', '"upscale": 8.0')
    assert "8.0" in notes["architecture"]
    safetensors.torch.save_file(content, file, notes)
    with pytest.raises(WeightsError, match="its notes do not match their checksum"):
        load_weights(file)
    safetensors.torch.save_file(content, file, {k: v for k, v in notes.items() if k != "notes_sha256"})
    load_weights(file)


def rewrite(file: Path, network: dict[str, Any], content: dict[str, torch.Tensor | None]) -> None:
    """Change what a file says of its network, and tensors of it; None: without that tensor. The checksums fit."""
    notes = {k: v for k, v in read_notes(file).items() if k != "notes_sha256"}
    notes["architecture"] = json.dumps({**json.loads(notes["architecture"]), **network})
    changed = {k: t for k, t in {**safetensors.torch.load_file(file), **content}.items() if t is not None}
    notes["sha256"] = tensors._tensors_sha256(changed)
    safetensors.torch.save_file(changed, file, notes)


LARGE = ("roi_heads.box_head.layers.0.weight", "roi_heads.box_head.layers.2.weight")
WIDE = {"box_hidden": 4096, "mask_channels": 4096}


@pytest.mark.parametrize(
    ("network", "content", "said"),
    [
        (WIDE, {}, r"has the shape \[.*\], not \[.*4096"),
        ({"mask_layers": 16}, {}, r"missing \['roi_heads\.mask_head\..*unknown \[\]"),
        ({}, dict.fromkeys(LARGE), rf"missing \['{LARGE[0]}', '{LARGE[1]}'\], unknown \[\]"),
        ({}, {"huge": torch.zeros(3)}, r"missing \[\], unknown \['huge'\]; download or copy it again"),
    ],
    ids=["shapes", "layers", "large tensors", "an unknown tensor"],
)
def test_a_network_is_not_built_before_its_tensors_fit_the_file(
    tiny: NucleusDetector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: dict[str, Any],
    content: dict[str, torch.Tensor | None],
    said: str,
) -> None:
    """A file may name a network of any size: it would fill the memory before the first tensor is compared."""
    file = tmp_path / "tiny.safetensors"
    save_weights(tiny, file, {})
    rewrite(file, network, content)
    built: list[str] = []
    build = NucleusDetector.__init__

    def watched(self: NucleusDetector, architecture: Architecture) -> None:
        build(self, architecture)
        built.append(next(self.parameters()).device.type)

    monkeypatch.setattr(NucleusDetector, "__init__", watched)
    with pytest.raises(WeightsError, match=said):
        load_weights(file)
    assert built == ["meta"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e5])
def test_weights_that_are_not_finite_are_neither_written_nor_read(
    tiny: NucleusDetector, tmp_path: Path, value: float
) -> None:
    """They would detect nothing, without a word; 1e5 is not finite in half precision."""
    file, name = tmp_path / "tiny.safetensors", "roi_heads.box_predictor.score.bias"
    wrong = copy.deepcopy(tiny)
    wrong.get_parameter(name).data[1] = value
    with pytest.raises(WeightsError, match=rf"{name} is not finite in half precision"):
        save_weights(wrong, file, {})
    assert not file.exists()
    save_weights(tiny, file, {})
    for stored in (wrong.get_parameter(name).data.half(), torch.full((2,), 1e300, dtype=torch.float64)):
        rewrite(file, {}, {name: stored})
        with pytest.raises(WeightsError, match=rf"holds values in {name} that are not finite"):
            load_weights(file)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3)}, foreign)
    with pytest.raises(WeightsError, match="holds no weights of Nightslide"):
        load_weights(foreign)
    safetensors.torch.save_file(
        {"a": torch.zeros(3)}, foreign, {"sha256": "", "architecture": json.dumps({"depth": 3})}
    )
    with pytest.raises(WeightsError, match="unknown key 'depth'"):
        load_weights(foreign)
    stated = json.dumps(dataclasses.asdict(TINY) | {"upscale": 10**400})
    safetensors.torch.save_file({"a": torch.zeros(3)}, foreign, {"sha256": "", "architecture": stated})
    with pytest.raises(WeightsError, match=r"upscale=inf: need 0\.25 to 8"):
        load_weights(foreign)
    pickled = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(3)}, pickled)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights(pickled)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"backbone": "hf-hub:timm/resnet18.a1_in1k"}, "need a timm model's name"),
        ({"backbone": "local-dir:/tmp/resnet18"}, "need a timm model's name"),
        ({"backbone": "resnet18.a1_in1k"}, "without that of its weights: resnet18, not"),
        ({"anchors": ((12, 24), (48,), (96,), (192,))}, "anchors=12,24/48/96/192: need four levels of as many sides"),
        ({"anchors": ()}, "need four levels"),
        ({"mask_size": 27}, "need an even number"),
        ({"channels": 10**9}, "channels=1000000000: need 1 to 4096"),
        ({"mask_layers": 17}, "mask_layers=17: need 1 to 16"),
        ({"classes": ()}, "need one or more"),
        ({"classes": ("a", "a")}, "with different names"),
        ({"upscale": 0.0}, "upscale=0.0"),
        ({"ratios": ()}, "need 1 to 16 of them"),
        ({"proposal_nms": 1.0}, "proposal_nms=1.0: need 0 < proposal_nms < 1"),
        ({"canonical_px": 0.0}, "canonical_px=0.0"),
        ({"box_pool": 1500}, "box_pool=1500: need 1 to 64"),
        ({"mpp": 8.0}, "mpp=8.0: need 0.05 to 5 um per pixel"),
    ],
)
def test_an_architecture_is_checked_before_it_is_built(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Architecture(**wrong)
    assert said in str(raised.value)


@pytest.mark.parametrize(("backbone", "said"), [("nosuch", "Unknown model"), ("levit_128s", "of any size")])
def test_a_backbone_that_does_not_fit_is_named(backbone: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone='{backbone}'.*{said}"):
        NucleusDetector(dataclasses.replace(TINY, backbone=backbone))


@pytest.mark.parametrize("backbone", ["resnet10t", "vgg11"])
def test_another_backbone_is_one_setting(backbone: str) -> None:
    """Whatever other feature maps it has."""
    model = NucleusDetector(dataclasses.replace(TINY, backbone=backbone)).eval()
    with torch.inference_mode():
        maps = model.features(torch.rand(1, 3, 64, 64)).table.maps()
    assert [features.shape[-1] for features in maps] == [96 // stride for stride in STRIDES]


def test_shipped_detectors_say_what_they_may_be_used_for() -> None:
    """The default may be used by everyone; weights that may not have another name, and state it themselves."""
    assert licence(find_weights("nuclei")).startswith("CC BY 4.0")
    assert "no commercial use" in licence(find_weights("research"))
    detectors = {"nuclei", "classes", "fast", "research"}
    assert detectors == set(shipped()) - {"stain"}
    assert detector_architecture(find_weights("fast")).mpp == 0.5
    classes = ("Connective", "Epithelial", "Inflammatory", "Neoplastic")
    assert tuple(sorted(detector_architecture(find_weights("classes")).classes)) == classes
    for name in detectors:
        notes = read_notes(find_weights(name))
        assert json.loads(notes["data"])
        assert "/" not in notes["data"] + json.loads(notes["recipe"])["init"]
        assert find_weights(name).stat().st_size < 25e6


def test_a_missing_name_lists_what_there_is() -> None:
    assert "nuclei" in shipped()
    names = r"classes, fast, nuclei, research; of the stain normalisation stain"
    with pytest.raises(WeightsError, match=rf"no weights 'nucleii': need a \.safetensors file or .* \({names}\)"):
        find_weights("nucleii")


def test_weights_of_the_other_kind_are_named() -> None:
    """A detector for the stain normalisation, and the other way round."""
    detector, stain = "a detector, for --weights", "the stain normalisation, for --stain.weights"
    with pytest.raises(WeightsError) as refused:
        load_weights(file := find_weights("stain"))
    assert str(refused.value) == (
        f"{file} holds weights of {stain}: need those of {detector}, as 'nightslide train' writes them"
    )
    with pytest.raises(WeightsError) as refused:
        dcgmm.load(file := find_weights("fast"))
    assert str(refused.value) == (
        f"{file} holds weights of {detector}: need those of {stain}, as 'nightslide fit-stain' writes them"
    )


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    """A run refuses weights whose file has changed: writing the same ones again must not."""
    network, notes = NucleusDetector(TINY), {name: name * 3 for name in ("recipe", "data", "step", "licence")}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_weights(network, file, notes)
    assert len({file.read_bytes() for file in files}) == 1
    assert notes.items() <= read_notes(files[0]).items()
    for name, value in load_weights(files[0]).state_dict().items():
        assert torch.equal(value, network.state_dict()[name].half().float()) or name.endswith("num_batches_tracked")
