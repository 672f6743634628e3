"""An archive: the slides among files, folders and manifests, and the names of their results."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.archive.inputs.naming import Place, name_slides
from pipeline.archive.inputs.remote import RemoteSlide, is_url, locate_each, without_secrets
from pipeline.archive.inputs.search import SUFFIXES, Search
from pipeline.archive.inputs.staging import LocalSlide, SlideFiles
from pipeline.errors import RunError
from pipeline.text import printable
from slides.scale import FORCED, NEED_MPP, GivenScale, is_believable

IN_MANIFEST = "manifest"  # source of a scale
_NEED_INPUTS = "need slides, folders of slides, or a CSV manifest"

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"Slides, folders (searched), URLs of either, and CSV manifests: one of them or several."


class Source(NamedTuple):
    """A slide of the archive, and the folder of its results relative to the run's."""

    path: Path  # of a slide at a URL, that as a path: it has its name, but cannot be opened
    name: str
    scale: GivenScale
    problem: str = ""  # why it cannot be processed, where that is known without opening it
    regions: Path | None = None  # the file of the regions that it is restricted to
    skip: str = ""  # why it is left out, as the user asked
    remote: RemoteSlide | None = None

    @property
    def place(self) -> str:
        return self.remote.place if self.remote else str(self.path)

    @property
    def files(self) -> SlideFiles:
        # of os.path, as pathlib refuses links in a circle
        return self.remote or LocalSlide(Path(os.path.realpath(self.path)))


class Archive(NamedTuple):
    """Slides in the order of their names, and what else the inputs hold."""

    sources: tuple[Source, ...]
    skipped: int  # files in the folders that are no slides
    unread: tuple[str, ...] = ()  # what is left out, and why: folders, those without slides, links, slides to skip


class _Given(NamedTuple):
    """A slide that is named, by the user or in a manifest."""

    place: Place
    path: Path
    mpp: float | None = None
    problem: str = ""
    url: str = ""  # with its secrets


def find_slides(
    inputs: Inputs,
    out: Path | None = None,
    *,
    mpp: float | None = None,
    force_mpp: float | None = None,
    follow_links: bool = False,
    urls: bool = False,
) -> Archive:
    """Slides among files, folders (searched to any depth, `out` left out), URLs of either, and CSV manifests.

    A folder's slides are known by their suffix, DICOM files by their header; a slide of several files, or one that
    is reached in several ways, is listed once. Links that lead out of an input folder are followed only with
    `follow_links`; those within it, and those that are named, always. A manifest has the columns path, relative to
    itself, and perhaps mpp, which overrides what the slide states; `mpp` is for slides that state none, `force_mpp`
    for all. An error in a row of a manifest is that slide's `problem` and stops no other. `naming` has the rule of
    names, which does not depend on the order of the inputs. urls: whether the slides will be copied to a disk before
    they are read.
    Raises RunError for an input that does not exist, that is no manifest, or lies in `out`; for a URL without `urls`;
    for a scale that no slide has; and where no slide is.
    """
    _check_scales({"mpp": mpp, "force-mpp": force_mpp})
    given_inputs = _listed(inputs)
    if not given_inputs:  # such as a pattern that no file fits
        raise RunError(f"there is no input: {_NEED_INPUTS}")
    if "" in given_inputs:  # as a path it would be the current folder
        raise RunError(f"an input is empty: {_NEED_INPUTS}; `.` is this folder")
    remote = [str(given) for given in given_inputs if is_url(given)]
    paths = [Path(given) for given in given_inputs if not is_url(given)]
    # the outermost folder names a slide, as it does in the search
    out_folder = None if out is None else os.path.realpath(out)
    named = sorted(_named(paths, out_folder), key=lambda given: (len(given.place.home.parts), given.place, given.path))
    every_url = [*remote, *(given.url for given in named if given.url)]
    if every_url and not urls:
        raise RunError(
            f"{without_secrets(every_url[0])}: slides at URLs are read only by `nightslide run` with --stage DIR, a "
            f"folder on this machine's disk into which each is copied first"
        )
    search = Search(out_folder, follow_links)
    search.folders(_folders(paths, out_folder))
    for url in sorted(remote, key=without_secrets):
        search.url(url)
    scales = _add_named(named, search)
    names = name_slides([file.place for file in search.slides.values()])
    sources = [
        Source(file.path, name, _scale(scales[key], mpp, force_mpp), search.problems.get(key, ""), remote=file.remote)
        for name, (key, file) in zip(names, search.slides.items(), strict=True)
    ]
    if not sources:
        searched = ", ".join([*map(str, paths), *map(without_secrets, remote)])
        raise RunError(
            f"no slides in {searched}: {search.skipped} other files were skipped; folders are searched for "
            f"{' '.join(sorted(SUFFIXES))}" + "".join(f"; not searched: {cause}" for cause in search.unread)
        )
    return Archive(tuple(sorted(sources, key=lambda s: s.name)), search.skipped, (*search.unread, *search.bare))


