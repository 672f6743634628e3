"""What the detector finds in one patch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Found(NamedTuple):
    """A tile's instances, off the device: patch px."""

    boxes: NDArray[np.float32]  # (N, 4)
    soft: NDArray[np.float32]  # (N, M, M)
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    votes: NDArray[np.int64]
    stains: NDArray[np.float32]  # (N, 2) mean haematoxylin and eosin density
    saturated: bool
    lost: bool = False  # the device had no memory for it, not even in parts
    quartered: bool = False  # the device had no memory for it as a whole
