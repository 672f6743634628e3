"""Stain normalisation in the stream: which template, which network, and what a run refuses to mix."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oracle import replace_detector
from pipeline.archive.run import run
from pipeline.cli import app, main
from pipeline.config import Detector, Execution, Settings, Stain, Stitching, Tiling, Tissue
from pipeline.errors import RunError, StainError, WeightsError
from pipeline.model import dcgmm, fuse, inference, load, stain
from pipeline.model.fitted_stain import TEMPLATE, Normalisation, read_template
from pipeline.model.instances import STATISTICS, HostInstances, Instances, Patches
from pipeline.model.weights import content_sha256, find_weights
from pipeline.segment.plan import Plan, plan_slide
from slides.errors import SlideNotFound
from slides.slide import open_slide


def picture(path: Path, seed: int, side: int = 300) -> Path:
    """Discs of haematoxylin in eosin, with a stripe of glass, in the light of a dim lamp."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    density = np.full((side, side, 3), (0.1, 0.5, 0.25)) * rng.uniform(0.6, 1.5)
    for row, column in rng.integers(0, side, (60, 2)):
        density[(y - row) ** 2 + (x - column) ** 2 < 80] = (0.9, 1.0, 0.5)
    density[: side // 8] = 0
    light = 230 * np.exp(-density) + rng.normal(0, 2, density.shape)
    Image.fromarray(light.clip(0, 255).astype(np.uint8)).save(path)
    return path


def chosen(**staining: Any) -> Settings:
    return Settings(
        tissue=Tissue(everywhere=True),
        tiling=Tiling(mpp=0.25, tile=256, margin=64, block=1),
        stain=Stain(patches=8, **staining),
        stitching=Stitching(max_diameter_um=10),
    )


def planned(path: Path, settings: Settings) -> Plan:
    with open_slide(path, mpp=0.25) as slide:
        return plan_slide(slide, settings)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("slide") / "slide.png", 0)


@pytest.mark.parametrize("method", ["reinhard", "macenko", "dcgmm"])
def test_a_slide_is_normalised_to_what_comes_with_the_method(slide: Path, method: Any) -> None:
    plan = planned(slide, chosen(method=method))
    assert plan.normalisation.source.method == method
    assert plan.normalisation.source.numbers["white"] == pytest.approx((230 / 255,) * 3, abs=0.015)
    shipped = read_template(find_weights("stain")) if method == "dcgmm" else TEMPLATE[method]
    assert plan.normalisation.target == shipped
    assert plan.notes == ()


@pytest.mark.parametrize("method", ["reinhard", "macenko", "dcgmm"])
def test_a_template_of_ones_own_is_fitted_as_a_slide_is(slide: Path, tmp_path: Path, method: Any) -> None:
    template = picture(tmp_path / "template.png", 1)
    plan = planned(slide, chosen(method=method, template=str(template)))
    source, target = plan.normalisation
    assert target == planned(template, chosen(method=method)).normalisation.source
    assert target != source


def test_what_lies_beyond_the_edge_is_no_glass(tmp_path: Path) -> None:
    """A picture smaller than the regions that are read is not taken for one with white glass."""
    plan = planned(picture(tmp_path / "small.png", 2, side=150), chosen(method="macenko"))
    assert plan.normalisation.source.numbers["white"] == pytest.approx((230 / 255,) * 3, abs=0.015)


def test_a_slide_without_a_stain_goes_on_as_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), (200, 200, 200)).save(tmp_path / "grey.png")
    plan = planned(tmp_path / "grey.png", chosen(method="dcgmm"))
    assert plan.normalisation == (TEMPLATE["none"], TEMPLATE["none"])
    assert "need" in plan.notes[0]


def test_files_of_other_content_than_the_run_recorded_are_refused(slide: Path, tmp_path: Path) -> None:
    """A template or a network that was replaced after the run started does not reach the slides that are left."""
    template, weights = picture(tmp_path / "template.png", 1), tmp_path / "mine.safetensors"
    shutil.copy(find_weights("stain"), weights)
    settings = chosen(method="dcgmm", template=str(template), weights=str(weights))
    recorded = {"weights": content_sha256(weights), "template": content_sha256(template)}
    checksums = {f"{name}_sha256": sha256 for name, sha256 in recorded.items()}
    pinned = dataclasses.replace(settings, stain=Stain(**{**dataclasses.asdict(settings.stain), **checksums}))
    with open_slide(slide, mpp=0.25) as opened:
        plain = plan_slide(opened, settings).normalisation
        assert plan_slide(opened, pinned).normalisation == plain
        picture(template, 2)
        with pytest.raises(WeightsError, match=f"{template} has other content.*{recorded['template']}"):
            plan_slide(opened, pinned)
        dcgmm.save(dcgmm.load(weights), weights, {"template": "another"})
        with pytest.raises(WeightsError, match=f"{weights} has other content.*{recorded['weights']}"):
            plan_slide(opened, dataclasses.replace(pinned, stain=dataclasses.replace(pinned.stain, template="")))


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_planning_needs_no_gpu(slide: Path, tmp_path: Path, device: str) -> None:
    """Stains are fitted on the CPU: a worker without a GPU plans for a detector that has one."""
    settings = chosen(method="dcgmm", template=str(picture(tmp_path / "template.png", 1)))
    elsewhere = dataclasses.replace(settings, detector=Detector(device=device))
    assert planned(slide, elsewhere).normalisation == planned(slide, settings).normalisation


