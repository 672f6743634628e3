"""`nightslide verify` says what differs from what was written, and nothing else."""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
from oracle import chosen, paint
from pipeline import files
from pipeline.api import export_files
from pipeline.archive.ledger import write_ledger
from pipeline.archive.run import run
from pipeline.archive.verify import verify_results
from pipeline.cli import main
from pipeline.config import Execution, Export, Settings
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment.record import SlideRecord

ONE = Execution(cluster=False, workers=1)
SETTINGS = dataclasses.replace(chosen(), export=Export(formats=("qupath", "csv")))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two finished slides, a and b."""
    slides = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, slide in enumerate(slides):
        paint(slide, seed)
    assert segment(tmp_path / "out") == ["done", "done"]
    return tmp_path / "out"


def segment(out: Path, execution: Execution = ONE, settings: Settings = SETTINGS) -> list[str]:
    """Status of both slides, whose files lie beside `out`."""
    slides = [out.parent / "a.png", out.parent / "b.png"]
    rows = run(slides, out, settings, execution, mpp=0.25, say=lambda line: None, detect=oracle.detect)
    return [row.status for row in rows]


def said(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, list[str]]:
    """Exit status and lines of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder)])
    return int(ended.value.code or 0), capsys.readouterr().out.splitlines()


def flip(file: Path) -> None:
    """One bit in the middle: the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "has other content than was written"),
    "zeroed": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "has other content than was written"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:40]), r"has 40 bytes, was written with [\d,]+"),
    "deleted": (Path.unlink, "is missing"),
}
BYTES_AS_TEXT = {"bytes": "1", "sha256": ""}
OVERWRITE = "put the file back, or run the slide again with --overwrite"
AGAIN = "delete it, and the same run command makes it again, or nightslide export --formats {} where that made it"
REMEDIES = {
    "nuclei.parquet": OVERWRITE,
    "overlay.jpg": OVERWRITE,
    "thumbnail.jpg": OVERWRITE,
    "tissue.geojson": OVERWRITE,
    "artefacts.geojson": OVERWRITE,
    "nuclei.geojson.zip": AGAIN.format("qupath"),
    "nuclei.csv": AGAIN.format("csv"),
}


def test_every_damage_of_every_result_is_said_and_its_remedy_helps(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: finished results are not trusted blindly."""
    assert said(capsys, out) == (0, ["2 of 2 slides as written"])
    assert said(capsys, out / "b") == (0, ["1 of 1 slide as written"])
    assert set(json.loads((out / "a" / "slide.json").read_text())["files"]) == set(REMEDIES)
    for name, remedy in REMEDIES.items():
        file = out / "a" / name
        whole = file.read_bytes()
        for damage, problem in DAMAGE.values():
            damage(file)
            status, lines = said(capsys, out)
            assert status == 1
            needed = remedy if file.exists() else remedy.removeprefix("delete it, and ")
            assert re.fullmatch(f"a: {re.escape(name)} {problem}: {re.escape(needed)}", lines[0]), lines
            assert lines[1:] == ["1 of 2 slides as written"]
            if remedy == OVERWRITE:
                file.write_bytes(whole)
            else:
                file.unlink(missing_ok=True)
                assert segment(out) == ["done before"] * 2
            assert said(capsys, out)[0] == 0
            assert file.read_bytes() == whole


def test_every_damage_in_a_folder_is_said_and_its_remedy_helps(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The results that are folders, too, have a size and a checksum."""
    store = out / "a" / "nuclei.spatialdata.zarr"
    file = store / "shapes" / "nuclei" / "shapes.parquet"
    again = AGAIN.format("spatialdata")
    formats = dataclasses.replace(SETTINGS, export=Export(formats=("spatialdata",)))
    assert segment(out, settings=formats) == ["done before"] * 2
    assert said(capsys, out)[0] == 0
    whole = files.sha256(store)
    for damage in (*(damage for damage, _ in DAMAGE.values()), lambda file: (file.parent / "added").touch()):
        damage(file)
        status, lines = said(capsys, out)
        assert status == 1
        problem = r"has (other content than was written|[\d,]+ bytes, was written with [\d,]+)"
        assert re.fullmatch(f"a: {re.escape(store.name)} {problem}: {again}", lines[0]), lines
        files.remove(store)
        assert said(capsys, out)[1][0] == f"a: {store.name} is missing: {again.removeprefix('delete it, and ')}"
        assert segment(out, settings=formats) == ["done before"] * 2
        assert said(capsys, out)[0] == 0
        assert files.sha256(store) == whole


def test_what_was_exported_after_the_run_is_exported_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run command does not make it: the remedy names the command that does."""
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(out / "a"), "--formats", "density"])
    files.remove(out / "a" / "density")
    assert segment(out) == ["done before"] * 2
    (status, (line, _)) = said(capsys, out)
    assert status == 1
    assert "nightslide export --formats density where that made it" in line
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(out / "a"), "--formats", "density"])
    assert said(capsys, out)[0] == 0


