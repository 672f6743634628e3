"""An archive: which slides there are among files, folders and manifests, and what their results are called."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config import ConfigError

SUFFIXES = frozenset(
    [
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".scn",
        ".mrxs",
        ".vms",
        ".vmu",
        ".bif",
        ".svslide",
        ".dcm",
        ".czi",
        ".zvi",
    ]
)  # what OpenSlide's formats are called; other files are opened only where they are named


class RunError(ConfigError):
    """Inputs or an output folder that a run cannot begin with."""


class Source(NamedTuple):
    """A slide of the archive, and the folder of its results relative to the run's."""

    path: Path
    name: str
    mpp: float | None


class Archive(NamedTuple):
    sources: tuple[Source, ...]
    skipped: int  # files in the folders that are no slides by their suffix


def find_slides(inputs: Sequence[Path], out: Path | None = None, mpp: float | None = None) -> Archive:
    """Slides among files, folders (searched to any depth) and CSV manifests (columns path and, if given, mpp).

    A slide's name is its path relative to its input folder, without suffix; where two slides would share a
    name both keep their suffix, and then a number. `mpp` is for every slide that the manifest gives none.
    A file that is reached twice counts once. Raises RunError for an input that does not exist, or no slide.
    """
    found: list[tuple[Path, Path, float | None]] = []  # path, relative name with suffix, mpp
    skipped = 0
    for given in inputs:
        if given.is_dir():
            inside = [p for p in _walk(given) if out is None or not p.resolve().is_relative_to(out.resolve())]
            chosen = [p for p in inside if p.suffix.lower() in SUFFIXES]
            found += [(p, p.relative_to(given), mpp) for p in chosen]
            skipped += len(inside) - len(chosen)
        elif given.suffix.lower() == ".csv":
            found += [(p, Path(p.name), mpp if m is None else m) for p, m in _manifest(given)]
        elif given.exists():
            found.append((given, Path(given.name), mpp))
        else:
            raise RunError(f"{given} does not exist: need slides, folders of slides, or a CSV manifest")
    unique = {path.resolve(): (path, relative, scale) for path, relative, scale in reversed(found)}
    ordered = sorted(unique.values(), key=lambda entry: (entry[1].as_posix(), entry[0].as_posix()))
    if not ordered:
        raise RunError(
            f"no slides in {', '.join(map(str, inputs))}: {skipped} other files were skipped; folders are searched "
            f"for {' '.join(sorted(SUFFIXES))}"
        )
    return Archive(tuple(_name(ordered)), skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Files under a folder, links followed, each real folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place) / name for name in sorted(names))


def _manifest(path: Path) -> list[tuple[Path, float | None]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or []):
                raise RunError(f"{path} has the columns {reader.fieldnames}: need path and, where wanted, mpp")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path} is not a readable CSV manifest: {error}") from error
    entries = []
    for number, row in enumerate(rows, 2):
        slide = path.parent / (row["path"] or "")
        if not (row["path"] or "").strip() or not slide.exists():
            raise RunError(f"{path}, line {number}: {row['path']!r} does not exist")
        try:
            entries.append((slide, float(row["mpp"]) if (row.get("mpp") or "").strip() else None))
        except ValueError:
            raise RunError(f"{path}, line {number}: mpp={row['mpp']!r} is not a number") from None
    return entries


def _name(ordered: Iterable[tuple[Path, Path, float | None]]) -> Iterator[Source]:
    entries = list(ordered)
    short = [relative.with_suffix("").as_posix() for _, relative, _ in entries]
    # two that differ in case alone would be one folder on many file systems
    counts: dict[str, int] = {}
    for name in short:
        counts[name.casefold()] = counts.get(name.casefold(), 0) + 1
    taken: set[str] = set()
    for (path, relative, mpp), name in zip(entries, short, strict=True):
        wanted = name if counts[name.casefold()] == 1 else relative.as_posix()
        final, number = wanted, 2
        while final.casefold() in taken:
            final, number = f"{wanted}-{number}", number + 1
        taken.add(final.casefold())
        yield Source(path, final, mpp)
