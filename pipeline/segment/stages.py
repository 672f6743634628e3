"""The stages of a slide: plan, tile, detect, outline, stitch, export. Each reads one store and writes the next.

Every stage takes paths and numbers, may run in any process, commits its result in one rename, and may be
run twice, even at the same time: what is there already is not done again, and equal work gives equal bytes.

    slide --begin--> work/plan.json --tile--> work/patches.zarr --detect--> work/found/<block>.npz
          --outline--> work/instances/<block>.parquet --stitch--> nuclei.parquet
          --export--> nuclei.geojson.zip, overlay.jpg --finish--> slide.json
"""

import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipeline import files
from pipeline.config import Detector, Export, Settings
from pipeline.errors import SlideChanged
from pipeline.model.instances import Found
from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment import pictures, polygons, stitch, tables
from pipeline.segment.export import FORMATS, Exported
from pipeline.segment.plan import Plan, picture_mpp, plan_slide, read_plan, write_plan
from pipeline.segment.predictions import read_found, write_found
from pipeline.segment.summary import findings
from slides.geometry import Size
from slides.grid import Tile
from slides.patches import PatchStore, cut
from slides.slide import Slide, open_slide


@dataclass(frozen=True)
class Job:
    """A slide and what is to be done to it: all that a task on any machine needs to know."""

    source: Path
    folder: Path
    settings: Settings
    digest: str
    mpp: float | None = None

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def found(self, block: int) -> Path:
        return self.work / "found" / f"{block:06d}.npz"

    def instances(self, block: int) -> Path:
        return self.work / "instances" / f"{block:06d}.parquet"


class BlockRecord(NamedTuple):
    """What became of a block: small enough to send anywhere."""

    block: int
    nuclei: int = 0
    core_mm2: float = 0.0
    lost_mm2: float = 0.0
    saturated: int = 0  # tiles whose cap was reached even after they were split
    quartered: int = 0  # tiles that the device had no memory for as a whole
    touching: int = 0  # claimed instances cut by a read edge inside the slide: the margin is too small for them
    tile_seconds: float = 0.0
    device_seconds: float = 0.0
    outline_seconds: float = 0.0


# --------------------------------------------------------------------------------------------------- begin


THUMBNAIL_PX, OVERLAY_PX = 1200, 3000  # longest sides of thumbnail.jpg and overlay.jpg


def begin(job: Job) -> tuple[int, ...]:
    """Open the slide, find its tissue, lay the grid, fit its stain; or take up what was begun earlier.

    Writes work/plan.json, work/tissue.npy and thumbnail.jpg. Returns the blocks that hold tissue. Raises
    slides.errors.SlideError, SlideChanged.
    """
    with open_slide(job.source, mpp=job.mpp) as slide:
        if (job.work / "plan.json").exists():
            plan = read_plan(job.work)
            if plan.scale != slide.scale:
                raise SlideChanged(
                    f"{job.source.name} was begun at {plan.scale.x} um/px ({plan.scale.source}), now it has "
                    f"{slide.scale.x} ({slide.scale.source}): give the same --mpp, or --overwrite"
                )
            if plan.quick_hash != slide.quick_hash:
                raise SlideChanged(
                    f"{job.source.name} is not the file this work began on ({slide.quick_hash[:12]}, was "
                    f"{plan.quick_hash[:12]}): delete {job.work}, or put the slide back"
                )
        else:
            plan = plan_slide(slide, job.settings)
            job.work.mkdir(parents=True, exist_ok=True)
            mpp = picture_mpp(plan, THUMBNAIL_PX)
            pictures.draw_plan(slide.thumbnail(mpp), mpp, plan.tissue, plan.tiles, job.folder / "thumbnail.jpg")
            write_plan(plan, job.work)
    PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    stores = (job.found(0).parent, job.instances(0).parent)
    for folder in stores:
        folder.mkdir(exist_ok=True)
    for folder in (job.folder, job.work, *stores):
        files.sweep(folder)  # what a killed process left half-written
    return plan.blocks


