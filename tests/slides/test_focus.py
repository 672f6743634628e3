"""Blur is found on slides of several scanners, and how sharp a slide is does not depend on the tiling."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from drawn_artefacts import compressed, picture
from slides import focus
from slides.geometry import Box, Size
from slides.grid import TileGrid

SIZE = Size(611, 457)
NOISE = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3)).astype(np.uint8)


def measured(image: np.ndarray, grid: TileGrid) -> focus.Focus:
    """The sums over all blocks of a grid, as a run adds them up: through JSON, block by block."""
    parts, whole = [], Box(0, 0, *grid.size)
    for block in range(grid.blocks):
        tiles = grid.tiles_of(block)
        patches = np.full((len(tiles), grid.tile, grid.tile, 3), 255, np.uint8)
        for patch, tile in zip(patches, tiles, strict=True):
            inside = tile.read.intersect(whole)
            patch[inside.within((tile.read.x0, tile.read.y0))] = image[inside.within((0, 0))]
        part = focus.measure(patches, tiles, grid.size, 0.25)
        parts.append(focus.from_json(focus.to_json(part)))
    return focus.add(parts)


WHOLE = measured(NOISE, TileGrid(SIZE, 736, 32, 1))


@given(st.sampled_from([64, 96, 128, 256, 320]), st.integers(8, 30), st.integers(1, 4))
@settings(max_examples=15)
def test_sums_do_not_depend_on_the_tiling(tile: int, margin: int, block: int) -> None:
    """Law: whatever the tile, margin and block, the sums are the same to the last bit."""
    again = measured(NOISE, TileGrid(SIZE, tile, margin, block))
    assert again.corner == WHOLE.corner
    assert (again.sums == WHOLE.sums).all()


def test_every_pixel_pair_counts_once() -> None:
    assert WHOLE.sums[..., 0].sum() == (SIZE.width // 2) * (SIZE.height // 2)
    even = NOISE[: SIZE.height // 2 * 2, : SIZE.width // 2 * 2, 1]
    assert WHOLE.sums[..., 1].sum() == even.sum(dtype=np.int64)


def test_the_sums_are_those_of_squared_laplacians_at_two_scales() -> None:
    """As scipy computes them: pixels of 2 x 2 work px, the coarser ones smoothed by 1 2 1; none at the slide's edge."""
    green = NOISE[: SIZE.height // 2 * 2, : SIZE.width // 2 * 2, 1].astype(np.int64)
    grey = green[::2, ::2] + green[1::2, ::2] + green[::2, 1::2] + green[1::2, 1::2]
    smooth = ndimage.correlate(grey, np.outer([1, 2, 1], [1, 2, 1])) // 16
    beside, apart = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]), np.zeros((5, 5), int)
    apart[::2, ::2] = beside
    measures = np.zeros((4, *grey.shape), np.int64)
    measures[:2] = np.ones_like(grey), grey
    inner = slice(3, -3), slice(3, -3)
    for squares, image, laplacian in zip(measures[2:], (grey, smooth), (beside, apart), strict=True):
        squares[inner] = (ndimage.correlate(image, laplacian) ** 2)[inner]
    assert focus.cell_px(0.25) == 256
    rows, columns = (range(0, side, 128) for side in grey.shape)
    expected = [[measures[:, y : y + 128, x : x + 128].sum((1, 2)) for x in columns] for y in rows]
    assert WHOLE.corner == (0, 0)
    assert np.array_equal(WHOLE.sums, expected)


def test_a_small_margin_counts_every_pixel_and_adds_no_structure() -> None:
    """The Laplacians reach beyond what is read; an odd margin begins within a pair of pixels."""
    grid = TileGrid(SIZE, 96, 3, 2)
    assert np.array_equal(measured(NOISE, grid).sums[..., :2], WHOLE.sums[..., :2])
    even = np.full((SIZE.height, SIZE.width, 3), 128, np.uint8)
    assert not measured(even, grid).sums[..., 2:].any()


def test_a_core_of_one_row_or_column_has_no_pairs() -> None:
    image, size = NOISE[:129, :129], Size(129, 129)
    whole, tiled = (measured(image, TileGrid(size, tile, margin, 1)) for tile, margin in ((192, 16), (96, 16)))
    assert np.array_equal(tiled.sums, whole.sums)
    assert whole.sums[..., 0].sum() == 64**2


def test_a_cell_is_two_pixels_at_least() -> None:
    assert [focus.cell_px(mpp) for mpp in (0.25, 0.5, 1.3, 200.0)] == [256, 128, 50, 2]


