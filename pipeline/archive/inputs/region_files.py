"""Which file of regions belongs to which slide: they are matched by their names."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline import config
from pipeline.archive.inputs.sources import Archive, Source
from pipeline.errors import RunError
from pipeline.layout import DENSITY, RESERVED
from pipeline.segment.geojson import image_name
from pipeline.segment.regions import RegionFile
from pipeline.text import printable

_SHOWN = 10  # slides in a message


class Matches(NamedTuple):
    """The slides by their names in the results: those with a file of regions, and those of which it is unclear."""

    files: dict[str, Path]
    problems: dict[str, str]  # several files, or a file that fits several slides
    unused: tuple[Path, ...] = ()  # other files with such a suffix, but for those that we write ourselves


def match_regions(folder: str, slides: Mapping[str, Path]) -> Matches:
    """The files of regions in a folder that belong to slides.

    slides: the path of each slide by its name in the results. A file has the name of its slide and one of the suffixes
    .geojson, .geojson.gz, .geojson.zip and .zip, and lies where the slide lies, or would: of a/x.svs, called a/x in the
    results, the regions are a/x.svs.geojson, a/x.geojson, x.svs.geojson or x.geojson, the first of these that is there.
    QuPath calls x.ome.tif x, so that counts, too; so do, after the slide's own, the name in the results and that of the
    file to which a link leads. Hidden files and folders are left out.
    Raises RunError for a folder that does not exist and for one without such a file.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise RunError(f"regions={folder} is no folder: need one with QuPath's GeoJSON files, named after the slides")
    exports = _exports(root)
    fitting: dict[str, list[str]] = defaultdict(list)
    for own in (True, False):  # what a slide itself is called counts before what else it may be called
        taken, found = set(fitting), {name for names in fitting.values() for name in names}
        for name, path in slides.items():
            images = _own_names(path) if own else _other_names(name, path)
            keys = _keys(images, name, path, root) if name not in found else ()
            if key := next((key for key in keys if key in exports and key not in taken), None):
                fitting[key].append(name)
    if not fitting:
        example = min(slides.values()).name
        raise RunError(
            f"regions={folder}: no file there belongs to a slide: need names such as {example}.geojson, as QuPath "
            f"exports them"
        )
    others = (path for key, paths in exports.items() if key not in fitting for path in paths)
    matches = Matches({}, {}, tuple(path for path in others if path.name not in (*RESERVED, *DENSITY)))
    for key, names in fitting.items():
        files = exports[key]
        rivals = [(Path(name).parent / slides[name].name).as_posix() for name in names]
        for name, slide in zip(names, rivals, strict=True):
            if len(names) > 1:
                rule = f"{files[0]} fits {' and '.join(rivals)}: need one for each, such as {slide}.geojson"
                matches.problems[name] = printable(rule)
            elif len(files) > 1:
                matches.problems[name] = printable(f"regions are in {' and in '.join(map(str, files))}: need one file")
            else:
                matches.files[name] = files[0]
    return matches


def _own_names(path: Path) -> list[str]:
    return [path.name, path.stem, path.stem.removesuffix(".ome")]


def _other_names(name: str, path: Path) -> list[str]:
    """What a slide is called in the results, with the suffix of its file; and the file to which a link leads."""
    linked = Path(os.path.realpath(path))
    return [*_own_names(Path(f"{Path(name).name}{suffix(linked)}")), *_own_names(linked)]


def suffix(path: Path) -> str:
    """That of a slide's file: .svs, or .ome.tif."""
    return "".join(path.suffixes[-2:] if path.stem.endswith(".ome") else path.suffixes[-1:])


def _keys(images: Iterable[str], name: str, path: Path, root: Path) -> Iterator[str]:
    """Names that a file of regions may have, relative to its folder and without suffix, the most special first.

    images: what the slide may be called; name, path: its name in the results, and its file
    """
    places = [Path(name).parent, Path()]
    if path.is_relative_to(root):  # the regions lie among the slides
        places.insert(0, path.relative_to(root).parent)
    for place in places:
        for image in images:
            yield _key(place / image)


def _exports(root: Path) -> dict[str, list[Path]]:
    """The exports in a folder, however deep, by their path relative to it without suffix."""
    exports: dict[str, list[Path]] = defaultdict(list)
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file() and (image := image_name(path, given=False)):
                exports[_key(path.with_name(image).relative_to(root))].append(path)
    return exports


def _key(path: Path) -> str:
    """Equal for letters that are composed, and decomposed, as disks of macOS have them."""
    return unicodedata.normalize("NFC", path.as_posix())


def with_regions(archive: Archive, regions: config.Regions) -> Archive:
    """The archive, each slide with the file of its regions if there are any; one without a file is to be skipped.

    A slide of which the file is unclear has that as its problem. Raises what `match_regions` raises.
    """
    if not regions.folder:
        return archive
    slides = {source.name: Path(os.path.abspath(source.path)) for source in archive.sources}
    files, problems, _ = match_regions(regions.folder, slides)
    sources = []
    for source in archive.sources:
        file, problem = files.get(source.name), source.problem or problems.get(source.name, "")
        skip = "" if file or problem else f"no file of regions in {regions.folder}"
        sources.append(source._replace(regions=file, problem=problem, skip=skip))
    skipped = [source.name for source in sources if source.skip]
    shown = ", ".join(skipped[:_SHOWN]) + (", ..." if len(skipped) > _SHOWN else "")
    are, them = ("slide is", "it") if len(skipped) == 1 else ("slides are", "them")
    line = f"{len(skipped)} {are} skipped, as {regions.folder} has no regions of {them}: {shown}"
    return archive._replace(sources=tuple(sources), unread=(*archive.unread, *([line] if skipped else [])))


def region_file(source: Source, regions: config.Regions) -> RegionFile | None:
    """The file of a slide's regions with its checksum; None where it is not restricted. Raises AnnotationError."""
    return None if source.regions is None else RegionFile.of(source.regions, regions.crop)
