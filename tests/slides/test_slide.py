"""Slides of all sorts: scale, frames, pixels, damage."""

import errno
import io
import math
import pickle
import shutil
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from slides import stored
from slides.errors import (
    RegionUnreadable,
    ScaleUnknown,
    SlideError,
    SlideNotFound,
    SlideTooLarge,
    SlideUnreadable,
    SlideUnsupported,
)
from slides.geometry import Affine, Box, Size
from slides.opening import _bits, _directory_beyond, stated_tile
from slides.scale import FORCED, GivenScale, find_scale
from slides.slide import Slide, _bounds, _file_hash, _needs_no_filter, _shows_the_same, open_slide

Writer = Callable[..., Path]
WIDTH, HEIGHT = 613, 467  # neither is a multiple of anything, so pyramids have fractional downsamples


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth noise with some edges, uint8 (467, 613, 3)."""
    noise = np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    image: np.ndarray = np.clip(128 + smooth / smooth.std() * 50, 0, 255).astype(np.uint8)
    image[100:200, 150:300] = (200, 120, 180)
    return image


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Writer:
    """Write the picture as a tiled pyramid. mpp None: no resolution tags; along y it is `aspect` times as large."""
    folder = tmp_path_factory.mktemp("pyramids")

    def make(name: str, mpp: float | None, factors: tuple[int, ...] = (1, 2, 4), aspect: float = 1.0) -> Path:
        path = folder / name
        with tifffile.TiffWriter(path) as tiff:
            for factor in factors:
                level = picture[: HEIGHT // factor * factor, : WIDTH // factor * factor]
                level = level.reshape(HEIGHT // factor, factor, WIDTH // factor, factor, 3).mean((1, 3))
                per_cm = None if mpp is None else (1e4 / mpp / factor, 1e4 / mpp / factor / aspect)
                tiff.write(
                    level.astype(np.uint8),
                    tile=(128, 128),
                    photometric="rgb",
                    compression="adobe_deflate",
                    subfiletype=int(factor > 1),
                    metadata=None,
                    resolution=per_cm,
                    resolutionunit=3,
                )
        return path

    return make


@pytest.fixture(scope="module")
def slide(pyramid: Writer) -> Slide:
    return open_slide(pyramid("plain.tif", 0.5))


# Laws


@given(data=st.data(), mpp=st.sampled_from([0.31, 0.5, 0.77, 1.0, 1.03, 2.1, 4.0]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pixels_do_not_depend_on_the_box(slide: Slide, data: st.DataObject, mpp: float) -> None:
    """A part read on its own is, bit for bit, a part of the whole; white outside."""
    frame = slide.frame(mpp)
    size = frame.size
    x0 = data.draw(st.integers(-30, size.width), "x0")
    y0 = data.draw(st.integers(-30, size.height), "y0")
    box = Box(x0, y0, x0 + data.draw(st.integers(0, 200), "w"), y0 + data.draw(st.integers(0, 200), "h"))
    pixels = slide.read(box, frame)
    inside = box.intersect(frame.box)
    expected = np.full((box.height, box.width, 3), 255, np.uint8)
    if inside.area:
        expected[inside.within((x0, y0))] = slide.read(frame.box, frame)[inside.within((0, 0))]
    assert np.array_equal(pixels, expected)
    again, lost = slide.read_decodable(box, frame)
    assert np.array_equal(again, pixels)
    assert not lost.any()


def test_the_chunks_in_which_a_level_is_read_do_not_show(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where its downsample is fractional, and OpenSlide shifts what it reads by a part of a pixel.

    However large the box, OpenSlide is asked for a chunk at a time: more would fill the memory.
    """
    monkeypatch.setattr(stored, "CHUNK", 200)
    pixels, asked, from_openslide = stored.StoredPixels(slide.path), list[Box](), stored.StoredPixels._from_openslide

    def watched(self: stored.StoredPixels, level: int, box: Box) -> stored.Pixels:
        asked.append(box)
        return from_openslide(self, level, box)

    monkeypatch.setattr(stored.StoredPixels, "_from_openslide", watched)
    for level, (size, _) in enumerate(pixels.levels[:2]):
        whole, _ = pixels.read(level, Box(0, 0, *size), strict=True)
        for x, y in ((1, 2), (100, 150), (250, 0)):
            part, _ = pixels.read(level, Box(x, y, *size), strict=True)
            assert np.array_equal(part, whole[y:, x:])
    assert max(max(box.size) for box in asked) == 200


@pytest.mark.parametrize("tile", [(4096, 64), (64, 4096), (16, 16)])
def test_tiles_of_any_shape_are_read(tmp_path: Path, picture: np.ndarray, tile: tuple[int, int]) -> None:
    """Also those that are longer than what is read at a time."""
    tifffile.imwrite(tmp_path / "x.tif", picture, tile=tile, photometric="rgb", compression="adobe_deflate")
    with open_slide(tmp_path / "x.tif", mpp=0.25) as slide:
        assert slide.vendor == "generic-tiff"
        assert np.array_equal(slide.read(Box(0, 0, WIDTH, HEIGHT), slide.frame(0.25)), picture)


def test_level_0_comes_back_unchanged(slide: Slide, picture: np.ndarray) -> None:
    assert np.array_equal(slide.read(Box(0, 0, WIDTH, HEIGHT), slide.frame(slide.scale.x)), picture)


