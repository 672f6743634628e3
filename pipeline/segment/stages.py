"""The stages of a slide, as a list: each reads one store and writes the next.

    slide --plan, stain--> work/plan.json --tile--> work/patches.zarr, work/focus/<block>.json
          --detect--> work/predictions/<block>.npz --outline--> work/instances/<block>.parquet
          --stitch--> nuclei.parquet --export--> nuclei.geojson.zip, ...

`STAGES` is what a run works through, and what the ledger's columns and the report's are made from. A stage is a
function of a job, and of a block where it is done block by block; it may run in any process, commits its result in one
rename, and may run twice, even at the same time: what is there already is not done again, and equal work gives equal
bytes. Scratch that is damaged counts as missing.
"""

import contextlib
import functools
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import numpy as np
import pyarrow as pa
import shapely

from pipeline import files
from pipeline.config import Settings
from pipeline.errors import ScratchLost, SlideChanged
from pipeline.layout import RESULTS
from pipeline.model.allocator import return_freed_memory
from pipeline.model.device import compute, computes_on
from pipeline.model.fitted_stain import UNCHANGED, Normalisation
from pipeline.model.instances import HostInstances, Patches, Result, select
from pipeline.segment import annotations, pictures, polygons, stain_trial, stitch, tables
from pipeline.segment.finished import check_exports, check_same_file, write_exports
from pipeline.segment.job import Job
from pipeline.segment.nuclei import write_nuclei
from pipeline.segment.plan import (
    Plan,
    load_plan,
    picture_frame,
    plan_slide,
    read_artefacts,
    read_plan,
    reported_tissue,
    write_plan,
)
from pipeline.segment.predictions import read_predictions, write_predictions
from pipeline.segment.record import ARTEFACT_AREAS, Counts, StageRecord
from slides import focus
from slides.artefacts import ArtefactMap
from slides.grid import Tile
from slides.patches import PatchStore, cut
from slides.scale import GivenScale
from slides.slide import Slide

# A process of more returns what detection left free before a stage of the whole slide, which needs memory of its own.
_SLIDE_STAGE_BYTES = 1e9
_NEW_OBJECTS = 50_000  # after which Python looks for garbage again
THUMBNAIL_PX, OVERLAY_PX = 1200, 3000  # longest sides of thumbnail.jpg and overlay.jpg


class Detect(Protocol):
    """What may replace the detector: patches uint8 (h, w, 3) of any sizes -> the instances of each, in their order."""

    def __call__(
        self, patches: Patches, normalisation: Normalisation, settings: Settings
    ) -> Iterator[HostInstances]: ...


def _seldom_look_for_garbage() -> None:
    """Have this process look for objects that are in cycles, and that nobody needs, less often than Python does.

    A geometry is an object, and in no cycle. After every 700 new ones Python looks, now and then at all that there are,
    which takes a twentieth of the time around the detector (`workflows/benchmarks/feed.py`). No cycle holds an array.
    """
    often, *seldom = gc.get_threshold()
    if 0 < often < _NEW_OBJECTS:  # 0: it never looks
        gc.set_threshold(_NEW_OBJECTS, *seldom)


def _worked(stage: str, since: float, counts: Counts = Counts(), computed_on: tuple[str, ...] = ()) -> StageRecord:
    return StageRecord({stage: round(time.perf_counter() - since, 3)}, counts, computed_on)


# ---------------------------------------------------------------------------------------------------- plan


