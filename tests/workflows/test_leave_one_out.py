"""Leaving one set out: what each fold is trained on and scored on, and that a finished fold is not done again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Architecture
from pipeline.errors import ConfigError
from pipeline.model.detector import NucleusDetector, save_weights
from training.config import Training
from training.data.sample import Dataset

SCRIPTS = Path(__file__).parents[2] / "workflows" / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import leave_one_out

    return leave_one_out


@pytest.fixture
def data(tmp_path: Path, script: ModuleType) -> Path:
    """Three images of a nucleus in each of the sets; the last of kumar is no training image."""
    for name in script.SETS:
        for kind in ("images", "labels"):
            (tmp_path / "data" / name / kind).mkdir(parents=True)
        labels = np.zeros((64, 64), np.uint16)
        labels[20:40, 20:40] = 1
        for id_ in "abc":
            Image.new("RGB", (64, 64), "pink").save(tmp_path / "data" / name / "images" / f"{id_}.png")
            Image.fromarray(labels).save(tmp_path / "data" / name / "labels" / f"{id_}.png")
    (tmp_path / "data" / "kumar" / "splits.json").write_text('{"train": ["a", "b"], "test": ["c"]}')
    return tmp_path / "data"


@pytest.fixture
def trained(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    """The number of images of each set that each fold was trained on, by the set left out; no real training."""
    tiny = Architecture(channels=8, semantic=0, box_hidden=8, mask_channels=8, mask_layers=1)
    weights = tmp_path / "tiny.safetensors"
    save_weights(NucleusDetector(tiny), weights, {})
    folds: dict[str, dict[str, int]] = {}

    def fit(sets: list[Dataset], out: Path, training: Training, architecture: Architecture) -> Path:
        assert out.name not in folds, "a finished fold was trained again"
        folds[out.name] = {one.name: len(one.images) for one in sets}
        return weights

    monkeypatch.setattr(script, "fit", fit)
    return folds


@pytest.fixture
def run(data: Path, tmp_path: Path, script: ModuleType, trained: Any) -> Callable[..., int]:
    def leave(**given: Any) -> int:
        status: int = script.leave_one_out(data=data, out=tmp_path / "out", **{"sets": ("tnbc", "kumar"), **given})
        return status

    return leave


def test_a_fold_is_trained_on_the_others_and_scored_on_what_is_left_out(
    run: Callable[..., int], trained: dict[str, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: no test image of kumar is trained on or scored; the same command does nothing again."""
    assert run() == 0
    assert trained == {
        "tnbc": {"nuinsseg": 3, "consep_train": 3, "dsb2018_tissue": 3, "kumar": 2},
        "kumar": {"nuinsseg": 3, "tnbc": 3, "consep_train": 3, "dsb2018_tissue": 3},
    }
    scored = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in trained}
    assert {name: list(content["per_image"]) for name, content in scored.items()} == {
        "tnbc": ["a", "b", "c"],
        "kumar": ["a", "b"],
    }
    assert scored["kumar"]["breakdown"]["overall"]["misses"]["none"] <= 2
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("|")][2:] == [
        "| tnbc",
        "| kumar",
        "| **mean of 2 sets**",
    ]
    assert run() == 0  # `fit` refuses to be asked twice
    assert capsys.readouterr().out == table


def test_a_finished_fold_of_another_recipe_is_refused(run: Callable[..., int]) -> None:
    run(sets=("tnbc",))
    for other in ({"training": Training(steps=7)}, {"images": 1}, {"objectness": 0.1}):
        with pytest.raises(ConfigError, match=r"tnbc\.json is of another recipe"):
            run(sets=("tnbc",), **other)


def test_a_finished_fold_of_an_older_version_is_the_same(
    run: Callable[..., int], trained: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    """Which did not state a setting that has its default."""
    run(sets=("tnbc",))
    file = tmp_path / "out" / "tnbc.json"
    content = json.loads(file.read_text())
    del content["fold"]["architecture"]["score"]
    file.write_text(json.dumps(content))
    assert run(sets=("tnbc",)) == 0


def test_a_part_of_the_images_is_drawn_by_the_seed(run: Callable[..., int], tmp_path: Path) -> None:
    run(sets=("tnbc",), images=2)
    assert len(json.loads((tmp_path / "out" / "tnbc.json").read_text())["per_image"]) == 2


def test_a_training_that_was_stopped_is_no_finished_fold(
    run: Callable[..., int], trained: dict[str, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Architecture(channels=8, semantic=0, box_hidden=8, mask_channels=8, mask_layers=1)
    save_weights(NucleusDetector(tiny), tmp_path / "tiny.safetensors", {"step": "3"})
    assert run(sets=("tnbc",), training=Training(steps=4)) == 1
    assert not (tmp_path / "out" / "tnbc.json").exists()
    trained.clear()
    save_weights(NucleusDetector(tiny), tmp_path / "tiny.safetensors", {"step": "4"})
    assert run(sets=("tnbc",), training=Training(steps=4)) == 0
    assert (tmp_path / "out" / "tnbc.json").exists()


def test_weights_that_know_what_is_left_out_are_refused(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init nuclei was trained on tnbc"):
        run(sets=("tnbc",), training=Training(init="nuclei"))


def test_an_unknown_set_is_refused_before_anything_is_trained(
    run: Callable[..., int], trained: dict[str, dict[str, int]]
) -> None:
    with pytest.raises(ConfigError, match="no set 'monuseg': need some of nuinsseg, tnbc"):
        run(sets=("tnbc", "monuseg"))
    assert not trained
