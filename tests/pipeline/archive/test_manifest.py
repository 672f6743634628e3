"""What a run refuses, or warns of, before anything is started."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline import files
from pipeline.api import CPU_SECONDS_PER_MM2, speed
from pipeline.archive.manifest import check_seams, check_worker, end_overwriting, open_run, resolve, versions
from pipeline.archive.run import run
from pipeline.config import Architecture, Detector, Execution, Export, Settings, Stain, Tiling
from pipeline.errors import RunError, WeightsError
from pipeline.layout import RunFolder
from pipeline.model import load
from pipeline.model.detector import NucleusDetector, save_weights
from pipeline.model.weights import find_weights


@pytest.mark.parametrize(
    ("tile", "margin", "message"),
    [
        (1056, 128, r"tiling\.tile=1056 enlarged by 1\.5 .* no multiple of 32 px: need a multiple of 64, such as 1088"),
        (1280, 202, r"tiling\.margin=202 enlarged .* need a multiple of 64, such as 256"),
        (1024, 100, r"tiling\.margin=100 enlarged by 1\.5 .* no multiple of 32 px: need a multiple of 64, such as 128"),
        (1024, 10, r"tiling\.margin=10 enlarged by 1\.5 .*, such as 64$"),
    ],
)
def test_tiles_that_lie_otherwise_on_the_feature_maps_are_refused(
    tmp_path: Path, tile: int, margin: int, message: str
) -> None:
    (tmp_path / "a.svs").touch()
    with pytest.raises(RunError, match=message):
        run(
            [tmp_path / "a.svs"],
            tmp_path / "out",
            Settings(tiling=Tiling(tile=tile, margin=margin)),
            Execution(cluster=False),
        )
    assert not (tmp_path / "out").exists()


def test_a_margin_too_small_for_the_detector_is_said() -> None:
    (warning,) = check_seams(Settings(tiling=Tiling(tile=1024, margin=64)))
    assert "tiling.margin=64: with less than 128 px" in warning
    assert check_seams(Settings(tiling=Tiling(tile=1024, margin=128))) == ()


def test_the_default_tiling_needs_no_warning() -> None:
    assert check_seams(Settings()) == ()


def test_weights_of_another_kind_are_refused() -> None:
    """Before any slide: `plan` loads no network."""
    for settings, kind in (
        (
            Settings(detector=Detector(weights="stain")),
            "the stain normalisation, for --stain.weights: need those of a det",
        ),
        (Settings(stain=Stain("dcgmm", weights="nuclei")), "a detector, for --weights: need those of the stain"),
    ):
        with pytest.raises(WeightsError, match=f"holds weights of {kind}"):
            resolve(settings)


def test_the_weights_set_the_working_scale_and_the_score(tmp_path: Path) -> None:
    """Unless they are given; the scale must be near theirs. The estimated time follows it."""
    assert resolve(Settings()).tiling.mpp == 0.25
    coarse = Architecture(mpp=0.5, score=0.35, channels=8, box_hidden=8, mask_channels=8, backbone="test_efficientnet")
    save_weights(NucleusDetector(coarse), tmp_path / "coarse.safetensors", {})
    detector = Detector(weights=str(tmp_path / "coarse.safetensors"), device="cpu")
    assert resolve(Settings(detector=detector)).tiling == Tiling(mpp=0.5)
    assert resolve(Settings(detector=detector)).detector.score == 0.35
    assert resolve(Settings(detector=dataclasses.replace(detector, score=0.8))).detector.score == 0.8
    assert resolve(Settings(detector=dataclasses.replace(detector, score=0.0))).detector.score == 0
    assert resolve(Settings(tiling=Tiling(mpp=0.48), detector=detector)).tiling.mpp == 0.48
    with pytest.raises(RunError, match=r"tiling\.mpp=0\.25, but coarse\.safetensors was trained at 0\.5"):
        resolve(Settings(tiling=Tiling(mpp=0.25), detector=detector))
    assert speed(Settings(detector=Detector(device="cpu"))) == CPU_SECONDS_PER_MM2
    assert speed(Settings(detector=detector)) == CPU_SECONDS_PER_MM2 / 4


def test_a_folder_of_the_settings_is_the_same_to_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(Settings(export=Export(dicom_reference="dcm"))).export.dicom_reference == str(tmp_path / "dcm")
    assert resolve(Settings()).export.dicom_reference == ""


def test_files_of_the_settings_are_the_same_to_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: settings that are resolved stay as they are, from whatever folder a worker was started."""
    for name in ("nuclei", "stain"):
        shutil.copy(find_weights(name), tmp_path / f"own {name}.safetensors")
    Image.new("RGB", (64, 64), (200, 100, 180)).save(tmp_path / "template.png")
    stain = Stain("dcgmm", weights="own stain.safetensors", template="template.png")
    given = Settings(detector=Detector(weights="own nuclei.safetensors"), stain=stain)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    monkeypatch.chdir(tmp_path)
    resolved = resolve(given)
    monkeypatch.chdir(elsewhere)
    assert resolve(resolved) == resolved


