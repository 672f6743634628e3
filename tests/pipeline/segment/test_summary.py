"""Statistics of a slide's nuclei; the seam check finds nothing in any grid, unless there is a fault."""

import json

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_tables import append
from pipeline.model.fitted_stain import TEMPLATE, Normalisation
from pipeline.segment import tables
from pipeline.segment.plan import Plan
from pipeline.segment.summary import AREA_EDGES_UM2, SEAM_EDGES_PX, seam_counts, seam_verdict, summarise
from slides.artefacts import ArtefactMap
from slides.geometry import Affine, Box, Frame, Size
from slides.grid import TileGrid
from slides.scale import Scale
from slides.tissue import TissueMap

SIZE = Size(3000, 2500)
WORK = Frame(SIZE, 0.25, Affine(0.5, 0.5, 10.0, 20.0))


def tissue_map(mask: np.ndarray, mpp: float) -> TissueMap:
    height, width = mask.shape
    return TissueMap(mask, Frame(Size(width, height), mpp, Affine(mpp / 0.5, mpp / 0.5, 10.0, 20.0)), WORK)


WHOLE = tissue_map(np.ones((79, 94), bool), 8.0)


@st.composite
def grids(draw: st.DrawFn, most: int = 300) -> TileGrid:
    size = Size(draw(st.integers(1, most)), draw(st.integers(1, most)))
    margin = draw(st.integers(0, 20))
    return TileGrid(size, 2 * margin + draw(st.integers(1, 350)), margin, 2)


def nearest_seam(centroids: np.ndarray, grid: TileGrid) -> np.ndarray:
    """By brute force: the distance to every seam of the grid."""
    x, y = centroids.T
    lines = [abs(x - col * grid.stride) for col in range(1, grid.cols)]
    lines += [abs(y - row * grid.stride) for row in range(1, grid.rows)]
    return np.asarray(np.min([np.full(len(x), np.inf), *lines], axis=0))


def evenly(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 2)) * SIZE


# ------------------------------------------------------------------------------------------ the seam check


