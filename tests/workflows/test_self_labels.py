"""Detections as a dataset: certain ones are nuclei, uncertain ones are gone from the picture."""

from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

import finished_run
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.segment.tables import geometry, read_nuclei
from training.data.datasets import read_dataset

SCRIPTS = Path(__file__).parents[2] / "workflows" / "experiments"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_uncertain_detections_get_pixels_from_around_and_no_label() -> None:
    import self_labels as script

    pixels = np.full((40, 60, 3), 230, np.uint8)
    polygons = np.array([shapely.box(5, 5, 15, 15), shapely.box(30, 10, 40, 20), shapely.box(-4, 30, 6, 44)], object)
    for polygon in polygons:
        left, top, right, bottom = np.maximum(0, polygon.bounds).astype(int)
        pixels[top:bottom, left:right] = 90
    image, labels = script.label(polygons, np.array([True, False, False]), pixels)
    assert labels.dtype == np.uint16
    assert (labels[5:15, 5:15] == 1).all()
    assert (labels > 0).sum() == 100
    assert (image[labels == 1] == 90).all()
    assert (image[labels == 0] == 230).all()


def test_a_finished_run_becomes_a_dataset_whose_nuclei_lie_where_they_were_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import self_labels as script

    run = finished_run.finish(tmp_path)
    assert script.self_labels(run.run, out=tmp_path / "dataset", score=0.0, side=10_000, least=1) == 0
    assert f"{finished_run.FIRST}: 1" in capsys.readouterr().out
    for image in read_dataset(tmp_path / "dataset", mpp=0.25).images:
        name = image.id.removesuffix("_0_0")
        labels = np.asarray(Image.open(tmp_path / "dataset" / "labels" / f"{image.id}.png"))
        outlines = geometry(read_nuclei(RunFolder(run.run).slide(name).nuclei, ["geometry"]))
        assert len(np.unique(labels)) - 1 == len(outlines)
        assert (labels > 0).sum() == pytest.approx(shapely.area(outlines).sum(), rel=0.02)
        centres = shapely.get_coordinates(shapely.point_on_surface(outlines)).astype(int)
        assert (labels[centres[:, 1], centres[:, 0]] > 0).all()


def test_squares_with_too_few_nuclei_are_left_out_and_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    import self_labels as script

    run = finished_run.finish(tmp_path)
    script.self_labels(run.run, out=tmp_path / "dataset", score=0.0, least=10_000)
    assert not (tmp_path / "dataset").exists()
    with pytest.raises(RunError, match="need the results of a run"):
        script.self_labels(tmp_path / "slides", out=tmp_path / "dataset")
