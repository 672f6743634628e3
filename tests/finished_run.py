"""A finished run, for the tests of what shows it."""

import shutil
from pathlib import Path
from typing import NamedTuple

import oracle
from pipeline.archive.run import run
from pipeline.config import Execution

FIRST, SECOND, FAILED = "Präparat 1 & 2", "Präparat 3", "broken"
"Names of the slides."


class Finished(NamedTuple):
    """A run's folder, the folder of its slides, and how many nuclei the first slide has."""

    run: Path
    slides: Path
    nuclei: int

    def copy(self, folder: Path) -> "Finished":
        """The same slides with a copy of the results, to be damaged."""
        return self._replace(run=Path(shutil.copytree(self.run, folder / "results")))


def finish(folder: Path) -> Finished:
    """Paint two slides and damage a third, and run them."""
    slides, out = folder / "slides", folder / "results"
    slides.mkdir()
    nuclei = oracle.paint(slides / f"{FIRST}.png", 0)
    oracle.paint(slides / f"{SECOND}.png", 1)
    (slides / f"{FAILED}.svs").write_bytes(b"not a slide")
    one = Execution(cluster=False, workers=1)
    run(list(slides.iterdir()), out, oracle.chosen(), one, mpp=0.25, detect=oracle.detect, say=lambda line: None)
    return Finished(out, slides, nuclei)
