"""The report shows what was measured in regions, and the density where it was exported."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from nuclei_tables import blobs, write
from pipeline.config import Export
from pipeline.layout import RunFolder
from pipeline.report import regions
from pipeline.report.page import write_report
from pipeline.report.regions import region_table
from pipeline.report.results import SlideResult, read_results
from pipeline.segment.export import write_density

ROW = {"slide": "x", "status": "done", "nuclei": 60}


def shown(*rows: dict[str, str]) -> str:
    return region_table([SlideResult(ROW, regions=rows)], "regions.csv")


def test_rows_are_shown_and_escaped() -> None:
    page = shown(
        {"region": "<b>bold</b>", "class": "Tumor", "nuclei": "1200", "per_mm2": "0.123456", "tissue_mm2": "<i>"}
    )
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>" not in page
    assert [f'<td class="number">{text}</td>' in page for text in ("1,200", "0.1235", "&lt;i&gt;")] == [True] * 3
    assert '<a href="regions.csv">' in page
    assert shown() == ""


def test_a_long_table_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_SHOWN", 3)
    page = shown(*({"region": f"r{n}"} for n in range(5)))
    assert page.count("<tr>") == 1 + 3
    assert "2 more regions" in page


def test_the_density_of_a_slide_is_drawn(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    slide = folder.slide("x")
    slide.path.mkdir()
    Image.new("RGB", (60, 40)).save(slide.overlay)
    nuclei = write(slide.nuclei, blobs(60))
    (plain,) = read_results(folder, [ROW])
    assert plain.density_map == ""
    write_density(nuclei, slide.export("density"), Export())
    (result,) = read_results(folder, [ROW])
    picture = Image.open(io.BytesIO(base64.b64decode(result.density_map.partition(",")[2])))
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert max(picture.size) > 100
    assert pixels.min(0).tolist() == [45, 17, 86]  # the densest square
    assert pixels.max(0).tolist() == [255, 255, 255]  # squares without nuclei
    assert result.densest >= 100  # a nucleus in a square of 100 um
    assert result.density_map in write_report(folder, [ROW]).read_text()
    (slide.export("density") / "density.ome.tif").write_bytes(b"nothing")
    assert read_results(folder, [ROW])[0].density_map == ""


def test_a_table_that_cannot_be_read_is_left_out(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    folder.slide("x").path.mkdir()
    folder.slide("x").regions.write_bytes(b"\xff\xfe\0a,b\n")
    assert read_results(folder, [ROW])[0].regions == ()
