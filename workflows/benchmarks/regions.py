"""Seconds and memory to measure and to export many nuclei: draws a table of them and freehand regions, and measures.

    python workflows/benchmarks/regions.py --nuclei 1000000 --regions 50

The nuclei are spread over a slide of 40,000 px at 0.25 um; a region is a rough outline of 1,000 vertices that holds
about a tenth of them, so regions overlap. The tissue is drawn with holes, on the pixels of a mask of 8 um.
"""

import argparse
import contextlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shapely
from scipy import ndimage

from pipeline.config import Export
from pipeline.layout import SlideFolder
from pipeline.segment import tables
from pipeline.segment.export import write_density
from pipeline.segment.polygons import Polygons, from_masks
from pipeline.segment.region_table import measure_regions
from pipeline.segment.regions import RegionFile
from slides.geometry import Box, Size

SIDE, MPP, MASK_MPP, VERTICES, PART = 40_000, 0.25, 8.0, 1000, 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuclei", type=int, default=1_000_000)
    parser.add_argument("--regions", type=int, default=50)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        slide = SlideFolder(Path(place))
        write_nuclei(slide.nuclei, given.nuclei, rng)
        write_geojson(slide.tissue_annotation, tissue(rng))
        write_geojson(slide.path / "regions.geojson", freehand(given.regions, rng))
        before = peak_mb()
        with timed(f"{given.nuclei:,} nuclei x {given.regions} regions"):
            table = measure_regions(slide, RegionFile.of(slide.path / "regions.geojson", crop=True))
        print(f"{sum(row['nuclei'] for row in table.rows):,} nuclei in all regions together")
        with timed("density"):
            write_density(slide.nuclei, slide.path / "density", Export())
        print(f"memory: {before:,.0f} MB when the table was written, {peak_mb():,.0f} MB at the end")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the seconds that a block takes, on the clock and of computing: others may use the machine, too."""
    started, computed = time.perf_counter(), time.process_time()
    yield
    print(f"{what}: {time.perf_counter() - started:.2f} s, {time.process_time() - computed:.2f} s of computing")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def write_nuclei(path: Path, count: int, rng: np.random.Generator) -> None:
    """Hexagons, in parts as a run writes them."""
    angle = np.linspace(0, 2 * np.pi, 6, endpoint=False)
    hexagon = np.stack([np.cos(angle), np.sin(angle)], 1)
    provenance = tables.Provenance(
        "0", (MPP, MPP), Size(SIDE, SIDE), Box(0, 0, SIDE, SIDE), "0", {"Nucleus": (0, 200, 0), "Other": (200, 0, 0)}
    )
    with tables.NucleiWriter(path, provenance) as writer:
        for first in range(0, count, PART):
            size = min(PART, count - first)
            centre, radius = rng.uniform(20, SIDE - 20, (size, 1, 2)), rng.uniform(6, 18, (size, 1, 1))
            writer.write(
                np.asarray(shapely.polygons(centre + radius * hexagon), dtype=object),
                class_name=rng.choice(["Nucleus", "Other"], size).tolist(),
                score=rng.random(size),
                votes=np.ones(size, int),
                stains=rng.random((size, len(tables.STAINS))),
                class_score=np.ones(size),
                artefact=[""] * size,
            )


def freehand(count: int, rng: np.random.Generator) -> Polygons:
    """Rough outlines around random places."""
    angle = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    radius = 0.2 * SIDE * (1 + 0.02 * rng.standard_normal((count, VERTICES)))
    spokes = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.asarray(shapely.polygons(rng.uniform(0, SIDE, (count, 1, 2)) + spokes), dtype=object)


def tissue(rng: np.random.Generator) -> Polygons:
    """Half of the slide, with rough borders."""
    side = round(SIDE * MPP / MASK_MPP)
    mask = ndimage.gaussian_filter(rng.standard_normal((side, side)), 16) > 0
    parts = from_masks(mask[None], np.array([[0, 0, SIDE, SIDE]], np.float32), level=0.5)
    return np.asarray(shapely.get_parts(parts), dtype=object)


def write_geojson(path: Path, polygons: Polygons) -> None:
    features = [{"type": "Feature", "geometry": json.loads(text)} for text in shapely.to_geojson(polygons)]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


if __name__ == "__main__":
    main()
