"""The command line says what the dataclasses say, and the README says what the command line says."""

import dataclasses
import errno
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pipeline import cli
from pipeline.archive.estimate import SlideEstimate
from pipeline.archive.inputs.sources import Source
from pipeline.archive.ledger import write_ledger
from pipeline.cli import app, main
from pipeline.config import Execution, Settings, check, read_toml
from pipeline.errors import ClusterLost, ExportFailed
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    "run",
    "plan",
    "demo",
    "train",
    "evaluate",
    "fit-stain",
    "convert",
    "export",
    "qupath",
    "report",
    "view",
    "certificates",
    "doctor",
)


def said(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(tokens)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


OWN_COMMANDS = ("run", "plan", "export", "qupath", "report", "verify", "view", "certificates", "demo", "doctor")


@pytest.mark.parametrize("command", OWN_COMMANDS)
def test_every_flag_has_a_sentence(command: str) -> None:
    """Law: a command says what it does, and each of its flags what it is for."""
    assert app[command].help.splitlines()[0].endswith(".")
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    silent = [a.name for a in arguments if a.show and not (a.parameter.help or "").endswith((".", ")"))]
    assert not silent
    if command != "doctor":
        assert list(arguments)


def test_the_settings_stand_in_groups_with_the_common_ones_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    _, out, _ = said(capsys, "run", "--help")
    groups = (
        "Arguments",
        "Common options",
        "Tissue",
        "Tiling",
        "Stain",
        "Detector",
        "Stitching",
        "Regions",
        "Export",
        "Execution",
    )
    at = [out.index(f"─ {group} ─") for group in groups]
    assert at == sorted(at)
    common = out[at[1] : at[2]]
    for flag in ("--out", "--mpp", "--views", "--stain", "--weights", "--detector.device", "--config"):
        assert re.search(rf"{flag}\b", common), flag


def test_the_commands_stand_in_groups_in_the_order_in_which_they_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = said(capsys, "--help")
    groups = ("Slides", "Results of a run", "Your own weights", "This machine", "Common options")
    at = [out.index(f"─ {group} ─") for group in groups]
    assert at == sorted(at)
    for command, group in {"run": 0, "plan": 0, "view": 1, "export": 1, "train": 2, "doctor": 3}.items():
        assert f"│ {command} " in out[at[group] : at[group + 1]], command


def test_the_help_says_which_commands_take_a_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the flag with every command."""
    _, out, _ = said(capsys, "verify", "--help")
    line = " ".join(re.sub("[│╮╭]", "", out).split()).partition("--config PATH ")[2]
    named = re.match(r"TOML file of settings, for ([a-z, ]+);", line)
    assert named is not None
    assert set(re.split(", | and ", named[1])) == cli._CONFIGURED


def test_no_flag_has_a_negative_that_reads_badly(capsys: pytest.CaptureFixture[str]) -> None:
    out = "".join(said(capsys, command, "--help")[1] for command in OWN_COMMANDS)
    assert set(re.findall(r"--\S*\b(?:no|empty)-[\w-]+", out)) == {
        "--export.no-crop",
        "--regions.no-crop",
        "--no-crop",
        "--no-cluster",
        "--no-wait",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_is_in_the_readme(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, command, "--help")
    assert status == 0
    assert f"Usage: nightslide {command}" in out
    assert f"nightslide {command}" in README


def test_every_setting_is_a_flag_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: defaults are written once; the help shows the dataclasses'."""
    monkeypatch.setattr(app, "console", Console(width=240))  # COLUMNS counts for the first help of a process only
    _, out, _ = said(capsys, "run", "--help")
    for table in dataclasses.fields(Settings):
        values = getattr(Settings(), table.name)
        prefix = "detector" if table.name == "detector" else table.name
        for field in dataclasses.fields(values):
            flag = f"--{prefix}.{field.name.replace('_', '-')}"
            assert flag in out, flag
            line = next(row for row in out.splitlines() if flag in row)
            default = getattr(values, field.name)
            if isinstance(default, int | float) and not isinstance(default, bool):
                assert f"[default: {default}]" in line, line
    for field in dataclasses.fields(Execution):
        assert f"--{field.name.replace('_', '-')}" in out


def commands_of_the_readme() -> list[list[str]]:
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", README, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:^|uv run )nightslide (.*)", line.split(" #")[0].strip()) for line in lines]
    return [shlex.split(match.group(1)) for match in found if match]


