"""Searches folders for slides: each is listed once, however often it is reached, and only DICOM files are opened."""

import itertools
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.archive.inputs.naming import Place
from pipeline.archive.inputs.remote import RemoteFolder, RemoteSlide, locate
from pipeline.errors import RunError
from pipeline.layout import STAGED, RunFolder
from pipeline.text import counted, printable
from slides.dicom import read_header
from slides.errors import SlideError
from slides.parts import Directory, LocalDirectory

SUFFIXES = frozenset(
    [
        ".bif",
        ".czi",
        ".dcm",
        ".mrxs",
        ".ndpi",
        ".scn",
        ".svs",
        ".svslide",
        ".tif",
        ".tiff",
        ".vms",
        ".vmu",
    ]
)  # of OpenSlide's formats; files with others are slides only where they are given by name

# folders of snapshots and deleted files: slides in there would be processed twice
_SYSTEM = frozenset(
    ["$recycle.bin", ".trash", ".trashes", ".snapshot", ".snapshots", ".appledouble", "@eadir", "#recycle", "__macosx"]
)
_APPLE_DOUBLE = "._"  # macOS writes ._x.svs beside x.svs where a file system cannot store its attributes
_OF_A_RUN = {RunFolder(Path()).run_json.name, RunFolder(Path()).ledger.name}  # mark a folder of results
_MIRAX_PARTS = "slidedat.ini"  # marks the folder of a .mrxs file, which holds nothing but parts of that slide


class SlideFile(NamedTuple):
    """A slide: the file to open, and the place that its name comes from; remote: where it is if not on a disk."""

    path: Path
    place: Place
    remote: RemoteSlide | None = None


