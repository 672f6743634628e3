"""The cluster that a run starts on this machine."""

import os
import signal
import time

import dask
from distributed import Worker

from pipeline.archive.workers.local_cluster import start_cluster
from pipeline.config import Execution


def test_a_worker_that_died_comes_back_however_long_its_start_takes() -> None:
    """Dask gives up a worker whose process is not back in time: 15 s, here less than any start. The run would wait."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}),
        start_cluster(Execution(workers=1), "cpu") as client,
    ):
        before = set(client.run(os.getpid).values())
        doomed = before.pop()
        os.kill(doomed, signal.SIGKILL)
        left = time.monotonic() + 60
        while len(pids := set(client.run(os.getpid, on_error="ignore").values()) - {doomed}) <= len(before):
            assert time.monotonic() < left, pids
            time.sleep(0.1)
        assert len(client.cluster.workers) == len(pids), "one that was given up is there for a moment only"


def test_workers_keep_no_samples_of_what_they_call() -> None:
    """Dask's profiler has a tree of calls for each of the last 1,000 s: workers grew by 0.2 MB a small slide."""

    def sampled(dask_worker: Worker) -> list[str]:
        return [name for name in dask_worker.periodic_callbacks if name.startswith("profile")]

    with start_cluster(Execution(workers=1), "cpu") as client:
        assert not any(client.run(sampled).values())
