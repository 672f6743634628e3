"""JPEG tiles that are decoded without OpenSlide: the same pixels as through it, and what is left to it."""

import itertools
import os
import pickle
import threading
from collections.abc import Callable
from io import BytesIO, FileIO
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import jpeg_tiff
from jpeg_tiff import Level
from slides import stored_tiles
from slides.errors import RegionUnreadable
from slides.geometry import Box, Size
from slides.slide import open_slide
from slides.stored import StoredPixels
from slides.stored_tiles import StoredTiles

WIDTH, HEIGHT = 301, 223


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours, uint8 (223, 301, 3)."""
    noise = np.random.default_rng(3).normal(size=(HEIGHT, WIDTH, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
    pixels: np.ndarray = np.clip(150 + smooth / smooth.std() * 50, 0, 255).astype(np.uint8)
    return pixels


def through_openslide(path: Path, level: int = 0) -> np.ndarray:
    """A whole level, on white: uint8 (h, w, 3)."""
    with openslide.OpenSlide(path) as handle:
        image = handle.read_region((0, 0), level, handle.level_dimensions[level])
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]


def not_asked(*_: object) -> None:
    raise AssertionError("OpenSlide was asked")


FORMS = [
    {"rgb": rgb, "subsampling": subsampling, "tables": tables, "tile": tile}
    for rgb, subsampling in [(True, "4:4:4"), (False, "4:4:4"), (False, "4:2:2"), (False, "4:2:0")]
    for tables, tile in [(False, (64, 64)), (True, (112, 80))]
]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: "-".join(map(str, form.values())))
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    """A slide whose tiles are encoded in one of these ways."""
    path = tmp_path_factory.mktemp("forms") / "x.tif"
    return jpeg_tiff.write(path, Level(picture, **request.param))


@given(data=st.data())
def test_every_box_is_what_openslide_gives(form: Path, data: st.DataObject) -> None:
    """Law: bit for bit, whichever way the tiles are encoded; and OpenSlide is not asked for it."""
    stored, expected = StoredPixels(form), through_openslide(form)
    assert stored._stored_tiles(0) is not None
    x0, y0 = data.draw(st.integers(0, WIDTH - 1), "x0"), data.draw(st.integers(0, HEIGHT - 1), "y0")
    box = Box(x0, y0, data.draw(st.integers(x0, WIDTH), "x1"), data.draw(st.integers(y0, HEIGHT), "y1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredPixels, "_from_openslide", not_asked)
        pixels, lost = stored.read(0, box, strict=True)
        assert np.array_equal(stored.region(0, box), pixels)
    assert np.array_equal(pixels, expected[box.within((0, 0))])
    assert not lost.any()
    stored.close()


def test_tiles_are_read_where_the_system_has_no_pread(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.delattr("os.pread", raising=False)
    stored = StoredPixels(jpeg_tiff.write(tmp_path / "x.tif", Level(picture)))
    assert stored._stored_tiles(0) is not None
    pixels, _ = stored.read(0, Box(0, 0, WIDTH, HEIGHT), strict=True)
    assert np.array_equal(pixels, through_openslide(tmp_path / "x.tif"))


def test_levels_of_a_whole_downsample_are_read_and_others_are_not(tmp_path: Path, picture: np.ndarray) -> None:
    """OpenSlide shifts a level of a fractional downsample by a part of a pixel."""
    pixels = picture[:192, :256]
    levels = [pixels, pixels[::2, ::2], pixels[:190:4, :252:4]]
    written = [Level(level, reduced=number > 0) for number, level in enumerate(levels)]
    stored = StoredPixels(jpeg_tiff.write(tmp_path / "x.tif", *written))
    assert [stored._stored_tiles(level) is not None for level in range(3)] == [True, True, False]
    for level in range(3):
        size = stored.levels[level].size
        read = stored.read(level, Box(0, 0, *size), strict=True)[0]
        assert np.array_equal(read, through_openslide(tmp_path / "x.tif", level))


def damaged(stream: bytes) -> bytes:
    """A JPEG stream whose last third is zero."""
    return stream[: len(stream) * 2 // 3] + bytes(len(stream) - len(stream) * 2 // 3)


def enormous(stream: bytes) -> bytes:
    """A JPEG stream whose header states 60,000 x 60,000 px."""
    at = stream.index(b"\xff\xc0") + 5
    return stream[:at] + (60_000).to_bytes(2, "big") * 2 + stream[at + 4 :]


def in_mode(stream: bytes, mode: str) -> bytes:
    """The same picture in another of Pillow's modes, as JPEG; RGB is stored as it is."""
    other = BytesIO()
    Image.open(BytesIO(stream)).convert(mode).save(other, "JPEG", keep_rgb=True)
    return other.getvalue()


