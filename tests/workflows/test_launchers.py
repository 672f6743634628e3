"""The launchers for one machine and for SLURM, with stand-ins for `dask`, `nvidia-smi` and dask-jobqueue."""

import argparse
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.model.allocator import ENVIRONMENT

LAUNCHERS = Path(__file__).parents[2] / "workflows" / "launchers"
# the scheduler writes its file and stays; a worker writes its command and variables, and stays as well
DASK = """#!/bin/bash
case $1 in
    scheduler) echo started > "$3" ;;
    worker) { echo "$*" && env; } > "$SEEN.$$" && mv "$SEEN.$$" "$SEEN/$$" ;;
esac
exec sleep 60
"""
# as Debian's mawk, in a language that writes numbers with a comma
AWK = """#!/bin/sh
if [ "$LC_ALL" = C ]; then exec /usr/bin/awk "$@"; else /usr/bin/awk "$@" | tr . ,; fi
"""


def workers(folder: Path, number: int, **environment: str) -> list[tuple[str, dict[str, str]]]:
    """The command and the variables of each worker that machine.sh starts, of as many as are expected."""
    commands, seen = folder / "bin", folder / "seen"
    commands.mkdir()
    seen.mkdir()
    for name, text in (("dask", DASK), ("awk", AWK), ("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    environment |= {"PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path), "SEEN": str(seen)}
    launcher = ["bash", str(LAUNCHERS / "machine.sh"), "start", str(folder / "scheduler.json")]
    with subprocess.Popen(launcher, env=environment) as started:
        while len(list(seen.iterdir())) < number and started.poll() is None:
            time.sleep(0.05)
        started.terminate()
    said = sorted(file.read_text().splitlines() for file in seen.iterdir())
    return [(command, dict(line.split("=", 1) for line in lines if "=" in line)) for command, *lines in said]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_without_a_gpu_one_worker_computes_on_all_cores_with_the_allocator_of_a_run(
    hidden: str, tmp_path: Path
) -> None:
    """Whatever number of threads programs are told to have: `nproc` prints that."""
    ((command, variables),) = workers(tmp_path, 1, CUDA_VISIBLE_DEVICES=hidden, OMP_NUM_THREADS="7777")
    cores = len(os.sched_getaffinity(0))
    assert variables.items() >= {**ENVIRONMENT, "OMP_NUM_THREADS": str(cores)}.items()
    assert command.endswith(f"--nthreads {2 + min(4, cores)} --resources GPU=1 CPU={min(4, cores)}")


def test_every_gpu_has_a_worker_and_cpus_feed_them(tmp_path: Path) -> None:
    started = workers(tmp_path, 3)
    gpus = {variables["CUDA_VISIBLE_DEVICES"]: command for command, variables in started}
    assert set(gpus) == {"", "0", "1"}
    assert "--resources CPU=1" in gpus[""]
    assert all("--nthreads 2 --resources GPU=1" in gpus[gpu] for gpu in "01")
    assert {variables["OMP_NUM_THREADS"] for _, variables in started} == {"1"}
    assert all("--death-timeout 300" in command for command, _ in started)


def test_the_share_of_the_memory_is_a_number_that_dask_reads(tmp_path: Path) -> None:
    """Whatever the language: 0,333 is none, and no worker would start."""
    shares = {re.findall(r"--memory-limit (\S+)", command)[0] for command, _ in workers(tmp_path, 3)}
    assert len(shares) == 1
    assert 0 < float(shares.pop()) <= 1 / 3


@pytest.mark.parametrize("gpu_jobs", [0, 1])
def test_a_cpu_job_detects_with_the_allocator_of_a_run(gpu_jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jobqueue = ModuleType("dask_jobqueue.slurm")
    jobqueue.__dict__["SLURMJob"] = object
    monkeypatch.setitem(sys.modules, "dask_jobqueue", ModuleType("dask_jobqueue"))
    monkeypatch.setitem(sys.modules, "dask_jobqueue.slurm", jobqueue)
    cpu_job = runpy.run_path(str(LAUNCHERS / "slurm_cluster.py"))["cpu_job"]
    given = argparse.Namespace(
        gpu_jobs=gpu_jobs,
        cores=4,
        cpu_options="",
        certificates="",
        memory="16GB",
        hours=8,
        prologue=["module load x"],
        logs="l",
        interface=None,
    )
    lines = cpu_job(given)["options"]["job_script_prologue"]
    expected = {"OMP_NUM_THREADS": "1"} if gpu_jobs else {"OMP_NUM_THREADS": "4", **ENVIRONMENT}
    assert lines == ["module load x", *(f"export {name}={value}" for name, value in expected.items())]


def test_options_of_sbatch_may_be_one_word_that_begins_with_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = runpy.run_path(str(LAUNCHERS / "slurm_cluster.py"))
    monkeypatch.setitem(launcher["parse"].__globals__, "find_spec", lambda _: object())
    words = ["--gpu-options", "--gres=gpu:2", "--cpu-options", "-p cpu", "--", "slides", "--gpu-options", "--out"]
    monkeypatch.setattr(sys, "argv", ["slurm_cluster.py", *words])
    given = launcher["parse"]()
    assert (given.gpu_options, given.cpu_options) == ("--gres=gpu:2", "-p cpu")
    assert given.arguments == ["slides", "--gpu-options", "--out"]