def test_the_detector_is_given_normalised_patches(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(chosen(method="dcgmm"), detector=Detector(score=0.6))
    plan, seen = planned(slide, settings), []

    def look(_model: Any, images: torch.Tensor, *_: Any) -> list[Instances[torch.Tensor]]:
        seen.append(images)
        raise StopAsyncIteration

    monkeypatch.setattr(fuse, "infer", look)
    on_cpu: Any = load.LoadedDetector(None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    monkeypatch.setattr(load, "detector", lambda _: on_cpu)
    pixels = np.array(Image.open(slide))[None, :256, :256]
    with pytest.raises(StopAsyncIteration):
        list(inference.detect_patches(list(pixels), plan.normalisation, settings))
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = stain.Normaliser(plan.normalisation, dcgmm.load(find_weights("stain")))(raw)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=0)
    assert float((seen[0] - raw).abs().mean()) > 0.02


# ----------------------------------------------------------------------------------------------------- runs


def nothing_found(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[HostInstances]:
    """Stands for the detector."""
    for _ in patches:
        yield HostInstances(
            np.zeros((0, 4), np.float32),
            np.zeros((0, 8, 8), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros((0, 2, len(STATISTICS)), np.float32),
            False,
        )


def test_another_network_or_template_does_not_continue_a_run(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contents of the files count, not their names; a method that does not read them is not affected."""
    replace_detector(monkeypatch, nothing_found)
    mine, template = tmp_path / "mine.safetensors", picture(tmp_path / "template.png", 1)
    shutil.copy(find_weights("stain"), mine)

    def segment(out: str, **staining: Any) -> str:
        settings, running = chosen(**staining), Execution(cluster=False, workers=1)
        (row,) = run([slide], tmp_path / out, settings, running, mpp=0.25, say=lambda line: None)
        return row.status

    assert segment("a", method="dcgmm", template=str(template)) == "done"
    assert segment("a", method="dcgmm", template=str(template), weights=str(mine)) == "done before"
    written = json.loads((tmp_path / "a" / "run.json").read_text())
    assert all(len(written["settings"]["stain"][f"{name}_sha256"]) == 64 for name in ("weights", "template"))
    assert "stain_target" in json.loads((tmp_path / "a" / "slide" / "slide.json").read_text())

    dcgmm.save(dcgmm.load(mine), mine, {"template": "another"})
    with pytest.raises(RunError, match=r"stain\.weights has other content"):
        segment("a", method="dcgmm", template=str(template), weights=str(mine))
    picture(template, 2)
    with pytest.raises(RunError, match=r"stain\.template has other content"):
        segment("a", method="dcgmm", template=str(template))
    assert segment("b", method="none") == "done"
    assert segment("b", method="none", weights=str(mine)) == "done before"


def test_what_cannot_be_normalised_to_is_refused_before_anything_is_started(slide: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 300), "white").save(tmp_path / "white.png")
    for error, staining in (
        (SlideNotFound, {"template": str(tmp_path / "nowhere.png")}),
        (StainError, {"template": str(tmp_path / "white.png")}),
        (WeightsError, {"weights": "nowhere"}),
        (WeightsError, {"weights": "nuclei"}),
    ):
        with pytest.raises(error, match=r"no such file|need"):
            run(
                [slide],
                tmp_path / "out",
                chosen(method="dcgmm", **staining),
                Execution(cluster=False, workers=1),
                mpp=0.25,
            )
        assert not (tmp_path / "out").exists()


def test_a_template_without_a_stain_is_wrong_usage(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on the terminal and exit status 2, and no output folder."""
    Image.new("RGB", (300, 300), (200, 200, 200)).save(tmp_path / "grey.png")
    out, template = str(tmp_path / "out"), str(tmp_path / "grey.png")
    with pytest.raises(SystemExit) as raised:
        main(["run", str(slide), "--out", out, "--mpp", "0.25", "--stain", "macenko", "--stain.template", template])
    assert raised.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"nightslide: {template}: 0 of 262144 cells")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_digest_names_the_files_by_content() -> None:
    settings = Settings(stain=Stain("dcgmm", template="/y"))
    elsewhere = dataclasses.replace(settings, stain=Stain("dcgmm", weights="/elsewhere", template="/x"))
    assert settings.digest == elsewhere.digest
    contents = [{"weights_sha256": "x"}, {"weights_sha256": "y"}, {"template_sha256": "x"}]
    digests = {dataclasses.replace(settings, stain=Stain("dcgmm", template="/y", **c)).digest for c in contents}  # type: ignore[arg-type]
    assert len(digests) == 3


def test_the_short_flag_goes_with_the_long_ones() -> None:
    tokens = ["run", "x.svs", "--out", "o", "--stain", "dcgmm", "--stain.template", "t.png", "--stain.patches", "3"]
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert bound.arguments["settings"].stain == Stain("dcgmm", patches=3, template="t.png")
