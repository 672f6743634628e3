"""Stain normalisation: a slide's stain is fitted once, and moved to a template's inside the stream.

Densities are optical densities by natural logarithm, OD = -ln I with I in 0..1; the mean of a pixel's
three is D. Every method changes ratios I' / I, so what it does not describe stays as it is: white glass,
pixels beyond the fitted range, the part of a colour outside the plane of two stains.

A method is a row of `_METHODS`. One that looks at the neighbourhood of a pixel (the paper's mixture model
does) finds it in both verbs: `fit` is given whole patches, `normalise` whole images.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Numbers = Mapping[str, tuple[float, ...]]

_DARKEST = 1 / 255  # black is not infinitely dense: 8 bits end here
_GLASS_OD, _TISSUE_OD = 0.03, 0.15  # of D; the upper is Macenko's beta: paler pixels have no colour to speak of
_CELL_PX = 4
_FEWEST_CELLS = 500
_LEAST_CHROMA = 0.1  # grey is 0; H&E has 0.16 and more
_LEAST_DEVIATION = 0.001  # of log10 colours; H&E has, along red-green, 0.002 and more
_LEAST_ANGLE_DEG = 10.0  # between two stains; H&E has 14 and more: less would amplify noise more than stain
_LEAST_STRENGTH = 0.05  # OD of the 99th percentile; H&E has 0.4 and more


class StainError(ValueError):
    """Pixels that do not tell a stain, or a stain that does not fit its use."""


@dataclass(frozen=True)
class Stain:
    """The stain of a slide, as a method sees it. Plain numbers: it is written to JSON and sent anywhere."""

    method: str
    numbers: Numbers

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Stain":
        """What `to_json` gave, back, also after a trip through JSON text. Raises StainError for anything else.

        Law: Stain.from_json(json.loads(json.dumps(s.to_json()))) == s.
        """
        if not isinstance(content, Mapping) or set(content) != {"method", "numbers"}:
            raise StainError(f"{content!r} is not a stain: need a table of 'method' and 'numbers'; fit it again")
        lengths = _find(content["method"]).lengths
        try:
            numbers = {str(name): tuple(map(float, values)) for name, values in content["numbers"].items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise StainError(f"{content['numbers']!r} are not named numbers ({error}): fit the stain again") from error
        found = {name: len(values) for name, values in numbers.items()}
        if found != lengths or not all(math.isfinite(v) for values in numbers.values() for v in values):
            raise StainError(f"{numbers} is no {content['method']} stain: need finite {lengths}; fit it again")
        return cls(content["method"], numbers)


def fit(patches: NDArray[np.uint8] | Tensor, tissue: NDArray[np.bool_] | Tensor, method: str) -> Stain:
    """The stain of one slide, from patches of it; computed on the device of the patches.

    patches: uint8 (B, H, W, 3), regions spread over the slide
    tissue: bool (B, H, W), the pixels to learn from; pale ones among them (D under 0.15) are left out
    Numbers are rounded to six digits after the point, so that they read well and do not carry the order
    in which a machine adds.
    Raises StainError for an unknown method, arrays that do not fit together, and pixels that tell no
    stain: too few, grey, of one colour only. The caller may then go on with "none".
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or tissue.shape != patches.shape[:3]:
        raise StainError(
            f"patches {tuple(patches.shape)}, tissue {tuple(tissue.shape)}: need (B, H, W, 3) and (B, H, W)"
        )
    numbers = _find(method).fit(torch.as_tensor(patches), torch.as_tensor(tissue))
    return Stain(method, {name: tuple(round(v, 6) for v in values) for name, values in numbers.items()})


def normalise(images: Tensor, source: Stain, target: Stain) -> Tensor:
    """Images stained like `source`, as if they had been stained like `target`; on their own device.

    images: float32 (B, 3, H, W), RGB in 0..1. Returns the same shape and dtype, in 0..1.
    Raises StainError when source and target are of different methods.
    Law: normalise(x, s, s) == x within rounding, whatever x; white stays white.
    """
    if source.method != target.method:
        raise StainError(f"source is {source.method}, target {target.method}: need stains of one method")
    return _find(source.method).transfer(images, source.numbers, target.numbers)


