"""`nightslide measure`: tables of a slide and of the run; whatever is wrong with one slide stops no other."""

import csv
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

import oracle
import pipeline
from oracle import chosen, paint
from pipeline import config, files
from pipeline.archive.measure import measure_slides
from pipeline.archive.run import run
from pipeline.archive.verify import verify_results
from pipeline.cli import main
from pipeline.config import Execution
from pipeline.errors import ExportFailed, RunError

WHOLE = shapely.box(0, 0, 410, 330)
QUARTERS = [shapely.box(x, y, x + 205, y + 165) for x in (0, 205) for y in (0, 165)]


def draw(path: Path, *shapes: Any, class_: str = "Tumor") -> None:
    path.parent.mkdir(exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shape)),
            "properties": {"objectType": "annotation", "name": f"=area {n}", "classification": {"name": class_}},
        }
        for n, shape in enumerate(shapes)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run of the slides a, b and site/c in out, and a folder for their regions."""
    (tmp_path / "slides" / "site").mkdir(parents=True)
    for seed, name in enumerate(("a", "b", "site/c")):
        paint(tmp_path / "slides" / f"{name}.tif", seed)
    rows = run(
        tmp_path / "slides",
        tmp_path / "out",
        chosen(),
        Execution(cluster=False, workers=1),
        mpp=0.25,
        say=lambda line: None,
        detect=oracle.detect,
    )
    assert [row.status for row in rows] == ["done"] * 3
    (tmp_path / "drawn").mkdir()
    return tmp_path


def measure(place: Path, capsys: pytest.CaptureFixture[str], folder: str = "out") -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["measure", str(place / folder), "--regions", str(place / "drawn")])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_slide_has_its_table_and_the_run_has_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(place / "drawn" / "a.geojson", WHOLE, *QUARTERS)
    draw(place / "drawn" / "c.tif.geojson", WHOLE, class_="Stroma")
    status, out, err = measure(place, capsys)
    assert (status, err) == (0, "")
    a, b, c, where = out.splitlines()
    assert where == f"regions: {place}/out/regions.csv"
    assert a.startswith("a: 5 regions of a.geojson")
    assert b == f"b: no file of regions in {place}/drawn"
    assert c.startswith("site/c: 1 region of c.tif.geojson")
    rows = table(place / "out" / "regions.csv")
    assert rows == table(place / "out" / "a" / "regions.csv") + table(place / "out" / "site" / "c" / "regions.csv")
    assert [(row["slide"], row["class"]) for row in rows] == [("a", "Tumor")] * 5 + [("site/c", "Stroma")]
    whole, *quarters = rows[:5]
    assert int(whole["nuclei"]) == len(pipeline.read_nuclei(place / "out" / "a")) > 50
    assert sum(int(row["nuclei"]) for row in quarters) == int(whole["nuclei"])
    assert whole["region"] == "'=area 0"  # no spreadsheet takes it for a formula
    assert not (place / "out" / "b" / "regions.csv").exists()
    assert all(not problems for _, problems in verify_results(place / "out"))
    report = (place / "out" / "report.html").read_text()
    assert "<h2>Regions</h2>" in report
    assert report.count("=area") == 6


def test_a_file_that_is_no_geojson_stops_no_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(place / "drawn" / "a.geojson", WHOLE)
    measure(place, capsys)
    (place / "drawn" / "a.geojson").write_text("<html>")
    draw(place / "drawn" / "b.geojson", WHOLE)
    status, out, err = measure(place, capsys)
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith(f"a: FAILED: {place}/drawn/a.geojson is not JSON")
    assert line.endswith("export it again")
    assert "b: 1 region" in out
    assert [row["slide"] for row in table(place / "out" / "regions.csv")] == ["b"]
    assert not (place / "out" / "a" / "regions.csv").exists(), "it was of regions that are gone"


def test_a_broken_archive_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passed over it would leave its slide without regions."""
    draw(place / "drawn" / "a.geojson", WHOLE)
    (place / "drawn" / "b.zip").write_bytes(b"PK, of half of which nothing came")
    status, _, err = measure(place, capsys)
    assert status == 1
    assert "b.zip cannot be read (File is not a zip file): export it again, or remove it" in err
    assert [row["slide"] for row in table(place / "out" / "regions.csv")] == ["a"]


