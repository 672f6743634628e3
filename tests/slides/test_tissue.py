"""Tissue is found, glass and ink are not; a tissue map is queried in work px."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from slides import tissue
from slides.geometry import Affine, Box, Frame, Size
from slides.phantom import draw
from slides.slide import open_slide
from slides.tissue import TissueMap, filled, tissue_mask, without_small

MPP = 8.0
EOSIN, HAEMATOXYLIN, PALE = (225, 140, 185), (120, 90, 150), (240, 222, 234)
BLUE_INK, GREEN_INK, RED_INK, BLACK_INK = (40, 60, 160), (30, 120, 60), (210, 30, 45), (35, 33, 36)


def _find(thumbnail: np.ndarray, margin_um: float = 0.0, min_area_um2: float = 5000.0) -> np.ndarray:
    return tissue_mask(thumbnail, MPP, min_area_um2=min_area_um2, margin_um=margin_um)


def _map(mask: np.ndarray, mpp: float, work_mpp: float) -> TissueMap:
    """A slide of 0.25 um per px whose thumbnail at `mpp` the mask covers."""
    height, width = mask.shape
    ratio = mpp / work_mpp
    return TissueMap(
        mask,
        Frame(Size(width, height), mpp, Affine(mpp / 0.25, mpp / 0.25, 0, 0)),
        Frame(Size(int(width * ratio), int(height * ratio)), work_mpp, Affine(work_mpp / 0.25, work_mpp / 0.25, 0, 0)),
    )


def _glass(colour: tuple[int, int, int] = (243, 243, 244), seed: int = 0) -> np.ndarray:
    """Noisy glass, uint8 (150, 200, 3)."""
    noise = np.random.default_rng(seed).normal(0, 2, (150, 200, 3))
    return np.clip(noise + colour, 0, 255).astype(np.uint8)


def _with(thumbnail: np.ndarray, colour: tuple[int, int, int], place: tuple[slice, slice]) -> np.ndarray:
    painted = thumbnail.copy()
    painted[place] = np.clip(thumbnail[place].astype(int) - 243 + colour, 0, 255)
    return painted


MIDDLE = (slice(40, 100), slice(60, 140))
CORNER = (slice(5, 25), slice(10, 180))


@given(st.sampled_from([EOSIN, HAEMATOXYLIN, PALE]), st.integers(0, 50), st.integers(150, 255))
def test_stained_tissue_is_found_on_any_grey_glass(colour: tuple[int, int, int], seed: int, grey: int) -> None:
    """Dimmer light dims tissue and glass alike: the mask is the painted rectangle, give or take a pixel."""
    bright = _with(_glass(seed=seed), colour, MIDDLE)
    mask = _find((bright * (grey / 255)).astype(np.uint8))
    truth = np.zeros(mask.shape, bool)
    truth[MIDDLE] = True
    assert (mask | ~ndimage.binary_erosion(truth, iterations=2)).all()
    assert not (mask & ~ndimage.binary_dilation(truth, iterations=2)).any()


@given(st.integers(0, 50), st.integers(60, 250))
def test_empty_glass_and_black_hold_no_tissue(seed: int, grey: int) -> None:
    assert not _find(_glass((grey, grey, grey), seed)).any()
    assert not _find(np.zeros((40, 50, 3), np.uint8)).any()
    assert not _find(np.full((40, 50, 3), 255, np.uint8)).any()


def test_uneven_glass_is_no_tissue() -> None:
    shade = np.linspace(0.55, 1, 200)[None, :, None]
    mask = _find((_with(_glass(), EOSIN, MIDDLE) * shade).astype(np.uint8))
    assert mask[MIDDLE].mean() > 0.95
    mask[35:105, 55:145] = False
    assert not mask.any()


@pytest.mark.parametrize("ink", [BLUE_INK, GREEN_INK, RED_INK, BLACK_INK, (0, 0, 0)])
def test_ink_and_black_borders_are_no_tissue(ink: tuple[int, int, int]) -> None:
    """Whatever the ink, its soft rim included; tissue elsewhere is found as without it."""
    clean = _with(_glass(), EOSIN, MIDDLE)
    inked = clean.copy()
    inked[CORNER] = ink
    soft = ndimage.gaussian_filter(inked.astype(float), (0.8, 0.8, 0)).astype(np.uint8)
    mask = _find(soft)
    assert not mask[:32].any()
    assert mask[MIDDLE].mean() > 0.95


def test_ink_across_tissue_is_no_tissue_whatever_is_filled_and_grown() -> None:
    """A stroke is narrower than the holes that are filled, and than what the margin closes."""
    stroke = slice(62, 76), slice(80, 110)  # 26,880 um2
    inked = _with(_glass(), EOSIN, MIDDLE)
    inked[stroke] = BLUE_INK
    for margin_um in (0.0, 40.0):
        mask = _find(inked, margin_um)
        assert not mask[67:71, 84:106].any()
        assert mask[42:50, 62:138].all()
        assert mask[90:98, 62:138].all()


@pytest.mark.parametrize(
    "colour",
    [(60, 30, 80), (200, 60, 120), (150, 60, 60), (235, 170, 175)],
    ids=["dense haematoxylin", "dense eosin", "pigment", "pale and red"],
)
def test_a_dense_or_reddish_stain_is_no_ink(colour: tuple[int, int, int]) -> None:
    """Black ink is grey; red ink spares red, absorbs blue as much as green, and is dense."""
    assert _find(_with(_glass(), colour, MIDDLE))[MIDDLE].mean() > 0.95


@pytest.mark.parametrize("colour", [(236, 243, 244), (150, 150, 151)], ids=["a faint tint", "dust"])
def test_glass_that_is_not_clean_is_no_ink(colour: tuple[int, int, int]) -> None:
    """From the tissue beside ink its blurred edge is taken, 24 um: here from row 97 on."""
    tissue = _with(_glass(), EOSIN, MIDDLE)
    soiled = _with(tissue, colour, (slice(100, 150), slice(0, 200)))
    assert np.array_equal(_find(soiled)[:99], _find(tissue)[:99])


@pytest.mark.parametrize(("ink", "small", "large"), [(BLUE_INK, 12, 16), (BLACK_INK, 10, 13), (RED_INK, 25, 30)])
def test_what_is_smaller_than_a_stroke_is_part_of_the_tissue(ink: tuple[int, int, int], small: int, large: int) -> None:
    """Pigment, a fold, or blood if it is red: 6,000 and 40,000 um2 are squares of 9.7 and 25 px in blurred edges."""
    for side, kept in ((small, True), (large, False)):
        spotted = _with(_glass(), EOSIN, MIDDLE)
        spot = slice(60, 60 + side), slice(90, 90 + side)
        spotted[spot] = ink
        assert _find(spotted)[spot].all() == kept
        assert _find(spotted)[spot].any() == kept


def test_on_a_grey_slide_tissue_is_what_varies() -> None:
    """Stain is not to be seen there: glass does not vary within 40 um, however uneven its light."""
    noise = ndimage.gaussian_filter(np.random.default_rng(2).normal(0, 100, (150, 200)), 1)
    slide = np.broadcast_to(np.linspace(250, 200, 200), (150, 200)).copy()
    slide[MIDDLE] += noise[MIDDLE] - 40
    mask = _find(np.clip(slide, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2))
    assert mask[MIDDLE].mean() > 0.95
    mask[36:104, 56:144] = False
    assert not mask.any()


def test_a_picture_without_glass_is_all_tissue() -> None:
    noise = np.random.default_rng(1).normal(0, 6, (80, 90, 3))
    assert _find(np.clip(noise + EOSIN, 0, 255).astype(np.uint8)).all()


def test_specks_go_holes_are_filled_and_the_margin_is_added() -> None:
    thumbnail = _with(_glass(), EOSIN, MIDDLE)
    thumbnail = _with(thumbnail, HAEMATOXYLIN, (slice(120, 125), slice(20, 25)))  # 1600 um2
    thumbnail[60:80, 90:110] = 243  # 25,600 um2
    mask = _find(thumbnail)
    assert not mask[115:130].any()
    assert mask[60:80, 90:110].all()
    assert _find(thumbnail, min_area_um2=500)[120:125, 20:25].any()
    grown = _find(thumbnail, margin_um=40)
    assert grown[40 - 4 : 100 + 4, 60 - 4 : 140 + 4].mean() > 0.98
    assert not grown[:32].any()
    large = _with(_glass(), EOSIN, (slice(5, 145), slice(5, 195)))
    large[40:100, 60:140] = 243  # 0.3 mm2
    assert not _find(large)[50:90, 70:130].any()


def test_a_bigger_margin_never_takes_tissue_away() -> None:
    thumbnail = _with(_glass(), EOSIN, MIDDLE)
    masks = [_find(thumbnail, margin) for margin in (0, 16, 50)]
    assert all((small <= big).all() for small, big in pairwise(masks))


def test_an_empty_thumbnail() -> None:
    assert _find(np.zeros((0, 10, 3), np.uint8)).shape == (0, 10)


def test_the_phantoms_nuclei_are_in_and_its_pen_is_out() -> None:
    phantom = draw(Size(1600, 1200), 5)
    thumbnail = phantom.image.reshape(75, 16, 100, 16, 3).mean((1, 3)).astype(np.uint8)
    mask = tissue_mask(thumbnail, 4.0, min_area_um2=5000, margin_um=16)
    tissue = _map(mask, 4.0, 0.25)
    centres = np.array([polygon.mean(axis=0) for polygon in phantom.polygons])
    assert tissue.contains(centres).all()
    assert mask.mean() < 0.9
    assert not mask[-6:, -6:].any()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", 0.4, 0.6),
        ("leica-offset-region.scn", 0.4, 0.6),
        ("mirax-sparse.mrxs", 0.4, 0.65),
        ("philips.tiff", 0.4, 0.6),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.6, 0.8),
    ],
)
def test_shared_slides_show_the_tissue_one_sees(shared: Path, name: str, low: float, high: float) -> None:
    with open_slide(shared / "slides" / name, mpp=0.5) as slide:
        assert low < tissue_mask(slide.thumbnail(slide.frame(8)), 8.0, min_area_um2=10_000, margin_um=32).mean() < high


# TissueMap


def test_a_map_is_queried_in_work_pixels() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True  # work px 64..96 x 32..64 at mpp 0.25
    tissue = _map(mask, 8.0, 0.25)
    points = [(64, 32), (95.9, 63.9), (96, 40), (63.9, 40), (-1, -1), (1e6, 40)]
    assert tissue.contains(points).tolist() == [True, True, False, False, False, False]
    assert tissue.area_mm2 == pytest.approx(64e-6)
    assert tissue.any_in(Box(95, 63, 200, 200))
    assert not tissue.any_in(Box(96, 0, 200, 200))
    assert not tissue.any_in(Box(70, 40, 70, 50))
    assert not tissue.any_in(Box(-50, -50, -10, -10))
    assert tissue.contains(np.zeros((0, 2))).shape == (0,)
    assert tissue.bounds_in(Box(0, 0, 500, 500)) == (64, 32, 96, 64)
    assert tissue.bounds_in(Box(70, -9, 80, 40)) == (70, 32, 80, 40)
    assert tissue.bounds_in(Box(96, 0, 200, 200)).area == tissue.bounds_in(Box(70, 40, 70, 50)).area == 0


def test_boxes_beside_the_mask_hold_no_tissue() -> None:
    tissue = _map(np.ones((3, 4), bool), 8.0, 0.25)  # 128 x 96 work px
    for x, y in ((-100, 20), (50, -80), (-21, -80), (128, 20), (50, 96)):
        box = Box(x, y, x + 20, y + 15)
        assert not tissue.any_in(box)
        assert tissue.bounds_in(box).area == 0
        assert not tissue.contains((box.corner, (box.x1 - 1, box.y1 - 1))).any()


def test_pieces_and_holes_are_kept_or_not_by_their_pixels() -> None:
    """Pieces touch by corners, too, holes by sides; what is open to the picture's edge is no hole."""
    mask = np.ones((7, 9), bool)
    for y, x in ((1, 1), (1, 2), (2, 3), (3, 8), (5, 5), (5, 6), (5, 7)):
        mask[y, x] = False
    for area_px, left in ((2, 6), (3, 4), (100, 1)):
        assert np.count_nonzero(~filled(mask, area_px)) == left
        assert not filled(mask, area_px)[3, 8]
    for area_px, left in ((3, 6), (4, 0)):
        assert np.count_nonzero(without_small(~mask, area_px)) == left


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 3))
def test_a_box_has_tissue_where_one_of_its_points_has(seed: int, work_mpp: float) -> None:
    """Law: the bounds of the tissue in a box hold every point of it there, and no row or column too many."""
    rng = np.random.default_rng(seed)
    tissue = _map(rng.random((9, 11)) < 0.1, 2.0, work_mpp)
    x, y, width, height = rng.integers(0, 20, 4)
    box = Box(int(x), int(y), int(x + width), int(y + height))
    centres = [(i + 0.5, j + 0.5) for j in range(box.y0, box.y1) for i in range(box.x0, box.x1)]
    on_tissue = np.reshape(centres, (-1, 2))[tissue.contains(np.reshape(centres, (-1, 2)))]
    bounds = tissue.bounds_in(box)
    assert bounds.intersect(box) == bounds
    if len(on_tissue):
        assert tissue.any_in(box)
        assert (on_tissue > bounds[:2]).all()
        assert (on_tissue < bounds[2:]).all()
        for x, y in ((bounds.x0, bounds.y0), (bounds.x1 - 1, bounds.y1 - 1)):
            assert tissue.any_in(Box(x, bounds.y0, x + 1, bounds.y1))
            assert tissue.any_in(Box(bounds.x0, y, bounds.x1, y + 1))


@pytest.mark.parametrize("pixels", [1, 500, 7000])
@pytest.mark.parametrize("margin_um", [0.0, 7.9, 8.0, 50.0, 300.0])
def test_the_mask_does_not_depend_on_the_strips_it_is_made_in(
    pixels: int, margin_um: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the same mask, row by row or in one go; with ink, holes, and pieces that are too small."""
    rng = np.random.default_rng(0)
    thumbnail = _glass()
    for colour in (EOSIN, HAEMATOXYLIN, BLUE_INK, RED_INK) * 3:
        y, x, side = *rng.integers(0, 150, 2), rng.integers(2, 40)
        thumbnail = _with(thumbnail, colour, (slice(y, y + side), slice(x, x + side)))
    expected = _find(thumbnail, margin_um)
    assert 0.05 < expected.mean() < 0.95
    monkeypatch.setattr(tissue, "_STRIP_PX", pixels)
    assert np.array_equal(_find(thumbnail, margin_um), expected)
