"""The slide and the settings of a task: all that it needs on any machine."""

import errno
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Settings
from pipeline.errors import LeaseLost
from pipeline.layout import SlideFolder
from slides.slide import GivenScale, Slide, open_slide


@dataclass(frozen=True)
class Manifest:
    """A run's settings, with the paths of every file that they name, and those files' checksums."""

    settings: Settings
    weights_sha256: str
    stain_sha256: Mapping[str, str]  # of `weights` and `template`, where the stain normalisation reads them

    @functools.cached_property
    def digest(self) -> str:
        """Names everything that nuclei.parquet depends on."""
        return self.settings.digest(self.weights_sha256, self.stain_sha256)


@dataclass(frozen=True)
class Job:
    """Paths and numbers only: it is sent with every task.

    scale: what the user states of it.
    lease: the file of this run's lease of the slide; None where there are no other runs.
    """

    source: Path
    folder: SlideFolder
    manifest: Manifest
    scale: GivenScale
    lease: Path | None = None

    def open(self) -> Slide:
        """The slide. Raises what `open_slide` raises."""
        return open_slide(self.source, **self.scale._asdict())

    @property
    def settings(self) -> Settings:
        return self.manifest.settings

    @property
    def digest(self) -> str:
        return self.manifest.digest

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
