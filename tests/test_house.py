"""The laws of the house: imports point down, nothing heavy is pulled in by accident, no default twice."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("slides", "pipeline", "training")
# The rooms, each allowed to import itself and what stands before it. A name is a package or a module.
ROOMS = (
    "slides",
    "pipeline.errors",
    "pipeline.text",
    "pipeline.config",
    "pipeline.files",
    "pipeline.layout",
    "pipeline.model",
    "pipeline.segment",
    "pipeline.report",
    "pipeline.archive",
    "pipeline.view",
    "pipeline.demo",
    "pipeline.doctor",
    "pipeline",  # its public names, each imported when it is asked for
    "pipeline.cli",
    "training",
)


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports(path: Path) -> set[str]:
    """Full names of the project's modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports between packages are absolute"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from pipeline import files` imports pipeline.files, and nothing of the package's own
            found |= names if all(is_module(name) for name in names) else names | {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def modules(package: str) -> list[Path]:
    """Every module of a package, in every folder however deep."""
    return sorted(path for path in (ROOT / package).rglob("*.py") if path.stat().st_size)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> int:
    """The most special room that holds a module."""
    fitting = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    assert fitting, f"{name} is in no room"
    return ROOMS.index(max(fitting, key=len))


def every_module() -> dict[str, Path]:
    return {name_of(path): path for package in PACKAGES for path in modules(package)}


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    return {name for name in imports(path) if name in known} - {name_of(path)}


def test_the_walk_reaches_every_folder() -> None:
    """Else every law below would skip the rooms in silence."""
    names = set(every_module())
    assert {"pipeline.model.detector", "pipeline.segment.stages", "training.data.datasets"} <= names
    assert len({room_of(name) for name in names}) >= len(ROOMS) - 3


@pytest.mark.parametrize("name", sorted(every_module()))
def test_imports_point_down(name: str) -> None:
    """Law: a module imports its own room and those that stand before it."""
    known = every_module()
    for used in imported_modules(known[name], known):
        # training's commands are part of the command line, which imports them by their module's name
        assert room_of(used) <= room_of(name), f"{name} imports {used}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = every_module()
    uses = {name: imported_modules(path, known) for name, path in known.items()}
    left = dict(uses)
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_only_what_starts_or_reaches_a_cluster_imports_dask() -> None:
    """And what asks it how many cores this machine lends us."""
    for name, path in every_module().items():
        if name in {f"pipeline.archive.workers.{module}" for module in ("local_cluster", "machine", "scheduler")}:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {n.split(".")[0] for n in names} & {"dask", "distributed"}, path


@pytest.mark.parametrize("package", ["slides", "pipeline"])
def test_the_tree_of_errors_has_all_of_them(package: str) -> None:
    module = ast.parse((ROOT / package / "errors.py").read_text(encoding="utf-8"))
    tree = (ast.get_docstring(module) or "").split()
    assert not {node.name for node in module.body if isinstance(node, ast.ClassDef)} - {*tree}


def loaded_by(statement: str, *heavy: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_slides_pull_in_neither_torch_nor_dask() -> None:
    names = ", ".join(name_of(path) for path in modules("slides"))
    assert loaded_by(f"import {names}", "torch", "dask", "distributed") == []


def test_the_command_line_starts_without_heavy_imports() -> None:
    """Law: --help is instant."""
    assert loaded_by("import pipeline.cli", "torch", "dask", "distributed", "pyarrow", "openslide") == []


def test_all_but_the_detector_starts_without_its_libraries() -> None:
    """Law: a run's own process, and a worker that only tiles, outlines or exports, are small and start at once."""
    heavy = ("torch", "torchvision", "timm", "scipy.ndimage")
    assert loaded_by("import pipeline.segment.stages", *heavy) == []
    assert loaded_by("import pipeline.api, pipeline.archive.run, pipeline.archive.verify", *heavy) == []


def test_the_viewer_starts_without_torch() -> None:
    """Law: it needs no detector, and half a gigabyte less memory."""
    assert loaded_by("import pipeline.view.application", "torch", "dask") == []


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
        "CHANGELOG.md",
        "CITATION.cff",
    }
    assert not list((ROOT / "tests").rglob("__init__.py"))
