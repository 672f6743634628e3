"""A run over an archive: order, resume, what failed, and the ledger that says so."""

import contextlib
import csv
import dataclasses
import json
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import schedule, stages, tables
from pipeline.archive import RunError, Source, find_slides
from pipeline.config import Running, Settings
from pipeline.detector import read_architecture
from pipeline.plan import plan_slide, read_plan, stain_files, stain_target
from pipeline.stages import BlockRecord, Job
from pipeline.tensorfile import file_sha256, find_weights, read_notes
from slides.slide import open_slide


@dataclass(frozen=True)
class Row:
    """A slide's line in the ledger."""

    slide: str
    status: str  # done, done before, failed, interrupted
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
    detector_waiting: float = 0.0
    area_lost_mm2: float = 0.0
    saturated_tiles: int = 0
    touching_nuclei: int = 0
    seam_duplicates: int = 0
    note: str = ""


def run(
    inputs: Sequence[Path],
    out: Path,
    settings: Settings,
    running: Running,
    *,
    mpp: float | None = None,
    client: Any = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Segment every slide and write the results of DESIGN's layout under `out`; the ledger is returned.

    client: a `dask.distributed.Client` that shares this file system, instead of threads of this process.
    What is done is kept: a second call continues at the block. A slide that fails does not stop the others.
    Raises RunError, WeightsError or ConfigError before anything is begun.
    """
    archive = find_slides(inputs, out, mpp)
    settings, digest = _settle(settings, out, running.overwrite)
    say(f"{len(archive.sources)} slides, {archive.skipped} other files skipped; results in {out}")
    rows: dict[str, Row] = {}
    stop = threading.Event()
    with schedule.pools(running, client) as places:
        serial = isinstance(places.cpu, schedule.Loop)
        # a second slide is planned and tiled while the first one ends, so the detector need not wait
        with ThreadPoolExecutor(1 if serial else 2) as hands:
            futures: dict[Future[Row], Source] = {}
            for source in archive.sources:
                job = Job(source.path.resolve(), (out / source.name).resolve(), settings, digest, source.mpp)
                futures[hands.submit(_one_slide, source, job, places, running, stop, say)] = source
            try:
                pending = set(futures)
                while pending:
                    done, pending = wait_all(pending, timeout=0.5)
                    for future in done:
                        rows[futures[future].name] = future.result()
                    if done:
                        _write_ledger(out, [rows[s.name] for s in archive.sources if s.name in rows])
            except BaseException:
                stop.set()
                for future in futures:
                    future.cancel()
                raise
    return [rows[s.name] for s in archive.sources]


def _settle(settings: Settings, out: Path, overwrite: bool) -> tuple[Settings, str]:
    """Settings that name files by their paths, and their digest, which the output folder's run.json then has."""
    weights = find_weights(settings.detector.weights)
    trained_mpp = read_architecture(weights).mpp
    if abs(settings.tiling.mpp / trained_mpp - 1) > 0.1:
        raise RunError(
            f"tiling.mpp={settings.tiling.mpp}, but {weights.name} was trained at {trained_mpp} um per pixel: "
            f"need the same within a tenth; leave --tiling.mpp out, or choose other --weights"
        )
    files = stain_files(settings)
    settings = dataclasses.replace(
        settings,
        detector=dataclasses.replace(settings.detector, weights=str(weights)),
        stain=dataclasses.replace(
            settings.stain,
            weights=str(files.get("weights", settings.stain.weights)),
            template=str(files.get("template", "")),
        ),
    )
    stain_target(settings)  # a template that tells no stain is refused before anything is begun
    stain_sha256 = {name: file_sha256(p) for name, p in files.items()}
    digest = settings.digest(file_sha256(weights), stain_sha256)
    _open_run(out, settings, digest, weights, stain_sha256, overwrite)
    return settings, digest


def _open_run(
    out: Path, settings: Settings, digest: str, weights: Path, stain_sha256: dict[str, str], overwrite: bool
) -> None:
    """Write run.json, or make sure that the folder's is of the same settings."""
    path = out / "run.json"
    if path.exists() and not overwrite:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["digest"] != digest:
            raise RunError(
                f"{out} holds a run with other settings ({before['digest']}, this one is {digest}): "
                f"{_differences(before, settings, weights, stain_sha256)}. Choose another --out, or give --overwrite"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "digest": digest,
        "settings": asdict(settings),
        "weights_sha256": file_sha256(weights),
        "stain_sha256": stain_sha256,
        "weights_notes": {k: v for k, v in read_notes(weights).items() if k != "architecture"},
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONED},
    }
    with tables.committed(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")


VERSIONED = (
    "nightslide",
    "torch",
    "torchvision",
    "timm",
    "zarr",
    "numpy",
    "shapely",
    "pyarrow",
    "openslide-python",
)


def _differences(before: dict[str, Any], settings: Settings, weights: Path, stain_sha256: dict[str, str]) -> str:
    now, then = asdict(settings), before["settings"]
    changed = [
        f"{table}.{key} was {then.get(table, {}).get(key)!r}, is {value!r}"
        for table, values in now.items()
        for key, value in values.items()
        if json.loads(json.dumps(value)) != then.get(table, {}).get(key)
    ]
    if before["weights_sha256"] != file_sha256(weights):
        changed.append("the weights file has other content")
    for name, sha256 in stain_sha256.items():
        if before.get("stain_sha256", {}).get(name) not in (None, sha256):
            changed.append(f"the file of stain.{name} has other content")
    return "; ".join(changed) or "the version changed"


def _one_slide(
    source: Source,
    job: Job,
    places: schedule.Pools,
    running: Running,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Row:
    """The slide's row, whatever happens to it."""
    if stop.is_set():
        return Row(source.name, "interrupted")
    try:
        before = None if running.overwrite else _finished(job)
        if before is not None:
            say(f"{source.name}: done before, {before.nuclei:,} nuclei")
            return dataclasses.replace(before, status="done before")
        if running.overwrite and job.folder.exists():
            for name in ("work", *RESULTS):
                path = job.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        row = _segment(source, job, places, running, stop)
        say(summary(row) if row.status == "done" else f"{source.name}: interrupted")
        return row
    except Exception as error:
        cause = f"{error}" if str(error) else type(error).__name__
        say(f"{source.name}: FAILED: {cause}")
        _explain(source, job, error)
        return Row(source.name, "failed", cause=" ".join(cause.split()))


def _explain(source: Source, job: Job, error: Exception) -> None:
    """Append the traceback to errors.log of the run, for whoever mends it."""
    out = Path(str(job.folder).removesuffix(str(Path(source.name))))
    with contextlib.suppress(OSError), (out / "errors.log").open("a", encoding="utf-8") as log:
        log.write(f"{source.path}\n{''.join(traceback.format_exception(error))}\n")


RESULTS = ("slide.json", "thumbnail.jpg", "overlay.jpg", "nuclei.parquet", "nuclei.geojson.zip", "nuclei.csv")


def _finished(job: Job) -> Row | None:
    """The row of a slide whose results are complete: slide.json is written last."""
    path = job.folder / "slide.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    row = Row(**content["ledger"])
    if job.mpp is not None and row.mpp != round(job.mpp, 6):
        raise RunError(
            f"{row.slide} was done at mpp={row.mpp}, now mpp={job.mpp}: choose another --out, or --overwrite"
        )
    return row if content["digest"] == job.digest else None


def _segment(source: Source, job: Job, places: schedule.Pools, running: Running, stop: threading.Event) -> Row:
    began = time.perf_counter()
    blocks = places.cpu.submit(stages.begin, job).result()
    planned = time.perf_counter()
    plan = read_plan(job.work)
    steps = (
        schedule.Step(stages.tile_block, False),
        schedule.Step(stages.detect_block, True),
        schedule.Step(stages.outline_block, False),
    )
    records: list[BlockRecord] = []
    for outcome in schedule.flow(places, ((job, b) for b in blocks), steps, running.window, stop):
        if outcome.error is not None:
            raise outcome.error
        records.append(outcome.record)
    if len(records) < len(blocks):
        return Row(source.name, "interrupted")
    detected = time.perf_counter()
    stitched = places.cpu.submit(stages.stitch_slide, job).result()
    exported_from = time.perf_counter()
    places.cpu.submit(stages.export_slide, job).result()
    ended = time.perf_counter()
    device = sum(r.device_seconds for r in records)
    row = Row(
        source.name,
        "done",
        mpp=round((plan.scale.x + plan.scale.y) / 2, 6),
        mpp_source=plan.scale.source,
        tissue_mm2=round(plan.tissue.area_mm2, 4),
        tiles=len(plan.tiles),
        nuclei=stitched.nuclei,
        seconds_plan=round(planned - began, 3),
        seconds_tile=round(sum(r.tile_seconds for r in records), 3),
        seconds_detect=round(device, 3),
        seconds_outline=round(sum(r.outline_seconds for r in records), 3),
        seconds_stitch=round(exported_from - detected, 3),
        seconds_export=round(ended - exported_from, 3),
        seconds=round(ended - began, 3),
        detector_waiting=round(max(0.0, 1 - device / max(ended - began, 1e-9)), 4),
        area_lost_mm2=round(sum(r.lost_mm2 for r in records), 6),
        saturated_tiles=sum(r.saturated for r in records),
        touching_nuclei=sum(r.touching for r in records),
        seam_duplicates=stitched.dropped,
        note=plan.stain_note,
    )
    stages.finish(job, plan, asdict(row))
    if not running.keep_work:
        shutil.rmtree(job.work)
    return row


def _write_ledger(out: Path, rows: Sequence[Row]) -> None:
    with tables.committed(out / "ledger.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def summary(row: Row) -> str:
    """What a person wants to know of a slide: nuclei, stages with seconds and mm2 per second, warnings."""
    stages_ = ("plan", "tile", "detect", "outline", "stitch", "export")
    area = row.tissue_mm2
    parts = []
    for name in stages_:
        seconds = getattr(row, f"seconds_{name}")
        parts.append(f"{name} {seconds:.1f} s" + (f" ({area / seconds:.3f} mm2/s)" if seconds >= 0.05 else ""))
    lines = [
        f"{row.slide}: {row.nuclei:,} nuclei in {area:.2f} mm2, {row.seconds:.1f} s "
        f"({row.seconds / area if area else 0:.1f} s/mm2); detector waiting {row.detector_waiting:.0%}",
        "    " + ", ".join(parts),
    ]
    if row.area_lost_mm2:
        lines.append(f"    WARNING: {row.area_lost_mm2:.3f} mm2 of the slide cannot be read and were left out")
    if row.saturated_tiles:
        lines.append(
            f"    WARNING: {row.saturated_tiles} tiles hold more nuclei than --detector.instances-per-mm2 allows"
        )
    if row.touching_nuclei:
        lines.append(f"    {row.touching_nuclei} nuclei reach the edge of what their tile read: raise --tiling.margin")
    if row.note:
        lines.append(f"    not normalised: {row.note}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- plan


class Forecast(NamedTuple):
    """What a slide will cost, or why it will fail."""

    slide: str
    problem: str
    mpp: float
    mpp_source: str
    tissue_mm2: float
    tiles: int
    hours: float
    disk_gb: float


def forecast(source: Source, settings: Settings, seconds_per_mm2: float) -> Forecast:
    """Open a slide, find its tissue, and say what a run would take. Reads a thumbnail only."""
    unnormalised = dataclasses.replace(settings, stain=dataclasses.replace(settings.stain, method="none"))
    try:
        with open_slide(source.path, mpp=source.mpp) as slide:
            plan = plan_slide(slide, unnormalised)
    except Exception as error:
        return Forecast(source.name, " ".join(str(error).split()), 0, "", 0, 0, 0, 0)
    area = plan.tissue.area_mm2
    # a dense slide has 6,000 nuclei per mm2; each takes 415 bytes in the table and 284 in the zip
    return Forecast(
        source.name,
        "",
        plan.scale.x,
        plan.scale.source,
        area,
        len(plan.tiles),
        area * seconds_per_mm2 * settings.fusion.views / 3600,
        area * 6000 * 700 / 1e9,
    )
