"""DICOM headers, against files that OpenSlide opens too."""

import contextlib
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dicom_files
from dicom_files import element, sequence, write
from slides.dicom import Header, read_header
from slides.errors import SlideUnreadable
from slides.slide import open_slide


def header_of(path: Path) -> Header | None:
    with path.open("rb") as file:
        return read_header(file, path)


def test_the_files_of_these_tests_are_slides_to_openslide(tmp_path: Path) -> None:
    """A series is one slide, whichever of its files is opened; and it is read like any other."""
    for name, level in (("b", 0), ("a", 1)):
        write(tmp_path / f"{name}.dcm", "1.2.3", level=level)
    write(tmp_path / "c.dcm", "1.2.4")
    for name in "ab":
        assert openslide.OpenSlide.detect_format(tmp_path / f"{name}.dcm") == "dicom"
        with open_slide(tmp_path / f"{name}.dcm") as slide:
            assert [level.size.width for level in slide.levels] == [2 * dicom_files.SIDE, dicom_files.SIDE]
            assert slide.scale.x == pytest.approx(0.5)
            assert np.all(slide.thumbnail(slide.frame(4.0)) == dicom_files.GREY)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("kind", ["VOLUME", "LABEL", "THUMBNAIL"])
def test_series_and_kind_are_read(tmp_path: Path, explicit: bool, kind: str) -> None:
    path = write(tmp_path / "x.dcm", "1.2.840.99", kind=kind, explicit=explicit)
    assert header_of(path) == Header("1.2.840.99", kind == "VOLUME")


@given(
    values=st.lists(st.binary(max_size=9), max_size=3),
    defined=st.booleans(),
    inner=st.booleans(),
    explicit=st.booleans(),
)
def test_sequences_before_the_series_are_passed_over(
    tmp_path_factory: pytest.TempPathFactory, values: list[bytes], defined: bool, inner: bool, explicit: bool
) -> None:
    """Law: whatever the sequences hold, and however their lengths are given, the series is found behind them."""
    items = [element(0x00081150, b"UI", value, explicit) for value in values]
    nested = sequence(0x00081115, items, defined=inner, explicit=explicit)
    outer = sequence(0x00089215, [nested, nested], defined=defined, explicit=explicit)
    path = write(tmp_path_factory.getbasetemp() / "sequence.dcm", "1.2.5", before_series=outer, explicit=explicit)
    assert header_of(path) == Header("1.2.5", True)


def test_other_files_are_no_slides(tmp_path: Path) -> None:
    ct = write(tmp_path / "ct.dcm", "1.2.6", sop_class="1.2.840.10008.5.1.4.1.1.2")
    assert header_of(ct) is None
    for content in (b"", b"text", bytes(4096)):
        (tmp_path / "x.dcm").write_bytes(content)
        assert header_of(tmp_path / "x.dcm") is None


@given(st.data())
def test_damage_is_named_and_ends(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Law: a header that is cut or overwritten gives an instance, None or SlideUnreadable, and nothing else."""
    folder = tmp_path_factory.getbasetemp()
    whole = write(folder / "whole.dcm", "1.2.7").read_bytes()
    end = whole.index(b"1.2.7")
    cut = data.draw(st.integers(132, end))
    (folder / "cut.dcm").write_bytes(whole[:cut])
    with pytest.raises(SlideUnreadable, match=r"cut\.dcm is a DICOM file with a damaged header: copy it again"):
        header_of(folder / "cut.dcm")
    at, noise = data.draw(st.integers(132, end)), data.draw(st.binary(min_size=1, max_size=40))
    (folder / "noise.dcm").write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    found: Header | None = None
    with contextlib.suppress(SlideUnreadable):
        found = header_of(folder / "noise.dcm")
    assert found is None or isinstance(found, Header)
