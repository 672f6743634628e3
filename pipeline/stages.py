"""The stages of a slide: plan, tile, detect, stitch, export. Each reads one store and writes the next.

Every stage takes paths and numbers, may run in any process, commits its result in one rename, and may be
run twice: what is there already is not done again.

    slide --plan--> work/plan.json --tile--> work/patches.zarr --detect--> work/instances/<block>.parquet
          --stitch--> nuclei.parquet --export--> nuclei.geojson.zip, overlay.jpg, slide.json
"""

import functools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import shapely
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from pipeline import dcgmm, fuse, pictures, polygons, stain, stitch, tables, views
from pipeline.config import Detection, Exporting, Settings
from pipeline.dcgmm import ClusterNet
from pipeline.detector import (
    NucleusDetector,
    caps,
    choose_device,
    choose_precision,
    fold,
    load_weights,
    read_architecture,
)
from pipeline.export import FORMATS, Exported
from pipeline.tensorfile import find_weights
from slides.errors import ScaleUnknown, SlideNotFound
from slides.geometry import Affine, Box, Size
from slides.grid import Tile, TileGrid, check_margin
from slides.patches import PatchStore, cut
from slides.slide import Scale, Slide, open_slide
from slides.tissue import TissueMap, tissue_mask


class SlideChanged(Exception):
    """The slide is not the one that the work in this folder was begun on."""


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

    def instances(self, block: int) -> Path:
        return self.work / "instances" / f"{block:06d}.parquet"


class Plan(NamedTuple):
    """What a slide is and where its tissue lies."""

    quick_hash: str
    vendor: str
    scale: Scale
    size: Size
    bounds: Box  # slide px
    to_slide: Affine  # work -> slide
    grid: TileGrid
    tissue: TissueMap
    stain: stain.Stain
    target: stain.Stain  # what it is normalised to
    has_icc: bool  # the pixels are taken as stored; the profile is not applied
    stain_note: str  # why the slide is not normalised although it was asked for; empty otherwise

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles whose core holds tissue, block by block."""
        return tuple(t for block in range(self.grid.blocks) for t in self.of_block(block))

    def of_block(self, block: int) -> tuple[Tile, ...]:
        return tuple(t for t in self.grid.tiles_of(block) if self.tissue.any_in(t.core))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that hold tissue."""
        return tuple(b for b in range(self.grid.blocks) if self.of_block(b))


class BlockRecord(NamedTuple):
    """What became of a block: small enough to send anywhere."""

    block: int
    nuclei: int = 0
    lost_mm2: float = 0.0
    saturated: int = 0  # tiles whose cap was reached even after they were split
    touching: int = 0  # claimed instances cut by a read edge inside the slide: the margin is too small for them
    tile_seconds: float = 0.0
    device_seconds: float = 0.0
    outline_seconds: float = 0.0
    began: float = 0.0  # of detection, monotonic clock of the process
    ended: float = 0.0


# ---------------------------------------------------------------------------------------------------- plan


THUMBNAIL_PX, OVERLAY_PX = 1200, 3000  # longest sides of thumbnail.jpg and overlay.jpg


def plan_slide(slide: Slide, settings: Settings) -> Plan:
    """The plan of a slide. Reads a thumbnail and, to fit its stain, a few regions.

    Raises GridError where the margin is too small for the largest nucleus and the views' shifts.
    """
    tiling = settings.tiling
    size, to_slide = slide.work(tiling.mpp)
    grid = TileGrid(size, tiling.tile, tiling.margin, tiling.block)
    check_margin(
        tiling.margin,
        settings.stitching.max_diameter_um / tiling.mpp,
        settings.stitching.tolerance_px,
        views.largest_shift(settings.fusion.views),
    )
    tissue = _find_tissue(slide, settings)
    target, note = stain_target(settings), ""
    try:
        fitted = _fit_stain(slide, tissue, settings, stain_network(settings))
    except stain.StainError as error:
        fitted = target = stain.TEMPLATE["none"]
        note = str(error)
    return Plan(
        slide.quick_hash,
        slide.vendor,
        slide.scale,
        slide.size,
        slide.bounds,
        to_slide,
        grid,
        tissue,
        fitted,
        target,
        slide.has_icc,
        note,
    )