@pytest.mark.parametrize(
    ("mpp", "aspect"), [(0.25, 1.0), (0.5, 1.0), (0.8, 1.0), (2.0, 1.0), (3.7, 1.0), (0.5, 1.019), (0.8, 0.982)]
)
def test_points_of_a_frame_lie_where_the_affine_says(pyramid: Writer, mpp: float, aspect: float) -> None:
    """A disc's centre of mass, found in px of the frame, is its centre on the slide: no half pixel is lost.

    Pixels of the frame are square, also where those of the slide are not: along y, `aspect` times as large as along x.
    """
    path = pyramid("plain.tif", 0.5).with_name("disc.tif")
    y, x = np.mgrid[:600, :800] + 0.5
    disc = (255 * (np.hypot(x - 321.3, y - 222.6) > 60)).astype(np.uint8)[..., None].repeat(3, axis=2)
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 2, 4):
            level = disc.reshape(600 // factor, factor, 800 // factor, factor, 3).mean((1, 3))
            tiff.write(
                level.astype(np.uint8),
                tile=(128, 128),
                photometric="rgb",
                subfiletype=int(factor > 1),
                metadata=None,
                resolution=(20000, 20000 / aspect),
                resolutionunit=3,
            )
    with open_slide(path) as slide:
        frame = slide.frame(mpp)
        dark = 255.0 - slide.read(frame.box, frame)[..., 0]
    row, col = ndimage.center_of_mass(dark)
    centre = frame.to_slide.apply((col + 0.5, row + 0.5))
    np.testing.assert_allclose(centre, (321.3, 222.6), atol=0.1)
    down, across = (
        np.sqrt(np.average((at - mean) ** 2, weights=dark))
        for at, mean in zip(np.indices(dark.shape), (row, col), strict=True)
    )
    assert down / across == pytest.approx(aspect, abs=0.003)
    beyond = frame.to_slide.apply(frame.size) - slide.size
    assert (beyond > -1e-3).all(), "the frame covers the slide"
    assert (beyond < frame.to_slide[:2]).all(), "no row or column of it lies beyond the slide"


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.7, 1.0, 2.0, 6.0])
def test_for_display_the_pixels_are_nearly_those_that_are_measured(slide: Slide, mpp: float) -> None:
    """Also in boxes that hang over the frame, or lie outside it."""
    frame = slide.frame(mpp)
    width, height = frame.size
    for box in (frame.box, Box(-9, -7, width // 3, height // 2), Box(width // 2, 3, width + 9, height + 9)):
        shown = slide.read_for_display(box, frame).astype(int)
        measured = slide.read(box, frame).astype(int)
        assert shown.shape == measured.shape
        # where the filter is less exact or a part of a pixel off, edges differ
        assert np.abs(shown - measured).mean() < 4
    assert (slide.read_for_display(Box(width, 0, width + 5, 5), frame) == 255).all()


def test_for_display_of_very_many_stored_pixels(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in parts, as for measuring, and memory stays bounded."""
    frame = slide.frame(2.0)
    monkeypatch.setattr("slides.slide._MOST_FOR_DISPLAY_PX", 100)
    assert (slide.read_for_display(frame.box, frame) == slide.read_decodable(frame.box, frame)[0]).all()


def test_a_frame_has_no_column_for_the_rounding_of_a_division(tmp_path: Path) -> None:
    """0.3 / 0.1 is a little less than 3."""
    Image.new("RGB", (600, 300)).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", mpp=0.1) as slide:
        assert slide.frame(0.3).size == (200, 100)
        assert slide.frame(0.299).size == (201, 101)


def test_downsampling_is_antialiased(tmp_path: Path) -> None:
    """A fine checkerboard becomes grey, not black or white, also without a pyramid."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    Image.fromarray(board).save(tmp_path / "board.png")
    with open_slide(tmp_path / "board.png", mpp=0.25) as slide:
        # The last pixels hang over the picture, whose edge is continued: no checkerboard there.
        assert np.abs(slide.thumbnail(slide.frame(1.9))[:-3, :-3].astype(int) - 127).max() <= 6


@pytest.mark.parametrize("mpp", [0.2, 0.4, 0.5, 1.25])
def test_the_cells_in_which_a_frame_is_resampled_do_not_show(tmp_path: Path, mpp: float) -> None:
    """It is what Pillow makes of the whole picture at once, but at the slide's edge, and for rounding.

    Pillow rounds twice, after columns and rows, and its weights' last bits depend on where it starts: what is off by 1
    after the columns may be off by 2 in the end. Without the filter's reach the edges of cells differ by 9 to 20.
    """
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (800, 1000, 3), np.uint8))
    noise.save(tmp_path / "noise.png")
    with open_slide(tmp_path / "noise.png", mpp=0.25) as slide:
        frame = slide.frame(mpp)
        assert max(frame.size) > 128, "several cells"
        pixels = slide.read(frame.box, frame).astype(int)
    whole = np.asarray(noise.resize(frame.size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels - whole)[4:-4, 4:-4].max() <= 2


def test_a_coarse_frame_is_made_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stored pixels it is made of, they are not held at once."""
    Image.new("RGB", (1600, 1200)).save(tmp_path / "x.png")
    boxes, read = list[Box](), stored.StoredPixels.read

    def watched(self: stored.StoredPixels, level: int, box: Box, *, strict: bool) -> Any:
        boxes.append(box)
        return read(self, level, box, strict=strict)

    monkeypatch.setattr("slides.slide.CHUNK", 256)
    monkeypatch.setattr(stored.StoredPixels, "read", watched)
    with open_slide(tmp_path / "x.png", mpp=0.25) as slide:
        for mpp in (0.2, 0.5, 2.0):
            boxes.clear()
            frame = slide.frame(mpp)
            slide.read(frame.box, frame)
            reach = 3 * math.ceil(max(1, mpp / 0.25)) + 1  # of the filter, on either side
            assert max(max(box.size) for box in boxes) <= 256 + 2 * reach


def test_a_slide_is_known_by_openslide_s_hash_and_a_picture_by_its_content(slide: Slide, tmp_path: Path) -> None:
    with openslide.OpenSlide(slide.path) as handle:
        assert slide.quick_hash == handle.properties["openslide.quickhash-1"]
    hashes = []
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        hashes.append(open_slide(tmp_path / f"{name}.png", mpp=0.25).quick_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_slide_survives_pickling_threads_and_processes(slide: Slide) -> None:
    box, frame = Box(50, 60, 250, 200), slide.frame(0.5)
    expected = slide.read(box, frame)
    copy = pickle.loads(pickle.dumps(slide))
    assert (copy.path, copy.scale, copy.bounds) == (slide.path, slide.scale, slide.bounds)
    assert np.array_equal(copy.read(box, frame), expected)

    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(slide.read(box, frame))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(pixels, expected) for pixels in found)

    context = get_context("spawn")
    with context.Pool(1) as pool:
        assert np.array_equal(pool.apply(slide.read, (box, frame)), expected)


def test_a_closed_slide_opens_again_on_the_next_read(slide: Slide) -> None:
    frame = slide.frame(0.5)
    before = slide.read(Box(0, 0, 20, 20), frame)
    slide.close()
    assert np.array_equal(slide.read(Box(0, 0, 20, 20), frame), before)


# Scale


def test_scale_from_the_tiff_resolution(slide: Slide) -> None:
    assert slide.scale.source == "tiff resolution"
    assert slide.scale.x == pytest.approx(0.5, rel=1e-6)
    assert slide.vendor == "generic-tiff"
    assert slide.frame(0.25).size == Size(2 * WIDTH, 2 * HEIGHT)


@pytest.mark.parametrize("mpp", [None, 1000.0, 0.01])
def test_an_unbelievable_scale_is_refused_with_the_remedy(pyramid: Writer, mpp: float | None) -> None:
    path = pyramid(f"scale-{mpp}.tif", mpp)
    with pytest.raises(ScaleUnknown, match=r"scale-.*pass --mpp"):
        open_slide(path)
    assert open_slide(path, mpp=0.4, mpp_source="manifest").scale == (0.4, 0.4, "manifest")
    assert open_slide(path, default_mpp=0.4).scale == (0.4, 0.4, "default by --mpp")


def test_what_is_given_for_a_slide_goes_before_what_it_states_and_a_default_after(pyramid: Writer) -> None:
    path = pyramid("plain.tif", 0.5)
    assert open_slide(path, mpp=0.26).scale == (0.26, 0.26, "given")
    assert open_slide(path, mpp=0.26, mpp_source=FORCED, default_mpp=1.0).scale == (0.26, 0.26, FORCED)
    assert open_slide(path, default_mpp=1.0).scale == open_slide(path).scale
    copy = pickle.loads(pickle.dumps(open_slide(path, mpp=0.26, mpp_source="manifest")))
    assert copy.scale == (0.26, 0.26, "manifest")


@pytest.mark.parametrize("mpp", [250, 0, -1, float("nan"), 1e9, 0.049, 5.1, True])
def test_what_is_given_is_checked(pyramid: Writer, mpp: float) -> None:
    path = pyramid("plain.tif", 0.5)
    for scale in (GivenScale(mpp=mpp), GivenScale(default_mpp=mpp)):
        with pytest.raises(ScaleUnknown, match=r"mpp=.* for .*plain\.tif: need 0.05 to 5"):
            open_slide(path, **scale._asdict())


@pytest.mark.parametrize("stated", [("0.5", "nan"), ("nan", "0.5"), ("0.5", "1000")])
def test_a_scale_that_is_believable_along_one_axis_only_is_unknown(stated: tuple[str, str]) -> None:
    properties = dict(zip(("openslide.mpp-x", "openslide.mpp-y"), stated, strict=True))
    with pytest.raises(ScaleUnknown, match=r"states (nan|1000) um/px, not between 0\.05 and 5: pass --mpp"):
        find_scale(Path("slide.svs"), properties, GivenScale())


@pytest.mark.parametrize("aspect", [0.5, 0.97, 1.03])
def test_oblong_pixels_are_refused_with_the_remedy(pyramid: Writer, aspect: float) -> None:
    """Also where there is a default: the slide is not silent, it contradicts itself."""
    path = pyramid(f"oblong-{aspect}.tif", 0.5, aspect=aspect)
    for default in (None, 0.5):
        with pytest.raises(
            ScaleUnknown, match=r"oblong.* states 0\.5 x .* need square pixels, within 2 %.*--force-mpp"
        ):
            open_slide(path, default_mpp=default)
    assert open_slide(path, mpp=0.5).scale == (0.5, 0.5, "given")


def test_nearly_square_pixels_are_taken_as_stated(pyramid: Writer) -> None:
    scale = open_slide(pyramid("nearly.tif", 0.5, aspect=1.015)).scale
    assert list(scale[:2]) == pytest.approx([0.5, 0.5075], rel=1e-5)  # a fraction in the file, rounded by its writer


# Plain images


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGB"), ("png", "L"), ("jpg", "RGB"), ("webp", "RGB")])
def test_plain_images_are_slides_of_one_level(tmp_path: Path, picture: np.ndarray, suffix: str, mode: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(picture).convert(mode).save(path)
    with pytest.raises(ScaleUnknown, match="pass --mpp"):
        open_slide(path)
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.vendor, slide.size, len(slide.levels)) == ("image", Size(WIDTH, HEIGHT), 1)
        assert len(slide.quick_hash) == 64
        stored = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(slide.read(Box(0, 0, WIDTH, HEIGHT), slide.frame(0.25)), stored)


def test_a_plain_tiff_states_its_resolution(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, picture, photometric="rgb", resolution=(40000, 39800), resolutionunit=3)
    scale = open_slide(path).scale
    assert scale.source == "tiff resolution"
    assert (scale.x, scale.y) == pytest.approx((1 / 4, 1 / 3.98), rel=1e-6)


@pytest.mark.parametrize(("unit", "um"), [(None, 25_400), (2, 25_400), (3, 10_000), (1, None)])
def test_the_resolution_of_a_plain_tiff_is_per_inch_or_centimetre(
    tmp_path: Path, picture: np.ndarray, unit: int | None, um: int | None
) -> None:
    """Per inch where it does not say (TIFF 6.0); without a unit it is none."""
    tags = {282: 50_000.0, 283: 50_000.0, **({} if unit is None else {296: unit})}
    Image.fromarray(picture).save(tmp_path / "x.tif", tiffinfo=tags)
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        assert (296 in tiff.pages.first.tags) == (unit is not None)
    if um is None:
        with pytest.raises(ScaleUnknown, match="pass --mpp"):
            open_slide(tmp_path / "x.tif")
    else:
        assert open_slide(tmp_path / "x.tif").scale.x == pytest.approx(um / 50_000, rel=1e-5)


@pytest.mark.parametrize("suffix", ["gif", "ppm", "tga"])
def test_plain_images_of_other_formats_are_no_slides(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    Image.fromarray(picture).save(tmp_path / f"x.{suffix}")
    with pytest.raises(SlideUnreadable, match="is not a slide: OpenSlide and Pillow know no such format"):
        open_slide(tmp_path / f"x.{suffix}", mpp=0.25)


def test_a_plain_tiff_may_describe_itself_in_latin_1(tmp_path: Path, picture: np.ndarray) -> None:
    """OME's XML, which is looked for in its description, is UTF-8."""
    Image.fromarray(picture).save(tmp_path / "x.tif", tiffinfo={270: "0,25 µm".encode("latin-1")})
    assert open_slide(tmp_path / "x.tif", mpp=0.25).size == (WIDTH, HEIGHT)


def test_a_colour_profile_is_recorded(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "with.png", icc_profile=b"colours stay as stored")
    Image.fromarray(picture).save(tmp_path / "without.png")
    with open_slide(tmp_path / "with.png", mpp=0.25) as slide:
        assert slide.has_icc
        assert np.array_equal(slide.read(Box(0, 0, WIDTH, HEIGHT), slide.frame(0.25)), picture)
    assert not open_slide(tmp_path / "without.png", mpp=0.25).has_icc


@pytest.mark.parametrize("orientation", range(9))
def test_a_plain_tiff_is_read_as_it_is_stored_however_it_is_to_be_shown(
    tmp_path: Path, picture: np.ndarray, orientation: int
) -> None:
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, picture, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    with open_slide(path, mpp=0.25) as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, *slide.size), slide.frame(0.25)), picture)


