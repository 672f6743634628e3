"""The search at the seams reads what it needs, block by block, and decides as if it had everything at once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import chosen, paint
from pipeline.layout import SlideFolder
from pipeline.model import instances
from pipeline.segment import stitch, tables
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan, plan_slide
from pipeline.segment.seams import left_out_at_seams
from slides.grid import Tile
from slides.scale import GivenScale
from slides.slide import open_slide

SETTINGS = chosen(tile=96, margin=20, block=3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("slide") / "discs.png"
    paint(path, 0)
    with open_slide(path, mpp=0.25) as slide:
        return plan_slide(slide, SETTINGS)


def claimed(tile: Tile, centres: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """Rows of the discs that a tile claims, of which it misses some, and sees the others up to a pixel elsewhere."""
    seen = centres[rng.random(len(centres)) < 0.7]
    seen = seen + rng.uniform(-1, 1, seen.shape)
    seen = seen[stitch.claim(seen, tile.core, tolerance=2.0)]
    discs = shapely.buffer(shapely.points(seen), rng.uniform(2, 9, len(seen)))
    count = len(seen)
    found = instances.empty(28)._replace(
        scores=rng.random(count, dtype=np.float32),
        votes=np.ones(count, np.int64),
        class_index=np.zeros(count, np.int64),
        class_scores=np.ones(count, np.float32),
        stain_density=np.zeros((count, 2, len(instances.STATISTICS)), np.float32),
    )
    return tables.instance_rows(tile, discs, found)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_block_by_block_is_decided_as_all_at_once(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder, rng, grid = SlideFolder(tmp_path_factory.mktemp("seams")), np.random.default_rng(seed), plan.grid
    folder.instances(0).parent.mkdir(parents=True)
    centres = rng.uniform(0, grid.size, (400, 2))
    centres[100:] = centres[100:] // grid.stride * grid.stride + rng.uniform(-6, 6, (300, 2))  # where four tiles meet
    blocks = [pa.concat_tables([claimed(tile, centres, rng) for tile in plan.of_block(b)]) for b in plan.blocks]
    for block, rows in zip(plan.blocks, blocks, strict=True):
        tables.write_instances(folder.instances(block), rows, {})

    every = pa.concat_tables(blocks)
    outlines, place = tables.geometry(every), np.stack([every["tile_col"], every["tile_row"]], 1)
    cores = np.concatenate([place * grid.stride, (place + 1) * grid.stride], 1)
    outside = stitch.anchored_outside(shapely.get_coordinates(shapely.centroid(outlines)), cores, grid.size)
    score, number = every["score"].to_numpy(), (place @ (1, 1000)).astype(np.int64)
    kept = stitch.resolve(outlines, number, score, iou=SETTINGS.stitching.iou, outside=outside)
    ends = np.cumsum([rows.num_rows for rows in blocks])[:-1]
    expected = {b: np.flatnonzero(~k).tolist() for b, k in zip(plan.blocks, np.split(kept, ends), strict=True)}

    left_out = left_out_at_seams(Job(Path("x"), folder, SETTINGS, GivenScale()), plan)
    assert sum(map(len, expected.values())) > 0
    assert {b: sorted(left_out.get(b, [])) for b in plan.blocks} == expected
