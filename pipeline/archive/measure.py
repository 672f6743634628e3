"""Nuclei in annotated regions, over all finished slides of a run: `regions.csv` of each slide, and of the run."""

import contextlib
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import config, files
from pipeline.archive.inputs.region_files import match_regions
from pipeline.archive.ledger import read_ledger
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.report.page import write_report
from pipeline.segment.finished import UNUSABLE, cause, remedy
from pipeline.segment.region_table import measure_regions
from pipeline.segment.regions import RegionFile
from pipeline.text import csv_cell, one_line, printable
from slides.errors import NightslideError


class Measured(NamedTuple):
    """What became of a slide, or of a file of regions that is not used."""

    slide: str  # its name in the results; of a file, its path
    rows: Sequence[dict[str, Any]] = ()  # of its regions.csv
    words: str = ""  # for the terminal
    failed: bool = False  # it has regions, but these could not be measured


def measure_slides(folder: Path, regions: config.Regions) -> Iterator[Measured]:
    """Measure the nuclei of every finished slide in its regions, and write the tables; a slide at a time.

    folder: of a run, or of one slide of it. A slide without regions, or with regions that cannot be read, stops
    no other, and keeps no regions.csv of an earlier call. One whose table cannot be written stops no other. Where
    `folder` is a run's, files that are of none of its slides have a line each, after the slides. The run's own
    regions.csv, which is those of all its slides, and its report are written last.
    `pipeline.segment.region_table` says what the columns are.
    Raises RunError for a folder without finished slides, and what `match_regions` raises.
    """
    if not regions.folder:
        raise RunError("regions is not given: need --regions with the folder of QuPath's GeoJSON files")
    run = RunFolder(folder)
    finished = run.finished()
    one = [slide.path for slide in finished] == [run.path]
    if one and (whole := finished[0].run):
        run, finished = whole, [SlideFolder(Path(os.path.abspath(folder)))]
    slides = {printable(run.name_of(slide)): slide for slide in finished}
    if not slides:
        raise RunError(f"{folder} holds no finished slide: need the --out folder of a run")
    matches = match_regions(regions.folder, {name: _source(slide) for name, slide in slides.items()})
    for name, slide in slides.items():
        if name in matches.files:
            measured = _measure(name, slide, matches.files[name], regions.crop)
        elif name in matches.problems:
            measured = Measured(name, words=matches.problems[name], failed=True)
        elif slide.slide_json.exists() and files.read_json(slide.slide_json) is None:
            lost = f"{slide.slide_json} is damaged, so which file of regions belongs to the slide is not known"
            measured = Measured(name, words=f"{lost}: {remedy(slide.slide_json)}", failed=True)
        else:
            measured = Measured(name, words=f"no file of regions in {regions.folder}")
        try:
            if measured.rows:
                _write(slide.regions, [{key: _cell(value) for key, value in row.items()} for row in measured.rows])
            else:
                slide.regions.unlink(missing_ok=True)
        except OSError as error:
            measured = Measured(name, words=files.refusal(error) or one_line(error), failed=True)
        yield measured
    for path in () if one else matches.unused:
        yield Measured(printable(path), words="not used: it is of no finished slide, or that has another file, too")
    if [slide.path for slide in finished] != [run.path]:
        _write(run.regions, list(_tables(run)))
        with contextlib.suppress(RunError):  # slides of which there is no ledger
            write_report(run, read_ledger(run))


def _source(slide: SlideFolder) -> Path:
    """The path of the slide that the results are of; only its name where nothing else is known."""
    content = files.read_json(slide.slide_json) or {}
    return Path(str(content.get("source_path") or content.get("source") or slide.path.name))


def _measure(name: str, slide: SlideFolder, path: Path, crop: bool) -> Measured:
    try:
        table = measure_regions(slide, RegionFile.of(path, crop))
    except UNUSABLE as error:
        about = "" if isinstance(error, NightslideError) else f"{slide.nuclei} cannot be measured: "
        return Measured(name, words=f"{about}{cause(error, slide.nuclei)}", failed=True)
    notes = "".join(f"; {note}" for note in table.notes)
    rows = [{"slide": name, **row} for row in table.rows]
    return Measured(name, rows, f"{table.regions.describe(path)}{notes}")


def _tables(run: RunFolder) -> Iterator[dict[str, str]]:
    """The rows of all slides that have been measured. Raises RunError for a table that cannot be read."""
    for slide in run.finished():
        if slide.regions.is_file():
            try:
                with slide.regions.open(newline="", encoding="utf-8") as file:
                    yield from csv.DictReader(file)
            except (OSError, ValueError, csv.Error) as error:  # a spreadsheet may save it in another encoding
                raise RunError(
                    f"{slide.regions} is no table of regions ({error}): measure its slide again, or delete the file"
                ) from error


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Commit rows of cells as CSV; the columns are those of all rows, and what is not known is left empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with files.committed(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> object:
    """A value as text: numbers with six digits, none for NaN."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return csv_cell(value)