def _picture_mpp(plan: Plan, longest_px: int) -> float:
    """The scale at which the slide's longest side has so many pixels, never finer than the work frame's."""
    return plan.tissue.work_mpp * max(1.0, max(plan.grid.size) / longest_px)


def _find_tissue(slide: Slide, settings: Settings) -> TissueMap:
    mpp = max(settings.tissue.thumbnail_mpp, settings.tiling.mpp)
    thumbnail = slide.thumbnail(mpp)
    if settings.tissue.everywhere:
        return TissueMap(np.ones(thumbnail.shape[:2], bool), mpp, settings.tiling.mpp)
    area, margin = settings.tissue.min_area_um2, settings.tissue.margin_um
    return TissueMap(tissue_mask(thumbnail, mpp, min_area_um2=area, margin_um=margin), mpp, settings.tiling.mpp)


def _fit_stain(slide: Slide, tissue: TissueMap, settings: Settings, network: ClusterNet | None) -> stain.Stain:
    """The slide's stain from regions spread evenly over its tissue. Raises StainError where it cannot be told."""
    method = settings.stain.method
    if method == "none":
        return stain.TEMPLATE["none"]
    rows, columns = np.nonzero(tissue.mask)
    if not len(rows):
        raise stain.StainError("no tissue was found to fit the stain on")
    chosen = np.unique(np.linspace(0, len(rows) - 1, settings.stain.patches).astype(int))
    ratio, side = tissue.mpp / tissue.work_mpp, 256
    size = slide.work(settings.tiling.mpp)[0]
    regions, masks = [], []
    for index in chosen:
        x, y = int((columns[index] + 0.5) * ratio) - side // 2, int((rows[index] + 0.5) * ratio) - side // 2
        # whatever hangs over the edge is white that no lamp has lit
        x, y = (max(0, min(corner, extent - side)) for corner, extent in ((x, size.width), (y, size.height)))
        pixels, lost = slide.salvage(Box(x, y, x + side, y + side), settings.tiling.mpp)
        lost[max(0, size.height - y) :], lost[:, max(0, size.width - x) :] = True, True
        regions.append(pixels)
        masks.append(~lost)
    return stain.fit(np.stack(regions), np.stack(masks), method, network)


def stain_files(settings: Settings) -> dict[str, Path]:
    """The files that this stain normalisation reads: `weights` of dcgmm's network, `template` where one is given.

    Raises WeightsError, SlideNotFound.
    """
    files = {"weights": find_weights(settings.stain.weights)} if settings.stain.method == "dcgmm" else {}
    if settings.stain.template and settings.stain.method != "none":
        files["template"] = Path(settings.stain.template).resolve()
        if not files["template"].is_file():
            raise SlideNotFound(f"{files['template']}: there is no such file to take as --stain.template")
    return files


def stain_network(settings: Settings) -> ClusterNet | None:
    """The network of dcgmm on the detector's device, loaded once per process, file and device; else None."""
    if settings.stain.method != "dcgmm":
        return None
    weights = find_weights(settings.stain.weights)
    with _loading:
        return _stain_network(weights, weights.stat().st_mtime_ns, settings.detector.device)


@functools.lru_cache(maxsize=2)
def _stain_network(weights: Path, _changed_ns: int, device_name: str) -> ClusterNet:
    return dcgmm.load(weights).to(choose_device(device_name))


def stain_target(settings: Settings) -> stain.Stain:
    """What slides are normalised to: the stain of --stain.template, or the one that comes with the method.

    Found once per process. Raises what `stain_files`, `fit_template` and `stain.read_template` raise.
    """
    return _stain_target(settings, tuple(path.stat().st_mtime_ns for path in stain_files(settings).values()))


