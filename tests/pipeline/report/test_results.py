"""What is read from the slides' folders, and which slides are outliers."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.files import with_checksum
from pipeline.layout import RunFolder
from pipeline.report.page import write_report
from pipeline.report.results import FEWEST_SLIDES, read_results, robust_z
from pipeline.segment.record import OF_OTHER_SETTINGS, SlideRecord
from pipeline.segment.summary import AREA_EDGES_UM2, SEAM_EDGES_PX, VERSION

WHOLE = {"digest": "", "quick_hash": "", "files": {}}  # what every slide.json has
SOME = st.lists(st.floats(-1e3, 1e3).map(lambda v: round(v, 3)), min_size=FEWEST_SLIDES, max_size=30)


def done(name="a", **more):
    return {"slide": name, "status": "done", "tissue_mm2": 2.0, "nuclei": 6000, "seconds_elapsed": 10.0, **more}


def found(**more):
    quantiles = [10, 20, 30, 40, 90]
    bins = [1.0] * len(SEAM_EDGES_PX)
    seams = {"observed": bins, "expected": bins, "ratio": 1.0, "standard_error": 0.1, "suspicious": False}
    return {"version": VERSION, "area_um2": sizes(quantiles), "seams": seams, **more}


def sizes(quantiles):
    return {"quantiles": quantiles, "counts": [1] * len(AREA_EDGES_UM2)}


def finish(folder, summary, remarks=()) -> None:
    folder.mkdir(parents=True)
    record = SlideRecord("a", "done", remarks=tuple(remarks)).to_json()
    (folder / "slide.json").write_text(json.dumps({"summary": summary, "record": record, **WHOLE}))


# ------------------------------------------------------------------------------------------------ outliers


def test_known_robust_scores():
    """Median 5, deviations 4 3 2 1 0 1 2 3 45: their median is 2."""
    scores = robust_z([1, 2, 3, 4, 5, 6, 7, 8, 50])
    assert scores == pytest.approx(0.6745 * (np.array([1, 2, 3, 4, 5, 6, 7, 8, 50]) - 5) / 2)
    assert np.flatnonzero(np.abs(scores) > 3.5).tolist() == [8]


@given(SOME, st.sampled_from([-8.0, 0.5, 2.0]), st.sampled_from([-128.0, 0.0, 64.0]))
def test_scores_do_not_depend_on_unit_or_origin(values, scale, shift):
    """Law: shifting and scaling all changes nothing, but the sign."""
    before, after = robust_z(values), robust_z(np.array(values) * scale + shift)
    assert np.isnan(before).tolist() == np.isnan(after).tolist()
    assert after == pytest.approx(before * np.sign(scale), rel=1e-6, abs=1e-6, nan_ok=True)


def test_what_cannot_be_judged_has_no_score():
    assert np.isnan(robust_z([1.0, 2, 3, 4, 5, 6, 700])).all()  # too few
    assert np.isnan(robust_z([1.0] * 8 + [700])).all()  # no measure of unlike
    mixed = robust_z([1.0, 2, 3, 4, 5, 6, 7, 8, np.nan, np.inf])
    assert np.isnan(mixed[8])
    assert np.isfinite(mixed[:8]).all()
    assert robust_z([]).shape == (0,)


def test_slides_unlike_the_others_are_named_with_the_reason(tmp_path):
    rows = [done(f"s{i}", nuclei=6000 + 100 * i) for i in range(9)]
    rows += [done("sparse", nuclei=400), done("none", nuclei=0)]
    for i in range(9):
        size = 99.0 if i == 4 else 30.0 + 0.1 * i
        finish(tmp_path / f"s{i}", found(area_um2=sizes([10, 20, size, 120, 150])))
    slides = {s.name: s for s in read_results(RunFolder(tmp_path), rows)}
    assert {name for name, s in slides.items() if s.outlier} == {"sparse", "s4"}
    assert "fewer nuclei than usual: 200 per mm², the run's median is 3,175" in slides["sparse"].remarks[0]
    assert "larger nuclei than usual: 99.0 µm² at the median, the run's is 30.5" in slides["s4"].remarks[0]


def test_seven_slides_are_too_few_to_be_unlike(tmp_path):
    rows = [done(f"s{i}", nuclei=6000 + 100 * i) for i in range(6)] + [done("sparse", nuclei=400)]
    assert not any(s.outlier for s in read_results(RunFolder(tmp_path), rows))


# ------------------------------------------------------------------------------------------------ a slide


def test_remarks_are_those_of_the_slide_and_else_of_its_row(tmp_path):
    finish(tmp_path / "a", found(), ["no tissue; none at all", "0.05 mm² have no result"])
    rows = [done(remarks="no tissue; none at all; 0.05 mm² have no result"), done("gone", remarks="lost")]
    whole, gone = read_results(RunFolder(tmp_path), rows)
    assert whole.remarks == ("no tissue; none at all", "0.05 mm² have no result")
    assert gone.remarks == ("lost",)


def test_what_was_not_done_again_is_a_remark_beside_the_slide_s_own(tmp_path):
    finish(tmp_path / "a", found(), ["its own"])
    row = done(status="done otherwise", cause="other regions")
    (slide,) = read_results(RunFolder(tmp_path), [row])
    assert (slide.state, slide.remarks) == ("done", ("not done again: other regions", "its own"))


def test_that_a_slide_is_of_other_settings_is_a_remark_beside_its_own(tmp_path):
    finish(tmp_path / "a", found(), ["its own"])
    row = done(remarks=f"{OF_OTHER_SETTINGS}; its own")
    (slide,) = read_results(RunFolder(tmp_path), [row])
    assert slide.remarks == (OF_OTHER_SETTINGS, "its own")


def test_a_good_slide_has_no_remark(tmp_path):
    finish(tmp_path / "a", found())
    (slide,) = read_results(RunFolder(tmp_path), [done()])
    assert (slide.remarks, slide.state, slide.density, slide.median_area) == ((), "done", 3000.0, 30.0)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{",
        '{"summary": null}',
        '{"summary": {"version": 99}}',
        '{"summary": 3}',
        '{"record": {}}',
        json.dumps({"record": 3, "summary": {"version": VERSION}}),
        json.dumps({"record": {"slide": "", "status": "done"}, "summary": {"version": VERSION}, **WHOLE}),
    ],
)
def test_a_slide_without_legible_summary_is_described_by_its_row(tmp_path, content):
    if content is not None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "slide.json").write_text(content)
    (slide,) = read_results(RunFolder(tmp_path), [done()])
    assert (slide.summary, slide.density, slide.remarks) == ({}, 3000.0, ())
    assert np.isnan(slide.median_area)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("summary", "area_um2"), None),
        (("summary", "area_um2", "quantiles"), "12345"),
        (("summary", "area_um2", "quantiles"), [30.0]),
        (("summary", "area_um2", "counts"), None),
        (("summary", "classes"), [1]),
        (("summary", "classes"), {"Nucleus": "many"}),
        (("summary", "seams"), None),
        (("summary", "seams", "observed"), [1]),
        (("summary", "seams", "ratio"), "1.0"),
        (("summary", "seams", "standard_error"), None),
        (("record", "attempts"), [["yesterday", "today"]]),
        (("record", "remarks"), 3),
        (("record", "work", "seconds"), {"plan": "long"}),
    ],
)
def test_a_slide_json_of_other_content_costs_no_other_slide_the_report(tmp_path, path, value):
    """Its checksum fits, or it has none, as those that were written by hand or by another version."""
    for name in "ab":
        finish(tmp_path / name, found())
    content = json.loads((tmp_path / "a" / "slide.json").read_text())
    inside = content
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    (tmp_path / "a" / "slide.json").write_text(json.dumps(with_checksum(content)))
    write_report(RunFolder(tmp_path), [done("a"), done("b")])
    first, second = read_results(RunFolder(tmp_path), [done("a"), done("b")])
    assert (first.summary, first.density) == ({}, 3000.0)
    assert second.summary == found()


@pytest.mark.parametrize("name", ["../other", "link"])
def test_a_ledger_shows_no_folder_beside_the_run_s(tmp_path, name):
    run, other = tmp_path / "run", tmp_path / "other"
    finish(other, found(), ["its own"])
    Image.new("RGB", (400, 300), "red").save(other / "overlay.jpg")
    run.mkdir()
    (run / "link").symlink_to(other)
    for told in (name, str(other)):
        (slide,) = read_results(RunFolder(run), [done(told)])
        assert (slide.address, slide.overlay, slide.picture, slide.summary, slide.remarks) == ("", "", "", {}, ())


def test_of_a_damaged_slide_json_nothing_is_believed(tmp_path):
    """One that is still JSON, whose numbers and names may be any."""
    (tmp_path / "a").mkdir()
    record = SlideRecord("a", "done", remarks=("lost",)).to_json()
    content = with_checksum({"summary": found(), "record": record, **WHOLE})
    text = json.dumps(content)
    for damaged in (text.replace('"quantiles"', '"quantilez"'), text.replace("lost", "last")):
        (tmp_path / "a" / "slide.json").write_text(damaged)
        (slide,) = read_results(RunFolder(tmp_path), [done()])
        assert (slide.summary, slide.density, slide.remarks) == ({}, 3000.0, ())


@pytest.mark.parametrize("number", [10**400, float("nan"), float("inf"), "x"], ids=["too large", "nan", "inf", "text"])
@pytest.mark.parametrize("where", ["ratio", "classes", "quantiles"])
def test_a_number_that_nothing_is_computed_with_is_left_out(tmp_path, where, number):
    """The report of all slides ended with an unexpected error."""
    summary = found(classes={"Nucleus": 1})
    if where == "ratio":
        summary["seams"]["ratio"] = number
    elif where == "classes":
        summary["classes"]["Nucleus"] = number
    else:
        summary["area_um2"]["quantiles"][2] = number
    finish(tmp_path / "a", summary)
    (slide,) = read_results(RunFolder(tmp_path), [done()])
    assert slide.summary == {}
    write_report(RunFolder(tmp_path), [done()])


@pytest.mark.parametrize(
    ("status", "state"),
    [("done before", "done"), ("failed", "failed"), ("interrupted", "pending"), ("locked", "pending")],
)
def test_states(tmp_path, status, state):
    (slide,) = read_results(RunFolder(tmp_path), [done(status=status)])
    assert slide.state == state
    assert np.isfinite(slide.density) == (state == "done")


def test_the_picture_is_small_and_whole(tmp_path):
    finish(tmp_path / "a", found())
    noise = np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "overlay.jpg")
    (slide,) = read_results(RunFolder(tmp_path), [done()])
    kind, content = slide.picture.split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (180, 90)
    assert len(content) < 15_000


def huge(picture: bytes) -> bytes:
    """A JPEG whose header states the largest size."""
    size = picture.index(b"\xff\xc0") + 5
    return picture[:size] + b"\xff\xff\xff\xff" + picture[size + 4 :]


@pytest.mark.parametrize("spoil", [lambda b: b"no picture", lambda b: b[: len(b) // 2], lambda b: b"", huge])
def test_a_broken_picture_is_left_out(tmp_path, spoil):
    finish(tmp_path / "a", found())
    picture = tmp_path / "a" / "overlay.jpg"
    Image.new("RGB", (400, 300), "red").save(picture)
    picture.write_bytes(spoil(picture.read_bytes()))
    (slide,) = read_results(RunFolder(tmp_path), [done()])
    assert slide.picture == ""
