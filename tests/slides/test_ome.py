"""OME-TIFF: its scale, its pyramid, and those that are no RGB."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import jpeg_tiff
from jpeg_tiff import Level
from slides import open_slide
from slides.errors import ScaleUnknown, SlideUnsupported
from slides.geometry import Size
from slides.ome import read_ome

MPP = 0.2521
FORM = (
    '<?xml version="1.0" encoding="UTF-8"?><!-- a comment --><OME xmlns="{schema}"><Image ID="Image:0" Name="case 7">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="8" SizeC="3" SizeZ="1" {size}>'
    '{channels}<TiffData IFD="0"/></Pixels></Image><Image ID="Image:1" Name="label"><Pixels SizeX="4" SizeY="4" '
    'PhysicalSizeX="9" PhysicalSizeY="9"/></Image></OME>'
)
SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
RGB = '<Channel ID="Channel:0:0" SamplesPerPixel="3"/>'


def described(size: str = f'PhysicalSizeX="{MPP}" PhysicalSizeY="{MPP}"', channels: str = RGB) -> str:
    return FORM.format(schema=SCHEMA, size=size, channels=channels)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth colours, uint8 (904, 1304, 3)."""
    coarse = np.random.default_rng(5).integers(80, 220, (13, 18, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((1304, 904), Image.Resampling.BICUBIC))


def smaller(picture: np.ndarray, times: int) -> np.ndarray:
    """The picture reduced so many times: a row or column that is left over is dropped."""
    size = picture.shape[1] // times, picture.shape[0] // times
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def pyramid(
    path: Path,
    picture: np.ndarray,
    *,
    shown: np.ndarray | None = None,
    description: str = "",
    replaced: dict[int, bytes] | None = None,
) -> Path:
    """An OME-TIFF of three levels, the coarse ones of `shown`."""
    half, eighth = (smaller(picture if shown is None else shown, times) for times in (2, 8))
    versions = (Level(half, (128, 128), reduced=True, replaced=replaced or {}), Level(eighth, (128, 128), reduced=True))
    return jpeg_tiff.write(path, Level(picture, (128, 128), description=description or described(), smaller=versions))


@pytest.mark.parametrize(
    ("unit", "micrometres"),
    [("", 1), ("µm", 1), ("\u03bcm", 1), ("nm", 1e-3), ("mm", 1e3), ("cm", 1e4), ("m", 1e6), ("in", 25400)],
)
def test_the_scale_is_that_of_the_first_picture_in_its_unit(unit: str, micrometres: float) -> None:
    stated = " ".join(
        f'PhysicalSize{axis}="{MPP / micrometres!r}"' + (f' PhysicalSize{axis}Unit="{unit}"' if unit else "")
        for axis in "XY"
    )
    ome = read_ome(described(stated))
    assert ome is not None
    assert ome.mpp == pytest.approx((MPP, MPP), rel=1e-12)


@pytest.mark.parametrize(
    "size",
    [
        "",
        f'PhysicalSizeX="{MPP}"',
        'PhysicalSizeX="wide" PhysicalSizeY="high"',
        'PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1" PhysicalSizeYUnit="pixel"',
    ],
)
def test_what_states_no_length_has_no_scale(size: str) -> None:
    ome = read_ome(described(size))
    assert ome is not None
    assert ome.mpp is None


@pytest.mark.parametrize(
    "description",
    ["", "Aperio |MPP = 0.25", "<OME", described()[:-9], '<!DOCTYPE a [<!ENTITY b "c">]>' + described(), "<OME></OME>"],
)
def test_what_is_not_omes_xml_is_passed_over(description: str) -> None:
    assert read_ome(description) is None


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    assert read_ome(text) is None or "<OME" in text
    read_ome("<OME" + text)


def test_an_ome_tiff_has_its_scale_and_its_levels(tmp_path: Path, picture: np.ndarray) -> None:
    with open_slide(pyramid(tmp_path / "case7.ome.tif", picture[:900, :1301])) as slide:
        assert slide.scale == (MPP, MPP, "metadata")
        assert [level.size for level in slide.levels] == [Size(1301, 900), Size(650, 450), Size(162, 112)]
        assert [level.downsample for level in slide.levels] == [1, 1301 / 650, 1301 / 162]


@pytest.mark.parametrize("times", [2, 8])
def test_a_coarse_frame_is_read_from_a_coarse_level(tmp_path: Path, picture: np.ndarray, times: int) -> None:
    """So the tissue of a gigapixel slide is found without decoding all of it."""
    path = pyramid(tmp_path / "case7.ome.tif", picture)
    inverted = pyramid(tmp_path / "inverted.ome.tif", 255 - picture, shown=picture)
    with open_slide(path) as slide, open_slide(inverted) as other:
        frame = slide.frame(times * MPP)
        pixels = slide.read(frame.box, frame).astype(int)
        assert np.abs(pixels - smaller(picture, times)).mean() < 1.5
        assert np.array_equal(other.read(frame.box, frame), pixels)
        assert not slide.read_decodable(frame.box, frame)[1].any()


def test_a_damaged_tile_of_a_coarse_level_is_lost_alone(tmp_path: Path, picture: np.ndarray) -> None:
    path = pyramid(tmp_path / "case7.ome.tif", picture, replaced={7: b"\xff\xd8 damaged"})
    with open_slide(path) as slide:
        frame = slide.frame(2 * MPP)
        _, lost = slide.read_decodable(frame.box, frame)
        assert lost.sum() == 128**2
        assert lost[128:256, 128:256].all()  # tile 7 of six a row


def test_versions_that_are_larger_or_of_another_form_are_no_levels(tmp_path: Path, picture: np.ndarray) -> None:
    small = smaller(picture, 8)
    strange = (
        *(Level(other, (128, 128)) for other in (picture, picture[:113], picture[:, :163], smaller(picture, 2))),
        Level(small, (128, 128), photometric=1),
        Level(smaller(picture, 4), strip=True),
        Level(small, (128, 64)),
    )
    path = jpeg_tiff.write(tmp_path / "case7.ome.tif", Level(smaller(picture, 2), (128, 128), smaller=strange))
    with open_slide(path, mpp=0.5) as slide:
        assert [level.size for level in slide.levels] == [Size(652, 452), Size(163, 113)]


def test_versions_of_a_picture_that_is_left_to_openslide_are_no_levels(tmp_path: Path, picture: np.ndarray) -> None:
    """They might have other colours: here the first picture is shown in others than its tiles' headers say."""
    small = Level(smaller(picture, 4), (128, 128))
    for photometric, levels in ((0, 2), (2, 1)):
        path = jpeg_tiff.write(
            tmp_path / "x.tif", Level(picture, (128, 128), photometric=photometric, smaller=(small,))
        )
        with open_slide(path, mpp=0.5) as slide:
            assert len(slide.levels) == levels


def test_channels_that_are_pictures_of_their_own_are_refused(tmp_path: Path, picture: np.ndarray) -> None:
    """OpenSlide shows the first of them, in grey: fluorescence, or the red of a slide of H&E."""
    channels = '<Channel ID="Channel:0:0"/><Channel ID="Channel:0:1"/><Channel ID="Channel:0:2"/>'
    path = pyramid(tmp_path / "case7.ome.tif", picture, description=described(channels=channels))
    with pytest.raises(SlideUnsupported, match=r"OME-TIFF of 3 channels.*need RGB"):
        open_slide(path)


def test_an_ome_tiff_without_tiles_states_its_scale(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "case7.ome.tif"
    stated = 'PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.25" PhysicalSizeYUnit="µm"'
    Image.fromarray(picture[:64, :64]).save(path, "TIFF", tiffinfo={270: described(stated).encode()})
    with open_slide(path) as slide:
        assert slide.scale == (0.25, 0.25, "metadata")
        assert slide.vendor == "image"


def test_without_a_scale_the_user_must_state_it(tmp_path: Path, picture: np.ndarray) -> None:
    with pytest.raises(ScaleUnknown, match="--mpp"):
        open_slide(pyramid(tmp_path / "case7.ome.tif", picture, description=described(size="")))
