"""Every form that is drawn as pixels, written by the test as its source publishes it, reads back equal."""

import contextlib
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.io import savemat
from scipy.sparse import csc_array

from pipeline.errors import AnnotationError
from training.data.datasets import read_dataset
from training.data.mat5 import read_mat
from training.data.sample import Dataset, LabelledImage

Ints = NDArray[np.uint16]

MAPS = arrays(
    np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 0, 1, 2, 7, 300])
)
SIDE = st.integers(0, 4)
RGB = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)


def numbered(labels: Ints) -> NDArray[np.int64]:
    return np.searchsorted(np.unique(np.r_[0, labels.ravel()]), labels)


def save(path: Path, values: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def only(found: Dataset) -> LabelledImage:
    (annotated,) = found.images
    read = pickle.loads(pickle.dumps(annotated)).read()
    assert isinstance(read, LabelledImage)
    assert len(read.class_index) == read.labels.max()
    return read


def maps(folder: Path, labels: Ints, classes: NDArray[np.uint8] | None = None) -> Path:
    save(folder / "images" / "x_1.png", RGB[: labels.shape[0], : labels.shape[1]])
    save(folder / "labels" / "x_1.png", labels)
    if classes is not None:
        save(folder / "classes" / "x_1.png", classes)
    return folder


@settings(max_examples=30)
@given(labels=MAPS, of=st.lists(st.integers(1, 3), min_size=301, max_size=301), data=st.data())
def test_folders_of_maps_read_back(
    labels: Ints, of: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A nucleus is of the class of most of its pixels; background among them does not count."""
    classes = np.array(of, np.uint8)[labels] * (labels > 0)
    for number in np.unique(labels[labels > 0]):
        if (labels == number).sum() > 2:  # one pixel of another class or none changes nothing
            place = tuple(np.argwhere(labels == number)[0])
            classes[place] = data.draw(st.integers(0, 3))
    folder = maps(tmp_path_factory.mktemp("maps"), labels, classes)
    found = read_dataset(folder, mpp=0.25)
    read = only(found)
    np.testing.assert_array_equal(read.labels, numbered(labels))
    np.testing.assert_array_equal(read.image, RGB[: labels.shape[0], : labels.shape[1]])
    assert read.class_index.tolist() == [of[n] for n in np.unique(labels) if n]
    assert found.classes == (tuple(map(str, range(1, classes.max() + 1))) or ("Nucleus",))
    for path in (folder / "classes").iterdir():
        path.unlink()
    (folder / "classes").rmdir()
    assert set(only(read_dataset(folder, mpp=0.25)).class_index) <= {1}


def test_the_classes_of_numbers_are_named_by_dataset_json(tmp_path: Path) -> None:
    maps(tmp_path, np.array([[1, 2]], np.uint16), np.array([[2, 1]], np.uint8))
    (tmp_path / "dataset.json").write_text('{"mpp": 0.25, "classes": ["epithelial", "immune", "unseen"]}')
    assert read_dataset(tmp_path).classes == ("epithelial", "immune", "unseen")
    (tmp_path / "dataset.json").write_text('{"mpp": 0.25, "classes": ["epithelial"]}')
    with pytest.raises(AnnotationError, match=r"objects of class 2, dataset.json names 1 classes"):
        read_dataset(tmp_path)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    labels = np.array([[1, 2]], np.uint16)
    folder = maps(tmp_path / "a", labels, np.array([[2, 0]], np.uint8))
    with pytest.raises(AnnotationError, match="gives nucleus 2 no class"):
        read_dataset(folder, mpp=0.25).images[0].read()
    save(folder / "classes" / "x_1.png", np.ones((2, 2), np.uint8))
    with pytest.raises(AnnotationError, match="need one class per pixel"):
        read_dataset(folder, mpp=0.25).images[0].read()
    save(folder / "classes" / "x_1.png", np.full((1, 2), 300, np.uint16))
    with pytest.raises(AnnotationError, match="has objects of class 300: need classes of 1 to 255"):
        read_dataset(folder, mpp=0.25)
    (folder / "classes" / "x_1.png").unlink()
    with pytest.raises(
        AnnotationError,
        match=r"'x_1' has no labels: need a file of its name, in \.png, \.tif, \.tiff",
    ):
        read_dataset(folder, mpp=0.25)
    (folder / "classes").rmdir()
    extra = save(folder / "labels" / "y.png", labels)
    with pytest.raises(AnnotationError, match=r"'y' has no image: need a file of its name, in \.bmp, "):
        read_dataset(folder, mpp=0.25)
    extra.rename(folder / "labels" / ".hidden.png")
    save(folder / "images" / "x_1.jpg", RGB)
    with pytest.raises(AnnotationError, match=r"'x_1' is both .*jpg and .*png"):
        read_dataset(folder, mpp=0.25)
    (folder / "images" / "x_1.jpg").unlink()
    save(folder / "labels" / "x_1.png", RGB)
    with pytest.raises(AnnotationError, match="one label per pixel"):
        read_dataset(folder, mpp=0.25).images[0].read()
    for part in ("images", "labels"):
        save(folder / "labels" / "x_1.png", labels)
        (folder / part / "x_1.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
        with pytest.raises(AnnotationError, match=rf"{part}/x_1.png is (a damaged|not a)"):
            read_dataset(folder, mpp=0.25).images[0].read()


def test_a_background_that_is_numbered_is_said(tmp_path: Path) -> None:
    """As of a map that counts it from 1, or of a palette in another order: it were a nucleus, without a word."""
    labels = np.zeros((60, 60), np.uint16)
    labels[::6, ::6] = np.arange(1, 101).reshape(10, 10)
    save(tmp_path / "images" / "a.png", np.full((60, 60, 3), 200, np.uint8))
    save(tmp_path / "labels" / "a.png", labels)
    assert read_dataset(tmp_path, mpp=4).describe_nuclei() == []
    save(tmp_path / "labels" / "a.png", labels + np.uint16(1))
    assert read_dataset(tmp_path, mpp=4).describe_nuclei() == [
        f"{tmp_path.name}: a nucleus of 'a' has 3,500 px, 3,500 times the median of its nuclei: is it the background, "
        "which needs the number 0, or an area?"
    ]


def test_a_map_in_several_pages_is_refused(tmp_path: Path) -> None:
    """Its first page may be of another plane, without a nucleus. Reduced copies, as pyramids have, are none."""
    folder = maps(tmp_path, np.array([[1, 2], [3, 0]], np.uint16))
    (folder / "labels" / "x_1.png").unlink()
    path = folder / "labels" / "x_1.tif"
    whole, reduced = (Image.fromarray(np.ones((n, n), np.uint16)) for n in (2, 1))
    whole.save(path, save_all=True, append_images=[reduced])
    assert len(read_dataset(folder, mpp=0.25).images[0].read().class_index) == 1
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(path, save_all=True, append_images=[whole])
    with pytest.raises(AnnotationError, match=r"x_1\.tif has 2 pages of one size, of which one would"):
        read_dataset(folder, mpp=0.25).images[0].read()


def test_a_hidden_file_makes_no_dataset_of_matlab(tmp_path: Path) -> None:
    """macOS writes ._x_1.mat beside x_1.mat, and leaves it where that is moved away."""
    (maps(tmp_path, np.eye(4, dtype=np.uint16)) / "labels" / "._x_1.mat").touch()
    assert len(only(read_dataset(tmp_path, mpp=0.25)).class_index) == 1


@pytest.mark.parametrize(("tag", "becomes"), [(256, (300, 3, 1, 2)), (259, (259, 3, 1, 98))])  # width, compression
def test_a_map_whose_second_page_is_damaged_is_refused(tag: int, becomes: tuple[int, ...], tmp_path: Path) -> None:
    """Pillow lets the errors of its parser through there: TypeError and KeyError."""
    path = save(maps(tmp_path, np.eye(4, dtype=np.uint16)) / "labels" / "x_1.png", RGB[:4, :4, 0]).with_suffix(".tif")
    path.with_suffix(".png").unlink()
    pages = [Image.fromarray(np.zeros((side, side), np.uint16)) for side in (4, 2)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    content, at = bytearray(path.read_bytes()), 4
    for _ in pages:
        first = struct.unpack_from("<I", content, at)[0] + 2
        at = first + 12 * struct.unpack_from("<H", content, first - 2)[0]  # where the next page's directory is stated
    entry = next(e for e in range(first, at, 12) if struct.unpack_from("<H", content, e)[0] == tag)
    struct.pack_into("<HHII", content, entry, *becomes)
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=r"x_1\.tif is not a readable image .*: copy it again"):
        only(read_dataset(tmp_path, mpp=0.25))


def test_a_large_map_is_no_reason_for_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large image is none."""
    folder = maps(tmp_path, np.array([[1, 2], [3, 0]], np.uint16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    assert len(read_dataset(folder, mpp=0.25).images[0].read().class_index) == 3


def test_a_map_of_more_pixels_than_pillow_reads_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = maps(tmp_path, np.array([[1, 2], [3, 0]], np.uint16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # it refuses more than twice as many
    with pytest.raises(AnnotationError, match=r"x_1\.png is too large .*: cut the image and its map into parts"):
        read_dataset(folder, mpp=0.25).images[0].read()


def test_a_map_of_64_bits_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = maps(tmp_path, np.array([[1, 2], [3, 0]], np.uint16))
    (folder / "labels" / "x_1.png").unlink()
    tifffile.imwrite(folder / "labels" / "x_1.tif", np.ones((2, 2), np.int64))
    with pytest.raises(AnnotationError, match="or save it as PNG or TIFF of 8, 16 or 32 bits"):
        read_dataset(folder, mpp=0.25).images[0].read()


@pytest.mark.parametrize("orientation", range(9))
def test_a_map_in_tiff_is_read_as_it_is_stored(orientation: int, tmp_path: Path) -> None:
    """As its image is; and also where the tag says that 0 is white, as ImageJ saves masks."""
    labels = np.array([[1, 2, 2], [3, 0, 0], [0, 0, 4]], np.uint16)
    folder = maps(tmp_path, labels)
    (folder / "labels" / "x_1.png").unlink()
    for photometric in ("minisblack", "miniswhite"):
        for values in (labels, labels.astype(np.uint8)):
            tifffile.imwrite(
                folder / "labels" / "x_1.tif",
                values,
                photometric=photometric,
                extratags=[(274, "H", 1, orientation, True)],
            )
            np.testing.assert_array_equal(only(read_dataset(folder, mpp=0.25)).labels, labels)


def test_a_map_in_colours_of_16_bits_is_refused(tmp_path: Path) -> None:
    """Pillow reads the upper 8 bits: numbers below 256 would be background, others would fall together."""
    labels = np.array([[1, 2, 0], [0, 300, 301]], np.uint16)
    folder = maps(tmp_path, labels)
    (folder / "labels" / "x_1.png").unlink()
    tifffile.imwrite(folder / "labels" / "x_1.tif", np.stack([labels] * 3, 2), photometric="rgb")
    with pytest.raises(AnnotationError, match=r"x_1\.tif has 16 bits a channel, .*: save it with one channel, grey"):
        read_dataset(folder, mpp=0.25).images[0].read()


def test_a_binary_mask_is_no_map_of_one_nucleus(tmp_path: Path) -> None:
    """Of a few pieces it may be one: an annotation that something lies across."""
    mask = np.zeros((9, 9), np.uint16)
    mask[::2, ::2] = 255
    (one,) = read_dataset(maps(tmp_path / "mask", mask), mpp=0.25).images
    with pytest.raises(AnnotationError, match="is a mask: its 25 pieces have one number, 255: need another number"):
        one.read()
    save(tmp_path / "mat" / "Images" / "x_1.png", RGB)
    (tmp_path / "mat" / "Labels").mkdir()
    savemat(tmp_path / "mat" / "Labels" / "x_1.mat", {"inst_map": mask > 0})
    (one,) = read_dataset(tmp_path / "mat", mpp=0.25).images
    with pytest.raises(AnnotationError, match=r"x_1\.mat: inst_map is a mask: its 25 pieces have one number, 1: need"):
        one.read()
    mask[:, 2:] = 0
    dataset = read_dataset(maps(tmp_path / "pieces", mask), mpp=2)
    assert len(dataset.images[0].read().class_index) == 1
    assert dataset.describe_nuclei() == [
        "pieces: the first images have 1 nucleus in 5 separate pieces: need another number for each nucleus; are they "
        "masks of 0 and 1?"
    ]
    mask[::2] = np.arange(1, 6)[:, None] * (mask[::2] > 0)
    assert read_dataset(maps(tmp_path / "numbered", mask), mpp=2).describe_nuclei() == []


@settings(max_examples=30)
@given(mask=arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 255])))
def test_binary_masks_are_taken_apart_corners_joined(
    mask: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TNBC's layout; what touches at a corner only is one nucleus."""
    folder = tmp_path_factory.mktemp("tnbc")
    save(folder / "Slide_03" / "03_2.png", RGB[: mask.shape[0], : mask.shape[1]])
    in_colour = np.dstack([mask] * 3)
    for drawn in (mask, in_colour):
        save(folder / "GT_03" / "03_2.png", drawn)
        read = only(read_dataset(folder, mpp=0.25))
        expected, count = ndimage.label(mask, np.ones((3, 3)))
        np.testing.assert_array_equal(read.labels, expected)
        assert len(read.class_index) == count
    assert read_dataset(folder, mpp=0.25).images[0][:2] == ("03_2", "03")


def test_numbered_masks_keep_their_numbers(tmp_path: Path) -> None:
    labels = np.array([[1, 5, 0, 1]], np.uint8)
    save(tmp_path / "Slide_01" / "01_1.png", RGB[:1, :4])
    save(tmp_path / "GT_01" / "01_1.png", labels)
    assert only(read_dataset(tmp_path, mpp=0.25)).labels.tolist() == [[1, 2, 0, 1]]
    (tmp_path / "Slide_02").mkdir()
    with pytest.raises(AnnotationError, match="has no GT_02: need both"):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "GT_02").mkdir()
    save(tmp_path / "GT_02" / "02_1.png", labels)
    with pytest.raises(AnnotationError, match="'02_1' has no image"):
        read_dataset(tmp_path, mpp=0.25)


LAYERS = arrays(np.uint8, (2, 4, 5, 6), elements=st.sampled_from([0, 0, 0, 1, 2, 9]))


@settings(max_examples=30)
@given(layers=LAYERS, dtype=st.sampled_from([np.float64, np.uint8, np.int32]))
def test_pannuke_reads_back(layers: NDArray[np.uint8], dtype: type, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every (channel, number) is a nucleus of the channel's class; the later channel has what two claim."""
    folder = tmp_path_factory.mktemp("Fold 1")
    beside = {"images": folder / "images" / "fold1", "masks": folder / "masks" / "fold1"}
    for path in beside.values():
        path.mkdir(parents=True)
    images: NDArray[Any] = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(dtype)
    np.save(beside["images"] / "images.npy", images)
    np.save(beside["masks"] / "masks.npy", layers.astype(dtype))
    np.save(beside["images"] / "types.npy", np.array(["Breast", "Bile-duct"]))
    found = read_dataset(folder, mpp=0.25)
    assert [a[:2] for a in found.images] == [("fold1_00000", "Breast"), ("fold1_00001", "Bile-duct")]
    assert found.classes == ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
    for index, annotated in enumerate(found.images):
        read = pickle.loads(pickle.dumps(annotated)).read()
        np.testing.assert_array_equal(read.image, images[index])
        top = np.zeros((4, 5, 2), int)  # channel and number that each pixel belongs to
        for channel in range(5):
            top = np.where(layers[index, ..., channel, None] > 0, [channel + 1, 0], top)
            top[..., 1] = np.where(layers[index, ..., channel] > 0, layers[index, ..., channel], top[..., 1])
        kept = sorted({tuple(t) for t in top.reshape(-1, 2) if t[0]})
        assert read.class_index.tolist() == [channel for channel, _ in kept]
        np.testing.assert_array_equal(
            read.labels, [[kept.index(tuple(t)) + 1 if t[0] else 0 for t in row] for row in top]
        )
        assert read.contested_px == ((layers[index, ..., :5] > 0).sum(-1) > 1).sum()


def test_bad_arrays_are_named_and_never_unpickled(tmp_path: Path) -> None:
    def put(images: NDArray[Any], masks: NDArray[Any] | None, types: NDArray[Any] | None = None) -> Path:
        for name, values in (("images", images), ("masks", masks), ("types", types)):
            (tmp_path / f"{name}.npy").unlink(missing_ok=True)
            if values is not None:
                np.save(tmp_path / f"{name}.npy", values)
        return tmp_path

    images, masks = np.full((1, 4, 4, 3), 9.0), np.zeros((1, 4, 4, 6))
    assert only(read_dataset(put(images, masks), mpp=0.25)).labels.sum() == 0
    assert read_dataset(tmp_path, mpp=0.25).images[0][:2] == ("00000", "")
    (tmp_path / "dataset.json").write_text('{"classes": ["a"]}')
    with pytest.raises(AnnotationError, match="a channel for each of a, and background"):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "dataset.json").unlink()
    for bad, message in (
        ((images, None), r"has no masks: need [^ ]*masks\.npy$"),
        ((images, masks[..., :5]), r"need \(N, height, width, 3\)"),
        ((images, masks, np.array(["Breast"], dtype=object)), "never unpickled: save a plain array"),
        ((images, masks.astype(object)), "never unpickled"),
        ((images, masks, np.array(["Breast", "Colon"])), "need 1 texts"),
        ((images + 1j, masks), "complex128.*need numbers"),
        ((images, masks > 0), "masks.npy bool: need numbers, another one for each nucleus"),
        ((images[:, :0], masks[:, :0]), r"is \(1, 0, 4, 3\).*need \(N, height, width, 3\)"),
    ):
        with pytest.raises(AnnotationError, match=message):
            read_dataset(put(*bad), mpp=0.25)
    for bad, message in (
        ((images / 255, masks), "need colours of 0 to 255"),
        ((images * np.nan, masks), "need colours of 0 to 255"),
        ((images, masks + 0.5), r"masks.npy\[0\]: the labels hold fractions"),
    ):
        with pytest.raises(AnnotationError, match=message):
            read_dataset(put(*bad), mpp=0.25).images[0].read()
    (tmp_path / "images.npy").write_bytes(b"nothing")
    with pytest.raises(AnnotationError, match="not a readable array"):
        read_dataset(tmp_path, mpp=0.25)


def test_masks_of_pannuke_that_number_no_nuclei_are_refused(tmp_path: Path) -> None:
    """All of a class would be one nucleus."""
    masks = np.zeros((1, 20, 20, 6), np.uint8)
    masks[0, ::3, ::3, 2] = 1
    np.save(tmp_path / "images.npy", np.full((1, 20, 20, 3), 9, np.uint8))
    np.save(tmp_path / "masks.npy", masks)
    with pytest.raises(
        AnnotationError, match=r"masks\.npy\[0\]: channel 2 is a mask: its 49 pieces have one number, 1"
    ):
        read_dataset(tmp_path, mpp=0.25).images[0].read()


def put_conic(folder: Path, images: NDArray[Any], labels: NDArray[Any], info: str | None = None) -> Path:
    """As the training set of the challenge lies in its folder."""
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "counts.csv").write_text("neutrophil,epithelial,lymphocyte,plasma,eosinophil,connective\n")
    (folder / "patch_info.csv").unlink(missing_ok=True)
    if info is not None:
        (folder / "patch_info.csv").write_text(info)
    return folder


@settings(max_examples=20)
@given(
    labels=arrays(np.uint16, (2, 256, 256), elements=st.sampled_from([0, 1, 2, 7, 300]), fill=st.just(0)),
    of=st.lists(st.integers(1, 6), min_size=301, max_size=301),
    dtype=st.sampled_from([np.uint16, np.int32, np.float64]),
)
def test_conic_reads_back(labels: Ints, of: list[int], dtype: type, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Channel 0 numbers the nuclei, channel 1 has their classes; patch_info.csv says what each was cut from."""
    folder = tmp_path_factory.mktemp("conic")
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    types = np.array(of)[labels] * (labels > 0)
    put_conic(folder, images, np.stack([labels, types], 3).astype(dtype), "patch_info\nconsep_1-0000\ndpath_12-0013\n")
    found = read_dataset(folder, mpp=0.5)
    assert [a[:2] for a in found.images] == [("00000", "consep_1"), ("00001", "dpath_12")]
    assert found.classes == ("Neutrophil", "Epithelial", "Lymphocyte", "Plasma", "Eosinophil", "Connective")
    for index, annotated in enumerate(found.images):
        read = pickle.loads(pickle.dumps(annotated)).read()
        np.testing.assert_array_equal(read.image, images[index])
        np.testing.assert_array_equal(read.labels, numbered(labels[index]))
        assert read.class_index.tolist() == [of[n] for n in np.unique(labels[index]) if n]
    assert not found.unread


def test_bad_arrays_of_conic_are_named_and_never_unpickled(tmp_path: Path) -> None:
    images, labels = np.full((1, 4, 4, 3), 9, np.uint8), np.zeros((1, 4, 4, 2), np.uint16)
    assert only(read_dataset(put_conic(tmp_path, images, labels), mpp=0.5)).labels.sum() == 0
    assert read_dataset(tmp_path, mpp=0.5).images[0][:2] == ("00000", "")
    for bad, message in (
        (
            (images, labels[..., :1]),
            r"need \(N, height, width, 3\) and \(N, height, width, 2\), a map of nuclei and one",
        ),
        ((images[:, :0], labels[:, :0]), r"is \(1, 0, 4, 3\).*need \(N, height, width, 3\)"),
        ((images, labels.astype(object)), r"labels\.npy holds Python objects, which are never unpickled"),
        ((images.astype(object), labels), r"images\.npy holds Python objects, which are never unpickled"),
        ((images, labels > 0), r"labels\.npy bool: need numbers"),
        ((images, labels, "patch_info\na_1-0\na_1-1\n"), r"patch_info\.csv has 2 rows for 1 images: need one for each"),
        ((images, labels, "other\na_1-0\n"), r"patch_info\.csv is no table with a column patch_info"),
    ):
        with pytest.raises(AnnotationError, match=message):
            read_dataset(put_conic(tmp_path, *bad), mpp=0.5)
    nucleus = labels.copy()
    nucleus[0, 0, 0] = 5, 7
    mask = np.zeros((1, 20, 20, 2), np.uint16)
    mask[0, ::3, ::3] = 1
    for bad, message in (
        ((images / 255, labels), "need colours of 0 to 255"),
        ((images, nucleus), r"labels\.npy\[0\]: channel 1 has a nucleus of class 7: need 1 to 6"),
        ((images, nucleus * [1, 0]), r"labels\.npy\[0\]: channel 1 gives nucleus 5 no class"),
        ((images, nucleus + 0.5), r"labels\.npy\[0\]: the labels hold fractions"),
        (
            (np.full((1, 20, 20, 3), 9), mask),
            r"labels\.npy\[0\]: channel 0 is a mask: its 49 pieces have one number, 1",
        ),
    ):
        with pytest.raises(AnnotationError, match=message):
            read_dataset(put_conic(tmp_path, *bad), mpp=0.5).images[0].read()


def test_arrays_of_pannuke_with_other_labels_beside_are_pannukes(tmp_path: Path) -> None:
    put_conic(tmp_path, np.full((1, 4, 4, 3), 9, np.uint8), np.zeros((1, 4, 4, 3)))
    np.save(tmp_path / "masks.npy", np.zeros((1, 4, 4, 6)))
    assert read_dataset(tmp_path, mpp=0.25).classes[0] == "Neoplastic"


@settings(max_examples=30)
@given(
    labels=MAPS,
    image=st.sampled_from(["000_img.png", "000.png", "000.tif"]),
    masks=st.sampled_from(["000_masks.png", "000_masks.tif"]),
    place=st.sampled_from(["", "train"]),
)
def test_cellpose_reads_back(
    labels: Ints, image: str, masks: str, place: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever Cellpose has written beside its masks."""
    folder = tmp_path_factory.mktemp("cellpose")
    save(folder / place / image, RGB[: labels.shape[0], : labels.shape[1]])
    save(folder / place / masks, labels)
    for name in ("cp_masks", "flows", "outlines"):
        save(folder / place / f"{Path(image).stem}_{name}.png", RGB)
    (folder / place / f"{Path(image).stem}_seg.npy").write_bytes(b"never opened")
    (folder / "models").mkdir()
    found = read_dataset(folder, mpp=0.25)
    assert [a[:2] for a in found.images] == [(f"{place}_000" if place else "000", place)]
    assert found.classes == ("Nucleus",)
    (said,) = found.describe_skipped()
    assert said.endswith(": 1 object skipped: <id>_seg.npy, which is never unpickled: its _masks are read")
    read = only(found)
    np.testing.assert_array_equal(read.image, RGB[: labels.shape[0], : labels.shape[1]])
    np.testing.assert_array_equal(read.labels, numbered(labels))


class Unpickled:
    """Raises where a file that holds it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def test_bad_folders_of_cellpose_are_named_and_never_unpickled(tmp_path: Path) -> None:
    labels = np.array([[1, 2], [0, 0]], np.uint16)
    save(tmp_path / "a_img.png", RGB[:2, :2])
    with pytest.raises(AnnotationError, match=r"<id>\.png with <id>_masks\.png \(Cellpose\)"):
        read_dataset(tmp_path, mpp=0.25)
    np.save(tmp_path / "a_img_seg.npy", np.array({"masks": Unpickled()}, dtype=object))
    with pytest.raises(
        AnnotationError,
        match=r"a_img_seg\.npy holds Python objects, so it is never unpickled: save the masks as PNG or TIFF in",
    ):
        read_dataset(tmp_path, mpp=0.25)
    save(tmp_path / "b.png", RGB[:2, :2])
    save(tmp_path / "b_masks.png", labels)
    with pytest.raises(AnnotationError, match=r"a_img\.png has no masks, as \S*a_img_seg\.npy is never unpickled: "):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "a_img_seg.npy").unlink()
    with pytest.raises(AnnotationError, match=r"a_img\.png has no masks: need a_masks in \.png, \.tif, \.tiff"):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "a_img.png").rename(tmp_path / "b_img.png")
    with pytest.raises(AnnotationError, match=r"'b' is both \S*b\.png and \S*b_img\.png: need one"):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "b_img.png").unlink()
    (tmp_path / "dataset.json").write_text('{"classes": ["a", "b"]}')
    with pytest.raises(AnnotationError, match="names 2 classes, but masks of Cellpose have none"):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "dataset.json").unlink()
    save(tmp_path / "c_masks.png", labels)
    with pytest.raises(AnnotationError, match=r"c_masks\.png has no image: need c or c_img in \.bmp, "):
        read_dataset(tmp_path, mpp=0.25)
    (tmp_path / "c_masks.png").unlink()
    save(tmp_path / "b_masks.png", np.zeros((9, 9), np.uint8) + (np.indices((9, 9)) % 2 == 0).all(0).astype(np.uint8))
    with pytest.raises(AnnotationError, match=r"b_masks\.png is a mask: its 25 pieces have one number, 1"):
        read_dataset(tmp_path, mpp=0.25).images[0].read()


@settings(max_examples=30)
@given(labels=MAPS, of=st.lists(st.integers(1, 6), min_size=301, max_size=301), seed=st.integers(0, 99))
def test_lizard_reads_back(labels: Ints, of: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its `class` is in the order of its `id`, which may be any, and may have a nucleus without a pixel."""
    folder = tmp_path_factory.mktemp("lizard")
    ids = np.random.default_rng(seed).permutation([*np.unique(labels[labels > 0]), 299])
    save(folder / "images" / "consep_1.png", RGB[: labels.shape[0], : labels.shape[1]])
    (folder / "labels").mkdir()
    content = {"inst_map": labels.astype(np.int32), "id": ids[:, None], "class": np.array(of)[ids][:, None]}
    savemat(folder / "labels" / "consep_1.mat", {**content, "bbox": np.ones((len(ids), 4)), "centroid": ids + 0.5})
    read = only(read_dataset(folder, mpp=0.5))
    np.testing.assert_array_equal(read.labels, numbered(labels))
    assert read.class_index.tolist() == [of[n] for n in np.unique(labels) if n]


@settings(max_examples=30)
@given(
    labels=MAPS,
    of=st.lists(st.integers(1, 4), min_size=301, max_size=301),
    by=st.sampled_from(["map", "list", "class", ""]),
)
def test_matlab_files_read_back(labels: Ints, of: list[int], by: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """CoNSeP has a class per pixel and per nucleus, in rising order of the numbers; CPM has none."""
    folder = tmp_path_factory.mktemp("consep")
    numbers = np.unique(labels[labels > 0])
    class_index = [of[n] for n in numbers]
    content: dict[str, Any] = {"inst_map": labels.astype(float)}
    if by == "map":
        content["type_map"] = (np.array(of)[labels] * (labels > 0)).astype(float)
    elif by:
        content["inst_type" if by == "list" else by] = np.array(class_index, float).reshape(-1, 1)
    save(folder / "Images" / "train_1.png", RGB[: labels.shape[0], : labels.shape[1]])
    (folder / "Labels").mkdir()
    savemat(folder / "Labels" / "train_1.mat", content)
    found = read_dataset(folder, mpp=0.25)
    read = only(found)
    np.testing.assert_array_equal(read.labels, numbered(labels))
    assert read.class_index.tolist() == (class_index if by else [1] * len(class_index))
    assert found.classes == (tuple(map(str, range(1, max(class_index) + 1))) if by and class_index else ("Nucleus",))


@given(
    values=arrays(st.sampled_from(["u1", "i2", "u2", "i4", "f4", "f8", "i8", "?"]), st.tuples(SIDE, SIDE, SIDE)),
    compressed=st.booleans(),
)
def test_matlab_arrays_are_what_scipy_wrote(
    values: NDArray[Any], compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mat") / "a.mat"
    savemat(path, {"other": "text", "mine": values, "cells": [{"a": 1}]}, do_compression=compressed)
    (read,) = read_mat(path, ["mine", "absent"]).values()
    np.testing.assert_array_equal(read, values)


@settings(max_examples=150)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    stop=st.integers(0, 10_000),
    compressed=st.booleans(),
)
def test_no_damaged_matlab_file_brings_us_down(
    changes: list[tuple[int, int]], stop: int, compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law: what is read are arrays, or an error that is meant."""
    path = tmp_path_factory.mktemp("mat") / "a.mat"
    savemat(path, {"inst_map": np.eye(5), "inst_type": np.ones((5, 1), np.uint8)}, do_compression=compressed)
    damaged = bytearray(path.read_bytes())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path.write_bytes(damaged[: max(stop, 1)])
    with contextlib.suppress(AnnotationError):
        assert all(isinstance(v, np.ndarray) for v in read_mat(path, ["inst_map", "inst_type"]).values())


def test_compressed_arrays_in_one_another_are_damage(tmp_path: Path) -> None:
    path, packed = tmp_path / "a.mat", b"\0" * 8
    for _ in range(3000):
        packed = zlib.compress(packed, 1)
        packed = struct.pack("<II", 15, len(packed)) + packed
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + packed)
    with pytest.raises(AnnotationError, match="a compressed array within another"):
        read_mat(path, ["inst_map"])


def test_bad_matlab_files_are_named(tmp_path: Path) -> None:
    save(tmp_path / "Images" / "a.png", RGB[:2, :2])
    (tmp_path / "Labels").mkdir()
    path = tmp_path / "Labels" / "a.mat"
    labels = np.array([[1, 2], [2, 0]])
    for content, message in (
        ({"other": labels}, "a.mat holds no inst_map: need the map of nuclei by that name"),
        ({"inst_map": labels - 3}, "need 0 to"),
        ({"inst_map": labels, "inst_type": np.array([[1]])}, "inst_type has 1 classes for 2 nuclei"),
        ({"inst_map": labels, "inst_type": np.array([[1], [300]])}, "class 300: need classes of 1 to 255"),
        ({"inst_map": labels, "class": np.array([[1]])}, "a.mat: class has 1 classes for 2 nuclei"),
        ({"inst_map": labels, "class": [1, 2], "id": [2, 3]}, "a.mat: id lacks nucleus 1 of inst_map: need the class"),
        ({"inst_map": labels, "class": [1, 2], "id": [2]}, "class has 2 classes, id 1 different numbers: need one"),
        ({"inst_map": labels, "class": [1, 2], "id": [2, 2]}, "class has 2 classes, id 1 different numbers: need one"),
        ({"inst_map": labels, "type_map": labels[:1]}, "type_map is .* need one class per pixel"),
        ({"inst_map": labels, "type_map": labels * 0}, "type_map gives nucleus 1 no class"),
    ):
        savemat(path, content)
        with pytest.raises(AnnotationError, match=message):
            read_dataset(tmp_path, mpp=0.25)
    savemat(path, {"inst_map": labels, "inst_type": np.array([[1], [3]])})
    (tmp_path / "dataset.json").write_text('{"classes": ["a", "b"]}')
    with pytest.raises(AnnotationError, match="class 0 or above 2"):
        read_dataset(tmp_path, mpp=0.25).images[0].read()
    (tmp_path / "dataset.json").unlink()
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\0" * 400)
    with pytest.raises(AnnotationError, match="save it with -v7"):
        read_dataset(tmp_path, mpp=0.25)
    path.write_bytes(b"nothing" * 40)
    with pytest.raises(AnnotationError, match="not a MATLAB file of level 5"):
        read_dataset(tmp_path, mpp=0.25)
    cells = np.array([labels, labels], object)
    for odd, what in (("text", "text"), (csc_array(labels), "a sparse array"), (cells, "a cell array")):
        savemat(path, {"inst_map": odd})
        with pytest.raises(AnnotationError, match=f"a.mat: inst_map is {what}: need a full array of numbers, as full"):
            read_dataset(tmp_path, mpp=0.25)
    savemat(path, {"inst_map": np.ones((3, 3))})
    with pytest.raises(AnnotationError, match="need one label per pixel"):
        read_dataset(tmp_path, mpp=0.25).images[0].read()
