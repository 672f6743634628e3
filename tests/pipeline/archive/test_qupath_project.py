"""A QuPath project of a run has every slide once, keeps what is in it, and is written only where something is new."""

import json
import ntpath
import os
import re
import shlex
import shutil
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest

from nuclei_tables import PROVENANCE, blobs, write
from oracle import paint
from pipeline import cli
from pipeline.archive import qupath_project
from pipeline.archive.inputs.region_files import match_regions
from pipeline.archive.ledger import write_ledger
from pipeline.archive.qupath_project import write_project
from pipeline.errors import ConfigError, RunError
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord
from slides import open_slide


def finished(run: RunFolder, name: str, source: str | Path) -> None:
    folder = run.slide(name)
    folder.path.mkdir(parents=True)
    write(folder.nuclei, blobs(2))
    content = {"source": Path(source).name, "source_path": str(source), "quick_hash": ""}
    folder.slide_json.write_text(json.dumps(content))


def slide(path: Path) -> Path:
    """A file for a slide that is not opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "my results")
    finished(made, "a/x", slide(data / "a" / "x.svs"))
    finished(made, "b/x", slide(data / "b" / "x.svs"))
    finished(made, "µ y", slide(data / "a µ#1" / "y.ome.tif"))
    made.run_json.write_text("{}")
    return made


def content(run: RunFolder) -> dict[str, Any]:
    project: dict[str, Any] = json.loads(run.qupath_project.read_text())
    return project


def test_every_finished_slide_is_an_image(run: RunFolder, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["qupath", str(run.path)])
    assert ended.value.code == 0
    said, advice = capsys.readouterr().out.splitlines()
    assert said == f"{run.qupath_project}: 3 images, 3 of them new"
    assert shlex.split(advice)[-4:] == [str(run.qupath_script), "-p", str(run.qupath_project), "-s"]
    project = content(run)
    assert project["lastID"] == 3
    assert project["createTimestamp"] <= project["modifyTimestamp"]
    assert project["uri"] == run.qupath_project.as_uri()
    assert [entry["entryID"] for entry in project["images"]] == [1, 2, 3]
    assert [entry["imageName"] for entry in project["images"]] == ["a/x.svs", "b/x.svs", "µ y.ome.tif"]
    assert [entry["serverBuilder"] for entry in project["images"]] == [
        {"builderType": "uri", "uri": f"file://{data}/{place}", "args": []}
        for place in ("a/x.svs", "b/x.svs", "a%20%C2%B5%231/y.ome.tif")
    ]


def test_classes_have_the_colours_of_the_nuclei(run: RunFolder) -> None:
    """As Java's Color.getRGB() has them: a signed number, opaque."""
    write_project(run)
    classes = json.loads(run.qupath_classes.read_text())["pathClasses"]
    assert [one["name"] for one in classes] == sorted(PROVENANCE.colours)
    for one in classes:
        assert -(2**31) <= one["color"] < 0
        assert (one["color"] % 2**32).to_bytes(4, "big") == bytes([255, *PROVENANCE.colours[one["name"]]])


def test_a_project_has_the_script_that_adds_the_nuclei(run: RunFolder) -> None:
    """Among the scripts that QuPath lists; what a person saves there in its place stays."""
    script = Path(__file__).parents[3] / "workflows" / "qupath" / "import.groovy"
    assert write_project(run).warnings == ()
    assert run.qupath_script.read_text() == script.read_text()
    run.qupath_script.write_text("// changed in QuPath")
    (warning,) = write_project(run).warnings
    assert warning.startswith(f"{run.qupath_script} is not the script of this version: move it away")
    assert run.qupath_script.read_text() == "// changed in QuPath"
    run.qupath_script.unlink()
    (run.qupath_script / "notes").mkdir(parents=True)
    assert write_project(run).warnings == (warning,)
    assert (run.qupath_script / "notes").is_dir()


