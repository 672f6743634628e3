"""The views of the multi-inference: flips, quarter-turns and small shifts of a patch, and the way back.

A view mirrors left and right, then turns by quarters anticlockwise, then shifts. The shift rolls the image
around its edge, so that every view can be undone exactly; what is rolled to the other side lies in the margin,
which is checked to be wide enough. Boxes and points move with the pixels that they lie on, but are not rolled.

Laws, for every view: undo(apply(x)) == x, for images, boxes, masks and points; the box of a pixel becomes
the box of the pixel it moves to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import VIEW_SHIFT_PX


class View(NamedTuple):
    flip: bool  # left and right
    turns: int  # quarters, anticlockwise
    shift: tuple[int, int]  # right, down; px


_ALL = (
    View(False, 0, (0, 0)),
    View(False, 2, (VIEW_SHIFT_PX, VIEW_SHIFT_PX)),
    View(False, 1, (0, 0)),
    View(False, 3, (VIEW_SHIFT_PX, VIEW_SHIFT_PX)),
    View(True, 0, (0, VIEW_SHIFT_PX)),
    View(True, 2, (VIEW_SHIFT_PX, 0)),
    View(True, 1, (0, VIEW_SHIFT_PX)),
    View(True, 3, (VIEW_SHIFT_PX, 0)),
)


def choose_views(count: int) -> tuple[View, ...]:
    """The first `count` views: 1 (the patch as it is), 2 (a half-turn), 4 (every quarter-turn), or 8 (mirrored, too).

    Quarter-turns bring slightly more than mirroring does: workflows/experiments/README.md.

    Raises ValueError for any other number.
    """
    if count not in (1, 2, 4, 8):
        raise ValueError(f"views={count}: need 1, 2, 4 or 8")
    return _ALL[:count]


def apply(view: View, images: Tensor) -> Tensor:
    """Images (..., H, W) as the view shows them: (..., W, H) after an odd number of quarter-turns."""
    if view == _ALL[0]:
        return images
    if view.flip:
        images = images.flip(-1)
    images = torch.rot90(images, view.turns, (-2, -1))
    return images.roll((view.shift[1], view.shift[0]), (-2, -1)) if any(view.shift) else images


def undo(view: View, images: Tensor) -> Tensor:
    """Images of the view, back as the patch shows them."""
    if any(view.shift):
        images = images.roll((-view.shift[1], -view.shift[0]), (-2, -1))
    return _turn_back(view, images)


def undo_masks(view: View, masks: Tensor) -> Tensor:
    """Masks (N, M, M) on the grids of their boxes: flipped and turned back; the shift moves the boxes alone."""
    return _turn_back(view, masks)


def _turn_back(view: View, images: Tensor) -> Tensor:
    if view.turns:
        images = torch.rot90(images, -view.turns, (-2, -1))
    return images.flip(-1) if view.flip else images


def apply_points(view: View, xy: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (N, 2) of the patch, in px from its corner, as the view shows them.

    size: height and width of the patch
    """
    x, y = xy.unbind(-1)
    height, width = size
    if view.flip:
        x = width - x
    for _ in range(view.turns % 4):
        x, y = y, width - x
        height, width = width, height
    return torch.stack([x + view.shift[0], y + view.shift[1]], -1)


def undo_points(view: View, xy: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (N, 2) of the view, in the patch. size: of the patch, too."""
    x, y = xy[..., 0] - view.shift[0], xy[..., 1] - view.shift[1]
    height, width = size if view.turns % 2 == 0 else size[::-1]
    for _ in range(view.turns % 4):
        x, y = height - y, x
        height, width = width, height
    return torch.stack([width - x if view.flip else x, y], -1)


def apply_boxes(view: View, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4), x0 y0 x1 y1 of the patch, as the view shows them."""
    if view == _ALL[0]:
        return boxes
    return _ordered(apply_points(view, boxes.reshape(-1, 2, 2), size))


def undo_boxes(view: View, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of the view, in the patch."""
    if view == _ALL[0]:
        return boxes
    return _ordered(undo_points(view, boxes.reshape(-1, 2, 2), size))


def _ordered(corners: Tensor) -> Tensor:
    """Any two opposite corners (N, 2, 2) -> x0 y0 x1 y1 (N, 4)."""
    return torch.cat([corners.amin(1), corners.amax(1)], -1)
