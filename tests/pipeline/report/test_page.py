"""The page names every slide once, loads nothing, and takes nothing from outside for markup."""

import json
import os
import shlex
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from browser import SIZE, browser
from pipeline.layout import RunFolder
from pipeline.report.page import write_report
from pipeline.segment.record import SlideRecord
from pipeline.segment.stages import STAGES
from pipeline.segment.summary import AREA_EDGES_UM2, SEAM_EDGES_PX, VERSION, seam_verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quotes\" & 'more'",
    "Präparat № 7, 病理",
    "100% #1 ?a=b",
    "javascript:alert(2)",
    "folder/with spaces/a:b",
    "</table></style><img src=x onerror=alert(3)>",
]

VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, the text of each cell, and what is open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr" and self.tags[-1][1].get("id", "").startswith("slide-"):
            self.rows.append([])
        elif tag == "td" and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script", "title"):
            self.text += data
            if "tbody" in self.open and "td" in self.open:
                self.rows[-1][-1] += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


def row(name, status="done", **more):
    stages = {f"seconds_{s}": 1.0 + i for i, s in enumerate(("plan", "tile", "detect", "outline", "stitch", "export"))}
    return {
        "slide": name,
        "status": status,
        "tissue_mm2": 2.0,
        "nuclei": 6000,
        "seconds_elapsed": 30.0,
        **stages,
        **more,
    }


def found(near=100):
    observed = [near, near, *[100] * (len(SEAM_EDGES_PX) - 3), 4000]
    expected = [100.0] * (len(SEAM_EDGES_PX) - 1) + [4000.0]
    counts = [50] * len(AREA_EDGES_UM2)
    return {
        "version": VERSION,
        "area_um2": {"quantiles": [10.0, 20.0, 30.0, 40.0, 90.0], "counts": counts},
        "seams": {"observed": observed, "expected": expected, **seam_verdict(observed, expected)._asdict()},
    }


def finish(folder, summary, attempts=(), remarks=()) -> None:
    folder.mkdir(parents=True)
    record = SlideRecord("a", "done", remarks=tuple(remarks), attempts=tuple(attempts)).to_json()
    content = {"digest": "", "quick_hash": "", "files": {}, "record": record, "summary": summary}
    (folder / "slide.json").write_text(json.dumps(content))
    Image.new("RGB", (400, 300), "pink").save(folder / "overlay.jpg")


def read(out, rows) -> Page:
    path = write_report(RunFolder(out), rows)
    assert path == out / "report.html"
    assert not list(out.glob(".partial*"))
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


# ------------------------------------------------------------------------------------------------ law


def test_every_slide_is_named_once_however_it_is_called(tmp_path):
    """Law: names are text, never markup, and addresses lead to the files."""
    for name in HOSTILE[:-1]:
        finish(tmp_path / name, found())
    rows = [*map(row, HOSTILE[:-1]), row(HOSTILE[-1], "failed", cause=f"{HOSTILE[-1]}: <b>no</b>")]
    page = read(tmp_path, rows)
    assert sorted(cells[1] for cells in page.rows) == sorted(HOSTILE)
    addresses = [a for a in page.attributes("a", "href") if not a.startswith("#")]
    assert all((tmp_path / unquote(address)).exists() for address in addresses)
    assert not any(":" in a or "?" in a or " " in a for a in addresses)
    assert {unquote(a) for a in addresses if a.endswith("overlay.jpg")} == {f"{n}/overlay.jpg" for n in HOSTILE[:-1]}
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"onerror", "onload", "onclick"} & {name for _, attrs in page.tags for name in attrs}


def test_the_page_needs_nothing_else(tmp_path):
    """Law: no address leads out of the run's folder, whatever settings and causes say."""
    finish(tmp_path / "a", found())
    notes = {"source": "https://example.org/<weights>"}
    run = {"digest": "d1", "settings": {"stain": {"method": "none"}}, "weights_notes": notes}
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = read(tmp_path, [row("a"), row("b", "failed", cause="see https://example.org")])
    for name in ("href", "src", "action", "data", "xlink:href"):
        for address in [attrs[name] for _, attrs in page.tags if name in attrs]:
            assert address.startswith(("#", "data:image/jpeg;base64,", "a/"))
    assert not page.attributes("link", "href")
    assert "url(" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page.attributes("meta", "content")[0]
    assert "https://example.org/<weights>" in page.text