def test_what_is_in_a_project_stays(run: RunFolder, data: Path) -> None:
    """As QuPath writes it: URIs with one slash, servers within servers, fields that we do not know."""
    write_project(run)
    project = content(run)
    rotated = {"builderType": "rotated", "builder": {"builderType": "uri", "uri": f"file:{data}/a/x.svs", "args": []}}
    mine = {"serverBuilder": rotated, "entryID": 8, "imageName": "mine", "metadata": {"k": "v"}}
    other = {
        "serverBuilder": {"builderType": "uri", "uri": "https://example.org/1"},
        "entryID": 4,
        "imageName": "other",
    }
    project |= {"version": "0.6.0", "images": [mine, other], "createTimestamp": 5}
    run.qupath_project.write_text(json.dumps(project))
    run.qupath_classes.write_text(json.dumps({"pathClasses": [{"name": "Nucleus", "color": -1}, {"name": "Tumor"}]}))
    assert write_project(run)[1:] == (4, 2, ())
    extended = content(run)
    assert extended["images"][:2] == [mine, other]
    assert [entry["entryID"] for entry in extended["images"][2:]] == [9, 10]
    assert (extended["version"], extended["createTimestamp"], extended["lastID"]) == ("0.6.0", 5, 10)
    classes = json.loads(run.qupath_classes.read_text())["pathClasses"]
    assert classes[:2] == [{"name": "Nucleus", "color": -1}, {"name": "Tumor"}]
    assert len(classes) == 3


def test_a_second_run_writes_nothing(run: RunFolder) -> None:
    write_project(run)
    made = (run.qupath_project, run.qupath_classes, run.qupath_script)
    before = {path: path.stat().st_mtime_ns for path in made}
    assert write_project(run)[1:] == (3, 0, ())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_name_that_is_no_text_is_known_again(run: RunFolder, data: Path) -> None:
    finished(run, "caf_xe9", slide(data / os.fsdecode(b"caf\xe9.svs")))
    assert write_project(run)[1:3] == (4, 4)
    assert write_project(run)[1:] == (4, 0, ())


@pytest.mark.parametrize("written", ["file:/", "file:///", "file:////"])
@pytest.mark.parametrize("path", ["C:\\slides\\x y.svs", "\\\\server\\slides\\µ.svs"])
def test_images_of_windows_are_known_again(monkeypatch: pytest.MonkeyPatch, path: str, written: str) -> None:
    """Law: the path of a file's URI is that of the file, whichever of its forms QuPath writes."""
    monkeypatch.setattr(qupath_project, "os", SimpleNamespace(fsdecode=os.fsdecode, path=ntpath))
    monkeypatch.setattr(qupath_project, "Path", PureWindowsPath)
    uri = PureWindowsPath(path).as_uri()
    assert qupath_project._path(uri) == path
    if (written == "file:////") == path.startswith("\\\\"):
        assert qupath_project._path(written + uri.removeprefix("file:").lstrip("/")) == path


def test_what_cannot_be_a_project_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no finished slides: need the --out folder of a run"):
        write_project(RunFolder(tmp_path / "nowhere"))
    with pytest.raises(RunError, match=r"has no finished slides: need the --out folder of a run"):
        write_project(RunFolder(run.slide("µ y").path))
    run.qupath_project.parent.mkdir()
    image = '{"images": [{"entryID": 1, "serverBuilder": {"uri": "%s"}}], "lastID": %s}'
    for text in ("[]", '{"images": 3}', '{"images": {}}', "no JSON", image % (r"\udcff", 1), image % ("x", "1e999")):
        run.qupath_project.write_text(text)
        with pytest.raises(RunError, match="is no QuPath project: move it away"):
            write_project(run)


