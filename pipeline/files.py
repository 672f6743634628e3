"""Files and folders that are complete or absent: written beside, synced, renamed. And JSON."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from slides.partial import PREFIX, partial_path, replace


@contextlib.contextmanager
def committed(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A path beside `path` for a new file or folder (same suffix), which becomes `path` when the block ends well.

    Synced, then renamed over what was there, then the folder is synced: a reader, or a machine that lost
    power, has all of it or nothing. On an error the partial file is removed, and an OSError for which `refusal` has
    words names `path`; what cannot be removed, or a killed process leaves, is left to `sweep`. Writers of the same file
    do not disturb each other; the last one stays.
    synced: False for scratch that has a checksum, as many disks take longer to sync than to write it; what a machine
    that lost power has of it may be damaged.
    """
    partial = partial_path(path)
    try:
        yield partial
        if synced:
            _sync(partial)
        _replace(partial, path)
        if synced:
            _sync_names(path.parent)
    except OSError as error:
        # other libraries name a file in their message; one that is read here is not what is written
        unnamed = error.filename is None and os.sep not in (error.strerror or "")
        if error.errno in _REMEDIES and (unnamed or partial.name in os.fsdecode(error.filename or "")):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # of a folder that is read-only by now: it would hide the error above
            remove(partial)


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"Numbers of errors: no space is left, or none of a quota."

_FULL, _FORBIDDEN = "free some space there", "make it a file or folder that may be read and written"
if os.name == "nt":
    _FORBIDDEN = f"close the programs that have it open, or {_FORBIDDEN}"
_REMEDIES = {
    **dict.fromkeys(FULL_DISK, _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "look whether the disk or file server is in order"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "move away the file that is in the place of a folder"),
    errno.ELOOP: "remove the symbolic link that leads to itself",
    errno.EISDIR: "move away the folder that is in the place of a file",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EFBIG: "use a disk that takes larger files, or raise the limit of `ulimit -f`",
}


def refusal(error: OSError) -> str:
    """In words: the path, what the system refused there, and the remedy. Empty for other errors than those of a full
    disk, of files that are larger than it takes, of files and folders that may not be read or written, of a disk or
    file server that fails, and of names that are too long, taken by a file or a folder, or links that lead to
    themselves.
    """
    if error.errno not in _REMEDIES:
        return ""
    if error.filename is None:
        said = error.strerror or os.strerror(error.errno)  # of other libraries, which name the file in there
    else:
        said = f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"
    return f"{said}: {_REMEDIES[error.errno]}, and give the same command again"


def _replace(partial: Path, path: Path) -> None:
    """Rename over what is there: a file over a file, a folder over a folder, either over a link.

    A folder or link in the place of a folder is moved away first: no folder can be renamed over it. A folder in the
    place of a file is not ours, nor is a file in the place of a folder: IsADirectoryError or NotADirectoryError, on
    Windows PermissionError.
    """
    while True:
        try:
            return replace(partial, path)
        except OSError:
            if not (partial.is_dir() and (path.is_dir() or path.is_symlink())):
                raise
            former = partial_path(path)
            with contextlib.suppress(FileNotFoundError):  # another writer was faster
                replace(path, former)
                remove(former)


def refuse_folder(path: Path) -> None:
    """Raise ConfigError where a user names a folder for a file: the file would take the place of all that is in it."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: need a name for the file that is written, inside it or elsewhere")


def remove(path: Path) -> None:
    """Remove a file or a folder, there or not; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sync a file, or a folder with all that is in it."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
        _sync_names(path)
    else:
        _sync_handle(path, os.O_RDWR)  # Windows syncs only what is open for writing


def _sync_names(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync_handle(folder, os.O_RDONLY)


def _sync_handle(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`, while nobody writes there."""
    for leftover in list(folder.glob(f"{PREFIX}*")):
        remove(leftover)


def now_ns(folder: Path) -> int:
    """The time by the clock that stamps the files of `folder`, in ns: the clocks of machines differ."""
    stamp = partial_path(folder / "now")
    try:
        stamp.touch()
    except OSError as error:
        error.filename = str(folder)  # the file's own name says nothing to anybody
        raise
    try:
        return stamp.stat().st_mtime_ns
    finally:
        stamp.unlink()


def mtime_ns(path: Path) -> int | None:
    """When a file was written, by the clock of its file system; None where there is none (any more) that we may see."""
    try:
        return path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def stamp(path: Path) -> tuple[int, ...]:
    """Size, time of the last change in ns, and inode of a file: another tuple where the file was replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def write_json(path: Path, content: Any, *, synced: bool = True) -> None:
    """Commit `content` (what JSON holds; tuples become lists) to `path`, in UTF-8, indented."""
    with committed(path, synced=synced) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, it cannot be read, or it holds anything else."""
    try:
        return read_json_if_there(path)
    except OSError:
        return None


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """As `read_json`, for what is replaced where there is none. Raises OSError where it is there and cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError, MemoryError):  # a damaged file may be of any size
        return None
    return content if isinstance(content, dict) else None


# ----------------------------------------------------------------------------------- files with a checksum


def write_checked_json(path: Path, content: dict[str, Any], *, synced: bool = True) -> None:
    """Commit `content` with a checksum of its own; see `read_checked_json`."""
    write_json(path, {"sha256": _digest(content), "content": content}, synced=synced)


def read_checked_json(path: Path) -> dict[str, Any] | None:
    """What `write_checked_json` wrote; None where the file is missing, cannot be read, or is damaged in any way."""
    try:
        return read_checked_json_if_there(path)
    except OSError:
        return None


def read_checked_json_if_there(path: Path) -> dict[str, Any] | None:
    """As `read_checked_json`. Raises OSError where the file is there and cannot be read."""
    stored = read_json_if_there(path) or {}
    content = stored.get("content")
    return content if isinstance(content, dict) and stored.get("sha256") == _digest(content) else None


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with a checksum of all the rest in its field `sha256`, for files that others read, too."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": _digest(json.loads(json.dumps(rest)))}


def fits_checksum(content: Mapping[str, Any]) -> bool:
    """Whether content read from a file is what `with_checksum` gave, or has no checksum."""
    return "sha256" not in content or content["sha256"] == with_checksum(content)["sha256"]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def checked(path: Path, about: dict[str, Any]) -> Iterator[Path]:
    """As `committed`, with a second file beside it that holds its checksum and `about` (what JSON holds). Not synced.

    Two writers of equal bytes do not disturb each other: the checksum of one fits the file of the other.
    """
    with committed(path, synced=False) as partial:
        yield partial
        checksum = file_sha256(partial)
    write_checked_json(_checksum_file(path), {"file": checksum, "about": about}, synced=False)


def read_checked(path: Path) -> dict[str, Any] | None:
    """`about` of a file that `checked` wrote; None where it or its checksum is missing, damaged, or cannot be read."""
    try:
        return read_checked_if_there(path)
    except OSError:
        return None


def read_checked_if_there(path: Path) -> dict[str, Any] | None:
    """As `read_checked`. Raises OSError where one of the two is there and cannot be read."""
    stored = read_checked_json_if_there(_checksum_file(path))
    try:
        return stored["about"] if stored is not None and stored["file"] == file_sha256(path) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum, that one first: a file without it counts as missing."""
    _checksum_file(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.checksum")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- a file or a folder


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder. Raises OSError where there is neither."""
    return sum(file.stat().st_size for file in _contents(path))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, or of the names and checksums of all files in a folder."""
    if not path.is_dir():
        return file_sha256(path)
    lines = (f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in _contents(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _contents(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else [path]
