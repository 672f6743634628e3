"""A stain is fitted once per slide, on the CPU, from patches of it; `pipeline.model.stain` applies it.

Densities are optical densities by the natural logarithm, OD = -ln I with I in 0..1 of the glass; the mean of a pixel's
three is D.

    fitted = fit(patches, readable, method)

dcgmm, the paper's method, needs a network that clusters each pixel by its neighbourhood; only that loads torch.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StainError
from pipeline.model.fitted_stain import FittedStain, Numbers, check_method

if TYPE_CHECKING:
    from pipeline.model.dcgmm import ClusterNet

T = TypeVar("T", bound=np.generic)
Floats = NDArray[np.floating]

TISSUE_OD = 0.15  # of D; Macenko's beta: the colour of paler pixels is mostly noise
DARKEST = 1 / 255  # black is not infinitely dense: 8 bits end here

# Reinhard et al. (2001), "Color transfer between images": RGB to cone responses, and Ruderman's axes of
# their logarithms: lightness, yellow-blue, red-green.
RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LOG_LMS_TO_LAB = np.array([3.0, 6.0, 2.0])[:, None] ** -0.5 * np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])

_CELL_PX = 4
_FEWEST_CELLS = 500
_BRIGHTEST = 0.995  # quantile of the cells that is glass, where there is any
_LEAST_WHITE = 0.5  # however dark a field is, it is not brightened by more than one over this
_LARGEST_TINT = 0.1  # of glass; a brightest colour that is further from grey is a stain's
_LEAST_CHROMA = 0.1  # grey is 0; H&E has 0.16 and more
_LEAST_DEVIATION = 0.001  # of log10 colours; H&E has, along red-green, 0.002 and more
_LEAST_ANGLE_DEG = 10.0  # between two stains; H&E has 14 and more: less would amplify noise more than stain
_LEAST_STRENGTH = 0.05  # OD of the 99th percentile; H&E has 0.4 and more

_MORE_TISSUE = "fit it on more tissue (--stain.patches), or give --stain none"


class StainSample(NamedTuple):
    """What a stain is fitted on."""

    white: tuple[float, ...]  # what glass lets through, per channel, in 0..1
    cells: Floats  # float32 (M, 3), mean colours of stained cells of 4 x 4 px, 1 is glass


def fit(
    patches: NDArray[np.uint8],
    readable: NDArray[np.bool_],
    method: str,
    network: "ClusterNet | None" = None,
) -> FittedStain:
    """The stain of one slide, from patches of it.

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
    check_network(method, network)
    if method == "none":
        return FittedStain("none", {})
    pooled = sample(patches, readable)
    if method == "reinhard":
        numbers = _fit_reinhard(pooled)
    elif method == "macenko":
        numbers = _fit_macenko(pooled)
    else:
        assert network is not None
        numbers = _fit_dcgmm(patches, readable, pooled, network)
    numbers = {"white": pooled.white, **numbers}
    return FittedStain(method, {name: tuple(round(v, 6) for v in values) for name, values in numbers.items()})


def check_network(method: str, network: "ClusterNet | None") -> None:
    """Raise StainError for dcgmm without its network, and for another method with one."""
    if (network is not None) != (method == "dcgmm"):
        given = "without its network" if network is None else "with a network that it does not use"
        raise StainError(f"{method} {given}: need the network of load.stain_network for dcgmm, and none for the others")


def optical_density(intensities: Floats) -> Floats:
    """Natural optical density of intensities in 0..1, any shape, in their dtype; finite for black."""
    density: Floats = -np.log(intensities.clip(min=DARKEST))
    return density


def density_level(cells: Floats) -> float:
    """Mean D of stained cells (M, 3). The network of dcgmm is given densities relative to it, so that pale and dark
    slides of the same tissue fall into the same clusters."""
    return float(optical_density(cells).mean(dtype=np.float64))


# --------------------------------------------------------------------------------------------- the sample


