"""Settings: one place, strict, and a digest that names what results depend on."""

import ast
import copy
import dataclasses
import inspect
import itertools
import math
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pipeline import config
from pipeline.config import (
    STRIDES,
    Architecture,
    Detector,
    Execution,
    Export,
    Regions,
    Sampling,
    Settings,
    Stain,
    StainArchitecture,
    Tiling,
    Tissue,
    build,
    check,
    checked,
    grid_step,
    read_toml,
    side_step,
)
from pipeline.errors import ConfigError


def test_settings_survive_a_round_trip_through_plain_values() -> None:
    for kind in (Settings, Execution, Architecture):
        assert build(kind, dataclasses.asdict(kind()), "test") == kind()


def test_settings_of_python_have_the_types_of_a_file_s() -> None:
    """Whole numbers, numpy's, lists and paths."""
    made = Settings(
        tissue=Tissue(margin_um=40),
        detector=Detector(score=np.float64(0.5)),
        regions=Regions(folder=cast(str, Path("drawn"))),
        export=Export(formats=cast(Any, ["csv", "qupath"])),
    )
    settings = checked("settings", made, Settings)
    assert (type(settings.tissue.margin_um), type(settings.detector.score)) == (float, float)
    assert (settings.regions.folder, settings.export.formats) == ("drawn", ("csv", "qupath"))
    assert settings.digest == Settings(detector=Detector(score=0.5)).digest


def test_toml_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[tiling]\ntile = 512\n[detector]\nscore = 0.25\n[export]\nformats = ['csv']\n")
    settings = check(read_toml(file), file)
    assert settings.tiling == Tiling(tile=512)
    assert settings.detector == Detector(score=0.25)
    assert settings.export.formats == ("csv",)
    assert settings.stitching == Settings().stitching


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[detector]\nscor = 0.3", "unknown key 'scor'; the keys here are weights, views, score"),
        ("[detektor]\nscore = 0.3", "unknown key 'detektor'; the keys here are tissue, tiling"),
        ("workers = 4", "the keys here are tissue, tiling, stain, detector, stitching, regions, export, execution"),
        ("[detector]\nscore = 'high'", "score='high': need float"),
        ("[tiling]\ntile = 512.5", "tile=512.5: need int"),
        ("[tiling]\ntile = true", "tile=True: need int"),
        ("[detector]\nviews = 3", "views=3: need one of 1, 2, 4, 8"),
        ("[tiling]\nmargin = 700", "bad.toml: tiling: margin=700 leaves no core in a tile of 1280 px: need 2 * margin"),
        ("[tiling]\ntile = 100", "tile=100: need a positive multiple of 32, and with the shipped weights one of 64"),
        ("[detector]\nviews = 4.0", "views=4.0: need one of 1, 2, 4, 8"),
        ("[detector]\nviews = true", "views=True: need one of 1, 2, 4, 8"),
        ("[tiling]\nmpp = 8", "mpp=8.0: need 0.05 to 5 um per pixel"),
        ("[stitching]\nsimplify_px = inf", "simplify-px=inf: need 0 to 100 px"),
        ("[stitching]\ntolerance_px = inf", "tolerance-px=inf: need 0 to 1000 px"),
        ("[stitching]\nmax_diameter_um = inf", "max-diameter-um=inf: need more than 0, to 10000 um"),
        ("tiling = 5", "5 is not a table"),
        ("[tiling", "is not a readable TOML file"),
        (f"a = {'[' * 3000}", "is not a readable TOML file"),
        (f"a = {'9' * 5000}", "is not a readable TOML file"),
        (f"[tiling]\nmpp = {'9' * 400}", "mpp=inf: need 0.05 to 5 um per pixel"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        check(read_toml(file), file)
    assert said in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read_toml(tmp_path / "none.toml")
    assert str(raised.value) == f"{tmp_path / 'none.toml'} does not exist: need a TOML file of settings"
    with pytest.raises(ConfigError) as raised:
        read_toml(tmp_path)
    assert str(raised.value) == f"{tmp_path} cannot be read (Is a directory): need a TOML file of settings"


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (Detector, {"proposals_per_mm2": math.inf}, "proposals-per-mm2=inf: need more than 0, to 1e7"),
        (Detector, {"instances_per_mm2": math.inf}, "instances-per-mm2=inf: need more than 0, to 1e7"),
        (StainArchitecture, {"floor": math.inf}, "floor=inf: need more than 0, to 10"),
        (StainArchitecture, {"mpp": 8.0}, "mpp=8.0: need 0.05 to 5 um per pixel"),
    ],
)
def test_numbers_that_no_slide_has_are_refused(kind: type, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        kind(**wrong)
    assert said in str(raised.value)


def test_the_digest_names_what_results_depend_on_and_nothing_else() -> None:
    settings = Settings()
    same = dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, device="cpu", batch=3))
    exported = dataclasses.replace(settings, export=Export(formats=("csv",), crop=False))
    other = dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, score=0.51))
    file = dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, weights_sha256="b"))
    assert settings.digest == same.digest == exported.digest
    assert len({settings.digest, other.digest, file.digest}) == 3


