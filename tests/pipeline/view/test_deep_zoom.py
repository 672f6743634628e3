"""The tiles of a level, put together, are the slide."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.view.deep_zoom import TILE_PX, DeepZoom
from slides.slide import open_slide


def whole(picture: DeepZoom, level: int) -> np.ndarray:
    """All tiles of a level, side by side."""
    rows: list[np.ndarray] = []
    while True:
        tiles: list[np.ndarray] = []
        while (content := picture.tile(level, len(tiles), len(rows))) is not None:
            tiles.append(np.asarray(Image.open(BytesIO(content))))
        if not tiles:
            return np.concatenate(rows)
        rows.append(np.concatenate(tiles, 1))


def smooth(seed: int, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_every_level_is_the_slide_at_half_the_size_of_the_next(tmp_path: Path) -> None:
    smooth(0, 1203, 1400).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.25) as slide:
        picture = DeepZoom(slide)
        assert picture.levels == range(9, 12)
        finest = np.asarray(Image.open(tmp_path / "slide.png").convert("RGB")).astype(float)
        for level in picture.levels:
            shown = whole(picture, level).astype(float)
            ratio = 2 ** (picture.levels[-1] - level)
            assert shown.shape == (-(-1400 // ratio), -(-1203 // ratio), 3)
            centres = finest[ratio // 2 :: ratio, ratio // 2 :: ratio]
            assert np.abs(shown[: len(centres), : centres.shape[1]] - centres).mean() < 4
        assert max(whole(picture, picture.levels[0]).shape) <= TILE_PX


def test_tiles_that_do_not_exist(tmp_path: Path) -> None:
    smooth(0, 600, 560).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.25) as slide:
        picture = DeepZoom(slide)
        assert picture.tile(picture.levels[-1] + 1, 0, 0) is None
        assert picture.tile(picture.levels[0] - 1, 0, 0) is None
        assert picture.tile(picture.levels[-1], 2, 0) is None
        assert picture.tile(picture.levels[-1], 0, 10**30) is None


@pytest.mark.parametrize("size", [(1, 1), (511, 3), (512, 512), (513, 1)])
def test_small_slides(tmp_path: Path, size: tuple[int, int]) -> None:
    """A slide that fits into a tile has one level, and its finest level always has its own pixels."""
    Image.new("RGB", size, (200, 120, 160)).save(tmp_path / "slide.png")
    with open_slide(tmp_path / "slide.png", mpp=0.25) as slide:
        picture = DeepZoom(slide)
        assert whole(picture, picture.levels[-1]).shape == (*size[::-1], 3)
        assert len(picture.levels) == (2 if max(size) > TILE_PX else 1)


@pytest.mark.parametrize("name", ["mirax-sparse.mrxs", "leica-offset-region.scn"])
def test_the_picture_is_cropped_to_the_bounds(shared: Path, name: str) -> None:
    """And what is not stored there is white."""
    with open_slide(shared / "slides" / name) as slide:
        picture = DeepZoom(slide)
        assert picture.size == slide.bounds.size != slide.size
        shown = whole(picture, picture.levels[-1]).astype(float)
        frame = slide.frame(slide.scale.x)
        truth = slide.read_decodable(frame.box, frame)[0].astype(float)
        assert shown.shape == truth.shape
        assert np.abs(shown - truth).mean() < 3
