"""Fixtures for the tests of the viewer."""

import pytest

from finished_run import Finished, finish


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that is only read."""
    return finish(tmp_path_factory.mktemp("finished"))
