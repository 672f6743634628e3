"""`plan`, `export`, `measure` and `read_nuclei` for scripts and notebooks; `run` is in `pipeline.archive.run`."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archive.estimate import SlideEstimate, estimate_slides
from pipeline.archive.inputs.region_files import with_regions
from pipeline.archive.inputs.sources import Archive, Inputs, find_slides
from pipeline.archive.lease import Leases
from pipeline.archive.manifest import check_seams, resolve
from pipeline.archive.measure import Measured, measure_slides
from pipeline.archive.verify import without_nuclei
from pipeline.config import Architecture, Execution, Export, Regions, Settings, build, checked, given_path, require
from pipeline.errors import ExportFailed, RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.model.device import count_gpus, device_kind
from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment.export import Exported, check_formats
from pipeline.segment.finished import UNUSABLE, cause, rewrite_exports
from pipeline.segment.tables import checked_between_groups
from pipeline.segment.tables import read_nuclei as read_table

CPU_SECONDS_PER_MM2 = 13.0
"Of tissue, all stages but the choice of the stain, in one view: 3.48 mm2 on two cores of an AMD EPYC (README, Cost)."

_RESULTS = "the --out folder of a run, or the folder of one slide in it"


def plan(
    inputs: Inputs,
    settings: Settings = Settings(),
    *,
    mpp: float | None = None,
    force_mpp: float | None = None,
    seconds_per_mm2: float | None = None,
    follow_links: bool = Execution().follow_links,
) -> list[SlideEstimate]:
    """Open slides and estimate what a run would take; nothing is written.

    inputs, mpp, force_mpp: as for `pipeline.archive.run.run`
    seconds_per_mm2: of tissue in one view, from the ledger of a finished run; see `speed`
    follow_links: as in `Execution`
    Returns an estimate for each slide that is not skipped for want of regions: tissue, tiles, hours (NaN where no speed
    is known), disk space, or the `problem` with which it would fail. Warns as the run would, of folders that cannot be
    read, of a small margin, and of settings that have no effect. Raises ConfigError for inputs that cannot be searched
    and for settings, SlideError for a `stain.template` that is not there.
    """
    settings = checked("settings", settings, Settings)
    seconds = speed(settings, seconds_per_mm2)
    planned = estimate(inputs, settings, seconds, mpp=mpp, force_mpp=force_mpp, follow_links=follow_links)
    for warning in planned.warnings:
        warnings.warn(warning, stacklevel=2)
    return list(planned.estimates)


class Planned(NamedTuple):
    """What a run would take."""

    archive: Archive
    warnings: tuple[str, ...]  # those that the run would begin with
    estimates: Iterator[SlideEstimate]  # made one by one


def estimate(
    inputs: Inputs,
    settings: Settings,
    seconds_per_mm2: float,
    *,
    mpp: float | None = None,
    force_mpp: float | None = None,
    follow_links: bool = Execution().follow_links,
    apart: bool = False,
) -> Planned:
    """The slides of `inputs`, and their estimates one by one; see `plan`.

    apart: as for `estimate_slides`; a script that asks for it needs `if __name__ == "__main__":`
    Raises what `pipeline.archive.run.run` would raise for these settings.
    """
    unused, settings = settings.unused, resolve(settings)
    seams = check_seams(settings)
    archive = find_slides(inputs, mpp=mpp, force_mpp=force_mpp, follow_links=follow_links)
    archive = with_regions(archive, settings.regions)
    sources = [source for source in archive.sources if not source.skip]
    estimates = estimate_slides(sources, settings, seconds_per_mm2, apart=apart)
    return Planned(archive, (*seams, *unused, *archive.unread), estimates)


def speed(settings: Settings, seconds_per_mm2: float | None = None) -> float:
    """Seconds for 1 mm2 of tissue in one view on the device of `settings`.

    That is `seconds_per_mm2` where it is given, else what was measured for a CPU, in proportion to the pixels that the
    weights take; NaN for a GPU, for which nothing has been measured. Raises ConfigError for a device that is not there,
    and for a speed that is not above 0; WeightsError.
    """
    if seconds_per_mm2 is not None:
        is_number = isinstance(seconds_per_mm2, int | float) and not isinstance(seconds_per_mm2, bool)
        is_speed = is_number and 0 < seconds_per_mm2 < float("inf")
        require(is_speed, f"seconds-per-mm2={seconds_per_mm2!r}: need a number above 0")
        return seconds_per_mm2
    if device_kind(settings.detector.device, count_gpus()) != "cpu":
        return float("nan")
    taken, measured = detector_architecture(find_weights(settings.detector.weights)), Architecture()
    return CPU_SECONDS_PER_MM2 * (taken.upscale / taken.mpp * measured.mpp / measured.upscale) ** 2


def export(
    folder: str | os.PathLike[str], formats: str | Sequence[str] = Export().formats, **options: Any
) -> dict[Path, Exported]:
    """Write the files for other programs again, from the tables of a finished run; nothing is segmented.

    folder: of a run, or of one slide of it
    formats: one or several; options: the other fields of `Export`, such as crop=False
    Returns the number of nuclei by file. Warns of slides whose table is missing, and of options of formats that are not
    written. Raises ConfigError for a format that does not exist, RunError for a folder without tables, and, once all
    others are written, ExportFailed for what could not be: tables that are damaged, a full disk, slides that a run is
    working on.
    """
    results = given_path("folder", folder, _RESULTS)
    wanted = _listed("formats", formats, "the name of a format, or several")
    settings = build(Export, {"formats": wanted, **options}, where="export")
    for problem in (*settings.unused, *(f"not exported: {problem}" for problem in without_nuclei(results))):
        warnings.warn(problem, stacklevel=2)
    return dict(export_files(results, settings))


def export_files(folder: str | os.PathLike[str], settings: Export) -> Iterator[tuple[Path, Exported]]:
    """`export`, a slide at a time: each file with its count, once the slide's are written, or one could not be."""
    check_formats(settings.formats)
    slides = RunFolder(Path(folder)).with_nuclei()
    if not slides:
        raise RunError(f"{folder} holds no nuclei.parquet: need the --out folder of a run")
    failed = []
    with Leases() as leases:
        for slide in slides:
            written: dict[str, Exported] = {}
            try:
                if not leases.take(slide.path):  # a run with --overwrite would remove what slide.json is written for
                    who = leases.holder(slide.path)
                    failed.append(f"{slide.path}: a run is working on it ({who}), try again when it is done")
                    continue
                try:
                    with checked_between_groups(functools.partial(leases.check, slide.path)):
                        for wanted in settings.formats:  # one by one: what is made is noted, should the next one fail
                            written |= rewrite_exports(slide, dataclasses.replace(settings, formats=(wanted,)))
                finally:
                    leases.release(slide.path)
            except UNUSABLE as error:
                failed.append(f"{slide.nuclei} could not be exported: {cause(error, slide.nuclei)}")
            for name, exported in written.items():
                yield slide.export(name), exported
    if failed:
        raise ExportFailed("\n".join(failed))


