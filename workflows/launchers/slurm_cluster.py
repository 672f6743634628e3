r"""`nightslide run` on SLURM, as one Dask cluster whose workers are jobs, some with a GPU and some without.

    uv run --with dask-jobqueue python workflows/launchers/slurm_cluster.py \
        --gpu-jobs 4 --gpu-options "-p gpu --gres=gpu:1" --cpu-jobs 6 --cpu-options "-p cpu" --hours 12 \
        -- slides/ --out results --stain macenko

What follows -- are arguments of `nightslide run`. Start it where the compute nodes can reach it (--interface)
for as long as the run takes: in a small job of its own, or on a login node under tmux. Slides, results and this
environment must have the same paths on all nodes. The jobs end with the run; preempted jobs are submitted again.
If this process dies, its jobs end by themselves, and the same command continues.
With --certificates, a folder that `nightslide certificates` made, all of them talk over TLS; without, anyone who can
reach the ports of scheduler and workers can run code there.
"""

import argparse
import itertools
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from distributed import Scheduler, Security, SpecCluster
from tornado.ioloop import PeriodicCallback

from pipeline.cli import main as nightslide
from pipeline.model.allocator import ENVIRONMENT

CHECK_MS = 60_000  # between checks that all jobs are there
LEAVE_S = 300  # how long before its time limit a worker hands over its results and ends