@pytest.mark.parametrize("tokens", commands_of_the_readme(), ids=" ".join)
def test_every_command_in_the_readme_is_understood(tokens: list[str]) -> None:
    """Law: the README's commands parse, flag by flag."""
    if "--config" in tokens:
        at = tokens.index("--config")
        assert (Path(__file__).parents[2] / tokens[at + 1]).is_file()
        tokens = tokens[:at] + tokens[at + 2 :]
    command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert command.__name__ == tokens[0].replace("-", "_")
    assert bound.arguments or len(tokens) == 1
    assert not ignored


def test_anchors_are_given_level_by_level() -> None:
    tokens = ["train", "--data", "d", "--out", "o", "--architecture.anchors", "12/24/48/96"]
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert bound.arguments["architecture"].anchors == ((12,), (24,), (48,), (96,))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["run", "--out", "o"], "INPUTS requires an argument"),
        (["export"], "FOLDER requires an argument"),
        (["run", "x.svs", "--out", "o", "--tile", "512"], "Unknown option: --tile. Did you mean --tiling.tile?"),
        (["run", "x.svs", "--out", "o", "--device", "cpu"], "Did you mean --detector.device?"),
        (["run", "x.svs", "--out", "o", "--weigths", "fast"], "Did you mean --weights?"),
        (["export", "o", "--format", "csv"], "Did you mean --formats?"),
        (["run", "x.svs", "--out", "o", "--bogus", "3"], "Unknown option: --bogus"),
        (
            ["export", "o", "--formats", "csv", "dsa"],
            "dsa: 1 argument too many; a flag takes one value and is given again",
        ),
        (["run", "nowhere.svs", "--out", "o"], "nowhere.svs does not exist"),
        (["run", "x.svs", "--out", ""], "out='': need a path"),
        (["run", "x.svs", "--out="], "out='': need a path"),
        (["run", "x.svs", "--out", "o", "--config", ""], "config='': need a path"),
        (["verify", ""], "folder='': need a path"),
        (["view", ".", "--slides", ""], "slides='': need a path"),
        (["run", "x.svs", "--out", "o", "--tiling.margin", "640"], "need 2 * margin < tile"),
        (["run", "x.svs", "--out", "o", "--views", "3"], "Choose from: 1, 2, 4, 8"),
        (["run", "x.svs", "--out", "o", "--views", "2.5"], "views=2.5: need a whole number"),
        (["run", "x.svs", "--out", "o", "--tiling.tile", "512.0"], "tiling.tile=512.0: need a whole number"),
        (["run", "x.svs", "--out", "o", "--mpp", "0"], "mpp=0.0: need 0.05 to 5 micrometres per pixel"),
        (["run", "x.svs", "--out", "o", "--mpp=-1"], "mpp=-1.0: need 0.05 to 5"),
        (["run", "x.svs", "--out", "o", "--mpp", "nan"], "mpp=nan: need 0.05 to 5"),
        (["plan", "x.svs", "--mpp", "1e9"], "mpp=1000000000.0: need 0.05 to 5"),
        (["plan", ".", "--seconds-per-mm2", "0"], "seconds-per-mm2=0.0: need a number above 0"),
        (
            ["run", "x.svs", "--out", "o", "--stain", "none", "--stain.template", "y.png"],
            "has no effect without stain normalisation",
        ),
        (
            ["plan", "x.svs", "--stain", "none", "--stain.template", "y.png"],
            "has no effect without stain normalisation",
        ),
        (["demo", "--stain", "none", "--stain.template", "y.png"], "has no effect without stain normalisation"),
        (["run", "x.svs", "--out", "o", "--detector.device", "gpu"], "device='gpu': need cpu, cuda, cuda:N or auto"),
        (["run", "x.svs", "--out", "o", "--detector.device", "cuda:99"], "device='cuda:99': this machine shows"),
        (
            ["run", "x.svs", "--out", "o", "--detector.device", "banana"],
            "device='banana': need cpu, cuda, cuda:N or auto",
        ),
        (["run", "x.svs", "--out", "o", "--detector.device", "meta"], "device='meta': need cpu, cuda, cuda:N or auto"),
        (["run", "x.svs", "--out", "o", "--detector.device", "cuda:x"], "device='cuda:x': need cpu, cuda"),
        (["run", "x.svs", "--out", "o", "--detector.device", ""], "device='': need cpu, cuda, cuda:N or auto"),
        (
            ["run", "x.svs", "--out", "o", "--scheduler", "tcp://head:8786", "--detector.device", "x"],
            "device='x': need cpu",
        ),
        (["plan", "x.svs", "--detector.device", "cuda:99"], "device='cuda:99': this machine shows"),
        (["demo", "--detector.device", "cuda:99"], "device='cuda:99': this machine shows"),
        (["run", "x.svs", "--out", "o", "--workers=-1"], "workers=-1: need 0 (automatic) to 1024"),
        (["run", "x.svs", "--out", "o", "--workers", "1000000"], "workers=1000000: need 0 (automatic) to 1024"),
        (["run", "x.svs", "--out", "o", "--workers", "many"], "workers=many: need a whole number"),
        (["run", "x.svs", "--out", "o", "--workers", "1.5"], "workers=1.5: need a whole number"),
        (["run", "x.svs", "--out", "o", "--gpus=-2"], "gpus=-2: need -1 (all) or more"),
        (["run", "x.svs", "--out", "o", "--gpus", "99"], "gpus=99: this machine has"),
        (
            ["run", "x.svs", "--out", "o", "--gpus", "1", "--detector.device", "cpu"],
            "gpus=1: this machine has 0 to use",
        ),
        (
            ["run", "x.svs", "--out", "o", "--gpus=2", "--no-cluster"],
            "gpus=2 with --no-cluster: one process detects on",
        ),
        (["run", "x.svs", "--out", "o", "--window=-1"], "window=-1: need 0 (automatic) or more"),
        (["run", "x.svs", "--out", "o", "--scheduler", "head"], "scheduler='head': need an address such as tcp://"),
        (["run", "x.svs", "--out", "o", "--scheduler", "tcp://head"], "need an address such as tcp://host:8786"),
        (["run", "x.svs", "--out", "o", "--scheduler", "head:8786"], "need an address such as tcp://host:8786"),
        (
            ["run", "x.svs", "--out", "o", "--scheduler", "tls://head:8786"],
            "need --tls-ca-file, --tls-cert and --tls-key",
        ),
        (
            ["run", "x.svs", "--out", "o", "--tls-key", "k"],
            "TLS without --tls-ca-file, --tls-cert: need all three files",
        ),
        (
            ["run", "x.svs", "--out", "o", "--tls-key", "k", "--tls-cert", "c", "--tls-ca-file", "a"],
            "TLS files without a scheduler: need --scheduler",
        ),
        (["run", "x.svs", "--out", "o", "--scheduler-file", "none.json"], "none.json does not exist"),
        (["verify", "nowhere"], "holds no finished slide"),
        (["certificates", "--out", "o", "--days", "0"], "days=0: need 1 to 3650"),
        (["run", "x.svs", "--out", "o", "--memory-limit", "1MB"], "memory-limit='1MB': need auto, or 1GB or more"),
        (["run", "x.svs", "--out", "o", "--memory-limit", "1.2.3GB"], "need auto, or 1GB or more"),
        (["run", "x.svs", "--out", "o", "--config", "none.toml"], "none.toml"),
        (["train", "--data", "d", "--out", "o", "--config", "c.toml"], "train takes no settings: leave --config out"),
        (["verify", "o", "--config", "c.toml"], "verify takes no settings: leave --config out"),
        (["bogus"], 'Unknown command "bogus". `nightslide --help` lists the commands.'),
        (["veiw"], 'Unknown command "veiw". Did you mean "view"? `nightslide --help` lists the commands.'),
        (["export", "nowhere"], "holds no nuclei.parquet"),
        (["evaluate", "--data", "nowhere"], "nowhere does not exist"),
        (["train", "--data", "d", "--out", "o", "--architecture.anchors", "12 24"], "need sides such as 18,30/44,64"),
        (["train", "--data", "d", "--out", "o", "--architecture.backbone", "hf-hub:a/b"], "need a timm model's name"),
    ],
)
def test_wrong_usage_is_named_and_ends_with_2(
    tokens: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.svs").write_bytes(b"no slide, but there")
    status, _, err = said(capsys, *tokens)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.svs"], "refused before anything is started"


def test_a_run_ends_with_how_many_slides_are_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [SlideRecord("a", "done"), SlideRecord("b", "skipped")]
    monkeypatch.setattr("pipeline.archive.run.run", lambda *_, **__: rows)
    assert said(capsys, "run", "x", "--out", "o")[:2] == (0, "1 of 2 slides done, 0 nuclei; ledger: o/ledger.csv\n")
    rows.pop()
    assert said(capsys, "run", "x", "--out", "o")[:2] == (0, "1 of 1 slide done, 0 nuclei; ledger: o/ledger.csv\n")


def test_a_lost_cluster_is_no_wrong_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.archive.run.run", raiser(ClusterLost("the Dask scheduler is gone")))
    status, _, err = said(capsys, "run", "x.svs", "--out", "o")
    assert (status, err) == (1, "nightslide: the Dask scheduler is gone\n")


def raiser(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("two\nlines"), OSError(22, "Invalid argument")])
def test_an_unexpected_error_is_a_line_and_a_traceback_only_on_request(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NIGHTSLIDE_DEBUG", raising=False)
    monkeypatch.setattr("pipeline.archive.run.run", raiser(error))
    status, _, err = said(capsys, "run", "x.svs", "--out", "o")
    assert status == 1
    assert err.startswith(f"nightslide: unexpected {type(error).__name__}: ")
    assert len(err.splitlines()) == 2
    assert "please report it" in err
    monkeypatch.setenv("NIGHTSLIDE_DEBUG", "1")
    status, _, err = said(capsys, "run", "x.svs", "--out", "o")
    assert status == 1
    assert err.startswith("Traceback")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device: free some space there, and give the same command again"),
        (errno.EDQUOT, "Disk quota exceeded: free some space there, and give the same command again"),
        (errno.EACCES, "Permission denied: make it a file or folder that may be read and written"),
        (errno.EROFS, "Read-only file system: make it a file or folder that may be read and written"),
        (errno.ESTALE, "Stale file handle: look whether the disk or file server is in order, and give the same"),
        (errno.EIO, "Input/output error: look whether the disk or file server is in order, and give the same"),
        (errno.ENOTDIR, "Not a directory: move away the file that is in the place of a folder, and give the same"),
        (errno.ENAMETOOLONG, "File name too long: give it a shorter name, and give the same command again"),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_ours(
    number: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file is being written, the message names it, and not the partial one; a library names none."""
    write_ledger(RunFolder(tmp_path), [])
    monkeypatch.setattr("pipeline.files._sync", raiser(OSError(number, "Error writing bytes to file")))
    status, _, err = said(capsys, "report", str(tmp_path))
    assert status == 1
    assert err.startswith(f"nightslide: {tmp_path / 'report.html'}: {words}")
    assert len(err.splitlines()) == 1


def test_debug_is_a_flag_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSLIDE_DEBUG", "0")
    monkeypatch.setattr("pipeline.archive.run.run", raiser(KeyError("x")))
    assert "Traceback" in said(capsys, "run", "x.svs", "--out", "o", "--debug")[2]


# ------------------------------------------------------------------------------------------------ plan


def planned(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *tokens: str,
    names: Sequence[str] = ("case1",),
) -> list[str]:
    """The lines of `plan` for slides of 10 mm2 of tissue each."""

    def estimate(source: Source, settings: Settings, seconds: float) -> SlideEstimate:
        hours = 10 * seconds * settings.detector.views / 3600
        return SlideEstimate(source.name, "", 0.25, "slide", 10.0, 40, hours, 0.042)

    for name in names:
        (folder / f"{name}.svs").touch()
    monkeypatch.setattr("pipeline.archive.estimate.estimate_slide", estimate)
    monkeypatch.setattr("pipeline.archive.estimate.ask_each", lambda ask, each, _: itertools.starmap(ask, each))
    status, out, _ = said(capsys, "plan", str(folder), *tokens)
    assert status == 0
    return out.splitlines()


def test_the_time_says_which_device_they_are_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, row, total, basis = planned(capsys, monkeypatch, tmp_path, "--detector.device", "cpu", "--views", "4")
    assert row.split()[4:6] == ["9", "min"]
    assert "10.00 mm2 of tissue, time 9 min, disk 0.042 GB" in total  # as exact as the table
    assert basis.startswith("time on the CPU, at 13 s per mm2 of tissue and view as measured on two cores; ")


def test_no_time_of_a_cpu_is_given_where_a_gpu_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU has not been timed: its time is not known, unless the user says how fast it is."""
    monkeypatch.setattr("pipeline.api.count_gpus", lambda: 1)
    _, row, total, basis = planned(capsys, monkeypatch, tmp_path)
    assert row.split()[4] == "?"
    assert "time ?, disk" in total
    assert basis.startswith("the time is not known: no speed has been measured for a GPU")
    assert "--seconds-per-mm2" in basis
    _, row, _, basis = planned(capsys, monkeypatch, tmp_path, "--seconds-per-mm2", "3.6")
    assert row.split()[4:6] == ["36.0", "s"]
    assert basis == "time at 3.6 s per mm2 of tissue and view, as given"


def test_one_long_name_does_not_widen_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ["short", "begin" + "x" * 150 + "end"]
    lines = planned(capsys, monkeypatch, tmp_path, names=names)[:3]
    assert all(len(line) <= cli._NAME_CHARS + 48 for line in lines)
    assert re.match(r"beginx+…x+end ", next(line for line in lines if line.startswith("begin")))
    assert len({len(line) for line in lines}) == 1


def test_a_configuration_file_is_used_and_flags_come_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.archive import run as run_module

    seen: list[Settings] = []

    def record(inputs: object, out: object, settings: Settings, running: object, **_: object) -> list[object]:
        seen.append(settings)
        return []

    monkeypatch.setattr(run_module, "run", record)
    config = tmp_path / "c.toml"
    config.write_text("[detector]\nscore = 0.25\nnms = 0.35\nviews = 4\n")
    with pytest.raises(SystemExit):
        main(["run", "x.svs", "--out", "o", "--config", str(config), "--detector.score", "0.75"])
    with pytest.raises(SystemExit):
        main(["run", "x.svs", "--out", "o"])
    assert (seen[0].detector.score, seen[0].detector.nms, seen[0].detector.views) == (0.75, 0.35, 4)
    assert seen[1] == Settings(), "a configuration must not outlive its command"


def test_a_configuration_file_may_hold_the_settings_of_execution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a table of their own, and after the mark with which some editors begin a file; other commands pass it over."""
    from pipeline.archive import run as run_module

    seen: list[Execution] = []

    def record(inputs: object, out: object, settings: Settings, running: Execution, **_: object) -> list[object]:
        seen.append(running)
        return []

    monkeypatch.setattr(run_module, "run", record)
    config = tmp_path / "c.toml"
    config.write_text("\ufeff[execution]\nworkers = 3\nmemory_limit = '4GB'\ncluster = false\n", encoding="utf-8")
    said(capsys, "run", "x.svs", "--out", "o", "--config", str(config), "--workers", "5")
    assert seen == [Execution(workers=5, memory_limit="4GB", cluster=False)]
    assert planned(capsys, monkeypatch, tmp_path, "--config", str(config), "--detector.device", "cpu")
    config.write_text("[execution]\nwoorkers = 3\n")
    status, _, err = said(capsys, "run", "x.svs", "--out", "o", "--config", str(config))
    assert (status, "execution: unknown key 'woorkers'" in err) == (2, True)


def test_a_plan_follows_links_where_the_configuration_of_a_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("slides", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "far.svs").touch()
    (tmp_path / "slides" / "link").symlink_to(tmp_path / "elsewhere")
    config = tmp_path / "c.toml"
    for follow, seen in (("true", True), ("false", False)):
        config.write_text(f"[execution]\nfollow_links = {follow}\nworkers = 3\n")
        lines = planned(capsys, monkeypatch, tmp_path / "slides", "--config", str(config), "--detector.device", "cpu")
        assert any(line.startswith("link/far ") for line in lines) == seen


def test_every_table_of_a_configuration_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with the name of a command, too; `export` and `measure` take the table that they have flags of."""
    from pipeline import api
    from pipeline.archive import measure, verify
    from pipeline.archive import run as run_module

    seen: list[object] = []

    def record(*given: object, **_: object) -> list[object]:
        seen.append(given)
        return []

    monkeypatch.setattr(run_module, "run", record)
    monkeypatch.setattr(api, "export_files", record)
    monkeypatch.setattr(measure, "measure_slides", record)
    monkeypatch.setattr(verify, "without_nuclei", lambda _: [])
    run = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "with_nuclei", lambda _: [])
    config = tmp_path / "c.toml"
    tables = {
        "tissue": "everywhere = true",
        "tiling": "block = 2",
        "stain": "method = 'none'",
        "detector": "views = 2",
        "stitching": "iou = 0.5",
        "regions": "folder = 'drawn'\ncrop = false",
        "export": "formats = ['csv', 'dsa']\ndicom_reference = 'dcm'",
        "execution": "workers = 3",
    }
    assert tables.keys() == {field.name for field in dataclasses.fields(Settings)} | {"execution"}
    config.write_text("".join(f"[{name}]\n{values}\n" for name, values in tables.items()))
    settings = check(read_toml(config), config)
    for tokens in (["run", "x.svs", "--out", "o"], ["export", str(run.path)], ["measure", str(run.path)]):
        assert said(capsys, *tokens, "--config", str(config))[0] == 0
    assert all(getattr(settings, name) != getattr(Settings(), name) for name in tables.keys() - {"execution"})
    assert seen == [
        (["x.svs"], Path("o"), settings, Execution(workers=3)),
        (run.path, settings.export),
        (run.path, settings.regions),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tiling.tile", "1056"), "tiling.tile=1056"),
        (("--tiling.mpp", "1"), "tiling.mpp=1"),
        (("--stain", "macenko", "--stain.template", "nope.png"), "nope.png"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.svs").touch()
    status, _, err = said(capsys, "plan", str(tmp_path), "--detector.device", "cpu", *flags)
    assert (status, words in err) == (2, True)


def test_a_plan_warns_of_what_a_run_warns_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = planned(capsys, monkeypatch, tmp_path, "--tiling.margin", "64", "--detector.device", "cpu")
    assert [line for line in small if line.startswith("WARNING: tiling.margin=64: with less than 128 px, nuclei near")]
    unused = planned(capsys, monkeypatch, tmp_path, "--export.density-um", "50", "--detector.device", "cpu")
    assert "WARNING: density-um=50.0 has no effect without the format density" in unused
    assert not [line for line in planned(capsys, monkeypatch, tmp_path) if line.startswith("WARNING")]


def test_an_export_is_printed_whatever_a_name_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names of folders may hold what turns the text around; so may those in the causes of what failed."""
    slide = tmp_path / "x\u202ey"

    def written(*_: object) -> Iterator[tuple[Path, str]]:
        yield slide / "nuclei.csv", "1 nucleus"
        raise ExportFailed(f"{slide} is damaged")

    monkeypatch.setattr("pipeline.api.export_files", written)
    status, out, err = said(capsys, "export", str(tmp_path))
    assert status == 1
    assert out == f"{tmp_path}/x\\u202ey/nuclei.csv: 1 nucleus\n"
    assert err == f"nightslide: {tmp_path}/x\\u202ey is damaged\n"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_run_whose_output_is_closed_does_its_work(tmp_path: Path, closed: str) -> None:
    """As a scheduler of nightly jobs may start it."""
    Image.new("RGB", (300, 300), "white").save(tmp_path / "blank.tif")
    words = ["run", "blank.tif", "--mpp", "0.25", "--out", "out", "--no-cluster"]
    command = shlex.join([sys.executable, "-c", "from pipeline.cli import main; main()", *words])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], env=environment, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_plan_is_printed_whatever_a_name_holds_and_whoever_reads_it(tmp_path: Path) -> None:
    """Names that the terminal's encoding lacks, or that would turn its text round; a reader that ends early."""
    for name in ("日本" * 40, "x\u202ey", *(f"{number:0200}" for number in range(400))):  # more than a pipe holds
        (tmp_path / f"{name}.svs").write_bytes(b"no slide")
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "plan", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr, b"unexpected" in done.stderr) == (1, False, False)
    assert rb"x\u202ey" in done.stdout
    piped = subprocess.run(["bash", "-c", f"{shlex.join(command)} | head -1"], env=environment, capture_output=True)
    assert (piped.stdout.split()[0], piped.stderr.strip()) == (b"slide", b"")
