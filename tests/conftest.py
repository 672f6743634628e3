"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no broken law.
settings.register_profile("nightslide", deadline=None)
settings.load_profile("nightslide")

# Files are tested side by side, and the networks of most tests are so small that threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's kernels are computed by its interpreter: there is no GPU. Read when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them and all their children ignore Ctrl-C, which is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party slides and data beside the repository; without it the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the third-party data in ../shared, which is not here")
    return folder
