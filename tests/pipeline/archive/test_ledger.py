"""ledger.csv reads back as it was written."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import files
from pipeline.archive.failures import read_failure, write_failure
from pipeline.archive.ledger import mixed_stains, other_slides, read_ledger, row_of, terminal_lines, write_ledger
from pipeline.config import Settings
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.segment.finished import damaged_results
from pipeline.segment.record import Counts, SlideRecord, StageRecord
from pipeline.text import csv_cell, from_csv_cell


def test_the_ledger_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """`nightslide report` and `verify` read it: numbers are numbers again, whole or not."""
    work = StageRecord(
        {"tile": 0.115, "detect": 2.5}, computed_on=("cpu float32",), waited={"tile": 0.25, "disk": -1e-9}
    )
    records = [
        SlideRecord("=a", "done", mpp=0.25, mpp_source="--mpp", tissue_mm2=1.5, tiles=3, work=work),
        SlideRecord("b", "failed", "no such file"),
    ]
    write_ledger(RunFolder(tmp_path), records)
    assert [row_of(records[0])[f"seconds_idle_{name}"] for name in ("tile", "disk", "plan")] == [0.25, 0.0, 0.0]
    assert read_ledger(RunFolder(tmp_path)) == [row_of(record) for record in records]


def test_what_was_lost_and_the_time_are_not_rounded_to_whole_numbers() -> None:
    lost = SlideRecord("a", "done", work=StageRecord({"detect": 2.25}, Counts(area_lost_mm2=0.75)))
    row = row_of(lost)
    assert (row["area_lost_mm2"], row["seconds_detect"], row["seconds_work"]) == (0.75, 2.25, 2.25)
    # that of a slide without tissue, too
    assert terminal_lines(lost).startswith("a: 0 nuclei in 0.00 mm2, 2.2 s of work (0.0 s/mm2)\n")


def test_text_that_is_none_keeps_no_row_from_the_ledger(tmp_path: Path) -> None:
    records = [SlideRecord("a", "done", remarks=("1 region of caf\udce9.geojson",)), SlideRecord("b", "done")]
    write_ledger(RunFolder(tmp_path), records)
    rows = [(row["slide"], row["remarks"]) for row in read_ledger(RunFolder(tmp_path))]
    assert rows == [("a", r"1 region of caf\udce9.geojson"), ("b", "")]


def test_a_cause_of_any_length_keeps_the_ledger_legible(tmp_path: Path) -> None:
    """As a damaged slide may hold it; csv reads no cell of more than 131,072 characters."""
    run = RunFolder(tmp_path)
    failed = write_failure(run.slide("a"), "a", "a.mrxs", ValueError(f"there is no section {'S' * 200_000}"))
    write_ledger(run, [failed, SlideRecord("b", "done")])
    assert [row["slide"] for row in read_ledger(run)] == ["a", "b"]
    assert read_failure(run.slide("a"), "a") == failed


@pytest.mark.parametrize("damage", ["a", 'a,"', "a\0b", "a,done,,x"])
def test_a_row_that_cannot_be_read_is_an_error_that_says_so(damage: str, tmp_path: Path) -> None:
    """Edited by hand, perhaps."""
    run = RunFolder(tmp_path)
    write_ledger(run, [SlideRecord("a", "done"), SlideRecord("b", "done")])
    head, _, last = run.ledger.read_text().splitlines()
    run.ledger.write_text(f"{head}\n{last}\n{damage}\n")
    with pytest.raises(
        RunError, match=r"is damaged, or not a run's ledger \(.*\): give the run's command again, which"
    ):
        read_ledger(run)


@pytest.mark.parametrize("column", ["nuclei", "saturated_tiles", "tiles"])
def test_a_number_too_large_to_compute_with_is_damage(column: str, tmp_path: Path) -> None:
    """The report ended with an unexpected OverflowError."""
    run = RunFolder(tmp_path)
    write_ledger(run, [SlideRecord("a", "done")])
    head, row = (line.split(",") for line in run.ledger.read_text().splitlines())
    row[head.index(column)] = "9" * 400
    run.ledger.write_text("\n".join(map(",".join, (head, row))))
    with pytest.raises(RunError, match=r"is damaged, or not a run's ledger .*int too large"):
        read_ledger(run)


def test_a_ledger_that_a_spreadsheet_has_saved(tmp_path: Path) -> None:
    """With a byte order mark it is read; with other separators the error says what to do."""
    run = RunFolder(tmp_path)
    write_ledger(run, [SlideRecord("a", "done"), SlideRecord("b", "done")])
    rows, text = read_ledger(run), run.ledger.read_text()
    run.ledger.write_text(text, encoding="utf-8-sig")
    assert read_ledger(run) == rows
    run.ledger.write_text(text.replace(",", ";"))
    with pytest.raises(RunError, match=r"lacks the column 'slide'.*give the run's command again, which writes it"):
        read_ledger(run)


def test_idle_seconds_of_slides_add_up() -> None:
    """Of two detectors, one slide has what another one lacks: only the sum says how idle they were."""
    rows = [
        row_of(SlideRecord(name, "done", work=StageRecord(waited={"disk": waited})))
        for name, waited in (("long", -29.0), ("short", 30.0))
    ]
    assert sum(row["seconds_idle_disk"] for row in rows) == 1.0


def test_slides_that_were_normalised_in_several_ways_are_counted() -> None:
    """With --stain auto they may be; those without results have none."""
    rows = [row_of(SlideRecord(str(n), "done", stain=stain)) for n, stain in enumerate(["none", "macenko", "none", ""])]
    assert mixed_stains(rows[::2]) == ""
    assert mixed_stains(rows).startswith("stain normalisation: none for 2 slides, macenko for 1 slide; ")


@given(st.text(st.sampled_from("'=+-@ab\t"), max_size=5))
def test_a_cell_reads_back_as_the_text_that_it_was_made_from(text: str) -> None:
    """Law: and what a spreadsheet would evaluate has an apostrophe in front."""
    cell = csv_cell(text)
    assert from_csv_cell(str(cell)) == text
    assert not str(cell).startswith(("=", "+", "-", "@", "\t"))


@pytest.mark.parametrize(
    "other",
    [
        {"regions": "none"},
        {"regions": {"path": "/drawn/a.geojson"}},
        {"files": {"overlay.jpg": {}}},
        {"record": {"slide": "", "status": "done", "work": {"seconds": {"plan": "long"}}}},
        {"record": {"slide": "", "status": "done", "work": {"counts": {"nuclei": "many"}}}},
        {"record": {"slide": "", "status": "done", "attempts": [["yesterday", "today"]]}},
        {"record": {"slide": "", "status": "done", "tissue_mm2": "large"}},
    ],
)
def test_a_slide_json_of_other_content_costs_no_other_slide_its_row(tmp_path: Path, other: dict[str, Any]) -> None:
    """Its checksum fits, or it has none, as those that were written by hand or by another version."""
    run, settings = RunFolder(tmp_path), Settings()
    whole: dict[str, Any] = {"digest": settings.digest, "quick_hash": "1f", "regions": None, "files": {}}
    for name, content in (("a", other), ("b", {})):
        run.slide(name).path.mkdir()
        record = SlideRecord("", "done", tissue_mm2=1.0).to_json()
        files.write_json(run.slide(name).slide_json, files.with_checksum({**whole, "record": record, **content}))
    write_ledger(run, other_slides(run, (), settings).records)
    assert [row["slide"] for row in read_ledger(run)] == ["b"]
    damaged = {
        name: list(damaged_results(run.slide(name), files.read_json(run.slide(name).slide_json) or {}, thorough=False))
        for name in "ab"
    }
    assert [bool(lines) for lines in damaged.values()] == [True, False]


def test_a_command_reads_what_others_have_left_and_none_of_its_own_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10,000 slides that are done, which a command is to resume, that would take a third of its time."""
    run, settings = RunFolder(tmp_path), Settings()
    for name in ("own", "other"):
        run.slide(name).path.mkdir()
        record = SlideRecord("", "done", tissue_mm2=1.0).to_json()
        content = {"digest": settings.digest, "quick_hash": "1f", "source_path": f"/slides/{name}.svs", "files": {}}
        files.write_json(run.slide(name).slide_json, files.with_checksum({**content, "record": record}))
        write_failure(run.slide(f"{name}, failed"), f"{name}, failed", "a.svs", ValueError("damaged"))
    read, read_json = [], files.read_json

    def reading(path: Path) -> dict[str, Any] | None:
        read.append(path.parent.name)
        return read_json(path)

    monkeypatch.setattr(files, "read_json", reading)
    others = other_slides(run, {"own", "own, failed"}, settings)
    assert [record.slide for record in others.records] == ["other", "other, failed"]
    assert others.names == {"/slides/other.svs": "other"}
    assert set(read) == {"other", "other, failed"}
