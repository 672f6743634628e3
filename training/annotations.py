"""Annotated images in, one dataset form out: an RGB image, an instance map, its scale.

A dataset is a folder: `images/<id>.{png,webp,jpg,jpeg,tif,tiff}` (RGB), `labels/<id>.png` (uint16 instance
map, 0 = background), and, if it has named splits, `splits.json` (name -> list of ids).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import ConfigError

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff")


class AnnotationError(ConfigError):
    """A dataset that is incomplete or contradicts itself; the message names the file and the rule."""


class Annotated(NamedTuple):
    """One annotated image, not yet read."""

    id: str
    image: Path
    labels: Path
    mpp: float


def find(data: Path, splits: Sequence[str], mpp: float) -> list[Annotated]:
    """The images of a dataset folder, of the named splits or all, sorted by id.

    Raises AnnotationError for a folder without images, an unknown split (it lists the right ones), an id
    without image or without labels.
    """
    images = {p.stem: p for p in sorted((data / "images").glob("*")) if p.suffix.lower() in SUFFIXES}
    if not images:
        raise AnnotationError(f"{data} holds no images: need {data / 'images'}/<id>.png and labels/<id>.png")
    if splits:
        named = _read_splits(data / "splits.json")
        unknown = [s for s in splits if s not in named]
        if unknown:
            raise AnnotationError(f"{data} has no split '{unknown[0]}': its splits are {', '.join(named)}")
        ids = sorted({i for s in splits for i in named[s]})
    else:
        ids = sorted(images)
    found = []
    for id_ in ids:
        labels = data / "labels" / f"{id_}.png"
        if id_ not in images or not labels.is_file():
            raise AnnotationError(f"{data}: '{id_}' has no {'labels' if id_ in images else 'image'}: need both")
        found.append(Annotated(id_, images[id_], labels, mpp))
    return found


def _read_splits(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path} names no splits ({error}): need a JSON object, name -> list of ids") from error
    named = {k: v for k, v in content.items() if isinstance(v, list) and all(isinstance(i, str) for i in v)}
    if not named:
        raise AnnotationError(f"{path} names no splits: need a JSON object, name -> list of ids")
    return named


def read_image(annotated: Annotated) -> NDArray[np.uint8]:
    """RGB uint8 (h, w, 3)."""
    with Image.open(annotated.image) as image:
        return np.asarray(image.convert("RGB"))


def read_labels(annotated: Annotated) -> NDArray[np.int32]:
    """Instance map int32 (h, w), 0 = background. Raises AnnotationError where it does not fit the image."""
    with Image.open(annotated.labels) as image:
        labels = np.asarray(image).astype(np.int32)
    with Image.open(annotated.image) as image:
        size = image.size
    if labels.ndim != 2 or labels.shape != (size[1], size[0]):
        raise AnnotationError(
            f"{annotated.labels} is {labels.shape}, its image {(size[1], size[0])}: need one label per pixel"
        )
    return labels
