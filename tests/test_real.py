"""The whole way on real slides and real images, with the shipped weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import geopandas
import numpy as np
import pytest
import torch
from PIL import Image

from oracle import replace_detector
from pipeline.archive.run import run
from pipeline.config import Execution, Settings, Tissue
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.instances import STATISTICS, HostInstances, Patches
from pipeline.model.weights import find_weights, read_notes, trained_pixels
from training import checkpoint
from training.data.datasets import read_dataset
from training.evaluate import Outputs, evaluate, gather

EXPECTED = {
    "CMU-1-Small-Region": ("done", ""),
    "TCGA-CR-7395-01A-01-TS1": ("failed", "pass --mpp"),
    "damaged/empty": ("failed", "empty"),
    "damaged/mirax-missing-datafile/mirax-sparse": ("failed", "Data0000.dat is missing"),
    "damaged/random-byte-flips-in-tiles": ("done", ""),
    "damaged/text-renamed": ("failed", "is not a slide"),
    "damaged/truncated-50pct": ("failed", "truncated"),
    "damaged/zeroed-60kB-in-tile-data": ("done", ""),
    "generic-no-resolution": ("failed", "pass --mpp"),
    "generic-pyramid-jpeg": ("done", ""),
    "leica-offset-region": ("done", ""),
    "mirax-sparse": ("done", ""),
    "philips": ("done", ""),
}


def one_square(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Finds one square in the middle of every patch: what is tested is everything around the detector."""
    for patch in patches:
        y, x = patch.shape[0] / 2, patch.shape[1] / 2
        yield HostInstances(
            np.array([[x - 14, y - 14, x + 14, y + 14]], np.float32),
            np.ones((1, 28, 28), np.float32),
            np.array([0.9], np.float32),
            np.zeros(1, np.int64),
            np.ones(1, np.float32),
            np.ones(1, np.int64),
            np.zeros((1, 2, len(STATISTICS)), np.float32),
            False,
        )


def test_an_archive_of_every_format_with_damage_between(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readable slides are done, the others fail alone with a cause that a user understands."""
    replace_detector(monkeypatch, one_square)
    rows = {
        r.slide: r
        for r in run([shared / "slides"], tmp_path, Settings(), Execution(cluster=False), say=lambda line: None)
    }
    assert {name: row.status for name, row in rows.items()} == {n: status for n, (status, _) in EXPECTED.items()}
    for name, (_, cause) in EXPECTED.items():
        assert cause in rows[name].cause
    for name in ("damaged/zeroed-60kB-in-tile-data", "damaged/random-byte-flips-in-tiles"):
        assert rows[name].work.counts.area_lost_mm2 > 0
    assert rows["CMU-1-Small-Region"].work.counts.area_lost_mm2 == 0
    for name in ("CMU-1-Small-Region", "leica-offset-region", "mirax-sparse", "philips", "generic-pyramid-jpeg"):
        assert rows[name].tissue_mm2 == pytest.approx(0.86, rel=0.1)
        assert rows[name].nuclei > 10
        with Image.open(tmp_path / name / "thumbnail.jpg") as thumbnail:
            assert max(thumbnail.size) <= 1200
    leica = geopandas.read_parquet(tmp_path / "leica-offset-region" / "nuclei.parquet").total_bounds
    assert leica[0] >= 3000
    assert leica[1] >= 5000
    assert leica[2] <= 5220
    assert leica[3] <= 7967


def test_a_slide_without_scale_runs_where_the_user_gives_one(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_detector(monkeypatch, one_square)
    slide = shared / "slides" / "generic-no-resolution.tif"
    (row,) = run([slide], tmp_path, Settings(), Execution(cluster=False), mpp=0.499, say=lambda line: None)
    assert (row.status, row.mpp_source, row.mpp) == ("done", "default by --mpp", 0.499)


def test_the_shipped_weights_segment_an_image_they_never_saw(shared: Path, tmp_path: Path) -> None:
    """A test image of Kumar's set, through the path of `nightslide evaluate`; its label maps can be written."""
    torch.set_num_threads(2)
    whole = gather([shared / "data" / "kumar"], ["test_same_organ"], [0.25])
    name = "TCGA-18-5592-01Z-00-DX1"
    one = whole._replace(images=tuple(m for m in whole.images if m.name == name))
    settings = Settings(tissue=Tissue(everywhere=True))
    scores = evaluate(
        one, settings, Execution(cluster=False), outputs=Outputs(labels=tmp_path), say=lambda line: None
    ).images[name]
    assert scores.aji > 0.55
    assert scores.pq > 0.5
    labels = np.asarray(Image.open(tmp_path / "TCGA-18-5592-01Z-00-DX1.png"))
    assert labels.dtype == np.uint16
    assert len(np.unique(labels)) > 200


def test_the_shipped_weights_say_how_they_came_to_be() -> None:
    notes = read_notes(find_weights("nuclei"))
    assert json.loads(notes["recipe"])["seed"] == 0
    # checksums of the weights that they are the means of, one of them twice
    for name, parts in (("nuclei", 4), ("classes", 3)):
        of = json.loads(read_notes(find_weights(name))["mean_of"])
        assert (len(of), len(set(of))) == (parts, parts - 1)


def test_the_shipped_weights_know_the_images_that_they_were_trained_on(shared: Path) -> None:
    """By their pixels, so that `evaluate` can warn of them: those of an open set, but for two, and none of Kumar's."""
    tnbc, unseen = (
        {
            image.id: checkpoint.digest([image.read().image.tobytes()])
            for image in read_dataset(data, splits, 0.25).images
        }
        for data, splits in ((shared / "data" / "tnbc", []), (shared / "data" / "kumar", ["test_same_organ"]))
    )
    for name in ("nuclei", "classes", "fast", "research"):
        known = trained_pixels(find_weights(name))
        assert {id_ for id_, digest in tnbc.items() if digest not in known} == {"04_2", "05_3"}
        assert {digest in known for digest in unseen.values()} == {name == "research"}
