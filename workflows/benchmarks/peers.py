# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "nightslide",
#     "cellpose>=3.1,<4",
#     "cellvit==1.0.9",
#     "instanseg-torch>=0.1.2",
#     "seaborn", # instanseg imports it, and does not say so
#     "stardist>=0.9.2",
#     "tensorflow-cpu>=2.21",
#     "tiatoolbox==2.1.3",
# ]
#
# [tool.uv]
# override-dependencies = ["numpy>=2"] # cellpose asks for less, and runs with it
#
# [tool.uv.sources]
# nightslide = { path = "../..", editable = true }
#
# # Of these two what their networks import, and no bounds: theirs exclude each other's, and our torch.
# [[tool.uv.dependency-metadata]]
# name = "tiatoolbox"
# version = "2.1.3"
# requires-dist = [
#     "defusedxml", "glymur", "joblib", "pandas", "scikit-learn", "SimpleITK", "transformers", "umap-learn", "wsidicom",
# ]
# [[tool.uv.dependency-metadata]]
# name = "cellvit"
# version = "1.0.9"
# requires-dist = ["colorama", "natsort", "pandas", "ujson"]
# ///
"""Core-seconds and arithmetic per mm2 of Nightslide's detector and of other networks, on the same pixels and cores.

    uv run workflows/benchmarks/peers.py SLIDE --out peers.json [--rounds N] [--only NAME ...] [--weights NAME ...]

uv installs the others into an environment of their own. Their weights are random, which changes no time; what follows
each network is measured on maps made from the nuclei that Nightslide finds in the area, which is the core of the tile
with most haematoxylin. All take their turns in every round; the table has the medians. README.md in this folder has
what it gave. The arithmetic of our own network alone, for which no other package is needed:

    python workflows/benchmarks/peers.py SLIDE --only nightslide --rounds 0 [--weights NAME ...]
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Detector, Settings, Tiling
from pipeline.model import allocator, inference, load
from pipeline.model.device import choose_precision
from pipeline.model.instances import Patches
from pipeline.model.weights import as_weights_state
from pipeline.segment import polygons, stages
from pipeline.segment.plan import Plan, plan_slide
from pipeline.segment.tables import geometry
from slides.geometry import Box
from slides.grid import Tile
from slides.slide import Slide, open_slide

# One allocator for all; threads that wait do not spin, so that the time of computing is that of work.
ENVIRONMENT = {**allocator.ENVIRONMENT, "OMP_WAIT_POLICY": "passive", "TF_CPP_MIN_LOG_LEVEL": "3"}
ARCHIVE_MM2 = 1000 * 200.0  # a thousand slides
BFLOAT16 = choose_precision("auto", load.CPU) == torch.bfloat16
PRECISION = "bfloat16" if BFLOAT16 else "float32"
GPU_TFLOPS = 40.0  # achieved in bfloat16; assumed, not measured

Maps = NDArray[Any]


class Area(NamedTuple):
    """The square of the slide that all networks get, and the nuclei in it."""

    slide: Slide
    corner_um: tuple[float, float]
    side_um: float
    nuclei: polygons.Polygons  # um, from the area's corner

    @property
    def mm2(self) -> float:
        return (self.side_um / 1000) ** 2

    def images(self, mpp: float, side_px: int, batch: int) -> Tensor:
        """The pixels around its centre at a scale, `batch` times the same: float32 (B, 3, side, side) in 0..1."""
        x, y = (round((at + self.side_um / 2) / mpp) - side_px // 2 for at in self.corner_um)
        pixels = self.slide.read(Box(x, y, x + side_px, y + side_px), self.slide.frame(mpp))
        images = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        return images.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)

    def labels(self, mpp: float) -> NDArray[np.int32]:
        """The nuclei as a label map of the area at a scale."""
        side = round(self.side_um / mpp)
        return polygons.rasterise(shapely.transform(self.nuclei, lambda xy: xy / mpp), (side, side))


@dataclass
class Network:
    """A network, what follows it, and how its own software lays its tiles over a slide."""

    name: str
    package: str
    mpp: float
    tile_px: int
    advance_px: int  # from one tile to the next
    run: Callable[[], object]  # on a batch of tiles
    follow: Callable[[], int]  # maps -> nuclei; returns how many
    follow_mm2: float  # of these maps
    parameters: int
    precision: str
    batch: int = 1
    flops: int = 0  # of `run`
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # of `run`, `follow`: see `timed`

    @property
    def run_mm2(self) -> float:
        return self.batch * (self.advance_px * self.mpp / 1000) ** 2


# ------------------------------------------------------------------------------------------------ Nightslide


def settings_for(weights: str) -> Settings:
    return as_weights_state(Settings(detector=Detector(weights=weights, device="cpu")))


def patch(slide: Slide, plan: Plan, tile: Tile) -> Patches:
    """What the detector is given of a tile: uint8 (h, w, 3)."""
    return [slide.read(plan.trimmed(tile), plan.frame)]


def find_area(slide: Slide) -> Area:
    """The core of the tile that absorbs most red, as haematoxylin does, with the nuclei that are detected there."""
    settings = settings_for("nuclei")
    plan = plan_slide(slide, settings)
    stride, mpp = plan.grid.stride, plan.frame.mpp
    whole = [tile for tile in plan.tiles if tile.core.size == (stride, stride)]
    tile = min(whole, key=lambda tile: float(slide.read(tile.core, plan.frame)[..., 0].mean()))
    (result,) = inference.detect_patches(patch(slide, plan, tile), plan.normalisation, settings)
    corner = np.array(tile.core[:2])
    outlines = geometry(stages.outline(result(), tile, plan, settings)[0])
    nuclei = shapely.transform(outlines, lambda xy: (xy - corner) * mpp)
    x, y = (corner * mpp).tolist()
    return Area(slide, (x, y), stride * mpp, nuclei)


def nightslide(area: Area, weights: str) -> Network:
    """From pixels to instances (normalisation, network, non-maximum suppression), then outlines and measurements."""
    settings = settings_for(weights)
    plan = plan_slide(area.slide, settings)
    mpp, stride = plan.frame.mpp, plan.grid.stride
    col, row = (int((at + area.side_um / 2) / mpp) // stride for at in area.corner_um)
    tile = plan.grid.tile_at(row, col)
    pixels = patch(area.slide, plan, tile)

    def run() -> Any:
        return next(inference.detect_patches(pixels, plan.normalisation, settings))()

    detected = run()
    return Network(
        f"Nightslide, {weights}",
        "nightslide",
        mpp,
        plan.grid.tile,
        stride,
        run,
        lambda: stages.outline(detected, tile, plan, settings)[0].num_rows,
        follow_mm2=tile.core.area * (mpp / 1000) ** 2,
        parameters=parameters(load.detector(settings.detector).model),
        precision=PRECISION,
    )


# ------------------------------------------------------------------------------------------------ the others


def of_torch(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The fields of a Network that is a torch module, in channels_last and under autocast."""
    model = nn.Module.to(model.eval(), memory_format=torch.channels_last)  # tiatoolbox has a `to` of its own

    def run() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            return model(images)

    return {"run": run, "parameters": parameters(model), "precision": PRECISION, "batch": len(images)}