def main() -> None:
    given = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as nightslide does: a clean end
    gpu_jobs = {f"gpu-{number}": gpu_job(given) for number in range(given.gpu_jobs)}
    cpu_jobs = {f"cpu-{number}": cpu_job(given) for number in range(given.cpu_jobs)}
    tls = tls_files(given.certificates)
    options: dict[str, Any] = {"interface": given.interface, "dashboard_address": ":0"}
    security = None
    if tls:
        roles = ("client", "scheduler", "worker")
        one_for_all = {f"tls_{role}_{part}": tls[f"tls-{part}"] for role in roles for part in ("cert", "key")}
        security = Security(tls_ca_file=tls["tls-ca-file"], require_encryption=True, **one_for_all)
        options |= {"protocol": "tls", "security": security}
    scheduler = {"cls": Scheduler, "options": options}
    # dask-jobqueue's SLURMCluster has one kind of job; Dask's SpecCluster takes its jobs in several kinds
    with SpecCluster(
        gpu_jobs or cpu_jobs, scheduler, security=security, name="nightslide", silence_logs=logging.ERROR
    ) as cluster:
        print(f"scheduler: {cluster.scheduler_address}; waiting for the first of {len(cluster.worker_spec)} jobs")
        cluster.wait_for_workers(1)
        cluster.worker_spec.update(cpu_jobs)  # not sooner: without a GPU worker they would be idle
        cluster.scale(len(cluster.worker_spec))
        cluster.loop.add_callback(PeriodicCallback(lambda: cluster.scale(len(cluster.worker_spec)), CHECK_MS).start)
        nightslide(["run", *given.arguments, "--scheduler", cluster.scheduler_address, *flags(tls)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-jobs", type=int, default=1, help="jobs with one GPU each; 0: none (%(default)s)")
    parser.add_argument(
        "--gpu-options", default="--gres=gpu:1", help="options of sbatch for the GPU jobs (%(default)s)"
    )
    parser.add_argument("--cpu-jobs", type=int, default=2, help="jobs that read, tile and outline (%(default)s)")
    parser.add_argument("--cpu-options", default="", help="options of sbatch for the CPU jobs")
    parser.add_argument("--cores", type=int, default=4, help="cores of a CPU job (%(default)s)")
    parser.add_argument("--memory", default="16GB", help="memory of each job (%(default)s)")
    parser.add_argument("--hours", type=float, default=8, help="time limit of each job (%(default)s)")
    parser.add_argument("--prologue", action="append", default=[], help="a line for the job script: module load ...")
    parser.add_argument("--interface", help="network interface that the nodes can reach, such as ib0")
    parser.add_argument("--certificates", default="", help="folder of certificates for TLS, readable on all nodes")
    parser.add_argument("--logs", default="nightslide-jobs", help="folder for the jobs' output (%(default)s)")
    parser.add_argument("arguments", nargs="+", help="arguments of nightslide run")
    given = parser.parse_args(joined(sys.argv[1:]))
    if given.gpu_jobs + given.cpu_jobs < 1:
        parser.error("gpu-jobs=0 and cpu-jobs=0: need one job or more")
    if find_spec("dask_jobqueue") is None:
        parser.error("dask-jobqueue is not installed: need it to submit jobs; start with uv run --with dask-jobqueue")
    return given


def joined(words: Sequence[str]) -> list[str]:
    """The command line with options of sbatch joined to their flag, `--gpu-options=--gres=gpu:1`.

    argparse takes a word that begins with a dash for another flag, unless it holds a space. What follows -- stays.
    """
    own = list(itertools.takewhile(lambda word: word != "--", words))
    result: list[str] = []
    for word in own:
        if result and result[-1] in ("--gpu-options", "--cpu-options"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return [*result, *words[len(own) :]]


def tls_files(folder: str) -> dict[str, str]:
    """The files of TLS in a folder, by the names of the flags that take them, here and in `dask worker`."""
    names = {"tls-ca-file": "ca.pem", "tls-cert": "cert.pem", "tls-key": "key.pem"}
    return {flag: os.path.abspath(os.path.join(folder, name)) for flag, name in names.items()} if folder else {}


def flags(files: dict[str, str]) -> list[str]:
    return [part for flag, file in files.items() for part in (f"--{flag}", file)]


def gpu_job(given: argparse.Namespace) -> dict[str, Any]:
    """Two threads share the GPU: one reads the next block while the other computes."""
    return job(given, given.gpu_options, cores=2, threads=2, resources="GPU=1")


def cpu_job(given: argparse.Namespace) -> dict[str, Any]:
    """Reads, tiles and outlines, a block a core; detects too, where no job has a GPU."""
    cores = given.cores
    if given.gpu_jobs:
        return job(given, given.cpu_options, cores, threads=cores, resources=f"CPU={cores}")
    return job(given, given.cpu_options, cores, threads=cores + 2, resources=f"GPU=1 CPU={cores}")


def job(given: argparse.Namespace, options: str, cores: int, threads: int, resources: str) -> dict[str, Any]:
    """SpecCluster's description of a worker: one job with one worker process under a nanny.

    cores: of the job; threads: of the worker, one task each; resources: as `dask worker` takes them.
    """
    from dask_jobqueue.slurm import SLURMJob  # not a dependency of the project: --help works without it

    tls = tls_files(given.certificates)
    environment = {"OMP_NUM_THREADS": "1"}
    if "GPU=1 CPU" in resources:  # it detects on all cores; Dask sets the allocator otherwise, which takes longer
        environment = {"OMP_NUM_THREADS": str(cores), **ENVIRONMENT}
    return {
        "cls": SLURMJob,
        "options": {
            "cores": threads,
            "job_cpu": cores,
            "processes": 1,
            "memory": given.memory,
            "walltime": str(round(given.hours * 60)),  # minutes
            "job_extra_directives": [options] if options else [],
            "job_script_prologue": [
                *given.prologue,
                *(f"export {name}={value}" for name, value in environment.items()),
            ],
            "worker_extra_args": [
                f'--resources "{resources}"',
                f"--lifetime {max(60, round(given.hours * 3600) - LEAVE_S)}s",
                *map(shlex.quote, ["--protocol", "tls", *flags(tls)] if tls else []),
            ],
            "job_name": "nightslide",
            "log_directory": given.logs,
            "interface": given.interface,
        },
    }


if __name__ == "__main__":
    main()
