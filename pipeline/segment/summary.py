"""Statistics of a finished slide's nuclei: a few kB, so that the report of a thousand slides is quick to make.

They include the seam check. Where two tiles meet, a nucleus may be detected twice or not at all, and then the density
of centroids changes with the distance to the nearest seam. When stitching is right it does not.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.segment import arrow, tables
from pipeline.segment.plan import Plan
from pipeline.segment.polygons import Floats, Ints
from slides.grid import TileGrid
from slides.tissue import TissueMap

VERSION = 1  # of what is written; a reader ignores other versions

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
AREA_EDGES_UM2 = tuple(range(0, 251, 5))  # one more bin takes what is larger
SCORE_EDGES = tuple(i / 20 for i in range(21))
SEAM_EDGES_PX = tuple(range(0, 65, 4))  # distance to the nearest seam, work px; one more bin takes the rest

# The seam check judges the density in this strip: duplicates and losses lie within the claim's tolerance of a seam.
NEAR_PX = 8

# Tissue is even enough over 64 um at 0.25 um per px, and a strip of 8 px is a small part of it.
_CELL_PX = 256

_SIGMAS, _SHARE, _FEWEST = 4.0, 0.05, 25.0


def summarise(nuclei: Path, plan: Plan) -> dict[str, Any]:
    """Statistics of a slide's nuclei.parquet for slide.json: counts, density, areas, scores, and the seam check.

    Densities are per mm2 of tissue; where there is no tissue, or no nucleus, the value is None or the list empty.
    Memory holds one row group, and four bytes a nucleus for the exact quantiles.
    """
    classes: Counter[str] = Counter()
    scores = np.zeros(len(SCORE_EDGES) - 1, np.int64)
    for rows in tables.iter_nuclei(nuclei, ["class", "score"]):
        classes.update(rows["class"].to_pylist())
        scores += np.histogram(arrow.values(rows["score"]), SCORE_EDGES)[0]
    area = arrow.values(tables.read_nuclei(nuclei, ["area_um2"])["area_um2"])
    tissue_mm2 = plan.tissue.area_mm2
    centroids = (
        plan.frame.to_slide.invert(np.stack([arrow.values(rows["centroid_x"]), arrow.values(rows["centroid_y"])], 1))
        for rows in tables.iter_nuclei(nuclei, ["centroid_x", "centroid_y"])
    )
    observed, expected = seam_counts(centroids, plan.grid, plan.tissue)
    return {
        "version": VERSION,
        "nuclei": len(area),
        "per_mm2": round(len(area) / tissue_mm2, 2) if tissue_mm2 else None,
        "classes": dict(sorted(classes.items())),
        "area_um2": {
            "levels": QUANTILES,
            "quantiles": np.quantile(area, QUANTILES).round(2).tolist() if len(area) else [],
            "edges": AREA_EDGES_UM2,
            "counts": np.histogram(area, (*AREA_EDGES_UM2, np.inf))[0].tolist(),
        },
        "score": {"edges": SCORE_EDGES, "counts": scores.tolist()},
        "seams": {
            "edges_px": SEAM_EDGES_PX,
            "observed": observed.tolist(),
            "expected": expected.round(3).tolist(),
            **seam_verdict(observed, expected)._asdict(),
        },
    }


# ------------------------------------------------------------------------------------------- the seam check


class SeamVerdict(NamedTuple):
    """Whether the density of nuclei beside the seams is that of the surroundings."""

    ratio: float | None  # observed to expected within NEAR_PX; None where there is no seam on tissue with nuclei
    standard_error: float | None
    suspicious: bool


def seam_verdict(observed: Sequence[float] | NDArray[Any], expected: Sequence[float] | NDArray[Any]) -> SeamVerdict:
    """Judge the counts of `seam_counts`, of one slide or added up over many.

    With o and e the counts within 8 px of a seam, the ratio is o / e; if o is Poisson with mean e, its standard error
    is 1 / sqrt(e). Suspicious is a ratio off by more than 4 standard errors and by more than 5 %, as less may be the
    tissue's own unevenness, where at least 25 are expected, as fewer are not normally distributed.
    A ratio above 1 can come from duplicates, or from uncertain detections: within the claim's tolerance of a seam two
    tiles may detect each, so it has two chances.
    """
    near = SEAM_EDGES_PX.index(NEAR_PX)
    observed_near, expected_near = float(np.sum(observed[:near])), float(np.sum(expected[:near]))
    if expected_near <= 0:
        return SeamVerdict(None, None, False)
    off, error = abs(observed_near / expected_near - 1), expected_near**-0.5
    suspicious = expected_near >= _FEWEST and off > max(_SIGMAS * error, _SHARE)
    return SeamVerdict(round(observed_near / expected_near, 4), round(error, 4), suspicious)


def seam_counts(centroids: Iterable[Floats], grid: TileGrid, tissue: TissueMap) -> tuple[Ints, Floats]:
    """How many nuclei lie at each distance from the nearest seam, and how many would if the seams had no effect.

    centroids: batches of float64 (N, 2), work px; those off the tissue are left out.
    Returns int64 and float64 (bins,): `SEAM_EDGES_PX` and the rest. Both sum to the nuclei on tissue.

    A seam is a border between two cores; the slide's own border is none. Every core is cut into cells of at most
    256 px. Were the n nuclei of a cell spread evenly over the cell's tissue, of area A, n * A_b / A of them would lie
    in bin b, with A_b the cell's tissue at that distance from a seam. The sum over the cells is what is expected: an
    uneven density of tissue does not look like a seam, as cells are smaller than tiles and larger than a bin. That
    reduces the measured effect of a fault by the bin's share of its cell, 3 to 6 % for 8 px. Areas are exact: what lies
    further than d from every seam is a rectangle in each cell, and the mask is summed over it with parts of pixels.
    Law: for nuclei spread evenly over the tissue of each cell, whatever the grid, observed / expected tends to 1.
    """
    across, down = _axis(grid.size.width, grid.stride), _axis(grid.size.height, grid.stride)
    observed = np.zeros(len(SEAM_EDGES_PX), np.int64)
    held = np.zeros((len(down.start), len(across.start)), np.int64)
    for batch in centroids:
        x, y = batch[tissue.contains(batch)].T
        col, row = across.cell_of(x), down.cell_of(y)
        distance = np.minimum(across.distance(x, col), down.distance(y, row))
        observed += np.histogram(distance, (*SEAM_EDGES_PX, np.inf))[0]
        np.add.at(held, (row, col), 1)
    table = np.pad(tissue.mask.cumsum(0, np.int32).cumsum(1, np.int32), ((1, 0), (1, 0)))
    scale = tissue.per_work_px
    # each cell's tissue that lies further from every seam than the lower edge of a bin, (bins, rows, cols)
    beyond = np.stack([_tissue(table, down.inner(d), across.inner(d), scale) for d in SEAM_EDGES_PX])
    # a nucleus on a pixel that its cell does not reach into, by rounding, is left out
    density = np.divide(held, beyond[0], out=np.zeros_like(beyond[0]), where=beyond[0] > 1e-6)
    expected = -np.diff(np.tensordot(beyond, density, 2), append=0.0)
    return observed, expected


class _Axis(NamedTuple):
    """The cells along one side of the grid, float64 (cells,) each, work px."""

    start: Floats
    stop: Floats
    low: Floats  # the seam before each cell's core, -inf where the slide begins
    high: Floats  # the seam after it, +inf where the slide ends

    def cell_of(self, at: Floats) -> Ints:
        return np.searchsorted(self.start, at, side="right") - 1

    def distance(self, at: Floats, cell: Ints) -> Floats:
        """From a position in a cell to the nearer seam."""
        return np.minimum(at - self.low[cell], self.high[cell] - at)

    def inner(self, distance: float) -> tuple[Floats, Floats]:
        """Where each cell's part begins and ends that is so far from both seams."""
        start = np.minimum(np.maximum(self.start, self.low + distance), self.stop)
        return start, np.maximum(np.minimum(self.stop, self.high - distance), start)


