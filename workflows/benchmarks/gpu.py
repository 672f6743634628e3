"""The detector on a GPU, measured in this process: is it right, how fast, how much memory. See gpu.sh, which calls it.

    python workflows/benchmarks/gpu.py patches|speed|alternatives|pair|memory|trace|tables --out OUT ...

Every command appends rows (what, value) to OUT/gpu.tsv. With --device cpu all of it can be tried without a GPU.
"""

import argparse
import csv
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

import pipeline
from pipeline.config import Detector, Settings, Tiling
from pipeline.model import gpu_layers, inference, load, suppress
from pipeline.model.device import compute
from pipeline.model.fitted_stain import UNCHANGED
from pipeline.model.instances import HostInstances, Result
from pipeline.model.weights import as_weights_state
from slides.errors import NightslideError
from slides.geometry import Box
from slides.slide import open_slide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.tsv and the trace")
    parser.add_argument("--slide", type=Path, help="patches are cut from it; all but tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tile", type=int, default=1024, help="side of a patch, px (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=3, help="how long each speed is measured (%(default)s)")
    parser.add_argument("--results", type=Path, nargs=2, help="two slides' folders; tables compares their nuclei")
    COMMANDS[parser.parse_args().what](parser.parse_args())


def row(given: argparse.Namespace, what: str, value: object) -> None:
    with (given.out / "gpu.tsv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerow([what, value])
    print(f"{what}\t{value}", flush=True)


def cut(given: argparse.Namespace, count: int) -> NDArray[np.uint8]:
    """The darkest patches of the slide, uint8 (count, T, T, 3), some of them repeated where it has fewer."""
    side = given.tile
    with open_slide(given.slide) as slide:
        frame = slide.frame(0.25)
        corners = [(x, y) for y in range(0, frame.size.height, side) for x in range(0, frame.size.width, side)]
        every = [slide.read(Box(x, y, x + side, y + side), frame) for x, y in corners]
    every.sort(key=lambda patch: float(patch.mean()))
    return np.stack([every[i % min(count, len(every))] for i in range(count)])


def settings(given: argparse.Namespace, **detection: Any) -> Settings:
    detector = Detector(**{"device": given.device, **detection})
    return as_weights_state(Settings(tiling=Tiling(tile=given.tile), detector=detector))


def detect(patches: NDArray[np.uint8], chosen: Settings) -> list[HostInstances]:
    return [result() for result in inference.detect_patches(list(patches), UNCHANGED, chosen)]


def matched_share(detected: list[HostInstances], expected: list[HostInstances]) -> str:
    """How many boxes of the same patches have a partner of IoU above .9, of how many."""
    matched = nuclei = 0
    for a, b in zip(detected, expected, strict=True):
        iou = box_iou(torch.from_numpy(a.boxes), torch.from_numpy(b.boxes))
        matched += int((iou > 0.9).any(1).sum())
        nuclei += max(len(a.boxes), len(b.boxes))
    return f"{matched / nuclei:.4f} of {nuclei}"


def compare_patches(given: argparse.Namespace) -> None:
    """Boxes and masks of the device against those of the CPU in float32."""
    patches = cut(given, 4)
    expected = detect(patches, settings(given, device="cpu", precision="float32"))
    for precision in ("float32", "auto"):
        difference, detected = [], detect(patches, settings(given, precision=precision))
        for a, b in zip(detected, expected, strict=True):
            iou, index = box_iou(torch.from_numpy(a.boxes), torch.from_numpy(b.boxes)).max(1)
            same = (iou > 0.9).numpy()
            levels = a.mask_probs[same].astype(float) - b.mask_probs[index.numpy()[same]]
            difference.append(np.abs(levels).mean((1, 2)) / 255)
        row(given, f"boxes as the CPU's at IoU .9, {precision}", matched_share(detected, expected))
        row(given, f"mean difference of their masks, {precision}", f"{np.concatenate(difference).mean():.5f}")


def measure_speed(given: argparse.Namespace) -> None:
    """Patches and mm2 per second, by size of batch and number of views, of two threads that take turns as in a run."""
    patches = cut(given, 2 * max(given.batches))  # several, for no two batches of a slide hold as many nuclei
    mm2 = (given.tile * 0.25 / 1000) ** 2
    for views in given.views:
        for batch in given.batches:
            chosen = settings(given, batch=batch, views=views)
            compute(given.device, functools.partial(detect, patches[:batch], chosen))  # loads, and chooses algorithms
            _reset_peak()
            passed, turns = _in_turns(patches, batch, chosen, given.seconds)
            done = batch * len(turns)
            fits = inference._batch_that_fits.get(chosen, batch)
            row(
                given,
                f"{views} views, batch of {batch}" + ("" if fits == batch else f", which became {fits}"),
                f"{done / passed:.2f} patches/s, {done * mm2 / passed:.3f} mm2/s, a turn on the device "
                f"{sum(turns) / passed:.0%} of the time, {_peak_gb():.2f} GB at most",
            )


def _in_turns(patches: NDArray[np.uint8], batch: int, chosen: Settings, seconds: float) -> tuple[float, list[float]]:
    """Batches of the patches for so many seconds, or a little more: how many, and the seconds of each turn.

    Two threads take turns as those of a worker do: what one prepares takes no time of the other's turn.
    """
    started, turns = time.perf_counter(), list[float]()

    def detect_for_a_while() -> None:
        while time.perf_counter() - started < seconds:
            some = patches[(len(turns) * batch + np.arange(batch)) % len(patches)]
            queue = inference.detect_patches(list(some), UNCHANGED, chosen)
            results, turn = compute(chosen.detector.device, functools.partial(_timed, queue))
            for result in results:
                result()
            turns.append(turn)

    with ThreadPoolExecutor(2) as threads:
        for thread in [threads.submit(detect_for_a_while) for _ in range(2)]:
            thread.result()
    return time.perf_counter() - started, turns


def _timed(queue: Iterator[Result]) -> tuple[list[Result], float]:
    started = time.perf_counter()
    return list(queue), time.perf_counter() - started


def measure_alternatives(given: argparse.Namespace) -> None:
    """With torchvision's suppression, and with none of the kernels in Triton, as where that cannot be used."""
    batch, mm2 = given.batches[-1], (given.tile * 0.25 / 1000) ** 2
    patches, chosen = cut(given, 2 * batch), settings(given, batch=batch, views=1)
    expected: list[HostInstances] = []
    alternatives: dict[str, list[Any]] = {
        "as it is": [],
        "torchvision's suppression": [suppress],
        "no kernels": [suppress, gpu_layers],
    }
    for how, without in alternatives.items():
        with ExitStack() as stack:
            for module in without:
                stack.enter_context(mock.patch.object(module, "kernels_problem", return_value="left out"))
            load._detectors._loaded.clear()
            detected = compute(given.device, functools.partial(detect, patches[:batch], chosen))
            expected = expected or detected
            _reset_peak()
            passed, turns = _in_turns(patches, batch, chosen, given.seconds)
            speed, alike = batch * len(turns) * mm2 / passed, matched_share(detected, expected)
            row(given, how, f"{speed:.3f} mm2/s, {_peak_gb():.2f} GB at most; boxes as it is at IoU .9: {alike}")
    load._detectors._loaded.clear()


def measure_pair(given: argparse.Namespace) -> None:
    """Two processes on one device, each as `speed` measures it."""
    words = [sys.executable, __file__, "speed", "--out", given.out, "--slide", given.slide, "--device", given.device]
    words += ["--tile", given.tile, "--batches", given.batches[-1], "--views", "1", "--seconds", given.seconds]
    both = [subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    speeds = [process.communicate()[0].strip().partition("\t")[2] for process in both]
    row(given, "two processes at once", "; ".join(speeds))


def provoke_shortage(given: argparse.Namespace) -> None:
    """Six tenths of the memory that a batch takes, then of what a patch takes: nothing may be lost."""
    if given.device == "cpu":
        row(given, "shortage of memory", "not provoked on a CPU")
        return
    patches, total = cut(given, 8), torch.cuda.get_device_properties(0).total_memory
    for batch in (8, 1):
        chosen = settings(given, batch=batch, views=1)
        whole = detect(patches[:batch], chosen)
        _reset_peak()
        detect(patches[:batch], chosen)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.6 * torch.cuda.max_memory_allocated() / total)
        parts = detect(patches[:batch], chosen)
        torch.cuda.set_per_process_memory_fraction(1.0)
        nuclei = [sum(len(patch.boxes) for patch in detected) for detected in (parts, whole)]
        row(
            given,
            f"six tenths of the memory of a batch of {batch}",
            f"batches of {inference._batch_that_fits.get(chosen, batch)}, {sum(p.split for p in parts)} in quarters, "
            f"{sum(p.lost for p in parts)} lost, {nuclei[0]} of {nuclei[1]} nuclei",
        )


def record_trace(given: argparse.Namespace) -> None:
    """One batch under torch's profiler: OUT/trace.json for chrome://tracing, OUT/trace.txt with the longest kernels."""
    batch, on_gpu = given.batches[-1], given.device != "cpu"
    patches, chosen = cut(given, batch), settings(given, batch=batch, views=1)
    for _ in range(2):
        detect(patches, chosen)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as profile:
        started = time.perf_counter()
        detect(patches, chosen)
        passed = time.perf_counter() - started
    profile.export_chrome_trace(str(given.out / "trace.json"))
    every = profile.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    (given.out / "trace.txt").write_text(every.table(sort_by=order, row_limit=60), encoding="utf-8")
    if on_gpu:
        busy = sum(event.self_device_time_total for event in every) / 1e6
        row(given, f"device computing during a batch of {batch}", f"{busy / passed:.0%} of {passed:.3f} s, profiled")
    longest = sorted(every, key=lambda event: -getattr(event, order))[:5]
    row(given, "longest", ", ".join(f"{e.key} {getattr(e, order) / 1e6 / passed:.0%}" for e in longest))


def compare_tables(given: argparse.Namespace) -> None:
    """Nuclei of two runs: the share that has an equal at IoU .9."""
    a, b = (shapely.from_wkb(pipeline.read_nuclei(folder)["geometry"].to_numpy()) for folder in given.results)
    left, right = shapely.STRtree(b).query(a, predicate="intersects")
    shared = shapely.area(shapely.intersection(a[left], b[right]))
    iou = shared / (shapely.area(a[left]) + shapely.area(b[right]) - shared)
    matched = len(np.unique(left[iou > 0.9]))  # two polygons of a slide do not overlap so much
    row(given, "nuclei.parquet as the CPU's at IoU .9", f"{2 * matched / (len(a) + len(b)):.4f} of {len(a)}, {len(b)}")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "patches": compare_patches,
    "speed": measure_speed,
    "alternatives": measure_alternatives,
    "pair": measure_pair,
    "memory": provoke_shortage,
    "trace": record_trace,
    "tables": compare_tables,
}


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"gpu: {error}", file=sys.stderr)
        sys.exit(2)
