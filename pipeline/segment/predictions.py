"""What the detector finds in the patches of a block: handed on disk from the device to those who outline it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.model.instances import Found
from pipeline.segment.record import WorkRecord

_COLUMNS = ("boxes", "soft", "scores", "classes", "votes", "stains")  # a row an instance


class Predictions(NamedTuple):
    """What `write_predictions` wrote."""

    tiles: list[Found]
    lost: NDArray[np.float32]  # share of each tile's core without a result: unreadable, or no memory
    work: WorkRecord


def write_predictions(path: Path, found: Sequence[Found], lost: NDArray[np.float32], work: WorkRecord) -> None:
    """Commit what was found in a block's tiles, with what was done for it so far.

    lost: float32 (tiles,), the share of each core that could not be read
    """
    arrays: dict[str, Any] = {name: np.concatenate([getattr(f, name) for f in found]) for name in _COLUMNS}
    with files.sealed(path, work.to_json()) as partial:
        np.savez(
            partial,
            allow_pickle=False,
            **arrays,
            counts=np.array([len(f.boxes) for f in found]),
            saturated=np.array([f.saturated for f in found]),
            quartered=np.array([f.quartered for f in found]),
            lost=np.where([f.lost for f in found], np.float32(1), lost),
        )


def read_predictions(path: Path) -> Predictions | None:
    """What was found in a block; None where the file is missing or damaged."""
    work = files.read_seal(path)
    if work is None:
        return None
    with np.load(path, allow_pickle=False) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        columns = zip(*(np.split(stored[name], ends) for name in _COLUMNS), strict=True)
        found = [
            Found(**dict(zip(_COLUMNS, column, strict=True)), saturated=bool(saturated), quartered=bool(quartered))
            for column, saturated, quartered in zip(columns, stored["saturated"], stored["quartered"], strict=True)
        ]
        return Predictions(found, stored["lost"], WorkRecord.from_json(work))
