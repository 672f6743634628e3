"""A QuPath project of a run: every finished slide as an image, the classes of their nuclei, and a script.

The script adds the nuclei, in QuPath: its data files are Java's serialisation.
"""

import contextlib
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from pipeline import files
from pipeline.archive.inputs.region_files import suffix
from pipeline.archive.inputs.remote import is_url
from pipeline.archive.verify import without_nuclei
from pipeline.config import require
from pipeline.errors import RunError
from pipeline.layout import RunFolder, SlideFolder
from pipeline.segment import tables
from pipeline.segment.finished import check_same_source, remedy
from pipeline.text import one_line
from slides.errors import NightslideError, SlideError

_SCRIPT = "import.groovy"


class Written(NamedTuple):
    """A project, and how many of its images it got now."""

    file: Path
    images: int
    added: int
    warnings: tuple[str, ...]  # a line each: what is left out, and what is not as it was


def write_project(run: RunFolder, slides: Path | None = None) -> Written:
    """Write the project of a run, or add to it what it lacks: what is in a project stays as it is.

    slides: a folder in which slides are looked for that are not where the run read them. An image has the name of its
    slide's results with the suffix of its file, as that of its regions may have: a/x.svs.
    Raises RunError for a folder without finished slides, or with none whose slide QuPath could open, and for a project
    that cannot be extended; ConfigError where `slides` is no folder.
    """
    finished = run.finished()
    if not run.run_json.is_file() or not finished:
        raise RunError(f"{run.path} has no finished slides: need the --out folder of a run")
    project = _read(run.qupath_project)
    known = {str(entry.get("imageName")): [*map(_path, _uris(entry))] for entry in project["images"]}
    present = {path for paths in known.values() for path in paths}
    moved = _by_name(slides)
    added, left_out, warnings = 0, [], without_nuclei(run.path)
    colours: dict[str, tuple[int, int, int]] = {}
    for slide in finished:
        name = run.name_of(slide)
        outcome = _outcome(name, slide, known, present, moved)
        colours |= outcome.colours
        if outcome.image is not None:
            project["lastID"] += 1
            project["images"].append(_entry(outcome.image, project["lastID"], outcome.image_name))
            added += 1
        if outcome.warning:
            warnings.append(f"{name}: {outcome.warning}")
        if outcome.left_out:
            left_out.append(f"{name}: {outcome.left_out}")
    if not project["images"]:
        raise RunError(f"no slide of {run.path} can be an image of a project: {'; '.join(left_out)}")
    run.qupath_classes.parent.mkdir(parents=True, exist_ok=True)
    _add_classes(run.qupath_classes, colours)
    warnings += _add_script(run.qupath_script)
    if added:
        project |= {"modifyTimestamp": _now_ms(), "uri": run.qupath_project.absolute().as_uri()}
        files.write_json(run.qupath_project, project)
    warnings += [f"left out: {line}" for line in left_out]
    return Written(run.qupath_project, len(project["images"]), added, tuple(warnings))


class _Outcome(NamedTuple):
    """What becomes of a finished slide; with the defaults, the project has it already."""

    colours: Mapping[str, tuple[int, int, int]]  # of its classes
    image: Path | None = None  # the file of a new image
    image_name: str = ""
    warning: str = ""  # what is wrong with the image that the project has
    left_out: str = ""  # why it is no image


def _outcome(
    name: str,
    slide: SlideFolder,
    known: Mapping[str, Sequence[str]],
    present: Collection[str],
    moved: Mapping[str, Sequence[Path]],
) -> _Outcome:
    """What becomes of the slide of this name.

    known: the files of the project's images by the images' names; present: all of them; moved: of `_by_name`.
    """
    try:
        colours = tables.read_provenance(slide.nuclei).colours if slide.nuclei.is_file() else {}
    except (NightslideError, OSError, ValueError, KeyError, pa.ArrowException) as error:
        return _Outcome({}, left_out=f"{slide.nuclei.name} is damaged ({one_line(error)}): {remedy(slide.nuclei)}")
    content = files.read_json(slide.slide_json) or {}
    if not {"source", "source_path", "quick_hash"} <= content.keys():
        return _Outcome(colours, left_out=f"{slide.slide_json.name} is damaged")
    place = str(content["source_path"])
    source = Path(place)
    image_name = name if name.endswith(suffix(source)) else f"{name}{suffix(source)}"
    its_files = [str(source)] if str(source) in present else known.get(image_name, [])
    if any(map(os.path.exists, its_files)):
        return _Outcome(colours)
    if its_files:
        lost = f"{its_files[0]}, its image in the project, does not exist: tell QuPath where it is now"
        return _Outcome(colours, warning=lost)
    image = _image(source, content, moved)
    if image is not None:
        return _Outcome(colours) if str(image) in present else _Outcome(colours, image, image_name)
    lack, what = f"{place} does not exist", "the slide is now"
    if is_url(place):
        lack, what = "it was read from a URL, which QuPath does not open", "a copy of the slide is"
    return _Outcome(colours, left_out=f"{lack}: say with --slides DIR where {what}")


