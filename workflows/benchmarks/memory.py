"""Memory of a process that detects on the CPU, step by step: what it occupies, and what is allocated of that.

    python workflows/benchmarks/memory.py CMU-1-Small-Region.svs --patches 2 --views 1

The densest tiles of the slide are detected, as a worker does it. A thread samples every 2 ms the PSS of the process and
the bytes that glibc's allocator has given out (mallinfo2), of which each step has a peak. The last line is the peak of
all, and the CPU seconds of detection after the first tile.
"""

import argparse
import ctypes
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from pipeline.config import Detector, Settings, Tiling
from pipeline.model import detector, inference, load
from pipeline.model.allocator import keep_few_prepared_layers, keep_freed_memory
from pipeline.model.fitted_stain import UNCHANGED
from pipeline.model.roi_align import FeatureTable
from pipeline.model.weights import as_weights_state
from pipeline.segment.plan import plan_slide
from slides.errors import NightslideError
from slides.slide import open_slide


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


LIBRARY = ctypes.CDLL(None)
LIBRARY.mallinfo2.restype = MallInfo


def pss() -> int:
    """Of this process, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Watch:
    """The peaks of PSS and of what is allocated, by the innermost step that was going on."""

    def __init__(self) -> None:
        self.steps: list[str] = ["else"]
        self.peaks: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self._note(self.steps[-1])

    def _note(self, step: str) -> None:
        now, before = (pss(), LIBRARY.mallinfo2().used), self.peaks.get(step, (0, 0))
        self.peaks[step] = max(before[0], now[0]), max(before[1], now[1])

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.steps.append(name)
        try:
            yield
        finally:
            self._note(name)  # it may have been too short for a sample
            self.steps.pop()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def watched(watch: Watch, owner: Any, name: str, step: str) -> None:
    """Have calls of a method or function be a step."""
    called: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(called)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.step(step):
            return called(*args, **kwargs)

    setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--patches", type=int, default=2, help="how many, the densest first (%(default)s)")
    parser.add_argument("--views", type=int, default=1, choices=get_args(Detector.__annotations__["views"].__args__[0]))
    parser.add_argument("--tile", type=int, default=Tiling.tile)
    given = parser.parse_args()
    keep_freed_memory()  # before there are threads, as in a worker
    keep_few_prepared_layers()
    settings = as_weights_state(
        Settings(tiling=Tiling(tile=given.tile), detector=Detector(device="cpu", views=given.views))
    )
    with open_slide(given.slide) as slide:
        plan = plan_slide(slide, settings)
        patches = [slide.read(plan.trimmed(tile), plan.frame) for tile in plan.tiles]
    densest = np.argsort([patch[..., 1].mean() for patch in patches])[: given.patches]
    model = load.detector(settings.detector).model
    with Watch() as watch:
        for owner, name, step in (
            (inference, "_detect", "normalise, fuse"),
            (detector, "upsample", "enlarge"),
            (model.backbone, "forward", "backbone"),
            (model.pyramid, "forward", "pyramid"),
            (model.semantic, "forward", "semantic branch"),
            (FeatureTable, "of", "feature table"),
            (model, "features", "features, else"),
            (model.rpn.head, "forward", "proposals: head"),
            (model, "propose", "proposals, else"),
            (model.roi_heads.box_roi_pool, "forward", "boxes: pool"),
            (model.roi_heads.box_head, "forward", "boxes: head"),
            (model, "classify", "boxes, else"),
            (model.roi_heads.mask_roi_pool, "forward", "masks: pool"),
            (model.roi_heads.mask_head, "forward", "masks: head"),
            (model.roi_heads.mask_predictor, "forward", "masks: predictor"),
            (model, "masks", "masks, else"),
            (inference, "_download", "stain density"),
        ):
            watched(watch, owner, name, step)
        seconds, nuclei = [], 0
        for number in densest:
            started = time.process_time()
            (result,) = inference.detect_patches([patches[number]], UNCHANGED, settings)
            nuclei += len(result().boxes)
            seconds.append(time.process_time() - started)
    for step, (occupied, allocated) in watch.peaks.items():
        print(f"{step:20}  PSS {occupied / 1e6:6.0f} MB  allocated {allocated / 1e6:6.0f} MB")
    occupied, allocated = (max(column) for column in zip(*watch.peaks.values(), strict=True))
    print(
        f"peak: PSS {occupied / 1e6:.0f} MB, allocated {allocated / 1e6:.0f} MB; {nuclei:,} nuclei, "
        f"{sum(seconds[1:]):.2f} s of CPU; {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"memory: {error}", file=sys.stderr)
        sys.exit(2)
