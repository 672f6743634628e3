"""COCO JSON, as pycocotools understands it, in and out."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from pipeline.errors import AnnotationError
from training.data.coco import _counts, _text, write_coco
from training.data.datasets import read_dataset
from training.data.sample import Dataset, LabelledImage, Sample, labelled_image

# pycocotools' own decoder, which only the tests use, is not ready for numpy 2.
DECODER = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
MASKS = arrays(np.uint8, (12, 20), elements=st.sampled_from([0, 0, 0, 1]))
RING = st.lists(st.floats(-3, 23, width=32), min_size=6, max_size=12).filter(lambda xy: len(xy) % 2 == 0)


def write(folder: Path, nuclei: list[dict[str, Any]], **changes: Any) -> Path:
    """A COCO file with one image of 20 x 12 px and three categories, out of order."""
    (folder / "images").mkdir(exist_ok=True)
    Image.fromarray(RGB).save(folder / "images" / "x_1.png")
    content = {
        "images": [{"id": 5, "file_name": "x_1.png", "width": 20, "height": 12}],
        "categories": [{"id": 9, "name": "c"}, {"id": 2, "name": "a"}, {"id": 4, "name": "b"}],
        "annotations": [{"id": i, "image_id": 5, "category_id": 4} | n for i, n in enumerate(nuclei)],
    }
    path = folder / "train.json"
    path.write_text(json.dumps(content | changes))
    return path


def only(found: Dataset) -> LabelledImage:
    (annotated,) = found.images
    return LabelledImage(*pickle.loads(pickle.dumps(annotated)).read())


def given_pixels(read: LabelledImage) -> Dataset:
    return Dataset("g", (Sample("x", "", 0.25, lambda: read),), ("Nucleus",))


@DECODER
@settings(max_examples=40)
@given(
    drawn=st.lists(st.one_of(MASKS, st.lists(RING, min_size=1, max_size=2)), max_size=4),
    compressed=st.booleans(),
    crowd=st.sampled_from([-1, 0]),
)
def test_masks_are_those_of_pycocotools(
    drawn: list[Any], compressed: bool, crowd: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Polygons and run lengths, the later over the earlier; crowds are white where others are none; classes in order of
    their ids.
    """
    folder = tmp_path_factory.mktemp("coco")
    nuclei: list[dict[str, Any]] = []
    for number, shape in enumerate(drawn):
        segmentation: Any = shape
        if isinstance(shape, np.ndarray):
            runs = np.diff(np.flatnonzero(np.r_[True, np.diff(shape.T.ravel()) != 0, True])).tolist()
            text = mask_tools.encode(np.asfortranarray(shape))["counts"].decode()
            segmentation = {"size": [12, 20], "counts": text if compressed else [0] * int(shape[0, 0]) + runs}
        nuclei.append({"segmentation": segmentation, "category_id": [2, 4, 9, 4][number], "iscrowd": number == crowd})
    crowd = -1 if len(nuclei) == 1 else crowd  # CVAT calls every mask a crowd
    path = write(folder, nuclei)
    oracle = COCO(path)
    painted, claims, white = np.zeros((12, 20), int), np.zeros((12, 20), int), np.zeros((12, 20), bool)
    for number in range(len(nuclei)):
        mask = oracle.annToMask(oracle.anns[number])
        if number == crowd:
            white = mask > 0
        else:
            painted[mask > 0] = number + 1
            claims += mask
    found = read_dataset(folder, mpp=0.25)
    read = only(found)
    kept = np.unique(painted[painted > 0])
    np.testing.assert_array_equal(read.labels, np.searchsorted(np.r_[0, kept], painted))
    assert read.class_index.tolist() == [[1, 2, 3, 2][n - 1] for n in kept]
    assert read.contested_px == (claims > 1).sum()
    assert found.classes == ("a", "b", "c")
    expected = RGB.copy()
    expected[white & (painted == 0)] = 255
    np.testing.assert_array_equal(read.image, expected)


@pytest.mark.parametrize("stated", [True, None, "0.25"])
def test_a_scale_that_is_no_number_is_not_stated(stated: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [])
    content = json.loads(path.read_text())
    content["images"][0]["mpp"] = stated
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match="states no resolution: pass --mpp"):
        read_dataset(path)
    assert read_dataset(path, mpp=0.5).describe_skipped() == []