def hovernet(area: Area, mode: str) -> Network:
    """Fast: of PanNuke, with its classes; original: of Kumar, without any."""
    from tiatoolbox.models.architecture.hovernet import HoVerNet

    mpp, (tile, kept), classes = 0.25, {"fast": (256, 164), "original": (270, 80)}[mode], {"fast": 6, "original": None}
    model = HoVerNet(num_types=classes[mode], mode=mode)
    if BFLOAT16:
        model.upsample2x.bfloat16()  # its product is one that autocast leaves alone
    labels = area.labels(mpp)
    inside = (labels > 0)[..., None].astype(np.float32)
    maps = [inside, horizontal_vertical(labels), *([inside] if classes[mode] else [])]
    return Network(
        f"HoVer-Net, {mode}",
        "tiatoolbox",
        mpp,
        tile,
        kept,
        follow=lambda: len(model.postproc(maps)[0]["info_dict"]["box"]),
        follow_mm2=area.mm2,
        **of_torch(model, area.images(mpp, tile, 1) * 255),
    )


def cellvit(area: Area) -> Network:
    from cellvit.models.cell_segmentation.cellvit_256 import CellViT256
    from cellvit.models.cell_segmentation.postprocessing import DetectionCellPostProcessor

    mpp, tile, overlap, classes = 0.25, 1024, 64, 6
    labels = area.labels(mpp)
    inside = (labels > 0)[..., None].astype(np.float32)
    maps = np.concatenate([inside, inside, horizontal_vertical(labels)], -1)  # class, nucleus, distances
    follow = DetectionCellPostProcessor(nr_types=classes, magnification=40)
    return Network(
        "CellViT-256",
        "cellvit",
        mpp,
        tile,
        tile - overlap,
        follow=lambda: len(follow.post_process_single_image(maps)[1]),
        follow_mm2=area.mm2,
        **of_torch(CellViT256(None, classes, num_tissue_classes=19), area.images(mpp, tile, 1)),
    )


