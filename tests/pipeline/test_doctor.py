"""What `nightslide doctor` says of a machine that is well, and of one that is not."""

import re
from importlib import metadata

import pytest

from pipeline import doctor
from pipeline.archive.manifest import VERSIONED
from pipeline.model import load
from pipeline.model.weights import shipped


def checked() -> tuple[int, list[str]]:
    lines: list[str] = []
    return doctor.check_up(lines.append), lines


def test_versions_weights_and_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    status, lines = checked()
    assert status == 0
    assert lines[-1] == "no problems found"
    for name in VERSIONED:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    for name in shipped():
        assert any(re.match(rf"weights {name}: [0-9a-f]{{16}} CC BY", line) for line in lines), "with their licences"
    assert any(line.startswith("smoke test: the detector runs on ") for line in lines)


def test_a_package_of_the_same_name_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"slides": ["nightslide", "python-slides"]})
    status, lines = checked()
    assert status == 1
    assert any("PROBLEM: python-slides also provides a package 'slides'" in line for line in lines)


def test_a_detector_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(metadata, "packages_distributions", dict)
    monkeypatch.setattr(load, "detector", broken)
    status, lines = checked()
    assert status == 1
    assert "PROBLEM: the detector does not run: no kernel image is available" in lines
    assert lines[-1] == "problems found: 1"