def marked_as_rgb(stream: bytes) -> bytes:
    """A stream of YCbCr without JFIF's marker, but with Adobe's, which says RGB."""
    jfif = 4 + int.from_bytes(stream[4:6], "big")
    assert stream[2:4] == b"\xff\xe0"
    return b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + stream[jfif:]


@pytest.mark.parametrize(
    "spoilt",
    [
        damaged,
        enormous,
        lambda stream: b"",
        lambda stream: b"\xff",
        lambda stream: b"\0" * len(stream),
        lambda s: s[:99],
        lambda stream: in_mode(stream, "L"),
        lambda stream: in_mode(stream, "CMYK"),
        lambda stream: in_mode(stream, "RGB"),
        marked_as_rgb,
    ],
    ids=["damaged", "enormous", "missing", "a-byte", "zeros", "short", "grey", "cmyk", "rgb", "marked-as-rgb"],
)
def test_what_is_no_sound_tile_is_left_to_openslide(
    tmp_path: Path, picture: np.ndarray, spoilt: Callable[[bytes], bytes]
) -> None:
    """So nothing changes for damaged slides: what OpenSlide refuses is lost, its neighbours are kept."""
    tile = spoilt(jpeg_tiff.encode(picture[64:128, 128:192]))
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture, replaced={7: tile}))  # second row of five
    stored, other = StoredPixels(path), StoredPixels(path)
    tiles = stored._stored_tiles(0)
    assert tiles is not None
    pixels = np.zeros((100, 200, 3), np.uint8)
    assert tiles.read(Box(60, 40, 260, 140), pixels) == [Box(128, 64, 192, 128)]
    other._tiles[0] = None  # as if there were no such tiles
    whole = Box(0, 0, WIDTH, HEIGHT)
    for one, two in zip(stored.read(0, whole, strict=False), other.read(0, whole, strict=False), strict=True):
        assert np.array_equal(one, two)
    if stored.read(0, whole, strict=False)[1].any():
        with pytest.raises(RegionUnreadable, match="64 x 64 px"):
            stored.read(0, whole, strict=True)


def test_tiles_that_openslide_shows_in_other_colours_are_not_read(tmp_path: Path, picture: np.ndarray) -> None:
    """Here the file says RGB, and the tiles' own headers YCbCr."""
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture, photometric=2))
    tiles = StoredTiles.find(path, Size(WIDTH, HEIGHT), Size(64, 64))
    assert tiles is not None
    assert len(tiles.read(Box(0, 0, WIDTH, HEIGHT), np.empty_like(picture))) == 20
    stored = StoredPixels(path)
    assert stored._stored_tiles(0) is None
    assert np.array_equal(stored.region(0, Box(0, 0, WIDTH, HEIGHT)), through_openslide(path))


def test_a_level_of_which_openslide_gives_other_pixels_is_left_to_it(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredPixels(jpeg_tiff.write(tmp_path / "x.tif", Level(picture)))
    from_openslide = StoredPixels._from_openslide

    def another_pixel(self: StoredPixels, level: int, box: Box) -> np.ndarray:
        pixels = from_openslide(self, level, box).copy()
        if box.y0 >= 128:
            pixels[-1, -1, 2] ^= 1
        return pixels

    monkeypatch.setattr(StoredPixels, "_from_openslide", another_pixel)
    assert stored._stored_tiles(0) is None


def test_a_slide_of_damaged_tiles_only_is_not_read(tmp_path: Path, picture: np.ndarray) -> None:
    """No tile can be compared."""
    zeros = dict.fromkeys(range(20), bytes(2000))
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture, replaced=zeros))
    stored = StoredPixels(path)
    assert stored._stored_tiles(0) is None
    assert stored.read(0, Box(0, 0, WIDTH, HEIGHT), strict=False)[1].all()