# ---------------------------------------------------------------------------------------------------- tile


def tile_block(job: Job, block: int) -> float:
    """Cut a block's patches from the slide into the Zarr store. Returns the seconds it took."""
    began = time.perf_counter()
    plan = read_plan(job.work)
    store = PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    if not _past_detection(job, block) and not store.is_done(block):
        tiles = plan.of_block(block)
        patches, lost = cut(_slide(job.source, job.mpp), tiles, plan.grid, job.settings.tiling.mpp)
        store.write(block, tiles, patches, lost)
    return time.perf_counter() - began


@functools.lru_cache(maxsize=4)
def _slide(source: Path, mpp: float | None) -> Slide:
    """Slides stay open between blocks; a Slide gives every thread a handle of its own."""
    return open_slide(source, mpp=mpp)


# -------------------------------------------------------------------------------------------------- detect


def detect_block(job: Job, block: int, tile_seconds: float = 0.0) -> None:
    """Patches of one block -> what the detector finds in them, committed in one rename; then the patches go.

    The device is asked for only once the patches are in memory: two of these in one process take turns, and while
    one computes the other one reads.
    """
    from pipeline.model import inference  # the workers that do not detect start in half the time without it

    plan = read_plan(job.work)
    store = PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    tiles = plan.of_block(block)
    while not _past_detection(job, block):
        patches, lost = store.read(block, tiles)
        if not store.is_done(block):  # a twin of this task was here first and has taken them away
            tile_seconds += tile_block(job, block)
            continue
        with inference.device_lock():
            began = time.perf_counter()
            found = list(inference.detect_patches(patches, plan, job.settings))
            seconds = time.perf_counter() - began
        write_found(job.found(block), found, lost, tile_seconds, seconds)
    store.discard(block)


def _past_detection(job: Job, block: int) -> bool:
    return job.found(block).exists() or job.instances(block).exists()


# ------------------------------------------------------------------------------------------------- outline


def outline_block(job: Job, block: int) -> BlockRecord:
    """What the detector found in one block -> its claimed instances, committed in one rename."""
    target, source = job.instances(block), job.found(block)
    if not target.exists():
        plan = read_plan(job.work)
        stored = read_found(source)
        began = time.perf_counter()
        tiles = plan.of_block(block)
        done = [outline(f, tile, plan, job.settings) for tile, f in zip(tiles, stored.tiles, strict=True)]
        rows = pa.concat_tables([table for table, _ in done])
        core_mm2 = np.array([t.core.width * t.core.height for t in tiles]) * (job.settings.tiling.mpp / 1000) ** 2
        record = BlockRecord(
            block,
            rows.num_rows,
            float(core_mm2.sum()),
            float((stored.lost * core_mm2).sum()),
            sum(f.saturated for f in stored.tiles),
            sum(f.quartered for f in stored.tiles),
            sum(cut_off for _, cut_off in done),
            stored.tile_seconds,
            stored.device_seconds,
            time.perf_counter() - began,
        )
        tables.write_instances(target, rows, record._asdict())
    source.unlink(missing_ok=True)
    return BlockRecord(**tables.read_record(target))


