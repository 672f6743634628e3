"""Files that are complete or absent: written beside, synced, renamed. And JSON."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slides.partial import PREFIX, partial_path


@contextlib.contextmanager
def committed(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to (same suffix), which becomes `path` when the block ends well.

    Synced, then renamed over what was there, then the folder is synced: a reader, or a machine that lost
    power, has all of the file or nothing. On an error the partial file is removed; a killed process leaves
    it to `sweep`. Writers of the same path do not disturb each other; the last one stays.
    """
    partial = partial_path(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing; a folder opens only for reading.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> int:
    """Remove what killed writers left in `folder`, while nobody writes there. Returns how many files."""
    leftovers = list(folder.glob(f"{PREFIX}*"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def now_ns(folder: Path) -> int:
    """The time by the clock that stamps the files of `folder`, in ns: the clocks of machines differ."""
    stamp = partial_path(folder / "now")
    stamp.touch()
    try:
        return stamp.stat().st_mtime_ns
    finally:
        stamp.unlink()


def mtime_ns(path: Path) -> int | None:
    """When a file was written, by the clock of its file system; None where there is none (any more)."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def write_json(path: Path, content: Any) -> None:
    """Commit `content` (what JSON holds; tuples become lists) to `path`, in UTF-8, indented."""
    with committed(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


# ----------------------------------------------------------------------------------- files with a checksum


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """Commit `content` with a checksum of its own; see `read_checked_json`."""
    write_json(path, {"sha256": _digest(content), "content": content})


def read_checked_json(path: Path) -> dict[str, Any] | None:
    """What `write_checked_json` wrote; None where the file is missing or damaged in any way."""
    stored = read_json(path) or {}
    content = stored.get("content")
    return content if isinstance(content, dict) and stored.get("sha256") == _digest(content) else None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def checked(path: Path, about: dict[str, Any]) -> Iterator[Path]:
    """As `committed`, with a second file beside it that holds its checksum and `about` (what JSON holds).

    Two writers of equal bytes do not disturb each other: the checksum of one fits the file of the other.
    """
    with committed(path) as partial:
        yield partial
        checksum = file_sha256(partial)
    write_checked_json(_checksum_file(path), {"file": checksum, "about": about})


def read_checked(path: Path) -> dict[str, Any] | None:
    """`about` of a file that `checked` wrote; None where it or its checksum is missing or damaged."""
    stored = read_checked_json(_checksum_file(path))
    try:
        return stored["about"] if stored is not None and stored["file"] == file_sha256(path) else None
    except OSError:
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
