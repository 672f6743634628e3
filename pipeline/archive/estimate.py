"""Time and disk space that a run will take, slide by slide, estimated before it is started."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.archive.inputs.region_files import region_file
from pipeline.archive.inputs.sources import Source
from pipeline.archive.workers.machine import count_cores
from pipeline.archive.workers.processes import ask_each
from pipeline.config import Settings, Stain
from pipeline.errors import RunError
from pipeline.model.weights import as_weights_state
from pipeline.segment import stain_trial
from pipeline.segment.finished import check_exports
from pipeline.segment.plan import plan_slide
from pipeline.text import one_line
from slides.slide import Slide


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
    notes: tuple[str, ...] = ()  # what a person should know before the run


# Processes that open slides: each takes 0.17 GB, and more of a large slide.
_AT_ONCE = 16

_CRASHED = (
    "the process that read it ended: the file is damaged, or there is too little memory; copy it again, or leave it out"
)


def estimate_slides(
    sources: Sequence[Source], settings: Settings, seconds_per_mm2: float, *, apart: bool
) -> Iterator[SlideEstimate]:
    """`estimate_slide` of each, in this order.

    apart: in other processes, as many as there are cores, up to _AT_ONCE; a file that crashes its reader ends one
    """
    questions = [(source, settings, seconds_per_mm2) for source in sources]
    if apart:
        answers = ask_each(estimate_slide, questions, min(count_cores(), _AT_ONCE))
    else:
        answers = itertools.starmap(estimate_slide, questions)
    for source, answer in zip(sources, answers, strict=True):
        yield answer or _failing(source, _CRASHED)


def estimate_slide(source: Source, settings: Settings, seconds_per_mm2: float) -> SlideEstimate:
    """Open a slide, find its tissue, and say what a run would take. Reads a thumbnail and the texture below its tissue.

    So it does not know whether a stain can be fitted, and counts the time of the trial of `--stain auto` in any case.
    """
    try:
        unnormalised = dataclasses.replace(as_weights_state(settings), stain=Stain(method="none"))
        if source.problem:
            raise RunError(source.problem)
        with Slide(source.path, source.scale) as slide:
            plan = plan_slide(slide, unnormalised, region_file(source, settings.regions))
        check_exports(source.path, source.name, plan, settings.export)
    except Exception as error:
        return _failing(source, one_line(error))
    area = plan.tissue.area_mm2
    detected = area * settings.detector.views
    if settings.stain.method == "auto" and area:
        detected += stain_trial.inference_mm2(plan.whole_tissue, plan.step)
    # a dense slide has 6,000 nuclei per mm2; each takes 415 bytes in the table and 284 in the zip
    return SlideEstimate(
        source.name,
        "",
        plan.scale.mean,
        plan.scale.source,
        area,
        len(plan.tiles),
        detected * seconds_per_mm2 / 3600,
        area * 6000 * 700 / 1e9,
        plan.notes,
    )


def _failing(source: Source, problem: str) -> SlideEstimate:
    return SlideEstimate(source.name, problem, 0, "", 0, 0, 0, 0)
