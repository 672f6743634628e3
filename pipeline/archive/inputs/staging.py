"""Copies of slides on a local disk, made before a slide is read and removed after: `--stage DIR`.

DIR/.nightslide-stage-TOKEN/ belongs to one run, which holds a lease on it (`pipeline.archive.lease`); the next run that
starts with the same DIR removes those of runs that have died. In it, every slide has a folder of its own:

    .partial-...     while it is copied
    slide/           the slide's files, under their names: complete, as it is renamed from the first

Law: the files of one run take at most `--stage-space` on the disk, at any time. A slide waits until there is room.
"""

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple, Protocol, Self

from pipeline import files
from pipeline.archive.lease import Leases, has_ended
from pipeline.archive.slots import Space
from pipeline.errors import RunError, SlideChanged
from pipeline.layout import STAGED
from pipeline.segment.job import Job, Origin, Part
from pipeline.text import counted
from slides.errors import SlideNotFound, SlideTooLarge, SlideUnreadable
from slides.partial import partial_path
from slides.parts import LocalDirectory, parts

_OWN = re.compile(re.escape(STAGED) + "[0-9a-f]{32}")
_COPY = "slide"
_COPIES = 2  # at a time: one hides the other's pauses, and more would delay the slide that is needed first
_PIECE = 8 * 2**20  # bytes


class SlideFiles(Protocol):
    """Where the files of a slide are, on a disk or elsewhere."""

    @property
    def place(self) -> str:
        """The path of its own file, or its URL without secrets."""

    def origin(self) -> Origin:
        """Place, size, date and tag of the slide's own file. Raises SlideError."""

    def part(self, name: str) -> Part:
        """A file of the slide as it is now, by its name as in `Part`. Raises SlideError, OSError."""

    def parts(self) -> list[Part]:
        """All files of the slide, its own first. Raises SlideError, OSError."""

    def pieces(self, part: Part) -> Iterator[bytes]:
        """The content of a file, piece by piece. Raises SlideChanged where it is not as listed; SlideError, OSError."""


class LocalSlide(NamedTuple):
    """A slide on a disk; path: absolute, without links."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def origin(self) -> Origin:
        try:
            return Origin.of(self.path)
        except FileNotFoundError:
            raise SlideNotFound(f"{self.path}: there is no such file") from None

    def part(self, name: str) -> Part:
        return Part.of(name, (self.path.parent / name).stat())

    def parts(self) -> list[Part]:
        self.origin()
        return [self.part(name) for name in parts(self.path.name, LocalDirectory(self.path.parent))]

    def pieces(self, part: Part) -> Iterator[bytes]:
        path = self.path.parent / part.name
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
            if Part.of(part.name, os.fstat(file.fileno())) != part:
                raise SlideChanged(f"{path} changed while it was copied: run the same command again")


class Room(NamedTuple):
    """Space that is kept for the copy of a slide: its folder, and the files that fit."""

    folder: Path
    parts: Sequence[Part]

    @property
    def file(self) -> Path:
        """The copy that is to be opened, once it is complete."""
        return self.folder / _COPY / self.parts[0].name

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def make_home(home: Path) -> None:
    """Make DIR of `--stage`. Raises RunError where nothing can be written there."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        files.now_ns(home)
    except OSError as error:
        raise RunError(
            f"--stage {home} cannot be written ({error.strerror or error}): need a folder that can be"
        ) from error


