"""The mixture follows from EM, the network depends on nearby densities only, the transfer keeps what it should."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import Architecture, StainArchitecture
from pipeline.errors import ConfigError, WeightsError
from pipeline.model import dcgmm, weights
from pipeline.model.dcgmm import ClusterNet, Mixture
from pipeline.model.weights import find_weights

FLOOR = 0.03


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> ClusterNet:
    torch.manual_seed(0)
    return ClusterNet(StainArchitecture()).eval()


def three_stains(seed: int) -> tuple[Tensor, Tensor]:
    """HSD (1, 3, 24, 24) of pixels drawn from three Gaussians, and which one each was drawn from (1, 24, 24)."""
    chooser = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (1, 24, 24), generator=chooser)
    mean = torch.tensor([[0.25, -0.2, 0.4], [0.5, -0.1, 0.5], [0.9, 0.1, 0.3]])
    hsd = mean[which].permute(0, 3, 1, 2) + 0.05 * torch.randn(1, 3, 24, 24, generator=chooser)
    return hsd, which


# ----------------------------------------------------------------------------------------------------- HSD


@given(seed=st.integers(0, 1000), darkest=st.floats(1e-6, 6))
def test_hsd_and_back(seed: int, darkest: float) -> None:
    """Law: from_hsd(to_hsd(x)) == x for any densities of 0 and more, and chroma lies in the triangle."""
    density = noise(seed, 1, 3, 4, 4) * darkest
    density[0, :, 0, 0], density[0, 1:, 0, 1] = 0, 0  # white; one channel alone
    hsd = dcgmm.to_hsd(density)
    _, cx, cy = hsd.unbind(1)
    assert cx.min() >= -1 - 1e-5
    assert cx.max() <= 2 + 1e-4
    assert bool((cy.abs() <= (2 - cx) / math.sqrt(3) + 1e-4).all())
    torch.testing.assert_close(dcgmm.from_hsd(hsd), density, atol=2e-4, rtol=1e-4)


@given(seed=st.integers(0, 1000))
def test_no_chroma_leads_to_negative_densities(seed: int) -> None:
    density = dcgmm.from_hsd(10 * noise(seed, 1, 3, 8, 8) - 5)
    assert density.min() >= -1e-5
    assert bool(density.isfinite().all())


def test_chroma_does_not_change_with_the_amount_of_stain() -> None:
    pale = noise(1, 1, 3, 4, 4) + 0.1
    torch.testing.assert_close(dcgmm.to_hsd(3 * pale)[:, 1:], dcgmm.to_hsd(pale)[:, 1:], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- mixture


@given(seed=st.integers(0, 1000))
def test_moments_add(seed: int) -> None:
    """Law: the moments of a picture are the sum of those of its halves."""
    hsd, shares, tissue = noise(seed, 1, 3, 8, 8), noise(seed + 1, 1, 3, 8, 8), noise(seed + 2, 1, 1, 8, 8) > 0.5
    whole = dcgmm.moments(hsd, shares, tissue)
    halves = [dcgmm.moments(hsd[..., s], shares[..., s], tissue[..., s]) for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_the_mixture_is_what_was_drawn_from() -> None:
    hsd, which = three_stains(0)
    shares = torch.nn.functional.one_hot(which, 3).permute(0, 3, 1, 2).float()
    found = dcgmm.maximise(dcgmm.moments(hsd, shares, torch.ones(1, 1, 24, 24, dtype=torch.bool)), FLOOR)
    torch.testing.assert_close(
        found.mean[0, :, 0], torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64), atol=0.02, rtol=0
    )
    expected = torch.full((3, 3), math.hypot(0.05, FLOOR), dtype=torch.float64)
    torch.testing.assert_close(found.deviation[0], expected, atol=0.01, rtol=0)
    assert float(found.share.sum()) == pytest.approx(1)


def test_likelihoods_are_those_of_gaussians() -> None:
    """Of every pixel and cluster, with the cluster's share."""
    hsd, one = noise(0, 1, 3, 4, 5), mixture(1)
    found = dcgmm.log_likelihoods(hsd, Mixture(*(t[None] for t in one)))
    gaussians = torch.distributions.Normal(one.mean, one.deviation)
    expected = gaussians.log_prob(hsd[0].permute(1, 2, 0)[:, :, None].double()).sum(-1) + one.share.log()
    torch.testing.assert_close(found[0].double(), expected.permute(2, 0, 1), atol=1e-3, rtol=1e-5)


