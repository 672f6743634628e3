"""Detection of tissue and artefacts on a slide, by the settings of a run."""

from typing import NamedTuple

import numpy as np

from pipeline.config import Tissue
from slides.artefacts import ArtefactMap, find_artefacts, read_texture
from slides.geometry import Frame
from slides.slide import Slide
from slides.stored import Pixels
from slides.tissue import TissueMap, densities, glass, tissue_mask

# A field of view up to this area was chosen by somebody: where no tissue is recognised, it is pale, or fat.
_FIELD_UM2 = 2_000_000.0

# The least range of density, in green, of a field of view that holds anything: noise of glass has half of it.
_STRUCTURE = 0.04

# Tissue that the edges of a field of view cut is smaller than a piece of tissue, but not by more than this.
_PIECE_OF_FIELD = 0.1


class Detected(NamedTuple):
    """What a thumbnail shows."""

    artefacts: ArtefactMap  # with the tissue
    glass: float  # grey level of clean glass in green
    notes: tuple[str, ...]  # what a person should know of it


def find_tissue_and_artefacts(slide: Slide, settings: Tissue, work_mpp: float) -> Detected:
    """The tissue and, unless they are off, the artefacts of a slide; work_mpp: of the frame in which maps are asked."""
    thumbnail, frame = _thumbnail(slide, settings, work_mpp)
    tissue, notes = _tissue(slide, thumbnail, frame, settings, work_mpp)
    artefacts = ArtefactMap(np.zeros(tissue.mask.shape, np.uint8), tissue)
    if settings.artefacts != "off":
        found = find_artefacts(thumbnail, read_texture(slide, frame, thumbnail), tissue.mask, frame.mpp)
        artefacts = ArtefactMap(found.kinds, tissue._replace(mask=tissue.mask & ~found.bare_ink))
    return Detected(artefacts, float(glass(thumbnail)[1]), notes)


def find_tissue(slide: Slide, settings: Tissue, work_mpp: float) -> TissueMap:
    """The tissue of a slide, from a thumbnail of it; work_mpp: of the work frame, in which the map is asked."""
    return _tissue(slide, *_thumbnail(slide, settings, work_mpp), settings, work_mpp)[0]


def _thumbnail(slide: Slide, settings: Tissue, work_mpp: float) -> tuple[Pixels, Frame]:
    """That of a slide that is larger than any glass is coarser than the settings say, which bounds the memory."""
    frame = slide.thumbnail_frame(max(settings.thumbnail_mpp, work_mpp))
    return slide.thumbnail(frame), frame


def _tissue(
    slide: Slide, thumbnail: Pixels, frame: Frame, settings: Tissue, work_mpp: float
) -> tuple[TissueMap, tuple[str, ...]]:
    """The tissue, and a note where a field of view is taken whole for want of recognisable tissue."""
    work = slide.frame(work_mpp)
    whole = TissueMap(np.ones(thumbnail.shape[:2], bool), frame, work)
    area_um2 = work.size.width * work.size.height * work.mpp**2
    if settings.everywhere or area_um2 < settings.min_area_um2:
        return whole, ()
    smallest = min(settings.min_area_um2, _PIECE_OF_FIELD * area_um2)
    mask = tissue_mask(thumbnail, frame.mpp, min_area_um2=smallest, margin_um=settings.margin_um)
    if mask.any() or area_um2 > _FIELD_UM2 or np.ptp(densities(thumbnail)[1]) < _STRUCTURE:
        return whole._replace(mask=mask), ()
    return whole, (f"no tissue was recognised in a field of view of {area_um2 / 1e6:.2g} mm²: all of it was taken",)