def test_shipped_weights_are_those_of_the_workers_own_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers in images of their own have their packages elsewhere: every slide failed there. Content is compared."""
    resolved = resolve(Settings(stain=Stain("dcgmm")))
    assert (resolved.detector.weights, resolved.stain.weights) == ("nuclei", "stain")
    elsewhere = tmp_path / "pipeline"
    shutil.copytree(find_weights("nuclei").parent, elsewhere / "weights")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    assert resolve(resolved) == resolved
    assert find_weights(resolved.detector.weights) == elsewhere / "weights" / "nuclei.safetensors"
    shutil.copy(find_weights("fast"), find_weights("nuclei"))
    with pytest.raises(WeightsError, match="has other content than when the run was started"):
        load.detector(resolved.detector)


def test_a_worker_that_has_another_disk_or_other_versions_is_refused(tmp_path: Path) -> None:
    """The folder is there, but not that of the run; and other versions give other results."""
    with pytest.raises(RunError, match=r"does not see .*run\.json: workers need the same file system"):
        check_worker(versions(), tmp_path / "run.json", None)
    (tmp_path / "run.json").touch()
    check_worker(versions(), tmp_path / "run.json", tmp_path)
    with pytest.raises(RunError, match=r"does not see .*stage: need a --stage folder that all workers share"):
        check_worker(versions(), tmp_path / "run.json", tmp_path / "stage")
    with pytest.raises(RunError, match=r"^has torch .*, not 1\.0: need the same everywhere"):
        check_worker({**versions(), "torch": "1.0"}, tmp_path / "run.json", None)


def test_a_worker_that_cannot_write_to_the_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slide of which it did a task failed: a folder that is mounted there for reading is seen, too."""
    (tmp_path / "run.json").touch()
    check_worker(versions(), tmp_path / "run.json", None)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(RunError, match=r"cannot write to .* \(Read-only file system\): workers need the rights"):
        check_worker(versions(), tmp_path / "run.json", None)


def test_a_worker_is_fit_for_work_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is full for every other worker, too, and space may be made: it must not be retired for that."""
    (tmp_path / "run.json").touch()

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space left"):
        files.now_ns(tmp_path)
    check_worker(versions(), tmp_path / "run.json", None)


def test_of_other_settings_only_those_are_named_that_matter(tmp_path: Path) -> None:
    """Other formats alone are no reason to refuse a folder: a run writes them beside the others."""
    run = RunFolder(tmp_path)
    open_run(run, resolve(Settings()), overwrite=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "slide.json").write_text("{}")
    csv = Export(formats=("qupath", "csv"))
    open_run(run, resolve(Settings(export=csv)), overwrite=False)
    with pytest.raises(RunError, match=r"\): tiling\.tile was 1280, is 512\. Choose another --out"):
        open_run(run, resolve(Settings(export=csv, tiling=Tiling(tile=512))), overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_json_that_cannot_be_read_is_named(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said of the whole folder that it cannot be written."""
    run = RunFolder(tmp_path)
    run.run_json.mkdir()
    with pytest.raises(RunError, match=rf"^{run.run_json}: Is a directory: move away the folder that is in"):
        open_run(run, resolve(Settings()), overwrite)
    run.run_json.rmdir()
    open_run(run, resolve(Settings()), overwrite=False)

    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RunError, match=rf"^{run.run_json}: Permission denied: make it a file or folder that may be"):
        open_run(run, resolve(Settings()), overwrite)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_link_that_leads_nowhere_is_no_run_json(tmp_path: Path) -> None:
    """The folder was refused, as one that cannot be written."""
    run, elsewhere = RunFolder(tmp_path / "out"), tmp_path / "elsewhere.json"
    run.path.mkdir()
    run.run_json.symlink_to(elsewhere)
    open_run(run, resolve(Settings()), overwrite=False)
    assert not run.run_json.is_symlink()
    assert not elsewhere.exists()


def test_a_file_system_without_links_takes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT is, and some file servers are."""

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(os, "link", refuse)
    settings = resolve(Settings())
    assert open_run(RunFolder(tmp_path), settings, overwrite=False) == ((), "")
    assert (files.read_json(tmp_path / "run.json") or {})["digest"] == settings.digest


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_folder_whose_name_is_no_text_takes_no_run(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"out\xff")
    with pytest.raises(RunError, match=r"--out .*out\\udcff is not UTF-8, as tables need it: choose another name"):
        open_run(RunFolder(folder), resolve(Settings()), overwrite=False)
    assert not folder.exists()


def test_a_round_of_overwriting_goes_on_with_the_same_settings_until_it_ends(tmp_path: Path) -> None:
    """Law: no command ends the round of another one; with other settings every slide is to be done again."""
    run = RunFolder(tmp_path)
    one, other = resolve(Settings()), resolve(Settings(tiling=Tiling(tile=512)))
    first = open_run(run, one, overwrite=True).overwrite
    assert first
    assert open_run(run, one, overwrite=True).overwrite == first
    assert open_run(run, one, overwrite=False).overwrite == ""
    second = open_run(run, other, overwrite=True).overwrite
    assert second not in ("", first)
    for ended in ("", first):
        end_overwriting(run, ended)
        assert open_run(run, other, overwrite=True).overwrite == second
    end_overwriting(run, second)
    open_run(run, other, overwrite=False)
    assert open_run(run, other, overwrite=True).overwrite not in ("", first, second)


def test_of_two_runs_that_start_at_once_the_settings_of_one_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    first, second = resolve(Settings()), resolve(Settings(tiling=Tiling(tile=512)))
    open_run(run, first, overwrite=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "slide.json").write_text("{}")
    monkeypatch.setattr(Path, "exists", lambda _: False)  # neither has seen the run.json of the other
    with pytest.raises(RunError, match="holds results of other settings"):
        open_run(run, second, overwrite=False)
