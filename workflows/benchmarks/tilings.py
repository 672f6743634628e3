"""How far the nuclei of a slide depend on its tiling: every tiling given is run, and each two are compared.

    python workflows/benchmarks/tilings.py SLIDE --out DIR 1024/64 1024/128 ... [--mpp UM]

A tiling is tile/margin, in px at the working scale. Printed for each two: the share of nuclei that have a partner at
IoU .5 and .9 (of both tilings together, 2 * pairs / nuclei), and of those without one at .5 the share among the nuclei
near a seam of either tiling (their centroid within 64 px of it) and among all others.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

import pipeline
from pipeline.config import Architecture, Execution, Settings, Tiling
from pipeline.layout import RunFolder
from pipeline.segment.tables import geometry, read_nuclei
from slides.errors import NightslideError
from slides.slide import open_slide

NEAR_PX = 64  # work px


def nuclei_of(slide: Path, out: Path, tiling: Tiling, mpp: float | None) -> NDArray[np.object_]:
    """The outlines of a slide's nuclei with a tiling, slide px, from DIR/tile-margin; it is run where need be."""
    folder = out / f"{tiling.tile}-{tiling.margin}"
    pipeline.run([slide], folder, Settings(tiling=tiling), Execution(cluster=False), mpp=mpp)
    (table,) = RunFolder(folder).with_nuclei()
    return geometry(read_nuclei(table.nuclei, ["geometry"]))


def partners(a: NDArray[np.object_], b: NDArray[np.object_], iou: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of a and of b have a partner: pairs are disjoint, as outlines of one tiling overlap by less than half."""
    left, right = shapely.STRtree(b).query(a, predicate="intersects")
    shared = shapely.area(shapely.intersection(a[left], b[right]))
    match = shared / (shapely.area(a)[left] + shapely.area(b)[right] - shared) >= iou
    paired_a, paired_b = np.zeros(len(a), bool), np.zeros(len(b), bool)
    paired_a[left[match]], paired_b[right[match]] = True, True
    return paired_a, paired_b


def near_seam(nuclei: NDArray[np.object_], tiling: Tiling, scale: float) -> NDArray[np.bool_]:
    """Whether centroids lie within NEAR_PX of a seam; scale: work px per slide px."""
    centroid = shapely.get_coordinates(shapely.centroid(nuclei)) * scale
    stride = tiling.tile - 2 * tiling.margin
    to_seam = np.abs(centroid - np.maximum(np.rint(centroid / stride), 1) * stride)
    return np.asarray(to_seam.min(1) < NEAR_PX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("tilings", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mpp", type=float)
    given = parser.parse_args()
    sizes = [tuple(map(int, text.split("/"))) for text in given.tilings]
    tilings = [Tiling(mpp=Architecture().mpp, tile=tile, margin=margin) for tile, margin in sizes]
    nuclei = [nuclei_of(given.slide, given.out, tiling, given.mpp) for tiling in tilings]
    with open_slide(given.slide, mpp=given.mpp) as slide:
        scale = slide.scale.x / tilings[0].mpp
    print(f"{'tilings':21} {'nuclei':>13} {'IoU .5':>7} {'IoU .9':>7} {'alone near seams':>17} {'elsewhere':>10}")
    for (s, a), (t, b) in itertools.combinations(zip(tilings, nuclei, strict=True), 2):
        shares = [np.concatenate(partners(a, b, iou)).mean() for iou in (0.5, 0.9)]
        alone = ~np.concatenate(partners(a, b, 0.5))
        near = np.concatenate([near_seam(x, s, scale) | near_seam(x, t, scale) for x in (a, b)])
        name = f"{s.tile}/{s.margin} {t.tile}/{t.margin}"
        counts = f"{len(a)} {len(b)}"
        rates = f"{alone[near].mean():17.2%} {alone[~near].mean():10.2%}"
        print(f"{name:21} {counts:>13} {shares[0]:7.2%} {shares[1]:7.2%} {rates}")


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"tilings: {error}", file=sys.stderr)
        sys.exit(2)
