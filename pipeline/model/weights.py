"""Weights on disk: safetensors with the architecture, notes and a checksum of the tensors inside.

Nothing is unpickled. A network is built from the architecture in its file; a file that is damaged, or of another kind,
raises WeightsError.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

import safetensors

from pipeline.config import Architecture, Settings, Stain, StainArchitecture, build
from pipeline.errors import WeightsError
from pipeline.files import file_sha256, stamp
from slides.errors import SlideNotFound

T = TypeVar("T")

NOTES_PIXELS = "trained_pixels"  # the note of the digests of what was trained on, apart by spaces
NOTES_SHA256 = "notes_sha256"  # the note that holds the checksum of all others


def shipped() -> tuple[str, ...]:
    """Names of the weights that come with the package."""
    folder = resources.files("pipeline") / "weights"
    return tuple(
        sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir() if f.name.endswith(".safetensors"))
    )


def find_weights(name: str) -> Path:
    """Path of shipped weights by name, or of a file. Raises WeightsError when there is neither."""
    if name in shipped():
        return Path(str(resources.files("pipeline") / "weights" / f"{name}.safetensors"))
    path = Path(name)
    if not path.is_file():
        stain = Stain().weights
        detectors = ", ".join(one for one in shipped() if one != stain)
        raise WeightsError(
            f"no weights '{name}': need a .safetensors file or one of the shipped names ({detectors}; of the stain "
            f"normalisation {stain})"
        )
    return path


def same_everywhere(name: str, path: Path) -> str:
    """What names weights to every worker, in whatever folder it was started: `path`, absolute, of a file.

    name: that `find_weights` has found at `path`. Of shipped weights it stays, as they lie elsewhere where a worker has
    another installation than the command.
    """
    return name if name in shipped() else os.path.abspath(path)


def as_weights_state(settings: Settings) -> Settings:
    """The settings with the working scale and score threshold of their weights, where they have none of their own.

    Raises WeightsError.
    """
    architecture = detector_architecture(find_weights(settings.detector.weights))
    score = architecture.score if settings.detector.score is None else settings.detector.score
    return dataclasses.replace(
        settings,
        tiling=dataclasses.replace(settings.tiling, mpp=settings.tiling.mpp or architecture.mpp),
        detector=dataclasses.replace(settings.detector, score=score),
    )


def stain_files(settings: Stain) -> dict[str, Path]:
    """The files that stain normalisation reads: `weights` of dcgmm's network, `template` where one is given.

    Raises WeightsError, SlideNotFound.
    """
    files = {"weights": find_weights(settings.weights)} if settings.method == "dcgmm" else {}
    if settings.template and settings.method != "none":
        files["template"] = Path(settings.template).resolve()
        if not files["template"].is_file():
            raise SlideNotFound(f"{files['template']}: there is no such file to take as --stain.template")
    return files


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's content; computed again only where the file's size, time or inode is another."""
    return _cached_sha256(path, stamp(path))


@functools.lru_cache(maxsize=32)
def _cached_sha256(path: Path, _stamp: tuple[int, ...]) -> str:
    return file_sha256(path)


def check_content(path: Path, recorded: str) -> str:
    """SHA-256 of a file. Raises WeightsError where it is not `recorded`, unless that is empty: any content will do."""
    try:
        sha256 = content_sha256(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}): put the file back, or choose other weights") from error
    if recorded not in ("", sha256):
        raise WeightsError(
            f"{path} has other content than when the run was started (SHA-256 {sha256}, recorded was {recorded}): "
            "put the file back, or choose another --out"
        )
    return sha256


def read_notes(path: Path) -> dict[str, str]:
    """The notes of a weights file: architecture, checksum, recipe, data, licence. Raises WeightsError."""
    try:
        with safetensors.safe_open(path, "np") as file:
            notes = dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from error
    if notes.get(NOTES_SHA256, notes_sha256(notes)) != notes_sha256(notes):  # older files have none
        raise WeightsError(f"{path} is damaged: its notes do not match their checksum; download or copy it again")
    return notes


def notes_sha256(notes: Mapping[str, str]) -> str:
    """The checksum of all notes of a weights file but itself."""
    rest = {name: value for name, value in notes.items() if name != NOTES_SHA256}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def licence(path: Path) -> str:
    """The licence in a weights file's notes, as one line of printable characters; "" where it has none."""
    line = " ".join(read_notes(path).get("licence", "").split())
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= 400 else f"{line[:399]}…"


def trained_pixels(path: Path) -> frozenset[str]:
    """Digests of the images that weights were trained on, of their pixels; none of files that do not state them."""
    return frozenset(read_notes(path).get(NOTES_PIXELS, "").split())


def read_architecture(path: Path, kind: type[T], maker: str) -> T:
    """The architecture in a file's notes, as a dataclass `kind`.

    maker: the command that writes such files, for the message
    Raises WeightsError where the file has none, or one that `kind` refuses.
    """
    notes = read_notes(path)
    if "architecture" not in notes or "sha256" not in notes:
        raise WeightsError(f"{path} holds no weights of Nightslide: need a file written by '{maker}'")
    try:
        content = json.loads(notes["architecture"])
        if not (others := _of_another_kind(content, kind)):
            return build(kind, content, f"{path}: architecture")
    except (ValueError, RecursionError) as error:  # ConfigError, JSONDecodeError; JSON of many levels
        raise WeightsError(
            f"{path} names no architecture that can be built ({error}): need a file written by '{maker}'"
        ) from error
    raise WeightsError(f"{path} holds weights of {others}: need those of {_WHAT[kind]}, as '{maker}' writes them")


_WHAT: Mapping[type, str] = {
    Architecture: "a detector, for --weights",
    StainArchitecture: "the stain normalisation, for --stain.weights",
}


def _of_another_kind(architecture: object, kind: type) -> str:
    """What the weights are of where all keys of their architecture are those of another kind; else empty."""

    def fits(one: type) -> bool:
        names = {field.name for field in dataclasses.fields(one)}
        return isinstance(architecture, dict) and architecture.keys() <= names

    return "" if fits(kind) else next((what for one, what in _WHAT.items() if fits(one)), "")


def detector_architecture(path: Path) -> Architecture:
    """The architecture of a detector, from the notes of its weights file, without loading it. Raises WeightsError."""
    return read_architecture(path, Architecture, "nightslide train")


def stain_architecture(path: Path) -> StainArchitecture:
    """The architecture of dcgmm's network, as `detector_architecture`."""
    return read_architecture(path, StainArchitecture, "nightslide fit-stain")