@pytest.mark.parametrize("table", ["tissue", "tiling", "stain", "detector", "stitching"])
def test_every_setting_but_where_and_in_what_portions_is_another_run(table: str) -> None:
    """Law: the digest is another one for every value of every setting that may change a result."""
    settings, unnamed = Settings(), {"detector": {"device", "batch", "weights"}, "stain": {"weights", "template"}}
    for field in dataclasses.fields(getattr(settings, table)):
        changed = copy.copy(getattr(settings, table))
        object.__setattr__(changed, field.name, "another")  # whatever its rule
        same = dataclasses.replace(settings, **{table: changed}).digest == settings.digest
        assert same == (field.name in unnamed.get(table, set())), field.name


@pytest.mark.parametrize(
    ("said", "expected"),
    [("8GB", 8e9), ("1.5 TB", 1.5e12), ("512 MiB", 2**29), ("500GiB", 500 * 2**30), ("8 G", 0), ("8gb", 0), ("", 0)],
)
def test_sizes_are_decimal_unless_they_say_binary(said: str, expected: float) -> None:
    assert config._bytes(said) == expected


def test_every_field_has_a_sane_type_and_settings_are_frozen() -> None:
    for field in dataclasses.fields(Settings):
        table = getattr(Settings(), field.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(table, dataclasses.fields(table)[0].name, None)


def test_work_of_another_format_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older version left half done is refused, not continued."""
    before = Settings().digest
    monkeypatch.setattr(config, "WORK_FORMAT", config.WORK_FORMAT + 1)
    assert Settings().digest != before


@pytest.mark.parametrize(
    ("upscale", "step"), [(0.5, 64), (1.0, 32), (1.1, 320), (1.25, 128), (1.5, 64), (2.0, 16), (3.0, 32), (8.0, 4)]
)
def test_sides_that_are_multiples_of_the_step_fit_the_strides(upscale: float, step: int) -> None:
    """The least side that enlarges to a multiple of the coarsest stride; all others that do are multiples of it."""
    fitting = [side for side in range(1, 2 * step + 1) if round(side * upscale, 6) % STRIDES[-1] == 0]
    assert side_step(upscale) == step
    assert fitting == [step, 2 * step]
    tiles = [side for side in range(step, 32 * step + 1, step) if side % STRIDES[-1] == 0]
    assert grid_step(upscale) == tiles[0]  # they fit with any detector's own sides, and before they are enlarged


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"anchor_negative_iou": 0.7},
            "anchor_negative_iou=0.7, anchor_positive_iou=0.6: need 0 < negative <= positive",
        ),
        ({"proposals_positive": 0.0}, "proposals_positive=0.0: need more than 0, to 1"),
        ({"after_nms": 0}, "after_nms=0: need 1 or more"),
    ],
)
def test_sampling_is_checked(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Sampling(**wrong)
    assert said in str(raised.value)


@pytest.mark.parametrize("kind", [Detector, Architecture, Sampling])
def test_every_field_of_the_detector_is_explained(kind: type) -> None:
    """A string follows every field: the command line and contributors read it."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, following in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{kind.__name__}: {ast.unparse(field.target)}"


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", "a\tb", "\u202etxt"])
def test_the_name_of_a_class_cannot_command_a_terminal(name: str) -> None:
    with pytest.raises(ConfigError, match="need names of a line each, without control characters"):
        Architecture(classes=("nucleus", name))
    assert Architecture(classes=("Tumor: Positive", "Ignore*", "épithélium")).classes[1] == "Ignore*"


def test_settings_compute_their_digest_once_and_copies_their_own() -> None:
    """A run asks for it several times a slide; what a worker unpickles is equal."""
    settings = Settings()
    assert settings.digest is settings.digest
    other = dataclasses.replace(settings, tiling=Tiling(tile=1024))
    assert other.digest != settings.digest
    assert pickle.loads(pickle.dumps(settings)) == settings == Settings()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Settings(), None),
        (Execution(), None),
        (Export(density_um=50), "density-um=50 has no effect without the format density"),
        (Export(("qupath", "density"), density_um=50, cells=5), None),
        (Export(("csv",), cells=5), "cells=5 has no effect without the format qupath"),
        (Export(dicom_reference="d"), "dicom-reference=d has no effect without the format dicom"),
        (Settings(export=Export(("csv",), cells=5)), "cells=5 has no effect without the format qupath"),
        (Settings(stain=Stain(weights="w")), "weights=w has no effect on the stain without --stain dcgmm"),
        (Settings(stain=Stain("dcgmm", weights="w")), None),
        (Settings(regions=Regions(crop=False)), "regions.no-crop has no effect without --regions"),
        (Settings(regions=Regions("drawn", crop=False)), None),
        (Execution(scheduler="tcp://h:1", gpus=1), "gpus=1 has no effect with a scheduler, which has its workers"),
        (Execution(scheduler_file="f", workers=4), "workers=4 has no effect with a scheduler, which has its workers"),
        (Execution(cluster=False, memory_limit="8GB"), "memory-limit=8GB has no effect with --no-cluster"),
        (Execution(cluster=False, workers=2), None),
        (Execution(workers=2, gpus=1, memory_limit="8GB"), None),
        (Execution(stage_space="1TB"), "stage-space=1TB has no effect without --stage"),
        (Execution(stage_space="1TB", stage="/scratch"), None),
    ],
)  # fmt: skip
def test_what_is_chosen_and_changes_nothing_is_named(settings: Settings | Export | Execution, line: str | None) -> None:
    assert settings.unused == (() if line is None else (line,))