@pytest.mark.parametrize("tile", [None, (64, 64)], ids=["a plain image", "through OpenSlide"])
@pytest.mark.parametrize("shape", [(90, 100, 3), (90, 100)], ids=["RGB", "grey"])
def test_more_than_8_bits_a_channel_are_refused(
    tmp_path: Path, shape: tuple[int, ...], tile: tuple[int, int] | None
) -> None:
    """OpenSlide and Pillow take the upper 8: of the 12 bits of a camera, in 16, that is nearly black."""
    pixels = np.random.default_rng(1).integers(0, 2**12, shape, np.uint16)
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, pixels, photometric="rgb" if len(shape) == 3 else "minisblack", tile=tile)
    with pytest.raises(SlideUnsupported, match=r"deep\.tif has 16 bits a channel: need 8; convert it, scaling"):
        open_slide(path, mpp=0.25)


def test_transparency_is_blended_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, 32:, 3] = 255
    rgba[:, 16:32, 3] = 51
    rgba[:, 8:16] = (100, 100, 100, 127)  # 177.8
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    with open_slide(tmp_path / "clear.png", mpp=0.25) as slide:
        assert slide.read(Box(0, 0, 64, 64), slide.frame(0.25))[5, [0, 10, 20, 40], 1].tolist() == [255, 178, 204, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_plain_image_is_decoded_in_strips_as_it_is_as_a_whole(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("slides.opening._STRIP_PX", 7 * HEIGHT)
    path = tmp_path / "image.tif"
    Image.fromarray(picture).convert(mode).save(path)
    with Image.open(path) as stored, open_slide(path, mpp=0.25) as slide:
        whole = stored.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
        assert slide.size == whole.size
        assert np.array_equal(slide.read(Box(0, 0, *whole.size), slide.frame(0.25)), np.asarray(expected))


# Damage


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SlideNotFound, match=r"lost\.svs: there is no such file"):
        open_slide(tmp_path / "lost.svs")
    with pytest.raises(FileNotFoundError):
        open_slide(tmp_path)
    with pytest.raises(SlideNotFound, match="a folder: need a file in it"):
        open_slide(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("empty.svs", b"", "is empty"),
        ("text.svs", b"not a slide " * 100, "is not a slide"),
        ("short.tif", b"II*\0" + struct.pack("<I", 5000) + bytes(100), "is truncated: it has 108 bytes"),
        ("big.tif", b"MM\0+" + struct.pack(">HHQ", 8, 0, 9999) + bytes(100), "is truncated"),
        ("huge.tif", b"MM\0+" + struct.pack(">HHQ", 8, 0, 2**64 - 1) + bytes(100), "is truncated"),
        ("alone.mrxs", b"\xff\xd8\xff" + bytes(100), "copy the folder 'alone' beside it"),
        ("ALONE.MRXS", b"\xff\xd8\xff" + bytes(100), "copy the folder 'ALONE' beside it"),
        ("broken.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a slide|is a damaged image"),
    ],
)
def test_what_does_not_open_says_why(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideUnreadable, match=cause) as raised:
        open_slide(tmp_path / name)
    assert name in str(raised.value)


