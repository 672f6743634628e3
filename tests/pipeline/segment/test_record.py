"""Records add up and travel as JSON; every remark is made where it should be, and only there."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.segment.record import Counts, SlideRecord, StageRecord, is_whole, remarks

COUNTS = st.builds(Counts, *(st.integers(0, 99) for _ in dataclasses.fields(Counts)))
WORK = st.builds(
    StageRecord,
    st.dictionaries(st.sampled_from(["plan", "tile", "detect"]), st.integers(0, 9).map(float)),
    COUNTS,
    st.lists(st.sampled_from(["cpu float32", "cuda bfloat16"]), unique=True).map(lambda kinds: tuple(sorted(kinds))),
)


@given(WORK, WORK, WORK)
def test_records_of_parts_add_up_in_any_order(a: StageRecord, b: StageRecord, c: StageRecord) -> None:
    """Law: addition of records is associative and commutative, and the empty record adds nothing."""
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + StageRecord() == a
    assert (a + b).counts.nuclei == a.counts.nuclei + b.counts.nuclei


@given(WORK)
def test_records_come_back_from_json(work: StageRecord) -> None:
    record = SlideRecord("a/b", "done", mpp=0.5, work=work, remarks=("one; two",))
    assert SlideRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    newer = {**record.to_json(), "unknown": 1}
    newer["work"]["counts"]["unknown"] = 2
    assert SlideRecord.from_json(newer) == record


def done(tissue_mm2: float = 2.0, nuclei: int = 6000, **counts: float) -> SlideRecord:
    work = StageRecord(counts=Counts(nuclei=nuclei, **counts))  # type: ignore[arg-type]
    return SlideRecord("a", "done", mpp=0.5, mpp_source="metadata", tissue_mm2=tissue_mm2, work=work)


def summary(median: float = 40.0, suspicious: bool = False) -> dict[str, object]:
    seams = {"ratio": 1.05, "standard_error": 0.01, "suspicious": suspicious}
    return {"area_um2": {"quantiles": [10, 20, median, 60, 90]}, "seams": seams}


def test_a_slide_without_trouble_has_no_remarks() -> None:
    """Nor one with as many cut nuclei, or artefacts, as are usual."""
    assert remarks(done(touching_nuclei=3), summary()) == ()
    assert remarks(done(), summary(median=8.0)) == remarks(done(), summary(median=150.0)) == ()
    assert remarks(done(blur_mm2=0.06, pen_mm2=0.03, flagged_nuclei=90), summary()) == ()


@pytest.mark.parametrize(
    ("record", "about", "said"),
    [
        (done(nuclei=0), {}, "no nuclei were found"),
        (done(area_lost_mm2=0.05), summary(), "0.05 mm² of tiles, glass included, have no result"),
        (done(saturated_tiles=3), summary(), "3 tiles hold more nuclei than allowed: raise"),
        (done(saturated_tiles=3), summary(), "and --detector.proposals-per-mm2 to more than three times as many"),
        (done(saturated_tiles=1), summary(), "1 tile holds more nuclei than allowed"),
        (done(split_tiles=2), summary(), "2 tiles were done in quarters for want of device memory"),
        (done(nuclei=1, touching_nuclei=1), summary(), "1 nucleus reaches the edge of what a tile read"),
        (done(touching_nuclei=7), summary(), "7 nuclei reach the edge of what a tile read"),
        (
            done(blur_mm2=0.08, pen_mm2=0.04, flagged_nuclei=90),
            summary(),
            "artefacts cover 6% of the tissue (pen 0.04, blur 0.08 mm²); nuclei there (90) have",
        ),
        (done(blur_mm2=0.01, skipped_mm2=0.01), summary(), "0.01 mm² of tissue, 0 tiles, were skipped: blur 0.01 mm²"),
        (done(export_dropped=1), summary(), "1 nucleus is outside the slide, or too small for the exports"),
        (done(), summary(median=5.0), "the median nucleus has 5 µm², usual are 8 to 150: check the scale (0.5 µm/px"),
        (done(), summary(median=400.0), "the median nucleus has 400 µm²"),
        (done(), summary(suspicious=True), "seam check failed: density near seams is 1.05 ± 0.01"),
    ],
)
def test_what_a_person_should_look_at(record: SlideRecord, about: dict[str, object], said: str) -> None:
    (remark,) = remarks(record, about)
    assert said in remark


def test_a_slide_without_tissue_lacks_no_nuclei() -> None:
    """That there is no tissue is a note of its plan."""
    assert remarks(done(tissue_mm2=0.0, nuclei=0), {}, ("no tissue",)) == ("no tissue",)


def test_notes_of_the_plan_come_first() -> None:
    assert remarks(done(area_lost_mm2=1.0), summary(), ("not normalised: too few cells",))[0].startswith("not norm")


def test_a_mixture_of_devices_is_a_remark() -> None:
    mixed = dataclasses.replace(done(), work=StageRecord({}, Counts(nuclei=1), ("cpu bfloat16", "cuda bfloat16")))
    assert "computed on cpu bfloat16 and cuda bfloat16" in remarks(mixed, summary())[0]
    alike = dataclasses.replace(mixed, work=StageRecord({}, Counts(nuclei=1), ("cpu bfloat16",)))
    assert remarks(alike, summary()) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("digest", None),
        ("quick_hash", 1),
        ("source_parts", None),
        ("source_parts", ["x"]),
        ("source_parts", [{"name": "x"}]),
        ("record", {"slide": "", "status": "done", "mpp": 10**400}),
        ("record", {"slide": "", "status": "done", "work": {"seconds": {"plan": 10**400}}}),
        ("record", {"slide": "", "status": "done", "work": {"counts": {"blur_mm2": 10**400}}}),
    ],
)
def test_a_slide_json_with_what_nobody_can_read_is_damaged(name: str, value: object) -> None:
    """Of a version without a checksum, too: one slide ended the run, the report and `verify` of all."""
    part = {"name": "x", "bytes": 1, "mtime_ns": 1, "etag": ""}
    record = SlideRecord("", "done").to_json()
    content = {"digest": "d", "quick_hash": "q", "files": {}, "source_parts": [part], "record": record}
    assert is_whole(content)
    assert is_whole({key: kept for key, kept in content.items() if key != "source_parts"})
    assert not is_whole({**content, name: value})