@dataclass
class Search:
    """The slides listed so far, by a key: the real path, or for DICOM the real folder and the series.

    out: real path of the folder of results, which is not searched.
    follow_links: links that lead out of the input folder that they lie in are followed; others always are.
    Law: the slides do not depend on the order in which folders are given.
    """

    out: str | None = None
    follow_links: bool = False
    slides: dict[str, SlideFile] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # key -> why the slide cannot be processed
    unread: list[str] = field(default_factory=list)  # folders, and links that were not followed, and why
    _others: dict[str, str] = field(default_factory=dict)  # real paths of files that are no slides -> key
    _links: deque[Place] = field(default_factory=deque)
    _searched: set[str] = field(default_factory=set)  # real paths of folders
    _outward: Counter[Path] = field(default_factory=Counter)  # input folder -> links that lead out of it
    _given: dict[Path, str] = field(default_factory=dict)  # input folder -> its real path, or URL
    _settled: set[Path] = field(default_factory=set)  # input folders with a slide, or of which something else is said

    @property
    def skipped(self) -> int:
        """How many files are no slides; those that belong to a DICOM slide, or are added by name, are not counted."""
        return sum(key not in self.slides for key in self._others.values())

    @property
    def bare(self) -> list[str]:
        """A line for each input folder in which there is no slide, found there or by way of another input."""
        bare = [real for home, real in self._given.items() if home not in self._settled]
        if bare:  # else thousands of slides would be looked up on their disks once more
            slides = [Path(os.path.realpath(slide.path)) for slide in self.slides.values() if slide.remote is None]
            bare = [real for real in bare if not any(slide.is_relative_to(real) for slide in slides)]
        need = "need files with a suffix such as .svs or .tiff; its disk may not be mounted"
        return [printable(f"no slides in {real}: {need}") for real in sorted(bare)]

    def folders(self, given: Iterable[Path]) -> None:
        """Search folders to any depth: outer ones before those inside them, and the targets of links at last."""
        for real, path in sorted((os.path.realpath(p), os.path.abspath(p)) for p in given):
            self._given[Path(path)] = real
            self._tree(Place(Path(path), ""), real)
        while self._links:
            self._link(self._links.popleft())
        for home, count in sorted(self._outward.items()):
            links = counted(count, "link leads", "links lead")
            self.unread.append(printable(f"{links} out of {home}: not followed, give --follow-links"))

    def add(self, path: Path, place: Place) -> str:
        """A slide that is given by name, whatever its suffix, whether it exists or not. Returns its key."""
        self._settled.add(place.home)
        key = real = os.path.realpath(path)
        if os.path.isfile(real):
            key, _ = self._identify(real, LocalDirectory(Path(real).parent))
        else:
            self.problems[key] = _missing(path)
        self.slides.setdefault(key, SlideFile(path, place))
        return key

    def url(self, url: str) -> None:
        """The slide at a URL, or all slides below it. Raises as `pipeline.archive.inputs.remote.locate`."""
        found = locate(url)
        if isinstance(found, RemoteSlide):
            self._add_remote(found)
            return
        self._given[Path(found.url(""))] = found.url("")
        names = found.everything()
        held: defaultdict[str, set[str]] = defaultdict(set)
        for name in names:
            folder, _, file = name.rpartition("/")
            held[folder].add(file)
        of_runs = {folder for folder, files in held.items() if files >= _OF_A_RUN}
        self.unread += [_results(found.url(folder)) for folder in sorted(of_runs)]
        left_out = of_runs | {folder for folder, files in held.items() if _MIRAX_PARTS in map(str.casefold, files)}
        for name in names:
            folder, _, file = name.rpartition("/")
            around = {"", *itertools.accumulate(folder.split("/"), "{}/{}".format)}
            if not around & left_out and not any(map(_is_system, folder.split("/"))):
                place = Place(Path(found.url("")), name)
                self._file(place, found.url(name), RemoteSlide(found.inner(folder), file))

    def add_url(self, found: RemoteFolder | RemoteSlide | RunError, path: Path, place: Place) -> str:
        """A slide that a manifest names by its URL, there or not; path, place: of the URL. Returns its key.

        found: what is there, of `pipeline.archive.inputs.remote.locate_each`
        """
        if isinstance(found, RemoteSlide):
            return self._add_remote(found)
        if isinstance(found, RemoteFolder):
            problem = f"{found.url('')} is no file: need one, or give the folder itself as an input"
        else:
            problem = str(found)
        self.slides[str(path)] = SlideFile(path, place)
        self.problems[str(path)] = printable(problem)
        return str(path)

    def _add_remote(self, slide: RemoteSlide) -> str:
        place = Place(Path(slide.folder.url("")), slide.name)
        key, _ = self._identify(slide.place, slide.folder)
        known = self.slides.setdefault(key, SlideFile(place.path, place, slide)).remote
        if known is not None and known is not slide and known.place == slide.place:
            try:
                if known.entry() == slide.entry():
                    return key
                problem = (
                    f"{slide.place} has several URLs, of files that differ: give one, and the others in commands of "
                    f"their own with another --out"
                )
            except SlideError as error:
                problem = str(error)
            self.problems[key] = printable(problem)
        return key

    def _tree(self, top: Place, real: str) -> None:
        """Search a folder to any depth; links are kept for later."""
        waiting = [(top.relative, real)]
        while waiting:
            relative, real = waiting.pop()
            if real in self._searched or (self.out and (real == self.out or real.startswith(self.out + os.sep))):
                continue
            self._searched.add(real)
            inner = self._folder(top.home, relative, real)
            waiting += [(f"{relative}/{name}" if relative else name, os.path.join(real, name)) for name in inner]

    def _folder(self, home: Path, relative: str, real: str) -> list[str]:
        """Sort out the files of one folder. Returns the names of its folders, the last one first."""
        path = home / relative
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            self._say(home, relative, printable(f"{path}: {error.strerror}"))
            return []
        names = {entry.name for entry in entries}
        if any(name.casefold() == _MIRAX_PARTS for name in names):
            return []
        if names >= _OF_A_RUN:
            self._say(home, relative, _results(path))
            return []
        inner = []
        for entry in entries:
            place = Place(home, f"{relative}/{entry.name}" if relative else entry.name)
            try:
                if self._entry(entry, place, os.path.join(real, entry.name)):
                    inner.append(entry.name)
            except OSError as error:
                self.unread.append(printable(f"{place.path}: {error.strerror}"))
        return inner[::-1]

    def _say(self, home: Path, relative: str, why: str) -> None:
        """Note why a folder is not searched."""
        self.unread.append(why)
        if not relative:
            self._settled.add(home)

    def _entry(self, entry: os.DirEntry[str], place: Place, real: str) -> bool:
        """Note what lies in a folder; whether it is a folder to search. Raises OSError."""
        if entry.is_symlink():
            self._links.append(place)
        elif entry.is_file(follow_symlinks=False):
            self._file(place, real)
        elif entry.is_dir(follow_symlinks=False) and not _is_system(entry.name):
            return True
        else:
            self._other(real)
        return False

    def _link(self, place: Place) -> None:
        """Follow a link, after all else. A broken link with a slide's suffix is a slide that fails."""
        path = place.path
        real = os.path.realpath(path)
        wanted = not _is_system(path.name) if os.path.isdir(real) else os.path.isfile(real) and _is_slide(path.name)
        if wanted and not self.follow_links and not Path(real).is_relative_to(os.path.realpath(place.home)):
            self._outward[place.home] += 1
        elif os.path.isdir(real) and not _is_system(path.name):
            if real in self._searched:  # by way of another folder, which has its slides
                self._settled.add(place.home)
            self._tree(place, real)
        elif os.path.isfile(real):
            self._file(place, real)
        elif _is_slide(path.name):
            self.add(path, place)
        elif os.path.exists(real):
            self._other(real)
        else:
            self.unread.append(_missing(path))

    def _file(self, place: Place, real: str, remote: RemoteSlide | None = None) -> None:
        """A file in a folder: a slide by its suffix, and for DICOM by its header; real: its path or URL."""
        if not _is_slide(place.relative.rpartition("/")[2]):
            self._other(real)
            return
        key, opens = self._identify(real, remote.folder if remote else LocalDirectory(Path(real).parent))
        if opens:
            self._settled.add(place.home)
            self.slides.setdefault(key, SlideFile(place.path, place, remote))
        else:
            self._other(real, key)

    def _other(self, real: str, key: str = "") -> None:
        self._others[real] = key or real

    def _identify(self, real: str, folder: Directory) -> tuple[str, bool]:
        """The key of a file, and whether a slide can be opened by it: of a DICOM series, by each file of a level."""
        if not real.lower().endswith(".dcm"):
            return real, True
        try:
            with folder.open(os.path.basename(real)) as file:
                header = read_header(file, real)
        except (OSError, SlideError) as error:
            self.problems[real] = printable(error)
            return real, True
        if header is None:
            return real, False
        return f"{os.path.dirname(real)} {header.series}", header.is_level