def sample(patches: NDArray[np.uint8], readable: NDArray[np.bool_]) -> StainSample:
    """What glass lets through, and the colours of stained tissue, relative to it.

    patches: uint8 (B, H, W, 3); readable: bool (B, H, W), the pixels to learn from.

    Colours are means over cells of 4 x 4 px: a stain hardly changes within a micrometre but a sensor's noise does,
    and the percentiles that the white point and Macenko's method use would be those of the noise.
    Raises StainError when there are too few cells, or they are grey on the whole.
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or readable.shape != patches.shape[:3]:
        raise StainError(f"patches {patches.shape}, readable {readable.shape}: need (B, H, W, 3) and (B, H, W)")
    sums = _cells(patches).sum((2, 4), dtype=np.uint32)[_cells(readable).all((2, 4))]
    cells = (sums / (255 * _CELL_PX**2)).astype(np.float32)  # (M, 3)
    if len(cells) < _FEWEST_CELLS:
        raise StainError(f"{len(cells)} cells of {_CELL_PX} x {_CELL_PX} pixels can be read: need {_FEWEST_CELLS}")
    white = white_point(cells)
    return StainSample(white, _stained(cells / np.array(white, np.float32)))


def _cells(images: NDArray[T]) -> NDArray[T]:
    """(B, H, W, ...) as cells (B, H / 4, 4, W / 4, 4, ...); what is left over on the right and below is left out."""
    rows, columns = images.shape[1] // _CELL_PX, images.shape[2] // _CELL_PX
    whole = images[:, : rows * _CELL_PX, : columns * _CELL_PX]
    return whole.reshape(len(images), rows, _CELL_PX, columns, _CELL_PX, *images.shape[3:])


def white_point(cells: Floats) -> tuple[float, ...]:
    """What glass lets through, per channel, from cells (M, 3) in 0..1.

    Where the brightest colours are nearly grey, they are glass. Where they are not, the pixels show no glass; but
    tissue lets some colours through almost whole (eosin red, haematoxylin blue). The brightest channel is then taken
    for the level of the light, and the tint for the stain's. Either way no channel is more than doubled, and a field
    without glass keeps its colour: it is never made white.
    """
    brightest = [_percentile(channel, _BRIGHTEST) for channel in cells.T]
    level = max(brightest)
    white = brightest if min(brightest) >= (1 - _LARGEST_TINT) * level else [level] * 3
    return tuple(max(_LEAST_WHITE, v) for v in white)


def _percentile(values: Floats, share: float) -> float:
    """The value that `share` of `values` (N,) do not exceed: one of them, so that no order of adding changes it."""
    rank = round(share * (len(values) - 1))
    return float(np.partition(values, rank)[rank])


def _stained(colours: Floats) -> Floats:
    """Those of the cells' colours (M, 3) that are stained. Raises StainError for too few, or grey on the whole."""
    stained: Floats = colours[optical_density(colours).mean(1) > TISSUE_OD]
    if len(stained) < _FEWEST_CELLS:
        raise StainError(
            f"{len(stained)} of {len(colours)} cells of {_CELL_PX} x {_CELL_PX} pixels are stained (optical "
            f"density over {TISSUE_OD}): need {_FEWEST_CELLS}; {_MORE_TISSUE}"
        )
    red, green, blue = optical_density(stained).mean(0, dtype=np.float64).tolist()
    mean = (red + green + blue) / 3
    chroma = math.hypot(red / mean - 1, (green - blue) / (math.sqrt(3) * mean))  # of the HSD colour space
    if chroma < _LEAST_CHROMA:
        raise StainError(
            f"the tissue's mean colour is grey (HSD chroma {chroma:.3f}): need {_LEAST_CHROMA}; "
            "is the slide stained with H&E? else give --stain none"
        )
    return stained


# -------------------------------------------------------------------------------------------- the methods


def _fit_reinhard(pooled: StainSample) -> Numbers:
    """Mean and standard deviation of the tissue along Ruderman's axes, log10 units."""
    cones = _product(pooled.cells, RGB_TO_LMS.T)  # (M, 3)
    lab = _product(np.log10(cones.clip(min=DARKEST)), LOG_LMS_TO_LAB.T)
    deviation = lab.std(0, ddof=1).tolist()
    if min(deviation) < _LEAST_DEVIATION:
        raise StainError(
            f"the tissue has nearly one colour (deviations {', '.join(f'{d:.4f}' for d in deviation)} along "
            f"Ruderman's axes): need {_LEAST_DEVIATION}; {_MORE_TISSUE}"
        )
    return {"mean": tuple(lab.mean(0).tolist()), "deviation": tuple(deviation)}


def _fit_macenko(pooled: StainSample) -> Numbers:
    """Unit vectors of the two stains and their 99th percentiles. Macenko et al. (2009).

    The plane is spanned by the first two singular vectors of the densities; in it, the stains are the
    1st and 99th percentile of the angle. Haematoxylin is the one that absorbs more red.
    """
    density = optical_density(pooled.cells).astype(np.float64)  # (M, 3)
    plane = np.linalg.eigh(_product(density.T, density)).eigenvectors[:, [2, 1]]  # (3, 2)
    plane *= np.sign(plane[:, 0].sum())  # towards the densities, so that angles lie around 0
    along, across = _product(density, plane).T
    angles = np.arctan2(across, along)
    low, high = _percentile(angles, 0.01), _percentile(angles, 0.99)
    if math.degrees(high - low) < _LEAST_ANGLE_DEG:
        raise StainError(
            f"the tissue's colours span {math.degrees(high - low):.1f} degrees: need {_LEAST_ANGLE_DEG:.0f} to "
            f"separate two stains; {_MORE_TISSUE}"
        )
    ends = np.array([[math.cos(a), math.sin(a)] for a in (low, high)])
    vectors = sorted((ends @ plane.T).tolist(), reverse=True)  # red comes first in a vector
    amounts = _product(density, np.linalg.pinv(np.array(vectors)))  # (M, 2)
    strength = tuple(_percentile(amount, 0.99) for amount in amounts.T)
    if min(strength) < _LEAST_STRENGTH:
        raise StainError(
            f"stain densities reach {strength[0]:.3f} and {strength[1]:.3f}: need {_LEAST_STRENGTH}; {_MORE_TISSUE}"
        )
    return {"haematoxylin": tuple(vectors[0]), "eosin": tuple(vectors[1]), "strength": strength}


def _product(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Matrix product in float64, without the libraries whose order of adding depends on the number of threads."""
    product: NDArray[np.float64] = np.einsum("ij,jk->ik", left, right, dtype=np.float64)
    return product


def _fit_dcgmm(
    patches: NDArray[np.uint8], readable: NDArray[np.bool_], pooled: StainSample, network: "ClusterNet"
) -> Numbers:
    """The density of the tissue, and the clusters of its colours."""
    from pipeline.model import dcgmm

    level = round(density_level(pooled.cells), 6)  # as it will be read
    density = optical_density(patches.astype(np.float32) / 255 / np.array(pooled.white, np.float32))
    tissue = readable & (density.mean(3) > TISSUE_OD)
    mixture = dcgmm.fit(density.clip(min=0), tissue, level, network)
    return {"density": (level,), **{name: tuple(t.flatten().tolist()) for name, t in mixture._asdict().items()}}