@pytest.mark.parametrize("mpp", [None, 0.5])
def test_the_picture_of_a_mirax_slide_is_not_taken_for_the_slide(
    shared: Path, tmp_path: Path, mpp: float | None
) -> None:
    """Where only a part of its folder is there, or its suffix is in capitals: a thumbnail was segmented with --mpp."""
    picture, folder = shared / "slides" / "mirax-sparse.mrxs", tmp_path / "x"
    shutil.copy(picture, tmp_path / "x.mrxs")
    folder.mkdir()
    shutil.copy(picture.with_suffix("") / "Data0000.dat", folder)
    with pytest.raises(SlideUnreadable, match=r"x\.mrxs lacks its data, as there is no Slidedat\.ini in 'x': copy"):
        open_slide(tmp_path / "x.mrxs", mpp=mpp)
    shutil.copytree(picture.with_suffix(""), folder, dirs_exist_ok=True)
    open_slide(tmp_path / "x.mrxs", mpp=mpp).close()
    (tmp_path / "x.mrxs").rename(tmp_path / "x.MRXS")
    with pytest.raises(SlideUnreadable, match=r"x\.MRXS has a suffix .*: call it x\.mrxs"):
        open_slide(tmp_path / "x.MRXS", mpp=mpp)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("slides.opening._directory_beyond", failing)
    (tmp_path / "x.svs").write_bytes(b"II*\0")
    with pytest.raises(SlideUnreadable, match=r"x\.svs cannot be read: Input/output error"):
        open_slide(tmp_path / "x.svs")


def test_a_folder_of_a_mirax_slide_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.name == "Slidedat.ini":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    (tmp_path / "x.mrxs").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "x").mkdir()
    with pytest.raises(SlideUnreadable, match=r"x\.mrxs cannot be read: Permission denied"):
        open_slide(tmp_path / "x.mrxs")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("bigtiff", "count", "entry", "link"), [(False, "H", 12, 4), (True, "Q", 20, 8)])
