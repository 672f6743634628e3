"""A slide whose nuclei are known, through the whole pipeline, and scored against the truth."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely

from pipeline import files
from pipeline.archive.run import run
from pipeline.config import Execution, Settings
from pipeline.segment import tables
from pipeline.segment.polygons import Polygons
from slides import phantom
from slides.geometry import Size

SIZE = Size(3600, 2800)  # work px: 0.6 mm2, most of it tissue


class Match(NamedTuple):
    """Found against true nuclei: a pair counts from an IoU of .5 on."""

    found: int
    true: int
    hits: int

    @property
    def precision(self) -> float:
        return self.hits / max(1, self.found)

    @property
    def recall(self) -> float:
        return self.hits / max(1, self.true)

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(1, self.found + self.true)


def match(found: Polygons, true: Polygons) -> Match:
    """Score polygons of one frame against each other, each used at most once."""
    i, j = shapely.STRtree(true).query(found, predicate="intersects")
    shared = shapely.area(shapely.intersection(found[i], true[j]))
    iou = shared / (shapely.area(found[i]) + shapely.area(true[j]) - shared)
    hit = iou >= 0.5
    return Match(len(found), len(true), min(len(np.unique(i[hit])), len(np.unique(j[hit]))))


def run_demo(out: Path, seed: int, settings: Settings, say: Callable[[str], None] = print) -> int:
    """Phantom slide -> run -> score against the truth it knows. Returns the run's exit status."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    slide = out / f"phantom-{seed}.tif"
    drawn = phantom.draw(SIZE, seed)
    with files.committed(slide) as part:
        phantom.write(part, drawn)
    say(f"drew {slide}: {len(drawn.polygons):,} nuclei on {SIZE.width} x {SIZE.height} px")
    (row,) = run([slide], out / "results", settings, Execution(cluster=False), say=say)
    if row.status == "failed":
        return 1
    folder = out / "results" / slide.stem
    found = tables.geometry(tables.read_nuclei(folder / "nuclei.parquet", ["geometry"]))
    scores = match(found, np.array([shapely.Polygon(ring) for ring in drawn.polygons], object))
    say(
        f"against the truth, at IoU .5: precision {scores.precision:.3f}, recall {scores.recall:.3f}, "
        f"F1 {scores.f1:.3f} ({scores.found:,} found, {scores.true:,} true)"
    )
    say(f"look at   {folder / 'overlay.jpg'}")
    say(f"          {folder / 'thumbnail.jpg'}")
    say(f"in QuPath open {slide}, then drag {folder / 'nuclei.geojson.zip'} onto it")
    say(f"{time.perf_counter() - began:.0f} s")
    return 0