@pytest.mark.skipif(os.name != "posix", reason="names that are not text are found on POSIX systems only")
def test_a_name_that_is_no_text_still_leads_to_its_folder(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        finish(tmp_path / name, found())
    except OSError:
        pytest.skip("this file system takes text only")
    page = read(tmp_path, [row(name)])
    assert "caf%E9/overlay.jpg" in page.attributes("a", "href")
    assert [cells[1] for cells in page.rows] == ["caf?"]


# ------------------------------------------------------------------------------------------------ known answers


def test_a_run_without_anything(tmp_path):
    page = read(tmp_path, [])
    assert page.rows == []
    assert "slides done" in page.text


def test_slides_without_summary_pictures_and_folders(tmp_path):
    rows = [
        row("gone"),
        row("b", "interrupted"),
        row("c", "locked", cause="locked by gpu07, process 12"),
        {"slide": "d", "status": "x"},
    ]
    page = read(tmp_path, rows)
    assert {cells[1]: cells[2] for cells in page.rows} == {
        "gone": "done",
        "b": "interrupted",
        "c": "locked",
        "d": "x",
    }
    assert not page.attributes("img", "src")


def test_failures_stand_first_by_cause(tmp_path):
    finish(tmp_path / "fine", found())
    rows = [row("fine"), row("x/full", "failed", cause="[Errno 28] No space left on device")]
    rows += [row(f"x/case {i}", "failed", cause=f"case {i}.svs: region ({i}, 20) cannot be read") for i in (3, 4)]
    page = read(tmp_path, rows)
    assert [cells[1] for cells in page.rows] == ["x/full", "x/case 3", "x/case 4", "fine"]
    failures = page.text[page.text.index("Failures") : page.text.index("Seams")]
    assert failures.index("2 · …") < failures.index("1 · [Errno 28]")
    assert failures.count("cannot be read") == 3  # the cause, and where two differ each its own


def test_causes_that_name_the_slides_own_folder_are_one(tmp_path):
    rows = [row(f"x/{name}", "failed", cause=f"/out/x/{name}: Permission denied") for name in ("axe", "bow")]
    assert "2 · … Permission denied" in read(tmp_path, rows).text


def test_the_run_in_numbers(tmp_path):
    """Two slides side by side count once, the day between two attempts not at all; when files were written neither."""
    finish(tmp_path / "a", found(), [(1000, 1030)])
    finish(tmp_path / "b", found(), [(1015, 1045)])
    finish(tmp_path / "c", found(), [(500, 510), (90_000, 90_020)])
    page = read(tmp_path, [row("a"), row("b"), row("c", "done before"), row("d", "waiting")])
    figures = page.text[: page.text.index("Seams")]
    for words in ("3slides done", "0failed", "1pending", "18,000nuclei", "6.0mm² of tissue", "3,000nuclei per mm²"):
        assert words in figures
    assert "75.0 sof processing" in figures
    assert "288mm² per hour" in figures  # 6 mm2 in 45 + 30 s
    assert "lost" not in figures


def test_small_areas_are_not_none(tmp_path):
    """As of slides that were segmented in regions only."""
    finish(tmp_path / "a", found())
    page = read(tmp_path, [row("a", tissue_mm2=0.0421, fold_mm2=0.0042, area_lost_mm2=0.00031)])
    for words in ("1slide done", "0.042mm² of tissue", "0.0042mm² under artefacts", "0.00031mm² lost"):
        assert words in page.text


@pytest.mark.parametrize(("near", "words"), [(100, "passed"), (200, "failed")])
def test_the_seams_of_all_slides_are_judged_together(tmp_path, near, words):
    for name in "abc":
        finish(tmp_path / name, found(near), remarks=["seam check failed"] * (near == 200))
    page = read(tmp_path, [row(name) for name in "abc"])
    assert f"Seam check {words}: the density of nuclei within 8 px of a seam is {near / 100:.3f} ± 0.041" in page.text
    assert all((cells[-1] != "") == (near == 200) for cells in page.rows)


def test_settings_are_shown(tmp_path):
    run = {
        "digest": "d1<",
        "settings": {"detector": {"weights": "/somewhere/nuclei.safetensors", "score": 0.35, "views": 4}},
        "weights_sha256": "5ha",
        "versions": {"torch": "2.9"},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = read(tmp_path, []).text
    assert "weights nuclei · views 4 · digest d1<" in text
    assert all(word in text for word in ("score0.35", "weights_sha2565ha", "torch2.9"))


@pytest.mark.parametrize("settings", [None, 3, {"detector": None}, {"detector": [], "stain": "x", "tiling": 1}])
def test_settings_that_are_none_are_left_out(tmp_path, settings):
    (tmp_path / "run.json").write_text(json.dumps({"digest": "abc", "settings": settings}))
    assert "digest abc" in read(tmp_path, [row("a")]).text


def test_every_stage_has_a_colour_of_its_own(tmp_path):
    page = write_report(RunFolder(tmp_path), [row("a")]).read_text(encoding="utf-8")
    for number in range(len(STAGES)):
        assert f".c{number} {{ fill: var(--c{number})" in page
        assert page.count(f"--c{number}: #") == 2  # on light and on dark ground


def test_the_page_gives_the_command_of_the_viewer(tmp_path):
    folder = tmp_path / "it's <b>here"
    folder.mkdir()
    page = read(folder, [])
    assert f"nightslide view {shlex.quote(str(folder.resolve()))}" in page.text


def test_a_thousand_slides_make_a_page_that_opens(tmp_path):
    finish(tmp_path / "one", found())
    rows = [row(f"case {i}", "done", cause="", remarks="x" * 50) for i in range(1000)]
    for i in range(1000):
        (tmp_path / f"case {i}").symlink_to("one")
    path = write_report(RunFolder(tmp_path), rows)
    assert path.stat().st_size < 15_000_000 - 1000 * 8_000  # beside pictures of 8 kB, which real ones have


def test_the_page_says_what_detectors_waited_for(tmp_path):
    rows = [
        row("a", seconds_detect=80.0, seconds_idle_tile=15.0),
        row("b", "failed", seconds_detect=0, seconds_idle_disk=5.0),
    ]
    text = Page(write_report(RunFolder(tmp_path), rows).read_text("utf-8")).text
    assert (
        "the detector computed 80% of the time, and was idle 20%: 15% waiting for tiles, "
        "5% reading the patches or writing the instances; add CPU workers (--workers)." in text
    )


def test_classes_have_their_shares(tmp_path):
    """Of each slide and of all; where all nuclei are of one class, nothing is said."""
    for name, classes in (("a", {"Inflammatory": 30, "<Connective>": 10}), ("b", {"Inflammatory": 60})):
        finish(tmp_path / name, {**found(), "classes": classes})
    page = read(tmp_path, [row("a", nuclei=40), row("b", nuclei=60)])
    assert "Classes of the nuclei: Inflammatory 90.0%, <Connective> 10.0%." in page.text
    cells = {cell for cells in page.rows for cell in cells}
    assert "40Inflammatory 75.0%, <Connective> 25.0%" in cells
    assert "60" in cells
    page = read(tmp_path, [row("b", nuclei=60)])
    assert "Classes of" not in page.text


def test_the_page_is_no_wider_than_the_window(tmp_path):
    """Also with the shares of several classes: the warnings come last. A narrow window scrolls the table."""
    classes = {"Connective": 1950, "Inflammatory": 302, "Neoplastic": 55, "Epithelial": 20}
    finish(tmp_path / "a", {**found(), "classes": classes}, remarks=["artefacts cover much of the tissue " * 3])
    path = write_report(RunFolder(tmp_path), [row("a")])
    with browser() as page:
        page.open(path.as_uri())
        page.wait_for("document.querySelector('#slides .remarks p').textContent")
        for width in (SIZE[0], 1200, 400):
            page.resize(width, SIZE[1])
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_of_many_slides_a_browser_builds_the_rows_that_it_shows(tmp_path):
    """All are filtered, sorted and linked to, whatever their names; ten thousand rows would take gigabytes."""
    rows = [row(f"slide {n:03d}", nuclei=n + 1) for n in range(450)]
    for n, name in enumerate(HOSTILE):
        rows[300 + n]["slide"] = name
    path = write_report(RunFolder(tmp_path), rows)
    assert len(Page(path.read_text("utf-8")).rows) == 200
    names = "Array.from(document.querySelectorAll('#slides tbody .name'), (cell) => cell.textContent)"
    search = "words.value = {}; words.dispatchEvent(new Event('input'))"
    sort = "document.querySelector('#slides th:nth-child(5) button').click()"  # by nuclei
    with browser() as page:
        page.open(path.as_uri())
        page.wait_for(f"{names}.length")
        for n, name in enumerate(HOSTILE):
            page.evaluate(search.format(json.dumps(name)))
            assert page.evaluate(names) == [name]
            page.evaluate(f"location.hash = 'slide-{300 + n}'")
            assert page.wait_for("document.querySelector('#slides .linked .name').textContent") == name
            assert page.evaluate("words.value") == ""
            assert page.evaluate("shown.textContent") == "450 of 450 slides"
        page.evaluate(search.format("''"))
        shown = []
        for count in (200, 400, 450):
            shown.append(page.evaluate(names))
            assert len(shown[-1]) == count
            page.evaluate("more.click()")
        assert shown[-1] == [str(r["slide"]) for r in rows]
        assert page.evaluate("more.hidden")
        page.evaluate(sort)
        page.evaluate(sort)
        assert page.evaluate(names)[:3] == ["slide 449", "slide 448", "slide 447"]


def test_a_printed_page_has_the_warnings(tmp_path):
    """The last column: Chromium shrinks a page to two thirds at most, and cuts off what is wider."""
    classes = {"Connective": 1950, "Inflammatory": 302, "Neoplastic": 55, "Epithelial": 20}
    finish(tmp_path / "a", {**found(), "classes": classes}, remarks=["artefacts cover much of the tissue " * 3])
    path = write_report(RunFolder(tmp_path), [row("a", fold_mm2=0.01)])
    with browser() as page:
        page.open(path.as_uri())
        page.wait_for("document.querySelector('#slides .remarks p').textContent")
        page.resize(718, 1000)  # A4 without its margins
        page.medium("print")
        assert page.evaluate("document.documentElement.scrollWidth") < 1.25 * 718


def test_a_cause_hides_no_warning(tmp_path):
    """Of a slide whose results are kept, though others were asked for: the row has both in its remarks."""
    warned = row("a", "done otherwise", cause="other regions", remarks="not done again: other regions; blurred")
    page = write_report(RunFolder(tmp_path), [warned, row("b", "failed", cause="no file")]).read_text("utf-8")
    assert "<p>not done again: other regions; blurred</p>" in page
    assert "<p>no file</p>" in page
