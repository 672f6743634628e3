"""Text from outside (names of files, messages of libraries) made safe to print and to write."""

import math
import os
import shlex
import subprocess
import unicodedata
from collections.abc import Iterable

_UNSAFE = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])  # control, format (bidirectional overrides), line separators


def printable(text: object) -> str:
    """Text that a terminal, a log and an HTML page can show: bytes and control characters become escapes.

    These are bytes of file names outside UTF-8, terminal escapes, bidirectional overrides. Line ends and tabs stay.
    """
    shown = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(_escaped(c) if c not in "\n\t" and unicodedata.category(c) in _UNSAFE else c for c in shown)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


_START, _END = 1500, 500  # characters of a message: a damaged slide's may hold whatever is in its file


def one_line(error: BaseException) -> str:
    """An exception's message as one printable line, or its type; of a long one the middle is left out."""
    line = printable(" ".join(str(error).split()) or type(error).__name__)
    return line if len(line) <= _START + _END else f"{line[:_START]} ... {line[-_END:]}"


def shell_command(parts: Iterable[object]) -> str:
    """A command to copy into a terminal of this system, quoted as its shell needs it."""
    words = [str(part) for part in parts]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number and what it counts: 1 slide, 1,024 slides."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def counted_nuclei(number: int) -> str:
    """`counted` for nuclei: 1 nucleus, 2,418 nuclei."""
    return counted(number, "nucleus", "nuclei")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: 3.4 s, 12 min, 40.3 h; `?` for NaN."""
    if math.isnan(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet evaluates


def csv_cell(value: object) -> object:
    """A value for a cell of a CSV file: text that a spreadsheet would evaluate gets an apostrophe in front.

    So does text that has one already, or `from_csv_cell` would take it away.
    """
    return f"'{value}" if isinstance(value, str) and value.lstrip("'").startswith(_FORMULA) else value


def from_csv_cell(text: str) -> str:
    """The inverse of `csv_cell` for text."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(_FORMULA) else text
