"""The cluster that a run starts on this machine."""

import os
import signal
import time

import dask
import distributed
import pytest
from distributed import Worker

from pipeline.archive.workers import local_cluster
from pipeline.archive.workers.local_cluster import start_cluster
from pipeline.archive.workers.machine import count_cores, worker_specs
from pipeline.config import Execution


def test_workers_are_started_as_they_fit_the_machine() -> None:
    """Their threads, resources and variables; together they may take the memory that there is, in their shares."""
    specs = worker_specs(2, count_cores(), [])
    names = {name for spec in specs for name in spec.environment}

    def variables() -> dict[str, str]:
        return {name: os.environ[name] for name in names if name in os.environ}

    with start_cluster(Execution(workers=2), "cpu") as client:
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"].items(), key=lambda worker: worker[1]["name"])
        environment = client.run(variables)
    assert [(about["nthreads"], about["resources"]) for _, about in workers] == [s[:2] for s in specs]
    for (address, _), spec in zip(workers, specs, strict=True):
        assert spec.environment.items() <= environment[address].items()
    limits = [about["memory_limit"] for _, about in workers]
    assert sum(limits) == pytest.approx(distributed.system.MEMORY_LIMIT, rel=1e-6)
    assert [limit / limits[-1] for limit in limits] == pytest.approx([s.memory / specs[-1].memory for s in specs])


def test_beside_a_gpu_workers_have_few_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores cut and outline there, and glibc would keep eight for each; the detector's allocator is not needed."""

    def not_started(*_: object, **options: object) -> None:
        assert dask.config.get("distributed.nanny.pre-spawn-environ") == {"MALLOC_ARENA_MAX": "2"}
        raise InterruptedError

    monkeypatch.setattr(local_cluster, "usable_gpus", lambda *_: ["0"])
    monkeypatch.setattr(distributed, "SpecCluster", not_started)
    with pytest.raises(InterruptedError), start_cluster(Execution(), "auto"):
        pass


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

    with start_cluster(Execution(workers=1, memory_limit="1GB"), "cpu") as client:
        assert not any(client.run(sampled).values())
        started = client.scheduler_info(n_workers=-1)["workers"].values()
    assert [about["memory_limit"] for about in started] == [10**9] * 2, "of each process, as was asked for"
