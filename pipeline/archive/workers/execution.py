"""Where a run's tasks are done: the executor that its `Execution` asks for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.archive.workers.cluster import Cluster
from pipeline.archive.workers.executors import Executor, Loop, Threads, open_threads
from pipeline.archive.workers.local_cluster import start_cluster
from pipeline.archive.workers.machine import count_cores, usable_gpus
from pipeline.archive.workers.scheduler import check_scheduler, connect
from pipeline.config import Execution
from pipeline.model.allocator import keep_few_prepared_layers, keep_freed_memory
from pipeline.model.device import choose_device


def check_execution(execution: Execution, device: str) -> None:
    """Raise ConfigError for what `open_executor` would refuse without asking a scheduler: nothing is started."""
    if execution.scheduler or execution.scheduler_file:
        check_scheduler(execution)
    else:
        usable_gpus(execution, device)  # one that is not there is refused now, not slide by slide


def starts_processes(execution: Execution, client: Any = None) -> bool:
    """Whether `open_executor` of the same arguments does: a script that calls it must be prepared for that."""
    return client is None and execution.cluster and not (execution.scheduler or execution.scheduler_file)


@contextmanager
def open_executor(execution: Execution, device: str = "auto", client: Any = None) -> Iterator[Executor]:
    """The executor of a run: the cluster of a client, one that is running, one of this machine, or this process.

    device: as in `Detector`; decides whether this machine's GPUs are used.
    client: a `dask.distributed.Client`, which is left as it is.
    Raises ConfigError for a scheduler that cannot be reached, or GPUs that are not there.
    """
    with ExitStack() as stack:
        if client is not None:
            yield Cluster(client)
        elif execution.scheduler or execution.scheduler_file:
            yield Cluster(stack.enter_context(connect(execution)))
        elif execution.cluster:
            yield Cluster(stack.enter_context(start_cluster(execution, device)))
        elif execution.workers == 1:
            _use_this_process(device)
            yield Loop()
        else:
            _use_this_process(device)
            feeders = execution.workers or min(4, count_cores())
            beside, on_device = (stack.enter_context(open_threads(count)) for count in (feeders, 2))
            yield Threads(beside, on_device, feeders)


def _use_this_process(device: str) -> None:
    """Prepare this process for the detector, before it has other threads."""
    if choose_device(device).type == "cpu":
        keep_freed_memory()
        keep_few_prepared_layers()
