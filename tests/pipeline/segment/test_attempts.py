"""When a slide was worked on: what was interrupted ended with the last block that it finished."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import files
from pipeline.layout import SlideFolder
from pipeline.segment.attempts import begin


def finish(folder: SlideFolder, block: int, when: float) -> None:
    folder.instances(block).parent.mkdir(exist_ok=True)
    folder.instances(block).touch()
    os.utime(folder.instances(block), (when, when))


def test_an_attempt_ended_with_its_last_block_and_without_one_was_none(tmp_path: Path) -> None:
    """However often a beginning is noted; blocks of an earlier attempt are not those of a later one."""
    folder = SlideFolder(tmp_path)
    folder.work.mkdir()
    assert begin(folder, 10.0) == []
    assert begin(folder, 20.0) == []
    finish(folder, 0, 24.0)
    finish(folder, 1, 22.0)
    for _ in range(2):
        assert np.allclose(begin(folder, 30.0), [(20.0, 24.0)], atol=1)
    assert np.allclose(begin(folder, 40.0), [(20.0, 24.0)], atol=1)
    finish(folder, 2, 44.0)
    assert np.allclose(begin(folder, 40.0), [(20.0, 24.0)], atol=1), "the one that goes on is not one before"
    assert np.allclose(begin(folder, 50.0), [(20.0, 24.0), (40.0, 44.0)], atol=1)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_blocks_may_be_stamped_by_another_clock(ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a file server; an attempt is as long as it was."""
    folder = SlideFolder(tmp_path)
    folder.work.mkdir()
    monkeypatch.setattr(files, "now_ns", lambda _: round((time.time() + ahead) * 1e9))
    now = time.time()
    begin(folder, now - 60)
    finish(folder, 0, now - 50 + ahead)
    ((since, until),) = begin(folder, now)
    assert since == now - 60
    assert until == pytest.approx(now - 50, abs=1)
