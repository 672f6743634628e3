"""Aperio XML, written as ImageScope writes it, gives the nuclei that were drawn."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipeline.errors import AnnotationError
from training.data.datasets import read_dataset
from training.data.outlines import paint
from training.data.sample import Dataset, LabelledImage

RGB = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
MAPS = arrays(np.uint8, (12, 12), elements=st.sampled_from([0, 0, 1, 2, 3]))
SIDE = st.tuples(st.integers(0, 10), st.integers(1, 4)).map(lambda s: (s[0], min(s[0] + s[1], 11)))
RECTANGLES = st.lists(st.tuples(SIDE, SIDE), max_size=6)


def only(found: Dataset) -> LabelledImage:
    (sample,) = found.images
    return LabelledImage(*pickle.loads(pickle.dumps(sample)).read())


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB).save(path)
    return path


def region(xy: Sequence[tuple[float | str, float | str]], **attributes: str) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in xy)
    stated = "".join(f' {k}="{v}"' for k, v in attributes.items())
    return f'<Region Id="1"{stated}><Attributes/><Vertices>{vertices}</Vertices></Region>'


def layer(regions: list[str], name: str = "", attribute: str = "Description") -> str:
    return (
        f'<Annotation Id="1" Name="{name}"><Attributes><Attribute Name="{attribute}" Id="0" Value=""/></Attributes>'
        f"<Regions><RegionAttributeHeaders/>{''.join(regions)}</Regions></Annotation>"
    )


def aperio(path: Path, *layers: str, mpp: str = "0.252000") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<Annotations MicronsPerPixel="{mpp}">{"".join(layers)}</Annotations>')
    return path


def corners(rectangle: tuple[tuple[int, int], tuple[int, int]]) -> list[tuple[float, float]]:
    (x0, x1), (y0, y1) = rectangle
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@settings(max_examples=40)
@given(first=RECTANGLES, second=RECTANGLES)
def test_regions_hold_the_centres_on_their_outline(
    first: list[Any], second: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Vertices are centres of pixels, later regions overwrite earlier ones, a layer's name is the class."""
    folder = tmp_path_factory.mktemp("monuseg")
    layers = [layer(list(map(region, map(corners, rs))), name=n) for rs, n in ((first, "t"), (second, ""))]
    aperio(folder / "Annotations" / "TCGA-A7-1.xml", *layers)
    picture(folder / "Tissue Images" / "TCGA-A7-1.tif")
    painted, claims = np.zeros((12, 12), int), np.zeros((12, 12), int)
    for number, ((x0, x1), (y0, y1)) in enumerate([*first, *second], 1):
        painted[y0 : y1 + 1, x0 : x1 + 1] = number
        claims[y0 : y1 + 1, x0 : x1 + 1] += 1
    found = read_dataset(folder)
    read = only(found)
    kept = np.unique(painted[painted > 0])
    np.testing.assert_array_equal(read.labels, np.searchsorted(np.r_[0, kept], painted))
    np.testing.assert_array_equal(read.image, RGB)
    assert found.images[0][:3] == ("TCGA-A7-1", "TCGA-A7", 0.252)
    assert [found.classes[k - 1] for k in read.class_index] == ["t" if n <= len(first) else "Nucleus" for n in kept]
    assert read.contested_px == (claims > 1).sum()


def test_what_is_no_nucleus_is_left_out(tmp_path: Path) -> None:
    triangle = [(1.0, 1.0), (5.0, 1.0), (1.0, 5.0)]
    regions = [region(triangle, NegativeROA="1"), region(triangle[:2]), region([]), region(triangle, NegativeROA="0")]
    path = aperio(tmp_path / "x.xml", layer(regions, attribute="Epithelial"), mpp="0")
    picture(tmp_path / "x.png")
    for data in (tmp_path, path):
        found = read_dataset(data, mpp=0.25)
        assert found.classes == ("Epithelial",)  # as MoNuSAC names them
        assert only(found).class_index.tolist() == [1]
    assert only(read_dataset(path, mpp=0.25)).labels.sum() == 15
    with pytest.raises(AnnotationError, match="states no resolution"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<Annotations>", "is not a readable XML file"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><Annotations/>', "declares a document type"),
        (f"<Annotations>{layer([region([(1, 2), (3, 4), ('NaN', 1)])])}</Annotations>", "need finite numbers"),
        (f"<Annotations>{layer([region([(1, 2), (3, 4), ('1e999', 1)])])}</Annotations>", "need finite numbers"),
        (f"<Annotations>{layer([region([(1, 2), (3, 4), ('', 1)])])}</Annotations>", "need finite numbers"),
        (
            f"<Annotations>{layer([region([(1, 2), (3, 4), (99, 1)])])}</Annotations>",
            "need the image that it was drawn",
        ),
        ("<Other/>", "holds no images"),
    ],
)
def test_bad_xml_is_named(text: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    (tmp_path / "x.xml").write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_dataset(tmp_path, mpp=0.25).images[0].read()


def test_an_annotation_needs_its_one_image(tmp_path: Path) -> None:
    aperio(tmp_path / "x.xml", layer([]))
    with pytest.raises(AnnotationError, match=r"x.xml has no image: need x.tif"):
        read_dataset(tmp_path)
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.tif")
    with pytest.raises(AnnotationError, match="has 2 images"):
        read_dataset(tmp_path)


def test_the_importer_agrees_with_the_label_maps_of_kumar(shared: Path, tmp_path: Path) -> None:
    """Measured: Dice .9992 to .9999, the same nucleus at .9984 to 1.0000 of the nuclear pixels."""
    data = shared / "data" / "kumar"
    truth = {a.id: a for a in read_dataset(data, mpp=0.25).images}
    for xml in (data / "xml").iterdir():
        os.symlink(xml, tmp_path / xml.name)
        os.symlink(data / "images" / f"{xml.stem}.webp", tmp_path / f"{xml.stem}.webp")
    found = read_dataset(tmp_path).images
    assert [(a.id, a.mpp) for a in found] == [(x, 0.252) for x in sorted(p.stem for p in tmp_path.glob("*.xml"))]
    for sample in found:
        read, wanted = sample.read().labels, truth[sample.id].read().labels
        assert read.max() == wanted.max()
        assert ((read == wanted) & (wanted > 0)).sum() > 0.998 * (wanted > 0).sum()
        assert 2 * ((read > 0) & (wanted > 0)).sum() > 0.999 * ((read > 0).sum() + (wanted > 0).sum())


def test_images_without_annotations_are_named(tmp_path: Path) -> None:
    aperio(tmp_path / "Annotations" / "a.xml", layer([region(corners(((2, 5), (2, 5))))]))
    aperio(tmp_path / "Annotations" / "b.xml")
    for name in ("a", "b", "c"):
        picture(tmp_path / "Tissue Images" / f"{name}.png")
    found = read_dataset(tmp_path)
    assert [image.id for image in found.images] == ["a", "b"]
    assert len(found.images[1].read().class_index) == 0
    (line,) = found.describe_skipped()
    assert "1 image without annotations is not read: c.png" in line


def test_nothing_painted_is_nothing() -> None:
    labels, contested = paint(np.empty(0, dtype=object), (3, 4))
    assert (labels.tolist(), contested) == ([[0] * 4] * 3, 0)
