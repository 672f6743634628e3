"""Segmentation of nuclei in whole-slide images: what a script or a notebook calls.

    import pipeline

    rows = pipeline.run(["slides/"], "results")
    nuclei = pipeline.read_nuclei("results/case7/nuclei.parquet")

Each name is imported when it is first used, so that `import pipeline` loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import export, measure, plan, read_nuclei
    from pipeline.archive.run import run
    from pipeline.config import Execution, Settings

__all__ = ["Execution", "Settings", "export", "measure", "plan", "read_nuclei", "run"]

_HOMES = {
    "Execution": "pipeline.config",
    "Settings": "pipeline.config",
    "export": "pipeline.api",
    "measure": "pipeline.api",
    "plan": "pipeline.api",
    "read_nuclei": "pipeline.api",
    "run": "pipeline.archive.run",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