def test_the_first_directory_beyond_a_files_end_is_found(
    order: Literal["<", ">"], bigtiff: bool, count: str, entry: int, link: int
) -> None:
    """Also where the file ends in the midst of it; one that ends with the file is there."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, bigtiff=bigtiff, byteorder=order) as tiff:
        for _ in range(3):
            tiff.write(np.zeros((16, 16, 3), np.uint8), photometric="rgb", metadata=None)
    whole = stream.getvalue()
    with tifffile.TiffFile(io.BytesIO(whole)) as tiff:
        places = [page.offset for page in tiff.pages]
    for place in places:
        entries = struct.unpack_from(order + count, whole, place)[0]
        end = place + struct.calcsize(count) + entries * entry + link
        for size in (place, place + 1, place + struct.calcsize(count), end - 1):
            assert _directory_beyond(io.BytesIO(whole[:size]), size) == place
    assert _directory_beyond(io.BytesIO(whole[:end]), end) is None


@pytest.mark.parametrize("content", [b"", b"I", b"II", b"II*\0", b"MM\0*\0\0", b"MM\0+\0\x08\0\0", b"II*\0\0\0\0\0"])
def test_a_file_that_ends_in_its_head_has_no_directory_beyond(content: bytes) -> None:
    assert _directory_beyond(io.BytesIO(content), len(content)) is None


@pytest.mark.parametrize(("stated", "size"), [("256", (256, 128)), ("-1", (0, 128)), ("²", (0, 128)), ("", (0, 128))])
def test_a_tile_of_no_stated_size_has_none(stated: str, size: tuple[int, int]) -> None:
    properties = {"openslide.level[1].tile-width": stated, "openslide.level[1].tile-height": "128"}
    assert stated_tile(properties, 1) == size
    assert stated_tile(properties, 0) == (0, 0)


def test_directories_in_a_circle_end() -> None:
    assert _directory_beyond(io.BytesIO(b"II*\0" + struct.pack("<IHIHI", 8, 0, 14, 0, 8)), 20) is None


def test_what_openslide_says_of_a_damaged_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> openslide.OpenSlide:
        raise openslide.OpenSlideError("Bad tile header")

    monkeypatch.setattr(openslide, "OpenSlide", failing)
    (tmp_path / "x.svs").touch()
    with pytest.raises(SlideUnreadable, match=r"x\.svs is damaged or incomplete: Bad tile header; copy it again$"):
        open_slide(tmp_path / "x.svs")


def test_a_tiff_that_tifffile_does_not_know_has_no_known_bits(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(b"II*\0 and no directory")
    assert _bits(tmp_path / "x.tif") == 0


def test_a_truncated_picture_is_damaged(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100_000])
    with pytest.raises(SlideUnreadable, match=r"half\.png is a damaged image"):
        open_slide(tmp_path / "half.png", mpp=0.25)


def test_a_tiff_whose_offsets_are_text_is_damaged(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "text.tif")
    with tifffile.TiffFile(tmp_path / "text.tif", mode="r+") as tiff:
        tiff.filehandle.seek(tiff.pages.first.tags["StripOffsets"].offset + 2)
        tiff.filehandle.write(struct.pack("<H", 2))  # the type ASCII
    with pytest.raises(SlideUnreadable, match=r"text\.tif is a damaged image"):
        open_slide(tmp_path / "text.tif", mpp=0.25)


def test_a_missing_part_is_named_wherever_the_slide_lies(tmp_path: Path) -> None:
    (tmp_path / "open slides").mkdir()
    names = "NoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=x.jpg\nMapFile=map.jpg\nMacroImage=macro.jpg\n"
    path = tmp_path / "open slides" / "x.vms"
    path.write_text(f"[Virtual Microscope Specimen]\n{names}OptimisationFile=\n")
    with pytest.raises(SlideUnreadable, match=r"its part map\.jpg is missing; copy everything that belongs to x\.vms"):
        open_slide(path)


def _spoil(path: Path, target: Path, tiles: Callable[[int], bool], level: int = 0) -> Path:
    """Copy a tiled TIFF with some tiles of a level overwritten."""
    if target != path:
        shutil.copy(path, target)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with target.open("r+b") as file:
        for i, (offset, length) in enumerate(places):
            if tiles(i):
                file.seek(offset)
                file.write(bytes(length))
    return target


def test_one_bad_tile_is_lost_alone_and_the_rest_is_kept(pyramid: Writer, tmp_path: Path, picture: np.ndarray) -> None:
    path = _spoil(pyramid("flat.tif", 0.5, (1,)), tmp_path / "spoilt.tif", lambda i: i == 6)
    bad = Box(128, 128, 256, 256)  # the seventh of 5 x 4 tiles of 128 px
    with open_slide(path) as slide:
        frame = slide.frame(0.5)
        with pytest.raises(RegionUnreadable, match=r"spoilt\.tif.*cannot be decoded"):
            slide.read(frame.box, frame)
        # The handle has been replaced.
        assert np.array_equal(slide.read(Box(300, 0, 400, 100), frame), picture[:100, 300:400])
        pixels, lost = slide.read_decodable(frame.box, frame)
        expected = picture.copy()
        expected[bad.within((0, 0))] = 255
        assert lost.sum() == bad.area
        assert lost[bad.within((0, 0))].all()
        # Resolution tags are single precision, so the scale is 0.5 within 1e-8 and edges are resampled.
        kept = ~ndimage.binary_dilation(lost, iterations=4)
        assert np.abs(pixels.astype(int) - expected)[kept].max() <= 1
        part, gone = slide.read_decodable(Box(200, 180, 400, 360), slide.frame(0.25))
        assert 0.2 < gone.mean() < 1
        assert (part[ndimage.binary_erosion(gone, iterations=8)] == 255).all()


@pytest.mark.parametrize("mpp", [0.25, 0.77, 1.0, 2.0])
def test_a_pixel_is_lost_where_its_centre_lies_in_a_bad_tile(pyramid: Writer, tmp_path: Path, mpp: float) -> None:
    """Also in a frame that is resampled, and read in part."""
    path = _spoil(pyramid("flat.tif", 0.5, (1,)), tmp_path / "spoilt.tif", lambda i: i == 6)
    with open_slide(path) as slide:
        frame = slide.frame(mpp)
        width, height = frame.size
        centres = [(np.arange(side) + 0.5) * mpp / 0.5 for side in frame.size]
        bad_x, bad_y = ((x > 128) & (x < 256) for x in centres)
        _, lost = slide.read_decodable(frame.box, frame)
        assert np.array_equal(lost, bad_y[:, None] & bad_x)
        _, part = slide.read_decodable(Box(width // 4, height // 4, width, height), frame)
        assert np.array_equal(part, lost[height // 4 :, width // 4 :])


def test_pixels_between_those_of_a_level_need_the_filter() -> None:
    """As where the bounds start at an odd pixel, and a level of half the size is read."""
    assert _needs_no_filter(Affine(1.0, 1.0, 3.0, 5.0))
    for shifted in (Affine(1.0, 1.0, 2.5, 5.0), Affine(1.0, 1.0, 3.0, 2.5), Affine(1.0, 2.0, 3.0, 5.0)):
        assert not _needs_no_filter(shifted)


def test_for_display_damage_is_white(pyramid: Writer, tmp_path: Path) -> None:
    path = _spoil(pyramid("flat.tif", 0.5, (1,)), tmp_path / "spoilt.tif", lambda i: i == 6)
    with open_slide(path) as slide:
        frame = slide.frame(0.5)
        shown = slide.read_for_display(frame.box, frame)
        assert (shown == slide.read_decodable(frame.box, frame)[0]).all()
        assert (shown[140:240, 140:240] == 255).all()


def test_a_file_that_opens_but_decodes_nowhere_is_refused(pyramid: Writer, tmp_path: Path) -> None:
    path = _spoil(pyramid("flat.tif", 0.5, (1,)), tmp_path / "hopeless.tif", lambda i: True)
    with pytest.raises(SlideUnreadable, match=r"hopeless\.tif opens, but nothing in it can be read"):
        open_slide(path)


@pytest.mark.parametrize(
    ("stated", "bounds"),
    [
        (("10", "20", "30", "40"), Box(10, 20, 40, 60)),
        (("90", "-5", "30", "40"), Box(90, 0, 100, 35)),
        (("200", "0", "30", "40"), Box(0, 0, 100, 80)),
        (("10", "20", "0", "40"), Box(0, 0, 100, 80)),
        (("10", "20", "30", "about 40"), Box(0, 0, 100, 80)),
    ],
    ids=["inside", "hang over", "outside", "empty", "no number"],
)
def test_bounds_are_a_part_of_the_slide_or_all_of_it(stated: tuple[str, ...], bounds: Box) -> None:
    names = [f"openslide.bounds-{side}" for side in ("x", "y", "width", "height")]
    assert _bounds(dict(zip(names, stated, strict=True)), Size(100, 80)) == bounds
    assert _bounds(dict(zip(names[:3], stated, strict=False)), Size(100, 80)) == Box(0, 0, 100, 80)


@given(
    x=st.tuples(st.integers(0, WIDTH - 1), st.integers(1, WIDTH)),
    y=st.tuples(st.integers(0, HEIGHT - 1), st.integers(1, HEIGHT)),
)
@example(x=(0, WIDTH), y=(0, HEIGHT))  # of whose second level the quotient rounds to more rows than there are
def test_on_a_coarse_level_bounds_are_all_pixels_that_show_a_part_of_them(
    slide: Slide, x: tuple[int, int], y: tuple[int, int]
) -> None:
    bounds = Box(x[0], y[0], max(x[0] + 1, x[1]), max(y[0] + 1, y[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slide, "bounds", bounds)
        for level, (size, _) in enumerate(slide.levels):
            columns, rows = (
                [i for i in range(stored) if i * whole < last * stored and (i + 1) * whole > first * stored]
                for stored, whole, first, last in (
                    (size.width, WIDTH, bounds.x0, bounds.x1),
                    (size.height, HEIGHT, bounds.y0, bounds.y1),
                )
            )
            assert slide._level_bounds(level) == Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_another_file_has_another_hash(tmp_path: Path) -> None:
    """Where it differs in size, in the first MiB or in the last: what lies between is not read."""
    path, mib = tmp_path / "x.png", 2**20
    contents = [bytearray(3 * mib) for _ in range(5)] + [bytearray(3 * mib + 1)]
    for content, place in zip(contents, (0, mib - 1, 2 * mib, 3 * mib - 1), strict=False):
        content[place] = 1
    hashes = []
    for content in contents:
        path.write_bytes(content)
        hashes.append(_file_hash(path))
    assert len(set(hashes)) == 6


@pytest.mark.parametrize("sound", range(20))
def test_a_file_of_which_one_tile_decodes_is_read(pyramid: Writer, tmp_path: Path, sound: int) -> None:
    path = _spoil(pyramid("flat.tif", 0.5, (1,)), tmp_path / "spoilt.tif", lambda i: i != sound)
    with open_slide(path) as slide:
        _, lost = slide.read_decodable(Box(0, 0, WIDTH, HEIGHT), slide.frame(0.5))
        assert 0 < lost.mean() < 1


@pytest.mark.parametrize("sound", [0, 2])
def test_a_file_of_which_one_level_decodes_is_read(pyramid: Writer, tmp_path: Path, sound: int) -> None:
    """The coarsest, from which its tissue is found, or that of the nuclei."""
    path = _spoil(pyramid("plain.tif", 0.5), tmp_path / "spoilt.tif", lambda i: False)
    for level in {0, 1, 2} - {sound}:
        _spoil(path, path, lambda i: True, level)
    with open_slide(path) as slide:
        for level, frame in enumerate(map(slide.frame, (0.5, 1.0, 2.0))):
            assert slide.read_decodable(frame.box, frame)[1].any() == (level != sound)


def test_damage_is_reported_before_a_missing_scale(pyramid: Writer, tmp_path: Path) -> None:
    path = _spoil(pyramid("flat-none.tif", None, (1,)), tmp_path / "both.tif", lambda i: True)
    with pytest.raises(SlideUnreadable):
        open_slide(path)


# Formats that are not read, and sizes that are refused


def _stored_as(path: Path, target: Path, compression: int) -> Path:
    """Copy a TIFF and claim another compression for its first level."""
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags["Compression"].valueoffset
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, at, compression)
    target.write_bytes(content)
    return target


def test_unsupported_is_not_damaged(pyramid: Writer, tmp_path: Path) -> None:
    paths = [_stored_as(pyramid("flat.tif", 0.5, (1,)), tmp_path / "webp.tif", 50001)]
    for name, content in (("a.czi", b"ZISRAWFILE" + bytes(999)), ("b.vsi", b"Olympus"), ("c.isyntax", b"Philips")):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    for path in paths:
        with pytest.raises(SlideUnsupported, match=r"OpenSlide .* does not read .*convert it") as raised:
            open_slide(path, mpp=0.25)
        assert path.name in str(raised.value)
        assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".ets", ".isyntax", ".kfb", ".lif", ".mds", ".nd2", ".oir", ".sdpc", ".VSI"])
def test_known_formats_that_are_not_read_are_not_damaged(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(b"of a scanner")
    with pytest.raises(SlideUnsupported, match=r"OpenSlide .* does not read .*convert it"):
        open_slide(tmp_path / f"x{suffix}", mpp=0.25)


def test_a_file_of_several_pictures_is_no_slide(tmp_path: Path, picture: np.ndarray) -> None:
    """The first may be the label of a slide in a format that OpenSlide lacks."""
    first = Image.fromarray(picture)
    first.save(tmp_path / "two.tif", save_all=True, append_images=[first])
    with pytest.raises(SlideUnsupported, match=r"two\.tif holds 2 image\(s\) of mode RGB .*need a slide, or one image"):
        open_slide(tmp_path / "two.tif", mpp=0.25)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_of_other_numbers_than_bytes_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (90, 80), 100).save(tmp_path / "x.tif")
    with pytest.raises(SlideUnsupported, match=rf"x\.tif holds 1 image\(s\) of mode {mode} .*8 bits a channel"):
        open_slide(tmp_path / "x.tif", mpp=0.25)


def test_a_picture_that_fills_the_memory_is_refused(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", picture[..., 0].size - 1)
    assert open_slide(tmp_path / "x.png", mpp=0.25).size == (WIDTH, HEIGHT)  # of which Pillow warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", picture[..., 0].size // 2 - 1)
    with pytest.raises(SlideTooLarge, match=r"x\.png: .*convert it to a tiled pyramidal TIFF"):
        open_slide(tmp_path / "x.png", mpp=0.25)


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, TypeError])
def test_whatever_pillow_raises_for_a_damaged_picture_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(path: Path) -> Image.Image:
        raise error("broken chunk")

    monkeypatch.setattr("slides.opening.open_quietly", failing)
    (tmp_path / "x.png").write_bytes(b"PNG")
    with pytest.raises(SlideUnreadable, match=r"x\.png is a damaged image \(broken chunk\): copy it again"):
        open_slide(tmp_path / "x.png", mpp=0.25)


def _huge(path: Path, width: int, height: int, tile: int) -> Path:
    """A TIFF of any size in a few MB: all its tiles are the same white one."""
    white = zlib.compress(bytes([255]) * (tile * tile * 3)) if tile <= 4096 else b""
    count = -(-width // tile) * -(-height // tile)
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3),
        (282, 5, 1, 12), (283, 5, 1, 12), (296, 3, 1, 3), (322, 4, 1, tile), (323, 4, 1, tile),
        (324, 4, count, 20), (325, 4, count, 20 + 4 * count),
    ]  # fmt: skip
    bits, pixels = 20 + 8 * count, 26 + 8 * count
    entries[2] = (258, 3, 3, bits)
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, pixels + len(white)) + bytes(4) + struct.pack("<II", 40000, 1))
        file.write(np.full(count, pixels, "<u4").tobytes() + np.full(count, len(white), "<u4").tobytes())
        file.write(struct.pack("<3H", 8, 8, 8) + white)
        file.write(struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries))
        file.write(bytes(4))
    return path


def test_a_thumbnail_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    """Two million pixels square in 2.4 MB: 11 GB at 8 um per px."""
    path = _huge(tmp_path / "huge.tif", 2_000_000, 2_000_000, 4096)
    assert path.stat().st_size < 3e6
    with open_slide(path) as slide:
        with pytest.raises(SlideTooLarge, match=r"huge\.tif is 62,500 x 62,500 px at 8 um/px.*thumbnail"):
            slide.thumbnail(slide.frame(8))
        assert slide.thumbnail_frame(8) == slide.frame(128)
        box = Box(1000, 1000, 1100, 1100)
        assert (slide.read(box, slide.frame(0.25)) == 255).all()


def test_the_thumbnail_of_any_glass_is_as_fine_as_it_is_asked_for(tmp_path: Path) -> None:
    """26 x 76 mm at 0.25 um per px."""
    with open_slide(_huge(tmp_path / "glass.tif", 104_000, 304_000, 4096)) as slide:
        assert slide.thumbnail_frame(8) == slide.frame(8)


def test_a_strip_without_coarse_levels_is_refused_where_its_thumbnail_is_too_coarse(tmp_path: Path) -> None:
    with (
        open_slide(_huge(tmp_path / "strip.tif", 4_000_000, 64, 256)) as slide,
        pytest.raises(SlideTooLarge, match=r"strip\.tif has no level coarser than 4,000,000 x 64 px"),
    ):
        slide.thumbnail(slide.frame(0.25 * 4_000_000 / 1200))


def test_tiles_that_fill_the_memory_are_refused(tmp_path: Path) -> None:
    path = _huge(tmp_path / "one.tif", 100_000, 100_000, 100_000)
    with pytest.raises(SlideTooLarge, match=r"one\.tif is stored in tiles of 100,000 x 100,000 px"):
        open_slide(path)


# The shared slides behave as their README says


@pytest.mark.parametrize(
    ("name", "size", "mpp", "source"),
    [
        ("CMU-1-Small-Region.svs", Size(2220, 2967), 0.499, "metadata"),
        ("leica-offset-region.scn", Size(2220, 2967), 0.5, "metadata"),
        ("mirax-sparse.mrxs", Size(2048, 2816), 0.499, "metadata"),
        ("philips.tiff", Size(2304, 3072), 0.499, "metadata"),
        ("generic-pyramid-jpeg.tif", Size(2220, 2967), 0.499, "tiff resolution"),
        ("damaged/zeroed-60kB-in-tile-data.svs", Size(2220, 2967), 0.499, "metadata"),
        ("damaged/random-byte-flips-in-tiles.svs", Size(2220, 2967), 0.499, "metadata"),
    ],
)
def test_shared_slides_open(shared: Path, name: str, size: Size, mpp: float, source: str) -> None:
    with open_slide(shared / "slides" / name) as slide:
        assert slide.bounds.size == size
        assert slide.scale.source == source
        assert slide.scale.x == pytest.approx(mpp, rel=1e-5)
        frame = slide.frame(16)
        thumbnail = slide.thumbnail(frame)
        assert thumbnail.shape[:2] == frame.size[::-1]
        assert thumbnail.min() < 150


@pytest.mark.parametrize("name", ["TCGA-CR-7395-01A-01-TS1.svs", "generic-no-resolution.tif"])
def test_shared_slides_without_a_scale_need_the_user(shared: Path, name: str) -> None:
    with pytest.raises(ScaleUnknown, match="pass --mpp"):
        open_slide(shared / "slides" / name)
    with open_slide(shared / "slides" / name, mpp=0.25) as slide:
        assert slide.has_icc == name.startswith("TCGA")
        assert slide.read(Box(100, 100, 164, 164), slide.frame(0.25)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("empty.svs", "is empty"),
        ("text-renamed.svs", "is not a slide"),
        ("truncated-50pct.svs", "is truncated"),
        ("mirax-missing-datafile/mirax-sparse.mrxs", r"Data0000\.dat is missing"),
    ],
)
def test_shared_slides_that_do_not_open(shared: Path, name: str, cause: str) -> None:
    with pytest.raises(SlideError, match=cause) as raised:
        open_slide(shared / "slides" / "damaged" / name)
    assert Path(name).name in str(raised.value)


def test_shared_mirax_with_a_damaged_overlap_is_damaged(shared: Path, tmp_path: Path) -> None:
    """OpenSlide opens it, and counts its levels' pixels below zero."""
    copy = Path(shutil.copy(shared / "slides" / "mirax-sparse.mrxs", tmp_path / "m.mrxs"))
    shutil.copytree(shared / "slides" / "mirax-sparse", tmp_path / "m", copy_function=shutil.copyfile)
    (tmp_path / "m").chmod(0o700)
    ini = tmp_path / "m" / "Slidedat.ini"
    ini.write_text(ini.read_text(encoding="utf-8").replace("OVERLAP_X=0", "OVERLAP_X=1000000"), encoding="utf-8")
    with pytest.raises(SlideUnreadable, match=r"m\.mrxs is damaged: its level 0 has -[\d,]+ x 6,144 px"):
        open_slide(copy)


