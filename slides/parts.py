"""The files that a slide consists of: one for most formats, many for MIRAX, DICOM and Hamamatsu's VMS and VMU.

Which they are is decided here once, for folders on a disk and for those of an object store (`Directory`). A slide that
is copied with its parts, under their names, opens as the original does.
"""

import configparser
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from slides.dicom import Header, read_header
from slides.errors import SlideUnreadable

_KEY_FILES = (".vms", ".vmu")
_LARGEST_KEY_FILE = 2**20  # bytes; real ones have a few kB


class Directory(Protocol):
    """The folder in which a slide lies."""

    def files(self) -> list[str]:
        """Names of the files in it, folders left out."""

    def below(self, name: str) -> list[str]:
        """The files at any depth in the folder of this name in it, as `name/...`; none where there is no folder."""

    def open(self, name: str) -> BinaryIO:
        """A file in it, to be read. Raises OSError."""


class LocalDirectory:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[str]:
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def below(self, name: str) -> list[str]:
        found = [
            os.path.relpath(os.path.join(folder, file), self.path)
            for folder, _, files in os.walk(self.path / name, onerror=_raise)
            for file in files
            if _is_file(os.path.join(folder, file))
        ]
        return sorted(path.replace(os.sep, "/") for path in found)

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")


def parts(name: str, directory: Directory) -> list[str]:
    """The files of the slide `name`, relative to its directory, "/" between folders; the one to open comes first.

    MIRAX: all in the folder of the slide's name. VMS and VMU: what the file names, if it is there. DICOM: all files
    of the series in the same folder. Any other: that file alone.
    Raises OSError; SlideUnreadable for a DICOM file with a damaged header.
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".mrxs":
        return [name, *directory.below(stem)]
    if suffix.lower() in _KEY_FILES:
        return [name, *_named_in(name, directory)]
    header = _header(name, directory)
    return [name, *([] if header is None else _of_series(header.series, name, directory))]


def _named_in(name: str, directory: Directory) -> list[str]:
    """The files that a VMS or VMU file names: an INI file, as in OpenSlide's documentation of Hamamatsu's formats."""
    with directory.open(name) as file:
        text = file.read(_LARGEST_KEY_FILE).decode("latin-1")
    ini = configparser.RawConfigParser(delimiters=("=",), strict=False)
    try:
        ini.read_string(text)
    except configparser.Error:
        return []  # OpenSlide says what is wrong with it
    values = {value for section in ini.values() for value in section.values()}
    return sorted(values.intersection(directory.files()) - {name})


def _of_series(series: str, name: str, directory: Directory) -> Iterator[str]:
    for other in directory.files():
        if other == name:
            continue
        try:
            header = _header(other, directory)
        except (SlideUnreadable, OSError):  # of an unknown series
            continue
        if header is not None and header.series == series:
            yield other


def _header(name: str, directory: Directory) -> Header | None:
    with directory.open(name) as file:
        return read_header(file, name)


def _is_file(path: str) -> bool:
    """Not so a link to nothing, nor a pipe, which would be waited for. Raises OSError for one that is not given."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # there is no such folder
        raise error
