"""Files that are being written: hidden names beside the file that they become by renaming."""

from pathlib import Path
from uuid import uuid4

PREFIX = ".partial-"


def partial_path(path: Path) -> Path:
    """A path beside `path`, with its suffix, that no other writer uses. A killed writer leaves its file there."""
    return path.with_name(f"{PREFIX}{uuid4().hex[:12]}-{path.name}")
