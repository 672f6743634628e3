"""A checkpoint is continued by the recipe that it was made with, and by no other."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError, WeightsError
from training import checkpoint

RECIPE = {"steps": 8, "rate": 1e-3, "minutes": 1.0, "init": "imagenet", "architecture.anchors": ((1, 2), (3, 4))}


def trained(seed: int) -> tuple[nn.Module, dict[str, torch.Tensor], torch.optim.Optimizer]:
    """A network after a step, with an average and an optimiser."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return model, {k: v.detach().clone() for k, v in model.state_dict().items()}, optimiser


def test_everything_comes_back(tmp_path: Path) -> None:
    model, average, optimiser = trained(0)
    other, other_average, other_optimiser = trained(1)
    assert checkpoint.resume(tmp_path / "c", other, other_average, other_optimiser, RECIPE) == (0, 0.0)
    checkpoint.save(tmp_path / "c", model, average, optimiser, 7, RECIPE)
    assert checkpoint.resume(tmp_path / "c", other, other_average, other_optimiser, RECIPE) == (7, 0.0)
    for ours, theirs in ((model.state_dict(), other.state_dict()), (average, other_average)):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moments = (o.state_dict()["state"][0]["exp_avg"] for o in (optimiser, other_optimiser))
    assert torch.equal(*moments)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the files of a process are not known so")
def test_no_file_of_a_checkpoint_is_kept_open(tmp_path: Path) -> None:
    """Windows could not put the next checkpoint in its place."""
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    continued = trained(1)
    checkpoint.resume(tmp_path / "c", *continued, RECIPE)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(errors="replace")
    checkpoint.save(tmp_path / "c", *continued, 8, RECIPE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 2e-3}, "is of a training with rate=0.001, not 0.002: continue it with the recipe"),
        ({"steps": 9}, "is of a training with steps=8, not 9"),
        ({"architecture.anchors": ((1, 2), (3, 5))}, r"anchors=\[\[1, 2\], \[3, 4\]\], not \[\[1, 2\], \[3, 5\]\]"),
    ],
)
def test_another_recipe_is_refused_with_both_values(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    with pytest.raises(ConfigError, match=message):
        checkpoint.resume(tmp_path / "c", *trained(1), RECIPE | changed)


def test_what_does_not_decide_the_weights_may_differ(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    changed = RECIPE | {"minutes": 5.0, "device": "cuda", "loaders": 3, "save_every": 9, "licence": "CC0"}
    assert checkpoint.resume(tmp_path / "c", *trained(1), changed) == (7, 0.0)


def test_a_checkpoint_that_recorded_less_is_continued(tmp_path: Path) -> None:
    """Older versions recorded the settings only, neither data nor architecture."""
    checkpoint.save(tmp_path / "c", *trained(0), 7, {"steps": 8, "rate": 1e-3})
    assert checkpoint.resume(tmp_path / "c", *trained(1), RECIPE) == (7, 0.0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"step": 1}',
        '{"step": 1, "parts": 3}',
        '{"step": "x", "parts": []}',
        '{"step": -3, "parts": []}',
        '{"step": 1e400, "parts": []}',
    ],
)
def test_a_damaged_state_is_named(content: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    (tmp_path / "c" / "state.json").write_text(content)
    with pytest.raises(WeightsError, match="c cannot be continued"):
        checkpoint.resume(tmp_path / "c", *trained(1), RECIPE)


def test_the_state_names_no_folder_outside(tmp_path: Path) -> None:
    """A checkpoint may come from elsewhere: names of its parts are names of files in it."""
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    (tmp_path / "c" / "00.safetensors").rename(tmp_path / "00.safetensors")
    state = tmp_path / "c" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"parts": ["../00.safetensors"]}))
    with pytest.raises(WeightsError, match="cannot be continued"):
        checkpoint.resume(tmp_path / "c", *trained(1), RECIPE)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """Of several processes one saves: rounding in place would make their optimisers differ. Nor is anything rounded."""
    model, average, optimiser = trained(0)
    before = {name: value.clone() for name, value in optimiser.state_dict()["state"][0].items()}
    checkpoint.save(tmp_path / "c", model, average, optimiser, 7, RECIPE)
    other, other_average, other_optimiser = trained(1)
    checkpoint.resume(tmp_path / "c", other, other_average, other_optimiser, RECIPE)
    for loaded in (optimiser, other_optimiser):
        state = loaded.state_dict()["state"][0]
        assert all(torch.equal(value, state[name]) for name, value in before.items())


def test_what_a_kill_in_the_removal_of_the_old_one_left_is_no_obstacle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", *trained(0), 7, RECIPE)
    (tmp_path / "c.old").mkdir()
    (tmp_path / "c.old" / "00.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path / "c", *trained(0), 8, RECIPE)
    assert checkpoint.resume(tmp_path / "c", *trained(1), RECIPE)[0] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
