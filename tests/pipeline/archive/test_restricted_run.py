"""`run --regions`: the nuclei in the regions are those of the whole slide, and other regions are never passed over."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

import oracle
from oracle import chosen, files, outlines, paint
from pipeline import config
from pipeline.api import plan
from pipeline.archive import run as archive_run
from pipeline.archive.ledger import read_ledger
from pipeline.archive.measure import Measured, measure_slides
from pipeline.cli import main
from pipeline.config import Execution, Settings
from pipeline.layout import RunFolder
from pipeline.segment import finished, tables
from pipeline.segment.record import SlideRecord
from pipeline.segment.regions import in_any

ONE = Execution(cluster=False, workers=1)
BLOB = shapely.Point(130, 120).buffer(70)
CORNER = shapely.Polygon([(300, 250), (405, 250), (405, 325)])


def draw(path: Path, *shapes: Any, class_: str = "Tumor") -> None:
    path.parent.mkdir(exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shape)),
            "properties": {"objectType": "annotation", "classification": {"name": class_}},
        }
        for shape in shapes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the slides x and y, and regions of x."""
    (tmp_path / "slides").mkdir()
    for seed, name in enumerate("xy"):
        paint(tmp_path / "slides" / f"{name}.tif", seed)
    draw(tmp_path / "drawn" / "x.geojson", BLOB, CORNER)
    return tmp_path


def segment(
    place: Path, regions: str = "drawn", out: str = "out", execution: Execution = ONE, settings: Settings = chosen()
) -> dict[str, SlideRecord]:
    folder = str(place / regions) if regions else ""
    settings = dataclasses.replace(settings, regions=config.Regions(folder))
    said: list[str] = []
    rows = archive_run.run(
        place / "slides", place / out, settings, execution, mpp=0.25, detect=oracle.detect, say=said.append
    )
    (place / "said.txt").write_text("\n".join(said))
    return {row.slide: row for row in rows}


def test_names_that_are_no_text_stop_no_run(place: Path) -> None:
    """Such as those of a slide and its regions in Latin-1, which Windows wrote."""
    (place / "slides" / "x.tif").rename(place / "slides" / "caf\udce9.tif")
    (place / "drawn" / "x.geojson").rename(place / "drawn" / "caf\udce9.geojson")
    assert segment(place)["caf_xe9"].status == "done"
    rows = {row["slide"]: row for row in read_ledger(RunFolder(place / "out"))}
    assert {name: row["status"] for name, row in rows.items()} == {"caf_xe9": "done", "y": "skipped"}
    assert rows["caf_xe9"]["remarks"].startswith(r"restricted to 2 regions of caf\udce9.geojson")


def test_the_nuclei_in_regions_are_those_of_the_whole_slide(place: Path) -> None:
    """Law: exactly, wherever the tiles lie."""
    whole = segment(place, regions="", out="whole")["x"]
    row = segment(place)["x"]
    table = tables.read_nuclei(place / "whole" / "x" / "nuclei.parquet")
    xy = np.stack([table["centroid_x"].to_numpy(), table["centroid_y"].to_numpy()], 1)
    inside = in_any([BLOB, CORNER], xy)
    assert row.nuclei == inside.sum() > 10
    expected = {shapely.to_wkb(p) for p in shapely.normalize(tables.geometry(table)[inside])}
    assert outlines(place / "out" / "x") == expected
    assert segment(place, out="other", settings=chosen(tile=64, margin=14, block=1))["x"].status == "done"
    assert outlines(place / "other" / "x") == expected
    assert row.tissue_mm2 < whole.tissue_mm2
    assert row.remarks[0] == "restricted to 2 regions of x.geojson, and blur is judged within them"


def test_tiles_outside_the_regions_are_not_read(place: Path) -> None:
    small = chosen(tile=64, margin=14, block=1)
    assert segment(place, settings=small)["x"].tiles < segment(place, "", "whole", settings=small)["x"].tiles


