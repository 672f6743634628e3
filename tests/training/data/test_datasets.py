"""A dataset is found, named, scaled, grouped and split the same way whatever its source; what is written reads back."""

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from pipeline.errors import AnnotationError
from training.data import label_maps
from training.data.coco import write_coco
from training.data.datasets import group_of, named_splits, read_dataset, requested_sets
from training.data.label_maps import write_folder
from training.data.sample import Dataset, LabelledImage, Sample, labelled_image

MAPS = arrays(
    np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 0, 1, 2, 7, 300])
)


def colours(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def numbered(labels: NDArray[np.uint16]) -> NDArray[np.int32]:
    """What every reader should make of a label map: 1..N in the same order."""
    return np.searchsorted(np.unique(np.r_[0, labels.ravel()]), labels).astype(np.int32)


def put(folder: Path, name: str, labels: NDArray[np.uint16]) -> None:
    for part, values in (("images", colours(labels.shape)), ("labels", labels)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / part / f"{name}.png")


class Given:
    """A reader that has the pixels already; pickles."""

    def __init__(self, pixels: LabelledImage) -> None:
        self.pixels = pixels

    def __call__(self) -> LabelledImage:
        return self.pixels


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    classes = draw(st.sampled_from([("Nucleus",), ("Tumour", "Immune µ"), ("b", "a", "c")]))
    images = []
    for name in sorted(draw(st.sets(st.sampled_from(["a_1", "a_2", "TCGA-B0-1", "x y"]), min_size=1, max_size=2))):
        labels = draw(MAPS)
        class_index = np.array(draw(st.lists(st.integers(1, len(classes)), min_size=300, max_size=300)))
        group = draw(st.sampled_from(["", "bladder"]))
        read = labelled_image(colours(labels.shape, len(name)), labels, class_index)
        images.append(Sample(name, group, draw(st.sampled_from([0.25, 0.4989])), Given(read)))
    return Dataset("given", tuple(images), classes)


def check_equal(found: Dataset, expected: Dataset) -> None:
    """All but the name."""
    assert found.classes == expected.classes
    assert [a[:3] for a in found.images] == [a[:3] for a in expected.images]
    for one, other in zip(found.images, expected.images, strict=True):
        read, wanted = pickle.loads(pickle.dumps(one)).read(), other.read()
        for field in ("image", "labels", "class_index"):
            a, b = getattr(read, field), getattr(wanted, field)
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@settings(max_examples=25)
@given(dataset=datasets())
def test_what_is_written_reads_back_equal(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Law: a dataset that is written and read again is the same, in both forms that are written."""
    folder = tmp_path_factory.mktemp("out")
    nuclei = sum(len(a.read().class_index) for a in dataset.images)
    for written in (write_folder(dataset, folder / "maps"), write_coco(dataset, folder / "coco" / "c.json")):
        assert written == (len(dataset.images), nuclei, 0, 0)
    check_equal(read_dataset(folder / "maps"), dataset)
    check_equal(read_dataset(folder / "coco"), dataset)
    check_equal(read_dataset(folder / "coco" / "c.json"), dataset)


@given(labels=MAPS)
def test_numbers_are_made_contiguous_and_nothing_else(labels: NDArray[np.uint16]) -> None:
    """Law: the same number exactly where it was the same; specks are kept; classes go with their nuclei."""
    class_index = np.arange(1000, 1300)
    read = labelled_image(colours(labels.shape), labels, class_index)
    np.testing.assert_array_equal(read.labels, numbered(labels))
    assert read.class_index.tolist() == [999 + n for n in np.unique(labels) if n]
    assert labelled_image(colours(labels.shape), labels.astype(float), None).labels.tolist() == read.labels.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 5)), "need one label per pixel"),
        (np.zeros((4, 4, 3)), "need \\(height, width\\)"),
        (np.full((4, 4), 0.5), "need whole numbers"),
        (np.full((4, 4), np.nan), "need whole numbers"),
        (np.full((4, 4), -1), "from -1 to -1: need 0"),
        (np.full((4, 4), 2**40), "need 0 to 16777215"),
        (np.full((4, 4), "a"), "of type <U1"),
        (np.zeros((0, 4)), "need \\(height, width\\)"),
    ],
)
def test_what_is_no_label_map_is_refused(labels: NDArray[np.generic], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        labelled_image(colours((4, 4)), labels, None)


def test_what_does_not_fit_the_files_is_not_written(tmp_path: Path) -> None:
    labels = np.arange(1, 65_537).reshape(256, 256)
    many = Dataset("m", (Sample("x", "", 0.25, Given(labelled_image(colours((256, 256)), labels, None))),), ("N",))
    with pytest.raises(AnnotationError, match="'x' has 65536 nuclei, a 16-bit map numbers 65535: write COCO"):
        write_folder(many, tmp_path)
    put(tmp_path, "old", np.ones((3, 3), np.uint16))
    with pytest.raises(AnnotationError, match="holds images already: need a new folder"):
        write_folder(many, tmp_path)
    with pytest.raises(AnnotationError, match="has 256 classes: need up to 255"):
        write_folder(many._replace(classes=tuple(map(str, range(256)))), tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("human_bladder_01", "human_bladder"),
        ("03_2", "03"),
        ("TCGA-G9-6336-01Z-00-DX1", "TCGA-G9"),
        ("TCGA-G9-6336-01Z-00-DX1_2", "TCGA-G9"),
        ("case-7 (2)", ""),
        ("case7_1", "case7"),
        ("00ae65c1c663", ""),
        ("12", ""),
        ("_12", ""),
        ("fold1_00003", "fold1"),
    ],
)
def test_the_group_is_the_name_without_its_last_number(name: str, group: str) -> None:
    assert group_of(name) == group


def test_dataset_json_has_the_last_word(tmp_path: Path) -> None:
    for name in ("a_1", "b_1"):
        put(tmp_path, name, np.ones((3, 4), np.uint16))
    with pytest.raises(AnnotationError, match="'a_1' states no resolution: pass --mpp"):
        read_dataset(tmp_path)
    metadata = {"mpp": {"a_1": 0.5, "": 0.3}, "classes": ["Tumour"], "groups": {"b_1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(metadata))
    found = read_dataset(tmp_path)
    assert [a[:3] for a in found.images] == [("a_1", "a", 0.5), ("b_1", "liver", 0.3)]
    assert found.classes == ("Tumour",)
    assert found.name == tmp_path.name
    assert [a.mpp for a in read_dataset(tmp_path, mpp=0.2).images] == [0.2, 0.2]
    with pytest.raises(AnnotationError, match=r"mpp=9 for 'a_1': need 0.05 to 5"):
        read_dataset(tmp_path, mpp=9)


def test_dataset_json_merges_classes(tmp_path: Path) -> None:
    """Several to one, and to none that is known."""
    (tmp_path / "classes").mkdir()
    labels = np.array([[1, 2], [3, 4]])
    put(tmp_path, "x", labels.astype(np.uint16))
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "classes" / "x.png")
    metadata: dict[str, object] = {"mpp": 0.25, "classes": ["Other", "Muscle", "Tumour", "Fibroblast"]}
    metadata["merge"] = {"Other": None, "Muscle": "Connective", "Fibroblast": "Connective"}
    (tmp_path / "dataset.json").write_text(json.dumps(metadata))
    found = read_dataset(tmp_path)
    assert found.classes == ("Connective", "Tumour")
    assert found.images[0].read().class_index.tolist() == [0, 1, 2, 1]
    for convert, out in ((write_folder, tmp_path / "maps"), (write_coco, tmp_path / "coco" / "written.json")):
        with pytest.raises(AnnotationError, match="'x' has nuclei of no known class, which the form cannot state"):
            convert(found, out)
    for folder in ("maps", "coco"):
        assert not list((tmp_path / folder).iterdir()), "what is written by half would be in the way of another try"
    for merge, message in (
        ({"Glia": "x"}, "merges 'Glia', which is no class of this dataset"),
        (dict.fromkeys("abc"), "merges 'a'"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({**metadata, "merge": merge}))
        with pytest.raises(AnnotationError, match=message):
            read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"merge": {"Nucleus": 3}}', "merge is {'Nucleus': 3}: need a class, or null"),
        ('{"merge": {"Nucleus": null}}', "merges every class into null"),
        ('{"mmp": 0.25}', "holds 'mmp': need an object with mpp, classes, groups"),
        ("[]", "holds no object"),
        ('{"mpp": "fine"}', "mpp is 'fine': need a number"),
        ('{"mpp": {"x": "fine"}}', "need a number, or one for each id"),
        ('{"mpp": NaN}', "is not JSON"),
        ('{"mpp": 1e999}', "need 0.05 to 5"),
        (f'{{"mpp": {"9" * 400}}}', "need a number, or one for each id"),
        ('{"classes": []}', "need a list of names, at least one"),
        ('{"classes": ["a", "a"]}', "names one twice"),
        ('{"classes": ["a", "b"]}', "names 2 classes, but there is no"),
        ('{"groups": ["liver"]}', "need the name of a group for each id"),
        ('{"groups": {"y": "liver"}}', "names 'y', which is no image"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_dataset_json_is_named(content: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, "x", np.ones((3, 4), np.uint16))
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(AnnotationError, match=message):
        read_dataset(tmp_path)


def test_the_resolution_tags_are_believed_only_if_believable(tmp_path: Path) -> None:
    for name, dots_per_inch in (("fine", 101_600), ("screen", 72)):
        folder = tmp_path / name
        put(folder, "x", np.ones((3, 4), np.uint16))
        (folder / "images" / "x.png").unlink()
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[282] = tags[283] = dots_per_inch
        tags[296] = 2
        Image.fromarray(colours((3, 4))).save(folder / "images" / "x.tif", tiffinfo=tags)
    assert read_dataset(tmp_path / "fine").images[0].mpp == pytest.approx(0.25)
    with pytest.raises(AnnotationError, match="states no resolution"):
        read_dataset(tmp_path / "screen")


def test_splits_are_lists_and_folds_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text('{"test": ["c"], "note": 3, "loo": {"p": {"1": ["a"], "2": ["b", "c"]}, "seed": 4}}')
    assert named_splits(path) == {
        "test": ["c"],
        "loo/p/1": ["a"],
        "loo/p/2": ["b", "c"],
        "loo/p": ["a", "b", "c"],
        "loo/p/not-1": ["b", "c"],
        "loo/p/not-2": ["a"],
    }
    for name in "abc":
        put(tmp_path, name, np.ones((3, 4), np.uint16))
    assert [a.id for a in read_dataset(tmp_path, ["loo/p/not-1", "test"], 0.25).images] == ["b", "c"]
    with pytest.raises(AnnotationError, match="no split 'tets': its splits are test, loo/p/1"):
        read_dataset(tmp_path, ["tets"], 0.25)
    for bad, message in (
        ("[]", "names no splits"),
        ("{}", "names no splits"),
        ('{"test": [1]}', "'test' holds 1: need ids of images"),
        ('{"fold": {"1": ["a"], "2": ["b", 3]}}', "'fold/2' holds 3"),
    ):
        path.write_text(bad)
        with pytest.raises(AnnotationError, match=message):
            read_dataset(tmp_path, ["test"], 0.25)
    path.write_text('{"test": ["a", "z"]}')
    with pytest.raises(AnnotationError, match=r"'z' of splits.json has no image"):
        read_dataset(tmp_path, ["test"], 0.25)
    path.unlink()
    with pytest.raises(AnnotationError, match=r"splits.json cannot be read"):
        read_dataset(tmp_path, ["test"], 0.25)


def test_annotations_of_a_form_that_is_not_read_are_said(tmp_path: Path) -> None:
    """Of two forms in a folder one is read; what is no form, or damaged, is none."""
    for name in "ab":
        put(tmp_path, name, np.ones((3, 4), np.uint16))
    (tmp_path / "notes.json").write_text("{")
    assert read_dataset(tmp_path, mpp=0.25).describe_skipped() == []
    (tmp_path / "notes.json").unlink()
    write_coco(read_dataset(tmp_path, mpp=0.25), tmp_path / "coco" / "c.json")
    (tmp_path / "coco" / "c.json").rename(tmp_path / "c.json")
    found = read_dataset(tmp_path, mpp=0.25)
    (line,) = found.describe_skipped()
    assert line.startswith(
        f"{tmp_path.name}: read as label maps (images/<id>.png with labels/<id>.png); COCO of 2 images"
    )
    assert line.endswith("is not read: keep each form in a folder of its own")
    square = {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 2], [0, 0]]]}
    drawn = {"type": "Feature", "geometry": square, "properties": {"objectType": "detection"}}
    (tmp_path / "a.geojson").write_text(json.dumps(drawn))
    assert "QuPath GeoJSON of 1 image" in read_dataset(tmp_path, mpp=0.25).describe_skipped()[0]
    (one,) = read_dataset(tmp_path / "a.geojson", mpp=0.25).images  # its image, not its label map
    assert one.image == tmp_path / "images" / "a.png"


def test_an_unknown_form_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"holds no images in a form .* labels/<id>.png .*\(COCO\)"):
        read_dataset(tmp_path, mpp=0.25)
    with pytest.raises(AnnotationError, match="does not exist"):
        read_dataset(tmp_path / "nowhere", mpp=0.25)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(AnnotationError, match="holds no images"):
        read_dataset(tmp_path / "notes.txt", mpp=0.25)


@pytest.mark.parametrize(
    ("name", "images", "classes", "group"),
    [
        ("kumar", 30, 1, "TCGA-18"),
        ("tnbc", 50, 1, "01"),
        ("nuinsseg", 665, 1, "human_bladder"),
        ("consep_train", 27, 7, "train"),
        ("dsb2018_tissue", 107, 1, ""),
    ],
)
def test_the_sets_at_hand(shared: Path, name: str, images: int, classes: int, group: str) -> None:
    found = read_dataset(shared / "data" / name, mpp=0.25)
    assert (found.name, len(found.images), len(found.classes)) == (name, images, classes)
    assert found.images[0].group == group
    read = found.images[0].read()
    assert read.image.shape == (*read.labels.shape, 3)
    np.testing.assert_array_equal(np.unique(read.labels), np.arange(len(read.class_index) + 1))
    assert read.class_index.min() >= 1
    assert read.class_index.max() <= classes


def test_the_folds_of_a_real_set(shared: Path) -> None:
    data = shared / "data" / "tnbc"
    for patient in range(1, 8):
        held = read_dataset(data, [f"bns/patients/0{patient}"], 0.25).images
        trained = read_dataset(data, [f"bns/patients/not-0{patient}"], 0.25).images
        assert {a.group for a in held} == {f"0{patient}"}
        assert len(held) + len(trained) == 33
        assert not {a.id for a in held} & {a.id for a in trained}


def test_a_figure_is_not_taken_for_its_image(shared: Path) -> None:
    """nucls_sample's images are printed figures of three panels, 1500 x 500 px, with labels of 256 x 256."""
    with pytest.raises(AnnotationError, match=r"\(256, 256\), the image is \(500, 1500\): need one label per pixel"):
        read_dataset(shared / "data" / "nucls_sample", mpp=0.25).images[0].read()


def test_nothing_is_written_over_images(tmp_path: Path) -> None:
    """Neither the source's own nor those of another dataset, which would get other pictures."""
    put(tmp_path / "own", "a", np.ones((30, 40), np.uint16))
    found = read_dataset(tmp_path / "own", [], 0.25)
    before = (tmp_path / "own" / "images" / "a.png").read_bytes()
    with pytest.raises(AnnotationError, match=r"holds coco\.json or images already: need a new folder"):
        write_coco(found, tmp_path / "own" / "coco.json")
    assert (tmp_path / "own" / "images" / "a.png").read_bytes() == before
    write_coco(found, tmp_path / "two" / "train.json")
    for name in ("train.json", "test.json"):
        with pytest.raises(AnnotationError, match="need a new folder"):
            write_coco(found, tmp_path / "two" / name)


def test_a_linked_dataset_has_the_name_of_the_link(tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / name / "data", "a", np.ones((30, 40), np.uint16))
        (tmp_path / f"{name}-set").symlink_to(tmp_path / name / "data")
    assert [s.name for s in requested_sets([tmp_path / "one-set", tmp_path / "two-set"])] == ["one-set", "two-set"]


def test_a_class_of_a_nucleus_with_a_large_number_takes_no_memory() -> None:
    """As many votes as there are nuclei and classes, not as the largest number says."""
    labels = np.zeros((20, 20), np.int32)
    labels[2:9, 2:9], labels[12:18, 3:8] = 16_000_000, 7
    tracemalloc.start()
    of_nuclei = label_maps._majority(labels, np.where(labels == 7, 2, (labels > 0) * 250).astype(np.int32), "classes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9
    assert (of_nuclei[6], of_nuclei[-1], len(of_nuclei)) == (2, 250, 16_000_000)