def test_levels_of_one_size_and_other_sizes_than_asked_for_are_not_found(tmp_path: Path, picture: np.ndarray) -> None:
    """As of several focal planes, of which only OpenSlide knows which it shows, whatever their tiles are like."""
    size, tile = Size(WIDTH, HEIGHT), Size(64, 64)
    for other in (64, 64), (128, 64):
        path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture), Level(picture[::-1], tile=other))
        assert StoredTiles.find(path, size, tile) is None
    path = jpeg_tiff.write(tmp_path / "y.tif", Level(picture))
    assert StoredTiles.find(path, size, tile) is not None
    assert StoredTiles.find(path, Size(WIDTH, HEIGHT + 1), tile) is None
    assert StoredTiles.find(path, size, Size(64, 128)) is None
    assert StoredTiles.find(tmp_path / "none.tif", size, tile) is None


def test_levels_after_one_that_lacks_tiles_are_left_to_openslide(tmp_path: Path, picture: np.ndarray) -> None:
    """There OpenSlide does not show all the tiles that an Aperio slide has: it takes those of the earlier level."""
    levels = [
        Level(picture[:128, :256], description="Aperio Image Library", replaced={7: b""}),
        Level(255 - picture[:128:2, :256:2], tile=(64, 32)),
    ]
    path = jpeg_tiff.write(tmp_path / "x.svs", *levels)
    stored = StoredPixels(path)
    assert stored.vendor == "aperio"
    assert stored._stored_tiles(0) is not None
    second = StoredTiles.find(path, Size(128, 64), Size(64, 32))
    assert second is None
    assert np.array_equal(stored.region(1, Box(0, 0, 128, 64)), through_openslide(path, 1))


def test_the_first_tiles_to_be_compared_are_spread_over_the_level(tmp_path: Path, picture: np.ndarray) -> None:
    """The first rows of a slide are often glass."""
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture, tile=(16, 16)))  # 14 rows
    tiles = StoredTiles.find(path, Size(WIDTH, HEIGHT), Size(16, 16))
    assert tiles is not None
    boxes = list(tiles.boxes(49))
    assert len(set(boxes)) == 49
    assert all(0 <= below.y0 - above.y0 - 16 * 3 <= 16 for above, below in itertools.pairwise(boxes[:4]))
    assert {box.y0 for box in boxes} == set(range(0, 224, 16))
    assert len(list(tiles.boxes(1000))) == len(set(tiles.boxes(1000))) == 19 * 14


def test_tables_that_hold_more_than_tables_are_left_to_openslide(tmp_path: Path, picture: np.ndarray) -> None:
    """A restart interval among them is in force for no tile there: one that relies on it is lost."""
    stream = jpeg_tiff.encode(picture[:64, :64])
    tables = jpeg_tiff._split([stream])[0]
    assert stored_tiles._holds_only_tables(None)
    assert stored_tiles._holds_only_tables(tables)
    for other in (
        tables[:-2] + b"\xff\xdd\x00\x04\x00\x04\xff\xd9",
        tables + b"\0",
        tables[:-2],
        tables[2:],
        stream,
        b"",
    ):
        assert not stored_tiles._holds_only_tables(other)


def test_a_damaged_tile_among_those_compared_does_not_count(tmp_path: Path, picture: np.ndarray) -> None:
    tile = damaged(jpeg_tiff.encode(picture[:64, :64]))
    stored = StoredPixels(jpeg_tiff.write(tmp_path / "x.tif", Level(picture, replaced={0: tile, 5: b"", 10: tile})))
    assert stored._stored_tiles(0) is not None


