"""A run that is told to stop hands over at once: it does not wait for the end of a block."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import oracle
from oracle import chosen, files, paint
from pipeline.archive.event_loop import run_coroutine
from pipeline.archive.run import run
from pipeline.config import Execution

ROOT = Path(oracle.__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
ALL_IN_ONE = 8  # the slide's 20 tiles are one block
FLAGS = [
    *("--mpp", "0.25", "--tissue.everywhere", "--tiling.tile", "128", "--tiling.margin", "20"),
    *("--tiling.block", str(ALL_IN_ONE), "--stitching.max-diameter-um", "4.5", "--stitching.simplify-px", "0"),
    *("--stain", "none"),
]


def nightslide(slide: Path, out: Path, *flags: str, seconds: float) -> subprocess.Popen[str]:
    """The command, in a process of its own; seconds: that the detector takes for a patch."""
    code = "import sys, oracle; oracle.command(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(slide), "--out", str(out), *FLAGS, *flags],
        env={**os.environ, "PYTHONPATH": PATHS, oracle.SECONDS: str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("workers", ["1", "3"])
def test_sigterm_stops_between_two_patches_and_the_same_command_resumes(workers: str, tmp_path: Path) -> None:
    """A batch system sends SIGTERM and kills half a minute later: a block of a slow detector takes longer."""
    slide, out, alone = tmp_path / "discs.png", tmp_path / "out", tmp_path / "alone"
    paint(slide, 0)
    how = ("--no-cluster", "--workers", workers)
    with nightslide(slide, out, *how, seconds=2) as doomed:
        try:
            while not list(out.glob("discs/work/patches.zarr/done/c/*/*/*")):  # then the block, of 40 s, is detected
                assert doomed.poll() is None
                time.sleep(0.05)
            time.sleep(1)
            doomed.send_signal(signal.SIGTERM)
            said, _ = doomed.communicate(timeout=15)
        finally:
            doomed.kill()
    assert doomed.returncode == 130, said
    assert "the same command continues where it stopped" in said
    assert not list((out / "discs" / "work" / "predictions").iterdir()), "half a block is not committed"
    assert not list(out.glob("discs/.lease*"))
    assert not (out / "discs" / "failure.json").exists()
    assert "interrupted" in (out / "ledger.csv").read_text()
    resumed = nightslide(slide, out, *how, seconds=0)
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    one = Execution(cluster=False, workers=1)
    run([slide], alone, chosen(block=ALL_IN_ONE), one, mpp=0.25, say=lambda line: None, detect=oracle.detect)
    assert files(out / "discs") == files(alone / "discs")


@pytest.mark.skipif(os.name != "posix", reason="needs groups of processes")
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_terminal_that_sends_ctrl_c_or_is_closed_ends_a_cluster_without_a_traceback(
    name: str, tmp_path: Path
) -> None:
    """It tells all processes of the command at once, those of the workers, too."""
    slide, out = tmp_path / "discs.png", tmp_path / "out"
    paint(slide, 0)
    code = "import sys, oracle; oracle.command(*sys.argv[1:])"
    doomed = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}", "run", str(slide), "--out", str(out), *FLAGS],
        env={**os.environ, "PYTHONPATH": PATHS, oracle.SECONDS: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while not list(out.glob("discs/work/patches.zarr/done/c/*/*/*")):
            assert doomed.poll() is None
            time.sleep(0.05)
        os.killpg(doomed.pid, getattr(signal, name))
        said, _ = doomed.communicate(timeout=60)
    finally:
        if doomed.poll() is None:
            os.killpg(doomed.pid, signal.SIGKILL)
    assert doomed.returncode == 130, said
    assert "the same command continues where it stopped" in said
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said
    assert "interrupted" in (out / "ledger.csv").read_text()


def test_a_second_signal_while_the_first_is_handled_changes_nothing() -> None:
    """`timeout`, and batch systems, send SIGTERM to a process and to its group: the run would have waited for ever."""
    stops: list[int] = []
    ended = threading.Event()

    def stop() -> None:
        stops.append(1)
        if len(stops) == 1:
            raise KeyboardInterrupt

    async def work() -> None:
        try:
            await asyncio.sleep(0.5)  # until it is waited for
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            ended.set()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_coroutine(work, stop)
    assert ended.is_set()
    assert len(stops) == 2
    assert time.monotonic() - started < 30
