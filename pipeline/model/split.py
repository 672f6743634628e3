"""Detection of a patch in quarters, where it exceeds the detector's limits or the device's memory."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor
from torchvision.ops import nms

from pipeline.model.detector import Candidates
from pipeline.model.instances import Instances, concat, select

R = TypeVar("R", Candidates, Instances[Tensor])


class Quarter(NamedTuple):
    """A part of a square patch, detected on its own: it owns a quarter, and reads some of its neighbours too."""

    x: int  # left edge of what it reads, patch px
    y: int  # upper edge
    side: int  # of what it reads, px
    half: int  # where the quarters meet, along either axis, patch px
    right: bool
    lower: bool

    @property
    def window(self) -> tuple[slice, slice]:
        """What it reads: indices of the rows and columns of the patch."""
        return slice(self.y, self.y + self.side), slice(self.x, self.x + self.side)

    def to_patch(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) in px of what it reads -> the same in patch px, and bool (N,): the quarter owns the centre."""
        boxes = boxes + boxes.new_tensor([self.x, self.y, self.x, self.y])
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        return boxes, ((centre[:, 0] >= self.half) == self.right) & ((centre[:, 1] >= self.half) == self.lower)


def quarters(side: int, margin: int, step: int) -> tuple[Quarter, ...]:
    """The four quarters of a patch of `side` px, which read at least `margin` px of each other.

    step: what each reads is a multiple of it (`config.side_step`). Empty where a quarter would read the whole patch.
    Law: every box of the patch is owned by one quarter.
    """
    half = side // 2
    read = -(-(half + margin) // step) * step
    if read >= side:
        return ()
    return tuple(
        Quarter((side - read) * right, (side - read) * lower, read, half, bool(right), bool(lower))
        for lower in (0, 1)
        for right in (0, 1)
    )


def join(parts: Sequence[Quarter], detected: Sequence[R], iou: float) -> R:
    """What the quarters of a patch detected, each in px of what it reads -> the patch's, best first.

    Each quarter gives what it owns. Where the boxes of one nucleus differ so much that two quarters own it,
    non-maximum suppression at `iou` keeps the better one.
    """
    owned = []
    for part, rows in zip(parts, detected, strict=True):
        boxes, own = part.to_patch(rows.boxes)
        owned.append(select(rows._replace(boxes=boxes), own))
    rows = concat(owned)
    return select(rows, nms(rows.boxes, rows.scores, iou))
