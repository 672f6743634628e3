"""What a run is asked for."""

from dataclasses import dataclass

from pipeline.archive.inputs.sources import Archive
from pipeline.config import Execution, Settings
from pipeline.layout import RunFolder


@dataclass(frozen=True)
class Command:
    """What a run is asked for, checked. Several commands may work on one folder, after each other or at once."""

    archive: Archive
    folder: RunFolder
    settings: Settings  # with the paths and checksums of the files that they name
    execution: Execution
    overwrite: str = ""  # as in `Job`
