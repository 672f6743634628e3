"""Every script says what it does, every launcher is valid shell, every configuration is valid."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline.config import Settings, check, read_toml

WORKFLOWS = Path(__file__).parents[2] / "workflows"


def files(pattern: str) -> list[Path]:
    return sorted(WORKFLOWS.rglob(pattern))


def name(path: Path) -> str:
    return path.name


def keep_this_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts do to their own process, which here is that of all tests."""
    for function in ("keep_freed_memory", "keep_few_prepared_layers"):
        monkeypatch.setattr(f"pipeline.model.allocator.{function}", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


def test_the_scripts_are_found() -> None:
    """Else the tests below would run on nothing."""
    assert len(files("*.py")) >= 7
    assert len(files("*.sh")) >= 7
    assert len(files("*.toml")) >= 1


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")  # scripts read sys.argv
@pytest.mark.parametrize("script", files("*.py"), ids=name)
def test_help_of_a_python_script_begins_with_what_it_does(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    said = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert said
    assert " ".join(said.split("\n\n")[0].split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("script", "flags"), [("choose", ["--unseen"]), ("views", ["--choice", "0"])])
def test_an_experiment_says_in_a_line_what_it_cannot_read(
    script: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever error of ours it is: here one of a slide, which is no wrong setting."""
    for folder, pixels in (("images", np.full((64, 64, 3), 200, np.uint8)), ("labels", np.eye(64, dtype=np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    stain = ["--stain", "macenko", "--stain.template", str(tmp_path / "none.svs")]
    file = WORKFLOWS / "experiments" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--data", str(tmp_path), "--mpp", "0.25", *flags, *stain])
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 2
    assert f"{script}: {tmp_path / 'none.svs'}: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("feed", ["none.svs", "work"]),
        ("gpu", ["patches", "--out", ".", "--slide", "none.svs", "--device", "cpu"]),
        ("memory", ["none.svs"]),
        ("replicate", ["none.svs", "giant.tif"]),
        ("tilings", ["none.svs", "--out", "out", "1280/128", "512/128"]),
        ("trainer", ["--data", "none.svs"]),
        ("viewer", ["none.svs", "work"]),
    ],
)
def test_a_benchmark_says_in_a_line_that_its_input_is_not_there(
    script: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = WORKFLOWS / "benchmarks" / f"{script}.py"
    keep_this_process_as_it_is(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file), *flags])
    monkeypatch.syspath_prepend(str(file.parent))
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"{script}: none\.svs.* (there is no such file|does not exist)", line)


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")  # scripts read sys.argv
@pytest.mark.parametrize(
    ("script", "there", "flags"), [("constancy", "kumar", []), ("rules", "nuinsseg", ["--weights", "w.safetensors"])]
)
def test_a_set_that_is_missing_is_named_before_anything_is_computed(
    script: str,
    there: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not after hours, and in a line; the one that is there comes first."""

    def too_late(*_: object) -> None:
        raise AssertionError("an image was computed")

    keep_this_process_as_it_is(monkeypatch)
    monkeypatch.setattr("training.evaluate.predict", too_late)
    monkeypatch.setattr("pipeline.model.stain_fit.fit", too_late)
    for folder, pixels in (("images", np.full((64, 64, 3), 200, np.uint8)), ("labels", np.eye(64, dtype=np.uint8))):
        (tmp_path / there / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / there / folder / "a.png")
    save_file({"x": np.zeros(1)}, tmp_path / "w.safetensors", {})  # which know no images
    monkeypatch.chdir(tmp_path)
    file = WORKFLOWS / "experiments" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--data", str(tmp_path), *flags])
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 2
    assert f"{script}: {tmp_path / 'tnbc'} does not exist: need a dataset's folder" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["choose", "views"])
def test_a_flag_of_the_execution_starts_no_cluster(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what is not given stays as it is without the flag, and as --help says."""
    folder = WORKFLOWS / "experiments"
    monkeypatch.syspath_prepend(str(folder))
    app = runpy.run_path(str(folder / f"{script}.py"))["app"]
    _, bound, _ = app.parse_args(["--data", "d", "--workers", "2"], exit_on_error=False, print_error=False)
    execution = bound.arguments["execution"]
    assert (execution.workers, execution.cluster) == (2, False)


def test_a_row_of_image_means_is_in_no_table_of_pooled_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "--mean", "--pooled"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(WORKFLOWS / "experiments" / "tables.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "--mean is a row of image means: leave --pooled out" in capsys.readouterr().err


@pytest.mark.parametrize("script", files("*.sh"), ids=name)
def test_help_of_a_shell_script_is_its_first_comment(script: Path) -> None:
    """And nothing else of it runs: no command of the project is on the path."""
    ended = subprocess.run(
        ["bash", script, "--help"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    lines = ended.stdout.splitlines()
    assert len(lines) >= 2
    assert any(script.name in line for line in lines)  # how it is called
    assert all(f"# {line}" in script.read_text(encoding="utf-8") for line in lines)


@pytest.mark.parametrize("path", files("*.toml"), ids=name)
def test_a_configuration_is_valid_and_changes_something(path: Path) -> None:
    assert check(read_toml(path), path) != Settings()