def stardist(area: Area, mpp: float) -> Network:
    """The shape of its H&E model. TensorFlow computes in bfloat16 where we do."""
    import tensorflow as tf
    from stardist import dist_to_coord, edt_prob, star_dist
    from stardist.models import Config2D, StarDist2D
    from stardist.nms import non_maximum_suppression

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": BFLOAT16})
    tile, rays, grid = 1024, 32, (2, 2)
    model = StarDist2D(Config2D(axes="YXC", n_rays=rays, n_channel_in=3, grid=grid), name=None, basedir=None)
    pixels = area.images(mpp, tile, 1).permute(0, 2, 3, 1).contiguous().numpy()
    labels = area.labels(mpp)
    prob, dist = edt_prob(labels)[::2, ::2], star_dist(labels, rays, grid=grid)

    def follow() -> int:
        chosen = {"prob_thresh": model.thresholds.prob, "nms_thresh": model.thresholds.nms}
        points, _, rays_px = non_maximum_suppression(dist, prob, grid=grid, **chosen)
        return len(dist_to_coord(rays_px, points))

    graph = tf.function(model.keras_model).get_concrete_function(tf.TensorSpec(pixels.shape)).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder(
        tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    ).with_empty_output()
    return Network(
        f"StarDist at {mpp}",
        "stardist",
        mpp,
        tile,
        tile - 2 * int(model._axes_tile_overlap("YX")[0]),
        run=lambda: model.keras_model.predict_on_batch(pixels),
        follow=follow,
        follow_mm2=area.mm2,
        parameters=model.keras_model.count_params(),
        precision=PRECISION,
        flops=tf.compat.v1.profiler.profile(graph, options=options.build()).total_float_ops,
    )


def instanseg(area: Area) -> Network:
    from instanseg.utils.loss.instanseg_loss import InstanSeg_Torchscript, ProbabilityNet
    from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet

    mpp, tile, overlap = 0.5, 512, 200  # of its eval_whole_slide_image: 2 * (80 + 20)
    model, maps = InstanSeg_UNet(3, [[2, 2, 1]], layers=[256, 128, 64, 32]), instanseg_maps(area.labels(mpp))

    class KnownMaps(nn.Module):
        """Stands for the network: its maps of the area's nuclei, and a classifier of pixels that knows them."""

        def __init__(self) -> None:
            super().__init__()
            self.pixel_classifier = nearness(ProbabilityNet(4))

        def forward(self, images: Tensor) -> Tensor:
            return maps + 0 * images.mean()

    grouping, images = (
        InstanSeg_Torchscript(KnownMaps(), pixel_size=mpp),
        area.images(mpp, round(area.side_um / mpp), 1),
    )
    return Network(
        "InstanSeg",
        "instanseg-torch",
        mpp,
        tile,
        tile - overlap,
        follow=lambda: len(grouping(images.clone()).unique()) - 1,
        follow_mm2=area.mm2,
        **of_torch(model, area.images(mpp, tile, 1)),
    )


def nearness(classifier: Any) -> Any:
    """InstanSeg's classifier of pixels, set by hand: a pixel that points less than 2 px from a seed belongs to it."""
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.zero_()
        for unit, (coordinate, sign) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1))):
            classifier.fc1.weight[unit, coordinate] = sign
        classifier.fc2.weight[0, :4] = 1
        classifier.fc3.weight[0, 0], classifier.fc3.bias[0] = -16, 8
    return classifier


def instanseg_maps(labels: NDArray[np.int32]) -> Tensor:
    """What InstanSeg's network would give for these nuclei: float32 (1, 5, h, w), two coordinates, two spreads, seeds.

    A coordinate is in units of 4 px, squashed into -4..4; a seed is 15 * (depth in its nucleus - 1/2), depth in 0..1.
    """
    offset = np.clip(to_centroid(labels) / 4, -3.9, 3.9)
    coordinates = np.log((offset / 8 + 0.5) / (0.5 - offset / 8))
    depth = depth_in_nucleus(labels)
    maps = np.concatenate([coordinates, np.zeros_like(coordinates), 15 * (depth - 0.5)[None]])
    return torch.from_numpy(maps.astype(np.float32))[None]


