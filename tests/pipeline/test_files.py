"""Files and folders appear complete or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import files
from slides import partial as partial_files


def test_a_committed_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "a.json"
    with files.committed(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
        assert partial.parent == tmp_path
        assert partial.suffix == ".json"
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with files.committed(target) as partial:
            partial.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_is_not_hidden_by_a_partial_file_that_cannot_be_removed(tmp_path, monkeypatch):
    """A file system that is read-only refuses to remove even what is not there: that file was named, not the other."""

    def refuse(path, **_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as raised, files.committed(tmp_path / "table") as partial:
        refuse(partial)
    assert files.refusal(raised.value).startswith(f"{tmp_path / 'table'}: Read-only file system: make it")


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "a"
    with files.committed(target) as first:
        first.write_text("first")
        with files.committed(target) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.files import committed\n"
        "with committed(Path(sys.argv[1]) / 'a.json') as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.json").exists()
    assert len(os.listdir(tmp_path)) == 1
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs a limit of the size of files")
def test_a_file_that_is_too_large_is_named_with_the_remedy(tmp_path):
    """For its disk, such as one of FAT, or for a limit."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with files.committed(tmp_path / "t") as partial:
            partial.write_bytes(bytes(2000))

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.refusal(raised.value).startswith(f"{tmp_path / 't'}: File too large: use a disk that takes larger")
    assert os.listdir(tmp_path) == []


def test_sweeping_spares_complete_files(tmp_path):
    (tmp_path / "nuclei.parquet").write_text("whole")
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["nuclei.parquet"]


# ---------------------------------------------------------------------------------------------- folders


def make_folder(path: Path, text: str) -> None:
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "c.txt").write_text(text)


LINKS = ("a link to a folder", "a link to a file", "a link to nothing")


@pytest.mark.parametrize("there", ["nothing", "a folder", *LINKS])
def test_a_folder_replaces_what_is_there(tmp_path, there):
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "t.zarr"
    make_folder(tmp_path / "folder", "of somebody")
    (tmp_path / "file").write_text("of somebody")
    if there == "a folder":
        make_folder(target, "old")
        (target / "more.txt").write_text("old")
    elif there in LINKS:
        target.symlink_to(tmp_path / there.removeprefix("a link to a "))
    with files.committed(target) as partial:
        make_folder(partial, "new")
        assert partial.suffix == ".zarr"
    assert [str(path.relative_to(target)) for path in target.rglob("*.txt")] == ["a/b/c.txt"]
    assert (target / "a" / "b" / "c.txt").read_text() == "new"
    assert not target.is_symlink()
    assert os.listdir(tmp_path / "out") == ["t.zarr"]
    assert (tmp_path / "folder" / "a" / "b" / "c.txt").read_text() == "of somebody"
    assert (tmp_path / "file").read_text() == "of somebody"


@pytest.mark.skipif(os.name != "posix", reason="on Windows both are a PermissionError")
def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(tmp_path):
    """We never make the one in the place of the other: what was in it was lost."""
    make_folder(tmp_path / "folder", "of somebody")
    (tmp_path / "file").write_text("of somebody")

    def write(name: str) -> None:
        with files.committed(tmp_path / name) as partial:
            if name == "file":
                make_folder(partial, "new")
            else:
                partial.write_text("new")

    with pytest.raises(IsADirectoryError) as over_folder:
        write("folder")
    assert files.refusal(over_folder.value).startswith(f"{tmp_path / 'folder'}: Is a directory: move away the folder")
    with pytest.raises(NotADirectoryError) as over_file:
        write("file")
    assert files.refusal(over_file.value).startswith(f"{tmp_path / 'file'}: Not a directory: move away the file")
    assert (tmp_path / "folder" / "a" / "b" / "c.txt").read_text() == "of somebody"
    assert (tmp_path / "file").read_text() == "of somebody"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def held_open(monkeypatch, times):
    """As on Windows, where nothing is renamed while a virus scanner has it open. Returns the tries."""
    tries = []

    def replace(*paths, replace=os.replace):
        tries.append(paths)
        if len(tries) <= times:
            raise PermissionError(errno.EACCES, "Access is denied", *map(str, paths))
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace)
    return tries


