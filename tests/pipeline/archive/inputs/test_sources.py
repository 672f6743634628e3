"""Which slides there are: each once, however it is reached; nothing passed over in silence, nothing written."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dicom_files
from pipeline.archive.inputs.naming import Place
from pipeline.archive.inputs.search import Search
from pipeline.archive.inputs.sources import Archive, Source, find_slides
from pipeline.errors import RunError
from slides.parts import LocalDirectory
from slides.scale import GivenScale


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def tree(folder: Path, *names: str) -> Path:
    touch(*(folder / name for name in names))
    return folder


def names(archive: Archive) -> list[str]:
    return [source.name for source in archive.sources]


FILES = st.sampled_from(["a/x.svs", "a/x.tif", "a/b/x.svs", "a/b/y.TIFF", "c/x.svs", "c/notes.txt", "x.svs", "a.svs"])
LINKS = st.dictionaries(
    st.sampled_from(["l", "a/l", "c/l.svs", "aa", "a/b/up"]),
    st.sampled_from([".", "a", "a/b", "c", "a/x.svs", "x.svs", "c/nothing.svs", "a/b/up"]),
)

MORE = st.lists(st.sampled_from([".", "a", "a/b", "c", "l", "c/l.svs", "a/x.svs"]))


@settings(max_examples=25)
@given(st.sets(FILES).map(lambda files: files | {"a/x.svs"}), LINKS, MORE)
def test_every_slide_is_found_once_however_it_is_reached(
    files: set[str], links: dict[str, str], more: list[str]
) -> None:
    """Law: every slide of a folder once, and the same ones by the same names for the same set of inputs."""
    with tempfile.TemporaryDirectory() as name:
        root = tree(Path(name).resolve(), *files)
        for link, target in links.items():
            if not (root / link).exists():
                (root / link).parent.mkdir(parents=True, exist_ok=True)
                (root / link).symlink_to(root / target)
        inputs = [root, *(root / m for m in more if (root / m).exists())]
        archive = find_slides(inputs)
        assert find_slides([*inputs[::-1], root]) == archive
        sound = [s.path.resolve() for s in archive.sources if not s.problem]
        assert len(set(sound)) == len(sound)
        assert set(sound) == {root / f for f in files if not f.endswith("txt")}
        for source in archive.sources:
            assert not source.problem or (source.path.is_symlink() and not source.path.exists())
        assert archive.skipped == sum(f.endswith("txt") for f in files)


def test_names_begin_at_the_outermost_input(tmp_path: Path) -> None:
    tree(tmp_path, "siteA/x.svs", "siteA/deep/y.svs", "siteB/x.svs")
    assert names(find_slides([tmp_path])) == ["siteA/deep/y", "siteA/x", "siteB/x"]
    assert names(find_slides([tmp_path / "siteB", tmp_path / "siteA"])) == ["deep/y", "siteA/x", "siteB/x"]
    assert names(find_slides([tmp_path / "siteA" / "deep", tmp_path / "siteA"])) == ["deep/y", "x"]
    assert names(find_slides([tmp_path / "siteA" / "deep" / "y.svs"])) == ["y"]


def test_a_real_folder_names_a_slide_before_a_link_does(tmp_path: Path) -> None:
    tree(tmp_path, "b/x.svs", "elsewhere/y.svs")
    archive = tree(tmp_path / "archive", "b/x.svs")
    (archive / "a").symlink_to("b")
    (archive / "loop").symlink_to(archive)
    (archive / "z.svs").symlink_to(tmp_path / "elsewhere" / "y.svs")
    (archive / "linked").symlink_to(tmp_path / "elsewhere")
    assert names(find_slides([archive], follow_links=True)) == ["b/x", "linked/y"]


def test_links_out_of_the_input_folder_are_counted_and_followed_only_if_wanted(tmp_path: Path) -> None:
    """Law: a link within the folder is followed; one that leads out of it is said, however deep it lies."""
    tree(tmp_path, "elsewhere/y.svs", "elsewhere/z.svs", "elsewhere/notes.txt", "archive2/w.svs")
    archive = tree(tmp_path / "archive", "b/x.svs", "v.svs")
    (archive / "out.svs").symlink_to(tmp_path / "elsewhere" / "y.svs")
    (archive / "b" / "up").symlink_to(tmp_path / "elsewhere")
    (archive / "neighbour").symlink_to(tmp_path / "archive2")  # its name begins as the folder's does
    (archive / "notes").symlink_to(tmp_path / "elsewhere" / "notes.txt")
    (archive / "inside").symlink_to(archive / "b")
    (archive / ".snapshot").symlink_to(tmp_path / "elsewhere")
    (archive / "inside.svs").symlink_to(archive / "v.svs")
    (tmp_path / "alias").symlink_to(archive)
    said = "links lead out of {}: not followed, give --follow-links"
    for folder in (archive, tmp_path / "alias"):  # an input that is a link itself is what the user named
        found = find_slides([folder])
        assert (names(found), found.unread) == (["b/x", "v"], ("3 " + said.format(folder),))
    followed = find_slides([archive], follow_links=True)
    assert (names(followed), followed.unread) == (["b/up/z", "b/x", "neighbour/w", "out", "v"], ())
    both = find_slides([archive, tmp_path / "elsewhere"])
    assert names(both) == ["b/x", "v", "y", "z"], "each by its own folder"
    assert names(find_slides([archive / "out.svs"])) == ["out"], "it is named"
    twice = [archive / "out.svs", tmp_path / "elsewhere" / "y.svs"]
    assert names(find_slides(twice)) == names(find_slides(twice[::-1])) == ["out"], "once, by one name"


def test_an_entry_that_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x.svs", "y.svs")
    looked = Search._file

    def refusing(search: Search, place: Place, real: str) -> None:
        if real.endswith("y.svs"):
            raise OSError(5, "Input/output error", real)
        looked(search, place, real)

    monkeypatch.setattr(Search, "_file", refusing)
    archive = find_slides([tmp_path])
    assert names(archive) == ["x"]
    assert archive.unread == (f"{tmp_path / 'y.svs'}: Input/output error",)


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    tree(tmp_path, "x.svs")
    (tmp_path / "site").symlink_to("/mnt/not there")
    (tmp_path / "lost.svs").symlink_to("/mnt/not there/lost.svs")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    archive = find_slides([tmp_path])
    assert [(s.name, s.problem) for s in archive.sources] == [
        ("lost", f"{tmp_path}/lost.svs is a link to /mnt/not there/lost.svs, which does not exist: restore it"),
        ("x", ""),
    ]
    assert [cause.partition(", ")[0] for cause in archive.unread] == [
        f"{tmp_path}/round is a link to {tmp_path}/round",
        f"{tmp_path}/site is a link to /mnt/not there",
    ]


def test_the_folder_of_results_is_not_searched_and_holds_no_input(tmp_path: Path) -> None:
    tree(tmp_path, "in/x.svs", "in/out/y.svs", "in/out/deep/z.svs", "in/outer/w.svs")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "out" / "deep")
    assert names(find_slides([tmp_path / "in"], tmp_path / "in" / "out")) == ["outer/w", "x"]
    for out in (tmp_path, tmp_path / "in"):
        with pytest.raises(RunError, match="need a folder apart from the slides"):
            find_slides([tmp_path / "in"], out)
        with pytest.raises(RunError, match="need a folder apart from the slides"):  # it would not be searched again
            find_slides([tmp_path / "in" / "x.svs"], out)


@pytest.mark.parametrize("inputs", ["", [""], ["slides", ""]])
def test_an_empty_input_is_not_the_current_folder(
    inputs: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a variable of a script that was not set."""
    tree(tmp_path, "slides/x.svs", "private/y.svs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="an input is empty: need slides, folders of slides"):
        find_slides(inputs)
    assert names(find_slides(".")) == ["private/y", "slides/x"]


def test_other_files_are_counted_and_rubbish_is_no_slide(tmp_path: Path) -> None:
    tree(tmp_path, "x.svs", "._x.svs", ".DS_Store", "notes.txt", "README", "y.zvi", ".svs", ".case.svs", " .tif")
    tree(tmp_path, "a/._y.svs", ".Trash-1000/files/old.svs", ".snapshot/hourly.0/x.svs", ".hidden/z.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    archive = find_slides([tmp_path])
    assert names(archive) == ["_", "_case", "_hidden/z", "x"]
    assert archive.skipped == 6 + 3 + 1
    assert archive.unread == ()


def test_every_suffix_of_openslide_s_formats_is_a_slide_s(tmp_path: Path) -> None:
    suffixes = ["bif", "czi", "mrxs", "ndpi", "scn", "svs", "svslide", "tif", "tiff", "vms", "vmu"]
    tree(tmp_path, *(f"{suffix}/x.{suffix}" for suffix in suffixes))
    assert names(find_slides([tmp_path])) == [f"{suffix}/x" for suffix in suffixes]


@pytest.mark.parametrize(
    "folder",
    [
        "$RECYCLE.BIN",
        ".Trash",
        ".Trashes",
        ".Trash-1000",
        ".snapshot",
        ".snapshots",
        ".AppleDouble",
        "@eaDir",
        "#recycle",
        "__MACOSX",
    ],
)
def test_folders_of_snapshots_and_deleted_files_are_not_searched(tmp_path: Path, folder: str) -> None:
    tree(tmp_path, "x.svs", f"case/{folder}/y.svs")
    assert names(find_slides([tmp_path])) == ["x"]


def test_names_that_are_no_text_are_found(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.svs", "wb"):
        pass
    tree(tmp_path, "späte Fälle/-x y .svs", "日本/x.ndpi")
    archive = find_slides([tmp_path])
    assert names(archive) == ["caf_xe9", "späte Fälle/-x y", "日本/x"]
    assert all(source.path.exists() for source in archive.sources)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x.svs", "secret/y.svs")
    listed = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    archive = find_slides([tmp_path])
    assert names(archive) == ["x"]
    assert archive.unread == (f"{tmp_path / 'secret'}: Permission denied",)
    with pytest.raises(RunError, match=r"not searched: .*secret: Permission denied"):
        find_slides([tmp_path / "secret"])


def test_what_is_not_searched_can_be_printed_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tree(tmp_path / os.fsdecode(b"caf\xe9"), "a.svs", "old/run.json", "old/ledger.csv", "secret/b.svs", "c.svs")
    (home / "link.svs").symlink_to(tree(tmp_path, "elsewhere/d.svs") / "elsewhere" / "d.svs")
    listed, looked = os.scandir, Search._file

    def refusing(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    def failing(search: Search, place: Place, real: str) -> None:
        if real.endswith("c.svs"):
            raise OSError(5, "Input/output error", real)
        looked(search, place, real)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(Search, "_file", failing)
    archive = find_slides([home])
    assert names(archive) == ["a"]
    assert len(archive.unread) == 4
    assert all("caf\\udce9" in cause for cause in archive.unread), archive.unread


def test_nothing_is_written_or_opened(tmp_path: Path) -> None:
    """Law: an archive may be read-only; slides are known without a look into them, DICOM files excepted."""
    tree(tmp_path, "a/x.svs", "b/y.mrxs")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    (tmp_path / "a" / "x.svs").chmod(0)
    assert names(find_slides([tmp_path])) == ["a/x", "b/y"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


# ------------------------------------------------------------------------------------- slides of several files


def test_mirax_and_hamamatsu_are_found_once(tmp_path: Path) -> None:
    tree(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Index.dat", "m/Data0000.dat", "m/thumb.tif")
    tree(tmp_path, "h.vms", "h.opt", "h_1.jpg", "h_macro.jpg")
    archive = find_slides([tmp_path])
    assert names(archive) == ["h", "m"]
    assert archive.skipped == 3


def test_a_dicom_series_is_one_slide(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    for name, series, level, kind in (
        ("0label", "1.1", 0, "LABEL"),
        ("1", "1.1", 0, "VOLUME"),
        ("2", "1.1", 1, "VOLUME"),
        ("3", "1.2", 0, "VOLUME"),
        ("4", "1.3", 0, "THUMBNAIL"),
    ):
        dicom_files.write(folder / f"{name}.dcm", series, level=level, kind=kind)
    (folder / "2.dcm").rename(folder / "2.DCM")
    dicom_files.write(folder / "ct.dcm", "1.1", sop_class="1.2.840.10008.5.1.4.1.1.2")
    (folder / "link.dcm").symlink_to("ct.dcm")
    dicom_files.write(tmp_path / "other.dcm", "1.1")
    archive = find_slides([tmp_path, folder / "2.DCM", folder / "0label.dcm"])
    assert names(archive) == ["case/1", "case/3", "other"]
    assert archive.skipped == 2  # ct, and the thumbnail that belongs to nothing
    assert names(find_slides([folder / "0label.dcm", folder / "2.DCM"])) == ["0label"]


def test_a_damaged_dicom_header_is_a_slide_that_fails(tmp_path: Path) -> None:
    path = dicom_files.write(tmp_path / "x.dcm", "1.1")
    path.write_bytes(path.read_bytes()[:300])
    (source,) = find_slides([tmp_path]).sources
    assert (source.name, source.problem) == ("x", f"{path} is a DICOM file with a damaged header: copy it again")


def test_a_dicom_file_that_cannot_be_read_is_a_slide_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(folder: LocalDirectory, name: str) -> Any:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(LocalDirectory, "open", refusing)
    tree(tmp_path, "x.dcm", "y.svs")
    for inputs in (tmp_path, [tmp_path / "x.dcm", tmp_path / "y.svs"]):
        x, y = find_slides(inputs).sources
        assert ("Permission denied" in x.problem, y.problem) == (True, "")


def test_the_slides_at_hand(shared: Path) -> None:
    archive = find_slides([shared / "slides"])
    assert [n for n in names(archive) if n.startswith(("mirax", "damaged/mirax", "leica"))] == [
        "damaged/mirax-missing-datafile/mirax-sparse",
        "leica-offset-region",
        "mirax-sparse",
    ]


# ------------------------------------------------------------------------------------- manifests


def manifest(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding, "surrogateescape"))
    return path


def test_manifests_are_relative_to_themselves_and_may_give_a_scale(tmp_path: Path) -> None:
    tree(tmp_path, "in/s/a.svs", "in/t/a.svs", "in/b.png", "else/c.svs")
    path = manifest(
        tmp_path / "in", f"path,mpp\ns/a.svs,0.5\nt/../t/a.svs,\nb.png,0.4\n{tmp_path}/else/c.svs,\n../else/c.svs,\n"
    )
    assert [(s.name, s.scale, s.problem) for s in find_slides([path], mpp=0.25).sources] == [
        ("b", GivenScale(0.4, "manifest"), ""),
        ("c", GivenScale(default_mpp=0.25), ""),
        ("s/a", GivenScale(0.5, "manifest"), ""),
        ("t/a", GivenScale(default_mpp=0.25), ""),
    ]
    forced = GivenScale(0.3, "forced by --force-mpp")
    assert {s.scale for s in find_slides([path], mpp=0.25, force_mpp=0.3).sources} == {forced}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("PATH;Mpp\na b.svs;0,5\n;\n", "utf-8-sig"),
        ("mpp, Path ,note\r\n0.5,a b.svs,fine\r\n\r\n", "utf-8"),
        ('path\tmpp\n"a b.svs"\t"0,5"\n', "utf-8-sig"),
        ('path,mpp\n" a b.svs ","0,5"', "utf-8"),
        ("mpp;path;note\n0,5;a b.svs;pale, folded, cut, twice\n", "utf-8"),  # the first line tells the separator
        ("path,mpp\na b.svs, 0.5\na b.svs, \n , \n", "utf-8"),
    ],
)
def test_manifests_as_spreadsheets_write_them(tmp_path: Path, text: str, encoding: str) -> None:
    tree(tmp_path, "a b.svs")
    path = manifest(tmp_path, text, encoding)
    assert find_slides([path]).sources == (Source(tmp_path / "a b.svs", "a b", GivenScale(0.5, "manifest")),)


@pytest.mark.parametrize(("name", "shown"), [(os.fsdecode(b"caf\xe9.svs"), "caf_xe9"), (" a.svs", " a")])
def test_a_manifest_may_name_what_is_no_text_or_begins_with_a_space(tmp_path: Path, name: str, shown: str) -> None:
    tree(tmp_path, name)
    assert find_slides([manifest(tmp_path, f"path\n{name}\n")]).sources == (
        Source(tmp_path / name, shown, GivenScale()),
    )


@pytest.mark.skipif(os.name != "posix", reason="file names are text there")
def test_a_manifest_of_another_encoding_is_told_from_a_missing_slide(tmp_path: Path) -> None:
    """As Excel writes it: bytes are looked for as file names, and when there are none, the remedy is the encoding."""
    tree(tmp_path, "Fall ä.tif")
    (source,) = find_slides([manifest(tmp_path, "path\nFall ä.tif\n", "cp1252")]).sources
    assert source.problem == (
        f"{tmp_path}/Fall \\udce4.tif does not exist: restore it, or save the manifest as CSV in UTF-8"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_or_a_device_is_no_slide(tmp_path: Path) -> None:
    """It is there, and is not opened: reading a pipe never ends."""
    os.mkfifo(tmp_path / "pipe.svs")
    device, pipe = (source.problem for source in find_slides([os.devnull, tmp_path / "pipe.svs"]).sources)
    assert device == "/dev/null is no regular file, but a pipe or a device: need the file of a slide"
    assert pipe == f"{tmp_path}/pipe.svs is no regular file, but a pipe or a device: need the file of a slide"


@pytest.mark.skipif(os.name != "posix", reason="file names are text there")
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_slide_is_named_so_that_it_can_be_printed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.svs")
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[kind]()
    (source,) = find_slides([manifest(tmp_path, f"path\n{path.name}\n")]).sources
    assert source.problem.startswith(f"{tmp_path}/caf\\udce9.svs is ")


def test_a_wrong_row_is_a_slide_that_fails_and_stops_no_other(tmp_path: Path) -> None:
    tree(tmp_path, "a.svs", "b.svs", "c.svs", "d.svs", "folder/x")
    (tmp_path / "gone.svs").symlink_to("nowhere.svs")
    rows = ["a.svs,0.5", "s/missing.svs,0.5", "b.svs,half", "c.svs,250", "d.svs,nan", "folder,", "gone.svs,"]
    sources = find_slides([manifest(tmp_path, "\n".join(["path,mpp", *rows]))]).sources
    problems = {s.name: s.problem.replace(f"{tmp_path}/", "") for s in sources}
    assert problems == {
        "a": "",
        "b": "list.csv, line 4: mpp='half' is not a number",
        "c": "list.csv, line 5: mpp=250: need 0.05 to 5 micrometres per pixel",
        "d": "list.csv, line 6: mpp=nan: need 0.05 to 5 micrometres per pixel",
        "folder": "folder is a folder: name the slides in it, or give the folder itself as an input",
        "gone": "gone.svs is a link to nowhere.svs, which does not exist: restore it",
        "s/missing": "s/missing.svs does not exist: restore it, or correct the manifest",
    }


def test_two_scales_for_one_slide_are_a_problem(tmp_path: Path) -> None:
    tree(tmp_path, "a.svs", "b.svs")
    path = manifest(tmp_path, "path,mpp\na.svs,0.5\na.svs,\nb.svs,0.5\n./b.svs,0.25\n")
    archive = find_slides([path, tmp_path], mpp=1)
    assert [(s.name, s.problem) for s in archive.sources] == [
        ("a", ""),
        ("b", "mpp is given as 0.25 and as 0.5: need one"),
    ]
    assert archive.sources[0].scale.mpp == 0.5


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    for text, encoding, cause in (
        ("slide\na.svs\n", "utf-8", r"has the columns \['slide'\]: need path"),
        ("", "utf-8", r"has the columns \[\]: need path"),
        ("path,mpp\n,0.5\n", "utf-8", "line 2: need the columns of the first line, and a path"),
        ("path,mpp\n ,0.5\n", "utf-8", "line 2: need the columns of the first line, and a path"),
        ("mpp,path\n0.5\n", "utf-8", "line 2: need the columns of the first line, and a path"),
        ("path,Path\na.svs,b.svs\n", "utf-8", "need one column path and one column mpp"),
        ("path\na, b.svs\nc,d\n", "utf-8", "no slides|line 2: need the columns"),
        ("path\na.svs\n", "utf-16", "holds zero bytes; save it as CSV in UTF-8"),
        ("path,mpp,MPP\nx.svs,1,2\n", "utf-8", "need one column path and one column mpp"),
        ('path\n"' + "a" * 200_000 + '"\n', "utf-8", "field larger than field limit"),
    ):
        with pytest.raises(RunError, match=cause):
            find_slides([manifest(tmp_path, text, encoding)])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(RunError, match=r"folder\.csv is not a readable CSV manifest: .*directory"):
        find_slides([tmp_path / "folder.csv"])


def test_the_name_of_a_manifest_is_printed_whatever_it_is(tmp_path: Path) -> None:
    """It is part of what is said of its rows, and may have capitals or bytes that are no text."""
    path = tmp_path / os.fsdecode(b"caf\xe9.CSV")
    path.write_text("path,mpp\na.svs,half\nb.svs,9\n")
    problems = [source.problem.replace(f"{tmp_path}/", "") for source in find_slides([path]).sources]
    assert problems == [
        "a.svs does not exist: restore it, or correct the manifest",
        "b.svs does not exist: restore it, or correct the manifest",
    ]
    tree(tmp_path, "a.svs", "b.svs")
    problems = [source.problem.replace(f"{tmp_path}/", "") for source in find_slides([path]).sources]
    assert problems == [
        "caf\\udce9.CSV, line 2: mpp='half' is not a number",
        "caf\\udce9.CSV, line 3: mpp=9: need 0.05 to 5 micrometres per pixel",
    ]


@pytest.mark.parametrize("scale", [0, 5.01, float("nan"), "0.5"])
@pytest.mark.parametrize("flag", ["mpp", "force_mpp"])
def test_a_scale_that_no_slide_has_is_refused(tmp_path: Path, flag: str, scale: Any) -> None:
    tree(tmp_path, "a.svs")
    with pytest.raises(RunError, match=f"^{flag.replace('_', '-')}={scale!r}: need 0.05 to 5 micrometres per pixel"):
        find_slides([tmp_path], **{flag: scale})


def test_a_slide_that_is_named_is_not_searched(tmp_path: Path) -> None:
    tree(tmp_path, "a.svs")
    assert find_slides([tmp_path / "a.svs"]) == Archive((Source(tmp_path / "a.svs", "a", GivenScale()),), 0, ())


def test_inputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="nowhere does not exist"):
        find_slides([tmp_path / "empty", tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"none\.csv does not exist"):
        find_slides([tmp_path / "none.csv"])
    with pytest.raises(RunError, match=r"no slides in .*empty: 0 other files"):
        find_slides([tmp_path / "empty"])
    with pytest.raises(RunError, match="there is no input: need slides, folders of slides"):
        find_slides(tmp_path.glob("*.svs"))


def test_a_folder_without_slides_is_named_among_others(tmp_path: Path) -> None:
    """A disk that is not there leaves an empty folder. Not so one whose slides are reached by way of another input."""
    tree(tmp_path, "slides/a.svs", "slides/inner/b.svs", "notes/x.txt", "named/y.png")
    (tmp_path / "disk").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.svs").symlink_to(tmp_path / "slides" / "a.svs")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "inner").symlink_to(tmp_path / "slides" / "inner")
    names = ("slides", "slides/inner", "notes", "named", "named/y.png", "disk", "links", "whole")
    inputs = [tmp_path / name for name in names]
    for order in (inputs, inputs[::-1]):
        archive = find_slides(order, follow_links=True)
        assert [source.name for source in archive.sources] == ["a", "inner/b", "y"]
        need = "need files with a suffix such as .svs or .tiff; its disk may not be mounted"
        assert archive.unread == tuple(f"no slides in {tmp_path / name}: {need}" for name in ("disk", "notes"))


@pytest.mark.parametrize(
    ("inputs", "named"), [(123, "123"), (None, "None"), (b"x.svs", "b'x.svs'"), (["x.svs", 7], "7")]
)
def test_what_is_no_path_is_named(inputs: Any, named: str) -> None:
    """As a script may pass it, whose types nobody checks."""
    with pytest.raises(RunError, match=f"an input is {named}: need slides, folders of slides"):
        find_slides(inputs)


def test_what_nightslide_has_written_is_no_input(tmp_path: Path) -> None:
    """Results of an earlier run among the slides hold TIFF files, and folders of staged slides copies."""
    copy = ".nightslide-stage-" + "0" * 32
    tree(tmp_path, "a.svs", "old/run.json", "old/ledger.csv", "old/a/density/density.ome.tif", f"{copy}/0/b.svs")
    archive = find_slides([tmp_path])
    assert names(archive) == ["a"]
    (said,) = archive.unread
    assert said == (
        f"{tmp_path}/old holds ledger.csv and run.json: results of a run are not searched for slides; where some lie "
        f"there, move the results away"
    )
