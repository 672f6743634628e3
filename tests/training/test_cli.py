"""The commands of training: every flag is explained, and what is skipped or missing is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
from cyclopts import Parameter
from PIL import Image

from pipeline.cli import app, main
from pipeline.errors import ConfigError
from training import cli as training_cli
from training import config
from training.data.datasets import read_dataset
from training.evaluate import check_scores, gather

GROUPS = {value.name for value in vars(config).values() if isinstance(value, type(config.DATA))}


def run(capsys: pytest.CaptureFixture[str], *tokens: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(token) for token in tokens])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def qupath_export(folder: Path, *objects: tuple[str, str]) -> Path:
    """An image of 64 px and its GeoJSON, with squares of these types and classes."""
    folder.mkdir()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(folder / "x.png")
    geometry = json.loads(shapely.to_geojson(shapely.box(8, 8, 24, 24)))
    features = [
        {"type": "Feature", "geometry": geometry, "properties": {"objectType": t, "classification": {"name": c}}}
        for t, c in objects
    ]
    (folder / "x.geojson").write_text(json.dumps(features))
    return folder


@pytest.mark.parametrize("command", ["train", "evaluate", "fit-stain", "convert"])
def test_every_flag_is_explained_and_in_a_group(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: all that the docstring says of a command, a sentence a flag; the settings of `run` are tested with `run`."""
    shown = run(capsys, command, "--help")[1]
    assert "─ Parameters ─" not in shown  # flags without a group, which come first
    about, _, _ = str(app[command].default_command.__doc__).partition("Parameters\n")
    assert " ".join(about.split()) in " ".join(shown.split())
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    own = [a for a in arguments if a.show and (not a.keys or command != "evaluate")]
    assert len(own) > 3
    for argument in own:
        parameter: Parameter = argument.parameter
        assert parameter.help, argument.name
        assert isinstance(parameter.group, tuple)
        assert {getattr(group, "name", group) for group in parameter.group} <= GROUPS, argument.name
        assert not any("empty" in name for name in argument.names), argument.names


# Prints the variable when torch is about to be loaded, whose OpenMP reads it.
WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
from pipeline.cli import main
main(["train", "--data", "nowhere", "--out", "nowhere"])
"""


@pytest.mark.parametrize(("chosen", "seen"), [({}, "2000"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_that_wait_leave_the_cores_to_others(chosen: dict[str, str], seen: str, tmp_path: Path) -> None:
    """OpenMP is told before torch is loaded; a user's own choice stands."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **chosen}
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == [seen], done.stderr


@pytest.mark.parametrize("command", ["train", "fit-stain"])
def test_an_output_that_is_a_file_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    (tmp_path / "out").touch()
    status, _, err = run(capsys, command, "--data", data, "--mpp", 0.25, "--out", tmp_path / "out")
    assert status == 2
    assert f"nightslide: {tmp_path / 'out'} cannot be made a folder: File exists; choose another" in err


@pytest.mark.parametrize(
    "flags", ["train --out x", "fit-stain --out x", "evaluate --save-labels x", "evaluate --json x/y"]
)
def test_a_dataset_that_is_not_there_leaves_no_folder(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *flags.split(), "--data", "misspelt")
    assert (status, os.listdir()) == (2, [])
    assert "misspelt does not exist: need a dataset's folder" in err


def test_train_without_nuclei_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = qupath_export(tmp_path / "none", ("cell", "Tumor"), ("detection", "Ignore*"))
    status, _, err = run(
        capsys, "train", "--data", data, "--mpp", 0.25, "--out", tmp_path / "out", "--init", "random",
        "--device", "cpu", "--loaders", 0, "--architecture.channels", 16,
    )  # fmt: skip
    assert status == 2
    assert "WARNING: none: 1 object skipped: a cell without an outline of its nucleus\n" in err
    assert "WARNING: none has 1 image: --hold-out 2 leaves none to train on, so 0 will be held out\n" in err
    assert "nightslide: none: 0 nuclei in its 1 training image: need at least one" in err


