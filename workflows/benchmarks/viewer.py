"""Is `nightslide view` quick on a slide of a million nuclei? Seconds to the first view, milliseconds a tile, memory.

    python workflows/benchmarks/viewer.py giant.tif WORK --nuclei 1000000

Writes results of the slide (of `replicate.py`, or another) with that many random outlines of the usual size and number
of vertices, in WORK, which is reused. Then the command is started, and asked as a page asks it: first for what a page
shows at first, then for random tiles by two threads at once.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import shapely
from numpy.typing import NDArray

from pipeline import files
from pipeline.archive.ledger import write_ledger
from pipeline.layout import RunFolder
from pipeline.segment.record import Counts, SlideRecord, StageRecord
from pipeline.segment.tables import STAINS, NucleiWriter, Provenance
from slides.errors import NightslideError
from slides.slide import Slide, open_slide

NAME = "slide"
VERTICES = 18  # the mean of CMU-1-Small-Region's
RADIUS_UM = (1.5, 5.0)
BATCH = 50_000
COLOURS = {"Nucleus": (40, 220, 90), "Lymphocyte": (90, 110, 255), "Tumour": (230, 60, 60)}
THREADS, TILES = 2, 200  # that ask at once; of each kind
VIEW_PX = (1400, 900)  # of the screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("work", type=Path, help="a folder for the results")
    parser.add_argument("--nuclei", type=int, default=1_000_000, help="how many (%(default)s)")
    given = parser.parse_args()
    run = RunFolder(given.work / f"results-{given.nuclei}")
    with open_slide(given.slide) as slide:
        if not run.ledger.exists():
            write_results(run, slide, given.nuclei)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "view", str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.findall(r"http\S+", process.stdout.readline())[0]
        print(f"{given.nuclei:,} nuclei, {run.slide(NAME).nuclei.stat().st_size / 1e6:,.0f} MB")
        measure(f"{address}slides/0/", process.pid)
        print(f"peak memory: {peak_gb(process.pid):.2f} GB")
    finally:
        process.terminate()
        process.wait()


def write_results(run: RunFolder, slide: Slide, nuclei: int) -> None:
    """The files that the viewer reads, as a run writes them; a third of the nuclei lie in dense spots."""
    folder = run.slide(NAME)
    folder.path.mkdir(parents=True)
    provenance = Provenance(
        slide.quick_hash, (slide.scale.x, slide.scale.y), slide.size, slide.bounds, "benchmark", COLOURS
    )
    rng = np.random.default_rng(0)
    corner, size = np.array(slide.bounds[:2], float), np.array(slide.bounds.size, float)
    spots = corner + rng.random((200, 2)) * size
    with NucleiWriter(folder.nuclei, provenance) as writer:
        for first in range(0, nuclei, BATCH):
            count = min(BATCH, nuclei - first)
            centres = corner + rng.random((count, 2)) * size
            dense = rng.random(count) < 1 / 3
            spread = 300 / slide.scale.x  # px
            centres[dense] = spots[rng.integers(0, len(spots), dense.sum())] + rng.normal(0, spread, (dense.sum(), 2))
            writer.write(
                outlines(rng, np.clip(centres, corner, corner + size), slide.scale.x),
                class_name=rng.choice(list(COLOURS), count).tolist(),
                score=rng.uniform(0.5, 1, count),
                votes=np.ones(count, int),
                stains=rng.random((count, len(STAINS))),
                class_score=np.ones(count),
                artefact=[""] * count,
            )
    content = {
        "source": slide.path.name,
        "source_path": str(slide.path.resolve()),
        "quick_hash": slide.quick_hash,
        "um_per_px": slide.scale[:2],
    }
    files.write_json(folder.slide_json, content)
    write_ledger(run, [SlideRecord(NAME, "done", tissue_mm2=1.0, work=StageRecord({}, Counts(nuclei=nuclei)))])


def outlines(rng: np.random.Generator, centres: NDArray[np.float64], mpp: float) -> NDArray[np.object_]:
    """Wavy ellipses around centres (n, 2), slide px. object (n,)"""
    count = len(centres)
    angle = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    radius = rng.uniform(*RADIUS_UM, (count, 1, 2)) / mpp * rng.uniform(0.9, 1.1, (count, VERTICES, 1))
    rings = centres[:, None] + radius * np.stack([np.cos(angle), np.sin(angle)], -1)
    polygons: NDArray[np.object_] = shapely.polygons(rings)
    return polygons


def measure(slide: str, pid: int) -> None:
    """Ask for what a page asks for, and print how long it took. slide: address of its page; pid: of the server."""

    def get(path: str) -> tuple[bytes, float]:
        started = time.perf_counter()
        with urlopen(slide + path) as answer:
            content: bytes = answer.read()
        return content, time.perf_counter() - started

    started, used = time.perf_counter(), cpu_s(pid)
    for name in ("", "about.json"):
        get(name)
    picture = json.loads(get("picture.json")[0])
    get(f"picture/{picture['minLevel']}/0_0.jpg")
    print(f"first picture: {time.perf_counter() - started:.1f} s")
    nuclei = json.loads(get("nuclei.json")[0])
    density = "density.bin?score=0.5&" + "&".join(f"class={number}" for number in range(len(nuclei["classes"])))
    get(density)
    print(f"first view with all nuclei: {time.perf_counter() - started:.1f} s, of CPU {cpu_s(pid) - used:.1f} s")

    rng = np.random.default_rng(1)

    def picture_tiles() -> list[str]:
        """Those of a view at a random place and level."""
        level = int(rng.integers(picture["minLevel"], picture["maxLevel"] + 1))
        ranges = []
        for side, length in zip(("width", "height"), VIEW_PX, strict=True):
            whole = picture[side] / 2 ** (picture["maxLevel"] - level)  # px of the level
            first = rng.uniform(0, max(0, whole - length))
            tile = picture["tileSize"]
            ranges.append(range(int(first // tile), int((min(whole, first + length) - 1) // tile) + 1))
        return [f"picture/{level}/{col}_{row}.jpg" for row in ranges[1] for col in ranges[0]]

    def nucleus_tile() -> str:
        return "nuclei/{}_{}.bin".format(*(int(rng.integers(count)) for count in nuclei["tiles"]))

    kinds = {
        "tiles of the picture": [path for _ in range(TILES // 8) for path in picture_tiles()],
        "tiles of outlines": [nucleus_tile() for _ in range(TILES)],
        "measurements of a nucleus": [f"nuclei/{int(rng.integers(nuclei['count']))}.json" for _ in range(TILES)],
        "density at a score": [density.replace("0.5", f"{rng.uniform(0.5, 1):.2f}") for _ in range(TILES)],
    }
    for words, paths in kinds.items():
        used = cpu_s(pid)
        with ThreadPoolExecutor(THREADS) as pool:
            report(words, list(pool.map(get, paths)), cpu_s(pid) - used)


def report(words: str, answers: Sequence[tuple[bytes, float]], used_s: float) -> None:
    ms = [1000 * seconds for _, seconds in answers]
    kb = sum(len(content) for content, _ in answers) / len(answers) / 1000
    median, most = np.percentile(ms, (50, 95))
    mean = 1000 * used_s / len(answers)
    print(f"{words}: median {median:.0f} ms, p95 {most:.0f} ms, of CPU {mean:.0f} ms, {kb:.0f} kB each")


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed: what does not depend on what else the machine does."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def peak_gb(pid: int) -> float:
    """The most memory that a process has had; Linux."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) * 1024 / 1e9


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"viewer: {error}", file=sys.stderr)
        sys.exit(2)
