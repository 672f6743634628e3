"""A dataset down the path of `run`, with an oracle in the detector's place, so that every score is known."""

import dataclasses
import errno
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oracle import replace_detector
from pipeline.archive.inputs.sources import find_slides
from pipeline.config import Architecture, Detector, Execution, Settings, Stain, Stitching, Tiling, Tissue
from pipeline.errors import AnnotationError
from pipeline.files import refusal
from pipeline.layout import RESULTS
from pipeline.model.detector import NucleusDetector, load_weights, save_weights
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import STATISTICS, HostInstances, Patches, empty
from pipeline.model.weights import content_sha256
from pipeline.segment.record import SlideRecord
from training import evaluate as evaluating
from training.config import Training
from training.data.datasets import read_dataset
from training.data.label_maps import write_folder
from training.data.sample import Dataset, LabelledImage, Sample
from training.evaluate import (
    COLUMNS,
    EvaluationImage,
    Outputs,
    as_json,
    evaluate,
    gather,
    predict,
    report,
    report_breakdown,
    summarise,
    tally_image,
    write_outputs,
)
from training.fit import fit
from training.measures import MEASURES, Detections, score

SIDE = 12  # of a nucleus, a square
CLASSES = ("Odd", "Even")


def oracle(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Reads nuclei back from their colours; misses every fifth, and calls every sixth 'Odd' though it is even."""
    for patch in patches:
        number = patch[..., 0].astype(np.int64)
        ids = np.array([i for i in np.unique(number[number != 255]) if i % 5], np.int64)
        corners = [np.argwhere(number == i).min(0) for i in ids]
        boxes = np.array([(x, y, x + SIDE, y + SIDE) for y, x in corners], np.float32).reshape(-1, 4)
        yield HostInstances(
            boxes,
            np.ones((len(ids), SIDE, SIDE), bool),
            (1 - ids / 500).astype(np.float32),
            np.where(ids % 6, (ids + 1) % 2, 0),
            np.ones(len(ids), np.float32),
            np.ones(len(ids), np.int64),
            np.zeros((len(ids), 2, len(STATISTICS)), np.float32),
            False,
        )


def draw_dataset(folder: Path, images: dict[str, int], *, classes: bool) -> Path:
    """Images on white with so many square nuclei, number i in the grey value i; 'odd' and 'even' as classes."""
    for name in ("images", "labels", *(["classes"] if classes else [])):
        (folder / name).mkdir(parents=True)
    for id_, count in images.items():
        labels = np.zeros((100, 140), np.uint16)
        for i in range(1, count + 1):
            y, x = 3 + 20 * ((i - 1) // 6), 5 + 20 * ((i - 1) % 6)
            labels[y : y + SIDE, x : x + SIDE] = i
        grey = np.where(labels, labels, 255).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, 2)).save(folder / "images" / f"{id_}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{id_}.png")
        if classes:
            class_index = np.where(labels, 2 - labels % 2, 0).astype(np.uint8)
            Image.fromarray(class_index).save(folder / "classes" / f"{id_}.png")
    ids = sorted(images)
    (folder / "splits.json").write_text(json.dumps({"first": ids[:1], "rest": ids[1:], "all": ids}))
    metadata = {"mpp": 0.25, "groups": {i: i[0] for i in ids}} | ({"classes": CLASSES} if classes else {})
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that names two classes; the oracle stands for its network."""
    small = Architecture(channels=16, box_hidden=8, mask_channels=8, mask_layers=1, classes=CLASSES)
    path = tmp_path_factory.mktemp("weights") / "two.safetensors"
    save_weights(NucleusDetector(small), path, {})
    return path


@pytest.fixture(scope="module")
def settings(weights: Path) -> Settings:
    return Settings(
        tissue=Tissue(everywhere=True),
        tiling=Tiling(mpp=0.25, tile=192, margin=64),
        stain=Stain(method="none"),
        stitching=Stitching(max_diameter_um=5.0, simplify_px=0.0),
        detector=Detector(weights=str(weights), score=0.6),
    )


@pytest.fixture(autouse=True)
def _oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_detector(monkeypatch, oracle)


ONE = Execution(cluster=False, workers=1)


def test_every_score_of_an_oracle_is_known(tmp_path: Path, settings: Settings) -> None:
    """One image of 12 nuclei (5 and 10 missed), one of 4, one of none: through tiles, seams and tables."""
    data = draw_dataset(tmp_path / "data", {"a1": 12, "a2": 4, "b1": 0}, classes=True)
    images = gather([data], ["first", "rest"])
    outputs = Outputs(tmp_path / "labels", tmp_path / "pictures")
    said: list[str] = []
    found = evaluate(images, settings, ONE, outputs=outputs, say=said.append)
    assert said
    assert not [line for line in said if tempfile.gettempdir() in line], "the results are gone at the end"

    first, second, empty = (found.images[i] for i in ("a1", "a2", "b1"))
    assert (first.annotated, first.detected, first.recall, first.precision) == (12, 10, 10 / 12, 1)
    assert (first.sq, first.hausdorff_um) == (1, 0)
    assert first.pq == first.f1 == 20 / 22
    assert first.aji == first.aji_plus == first.pixel_recall == 10 / 12
    assert (first.ap, first.ap50) == pytest.approx((84 / 101, 84 / 101))  # recalls 0 to .83
    assert first.class_accuracy == 8 / 10  # 6 and 12 are called odd
    assert (second.pq, second.aji, second.ap) == pytest.approx((1, 1, 1))
    assert empty.pq == empty.dice == 1
    assert np.isnan(empty.ap)

    assert found.overall.mean.f1 == pytest.approx((20 / 22 + 1 + 1) / 3)
    assert found.overall.pooled.f1 == 28 / 30
    assert found.overall.mean.ap == pytest.approx((84 / 101 + 1) / 2)
    assert found.within["split"]["first"].pooled == first
    assert found.within["split"]["rest"].mean.annotated == 4
    assert {name: s.mean.images for name, s in found.within["group"].items()} == {"a": 2, "b": 1}

    # odd: 1 3 7 9 11 and the two that are even are found, 5 is missed; of the second image 1 and 3
    odd, even = found.classes["Odd"], found.classes["Even"]
    assert (odd.pooled.precision, odd.pooled.recall) == (7 / 9, 7 / 8)
    assert (even.pooled.precision, even.pooled.recall) == (1, 5 / 8)
    assert odd.mean.images == 2  # the empty image says nothing of a class
    assert found.over_classes is not None
    assert found.over_classes.mean.images == found.over_classes.pooled.images == found.overall.pooled.images
    assert found.over_classes.pooled.pq == pytest.approx((odd.pooled.pq + even.pooled.pq) / 2)

    for image in images.images:
        labels = np.asarray(Image.open(tmp_path / "labels" / f"{image.name}.png"))
        assert labels.dtype == np.uint16
        assert score(image.sample.read().labels, labels.astype(np.int32)).pq == found.images[image.name].pq
        with Image.open(tmp_path / "pictures" / f"{image.name}.png") as picture:
            assert picture.width > 3 * 140

    content = json.loads(json.dumps(as_json(found, images.images, "nightslide evaluate"), allow_nan=False))
    assert content["weights_sha256"] == content_sha256(Path(settings.detector.weights))
    pinned = dataclasses.replace(settings.detector, weights_sha256=content["weights_sha256"])
    assert content["digest"] == dataclasses.replace(settings, detector=pinned).digest
    assert (content["command"], content["images"], content["mpp"]) == ("nightslide evaluate", 3, [0.25])
    assert (content["views"], content["stain"]) == (1, "none")
    assert content["area_mm2"] == pytest.approx(3 * 100 * 140 * 0.25**2 / 1e6, abs=1e-4)
    assert content["per_image"]["b1"]["ap"] is None
    assert content["per_image"]["a1"]["classes"]["Even"]["recall"] == 3 / 6
    assert content["overall"]["pooled"]["f1"] == 28 / 30

    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "none-1.json").write_text(json.dumps(content))
    script = Path(evaluating.__file__).parents[1] / "workflows" / "experiments" / "tables.py"
    command = [sys.executable, str(script), str(tmp_path / "json"), "--mean"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in (
        f"| none-1 | two.safetensors {content['weights_sha256'][:8]} | none | 1 | 3 |",
        "| **all images of all rows** |  |  |  | 3 |",
        "\nfirst, image mean:\n",
        f" {found.overall.mean.pq:.3f} ",
        " `nightslide evaluate` |",
    ):
        assert line in printed

    table = report(found).splitlines()
    assert [line.split(",")[0] for line in table[1:]] == [
        "split first", "split rest", "class Odd", "class Even", "mean over classes", "all", "all",
    ]  # fmt: skip
    assert len({len(line) for line in table}) == 1
    assert "a1" in report(found, per_image=True)


def test_classes_that_the_weights_do_not_know_are_not_scored(tmp_path: Path, settings: Settings) -> None:
    data = draw_dataset(tmp_path / "data", {"a1": 3}, classes=True)
    (data / "dataset.json").write_text(json.dumps({"mpp": 0.25, "classes": ["Round", "Long"]}))
    said = list[str]()
    found = evaluate(gather([data]), settings, ONE, say=said.append)
    assert found.classes == {}
    assert found.over_classes is None
    assert found.overall.mean.f1 == 1
    assert "class" not in report(found)
    assert any("are not scored, as the weights know Odd, Even, the annotations Round, Long: " in line for line in said)
    (data / "dataset.json").write_text(json.dumps({"mpp": 0.25, "classes": ["Odd", "Long"]}))
    some = evaluate(gather([data]), settings, ONE, say=said.append)
    assert (some.classes["Odd"].pooled.recall, some.classes["Long"].pooled.recall) == (1, 0)
    assert any("nothing is detected as Long, as the weights know Odd, Even: give those" in line for line in said)


def test_weights_of_one_class_score_none(tmp_path: Path, settings: Settings) -> None:
    """They have the name that annotations without a class have, of which QuPath's exports often hold some."""
    small = Architecture(channels=16, box_hidden=8, mask_channels=8, mask_layers=1)
    save_weights(NucleusDetector(small), tmp_path / "one.safetensors", {})
    data = draw_dataset(tmp_path / "data", {"a2": 1}, classes=True)
    (data / "dataset.json").write_text(json.dumps({"mpp": 0.25, "classes": ["Nucleus", "Tumor"]}))
    detector = dataclasses.replace(settings.detector, weights=str(tmp_path / "one.safetensors"))
    found = evaluate(gather([data]), dataclasses.replace(settings, detector=detector), ONE)
    assert (found.classes, found.over_classes, found.overall.mean.annotated) == ({}, None, 1)


def test_images_that_the_weights_were_trained_on_are_named(tmp_path: Path, settings: Settings, weights: Path) -> None:
    """Law: whatever their names, and also where those weights were trained on them that the training began with."""
    old = draw_dataset(tmp_path / "old", {"a1": 3, "a2": 4}, classes=True)
    new = draw_dataset(tmp_path / "new", {"b1": 4, "b2": 5}, classes=True)  # b1 has the pixels of a2
    quick = Training(steps=1, batch=1, crop_px=64, hold_out=0, init=str(weights), loaders=0, device="cpu")
    architecture = load_weights(weights).architecture
    first = fit([read_dataset(old)], tmp_path / "first", quick, architecture, say=lambda line: None)
    again = dataclasses.replace(quick, init=str(first))
    second = fit([read_dataset(old, ["first"])], tmp_path / "second", again, architecture, say=lambda line: None)
    images = gather([new])
    for trained, wanted in ((first, 1), (second, 1), (weights, 0)):
        said: list[str] = []
        of = dataclasses.replace(settings, detector=dataclasses.replace(settings.detector, weights=str(trained)))
        evaluate(images, of, ONE, say=said.append)
        warned = [line for line in said if "trained on 1 image of these 2, such as b1, under whatever name" in line]
        assert len(warned) == wanted


def test_an_image_that_cannot_be_segmented_is_named(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        raise RuntimeError("no such luck")

    replace_detector(monkeypatch, broken)
    data = draw_dataset(tmp_path / "data", {"a1": 3}, classes=False)
    with pytest.raises(AnnotationError, match="a1 could not be segmented: no such luck"):
        evaluate(gather([data]), settings, ONE)


def test_no_warning_names_a_file_of_results_that_are_gone(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is lost or looks wrong is said as `run` says it, but for where it tells to look."""

    def blind(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
        yield from (empty(SIDE) for _ in patches)

    replace_detector(monkeypatch, blind)
    data, said = draw_dataset(tmp_path / "data", {"a1": 3}, classes=False), list[str]()
    evaluate(gather([data]), settings, ONE, say=said.append)
    lines = [line for text in said for line in text.splitlines()]
    assert "    WARNING: no nuclei were found: is it stained with H&E, and is the scale right?" in lines
    assert not [line for line in lines if any(name in line for name in RESULTS)]


def test_every_image_is_handed_over_with_its_own_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what `run` sees are the pixels and the scale of the annotated image, whatever it is called."""
    rng = np.random.default_rng(0)
    colours = [rng.integers(0, 256, (9, 7, 3)).astype(np.uint8) for _ in range(3)]
    pixels = [LabelledImage(image, np.zeros((9, 7), np.int32), np.zeros(0, int)) for image in colours]
    names = ("z", "same/name", "same_name")
    images = [
        EvaluationImage(n, Sample(n, "", 0.2 + i / 30, partial(pixels.__getitem__, i)), ()) for i, n in enumerate(names)
    ]

    def looking(inputs: list[Path], out: Path, *_: object, **__: object) -> list[SlideRecord]:
        archive = find_slides(inputs)
        assert [s.scale.mpp for s in archive.sources] == [m.sample.mpp for m in images]
        for source, expected in zip(archive.sources, pixels, strict=True):
            assert np.array_equal(np.asarray(Image.open(source.path)), expected.image)
        return [SlideRecord(s.name, "done") for s in archive.sources]

    monkeypatch.setattr(evaluating, "run", looking)
    rows = predict(images, tmp_path, Settings(), ONE, lambda line: None)
    assert len({r.slide for r in rows}) == 3


def test_gather_knows_splits_groups_and_datasets(tmp_path: Path) -> None:
    one = draw_dataset(tmp_path / "one", {"a1": 1, "b1": 2}, classes=False)
    two = draw_dataset(tmp_path / "two", {"a1": 3, "c1": 4}, classes=True)
    alone = gather([one], ["all"])
    assert [(m.name, m.within) for m in alone.images] == [("a1", (("group", "a"),)), ("b1", (("group", "b"),))]
    # an image of two splits counts once, and in both
    both = gather([one], ["first", "all"]).images
    assert [m.name for m in both] == ["a1", "b1"]
    assert both[0].within == (("split", "first"), ("split", "all"), ("group", "a"))
    together = gather([one, two], mpp=[0.5, 0.2])
    assert [m.name for m in together.images] == ["one/a1", "one/b1", "two/a1", "two/c1"]
    assert [m.sample.mpp for m in together.images] == [0.5, 0.5, 0.2, 0.2]
    assert together.images[2].within[0] == ("data", "two")
    assert together.classes == ()  # only the second has any
    assert gather([two]).classes == CLASSES
    # a split of one dataset leaves the other whole
    assert [m.name for m in gather([one, two], ["two:rest"], [0.5, 0.2]).images] == ["one/a1", "one/b1", "two/c1"]


def test_a_dataset_is_read_once_where_it_has_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: of the images, whose scales are read with it, none is opened twice for one split, or without any."""
    data, read = draw_dataset(tmp_path / "data", {"a1": 1, "b1": 2}, classes=False), []

    def counted(path: Path, splits: Sequence[str], mpp: float | None) -> Dataset:
        read.append(tuple(splits))
        return read_dataset(path, splits, mpp)

    monkeypatch.setattr(evaluating, "read_dataset", counted)
    assert len(gather([data]).images) == 2
    assert len(gather([data], ["first"]).images) == 1
    assert read == [(), ("first",)]
    gather([data], ["first", "rest"])
    assert read[2:] == [("first",), ("rest",), ("first", "rest")]


def test_what_looks_wrong_is_said_of_the_images_of_every_split(tmp_path: Path) -> None:
    data = draw_dataset(tmp_path / "data", {"a1": 4, "b1": 4}, classes=False)
    (data / "dataset.json").write_text(json.dumps({"mpp": {"b1": 1.0}}))
    for splits in (["first", "rest"], ["rest", "first"], ["rest"], []):
        assert any("states, such as 'b1'" in line for line in gather([data], splits, [0.5]).skipped)
    assert not gather([data], ["first"], [0.5]).skipped


def test_what_cannot_be_gathered_is_said(tmp_path: Path) -> None:
    one = draw_dataset(tmp_path / "one", {"a1": 1}, classes=False)
    with pytest.raises(AnnotationError, match="3 values of mpp for 2 datasets"):
        gather([one, one], mpp=[1, 2, 3])
    with pytest.raises(AnnotationError, match="datasets called one, one: need a different name"):
        gather([one, one])
    with pytest.raises(AnnotationError, match="no split 'tset': its splits are first, rest"):
        gather([one], ["tset"])
    with pytest.raises(AnnotationError, match="split 'two:first' is of no dataset: need NAME, or one of one before"):
        gather([one], ["two:first"])


def test_more_detections_than_a_label_map_holds_are_refused(tmp_path: Path) -> None:
    pixels = LabelledImage(np.zeros((300, 300, 3), np.uint8), np.zeros((300, 300), np.int32), np.zeros(0, np.int64))
    found = np.arange(90_000, dtype=np.int32).reshape(300, 300)
    with pytest.raises(AnnotationError, match="big holds 89,999 detections, a 16-bit label map 65,535"):
        write_outputs(Outputs(tmp_path), "big", pixels, found)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AnnotationError, match="leads out of"):
        write_outputs(Outputs(tmp_path / "in"), "../out", pixels, found % 9)
    write_outputs(Outputs(), "big", pixels, found)


def test_a_full_disk_is_named_and_no_file_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that would have been written, wherever that is: it may be scratch of which nobody knows."""
    data = draw_dataset(tmp_path / "d", {"a1": 2}, classes=False)
    (image,) = gather([data]).images
    folder = tmp_path / "out"
    folder.mkdir()

    def save(image: Image.Image, path: Path, **options: Any) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    labelled = image.sample.read()
    monkeypatch.setattr(Image.Image, "save", save)
    for write, named in (
        (lambda: predict([image], folder, Settings(), ONE, lambda line: None), "000000-a1.png"),
        (lambda: write_outputs(Outputs(folder), "a1", labelled, labelled.labels), "a1.png"),
        (lambda: write_folder(read_dataset(data, mpp=0.25), folder / "maps"), "maps/images/a1.png"),
    ):
        with pytest.raises(OSError, match="No space") as error:
            write()
        assert refusal(error.value).startswith(f"{folder / named}: No space left on device: free some space there")
        assert not list(folder.rglob("*.png"))


def test_a_breakdown_of_every_dataset_and_of_all(tmp_path: Path, settings: Settings) -> None:
    """Law: what is counted there are the nuclei and detections that the scores are of."""
    data = [draw_dataset(tmp_path / name, {"a1": 12}, classes=False) for name in ("one", "two")]
    images = gather(data)
    scores = evaluate(images, settings, ONE)
    for counts, summary in [
        (scores.breakdown, scores.overall),
        *((b, scores.within["data"][name]) for name, b in scores.breakdown_within["data"].items()),
    ]:
        pooled = summary.pooled
        assert sum(part.annotated for part in counts.sizes.values()) == pooled.annotated
        assert sum(counts.misses.values()) == counts.misses["none"] == round(pooled.annotated * (1 - pooled.recall)) > 0
        assert sum(counts.false.values()) == round(pooled.detected * (1 - pooled.precision))
    written = as_json(scores, images.images, "")["breakdown"]
    assert written["within"]["data"].keys() == {"one", "two"}
    assert written["overall"]["misses"] == scores.breakdown.misses
    headings = [line for line in report_breakdown(scores).splitlines() if line.startswith("#")]
    assert headings == ["## data one", "## data two", "## all"]


def test_groups_of_one_image_are_left_out_of_the_table() -> None:
    """They are in the JSON all the same."""
    empty = LabelledImage(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int32), np.zeros(0, np.int64))
    none = Detections(np.zeros(0, object), np.zeros(0), np.zeros(0, np.int64))
    image = tally_image(empty, none, 0.25, 0)
    annotated = Sample("x", "", 0.25, lambda: empty)
    images = [EvaluationImage(n, annotated, (("group", n[0]),)) for n in ("a1", "a2", "b1", "b2")]
    assert "group a" in report(summarise(images, (), [image] * 4, {}))
    assert "group b" not in report(summarise(images[1:3], (), [image] * 2, {}))
    assert set(summarise(images[1:3], (), [image] * 2, {}).within["group"]) == {"a", "b"}


def test_every_measure_has_a_column() -> None:
    assert {*COLUMNS, "dq"} == {*MEASURES}  # DQ is F1, in one column
