"""Stain normalisation: a slide's stain is fitted once, and its images are moved to a template's stain.

First the illumination: images are divided by what glass lets through on the slide, and multiplied by the same of the
template. Then the stain. Densities are optical densities by the natural logarithm, OD = -ln I with I in 0..1 of the
glass; the mean of a pixel's three is D. Every method changes the ratios I' / I, so that what it does not describe stays
as it is: glass, pixels beyond the fitted range, the part of a colour outside the plane of two stains.

    fitted = fit(patches, readable, method)                    once per slide, on the CPU
    normaliser = Normaliser(Normalisation(fitted, template))   once per slide and device
    images = normaliser(images)                                every batch

dcgmm, the paper's method, needs a network that clusters each pixel by its neighbourhood; both steps are given it
(pipeline.model.load.stain_network).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import StainError
from pipeline.model import dcgmm
from pipeline.model.dcgmm import ClusterNet, Mixture
from pipeline.model.deterministic import mix_channels, softmax
from pipeline.model.fitted_stain import FittedStain, Normalisation, Numbers, check_method

TISSUE_OD = 0.15  # of D; Macenko's beta: the colour of paler pixels is mostly noise
_DARKEST = 1 / 255  # black is not infinitely dense: 8 bits end here
_GLASS_OD = 0.03  # of D
_CELL_PX = 4
_FEWEST_CELLS = 500
_BRIGHTEST = 0.995  # quantile of the cells that is glass, where there is any
_LEAST_WHITE = 0.5  # however dark a field is, it is not brightened by more than one over this
_LARGEST_TINT = 0.1  # of glass; a brightest colour that is further from grey is a stain's
_LEAST_CHROMA = 0.1  # grey is 0; H&E has 0.16 and more
_LEAST_DEVIATION = 0.001  # of log10 colours; H&E has, along red-green, 0.002 and more
_LEAST_ANGLE_DEG = 10.0  # between two stains; H&E has 14 and more: less would amplify noise more than stain
_LEAST_STRENGTH = 0.05  # OD of the 99th percentile; H&E has 0.4 and more


class StainSample(NamedTuple):
    """What a stain is fitted on: pixels divided by what their glass lets through."""

    white: tuple[float, ...]  # what glass lets through, per channel, in 0..1
    images: Tensor  # float32 (B, 3, H, W), 1 is glass
    tissue: Tensor  # bool (B, 1, H, W), to learn from: stained pixels that could be read
    cells: Tensor  # float32 (M, 3), mean colours of stained cells of 4 x 4 px


def fit(
    patches: NDArray[np.uint8],
    readable: NDArray[np.bool_],
    method: str,
    network: ClusterNet | None = None,
) -> FittedStain:
    """The stain of one slide, from patches of it; computed on the CPU.

    patches: uint8 (B, H, W, 3), regions spread over the slide
    readable: bool (B, H, W), the pixels to learn from: all that the slide shows. Glass among them gives the
    white point; the stain is learnt from the others (D of 0.15 and more)
    network: for dcgmm and no other method, on the CPU
    Numbers are rounded to six digits after the point, so that they read well and do not carry the order
    in which a machine adds.
    Raises StainError for an unknown method, arrays that do not fit together, and pixels from which no stain can be
    fitted: too few, grey, of one colour only. The caller may then go on with "none".
    """
    check_method(method)
    _check_network(method, network)
    if method == "none":
        return FittedStain("none", {})
    pooled = sample(patches, readable)
    if method == "reinhard":
        numbers = _fit_reinhard(pooled)
    elif method == "macenko":
        numbers = _fit_macenko(pooled)
    else:
        assert network is not None
        numbers = _fit_dcgmm(pooled, network)
    numbers = {"white": pooled.white, **numbers}
    return FittedStain(method, {name: tuple(round(v, 6) for v in values) for name, values in numbers.items()})


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
        check_method(method)
        _check_network(method, network)
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
    return -intensities.clamp(min=_DARKEST).log()


# --------------------------------------------------------------------------------------------- the sample


def sample(patches: NDArray[np.uint8], readable: NDArray[np.bool_]) -> StainSample:
    """Patches divided by what their glass lets through, and which of their pixels are stained tissue.

    patches: uint8 (B, H, W, 3); readable: bool (B, H, W), the pixels to learn from.

    Colours are means over cells of 4 x 4 px: a stain hardly changes within a micrometre but a sensor's noise does,
    and the percentiles that the white point and Macenko's method use would be those of the noise.
    Raises StainError when there are too few cells, or they are grey on the whole.
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or readable.shape != patches.shape[:3]:
        raise StainError(
            f"patches {tuple(patches.shape)}, readable {tuple(readable.shape)}: need (B, H, W, 3) and (B, H, W)"
        )
    images = torch.tensor(patches).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    known = torch.tensor(readable)[:, None]  # (B, 1, H, W)
    cells = F.avg_pool2d(images, _CELL_PX).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, 3)
    cells = cells[-F.max_pool2d(-known.float(), _CELL_PX)[:, 0] > 0]
    if len(cells) < _FEWEST_CELLS:
        raise StainError(f"{len(cells)} cells of {_CELL_PX} x {_CELL_PX} pixels can be read: need {_FEWEST_CELLS}")
    white = white_point(cells)
    glass = images.new_tensor(white)
    images = images / glass[:, None, None]
    tissue = known & (optical_density(images).mean(1, keepdim=True) > TISSUE_OD)
    return StainSample(white, images, tissue, _stained(cells / glass))