def hed(images: Tensor) -> Tensor:
    """Densities of haematoxylin and eosin: colour deconvolution after Ruifrok & Johnston (2001).

    images: float32 (B, 3, H, W), RGB in 0..1. Returns float32 (B, 2, H, W): haematoxylin, eosin.
    Decimal optical densities (-log10 I) with the vectors of QuPath's "H&E default" and their cross product
    for the residual, so that means over a nucleus are those QuPath measures. Negative where a pixel lacks
    the other stain's colour; not clipped, as means of clipped densities are biased.
    """
    haematoxylin, eosin = (torch.tensor(v, dtype=torch.float64) for v in _QUPATH_VECTORS)
    vectors = torch.stack([haematoxylin, eosin, torch.linalg.cross(haematoxylin, eosin)])
    unmix = torch.linalg.inv(F.normalize(vectors, dim=1))[:, :2] / math.log(10)  # (3 colours, 2 stains)
    return _mix(_density(images), unmix.T)


_QUPATH_VECTORS = ((0.65111, 0.70119, 0.29049), (0.2159, 0.8012, 0.5581))


def _density(intensities: Tensor) -> Tensor:
    """Natural optical density of intensities in 0..1, any shape; finite for black."""
    return -intensities.clamp(min=_DARKEST).log()


def _mix(images: Tensor, matrix: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, R, H, W): every pixel's colour times `matrix` (R, C)."""
    return F.conv2d(images, matrix.to(images)[:, :, None, None])


def _stained(patches: Tensor, tissue: Tensor) -> Tensor:
    """Mean colours, float32 (M, 3) in 0..1, of the cells of 4 x 4 px that are tissue and have a colour.

    Cells, because a stain hardly changes within a micrometre but a sensor's noise does, and the extremes
    that Macenko looks for would be the noise's.
    Raises StainError when they are too few, or grey on the whole.
    """
    cells = F.avg_pool2d(patches.permute(0, 3, 1, 2).float() / 255, _CELL_PX)  # (B, 3, H / 4, W / 4)
    whole = -F.max_pool2d(-tissue[:, None].float(), _CELL_PX)[:, 0] > 0  # (B, H / 4, W / 4)
    colours = cells.permute(0, 2, 3, 1)[whole]
    stained = colours[_density(colours).mean(1) > _TISSUE_OD]
    if len(stained) < _FEWEST_CELLS:
        raise StainError(
            f"{len(stained)} of {len(colours)} cells of {_CELL_PX} x {_CELL_PX} tissue pixels are stained (optical "
            f"density over {_TISSUE_OD}): need {_FEWEST_CELLS}; fit on more tissue, or use 'none'"
        )
    red, green, blue = _density(stained).mean(0).tolist()
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
    depth = (_density(images).mean(1, keepdim=True) - _GLASS_OD) / (_TISSUE_OD - _GLASS_OD)
    depth = depth.clamp(0, 1)
    return depth * depth * (3 - 2 * depth)


# ------------------------------------------------------------------------------------------------- none


def _fit_none(_patches: Tensor, _tissue: Tensor) -> Numbers:
    return {}


def _transfer_none(images: Tensor, _source: Numbers, _target: Numbers) -> Tensor:
    return images


# --------------------------------------------------------------------------------------------- Reinhard

# Reinhard et al. (2001), "Color transfer between images": RGB to cone responses, and Ruderman's axes of
# their logarithms: lightness, yellow-blue, red-green.
_RGB_TO_LMS = torch.tensor(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64
)
_LOG_LMS_TO_LAB = torch.tensor([3.0, 6.0, 2.0], dtype=torch.float64).rsqrt()[:, None] * torch.tensor(
    [[1, 1, 1], [1, 1, -2], [1, -1, 0]], dtype=torch.float64
)


def _fit_reinhard(patches: Tensor, tissue: Tensor) -> Numbers:
    """Mean and standard deviation of the tissue along Ruderman's axes, log10 units."""
    cones = _stained(patches, tissue) @ _RGB_TO_LMS.T.to(patches.device, torch.float32)  # (M, 3)
    lab = cones.clamp(min=_DARKEST).log10().double() @ _LOG_LMS_TO_LAB.T.to(patches.device)
    deviation = lab.std(0).tolist()
    if min(deviation) < _LEAST_DEVIATION:
        raise StainError(
            f"the tissue has nearly one colour (deviations {', '.join(f'{d:.4f}' for d in deviation)} along "
            f"Ruderman's axes): need {_LEAST_DEVIATION}; fit on more tissue, or use 'none'"
        )
    return {"mean": tuple(lab.mean(0).tolist()), "deviation": tuple(deviation)}


