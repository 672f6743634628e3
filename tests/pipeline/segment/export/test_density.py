"""density/: counted by hand, summed to the whole, and read by tifffile and as GeoJSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from nuclei_tables import PROVENANCE, append, blobs, write
from pipeline import files
from pipeline.config import Export
from pipeline.errors import ConfigError
from pipeline.segment import tables
from pipeline.segment.export import write_density
from slides.geometry import Box, Size

OBLONG = dataclasses.replace(PROVENANCE, um_per_px=(0.25, 0.5))  # pixels that are no squares


def table(path: Path, centres: Sequence[tuple[float, float]], half: list[float], names: list[str]) -> Path:
    """A slide of 90 x 50 px from (10, 20), of 1 um, with squares as nuclei."""
    provenance = tables.Provenance(
        "s", (1.0, 1.0), Size(200, 100), Box(10, 20, 100, 70), "d", {"A": (1, 2, 3), "B": (4, 5, 6)}
    )
    x, y = np.add(centres, (10.0, 20.0)).T
    shapes = np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object)
    with tables.NucleiWriter(path, provenance) as writer:
        append(
            writer,
            shapes,
            class_name=names,
            score=np.ones(len(x)),
            votes=np.ones(len(x), int),
            stains=np.zeros((len(x), len(tables.STAINS))),
        )
    return path


def picture(folder: Path) -> tuple[np.ndarray, dict[str, str], list[str]]:
    """The channels, the attributes of OME's Pixels, and the names of the channels."""
    with tifffile.TiffFile(folder / "density.ome.tif") as file:
        assert file.ome_metadata
        pixels = next(e for e in ElementTree.fromstring(file.ome_metadata).iter() if e.tag.endswith("}Pixels"))
        names = [e.attrib["Name"] for e in pixels if e.tag.endswith("}Channel")]
        return np.asarray(file.asarray()), pixels.attrib, names


def tiles(folder: Path) -> list[dict[str, Any]]:
    content = json.loads((folder / "density.geojson").read_text(encoding="utf-8"))
    return list(content["features"])


def test_squares_counted_by_hand(tmp_path: Path) -> None:
    """3 x 2 squares of 40 um, those at the right 10 um wide, those below 10 um high; one on a border, one beyond it."""
    centres = [(5, 5), (39.5, 5), (40, 5), (85, 45), (95, 45)]
    nuclei = table(tmp_path / "n.parquet", centres, [1, 2, 1, 1, 1], ["A", "B", "B", "A", "A"])
    assert write_density(nuclei, tmp_path / "density", Export(density_um=40.0)).written == 5
    channels, pixels, names = picture(tmp_path / "density")
    assert channels.dtype == np.float32
    assert names == ["Nuclei per mm^2", "Mean area µm^2", "A fraction", "B fraction"]
    assert {k: pixels[k] for k in ("PhysicalSizeX", "PhysicalSizeYUnit", "SizeC")} == {
        "PhysicalSizeX": "40.0",
        "PhysicalSizeYUnit": "µm",
        "SizeC": "4",
    }
    nan = np.nan
    per_square = 1e6 / 1600  # of one nucleus in a whole square
    np.testing.assert_allclose(channels[0], [[2 * per_square, per_square, 0], [0, 0, 2e6 / 100]])
    np.testing.assert_allclose(channels[1], [[(4 + 16) / 2, 4, nan], [nan, nan, 4]])
    np.testing.assert_allclose(channels[2], [[0.5, 0, nan], [nan, nan, 1]])
    np.testing.assert_allclose(channels[3], [[0.5, 1, nan], [nan, nan, 0]])
    first, second, third = tiles(tmp_path / "density")
    assert [shapely.from_geojson(json.dumps(t["geometry"])).bounds for t in (first, second, third)] == [
        (0, 0, 40, 40),
        (40, 0, 80, 40),
        (80, 40, 90, 50),
    ]
    assert first["properties"] == {
        "objectType": "tile",
        "measurements": {
            "Nuclei": 2,
            "Nuclei per mm^2": 1250,
            "Mean area µm^2": 10,
            "A fraction": 0.5,
            "B fraction": 0.5,
        },
    }
    assert len({t["id"] for t in (first, second, third)}) == 3


