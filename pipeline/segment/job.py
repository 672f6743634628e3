"""A slide and what is to be done to it: all that a task on any machine needs to know."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Settings
from pipeline.errors import LeaseLost
from pipeline.layout import SlideFolder


@dataclass(frozen=True)
class Job:
    """Paths and numbers only: it is sent with every task.

    mpp: micrometres per pixel at level 0 as the user gives them, or None for what the slide states.
    lease: the file that proves that this slide is ours; None where nobody else can have it.
    """

    source: Path
    folder: SlideFolder
    settings: Settings
    digest: str
    mpp: float | None = None
    lease: Path | None = None

    def check_lease(self) -> None:
        """To be asked before anything is committed. Raises LeaseLost once another process has the slide."""
        if self.lease is None:
            return
        try:
            os.utime(self.lease)  # asks the file server, where a look could be answered from a cache
        except FileNotFoundError:
            raise LeaseLost(f"{self.source.name}: another process has taken this slide over") from None
