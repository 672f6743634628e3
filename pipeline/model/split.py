"""Detection of a patch in quarters, where it exceeds the detector's limits or the device's memory."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor
from torchvision.ops import nms

from pipeline.model.detector import Candidates
from pipeline.model.instances import Instances, concat, select
from slides.geometry import Box

R = TypeVar("R", Candidates, Instances[Tensor])


class Quarter(NamedTuple):
    """A part of a patch, detected on its own: it owns its core, and reads some of its neighbours too. Patch px."""

    core: Box
    read: Box

    @property
    def window(self) -> tuple[slice, slice]:
        """What it reads: indices of the rows and columns of the patch."""
        return self.read.within((0, 0))

    def to_patch(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) in px of what it reads -> the same in patch px, and bool (N,): the quarter owns the centre."""
        boxes = boxes + boxes.new_tensor([*self.read[:2], *self.read[:2]])
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
        return boxes, (x >= self.core.x0) & (x < self.core.x1) & (y >= self.core.y0) & (y < self.core.y1)


def quarters(size: tuple[int, int], margin: int, step: int) -> tuple[Quarter, ...]:
    """The four quarters of a patch of this height and width, px; each reads at least `margin` px of its neighbours.

    step: the sides of what a quarter reads are multiples of it (`config.side_step`)
    Along an axis where a half would have to read the whole side, the patch is not divided. So a long and narrow patch
    has two parts, and a small one has none: the result is then empty.
    Law: where there are any, every box of the patch is owned by one of them.
    """
    rows, columns = (_halves(side, margin, step) for side in size)
    parts = tuple(
        Quarter(Box(left, upper, right, lower), Box(x0, y0, x1, y1))
        for (upper, lower), (y0, y1) in rows
        for (left, right), (x0, x1) in columns
    )
    return parts if len(parts) > 1 else ()


def _halves(side: int, margin: int, step: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Along one axis, what each half of a patch owns and what it reads: pairs of (start, stop), px.

    Where a half would have to read the whole side, the only part is the whole.
    """
    half = side // 2
    read = -(-(half + margin) // step) * step
    if read >= side:
        return [((0, side), (0, side))]
    return [((0, half), (0, read)), ((half, side), (side - read, side))]


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