def _transfer_reinhard(images: Tensor, source: Numbers, target: Numbers) -> Tensor:
    """Tissue to the target's mean and deviation along Ruderman's axes; glass is kept, with a smooth passage."""
    mean, deviation = (torch.tensor(source[name], dtype=torch.float64) for name in ("mean", "deviation"))
    mean_to, deviation_to = (torch.tensor(target[name], dtype=torch.float64) for name in ("mean", "deviation"))
    gain = deviation_to / deviation
    # lab' = gain (lab - mean) + mean_to is affine in log LMS: log LMS' - log LMS = matrix log LMS + offset
    back = torch.linalg.inv(_LOG_LMS_TO_LAB)
    matrix, offset = back @ torch.diag(gain - 1) @ _LOG_LMS_TO_LAB, back @ (mean_to - gain * mean)
    cones = _mix(images, _RGB_TO_LMS)
    change = _mix(cones.clamp(min=_DARKEST).log10(), matrix) + offset.to(images)[:, None, None]
    change *= _tissue_share(images)
    return _mix(cones * torch.pow(10, change), torch.linalg.inv(_RGB_TO_LMS)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- Macenko


def _fit_macenko(patches: Tensor, tissue: Tensor) -> Numbers:
    """Unit vectors of the two stains and their 99th percentiles. Macenko et al. (2009).

    The plane is spanned by the first two singular vectors of the densities; in it, the stains are the
    1st and 99th percentile of the angle. Haematoxylin is the one that absorbs more red.
    """
    density = _density(_stained(patches, tissue))  # (M, 3)
    wide = density.double()
    plane = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, [2, 1]]  # (3, 2)
    plane = plane * plane[:, :1].sum().sign()  # towards the densities, so that angles lie around 0
    along, across = (wide @ plane).unbind(1)
    angles = torch.atan2(across, along)
    low, high = _percentile(angles, 0.01), _percentile(angles, 0.99)
    if math.degrees(high - low) < _LEAST_ANGLE_DEG:
        raise StainError(
            f"the tissue's colours span {math.degrees(high - low):.1f} degrees: need {_LEAST_ANGLE_DEG:.0f} to tell "
            "two stains; fit on more tissue, or use 'none'"
        )
    ends = torch.tensor([[math.cos(a), math.sin(a)] for a in (low, high)], dtype=torch.float64)
    vectors = sorted((ends @ plane.cpu().T).tolist(), reverse=True)  # red comes first in a vector
    unmix = torch.linalg.pinv(torch.tensor(vectors, dtype=torch.float64)).to(density)  # (3, 2)
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


def _transfer_macenko(images: Tensor, source: Numbers, target: Numbers) -> Tensor:
    """Amounts of both stains scaled to the target's strengths, painted with its colours; glass is kept."""
    vectors, vectors_to = (torch.tensor([n["haematoxylin"], n["eosin"]], dtype=torch.float64) for n in (source, target))
    gain = torch.tensor(target["strength"], dtype=torch.float64) / torch.tensor(source["strength"], dtype=torch.float64)
    # All linear in the densities: OD' - OD = amounts (gain vectors_to - vectors), what else OD holds is kept.
    change = torch.linalg.pinv(vectors) @ (gain[:, None] * vectors_to - vectors)  # (3, 3), row vectors
    change_od = _mix(_density(images), change.T) * _tissue_share(images)
    return (images * (-change_od).exp()).clamp(0, 1)


# ------------------------------------------------------------------------------------- methods, template


class _Method(NamedTuple):
    fit: Callable[[Tensor, Tensor], Numbers]  # patches and tissue as `fit` takes them
    transfer: Callable[[Tensor, Numbers, Numbers], Tensor]
    lengths: Mapping[str, int]  # of the numbers


_METHODS: Mapping[str, _Method] = {
    "none": _Method(_fit_none, _transfer_none, {}),
    "reinhard": _Method(_fit_reinhard, _transfer_reinhard, {"mean": 3, "deviation": 3}),
    "macenko": _Method(_fit_macenko, _transfer_macenko, {"haematoxylin": 3, "eosin": 3, "strength": 2}),
}


def _find(method: Any) -> _Method:
    if method not in _METHODS:
        raise StainError(f"stain method {method!r}: need one of {', '.join(_METHODS)}")
    return _METHODS[method]


# The typical image: each of the 16 training images of Kumar et al. (2017) fitted alone, as slides are, and of
# every number the median. Pooled they would give a target of wider colours than any slide has.
# tests/pipeline/test_stain.py computes them again.
TEMPLATE: Mapping[str, Stain] = {
    "none": Stain("none", {}),
    "reinhard": Stain(
        "reinhard", {"mean": (-0.424042, -0.040493, 0.020432), "deviation": (0.217757, 0.037962, 0.007799)}
    ),
    "macenko": Stain(
        "macenko",
        {
            "haematoxylin": (0.511356, 0.754105, 0.411409),
            "eosin": (0.149538, 0.817207, 0.547106),
            "strength": (2.401532, 1.041591),
        },
    ),
}