def test_shared_leica_reads_only_inside_its_bounds(shared: Path) -> None:
    """The container was written around the CMU pixels: a frame starts where they start."""
    with (
        open_slide(shared / "slides" / "leica-offset-region.scn") as leica,
        open_slide(shared / "slides" / "CMU-1-Small-Region.svs") as cmu,
    ):
        assert leica.bounds == Box(3000, 5000, 5220, 7967)
        frame = leica.frame(0.5)
        assert frame.to_slide.apply((0, 0)).tolist() == [3000, 5000]
        box = Box(600, 900, 800, 1100)
        difference = leica.read(box, frame).astype(int) - cmu.read(box, cmu.frame(cmu.scale.x))
        assert np.abs(difference).mean() < 3
        assert (leica.read(Box(-10, -10, 0, 0), frame) == 255).all()
        assert (leica.read(Box(frame.size.width, 0, frame.size.width + 9, 9), frame) == 255).all()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("zeroed-60kB-in-tile-data.svs", 0.01, 0.1), ("random-byte-flips-in-tiles.svs", 0.2, 0.7)],
)
def test_shared_slides_with_unreadable_regions(shared: Path, name: str, low: float, high: float) -> None:
    with open_slide(shared / "slides" / "damaged" / name) as slide:
        frame = slide.frame(0.5)
        with pytest.raises(RegionUnreadable):
            slide.read(frame.box, frame)
        _, lost = slide.read_decodable(frame.box, frame)
        assert low < lost.mean() < high


