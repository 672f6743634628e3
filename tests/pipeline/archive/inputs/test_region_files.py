"""Files of regions belong to the slides whose names they have; what is unclear is never guessed."""

import os
import unicodedata
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from pipeline import config
from pipeline.archive.inputs.region_files import Matches, match_regions, with_regions
from pipeline.archive.inputs.sources import Archive, Source
from pipeline.errors import RunError
from slides.scale import GivenScale

Form = Literal["NFC", "NFD"]

SLIDES = {"a/x": Path("/scans/a/x.svs"), "b/y": Path("/scans/b/y.ome.tif"), "z": Path("/scans/z.mrxs")}


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x.geojson", "[]")
        else:
            path.write_text("[]")
    return folder


def matched(folder: Path, slides: dict[str, Path] = SLIDES) -> Matches:
    return match_regions(str(folder), slides)


@pytest.mark.parametrize("suffix", [".geojson", ".geojson.gz", ".geojson.zip", ".zip", ".GEOJSON"])
@pytest.mark.parametrize("name", ["a/x.svs", "a/x", "x.svs", "x"])
def test_the_name_is_that_of_the_slide_with_or_without_its_suffix_and_folder(
    tmp_path: Path, name: str, suffix: str
) -> None:
    made(tmp_path, name + suffix)
    assert matched(tmp_path) == Matches({"a/x": tmp_path / (name + suffix)}, {})


