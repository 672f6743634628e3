"""The stain of a slide, fitted on regions spread over its tissue, and the template's stain that it is normalised to.

Everything here is computed on the CPU, whatever the detector's device: a worker that plans needs none. torch is loaded
only for dcgmm.
"""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import Stain, Tissue
from pipeline.errors import StainError
from pipeline.files import stamp
from pipeline.model import stain_fit
from pipeline.model.fitted_stain import TEMPLATE, FittedStain, read_template
from pipeline.model.weights import check_content, stain_files
from pipeline.segment.tissue_map import find_tissue
from slides.errors import ScaleUnknown
from slides.geometry import Box
from slides.slide import Slide, open_slide
from slides.tissue import TissueMap

if TYPE_CHECKING:
    from pipeline.model.dcgmm import ClusterNet

REGION_PX = 256  # side of the regions that a fit pools, work px


def network_of(settings: Stain) -> "ClusterNet | None":
    """The network that the stain is fitted with, which only dcgmm has. Raises WeightsError."""
    if settings.method != "dcgmm":
        return None
    from pipeline.model.load import stain_network

    return stain_network(settings)


def fit_slide(slide: Slide, tissue: TissueMap, settings: Stain, network: "ClusterNet | None") -> FittedStain:
    """The slide's stain, from `settings.patches` regions spread evenly over its tissue.

    network: see `stain_fit.fit`. Raises StainError where no stain can be fitted.
    """
    if settings.fitted == "none":
        return TEMPLATE["none"]
    size, regions, masks = tissue.work.size, [], []
    for box in spread(tissue, settings.patches, REGION_PX):
        pixels, lost = slide.read_decodable(box, tissue.work)
        # what lies beyond the slide's edge is read as white, and is no glass
        lost[max(0, size.height - box.y0) :], lost[:, max(0, size.width - box.x0) :] = True, True
        regions.append(pixels)
        masks.append(~lost)
    if not regions:
        raise StainError("no tissue was found to fit the stain on")
    return stain_fit.fit(np.stack(regions), np.stack(masks), settings.fitted, network)


def spread(tissue: TissueMap, count: int, side: int) -> list[Box]:
    """At most `count` squares spread evenly over the tissue, in work px; within the slide where it is large enough.

    The tissue is cut into horizontal strips, about as many as the square root of `count`, and every strip from left to
    right into parts; all parts hold the same area of tissue. A square is centred on a tissue pixel in the middle of
    each part.
    """
    rows, columns = np.nonzero(tissue.mask)  # row by row
    count = min(count, len(rows))
    if not count:
        return []
    ratio, size, boxes = tissue.frame.mpp / tissue.work.mpp, tissue.work.size, []
    for parts in np.array_split(np.arange(count), round(math.sqrt(count))):
        first, stop = (end * len(rows) // count for end in (parts[0], parts[-1] + 1))
        strip = first + np.argsort(columns[first:stop], kind="stable")
        for index in strip[((np.arange(len(parts)) + 0.5) * len(strip) / len(parts)).astype(int)]:
            x, y = (int((at[index] + 0.5) * ratio) - side // 2 for at in (columns, rows))
            x, y = (max(0, min(corner, extent - side)) for corner, extent in ((x, size.width), (y, size.height)))
            boxes.append(Box(x, y, x + side, y + side))
    return boxes


def fit_template(
    path: Path, settings: Stain, tissue_settings: Tissue, mpp: float, network: "ClusterNet | None"
) -> FittedStain:
    """The stain of a slide or an image, fitted as a slide's is.

    mpp: the working scale, at which a file that does not state its own is taken: a stain hardly depends on it. Where
    no tissue is found, the file is a field of view, too small for that, and all of it is taken.
    Raises StainError where no stain can be fitted, SlideError where it cannot be read.
    """
    try:
        slide = open_slide(path)
    except ScaleUnknown:
        slide = open_slide(path, mpp=mpp)
    with slide:
        tissue = find_tissue(slide, tissue_settings, mpp)
        if not tissue.mask.any():
            tissue = tissue._replace(mask=~tissue.mask)
        try:
            return fit_slide(slide, tissue, settings, network)
        except StainError as error:
            raise StainError(f"{path}: {error}") from error


def template_stain(settings: Stain, tissue_settings: Tissue, mpp: float) -> FittedStain:
    """What slides are normalised to: the stain of --stain.template, or the one that comes with the method.

    Fitted once per process and content of the files.
    mpp: the working scale.
    Raises what `stain_files`, `fit_template` and `read_template` raise, and WeightsError for a file of
    other content than the settings say.
    """
    files = stain_files(settings)
    for name, path in files.items():
        check_content(path, getattr(settings, f"{name}_sha256"))
    return _template_stain(settings, tissue_settings, mpp, tuple(stamp(path) for path in files.values()))


@functools.lru_cache(maxsize=2)
def _template_stain(
    settings: Stain, tissue_settings: Tissue, mpp: float, _stamps: tuple[tuple[int, ...], ...]
) -> FittedStain:
    files = stain_files(settings)
    if "template" in files:
        return fit_template(files["template"], settings, tissue_settings, mpp, network_of(settings))
    return read_template(files["weights"]) if "weights" in files else TEMPLATE[settings.fitted]
