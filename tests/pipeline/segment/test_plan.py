"""The plan of a slide."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
from oracle import HEIGHT, WIDTH, chosen, paint
from pipeline.config import Artefacts, Detector, Settings, Stitching, Tissue
from pipeline.layout import SlideFolder
from pipeline.model.fitted_stain import TEMPLATE, UNCHANGED, Normalisation
from pipeline.model.instances import HostInstances
from pipeline.segment import plan as plan_module
from pipeline.segment.job import Part
from pipeline.segment.plan import Plan, load_plan, plan_slide, write_plan
from pipeline.segment.record import Counts, StageRecord
from pipeline.segment.regions import RegionFile
from pipeline.segment.stages import outline
from pipeline.segment.tables import bounds, geometry
from pipeline.segment.tissue_map import Detected, find_tissue_and_artefacts
from slides import slide as slide_module
from slides.artefacts import PEN
from slides.errors import GridError
from slides.geometry import Box, Size
from slides.scale import FORCED
from slides.slide import Slide, open_slide
from slides.tissue import TissueMap


def test_the_thumbnail_of_a_slide_larger_than_any_glass_is_coarser_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a slide is processed in bounded memory: it is not refused."""
    paint(tmp_path / "discs.png", 0)
    settings = dataclasses.replace(chosen(), tissue=Tissue(everywhere=True, thumbnail_mpp=1.0))
    with open_slide(tmp_path / "discs.png", mpp=0.25) as slide:
        usual = plan_slide(slide, settings)
        assert (usual.tissue.frame.mpp, usual.notes) == (1.0, ())
        monkeypatch.setattr(slide_module, "_LARGEST_THUMBNAIL_PX", HEIGHT * WIDTH // 16 // 5)
        plan = plan_slide(slide, settings)
    assert plan.tissue.frame.mpp == 4.0
    assert plan.notes == (
        "the slide is larger than any glass, so its scale may be wrong: tissue was detected at 4 µm/px, not 1",
    )
    assert plan.tiles == usual.tiles


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    path = tmp_path_factory.mktemp("slides") / "discs.png"
    paint(path, 0)
    return open_slide(path, mpp=0.25)


def test_views_that_are_shifted_need_a_wider_margin(discs: Slide) -> None:
    """Half of a nucleus of 18 px and the tolerance of 2 px fit into 11 px; a shift of 5 px does not."""
    settings = chosen(margin=11)
    assert plan_slide(discs, settings).grid.margin == 11
    with pytest.raises(GridError, match=r"margin=11 cuts objects of 18 px"):
        plan_slide(discs, dataclasses.replace(settings, detector=Detector(views=2)))


@pytest.mark.parametrize(("block", "expected"), [(3, 3), (100, 5)])
def test_a_block_has_no_more_tiles_than_the_slide(discs: Slide, block: int, expected: int) -> None:
    """All of a block is written and read, what lies beside the slide, too: here are 4 x 5 tiles."""
    grid = plan_slide(discs, chosen(block=block)).grid
    assert (grid.rows, grid.cols, grid.block) == (4, 5, expected)
    assert plan_module._grid(Size(HEIGHT, WIDTH), chosen(block=block)).block == expected, "of 5 x 4 tiles, too"


def test_every_field_of_a_plan_reads_back_as_it_was_written(discs: Slide, tmp_path: Path) -> None:
    """A field that were forgotten in the file would have its default afterwards, so here none has it."""
    plan = plan_slide(discs, chosen())
    plan = plan._replace(
        tissue=plan.tissue._replace(mask=np.eye(*plan.tissue.mask.shape) > 0),
        artefacts=plan.artefacts._replace(kinds=plan.artefacts.kinds + np.uint8(2)),
        normalisation=Normalisation(TEMPLATE["macenko"], TEMPLATE["reinhard"]),
        notes=("one", "two"),
        trials=(Box(0, 0, 64, 64), Box(64, 0, 128, 64)),
        trial_scores=(0.5, 0.75),
        trial_work=StageRecord({"stain": 1.5}, Counts(nuclei=3), ("cpu float32",)),
        file=(1000, 2**60),
        overwrite="a round",
        parts=(Part("x/Data0000.dat", 7, 2**60, "a tag"),),
    )
    assert all(getattr(plan, name) != default for name, default in Plan._field_defaults.items())
    folder = SlideFolder(tmp_path)
    folder.work.mkdir()
    write_plan(plan, folder, "digest")
    assert load_plan(folder, "other") is None
    back = load_plan(folder, "digest")
    assert back is not None
    maps = ("tissue", "whole_tissue", "artefacts")
    for name in Plan._fields:
        written, read = getattr(plan, name), getattr(back, name)
        if name not in maps:
            assert (read, type(read)) == (written, type(written)), name
    for was, is_ in ((plan.tissue, back.tissue), (plan.whole_tissue, back.whole_tissue)):
        assert np.array_equal(was.mask, is_.mask)
        assert (was.frame, was.work) == (is_.frame, is_.work)
    assert np.array_equal(plan.artefacts.kinds, back.artefacts.kinds)
    assert np.array_equal(plan.artefacts.tissue.mask, back.artefacts.tissue.mask)


def test_regions_do_not_change_what_the_detector_sees_of_a_tile(discs: Slide, tmp_path: Path) -> None:
    """So a nucleus in them has the outline that it has in a run of the whole slide."""
    outline = {"type": "Polygon", "coordinates": [[[100, 100], [140, 100], [140, 140], [100, 140], [100, 100]]]}
    (tmp_path / "x.geojson").write_text(json.dumps({"type": "Feature", "geometry": outline, "properties": {}}))
    whole = plan_slide(discs, chosen())._replace(step=2)
    restricted = plan_slide(discs, chosen(), RegionFile.of(tmp_path / "x.geojson", crop=True))._replace(step=2)
    assert 0 < len(restricted.tiles) < len(whole.tiles)
    assert restricted.tissue.area_mm2 < whole.tissue.area_mm2
    assert [restricted.trimmed(tile) for tile in restricted.tiles] == list(map(whole.trimmed, restricted.tiles))


@pytest.mark.parametrize("columns", [slice(0, 2), slice(None)])
def test_a_stain_is_fitted_without_artefacts_unless_they_cover_all(
    discs: Slide, monkeypatch: pytest.MonkeyPatch, columns: slice
) -> None:
    fitted = []

    def with_pen(*arguments: Any) -> Detected:
        found = find_tissue_and_artefacts(*arguments)
        found.artefacts.kinds[:, columns] = PEN
        return found

    def fit(slide: Slide, tissue: TissueMap, settings: Settings) -> tuple[Normalisation, tuple[str, ...]]:
        fitted.append(tissue.mask)
        return UNCHANGED, ()

    monkeypatch.setattr(plan_module, "find_tissue_and_artefacts", with_pen)
    monkeypatch.setattr(plan_module, "_normalisation", fit)
    plan = plan_slide(discs, chosen())
    clean = plan.artefacts.clean_tissue().mask
    assert clean.any() == (columns.stop is not None)
    assert np.array_equal(fitted[0], clean if clean.any() else plan.artefacts.tissue.mask)


def test_what_a_person_should_know_of_the_scale_and_the_levels_is_said(tmp_path: Path) -> None:
    """Law: nothing is silent."""
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        for number, shape in enumerate(((330, 410, 3), (150, 60, 3), (20, 40, 3))):
            pixels = np.full(shape, 200, np.uint8)
            tiff.write(pixels, tile=(64, 64), photometric="rgb", subfiletype=int(number > 0), metadata=None)
    with open_slide(tmp_path / "x.tif", mpp=0.25, mpp_source=FORCED) as slide:
        assert sorted(plan_slide(slide, chosen()).notes) == [
            "a level of 60 x 150 and one of 40 x 20 px is of another shape: not read from",
            "its scale is 0.25 µm/px by --force-mpp, whatever it states",
        ]


@pytest.mark.parametrize(
    ("tissue", "pen", "artefacts", "regions", "said"),
    [
        ("all", False, "flag", False, ""),
        ("none", False, "flag", False, "no tissue was found: --tissue.everywhere takes the whole slide"),
        ("all", True, "flag", False, ""),
        ("all", True, "skip", False, "artefacts cover all tissue: --artefacts flag reports the nuclei there, too"),
        ("none", True, "skip", False, "no tissue was found: --tissue.everywhere takes the whole slide"),
        ("right", False, "flag", True, "no tissue lies in the regions"),
        ("none", False, "flag", True, "no tissue was found: --tissue.everywhere takes the whole slide"),
        ("all", True, "skip", True, "artefacts cover all tissue: --artefacts flag reports the nuclei there, too"),
    ],
)
def test_why_there_is_no_tissue_is_said(
    discs: Slide,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tissue: str,
    pen: bool,
    artefacts: Artefacts,
    regions: bool,
    said: str,
) -> None:
    """The region, where there is one, lies at the left."""

    def detected(*arguments: Any) -> Detected:
        found = find_tissue_and_artefacts(*arguments)
        found.artefacts.kinds[:] = PEN * pen
        mask = np.full_like(found.artefacts.tissue.mask, tissue == "all")
        mask[:, -1] |= tissue == "right"
        return found._replace(
            artefacts=found.artefacts._replace(tissue=found.artefacts.tissue._replace(mask=mask)), notes=()
        )

    monkeypatch.setattr(plan_module, "find_tissue_and_artefacts", detected)
    outline = {"type": "Polygon", "coordinates": [[[100, 100], [140, 100], [140, 140], [100, 140], [100, 100]]]}
    (tmp_path / "x.geojson").write_text(json.dumps({"type": "Feature", "geometry": outline, "properties": {}}))
    drawn = RegionFile.of(tmp_path / "x.geojson", crop=True) if regions else None
    settings = dataclasses.replace(chosen(), tissue=Tissue(everywhere=True, artefacts=artefacts))
    plan = plan_slide(discs, settings, drawn)
    notes = [note for note in plan.notes if not note.startswith("restricted to 1 region of x.geojson")]
    assert len(plan.notes) - len(notes) == regions
    assert bool(plan.tiles) == (not said)
    assert [note.startswith(said) for note in notes] == [True] * bool(said)


def test_tiles_whose_tissue_lies_under_artefacts_are_counted(discs: Slide) -> None:
    """Not those without tissue, as are all at the left here; blocks without tiles are not gone through."""
    plan = plan_slide(discs, chosen(block=1))
    mask = np.ones_like(plan.tissue.mask)
    mask[:, :5] = False  # 160 of 410 work px
    tissue = plan.tissue._replace(mask=mask)
    plan = plan._replace(tissue=tissue, artefacts=plan.artefacts._replace(tissue=tissue))
    assert 0 < len(plan.tiles) < plan.grid.rows * plan.grid.cols
    assert plan.skipped_tiles == 0
    kinds = np.full_like(plan.artefacts.kinds, PEN)
    kinds[:, -1] = 0
    artefacts = plan.artefacts._replace(kinds=kinds)
    skipping = plan._replace(artefacts=artefacts, tissue=artefacts.clean_tissue())
    assert 0 < len(skipping.tiles) < len(plan.tiles)
    assert skipping.skipped_tiles == len(plan.tiles) - len(skipping.tiles)
    assert len(skipping.blocks) == len(skipping.tiles), "a block has one tile here"


def test_a_tile_claims_every_nucleus_of_the_tissue_in_its_core_once(discs: Slide) -> None:
    """Of outlines that cover each other the best; none whose centre lies off the tissue or beyond the core."""
    plan = plan_slide(discs, chosen())
    mask = plan.tissue.mask.copy()
    mask[2, 2] = False  # from 64 to 96 work px
    plan = plan._replace(tissue=plan.tissue._replace(mask=mask))
    tile = plan.grid.tile_at(0, 0)
    assert tile.core == Box(0, 0, 88, 88)
    boxes = np.array([[12, 10, 32, 30], [10, 10, 30, 30], [40, 40, 60, 60], [70, 70, 80, 80], [82, 20, 102, 40]], float)
    found = instances_of(boxes - plan.trimmed(tile).corner * 2, np.ones((5, 20, 20), bool), [0.8, 0.9, 0.5, 0.9, 0.9])
    rows, touching = outline(found, tile, plan, chosen())
    assert bounds(rows).tolist() == boxes[[1, 2]].tolist()
    assert rows["score"].to_pylist() == found.scores[[1, 2]].tolist()
    assert touching == 0


def instances_of(boxes: np.ndarray, masks: np.ndarray, scores: list[float]) -> HostInstances:
    count = len(boxes)
    return HostInstances(
        boxes.astype(np.float32),
        masks,
        np.array(scores, np.float32),
        np.zeros(count, np.int64),
        np.ones(count, np.float32),
        np.ones(count, np.int64),
        np.zeros((count, 2, 5), np.float32),
        False,
    )


def test_outlines_are_as_simple_as_the_settings_say(discs: Slide) -> None:
    plan = plan_slide(discs, chosen())
    tile = plan.grid.tile_at(0, 0)
    y, x = np.mgrid[:20, :20] - 9.5
    found = instances_of(np.array([[30, 30, 60, 60]]), (x**2 + y**2 < 81)[None], [0.9])
    vertices = []
    for simplify_px in (0.0, 2.0):
        settings = dataclasses.replace(chosen(), stitching=Stitching(simplify_px=simplify_px))
        (shape,) = geometry(outline(found, tile, plan, settings)[0])
        vertices.append(shapely.get_num_coordinates(shape))
    assert vertices[1] < vertices[0]


def outlined(slide: Slide, plan: Plan) -> pa.Table:
    """What the tiles of a plan claim, in their cores alone, of what the oracle detects in their trimmed patches."""
    exact = dataclasses.replace(chosen(), stitching=dataclasses.replace(chosen().stitching, tolerance_px=0.0))
    patches = [slide.read(plan.trimmed(tile), plan.frame) for tile in plan.tiles]
    detected = oracle.detect(patches, plan.normalisation, exact)
    rows = [outline(f, tile, plan, exact) for f, tile in zip(detected, plan.tiles, strict=True)]
    assert not any(touching for _, touching in rows)
    return pa.concat_tables([table for table, _ in rows])


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 8, 64]))
@example(seed=485418, step=2)
@settings(max_examples=20, deadline=None)
def test_what_a_tile_claims_does_not_depend_on_how_its_patch_is_trimmed(discs: Slide, seed: int, step: int) -> None:
    """Law: wherever the tissue lies, and by whatever step, the same polygons as from patches that hold all cores.

    In its core: what lies beyond it, on tissue that the core has none of, is the neighbour's alone.
    """
    plan = plan_slide(discs, chosen())
    some = np.random.default_rng(seed).random(plan.tissue.mask.shape) < 0.02
    tissue = TissueMap(some, plan.tissue.frame, plan.tissue.work)
    plan = plan._replace(step=step, tissue=tissue, whole_tissue=tissue)
    untrimmed = plan._replace(whole_tissue=tissue._replace(mask=np.ones_like(some)))
    if plan.tiles:
        assert outlined(discs, plan).equals(outlined(discs, untrimmed))
