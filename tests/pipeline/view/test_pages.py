"""The pages in a browser: what they draw is what the run wrote, and no text of it is taken for markup."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import shapely
import uvicorn

from browser import SIZE, Browser, browser
from finished_run import FIRST, Finished
from nuclei_tables import write
from pipeline import files
from pipeline.archive.ledger import write_ledger
from pipeline.layout import RunFolder
from pipeline.segment import tables
from pipeline.segment.record import Counts, SlideRecord, StageRecord
from pipeline.view.application import application
from pipeline.view.results import Results
from pipeline.view.server import listening
from slides.geometry import Box, Size

HOSTILE = "<img src=x onerror=alert(1)>"
DRAWN = "Number(document.querySelector('canvas.nuclei')?.dataset.drawn)"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of the pages of a run, as `nightslide view` serves them."""
    with listening(0) as listener:
        port = listener.getsockname()[1]
        app = application(Results(RunFolder(run)), "token", port)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/token/"
        finally:
            server.should_exit = True
            thread.join()


def text(page: Browser, name: str) -> str:
    return str(page.evaluate(f"document.getElementById('{name}').textContent"))


LATE = """
const ask = window.fetch;
window.answered = 0;
window.fetch = async (address) => {
  const answer = await ask(address);
  if (address.includes("score=0.68999")) await new Promise((then) => setTimeout(then, 1000));
  window.answered += address.startsWith("density");
  return answer;
};
"""


def test_an_answer_that_comes_late_does_not_replace_a_later_choice(page: Browser, finished: Finished) -> None:
    with served(finished.run) as address:
        page.open(f"{address}slides/0/")
        page.wait_for(f"document.getElementById('shown').textContent === '{finished.nuclei} nuclei'")
        page.evaluate(LATE)
        set_score(page, 0.69)
        time.sleep(0.4)  # a choice is counted after 0.15 s
        set_score(page, 0)
        page.wait_for("window.answered === 2")
        time.sleep(0.2)
        assert text(page, "shown") == f"{finished.nuclei} nuclei"


def test_the_list_and_a_slide_with_its_nuclei(page: Browser, finished: Finished) -> None:
    """All nuclei of a small slide are drawn; fewer with a higher score; the one under the cursor is described."""
    page.messages.clear()
    with served(finished.run) as address:
        page.open(address)
        page.wait_for("document.querySelectorAll('#slides tr').length === 3")
        assert text(page, "summary").startswith("2 of 3 slides done")
        page.wait_for("[...document.images].every((image) => image.complete && image.naturalWidth)")
        reached = "[...document.links].filter((link) => link.tabIndex >= 0).every((link) => link.textContent)"
        assert page.evaluate(reached)  # one link a slide, by its name
        page.resize(400, SIZE[1])
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.resize(*SIZE)
        page.evaluate("document.querySelector('td.name a').click()")
        assert page.wait_for(DRAWN) == finished.nuclei
        page.wait_for(f"document.getElementById('shown').textContent === '{finished.nuclei} nuclei'")
        assert text(page, "name") == FIRST
        assert text(page, "length").endswith("µm")
        table = tables.read_nuclei(RunFolder(finished.run).slide(FIRST).nuclei)
        set_score(page, 0.7)
        kept = int((table["score"].to_numpy() >= 0.7).sum())
        assert 0 < kept < finished.nuclei
        page.wait_for(f"{DRAWN} === {kept}")
        page.wait_for(f"document.getElementById('shown').textContent === '{kept} of {finished.nuclei} nuclei'")
        set_score(page, 0)
        look_at(page, address, table["centroid_x"][0].as_py(), table["centroid_y"][0].as_py())
        page.wait_for(f"{DRAWN} && !document.getElementById('nucleus').hidden")
        assert table["id"][0].as_py() in text(page, "nucleus")
        (area,) = re.findall(r"area([\d.]+) µm²", text(page, "nucleus"))
        assert float(area) == pytest.approx(table["area_um2"][0].as_py(), rel=1e-3)
    assert page.messages == []