def _by_name(folder: Path | None) -> dict[str, list[Path]]:
    """The files in a folder, however deep, by their names; none without a folder."""
    found: dict[str, list[Path]] = defaultdict(list)
    if folder is not None:
        require(folder.is_dir(), f"--slides {folder} is no folder: need the one that holds the slides")
        for inside, _, names in os.walk(os.path.abspath(folder)):
            for name in names:
                found[name].append(Path(inside, name))
    return found


def _image(source: Path, content: Mapping[str, Any], moved: Mapping[str, Sequence[Path]]) -> Path | None:
    """Where the slide of a slide.json is: where it was, else the first file of its name that has its content.

    Of one that was read from a URL, which QuPath does not open, or on a computer of another system, `source` is no
    absolute path: only the second counts.
    """
    if source.is_absolute() and source.exists():
        return source
    for path in sorted(moved.get(str(content["source"]), ())):
        with contextlib.suppress(SlideError):
            check_same_source(path, content)
            return path
    return None


def _read(file: Path) -> dict[str, Any]:
    """A project as QuPath 0.5 to 0.7 reads it; an empty one where there is no file."""
    if not file.exists():
        return {"createTimestamp": _now_ms(), "modifyTimestamp": _now_ms(), "lastID": 0, "images": []}
    try:
        content: Any = files.read_json(file)
        images = content["images"]
        if not isinstance(images, list):
            raise TypeError(f"images={images!r}: need a list")
        numbers = [int(entry["entryID"]) for entry in images]
        deque(map(_path, _uris(images)), 0)  # raises for one that is no path
        return {**content, "lastID": max([int(content.get("lastID", 0)), *numbers])}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise RunError(f"{file} is no QuPath project: move it away, and it is written again") from error


def _entry(image: Path, number: int, name: str) -> dict[str, Any]:
    builder = {"builderType": "uri", "uri": image.as_uri(), "args": []}
    return {"serverBuilder": builder, "entryID": number, "imageName": name}


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
    """Of a file, whatever bytes its name has: QuPath writes file:/..., others file:///..., of a server file://SERVER/..."""
    path = os.fsdecode(unquote_to_bytes(re.sub(r"\Afile:(//(?=/))?", "", uri)))
    return str(Path(path[1:] if os.path.splitdrive(path[1:])[0] else path))  # of Windows: /C:/...


def _add_classes(file: Path, colours: dict[str, tuple[int, int, int]]) -> None:
    """The project's classes, with ours that it lacks."""
    content = files.read_json(file) or {}
    known = content.get("pathClasses")
    known = known if isinstance(known, list) else []
    names = [one.get("name") for one in known if isinstance(one, dict)]
    ours = [{"name": name, "color": _packed(rgb)} for name, rgb in sorted(colours.items()) if name not in names]
    if ours:
        files.write_json(file, {**content, "pathClasses": known + ours})


def _add_script(file: Path) -> tuple[str, ...]:
    """The script of this version, and a warning where something else is in its place, which a person made perhaps."""
    installed = Path(__file__).with_name(_SCRIPT)  # where a wheel has it; else this is a source tree
    script = installed if installed.exists() else Path(__file__).parents[2] / "workflows" / "qupath" / _SCRIPT
    content = script.read_bytes()
    if not os.path.lexists(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.committed(file) as partial:
            partial.write_bytes(content)
    elif not file.is_file() or file.read_bytes() != content:
        return (f"{file} is not the script of this version: move it away, and it is written again",)
    return ()


def _packed(rgb: tuple[int, int, int]) -> int:
    """An opaque colour as QuPath stores it: ARGB in a signed number of 32 bits."""
    return int.from_bytes(bytes([255, *rgb]), "big", signed=True)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
