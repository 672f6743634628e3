"""Seconds, peak memory and size of exports of a large slide.

    python workflows/benchmarks/exports.py spatialdata h5ad --nuclei 1000000

A table of so many nuclei is made first: 20-sided, at 5,000 per mm2, in blocks from left to right and from top to bottom
as a run writes them. Each format is then written by a process of its own. With --folder the table is kept, and used
again.
"""

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely

from pipeline import files
from pipeline.config import Export
from pipeline.layout import SlideFolder
from pipeline.segment import tables
from pipeline.segment.export import FORMATS
from slides.geometry import Box, Size

BLOCK_PX = 3_600  # side of a block, slide px of 0.25 um
PER_BLOCK = 4_050  # 5,000 per mm2
COLOURS = {"Epithelium": (40, 220, 90), "Lymphocyte": (40, 120, 220), "Stroma": (240, 160, 30)}


class Cost(NamedTuple):
    """Of writing a file or folder."""

    seconds: float
    peak_bytes: int
    "Of the process's memory, with the interpreter and its packages."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="+", choices=list(FORMATS))
    parser.add_argument("--nuclei", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the table and the exports here")
    parser.add_argument("--dicom-reference", default="", help="for dicom: a DICOM image of the table's size in pixels")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = SlideFolder(given.folder or Path(temporary))
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.nuclei.exists():
            report(folder.nuclei, alone(make_table, folder, given.nuclei))
        for name in given.formats:
            report(
                folder.export(name), alone(write_export, folder, name, Export(dicom_reference=given.dicom_reference))
            )


def report(made: Path, cost: Cost) -> None:
    peak, size = cost.peak_bytes / 1e6, files.size_bytes(made) / 1e6
    print(f"{made.name:<24} {cost.seconds:6.1f} s  peak {peak:6.0f} MB  {size:6.0f} MB on disk", flush=True)


def alone(work: Any, *arguments: Any) -> Cost:
    """What a function costs in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, work, *arguments).result()


def measure(work: Any, *arguments: Any) -> Cost:
    started = time.perf_counter()
    work(*arguments)
    return Cost(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def write_export(folder: SlideFolder, name: Any, options: Export) -> None:
    FORMATS[name].write(folder.nuclei, folder.export(name), options)


def make_table(folder: SlideFolder, nuclei: int) -> None:
    blocks = math.ceil(nuclei / PER_BLOCK)
    across = math.ceil(math.sqrt(blocks))
    size = Size(across * BLOCK_PX, math.ceil(blocks / max(across, 1)) * BLOCK_PX)
    provenance = tables.Provenance("benchmark", (0.25, 0.25), size, Box(0, 0, *size), "benchmark", COLOURS)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    spokes = np.stack([np.cos(angle), np.sin(angle)], -1)
    rng = np.random.default_rng(0)
    with tables.NucleiWriter(folder.nuclei, provenance) as writer:
        for block in range(blocks):
            count = min(PER_BLOCK, nuclei - block * PER_BLOCK)
            corner = np.array([block % across, block // across]) * BLOCK_PX
            centre = corner + rng.uniform(20, BLOCK_PX - 20, (count, 1, 2))
            writer.write(
                np.asarray(shapely.polygons(centre + rng.uniform(10, 18, (count, 20, 1)) * spokes), dtype=object),
                class_name=rng.choice(list(COLOURS), count).tolist(),
                score=rng.uniform(0.5, 1, count),
                votes=rng.integers(1, 9, count),
                stains=rng.random((count, len(tables.STAINS))),
                class_score=np.ones(count),
                artefact=[""] * count,
            )


if __name__ == "__main__":
    main()
