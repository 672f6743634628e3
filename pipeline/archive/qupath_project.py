"""A QuPath project of a run: every finished slide as an image, and the classes of their nuclei.

The nuclei themselves are added by QuPath (workflows/qupath/import.groovy): its data files are Java's serialisation.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from pipeline import files
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.segment import tables
from pipeline.text import one_line
from slides.errors import NightslideError


class Written(NamedTuple):
    """A project, and how many of its images it got now."""

    file: Path
    images: int
    added: int
    left_out: tuple[str, ...]  # finished slides that are no images of it, and why


def write_project(run: RunFolder) -> Written:
    """Write the project of a run, or add to it what it lacks: what is in a project stays as it is.

    Raises RunError for a folder without finished slides, or with none whose slide QuPath could open, and for a project
    that cannot be extended.
    """
    slides = run.finished()
    if not run.run_json.is_file() or not slides:
        raise RunError(f"{run.path} has no finished slides: need the --out folder of a run")
    project = _read(run.qupath_project)
    present = {_path(uri) for entry in project["images"] for uri in _uris(entry)}
    added, left_out = 0, []
    colours: dict[str, tuple[int, int, int]] = {}
    for slide in slides:
        content = files.read_json(slide.slide_json) or {}
        source = Path(str(content.get("source_path", "")))
        name = slide.path.relative_to(run.path).as_posix()
        try:
            colours |= tables.read_provenance(slide.nuclei).colours if slide.nuclei.is_file() else {}
        except (NightslideError, OSError, ValueError, KeyError, pa.ArrowException) as error:
            left_out.append(f"{name}: {slide.nuclei.name} is damaged ({one_line(error)})")
            continue
        if "source_path" not in content:
            left_out.append(f"{name}: {slide.slide_json.name} is damaged")
        elif not source.is_absolute():
            left_out.append(f"{name}: it was read from a URL, which QuPath does not open")
        elif str(source) not in present:
            project["lastID"] += 1
            project["images"].append(_entry(source, project["lastID"]))
            added += 1
    if not project["images"]:
        raise RunError(f"no slide of {run.path} can be an image of a project: {'; '.join(left_out)}")
    run.qupath_classes.parent.mkdir(parents=True, exist_ok=True)
    _add_classes(run.qupath_classes, colours)
    if added:
        project |= {"modifyTimestamp": _now_ms(), "uri": run.qupath_project.absolute().as_uri()}
        files.write_json(run.qupath_project, project)
    return Written(run.qupath_project, len(project["images"]), added, tuple(left_out))


def _read(file: Path) -> dict[str, Any]:
    """A project as QuPath 0.5 to 0.7 reads it; an empty one where there is no file."""
    if not file.exists():
        return {"createTimestamp": _now_ms(), "modifyTimestamp": _now_ms(), "lastID": 0, "images": []}
    try:
        content: Any = files.read_json(file)
        numbers = [int(entry["entryID"]) for entry in content["images"]]
        return {**content, "lastID": max([int(content.get("lastID", 0)), *numbers])}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RunError(f"{file} is no QuPath project: move it away, and it is written again") from error


def _entry(source: Path, number: int) -> dict[str, Any]:
    builder = {"builderType": "uri", "uri": source.as_uri(), "args": []}
    return {"serverBuilder": builder, "entryID": number, "imageName": source.name}


def _uris(content: Any) -> Iterator[str]:
    """Of the files of an image, however its server is nested: a rotated image holds another one."""
    if isinstance(content, dict):
        if isinstance(uri := content.get("uri"), str):
            yield uri
        for value in content.values():
            yield from _uris(value)
    elif isinstance(content, list):
        for value in content:
            yield from _uris(value)


def _path(uri: str) -> str:
    """Of a file: QuPath writes file:/..., others file:///..."""
    return unquote(uri.removeprefix("file:").removeprefix("//"))


def _add_classes(file: Path, colours: dict[str, tuple[int, int, int]]) -> None:
    """The project's classes, with ours that it lacks."""
    content = files.read_json(file) or {}
    known = content.get("pathClasses")
    known = known if isinstance(known, list) else []
    names = {one.get("name") for one in known if isinstance(one, dict)}
    ours = [{"name": name, "color": _packed(rgb)} for name, rgb in sorted(colours.items()) if name not in names]
    if ours:
        files.write_json(file, {**content, "pathClasses": known + ours})


def _packed(rgb: tuple[int, int, int]) -> int:
    """An opaque colour as QuPath stores it: ARGB in a signed number of 32 bits."""
    return int.from_bytes(bytes([255, *rgb]), "big", signed=True)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
