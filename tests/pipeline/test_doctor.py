"""What `nightslide doctor` says of a machine that is well, and of one that is not."""

import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import doctor
from pipeline.archive.manifest import VERSIONED
from pipeline.config import Detector
from pipeline.model import load
from pipeline.model.weights import find_weights, shipped


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


def test_a_gpu_without_kernels_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no problem: all is done, more slowly."""
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    monkeypatch.setattr(doctor, "kernels_problem", lambda device: f"no C compiler for {device}")
    status, lines = checked()
    assert status == 0
    first = lines.index("cuda:0 T4, 16 GiB")
    assert lines[first + 1].startswith("cuda:0 detects more slowly than it could")
    assert lines[first + 1].endswith(": no C compiler for cuda:0")


def test_a_package_of_the_same_name_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"slides": ["nightslide", "python-slides"]})
    status, lines = checked()
    assert status == 1
    assert any("PROBLEM: python-slides also provides a package 'slides'" in line for line in lines)


@pytest.mark.parametrize("name", ["fast", "stain"])
@pytest.mark.parametrize("damage", ["a flipped bit", "a truncated file"])
def test_damaged_weights_are_a_problem(name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whichever network; all else is checked and listed all the same."""
    content, copy = bytearray(find_weights(name).read_bytes()), tmp_path / f"{name}.safetensors"
    content[-1000] ^= 1
    copy.write_bytes(content if damage == "a flipped bit" else content[:-1000])
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    monkeypatch.setattr(doctor, "find_weights", lambda asked: copy if asked == name else find_weights(asked))
    status, lines = checked()
    assert status == 1
    (problem,) = (line for line in lines if line.startswith("PROBLEM: "))
    assert problem.startswith(f"PROBLEM: {copy} is ")
    assert problem.endswith("or install nightslide anew")
    assert {line.split()[1] for line in lines if line.startswith("weights ")} == {
        f"{n}:" for n in shipped() if n != name
    }
    assert any(line.startswith("smoke test: the detector runs on ") for line in lines)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_value_that_is_not_finite_is_a_problem(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    running = load.detector(Detector(device="cpu"))
    pixels = torch.tensor([[0.5, value], [0.0, 1.0]])
    model: Any = SimpleNamespace(features=lambda _: SimpleNamespace(table=SimpleNamespace(pixels=pixels)))
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    monkeypatch.setattr(load, "detector", lambda _: running._replace(model=model))
    status, lines = checked()
    assert status == 1
    assert any("PROBLEM: the detector computes values that are not finite" in line for line in lines)


def test_a_detector_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(metadata, "packages_distributions", dict)
    monkeypatch.setattr(load, "detector", broken)
    status, lines = checked()
    assert status == 1
    assert "PROBLEM: the detector does not run: no kernel image is available" in lines
    assert lines[-1] == "problems found: 1"