def outline(found: Found, tile: Tile, plan: Plan, settings: Settings) -> tuple[pa.Table, int]:
    """A tile's claimed instances as rows of `tables.INSTANCES`, and how many of them a read edge cuts.

    Claimed is what is anchored (by its centroid) in the tile's core and in the tissue, and lies on no better one.
    """
    shapes = polygons.solid(polygons.polygons(found.soft, found.boxes, level=0.5))
    shapes = polygons.simplify(shapes, settings.stitching.simplify_px)
    shapes = shapely.transform(shapes, lambda xy: xy + np.array(tile.read[:2], float))
    anchors = polygons.centroids(shapes)  # NaN where nothing was outlined
    mine = stitch.claim(anchors, tile.core, tolerance=settings.stitching.tolerance_px)
    mine &= stitch.mask_nms(shapes, found.scores, share=settings.detector.overlap)
    mine[mine] = plan.tissue.contains(anchors[mine])
    bounds = shapely.bounds(shapes[mine])
    cut_off = int(stitch.touching(bounds, tile.read, plan.grid.size).sum())
    kept = np.flatnonzero(mine)
    table = tables.instances(
        tile=tile,
        geometry=shapes[kept],
        score=found.scores[kept],
        votes=found.votes[kept],
        klass=found.classes[kept],
        stains=found.stains[kept],
    )
    return table, cut_off


# -------------------------------------------------------------------------------------------------- stitch


class StitchRecord(NamedTuple):
    nuclei: int
    dropped: int  # at seams: duplicates across seams, and instances that no other tile confirms


COLOURS = (
    (40, 220, 90),
    (230, 60, 60),
    (90, 110, 255),
    (240, 160, 30),
    (40, 120, 220),
    (0, 170, 170),
    (200, 90, 150),
)


def stitch_slide(job: Job) -> StitchRecord:
    """Instances of all blocks -> nuclei.parquet, in slide px.

    Two passes keep memory small: first the boxes of everything, and the polygons only of what could have a
    rival across a seam; then block by block into the table, without the losers.
    """
    plan, settings = read_plan(job.work), job.settings
    classes = class_names(settings.detector)
    losers = _seam_losers(job, plan)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes)}
    provenance = tables.Provenance(plan.quick_hash, (plan.scale.x, plan.scale.y), plan.bounds, job.digest, colours)
    nuclei = 0
    with tables.NucleiWriter(job.folder / "nuclei.parquet", provenance) as writer:
        for block in plan.blocks:
            rows = tables.read_instances(job.instances(block))
            keep = np.ones(rows.num_rows, bool)
            keep[losers.get(block, [])] = False
            rows = rows.filter(pa.array(keep))
            outlines = shapely.transform(tables.geometry(rows), plan.to_slide.work_to_slide)
            writer.write(
                outlines,
                klass=[classes[i] for i in rows["klass"].to_numpy()],
                score=rows["score"].to_numpy(),
                votes=rows["votes"].to_numpy(),
                stains=np.stack([rows["haematoxylin"].to_numpy(), rows["eosin"].to_numpy()], 1),
            )
            nuclei += rows.num_rows
    return StitchRecord(nuclei, sum(map(len, losers.values())))


def class_names(settings: Detector) -> tuple[str, ...]:
    """Class names of the weights, read from the file's text without loading the network."""
    return detector_architecture(find_weights(settings.weights)).classes


def _seam_losers(job: Job, plan: Plan) -> dict[int, NDArray[np.int64]]:
    """Rows of each block to leave out: duplicates, and what is anchored outside its core and unconfirmed."""
    bounds, tile, score, place = [], [], [], []
    for block in plan.blocks:
        rows = tables.read_instances(job.instances(block), ["tile_row", "tile_col", "x0", "y0", "x1", "y1", "score"])
        bounds.append(tables.bounds(rows))
        tile.append(np.stack([rows["tile_row"].to_numpy(), rows["tile_col"].to_numpy()], 1))
        score.append(rows["score"].to_numpy())
        place.append(np.stack([np.full(rows.num_rows, block), np.arange(rows.num_rows)], 1))
    if not bounds:
        return {}
    boxes, tiles, scores, places = (np.concatenate(parts) for parts in (bounds, tile, score, place))
    stride = plan.grid.tile - 2 * plan.grid.margin
    corners = tiles[:, ::-1] * stride
    cores = np.concatenate([corners, corners + stride], 1)
    reach = max(0.0, float(stitch.overhang(boxes, cores).max(initial=0.0)))
    near = np.flatnonzero(stitch.seam_candidates(boxes, cores, reach))
    shapes = np.full(len(near), None, dtype=object)
    for block in np.unique(places[near, 0]):
        here = places[near, 0] == block
        encoded = tables.read_instances(job.instances(int(block)), ["geometry"])
        shapes[here] = tables.geometry(encoded.take(pa.array(places[near[here], 1])))
    number = tiles[near, 0].astype(np.int64) * plan.grid.cols + tiles[near, 1]
    anchors = polygons.centroids(shapes)
    outside = stitch.anchored_outside(anchors, cores[near], Size(plan.grid.cols * stride, plan.grid.rows * stride))
    lost = near[~stitch.resolve(shapes, number, scores[near], iou=job.settings.stitching.iou, outside=outside)]
    return {int(b): places[lost[places[lost, 0] == b], 1] for b in np.unique(places[lost, 0])}