def test_nor_does_one_that_openslide_alone_cannot_decode(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, calls = StoredPixels(jpeg_tiff.write(tmp_path / "x.tif", Level(picture))), list[Box]()
    from_openslide = StoredPixels._from_openslide

    def failing_at_first(self: StoredPixels, level: int, box: Box) -> np.ndarray:
        calls.append(box)
        if len(calls) == 1:
            raise RegionUnreadable("damaged")
        return from_openslide(self, level, box)

    monkeypatch.setattr(StoredPixels, "_from_openslide", failing_at_first)
    assert stored._stored_tiles(0) is not None
    assert len(calls) > 1


def test_only_plain_directories_are_read() -> None:
    """Three samples of 8 bits, side by side, compressed by JPEG, in as many tiles as the level needs, none huge."""
    size, tile = Size(WIDTH, HEIGHT), Size(64, 64)
    plain: dict[str, Any] = {
        "tilewidth": 64,
        "tilelength": 64,
        "compression": 7,
        "photometric": 6,
        "samplesperpixel": 3,
        "bitspersample": 8,
        "planarconfig": 1,
        "dataoffsets": (8,) * 20,
        "databytecounts": (9,) * 20,
        "jpegtables": None,
    }
    assert stored_tiles._is_readable(cast(Any, SimpleNamespace(**plain)), size, tile)
    changes: list[dict[str, Any]] = [
        {"compression": 8},
        {"photometric": 1},
        {"samplesperpixel": 4},
        {"bitspersample": 12},
        {"planarconfig": 2},
        {"dataoffsets": (8,) * 19, "databytecounts": (9,) * 19},
        {"databytecounts": (9,) * 19},
    ]
    for change in changes:
        assert not stored_tiles._is_readable(cast(Any, SimpleNamespace(**plain | change)), size, tile)
    huge = plain | {"tilewidth": 4096, "tilelength": 2048, "dataoffsets": (8,), "databytecounts": (9,)}
    assert not stored_tiles._is_readable(cast(Any, SimpleNamespace(**huge)), size, Size(4096, 2048))


@pytest.mark.parametrize("beyond", [0, 2**50])
def test_a_tile_that_is_said_to_end_beyond_the_file_is_left_to_openslide(
    tmp_path: Path, picture: np.ndarray, beyond: int
) -> None:
    """It may be whole; but OpenSlide does not read it. Nor is there memory for all that it is said to have."""
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture))
    tiles = StoredTiles.find(path, Size(WIDTH, HEIGHT), Size(64, 64))
    assert tiles is not None
    tiles._lengths[7] = path.stat().st_size + beyond
    left = tiles.read(Box(0, 0, WIDTH, HEIGHT), np.empty_like(picture))
    assert left == [Box(128, 64, 192, 128)]


def test_a_slide_that_is_closed_is_read_afresh(tmp_path: Path, picture: np.ndarray) -> None:
    """As another file may have taken its place."""
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture))
    stored = StoredPixels(path)
    stored.read(0, Box(0, 0, WIDTH, HEIGHT), strict=True)
    stored.close()
    jpeg_tiff.write(path, Level(255 - picture[::-1]))
    assert np.array_equal(stored.read(0, Box(0, 0, WIDTH, HEIGHT), strict=True)[0], through_openslide(path))


def test_no_file_makes_an_error(tmp_path: Path, picture: np.ndarray) -> None:
    """Whatever bytes are damaged, tiles are found or not."""
    whole = bytearray(jpeg_tiff.write(tmp_path / "x.tif", Level(picture, tile=(256, 256))).read_bytes())
    start = int.from_bytes(whole[4:8], "little")
    random = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for at in random.integers(start, len(whole), 2):
            spoilt[at] = random.integers(256)
        (tmp_path / "x.tif").write_bytes(spoilt)
        tiles = StoredTiles.find(tmp_path / "x.tif", Size(WIDTH, HEIGHT), Size(256, 256))
        if tiles is not None:
            found += 1
            left = tiles.read(Box(0, 0, WIDTH, HEIGHT), np.empty_like(picture))
            assert set(left) <= {Box(0, 0, 256, 223), Box(256, 0, 301, 223)}
    assert 0 < found < 300


def test_no_damage_to_an_ome_tiff_makes_an_error(tmp_path: Path, picture: np.ndarray) -> None:
    """Its smaller versions are found or not."""
    path, size = tmp_path / "x.tif", Size(WIDTH, HEIGHT)
    whole = jpeg_tiff.write(path, Level(picture, smaller=(Level(picture[::4, ::4]),))).read_bytes()
    start = int.from_bytes(whole[4:8], "little")  # of the directory
    found = set()
    for at in range(start, len(whole)):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        found.add(len(StoredTiles.smaller_versions(path, size)))
    assert found == {0, 1}
    assert StoredTiles.smaller_versions(tmp_path / "none.tif", size) == ()


