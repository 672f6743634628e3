"""QuPath's scripts, run by Groovy on stand-ins for QuPath's classes (qupath_api): QuPath itself is not at hand.

The stand-ins have the names and signatures of QuPath 0.5 to 0.7 that the scripts use, and keep a project in files.
"""

import json
import os
import shutil
import subprocess
import uuid
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive.run import run
from pipeline.config import Execution
from pipeline.layout import RunFolder
from pipeline.segment import tables

SCRIPTS = Path(__file__).parents[2] / "workflows" / "qupath"
API = Path(__file__).parent / "qupath_api"
MACENKO = {"white": [1, 0.9, 1], "haematoxylin": [0.5, 0.75, 0.4], "eosin": [0.1, 0.8, 0.5], "strength": [2, 1]}

pytestmark = pytest.mark.skipif(
    not (shutil.which("groovy") and shutil.which("javac")),
    reason="needs Groovy and a JDK (Debian: groovy, default-jdk-headless)",
)


def groovy(*command: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    home = Path(os.path.realpath(shutil.which("javac") or "")).parents[1]
    quick = {"JAVA_HOME": str(home), "JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    environment = {**os.environ, **quick, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins, compiled."""
    folder = tmp_path_factory.mktemp("classes")
    sources = sorted(path for path in API.rglob("*.*") if path.parent != API)
    made = groovy("groovyc", "-j", "-d", folder, *sources)
    assert not made.returncode, made.stdout + made.stderr
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `slides`, in which two slides have one name, and their `results`; one has tissue and an artefact."""
    folder = tmp_path_factory.mktemp("made")
    for number, name in enumerate(("a/x", "b/x", "y")):
        path = folder / "slides" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(path, number)
    (folder / "slides" / "list.csv").write_text("path\na/x.png\nb/x.png\ny.png\n")
    settings, once = chosen(), Execution(cluster=False, workers=1)
    inputs = [folder / "slides" / "list.csv"]
    rows = run(inputs, folder / "results", settings, once, mpp=0.25, say=lambda line: None, detect=oracle.detect)
    assert all(row.done for row in rows)
    results = RunFolder(folder / "results")
    for name, kinds in {"tissue": ["Tissue"], "artefacts": ["Artefact: pen", "Artefact: fold"]}.items():
        annotations = [
            {
                "type": "Feature",
                "id": str(uuid.uuid4()),
                "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]},
                "properties": {"objectType": "annotation", "classification": {"name": kind, "color": [1, 2, 3]}},
            }
            for kind in kinds
        ]
        text = json.dumps({"type": "FeatureCollection", "features": annotations})
        (results.slide("a/x").path / f"{name}.geojson").write_text(text)
    change(results, "y", stain={"method": "macenko", "numbers": MACENKO})
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same, where a test may change it; slide.json says where the slides are."""
    place = tmp_path / "place"
    shutil.copytree(made, place)
    for name in ("a/x", "b/x", "y"):
        change(RunFolder(place / "results"), name, source_path=str(place / "slides" / f"{name}.png"))
    return place


def change(results: RunFolder, name: str, **fields: Any) -> None:
    file = results.slide(name).slide_json
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


class Done(NamedTuple):
    status: int
    lines: list[str]
    images: list[dict[str, Any]] | None  # of the project, as QuPath would open it

    def said(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.lines)


def qupath(classes: Path, script: Path, project: Path, *args: str | Path, current: bool = False) -> Done:
    """`QuPath script SCRIPT --args ...`, and with `current` for every image: `-p PROJECT -s`."""
    done = groovy(
        "groovy",
        "-cp",
        classes,
        API / "script.groovy",
        script,
        project if current else "-",
        *args,
        QUPATH_PROJECT=project,
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert lines[-1].startswith("PROJECT "), done.stdout + done.stderr
    return Done(done.returncode, lines[:-1], json.loads(lines[-1].removeprefix("PROJECT ")))


def build(classes: Path, place: Path, *more: Path) -> Done:
    project = more[1] if len(more) > 1 else place / "results" / "qupath" / "project.qpproj"
    return qupath(classes, SCRIPTS / "project.groovy", project, place / "results", *more)


def empty_project(classes: Path, place: Path, *images: Path) -> Path:
    """A project of images without objects, beside the results."""
    script, project = place / "empty.groovy", place / "results" / "mine" / "project.qpproj"
    project.parent.mkdir()
    script.write_text(
        "def project = qupath.lib.projects.Projects.createProject(new File(args[0]), java.awt.image.BufferedImage)\n"
        "args.drop(1).each { def server = qupath.lib.images.servers.ImageServers.buildServer(new File(it).toURI())\n"
        "    project.addImage(server.getBuilder()).setImageName(new File(it).name) }\n"
        "project.syncChanges()\n"
    )
    assert not qupath(classes, script, project, project, *images).status
    return project


def nuclei(place: Path, name: str) -> list[str]:
    ids: list[str] = tables.read_nuclei(RunFolder(place / "results").slide(name).nuclei, ["id"])["id"].to_pylist()
    return ids


def objects(image: dict[str, Any]) -> list[str]:
    """Ids of the detections of an image, wherever in its hierarchy."""
    return [id_ for o in image["objects"] for id_ in (o["children"] if o["type"] == "annotation" else [o["id"]])]


def test_a_project_has_every_slide_with_all_that_is_known_of_it(classes: Path, place: Path) -> None:
    done = build(classes, place)
    assert done.status == 0, done.lines
    assert done.images is not None
    assert [image["name"] for image in done.images] == ["a/x.png", "b/x.png", "y.png"]
    for image, name in zip(done.images, ("a/x", "b/x", "y"), strict=True):
        assert image["uri"].endswith(f"/slides/{name}.png")
        assert image["type"] == "BRIGHTFIELD_H_E"
        assert image["um_per_px"] == [0.25, 0.25]  # of --mpp: the file states none
        assert objects(image) == nuclei(place, name)
        assert done.said(f"{len(nuclei(place, name))} nuclei")
    first, second, third = done.images
    tissue, *artefacts = first["objects"]
    assert (tissue["name"], tissue["locked"], len(tissue["children"])) == ("Tissue", True, len(nuclei(place, "a/x")))
    assert [(one["name"], one["children"]) for one in artefacts] == [("Artefact: pen", []), ("Artefact: fold", [])]
    assert second["stains"] is None
    stains = json.loads(third["stains"])
    assert [stains[key] for key in ("Stain 1", "Values 1")] == ["Hematoxylin", "0.50000 0.75000 0.40000"]
    assert stains["Background"].split() == ["255.00000", "229.50000", "255.00000"]


def test_a_second_run_changes_nothing(classes: Path, place: Path) -> None:
    """Neither of project.groovy nor of import.groovy; and a project is extended by the slides that it lacks."""
    results = RunFolder(place / "results")
    hidden = results.slide("y").slide_json.rename(place / "y.json")
    first = build(classes, place)
    project = results.qupath_project
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in project.parent.iterdir()}
    again = build(classes, place)
    assert again.status == 0
    assert again.images == first.images
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in project.parent.iterdir()} == files
    hidden.rename(results.slide("y").slide_json)
    extended = build(classes, place).images
    assert first.images is not None
    assert extended is not None
    assert extended[:2] == first.images
    assert objects(extended[2]) == nuclei(place, "y")
    imported = qupath(classes, SCRIPTS / "import.groovy", project, place / "results", current=True)
    assert imported.status == 0
    assert imported.images == extended


def test_slides_that_were_moved_are_found_by_the_names_of_their_folders(classes: Path, place: Path) -> None:
    """y is there twice now, in folders that were not its own: it is refused; the others are told apart."""
    moved = place / "elsewhere"
    (place / "slides").rename(moved)
    shutil.copytree(moved / "a", moved / "c")
    shutil.copy(moved / "y.png", moved / "a" / "y.png")
    shutil.copy(moved / "y.png", moved / "b" / "y.png")
    (moved / "y.png").unlink()
    done = build(classes, place, moved, place / "project.qpproj")
    assert done.status == 1
    assert done.images is not None
    assert [image["uri"].split("elsewhere/")[1] for image in done.images] == ["a/x.png", "b/x.png"]
    assert done.said("y.png: FAILED:", "2 files of its name")


def test_nuclei_are_imported_into_the_image_that_they_are_of(classes: Path, place: Path) -> None:
    """Slides of one name in two folders, another suffix, a slide that was moved; the results are around the project."""
    other = shutil.copy(place / "slides" / "y.png", place / "slides" / "y.tiff.png")
    copied = shutil.copytree(place / "slides" / "b", place / "copy" / "b") / "x.png"
    images = [place / "slides" / "b" / "x.png", place / "slides" / "a" / "x.png", copied, Path(other)]
    done = qupath(classes, SCRIPTS / "import.groovy", empty_project(classes, place, *images), current=True)
    assert done.images is not None
    assert [objects(image) for image in done.images] == [
        nuclei(place, "b/x"),
        nuclei(place, "a/x"),
        nuclei(place, "b/x"),
        [],
    ]
    assert done.status == 1
    assert done.said("ERROR y.tiff.png: ", "0 results, need one")


def test_an_image_keeps_the_scale_that_it_has(classes: Path, place: Path) -> None:
    project, script = empty_project(classes, place, place / "slides" / "y.png"), place / "scale.groovy"
    script.write_text(
        "import qupath.lib.scripting.QP\nQP.setPixelSizeMicrons(QP.getCurrentImageData(), 0.5, 0.49, null)\n"
    )
    qupath(classes, script, project, current=True)
    done = qupath(classes, SCRIPTS / "import.groovy", project, place / "results", current=True)
    assert done.images is not None
    (image,) = done.images
    assert (objects(image), image["um_per_px"]) == (nuclei(place, "y"), [0.5, 0.49])


def test_an_image_of_two_results_needs_to_be_told_which(classes: Path, place: Path) -> None:
    shutil.copytree(place / "results" / "b", place / "results" / "again" / "b")
    project = empty_project(classes, place, place / "slides" / "b" / "x.png")
    done = qupath(classes, SCRIPTS / "import.groovy", project, place / "results", current=True)
    assert done.status == 1
    assert done.said("x.png: 2 results, need one: give the folder of its own results as RESULTS")
    done = qupath(classes, SCRIPTS / "import.groovy", project, place / "results" / "again" / "b" / "x", current=True)
    assert done.status == 0
    assert done.images is not None
    assert objects(done.images[0]) == nuclei(place, "b/x")


def test_what_qupath_cannot_read_is_an_error_and_the_image_is_not_added(classes: Path, place: Path) -> None:
    results = RunFolder(place / "results")
    file = results.slide("a/x").export("qupath")
    with zipfile.ZipFile(file) as archive:
        ((name, text),) = [(name, archive.read(name).decode()) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, text.replace('"geometry":{', '"geometry":null,"former":{', 1))
    content = json.loads(results.slide("a/x").slide_json.read_text())["files"]
    content[file.name]["bytes"] = file.stat().st_size
    change(results, "a/x", files=content)
    change(results, "b/x", bounds=[10, 10, 400, 300])
    results.slide("y").export("qupath").write_bytes(b"")
    done = build(classes, place)
    assert done.status == 1
    assert done.images is None
    count = len(nuclei(place, "a/x"))
    assert done.said("x.png: FAILED:", f"QuPath reads {count - 1} of {count} nuclei in nuclei-00000.geojson")
    assert done.said(
        "x.png: FAILED:", "410 x 330 px in QuPath, the nuclei are in an image of 390 x 290 px", "--no-crop"
    )
    assert done.said("y.png: FAILED:", "is not as it was written")


def test_another_result_is_not_added_to_the_first(classes: Path, place: Path) -> None:
    build(classes, place)
    results = RunFolder(place / "results")
    content = json.loads(results.slide("y").slide_json.read_text())["files"]
    content["nuclei.geojson.zip"]["sha256"] = "another"
    change(results, "y", files=content)
    done = build(classes, place)
    assert done.status == 1
    assert done.said("y.png has nuclei of another result: delete its detections, and run again")
    assert done.images is not None
    assert objects(done.images[2]) == nuclei(place, "y")


def test_what_is_missing_on_the_command_line_is_said(classes: Path, place: Path) -> None:
    for script in ("project.groovy", "import.groovy"):
        done = qupath(classes, SCRIPTS / script, place / "none.qpproj")
        assert done.status == 1
        assert done.said("no results are given" if script == "project.groovy" else "no image is open")
