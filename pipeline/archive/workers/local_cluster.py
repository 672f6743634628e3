"""A Dask cluster on this machine, which ends with the run.

One of the three files that import Dask, beside `machine` and `scheduler`.
"""

import logging
import os
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.archive.workers.machine import WorkerSpec, count_cores, usable_gpus, worker_specs
from pipeline.archive.workers.processes import GUARD, interrupts_kept_from_children
from pipeline.config import Execution
from pipeline.errors import RunError
from pipeline.model.allocator import ENVIRONMENT


@contextmanager
def start_cluster(execution: Execution, device: str) -> Iterator[Any]:
    """A client of a cluster on this machine, which ends with it."""
    import dask
    from distributed import Client, Scheduler, SpecCluster
    from distributed.worker_memory import parse_memory_limit

    gpus = usable_gpus(execution, device)
    chosen = worker_specs(execution.workers, count_cores(), gpus)
    log, whole = logging.getLogger(__name__), sum(spec.memory for spec in chosen)
    limits = [parse_memory_limit(execution.memory_limit, spec.memory, whole, logger=log) for spec in chosen]
    workers = {number: _worker(*one) for number, one in enumerate(zip(chosen, limits, strict=True))}
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "dashboard": True, "dashboard_address": "127.0.0.1:0"},
    }
    # read before Python starts; beside a GPU, workers cut and outline: their threads would keep 8 arenas a core
    variables = {"MALLOC_ARENA_MAX": "2"} if gpus else ENVIRONMENT
    quiet = {
        "distributed.worker.memory.target": False,  # Dask could spill records only, which are small
        "distributed.worker.memory.spill": False,
        "distributed.worker.profile.enabled": False,  # its samples grow to 100 MB and more in every worker
        # after so long without its process Dask gives a worker up for good, also where that is being started again
        "distributed.deploy.lost-worker-timeout": "1000 days",
        "distributed.nanny.pre-spawn-environ": variables,
        "logging": {"distributed": "error"},
    }
    with ExitStack() as stack:
        stack.enter_context(_taken_back(variables.keys()))
        stack.enter_context(dask.config.set(quiet))
        with interrupts_kept_from_children():
            try:
                cluster = SpecCluster(workers, scheduler, name="nightslide", silence_logs=logging.ERROR)
            except RuntimeError as error:
                raise RunError(f"the worker processes do not start ({error}): {GUARD}") from None
            stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        client.wait_for_workers(len(chosen), timeout=120)
        yield client


def _worker(spec: WorkerSpec, memory_limit: int | None) -> dict[str, Any]:
    """A worker process, as `SpecCluster` starts it."""
    from distributed import Nanny

    options = {
        "nthreads": spec.threads,
        "resources": spec.resources,
        "env": spec.environment,
        "memory_limit": memory_limit,
        "host": "127.0.0.1",  # else its ports are open to the network, without authentication
        "dashboard": False,
        "silence_logs": logging.CRITICAL,  # a task that fails is a row of the ledger
    }
    return {"cls": Nanny, "options": options}


@contextmanager
def _taken_back(variables: Set[str]) -> Iterator[None]:
    """Those of these variables that this process lacks it lacks afterwards.

    Dask sets those of its workers here, where they inherit them, and leaves them: to all that a notebook starts later.
    """
    lacking = variables - os.environ.keys()
    try:
        yield
    finally:
        for name in lacking:
            os.environ.pop(name, None)
