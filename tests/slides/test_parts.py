"""Which files a slide consists of. Law: a copy of these, and of nothing else, is the same slide."""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from dicom_files import write
from slides.errors import SlideUnreadable
from slides.parts import LocalDirectory, parts
from slides.slide import open_slide


def copy(slide: Path, to: Path) -> Path:
    names = parts(slide.name, LocalDirectory(slide.parent))
    assert names[0] == slide.name
    assert len(set(names)) == len(names)
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(slide.parent / name, to / name)
    return to / slide.name


def assert_same_slide(one: Path, other: Path) -> None:
    with open_slide(one, mpp=0.5) as a, open_slide(other, mpp=0.5) as b:
        assert a.quick_hash == b.quick_hash
        assert (a.size, a.bounds, a.levels) == (b.size, b.bounds, b.levels)
        frame = a.frame(32.0)
        assert np.array_equal(a.thumbnail(frame), b.thumbnail(frame))


@pytest.mark.parametrize(
    ("name", "count"),
    [("CMU-1-Small-Region.svs", 1), ("leica-offset-region.scn", 1), ("philips.tiff", 1), ("mirax-sparse.mrxs", 4)],
)
def test_a_copy_of_its_parts_is_the_same_slide(shared: Path, tmp_path: Path, name: str, count: int) -> None:
    slide = shared / "slides" / name
    assert len(parts(name, LocalDirectory(slide.parent))) == count
    assert_same_slide(slide, copy(slide, tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_what_is_no_file_is_no_part(shared: Path, tmp_path: Path) -> None:
    """An editor's link to nothing failed the copy of a slide, and a pipe was waited for, for ever."""
    shutil.copy(shared / "slides" / "mirax-sparse.mrxs", tmp_path / "m.mrxs")
    shutil.copytree(shared / "slides" / "mirax-sparse", tmp_path / "m")
    whole = parts("m.mrxs", LocalDirectory(tmp_path))
    (tmp_path / "m" / ".#lock").symlink_to("nobody@nowhere.123")
    os.mkfifo(tmp_path / "m" / "pipe")
    assert parts("m.mrxs", LocalDirectory(tmp_path)) == whole
    (tmp_path / "m" / "Data0000.dat").rename(tmp_path / "elsewhere")
    (tmp_path / "m" / "Data0000.dat").symlink_to(tmp_path / "elsewhere")
    assert parts("m.mrxs", LocalDirectory(tmp_path)) == whole


def test_a_dicom_slide_is_the_files_of_its_series_whatever_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    for name, series, level in (("a.dcm", "1.2.3", 0), ("b", "1.2.3", 1), ("c.dcm", "1.2.4", 0)):
        write(folder / name, series, level=level)
    (folder / "notes.txt").write_text("a note")
    damaged = write(folder / "z.dcm", "1.2.5").read_bytes()
    (folder / "z.dcm").write_bytes(damaged[:300])
    assert parts("a.dcm", LocalDirectory(folder)) == ["a.dcm", "b"]
    assert_same_slide(folder / "a.dcm", copy(folder / "a.dcm", tmp_path / "copy"))
    with pytest.raises(SlideUnreadable, match="damaged header"):
        parts("z.dcm", LocalDirectory(folder))


def test_a_neighbour_that_cannot_be_read_is_no_part(tmp_path: Path) -> None:
    """Whose it is nobody can say; the slide itself must be readable."""

    class Guarded(LocalDirectory):
        guarded = ""

        def open(self, name: str) -> BinaryIO:
            if name == self.guarded:
                raise PermissionError(13, "Permission denied", name)
            return super().open(name)

    for name, level in (("a.dcm", 0), ("b.dcm", 1), ("secret.dcm", 2)):
        write(tmp_path / name, "1.2.3", level=level)
    directory = Guarded(tmp_path)
    directory.guarded = "secret.dcm"
    assert parts("a.dcm", directory) == ["a.dcm", "b.dcm"]
    directory.guarded = "a.dcm"
    with pytest.raises(PermissionError):
        parts("a.dcm", directory)


KEY_FILE = """[Virtual Microscope Specimen]
NoLayers=1
ImageFile=case(0,0).jpg
ImageFile(1,0)=case(1,0).jpg
MapFile=case_map2.jpg
MacroImage=../outside.jpg
OptimisationFile=case.opt
"""


def test_a_hamamatsu_slide_is_its_key_file_and_what_that_names(tmp_path: Path) -> None:
    for name in ("outside.jpg", "in/case(0,0).jpg", "in/case(1,0).jpg", "in/case_map2.jpg", "in/other.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "case.vms").write_text(KEY_FILE)
    expected = ["case.vms", "case(0,0).jpg", "case(1,0).jpg", "case_map2.jpg"]
    assert parts("case.vms", LocalDirectory(tmp_path / "in")) == expected  # nothing outside its folder
    (tmp_path / "in" / "case.vms").write_bytes(b"\xff no key file")
    assert parts("case.vms", LocalDirectory(tmp_path / "in")) == ["case.vms"]


@pytest.mark.parametrize("name", ["case.vmu", "CASE.VMS"])
def test_a_key_file_of_either_format_is_known_in_any_case(tmp_path: Path, name: str) -> None:
    """Of what it names only files count; itself is listed once; a key may be given twice."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.jpg").touch()
    (tmp_path / name).write_text(f"[Uncompressed Virtual Microscope Specimen]\nA=b.jpg\nB=folder\nC={name}\nA=b.jpg\n")
    assert parts(name, LocalDirectory(tmp_path)) == [name, "b.jpg"]


def test_a_mirax_slide_has_all_files_of_its_folder_at_any_depth(tmp_path: Path) -> None:
    for name in ("X.MRXS", "X/b.dat", "X/a/c.dat", "other/d.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert parts("X.MRXS", LocalDirectory(tmp_path)) == ["X.MRXS", "X/a/c.dat", "X/b.dat"]


def test_a_mirax_slide_without_its_folder_is_its_file_alone(tmp_path: Path) -> None:
    """Also where a file has the folder's name: what is missing is said when the slide is opened."""
    (tmp_path / "x.mrxs").touch()
    assert parts("x.mrxs", LocalDirectory(tmp_path)) == ["x.mrxs"]
    (tmp_path / "x").touch()
    assert parts("x.mrxs", LocalDirectory(tmp_path)) == ["x.mrxs"]


def test_a_folder_of_a_mirax_slide_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a copy would lack its data."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x").mkdir()
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError):
        parts("x.mrxs", LocalDirectory(tmp_path))
