"""What became of the slides: a row each, kept where its results are, and all of them in ledger.csv.

A finished slide has its row in slide.json, one that failed has failure.json with the cause: whoever runs on the
same folder, later or at the same time, knows.
"""

import csv
import dataclasses
import json
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import RunError
from pipeline.text import printable


@dataclass(frozen=True)
class Row:
    """A slide's line in the ledger."""

    slide: str
    status: str  # done, done before, failed, interrupted, elsewhere (another run is at it), waiting
    cause: str = ""
    mpp: float = 0.0
    mpp_source: str = ""
    tissue_mm2: float = 0.0
    tiles: int = 0
    nuclei: int = 0
    seconds_plan: float = 0.0
    seconds_tile: float = 0.0
    seconds_detect: float = 0.0
    seconds_outline: float = 0.0
    seconds_stitch: float = 0.0
    seconds_export: float = 0.0
    seconds: float = 0.0
    area_lost_mm2: float = 0.0
    saturated_tiles: int = 0
    quartered_tiles: int = 0
    touching_nuclei: int = 0
    seam_duplicates: int = 0
    export_changed: int = 0
    export_dropped: int = 0
    note: str = ""

    @property
    def done(self) -> bool:
        return self.status.startswith("done")


SLIDE, FAILURE = "slide.json", "failure.json"


def read_slide(folder: Path) -> dict[str, Any] | None:
    """What `stages.finish` wrote when the slide in this folder was done; None where it is not, or not legible."""
    return _read(folder / SLIDE)


def row_of(content: dict[str, Any]) -> Row:
    """The row in a slide.json, also of another version: what it does not know is left out."""
    known = {f.name for f in dataclasses.fields(Row)}
    return Row(**{name: value for name, value in content["ledger"].items() if name in known})


def write_failure(folder: Path, source: Path, error: BaseException) -> Row:
    """Note in the slide's folder, where it can be written, why it failed. Returns its row, without its name."""
    cause = printable(" ".join((str(error) or type(error).__name__).split()))
    trace = [printable(line) for line in traceback.format_exception(error)]
    content = {"source": printable(source), "cause": cause, "traceback": trace}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.committed(folder / FAILURE) as path:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError:
        pass  # a full disk or a folder that is gone may be the cause itself: the row says it
    return Row("", "failed", cause)


def read_failure(folder: Path, since_ns: int) -> Row | None:
    """The failure of this slide, without its name, if another run has noted one since (mtime, ns)."""
    path = folder / FAILURE
    content = _read(path)
    if content is None or path.stat().st_mtime_ns <= since_ns:
        return None
    return Row("", "failed", str(content.get("cause", "")))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_ledger(out: Path, rows: Iterable[Row]) -> None:
    """All rows as ledger.csv."""
    with files.committed(out / "ledger.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_ledger(out: Path) -> list[dict[str, Any]]:
    """The rows of ledger.csv, numbers as numbers. Raises RunError where there is none."""
    try:
        with (out / "ledger.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        empty = asdict(Row("", ""))
        return [{name: type(value)(row[name]) for name, value in empty.items()} for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise RunError(f"{out / 'ledger.csv'} is not a run's ledger: {error}") from error


def summary(row: Row) -> str:
    """What a person wants to know of a slide: nuclei, stages with seconds and mm2 per second, warnings."""
    area = row.tissue_mm2
    parts = []
    for name in ("plan", "tile", "detect", "outline", "stitch", "export"):
        seconds = getattr(row, f"seconds_{name}")
        parts.append(f"{name} {seconds:.1f} s" + (f" ({area / seconds:.3f} mm2/s)" if seconds >= 0.05 else ""))
    lines = [
        f"{row.slide}: {row.nuclei:,} nuclei in {area:.2f} mm2, {row.seconds:.1f} s "
        f"({row.seconds / area if area else 0:.1f} s/mm2)",
        "    " + ", ".join(parts),
    ]
    if row.area_lost_mm2:
        lines.append(f"    WARNING: {row.area_lost_mm2:.3f} mm2 of the slide have no result: unreadable, or no memory")
    if row.saturated_tiles:
        lines.append(
            f"    WARNING: {row.saturated_tiles} tiles hold more nuclei than --detector.instances-per-mm2 allows"
        )
    if row.quartered_tiles:
        lines.append(f"    {row.quartered_tiles} tiles were looked at in quarters, for want of memory on the device")
    if row.touching_nuclei:
        lines.append(f"    {row.touching_nuclei} nuclei reach the edge of what their tile read: raise --tiling.margin")
    if row.export_changed or row.export_dropped:
        lines.append(f"    export: {row.export_changed} outlines mended, {row.export_dropped} dropped")
    if row.note:
        lines.append(f"    not normalised: {row.note}")
    return "\n".join(lines)
