"""ledger.csv reads back as it was written."""

from pathlib import Path

from pipeline.archive.ledger import read_ledger, row_of, write_ledger
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord, StageRecord


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