def test_a_damaged_table_is_a_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever library notices the damage, and by whatever error; no other slide is lost, to measure or to export."""
    draw(place / "drawn" / "a.geojson", WHOLE)
    draw(place / "drawn" / "b.geojson", WHOLE)
    file = place / "out" / "a" / "nuclei.parquet"
    metadata = json.dumps({"um_per_px": [0.25, 0.25]})[:9].encode()  # not JSON
    for damaged in (b"PAR1 nothing PAR1", _with_provenance(file, metadata)):
        file.write_bytes(damaged)
        _describe(file)
        status, out, err = measure(place, capsys)
        assert status == 1
        assert err.startswith(f"a: FAILED: {file} cannot be measured: it is damaged (")
        assert err.endswith("): put the file back, or run the slide again with --overwrite\n")
        assert "b: 1 region" in out
        with pytest.raises(ExportFailed, match=re.escape(f"{file} could not be exported: it is damaged (")):
            pipeline.export(place / "out", "csv")
        assert (place / "out" / "b" / "nuclei.csv").exists()


def test_nothing_is_made_from_a_table_that_is_not_the_slides(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of another slide, or a bit that flipped: what was measured and exported was wrong without a word."""
    draw(place / "drawn" / "a.geojson", WHOLE)
    draw(place / "drawn" / "b.geojson", WHOLE)
    file, other = place / "out" / "a" / "nuclei.parquet", place / "out" / "b" / "nuclei.parquet"
    whole = file.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    remedy = "put the file back, or run the slide again with --overwrite\n"
    for content, words in (
        (other.read_bytes(), f"has {other.stat().st_size:,} bytes, was written with {len(whole):,}"),
        (flipped, "has other content than was written"),
    ):
        file.write_bytes(content)
        before = (place / "out" / "a" / "nuclei.geojson.zip").read_bytes()
        assert measure(place, capsys)[::2] == (1, f"a: FAILED: {file.name} {words}: {remedy}")
        assert [row["slide"] for row in table(place / "out" / "regions.csv")] == ["b"]
        with pytest.raises(ExportFailed, match=re.escape(f"{file} could not be exported: {file.name} {words}")):
            pipeline.export(place / "out", ["qupath", "csv"])
        assert (place / "out" / "a" / "nuclei.geojson.zip").read_bytes() == before
        assert not (place / "out" / "a" / "nuclei.csv").exists()
    file.write_bytes(whole)
    assert measure(place, capsys)[::2] == (0, "")


