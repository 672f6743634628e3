"""What the stream around the detector costs: core-seconds per mm2 of every step, with a detector that costs nothing.

    python workflows/benchmarks/feed.py CMU-1-Small-Region.svs WORK

SLIDE gives the pixels: a square of its tissue, as large as the core of a tile, is repeated to a giant slide of 40x and
to one of 20x, so that every patch of these shows the same. The nuclei that the shipped weights detect in it, as many as
make 3,000 per mm2, are recorded once in WORK, and answered for every patch. Everything else is a usual run, in this
process (--processes 0, with the steps one by one) or with worker processes, where the seconds of stages are by the
clock. All others are of processors, so that other programs disturb them less. WORK keeps the slides and the nuclei.
"""

import argparse
import cProfile
import functools
import os
import pstats
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import pipeline
from pipeline.archive import slide_stages
from pipeline.config import Architecture, Execution, Settings, Tissue
from pipeline.model.fitted_stain import UNCHANGED, Normalisation
from pipeline.model.instances import HostInstances, Instances, Patches, select
from pipeline.segment import stages, tables
from slides import focus
from slides.errors import NightslideError
from slides.geometry import Box
from slides.patches import PatchStore
from slides.slide import Slide, open_slide
from slides.stored import StoredPixels

MPP = {40: 0.25, 20: 0.5}  # of level 0, by magnification
DENSITY = 3000  # nuclei per mm2
WORK = "NIGHTSLIDE_FEED"  # in the environment of workers: the folder of the recorded nuclei and of their seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--scales", type=int, nargs="+", choices=MPP, default=list(MPP), help="magnifications")
    parser.add_argument("--tiles", type=int, default=12, help="tiles along a side of the giant slides (%(default)s)")
    parser.add_argument("--processes", type=int, default=0, help="worker processes; 0: all in this one (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="the functions that cost most, too; in this process")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ[WORK] = str(given.work.absolute())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    record(given.slide, given.work)
    for scale in given.scales:
        measure(giant(given.slide, given.work, scale, given.tiles), given)


# --------------------------------------------------------------------------------------------------- the slide


def square(slide: Slide, mpp: float) -> NDArray[np.uint8]:
    """The darkest square of the slide that is as large as the core of a tile: uint8 (side, side, 3)."""
    stride = Settings().tiling.tile - 2 * Settings().tiling.margin
    frame = slide.frame(Architecture().mpp)
    corners = [
        (x, y)
        for y in range(0, frame.size.height - stride + 1, stride // 4)
        for x in range(0, frame.size.width - stride + 1, stride // 4)
    ]
    squares = (slide.read(Box(x, y, x + stride, y + stride), frame) for x, y in corners)
    darkest = min(squares, key=lambda pixels: float(pixels.mean()))
    step = round(mpp / frame.mpp)
    averaged = darkest.reshape(stride // step, step, stride // step, step, 3).mean((1, 3)).round()
    pixels: NDArray[np.uint8] = averaged.astype(np.uint8)
    return pixels


def giant(source: Path, work: Path, scale: int, tiles: int) -> Path:
    """A slide of so many tiles a side, each the same; made once."""
    path = work / f"{scale}x-{tiles}.tif"
    if not path.exists():
        with open_slide(source) as slide:
            pixels = square(slide, MPP[scale])
        one, across = work / f"{scale}x.tif", str(tiles)
        Image.fromarray(pixels).save(one, resolution=1e4 / MPP[scale], resolution_unit=3)  # per centimetre
        command: list[str | Path] = [sys.executable, Path(__file__).with_name("replicate.py"), one]
        subprocess.run(
            [*command, path.with_suffix(".new"), "--across", across, "--down", across],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        path.with_suffix(".new").rename(path)
    return path


# ------------------------------------------------------------------------------------------------- the detector


def record(source: Path, work: Path) -> None:
    """Detect the nuclei of a patch of the giant slides, once: WORK/nuclei.npz."""
    path = work / "nuclei.npz"
    if path.exists():
        return
    from pipeline.archive.manifest import resolve
    from pipeline.model.inference import detect_patches

    settings = resolve(Settings())
    margin, mpp = settings.tiling.margin, settings.tiling.mpp
    with open_slide(source) as slide:
        patch = np.pad(square(slide, mpp), ((margin, margin), (margin, margin), (0, 0)), "wrap")
    (result,) = detect_patches([patch], UNCHANGED, settings)
    detected = result()
    most = round(DENSITY * (len(patch) * mpp / 1000) ** 2)
    chosen = select(detected, np.argsort(-detected.scores)[:most])
    np.savez(path, allow_pickle=False, **chosen._asdict())
    print(f"{len(chosen.boxes)} nuclei of {len(detected.boxes)} detected in a patch, {most} wanted")


@functools.lru_cache(maxsize=1)
def recorded() -> HostInstances:
    with np.load(Path(os.environ[WORK]) / "nuclei.npz", allow_pickle=False) as stored:
        values: dict[str, Any] = {name: stored[name] for name in stored.files}
    values |= {name: bool(value) for name, value in values.items() if not value.ndim}
    return Instances(**values)


def detect(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """The recorded nuclei for every patch. Stands for the detector."""
    for _ in patches:
        yield recorded()


# -------------------------------------------------------------------------------------------------- the seconds


class Clock:
    """Seconds of this process's processors by step; those of a step within another count for the inner one."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._profile = profile
        self._within: list[str] = []
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._within[-1] if self._within else "start, and between stages"] += now - self._since
        self._since = now

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed_step(*args: Any, **named: Any) -> Any:
            self._switch()
            self._within.append(step)
            outermost = self._profile if len(self._within) == 1 else None
            try:
                return outermost.runcall(function, *args, **named) if outermost else function(*args, **named)
            finally:
                self._switch()
                self._within.pop()

        return timed_step


def watch(clock: Clock) -> None:
    """Time every stage, and the steps of those that are done block by block."""
    steps = (
        (StoredPixels, "read", "tile: read and decode"),
        (stages, "cut", "tile: copy and resample"),
        (PatchStore, "write", "tile: write the store"),
        (PatchStore, "read", "detect: read the store"),
        (PatchStore, "discard", "detect: remove from the store"),
        (focus, "measure", "tile: sharpness"),
        (stages, "write_predictions", "detect: write predictions"),
        (stages, "read_predictions", "outline: read predictions"),
        (stages, "outline", "outline: polygons"),
        (tables, "write_instances", "outline: write instances"),
        (stages, "write_exports", "export: files"),
    )
    for place, name, step in steps:
        setattr(place, name, clock.timed(step, getattr(place, name)))
    timed = tuple(stage._replace(run=clock.timed(stage.name, stage.run)) for stage in stages.STAGES)
    vars(slide_stages)["STAGES"] = timed


def processor_seconds() -> float:
    """Of this process and of its children that have ended, theirs too."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(path: Path, given: argparse.Namespace) -> None:
    """A run over one giant slide, and its table."""
    out = given.work / "results"
    shutil.rmtree(out, ignore_errors=True)
    here = Execution(cluster=False, workers=1)
    execution = Execution(workers=given.processes) if given.processes else here
    settings = Settings(tissue=Tissue(everywhere=True))
    profile = cProfile.Profile() if given.profile else None
    clock = Clock(profile)
    if not given.processes:
        watch(clock)
    started, before = time.perf_counter(), processor_seconds()
    (record,) = pipeline.run([path], out, settings, execution, say=lambda _: None, detect=detect)
    spent, elapsed = processor_seconds() - before, time.perf_counter() - started
    mm2 = record.tissue_mm2
    print(f"\n{path.name}: {mm2:.2f} mm2, {record.nuclei:,} nuclei, {elapsed:.1f} s, {mm2 / elapsed:.2f} mm2/s")
    print(f"{spent / mm2:.3f} core-seconds per mm2")
    seconds = clock.seconds if not given.processes else dict(record.work.seconds)
    for step, value in seconds.items():
        print(f"    {step:30} {value / mm2:.3f} s/mm2  {value:6.2f} s")
    if profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"feed: {error}", file=sys.stderr)
        sys.exit(2)