def white_point(cells: Tensor) -> tuple[float, ...]:
    """What glass lets through, per channel, from cells (M, 3) in 0..1.

    Where the brightest colours are nearly grey, they are glass. Where they are not, the pixels show no glass; but
    tissue lets some colours through almost whole (eosin red, haematoxylin blue). The brightest channel is then taken
    for the level of the light, and the tint for the stain's. Either way no channel is more than doubled, and a field
    without glass keeps its colour: it is never made white.
    """
    brightest = [_percentile(channel, _BRIGHTEST) for channel in cells.unbind(1)]
    level = max(brightest)
    white = brightest if min(brightest) >= (1 - _LARGEST_TINT) * level else [level] * 3
    return tuple(min(1.0, max(_LEAST_WHITE, v)) for v in white)


def _stained(colours: Tensor) -> Tensor:
    """Those of the cells' colours (M, 3) that are stained. Raises StainError for too few, or grey on the whole."""
    stained = colours[optical_density(colours).mean(1) > TISSUE_OD]
    if len(stained) < _FEWEST_CELLS:
        raise StainError(
            f"{len(stained)} of {len(colours)} cells of {_CELL_PX} x {_CELL_PX} pixels are stained (optical "
            f"density over {TISSUE_OD}): need {_FEWEST_CELLS}; fit on more tissue, or use 'none'"
        )
    red, green, blue = optical_density(stained).mean(0).tolist()
    mean = (red + green + blue) / 3
    chroma = math.hypot(red / mean - 1, (green - blue) / (math.sqrt(3) * mean))  # of the HSD colour space
    if chroma < _LEAST_CHROMA:
        raise StainError(
            f"the tissue's mean colour is grey (HSD chroma {chroma:.3f}): need {_LEAST_CHROMA}; "
            "is the slide stained with H&E? use 'none'"
        )
    return stained


