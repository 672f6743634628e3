"""The table in CSV reads back equal, by a reader that we did not write."""

import csv
import dataclasses

import numpy as np
import pytest

from nuclei_tables import PROVENANCE, blobs, write, write_not_finite
from pipeline.config import Export
from pipeline.segment import tables
from pipeline.segment.export.csv_table import write_csv
from pipeline.segment.export.exported import Exported
from pipeline.text import from_csv_cell


@pytest.mark.parametrize("crop", [True, False])
def test_the_csv_reads_back_equal(tmp_path, crop):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(25))
    assert write_csv(nuclei, tmp_path / "n.csv", Export(crop=crop)) == Exported(25)
    rows = tables.read_nuclei(nuclei)
    with (tmp_path / "n.csv").open(newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert list(back[0])[:4] == ["id", "centroid_x", "centroid_y", "class"]
    assert set(back[0]) == set(rows.column_names) - {"geometry"}
    for name in ("id", "class"):
        assert [row[name] for row in back] == rows[name].to_pylist()
    for name in ("score", "votes", "area_um2", "eosin"):
        np.testing.assert_array_equal(np.array([row[name] for row in back], np.float32), rows[name])
    for name, corner in (("centroid_x", 100), ("centroid_y", 250)):
        written = np.array([float(row[name]) for row in back])
        np.testing.assert_allclose(written + corner * crop, rows[name])


def test_a_slide_without_nuclei_has_a_header(tmp_path):
    nuclei = write(tmp_path / "nuclei.parquet", blobs(0))
    assert write_csv(nuclei, tmp_path / "n.csv", Export()) == Exported(0)
    assert len((tmp_path / "n.csv").read_text().splitlines()) == 1


def test_no_class_is_a_formula(tmp_path):
    """As in the other tables; a spreadsheet would write an error in the place of the class +."""
    provenance = dataclasses.replace(PROVENANCE, colours={"+": (1, 2, 3), "=1+1": (1, 2, 3), "CD3+, other": (1, 2, 3)})
    nuclei = write(tmp_path / "nuclei.parquet", blobs(25), provenance=provenance)
    write_csv(nuclei, tmp_path / "n.csv", Export())
    with (tmp_path / "n.csv").open(newline="", encoding="utf-8") as file:
        back = [row["class"] for row in csv.DictReader(file)]
    assert set(back) == {"'+", "'=1+1", "CD3+, other"}
    assert list(map(from_csv_cell, back)) == tables.read_nuclei(nuclei)["class"].to_pylist()


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    write_csv(write_not_finite(tmp_path / "nuclei.parquet"), tmp_path / "n.csv", Export())
    with (tmp_path / "n.csv").open(newline="") as file:
        assert [row["eosin"] for row in csv.DictReader(file)] == ["", "0.3", ""]
