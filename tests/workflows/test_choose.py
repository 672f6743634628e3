"""Which images choose.py takes for held out: none that weights were trained on, and none where that is not known."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import ConfigError
from pipeline.model.weights import read_notes
from training import checkpoint
from training.data.sample import LabelledImage, Sample
from training.evaluate import EvaluationImage, EvaluationSet

SCRIPTS = Path(__file__).parents[2] / "workflows" / "experiments"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def never_read() -> LabelledImage:
    raise AssertionError("an image was read")


IMAGES = EvaluationSet(tuple(EvaluationImage(i, Sample(i, "", 0.25, never_read), ()) for i in "abcd"), ())
RECIPE = json.dumps({"hold_out": 2, "seed": 0})


def weights(path: Path, **notes: str) -> str:
    save_file({"x": np.zeros(1)}, path, notes)
    return str(path)


def chosen(path: str) -> list[str]:
    from choose import held_out

    return [image.sample.id for image in held_out(IMAGES, path, "discs").images]


def test_the_images_that_the_weights_name_are_taken(tmp_path: Path) -> None:
    named = weights(tmp_path / "named", recipe=RECIPE, data='{"discs": 4}', held_out='{"discs": ["b"]}')
    assert chosen(named) == ["b"]


def test_of_an_older_file_they_are_drawn_again(tmp_path: Path) -> None:
    assert len(chosen(weights(tmp_path / "older", recipe=RECIPE, data='{"discs": 4}'))) == 2


@pytest.mark.parametrize(
    "notes",
    [
        {
            "data": '{"discs": 4, "spots": 9}',
            "held_out": '{"spots": ["x"]}',
        },  # of the last training, which had no discs
        {"data": '{"discs": 4}', "mean_of": '["1", "2"]'},  # one of them may have held out none
    ],
)
def test_a_mean_that_does_not_say_what_all_trainings_held_out_is_refused(notes: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not state which images of discs were held out of all its trainings"):
        chosen(weights(tmp_path / "mean", recipe=RECIPE, **notes))


def test_a_mean_states_what_all_its_trainings_held_out(tmp_path: Path) -> None:
    held_out = runpy.run_path(str(SCRIPTS / "average.py"))["_held_out"]
    stated = (
        {"discs": ["a", "b"], "spots": ["x"], "own": ["o"]},
        {"discs": ["b", "c"], "spots": []},
        {"older": ["never"]},  # is not among its data
    )
    files = [Path(weights(tmp_path / str(i), held_out=json.dumps(of))) for i, of in enumerate(stated)]
    files.append(Path(weights(tmp_path / "older")))
    data = [{"discs": 9, "spots": 9, "own": 9}, {"discs": 9, "spots": 9}, {}, {"older": 9}]
    assert held_out(files, data) == {"discs": ["b"], "spots": [], "own": ["o"]}
    assert "held_out" not in read_notes(files[-1])


def test_images_that_the_weights_know_under_another_name_are_refused(tmp_path: Path) -> None:
    from choose import check_unseen

    nuclei = np.ones((4, 4), np.int32), np.ones(1, np.int64)
    drawn = [LabelledImage(np.full((4, 4, 3), grey, np.uint8), *nuclei) for grey in (10, 20)]
    samples = [Sample(f"new{i}", "", 0.25, itertools.repeat(image).__next__) for i, image in enumerate(drawn)]
    images = EvaluationSet(tuple(EvaluationImage(sample.id, sample, ()) for sample in samples), ())
    known = {"trained_pixels": f"0123 {checkpoint.pixels_digest(drawn[1].image)}"}
    with pytest.raises(ConfigError, match="knows was trained on 1 image of these 2, such as new1: need"):
        check_unseen(images, weights(tmp_path / "knows", **known))
    check_unseen(images, weights(tmp_path / "other", trained_pixels="0123"))
    check_unseen(IMAGES, weights(tmp_path / "older"))  # nothing is read for weights that do not say