def make_plan(job: Job) -> StageRecord:
    """Open the slide, detect its tissue, lay out the grid, fit its stain; or read the plan of an earlier run.

    Writes work/plan.json and work/tissue.npz. Removes what other settings left in the work folder.
    Raises slides.errors.SlideError, SlideChanged; RunError where an export that is asked for cannot be written.
    """
    started, folder = time.perf_counter(), job.folder
    with job.open() as slide:
        plan, origin = load_plan(folder, job.digest), job.origin
        now = (job.overwrite, slide.scale, slide.quick_hash)
        if plan is not None and job.overwrite and (plan.overwrite, plan.scale, plan.quick_hash) != now:
            plan = None  # not refused, as for --overwrite the remedy would be what was given
        if plan is not None:
            _check_same_slide(plan, slide, job)
        file, parts = (origin.bytes, origin.mtime_ns), origin.parts
        # a file that was repaired may hold what could not be read
        if plan is None or plan.file != file or (None not in (plan.parts, parts) and plan.parts != parts):
            remove_work(job)
            plan = plan_slide(slide, job.settings, job.regions)
            plan = plan._replace(file=file, parts=parts, overwrite=job.overwrite)
            job.check_lease()
            folder.work.mkdir(parents=True, exist_ok=True)
            write_plan(plan, folder, job.digest)
        check_exports(job.source, folder.name, plan, job.settings.export)
    job.check_lease()
    PatchStore.create(folder.patches, plan.grid, job.digest)
    stores = (folder.focus(0).parent, folder.predictions(0).parent, folder.instances(0).parent)
    for store in stores:
        store.mkdir(exist_ok=True)
    for place in (folder.path, folder.work, *stores):
        files.sweep(place)  # what a killed process left half-written
    return _worked("plan", started, Counts(skipped_tiles=plan.skipped_tiles))


def _check_same_slide(plan: Plan, slide: Slide, job: Job) -> None:
    """Raise SlideChanged where the work in the slide's folder was started on another file, or at another scale.

    Wherever a slide is opened: a file that is replaced during a run would give results of which a part shows another.
    """
    name = job.source.name
    if plan.scale != slide.scale:
        raise SlideChanged(
            f"{name}: work was started at {plan.scale.x} um/px ({plan.scale.source}), now it has {slide.scale.x} "
            f"({slide.scale.source}): give the same scale, or --overwrite"
        )
    of_work = "the file this work was started on"
    check_same_file(slide, plan.quick_hash, of_work, "give --overwrite, or put the slide back")


