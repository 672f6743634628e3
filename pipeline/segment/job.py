"""The slide and the settings of a task: all that it needs on any machine."""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from pipeline.config import Settings
from pipeline.errors import LeaseLost
from pipeline.layout import SlideFolder
from pipeline.segment.regions import RegionFile
from slides.errors import SlideError
from slides.parts import LocalDirectory, parts
from slides.scale import GivenScale
from slides.slide import Slide

LEASE_CHECK_S = 1.0  # between two checks while patches are detected or a slide is copied: each asks the file server

T = TypeVar("T")


class Part(NamedTuple):
    """A file of a slide, as it was listed; name: relative to the slide's directory, "/" between folders."""

    name: str
    bytes: int
    mtime_ns: int  # 0 where a server does not state it
    etag: str = ""  # of a store that has tags: another one where the content is another

    @classmethod
    def of(cls, name: str, stat: os.stat_result) -> Self:
        return cls(name, stat.st_size, stat.st_mtime_ns)


class Origin(NamedTuple):
    """A slide's own file where it was given, as results record it; place: its path, or its URL without secrets.

    parts: the slide's other files; None where they were not listed.
    """

    place: str
    bytes: int
    mtime_ns: int  # 0 where a server does not state it
    etag: str = ""
    parts: tuple[Part, ...] | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """Without the other files. Raises OSError."""
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_mtime_ns)


def other_parts(path: Path) -> tuple[Part, ...] | None:
    """The files of a slide on a disk beside its own; None where they cannot be listed, though it may open."""
    with contextlib.suppress(OSError, SlideError):
        names = parts(path.name, LocalDirectory(path.parent))[1:]
        return tuple(Part.of(name, (path.parent / name).stat()) for name in names)
    return None


def slide_digest(settings: Settings, regions: RegionFile | None) -> str:
    """The digest of a slide's results. regions: to which it is restricted; None for all of it."""
    if regions is None:
        return settings.digest
    content = f"{settings.digest} {regions.sha256} {regions.crop}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A slide, and how it is processed. It holds paths and numbers only, as it is sent to the worker with every task.

    source: the file to open: the slide, or a copy of it.
    scale: what the user states of it.
    regions: to which the slide is restricted; None: all of it is processed.
    lease: the file of this run's lease of the slide; None where there are no other runs.
    original: what `source` is a copy of; None where it is the slide itself.
    overwrite: the round of --overwrite, `OpenedRun.overwrite`, in which it is done again; empty where it is not.
    """

    source: Path
    folder: SlideFolder
    settings: Settings  # resolved: with the checksums of every file that they name
    scale: GivenScale
    regions: RegionFile | None = None
    lease: Path | None = None
    original: Origin | None = None
    overwrite: str = ""

    def open(self) -> Slide:
        """The slide. Raises what `open_slide` raises."""
        return Slide(self.source, self.scale)

    @property
    def origin(self) -> Origin:
        """The slide's own file, and all others that belong to it. Raises OSError."""
        return self.original or Origin.of(self.source)._replace(parts=other_parts(self.source))

    @property
    def digest(self) -> str:
        """Names everything that the slide's nuclei.parquet depends on: the settings, and what its regions are."""
        return slide_digest(self.settings, self.regions)

    def check_lease(self) -> None:
        """Called before anything is committed. Raises LeaseLost once the slide was given back or taken over."""
        if self.lease is None:
            return
        try:
            os.utime(self.lease)  # reaches the file server, where a read could be answered from a cache
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second: NFS, for a file that it has just known
                raise
            raise LeaseLost(f"{self.source.name}: another process has taken this slide over") from None

    def while_leased(self, items: Iterator[T]) -> Iterator[T]:
        """The items; the lease is checked first, and then every LEASE_CHECK_S. Raises LeaseLost."""
        self.check_lease()
        asked_s = time.monotonic()
        for item in items:
            if time.monotonic() >= asked_s + LEASE_CHECK_S:
                self.check_lease()
                asked_s = time.monotonic()
            yield item