def cellpose(area: Area) -> Network:
    """Scaled so that a nucleus of 8 um has the 17 px of its nuclei model."""
    from cellpose.dynamics import masks_to_flows, resize_and_compute_masks
    from cellpose.resnet_torch import CPnet

    mpp, tile, batch = 0.47, 224, 8
    labels = area.labels(mpp)
    flows, inside = masks_to_flows(labels).astype(np.float32) * 5, np.where(labels > 0, 6, -6).astype(np.float32)
    return Network(
        "Cellpose 3",
        "cellpose",
        mpp,
        tile,
        round(tile / 1.2),  # it overlaps tiles by a tenth on each side
        follow=lambda: int(resize_and_compute_masks(flows, inside).max()),
        follow_mm2=area.mm2,
        **of_torch(CPnet([2, 32, 64, 128, 256], 3, sz=3), area.images(mpp, tile, batch)[:, :2]),
    )


def mask_rcnn(area: Area, version: str) -> Network:
    """torchvision's, without resizing, with the proposals and detections that the nuclei need; tiled as ours."""
    from torchvision.models import detection
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    mpp, tiling = 0.25, Tiling()
    tile, advance = tiling.tile, tiling.tile - 2 * tiling.margin
    many = round(len(area.nuclei) * (tile / advance) ** 2)
    build = {"v1": detection.maskrcnn_resnet50_fpn, "v2": detection.maskrcnn_resnet50_fpn_v2}[version]
    model = build(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=tile,
        max_size=tile,
        box_score_thresh=0.0,
        box_detections_per_img=many,
        rpn_post_nms_top_n_test=4 * many,
    )
    boxes = torch.from_numpy(shapely.bounds(area.nuclei) / mpp).float()
    side, masks = round(area.side_um / mpp), torch.rand(len(boxes), 1, 28, 28)
    return Network(
        f"Mask R-CNN R50 {version}",
        "torchvision",
        mpp,
        tile,
        advance,
        follow=lambda: len(paste_masks_in_image(masks, boxes, (side, side)) > 0.5),
        follow_mm2=area.mm2,
        **of_torch(_Unpasted(model), area.images(mpp, tile, 1)),
    )


class _Unpasted(nn.Module):
    """torchvision's Mask R-CNN without its last step, which pastes every mask into an image of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        prepared, _ = self.model.transform(list(images))
        features = self.model.backbone(prepared.tensors)
        proposals, _ = self.model.rpn(prepared, features)
        return self.model.roi_heads(features, proposals, prepared.image_sizes)


# ------------------------------------------------------------------------------------------ maps of known nuclei


def to_centroid(labels: NDArray[np.int32]) -> Maps:
    """From every pixel of a nucleus to its centroid, px: float32 (2, h, w), x y; 0 elsewhere."""
    flat, (y, x) = labels.ravel(), np.indices(labels.shape)
    count = np.maximum(np.bincount(flat), 1)
    offset = [(np.bincount(flat, at.ravel()) / count)[labels] - at for at in (x, y)]
    return np.where(labels > 0, np.stack(offset), 0).astype(np.float32)


def horizontal_vertical(labels: NDArray[np.int32]) -> Maps:
    """HoVer-Net's maps: where in its nucleus a pixel lies, -1 (left, top) to 1: float32 (h, w, 2); 0 elsewhere."""
    every = np.arange(labels.max() + 1)
    maps = []
    for offset in -to_centroid(labels):
        low, high = (np.asarray(of(offset, labels, every)) for of in (ndimage.minimum, ndimage.maximum))
        maps.append(offset / np.maximum(np.where(offset < 0, -low[labels], high[labels]), 1e-6))
    return np.where(labels[..., None] > 0, np.stack(maps, -1), 0).astype(np.float32)


def depth_in_nucleus(labels: NDArray[np.int32]) -> Maps:
    """Distance to the nucleus' edge over the largest in it: float (h, w), 0..1; 0 elsewhere."""
    padded = np.pad(labels, 1)
    neighbours = ndimage.maximum_filter(padded, 3) != ndimage.minimum_filter(padded, 3)
    distance = ndimage.distance_transform_edt((padded > 0) & ~neighbours)[1:-1, 1:-1]
    deepest = np.asarray(ndimage.maximum(distance, labels, np.arange(labels.max() + 1)))
    return np.where(labels > 0, distance / np.maximum(deepest[labels], 1), 0)


