"""Stain normalisation: the images of a slide, whose stain was fitted, are moved to a template's stain.

First the illumination: images are divided by what glass lets through on the slide, and multiplied by the same of the
template. Then the stain, by optical densities as `stain_fit` has them. Every method changes the ratios I' / I, so that
what it does not describe stays as it is: glass, pixels beyond the fitted range, the part of a colour outside the plane
of two stains.

    fitted = stain_fit.fit(patches, readable, method)          once per slide, on the CPU
    normaliser = Normaliser(Normalisation(fitted, template))   once per slide and device
    images = normaliser(images)                                every batch

dcgmm, the paper's method, needs a network that clusters each pixel by its neighbourhood; both steps are given it
(pipeline.model.load.stain_network).
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import StainError
from pipeline.model import dcgmm
from pipeline.model.dcgmm import ClusterNet, Mixture
from pipeline.model.deterministic import mix_channels, softmax
from pipeline.model.fitted_stain import Normalisation, Numbers
from pipeline.model.stain_fit import DARKEST, LOG_LMS_TO_LAB, RGB_TO_LMS, TISSUE_OD, check_network

_GLASS_OD = 0.03  # of D


class Normaliser(nn.Module):
    """Images of one slide -> the same images as if they had been stained like the template.

    Made once per slide and device: it holds its constants and its network there, and nothing but the images is
    uploaded for a batch.

        images: float32 (B, 3, H, W), RGB in 0..1, on the device. Returns the same shape and dtype, in 0..1.

    Law: Normaliser(Normalisation(s, s))(x) == x within rounding, whatever x; the source's glass becomes the target's.
    """

    white: Tensor
    white_to: Tensor

    def __init__(
        self,
        normalisation: Normalisation,
        network: ClusterNet | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """network: for dcgmm and no other method: the one that both stains were fitted with, on `device`.

        Raises StainError when source and target are of different methods, and for a network that does not fit them
        or lies on another device.
        """
        super().__init__()
        source, target = normalisation
        method = source.method
        if method != target.method:
            raise StainError(f"source is {method}, target {target.method}: need stains of one method")
        check_network(method, network)
        self.transfer: nn.Module | None = None
        if method == "reinhard":
            self.transfer = _Reinhard(source.numbers, target.numbers)
        elif method == "macenko":
            self.transfer = _Macenko(source.numbers, target.numbers)
        elif network is not None:
            self.transfer = _Dcgmm(source.numbers, target.numbers, network)
        if self.transfer is not None:
            white, white_to = (torch.tensor(s.numbers["white"])[:, None, None] for s in normalisation)
            _hold(self, white=white, white_to=white_to)
        # not self.to(device): that would move the network, which others use too
        for module in self.modules():
            for name, constant in module.named_buffers(recurse=False):
                setattr(module, name, constant.to(device))
        devices = {tensor.device for tensor in (*self.parameters(), *self.buffers())}
        if len(devices) > 1:
            raise StainError(
                f"the network is not on {device}, where images are normalised: need load.stain_network for that device"
            )

    def forward(self, images: Tensor) -> Tensor:
        if self.transfer is None:
            return images
        moved: Tensor = self.transfer(images / self.white)
        return (moved * self.white_to).clamp(0, 1)


def _hold(module: nn.Module, **constants: Tensor) -> None:
    """Make constants, in float32, tensors of a module that move with it and are not saved."""
    for name, constant in constants.items():
        module.register_buffer(name, constant.float(), persistent=False)


def he_density(images: Tensor) -> Tensor:
    """Densities of haematoxylin and eosin: colour deconvolution after Ruifrok & Johnston (2001).

    images: float32 (B, 3, H, W), RGB in 0..1. Returns float32 (B, 2, H, W): haematoxylin, eosin.
    Decimal optical densities (-log10 I) with the vectors of QuPath's "H&E default" and their cross product
    for the residual, so that means over a nucleus are those QuPath measures. Negative where a pixel lacks
    the other stain's colour; not clipped, as means of clipped densities are biased.
    """
    return mix_channels(optical_density(images), _unmixing(images.device))


_QUPATH_VECTORS = ((0.65111, 0.70119, 0.29049), (0.2159, 0.8012, 0.5581))


@functools.lru_cache(maxsize=8)
def _unmixing(device: torch.device) -> Tensor:
    """float32 (2 stains, 3 colours): natural optical densities -> decimal densities of the stains."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        haematoxylin, eosin = (torch.tensor(v, dtype=torch.float64) for v in _QUPATH_VECTORS)
        vectors = torch.stack([haematoxylin, eosin, torch.linalg.cross(haematoxylin, eosin)])
        unmix: Tensor = torch.linalg.inv(F.normalize(vectors, dim=1))[:, :2] / math.log(10)  # (3 colours, 2 stains)
        return unmix.T.float().to(device)