def test_slides_that_cannot_be_images_are_named(run: RunFolder, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of URLs, of which no copy is known, and damaged ones; a project of nothing is not written."""
    finished(run, "c/z", "s3://bucket/z.svs")
    finished(run, "d", slide(data / "d.svs"))
    run.slide("d").nuclei.write_bytes(b"PAR1")
    finished(run, "e", slide(data / "e.svs"))
    run.slide("e").slide_json.write_text("{")
    with pytest.raises(SystemExit) as ended:
        cli.main(["qupath", str(run.path)])
    said = capsys.readouterr()
    assert (ended.value.code, said.out.splitlines()[0].endswith("3 images, 3 of them new")) == (0, True)
    url, table, record = said.err.splitlines()
    assert url == (
        "WARNING: left out: c/z: it was read from a URL, which QuPath does not open: say with --slides DIR where a "
        "copy of the slide is"
    )
    assert table.startswith("WARNING: left out: d: nuclei.parquet is damaged (")
    assert record == "WARNING: left out: e: slide.json is damaged"
    remote = RunFolder(run.path / "remote")
    finished(remote, "z", "s3://bucket/z.svs")
    remote.run_json.write_text("{}")
    with pytest.raises(RunError, match="URL"):
        write_project(remote)
    assert not remote.qupath_project.exists()


def test_regions_are_found_by_the_names_of_the_images(run: RunFolder, data: Path, tmp_path: Path) -> None:
    """Law: the files that the README's script writes, named after the images, are taken for the slides' regions."""
    write_project(run)
    for entry in content(run)["images"]:
        slide(tmp_path / "drawn" / f"{entry['imageName']}.geojson")
    places = {"a/x": data / "a" / "x.svs", "b/x": data / "b" / "x.svs", "µ y": data / "a µ#1" / "y.ome.tif"}
    files, problems, _ = match_regions(str(tmp_path / "drawn"), places)
    assert not problems
    assert {name: file.relative_to(tmp_path / "drawn").as_posix() for name, file in files.items()} == {
        "a/x": "a/x.svs.geojson",
        "b/x": "b/x.svs.geojson",
        "µ y": "µ y.ome.tif.geojson",
    }


def test_slides_that_were_moved_are_looked_for(tmp_path: Path) -> None:
    """The one of the right content among those of its name, or none: no image is of a file that is not there."""
    run, slides = RunFolder(tmp_path / "results"), tmp_path / "slides"
    for folder, seed in (("a", 1), ("b", 2)):
        slide(slides / folder / "x.png")
        paint(slides / folder / "x.png", seed)
        finished(run, folder, slides / folder / "x.png")
        with open_slide(slides / folder / "x.png", mpp=1.0) as opened:
            source_path, quick_hash = str(slides / folder / "x.png"), opened.quick_hash
        fields = {"source": "x.png", "source_path": source_path, "quick_hash": quick_hash}
        run.slide(folder).slide_json.write_text(json.dumps(fields))
    run.run_json.write_text("{}")
    slides.rename(tmp_path / "moved")
    with pytest.raises(
        RunError, match=r"a: \S+/slides/a/x\.png does not exist: say with --slides DIR where the slide is"
    ):
        write_project(run)
    with pytest.raises(ConfigError, match="need the one that holds the slides"):
        write_project(run, slides)
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "c")
    written = write_project(run, tmp_path / "moved" / "c")
    assert written[1:] == (
        1,
        1,
        (f"left out: b: {slides}/b/x.png does not exist: say with --slides DIR where the slide is now",),
    )
    assert write_project(run, tmp_path / "moved")[1:] == (2, 1, ())
    uris = [entry["serverBuilder"]["uri"] for entry in content(run)["images"]]
    assert uris == [f"file://{tmp_path}/moved/{place}/x.png" for place in ("c", "b")]
    assert write_project(run, tmp_path / "moved")[1:] == (2, 0, ())
    # back where they were they are the same images, whose files QuPath has to be told of
    (tmp_path / "moved").rename(slides)
    *counts, warnings = write_project(run)[1:]
    assert counts == [2, 0]
    assert warnings[0] == (
        f"a: {tmp_path}/moved/c/x.png, its image in the project, does not exist: tell QuPath where it is now"
    )


@pytest.mark.parametrize(
    ("source_path", "said"),
    [
        ("s3://bucket/2024/x y.png", "it was read from a URL, which QuPath does not open"),
        ("C:\\2024\\x y.png", "C:\\2024\\x y.png does not exist"),
    ],
)
def test_copies_of_slides_are_images_whose_place_is_unknown_here(tmp_path: Path, source_path: str, said: str) -> None:
    """At a URL, which QuPath does not open, or on Windows: a copy in the folder that --slides names is the image, if it
    has the content of the results.
    """
    run, copies = RunFolder(tmp_path / "results"), tmp_path / "copies"
    for folder, seed in (("a", 1), ("b", 2)):
        paint(slide(copies / folder / "x y.png"), seed)
    finished(run, "x y", source_path)
    with open_slide(copies / "b" / "x y.png", mpp=1.0) as opened:
        fields = {"source": "x y.png", "source_path": source_path, "quick_hash": opened.quick_hash}
    run.slide("x y").slide_json.write_text(json.dumps(fields))
    run.run_json.write_text("{}")
    with pytest.raises(RunError, match=re.escape(f"x y: {said}: say with --slides DIR")):
        write_project(run)
    assert write_project(run, copies)[1:] == (1, 1, ())
    (entry,) = content(run)["images"]
    assert entry["serverBuilder"]["uri"] == f"file://{copies}/b/x%20y.png"
    assert write_project(run, copies)[1:] == (1, 0, ())


def test_classes_of_no_name_are_no_error(run: RunFolder) -> None:
    run.qupath_classes.parent.mkdir(parents=True)
    run.qupath_classes.write_text('{"pathClasses": [{"name": {}}, {"name": []}, 3]}')
    write_project(run)
    kept = json.loads(run.qupath_classes.read_text())["pathClasses"]
    assert kept[:3] == [{"name": {}}, {"name": []}, 3]
    assert "Nucleus" in [one["name"] for one in kept[3:]]


def test_an_image_that_has_moved_since_is_said(run: RunFolder, data: Path) -> None:
    write_project(run)
    (data / "b").rename(data / "c")
    said = f"b/x: {data}/b/x.svs, its image in the project, does not exist: tell QuPath where it is now"
    assert write_project(run)[1:] == (3, 0, (said,))


def test_a_slide_json_without_a_checksum_of_its_slide_is_left_out(run: RunFolder) -> None:
    file = run.slide("a/x").slide_json
    fields = json.loads(file.read_text())
    del fields["quick_hash"]
    file.write_text(json.dumps(fields))
    assert write_project(run)[1:] == (2, 2, ("left out: a/x: slide.json is damaged",))


def test_slides_whose_results_are_gone_are_said(run: RunFolder) -> None:
    """An image without nuclei is one that can get none; of a folder that is gone only the ledger knows."""
    run.slide("a/x").nuclei.unlink()
    fields = json.loads(run.slide("a/x").slide_json.read_text())
    known = {
        "files": {"nuclei.parquet": {"bytes": 1, "sha256": ""}},
        "digest": "",
        "record": {"slide": "", "status": "done"},
    }
    run.slide("a/x").slide_json.write_text(json.dumps({**fields, **known}))
    write_ledger(run, [SlideRecord("gone", "done")])
    image, folder = write_project(run).warnings
    assert image == "a/x: nuclei.parquet is missing: put the file back, or run the slide again with --overwrite"
    assert folder.startswith("gone: slide.json is missing, though ledger.csv says that the slide is done: the same run")


def test_a_folder_of_moved_slides_adds_none_twice(run: RunFolder, data: Path, tmp_path: Path) -> None:
    """Copies of slides that are still where they were are not taken, in whatever order the commands are given."""
    shutil.copytree(data, tmp_path / "copies")
    assert write_project(run, tmp_path / "copies")[1:] == (3, 3, ())
    assert write_project(run)[1:] == (3, 0, ())
