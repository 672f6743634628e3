"""The outlines and counts that a page draws are those of the table."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import example, given
from hypothesis import strategies as st

from nuclei_tables import PROVENANCE, blobs, write
from pipeline.errors import RunError
from pipeline.segment import tables
from pipeline.view.nuclei import TILE_PX, NucleusTiles

CORNER = np.array(PROVENANCE.bounds[:2], float)
COLS, ROWS = 3, 3  # of tiles, over bounds of 4900 x 5750 px


class Decoded(NamedTuple):
    """A tile, read as the format is described: outlines in slide px."""

    rows: list[int]
    scores: np.ndarray
    classes: np.ndarray
    outlines: list[np.ndarray]
    quantum: float


def rewrite(path: Path, table: pa.Table) -> None:
    """Another table with the same provenance."""
    about = {name: value for name, value in pq.read_metadata(path).metadata.items() if name != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(about), path)


def decode(content: bytes, col: int, row: int) -> Decoded:
    count, vertices = np.frombuffer(content, "<u4", 2)
    (quantum,) = np.frombuffer(content, "<f4", 1, 8)
    at = 12
    parts = []
    for kind, length in (("<u4", count), ("<f4", count), ("<u4", count + 1), ("<i2", 2 * vertices), ("<u2", count)):
        parts.append(np.frombuffer(content, kind, length, at))
        at += parts[-1].nbytes
    assert at == len(content)
    rows, scores, starts, xy, classes = parts
    middle = (np.array([col, row]) + 0.5) * TILE_PX
    slide_xy = xy.reshape(-1, 2) * float(quantum) + middle + CORNER
    outlines = [slide_xy[starts[i] : starts[i + 1]] for i in range(count)]
    return Decoded(rows.tolist(), scores, classes, outlines, float(quantum))


def all_tiles(nuclei: NucleusTiles) -> dict[tuple[int, int], Decoded]:
    cols, rows = nuclei.tiles
    found = {}
    for row in range(rows):
        for col in range(cols):
            content = nuclei.tile(col, row)
            assert content is not None
            found[col, row] = decode(content, col, row)
    return found


@st.composite
def outlines(draw: st.DrawFn) -> np.ndarray:
    """Triangles and rectangles anywhere in and around the bounds, many on the edges of tiles."""
    edges = [c + k * TILE_PX for c in PROVENANCE.bounds[:2] for k in range(4)]
    place = st.one_of(st.floats(-500, 7000), st.sampled_from([float(edge) for edge in edges]))
    side = st.floats(1, 300)
    shapes = []
    for _ in range(draw(st.integers(0, 12))):
        x, y, w, h = draw(place), draw(place), draw(side), draw(side)
        box = shapely.box(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        triangle = shapely.Polygon([(x, y), (x + w, y), (x, y + h)])
        shapes.append(draw(st.sampled_from([box, triangle])))
    return np.array(shapes, dtype=object)


@given(outlines())
@example(np.array([shapely.box(0, 0, 9000, 9000), shapely.box(1000, 1000, 1010, 1010)], dtype=object))
@example(np.zeros(0, dtype=object))
def test_every_nucleus_is_in_the_tile_of_its_centroid_and_in_no_other(shapes: np.ndarray) -> None:
    """Law: tiles partition the nuclei, and hold their outlines within half a quantum."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "nuclei.parquet"), shapes)
        table, nuclei = tables.read_nuclei(path), NucleusTiles(path)
    found = all_tiles(nuclei)
    assert nuclei.tiles == (COLS, ROWS)
    assert len(nuclei) == len(shapes)
    assert sorted(row for tile in found.values() for row in tile.rows) == list(range(len(shapes)))
    names = list(nuclei.classes)
    for (col, row), tile in found.items():
        for i, number in enumerate(tile.rows):
            xy = np.array([table["centroid_x"][number].as_py(), table["centroid_y"][number].as_py()]) - CORNER
            where = np.clip(xy // TILE_PX, 0, (COLS - 1, ROWS - 1))
            assert (col, row) == tuple(where.astype(int))
            drawn, truth = (
                tile.outlines[i],
                shapely.get_coordinates(shapely.from_wkb(table["geometry"][number].as_py())),
            )
            assert drawn.shape == truth[:-1].shape
            # the table of vertices is in sixteenths, and a tile that is coarser rounds them once more
            assert (
                np.abs(drawn - truth[:-1]).max() <= tile.quantum / 2 + (1 / 32 if tile.quantum > 1 / 16 else 0) + 1e-6
            )
            corner = np.array([col, row]) * TILE_PX + CORNER
            reach = nuclei.overhang_px + 1e-6
            assert (truth >= corner - reach).all()
            assert (truth <= corner + TILE_PX + reach).all()
            assert tile.scores[i] == table["score"][number].as_py()
            assert names[tile.classes[i]] == table["class"][number].as_py()


@given(outlines(), st.floats(0, 1))
def test_the_cells_sum_to_the_nuclei(shapes: np.ndarray, score: float) -> None:
    """Law: each nucleus counts in one cell, by class and by score."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "nuclei.parquet"), shapes)
        table, nuclei = tables.read_nuclei(path), NucleusTiles(path)
    classes = range(len(nuclei.classes))
    assert nuclei.density(0, classes).sum() == len(shapes)
    assert nuclei.density(score, classes).sum() == (table["score"].to_numpy() >= score).sum()
    each = [int(nuclei.density(0, [number]).sum()) for number in classes]
    assert each == nuclei.class_counts()
    assert nuclei.density(0, []).sum() == 0


def test_a_cell_counts_the_nuclei_in_it(tmp_path: Path) -> None:
    """Fifty micrometres at 0.25 um/px: cells of 200 px from the corner of the bounds."""
    at = [(100, 250), (299, 449), (300, 250), (4999, 5999)]
    shapes = np.array([shapely.box(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in at], dtype=object)
    nuclei = NucleusTiles(write(tmp_path / "nuclei.parquet", shapes))
    counts = nuclei.density(0, range(len(nuclei.classes)))
    assert counts.shape == (29, 25)
    assert counts[0, 0] == 2
    assert counts[0, 1] == 1
    assert counts[28, 24] == 1


def test_one_large_outline_makes_only_its_own_tile_coarser(tmp_path: Path) -> None:
    shapes = np.array([shapely.box(-9000, 0, 12000, 2000), shapely.box(4500, 5000, 4510, 5010)], dtype=object)
    tiles = all_tiles(NucleusTiles(write(tmp_path / "nuclei.parquet", shapes)))
    assert sorted({tile.quantum for tile in tiles.values()}) == [1 / 16, 6 / 16]


def test_a_nucleus_is_its_row_without_the_outline(tmp_path: Path) -> None:
    path = write(tmp_path / "nuclei.parquet", blobs(50))
    nuclei, rows = NucleusTiles(path), tables.read_nuclei(path).drop_columns(["geometry"]).to_pylist()
    assert [nuclei.nucleus(row) for row in range(50)] == rows
    assert nuclei.nucleus(50) is None


def test_other_columns_are_shown_and_numbers_that_are_none_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "nuclei.parquet", blobs(2))
    table = tables.read_nuclei(path)
    table = table.set_column(table.column_names.index("artefact"), "artefact", pa.array(["pen", None]))
    table = table.append_column("bbox", pa.array([{"xmin": 1.0}, {"xmin": 2.0}]))
    rewrite(path, table.append_column("extra_um", pa.array([float("nan"), 1.0])))
    first = NucleusTiles(path).nucleus(0)
    assert first is not None
    assert first["artefact"] == "pen"
    assert not {"bbox", "geometry", "extra_um"} & first.keys()


def test_tiles_that_do_not_exist(tmp_path: Path) -> None:
    nuclei = NucleusTiles(write(tmp_path / "nuclei.parquet", blobs(2)))
    assert nuclei.tile(COLS, 0) is None
    assert nuclei.tile(0, ROWS) is None


def change(path: Path, column: str, values: pa.Array) -> None:
    table = tables.read_nuclei(path)
    rewrite(path, table.set_column(table.schema.get_field_index(column), column, values))


@pytest.mark.parametrize("damage", ["truncated", "not parquet", "no metadata", "no geometry", "NaN", "far away"])
def test_a_damaged_table_is_an_error_with_the_remedy(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "nuclei.parquet", blobs(3))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not parquet":
        path.write_text("id,x,y\n")
    elif damage == "no metadata":
        pq.write_table(tables.read_nuclei(path).replace_schema_metadata(), path)
    elif damage == "no geometry":
        change(path, "geometry", pa.array([b"\x00", b"", b"\x01\x03"]))
    elif damage == "NaN":
        change(path, "centroid_x", pa.array([1.0, float("nan"), 3.0]))
    else:
        change(path, "geometry", pa.array([shapely.box(0, 0, 1e12, 1).wkb] * 3))
    with pytest.raises(
        RunError,
        match=r"nuclei\.parquet cannot be read .*: put the file back, or run the slide again with --overwrite$",
    ):
        NucleusTiles(path)
