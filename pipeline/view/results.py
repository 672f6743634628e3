"""What the pages of `nightslide view` show of a run: its ledger, and the slides that are looked at."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline import files
from pipeline.archive.ledger import read_columns
from pipeline.config import require
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.finished import check_same_file, remedy
from pipeline.text import printable
from pipeline.view.deep_zoom import DeepZoom
from pipeline.view.nuclei import NucleusTiles
from slides.errors import SlideError
from slides.slide import open_slide

_OPEN_SLIDES = 4
_TABLES_IN_MEMORY = 2

# Columns of the ledger that are shown.
_COLUMNS = {"slide": str, "status": str, "cause": str, "nuclei": int, "tissue_mm2": float, "mpp": float, "remarks": str}

T = TypeVar("T")


class Results:
    """The results of a run, whose slides have numbers. Safe to use from several threads.

    run: with a ledger; slides: a folder in which slides are looked for before the place where the run read them.
    A slide keeps its number though others are added to the ledger. Raises RunError where there is no ledger, and
    ConfigError where `slides` is no folder.
    """

    def __init__(self, run: RunFolder, slides: Path | None = None) -> None:
        self.run = run
        require(
            slides is None or slides.is_dir(), f"--slides {slides} is no folder: need the one that holds the slides"
        )
        self._slides = slides
        self._numbers: dict[str, int] = {}  # of the slides, by their names in the ledger
        self._numbering = threading.Lock()
        self._pictures = _recent(_OPEN_SLIDES, self._open_picture)
        self._tables = _recent(_TABLES_IN_MEMORY, lambda number, _: NucleusTiles(self.folder(number).nuclei))
        self.ledger()

    def ledger(self) -> list[dict[str, Any]]:
        """The slides in the order of the ledger, as it is now: the number and some columns of each."""
        rows = read_columns(self.run, _COLUMNS)
        with self._numbering:
            numbers = [self._numbers.setdefault(row["slide"], len(self._numbers)) for row in rows]
        return [
            {"number": number}
            | {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}
            for number, row in zip(numbers, rows, strict=True)
        ]

    def __len__(self) -> int:
        """How many slides have numbers."""
        return len(self._numbers)

    def name(self, number: int) -> str:
        return list(self._numbers)[number]

    def folder(self, number: int) -> SlideFolder:
        """Raises RunError for a name in the ledger that leads out of the run's folder."""
        name = self.name(number)
        if not self.run.holds(name):
            raise RunError(f"the slide {name!r} in {self.run.ledger} leads out of the run's folder: need one inside it")
        return self.run.slide(name)

    def picture(self, number: int) -> DeepZoom:
        """The slide itself. Raises SlideError where it is not found or cannot be read, RunError if it is not done."""
        return self._pictures(number, files.mtime_ns(self.folder(number).slide_json))

    def nuclei(self, number: int) -> NucleusTiles:
        """Its nuclei. Raises RunError where there is no table, or it is damaged."""
        written = files.mtime_ns(self.folder(number).nuclei)
        if written is None:
            raise RunError(f"{self.name(number)} has no table of nuclei, as it is not done: run it again")
        return self._tables(number, written)

    def _open_picture(self, number: int, _: int | None) -> DeepZoom:
        content = files.read_json(self.folder(number).slide_json)
        if content is None:
            raise RunError(f"{self.name(number)} is not done, or its slide.json is damaged: run it again")
        try:
            source, name, quick_hash = Path(content["source_path"]), content["source"], content["quick_hash"]
            mpp = float(content["um_per_px"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            slide_json = self.folder(number).slide_json
            raise RunError(f"{slide_json} is damaged ({error!r}): {remedy(slide_json)}") from error
        problems: list[SlideError] = []
        for path in self._places(source, name):
            try:
                slide = open_slide(path, mpp=mpp)
                of_results = "the file that the results are of"
                check_same_file(slide, quick_hash, of_results, f"put that one back into {path.parent}")
                return DeepZoom(slide)
            except SlideError as error:
                problems.append(error)
        raise type(problems[0])(f"{problems[0]}; if the slide has moved, say with --slides DIR where it is")

    def _places(self, source: Path, name: str) -> Iterator[Path]:
        """Where a slide may be: wherever --slides holds a file of its name, then where the run read it.

        name: its own, as the path may be of another system.
        """
        for inside, _, names in os.walk(self._slides) if self._slides is not None else ():
            if name in names:
                yield Path(inside, name)
        yield source


def _recent(limit: int, make: Callable[[int, int | None], T]) -> Callable[[int, int | None], T]:
    """`make`, with its last few values kept: each is made once, however many threads ask for it."""
    cached, making = functools.lru_cache(limit)(make), threading.Lock()

    def value(number: int, written: int | None) -> T:
        with making:
            return cached(number, written)

    return value
