"""What is written of the nuclei of a slide, and what they look like in every export."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive.manifest import resolve
from pipeline.config import Detector, Settings
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches
from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment import stages, tables
from pipeline.segment.job import Job
from pipeline.segment.nuclei import COLOURS
from pipeline.segment.plan import read_plan, write_plan
from pipeline.segment.polygons import measure
from pipeline.segment.record import StageRecord
from slides.scale import GivenScale

# of linear RGB, after Machado, Oliveira and Fernandes 2009, at full severity
SEEN = {
    "all colours": np.eye(3),
    "without red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "without green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
CLEAR = 40  # CIELAB; of the colours before, two were 15 apart


@pytest.mark.parametrize("seen", SEEN)
def test_the_classes_that_are_shipped_differ_for_everyone(seen: str) -> None:
    """One man in twelve cannot tell red from green."""
    lab = cielab(np.array(COLOURS[:4]), SEEN[seen])
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > CLEAR


CLASSES = detector_architecture(find_weights("classes")).classes


def varied(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """The oracle's instances with other numbers in every column, all of which follow from the score."""
    for found in oracle.detect(patches, normalisation, settings):
        key = np.rint(200 * found.scores).astype(np.int64)
        yield found._replace(
            votes=1 + key % 7,
            class_index=key % len(CLASSES),
            class_scores=(key / 256).astype(np.float32),
            stain_density=(key[:, None] + np.arange(10)).astype(np.float32).reshape(-1, 2, 5),
        )


def test_what_was_detected_of_a_nucleus_is_in_its_row(tmp_path: Path) -> None:
    """Through the files of predictions and instances, and whatever is left out at the seams; and so is its shape."""
    painted = paint(tmp_path / "discs.png", 0)
    settings = resolve(dataclasses.replace(chosen(), detector=Detector(weights="classes")))
    job = Job(tmp_path / "discs.png", SlideFolder(tmp_path / "out"), settings, GivenScale(0.25))
    stages.make_plan(job)
    plan = read_plan(job.folder, job.digest)
    for block in plan.blocks:
        stages.outline_block(job, block, stages.detect_block(job, block, StageRecord(), varied))
    write_plan(plan._replace(scale=plan.scale._replace(x=0.25, y=0.5)), job.folder, job.digest)
    counts = stages.stitch_slide(job).counts
    nuclei = tables.read_nuclei(job.folder.nuclei)
    assert counts.nuclei == nuclei.num_rows == painted
    assert counts.seam_duplicates > 0
    key = np.rint(200 * nuclei["score"].to_numpy()).astype(np.int64)
    assert len(set(key.tolist())) > 50
    assert nuclei["votes"].to_pylist() == (1 + key % 7).tolist()
    assert nuclei["class"].to_pylist() == [CLASSES[i] for i in key % len(CLASSES)]
    assert nuclei["class_score"].to_pylist() == (key / 256).tolist()
    for i, name in enumerate(tables.STAINS):
        assert nuclei[name].to_pylist() == (key + i).tolist()
    measured = measure(tables.geometry(nuclei), (0.25, 0.5))
    for name in ("area_um2", "max_diameter_um", "minor_axis_um"):
        assert nuclei[name].to_pylist() == getattr(measured, name).tolist()
    assert np.stack([nuclei["centroid_x"], nuclei["centroid_y"]], 1).tolist() == measured.centroid.tolist()


def cielab(rgb: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """sRGB (N, 3), 0 to 255 -> L*, a*, b* under D65, (N, 3), of what is seen of it."""
    shares = rgb / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4) @ seen.T
    primaries = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear.clip(0, 1) @ primaries.T / primaries.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
