"""Deep convolutional Gaussian mixture model (DCGMM): pixels are clustered by the optical densities around them.

Zanjani et al. (2018), "Histopathology stain-color normalization using deep generative models", and Jung et
al. (2019). A small U-Net, whose only input is the optical density, gives every pixel's responsibilities (the E-step).
Densities are relative to the slide's mean, else the tissue of a pale slide would fall into other clusters. The
means and deviations of the clusters in HSD space follow from the responsibilities in closed form, slide by slide (the
M-step). As colour is no input of the network, cluster k is the same kind of tissue on every slide, however it is
stained, and a slide's cluster k can be moved to the template's.

HSD (van der Laak et al. 2000): a pixel is its mean optical density D, and a chroma that does not change with
the amount of stain, cx = OD_R / D - 1, cy = (OD_G - OD_B) / (sqrt 3 D). Densities of 0 and more fill a
triangle: cx in -1..2, |cy| <= (2 - cx) / sqrt 3.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import StainArchitecture
from pipeline.model import tensors, weights
from pipeline.model.deterministic import softmax, upsample

_NO_DENSITY = 1e-4  # less than the smallest step of 8 bits from white: chroma is undefined
_SHRINK = 2  # the network works at half the work scale: nuclei are large, and it takes a quarter of the time
_CHUNK = 8  # images in one pass of the network
_POOLED = 1e-4  # of all pixels, a share that is added to every cluster, so that an empty one has a mean


class Mixture(NamedTuple):
    """Gaussians in HSD space with diagonal covariance, of one slide or of each of B."""

    share: Tensor  # float64 (..., K), sums to 1
    mean: Tensor  # float64 (..., K, 3): D, cx, cy
    deviation: Tensor  # float64 (..., K, 3), at least the floor


class ClusterNet(nn.Module):
    """The E-step: relative optical density (B, 1, H, W) -> logits (B, K, H, W) of the clusters, any H and W.

    A U-Net without batch or image statistics: a pixel's logits depend on the pixels within `radius_px` of it, and
    neither on the batch nor on the rest of the image. Patches whose corners lie on multiples of `step_px` (those of
    the default grid do) give their common pixels the same logits, except within that radius of their edges, which is
    less than the margin.
    """

    def __init__(self, architecture: StainArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.channels
        self.down = nn.ModuleList(_block(before, after) for before, after in pairwise((1, *channels)))
        self.up = nn.ModuleList(_block(fine + coarse, fine) for fine, coarse in pairwise(channels))
        self.score = nn.Conv2d(channels[0], architecture.clusters, 1)
        self.bands = nn.Conv2d(1, architecture.clusters, 1, bias=False)
        # At first the clusters are bands of density, pale to dense, so that their order does not depend on the seed:
        # log N(D; centre, spread), without the terms that all have in common. Wider bands overlap, and clusters become
        # empty.
        centre = torch.linspace(0.5, 1.7, architecture.clusters)
        spread = (1.7 - 0.5) / (architecture.clusters - 1) / 3
        self.bands.weight = nn.Parameter((centre / spread**2)[:, None, None, None])
        self.score.bias = nn.Parameter(-centre.square() / (2 * spread**2))

    @property
    def step_px(self) -> int:
        """Pixels per cell of the coarsest level: images shifted by multiples of it have the same logits, shifted."""
        return int(_SHRINK * 2 ** (len(self.architecture.channels) - 1))

    @property
    def radius_px(self) -> int:
        """Largest distance, along an axis, of a pixel that changes another one's logits."""
        levels = len(self.architecture.channels)
        # 3 x 3 convolutions reach a cell of their level, down and up; then the coarsest cell's extent
        cells: int = 2 ** (levels + 1) - 3
        return _SHRINK * (cells + 1)  # one more for the interpolation

    def forward(self, density: Tensor) -> Tensor:
        height, width = density.shape[-2:]
        density = F.pad(density, (0, -width % self.step_px, 0, -height % self.step_px), mode="replicate")
        x = small = F.avg_pool2d(density, _SHRINK)
        levels = []
        for level, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if level else x)
            levels.append(x)
        for fine, layer in zip(reversed(levels[:-1]), reversed(list(self.up)), strict=True):
            x = layer(torch.cat([fine, F.interpolate(x, scale_factor=2.0, mode="nearest")], 1))
        logits = self.score(x) + self.bands(small)  # (B, K, H / 2, W / 2)
        return upsample(logits, float(_SHRINK))[..., :height, :width]


def _block(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))


def to_hsd(density: Tensor) -> Tensor:
    """Optical densities (B, 3, H, W), 0 and more -> (B, 3, H, W) of D, cx, cy; white is (0, 0, 0)."""
    mean = density.mean(1)
    ratio = density / mean.clamp(min=_NO_DENSITY)[:, None]
    white = mean <= _NO_DENSITY
    cx = (ratio[:, 0] - 1).masked_fill(white, 0)
    cy = ((ratio[:, 1] - ratio[:, 2]) / math.sqrt(3)).masked_fill(white, 0)
    return torch.stack([mean, cx, cy], 1)


def from_hsd(hsd: Tensor) -> Tensor:
    """(B, 3, H, W) of D, cx, cy -> optical densities, 0 and more; what lies outside the triangle is moved onto it.

    Law: from_hsd(to_hsd(x)) == x for densities of 0 and more, within rounding.
    """
    mean, cx = hsd[:, 0].clamp(min=0), hsd[:, 1].clamp(-1, 2)
    edge = (2 - cx) / math.sqrt(3)
    cy = torch.minimum(torch.maximum(hsd[:, 2], -edge), edge)
    green, blue = (2 - cx + math.sqrt(3) * cy) / 2, (2 - cx - math.sqrt(3) * cy) / 2
    return torch.stack([(cx + 1) * mean, green * mean, blue * mean], 1)


