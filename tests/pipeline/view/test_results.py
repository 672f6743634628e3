"""Slides are found again, by number, wherever they are now."""

import json
import shutil
import threading
from pathlib import Path

import pytest

import oracle
from finished_run import FAILED, FIRST, SECOND, Finished
from pipeline import files
from pipeline.archive.ledger import write_ledger
from pipeline.errors import ConfigError, RunError, SlideChanged
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord
from pipeline.view.results import Results
from slides.errors import SlideNotFound
from slides.slide import Slide


def moved(finished: Finished, folder: Path) -> Finished:
    """The same results, whose first slide is not where it was any more."""
    copy = finished.copy(folder)
    slide_json = RunFolder(copy.run).slide(FIRST).slide_json
    content = files.read_json(slide_json)
    assert content is not None
    content["source_path"] = str(folder / "gone" / Path(content["source_path"]).name)
    files.write_json(slide_json, content)
    return copy


def test_the_ledger_with_numbers(finished: Finished) -> None:
    rows = Results(RunFolder(finished.run)).ledger()
    assert [(row["number"], row["slide"], row["status"]) for row in rows] == [
        (0, FIRST, "done"),
        (1, SECOND, "done"),
        (2, FAILED, "failed"),
    ]
    assert rows[0]["nuclei"] == finished.nuclei
    assert f"{FAILED}.svs" in rows[2]["cause"]


def test_a_slide_keeps_its_number_when_the_ledger_changes(finished: Finished, tmp_path: Path) -> None:
    run = RunFolder(finished.copy(tmp_path).run)
    results = Results(run)
    write_ledger(run, [SlideRecord(name, "done") for name in ("a new one", SECOND, FIRST)])
    assert [(row["number"], row["slide"]) for row in results.ledger()] == [(3, "a new one"), (1, SECOND), (0, FIRST)]
    assert results.folder(1).path.name == SECOND


def test_a_slide_with_its_nuclei(finished: Finished) -> None:
    results = Results(RunFolder(finished.run))
    assert results.picture(0).size == (oracle.WIDTH, oracle.HEIGHT)
    assert len(results.nuclei(0)) == finished.nuclei
    assert results.nuclei(0) is results.nuclei(0)


def test_a_slide_is_opened_once_for_many_threads(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Slide] = []
    results = Results(RunFolder(finished.run))
    monkeypatch.setattr("pipeline.view.results.DeepZoom", opened.append)
    threads = [threading.Thread(target=results.picture, args=(0,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_few_slides_stay_open(finished: Finished, tmp_path: Path) -> None:
    """And one that was looked at long ago is opened again."""
    copy = finished.copy(tmp_path)
    run = RunFolder(copy.run)
    names = [f"copy {number}" for number in range(6)]
    for name in names:
        shutil.copytree(run.slide(FIRST).path, run.slide(name).path)
    write_ledger(run, [SlideRecord(name, "done") for name in names])
    results = Results(run)
    first = results.picture(0), results.nuclei(0)
    assert (results.picture(0), results.nuclei(0)) == first
    for number in range(6):
        results.picture(number), results.nuclei(number)
    assert results.picture(0) is not first[0]
    assert results.nuclei(0) is not first[1]


def test_results_that_were_made_again_are_read_again(finished: Finished, tmp_path: Path) -> None:
    run = RunFolder(finished.copy(tmp_path).run)
    results = Results(run)
    assert len(results.nuclei(0)) == finished.nuclei
    other = run.slide(SECOND).nuclei.read_bytes()
    with files.committed(run.slide(FIRST).nuclei) as path:
        path.write_bytes(other)
    assert len(results.nuclei(0)) == len(results.nuclei(1)) != finished.nuclei


def test_a_slide_that_has_moved(finished: Finished, tmp_path: Path) -> None:
    copy = moved(finished, tmp_path)
    with pytest.raises(SlideNotFound, match=r"gone.*no such file; if the slide has moved, say with --slides DIR"):
        Results(RunFolder(copy.run)).picture(0)
    elsewhere = tmp_path / "elsewhere" / "deep"
    shutil.copytree(copy.slides, elsewhere)
    results = Results(RunFolder(copy.run), elsewhere.parent)
    assert results.picture(0).slide.path.parent == elsewhere
    assert results.picture(1).size == (oracle.WIDTH, oracle.HEIGHT)


def test_a_slide_that_was_read_on_another_system(finished: Finished, tmp_path: Path) -> None:
    """Its path is none here, as that of Windows on Linux, but its name is known."""
    copy = finished.copy(tmp_path)
    slide_json = RunFolder(copy.run).slide(FIRST).slide_json
    content = json.loads(slide_json.read_text())
    slide_json.write_text(json.dumps(content | {"source_path": f"C:\\scans\\{FIRST}.png"}))
    assert Results(RunFolder(copy.run), copy.slides).picture(0).slide.path == copy.slides / f"{FIRST}.png"


def test_another_slide_of_the_same_name_is_not_shown(finished: Finished, tmp_path: Path) -> None:
    copy = moved(finished, tmp_path)
    others = tmp_path / "others"
    others.mkdir()
    oracle.paint(others / f"{FIRST}.png", 5)
    with pytest.raises(SlideChanged, match=r"is not the file that the results are of .*back into .*others; .*--slides"):
        Results(RunFolder(copy.run), others).picture(0)
    shutil.copytree(copy.slides, others / "here")  # among several of this name it is the one that fits
    assert Results(RunFolder(copy.run), others).picture(0).slide.path.parent.name == "here"


def test_a_slide_that_is_not_done(finished: Finished) -> None:
    results = Results(RunFolder(finished.run))
    with pytest.raises(RunError, match=f"{FAILED} is not done"):
        results.picture(2)
    with pytest.raises(RunError, match=f"{FAILED} has no table of nuclei, as it is not done: run it again"):
        results.nuclei(2)


@pytest.mark.parametrize("content", ["{}", '{"source_path": 1}', '{"source_path": "x", "um_per_px": []}', "[", "[]"])
def test_a_damaged_slide_json(finished: Finished, tmp_path: Path, content: str) -> None:
    run = RunFolder(finished.copy(tmp_path).run)
    run.slide(FIRST).slide_json.write_text(content)
    with pytest.raises(RunError, match="damaged"):
        Results(run).picture(0)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret"])
def test_a_name_does_not_lead_out_of_the_run(finished: Finished, tmp_path: Path, name: str) -> None:
    run = RunFolder(finished.copy(tmp_path).run)
    shutil.copytree(run.slide(FIRST).path, tmp_path / "secret")
    write_ledger(run, [SlideRecord(name, "done")])
    results = Results(run)
    for read in (results.picture, results.nuclei):
        with pytest.raises(RunError, match="leads out of the run's folder"):
            read(0)


def test_a_folder_that_is_no_run(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="need the --out folder of a run"):
        Results(RunFolder(tmp_path))
    with pytest.raises(ConfigError, match="need the one that holds the slides"):
        Results(RunFolder(finished.run), tmp_path / "none")