def test_an_empty_cluster_is_like_all_pixels_and_no_tissue_is_no_error() -> None:
    hsd, tissue = noise(0, 1, 3, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    shares = torch.zeros(1, 2, 8, 8)
    shares[:, 0] = 1
    found = dcgmm.maximise(dcgmm.moments(hsd, shares, tissue), FLOOR)
    torch.testing.assert_close(found.mean[0, 1], hsd.mean((0, 2, 3)).double(), atol=1e-4, rtol=0)
    nothing = dcgmm.maximise(dcgmm.moments(hsd, shares, ~tissue), FLOOR)
    assert all(bool(t.isfinite().all()) for t in nothing)
    assert float(nothing.deviation.min()) >= FLOOR


@given(seed=st.integers(0, 300))
def test_the_loss_bounds_the_likelihood(seed: int) -> None:
    """Law: minus the mean log likelihood under the M-step's mixture is never above the loss (Jensen)."""
    hsd, _ = three_stains(seed)
    logits = 4 * noise(seed, 1, 3, 24, 24)
    tissue = noise(seed + 1, 1, 1, 24, 24) > 0.3
    mixture = dcgmm.maximise(dcgmm.moments(hsd, logits.softmax(1), tissue), FLOOR)
    likelihood = dcgmm.log_likelihoods(hsd, mixture).logsumexp(1, keepdim=True)[tissue].mean()
    assert float(dcgmm.bound(hsd, logits, tissue, FLOOR)) >= float(-likelihood) - 1e-5


def test_em_lowers_the_loss_to_the_bound() -> None:
    """Exact E-steps never raise the loss, and in the end it is minus the log likelihood. Nothing is clipped."""
    hsd, _ = three_stains(0)
    tissue = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    logits = torch.stack([-4 * hsd[:, 0], 0 * hsd[:, 0], 4 * hsd[:, 0]], 1)
    losses = []
    for _ in range(60):
        losses.append(float(dcgmm.bound(hsd, logits, tissue, 1e-3)))
        logits = dcgmm.log_likelihoods(hsd, dcgmm.maximise(dcgmm.moments(hsd, logits.softmax(1), tissue), 1e-3))
    assert all(later <= earlier + 1e-3 for earlier, later in pairwise(losses))
    assert losses[-1] == pytest.approx(-float(logits.logsumexp(1).mean()), abs=1e-3)
    assert losses[-1] < -2  # far beyond a likelihood of 1, where the original code had no gradient left


def test_the_network_learns_clusters_without_labels() -> None:
    """From density alone, in seconds: pixels of one stain get one cluster, whatever the start."""
    hsd, which = three_stains(3)
    level = float(hsd[:, 0].mean())
    hsd, which = (t[..., :12, :12].repeat_interleave(16, -1).repeat_interleave(16, -2) for t in (hsd, which))
    tissue = torch.ones(1, 1, *hsd.shape[2:], dtype=torch.bool)
    torch.manual_seed(1)
    network = ClusterNet(StainArchitecture(channels=(8, 8)))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(80):
        loss = dcgmm.bound(hsd, network(hsd[:, :1] / level), tissue, FLOOR).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learnt = network(hsd[:, :1] / level).argmax(1)
    assert float((learnt == which).float().mean()) > 0.9


# ------------------------------------------------------------------------------------------------- network


@settings(max_examples=8)
@given(height=st.integers(1, 50), width=st.integers(1, 50))
def test_any_size_will_do(network: ClusterNet, height: int, width: int) -> None:
    assert network(noise(0, 2, 1, height, width)).shape == (2, 3, height, width)


def test_a_pixel_is_changed_by_its_neighbourhood_only(network: ClusterNet) -> None:
    """Law: what lies farther away than `radius_px` changes nothing, so a tile's core does not show the tiling."""
    radius, side = network.radius_px, 128
    assert radius <= 32  # no margin is smaller than 64 px
    density = noise(0, 1, 1, side, side)
    before, farthest = network(density), 0
    for y, x in ((0, 0), (63, 64), (66, 61), (127, 5)):
        changed = density.clone()
        changed[0, 0, y, x] += 5
        moved = ((network(changed) - before)[0].abs().amax(0) > 1e-6).nonzero()
        distance = (moved - torch.tensor([y, x])).abs().max()
        assert int(distance) <= radius
        farthest = max(farthest, int(distance))
    assert farthest >= radius // 2  # and the radius is not much larger than need be


def test_a_tile_has_the_logits_of_the_whole(network: ClusterNet) -> None:
    """Law: logits in a tile's core are those of the whole image, for tiles whose corners are multiples of the step."""
    density, radius, step = noise(1, 1, 1, 160, 160), network.radius_px, network.step_px
    whole = network(density)
    for y, x in ((0, 0), (3 * step, 5 * step)):
        tile = network(density[..., y : y + 112, x : x + 112])
        core = slice(radius, 112 - radius)
        expected = whole[..., y + radius : y + 112 - radius, x + radius : x + 112 - radius]
        torch.testing.assert_close(tile[..., core, core], expected, atol=1e-5, rtol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(network: ClusterNet) -> None:
    batch = noise(2, 3, 1, 32, 32)
    torch.testing.assert_close(network(batch)[1:2], network(batch[1:2]), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ transfer


def mixture(seed: int) -> Mixture:
    share, mean, deviation = noise(seed, 3) + 0.1, noise(seed + 1, 3, 3), noise(seed + 2, 3, 3) + 0.05
    return Mixture(*(t.double() for t in (share / share.sum(), mean, deviation)))


@given(seed=st.integers(0, 1000))
def test_to_the_same_mixture_nothing_changes(seed: int) -> None:
    hsd, shares = noise(seed, 1, 3, 8, 8), noise(seed + 1, 1, 3, 8, 8).softmax(1)
    assert torch.equal(dcgmm.transfer(hsd, shares, *dcgmm.coefficients(mixture(seed), mixture(seed))), hsd)


def test_a_cluster_gets_the_targets_mean_and_deviation() -> None:
    hsd, which = three_stains(5)
    shares = torch.nn.functional.one_hot(which, 3).permute(0, 3, 1, 2).float()
    tissue = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    source = Mixture(*(t[0] for t in dcgmm.maximise(dcgmm.moments(hsd, shares, tissue), 1e-6)))
    target = mixture(7)
    moved = dcgmm.transfer(hsd, shares, *dcgmm.coefficients(source, target))
    found = dcgmm.maximise(dcgmm.moments(moved, shares, tissue), 1e-6)
    torch.testing.assert_close(found.mean[0], target.mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.deviation[0], target.deviation, atol=2e-2, rtol=0)


# ------------------------------------------------------------------------------------------------- weights


def test_a_file_gives_the_network_back(network: ClusterNet, tmp_path: Path) -> None:
    dcgmm.save(network, tmp_path / "s.safetensors", {"template": "x"})
    again = dcgmm.load(tmp_path / "s.safetensors")
    assert again.architecture == network.architecture
    density = noise(0, 1, 1, 32, 32)
    torch.testing.assert_close(again(density), network(density), atol=1e-2, rtol=1e-2)  # half precision
    assert weights.read_notes(tmp_path / "s.safetensors")["template"] == "x"


def test_a_damaged_file_and_a_detectors_are_refused(network: ClusterNet, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    dcgmm.save(network, path, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged"):
        dcgmm.load(path)
    with pytest.raises(WeightsError, match="nightslide fit-stain"):
        dcgmm.load(find_weights("nuclei"))
    with pytest.raises(WeightsError, match="nightslide train"):
        weights.read_architecture(find_weights("stain"), Architecture, "nightslide train")


def test_an_architecture_that_cannot_be_is_refused() -> None:
    for wrong in ({"clusters": 1}, {"channels": ()}, {"channels": (8, 1_000_000)}, {"floor": 0.0}):
        with pytest.raises(ConfigError, match="need"):
            StainArchitecture(**wrong)