# -------------------------------------------------------------------------------------------------- export


class ExportRecord(NamedTuple):
    changed: int  # outlines that needed more than rounding to be valid, over all formats
    dropped: int  # nothing was left of them at the precision of the export
    findings: dict[str, Any]


def export_slide(job: Job) -> ExportRecord:
    """Everything that is made from nuclei.parquet: the formats asked for, the overlay, and what the report tells."""
    plan = read_plan(job.work)
    nuclei = job.folder / "nuclei.parquet"
    exported = write_formats(job.folder, job.settings.export).values()
    with open_slide(job.source, mpp=job.mpp) as slide:
        mpp = picture_mpp(plan, OVERLAY_PX)
        picture = slide.thumbnail(mpp)
    scale = mpp / job.settings.tiling.mpp
    pictures.draw_overlay(picture, nuclei, plan.to_slide, scale, job.folder / "overlay.jpg")
    return ExportRecord(sum(e.changed for e in exported), sum(e.dropped for e in exported), findings(nuclei, plan))


def write_formats(folder: Path, exporting: Export) -> dict[str, Exported]:
    """The files for other tools, from the folder's nuclei.parquet, by their names."""
    chosen = [FORMATS[name] for name in exporting.formats]
    return {f.file: f.write(folder / "nuclei.parquet", folder / f.file, crop=exporting.crop) for f in chosen}


def finish(job: Job, plan: Plan, results: dict[str, Any]) -> None:
    """Write slide.json, the mark of a finished slide: its provenance and `results`."""
    file = job.source.stat()
    content = {
        "digest": job.digest,
        "source": job.source.name,
        "source_bytes": file.st_size,
        "source_mtime_ns": file.st_mtime_ns,
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "size": plan.size,
        "bounds": plan.bounds,
        "um_per_px": plan.scale,
        "has_icc": plan.has_icc,
        "stain": plan.normalisation.source.to_json(),
        "stain_target": plan.normalisation.target.to_json(),
        **results,
    }
    with files.committed(job.folder / "slide.json") as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def clear(job: Job) -> None:
    """Remove the work folder. A twin of a task that is still at it, on a worker given up for lost, fails unheard."""
    if job.work.exists():
        job.work.rename(job.work.with_name(f".work-{uuid4().hex[:12]}"))
    for away in job.folder.glob(".work-*"):
        shutil.rmtree(away, ignore_errors=True)


def check_same(source: Path, finished: dict[str, Any]) -> None:
    """Raise SlideChanged where the slide is another than the one in a slide.json; it is opened only where need be."""
    file = source.stat()
    if (file.st_size, file.st_mtime_ns) == (finished.get("source_bytes"), finished.get("source_mtime_ns")):
        return
    with open_slide(source, mpp=1.0) as slide:
        if slide.quick_hash != finished["quick_hash"]:
            raise SlideChanged(
                f"{source.name} is not the file that these results are of ({slide.quick_hash[:12]}, was "
                f"{finished['quick_hash'][:12]}): put it back, or give --overwrite"
            )
