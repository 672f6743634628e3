"""The paths of a run and of its slides: the only place in which a file of theirs is named."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slides.partial import PREFIX, intended_name

EXPORTS = {
    "qupath": "nuclei.geojson.zip",
    "csv": "nuclei.csv",
    "spatialdata": "nuclei.spatialdata.zarr",
    "h5ad": "nuclei.h5ad",
    "ngff": "nuclei.ome.zarr",
    "dsa": "nuclei.dsa",
    "dicom": "nuclei.dicom",
    "density": "density",
}
"Files and folders made from nuclei.parquet, by the name of their format."

DENSITY = ("density.ome.tif", "density.geojson")
"In the folder of the format density."

LEASE = ".lease"  # hidden, as a slide's folder may hold the folders of other slides, whatever their names

STAGED = ".nightslide-stage-"
"How the names of folders begin that hold copies of slides, in the folder of --stage."

_SLIDE, _FAILURE = "slide.json", "failure.json"
_PICTURES = ("thumbnail.jpg", "overlay.jpg")
_ANNOTATIONS = ("tissue.geojson", "artefacts.geojson")
_NUCLEI, _WORK = "nuclei.parquet", "work"
_RUN, _LEDGER, _REPORT, _LOGS = "run.json", "ledger.csv", "report.html", "logs"
_QUPATH = "qupath"
_REGIONS = "regions.csv"  # of a slide and of the run; made by `nightslide measure`

RESULTS = (*_PICTURES, *_ANNOTATIONS, _NUCLEI, *EXPORTS.values())
"What a finished slide's folder holds beside slide.json."

RESERVED = frozenset([_RUN, _LEDGER, _REPORT, _LOGS, _QUPATH, _REGIONS, _SLIDE, _FAILURE, _WORK, *RESULTS])
"What a run and its slides write, hidden files left out: no slide's folder has such a name."


@dataclass(frozen=True)
class SlideFolder:
    """The folder of one slide's results."""

    path: Path

    @property
    def run(self) -> "RunFolder | None":
        """The run that it is a part of; None where it lies in no run's folder."""
        above = Path(os.path.abspath(self.path)).parents
        return next((RunFolder(folder) for folder in above if (folder / _RUN).is_file()), None)

    @property
    def name(self) -> str:
        """That of the slide in its run, "/" between its parts; the folder's own where it lies in no run's folder."""
        whole, run = Path(os.path.abspath(self.path)), self.run
        return whole.name if run is None else whole.relative_to(run.path).as_posix()

    @property
    def slide_json(self) -> Path:
        """Provenance, record and summary of a finished slide; written last."""
        return self.path / _SLIDE

    @property
    def failure_json(self) -> Path:
        return self.path / _FAILURE

    @property
    def thumbnail(self) -> Path:
        return self.path / _PICTURES[0]

    @property
    def overlay(self) -> Path:
        return self.path / _PICTURES[1]

    @property
    def tissue_annotation(self) -> Path:
        return self.path / _ANNOTATIONS[0]

    @property
    def artefact_annotations(self) -> Path:
        """Not there where a run did not look for artefacts."""
        return self.path / _ANNOTATIONS[1]

    @property
    def nuclei(self) -> Path:
        """The table that every other result is made from."""
        return self.path / _NUCLEI

    def export(self, name: str) -> Path:
        """The file of an export format, one of `EXPORTS`."""
        return self.path / EXPORTS[name]

    @property
    def regions(self) -> Path:
        """Measurements of regions, made by `nightslide measure` from a finished slide."""
        return self.path / _REGIONS

    @property
    def lease(self) -> Path:
        return self.path / LEASE

    @property
    def work(self) -> Path:
        """Scratch: removed when the slide is done."""
        return self.path / _WORK

    def discarded_work(self, token: str) -> Path:
        """What `work` is renamed to before it is removed, so that it disappears in one step; token: unique."""
        return self.path / f".{_WORK}-{token}"

    def all_discarded_work(self) -> list[Path]:
        """The renamed work folders whose removal was interrupted."""
        return list(self.path.glob(self.discarded_work("*").name))

    def half_written(self) -> list[Path]:
        """What killed writers left of files and folders that only the owner of the slide's lease writes."""
        names = {_SLIDE, *RESULTS}
        return [path for path in self.path.glob(f"{PREFIX}*") if intended_name(path) in names]

    @property
    def plan(self) -> Path:
        return self.work / "plan.json"

    @property
    def attempts(self) -> Path:
        """When the slide was worked on."""
        return self.work / "attempts.json"

    @property
    def tissue(self) -> Path:
        """The masks of the plan: the tissue, and the artefacts that a thumbnail shows."""
        return self.work / "tissue.npz"

    @property
    def artefacts(self) -> Path:
        """All artefacts, once every block is done."""
        return self.work / "artefacts.npy"

    @property
    def patches(self) -> Path:
        return self.work / "patches.zarr"

    def focus(self, block: int) -> Path:
        """How sharp a block's patches are."""
        return self.work / "focus" / f"{block:06d}.json"

    def predictions(self, block: int) -> Path:
        """The instances in a block's patches, in patch px."""
        return self.work / "predictions" / f"{block:06d}.npz"

    def instances(self, block: int) -> Path:
        """What a block's tiles claim, as polygons in work px."""
        return self.work / "instances" / f"{block:06d}.parquet"


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run."""

    path: Path

    @property
    def run_json(self) -> Path:
        """Settings, digest, versions: what the folder's results were made with."""
        return self.path / _RUN

    @property
    def ledger(self) -> Path:
        return self.path / _LEDGER

    @property
    def regions(self) -> Path:
        """The measured regions of all slides."""
        return self.path / _REGIONS

    @property
    def report(self) -> Path:
        return self.path / _REPORT

    @property
    def logs(self) -> Path:
        return self.path / _LOGS

    @property
    def qupath_project(self) -> Path:
        return self.path / _QUPATH / "project.qpproj"

    @property
    def qupath_classes(self) -> Path:
        """The classes of QuPath's project; QuPath fixes the name."""
        return self.path / _QUPATH / "classifiers" / "classes.json"

    @property
    def qupath_script(self) -> Path:
        """Adds the nuclei to the project's images. QuPath lists what is in a folder of this name."""
        return self.path / _QUPATH / "scripts" / "import.groovy"

    def slide(self, name: str) -> SlideFolder:
        """The folder of the slide of this name; names may hold "/"."""
        return SlideFolder(self.path / name)

    def name_of(self, slide: SlideFolder) -> str:
        """The inverse of `slide`, for a folder below the run's; of the run's own, where that is a slide's, its name."""
        if slide.path == self.path:
            return self.path.resolve().name
        return slide.path.relative_to(self.path).as_posix()

    def holds(self, name: str) -> bool:
        """Whether the folder of a slide of this name, as a ledger has it, lies inside; links are followed."""
        run = os.path.realpath(self.path)
        return Path(os.path.realpath(self.slide(name).path)).is_relative_to(run)

    def links(self, name: str) -> Iterator[Path]:
        """Symbolic links among all that a run writes of a slide, from its folder (below the run's own) to its work."""
        folder = self.slide(name)
        way = [path for path in (*reversed(folder.path.parents), folder.path) if self.path in path.parents]
        own = (folder.path / file for file in (LEASE, _SLIDE, _FAILURE, _WORK, _REGIONS, *RESULTS))
        yield from filter(os.path.islink, (*way, *own))
        for inside, folders, files in os.walk(folder.work):
            yield from filter(os.path.islink, (Path(inside, file) for file in (*folders, *files)))

    def finished(self) -> list[SlideFolder]:
        """The folders of finished slides, sorted."""
        return self._with(_SLIDE)

    def failed(self) -> list[SlideFolder]:
        """The folders of slides that failed, sorted."""
        return self._with(_FAILURE)

    def with_nuclei(self) -> list[SlideFolder]:
        """The folders that hold a table of nuclei, sorted."""
        return self._with(_NUCLEI)

    def _with(self, name: str) -> list[SlideFolder]:
        """The folders of slides that hold a file of this name, sorted. Exports and scratch are not searched."""
        found = []
        for inside, folders, names in os.walk(self.path):
            folders[:] = [folder for folder in folders if folder not in RESERVED and not folder.startswith(".")]
            if name in names:
                found.append(SlideFolder(Path(inside)))
        return sorted(found, key=lambda folder: folder.path)