def test_the_card_of_a_nucleus_lies_in_the_window(page: Browser, finished: Finished) -> None:
    """Also of one beside the lower border: the last of its measurements can be read."""
    table = tables.read_nuclei(RunFolder(finished.run).slide(FIRST).nuclei)
    with served(finished.run) as address:
        x, y = SIZE[0] / 2, SIZE[1] - 40
        middle = table["centroid_y"][0].as_py() - (y - SIZE[1] / 2) * 0.2
        page.open(f"{address}slides/0/?below#x={table['centroid_x'][0].as_py()}&y={middle}&px=0.2")
        page.wait_for(DRAWN)
        page.point(x - 30, y)
        page.point(x, y)
        page.wait_for("!document.getElementById('nucleus').hidden")
        assert page.evaluate("document.getElementById('nucleus').getBoundingClientRect().bottom") <= SIZE[1]
        words = page.evaluate("[...document.querySelectorAll('#nucleus dt')].map((name) => name.textContent)")
        assert "score" in words
        assert "artefact" not in words  # it lies in none
        page.resize(700, 400)  # as of a laptop at 200 %
        page.open(
            f"{address}slides/0/?low#x={table['centroid_x'][0].as_py()}&y={table['centroid_y'][0].as_py()}&px=0.2"
        )
        page.wait_for(DRAWN)
        page.point(320, 200)
        page.point(350, 200)
        page.wait_for("!document.getElementById('nucleus').hidden")
        assert page.evaluate("document.getElementById('nucleus').getBoundingClientRect().bottom") <= 400
        page.resize(*SIZE)


def test_no_key_turns_or_mirrors_the_picture(page: Browser, finished: Finished) -> None:
    """The nuclei would stay where they were drawn."""
    picture = "[...document.querySelectorAll('.openseadragon-canvas')].find((one) => one.querySelector('.nuclei'))"
    drawn = f"{picture}.querySelector('canvas:not(.nuclei)').toDataURL()"
    with served(finished.run) as address:
        page.open(f"{address}slides/0/?keys")
        page.wait_for(DRAWN)
        page.evaluate(f"{picture}.focus()")
        time.sleep(1)  # until the last tile has faded in
        before = page.evaluate(drawn)
        for key in "rf":
            page.press(key, ord(key.upper()))
            time.sleep(0.5)
            assert page.evaluate(drawn) == before


def test_a_nucleus_is_described_without_a_mouse(page: Browser, finished: Finished) -> None:
    """The one in the middle, once the picture has had a key; the one that a finger has tapped."""
    table = tables.read_nuclei(RunFolder(finished.run).slide(FIRST).nuclei)
    x, y = (table[f"centroid_{axis}"][0].as_py() for axis in "xy")
    described = f"document.getElementById('nucleus').textContent.includes('{table['id'][0].as_py()}')"
    seen = f"!document.getElementById('nucleus').hidden && {described}"
    with served(finished.run) as address:
        page.point(0, 0)
        page.open(f"{address}slides/0/?keyboard#x={x + 10}&y={y}&px=0.2")  # 50 px of the screen right of it
        page.wait_for(DRAWN)
        page.press("Tab", 9)
        page.wait_for("document.activeElement.ariaLabel.includes('arrow keys')")
        page.press("ArrowLeft", 37)
        page.wait_for(seen)
        page.open(f"{address}slides/0/?finger#x={x}&y={y}&px=0.2")
        page.wait_for(DRAWN)
        page.tap(SIZE[0] / 2, SIZE[1] / 2)
        page.wait_for(seen)
        time.sleep(0.3)
        assert page.evaluate(seen)


def test_the_panel_leaves_room_for_the_picture(page: Browser, finished: Finished) -> None:
    """On a narrow screen its choices are folded, and a click or Enter unfolds them."""
    share = "(({width, height}) => width * height / innerWidth / innerHeight)(%s)"
    panel = share % "document.querySelector('aside').getBoundingClientRect()"
    with served(finished.run) as address:
        for width, folded in ((400, True), (SIZE[0], False)):
            page.resize(width, 700)
            page.open(f"{address}slides/0/?{width}")
            page.wait_for("!document.getElementById('scores').hidden")
            assert page.evaluate("document.getElementById('score').checkVisibility()") is not folded
            assert page.evaluate(panel) < 0.2
    page.resize(*SIZE)


def test_a_server_that_has_ended_is_named_once(page: Browser, finished: Finished) -> None:
    with served(finished.run) as address:
        page.open(f"{address}slides/0/?ended")
        page.wait_for(DRAWN)
    for score in (0.7, 0.8):
        set_score(page, score)
        time.sleep(0.4)  # a choice is counted after 0.15 s
    page.wait_for("document.getElementById('problems').textContent")
    assert text(page, "problems") == "nightslide view did not answer: reload this page, or start the command again"


def set_score(page: Browser, score: float) -> None:
    page.evaluate(
        f"{{ const slider = document.getElementById('score'); slider.value = {score};"
        f"slider.dispatchEvent(new Event('input')); }}"
    )


def look_at(page: Browser, address: str, x: float, y: float) -> None:
    """Open the first slide with a point, slide px, in the middle, and move the mouse there."""
    page.open(f"{address}slides/0/?again#x={x}&y={y}&px=0.2")
    page.wait_for(DRAWN)
    page.point(SIZE[0] / 2 - 30, SIZE[1] / 2)
    page.point(SIZE[0] / 2, SIZE[1] / 2)


