"""Every view can be undone exactly, and moves boxes, masks and points as it moves pixels."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Detector
from pipeline.model.views import (
    View,
    apply,
    apply_boxes,
    apply_points,
    choose_views,
    undo,
    undo_boxes,
    undo_masks,
    undo_points,
)


def apply_masks(view: View, masks: torch.Tensor) -> torch.Tensor:
    """The inverse of `undo_masks`."""
    return apply(view._replace(shift=(0, 0)), masks)


shown = st.builds(View, st.booleans(), st.integers(0, 3), st.tuples(st.integers(-6, 6), st.integers(-6, 6)))
sizes = st.tuples(st.integers(8, 20), st.integers(8, 20))  # height, width


@given(shown, sizes, st.integers(0, 2**32))
def test_undo_is_the_inverse_of_apply(view: View, size: tuple[int, int], seed: int) -> None:
    """Law: undo(apply(x)) == x, on images, boxes, masks and points, of patches of any height and width."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, *size, generator=random)
    assert torch.equal(undo(view, apply(view, images)), images)
    masks = torch.rand(4, 7, 7, generator=random)
    assert torch.equal(undo_masks(view, apply_masks(view, masks)), masks)
    corners = torch.randint(0, 8, (5, 2, 2), generator=random).double()
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    assert torch.equal(undo_boxes(view, apply_boxes(view, boxes, size), size), boxes)
    points = torch.rand(6, 2, generator=random, dtype=torch.float64) * torch.tensor(size[::-1])
    torch.testing.assert_close(undo_points(view, apply_points(view, points, size), size), points)


@given(shown, sizes, st.data())
def test_a_box_moves_as_its_pixels_do(view: View, size: tuple[int, int], data: st.DataObject) -> None:
    """Law: what is painted in a box is, in the view, painted in the box that the view gives it (rolled round)."""
    height, width = size
    x0, x1 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    image = torch.zeros(1, 1, height, width)
    image[..., y0:y1, x0:x1] = 1
    (moved,) = apply_boxes(view, torch.tensor([[x0, y0, x1, y1]]), size).tolist()
    left, top, right, bottom = (int(v) for v in moved)
    shown = apply(view, image)[0, 0]
    painted = torch.zeros_like(shown)
    for row in range(top, bottom):
        for column in range(left, right):
            painted[row % len(painted), column % len(painted[0])] = 1
    assert torch.equal(shown, painted)


@given(shown, st.integers(0, 2**32))
def test_a_mask_turns_as_the_image_in_its_box_does(view: View, seed: int) -> None:
    side, box = 16, torch.tensor([[4.0, 5.0, 9.0, 10.0]])
    still = view._replace(shift=(0, 0))
    image = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(seed))
    (x0, y0, x1, y1) = (int(v) for v in apply_boxes(still, box, (side, side))[0])
    assert torch.equal(apply(still, image)[0, :, y0:y1, x0:x1], apply_masks(still, image[0, :, 5:10, 4:9]))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_views_differ_and_begin_with_the_patch_itself(count: Any) -> None:
    chosen = choose_views(count)
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert len({tuple(apply(v, image).flatten().tolist()) for v in chosen}) == count
    assert torch.equal(apply(chosen[0], image), image)
    assert Detector(views=count).largest_shift_px == max(abs(s) for v in chosen for s in v.shift)


def test_another_number_of_views_is_refused() -> None:
    with pytest.raises(ValueError, match="views=3: need 1, 2, 4 or 8"):
        choose_views(3)
