"""Arrow arrays made without pyarrow's own conversions: the same arrays, without pandas."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.segment import arrow

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_arrays_are_those_of_pyarrow(count: int) -> None:
    rng = np.random.default_rng(count)
    for values in (rng.random(count), rng.integers(0, 99, count), rng.random(count) < 0.5):
        assert arrow.numbers(values).equals(pa.array(values))
        assert arrow.numbers(values[::-1]).equals(pa.array(values[::-1]))
    doubles = rng.random(count)
    assert arrow.numbers(doubles, pa.float32()).equals(pa.array(doubles, pa.float32()))
    parts = [rng.bytes(int(length)) for length in rng.integers(0, 4, count)]
    assert arrow.binary(parts).equals(pa.array(parts, pa.binary()))
    assert arrow.binary(np.array(parts, object)).equals(pa.array(parts, pa.binary()))


def test_text_reads_back() -> None:
    words = ["", "a", "Häma", "核"]
    assert arrow.text(words).equals(pa.array(words))
    assert arrow.join("<", arrow.text(words), ">", "").to_pylist() == [f"<{word}>" for word in words]


def test_values_are_those_of_all_chunks() -> None:
    column = pa.chunked_array([arrow.numbers(np.arange(3)), arrow.numbers(np.arange(2))])
    assert arrow.values(column).tolist() == [0, 1, 2, 0, 1]
    assert len(arrow.values(pa.chunked_array([], pa.float32()))) == 0


def test_texts_are_filled_where_they_are_there_and_not_empty() -> None:
    column = pa.chunked_array([["pen", ""], [None, "b"], []], pa.string())
    assert arrow.filled(column).tolist() == [True, False, False, True]
    assert arrow.filled(pa.chunked_array([], pa.string())).tolist() == []


def test_a_table_without_rows_is_that_of_pyarrow() -> None:
    schema = pa.schema([("a", pa.float32()), ("b", pa.struct([("c", pa.string())]))])
    assert arrow.no_rows(schema).equals(schema.empty_table())


RUN = """
import sys
from pathlib import Path
import oracle
from PIL import Image
from pipeline.archive.run import run
from pipeline.config import Execution

folder = Path(sys.argv[1])
oracle.paint(folder / "a.png", 3)
Image.new("RGB", (300, 300), "white").save(folder / "b.png")
slides, here = [folder / "a.png", folder / "b.png"], Execution(cluster=False, workers=1)
records = run(slides, folder / "out", oracle.chosen(), here, mpp=0.25, detect=oracle.detect)
print(*(record.status for record in records), *(record.nuclei > 0 for record in records), "pandas" in sys.modules)
"""


def test_a_run_does_not_wait_for_pandas(tmp_path: Path) -> None:
    """Law: neither the tables nor the export for QuPath import it, with nuclei or without: a second a process."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "done done True False False"


READ = """
import sys
from pathlib import Path
from pipeline.config import Export, Regions
from pipeline.archive.measure import measure_slides
from pipeline.layout import RunFolder
from pipeline.segment.finished import write_exports
from pipeline.view.nuclei import NucleusTiles
from training.evaluate import read_detections

run, drawn = RunFolder(Path(sys.argv[1])), sys.argv[2]
assert [bool(slide.rows) for slide in measure_slides(run.path, Regions(drawn))] == [True, False]
print("measure", "pandas" in sys.modules)
for slide in run.finished():
    for name in ("qupath", "csv", "density", "dsa", "ngff"):
        write_exports(slide, Export(formats=(name,)))
        print(name, "pandas" in sys.modules)
    NucleusTiles(slide.nuclei).density(0.5, [0])
    print("view", "pandas" in sys.modules)
    read_detections(slide.nuclei)
    print("evaluate", "pandas" in sys.modules)
"""


def test_what_reads_the_tables_does_not_wait_for_pandas(tmp_path: Path) -> None:
    """Law: neither `measure` nor `view`, `evaluate` and the exports, but those of AnnData and DICOM, import it."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    oracle_run = [sys.executable, "-c", RUN, str(tmp_path)]
    subprocess.run(oracle_run, cwd=ROOT, env=path, capture_output=True, check=True)
    corners = [[0, 0], [300, 0], [300, 300], [0, 300], [0, 0]]
    region = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": {"objectType": "annotation"},
    }
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [region]}))
    reading = [sys.executable, "-c", READ, str(tmp_path / "out"), str(drawn)]
    done = subprocess.run(reading, cwd=ROOT, env=path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1 + 2 * 7
    assert not [line for line in done.stdout.splitlines() if line.endswith("True")]
