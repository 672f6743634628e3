"""The demo: a synthetic slide whose nuclei are known is segmented by the whole pipeline, and the result is scored."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely

from pipeline import files
from pipeline.archive.run import run
from pipeline.config import Execution, Settings, require
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.model.device import count_gpus, device_kind
from pipeline.segment import tables
from pipeline.segment.polygons import Polygons
from slides import phantom
from slides.geometry import Size

SIZE = Size(3600, 2800)  # work px: 0.6 mm2, most of it tissue


class Match(NamedTuple):
    """Detected against true nuclei: a pair with an IoU of at least .5 is a match."""

    detected: int
    true: int
    matched: int

    @property
    def precision(self) -> float:
        return self.matched / max(1, self.detected)

    @property
    def recall(self) -> float:
        return self.matched / max(1, self.true)

    @property
    def f1(self) -> float:
        return 2 * self.matched / max(1, self.detected + self.true)


def match(detected: Polygons, true: Polygons) -> Match:
    """Match polygons of one frame, object (N,) and (M,); each counts at most once."""
    i, j = shapely.STRtree(true).query(detected, predicate="intersects")
    shared = shapely.area(shapely.intersection(detected[i], true[j]))
    iou = shared / (shapely.area(detected[i]) + shapely.area(true[j]) - shared)
    matched = iou >= 0.5
    return Match(len(detected), len(true), min(len(np.unique(i[matched])), len(np.unique(j[matched]))))


def run_demo(out: Path, seed: int, settings: Settings) -> int:
    """Draw a slide, run the pipeline on it, and score the result. Returns the exit status.

    Raises RunError where `out` cannot be a folder to write to, ConfigError for a seed below 0 and for a device that is
    not there.
    """
    started = time.perf_counter()
    require(seed >= 0, f"seed={seed}: need 0 or more")
    device_kind(settings.detector.device, count_gpus())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be made a folder: {error.strerror}; choose another") from error
    slide = out / f"phantom-{seed}.tif"
    drawn = phantom.draw(SIZE, seed)
    with files.committed(slide) as part:
        phantom.write(part, drawn)
    print(f"drew {slide}: {len(drawn.polygons):,} nuclei on {SIZE.width} x {SIZE.height} px")
    results = RunFolder(out / "results")
    (row,) = run([slide], results.path, settings, Execution(cluster=False), say=print)
    if row.status not in ("done", "done before"):  # it has said why
        return 1
    folder = results.slide(row.slide)
    detected = tables.geometry(tables.read_nuclei(folder.nuclei, ["geometry"]))
    scores = match(detected, np.array([shapely.Polygon(ring) for ring in drawn.polygons], object))
    print(
        f"against the truth, at IoU .5: precision {scores.precision:.3f}, recall {scores.recall:.3f}, "
        f"F1 {scores.f1:.3f} ({scores.detected:,} detected, {scores.true:,} true)"
    )
    print(f"pictures: {folder.overlay}")
    print(f"          {folder.thumbnail}")
    if (nuclei := folder.export("qupath")).exists():  # not with other --export.formats
        print(f"in QuPath open {slide}, then drag {nuclei} onto it")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0
