"""A network is loaded once per content of its file and device; a file of other content than recorded is refused."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Architecture, Detector, Stain, StainArchitecture
from pipeline.errors import WeightsError
from pipeline.model import dcgmm, load
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.detector import NucleusDetector, save_weights
from pipeline.model.fitted_stain import METHODS, TEMPLATE, FittedStain, Normalisation, read_template
from pipeline.model.weights import content_sha256, find_weights

CPU = torch.device("cpu")
TINY = StainArchitecture(channels=(4, 8))


def save_stain_network(path: Path, seed: int) -> None:
    """Commit another network to the path, as a person replaces a file."""
    torch.manual_seed(seed)
    dcgmm.save(ClusterNet(TINY), path.with_suffix(".new"), {})
    os.replace(path.with_suffix(".new"), path)


def save_detector(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    architecture = Architecture(channels=16, semantic=0, box_hidden=8, mask_channels=8, mask_layers=1)
    save_weights(NucleusDetector(architecture), path.with_suffix(".new"), {})
    os.replace(path.with_suffix(".new"), path)


def load_stain_network(path: Path, recorded: str = "") -> Any:
    return load.stain_network(Stain(method="dcgmm", weights=str(path), weights_sha256=recorded), CPU)


def load_detector(path: Path, recorded: str = "") -> Any:
    return load.detector(Detector(weights=str(path), device="cpu", weights_sha256=recorded)).model


KINDS = pytest.mark.parametrize(
    ("save", "load_network"),
    [(save_detector, load_detector), (save_stain_network, load_stain_network)],
    ids=["detector", "stain"],
)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@KINDS
def test_a_replaced_file_is_another_network_and_not_the_one_that_was_recorded(
    save: Callable[[Path, int], None], load_network: Callable[..., Any], tmp_path: Path
) -> None:
    """A worker that lives long never computes with the old network under the digest of the new one, or the reverse."""
    path = tmp_path / "mine.safetensors"
    save(path, 0)
    first_sha256 = content_sha256(path)
    first = load_network(path, first_sha256)
    assert load_network(path) is first
    save(path, 1)
    second_sha256 = content_sha256(path)
    second = load_network(path)
    assert not same(second, first)
    assert load_network(path, second_sha256) is second
    with pytest.raises(WeightsError, match=f"{path}.*{second_sha256}.*recorded was {first_sha256}"):
        load_network(path, first_sha256)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.safetensors"
    save_stain_network(path, 2)
    read = dcgmm.load

    def read_slowly(asked: Path) -> ClusterNet:
        save_stain_network(path, 3)
        return read(asked)

    monkeypatch.setattr(dcgmm, "load", read_slowly)
    with pytest.raises(WeightsError, match="has other content than"):
        load_stain_network(path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights .*mine\.safetensors"):
        load_stain_network(tmp_path / "mine.safetensors")


def test_content_counts_and_not_the_path(tmp_path: Path) -> None:
    save_stain_network(tmp_path / "a.safetensors", 4)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert load_stain_network(tmp_path / "a.safetensors") is load_stain_network(tmp_path / "b.safetensors")


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block asks for its network again and again."""
    path, digest, hashed = tmp_path / "mine.safetensors", hashlib.file_digest, list[str]()

    def counted(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    save_stain_network(path, 5)
    for _ in range(3):
        load_stain_network(path, content_sha256(path))
    assert len(hashed) == 1
    save_stain_network(path, 6)
    load_stain_network(path)
    assert len(hashed) == 2


def test_two_networks_are_kept(tmp_path: Path) -> None:
    """Memory does not grow with the files that a process has seen; the least recently used goes first."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_stain_network(path, 7 + number)
    first, second = (load_stain_network(path) for path in paths[:2])
    assert load_stain_network(paths[0]) is first
    load_stain_network(paths[2])
    assert load_stain_network(paths[0]) is first
    again = load_stain_network(paths[1])
    assert again is not second
    assert same(again, second)


def test_threads_that_ask_at_once_get_one_network(tmp_path: Path) -> None:
    save_stain_network(tmp_path / "mine.safetensors", 10)
    with ThreadPoolExecutor(4) as pool:
        networks = list(pool.map(load_stain_network, [tmp_path / "mine.safetensors"] * 8))
    assert len({id(network) for network in networks}) == 1


def test_a_slide_has_one_normaliser_on_a_device() -> None:
    template = read_template(find_weights("stain"))
    dimmer = FittedStain("dcgmm", {**template.numbers, "white": (0.8, 0.8, 0.8)})
    settings, here = Stain(method="dcgmm"), torch.device("cpu")
    one = load.normaliser(Normalisation(dimmer, template), settings, here)
    assert load.normaliser(Normalisation(dimmer, template), settings, here) is one
    assert load.normaliser(Normalisation(template, template), settings, here) is not one


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_without_a_stain_is_not_normalised(method: Any) -> None:
    none = TEMPLATE["none"]
    images = torch.rand(1, 3, 8, 8)
    assert load.normaliser(Normalisation(none, none), Stain(method=method), CPU)(images) is images
