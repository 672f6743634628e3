"""Tables of nuclei for the tests of what reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import shapely

from pipeline.segment import tables
from slides.geometry import Box, Size

PROVENANCE = tables.Provenance(
    slide="4f0c",
    um_per_px=(0.25, 0.25),
    size=Size(6000, 7000),
    bounds=Box(100, 250, 5000, 6000),
    digest="d1",
    colours={"Nucleus": (200, 30, 30), 'odd "name" µ\\': (0, 128, 255)},
)


def write(path: Path, shapes: np.ndarray, seed: int = 0, provenance: tables.Provenance = PROVENANCE) -> Path:
    rng = np.random.default_rng(seed)
    count = len(shapes)
    names = list(provenance.colours)
    with tables.NucleiWriter(path, provenance) as writer:
        writer.write(
            shapes,
            class_name=[names[k] for k in rng.integers(0, len(names), count)],
            score=rng.random(count),
            votes=rng.integers(1, 9, count),
            stains=rng.random((count, len(tables.STAINS))),
            class_score=rng.random(count),
            artefact=[""] * count,
        )
    return path


def append(writer: tables.NucleiWriter, shapes: np.ndarray, **columns: Any) -> None:
    """Write nuclei whose class is certain, and which lie in no artefact, unless `columns` says otherwise."""
    usual = {"class_score": np.ones(len(shapes)), "artefact": [""] * len(shapes)}
    writer.write(shapes, **{**usual, **columns})


def write_not_finite(path: Path) -> Path:
    """Three nuclei: the eosin of the first and the last, and the score of the second, are not finite."""
    stains = np.full((3, len(tables.STAINS)), 0.5)
    stains[:, tables.STAINS.index("eosin")] = np.nan, 0.3, -np.inf
    scores = np.array([0.5, np.inf, 1e-7])
    with tables.NucleiWriter(path, PROVENANCE) as writer:
        append(writer, blobs(3), class_name=["Nucleus"] * 3, score=scores, votes=np.ones(3, dtype=int), stains=stains)
    return path


def blobs(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    radius = rng.uniform(10, 20, (count, 20))
    spokes = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    ring = rng.uniform(300, 3000, (count, 1, 2)) + spokes
    return np.asarray(shapely.polygons(ring), dtype=object).reshape(-1)
