"""Time and disk space that a run will take, slide by slide, estimated before it is started."""

import dataclasses
from typing import NamedTuple

from pipeline.archive.sources import Source
from pipeline.config import Settings
from pipeline.errors import RunError
from pipeline.segment.plan import plan_slide
from pipeline.text import one_line
from slides.slide import open_slide

_NUCLEI_PER_MM2 = 6000  # of a dense slide
_BYTES_PER_NUCLEUS = 700  # in nuclei.parquet and nuclei.geojson.zip together


class SlideEstimate(NamedTuple):
    """Time and disk space for a slide, or the `problem` with which it will fail."""

    slide: str
    problem: str
    mpp: float
    mpp_source: str
    tissue_mm2: float
    tiles: int
    hours: float
    disk_gb: float


def estimate_slide(source: Source, settings: Settings, seconds_per_mm2: float) -> SlideEstimate:
    """The estimate of a slide: it is opened, and its tissue is detected on a thumbnail; no more is read."""
    unnormalised = dataclasses.replace(settings, stain=dataclasses.replace(settings.stain, method="none"))
    try:
        if source.problem:
            raise RunError(source.problem)
        with open_slide(source.path, **source.scale._asdict()) as slide:
            plan = plan_slide(slide, unnormalised)
    except Exception as error:
        return SlideEstimate(source.name, one_line(error), 0, "", 0, 0, 0, 0)
    area = plan.tissue.area_mm2
    return SlideEstimate(
        source.name,
        "",
        plan.scale.x,
        plan.scale.source,
        area,
        len(plan.tiles),
        area * seconds_per_mm2 * settings.detector.views / 3600,
        area * _NUCLEI_PER_MM2 * _BYTES_PER_NUCLEUS / 1e9,
    )
