"""An exact detector and slides for it, so that what a run gives depends on the slide and on nothing else.

Every nucleus is painted in a colour of its own, and the oracle, in the detector's place, reads the colours back:
reading, tiling, storing, claiming, stitching and export are the real ones. Workers of a cluster import it by name,
so this folder is on their PYTHONPATH.
"""

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from pipeline.config import Settings, Stain, Stitching, Tiling, Tissue
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches
from pipeline.segment import stages, tables

HEIGHT, WIDTH, RADIUS = 330, 410, 9
_QUEUE = stages._queue
SECONDS = "NIGHTSLIDE_TEST_SECONDS_A_PATCH"  # in the environment: how slow the oracle is


def detect(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Instances of patches that show every nucleus in a colour of its own, on white. Stands for the detector."""
    for patch in patches:
        time.sleep(float(os.environ.get(SECONDS, "0")))
        number = patch.astype(np.int64) @ np.array([1, 256, 65536])
        ids = np.unique(number[number != 0xFFFFFF])
        side = 2 * RADIUS + 2
        boxes, masks = np.zeros((len(ids), 4), np.float32), np.zeros((len(ids), side, side), bool)
        for i, id_ in enumerate(ids):
            y, x = np.nonzero(number == id_)
            masks[i, y - y.min(), x - x.min()] = True
            boxes[i] = x.min(), y.min(), x.min() + side, y.min() + side
        yield HostInstances(
            boxes,
            masks,
            (0.5 + ids % 97 / 200).astype(np.float32),
            np.zeros(len(ids), np.int64),
            np.ones(len(ids), np.float32),
            np.ones(len(ids), np.int64),
            np.zeros((len(ids), 2, 5), np.float32),
            False,
        )


def replace_detector(monkeypatch: pytest.MonkeyPatch, detect: stages.Detect) -> None:
    """Have this in the detector's place, in this process, whatever a run is given."""
    monkeypatch.setattr(stages, "_queue", lambda _: _QUEUE(detect))


def command(*arguments: str) -> None:
    """The command `nightslide`, with the oracle in the detector's place."""
    from pipeline import cli
    from pipeline.archive import run

    run.run = functools.partial(run.run, detect=detect)
    cli.main(arguments)


def paint(path: Path, seed: int) -> int:
    """A slide of discs that do not touch, and how many."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centres: list[tuple[float, float]] = []
    for _ in range(400):
        cy, cx = rng.uniform(3, HEIGHT - 3), rng.uniform(3, WIDTH - 3)
        if all((cy - b) ** 2 + (cx - a) ** 2 > (2 * RADIUS + 2) ** 2 for b, a in centres):
            centres.append((cy, cx))
            number = len(centres) * 1009
            inside = (y + 0.5 - cy) ** 2 + (x + 0.5 - cx) ** 2 < rng.uniform(4, RADIUS) ** 2
            image[inside] = number % 256, number // 256 % 256, number // 65536
    Image.fromarray(image).save(path)
    return len(centres)


def chosen(tile: int = 128, margin: int = 20, block: int = 2) -> Settings:
    return Settings(
        tissue=Tissue(everywhere=True),
        tiling=Tiling(mpp=0.25, tile=tile, margin=margin, block=block),
        stain=Stain(method="none"),
        stitching=Stitching(max_diameter_um=2 * RADIUS * 0.25, simplify_px=0.0),
    )


def outlines(folder: Path) -> set[bytes]:
    polygons = tables.geometry(tables.read_nuclei(folder / "nuclei.parquet"))
    return {shapely.to_wkb(p) for p in shapely.normalize(polygons)}


def files(folder: Path) -> dict[str, bytes]:
    """What a finished slide's results are, but for the times in slide.json."""
    return {name: (folder / name).read_bytes() for name in ("nuclei.parquet", "nuclei.geojson.zip", "overlay.jpg")}
