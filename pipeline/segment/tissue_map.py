"""Tissue detection on a slide, by the settings of a run."""

import numpy as np

from pipeline.config import Tissue
from slides.slide import Slide
from slides.tissue import TissueMap, tissue_mask


def find_tissue(slide: Slide, settings: Tissue, work_mpp: float) -> TissueMap:
    """The tissue of a slide, from a thumbnail of it; work_mpp: of the work frame, in which the map is asked.

    The thumbnail of a slide that is larger than any glass is coarser than the settings say, which bounds the memory.
    A field of view that is smaller than the smallest piece of tissue is all tissue.
    """
    work = slide.frame(work_mpp)
    frame = slide.thumbnail_frame(max(settings.thumbnail_mpp, work.mpp))
    thumbnail = slide.thumbnail(frame)
    if settings.everywhere or work.size.width * work.size.height * work.mpp**2 < settings.min_area_um2:
        return TissueMap(np.ones(thumbnail.shape[:2], bool), frame, work)
    mask = tissue_mask(thumbnail, frame.mpp, min_area_um2=settings.min_area_um2, margin_um=settings.margin_um)
    return TissueMap(mask, frame, work)