def hostile(finished: Finished, folder: Path) -> RunFolder:
    """A run in which every text is markup: the slide's name, its remarks, a class, the cause of a failure."""
    run = RunFolder(finished.copy(folder).run)
    shutil.move(run.slide(FIRST).path, run.slide(HOSTILE).path)
    done = StageRecord({}, Counts(nuclei=2), (HOSTILE,))
    rows = [
        SlideRecord(HOSTILE, "done", tissue_mm2=1.0, work=done, remarks=(HOSTILE,)),
        SlideRecord("<script>alert(2)</script>", "failed", HOSTILE),
    ]
    write_ledger(run, rows)
    content = files.read_json(run.slide(HOSTILE).slide_json)
    assert content is not None
    width, height = content["size"]
    provenance = tables.Provenance(
        HOSTILE, (0.25, 0.25), Size(width, height), Box(0, 0, width, height), "", {HOSTILE: (255, 0, 0)}
    )
    shapes = shapely.box([10, 60], [10, 60], [40, 90], [40, 90])
    write(run.slide(HOSTILE).nuclei, shapes, provenance=provenance)
    files.write_json(run.slide(HOSTILE).slide_json, {**content, "source_path": f"/{HOSTILE}"})
    return run


def test_text_is_never_markup(page: Browser, finished: Finished, tmp_path: Path) -> None:
    """And the nuclei are drawn where the slide is not there any more."""
    page.messages.clear()
    with served(hostile(finished, tmp_path).path) as address:
        page.open(address)
        page.wait_for("document.querySelectorAll('#slides tr').length === 2")
        cells = page.evaluate("[...document.querySelectorAll('#slides td')].map((cell) => cell.textContent)")
        assert cells.count(HOSTILE) == 3
        assert page.evaluate("document.querySelectorAll('#slides img, script').length") == 2  # a thumbnail, slides.js
        page.open(f"{address}slides/0/")
        assert page.wait_for(DRAWN) == 2
        assert text(page, "name") == HOSTILE
        assert HOSTILE in text(page, "classes")
        assert "--slides DIR" in text(page, "problems")
        page.open(f"{address}slides/0/?again#x=25&y=25&px=0.2")
        page.wait_for(DRAWN)
        page.point(SIZE[0] / 2 - 30, SIZE[1] / 2)
        page.point(SIZE[0] / 2, SIZE[1] / 2)
        page.wait_for("!document.getElementById('nucleus').hidden")
        assert text(page, "nucleus").startswith(HOSTILE)
        assert page.evaluate("document.querySelectorAll('body img').length") == 0
    assert [message for message in page.messages if "409" not in message] == []


def test_outlines_of_tissue_and_artefacts(page: Browser, finished: Finished, tmp_path: Path) -> None:
    """QuPath's annotations, with their holes, are layers that can be hidden; the canvas shows their colour."""
    run = RunFolder(finished.copy(tmp_path).run)
    rings = [[[low, low], [high, low], [high, high], [low, high], [low, low]] for low, high in ((50, 200), (90, 160))]
    folder = run.slide(FIRST)
    for path, colour, kind, coordinates in (
        (folder.tissue_annotation, [0, 128, 0], "Polygon", rings),
        (folder.artefact_annotations, [255, 0, 0], "MultiPolygon", [rings]),
    ):
        geometry = {"type": kind, "coordinates": coordinates}
        properties = {"classification": {"name": path.stem, "color": colour}}
        feature = {"type": "Feature", "geometry": geometry, "properties": properties}
        files.write_json(path, {"type": "FeatureCollection", "features": [feature]})
    page.messages.clear()
    with served(run.path) as address:
        page.open(f"{address}slides/0/")
        page.wait_for(DRAWN)
        page.wait_for("document.querySelectorAll('#layers input').length === 4")
        page.evaluate("document.getElementById('outlines').click(); document.getElementById('density').click()")
        page.wait_for(f"{DRAWN} === 0 && {coloured_pixels()} > 0")
        page.evaluate("document.querySelectorAll('#layers input').forEach((box) => box.checked && box.click())")
        page.wait_for(f"{coloured_pixels()} === 0")
    assert page.messages == []


def coloured_pixels() -> str:
    """Counts them on a copy: a canvas that is read often is slow to draw on, of which the browser warns."""
    return """((canvas) => {
        const { width, height } = canvas;
        const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
        context.drawImage(canvas, 0, 0);
        return context.getImageData(0, 0, width, height).data.filter((value, i) => i % 4 === 3 && value).length;
    })(document.querySelector("canvas.nuclei"))"""