def test_on_windows_a_file_that_is_open_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_files, "_PATIENCE_S", 60.0)
    held_open(monkeypatch, 3)
    with files.committed(tmp_path / "t") as partial:
        partial.write_text("new")
    assert (tmp_path / "t").read_text() == "new"


@pytest.mark.parametrize("patience_s", [0.0, 0.1])
def test_a_file_that_stays_open_is_an_error_that_names_it(tmp_path, monkeypatch, patience_s):
    monkeypatch.setattr(partial_files, "_PATIENCE_S", patience_s)
    tries = held_open(monkeypatch, 1000)
    with pytest.raises(PermissionError) as refused, files.committed(tmp_path / "t") as partial:
        partial.write_text("new")
    assert files.refusal(refused.value).startswith(f"{tmp_path / 't'}: Permission denied: ")
    assert (len(tries) > 1) == (patience_s > 0)


def test_two_writers_of_one_folder_leave_that_of_the_last(tmp_path):
    with files.committed(tmp_path / "t") as first:
        make_folder(first, "first")
        with files.committed(tmp_path / "t") as second:
            make_folder(second, "second")
    assert (tmp_path / "t" / "a" / "b" / "c.txt").read_text() == "first"
    assert os.listdir(tmp_path) == ["t"]


def test_an_error_leaves_the_old_folder(tmp_path):
    make_folder(tmp_path / "t", "old")

    def fail() -> None:
        with files.committed(tmp_path / "t") as partial:
            make_folder(partial, "half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert (tmp_path / "t" / "a" / "b" / "c.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("synced", [True, False])
def test_a_writer_that_makes_nothing_leaves_the_old_folder(tmp_path, synced):
    make_folder(tmp_path / "t", "old")
    with pytest.raises(FileNotFoundError), files.committed(tmp_path / "t", synced=synced):
        pass
    assert (tmp_path / "t" / "a" / "b" / "c.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["t"]


def test_sweeping_removes_half_a_folder(tmp_path):
    make_folder(tmp_path / ".partial-0123456789ab-t", "half")
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", ["content", "name", "another file"])
def test_the_checksum_of_a_folder_is_of_names_and_content(tmp_path, change):
    for name in "xy":
        make_folder(tmp_path / name, "same")
    assert files.sha256(tmp_path / "x") == files.sha256(tmp_path / "y")
    assert files.size_bytes(tmp_path / "x") == 4
    file = tmp_path / "y" / "a" / "b" / "c.txt"
    if change == "content":
        file.write_text("Same")
    elif change == "name":
        file.rename(file.with_name("d.txt"))
    else:
        file.with_name("d.txt").touch()
    assert files.sha256(tmp_path / "x") != files.sha256(tmp_path / "y")


def test_a_file_that_may_not_be_read_keeps_its_name(tmp_path):
    """While another one is written: the error is not about that."""
    with pytest.raises(PermissionError) as raised, files.committed(tmp_path / "table.csv"):
        raise PermissionError(errno.EACCES, "Permission denied", "/archive/nuclei.parquet")
    assert files.refusal(raised.value).startswith("/archive/nuclei.parquet: Permission denied: make it")
    with pytest.raises(OSError, match="No space") as full, files.committed(tmp_path / "table.csv") as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert files.refusal(full.value).startswith(f"{tmp_path / 'table.csv'}: No space left on device: free")


def test_a_folder_that_does_not_say_the_time_is_named(tmp_path):
    """Not the file that is made for it."""
    with pytest.raises(FileNotFoundError) as raised:
        files.now_ns(tmp_path / "gone")
    assert raised.value.filename == str(tmp_path / "gone")