@given(grids(), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_nucleus_on_every_pixel_of_tissue_is_what_is_expected(grid, ratio, share, seed):
    """Law: areas are exact, for any grid and any tissue: observed and expected are equal."""
    shape = (-(-grid.size.height // ratio), -(-grid.size.width // ratio))
    tissue = tissue_map(np.random.default_rng(seed).random(shape) < share, ratio / 4)
    x, y = np.meshgrid(np.arange(grid.size.width) + 0.5, np.arange(grid.size.height) + 0.5)
    centroids = np.stack([x.ravel(), y.ravel()], 1)
    observed, expected = seam_counts(np.array_split(centroids, 3), grid, tissue)
    distance = nearest_seam(centroids[tissue.contains(centroids)], grid)
    assert observed.tolist() == np.histogram(distance, (*SEAM_EDGES_PX, np.inf))[0].tolist()
    assert expected == pytest.approx(observed, abs=1e-6 * grid.size.width * grid.size.height)


@given(st.integers(300, 1200), st.integers(0, 64), st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_evenly_spread_nuclei_pass_the_seam_check(stride, margin, seed):
    """Law: the ratio is 1 within its error; 5.5 standard errors come by chance once in 26 million."""
    observed, expected = seam_counts([evenly(40_000, seed)], TileGrid(SIZE, stride + 2 * margin, margin, 4), WHOLE)
    verdict = seam_verdict(observed, expected)
    assert verdict.ratio is not None
    assert verdict.standard_error is not None
    assert abs(verdict.ratio - 1) < 5.5 * verdict.standard_error
    assert expected.sum() == pytest.approx(observed.sum()) == 40_000


@given(st.integers(300, 1200), st.integers(0, 2**32 - 1), st.sampled_from(["twice", "never"]))
@settings(max_examples=10)
def test_duplicates_and_losses_beside_a_seam_are_suspicious(stride, seed, fault):
    grid, centroids = TileGrid(SIZE, stride + 128, 64, 4), evenly(40_000, seed)
    near = nearest_seam(centroids, grid) < 4
    faulty = np.concatenate([centroids, centroids[near]]) if fault == "twice" else centroids[~near]
    verdict = seam_verdict(*seam_counts([faulty], grid, WHOLE))
    assert verdict.suspicious
    assert verdict.ratio == pytest.approx(1.5 if fault == "twice" else 0.5, abs=0.15)


def test_tissue_of_uneven_density_passes_the_seam_check():
    """Ten times as many nuclei in one column of tiles, none in another: the seams between are right."""
    grid, centroids = TileGrid(SIZE, 628, 64, 4), evenly(200_000, 0)
    column = centroids[:, 0] // grid.stride
    kept = np.random.default_rng(1).random(len(centroids)) < np.where(column == 2, 1.0, np.where(column == 4, 0, 0.1))
    verdict = seam_verdict(*seam_counts([centroids[kept]], grid, WHOLE))
    assert not verdict.suspicious
    assert verdict.ratio is not None
    assert verdict.standard_error is not None
    assert abs(verdict.ratio - 1) < 4 * verdict.standard_error


def test_what_has_no_seam_or_no_nucleus_has_no_ratio():
    one_tile = TileGrid(Size(500, 500), 1024, 64, 4)
    observed, expected = seam_counts([np.full((7, 2), 250.0)], one_tile, WHOLE)
    assert observed.tolist() == [0] * (len(SEAM_EDGES_PX) - 1) + [7]
    assert expected.tolist() == pytest.approx(observed.tolist())
    assert seam_verdict(observed, expected) == (None, None, False)
    assert seam_verdict(*seam_counts([], TileGrid(SIZE, 628, 64, 4), WHOLE)) == (None, None, False)


@pytest.mark.parametrize(
    ("observed", "expected", "suspicious"),
    [
        (104_500, 100_000, False),  # many standard errors, and less than 5 %
        (106_000, 100_000, True),
        (94_000, 100_000, True),
        (120, 100, False),  # 20 %, two standard errors
        (141, 100, True),
        (24, 8, False),  # too few to tell
    ],
)
def test_a_ratio_is_suspicious_when_it_is_far_off_and_surely(observed, expected, suspicious):
    rest = [0] * (len(SEAM_EDGES_PX) - 2)
    verdict = seam_verdict([observed - 1, 1, *rest], [expected, 0, *rest])
    assert verdict[:2] == pytest.approx((observed / expected, expected**-0.5), abs=1e-4)
    assert verdict.suspicious == suspicious


# ----------------------------------------------------------------------------------------------- a slide


def plan() -> Plan:
    """A slide at 0.5 um per px, shifted; two tiles; its left half is tissue: 250 x 250 um."""
    mask = np.zeros((32, 64), bool)
    mask[:, :32] = True
    none = TEMPLATE["none"]
    return Plan(
        "hash",
        "generic",
        Scale(0.5, 0.5, "given"),
        Size(1000, 512),
        Box(0, 0, 1000, 512),
        WORK._replace(size=Size(1000, 1000)),
        TileGrid(Size(1000, 1000), 628, 64, 4),
        4,
        tissue_map(mask, 7.8125),
        tissue_map(mask, 7.8125),
        ArtefactMap(np.zeros(mask.shape, np.uint8), tissue_map(mask, 7.8125)),
        240.0,
        Normalisation(none, none),
        False,
        (),
    )


def write(path, sides_um, class_name, at):
    """Squares with these sides, centred at `at` (slide px)."""
    half = np.asarray(sides_um) / 0.5 / 2
    x, y = np.asarray(at, float).reshape(-1, 2).T
    shapes = np.asarray(shapely.box(x - half, y - half, x + half, y + half), dtype=object).reshape(-1)
    provenance = tables.Provenance(
        "s", (0.5, 0.5), Size(1000, 512), Box(0, 0, 1000, 512), "d", {"Nucleus": (1, 2, 3), "Other": (4, 5, 6)}
    )
    with tables.NucleiWriter(path, provenance) as writer:
        append(
            writer,
            shapes,
            class_name=class_name,
            score=np.linspace(0.5, 1.0, len(shapes)),
            votes=np.ones(len(shapes), int),
            stains=np.zeros((len(shapes), len(tables.STAINS))),
        )


def test_the_statistics_of_five_nuclei(tmp_path):
    # the seam of columns is at 500 work px, at slide x = 260; that of rows at slide y = 270
    at = [(259, 100), (255, 100), (100, 266.5), (100, 100), (60, 60)]
    write(tmp_path / "n.parquet", [2, 4, 6, 8, 20], ["Nucleus"] * 3 + ["Other"] * 2, at)
    found = summarise(tmp_path / "n.parquet", plan())
    assert json.loads(json.dumps(found))["nuclei"] == 5
    assert found["per_mm2"] == pytest.approx(5 / 0.0625, rel=1e-3)
    assert found["classes"] == {"Nucleus": 3, "Other": 2}
    assert found["area_um2"]["quantiles"][2] == pytest.approx(36)
    counts = dict(zip(AREA_EDGES_UM2, found["area_um2"]["counts"], strict=True))
    assert {edge: n for edge, n in counts.items() if n} == {0: 1, 15: 1, 35: 1, 60: 1, 250: 1}
    assert found["score"]["counts"][10] == 1
    assert found["score"]["counts"][-1] == 1
    observed = found["seams"]["observed"]
    assert (observed[0], observed[1], observed[2], observed[-1]) == (1, 1, 1, 2)  # at 2, 7 and 10 px of a seam, and far
    assert sum(found["seams"]["expected"]) == pytest.approx(5, abs=0.01)


def test_the_statistics_of_no_nuclei(tmp_path):
    write(tmp_path / "n.parquet", [], [], [])
    glass = plan()._replace(tissue=tissue_map(np.zeros((32, 64), bool), 7.8125))
    found = json.loads(json.dumps(summarise(tmp_path / "n.parquet", glass)))
    assert (found["nuclei"], found["per_mm2"], found["classes"], found["area_um2"]["quantiles"]) == (0, None, {}, [])
    assert found["seams"]["ratio"] is None
    assert not sum(found["area_um2"]["counts"])
