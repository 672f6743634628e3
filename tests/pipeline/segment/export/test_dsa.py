"""Annotations of the Digital Slide Archive: what is in them, and that they follow large_image's schema."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from nuclei_tables import PROVENANCE, append, blobs, write
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export.dsa import write_dsa
from pipeline.segment.export.exported import Exported

POLYLINE = {"type", "closed", "points", "group", "label", "lineColor", "user"}


def annotations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("crop", [True, False])
def test_the_elements_are_the_nuclei(tmp_path: Path, crop: bool) -> None:
    nuclei = write(tmp_path / "nuclei.parquet", blobs(25))
    assert write_dsa(nuclei, tmp_path / "dsa", Export(crop=crop)) == Exported(25)
    (annotation,) = annotations(tmp_path / "dsa")
    assert set(annotation) == {"name", "description", "elements"}
    rows = tables.read_nuclei(nuclei)
    for element, row, outline in zip(annotation["elements"], rows.to_pylist(), tables.geometry(rows), strict=True):
        assert set(element) == POLYLINE
        assert (element["type"], element["closed"]) == ("polyline", True)
        assert (element["group"], element["label"]) == (row["class"], {"value": row["class"]})
        assert element["lineColor"] == "rgb({}, {}, {})".format(*PROVENANCE.colours[row["class"]])
        points = np.array(element["points"])
        assert not points[:, 2].any()
        corner = (100, 250) if crop else (0, 0)
        expected = shapely.get_coordinates(outline)[:-1] - corner
        np.testing.assert_allclose(points[:, :2], expected, atol=0.00501)
        assert element["user"]["id"] == row["id"]
        assert element["user"]["area_um2"] == pytest.approx(row["area_um2"])
        assert set(element["user"]) == set(row) - {"geometry", "class", "artefact", "centroid_x", "centroid_y"}


def test_a_file_holds_so_many_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROW_GROUP", 10)
    write_dsa(write(tmp_path / "nuclei.parquet", blobs(25)), tmp_path / "dsa", Export())
    read = annotations(tmp_path / "dsa")
    assert [len(annotation["elements"]) for annotation in read] == [10, 10, 5]
    assert [annotation["name"] for annotation in read] == ["Nuclei 1", "Nuclei 2", "Nuclei 3"]


def test_what_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    """A number that is not finite; a nucleus that is a point at a hundredth of a pixel, which is counted."""
    triangle, speck = (shapely.Polygon([(500, 500), (500 + a, 500), (500, 500 + a)]) for a in (9, 0.001))
    with tables.NucleiWriter(tmp_path / "nuclei.parquet", PROVENANCE) as writer:
        append(
            writer,
            np.array([triangle, speck]),
            class_name=["Nucleus"] * 2,
            score=np.array([np.inf, 0.5]),
            votes=np.ones(2, int),
            stains=np.array([[0.5, *[np.nan] * (len(tables.STAINS) - 1)]] * 2),
        )
    assert write_dsa(tmp_path / "nuclei.parquet", tmp_path / "dsa", Export()) == Exported(1, dropped=1)
    (element,) = annotations(tmp_path / "dsa")[0]["elements"]
    assert len(element["points"]) == 3
    assert "score" not in element["user"]
    assert "eosin" not in element["user"]
    assert element["user"]["haematoxylin"] == 0.5


def test_a_slide_without_nuclei_has_no_file(tmp_path: Path) -> None:
    assert write_dsa(write(tmp_path / "nuclei.parquet", blobs(0)), tmp_path / "dsa", Export()) == Exported(0)
    assert annotations(tmp_path / "dsa") == []
