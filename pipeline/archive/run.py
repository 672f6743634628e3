"""A run over an archive: what it is asked for is checked and opened, and all slides are processed."""

import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipeline.archive.all_slides import AllSlides
from pipeline.archive.command import Command
from pipeline.archive.event_loop import run_coroutine
from pipeline.archive.inputs.region_files import with_regions
from pipeline.archive.inputs.sources import Inputs, find_slides
from pipeline.archive.inputs.staging import Staging, make_home
from pipeline.archive.lease import Leases
from pipeline.archive.manifest import (
    check_seams,
    end_overwriting,
    open_run,
    resolve,
)
from pipeline.archive.progress import Progress
from pipeline.archive.workers.execution import check_execution, open_executor, starts_processes
from pipeline.archive.workers.processes import ask, stop_in_a_starting_worker
from pipeline.config import Execution, Settings, checked, given_path, require
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.model.weights import find_weights, licence
from pipeline.segment.export import check_formats
from pipeline.segment.record import SlideRecord, device_use
from pipeline.segment.slide_stain import template_stain
from pipeline.segment.stages import Detect
from pipeline.text import counted


def run(
    inputs: Inputs,
    out: str | os.PathLike[str],
    settings: Settings = Settings(),
    execution: Execution = Execution(),
    *,
    mpp: float | None = None,
    force_mpp: float | None = None,
    client: Any = None,
    say: Callable[[str], None] | None = None,
    detect: Detect | None = None,
) -> list[SlideRecord]:
    """Segment every slide and write the results under `out`; what became of each slide is returned.

    mpp: micrometres per pixel at level 0, for slides that do not state it; force_mpp: for all, whatever they state.
    client: a `dask.distributed.Client` whose workers see the same files, instead of the cluster that `execution` asks
    for. That one starts processes: a script that calls `run` needs `if __name__ == "__main__":`, a notebook nothing.
    say: takes the lines that would go to the terminal. detect: replaces the detector, in tests.
    What is done is kept: a second call continues at the block. A slide that fails does not stop the others.
    Raises ConfigError (RunError, WeightsError), and StainError or SlideError of a `stain.template`, before anything is
    started; ClusterLost.
    """
    settings = checked("settings", settings, Settings)
    execution = checked("execution", execution, Execution)
    folder = RunFolder(given_path("out", out, "a folder for the results").absolute())
    require(say is None or callable(say), f"say={say!r}: need a function that takes a line")
    require(
        client is None or hasattr(client, "submit"),
        f"client={client!r}: need a dask.distributed.Client; of an address, give Execution(scheduler=ADDRESS)",
    )
    if starts_processes(execution, client):
        stop_in_a_starting_worker()
    archive = find_slides(
        inputs,
        folder.path,
        mpp=mpp,
        force_mpp=force_mpp,
        follow_links=execution.follow_links,
        urls=bool(execution.stage),
    )
    archive = with_regions(archive, settings.regions)
    unused = (*settings.unused, *(execution.unused if client is None else ()))
    settings = resolve(settings)
    check_formats(settings.export.formats)
    seams = check_seams(settings) if detect is None else ()
    _check_computing(settings, execution, client)
    if execution.stage:
        make_home(Path(execution.stage).absolute())
    opened = open_run(folder, settings, execution.overwrite)
    with Progress(folder.logs, len(archive.sources), say) as progress:
        found = f"{counted(len(archive.sources), 'slide')}, {counted(archive.skipped, 'other file')} skipped"
        progress.say(f"{found}; results in {out}")
        weights = find_weights(settings.detector.weights)
        if terms := licence(weights):
            progress.say(f"weights {weights.stem}: {terms}")
        for warning in (*seams, *unused, *opened.warnings, *archive.unread):
            progress.say(f"WARNING: {warning}")
        with (
            open_executor(execution, settings.detector.device, client) as executor,
            Leases() as leases,
            _staging(execution, leases) as staging,
        ):
            if executor.dashboard:
                progress.say(f"dashboard: {executor.dashboard}")
            if executor.warning:
                progress.say(f"WARNING: {executor.warning}")
            command = Command(archive, folder, settings, execution, opened.overwrite)
            slides = AllSlides(command, executor, leases, progress, detect, staging)
            return _carry_out(command, slides, progress)


def _check_computing(settings: Settings, execution: Execution, client: Any) -> None:
    """Raise ConfigError for devices or a scheduler that are no use, and what `template_stain` raises.

    settings: resolved
    """
    if client is None:
        check_execution(execution, settings.detector.device)
    # a template that shows no stain is refused, too; without a file it is known
    apart = bool(settings.stain.template) and starts_processes(execution, client)
    ask(apart, template_stain, settings.stain, settings.tissue, settings.tiling.mpp)


def _staging(execution: Execution, leases: Leases) -> contextlib.AbstractContextManager[Staging | None]:
    if not execution.stage:
        return contextlib.nullcontext()
    return Staging(Path(execution.stage).absolute(), execution.stage_space_bytes, leases)


def _carry_out(command: Command, slides: AllSlides, progress: Progress) -> list[SlideRecord]:
    """Process all slides; the ledger and the report are written, however that ends. Raises RunError, ClusterLost."""
    for problem in slides.check_workers(retire=False):
        raise RunError(problem)
    try:
        run_coroutine(slides.process, slides.stop)
        if _completes_round({record.status for record in slides.records.all()}):
            end_overwriting(command.folder, command.overwrite)
        if use := device_use(slides.work):
            progress.say(use)
    finally:
        records = slides.records.publish()
    return records


def _completes_round(statuses: Collection[str]) -> bool:
    """Whether a command that ends so leaves nothing of its round of --overwrite to the next one.

    Slides that another run holds are still of the round; so are those that failed, of a full disk perhaps, while others
    were done. Where a command did none, those that fail will go on failing.
    """
    return "locked" not in statuses and not {"done", "failed"} <= set(statuses)
