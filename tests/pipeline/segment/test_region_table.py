"""Nuclei measured in regions: counts worked out by hand, and a partition that sums to the whole."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from nuclei_tables import append
from pipeline.layout import SlideFolder
from pipeline.segment import tables
from pipeline.segment.annotations import place
from pipeline.segment.region_table import measure_regions
from pipeline.segment.regions import RegionFile
from slides.geometry import Box, Size

CORNER = (100, 250)  # of the slide's bounds
# centres from that corner, half the side (px of 0.5 um), class: squares of 4, 16, 36, 64 and 100 px
NUCLEI = [((10, 10), 1, "A"), ((30, 10), 2, "A"), ((50, 10), 3, "B"), ((10, 40), 4, "B"), ((70, 70), 5, "A")]


def slide(
    path: Path, nuclei: list[Any] = NUCLEI, artefacts: list[str | None] | None = None, classes: str = "AB"
) -> SlideFolder:
    """A slide of these nuclei; artefacts: the column that says in which kind of artefact each lies."""
    path.mkdir(exist_ok=True)
    folder = SlideFolder(path)
    bounds = Box(*CORNER, CORNER[0] + 100, CORNER[1] + 100)
    provenance = tables.Provenance("s", (0.5, 0.5), Size(300, 500), bounds, "d", dict.fromkeys(classes, (9, 0, 0)))
    xy = np.array([centre for centre, *_ in nuclei], float).reshape(-1, 2) + CORNER
    half = np.array([half for _, half, _ in nuclei], float).reshape(-1, 1)
    with tables.NucleiWriter(folder.nuclei, provenance) as writer:
        append(
            writer,
            np.asarray(shapely.box(*(xy - half).T, *(xy + half).T), dtype=object),
            class_name=[name for *_, name in nuclei],
            score=np.linspace(0.5, 0.9, len(nuclei)),
            votes=np.ones(len(nuclei), int),
            stains=np.zeros((len(nuclei), len(tables.STAINS))),
        )
    if artefacts is not None:
        about = pq.read_metadata(folder.nuclei).metadata
        table = pq.read_table(folder.nuclei)
        place = table.schema.get_field_index("artefact")
        table = table.set_column(place, "artefact", pa.array(artefacts, pa.string()))
        pq.write_table(table.replace_schema_metadata(about), folder.nuclei, row_group_size=2)
    return folder


def draw(path: Path, *outlines: Any, names: tuple[str, ...] = (), class_: str = "Tumor") -> RegionFile:
    """A file of QuPath's with these outlines, px from the corner of the slide's bounds."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(outline)),
            "properties": {"objectType": "annotation", "name": name, "classification": {"name": class_}},
        }
        for outline, name in zip(outlines, (*names, *[""] * len(outlines)), strict=False)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return RegionFile.of(path, crop=True)


def test_tissue_is_where_it_is_whatever_its_file_starts_at(tmp_path: Path) -> None:
    """With --export.no-crop its coordinates start at the corner of the whole slide."""
    folder = slide(tmp_path)
    draw(folder.tissue_annotation, shapely.box(0, 0, 30, 100))
    draw(folder.artefact_annotations, shapely.box(5, 5, 25, 15))
    file = draw(tmp_path / "r.geojson", shapely.box(0, 0, 40, 20))
    (cropped,) = measure_regions(folder, file).rows
    bounds = tables.read_provenance(folder.nuclei).bounds
    for path in (folder.tissue_annotation, folder.artefact_annotations):
        assert place(path, bounds, crop=False)
    (whole,) = measure_regions(folder, file).rows
    assert whole == pytest.approx(cropped, nan_ok=True)
    assert whole["tissue_mm2"] == pytest.approx((600 - 200) * 0.25e-6)


