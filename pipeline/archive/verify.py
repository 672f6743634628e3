"""Whether the results of a run are still what was written."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import files
from pipeline.archive.ledger import read_ledger
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.finished import damaged_results
from pipeline.text import printable


def verify_results(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every slide that was finished, by its name, and what is wrong with its results: a line each, with the remedy.

    folder: of a run, or of one slide of it. Reads every byte of every result.
    Raises RunError for a folder without a finished slide.
    """
    slides = finished_slides(folder)
    if not slides:
        raise RunError(f"{folder} holds no finished slide: need the --out folder of a run")
    for name, slide in slides.items():
        yield name, list(_problems(slide))


def without_nuclei(folder: Path) -> list[str]:
    """The slides that were finished and have no table of nuclei any more: a line each, with the remedy."""
    lost = {name: slide for name, slide in finished_slides(folder).items() if not slide.nuclei.exists()}
    return [f"{name}: {problem}" for name, slide in lost.items() for problem in _problems(slide, thorough=False)]


def finished_slides(folder: Path) -> dict[str, SlideFolder]:
    """The slides that were finished, there or not, by their names."""
    run = RunFolder(folder)
    slides = {slide.path: slide for slide in [*run.finished(), *_in_the_ledger(run)]}
    return {printable(run.name_of(slide)): slide for _, slide in sorted(slides.items())}


def _in_the_ledger(run: RunFolder) -> list[SlideFolder]:
    """The folders of the slides that are done according to ledger.csv, where there is one; none beside the run's."""
    try:
        rows = read_ledger(run)
    except RunError:
        return []
    return [run.slide(row["slide"]) for row in rows if row["status"].startswith("done") and run.holds(row["slide"])]


def _problems(slide: SlideFolder, *, thorough: bool = True) -> Iterator[str]:
    name = slide.slide_json.name
    if not slide.slide_json.exists():
        yield f"{name} is missing, though ledger.csv says that the slide is done: the same run command does it again"
        return
    content = files.read_json(slide.slide_json)
    if content is None:
        yield f"{name} is damaged: the same run command does the slide again"
    else:
        yield from damaged_results(slide, content, thorough=thorough)
