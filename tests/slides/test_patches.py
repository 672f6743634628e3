"""The patch store: what is done reads back, whatever happens; blocks do not touch each other."""

import os
import subprocess
import sys
import time
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slides import patches
from slides.errors import GridError, StoreMismatch
from slides.geometry import Box, Frame, Size
from slides.grid import Tile, TileGrid
from slides.patches import PatchStore, block_side, cut
from slides.slide import open_slide

ROOT = Path(__file__).resolve().parents[2]
GRID = TileGrid(Size(100, 70), tile=24, margin=4, block=3)  # 5 x 7 tiles in 2 x 3 blocks


SIDE = block_side(GRID)


def _content(tiles: tuple[Tile, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A region and lost shares, of noise."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), rng.random(len(tiles), np.float32)


def _windows(tiles: tuple[Tile, ...], region: np.ndarray) -> list[np.ndarray]:
    """What the tiles of a block read, of the region of the block."""
    corners = [(tile.row % GRID.block * GRID.stride, tile.col % GRID.block * GRID.stride) for tile in tiles]
    return [region[y : y + GRID.tile, x : x + GRID.tile] for y, x in corners]


def _assert_reads(store: PatchStore, block: int, tiles: tuple[Tile, ...], content: tuple[Any, Any]) -> None:
    read = store.read(block, tiles)
    assert read is not None
    assert [patch.shape for patch in read[0]] == [(GRID.tile, GRID.tile, 3)] * len(tiles)
    assert all(map(np.array_equal, read[0], _windows(tiles, content[0])))
    assert np.array_equal(read[1], content[1])


@given(order=st.permutations(range(GRID.blocks)), keep=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, order: list[int], keep: int) -> None:
    """In any order of blocks, for all tiles of a block or some; other blocks stay as they are."""
    store = PatchStore.create(tmp_path_factory.mktemp("store") / "patches.zarr", GRID, "digest")
    written = {}
    for block in order:
        assert not store.is_done(block)
        tiles = tuple(tile for i, tile in enumerate(GRID.tiles_of(block)) if keep >> i & 1)
        written[block] = (tiles, *_content(tiles, block))
        store.write(block, *written[block])
    reopened = PatchStore.create(store.path, GRID, "digest")
    for block, (tiles, region, lost) in written.items():
        assert reopened.is_done(block)
        _assert_reads(reopened, block, tiles, (region, lost))
        others = tuple(tile for tile in GRID.tiles_of(block) if tile not in tiles)
        _assert_reads(reopened, block, others, (region, np.zeros(len(others), np.float32)))


def test_a_white_block_leaves_no_region_but_is_done(tmp_path: Path) -> None:
    """Also where it had one before."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    tiles = GRID.tiles_of(0)
    white = np.full((SIDE, SIDE, 3), 255, np.uint8), np.zeros(9, np.float32)
    for content in (white, _content(tiles), white):
        store.write(0, tiles, *content)
        assert store.is_done(0)
        _assert_reads(store, 0, tiles, content)
        assert _regions(store) == ([] if content is white else [("0", "0")])


def test_any_zarr_reader_reads_the_store(tmp_path: Path) -> None:
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    tiles = GRID.tiles_of(4)
    region, lost = _content(tiles)
    store.write(4, tiles, region, lost)
    group: Any = zarr.open_group(store.path, mode="r", zarr_format=3)
    assert group.attrs["digest"] == "digest"
    assert np.array_equal(group["regions"][1, 1], region)
    assert (group["regions"][0] == 255).all()
    for tile, share in zip(tiles, lost, strict=True):
        assert group["lost"][tile.row, tile.col] == share
    assert np.asarray(group["done"]).any(axis=2).tolist() == [[False, False, False], [False, True, False]]


def _regions(store: PatchStore) -> list[tuple[str, ...]]:
    """Row and column of the blocks whose region is stored."""
    stored = (path for path in (store.path / "regions").glob("c/**/*") if path.is_file())
    return sorted(path.relative_to(store.path / "regions").parts[1:3] for path in stored)


def test_discarding_frees_the_block_and_nothing_else(tmp_path: Path) -> None:
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    for block in (0, 1):
        store.write(block, GRID.tiles_of(block), *_content(GRID.tiles_of(block), block))
    store.discard(0)
    store.discard(0)
    assert [store.is_done(block) for block in (0, 1)] == [False, True]
    assert store.read(0, GRID.tiles_of(0)) is None
    assert _regions(store) == [("0", "1")]
    store.write(0, GRID.tiles_of(0), *_content(GRID.tiles_of(0), 7))
    _assert_reads(store, 0, GRID.tiles_of(0), _content(GRID.tiles_of(0), 7))


@pytest.mark.parametrize("files", [1, 2])
def test_a_block_is_not_marked_as_done_while_it_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """However many files are gone: no reader of the store is told to look for them."""
    store, unlink, removed = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest"), Path.unlink, list[Path]()
    store.write(0, GRID.tiles_of(0), *_content(GRID.tiles_of(0)))

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == files:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.discard(0)
    group: Any = zarr.open_group(store.path, mode="r", zarr_format=3)
    assert not np.asarray(group["done"]).any()
    assert not store.is_done(0)


def test_a_region_is_written_without_reading_the_old_one(tmp_path: Path) -> None:
    """What a killed process left behind does not matter, not even garbage."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    tiles = GRID.tiles_of(4)
    region = store.path / "regions" / "c" / "1" / "1" / "0" / "0" / "0"
    region.parent.mkdir(parents=True)
    region.write_bytes(b"garbage")
    store.write(4, tiles, *_content(tiles))
    _assert_reads(store, 4, tiles, _content(tiles))


def test_another_configuration_or_grid_is_refused_and_both_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "patches.zarr"
    PatchStore.create(path, GRID, "aaaa")
    with pytest.raises(StoreMismatch, match=r"patches\.zarr was made with digest aaaa, this run has bbbb"):
        PatchStore.create(path, GRID, "bbbb")
    with pytest.raises(StoreMismatch, match=r"'margin': 4.*'margin': 3"):
        PatchStore.create(path, TileGrid(GRID.size, 24, 3, 3), "aaaa")


def test_blocks_of_another_configuration_are_never_done(tmp_path: Path) -> None:
    """Not even where the metadata that would tell are gone."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "aaaa")
    store.write(0, GRID.tiles_of(0), *_content(GRID.tiles_of(0)))
    (store.path / "zarr.json").unlink()
    assert not PatchStore.create(store.path, GRID, "bbbb").is_done(0)


def test_tiles_of_another_block_are_refused(tmp_path: Path) -> None:
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    with pytest.raises(GridError, match="is not in block 0"):
        store.read(0, GRID.tiles_of(1))


# A process of its own: makes or opens the store, then writes blocks (without end, if asked to).
WRITER = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from slides.geometry import Size
from slides.grid import TileGrid
from slides.patches import PatchStore, block_side

grid = TileGrid(Size(100, 70), tile=24, margin=4, block=3)
store = PatchStore.create(Path(sys.argv[1]), grid, "digest")
again = True
while again:
    for block in map(int, sys.argv[3:]):
        tiles, rng = grid.tiles_of(block), np.random.default_rng(block)
        region = rng.integers(0, 256, (block_side(grid), block_side(grid), 3), np.uint8)
        store.write(block, tiles, region, rng.random(len(tiles), np.float32))
    again = sys.argv[2] == "for ever"
"""


def _writer(path: Path, how_long: str, blocks: Iterable[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), how_long, *map(str, blocks)], cwd=ROOT)


def _assert_done_is_whole(path: Path) -> int:
    """Every block that says done holds all its patches. Returns how many do."""
    store = PatchStore.create(path, GRID, "digest")
    done = [block for block in range(GRID.blocks) if store.is_done(block)]
    for block in done:
        _assert_reads(store, block, GRID.tiles_of(block), _content(GRID.tiles_of(block), block))
    return len(done)


def test_a_killed_writer_never_leaves_a_block_that_is_done_by_half(tmp_path: Path) -> None:
    path = tmp_path / "patches.zarr"
    with _writer(path, "for ever", range(GRID.blocks)) as writer:
        while writer.poll() is None and not any(path.glob("done/c/*/*")):
            time.sleep(0.01)
        time.sleep(0.05)
        writer.kill()
    _assert_done_is_whole(path)
    with _writer(path, "once", range(GRID.blocks)) as writer:
        assert writer.wait() == 0
    assert _assert_done_is_whole(path) == GRID.blocks


def test_processes_write_different_blocks_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "patches.zarr"  # whoever comes first makes the store
    writers = [_writer(path, "once", range(first, GRID.blocks, 3)) for first in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert _assert_done_is_whole(path) == GRID.blocks
    assert [entry.name for entry in tmp_path.iterdir()] == ["patches.zarr"]


# A process of its own: writes one block again and again, with the contents of two seeds in turn.
REWRITER = """
import itertools, sys
from pathlib import Path
from typing import Any
import numpy as np
from slides.geometry import Size
from slides.grid import TileGrid
from slides.patches import PatchStore, block_side

grid = TileGrid(Size(100, 70), tile=24, margin=4, block=3)
store = PatchStore.create(Path(sys.argv[1]), grid, "digest")
tiles, contents = grid.tiles_of(0), []
for seed in map(int, sys.argv[2:]):
    rng = np.random.default_rng(seed)
    side = block_side(grid)
    contents.append((rng.integers(0, 256, (side, side, 3), np.uint8), rng.random(len(tiles), np.float32)))
for content in itertools.cycle(contents):
    store.write(0, tiles, *content)
    print("written", flush=True)
"""


@pytest.mark.parametrize("seeds", [("1", "1"), ("1", "2")], ids=["the same", "different"])
def test_what_is_read_while_it_is_rewritten_is_one_of_the_versions_or_nothing(tmp_path: Path, seeds: Any) -> None:
    """Two processes write a block while this one reads it. Equal contents are never missed, either."""
    path, tiles = tmp_path / "patches.zarr", GRID.tiles_of(0)
    store = PatchStore.create(path, GRID, "digest")
    versions = [_content(tiles, int(seed)) for seed in seeds]
    store.write(0, tiles, *versions[0])
    command = [sys.executable, "-c", REWRITER, str(path), *seeds]
    writers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(writer.stdout and writer.stdout.readline() for writer in writers)
        reads = [store.read(0, tiles) for _ in range(300)]
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert None not in reads or seeds[0] != seeds[1]
    expected = [(_windows(tiles, region), lost) for region, lost in versions]
    for read in reads:
        if read is not None:
            assert any(all(map(np.array_equal, read[0], w)) and np.array_equal(read[1], lost) for w, lost in expected)


def _damage(file: Path, kind: str, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    at = int(rng.integers(len(content)))
    if kind in ("missing", "a folder"):
        file.unlink()
        return (file / "with").mkdir(parents=True) if kind == "a folder" else None
    if kind == "empty":
        content.clear()
    elif kind == "truncated":
        del content[at:]
    elif kind == "zeroed":
        content[at:] = bytes(len(content) - at)
    else:
        content[at] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    return None


_KINDS = ["missing", "empty", "truncated", "zeroed", "flipped", "a folder"]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("reopen", [True, False])
def test_damage_is_never_read_and_is_made_good(tmp_path: Path, kind: str, reopen: bool) -> None:
    """Any file of the store, at a random place: blocks read back as written or not at all, and can be written."""
    rng = np.random.default_rng(_KINDS.index(kind))
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    contents = {block: _content(GRID.tiles_of(block), block) for block in range(3)}
    contents[2] = np.full_like(contents[2][0], 255), np.zeros_like(contents[2][1])  # white: no shard
    for block, content in contents.items():
        store.write(block, GRID.tiles_of(block), *content)
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    assert len(files) == 4 + 3 + 2 * 2  # metadata, marks, shards and lost shares
    for file in files * (1 if kind in ("missing", "empty", "a folder") else 5):
        _damage(file, kind, rng)
        if reopen:
            store = PatchStore.create(store.path, GRID, "digest")
        for block, content in contents.items():
            tiles = GRID.tiles_of(block)
            if store.read(block, tiles) is None:
                assert not store.is_done(block)
                store.write(block, tiles, *content)
            _assert_reads(store, block, tiles, content)
        if reopen:
            group: Any = zarr.open_group(store.path, mode="r")
            assert np.array_equal(group["lost"][:3, :3].ravel(), contents[0][1])


@pytest.mark.parametrize("file", ["done", "regions", "lost", "zarr.json"])
def test_a_damaged_file_of_any_size_is_damage(tmp_path: Path, file: str) -> None:
    """Its size is compared before memory is asked for."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    content = _content(GRID.tiles_of(0), 0)
    store.write(0, GRID.tiles_of(0), *content)
    (damaged,) = (
        [store.path / file] if file == "zarr.json" else [p for p in (store.path / file / "c").rglob("*") if p.is_file()]
    )
    try:
        os.truncate(damaged, 2**43)
    except OSError:
        pytest.skip("this file system holds no file of 8 TiB")
    store = PatchStore.create(store.path, GRID, "digest")
    if file != "zarr.json":
        assert not store.is_done(0)
        store.write(0, GRID.tiles_of(0), *content)
    _assert_reads(store, 0, GRID.tiles_of(0), content)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b'{"attributes": null}', b"[" * 100_000, b'{"attributes": {"digest": 1, "grid": 1, "sha256": 1}}'],
    ids=["list", "nothing", "null", "nested", "other checksum"],
)
def test_damaged_metadata_are_no_other_configuration(tmp_path: Path, content: bytes) -> None:
    """They are written again, and the blocks stay done."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    store.write(0, GRID.tiles_of(0), *_content(GRID.tiles_of(0)))
    (store.path / "zarr.json").write_bytes(content)
    _assert_reads(PatchStore.create(store.path, GRID, "digest"), 0, GRID.tiles_of(0), _content(GRID.tiles_of(0)))
    assert zarr.open_group(store.path, mode="r").attrs["digest"] == "digest"


def test_a_write_that_fails_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, which it would keep full."""
    store = PatchStore.create(tmp_path / "patches.zarr", GRID, "digest")
    before = sorted(tmp_path.rglob("*"))

    def failing(partial: Path, file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patches, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        store.write(0, GRID.tiles_of(0), *_content(GRID.tiles_of(0)))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]
    assert not store.is_done(0)


# Cutting


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(2).integers(0, 250, (70, 100, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(range(5), range(7)), ({1}, range(7)), ({2, 3}, range(7)), (range(5), {1, 5}), ({1, 4}, {2, 4, 5})],
)
def test_patches_are_what_their_reads_hold_and_cores_put_together_are_the_slide(
    picture: Path, rows: Container[int], columns: Container[int]
) -> None:
    """Also those of some rows and columns of tiles."""
    with open_slide(picture, mpp=0.25) as slide:
        frame = slide.frame(0.25)
        whole = slide.read(frame.box, frame)
        together = np.zeros_like(whole)
        for block in range(GRID.blocks):
            tiles = tuple(tile for tile in GRID.tiles_of(block) if tile.row in rows and tile.col in columns)
            region, lost = cut(slide, tiles, GRID, slide.frame(0.25))
            assert not lost.any()
            assert region.shape == (SIDE, SIDE, 3)
            for tile, patch in zip(tiles, _windows(tiles, region), strict=True):
                assert np.array_equal(patch, slide.read(tile.read, frame))
                together[tile.core.within((0, 0))] = patch[tile.core.within((tile.read.x0, tile.read.y0))]
    if rows == range(5) and columns == range(7):
        assert np.array_equal(together, whole)


def test_a_block_is_read_once(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(picture, mpp=0.25) as slide:
        boxes: list[Box] = []
        frame, read = slide.frame(0.25), slide.read_decodable

        def watched(box: Box, frame: Frame) -> Any:
            boxes.append(box)
            return read(box, frame)

        monkeypatch.setattr(slide, "read_decodable", watched)
        cut(slide, GRID.tiles_of(0), GRID, frame)
        assert boxes == [Box(-4, -4, 52, 52)]
        region, lost = cut(slide, (), GRID, frame)
        assert (region == 255).all()
        assert (region.shape, lost.shape) == ((SIDE, SIDE, 3), (0,))


def test_the_lost_share_is_the_cores(shared: Path) -> None:
    """The shares, weighted by the cores' areas, add up to the area lost."""
    with open_slide(shared / "slides" / "damaged" / "zeroed-60kB-in-tile-data.svs") as slide:
        frame = slide.frame(1.0)
        grid = TileGrid(frame.size, 256, 32, 4)
        total = 0.0
        for block in range(grid.blocks):
            tiles = grid.tiles_of(block)
            total += float(cut(slide, tiles, grid, frame)[1] @ [tile.core.area for tile in tiles])
        _, lost = slide.read_decodable(frame.box, frame)
        assert total == pytest.approx(lost.sum(), rel=1e-4)
        assert total > 0
