"""The command line says what the dataclasses say, and the README says what the command line says."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import app, main
from pipeline.config import Execution, Settings

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = ("run", "plan", "demo", "train", "evaluate", "fit-stain", "convert", "export", "doctor")


def said(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(tokens)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


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
    monkeypatch.setenv("COLUMNS", "240")
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


def test_shipped_configurations_are_valid() -> None:
    from pipeline.config import load

    configs = sorted((Path(__file__).parents[2] / "workflows" / "configs").glob("*.toml"))
    assert configs
    for config in configs:
        assert load(config) != Settings(), f"{config} sets nothing"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["run"], "requires an argument"),
        (["run", "x.svs", "--out", "o", "--bogus", "3"], "Unknown option: --bogus"),
        (["run", "nowhere.svs", "--out", "o"], "nowhere.svs does not exist"),
        (["run", "x.svs", "--out", "o", "--tiling.margin", "600"], "need 2 * margin < tile"),
        (["run", "x.svs", "--out", "o", "--views", "3"], "Choose from: 1, 2, 4, 8"),
        (["run", "x.svs", "--out", "o", "--config", "none.toml"], "none.toml"),
        (["bogus"], 'Unknown command "bogus"'),
        (["export", "nowhere"], "holds no finished slide"),
        (["evaluate", "--data", "nowhere"], "nowhere does not exist"),
        (["train", "--data", "d", "--out", "o", "--architecture.anchors", "12 24"], "need sides such as 18,30/44,64"),
        (["train", "--data", "d", "--out", "o", "--architecture.backbone", "hf-hub:a/b"], "need a timm model's name"),
    ],
)
def test_wrong_usage_is_named_and_ends_with_2(
    tokens: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = said(capsys, *tokens)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


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