@functools.lru_cache(maxsize=2)
def _stain_target(settings: Settings, _changed_ns: tuple[int, ...]) -> stain.Stain:
    files = stain_files(settings)
    if "template" in files:
        return fit_template(files["template"], settings, stain_network(settings))
    return stain.read_template(files["weights"]) if "weights" in files else stain.TEMPLATE[settings.stain.method]


def fit_template(path: Path, settings: Settings, network: ClusterNet | None) -> stain.Stain:
    """The stain of a slide or an image, fitted as a slide's is.

    A file that does not state its scale is taken at the working one: a stain hardly depends on it. Where no tissue
    is found it is a field of view, too small for that, and taken whole.
    Raises StainError where it tells no stain, SlideError where it cannot be read.
    """
    try:
        slide = open_slide(path)
    except ScaleUnknown:
        slide = open_slide(path, mpp=settings.tiling.mpp)
    with slide:
        tissue = _find_tissue(slide, settings)
        if not tissue.mask.any():
            tissue = tissue._replace(mask=~tissue.mask)
        return _fit_stain(slide, tissue, settings, network)


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
            mpp = _picture_mpp(plan, THUMBNAIL_PX)
            pictures.draw_plan(slide.thumbnail(mpp), mpp, plan.tissue, plan.tiles, job.folder / "thumbnail.jpg")
            _write_plan(plan, job.work)
    PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    job.instances(0).parent.mkdir(exist_ok=True)
    for folder in (job.folder, job.work, job.instances(0).parent):
        tables.sweep(folder)  # what a killed process left half-written
    return plan.blocks


def _write_plan(plan: Plan, work: Path) -> None:
    with tables.committed(work / "tissue.npy") as path, path.open("wb") as file:
        np.save(file, plan.tissue.mask, allow_pickle=False)
    content = {
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "scale": plan.scale,
        "size": plan.size,
        "bounds": plan.bounds,
        "to_slide": plan.to_slide,
        "grid": asdict(plan.grid),
        "tissue": [plan.tissue.mpp, plan.tissue.work_mpp],
        "stain": plan.stain.to_json(),
        "target": plan.target.to_json(),
        "has_icc": plan.has_icc,
        "stain_note": plan.stain_note,
    }
    with tables.committed(work / "plan.json") as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


@functools.lru_cache(maxsize=32)
def _read_plan(work: Path, _changed_ns: int) -> Plan:
    content = json.loads((work / "plan.json").read_text(encoding="utf-8"))
    grid = content["grid"]
    return Plan(
        content["quick_hash"],
        content["vendor"],
        Scale(*content["scale"]),
        Size(*content["size"]),
        Box(*content["bounds"]),
        Affine(*content["to_slide"]),
        TileGrid(Size(*grid["size"]), grid["tile"], grid["margin"], grid["block"]),
        TissueMap(np.load(work / "tissue.npy", allow_pickle=False), *content["tissue"]),
        stain.Stain.from_json(content["stain"]),
        stain.Stain.from_json(content["target"]),
        content["has_icc"],
        content["stain_note"],
    )


def read_plan(work: Path) -> Plan:
    """The plan that `begin` wrote; read once per process."""
    return _read_plan(work, (work / "plan.json").stat().st_mtime_ns)


# ---------------------------------------------------------------------------------------------------- tile


def tile_block(job: Job, block: int) -> float:
    """Cut a block's patches from the slide into the Zarr store. Returns the seconds it took."""
    began = time.perf_counter()
    plan = read_plan(job.work)
    store = PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    if not job.instances(block).exists() and not store.is_done(block):
        tiles = plan.of_block(block)
        patches, lost = cut(_slide(job.source, job.mpp), tiles, plan.grid, job.settings.tiling.mpp)
        store.write(block, tiles, patches, lost)
    return time.perf_counter() - began


@functools.lru_cache(maxsize=4)
def _slide(source: Path, mpp: float | None) -> Slide:
    """Slides stay open between blocks; a Slide gives every thread a handle of its own."""
    return open_slide(source, mpp=mpp)


# -------------------------------------------------------------------------------------------------- detect


