"""Where the tissue of a slide lies, by the settings of a run."""

import numpy as np

from pipeline.config import Tissue
from slides.slide import Slide
from slides.tissue import TissueMap, tissue_mask


def find_tissue(slide: Slide, settings: Tissue, work_mpp: float) -> TissueMap:
    """The tissue of a slide, from a thumbnail of it. work_mpp: um per work px, in which the map is asked."""
    mpp = max(settings.thumbnail_mpp, work_mpp)
    thumbnail = slide.thumbnail(mpp)
    if settings.everywhere:
        return TissueMap(np.ones(thumbnail.shape[:2], bool), mpp, work_mpp)
    mask = tissue_mask(thumbnail, mpp, min_area_um2=settings.min_area_um2, margin_um=settings.margin_um)
    return TissueMap(mask, mpp, work_mpp)