def test_counts_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region of 40 x 20 px holds two nuclei of class A, 1 and 4 um2; one of 60 x 50 px these and two of class B."""
    monkeypatch.setattr(tables, "_ROW_GROUP", 2)  # a table is read in several parts, as that of any large slide
    folder = slide(tmp_path)
    draw(folder.tissue_annotation, shapely.box(0, 0, 30, 100))
    file = draw(tmp_path / "r.geojson", shapely.box(0, 0, 40, 20), shapely.box(0, 0, 60, 50), names=("strip", "field"))
    strip, field = measure_regions(folder, file).rows
    assert (strip["region"], strip["class"], field["region"]) == ("strip", "Tumor", "field")
    assert (strip["nuclei"], field["nuclei"], strip["nuclei_in_artefacts"]) == (2, 4, 0)
    assert strip["area_mm2"] == pytest.approx(800 * 0.25e-6)
    assert strip["tissue_mm2"] == pytest.approx(600 * 0.25e-6)
    assert strip["per_mm2"] == pytest.approx(2 / (600 * 0.25e-6))
    assert field["tissue_mm2"] == pytest.approx(1500 * 0.25e-6)
    assert (strip["count_A"], strip["count_B"], field["count_A"], field["count_B"]) == (2, 0, 2, 2)
    assert (strip["fraction_A"], strip["fraction_B"], field["fraction_A"]) == (1, 0, 0.5)
    # areas of the field: 1, 4, 9 and 16 um2
    assert [field[f"area_um2_{name}"] for name in ("mean", "q25", "median", "q75")] == pytest.approx(
        [7.5, 3.25, 6.5, 10.75]
    )
    assert (strip["score_mean"], strip["votes_mean"]) == pytest.approx((0.55, 1))


def test_the_probability_of_a_class_is_measured_where_there_are_several(tmp_path: Path) -> None:
    """And all else in any case."""
    file = draw(tmp_path / "r.geojson", shapely.box(0, 0, 40, 20))
    one = slide(tmp_path / "one", [nucleus for nucleus in NUCLEI if nucleus[-1] == "A"], classes="A")
    (row,), (other,) = measure_regions(one, file).rows, measure_regions(slide(tmp_path / "two"), file).rows
    assert other["class_score_mean"] == 1
    scores = {f"class_score_{name}" for name in ("mean", "q25", "median", "q75")}
    assert {*other} - {*row} == {"count_B", "fraction_B", *scores}
    assert row["area_um2_mean"] == other["area_um2_mean"] == 2.5
    assert not any(name.startswith("centroid") for name in row)


def test_artefacts_are_left_out_of_the_tissue_and_of_all_but_the_count(tmp_path: Path) -> None:
    folder = slide(tmp_path, artefacts=[None, "Artefact: pen", "", "", ""])  # null, as other programs write it
    draw(folder.tissue_annotation, shapely.box(0, 0, 50, 100))
    draw(folder.artefact_annotations, shapely.box(20, 0, 30, 20), shapely.box(25, 0, 90, 10))  # they overlap each other
    file = draw(tmp_path / "r.geojson", shapely.box(0, 0, 40, 20))
    (row,) = measure_regions(folder, file).rows
    assert (row["nuclei"], row["nuclei_in_artefacts"], row["area_um2_mean"]) == (2, 1, 1)
    assert (row["count_A"], row["count_B"], row["fraction_A"]) == (1, 0, 1)
    # 40 x 20 px without 10 x 20 px of the one artefact, and without 10 x 10 of the other beside it
    assert row["tissue_mm2"] == pytest.approx((800 - 200 - 100) * 0.25e-6)
    assert row["per_mm2"] == pytest.approx(1 / row["tissue_mm2"])


def test_an_artefact_that_touches_the_tissue_in_a_line_and_overlaps_it_elsewhere(tmp_path: Path) -> None:
    """The two share a line and an area; older versions of GEOS raise on a geometry of both."""
    folder = slide(tmp_path)
    draw(folder.tissue_annotation, shapely.Polygon([(0, 0), (60, 0), (60, 60), (40, 60), (40, 20), (0, 20)]))
    draw(folder.artefact_annotations, shapely.box(10, 20, 50, 40))
    (row,) = measure_regions(folder, draw(tmp_path / "r.geojson", shapely.box(0, 0, 100, 100))).rows
    assert row["tissue_mm2"] == pytest.approx((60 * 20 + 20 * 40 - 10 * 20) * 0.25e-6)


def test_without_an_outline_of_the_tissue_its_area_is_not_known(tmp_path: Path) -> None:
    folder = slide(tmp_path)
    table = measure_regions(folder, draw(tmp_path / "r.geojson", shapely.box(0, 0, 40, 20)))
    (note,) = table.notes
    assert note.startswith("mm2 of tissue are not known, as tissue.geojson is missing: put the file back, or run the")
    assert math.isnan(table.rows[0]["tissue_mm2"])
    assert math.isnan(table.rows[0]["per_mm2"])
    assert table.rows[0]["nuclei"] == 2


@pytest.mark.parametrize(("crop", "flag"), [(True, "--regions.no-crop"), (False, "--regions.crop")])
def test_regions_off_the_slide_are_named(tmp_path: Path, crop: bool, flag: str) -> None:
    """They have no nuclei, as a region of glass has none: only the note tells a wrong frame from that."""
    folder = slide(tmp_path)
    draw(folder.tissue_annotation, shapely.box(0, 0, 30, 100))
    file = draw(tmp_path / "r.geojson", shapely.box(5000, 5000, 5010, 5010), shapely.box(0, 0, 400, 5020))
    table = measure_regions(folder, file._replace(crop=crop))
    assert table.rows[0]["nuclei"] == 0
    (note,) = table.notes
    assert note.startswith("1 of 2 regions lies outside the slide (")
    assert note.endswith(f"were they drawn on another one, or is it {flag}?")


@pytest.mark.parametrize("nuclei", [NUCLEI, []])
@pytest.mark.parametrize("rewritten", [False, True])  # a table without rows may have a row group without any
def test_a_region_without_nuclei_or_tissue(tmp_path: Path, nuclei: list[Any], rewritten: bool) -> None:
    folder = slide(tmp_path, nuclei, [""] * len(nuclei) if rewritten else None)
    draw(folder.tissue_annotation, shapely.box(0, 0, 5, 5))
    (row,) = measure_regions(folder, draw(tmp_path / "r.geojson", shapely.box(80, 0, 99, 20))).rows
    assert (row["nuclei"], row["tissue_mm2"], row["count_A"], row["count_B"]) == (0, 0, 0, 0)
    assert all(math.isnan(row[name]) for name in ("per_mm2", "fraction_A", "area_um2_median"))


CENTRES = st.lists(st.tuples(st.integers(5, 95), st.integers(5, 95)), min_size=1, max_size=30, unique=True)


@given(centres=CENTRES, x=st.integers(5, 95), y=st.integers(5, 95))
def test_a_partition_of_the_slide_sums_to_the_whole(
    centres: list[tuple[int, int]], x: int, y: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: nuclei, tissue and classes of the parts are those of the slide, wherever its nuclei lie."""
    folder = slide(tmp_path_factory.mktemp("slide"), [(c, 1, "AB"[k % 2]) for k, c in enumerate(centres)])
    draw(folder.tissue_annotation, shapely.Point(50, 50).buffer(40))
    draw(folder.artefact_annotations, shapely.Point(40, 60).buffer(20))
    whole, *parts = measure_regions(
        folder,
        draw(
            folder.path / "r.geojson",
            shapely.box(0, 0, 100, 100),
            shapely.Polygon([(0, 0), (100, 0), (x, y)]),
            shapely.Polygon([(100, 0), (100, 100), (x, y)]),
            shapely.Polygon([(100, 100), (0, 100), (x, y)]),
            shapely.Polygon([(0, 100), (0, 0), (x, y)]),
        ),
    ).rows
    assert whole["nuclei"] == len(centres) == sum(part["nuclei"] for part in parts)
    assert sum(part["tissue_mm2"] for part in parts) == pytest.approx(whole["tissue_mm2"])
    for name in "AB":
        assert sum(part[f"count_{name}"] for part in parts) == whole[f"count_{name}"]
        assert whole[f"count_{name}"] == pytest.approx(whole["nuclei"] * whole[f"fraction_{name}"])
