"""`--stain auto`: a slide is normalised where that raises the mean score of the detections in a part of it.

The measurements behind this rule are in workflows/experiments/README.md.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from pipeline.config import Settings
from pipeline.model.instances import HostInstances
from pipeline.segment.slide_stain import spread
from slides.geometry import Box
from slides.tissue import TissueMap

# Of the squares: four million px at most, thousands of nuclei. They do not depend on the tiling. On a CPU, nor does the
# choice; for a GPU they are filled up to the sizes of tiles.
SIDE_PX, MOST = 512, 16


def squares(tissue: TissueMap, step: int) -> tuple[Box, ...]:
    """Where to try, in work px: spread over the tissue, and no more than cover its area.

    step: sides are a multiple of it, as the detector needs; `config.grid_step`
    """
    area_px = tissue.area_mm2 * (1000 / tissue.work.mpp) ** 2
    side = max(1, SIDE_PX // step) * step
    return tuple(spread(tissue, min(MOST, math.ceil(area_px / side**2)), side))


def one_view(settings: Settings) -> Settings:
    """The settings of a trial: the rule was measured with one view, and more would take longer."""
    return dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, views=1))


def mean_score(squares: Iterable[HostInstances]) -> float:
    """The mean score of what was detected, to four digits, as it is kept; 0 where nothing was."""
    scores = np.concatenate([instances.scores for instances in squares])
    return round(float(scores.mean(dtype=np.float64)), 4) if len(scores) else 0.0