def _tissue_share(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): 0 on glass, which is kept, 1 on tissue, which is moved; smooth between."""
    share = (optical_density(images).mean(1, keepdim=True) - _GLASS_OD) / (TISSUE_OD - _GLASS_OD)
    share = share.clamp(0, 1)
    return share * share * (3 - 2 * share)


# --------------------------------------------------------------------------------------------- Reinhard

# Reinhard et al. (2001), "Color transfer between images": RGB to cone responses, and Ruderman's axes of
# their logarithms: lightness, yellow-blue, red-green.
_RGB_TO_LMS = torch.tensor(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64
)
_LOG_LMS_TO_LAB = torch.tensor([3.0, 6.0, 2.0], dtype=torch.float64).rsqrt()[:, None] * torch.tensor(
    [[1, 1, 1], [1, 1, -2], [1, -1, 0]], dtype=torch.float64
)


def _fit_reinhard(pooled: StainSample) -> Numbers:
    """Mean and standard deviation of the tissue along Ruderman's axes, log10 units."""
    cones = pooled.cells @ _RGB_TO_LMS.T.float()  # (M, 3)
    lab = cones.clamp(min=_DARKEST).log10().double() @ _LOG_LMS_TO_LAB.T
    deviation = lab.std(0).tolist()
    if min(deviation) < _LEAST_DEVIATION:
        raise StainError(
            f"the tissue has nearly one colour (deviations {', '.join(f'{d:.4f}' for d in deviation)} along "
            f"Ruderman's axes): need {_LEAST_DEVIATION}; fit on more tissue, or use 'none'"
        )
    return {"mean": tuple(lab.mean(0).tolist()), "deviation": tuple(deviation)}


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
        gain = deviation_to / deviation
        # lab' = gain (lab - mean) + mean_to is affine in log LMS: log LMS' - log LMS = matrix log LMS + offset
        back = torch.linalg.inv(_LOG_LMS_TO_LAB)
        matrix, offset = back @ torch.diag(gain - 1) @ _LOG_LMS_TO_LAB, back @ (mean_to - gain * mean)
        _hold(self, to_cones=_RGB_TO_LMS, to_rgb=torch.linalg.inv(_RGB_TO_LMS))
        _hold(self, matrix=matrix, offset=offset[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        cones = mix_channels(images, self.to_cones)
        change = mix_channels(cones.clamp(min=_DARKEST).log10(), self.matrix) + self.offset
        change *= _tissue_share(images)
        return mix_channels(cones * torch.pow(10, change), self.to_rgb)


# ---------------------------------------------------------------------------------------------- Macenko


def _fit_macenko(pooled: StainSample) -> Numbers:
    """Unit vectors of the two stains and their 99th percentiles. Macenko et al. (2009).

    The plane is spanned by the first two singular vectors of the densities; in it, the stains are the
    1st and 99th percentile of the angle. Haematoxylin is the one that absorbs more red.
    """
    density = optical_density(pooled.cells)  # (M, 3)
    wide = density.double()
    plane = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, [2, 1]]  # (3, 2)
    plane = plane * plane[:, :1].sum().sign()  # towards the densities, so that angles lie around 0
    along, across = (wide @ plane).unbind(1)
    angles = torch.atan2(across, along)
    low, high = _percentile(angles, 0.01), _percentile(angles, 0.99)
    if math.degrees(high - low) < _LEAST_ANGLE_DEG:
        raise StainError(
            f"the tissue's colours span {math.degrees(high - low):.1f} degrees: need {_LEAST_ANGLE_DEG:.0f} to "
            "separate two stains; fit on more tissue, or use 'none'"
        )
    ends = torch.tensor([[math.cos(a), math.sin(a)] for a in (low, high)], dtype=torch.float64)
    vectors = sorted((ends @ plane.T).tolist(), reverse=True)  # red comes first in a vector
    unmix = torch.linalg.pinv(torch.tensor(vectors, dtype=torch.float64)).float()  # (3, 2)
    strength = tuple(_percentile(amount, 0.99) for amount in (density @ unmix).unbind(1))
    if min(strength) < _LEAST_STRENGTH:
        raise StainError(
            f"stain densities reach only {strength[0]:.3f} and {strength[1]:.3f}: need {_LEAST_STRENGTH}; "
            "fit on more tissue, or use 'none'"
        )
    return {"haematoxylin": tuple(vectors[0]), "eosin": tuple(vectors[1]), "strength": strength}


def _percentile(values: Tensor, share: float) -> float:
    """The value that `share` of `values` (N,) do not exceed; torch.quantile ends at 16 million."""
    return float(values.kthvalue(1 + round(share * (len(values) - 1))).values)


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


# ------------------------------------------------------------------------------------------------ dcgmm

_CHUNK = 8  # patches in one pass of the network


def density_level(cells: Tensor) -> float:
    """Mean D of stained cells (M, 3). The network is given densities relative to it, so that pale and dark slides
    of the same tissue fall into the same clusters."""
    return float(optical_density(cells).mean())


def _fit_dcgmm(pooled: StainSample, network: ClusterNet) -> Numbers:
    """The E-step by the network, once; the M-step on all stained pixels."""
    level = round(density_level(pooled.cells), 6)  # as it will be read
    sums: list[Tensor] = []
    with torch.inference_mode():
        for images, tissue in zip(torch.split(pooled.images, _CHUNK), torch.split(pooled.tissue, _CHUNK), strict=True):
            hsd = dcgmm.to_hsd(optical_density(images).clamp(min=0))
            sums.append(dcgmm.moments(hsd, softmax(network(hsd[:, :1] / level), 1), tissue).sum(0))
    mixture = dcgmm.maximise(torch.stack(sums).sum(0), network.architecture.floor)
    return {"density": (level,), **{name: tuple(t.flatten().tolist()) for name, t in mixture._asdict().items()}}


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


# ----------------------------------------------------------------------------------------------- checks


def _check_network(method: str, network: ClusterNet | None) -> None:
    if (network is not None) != (method == "dcgmm"):
        given = "without its network" if network is None else "with a network that it does not use"
        raise StainError(f"{method} {given}: need the network of load.stain_network for dcgmm, and none for the others")