def _axis(extent: int, stride: int) -> _Axis:
    seams = np.arange(0, extent, stride)
    parts = -(-stride // _CELL_PX)
    start = np.unique((seams[:, None] + np.arange(parts) * stride // parts).ravel())
    start = start[start < extent]
    core = start // stride
    stop = np.append(start[1:], extent)
    low = np.where(core > 0, core * stride, -np.inf)
    high = np.where((core + 1) * stride < extent, (core + 1) * stride, np.inf)
    return _Axis(start.astype(np.float64), stop.astype(np.float64), low, high)


def _tissue(table: Ints, rows: tuple[Floats, Floats], cols: tuple[Floats, Floats], scale: float) -> Floats:
    """The mask's area, in its pixels, in every rectangle of rows x cols: float64 (rows, cols).

    table: summed areas of the mask (Crow, SIGGRAPH 1984), with a first row and column of zeros. Between its entries
    it is bilinear, as the mask is constant within a pixel: so parts of pixels count exactly.
    """
    strips = _between(table, rows[1] * scale) - _between(table, rows[0] * scale)  # (rows, w + 1)
    return (_between(strips.T, cols[1] * scale) - _between(strips.T, cols[0] * scale)).T


def _between(table: NDArray[Any], at: Floats) -> Floats:
    """The table's rows at positions between rows, linearly; beyond its ends the first or the last."""
    at = np.clip(at, 0, len(table) - 1)
    lower = np.minimum(at.astype(np.int64), max(len(table) - 2, 0))
    share = (at - lower)[:, None]
    upper = np.minimum(lower + 1, len(table) - 1)
    return np.asarray(table[lower] * (1 - share) + table[upper] * share)
