"""Quarters of a patch: every place is in one of them, and what they give is put together in the patch's frame."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import side_step
from pipeline.model.detector import Candidates
from pipeline.model.split import join, quarters

upscales = st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0])


sizes = st.tuples(*[st.integers(2, 64)] * 2)  # in steps


@given(sizes, st.integers(0, 300), upscales, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_every_place_has_one_quarter_that_sees_around_it(
    steps: tuple[int, int], margin: int, upscale: float, at: tuple[float, float]
) -> None:
    """Law: a box is owned by one quarter, which is smaller than the patch, and reads `margin` px around its centre.

    It begins and ends at multiples of the step.
    """
    step = side_step(upscale)
    height, width = steps[0] * step, steps[1] * step
    centre = torch.tensor([at], dtype=torch.float64) * torch.tensor([width - 1, height - 1])
    parts = quarters((height, width), margin, step)
    assert len(parts) in (0, 2, 4)
    assert parts or all(side // 2 + margin > side - step for side in (height, width))
    owners = []
    for part in parts:
        corner = torch.tensor(part.read[:2])
        moved, own = part.to_patch(torch.cat([centre - corner - 0.5, centre - corner + 0.5], 1))
        torch.testing.assert_close(moved, torch.cat([centre - 0.5, centre + 0.5], 1))
        owners += [part] * int(own)
    assert len(owners) == bool(parts)
    for part in owners:
        assert part.read.area < height * width
        assert all(px % step == 0 for px in part.read)
        low, high = part.read[:2], part.read[2:]
        for first, last, side, here in zip(low, high, (width, height), centre[0].tolist(), strict=True):
            assert 0 <= first <= last <= side
            assert max(0, here - margin) >= first
            assert min(side, here + margin) <= last


def test_what_a_quarter_reads_is_its_window() -> None:
    patch = torch.arange(256 * 256).reshape(256, 256)
    for part in quarters((256, 256), 32, 32):
        read = patch[part.window]
        assert read.shape == (160, 160)
        assert read[0, 0] == part.read.y0 * 256 + part.read.x0


def test_quarters_are_put_together_in_the_patch() -> None:
    """One nucleus in each quarter, one in the middle that two of them own; what a quarter does not own it drops."""
    parts = quarters((256, 256), 32, 32)  # each reads 160 px, and they meet at 128

    def rows(*boxes: tuple[float, float, float], saturated: bool = False) -> Candidates:
        x, y, score = torch.tensor(boxes).unbind(1)
        corners = torch.stack([x, y, x + 10, y + 10], 1)
        return Candidates(corners, score, torch.arange(len(boxes)), torch.ones(len(boxes)), saturated)

    detected = [
        rows((10, 10, 0.9), (122, 60, 0.5), (140, 10, 0.99)),  # the last lies in its neighbour
        rows((10 + 64, 10, 0.8), (124 - 96, 60, 0.6), saturated=True),  # the second is the first's, 2 px to the right
        rows((10, 10 + 64, 0.7)),
        rows((10 + 64, 10 + 64, 0.4)),
    ]
    whole = join(parts, detected, iou=0.5)
    assert whole.boxes[:, :2].tolist() == [[10, 10], [170, 10], [10, 170], [124, 60], [170, 170]]
    torch.testing.assert_close(whole.scores, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.4]))
    assert whole.class_index.tolist() == [0, 0, 0, 1, 0]
    assert whole.saturated
