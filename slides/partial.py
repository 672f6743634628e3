"""Files that are being written: hidden names beside the file that they become by renaming."""

import os
import time
from pathlib import Path
from uuid import uuid4

PREFIX = ".partial-"

# Windows renames nothing that another program has open, and virus scanners open new files for a moment.
_PATIENCE_S = 2.0 if os.name == "nt" else 0.0


def partial_path(path: Path) -> Path:
    """A path beside `path`, with its suffix, that no other writer uses. A killed writer leaves its file there."""
    return path.with_name(f"{PREFIX}{uuid4().hex[:12]}-{path.name}")


def intended_name(partial: Path) -> str:
    """The name of what a file or folder of `partial_path` was to become; empty for one of another name."""
    token, _, name = partial.name.removeprefix(PREFIX).partition("-")
    return name if partial.name.startswith(PREFIX) and len(token) == 12 else ""


def replace(partial: Path, path: Path) -> None:
    """Rename over what is there, on Windows once the programs that have it open have closed it. Raises OSError."""
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return os.replace(partial, path)
        except PermissionError:
            if time.monotonic() >= end_s or path.is_dir():  # nothing is renamed over a folder
                raise
            time.sleep(0.05)
