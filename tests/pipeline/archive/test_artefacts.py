"""A run on a field of view with ink on it: nuclei are flagged or skipped, areas counted, whatever the tiling."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from pipeline.archive.run import run
from pipeline.config import Artefacts, Execution, Settings, Tiling, Tissue
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import HostInstances, Patches
from pipeline.report.table import _COLUMNS
from pipeline.segment import tables
from pipeline.segment.record import SlideRecord

SIDE = 1600  # 0.4 mm
STROMA, INK, RED = np.array((215, 140, 180)), np.array((60, 40, 150)), (230, 40, 60)
FAINT = (230, 140, 180)  # dots in this colour do not show in green, in which sharpness is measured


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stroma, a stroke of violet ink over its middle, its lower quarter out of focus, and a lattice of dots."""
    rng = np.random.default_rng(0)
    stain = rng.uniform(0.4, 1.6, (SIDE // 16, SIDE // 16)).repeat(16, axis=0).repeat(16, axis=1)
    image = 243 * (STROMA / 243) ** stain[..., None]
    image[1200:] = STROMA
    image[500:640] = 0.3 * image[500:640] + 0.7 * INK
    for y in range(40, SIDE, 80):
        for x in range(40, SIDE, 80):
            image[y - 8 : y + 8, x - 8 : x + 8] = FAINT if y > 1200 else RED
    path = tmp_path_factory.mktemp("slide") / "field.png"
    Image.fromarray(image.astype(np.uint8)).save(path, compress_level=1)
    return path


def red_squares(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Stands for the detector: the dots."""
    for patch in patches:
        red = (patch == RED).all(axis=2) | (patch == FAINT).all(axis=2)
        inner = red & np.roll(red, 15, 0) & np.roll(red, 15, 1)
        y, x = np.nonzero(inner & np.roll(np.roll(red, 15, 0), 15, 1))
        boxes = np.stack([x - 15, y - 15, x + 1, y + 1], 1).astype(np.float32)
        boxes = boxes[(boxes[:, :2] >= 0).all(axis=1)]
        count = len(boxes)
        yield HostInstances(
            boxes,
            np.ones((count, 16, 16), bool),
            np.full(count, 0.9, np.float32),
            np.zeros(count, np.int64),
            np.ones(count, np.float32),
            np.ones(count, np.int64),
            np.zeros((count, 10), np.float32),
            False,
        )


def segment(slide: Path, out: Path, artefacts: Artefacts, tile: int = 512) -> tuple[SlideRecord, SlideFolder]:
    settings = Settings(tissue=Tissue(artefacts=artefacts), tiling=Tiling(mpp=0.25, tile=tile, margin=64, block=2))
    execution = Execution(cluster=False)
    (record,) = run([slide], out, settings, execution, mpp=0.25, detect=red_squares, say=lambda line: None)
    assert record.status == "done", record.cause
    return record, SlideFolder(out / "field")


def test_nuclei_are_flagged_skipped_or_left_alone(slide: Path, tmp_path: Path) -> None:
    flagged, folder = segment(slide, tmp_path / "flag", "flag")
    rows = tables.read_nuclei(folder.nuclei)
    kinds, x, y = np.array(rows["artefact"].to_pylist()), rows["centroid_x"].to_numpy(), rows["centroid_y"].to_numpy()
    assert len(kinds) == flagged.nuclei == 400
    assert (kinds[(y > 510) & (y < 630)] == "pen").all()
    assert (kinds[(y > 1300) & (y < 1530) & (x < 1530)] == "blur").all()
    assert not (kinds[(y < 350) | ((y > 850) & (y < 1150))] != "").any()
    counts = flagged.work.counts
    assert counts.flagged_nuclei == (kinds != "").sum()
    assert 0.4 * 0.035 < counts.pen_mm2 < 0.4 * 0.1  # with the rim of the stroke
    assert counts.blur_mm2 == pytest.approx(0.4 * 0.1, rel=0.4)
    assert any("of the tissue (pen" in remark for remark in flagged.remarks)
    skipped, without = segment(slide, tmp_path / "skip", "skip")
    kept = tables.read_nuclei(without.nuclei)
    assert kept["id"].to_pylist() == rows.filter(pc.equal(rows["artefact"], ""))["id"].to_pylist()
    assert (set(kept["artefact"].to_pylist()), skipped.work.counts.flagged_nuclei) == ({""}, 0)
    assert skipped.work.counts.skipped_mm2 == pytest.approx(flagged.tissue_mm2 - skipped.tissue_mm2, abs=1e-3)
    assert any("were skipped: pen" in remark for remark in skipped.remarks)
    summary = json.loads(without.slide_json.read_text())["summary"]
    assert summary["per_mm2"] == pytest.approx(skipped.nuclei / skipped.tissue_mm2, rel=1e-3), "of what was segmented"
    off, plain = segment(slide, tmp_path / "off", "off")
    assert tables.read_nuclei(plain.nuclei)["id"].to_pylist() == rows["id"].to_pylist()
    assert off.work.counts.artefact_mm2 == {}
    assert not plain.artefact_annotations.exists()
    names = json.loads(folder.slide_json.read_text())["files"]
    assert {"tissue.geojson", "artefacts.geojson"} <= names.keys()
    features = json.loads(folder.artefact_annotations.read_text())["features"]
    assert [f["properties"]["classification"]["name"] for f in features] == ["Artefact: pen", "Artefact: blur"]
    assert "mm² artefacts" in _COLUMNS
    assert "mm² under artefacts" in (tmp_path / "flag" / "report.html").read_text()


def test_artefacts_do_not_depend_on_the_tiling(slide: Path, tmp_path: Path) -> None:
    """Law: the same nuclei with the same kinds, and the same areas to the last digit."""
    results = []
    for tile in (256, 1024):
        record, folder = segment(slide, tmp_path / str(tile), "flag", tile)
        rows = tables.read_nuclei(folder.nuclei, ["id", "artefact"]).sort_by("id")
        areas = dataclasses.asdict(record.work.counts)
        files = (folder.artefact_annotations.read_bytes(), folder.tissue_annotation.read_bytes())
        results.append((rows.to_pydict(), {k: v for k, v in areas.items() if k.endswith("mm2")}, files))
    assert results[0] == results[1]


def test_a_pale_field_of_view_is_taken_whole_and_said(tmp_path: Path) -> None:
    """Fat or pale stroma, 0.2 mm wide, in which no tissue is recognised: it does not end as nothing."""
    image = np.full((800, 800, 3), (226, 222, 226), np.uint8)
    image[200:216, 200:216] = RED
    image[400:440] = (170, 164, 170)
    Image.fromarray(image).save(tmp_path / "field.png")
    record, _ = segment(tmp_path / "field.png", tmp_path / "out", "flag")
    assert record.nuclei == 1
    assert record.tissue_mm2 == pytest.approx(0.04, rel=0.05)
    assert record.remarks[0].startswith("no tissue was recognised in a field of view of 0.04 mm²")
