"""The instances in the patches of a block, on disk between detection and outlining."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.model.instances import HostInstances, Instances, columns, concat
from pipeline.segment.record import StageRecord


class Predictions(NamedTuple):
    """The instances of a block's tiles, and what was done for them."""

    tiles: list[HostInstances]
    lost: NDArray[np.float32]  # share of each tile's core without a result: unreadable, or no memory
    work: StageRecord


def write_predictions(path: Path, tiles: Sequence[HostInstances], lost: NDArray[np.float32], work: StageRecord) -> None:
    """Commit the instances of a block's tiles, with what was done for it so far.

    lost: float32 (tiles,), the share of each core that could not be read
    """
    whole = concat(tiles)
    arrays: dict[str, Any] = {name: getattr(whole, name) for name in columns(Instances)}
    with files.checked(path, work.to_json()) as partial:
        np.savez(
            partial,
            allow_pickle=False,
            **arrays,
            counts=np.array([len(f.boxes) for f in tiles]),
            saturated=np.array([f.saturated for f in tiles]),
            split=np.array([f.split for f in tiles]),
            lost=np.where([f.lost for f in tiles], np.float32(1), lost),
        )


def read_predictions(path: Path) -> Predictions | None:
    """The predictions of a block; None where the file is missing or damaged."""
    work = files.read_checked(path)
    if work is None:
        return None
    try:
        stored = np.load(path, allow_pickle=False)
    except FileNotFoundError:  # another worker that was given the same block has just outlined it
        return None
    with stored:
        ends = np.cumsum(stored["counts"])[:-1]
        parts = zip(*(np.split(stored[name], ends) for name in columns(Instances)), strict=True)
        tiles = [
            Instances(**dict(zip(columns(Instances), tile, strict=True)), saturated=bool(saturated), split=bool(split))
            for tile, saturated, split in zip(parts, stored["saturated"], stored["split"], strict=True)
        ]
        return Predictions(tiles, stored["lost"], StageRecord.from_json(work))