def test_a_slide_without_regions_is_skipped_and_said(place: Path) -> None:
    rows = segment(place)
    assert (rows["y"].status, rows["y"].cause) == ("skipped", f"no file of regions in {place}/drawn")
    assert not (place / "out" / "y").exists()
    assert f"WARNING: 1 slide is skipped, as {place}/drawn has no regions of it: y" in (place / "said.txt").read_text()
    assert [row["status"] for row in read_ledger(RunFolder(place / "out"))] == ["done", "skipped"]
    assert "skipped" in (place / "out" / "report.html").read_text()


def test_a_slide_that_is_done_and_has_no_regions_any_more_keeps_its_record(place: Path) -> None:
    draw(place / "drawn" / "y.geojson", BLOB)
    nuclei = segment(place)["y"].nuclei
    (place / "drawn" / "y.geojson").unlink()
    row = segment(place)["y"]
    assert (row.status, row.nuclei) == ("done before", nuclei)
    (place / "out" / "y" / "nuclei.parquet").unlink()
    row = segment(place)["y"]
    assert row.status == "failed", "it counted as done"
    assert row.cause.startswith("nuclei.parquet is missing: put the file back")


def test_a_plan_estimates_what_a_run_would_do(place: Path) -> None:
    """No slide without regions, and of the others the tissue in them."""
    whole = plan(place / "slides", Settings(), mpp=0.25)
    with pytest.warns(UserWarning, match="1 slide is skipped, as .* has no regions of it: y"):
        (drawn,) = plan(place / "slides", Settings(regions=config.Regions(str(place / "drawn"))), mpp=0.25)
    assert [estimate.slide for estimate in whole] == ["x", "y"]
    assert (drawn.slide, drawn.problem) == ("x", "")
    assert 0 < drawn.tissue_mm2 < whole[0].tissue_mm2


def test_the_command_succeeds_without_skipped_slides_and_refuses_a_folder_without_regions(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_run, "run", functools.partial(archive_run.run, detect=oracle.detect))
    flags = (
        "--mpp 0.25 --no-cluster --tissue.everywhere --tiling.tile 128 --tiling.margin 20 --stitching.max-diameter-um 4"
    )
    for folder, status, words in (
        ("drawn", 0, "1 of 2 slides done"),
        ("slides", 2, "no file there belongs to a slide"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "run",
                    str(place / "slides"),
                    "--out",
                    str(place / "o"),
                    "--regions",
                    str(place / folder),
                    *flags.split(),
                ]
            )
        assert ended.value.code == status
        assert words in "".join(capsys.readouterr())


def test_a_bad_file_of_regions_fails_its_slide_only(place: Path) -> None:
    (place / "drawn" / "y.geojson").write_text("{")
    rows = segment(place)
    assert rows["x"].status == "done"
    assert rows["y"].status == "failed"
    assert f"{place}/drawn/y.geojson is not JSON" in rows["y"].cause
    draw(place / "drawn" / "y.geojson", BLOB)
    assert segment(place)["y"].status == "done"


def test_the_same_regions_resume_and_others_are_refused(place: Path) -> None:
    """Law: never results of old regions in silence."""
    segment(place)
    before = files(place / "out" / "x")
    (place / "copy").mkdir()
    (place / "copy" / "x.tif.geojson").write_bytes((place / "drawn" / "x.geojson").read_bytes())
    assert segment(place, "copy")["x"].status == "done before"  # the content counts, not where it is
    draw(place / "drawn" / "x.geojson", CORNER)
    row = segment(place)["x"]
    assert row.status == "done otherwise"
    assert f"results of other regions (other content of {place}/drawn/x.geojson, now" in row.cause
    row = segment(place, "")["x"]
    assert f"results of other regions ({place}/drawn/x.geojson, now none): choose another --out" in row.cause
    assert files(place / "out" / "x") == before
    (place / "out" / "x" / "regions.csv").touch()
    assert segment(place, execution=dataclasses.replace(ONE, overwrite=True))["x"].status == "done"
    assert files(place / "out" / "x") != before
    assert not (place / "out" / "x" / "regions.csv").exists(), "measured on nuclei that are gone"