# ------------------------------------------------------------------------------------------------- measuring


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def networks(area: Area, weights: list[str], only: list[str]) -> Iterator[Network]:
    """All networks, or those whose name begins with one of `only`; those whose package is not there are left out."""
    every: dict[str, Callable[[Area], Network]] = {
        **{f"nightslide-{name}": functools.partial(nightslide, weights=name) for name in weights},
        "stardist-0.5": functools.partial(stardist, mpp=0.5),
        "stardist-0.25": functools.partial(stardist, mpp=0.25),
        "instanseg": instanseg,
        "cellpose": cellpose,
        "cellvit": cellvit,
        "hovernet-fast": functools.partial(hovernet, mode="fast"),
        "hovernet-original": functools.partial(hovernet, mode="original"),
        "maskrcnn-v1": functools.partial(mask_rcnn, version="v1"),
        "maskrcnn-v2": functools.partial(mask_rcnn, version="v2"),
    }
    for name, build in every.items():
        if not only or any(name.startswith(start) for start in only):
            try:
                yield build(area)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of computing on all cores together: others may use the machine, too."""
    started, computed = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - computed


def warm_up(network: Network) -> None:
    """The first call, which chooses algorithms, and counts operations: two for every multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        network.run()
    network.flops = network.flops or counter.get_total_flops()
    nuclei = network.follow()
    print(f"{network.name}: {nuclei / network.follow_mm2:,.0f} nuclei/mm2 from its maps", file=sys.stderr)


def measure(every: list[Network], rounds: int) -> None:
    for number in range(rounds):
        for network in every:
            network.seconds.setdefault("run", []).append(timed(network.run))
            network.seconds.setdefault("follow", []).append(timed(network.follow))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)


def row(network: Network) -> dict[str, Any]:
    """A row of the table and of the JSON file: medians of computing seconds; `rounds` has all that was timed."""
    areas = {"run": network.run_mm2, "follow": network.follow_mm2}
    seconds = {
        f"{what}_core_seconds_per_mm2": statistics.median(computed for _, computed in network.seconds[what]) / area
        for what, area in areas.items()
        if network.seconds
    }
    gflop = network.flops / network.run_mm2 / 1e9
    return {
        "network": network.name,
        "package": f"{network.package} {metadata.version(network.package)}",
        "precision": network.precision,
        "mpp": network.mpp,
        "tile_px": network.tile_px,
        "advance_px": network.advance_px,
        "parameters": network.parameters,
        "gflop_per_mm2": gflop,
        **seconds,
        "core_hours": sum(seconds.values()) * ARCHIVE_MM2 / 3600,
        "gpu_hours": gflop / 1000 / GPU_TFLOPS * ARCHIVE_MM2 / 3600,
        "rounds": network.seconds,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "network": lambda of: of["network"],
    "µm/px": lambda of: f"{of['mpp']:g}",
    "tile (advance), px": lambda of: f"{of['tile_px']} ({of['advance_px']})",
    "parameters, M": lambda of: f"{of['parameters'] / 1e6:.1f}",
    "GFLOP/mm²": lambda of: f"{of['gflop_per_mm2']:,.0f}",
    "network, core-s/mm²": lambda of: f"{of['run_core_seconds_per_mm2']:,.1f}" if of["rounds"] else "",
    "what follows, core-s/mm²": lambda of: f"{of['follow_core_seconds_per_mm2']:,.1f}" if of["rounds"] else "",
    "1,000 slides, core-hours": lambda of: f"{of['core_hours']:,.0f}" if of["rounds"] else "",
    "on a GPU, network, h": lambda of: f"{of['gpu_hours']:,.1f}",
    "package, precision": lambda of: f"{of['package']}, {of['precision']}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the cheapest network first."""
    ordered = sorted(rows, key=lambda of: (of["core_hours"], of["gflop_per_mm2"]))
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *([cell(of) for cell in COLUMNS.values()] for of in ordered)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def cpu() -> str:
    """The processor's name, where Linux says it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--out", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names, such as nightslide stardist-0.5")
    parser.add_argument("--weights", nargs="+", default=["nuclei"], help="of Nightslide's detector")
    given = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})  # libraries read it as they load
    torch.set_num_threads(given.cores)
    torch.set_flush_denormal(True)  # random weights make such numbers, trained ones hardly
    torch.manual_seed(0)
    with open_slide(given.slide) as slide:
        area = find_area(slide)
        print(f"{area.mm2:.4f} mm2, {len(area.nuclei) / area.mm2:,.0f} nuclei/mm2", file=sys.stderr)
        every = list(networks(area, given.weights, given.only))
        for network in every:
            warm_up(network)
        measure(every, given.rounds)
    rows = list(map(row, every))
    print(table(rows))
    if given.out:
        measured = {
            "processor": cpu(),
            "load": os.getloadavg(),
            "mm2": area.mm2,
            "nuclei": len(area.nuclei),
            "networks": rows,
        }
        given.out.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