def test_decoded_tiles_take_no_more_memory_than_they_may() -> None:
    recent = stored_tiles._Recent(1000)
    for number in range(10):
        recent.put((0, number), np.full(300, number, np.uint8))
        recent.put((0, number), np.full(300, number, np.uint8))
        assert recent.get((0, 0)) is not None  # the one that is used stays
    kept = [number for number in range(10) if recent.get((0, number)) is not None]
    assert kept == [0, 8, 9]
    recent.put((0, 10), np.zeros(2000, np.uint8))
    assert all(recent.get((0, number)) is None for number in range(11))


def test_only_tiles_at_the_edge_of_a_box_are_kept(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those inside are not asked for again; those at the edge are decoded once for both neighbours."""
    monkeypatch.setattr(stored_tiles, "_recent", {os.getpid(): stored_tiles._Recent(10**6)}.__getitem__)
    tiles = StoredTiles.find(jpeg_tiff.write(tmp_path / "x.tif", Level(picture)), Size(WIDTH, HEIGHT), Size(64, 64))
    assert tiles is not None
    decoded: list[int] = []
    decode = tiles._decode

    def counted(file: FileIO, index: int, room: np.ndarray) -> np.ndarray | None:
        decoded.append(index)
        return decode(file, index, room)

    monkeypatch.setattr(tiles, "_decode", counted)
    tiles.read(Box(0, 0, 200, 128), np.empty((128, 200, 3), np.uint8))
    tiles.read(Box(190, 0, WIDTH, 128), np.empty((128, WIDTH - 190, 3), np.uint8))
    assert sorted(decoded) == [0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_its_file_is_not_kept_open(tmp_path: Path, picture: np.ndarray) -> None:
    """So that any number of slides can be open."""
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture))
    stored = StoredPixels(path)
    stored.read(0, Box(0, 0, 9, 9), strict=True)
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    assert str(path) not in map(os.path.realpath, links)
    tiles = stored._stored_tiles(0)
    assert tiles is not None
    path.unlink()
    assert tiles.read(Box(0, 0, 80, 70), np.empty((70, 80, 3), np.uint8)) == [
        Box(0, 0, 64, 64),
        Box(64, 0, 80, 64),
        Box(0, 64, 64, 70),
        Box(64, 64, 80, 70),
    ]


def _same(slide: object, expected: np.ndarray) -> bool:
    frame = slide.frame(0.5)  # type: ignore[attr-defined]
    return np.array_equal(slide.read(frame.box, frame), expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_threads_and_processes_read_the_same(tmp_path: Path, picture: np.ndarray, method: str) -> None:
    path = jpeg_tiff.write(tmp_path / "x.tif", Level(picture))
    expected = through_openslide(path)
    slide = open_slide(path, mpp=0.5)
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(_same(slide, expected))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert _same(pickle.loads(pickle.dumps(slide)), expected)
    with get_context(method).Pool(1) as pool:
        assert pool.apply(_same, (slide, expected))


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "generic-pyramid-jpeg.tif",
        "generic-no-resolution.tif",
        "philips.tiff",
        "damaged/zeroed-60kB-in-tile-data.svs",
        "damaged/random-byte-flips-in-tiles.svs",
    ],
)
def test_slides_are_what_openslide_gives(shared: Path, name: str) -> None:
    """Pixels and what is lost, of all of level 0."""
    one, two = StoredPixels(shared / "slides" / name), StoredPixels(shared / "slides" / name)
    assert one._stored_tiles(0) is not None
    two._tiles[0] = None
    whole = Box(0, 0, *one.levels[0].size)
    for with_tiles, without in zip(one.read(0, whole, strict=False), two.read(0, whole, strict=False), strict=True):
        assert np.array_equal(with_tiles, without)


@pytest.mark.parametrize("name", ["TCGA-CR-7395-01A-01-TS1.svs", "leica-offset-region.scn", "mirax-sparse.mrxs"])
def test_other_formats_are_left_to_openslide(shared: Path, name: str) -> None:
    stored = StoredPixels(shared / "slides" / name)
    assert [stored._stored_tiles(level) for level in range(len(stored.levels))] == [None] * len(stored.levels)