def test_shared_slides_read_as_openslide_reads(shared: Path) -> None:
    path = shared / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide, openslide.OpenSlide(path) as handle:
        expected = np.asarray(handle.read_region((700, 900), 0, (300, 200)).convert("RGB"))
        assert np.array_equal(slide.read(Box(700, 900, 1000, 1100), slide.frame(slide.scale.x)), expected)


@pytest.mark.parametrize(
    ("mpp", "level"), [(0.2, 0), (0.5, 0), (0.9, 0), (0.97, 0), (1.0, 1), (1.5, 1), (1.95, 1), (2.0, 2), (8.0, 2)]
)
def test_the_level_that_is_read_is_the_coarsest_that_is_not_too_coarse(slide: Slide, mpp: float, level: int) -> None:
    """But for the rounding of its size: the second is of 306 x 233 px, not of 306.5 x 233.5."""
    assert slide._best_level(slide.frame(mpp)) == level


def test_a_level_of_another_shape_is_not_read_from(tmp_path: Path, picture: np.ndarray) -> None:
    """Such as a white label, which a generic TIFF holds as one more reduced image."""
    small = np.asarray(Image.fromarray(picture).resize((WIDTH // 4, HEIGHT // 4)))
    label = np.full((150, 60, 3), 255, np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        for level in (picture, small, label):
            tiff.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                subfiletype=int(level is not picture),
                metadata=None,
                resolution=(20_000, 20_000),
                resolutionunit=3,
            )
    slide = open_slide(tmp_path / "x.tif")
    (odd,) = slide.odd_levels
    assert slide.levels[odd].size == (60, 150)
    thumbnail = slide.thumbnail(slide.frame(0.5 * 12))
    assert np.abs(thumbnail.mean((0, 1)) - picture.mean((0, 1))).max() < 5
    assert open_slide(tmp_path / "x.tif", mpp=0.5).quick_hash == slide.quick_hash


@given(st.integers(3, 5000), st.integers(3, 5000), st.integers(1, 64))
def test_rounded_levels_have_the_shape_of_their_slide(width: int, height: int, factor: int) -> None:
    """Law: whichever way a scanner rounds."""
    for rounded in (math.floor, round, math.ceil):
        level = Size(*(max(1, rounded(side / factor)) for side in (width, height)))
        assert min(width, height) < 2 * factor or _shows_the_same(level, Size(width, height))


def test_all_threads_share_a_plain_picture(tmp_path: Path, picture: np.ndarray) -> None:
    """It is decoded as a whole; each thread would hold another copy. Large ones are no reason for a warning."""
    Image.fromarray(picture).save(tmp_path / "x.png")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
        slide = open_slide(tmp_path / "x.png", mpp=0.5)
    seen: list[tuple[int, bool]] = []

    def read() -> None:
        same = np.array_equal(slide.read(Box(10, 20, 90, 70), slide.frame(0.5)), picture[20:70, 10:90])
        seen.append((len(slide._stored._handles), same))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, True)] * 4