def test_results_without_regions_are_not_taken_for_restricted_ones(place: Path) -> None:
    segment(place, "")
    row = segment(place)["x"]
    assert row.status == "done otherwise"
    assert f"results of other regions (none, now {place}/drawn/x.geojson)" in row.cause


def test_work_that_was_started_on_other_regions_is_done_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same bytes as those of a run that was never interrupted."""

    def stop(*_: Any) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(finished, "finish_slide", stop)
        assert segment(place)["x"].status == "failed"
    assert (place / "out" / "x" / "work").exists()
    draw(place / "drawn" / "x.geojson", CORNER)
    assert segment(place)["x"].status == "done"
    assert segment(place, out="fresh")["x"].status == "done"
    assert files(place / "out" / "x") == files(place / "fresh" / "x")


def test_plan_counts_the_tissue_in_regions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*regions: str) -> list[str]:
        with pytest.raises(SystemExit):
            main(["plan", str(place / "slides"), "--mpp", "0.25", "--tissue.everywhere", *regions])
        return capsys.readouterr().out.splitlines()

    whole, drawn = planned(), planned("--regions", str(place / "drawn"))
    assert "NOTE: restricted to 2 regions of x.geojson" in "\n".join(drawn)
    assert sum(line.startswith(("x ", "y ")) for line in whole) == 2
    assert sum(line.startswith(("x ", "y ")) for line in drawn) == 1
    assert any("1 slide is skipped" in line for line in drawn)


def test_run_and_measure_count_the_same(place: Path) -> None:
    segment(place, "", "whole")
    segment(place)
    for out in ("whole", "out"):
        with pytest.raises(SystemExit) as ended:
            main(["measure", str(place / out), "--regions", str(place / "drawn")])
        assert ended.value.code == 0
    counts = [(place / out / "x" / "regions.csv").read_text() for out in ("whole", "out")]
    assert counts[0] == counts[1]
    assert pq.read_metadata(place / "out" / "x" / "nuclei.parquet").num_rows > 0


def test_regions_beyond_what_was_segmented_are_measured_as_far_as_that_reaches(place: Path) -> None:
    """Their density is that of the tissue that was looked at, and a note says so; without the file nothing is known."""
    segment(place)
    segment(place, "", out="whole")
    whole = shapely.box(0, 0, 410, 330)
    draw(place / "more" / "x.geojson", BLOB, whole)
    draw(place / "same" / "x.geojson", BLOB, CORNER)

    def measured(out: str, regions: str) -> Measured:
        return next(m for m in measure_slides(place / out, config.Regions(str(place / regions))) if m.slide == "x")

    inside, everything = measured("out", "more").rows
    assert "1 of 2 regions reaches beyond that" in measured("out", "more").words
    mm2 = 0.25e-3**2
    assert inside["tissue_mm2"] == pytest.approx(BLOB.area * mm2, rel=1e-3)
    assert everything["tissue_mm2"] == pytest.approx((BLOB.area + CORNER.area) * mm2, rel=1e-3)
    assert everything["per_mm2"] == pytest.approx(everything["nuclei"] / everything["tissue_mm2"])
    assert "beyond" not in measured("out", "same").words
    assert measured("whole", "more").rows[1]["tissue_mm2"] > 0.99 * whole.area * mm2
    (place / "drawn").rename(place / "moved")
    moved = measured("out", "moved")
    assert "only what" not in moved.words, "the same regions, wherever they are"
    assert moved.rows[0]["tissue_mm2"] == inside["tissue_mm2"]
    assert "put it back" in measured("out", "more").words
    assert all(np.isnan(row["tissue_mm2"]) and np.isnan(row["per_mm2"]) for row in measured("out", "more").rows)


def test_regions_that_lie_off_the_slide_are_named(place: Path) -> None:
    draw(place / "far" / "x.geojson", shapely.box(5000, 5000, 5100, 5100))
    (said,) = [remark for remark in segment(place, "far")["x"].remarks if "outside" in remark]
    assert said.startswith("the regions lie outside the slide (410 x 330 px)")
    assert said.endswith("or is it --regions.no-crop?")
