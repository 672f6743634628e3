"""What a script or a notebook calls: light to import, and as the README shows it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import pipeline
import slides
from pipeline.api import CPU_SECONDS_PER_MM2, export_files
from pipeline.archive.verify import verify_results
from pipeline.config import Detector, Export, Stain, Tissue
from pipeline.errors import ConfigError, ExportFailed, RunError
from slides import phantom
from slides.errors import SlideError
from slides.geometry import Size

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with slides/case7.tif, in which the README's Python was run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "slides").mkdir()
    phantom.write(folder / "slides" / "case7.tif", phantom.draw(Size(900, 700), 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names: dict[str, object] = {}
        for example in re.findall(r"```python\n(.*?)```", README, flags=re.S):
            exec(compile(example, "README.md", "exec"), names)
        yield folder


@pytest.mark.parametrize("name", [*pipeline.__all__, *slides.__all__])
def test_the_types_that_are_stated_can_be_asked_for(name: str) -> None:
    """As notebooks and validators do."""
    typing.get_type_hints(getattr(pipeline if name in pipeline.__all__ else slides, name))


def test_the_readme_s_example_segments_a_slide(place: Path) -> None:
    nuclei = pipeline.read_nuclei(place / "results" / "case7")
    assert nuclei.num_rows > 20
    assert nuclei.equals(pipeline.read_nuclei(place / "results" / "case7" / "nuclei.parquet"))
    assert pipeline.read_nuclei(place / "results" / "case7", ["id"]).column_names == ["id"]
    assert (place / "results" / "case7" / "nuclei.csv").is_file()


def test_a_run_returns_the_ledger_and_resumes(place: Path) -> None:
    """Every kind of path will do, one or several; what is done is not done again."""
    (row,) = pipeline.run([place / "slides" / "case7.tif"], str(place / "results"), say=lambda _: None)
    assert (row.slide, row.status, row.cause) == ("case7", "done before", "")
    assert row.nuclei == pipeline.read_nuclei(place / "results" / "case7").num_rows


def test_a_run_resumes_whichever_number_a_setting_is(place: Path) -> None:
    """40 and 40.0, which the command line makes of 40."""
    settings = pipeline.Settings(tissue=Tissue(margin_um=40))
    here = pipeline.Execution(cluster=False)
    (row,) = pipeline.run(place / "slides", place / "results", settings, here, say=lambda _: None)
    assert row.status == "done before"


def test_a_plan_is_an_estimate_for_each_slide(place: Path) -> None:
    cpu = pipeline.Settings(detector=Detector(device="cpu", views=4), stain=Stain(method="none"))
    (estimate,) = pipeline.plan(place / "slides", cpu)
    assert (estimate.slide, estimate.problem) == ("case7", "")
    assert estimate.mpp == pytest.approx(0.25, abs=1e-3)
    assert estimate.hours == pytest.approx(estimate.tissue_mm2 * CPU_SECONDS_PER_MM2 * 4 / 3600)
    (faster,) = pipeline.plan(place / "slides", cpu, seconds_per_mm2=CPU_SECONDS_PER_MM2 / 10)
    assert faster.hours == pytest.approx(estimate.hours / 10)


def test_a_plan_counts_what_the_choice_of_the_stain_takes(place: Path) -> None:
    """Squares of 512 px, twice in one view, whatever the number of views."""
    detector = Detector(device="cpu", views=4)
    named, chosen = (
        pipeline.plan(place / "slides", pipeline.Settings(detector=detector, stain=Stain(method=method)))[0]
        for method in ("macenko", "auto")
    )
    squares = (chosen.hours - named.hours) * 3600 / CPU_SECONDS_PER_MM2 / 2 / 0.128**2
    assert squares == pytest.approx(min(4, math.ceil(chosen.tissue_mm2 / 0.128**2)))


def test_what_was_exported_before_another_format_failed_is_noted(place: Path, tmp_path: Path) -> None:
    """And said: with other options, `verify` took it for damaged; a new format was in no checksum."""
    pytest.importorskip("h5py", reason="the extra anndata is not installed")
    results = shutil.copytree(place / "results", tmp_path / "results")
    pipeline.export(results, "density")
    (results / "case7" / "nuclei.h5ad").mkdir()
    exports = export_files(results, Export(formats=("density", "dsa", "h5ad", "csv"), density_um=50.0))
    assert [next(exports)[0].name for _ in range(2)] == ["density", "nuclei.dsa"]
    with pytest.raises(ExportFailed, match="Is a directory"):
        next(exports)
    noted = json.loads((results / "case7" / "slide.json").read_text())["files"]
    assert noted["density"]["options"]["density_um"] == 50
    assert "nuclei.dsa" in noted
    assert [problems for _, problems in verify_results(results)] == [[]]


def test_an_export_counts_the_nuclei_by_file(place: Path) -> None:
    count = pipeline.read_nuclei(place / "results" / "case7").num_rows
    exported = pipeline.export(place / "results", ("qupath", "csv"), crop=False)
    assert {path.name: counts.written for path, counts in exported.items()} == {
        "nuclei.geojson.zip": count,
        "nuclei.csv": count,
    }
    (path,) = pipeline.export(place / "results", "csv")
    assert path.name == "nuclei.csv"
    with pytest.warns(UserWarning, match="cells=5.* has no effect without the format qupath"):
        pipeline.export(place / "results", "csv", cells=5)
    with pytest.raises(ConfigError, match="need one of qupath, csv"):
        pipeline.export(place / "results", ["shapefile"])
    with pytest.raises(RunError, match=r"holds no nuclei\.parquet"):
        pipeline.export(place / "slides")


def test_a_damaged_table_is_named(place: Path, tmp_path: Path) -> None:
    whole = (place / "results" / "case7" / "nuclei.parquet").read_bytes()
    (tmp_path / "case8").mkdir()
    (tmp_path / "case8" / "nuclei.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportFailed, match=r"case8/nuclei\.parquet could not be exported: it is damaged"):
        pipeline.export(tmp_path)
    with pytest.raises(RunError, match=r"case8/nuclei\.parquet cannot be read: it is damaged"):
        pipeline.read_nuclei(tmp_path / "case8")
    with pytest.raises(RunError, match=r"case9.* does not exist"):
        pipeline.read_nuclei(tmp_path / "case9")


def test_one_column_is_read(place: Path) -> None:
    table = pipeline.read_nuclei(place / "results" / "case7", "area_um2")
    assert table.column_names == ["area_um2"]
    assert table.num_rows > 0
    with pytest.raises(RunError, match=r"nuclei\.parquet has no column 'area': need some of id, geometry, class, "):
        pipeline.read_nuclei(place / "results" / "case7", ["area_um2", "area"])


def test_parameters_of_another_type_are_refused(tmp_path: Path) -> None:
    other: Any = {"views": 4}
    for call in (lambda: pipeline.run("x.svs", tmp_path, other), lambda: pipeline.plan("x.svs", other)):
        with pytest.raises(ConfigError, match=r"settings=\{'views': 4\}: need a pipeline\.Settings"):
            call()
    with pytest.raises(ConfigError, match=r"execution=\{'views': 4\}: need a pipeline\.Execution"):
        pipeline.run("x.svs", tmp_path, execution=other)


@pytest.mark.parametrize("path", [123, None, b"x", "", "x\0y", ["x"]])
def test_what_is_no_path_is_refused(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty text would be the current folder; 1 an open file."""
    monkeypatch.chdir(tmp_path)
    what = "is empty" if path == "" else f"={path!r}"
    for name, call in (
        ("out", lambda: pipeline.run("x.svs", path)),
        ("folder", lambda: pipeline.export(path)),
        ("folder", lambda: pipeline.measure(path, "drawn")),
        ("regions", lambda: pipeline.measure("out", path)),
        ("path", lambda: pipeline.read_nuclei(path)),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} {what}' if path == '' else name + what)}: need "):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [123, None, b"x"])