@DECODER
@settings(max_examples=40)
@given(labels=arrays(np.uint16, (7, 9), elements=st.sampled_from([0, 0, 1, 2, 5])))
def test_pycocotools_reads_what_is_written(
    labels: NDArray[np.uint16], tmp_path_factory: pytest.TempPathFactory
) -> None:
    read = labelled_image(RGB[:7, :9], labels, None)
    path = tmp_path_factory.mktemp("out") / "c.json"
    assert write_coco(given_pixels(read), path) == (1, len(read.class_index), 0, 0)
    oracle = COCO(path)
    assert len(oracle.anns) == len(read.class_index)
    for number, annotation in oracle.anns.items():
        np.testing.assert_array_equal(oracle.annToMask(annotation), read.labels == number)
        rows, columns = np.nonzero(read.labels == number)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert annotation["area"] == len(rows)


@given(counts=st.lists(st.integers(0, 2**28), min_size=1, max_size=8))
@example(counts=[0, 1, 0, 1, 2**28])
def test_run_lengths_are_taken_apart_as_pycocotools_puts_them_together(counts: list[int]) -> None:
    assert _counts(_text(counts, 1, sum(counts))).tolist() == [*counts, 0, 0, 0, 0]


def test_large_numbers_do_not_end_the_process() -> None:
    """Where every number takes six characters pycocotools writes one beyond its memory, which glibc notices later."""
    texts = "[(_text([2**28, 2**28, 2**28, 0], 1, 3 * 2**28), bytes(i % 30)) for i in range(2000)]"
    code = f"from training.data.coco import _text; _ = {texts}"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


@given(text=st.binary(max_size=30))
def test_no_text_breaks_the_run_lengths(text: bytes) -> None:
    assert _counts(text).dtype == np.int64
    assert len(_counts(text)) >= 1


def test_images_lie_beside_or_below_or_above(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    assert only(read_dataset(path, mpp=0.25)).labels.sum() == 0
    (tmp_path / "images" / "x_1.png").rename(tmp_path / "x_1.png")
    assert read_dataset(path, mpp=0.25).name == "train"
    (tmp_path / "annotations").mkdir()
    path.rename(tmp_path / "annotations" / "train.json")
    for folder in (tmp_path, tmp_path / "annotations"):
        (folder / "._train.json").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")  # lies beside a copy from macOS
    assert read_dataset(tmp_path, mpp=0.25).images[0][:2] == ("x_1", "x")
    write(tmp_path, [])
    with pytest.raises(AnnotationError, match="holds 2 COCO files"):
        read_dataset(tmp_path, mpp=0.25)


@pytest.mark.parametrize("folder", ["images/default", "default"])
def test_images_of_a_part_lie_in_a_folder_of_its_name(tmp_path: Path, folder: str) -> None:
    """As CVAT exports them, beside annotations/instances_default.json; and as COCO's own train2017/."""
    path = write(tmp_path, [])
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "x_1.png").rename(tmp_path / folder / "x_1.png")
    (tmp_path / "annotations").mkdir()
    path = path.rename(tmp_path / "annotations" / "instances_default.json")
    for data in (tmp_path, path):
        assert [sample.id for sample in read_dataset(data, mpp=0.25).images] == ["x_1"]


