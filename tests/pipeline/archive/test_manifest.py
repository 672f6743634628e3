"""What a run refuses, or warns of, before anything is started."""

from pathlib import Path

import pytest

from pipeline.archive.manifest import check_seams
from pipeline.archive.run import run
from pipeline.config import Execution, Settings, Tiling
from pipeline.errors import RunError


@pytest.mark.parametrize(
    ("tile", "margin", "message"),
    [
        (1056, 128, r"tiling\.tile=1056 enlarged by 1\.5 .* no multiple of 32 px: need a multiple of 64, such as 1024"),
        (1024, 100, r"tiling\.margin=100 enlarged by 1\.5 .* no multiple of 32 px: need a multiple of 64, such as 128"),
    ],
)
def test_tiles_that_lie_otherwise_on_the_feature_maps_are_refused(
    tmp_path: Path, tile: int, margin: int, message: str
) -> None:
    (tmp_path / "a.svs").touch()
    with pytest.raises(RunError, match=message):
        run(
            [tmp_path / "a.svs"],
            tmp_path / "out",
            Settings(tiling=Tiling(tile=tile, margin=margin)),
            Execution(cluster=False),
        )
    assert not (tmp_path / "out").exists()


def test_a_margin_too_small_for_the_detector_is_said() -> None:
    (warning,) = check_seams(Settings(tiling=Tiling(tile=1024, margin=64)))
    assert "tiling.margin=64: with less than 128 px" in warning
    assert check_seams(Settings(tiling=Tiling(tile=1024, margin=128))) == ()


def test_the_default_tiling_needs_no_warning() -> None:
    assert check_seams(Settings()) == ()
