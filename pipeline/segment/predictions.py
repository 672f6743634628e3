"""What the detector found in the patches of a block: handed from the device to those who outline it, on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.model.instances import HostInstances, Instances, columns, concat


def write_found(
    path: Path,
    found: Sequence[HostInstances],
    lost: NDArray[np.float32],
    tile_seconds: float,
    device_seconds: float,
) -> None:
    whole = concat(found)
    arrays: dict[str, Any] = {name: getattr(whole, name) for name in columns(Instances)}
    with files.committed(path) as part:
        np.savez(
            part,
            allow_pickle=False,
            **arrays,
            counts=np.array([len(f.boxes) for f in found]),
            saturated=np.array([f.saturated for f in found]),
            split=np.array([f.split for f in found]),
            lost=np.where([f.lost for f in found], np.float32(1), lost),
            seconds=np.array([tile_seconds, device_seconds]),
        )


class Stored(NamedTuple):
    """What `write_found` wrote."""

    tiles: list[HostInstances]
    lost: NDArray[np.float32]  # share of each tile's core without a result: unreadable, or no memory
    tile_seconds: float
    device_seconds: float


def read_found(path: Path) -> Stored:
    with np.load(path, allow_pickle=False) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        tiles = zip(*(np.split(stored[name], ends) for name in columns(Instances)), strict=True)
        found = [
            Instances(**dict(zip(columns(Instances), tile, strict=True)), saturated=bool(saturated), split=bool(split))
            for tile, saturated, split in zip(tiles, stored["saturated"], stored["split"], strict=True)
        ]
        return Stored(found, stored["lost"], *map(float, stored["seconds"]))
