"""`--stain auto`: a slide is normalised where that raises the mean score of the detections in a part of it.

The measurements behind this rule are in workflows/experiments/README.md.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from pipeline.config import Settings, Tiling
from pipeline.model.instances import HostInstances
from pipeline.segment.slide_stain import spread
from slides.geometry import Box
from slides.tissue import TissueMap

# Of the squares: four million px at most, thousands of nuclei; on a small slide a tenth of it, but a million px, as
# many as the images have with which the rule was measured.
SIDE_PX, MOST, FEWEST, SHARE = 512, 16, 4, 0.1

NOTHING_FOUND = "not normalised: where that was tried, nothing was detected either way"


def squares(tissue: TissueMap, step: int) -> tuple[Box, ...]:
    """Where to try, in work px: spread over the tissue, and no more than cover its area.

    Of a slide that is narrower or lower than they are, they end with the step in which it ends.
    step: sides are a multiple of it, as the detector needs; `config.grid_step`
    """
    side = _side(step)
    cover = tissue.area_mm2 * (1000 / tissue.work.mpp) ** 2 / side**2
    tried = spread(tissue, min(MOST, math.ceil(cover), max(FEWEST, math.ceil(SHARE * cover))), side)
    end = Box(0, 0, *(math.ceil(extent / step) * step for extent in tissue.work.size))
    return tuple(square.intersect(end) for square in tried)


def _side(step: int) -> int:
    return max(1, SIDE_PX // step) * step


def inference_mm2(tissue: TissueMap, step: int) -> float:
    """How much is detected for a trial: all squares, without normalisation and with it."""
    return 2 * sum(square.area for square in squares(tissue, step)) * (tissue.work.mpp / 1000) ** 2


def own_settings(settings: Settings) -> Settings:
    """The settings of a trial. It is of one view, with which the rule was measured; more would take longer.

    Its tiling is its own, so that the choice does not depend on that of the run: for a GPU patches are filled up to the
    sizes of tiles.
    """
    detector = dataclasses.replace(settings.detector, views=1)
    return dataclasses.replace(settings, detector=detector, tiling=Tiling(mpp=settings.tiling.mpp, tile=2 * SIDE_PX))


def mean_score(squares: Iterable[HostInstances]) -> float:
    """The mean score of what was detected, to four digits, as it is kept; 0 where nothing was."""
    scores = np.concatenate([instances.scores for instances in squares])
    return round(float(scores.mean(dtype=np.float64)), 4) if len(scores) else 0.0