def test_what_is_no_path_of_a_slide_is_refused(path: Any) -> None:
    with pytest.raises(SlideError, match=re.escape(f"path={path!r}: need that of a slide, as text or as a path")):
        slides.open_slide(path)


@pytest.mark.parametrize(
    ("name", "given", "others", "said"),
    [
        ("export", ("out", 123), {}, "formats=123: need the name of a format, or several, as text"),
        ("export", ("out", [1]), {}, "formats=[1]: need the name of a format, or several, as text"),
        ("measure", ("out", "drawn"), {"crop": "no"}, "regions: crop='no': need bool"),
        ("read_nuclei", ("out", 123), {}, "columns=123: need the name of a column, or several, as text"),
        ("plan", ("x.svs",), {"seconds_per_mm2": "3"}, "seconds-per-mm2='3': need a number above 0"),
        ("plan", ("x.svs",), {"seconds_per_mm2": True}, "seconds-per-mm2=True: need a number above 0"),
        ("run", ("x.svs", "out"), {"say": "quiet"}, "say='quiet': need a function that takes a line"),
        ("run", ("x.svs", "out"), {"client": "tcp://a:1"}, "client='tcp://a:1': need a dask.distributed.Client; of an"),
    ],
)
def test_values_of_another_type_are_named(
    name: str,
    given: tuple[Any, ...],
    others: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)):
        getattr(pipeline, name)(*given, **others)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            pipeline.Settings(stain=Stain(method=cast(Any, "Macenko"))),
            "stain: method='Macenko': need one of none, reinhard",
        ),
        (pipeline.Settings(detector=Detector(views=cast(Any, 3))), "detector: views=3: need one of 1, 2, 4, 8"),
        (pipeline.Settings(export=Export(formats=cast(Any, "csv"))), "export: formats='csv': need a list"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_done(
    settings: pipeline.Settings, said: str, tmp_path: Path
) -> None:
    """As it is on the command line and in a TOML file."""
    for call in (lambda: pipeline.run("x.svs", tmp_path / "out", settings), lambda: pipeline.plan("x.svs", settings)):
        with pytest.raises(ConfigError, match=said):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), 1e9, "0.5", True])
