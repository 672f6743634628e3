"""The container's file, read as a builder would: no base image can be fetched where these tests run."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "workflows" / "container" / "Containerfile"
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "HEALTHCHECK", "CMD"}
BUILT_IN = {"PATH"}  # variables that every image has


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Without comments, lines that go on joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    """The instructions of each stage, from its FROM on; before them what precedes the first."""
    groups: list[list[Instruction]] = [[]]
    for instruction in instructions(FILE.read_text()):
        if instruction.name == "FROM":
            groups.append([])
        groups[-1].append(instruction)
    return groups


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def values(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.rest for instruction in stage if instruction.name == name]


def test_every_instruction_is_known_and_names_no_registry(stages: list[list[Instruction]]) -> None:
    for stage in stages:
        assert {instruction.name for instruction in stage} <= KNOWN
    assert not re.search(r"https?://|[a-z0-9-]+\.(io|com|org|dev)\b", FILE.read_text())


def test_every_variable_is_declared(stages: list[list[Instruction]]) -> None:
    for number, stage in enumerate(stages):
        known = set(BUILT_IN)
        for name, rest in stage:
            outside = {argument.partition("=")[0] for argument in values(stages[0], "ARG")}
            used = set(re.findall(r"\$\{?([A-Z]+)", rest))
            assert used <= (outside if name == "FROM" else known), rest
            if name in ("ARG", "ENV"):
                known.add(rest.partition("=")[0])
        assert number == 0 or values(stage, "FROM") == [stage[0].rest]
    assert [argument for argument in values(stages[0], "ARG") if "=" not in argument] == []


def test_what_is_copied_is_in_the_checkout_and_not_ignored(
    stages: list[list[Instruction]], project: dict[str, Any]
) -> None:
    copied = []
    for stage in stages[1:-1]:
        for copy in values(stage, "COPY"):
            *sources, _target = copy.split()
            copied += sources
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    assert all({file, *map(str, Path(file).parents)} & set(copied) for file in needed)


def test_the_last_stage_copies_from_one_before_it(stages: list[list[Instruction]]) -> None:
    names = [re.fullmatch(r"\S+ AS (\w+)", stage[0].rest) for stage in stages[1:-1]]
    for copy in values(stages[-1], "COPY"):
        source = re.match(r"--from=(\w+) (/\S+) (/\S+)$", copy)
        assert source
        assert source[1] in [name[1] for name in names if name]
        assert source[2] == source[3], "an environment of Python cannot be moved"


def test_it_runs_as_no_root_and_checks_itself(stages: list[list[Instruction]], project: dict[str, Any]) -> None:
    last = stages[-1]
    (user,) = values(last, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"useradd --uid {user.split(':')[0]} --non-unique " in " ".join(values(last, "RUN"))
    after = last[[instruction.name for instruction in last].index("USER") :]
    assert not values(after, "RUN")
    (check,) = values(last, "HEALTHCHECK")
    commands = [json.loads(check.partition("CMD ")[2]), *map(json.loads, values(last, "CMD"))]
    assert commands == [["nightslide", "doctor"], ["nightslide", "--help"]]
    assert "nightslide" in project["scripts"]
    (path,) = [value for value in values(last, "ENV") if value.startswith("PATH=")]
    assert path == "PATH=/opt/nightslide/bin:$PATH"


def test_its_extras_exist(stages: list[list[Instruction]], project: dict[str, Any]) -> None:
    arguments = dict(argument.partition("=")[::2] for stage in stages for argument in values(stage, "ARG"))
    assert set(arguments["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    assert arguments["TORCH"] == "cpu"
