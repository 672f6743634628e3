"""ledger.csv, a row a slide: all slides of the folder, whatever command did them.

A finished slide has its record in slide.json, and one that failed the cause in failure.json (`failures`), where other
runs on the same folder, later or at the same time, read it.
"""

import csv
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline import files
from pipeline.archive.failures import read_failure
from pipeline.config import Settings
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.job import slide_digest
from pipeline.segment.record import OF_OTHER_SETTINGS, WAITS, SlideRecord, read_record, read_slide_json
from pipeline.segment.regions import RegionFile
from pipeline.text import counted, counted_nuclei, csv_cell, from_csv_cell


def row_of(record: SlideRecord) -> dict[str, Any]:
    """A record as a row of ledger.csv: plain values by column.

    seconds_work is the sum over the stages, without waiting; seconds_elapsed runs from start to end, of every attempt.
    seconds_idle_... is how long detectors had nothing to compute before they got blocks of the slide, by the cause.
    Where there are several detectors, a slide may have less than 0, and another one too much: their sum counts.
    """
    work = record.work
    return {
        "slide": record.slide,
        "status": record.status,
        "cause": record.cause,
        "mpp": record.mpp,
        "mpp_source": record.mpp_source,
        "tissue_mm2": record.tissue_mm2,
        "tiles": record.tiles,
        "stain": record.stain,
        **{name: round(value, 6) for name, value in dataclasses.asdict(work.counts).items()},
        **{f"seconds_{name}": round(work.seconds.get(name, 0.0), 3) for name in _stage_names()},
        **{f"seconds_idle_{name}": round(work.waited.get(name, 0.0), 3) for name in WAITS},
        "seconds_work": round(record.work_seconds, 3),
        "seconds_elapsed": record.elapsed_seconds,
        "computed_on": " + ".join(work.computed_on),
        "remarks": "; ".join(record.remarks),
    }


def _stage_names() -> list[str]:
    from pipeline.segment.stages import STAGES  # loads what slides are processed with

    return [stage.name for stage in STAGES]


def write_ledger(run: RunFolder, records: Iterable[SlideRecord]) -> None:
    """Commit all rows as ledger.csv."""
    escaped = "backslashreplace"  # a name in a remark need not be text: one slide's may not cost all others their rows
    with files.committed(run.ledger) as path, path.open("w", newline="", encoding="utf-8", errors=escaped) as file:
        writer = csv.DictWriter(file, list(_columns()))
        writer.writeheader()
        for record in records:
            writer.writerow({name: csv_cell(value) for name, value in row_of(record).items()})


def _columns() -> dict[str, type]:
    """The columns in their order, and what each holds."""
    return {name: type(value) for name, value in row_of(SlideRecord("any", "waiting")).items()}


class OtherSlides(NamedTuple):
    """The slides of a folder that other commands have left there."""

    records: list[SlideRecord]  # by name
    names: dict[str, str]  # of those that are finished, by the places of their files


def other_slides(run: RunFolder, own: Collection[str], settings: Settings) -> OtherSlides:
    """The finished and failed slides of a folder but those of these names.

    settings: of the folder now; a slide that was done with others, before --overwrite, has a remark.
    """
    records, names = {}, dict[str, str]()
    for name, folder in _not_of(own, run, run.failed()):
        records[name] = read_failure(folder, name)
    for name, folder in _not_of(own, run, run.finished()):
        content = read_slide_json(folder)
        if content is not None:
            record = read_record(content, name)
            now = slide_digest(settings, RegionFile.from_json(content.get("regions")))
            of_others = () if content["digest"] == now else (OF_OTHER_SETTINGS,)
            records[name] = dataclasses.replace(record, remarks=(*of_others, *record.remarks))
            names[str(content.get("source_path"))] = name
    return OtherSlides([records[name] for name in sorted(records)], names)


def _not_of(own: Collection[str], run: RunFolder, folders: Iterable[SlideFolder]) -> Iterator[tuple[str, SlideFolder]]:
    """The folders of other slides, by their names."""
    named = ((run.name_of(folder), folder) for folder in folders)
    return ((name, folder) for name, folder in named if name not in own)


def read_ledger(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of ledger.csv, numbers as numbers. Raises RunError where there is none."""
    return read_columns(run, _columns())


def read_columns(run: RunFolder, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """Some columns of ledger.csv, each as a type: str, int or float. Raises RunError where there are none."""
    try:
        with run.ledger.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet saves it with a byte order mark
            rows = list(csv.DictReader(file))
        return [{name: _value(kind, from_csv_cell(row[name])) for name, kind in kinds.items()} for row in rows]
    except FileNotFoundError as error:
        if run.run_json.exists():
            raise RunError(
                f"{run.path} has no {run.ledger.name}: where a run has just been started, try again in a moment; else "
                f"give its command again"
            ) from error
        raise RunError(f"{run.ledger} does not exist: need the --out folder of a run") from error
    except KeyError as error:
        raise RunError(
            f"{run.ledger} is not a run's ledger, as it lacks the column {error.args[0]!r}: where a spreadsheet saved "
            f"it otherwise, give the run's command again, which writes it anew; else need the --out folder of a run"
        ) from error
    except (OSError, ValueError, OverflowError, TypeError, AttributeError, csv.Error) as error:
        raise RunError(
            f"{run.ledger} is damaged, or not a run's ledger ({error}): give the run's command again, which writes it "
            f"anew; else need the --out folder of a run"
        ) from error


def _value(kind: type, text: str) -> Any:
    """A cell as a value. Raises ValueError or OverflowError where it is none, or too large to compute with."""
    value = kind(text)
    if kind is int:
        float(value)
    return value


def terminal_lines(record: SlideRecord) -> str:
    """A finished slide for the terminal: nuclei, seconds of each stage, and warnings."""
    area, seconds = record.tissue_mm2, record.work_seconds
    stages = ", ".join(f"{name} {record.work.seconds.get(name, 0.0):.1f} s" for name in _stage_names())
    lines = [
        f"{record.slide}: {counted_nuclei(record.nuclei)} in {area:.2f} mm2, {seconds:.1f} s of work "
        f"({seconds / area if area else 0:.1f} s/mm2)",
        f"    {stages}",
        *(f"    WARNING: {remark}" for remark in record.remarks),
    ]
    return "\n".join(lines)


def mixed_computation(rows: Iterable[Mapping[str, Any]]) -> str:
    """A warning where slides of one run were computed on different kinds of device or precision; else empty."""
    kinds = sorted({str(row["computed_on"]) for row in rows if row["computed_on"]})
    if len(kinds) < 2:
        return ""
    return f"slides were computed on {', and others on '.join(kinds)}: single nuclei may differ between them"


def mixed_stains(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many slides were normalised by which method, where they differ; else empty."""
    counts = Counter(str(row["stain"]) for row in rows if row["stain"])
    if len(counts) < 2:
        return ""
    shares = ", ".join(f"{method} for {counted(count, 'slide')}" for method, count in counts.most_common())
    return f"stain normalisation: {shares}; to compare slides, treat all alike: --stain none or --stain macenko"
