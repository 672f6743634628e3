"""The example notebook runs on a finished result, and is committed without outputs."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import oracle
from pipeline.archive.run import run
from pipeline.config import Execution
from pipeline.layout import RunFolder

NOTEBOOK = Path(__file__).parents[2] / "workflows" / "examples" / "nuclei.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs() -> None:
    assert len(code_cells()) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())


def test_the_notebook_counts_every_nucleus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slide of known nuclei: all of them by class, by area and in the map of densities; three pictures."""
    monkeypatch.chdir(tmp_path)  # the notebook reads the folder `demo` beside it
    slide, out = tmp_path / "discs.png", tmp_path / "demo"
    count = oracle.paint(slide, 0)
    one, silent = Execution(cluster=False), lambda line: None
    (row,) = run([slide], out, oracle.chosen(), one, mpp=0.25, say=silent, detect=oracle.detect)
    assert row.nuclei == count
    slide_json = RunFolder(out).slide(row.slide).slide_json
    written = json.loads(slide_json.read_text())
    width, height = written["size"]
    slide_json.write_text(json.dumps({**written, "size": [3 * width, 2 * height]}))  # bounds may be a part of the slide
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    try:
        for cell in code_cells():
            exec("".join(cell["source"]), names)
        assert len(plt.get_fignums()) == 3
        thumbnail = plt.figure(1).axes[0].images[0]
        assert list(thumbnail.get_extent()) == [0, width, height, 0]
    finally:
        plt.close("all")
    assert len(names["nuclei"]) == count
    assert names["by_class"]["nuclei"].sum() == names["by_area"].sum() == count
    assert names["counts"].sum() == count
    assert np.allclose(names["per_mm2"], names["counts"] * 100)