def optical_density(intensities: Tensor) -> Tensor:
    """Natural optical density of intensities in 0..1, any shape; finite for black."""
    return -intensities.clamp(min=DARKEST).log()


# ----------------------------------------------------------------------------------------- the methods


def _tissue_share(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): 0 on glass, which is kept, 1 on tissue, which is moved; smooth between."""
    share = (optical_density(images).mean(1, keepdim=True) - _GLASS_OD) / (TISSUE_OD - _GLASS_OD)
    share = share.clamp(0, 1)
    return share * share * (3 - 2 * share)


class _Reinhard(nn.Module):
    """Tissue to the target's mean and deviation along Ruderman's axes; glass is kept, with a smooth transition.

    images: float32 (B, 3, H, W), 1 is glass; the same is returned, here and by the other methods.
    """

    to_cones: Tensor
    to_rgb: Tensor
    matrix: Tensor
    offset: Tensor

    def __init__(self, source: Numbers, target: Numbers) -> None:
        super().__init__()
        mean, deviation = (torch.tensor(source[name], dtype=torch.float64) for name in ("mean", "deviation"))
        mean_to, deviation_to = (torch.tensor(target[name], dtype=torch.float64) for name in ("mean", "deviation"))
        to_lms, to_lab = torch.from_numpy(RGB_TO_LMS), torch.from_numpy(LOG_LMS_TO_LAB)
        gain = deviation_to / deviation
        # lab' = gain (lab - mean) + mean_to is affine in log LMS: log LMS' - log LMS = matrix log LMS + offset
        back = torch.linalg.inv(to_lab)
        matrix, offset = back @ torch.diag(gain - 1) @ to_lab, back @ (mean_to - gain * mean)
        _hold(self, to_cones=to_lms, to_rgb=torch.linalg.inv(to_lms))
        _hold(self, matrix=matrix, offset=offset[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        cones = mix_channels(images, self.to_cones)
        change = mix_channels(cones.clamp(min=DARKEST).log10(), self.matrix) + self.offset
        change *= _tissue_share(images)
        return mix_channels(cones * torch.pow(10, change), self.to_rgb)


class _Macenko(nn.Module):
    """Amounts of both stains scaled to the target's strengths, in the target's colours; glass is kept."""

    change: Tensor

    def __init__(self, source: Numbers, target: Numbers) -> None:
        super().__init__()
        vectors, vectors_to = (
            torch.tensor([n["haematoxylin"], n["eosin"]], dtype=torch.float64) for n in (source, target)
        )
        strength, strength_to = (torch.tensor(n["strength"], dtype=torch.float64) for n in (source, target))
        gain = strength_to / strength
        # All linear in the densities: OD' - OD = amounts (gain vectors_to - vectors), what else OD holds is kept.
        change = torch.linalg.pinv(vectors) @ (gain[:, None] * vectors_to - vectors)  # (3, 3), row vectors
        _hold(self, change=change.T)

    def forward(self, images: Tensor) -> Tensor:
        change_od = mix_channels(optical_density(images), self.change) * _tissue_share(images)
        return images * (-change_od).exp()


class _Dcgmm(nn.Module):
    """Every cluster to the target's mean and deviation; glass is kept, with a smooth transition."""

    slopes: Tensor
    offsets: Tensor

    def __init__(self, source: Numbers, target: Numbers, network: ClusterNet) -> None:
        super().__init__()
        clusters = network.architecture.clusters
        if not len(source["share"]) == len(target["share"]) == clusters:
            raise StainError(
                f"stains of {len(source['share'])} and {len(target['share'])} clusters, a network of {clusters}: "
                "need stains that were fitted with this network; fit them again"
            )
        self.network = network
        self.level = source["density"][0]
        slopes, offsets = dcgmm.coefficients(_mixture(source), _mixture(target))
        _hold(self, slopes=slopes, offsets=offsets)

    def forward(self, images: Tensor) -> Tensor:
        density = optical_density(images).clamp(min=0)
        hsd = dcgmm.to_hsd(density)
        shares = softmax(self.network(hsd[:, :1] / self.level), 1)
        moved = dcgmm.from_hsd(dcgmm.transfer(hsd, shares, self.slopes, self.offsets))
        return images * ((density - moved) * _tissue_share(images)).exp()


def _mixture(numbers: Numbers) -> Mixture:
    share, mean, deviation = (torch.tensor(numbers[name], dtype=torch.float64) for name in Mixture._fields)
    return Mixture(share, mean.reshape(-1, 3), deviation.reshape(-1, 3))