def _is_slide(name: str) -> bool:
    return not name.startswith(_APPLE_DOUBLE) and os.path.splitext(name)[1].lower() in SUFFIXES


def _is_system(name: str) -> bool:
    return name.casefold() in _SYSTEM or name.startswith((".Trash-", STAGED))


def _results(folder: object) -> str:
    what = f"{folder} holds {' and '.join(sorted(_OF_A_RUN))}: results of a run are not searched for slides"
    return printable(f"{what}; where some lie there, move the results away")


def _missing(path: Path) -> str:
    # of os.path, which answers where pathlib raises: names too long, folders that may not be entered
    if os.path.isdir(path):
        return printable(f"{path} is a folder: name the slides in it, or give the folder itself as an input")
    if os.path.exists(path):
        return printable(f"{path} is no regular file, but a pipe or a device: need the file of a slide")
    if os.path.islink(path):
        return printable(f"{path} is a link to {_target(path)}, which does not exist: restore it")
    remedy = "correct the manifest" if _is_text(path) else "save the manifest as CSV in UTF-8"
    return printable(f"{path} does not exist: restore it, or {remedy}")


def _is_text(path: Path) -> bool:
    """Whether a name is Unicode, and holds no bytes that stand for themselves, as those of a manifest in Latin-1 do."""
    return not any("\udc80" <= character <= "\udcff" for character in str(path))


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # it was just removed
        return "somewhere"