class Engine(NamedTuple):
    """A detector on its device."""

    model: NucleusDetector
    device: torch.device
    precision: torch.dtype


_loading = threading.Lock()


def engine(settings: Detection) -> Engine:
    """The detector of these settings: loaded once per process, weights and device."""
    with _loading:
        return _engine(find_weights(settings.weights), settings.device, settings.precision)


@functools.lru_cache(maxsize=2)
def _engine(weights: Path, device_name: str, precision: str) -> Engine:
    device = choose_device(device_name)
    return Engine(fold(load_weights(weights)).to(device), device, choose_precision(precision, device))


class Found(NamedTuple):
    """A tile's instances, off the device: patch px."""

    boxes: NDArray[np.float32]  # (N, 4)
    soft: NDArray[np.float32]  # (N, M, M)
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    votes: NDArray[np.int64]
    stains: NDArray[np.float32]  # (N, 2) mean haematoxylin and eosin density
    saturated: bool


def detect_patches(patches: NDArray[np.uint8], plan: Plan, settings: Settings) -> Iterator[Found]:
    """Instances of patches uint8 (n, T, T, 3): normalise, infer in every view, fuse; batch by batch."""
    running = engine(settings.detector)
    size = settings.detector.batch or (8 if running.device.type == "cuda" else 1)
    limits = caps(
        patches.shape[1],
        settings.tiling.mpp,
        settings.detector.proposals_per_mm2,
        settings.detector.instances_per_mm2,
    )
    chosen = views.views(settings.fusion.views)
    for first in range(0, len(patches), size):
        batch = torch.from_numpy(patches[first : first + size]).to(running.device, non_blocking=True)
        raw = batch.permute(0, 3, 1, 2).float() / 255  # (B, 3, T, T)
        with torch.inference_mode():
            images = stain.normalise(raw, plan.stain, plan.target, stain_network(settings))
            with torch.autocast(running.device.type, running.precision, enabled=running.precision != torch.float32):
                found = fuse.infer(running.model, images, chosen, settings.detector, limits, settings.tiling.margin)
            for image, instances in zip(raw, found, strict=True):
                yield _off_device(image, instances)


