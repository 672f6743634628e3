"""Names of slides in the results of a run: DIR/<name>/ is a slide's folder. The rules:

1. A name is the slide's path relative to the input folder that it was found in, without its suffix. The outermost
   folder counts, and a real folder before a link to it. A slide given by itself was found in its own folder; one of a
   manifest in the manifest's, or in its own if it lies elsewhere.
2. Each part of a name fits every file system, log and table: bytes that are not UTF-8 are spelled `_xe9`; what
   Windows refuses, control characters and a leading dot become `_`; dots and spaces at the end go; more than 200 bytes
   are cut, and a hash appended; and `_` is appended to what a run calls its own files (`RESERVED`), and to what
   Windows calls its devices (con_, nul_.1).
3. Where slides of several folders would have one name, all of these begin with the folder's name, and with as many of
   its parents' as tell the folders apart: siteA/x, siteB/x.
4. Where a name is taken, the slide keeps its suffix, and if that does not help, a hash of its path follows. Taken is
   what a slide has that comes earlier in the alphabet (x.svs is `x`, x.tif is `x.tif`), and what is a folder that
   other slides' results lie in (beside a/y.svs, a.svs is `a.svs`).

Laws: no two names are equal, nor one a folder of another, nor one of `RESERVED`, also where a file system takes upper
for lower case or composed for decomposed letters. Names do not depend on the order of the inputs or of the search.
A slide that is added to an archive changes no other name, unless by rule 3, or where its name, or a folder that it
lies in, is the name that another slide had.
"""

import hashlib
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.layout import RESERVED

_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029<>:"|?*\\/]|^\.')
_DEVICE = re.compile(r"\A(con|prn|aux|nul|com[0-9]|lpt[0-9])(?= *(\.|\Z))", re.IGNORECASE)
_LONGEST = 200  # bytes; file systems end at 255, and the hash comes on top


class Place(NamedTuple):
    """Where a slide was found: an input folder (absolute), and the way from there, "/" between folders."""

    home: Path
    relative: str

    @property
    def path(self) -> Path:
        return self.home / self.relative


def name_slides(places: Sequence[Place]) -> list[str]:
    """The names of slides, "/" between their parts, in the order of `places`. The rule is the module's docstring."""
    homes: dict[str, set[Path]] = defaultdict(set)
    plain = [_key("/".join((*_folders(p), _fit(_stem(p))))) for p in places]
    for place, key in zip(places, plain, strict=True):
        homes[key].add(place.home)
    labels = {key: _labels(rivals) for key, rivals in homes.items()}
    folders = [(*labels[k][p.home], *_folders(p)) for p, k in zip(places, plain, strict=True)]
    taken = {_key("/".join(f[:depth])) for f in set(folders) for depth in range(1, len(f) + 1)}
    names = [""] * len(places)
    for i in sorted(range(len(places)), key=lambda i: (_key(places[i].relative), places[i].relative, places[i].home)):
        names[i] = next(name for name in _candidates(places[i], folders[i]) if _key(name) not in taken)
        taken.add(_key(names[i]))
    return names


def _candidates(place: Place, folders: tuple[str, ...]) -> Iterator[str]:
    """Names for a slide, the best first, without end."""
    name = _fit(place.relative.rpartition("/")[2])
    for last in (_fit(_stem(place)), name):
        yield "/".join((*folders, last))
    for attempt in itertools.count():
        yield "/".join((*folders, f"{name}-{_hash(f'{attempt} {place.path}')}"))


def _labels(homes: set[Path]) -> dict[Path, tuple[str, ...]]:
    """For each folder as many of the last parts of its path as tell it from the others; none where it is alone."""
    if len(homes) == 1:
        return dict.fromkeys(homes, ())
    labels: dict[Path, tuple[str, ...]] = {}
    parts = {home: (*filter(None, [home.drive]), *home.parts[1:]) for home in homes}  # drives are those of Windows
    for depth in range(1, max(map(len, parts.values())) + 1):
        labels = {home: tuple(map(_fit, parts[home][-depth:])) for home in homes}
        if len({_key("/".join(label)) for label in labels.values()}) == len(homes):
            break
    return labels


def _folders(place: Place) -> tuple[str, ...]:
    return tuple(map(_fit, place.relative.split("/")[:-1]))


def _stem(place: Place) -> str:
    return os.path.splitext(place.relative.rpartition("/")[2])[0]


def _fit(part: str) -> str:
    """A part of a path as a part of a name."""
    text = _UNFIT.sub("_", os.fsencode(part).decode("utf-8", "backslashreplace")).rstrip(" .") or "_"
    text = _DEVICE.sub(r"\1_", text)
    if len(text.encode()) > _LONGEST:
        text = f"{text.encode()[:_LONGEST].decode('utf-8', 'ignore')}-{_hash(part)}"
    return f"{text}_" if _key(text) in RESERVED else text


def _key(name: str) -> str:
    """Equal for names that some file system takes for one (Unicode 3.13, canonical caseless matching)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
