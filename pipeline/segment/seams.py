"""The search at the seams between tiles, over all blocks of a slide: which instances stitching leaves out.

The rules are those of `stitch`, which knows arrays only. Here the instances are read for it, in two passes, so that
memory does not grow with the slide's area: the first reads the boxes of everything, the second the polygons of what is
near a seam.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.segment import arrow, polygons, stitch, tables
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan
from pipeline.segment.polygons import Floats, Ints, Polygons

_TILE, _BOX = ("tile_row", "tile_col"), ("x0", "y0", "x1", "y1")  # columns of the instances


def left_out_at_seams(job: Job, plan: Plan) -> dict[int, Ints]:
    """Rows of each block to leave out: duplicates, and what is anchored outside its core and unconfirmed.

    A block of which nothing is left out is missing. Raises LeaseLost between two blocks.
    """
    if not plan.blocks:
        return {}
    near = _near_seams(job, plan, _largest_overhang(job, plan))
    cores = _cores(near.tile, plan.grid.stride)
    outside = stitch.anchored_outside(polygons.centroids(near.outline), cores, plan.grid.size)
    number = near.tile[:, 0].astype(np.int64) * plan.grid.cols + near.tile[:, 1]
    kept = stitch.resolve(near.outline, number, near.score, iou=job.settings.stitching.iou, outside=outside)
    block, row = near.block[~kept], near.row[~kept]
    return {int(b): row[block == b] for b in np.unique(block)}


class _NearSeams(NamedTuple):
    """The instances of all blocks that can have a duplicate in another tile. Parallel."""

    block: Ints  # (N,)
    row: Ints  # (N,), in the block's file
    outline: Polygons  # (N,), work px
    tile: Ints  # (N, 2), row and column of the tile that claimed it
    score: Floats  # (N,)


def _largest_overhang(job: Job, plan: Plan) -> float:
    """How far, in work px, an instance extends beyond its tile's core at most; at least 0."""
    reach = 0.0
    for block in job.while_leased(iter(plan.blocks)):
        boxes, tiles = _boxes(tables.read_instances(job.folder.instances(block), [*_TILE, *_BOX]))
        reach = max(reach, float(stitch.overhang(boxes, _cores(tiles, plan.grid.stride)).max(initial=0.0)))
    return reach


def _near_seams(job: Job, plan: Plan, reach: float) -> _NearSeams:
    """The instances nearer than `reach`, in work px, to the border of their core; the plan has blocks."""
    parts = []
    for block in job.while_leased(iter(plan.blocks)):
        rows = tables.read_instances(job.folder.instances(block), [*_TILE, *_BOX, "score", "geometry"])
        boxes, tiles = _boxes(rows)
        near = np.flatnonzero(stitch.seam_candidates(boxes, _cores(tiles, plan.grid.stride), reach))
        outlines = tables.geometry(rows.take(arrow.numbers(near)))
        scores = arrow.values(rows["score"])[near]
        parts.append(_NearSeams(np.full(len(near), block), near, outlines, tiles[near], scores))
    return _NearSeams(*map(np.concatenate, zip(*parts, strict=True)))


def _boxes(rows: pa.Table) -> tuple[Floats, Ints]:
    """Of instances, x0 y0 x1 y1 in work px, (N, 4); and row and column of their tiles, (N, 2)."""
    return tables.bounds(rows), np.stack([arrow.values(rows[name]) for name in _TILE], 1)


def _cores(tiles: Ints, stride: int) -> Ints:
    """The cores of tiles, x0 y0 x1 y1 in work px, (N, 4), not clipped to the slide; tiles: row and column, (N, 2)."""
    corners = tiles[:, ::-1] * stride
    return np.concatenate([corners, corners + stride], 1)