def _listed(inputs: Inputs) -> list[str | os.PathLike[str]]:
    """The inputs one by one. Raises RunError for what is no path, which Python does not refuse before it is run."""
    if isinstance(inputs, str | os.PathLike):
        return [inputs]
    listed: list[Any] = [inputs] if isinstance(inputs, bytes) or not isinstance(inputs, Iterable) else list(inputs)
    for given in listed:
        if not isinstance(given, str | os.PathLike):
            raise RunError(f"an input is {given!r}: {_NEED_INPUTS}, as text or as paths")
    return listed


def _check_scales(given: Mapping[str, float | None]) -> None:
    """Raise RunError for a scale that no slide has. given: by the name of its flag, of any type."""
    for flag, scale in given.items():
        if scale is not None and not is_believable(scale):
            raise RunError(f"{flag}={scale!r}: {NEED_MPP}")


def _add_named(named: Sequence[_Given], search: Search) -> defaultdict[str, set[float]]:
    """Add the slides that are named to those found, and note what is wrong with them. Returns their scales by key."""
    scales: defaultdict[str, set[float]] = defaultdict(set)
    found = locate_each(given.url for given in named if given.url)
    for given in named:
        where = (given.path, given.place)
        key = search.add_url(found[given.url], *where) if given.url else search.add(*where)
        if given.mpp is not None:
            scales[key].add(given.mpp)
        if given.problem:
            search.problems.setdefault(key, given.problem)
    for key, values in scales.items():
        if len(values) > 1:
            search.problems.setdefault(key, f"mpp is given as {' and as '.join(map(str, sorted(values)))}: need one")
    return scales


def _scale(in_manifests: set[float], mpp: float | None, force_mpp: float | None) -> GivenScale:
    if force_mpp is not None:
        return GivenScale(force_mpp, FORCED)
    if in_manifests:
        return GivenScale(min(in_manifests), IN_MANIFEST)
    return GivenScale(default_mpp=mpp)


def _folders(inputs: Sequence[Path], out: str | None) -> Iterator[Path]:
    """The folders among the inputs. Raises RunError for one in which the results would come to lie."""
    for given in inputs:
        if os.path.isdir(given):
            _check_apart(given, out)
            yield given


def _check_apart(given: Path, out: str | None) -> None:
    """Raise RunError for an input in the folder of results: a folder that holds results is not searched for slides."""
    if out is not None and Path(os.path.realpath(given)).is_relative_to(out):
        raise RunError(f"--out {out} is, or holds, the input {given}: need a folder apart from the slides")


def _named(inputs: Sequence[Path], out: str | None) -> Iterator[_Given]:
    """The slides that are named. Raises RunError for an input that does not exist, is no manifest, or lies in `out`."""
    for given in inputs:
        if not os.path.exists(given):
            raise RunError(f"{given} does not exist: {_NEED_INPUTS}")
        if given.suffix.lower() == ".csv":
            yield from _manifest(given)
        elif not os.path.isdir(given):
            _check_apart(given, out)
            yield _Given(_by_itself(given), given)


def _by_itself(path: Path) -> Place:
    folder, name = os.path.split(os.path.abspath(path))
    return Place(Path(folder), name)


def _manifest(path: Path) -> Iterator[_Given]:
    """The slides of a manifest. Raises RunError where it cannot be read, or not as a table with a column path.

    Columns stand in any order and case, between commas, semicolons or tabs; a byte order mark and a decimal comma are
    understood, as Excel writes them in Europe. Bytes that are not UTF-8 stand for themselves, as in file names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise RunError(f"{path} is not a readable CSV manifest: {error}") from error
    if "\0" in text:
        raise RunError(f"{path} is not a readable CSV manifest: it holds zero bytes; save it as CSV in UTF-8")
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count))
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if "path" not in reader.fieldnames:
        raise RunError(f"{path} has the columns {reader.fieldnames}: need path and, where wanted, mpp")
    if any(reader.fieldnames.count(name) > 1 for name in ("path", "mpp")):
        raise RunError(f"{path} has the columns {reader.fieldnames}: need one column path and one column mpp")
    folder = Path(os.path.abspath(path)).parent
    try:
        for row in reader:
            slide, scale = row["path"] or "", (row.get("mpp") or "").strip()
            if any(row.get(None) or ()) or (scale and not slide.strip()):
                raise RunError(f"{path}, line {reader.line_num}: need the columns of the first line, and a path")
            if slide.strip():
                yield _row(folder, slide, scale, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise RunError(f"{path} is not a readable CSV manifest: {error}") from error


def _row(folder: Path, slide: str, scale: str, where: str) -> _Given:
    """A slide of a manifest in `folder`; `where` is for messages."""
    url = slide.strip() if is_url(slide.strip()) else ""
    path = Path(without_secrets(url)) if url else folder / (slide if os.path.lexists(folder / slide) else slide.strip())
    place = Place(path.parent, path.name) if url else _by_itself(path)
    if place.path.is_relative_to(folder):
        place = Place(folder, place.path.relative_to(folder).as_posix())
    try:
        mpp = float(scale.replace(",", ".")) if scale else None
    except ValueError:
        return _Given(place, path, None, printable(f"{where}: mpp={scale!r} is not a number"), url)
    if mpp is not None and not is_believable(mpp):
        return _Given(place, path, None, printable(f"{where}: mpp={scale}: {NEED_MPP}"), url)
    return _Given(place, path, mpp, url=url)
