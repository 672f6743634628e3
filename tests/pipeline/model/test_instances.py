"""Instances of a tile: rows are chosen and put together alike on the host and on a device."""

import subprocess
import sys
from typing import Any

import numpy as np
import torch

from pipeline.model import instances
from pipeline.model.instances import HostInstances, Instances


def some(count: int, seed: int) -> HostInstances:
    random = np.random.default_rng(seed)
    return Instances(
        boxes=random.random((count, 4)).astype(np.float32),
        mask_probs=random.integers(0, 256, (count, 5, 5)).astype(np.uint8),
        scores=random.random(count).astype(np.float32),
        class_index=random.integers(0, 3, count),
        class_scores=random.random(count).astype(np.float32),
        votes=random.integers(1, 9, count),
        stain_density=random.random((count, 2, 5)).astype(np.float32),
    )


def on_device(rows: HostInstances) -> Instances[torch.Tensor]:
    tensors: dict[str, Any] = {name: torch.tensor(getattr(rows, name)) for name in instances.columns(Instances)}
    return Instances(**tensors)


def test_columns_are_all_but_the_flags() -> None:
    assert instances.columns(Instances) == Instances._fields[:7]


def test_parts_put_together_are_the_whole() -> None:
    """Law: concat(select(x, first), select(x, rest)) == x, for arrays and for tensors; flags are those of any."""
    whole, first = some(7, 0), np.arange(7) < 3
    parts = [instances.select(whole, first)._replace(split=True), instances.select(whole, np.flatnonzero(~first))]
    joined = instances.concat([*parts, instances.empty(5)._replace(saturated=True)])
    tensors = instances.concat([instances.select(on_device(whole), torch.tensor(m)) for m in (first, ~first)])
    assert (joined.saturated, joined.split, joined.lost) == (True, True, False)
    for name in instances.columns(Instances):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
        assert getattr(joined, name).dtype == getattr(whole, name).dtype
        assert np.array_equal(getattr(tensors, name).numpy(), getattr(whole, name))


def test_the_type_needs_no_torch() -> None:
    """What outlines instances reads them without the detector's libraries."""
    code = "import sys, pipeline.model.instances as i; i.concat([i.empty(28)] * 2); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