@pytest.mark.parametrize("name", ["tissue.geojson", "artefacts.geojson"])
def test_the_area_of_tissue_is_not_that_of_another_slide(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(place / "drawn" / "a.geojson", WHOLE)
    file = place / "out" / "a" / name
    file.write_text(file.read_text() + "\n")
    status, _, err = measure(place, capsys)
    assert status == 1
    assert err.startswith(f"a: FAILED: {name} has {file.stat().st_size:,} bytes, was written with ")


def test_a_slide_whose_table_cannot_be_written_stops_no_other(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may be of another user."""

    def refuse(partial: Path, path: Path, replace: Callable[..., None] = os.replace) -> None:
        if path == place / "out" / "a" / "regions.csv":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(partial))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", refuse)
    for name in ("a", "b"):
        draw(place / "drawn" / f"{name}.geojson", WHOLE)
    status, _, err = measure(place, capsys)
    assert status == 1
    assert err.startswith(f"a: FAILED: {place}/out/a/regions.csv: Read-only file system: make it a file or folder that")
    assert [row["slide"] for row in table(place / "out" / "regions.csv")] == ["b"]


def test_a_table_that_is_gone_is_a_line_with_the_remedy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(place / "drawn" / "a.geojson", WHOLE)
    file = place / "out" / "a" / "nuclei.parquet"
    file.unlink()
    gone = f"{file} cannot be measured: it is missing: put the file back, or run the slide again with --overwrite"
    assert measure(place, capsys)[::2] == (1, f"a: FAILED: {gone}\n")


@pytest.mark.parametrize("name", ["tissue.geojson", "artefacts.geojson"])
def test_without_an_outline_the_area_of_tissue_is_not_known(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the artefacts, tissue in them would count, and their nuclei not."""
    draw(place / "drawn" / "a.geojson", WHOLE)
    (place / "out" / "a" / name).unlink()
    _, out, _ = measure(place, capsys)
    assert f"mm2 of tissue are not known, as {name} is missing: put the file back, or run the slide again" in out
    (row,) = table(place / "out" / "a" / "regions.csv")
    assert (row["tissue_mm2"], row["per_mm2"]) == ("", "")


def test_a_damaged_slide_json_is_no_lack_of_regions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the slide's own name, a.tif, without which the file of its regions is not found."""
    draw(place / "drawn" / "a.tif.geojson", WHOLE)
    draw(place / "drawn" / "b.tif.geojson", WHOLE)
    file = place / "out" / "a" / "slide.json"
    file.write_bytes(file.read_bytes()[:100])
    status, out, err = measure(place, capsys)
    assert status == 1
    assert err.startswith(f"a: FAILED: {file} is damaged, so which file of regions belongs to the slide is not known: ")
    assert "b: 1 region" in out
    assert "site/c: no file of regions" in out


def _describe(file: Path) -> None:
    """Have slide.json say of a result what it is now, as if it had been damaged before that was written."""
    slide_json = file.with_name("slide.json")
    content = json.loads(slide_json.read_text())
    content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
    files.write_json(slide_json, files.with_checksum(content))


def _with_provenance(file: Path, text: bytes) -> bytes:
    """A table with other metadata of ours."""
    table = pq.read_table(file)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({**pq.read_metadata(file).metadata, b"nightslide": text}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("damaged", [lambda text: text.replace('"regions": null', '"regions": "x"'), lambda text: "{"])
def test_a_damaged_slide_json_is_a_line(
    damaged: Callable[[str], str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says to which regions the slide was restricted, and so what tissue was segmented."""
    for name in ("a", "b"):
        draw(place / "drawn" / f"{name}.geojson", WHOLE)
    file = place / "out" / "a" / "slide.json"
    file.write_text(damaged(file.read_text()))
    status, _, err = measure(place, capsys)
    assert status == 1
    assert "slide.json is damaged" in err
    assert [row["slide"] for row in table(place / "out" / "regions.csv")] == ["b"]


def test_one_slide_by_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's table has what was measured of it last, and of the others what it had."""
    for name in "abc":
        draw(place / "drawn" / f"{name}.geojson", WHOLE)
    measure(place, capsys)
    before = table(place / "out" / "regions.csv")
    draw(place / "drawn" / "c.geojson", *QUARTERS)
    assert measure(place, capsys, "out/site/c")[0] == 0
    of_c = table(place / "out" / "site" / "c" / "regions.csv")
    assert [row["slide"] for row in of_c] == ["site/c"] * 4
    assert table(place / "out" / "regions.csv") == [*before[:2], *of_c]


def test_a_file_of_no_finished_slide_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name with an error in it, or a slide that failed. Where one slide is measured, the others have files, too."""
    for name in ("a.geojson", "a.tif.geojson", "B7.geojson", "tissue.geojson", "density.geojson"):
        draw(place / "drawn" / name, WHOLE)
    status, out, err = measure(place, capsys)
    assert (status, err) == (0, "")
    assert [line.partition(": not used: it is of no finished slide")[0] for line in out.splitlines()[3:-1]] == [
        f"{place}/drawn/B7.geojson",
        f"{place}/drawn/a.geojson",
    ]
    assert "not used" not in measure(place, capsys, "out/a")[1]


def test_a_table_in_another_encoding_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a spreadsheet saves it; the run's table is made of those of all slides."""
    for name in ("a", "b"):
        draw(place / "drawn" / f"{name}.tif.geojson", WHOLE)
    measure(place, capsys)
    (place / "out" / "b" / "regions.csv").write_bytes("slide,region\nb,Präparat\n".encode("latin-1"))
    code, _, said = measure(place, capsys, "out/a")
    assert code == 2
    assert re.search(r"b.regions\.csv is no table of regions .*: measure its slide again, or delete the file", said)


def test_one_slide_without_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(place / "drawn" / "c.geojson", WHOLE)
    (place / "out" / "site" / "c").rename(place / "c")
    assert measure(place, capsys, "c")[0] == 0
    assert [row["slide"] for row in table(place / "c" / "regions.csv")] == ["c"]
    assert not (place / "c" / "report.html").exists()


def test_a_script_measures_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(place / "drawn" / "a.geojson", WHOLE)
    measure(place, capsys)
    before = (place / "out" / "regions.csv").read_bytes()
    a, b, _ = pipeline.measure(place / "out", place / "drawn")
    assert (place / "out" / "regions.csv").read_bytes() == before
    assert (a.slide, len(a.rows), a.failed, len(b.rows)) == ("a", 1, False, 0)
    assert a.rows[0]["nuclei"] == len(pipeline.read_nuclei(place / "out" / "a"))


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="regions is not given: need --regions"):
        list(measure_slides(tmp_path, config.Regions()))
    with pytest.raises(RunError, match="holds no finished slide"):
        list(measure_slides(tmp_path, config.Regions(str(tmp_path))))