def test_a_scale_that_no_slide_has_is_refused(mpp: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need 0\.05 to 5 micrometres per pixel"):
        pipeline.run("x.svs", tmp_path / "out", mpp=mpp)
    with pytest.raises(ConfigError, match=r"need 0\.05 to 5 micrometres per pixel"):
        pipeline.plan("x.svs", force_mpp=mpp)
    assert not (tmp_path / "out").exists()


def test_a_slide_is_opened(place: Path) -> None:
    with slides.open_slide(place / "slides" / "case7.tif") as slide:
        assert slide.size == Size(900, 700)
        assert np.isclose(slide.scale.x, 0.25, rtol=1e-3)


@pytest.mark.parametrize("package", ["pipeline", "slides"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print(*{{m.split('.')[0] for m in sys.modules}}); {package}.__all__; dir({package})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "dask", "pyarrow", "openslide", "zarr", "cyclopts"} & set(loaded)


@pytest.mark.parametrize("package", [pipeline, slides])
def test_every_public_name_is_there_and_documented(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__, name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    """Its worker processes import it, and so call `run` again: in a line each, and not by what Python says of that."""
    phantom.write(tmp_path / "a.tif", phantom.draw(Size(300, 300), 7))
    (tmp_path / "script.py").write_text("import pipeline\npipeline.run('a.tif', 'out')\n")
    ended = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("pipeline.errors.RunError: the worker processes do not start")
    assert 'needs `if __name__ == "__main__":`' in last
    assert "bootstrapping" not in ended.stderr