def _off_device(image: torch.Tensor, found: fuse.Instances) -> Found:
    """Copy a tile's instances to the host, with the mean stain densities of what their masks cover."""
    side = found.soft.shape[-1]
    density = roi_align(stain.hed(image[None]), [found.boxes.float()], side, sampling_ratio=1)  # (N, 2, M, M)
    inside = (found.soft > 0.5).float()[:, None]
    means = (density * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    return Found(
        found.boxes.float().cpu().numpy(),
        found.soft.float().cpu().numpy(),
        found.scores.float().cpu().numpy(),
        found.classes.cpu().numpy(),
        found.votes.cpu().numpy(),
        means.cpu().numpy(),
        found.saturated,
    )


def outline(found: Found, tile: Tile, plan: Plan, settings: Settings) -> tuple[pa.Table, int]:
    """A tile's claimed instances as rows of `tables.INSTANCES`, and how many of them a read edge cuts.

    Claimed is what is anchored (by its centroid) in the tile's core and in the tissue.
    """
    shapes = polygons.solid(polygons.polygons(found.soft, found.boxes, level=0.5))
    shapes = polygons.simplify(shapes, settings.stitching.simplify_px)
    shapes = shapely.transform(shapes, lambda xy: xy + np.array(tile.read[:2], float))
    centroids = shapely.centroid(shapes)
    anchors = np.stack([shapely.get_x(centroids), shapely.get_y(centroids)], 1)  # NaN where nothing was outlined
    mine = stitch.claim(anchors, tile.core, tolerance=settings.stitching.tolerance_px)
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


def detect_block(job: Job, block: int, tile_seconds: float = 0.0) -> BlockRecord:
    """Patches of one block -> its claimed instances, committed in one rename; then its patches go.

    While the device works on a batch, the outlines of the last are made on another thread.
    """
    target = job.instances(block)
    plan = read_plan(job.work)
    store = PatchStore.create(job.work / "patches.zarr", plan.grid, job.digest)
    if target.exists():
        store.discard(block)
        return BlockRecord(**tables.read_record(target))
    began = time.monotonic()
    tiles = plan.of_block(block)
    patches, lost = store.read(block, tiles)
    outlines: list[Future[tuple[pa.Table, int, float]]] = []
    saturated = 0
    with ThreadPoolExecutor(1) as pool:
        computing = time.perf_counter()
        for tile, found in zip(tiles, detect_patches(patches, plan, job.settings), strict=True):
            saturated += found.saturated
            outlines.append(pool.submit(_timed_outline, found, tile, plan, job.settings))
        device_seconds = time.perf_counter() - computing
        done = [f.result() for f in outlines]
    rows = pa.concat_tables([table for table, _, _ in done])
    core_mm2 = np.array([t.core.width * t.core.height for t in tiles]) * (job.settings.tiling.mpp / 1000) ** 2
    record = BlockRecord(
        block,
        rows.num_rows,
        float((lost * core_mm2).sum()),
        saturated,
        sum(c for _, c, _ in done),
        tile_seconds,
        device_seconds,
        sum(s for _, _, s in done),
        began,
        time.monotonic(),
    )
    tables.write_instances(target, rows, record._asdict())
    store.discard(block)
    return record


def _timed_outline(found: Found, tile: Tile, plan: Plan, settings: Settings) -> tuple[pa.Table, int, float]:
    began = time.perf_counter()
    table, cut_off = outline(found, tile, plan, settings)
    return table, cut_off, time.perf_counter() - began


# -------------------------------------------------------------------------------------------------- stitch


class StitchRecord(NamedTuple):
    nuclei: int
    dropped: int  # second sights of a nucleus that another tile shows better


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
    classes = engine_classes(settings.detector)
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


def engine_classes(settings: Detection) -> tuple[str, ...]:
    """Class names of the weights, read from the file's text without loading the network."""
    return read_architecture(find_weights(settings.weights)).classes


def _seam_losers(job: Job, plan: Plan) -> dict[int, NDArray[np.int64]]:
    """Rows of each block's instances that are second sights of a nucleus, found at the seams."""
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
    lost = near[~stitch.resolve(shapes, number, scores[near], iou=job.settings.stitching.iou)]
    return {int(b): places[lost[places[lost, 0] == b], 1] for b in np.unique(places[lost, 0])}


# -------------------------------------------------------------------------------------------------- export


def export_slide(job: Job) -> None:
    """Everything that is made from nuclei.parquet: the formats asked for, and the overlay picture."""
    plan = read_plan(job.work)
    write_formats(job.folder, job.settings.export)
    with open_slide(job.source, mpp=job.mpp) as slide:
        mpp = _picture_mpp(plan, OVERLAY_PX)
        picture = slide.thumbnail(mpp)
    pictures.draw_overlay(
        picture,
        job.folder / "nuclei.parquet",
        plan.to_slide,
        mpp / job.settings.tiling.mpp,
        job.folder / "overlay.jpg",
    )


def write_formats(folder: Path, exporting: Exporting) -> dict[str, Exported]:
    """The files for other tools, from the folder's nuclei.parquet, by their names."""
    chosen = [FORMATS[name] for name in exporting.formats]
    return {f.file: f.write(folder / "nuclei.parquet", folder / f.file, crop=exporting.crop) for f in chosen}


def finish(job: Job, plan: Plan, ledger: dict[str, Any]) -> None:
    """Write slide.json, the mark of a finished slide."""
    content = {
        "digest": job.digest,
        "source": job.source.name,
        "quick_hash": plan.quick_hash,
        "vendor": plan.vendor,
        "size": plan.size,
        "bounds": plan.bounds,
        "um_per_px": plan.scale,
        "has_icc": plan.has_icc,
        "stain": plan.stain.to_json(),
        "stain_target": plan.target.to_json(),
        "ledger": ledger,
    }
    with tables.committed(job.folder / "slide.json") as path:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
