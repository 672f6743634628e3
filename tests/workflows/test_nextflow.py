"""The Nextflow launcher. Nextflow itself comes from no registry of packages: its scripts are run without it, and its
files are parsed with Groovy, the language that they are written in, where that is installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.archive.inputs.search import SUFFIXES
from pipeline.layout import RESULTS, RunFolder

FOLDER = Path(__file__).parents[2] / "workflows" / "launchers" / "nextflow"
PARSE = """
import org.codehaus.groovy.control.*
args.each { def unit = new CompilationUnit(); unit.addSource(new File(it)); unit.compile(Phases.CONVERSION) }
"""


def script(process: str, **variables: str) -> str:
    """The shell script of a process, its variables replaced as Nextflow does."""
    body = re.search(rf'process {process} \{{.*?"""\n(.*?)"""', (FOLDER / "main.nf").read_text(), re.DOTALL)
    assert body
    text = re.sub(r"(?<!\\)\$\{([\w.]+)\}", lambda name: variables[name[1].removeprefix("params.")], body[1])
    return text.replace("\\$", "$")


def shell(text: str, folder: Path, **environment: str) -> str:
    """What a script prints, with a command `nightslide` that prints its arguments and what it sees."""
    command = folder / "bin" / "nightslide"
    command.parent.mkdir()
    command.write_text(
        "#!/bin/sh\nprintf '%s\\n' \"$@\"\n[ ! -d slides ] || find slides -type l -exec readlink -f {} +\n"
    )
    command.chmod(0o755)
    environment["PATH"] = f"{command.parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_slide_is_given_in_the_folder_that_names_it(tmp_path: Path) -> None:
    """Nextflow puts a link into the task's folder; the slide's siblings are beside its target."""
    (tmp_path / "archive" / "deep").mkdir(parents=True)
    slide = tmp_path / "archive" / "deep" / "a b.mrxs"
    slide.touch()
    task = tmp_path / "task"
    task.mkdir()
    (task / "a b.mrxs").symlink_to(slide)
    said = shell(script("SLIDE", slide="a\\ b.mrxs", flags="--views 4"), task, FOLDER="deep")
    assert said.splitlines() == ["run", "slides", "--follow-links", "--out", "results", "--views", "4", str(slide)]
    assert (task / "slides" / "deep" / "a b.mrxs").is_symlink()


def test_a_slide_at_the_top_has_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.svs").touch()
    shell(script("SLIDE", slide="x.svs", flags=""), tmp_path, FOLDER="")
    assert (tmp_path / "slides" / "x.svs").is_symlink()


def test_an_archive_is_one_command(tmp_path: Path) -> None:
    said = shell(script("ARCHIVE", archive="/data/my slides", out="/data/out", flags=""), tmp_path)
    assert said.splitlines() == ["run", "/data/my slides", "--out", "/data/out"]


def test_slides_are_known_by_the_suffixes_that_a_run_searches_for() -> None:
    """Those of DICOM files left out: a slide there is many files."""
    named = re.search(r"params\.suffixes = '([\w,]+)'", (FOLDER / "main.nf").read_text())
    assert named
    assert {f".{suffix}" for suffix in named[1].split(",")} == SUFFIXES - {".dcm"}


def test_a_slide_is_known_by_a_suffix_in_capitals_too() -> None:
    """As in a run; Nextflow's own patterns of files tell capitals from small letters."""
    text = (FOLDER / "main.nf").read_text()
    pattern = re.search(r'def suffixed = "(.*)\(\$\{params\.suffixes\.replace\(\',\', \'\|\'\)\}\)"', text)
    assert pattern
    assert 'channel.fromPath("${top}/**", checkIfExists: true)' in text
    assert ".filter { found -> found.name ==~ suffixed }" in text
    suffixed = re.compile(pattern[1] + "(svs|tif)")
    assert [n for n in ("a.svs", "A.SVS", "a.b.Tif", "svs", "a.svs.txt", "a.jpg") if suffixed.fullmatch(n)] == [
        "a.svs",
        "A.SVS",
        "a.b.Tif",
    ]


def test_every_result_of_a_slide_is_published() -> None:
    """And nothing that a task writes of its one slide where the run of all slides has its own."""
    text = (FOLDER / "main.nf").read_text()
    assert "path 'results/**'" in text
    pattern = re.search(r"file ==~ /(.*)/ \? null : file - 'results/'\n", text)
    assert pattern
    left_out = re.compile(pattern[1].replace("\\/", "/"))
    own = ["run.json", *(f"a/b/{name}" for name in (*RESULTS, "slide.json", "failure.json", "density/density.geojson"))]
    assert not [name for name in own if left_out.fullmatch(f"results/{name}")]
    run = RunFolder(Path("results"))
    for name in (run.ledger, run.report, run.logs / "x.log"):
        assert left_out.fullmatch(name.as_posix())


def test_nothing_is_between_the_declarations() -> None:
    """Nextflow 26.04 and newer read a script's variables and other statements only inside of them."""
    lines = (FOLDER / "main.nf").read_text().splitlines()
    outside = [line for line in lines if line[:1] not in ("", " ", "}", "/", "#")]
    declared = re.compile(r"nextflow\.enable\.dsl = 2|params\.\w+ = .*|process \w+ \{|workflow \{")
    assert [line for line in outside if not declared.fullmatch(line)] == []
    assert len(outside) == 9


def test_failures_are_tried_again_and_stop_no_other_slide() -> None:
    config = (FOLDER / "nextflow.config").read_text()
    assert "maxRetries = 2" in config
    assert "errorStrategy = { task.attempt <= task.maxRetries ? 'retry' : 'ignore' }" in config
    assert "workflow.failOnIgnore = true" in config
    processes = set(re.findall(r"^process (\w+)", (FOLDER / "main.nf").read_text(), re.MULTILINE))
    assert set(re.findall(r"withName: (\w+)", config)) == processes == {"SLIDE", "ARCHIVE"}


GROOVY, JAVA = shutil.which("groovy"), shutil.which("java")


@pytest.mark.skipif(not (GROOVY and JAVA), reason="needs groovy and java, as Debian has them")
@pytest.mark.parametrize("name", ["main.nf", "nextflow.config"])
def test_its_files_are_groovy(name: str, tmp_path: Path) -> None:
    (tmp_path / "parse.groovy").write_text(PARSE)
    (tmp_path / "broken.nf").write_text((FOLDER / name).read_text().replace("}", "", 1))
    environment = {**os.environ, "JAVA_HOME": str(Path(str(JAVA)).resolve().parents[1])}
    for file, sound in ((FOLDER / name, True), (tmp_path / "broken.nf", False)):
        ended = subprocess.run(
            [str(GROOVY), tmp_path / "parse.groovy", file], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (ended.returncode == 0) == sound, ended.stderr
        assert sound or "broken.nf" in ended.stderr
