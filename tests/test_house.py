"""The laws of the house: imports point down, nothing heavy is pulled in by accident, no default twice."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("slides", "pipeline", "training")
PIPELINE = [
    "config",
    "tensorfile",
    "device",
    "dcgmm",
    "stain",
    "pooling",
    "detector",
    "views",
    "fuse",
    "polygons",
    "stitch",
    "tables",
    "export",
    "pictures",
    "plan",
    "findings",
    "found",
    "inference",
    "stages",
    "schedule",
    "naming",
    "search",
    "archive",
    "settle",
    "lease",
    "ledger",
    "progress",
    "charts",
    "outcome",
    "report",
    "forecast",
    "run",
    "demo",
    "doctor",
    "cli",
]


def imports(path: Path) -> set[str]:
    """Full names of the project's modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports between packages are absolute"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below(package: str) -> None:
    """Law: slides <- pipeline <- training."""
    below = PACKAGES[: PACKAGES.index(package) + 1]
    assert modules(package)
    for path in modules(package):
        assert {name.split(".")[0] for name in imports(path)} <= set(below), path


def test_files_of_the_pipeline_import_only_what_stands_above_them() -> None:
    """Law: inside pipeline the data takes one way."""
    assert {p.stem for p in modules("pipeline")} - {"__init__"} == set(PIPELINE)
    for path in modules("pipeline"):
        if path.stem == "__init__":
            continue
        above = set(PIPELINE[: PIPELINE.index(path.stem)])
        used = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
        assert used & set(PIPELINE) <= above, f"{path.name} imports {sorted((used & set(PIPELINE)) - above)}"


def test_only_schedule_imports_dask() -> None:
    for package in PACKAGES:
        for path in modules(package):
            if path.name == "schedule.py":
                continue
            names = {
                alias.name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import)
                for alias in node.names
            } | {
                (node.module or "").split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom)
            }
            assert not names & {"dask", "distributed"}, path


def loaded_by(statement: str, *heavy: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_slides_pull_in_neither_torch_nor_dask() -> None:
    names = ", ".join(f"slides.{p.stem}" for p in modules("slides") if p.stem != "__init__")
    assert loaded_by(f"import {names}", "torch", "dask", "distributed") == []


def test_the_command_line_starts_without_heavy_imports() -> None:
    """Law: --help is instant."""
    assert loaded_by("import pipeline.cli", "torch", "dask", "distributed", "pyarrow", "openslide") == []


def test_the_top_level_is_as_designed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {n for n in top if not n.startswith(".")} <= {
        *PACKAGES,
        "workflows",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not list((ROOT / "tests").rglob("__init__.py"))
