"""What the detector found in the patches of a block: handed from the device to those who outline it, on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.model.instances import Found


def write_found(
    path: Path, found: Sequence[Found], lost: NDArray[np.float32], tile_seconds: float, device_seconds: float
) -> None:
    arrays: dict[str, Any] = {name: np.concatenate([getattr(f, name) for f in found]) for name in _COLUMNS}
    with files.committed(path) as part:
        np.savez(
            part,
            allow_pickle=False,
            **arrays,
            counts=np.array([len(f.boxes) for f in found]),
            saturated=np.array([f.saturated for f in found]),
            quartered=np.array([f.quartered for f in found]),
            lost=np.where([f.lost for f in found], np.float32(1), lost),
            seconds=np.array([tile_seconds, device_seconds]),
        )


_COLUMNS = ("boxes", "soft", "scores", "classes", "votes", "stains")  # of Found, a row an instance


class Stored(NamedTuple):
    """What `write_found` wrote."""

    tiles: list[Found]
    lost: NDArray[np.float32]  # share of each tile's core without a result: unreadable, or no memory
    tile_seconds: float
    device_seconds: float


def read_found(path: Path) -> Stored:
    with np.load(path, allow_pickle=False) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        columns = zip(*(np.split(stored[name], ends) for name in _COLUMNS), strict=True)
        found = [
            Found(**dict(zip(_COLUMNS, column, strict=True)), saturated=bool(saturated), quartered=bool(quartered))
            for column, saturated, quartered in zip(columns, stored["saturated"], stored["quartered"], strict=True)
        ]
        return Stored(found, stored["lost"], *map(float, stored["seconds"]))