def test_no_tiles_have_no_sums() -> None:
    nothing = focus.measure(np.zeros((0, 64, 64, 3), np.uint8), (), SIZE, 0.25)
    again = focus.from_json(focus.to_json(nothing))
    assert focus.add([nothing, again]).sums.shape == (0, 0, 4)
    tile = TileGrid(Size(600, 600), 128, 16, 1).tile_at(6, 0)
    assert tile.core.corner == (0, 576)
    part = focus.measure(np.full((1, 128, 128, 3), 200, np.uint8), (tile,), Size(600, 600), 0.25)
    assert focus.add([nothing, part, again]).corner == part.corner == (0, 2)
    assert not focus.blurred(nothing.sums, 243.0, 0.25).any()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "philips.tiff"])
def test_blur_of_three_widths_is_found_on_three_scanners_slides(shared: Path, name: str) -> None:
    """Half of a region is blurred, by Gaussians as a defocused lens and with the noise of a camera.

    Of its cells that hold tissue .5 to .6 were found at 1 um, .76 to .87 at 2 um, all at 4 um; of sharp ones none.
    """
    image = picture(shared / "slides", name, 0.5)[1024:2560, 256:1792]
    noise = np.random.default_rng(1).normal(0, 1.5, image.shape)
    for sigma_um, share in ((1.0, 0.35), (2.0, 0.65), (4.0, 0.9)):
        blurry = ndimage.gaussian_filter(image.astype(float), (sigma_um / 0.5, sigma_um / 0.5, 0)) + noise
        half = image.copy()
        half[:768] = np.clip(blurry, 0, 255).astype(np.uint8)[:768]
        large = np.asarray(Image.fromarray(compressed(half, 85)).resize((3072, 3072), Image.Resampling.BICUBIC))
        sums = measured(large, TileGrid(Size(3072, 3072), 1024, 128, 2)).sums
        found = focus.blurred(sums, 243.0, 0.25)
        dark = 243 - sums[..., 1] / sums[..., 0] / 4 > 40
        assert found[:6][dark[:6]].mean() > share
        assert found[6:][dark[6:]].mean() < 0.02


def test_what_has_no_structure_is_blurred_and_noise_is_not() -> None:
    """To the edge of the slide; but for glass, and a cell of which most lies beyond the edge."""
    grid = TileGrid(Size(900, 900), 256, 32, 2)
    expected = np.ones((4, 4), bool)
    expected[3, 3] = False
    assert np.array_equal(focus.blurred(measured(flat(128), grid).sums, 243.0, 0.25), expected)
    assert not focus.blurred(measured(flat(243), grid).sums, 243.0, 0.25).any()
    assert not focus.blurred(WHOLE.sums, 243.0, 0.25).any()


def cells(sharpness: list[float], fine_to_coarse: list[float], darkness: float = 50.0) -> np.ndarray:
    """The sums of a row of whole cells at 0.25 um per px, on glass of 243."""
    count = 128**2
    coarse = (np.array(sharpness) * darkness) ** 2 * count
    fine = np.array(fine_to_coarse) ** 2 * coarse
    grey = np.full(len(sharpness), 4 * (243.0 - darkness) * count)
    return np.stack([np.full(len(sharpness), count), grey, fine, coarse], axis=-1)[None].round().astype(np.int64)


def test_a_cell_is_blurred_by_its_sharpness_in_that_of_the_slide() -> None:
    """Below .15 of it; below .35 where the finer scale has less than .41 of the coarser. Paler cells are not judged."""
    sharp, of_its_own = [2.0] * 6, [0.14, 0.16, 0.34, 0.34, 0.36]
    ratios = [*[0.5] * 6, 0.5, 0.5, 0.4, 0.42, 0.4]
    sums = cells([*sharp, *(2.0 * each for each in of_its_own)], ratios)
    expected = [False] * 6 + [True, False, True, False, False]
    assert focus.blurred(sums, 243.0, 0.25)[0].tolist() == expected
    pale = [cells([sharpness] * 11, [0.5] * 11, 14.0) for sharpness in (0.0, 9.0, 9.0)]
    assert np.array_equal(focus.blurred(np.concatenate([sums, *pale]), 243.0, 0.25), [expected, *[[False] * 11] * 3])
    assert focus.blurred(cells([0.14, 0.16], [0.5] * 2, 16.0), 243.0, 0.25)[0].tolist() == [True, False]


def flat(grey: int) -> np.ndarray:
    return np.full((900, 900, 3), grey, np.uint8)