class Staging:
    """The staging folder of a run, there while the context lasts."""

    def __init__(self, home: Path, space_bytes: float, leases: Leases) -> None:
        """home: DIR of `--stage`; space_bytes: that this run's copies may take together."""
        self._home, self._leases = home, leases
        self._space = Space(space_bytes)
        self._copying = asyncio.Semaphore(_COPIES)
        self.folder = home

    def __enter__(self) -> Self:
        make_home(self._home)
        self._remove_leftovers()
        self.folder = self._own_folder()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._leases.release(self.folder)

    def _own_folder(self) -> Path:
        while True:
            folder = self._home / f"{STAGED}{uuid.uuid4().hex}"
            folder.mkdir(mode=0o700)
            try:
                if self._leases.take(folder):
                    return folder
            except OSError:  # such as a full disk
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def _remove_leftovers(self) -> None:
        """Remove the folders of runs that have died; those of others cannot be leased."""
        for entry in os.scandir(self._home):
            if _OWN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                folder = Path(entry.path)
                with contextlib.suppress(PermissionError):  # of another user
                    # who is known to have ended needs no lease, for which a disk full of the copies has no space
                    if has_ended(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                    elif self._leases.take(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                        self._leases.release(folder)

    @contextlib.asynccontextmanager
    async def room(self, slide: SlideFiles) -> AsyncIterator[Room]:
        """Space for a copy of a slide, for which it waits. At the end the copy is removed: nobody may read it then.

        Raises SlideTooLarge for a slide that takes more than there is; and what listing its files raises.
        """
        room = Room(self.folder / uuid.uuid4().hex, await asyncio.to_thread(slide.parts))
        size = room.bytes
        if size > self._space.size:
            raise SlideTooLarge(
                f"the slide has {size / 1e9:.3g} GB in {counted(len(room.parts), 'file')}, --stage-space is "
                f"{self._space.size / 1e9:.3g} GB: raise it"
            )
        await self._space.take(size)
        try:
            yield room
        finally:
            await asyncio.to_thread(_remove, room.folder)
            self._space.give_back(size)

    def of_original(self, error: Exception, place: str) -> Exception:
        """An error that names the slide's own place, where it names that of its copy.

        A copy that is not found was removed by somebody else: the slide's own file may well be there.
        """
        folder = re.compile(re.escape(f"{self.folder}{os.sep}") + "[0-9a-f]{32}" + re.escape(f"{os.sep}{_COPY}"))
        text = folder.sub(lambda _: os.path.dirname(place), str(error))
        if text == str(error):
            return error
        renamed = RunError(self._gone("the copy of this slide") if isinstance(error, SlideNotFound) else text)
        renamed.__cause__ = error
        return renamed

    async def copy(self, slide: SlideFiles, room: Room, job: Job) -> Job:
        """Copy a slide into its room. Returns the job on the copy.

        Raises SlideChanged; LeaseLost between two pieces; what reading the slide raises.
        """
        try:
            async with self._copying:
                await asyncio.to_thread(_copy, slide, room, job)
        except OSError as error:
            if not self.folder.exists():
                raise RunError(self._gone("the folder of this run")) from error
            if error.errno in files.FULL_DISK:
                error.filename = str(self.folder)  # so that the right disk is named: writing does not tell the file
            raise
        own, *others = room.parts
        original = Origin(slide.place, own.bytes, own.mtime_ns, own.etag, tuple(others))
        return dataclasses.replace(job, source=room.file, original=original)

    def _gone(self, what: str) -> str:
        return f"{what} in --stage {self._home} was removed during the run: give the same command again"


def _copy(slide: SlideFiles, room: Room, job: Job) -> None:
    room.folder.mkdir()  # in the folder of the run, which is not made again: without its lease it would be nobody's
    target = room.file.parent
    partial = partial_path(target)
    for part in room.parts:
        file = partial / _inside(part.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        left = part.bytes
        with file.open("wb") as copy:
            for piece in job.while_leased(slide.pieces(part)):
                left -= len(piece)
                if left < 0:
                    break
                copy.write(piece)
        if left:
            raise SlideChanged(f"{part.name} changed while it was copied: run the same command again")
    partial.rename(target)


def _inside(name: str) -> PurePath:
    """A name of a part as a path. Raises SlideUnreadable for one that would lead out of the folder."""
    path = PurePath(name)  # of this system: Windows takes a backslash for "/", and knows drives
    if path.anchor or ".." in path.parts or "\0" in name:
        raise SlideUnreadable(f"a part of the slide is called {name!r}: need a name below the slide's folder")
    return path


def _remove(folder: Path) -> None:
    """Remove a copy. Its files are emptied first: workers that have them open would keep the space of removed ones.

    Only after the slide's lease was given back: a task that still reads then gets nonsense, and cannot commit it.
    """
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                os.truncate(os.path.join(inside, name), 0)
    shutil.rmtree(folder, ignore_errors=True)