def image(**changes: Any) -> dict[str, Any]:
    return {"images": [{"id": 5, "file_name": "x_1.png", "width": 20, "height": 12} | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (image(file_name="../x_1.png"), "need a name within its folder"),
        (image(file_name="/etc/passwd"), "need a name within its folder"),
        (image(file_name="a/../../x_1.png"), "need a name within its folder"),
        (image(file_name="..\\x_1.png"), "need a name within its folder"),
        (image(file_name="C:x_1.png"), "need a name within its folder"),
        (image(file_name=""), "need a name within its folder"),
        (image(file_name=["x_1.png"]), "need a name within its folder"),
        (image(file_name="y.png"), r"there is no image y.png"),
        (image(file_name="y" * 5000), r"there is no image yyy"),
        (image(width=-20), "need 1 to 32768"),
        (image(width=2**40), "need 1 to 32768"),
        (image(width="20"), "need 1 to 32768"),
        (image(id=[5]), "is not in COCO's form"),
        ({"images": image()["images"] * 2}, "gives two images the same id"),
        ({"images": [*image()["images"], *image(id=6)["images"]]}, "two images called 'x_1'"),
        ({"images": [3]}, "is not in COCO's form"),
        ({"images": [{}]}, "is not in COCO's form"),
        ({"categories": []}, r"names the categories \[\]: need one or more"),
        ({"categories": [{"id": 4, "name": "a"}, {"id": 5, "name": "a"}]}, "each with its own name"),
        ({"categories": [{"id": 4, "name": None}]}, "each with its own name"),
        ({"categories": [{"id": 4, "name": "a"}, {"id": 4, "name": "b"}]}, "gives two categories the same id"),
        ({"categories": 3}, "is not in COCO's form"),
        ({"annotations": [3]}, "is not in COCO's form"),
        ({"annotations": [{"image_id": 5}]}, "is not in COCO's form"),
        ({"annotations": [{"id": 1, "image_id": 6, "category_id": 4}]}, "is of image 6 and category 4"),
        ({"annotations": [{"id": 1, "image_id": 5, "category_id": 3}]}, "is of image 5 and category 3"),
    ],
)
def test_a_json_of_the_wrong_shape_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_dataset(write(tmp_path, [], **changes), mpp=0.25)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "has no outline"),
        ([], "has no outline"),
        ({"size": [20, 12], "counts": [240]}, r"need polygons, or run lengths with size \[12, 20\]"),
        ({"size": [12, 20], "counts": [239]}, "cover 239 px of an image of 240"),
        ({"size": [12, 20], "counts": [-1, 241]}, "need text, or whole numbers from 0"),
        ({"size": [12, 20], "counts": [2**70]}, "need text, or whole numbers from 0"),
        ({"size": [12, 20], "counts": [240.0]}, "need text, or whole numbers from 0"),
        ({"size": [12, 20], "counts": 240}, "need text, or whole numbers from 0"),
        ({"size": [12, 20], "counts": "é€"}, "need all of them"),
        ({"size": [12, 20], "counts": ""}, "need all of them"),
        ({"size": [12, 20], "counts": "`"}, "need all of them"),
        ({"size": [12, 20], "counts": "ooooooooooooooooooooo0"}, "need all of them"),
        ([[1, 2, 3, 4]], "need x0, y0, x1, y1, ... of three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "need x0, y0, x1, y1, ... of three points"),
        ([[1, 2, 3, 4, 5, "6"]], "need x0, y0, x1, y1, ... of three points"),
        ([1, 2, 3, 4, 5, 6], "need x0, y0, x1, y1, ... of three points"),
        ([[1, 2, 3, 4, 5, 1e12]], "need the image that it was drawn on"),
    ],
)
def test_a_bad_outline_is_named(segmentation: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=f"annotation 0.*{message}"):
        read_dataset(write(tmp_path, [{"segmentation": segmentation}]), mpp=0.25)


def test_masks_without_a_pixel_are_counted(tmp_path: Path) -> None:
    """Outside the image, smaller than a pixel, or empty run lengths."""
    outside, small = [[22, 2, 25, 2, 25, 5]], [[1.5, 1.5, 1.6, 1.5, 1.6, 1.6]]
    empty = {"size": [12, 20], "counts": [240]}
    drawn = [{"segmentation": s} for s in (outside, [[2, 2, 8, 2, 8, 8]], small, empty)]
    found = read_dataset(write(tmp_path, drawn), mpp=0.25)
    assert found.skipped == {"outside the image, or too small to have a pixel": 3}
    assert len(only(found).class_index) == 1


def test_infinite_vertices_and_other_images_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"segmentation": [[1, 2, 3, 4, 5, 77]]}])
    path.write_text(path.read_text().replace("77", "NaN"))
    with pytest.raises(AnnotationError, match="holds NaN"):
        read_dataset(path, mpp=0.25)
    path.write_text(path.read_text().replace("NaN", "1e999"))
    with pytest.raises(AnnotationError, match="need the image that it was drawn on"):
        read_dataset(path, mpp=0.25)
    path = write(tmp_path, [], **image(width=21))
    with pytest.raises(AnnotationError, match=r"is 20 x 12 px, .* says 21 x 12: need the image that was annotated"):
        read_dataset(path, mpp=0.25).images[0].read()
    path = write(tmp_path, [{"segmentation": [[0, 0, 5, 0, 5, 5]]}])
    (tmp_path / "dataset.json").write_text('{"mpp": 0.25, "classes": ["c", "b", "a", "d"]}')
    assert read_dataset(path).classes == ("c", "b", "a", "d")
    (tmp_path / "dataset.json").write_text('{"mpp": 0.25, "classes": ["c"]}')
    with pytest.raises(AnnotationError, match=r"objects of class 'a', dataset.json names c"):
        read_dataset(path)
