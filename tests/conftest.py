"""Fixtures for all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no broken law.
settings.register_profile("nightslide", deadline=None)
settings.load_profile("nightslide")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party slides and data beside the repository; without it the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the third-party data in ../shared, which is not here")
    return folder