def measure(
    folder: str | os.PathLike[str], regions: str | os.PathLike[str], *, crop: bool = Regions().crop
) -> list[Measured]:
    """Measure the nuclei of finished slides in regions drawn in QuPath, and write regions.csv; nothing is segmented.

    folder: of a run, or of one slide of it
    regions: folder of QuPath's GeoJSON files, named after the slides; crop: as in `Regions`
    Returns what became of each slide; `pipeline.archive.measure.measure_slides` says more, and what is raised.
    """
    results = given_path("folder", folder, _RESULTS)
    drawn = given_path("regions", regions, "the folder of QuPath's GeoJSON files")
    return list(measure_slides(results, checked("regions", Regions(str(drawn), crop), Regions)))


def read_nuclei(path: str | os.PathLike[str], columns: str | Sequence[str] | None = None) -> pa.Table:
    """The nuclei of a slide, all columns of nuclei.parquet but `bbox`, or one or several.

    `geopandas.read_parquet` decodes the outlines.

    path: nuclei.parquet, or the slide's folder in the results
    Raises RunError where there is no such table, where it is damaged, and for a column that it does not have;
    ConfigError for what is no path and no name.
    """
    given = given_path("path", path, "a finished slide's folder or its nuclei.parquet")
    wanted = None if columns is None else _listed("columns", columns, "the name of a column, or several")
    table = SlideFolder(given).nuclei if given.is_dir() else given
    if not table.is_file():
        raise RunError(f"{table} does not exist: need a finished slide's folder or its nuclei.parquet")
    try:
        there = pq.read_schema(table).names
        lacking = sorted(set(wanted or ()) - {*there, "class_score"})  # which the first tables had not
        if not lacking:
            return read_table(table, wanted)
    except UNUSABLE as error:
        raise RunError(f"{table} cannot be read: {cause(error, table)}") from error
    raise RunError(f"{table} has no column {lacking[0]!r}: need some of {', '.join(there)}")


def _listed(name: str, values: Any, need: str) -> list[str]:
    """One text or several, as a list. Raises ConfigError for anything else. name: of the parameter."""
    listed: list[Any] = [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    require(all(isinstance(value, str) for value in listed), f"{name}={values!r}: need {need}, as text")
    return listed