def test_a_damaged_slide_json_is_said_and_its_remedy_helps(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = SlideFolder(out / "a").slide_json
    content = json.loads(file.read_text())
    del content["sha256"]  # else that alone tells
    for damaged, message, execution in (
        ("", "is damaged: the same run command does the slide again", ONE),
        ("[]", "is damaged: the same run command does the slide again", ONE),
        (None, "is missing, though ledger.csv says that the slide is done: the same run command does it again", ONE),
        (json.dumps({**content, "files": 3}), f"is damaged: {OVERWRITE}", dataclasses.replace(ONE, overwrite=True)),
        (json.dumps({**content, "files": {"x": {}}}), f"is damaged: {OVERWRITE}", None),
        (json.dumps({**content, "files": {"overlay.jpg": BYTES_AS_TEXT}}), f"is damaged: {OVERWRITE}", None),
        ("{}", f"is damaged: {OVERWRITE}", dataclasses.replace(ONE, overwrite=True)),
    ):
        if damaged is None:
            file.unlink()
        else:
            file.write_text(damaged)
        status, lines = said(capsys, out)
        assert (status, lines[0]) == (1, f"a: slide.json {message}")
        if OVERWRITE in message:
            assert segment(out)[0] == "failed", "never overwritten unless --overwrite says so"
        if execution is not None:
            assert segment(out, execution)[0] == "done"
            assert said(capsys, out)[0] == 0


def test_every_bit_of_a_slide_json_counts(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: a flipped bit is said, unless the file still says the same; nothing is taken as done, or exported, on it."""
    file = SlideFolder(out / "a").slide_json
    whole = file.read_bytes()
    content = json.loads(whole)
    rng = random.Random(1)
    for bit in rng.sample(range(8 * len(whole)), 300):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        read = files.read_json(file)
        if read == content or (read is not None and "sha256" not in read):
            continue  # 1e-05 and 1E-05; the checksum's own name
        ((_, problems), _) = verify_results(out)
        assert [problem.split(":")[0] for problem in problems] == ["slide.json is damaged"], (bit, read)
        if read is not None:
            assert files.fits_checksum(read) is False
    changed = {**content, "record": {**content["record"], "mpp": 0.26}}
    file.write_text(json.dumps(changed))
    assert segment(out) == ["failed", "done before"]
    assert list(export_files(out / "a", SETTINGS.export))
    assert said(capsys, out)[0] == 1, "an export does not make damage valid"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(out)])
    assert f"WARNING: {file} is damaged, so it does not note the exports: put the file back" in capsys.readouterr().err
    file.write_bytes(whole)
    assert segment(out) == ["done before"] * 2
    assert said(capsys, out)[0] == 0


def test_a_slide_json_without_a_checksum_of_itself_is_taken_as_it_is(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the first versions wrote it. Its next export gives it one."""
    file = SlideFolder(out / "a").slide_json
    content = json.loads(file.read_text())
    checksum = content.pop("sha256")
    file.write_text(json.dumps(content))
    assert said(capsys, out)[0] == 0
    assert segment(out) == ["done before"] * 2
    list(export_files(out / "a", SETTINGS.export))
    assert json.loads(file.read_text())["sha256"] == checksum


def test_a_folder_without_results_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no finished slide: need the --out folder of a run"):
        list(verify_results(tmp_path))


@pytest.mark.parametrize("name", ["/elsewhere/x", "../x"])
def test_a_ledger_that_names_other_folders_is_not_followed_there(name: str, tmp_path: Path) -> None:
    """One that is damaged, or of somebody else."""
    folder = RunFolder(tmp_path / "results")
    folder.slide("a").path.mkdir(parents=True)
    folder.slide("a").slide_json.write_text("{}")
    write_ledger(folder, [SlideRecord("a", "done"), SlideRecord(name, "done")])
    assert [slide for slide, _ in verify_results(folder.path)] == ["a"]


def test_a_terminal_shows_how_far_it_is(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive takes hours. What is found goes where it does without a terminal."""
    RunFolder(out).slide("a").overlay.unlink()
    plain = said(capsys, out)
    assert plain[0] == 1
    assert plain[1][0].startswith("a: overlay.jpg is missing")
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes any stream for a terminal
    with pytest.raises(SystemExit):
        main(["verify", str(out)])
    shown, errors = capsys.readouterr()
    assert shown.splitlines() == plain[1]
    assert "comparing slides" in errors
