"""Names of slides: unique, apart from each other, safe to write, and not changed by slides that are added."""

import json
import os
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import cast

from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.archive.inputs.naming import Place, name_slides
from pipeline.layout import EXPORTS, RESERVED, RESULTS, RunFolder
from pipeline.text import printable

# few names, so that they often meet
ORDINARY = ["a", "A", "ab", "b", "_a", "-a", "a.svs", "a.tif", "é", "e\u0301", "ß", "SS"]
TAKEN = ["work", "Work", "logs", "run.json", "nuclei.parquet"]
AWKWARD = ["con", "nul.1", "b ", ".a", "a.", "...", " ", "\udce9", "_xe9", "a\nb", "a:b", "s" * 240, "é" * 120]
PARTS = st.sampled_from([*ORDINARY, *TAKEN, *AWKWARD])
SUFFIXES = st.sampled_from([".svs", ".tif", ".SVS", ".tif.svs", ""])
HOMES = st.sampled_from(
    [Path("/in/siteA"), Path("/in/siteB"), Path("/in/x/siteA"), Path("/in"), Path("/"), Path("/b/A")]
)


@st.composite
def places(draw: st.DrawFn) -> Place:
    folders = draw(st.lists(PARTS, max_size=2))
    return Place(draw(HOMES), "/".join([*folders, draw(PARTS) + draw(SUFFIXES)]))


ARCHIVES = st.lists(places(), min_size=1, max_size=8, unique=True)


def same_to_a_file_system(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


@given(ARCHIVES)
@example([Place(Path("/in"), name) for name in ("a.svs", "a/work.svs", "a/nuclei.parquet.svs", "a.svs/a.svs")])
@example([Place(Path("/in"), name) for name in ("x.svs", "X.svs", "x.SVS", "X.SVS", "x.tif")])
def test_no_two_slides_share_a_folder_and_none_lies_in_another(archive: list[Place]) -> None:
    """Law: names are apart on every file system, reserved ones are nobody's, and all can be written anywhere."""
    names = [same_to_a_file_system(name) for name in name_slides(archive)]
    assert len(set(names)) == len(archive)
    parts = [name.split("/") for name in names]
    folders = {"/".join(p[:depth]) for p in parts for depth in range(1, len(p))}
    assert not folders & set(names)
    for part in {part for p in parts for part in p}:
        assert part not in RESERVED
        assert part == part.rstrip(" .")
        assert part[0] != "."
        assert part.isprintable()
        assert 0 < len(part.encode("utf-8")) <= 255
    assert json.loads(json.dumps(names, ensure_ascii=False).encode("utf-8")) == names


@given(st.data(), ARCHIVES)
def test_names_do_not_depend_on_the_order(data: st.DataObject, archive: list[Place]) -> None:
    named = dict(zip(archive, name_slides(archive), strict=True))
    other = data.draw(st.permutations(archive))
    assert dict(zip(other, name_slides(other), strict=True)) == named


def plain(place: Place) -> str:
    """The name that a slide has where it is the only one."""
    return same_to_a_file_system(name_slides([place])[0])


@given(ARCHIVES, places())
def test_a_slide_that_is_added_changes_no_other_name(archive: list[Place], added: Place) -> None:
    """Law: all keep their names, unless the new slide, or a folder it is in, has the name of one of them, or lies
    in another input folder under the same name."""
    assume(added not in archive)
    assume(not any(plain(p) == plain(added) and p.home != added.home for p in archive))
    before = name_slides(archive)
    *after, new = name_slides([*archive, added])
    steps = same_to_a_file_system(new).split("/")
    its = {"/".join(steps[:depth]) for depth in range(1, len(steps) + 1)}
    assume(not its & set(map(same_to_a_file_system, before)))
    assert after == before


def names(home: str, *relative: str) -> list[str]:
    return name_slides([Place(Path(home), r) for r in relative])


def test_the_ordinary_case_is_the_path_without_suffix() -> None:
    assert names("/in", "x.svs", "site A/ä/x.ndpi", "case.1.tif", "-b.svs", "noend") == [
        "x",
        "site A/ä/x",
        "case.1",
        "-b",
        "noend",
    ]


def test_the_first_in_the_alphabet_keeps_the_short_name() -> None:
    assert names("/in", "x.tif", "x.svs") == ["x.tif", "x"]
    assert names("/in", "a.svs", "a/y.svs") == ["a.svs", "a/y"]
    first, second, third = names("/in", "x.tif", "x.svs", "X.tif")
    assert (first, second) == ("x.tif-" + first[-8:], "x")
    assert third == "X.tif"


def test_what_is_not_fit_for_a_name_is_replaced() -> None:
    assert names("/in", ".x.svs", "a:b.svs", "end. .svs", os.fsdecode(b"caf\xe9.svs"), "logs/x.svs", "work.svs") == [
        "_x",
        "a_b",
        "end",
        "caf_xe9",
        "logs_/x",
        "work_",
    ]
    (long,) = names("/in", "é" * 126 + ".s")
    assert long.startswith("é" * 100 + "-")


def test_no_folder_is_called_as_a_device_of_windows() -> None:
    """Where one is, the results can be written on Linux, and neither copied to Windows nor opened there."""
    assert names("/in", "Con/x.svs", "nul.svs", "aux.1.svs", "com1 .2.svs", "nul_.svs", "control.svs", "com.svs") == [
        "Con_/x",
        "nul_",
        "aux_.1",
        "com1_ .2",
        "nul_.svs",
        "control",
        "com",
    ]


def test_equal_names_of_two_drives_begin_with_the_drive() -> None:
    homes = [PureWindowsPath("C:/slides"), PureWindowsPath("D:/slides")]
    assert name_slides([Place(cast(Path, home), "x.svs") for home in homes]) == ["C_/slides/x", "D_/slides/x"]


def test_equal_names_of_several_folders_begin_with_the_folders() -> None:
    def of(*paths: tuple[str, str]) -> list[str]:
        return name_slides([Place(Path(home), relative) for home, relative in paths])

    assert of(("/d/siteA", "x.svs"), ("/d/siteB", "x.svs"), ("/d/siteB", "y.svs")) == ["siteA/x", "siteB/x", "y"]
    assert of(("/d/1/slides", "x.svs"), ("/d/2/slides", "x.tif")) == ["1/slides/x", "2/slides/x"]
    assert of(("/d", "x.svs"), ("/d/s", "x.svs"), ("/", "x.svs")) == ["d/x", "s/x", "x"]


def test_everything_that_a_run_writes_is_reserved() -> None:
    run, slide = RunFolder(Path("r")), RunFolder(Path("r")).slide("s")
    of_run = (run.run_json, run.ledger, run.report, run.logs, run.regions, run.qupath_project.parent)
    own = (*of_run, slide.regions, slide.slide_json, slide.failure_json, slide.work)
    assert {*RESULTS, *EXPORTS.values(), *(path.name for path in own), slide.thumbnail.name} == RESERVED


def test_any_name_of_a_file_can_be_shown() -> None:
    assert printable(Path(os.fsdecode(b"/x/caf\xe9 \xc3\xa9"))).encode("utf-8") == "/x/caf\\udce9 é".encode()