def test_uncropped_squares_start_at_the_corner_of_the_whole_slide(tmp_path: Path) -> None:
    nuclei = table(tmp_path / "n.parquet", [(5, 5)], [1], ["A"])
    write_density(nuclei, tmp_path / "density", Export(density_um=66.667, crop=False))
    assert picture(tmp_path / "density")[0].shape == (4, 2, 3)
    (tile,) = tiles(tmp_path / "density")
    assert shapely.from_geojson(json.dumps(tile["geometry"])).bounds == (0, 0, 66.67, 66.67)


@pytest.mark.parametrize(("um_per_px", "width"), [(0.23, 10_000), (0.26, 5000), (0.114, 50_000), (0.25, 1004)])
def test_the_last_square_is_no_sliver_made_by_rounding(um_per_px: float, width: int, tmp_path: Path) -> None:
    """A width that is a whole number of squares has as many; then a nucleus on the border is in one of real size."""
    provenance = tables.Provenance(
        "s", (um_per_px, um_per_px), Size(width, 400), Box(0, 0, width, 400), "d", {"A": (1, 2, 3)}
    )
    shape = np.asarray([shapely.box(width - 8, 10, width + 8, 26)], dtype=object)
    with tables.NucleiWriter(tmp_path / "n.parquet", provenance) as writer:
        append(
            writer,
            shape,
            class_name=["A"],
            score=np.ones(1),
            votes=np.ones(1, int),
            stains=np.zeros((1, len(tables.STAINS))),
        )
    write_density(tmp_path / "n.parquet", tmp_path / "density", Export(density_um=100.0))
    exact = width * um_per_px / 100
    assert picture(tmp_path / "density")[0].shape[2] == math.ceil(round(exact, 6))
    (tile,) = tiles(tmp_path / "density")
    assert shapely.from_geojson(json.dumps(tile["geometry"])).area > 1


@given(side_um=st.floats(10, 3000), crop=st.booleans())
def test_density_times_area_is_the_number_of_nuclei(
    side_um: float, crop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law, whatever the size of the squares; and tiles and picture say the same."""
    folder = tmp_path_factory.mktemp("density")
    nuclei = write(folder / "n.parquet", blobs(60), provenance=OBLONG)
    write_density(nuclei, folder / "density", Export(density_um=side_um, crop=crop))
    measured = [tile["properties"]["measurements"] for tile in tiles(folder / "density")]
    assert sum(m["Nuclei"] for m in measured) == 60
    area_mm2 = [shapely.from_geojson(json.dumps(t["geometry"])).area * 0.125e-6 for t in tiles(folder / "density")]
    total = sum(m["Nuclei per mm^2"] * area for m, area in zip(measured, area_mm2, strict=True))
    assert total == pytest.approx(60, rel=0.01)  # corners have two decimals
    density = picture(folder / "density")[0][0]
    np.testing.assert_allclose(density[density > 0], [m["Nuclei per mm^2"] for m in measured], rtol=1e-5)


def test_a_slide_without_nuclei_has_a_picture_and_no_tiles(tmp_path: Path) -> None:
    nuclei = write(tmp_path / "n.parquet", blobs(0), provenance=OBLONG)
    assert write_density(nuclei, tmp_path / "density", Export()).written == 0
    channels, *_ = picture(tmp_path / "density")
    assert channels.shape == (2 + len(PROVENANCE.colours), 29, 13)
    assert not channels[0].any()
    assert np.isnan(channels[1:]).all()
    assert tiles(tmp_path / "density") == []


def test_other_squares_are_another_export(tmp_path: Path) -> None:
    nuclei = write(tmp_path / "n.parquet", blobs(20))
    sums = set()
    for side in (50.0, 100.0, 50.0):
        write_density(nuclei, tmp_path / "density", Export(density_um=side))
        sums.add(files.sha256(tmp_path / "density"))
    assert len(sums) == 2
    with pytest.raises(ConfigError, match="density-um=5: need 10 to 10000 um"):
        Export(density_um=5)