@pytest.mark.parametrize(("mpp", "area"), [(0.25, ""), (0.1, "2.6"), (1, "256.0")])
def test_a_scale_at_which_nuclei_have_a_strange_size_is_said(
    mpp: float, area: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A square of 16 px is 16 um2 at 0.25 um/px. An image without nuclei says nothing."""
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(data / "a.png")
    (data / "a.geojson").write_text("[]")
    dataset = read_dataset(data, mpp=mpp)
    line = (
        f"one: nuclei of 'x' have a median of {area} um2 at {mpp:g} um/px; 4 to 200 um2 is usual: is the scale right?"
    )
    assert dataset.describe_nuclei() == ([line] if area else [])
    assert gather([data], mpp=[mpp]).skipped == ((line,) if area else ())
    _, _, err = run(capsys, "convert", "--data", data, "--mpp", mpp, "--out", tmp_path / "maps")
    assert err == (f"WARNING: {line}\n" if area else "")


def test_a_scale_that_is_overridden_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--mpp` is for all datasets, also for those that state a scale."""
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    (data / "dataset.json").write_text('{"mpp": 0.5}')
    warning = "WARNING: one: --mpp is used in place of what 1 image states, such as 'x' (0.5)"
    for mpp, said in ((0.5, ""), (0.25, warning)):
        status, _, err = run(capsys, "convert", "--data", data, "--mpp", mpp, "--out", tmp_path / f"maps{mpp}")
        assert status == 0
        assert err.startswith(said) if said else err == ""
    help_ = " ".join(run(capsys, "convert", "--help")[1].replace("│", "").split())
    assert "whatever dataset.json and the files state" in help_


def test_convert_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = qupath_export(tmp_path / "none", ("cell", "Tumor"))
    status, out, err = run(capsys, "convert", "--data", data, "--mpp", 0.25, "--out", tmp_path / "maps")
    assert status == 0
    assert ": 1 image, 0 nuclei" in out
    assert "WARNING: none: 1 object skipped: a cell without an outline of its nucleus\n" in err
    assert f"WARNING: {data} holds no nucleus: need at least one to train" in err
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    status, out, err = run(capsys, "convert", "--data", data, "--mpp", 0.25, "--out", tmp_path / "coco.json")
    assert (status, err) == (0, "")
    assert ": 1 image, 1 nucleus;" in out


def test_nuclei_below_others_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two outlines in one place: the later one has all pixels."""
    data = qupath_export(tmp_path / "two", ("detection", "Tumor"), ("detection", "Tumor"))
    said = "1 object skipped: without a pixel of its own: below later ones, too small, or outside the image\n"
    common = "--data", data, "--mpp", 0.25
    for out in ("maps", "coco.json"):
        _, _, err = run(capsys, "convert", *common, "--out", tmp_path / out)
        assert err.startswith(f"WARNING: two: {said}")
    _, out, err = run(
        capsys, "train", *common, "--out", tmp_path / "out", "--init", "random", "--device", "cpu", "--loaders", 0,
        "--architecture.channels", 16, "--steps", 1, "--batch", 1, "--crop-px", 64, "--hold-out", 0,
    )  # fmt: skip
    assert f"WARNING: two: {said}" in out
    _, _, err = run(
        capsys, "evaluate", *common, "--stain", "none", "--weights", tmp_path / "out" / "nuclei.safetensors"
    )
    assert f"WARNING: annotations: {said}" in err


@pytest.mark.parametrize("flags", [[], ["--workers", "2"], ["--window", "5"]])
def test_evaluation_starts_no_processes_unless_it_is_told_to(flags: list[str]) -> None:
    for cluster in ([], ["--cluster"]):
        _, bound, _, _ = app.parse_known_args(["evaluate", "--data", "d", *flags, *cluster])
        execution = bound.arguments.get("execution", training_cli.EvaluationExecution())
        assert execution.cluster == bool(cluster)


def test_evaluation_takes_the_execution_of_a_configuration_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import evaluate

    seen: list[object] = []

    def record(_images: object, _whole: object, execution: object, **_: object) -> None:
        seen.append(execution)
        raise ConfigError("enough")

    monkeypatch.setattr(evaluate, "gather", lambda *_: evaluate.EvaluationSet((), (), ()))
    monkeypatch.setattr(evaluate, "evaluate", record)
    config = tmp_path / "c.toml"
    config.write_text("[execution]\nworkers = 3\n")
    with pytest.raises(SystemExit):
        main(["evaluate", "--data", str(tmp_path), "--config", str(config)])
    assert seen == [training_cli.EvaluationExecution(workers=3)]


@pytest.mark.parametrize("flag", ["--save-labels", "--pictures"])
def test_what_evaluation_writes_takes_no_file_of_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """Nor a name beside it, by which the dataset would have two images."""
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    before = (data / "x.png").read_bytes()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "x.png").symlink_to(data / "x.png")
    for given in (data, data / "x.geojson"):  # or the annotations alone, with the image beside them
        for folder in (data, data / "new", tmp_path / "link"):
            status, _, err = run(capsys, "evaluate", "--data", given, "--mpp", 0.25, flag, folder)
            assert status == 2
            assert f"{folder} is in the folder of a dataset, or holds its images: choose another folder" in err
    assert (data / "x.png").read_bytes() == before
    assert sorted(os.listdir(data)) == ["x.geojson", "x.png"]


def test_scores_do_not_take_the_place_of_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Former scores may be replaced, and an empty file, as `mktemp` makes it."""
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    annotations, scores = data / "x.geojson", tmp_path / "scores.json"
    before = annotations.read_bytes()
    status, _, err = run(capsys, "evaluate", "--data", data, "--mpp", 0.25, "--json", annotations)
    assert (status, annotations.read_bytes()) == (2, before)
    assert f"{annotations} is there already, and holds no scores of `evaluate`: choose another name" in err
    for former in ("", '{"overall": {}}'):
        scores.write_text(former)
        check_scores(scores)


def test_label_maps_and_pictures_have_folders_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, both = qupath_export(tmp_path / "one", ("detection", "Tumor")), tmp_path / "both"
    status, _, err = run(
        capsys, "evaluate", "--data", data, "--mpp", 0.25, "--save-labels", both, "--pictures", both / "../both"
    )
    assert status == 2
    assert f"label maps and pictures in {both} would have the same names: need two folders" in err


def test_scores_do_not_take_the_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user who names a folder for the file of `--json` keeps what is in it, and hears so before anything is read."""
    data = qupath_export(tmp_path / "one", ("detection", "Tumor"))
    status, _, err = run(capsys, "evaluate", "--data", tmp_path / "not read", "--json", data)
    assert status == 2
    assert f"{data} is a folder: need a name for the file" in err
    assert sorted(os.listdir(data)) == ["x.geojson", "x.png"]
