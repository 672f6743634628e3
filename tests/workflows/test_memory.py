"""The benchmark of the detector's memory measures the steps that the detector has today."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "workflows" / "benchmarks" / "memory.py"


def test_every_step_of_a_patch_is_measured(tmp_path: Path) -> None:
    slide = tmp_path / "slide.tif"
    pixels = np.random.default_rng(0).normal((200, 140, 180), 20, (512, 512, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(slide, resolution=1e4 / 0.25, resolution_unit=3)  # per centimetre
    ended = subprocess.run(
        [sys.executable, SCRIPT, slide, "--patches", "1", "--tile", "640"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for step in ("backbone", "feature table", "proposals: head", "peak: PSS"):
        assert f"\n{step} " in f"\n{ended.stdout}", ended.stdout