def moments(hsd: Tensor, shares: Tensor, tissue: Tensor) -> Tensor:
    """Sums from which a mixture follows, float64 (B, K, 7): 1, x, x squared, each weighted by the responsibilities.

    hsd: (B, 3, H, W); shares: responsibilities (B, K, H, W); tissue: bool (B, 1, H, W), the pixels that count.
    Law: the moments of two images together are the sum of theirs.
    """
    powers = torch.cat([torch.ones_like(hsd[:, :1]), hsd, hsd.square()], 1).double()  # (B, 7, H, W)
    return torch.einsum("bkhw,bphw->bkp", (shares * tissue).double(), powers)


def maximise(sums: Tensor, floor: float) -> Mixture:
    """The M-step: moments (..., K, 7) -> the mixture of maximum likelihood, deviations of at least `floor`.

    A cluster that is nearly empty takes the mean and deviation of all.
    """
    total = sums.sum(-2, keepdim=True)  # (..., 1, 7)
    share = (sums[..., 0] / total[..., 0].clamp(min=1)).clamp(min=1e-6)
    sums = sums + _POOLED * total
    count = sums[..., :1].clamp(min=_POOLED)  # no pixel at all: mean 0, the floor for a deviation
    mean = sums[..., 1:4] / count
    variance = (sums[..., 4:7] / count - mean.square()).clamp(min=0)
    return Mixture(share / share.sum(-1, keepdim=True), mean, (variance + floor**2).sqrt())


def fit(density: NDArray[np.floating], tissue: NDArray[np.bool_], level: float, network: ClusterNet) -> Mixture:
    """The mixture of one slide: the E-step by the network, once; the M-step on all stained pixels.

    density: optical densities (B, H, W, 3), 0 and more; tissue: bool (B, H, W), the pixels that count
    level: the slide's mean, to which the network's input is relative; network: on the CPU
    """
    sums: list[Tensor] = []
    with torch.inference_mode():
        for first in range(0, len(density), _CHUNK):
            few = slice(first, first + _CHUNK)
            hsd = to_hsd(torch.from_numpy(density[few]).permute(0, 3, 1, 2))
            counted = torch.from_numpy(tissue[few])[:, None]
            sums.append(moments(hsd, softmax(network(hsd[:, :1] / level), 1), counted).sum(0))
    return maximise(torch.stack(sums).sum(0), network.architecture.floor)


def bound(hsd: Tensor, logits: Tensor, tissue: Tensor, floor: float) -> Tensor:
    """The loss (B,): mean over tissue pixels of sum_k g_k (log g_k - log share_k - log N_k(x)); never clipped.

    It is minus the evidence lower bound of EM, so it lies above minus the log likelihood, and reaches it where g
    are the true responsibilities. Every image has a mixture of its own, held fixed while the network learns.
    """
    log_shares = logits.log_softmax(1)
    shares = log_shares.exp()
    with torch.no_grad():
        mixture = maximise(moments(hsd, shares, tissue), floor)
    likelihood = log_likelihoods(hsd, mixture)
    per_pixel = (shares * (log_shares - likelihood)).sum(1, keepdim=True)  # (B, 1, H, W)
    return (per_pixel * tissue).sum((1, 2, 3)) / tissue.sum((1, 2, 3)).clamp(min=1)


def log_likelihoods(hsd: Tensor, mixture: Mixture) -> Tensor:
    """log share_k + log N_k(x), (B, K, H, W), of mixtures (B, K)."""
    mean, deviation = (t.to(hsd)[..., None, None] for t in (mixture.mean, mixture.deviation))  # (B, K, 3, 1, 1)
    distance = ((hsd[:, None] - mean) / deviation).square().sum(2)  # (B, K, H, W)
    constant = mixture.share.log() - mixture.deviation.log().sum(-1) - 1.5 * math.log(2 * math.pi)  # (B, K)
    return constant.to(hsd)[..., None, None] - 0.5 * distance


def coefficients(source: Mixture, target: Mixture) -> tuple[Tensor, Tensor]:
    """What `transfer` needs to move every cluster of `source` (K) to its `target`: slopes, offsets, float32 (K, 3)."""
    gain = target.deviation / source.deviation
    return (gain - 1).float(), (target.mean - gain * source.mean).float()


def transfer(hsd: Tensor, shares: Tensor, slopes: Tensor, offsets: Tensor) -> Tensor:
    """x' = sum_k g_k ((x - mean_k) / deviation_k * deviation'_k + mean'_k), (B, 3, H, W).

    hsd: float32 (B, 3, H, W); shares: responsibilities (B, K, H, W); slopes, offsets: see `coefficients`.
    Law: to the same mixture nothing changes, to the last bit.
    """
    slope = torch.einsum("bkhw,kc->bchw", shares, slopes)
    return hsd + hsd * slope + torch.einsum("bkhw,kc->bchw", shares, offsets)


def save(network: ClusterNet, path: Path, notes: Mapping[str, str]) -> None:
    """Half-precision safetensors with the architecture, notes and a checksum of the tensors inside."""
    tensors.save(network, network.architecture, path, notes)


def load(path: Path) -> ClusterNet:
    """The network that a weights file holds, in float32, for inference.

    Raises WeightsError where the file is damaged, of another kind, or does not fit the architecture it names.
    """
    architecture = weights.stain_architecture(path)
    return tensors.load_into(lambda: ClusterNet(architecture), path).requires_grad_(False)
