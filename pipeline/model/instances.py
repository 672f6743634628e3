"""The instances of one tile: one type, from the detector to the block's file on disk."""

import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Patches = Sequence[NDArray[np.uint8]]
"Each (h, w, 3), of a size of its own."

STATISTICS = ("mean", "median", "min", "max", "sd")
"Of the pixels of a mask; the last is the sample's standard deviation."

A = TypeVar("A")
T = TypeVar("T", bound=tuple[Any, ...])  # Instances, or another NamedTuple of columns and flags


class Instances(NamedTuple, Generic[A]):
    """The instances of one tile, in patch px: columns with a row per instance, then flags of the tile as a whole.

    A is torch.Tensor within pipeline.model, and a numpy array outside it: `HostInstances`.
    """

    boxes: A  # float32 (N, 4), x0 y0 x1 y1, half-open
    mask_probs: A  # (N, M, M), the grid spans the box: float32, 0..1, where they are made, and uint8, 0..255, elsewhere
    scores: A  # float32 (N,), the mean over the views
    class_index: A  # int64 (N,), from 0
    class_scores: A  # float32 (N,), the probability of that class for what is a nucleus; 1 where there is one class
    votes: A  # int64 (N,): how many views detected it
    stain_density: A  # float32 (N, 2, 5): haematoxylin and eosin, log10, where the mask exceeds a half; `STATISTICS`
    saturated: bool = False  # a limit was reached even in quarters: nuclei may be missing
    split: bool = False  # the device had no memory for the whole patch: it was detected in quarters
    lost: bool = False  # the device had no memory even for its parts: it has no result


HostInstances = Instances[NDArray[Any]]

Result = Callable[[], HostInstances]
"Gives the instances of a patch; waits until the device has computed and copied them."


def columns(kind: type[tuple[Any, ...]]) -> tuple[str, ...]:
    """The fields of a NamedTuple that hold a row per instance: all but the flags."""
    return tuple(name for name, hint in typing.get_type_hints(kind).items() if hint is not bool)


def select(rows: T, chosen: Any) -> T:
    """Some of the rows. chosen: bool (N,), or indices in the order wanted; an array of the same kind."""
    table: Any = rows
    selected: T = table._replace(**{name: getattr(table, name)[chosen] for name in columns(type(rows))})
    return selected


def concat(parts: Sequence[T]) -> T:
    """One or more sets of rows, one after the other. A flag is set where it is set in any of them."""
    first: Any = parts[0]
    joined: dict[str, Any] = {name: _join([getattr(p, name) for p in parts]) for name in columns(type(first))}
    flags = {name: any(getattr(p, name) for p in parts) for name in first._fields if name not in joined}
    whole: T = first._replace(**joined, **flags)
    return whole


def _join(arrays: list[Any]) -> Any:
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import torch  # not loaded in processes that only outline

    return torch.cat(arrays)


def empty(mask_size: int) -> HostInstances:
    """A tile without instances. mask_size: M, the side of the detector's masks."""
    return Instances(
        boxes=np.zeros((0, 4), np.float32),
        mask_probs=np.zeros((0, mask_size, mask_size), np.uint8),
        scores=np.zeros(0, np.float32),
        class_index=np.zeros(0, np.int64),
        class_scores=np.zeros(0, np.float32),
        votes=np.zeros(0, np.int64),
        stain_density=np.zeros((0, 2, len(STATISTICS)), np.float32),
    )
