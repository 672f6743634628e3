"""The Kubernetes files, read as the cluster would: no cluster is at hand where these tests run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import app

WORKFLOWS = Path(__file__).parents[2] / "workflows"
FILES = sorted((WORKFLOWS / "launchers" / "kubernetes").glob("*.yaml"))


def pods(content: Any) -> Iterator[dict[str, Any]]:
    """Every description of a pod, however deep it is."""
    if isinstance(content, dict):
        if "containers" in content:
            yield content
        for value in content.values():
            yield from pods(value)
    elif isinstance(content, list):
        for value in content:
            yield from pods(value)


def described() -> list[dict[str, Any]]:
    return [pod for file in FILES for part in yaml.safe_load_all(file.read_text()) for pod in pods(part)]


def test_there_are_pods() -> None:
    """Else the tests below would run on nothing."""
    assert len(described()) == 5


@pytest.mark.parametrize("pod", described(), ids=lambda pod: pod["containers"][0]["name"])
def test_a_pod_has_what_it_mounts_and_may_write_the_archive(pod: dict[str, Any]) -> None:
    """A new volume belongs to root, and the image runs as another user."""
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    user = re.search(r"^USER \d+:(\d+)$", (WORKFLOWS / "container" / "Containerfile").read_text(), re.MULTILINE)
    assert user
    if "archive" in volumes:
        assert pod["securityContext"]["fsGroup"] == int(user[1])
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"  # else every file, at every start


def test_runs_are_commands_of_today() -> None:
    commands = [pod["containers"][0]["args"] for pod in described()]
    runs = [command[1:] for command in commands if command[0] == "nightslide"]
    assert len(runs) == 2
    for run in runs:
        _, bound, unused, _ = app.parse_known_args(run)
        assert not unused
        assert str(bound.arguments["out"]) == "results"
