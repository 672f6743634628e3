"""Several processes on one slide, suspended, their leases stolen, clocks wrong: the bytes of an undisturbed run.

The trials are those of workflows/benchmarks/shared_slide.py.
"""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import oracle

SCRIPT = Path(oracle.__file__).parents[1] / "workflows" / "benchmarks" / "shared_slide.py"


def test_ten_trials_give_the_bytes_of_an_undisturbed_run() -> None:
    """In a process of its own: it forks, which this one, with its threads, must not."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--trials", "10", "--seed", "1"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "10 of 10 trials gave the bytes of an undisturbed run"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_a_trial_that_differs_is_seen(script: dict[str, Any], tmp_path: Path) -> None:
    results = {"nuclei.parquet": b"whole", "overlay.jpg": b"picture"}
    folder = tmp_path / "discs"
    folder.mkdir()
    for name, content in results.items():
        (folder / name).write_bytes(content)
    assert script["differences"](tmp_path, "discs", [0, 0], results) == []
    assert script["differences"](tmp_path, "discs", [0, 1], results) == ["exit statuses [0, 1]"]
    assert "did not end" in script["differences"](tmp_path, "discs", [0, None], results)[0]
    (folder / "nuclei.parquet").write_bytes(b"half")
    (folder / "overlay.jpg").unlink()
    (folder / "failure.json").touch()
    (folder / "work").mkdir()
    assert script["differences"](tmp_path, "discs", [0], results) == [
        *("nuclei.parquet differs", "overlay.jpg differs", "failure.json is left", "work is left")
    ]
    shutil.rmtree(folder)
    assert len(script["differences"](tmp_path, "discs", [0], results)) == 2


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_a_heartbeat_is_moved(script: dict[str, Any], tmp_path: Path, seconds: float) -> None:
    file = tmp_path / "token"
    file.touch()
    before = file.stat().st_mtime
    script["move_heartbeat"](tmp_path, seconds)
    assert file.stat().st_mtime == pytest.approx(before + seconds, abs=1)
    script["move_heartbeat"](tmp_path / "nothing", seconds)
