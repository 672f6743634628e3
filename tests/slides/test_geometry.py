"""Laws of boxes and of the affine."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slides.geometry import Affine, Box, union

coordinates = st.integers(-1000, 1000)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x0, y0 = draw(coordinates), draw(coordinates)
    return Box(x0, y0, x0 + draw(st.integers(0, 500)), y0 + draw(st.integers(0, 500)))


def _pixels(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box.x0, box.x1) for y in range(box.y0, box.y1)}


@given(boxes(), boxes())
def test_an_intersection_is_never_negative_and_commutes_in_size(a: Box, b: Box) -> None:
    both = a.intersect(b)
    assert both.width >= 0
    assert both.height >= 0
    assert both.area == b.intersect(a).area
    assert both.area <= min(a.area, b.area)


@given(*(st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), *[st.integers(0, 6)] * 4),) * 2)
def test_an_intersection_holds_the_pixels_of_both(a: Box, b: Box) -> None:
    assert _pixels(a.intersect(b)) == _pixels(a) & _pixels(b)


@given(boxes(), coordinates, coordinates)
def test_shifting_there_and_back_changes_nothing(box: Box, dx: int, dy: int) -> None:
    assert box.shift(dx, dy).shift(-dx, -dy) == box
    assert box.shift(dx, dy).size == box.size


@given(st.lists(boxes(), min_size=1, max_size=5))
def test_a_union_holds_every_box_and_no_smaller_one_does(many: list[Box]) -> None:
    whole = union(many)
    assert all(box.intersect(whole) == box for box in many)
    assert whole.x0 in {box.x0 for box in many}
    assert whole.y1 in {box.y1 for box in many}


def test_a_box_indexes_its_pixels() -> None:
    array = np.arange(20).reshape(4, 5)
    assert array[Box(11, 22, 13, 24).within((10, 20))].tolist() == [[11, 12], [16, 17]]


scales, offsets = st.floats(0.01, 100), st.floats(-1e5, 1e5)
points = st.lists(st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)), max_size=5)


@given(st.builds(Affine, scales, scales, offsets, offsets), points)
def test_the_affine_inverts_itself(affine: Affine, xy: list[tuple[float, float]]) -> None:
    px = np.array(xy, np.float64).reshape(-1, 2)
    np.testing.assert_allclose(affine.invert(affine.apply(px)), px, rtol=1e-9, atol=1e-5)
    np.testing.assert_allclose(affine.apply(affine.invert(px)), px, rtol=1e-9, atol=1e-5)


def test_the_affine_keeps_x_and_y_apart() -> None:
    assert Affine(2, 3, 10, 20).apply([[1, 1], [0, 2]]).tolist() == [[12, 23], [10, 26]]