def remove_work(job: Job) -> None:
    """Remove the work folder. A task that another worker, given up for lost, still runs in there then fails alone.

    Raises LeaseLost.
    """
    job.check_lease()
    folder = job.folder
    with contextlib.suppress(FileNotFoundError):  # there is none, or a former owner, suspended until now, was faster
        folder.work.rename(folder.discarded_work(uuid4().hex[:12]))
    for leftover in folder.all_discarded_work():
        shutil.rmtree(leftover, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- stain


def choose_stain(job: Job, detect: Detect | None = None) -> StageRecord:
    """With --stain auto: drop the plan's normalisation unless it raises the mean score; committed in the plan.

    detect: replaces the detector.
    """
    plan = read_plan(job.folder, job.digest)
    if not plan.trials:
        return plan.trial_work
    with job.open() as slide:
        _check_same_slide(plan, slide, job)
        patches = [slide.read_decodable(square, plan.frame)[0] for square in plan.trials]
    settings = stain_trial.own_settings(job.settings)
    queues = [_queue(detect)(patches, each, settings) for each in (UNCHANGED, plan.normalisation)]
    tried, worked = _computed("stain", job, queues, detect)
    without, with_it = (stain_trial.mean_score(result() for result in results) for results in tried)
    chosen = plan.normalisation if with_it > without else UNCHANGED
    notes = plan.notes if without or with_it else (*plan.notes, stain_trial.NOTHING_FOUND)
    decided = plan._replace(
        normalisation=chosen, notes=notes, trials=(), trial_scores=(without, with_it), trial_work=worked
    )
    job.check_lease()
    other = read_plan(job.folder, job.digest)
    if not other.trials:  # another worker, of another device perhaps, has decided meanwhile, and blocks may follow that
        return other.trial_work
    write_plan(decided, job.folder, job.digest)
    return worked


# ---------------------------------------------------------------------------------------------------- tile


def tile_block(job: Job, block: int, before: StageRecord) -> StageRecord:
    """Cut a block's patches from the slide into the Zarr store, and measure how sharp they are. Raises SlideChanged."""
    started = time.perf_counter()
    if _is_detected(job, block):
        return before
    plan = read_plan(job.folder, job.digest)
    store = PatchStore.create(job.folder.patches, plan.grid, job.digest)
    if not store.is_done(block) or _focus(job, block) is None:
        tiles = plan.of_block(block)
        region, lost = cut(_planned_slide(job, plan), tiles, plan.grid, plan.frame)
        _planned_slide(job, plan)  # it may have been replaced while it was read
        sharpness = focus.measure(store.windows(block, tiles, region), tiles, plan.grid.size, plan.frame.mpp)
        job.check_lease()
        files.write_checked_json(job.folder.focus(block), focus.to_json(sharpness), synced=False)
        store.write(block, tiles, region, lost)
    return before + _worked("tile", started)


def _planned_slide(job: Job, plan: Plan) -> Slide:
    """The slide as its file is now. Raises SlideChanged where that is not the one that was planned."""
    slide = _slide(job.source, job.scale, files.stamp(job.source))
    _check_same_slide(plan, slide, job)
    return slide


@functools.lru_cache(maxsize=4)
def _slide(source: Path, scale: GivenScale, _stamp: tuple[int, ...]) -> Slide:
    """A slide stays open between blocks, and gives every thread a handle of its own; a replaced one is opened anew."""
    return Slide(source, scale)


def _is_detected(job: Job, block: int) -> bool:
    if block_record(job, block) is not None:
        return True
    return _focus(job, block) is not None and files.read_checked(job.folder.predictions(block)) is not None


def _focus(job: Job, block: int) -> dict[str, Any] | None:
    """How sharp a block is, as `tile_block` measured it; None where that is missing or damaged."""
    return files.read_checked_json(job.folder.focus(block))


def block_record(job: Job, block: int) -> StageRecord | None:
    """What was done for a block, if its instances are complete; else None."""
    content = files.read_checked(job.folder.instances(block))
    return None if content is None else StageRecord.from_json(content)


# -------------------------------------------------------------------------------------------------- detect


def detect_block(job: Job, block: int, before: StageRecord, detect: Detect | None = None) -> StageRecord:
    """Patches of one block, trimmed to the tissue -> their instances, committed in one rename; then they are deleted.

    detect: replaces the detector. It is called once the patches are in memory, and computes only when its iterator is
    advanced. Two calls of this function in one process take turns at computing: while one does, the other reads.
    Raises LeaseLost between two patches once the slide is not ours any more, as when the run is interrupted.
    """
    plan = read_plan(job.folder, job.digest)
    store = PatchStore.create(job.folder.patches, plan.grid, job.digest)
    tiles = plan.of_block(block)
    while not _is_detected(job, block):
        stored = store.read(block, tiles)
        if stored is None:  # damaged, or removed by another worker that was given the same block
            before = tile_block(job, block, before)
            continue
        patches, lost = stored
        trimmed = [
            patch[plan.trimmed(tile).within((tile.read.x0, tile.read.y0))]
            for patch, tile in zip(patches, tiles, strict=True)
        ]
        queue = _queue(detect)(trimmed, plan.normalisation, job.settings)
        (results,), worked = _computed("detect", job, [queue], detect)
        before += worked
        instances = [result() for result in results]
        job.check_lease()
        write_predictions(job.folder.predictions(block), instances, lost, before)
        break
    store.discard(block)
    return before


def _computed(
    stage: str, job: Job, queues: Sequence[Iterator[Result]], detect: Detect | None
) -> tuple[list[list[Result]], StageRecord]:
    """All results of each queue, computed in our turn at the device, and the work that was.

    The results of a GPU wait for the last of its work and their copy, in which it may compute for another thread.
    Raises LeaseLost between two patches.
    """

    def all_of_them() -> tuple[list[list[Result]], StageRecord]:
        started = time.perf_counter()
        results = [list(job.while_leased(queue)) for queue in queues]
        return results, _worked(stage, started, computed_on=() if detect else (computes_on(job.settings.detector),))

    return compute(job.settings.detector.device, all_of_them)


def prepare_detector(settings: Settings) -> None:
    """What a process does before it first detects, done while the first slide is planned."""
    from pipeline.model.inference import prepare_device

    prepare_device(settings)


def _queue(detect: Detect | None) -> Callable[[Patches, Normalisation, Settings], Iterator[Result]]:
    """The detector, or what replaces it, whose instances are known at once."""
    if detect is not None:
        return lambda patches, normalisation, settings: map(_known, detect(patches, normalisation, settings))
    from pipeline.model.inference import detect_patches  # workers that do not detect start in half the time without it

    return detect_patches


def _known(instances: HostInstances) -> Result:
    return lambda: instances


# ------------------------------------------------------------------------------------------------- outline


def outline_block(job: Job, block: int, before: StageRecord) -> StageRecord:
    """The instances in one block -> those that its tiles claim, as polygons, committed in one rename.

    Returns all that was done for the block, by an earlier run too. Raises ScratchLost where it was not detected.
    """
    started, target = time.perf_counter(), job.folder.instances(block)
    _seldom_look_for_garbage()
    predictions, sharpness = read_predictions(job.folder.predictions(block)), _focus(job, block)
    record = block_record(job, block)  # last: another worker with the same block removes the others once it is there
    if record is None:
        if predictions is None or sharpness is None:
            missing = job.folder.predictions(block) if predictions is None else job.folder.focus(block)
            raise ScratchLost(f"{missing} is missing or damaged")
        plan = read_plan(job.folder, job.digest)
        tiles = plan.of_block(block)
        done = [outline(f, tile, plan, job.settings) for tile, f in zip(tiles, predictions.tiles, strict=True)]
        core_mm2 = np.array([tile.core.area for tile in tiles]) * (job.settings.tiling.mpp / 1000) ** 2
        counts = Counts(
            area_lost_mm2=float((predictions.lost * core_mm2).sum()),
            saturated_tiles=sum(f.saturated for f in predictions.tiles),
            split_tiles=sum(f.split for f in predictions.tiles),
            touching_nuclei=sum(touching for _, touching in done),
        )
        record = predictions.work + _worked("outline", started, counts)
        job.check_lease()
        about = {**record.to_json(), "focus": sharpness}
        tables.write_instances(target, pa.concat_tables([table for table, _ in done]), about)
    files.remove_checked(job.folder.predictions(block))
    job.folder.focus(block).unlink(missing_ok=True)
    return record


def outline(instances: HostInstances, tile: Tile, plan: Plan, settings: Settings) -> tuple[pa.Table, int]:
    """A tile's claimed instances as rows of `tables.INSTANCES`, and how many of them a read edge cuts.

    A claimed instance is anchored (by its centroid) in the tile's core and in the tissue, and no better one covers it.
    """
    patch = plan.trimmed(tile)
    core = tile.core.shift(-patch.x0, -patch.y0)
    decisive = stitch.reaches(instances.boxes, core, tolerance=settings.stitching.tolerance_px)
    instances = select(instances, np.flatnonzero(decisive))
    shapes = polygons.solid(polygons.from_masks(instances.mask_probs, instances.boxes, level=0.5))
    shapes = polygons.simplify(shapes, settings.stitching.simplify_px)
    shapes = shapely.transform(shapes, lambda xy: xy + np.array(patch[:2], float))
    anchors = polygons.centroids(shapes)  # NaN where nothing was outlined
    mine = stitch.claim(anchors, tile.core, tolerance=settings.stitching.tolerance_px)
    mine &= stitch.mask_nms(shapes, instances.scores, share=settings.detector.overlap)
    mine[mine] = plan.tissue.contains(anchors[mine])
    bounds = shapely.bounds(shapes[mine])
    cut_off = int(stitch.touching(bounds, patch, plan.grid.size).sum())
    kept = np.flatnonzero(mine)
    return tables.instance_rows(tile, shapes[kept], select(instances, kept)), cut_off


# -------------------------------------------------------------------------------------------------- stitch


def stitch_slide(job: Job) -> StageRecord:
    """Instances of all blocks -> nuclei.parquet, in slide px; and all artefacts -> work/artefacts.npy.

    With --overwrite the former results are removed now, as late as can be: a slide that fails before keeps them.
    Raises ScratchLost where the instances of a block are missing or damaged; LeaseLost between two blocks.
    """
    started = time.perf_counter()
    return_freed_memory(_SLIDE_STAGE_BYTES)
    _seldom_look_for_garbage()
    plan = read_plan(job.folder, job.digest)
    if job.overwrite:
        _remove_results(job)
    artefacts = _with_blur(job, plan)
    counts = write_nuclei(job, plan, artefacts)
    return _worked("stitch", started, counts + _areas(artefacts, skipped=job.settings.tissue.artefacts == "skip"))


def _remove_results(job: Job) -> None:
    """Whatever an earlier run made of the slide, with other settings perhaps; not what this round has made already."""
    if (files.read_json_if_there(job.folder.slide_json) or {}).get("overwrite") == job.overwrite:
        return  # a second call of this stage, by a worker that was given up for lost
    job.check_lease()  # after that: whoever waits long for a file server may be given up, and the slide done meanwhile
    job.folder.slide_json.unlink(missing_ok=True)  # first: without it, nothing else counts as a result
    results = (job.folder.regions, *(job.folder.path / name for name in RESULTS))
    for path in job.while_leased(iter(results)):
        files.remove(path)


def _with_blur(job: Job, plan: Plan) -> ArtefactMap:
    """All artefacts of a slide, committed as work/artefacts.npy. Raises ScratchLost where a block is missing."""
    parts = []
    for block in job.while_leased(iter(plan.blocks)):
        about = files.read_checked(job.folder.instances(block))
        if about is None:
            raise ScratchLost(f"{job.folder.instances(block)} is missing or damaged")
        parts.append(focus.from_json(about["focus"]))
    artefacts = plan.artefacts
    if job.settings.tissue.artefacts != "off":
        whole = focus.add(parts)
        blurred = focus.blurred(whole.sums, plan.glass, plan.frame.mpp)
        artefacts = artefacts.with_blur(blurred, whole.corner, focus.cell_px(plan.frame.mpp))
    with files.checked(job.folder.artefacts, {}) as path, path.open("wb") as file:
        np.save(file, artefacts.kinds, allow_pickle=False)
    return artefacts


def _areas(artefacts: ArtefactMap, *, skipped: bool) -> Counts:
    areas = artefacts.tissue_mm2()
    fields: dict[str, Any] = {ARTEFACT_AREAS[kind]: area for kind, area in areas.items()}
    return Counts(**fields, skipped_mm2=sum(areas.values()) if skipped else 0.0)


# -------------------------------------------------------------------------------------------------- export


def export_slide(job: Job) -> StageRecord:
    """The files of the chosen formats, made from nuclei.parquet, the annotations, and the pictures.

    Raises LeaseLost, SlideChanged, and ScratchLost where the artefacts are missing or damaged.
    """
    started, folder, plan = time.perf_counter(), job.folder, read_plan(job.folder, job.digest)
    return_freed_memory(_SLIDE_STAGE_BYTES)
    _seldom_look_for_garbage()
    artefacts, crop = read_artefacts(folder, plan), job.settings.export.crop
    tissue = reported_tissue(artefacts, job.settings)
    with tables.checked_between_groups(job.check_lease):
        exported = write_exports(folder, job.settings.export, job.source).values()
        annotations.write_tissue(folder.tissue_annotation, plan.quick_hash, tissue, plan.bounds, crop)
        if job.settings.tissue.artefacts != "off":
            annotations.write_artefacts(folder.artefact_annotations, plan.quick_hash, artefacts, plan.bounds, crop)
        with job.open() as slide:
            _check_same_slide(plan, slide, job)
            small, large = (picture_frame(slide, plan, longest_px) for longest_px in (THUMBNAIL_PX, OVERLAY_PX))
            picture = slide.thumbnail(small)
            pictures.draw_plan(picture, small, artefacts, tissue, plan.tiles, folder.thumbnail)
            if large != small:  # they are the same of a slide that is smaller than either
                picture = slide.thumbnail(large)
        pictures.draw_overlay(picture, large, folder.nuclei, folder.overlay)
    counts = Counts(export_repaired=sum(e.changed for e in exported), export_dropped=sum(e.dropped for e in exported))
    return _worked("export", started, counts)


# ------------------------------------------------------------------------------------------------ the list


class Stage(NamedTuple):
    """A step in the processing of a slide.

    run: a function of a job; per_block: of a job, a block and the record of what was done for the block before.
    on_device: it computes where the detector does; it takes a stand-in for the detector as its last argument.
    needed: whether there is anything to do with these settings; else it is left out, and waits for no device.
    """

    name: str
    run: Callable[..., StageRecord]
    per_block: bool = False
    on_device: bool = False
    needed: Callable[[Settings], bool] = lambda settings: True


STAGES = (
    Stage("plan", make_plan),
    Stage("stain", choose_stain, on_device=True, needed=lambda settings: settings.stain.method == "auto"),
    Stage("tile", tile_block, per_block=True),
    Stage("detect", detect_block, per_block=True, on_device=True),
    Stage("outline", outline_block, per_block=True),
    Stage("stitch", stitch_slide),
    Stage("export", export_slide),
)