@pytest.mark.parametrize(("slide", "drawn"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_letters_are_one_name(tmp_path: Path, slide: Form, drawn: Form) -> None:
    """One disk stores Müller as it is given, another one, of macOS, decomposed."""
    name = unicodedata.normalize(slide, "Müller")
    made(tmp_path, unicodedata.normalize(drawn, "Müller.svs.geojson"))
    (found,) = matched(tmp_path, {name: Path(f"/scans/{name}.svs")}).files
    assert found == name
    made(tmp_path, unicodedata.normalize(slide, "Müller.svs.geojson"))  # a disk that keeps both has two files
    assert "need one file" in matched(tmp_path, {name: Path(f"/scans/{name}.svs")}).problems[name]


def test_the_most_special_name_counts(tmp_path: Path) -> None:
    made(tmp_path, "x.geojson", "a/x.geojson", "a/x.svs.geojson", "y.geojson", "b/y.ome.geojson", "other.geojson")
    assert matched(tmp_path).files == {"a/x": tmp_path / "a/x.svs.geojson", "b/y": tmp_path / "b/y.ome.geojson"}


def test_qupath_drops_both_suffixes_of_an_ome_tiff(tmp_path: Path) -> None:
    made(tmp_path, "y.geojson")
    assert matched(tmp_path).files == {"b/y": tmp_path / "y.geojson"}


def test_regions_may_lie_beside_the_slides(tmp_path: Path) -> None:
    """Whatever the slide is called in the results: here, a slide that was given by itself."""
    made(tmp_path, "site/deep/x.svs.geojson", "site/x.svs.geojson")
    slides = {"x": tmp_path / "site/deep/x.svs"}
    assert matched(tmp_path, slides).files == {"x": tmp_path / "site/deep/x.svs.geojson"}


def test_a_link_s_regions_have_its_name_that_of_its_file_or_the_one_in_the_results(tmp_path: Path) -> None:
    """In a run, which is given the link, and of its results, which know the file: the same files are found."""
    real, link = tmp_path / "scans" / "S-0815.scn", tmp_path / "cases" / "case7.scn"
    for folder in (real.parent, link.parent):
        folder.mkdir()
    real.touch()
    link.symlink_to(real)
    for name in ("case7.scn", "case7", "S-0815.scn", "S-0815"):
        file = made(tmp_path / name, f"{name}.geojson") / f"{name}.geojson"
        for path in (link, real):
            assert matched(tmp_path / name, {"case7": path}).files == {"case7": file}


def test_what_a_slide_is_called_counts_before_the_file_of_a_link(tmp_path: Path) -> None:
    """Where all files are called slide.svs, in folders of their own, and links tell them apart."""
    slides = {"slide": tmp_path / "slide.svs"}
    for name in "AB":
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "slide.svs").touch()
        slides[name] = tmp_path / f"{name}.svs"
        slides[name].symlink_to(tmp_path / "store" / name / "slide.svs")
    made(tmp_path / "drawn", "slide.geojson", "A.geojson")
    files = {"slide": tmp_path / "drawn" / "slide.geojson", "A": tmp_path / "drawn" / "A.geojson"}
    assert matched(tmp_path / "drawn", slides) == Matches(files, {})


def test_a_file_that_fits_two_slides_is_given_to_neither(tmp_path: Path) -> None:
    made(tmp_path, "x.geojson")
    slides = {"x": Path("/scans/x.svs"), "x.tif": Path("/scans/x.tif")}
    files, problems, _ = matched(tmp_path, slides)
    assert files == {}
    assert "x.geojson fits x.svs and x.tif: need one for each, such as x.tif.geojson" in problems["x.tif"]
    made(tmp_path, "x.tif.geojson")
    assert matched(tmp_path, slides) == Matches({"x": tmp_path / "x.geojson", "x.tif": tmp_path / "x.tif.geojson"}, {})


def test_slides_of_one_name_in_two_folders_need_files_in_these(tmp_path: Path) -> None:
    made(tmp_path, "x.geojson")
    slides = {"a/x": Path("/scans/a/x.svs"), "b/x": Path("/scans/b/x.svs")}
    words = f"{tmp_path}/x.geojson fits a/x.svs and b/x.svs: need one for each, such as b/x.svs.geojson"
    assert matched(tmp_path, slides).problems["b/x"] == words
    made(tmp_path, "b/x.svs.geojson")
    assert matched(tmp_path, slides).files == {"a/x": tmp_path / "x.geojson", "b/x": tmp_path / "b/x.svs.geojson"}


def test_two_files_of_a_slide_are_a_problem(tmp_path: Path) -> None:
    made(tmp_path, "z.geojson", "z.zip", "x.geojson")
    files, problems, _ = matched(tmp_path)
    assert files == {"a/x": tmp_path / "x.geojson"}
    assert problems == {"z": f"regions are in {tmp_path}/z.geojson and in {tmp_path}/z.zip: need one file"}


def test_other_archives_and_hidden_files_are_no_regions(tmp_path: Path) -> None:
    made(tmp_path, "x.geojson", ".z.geojson", ".trash/z.geojson", "z.json")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("notes.txt", "")
    assert matched(tmp_path).files.keys() == {"a/x"}


def test_what_is_no_file_is_no_region(tmp_path: Path) -> None:
    """To read from a named pipe would wait for ever."""
    made(tmp_path, "a/x.geojson")
    os.mkfifo(tmp_path / "a/x.svs.geojson")  # the better name of the two
    assert [file.name for file in matched(tmp_path).files.values()] == ["x.geojson"]


def test_a_folder_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no folder: need one with QuPath's GeoJSON files"):
        matched(tmp_path / "nowhere")
    made(tmp_path, "other.geojson")
    with pytest.raises(RunError, match=r"no file there belongs to a slide: need names such as x\.svs\.geojson"):
        matched(tmp_path)


def test_slides_of_a_run_without_regions_are_skipped_and_named(tmp_path: Path) -> None:
    made(tmp_path, "x.geojson", "z.geojson", "z.zip")
    sources = tuple(Source(path, name, GivenScale()) for name, path in SLIDES.items())
    archive = with_regions(Archive(sources, 0, ("one folder",)), config.Regions(str(tmp_path)))
    x, y, z = archive.sources
    assert (x.regions, x.skip, x.problem) == (tmp_path / "x.geojson", "", "")
    assert (y.regions, y.skip, y.problem) == (None, f"no file of regions in {tmp_path}", "")
    assert (z.regions, z.skip) == (None, "")
    assert "need one file" in z.problem
    assert archive.unread == (
        "one folder",
        f"1 slide is skipped, as {tmp_path} has no regions of it: b/y",
    )
    bad = Source(Path("/scans/b/y.tif"), "b/y", GivenScale(), "its row is wrong")
    assert with_regions(Archive((x, bad), 0), config.Regions(str(tmp_path))).sources[1] == bad  # it fails all the same
    assert with_regions(Archive(sources, 0), config.Regions()) == Archive(sources, 0)
