"""Every executor gives the same records; the worker processes fit the machine."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.archive.executors import Cluster, Executor, open_executor, run_task, worker_specs
from pipeline.config import Execution
from pipeline.errors import ConfigError

HERE = Execution(cluster=False)


def double(x: int) -> int:
    if x == 13:
        raise ValueError("thirteen")
    return 2 * x


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, resources={"GPU": 1}, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def doubled(where: Executor, items: list[int]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        tasks = [run_task(where, i % 2 == 0, double, i) for i in items]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return [str(answer) for answer in asyncio.run(all_of_them())]


def test_every_executor_gives_the_same(client: Any) -> None:
    """Law: loop, threads and Dask give the same records, and the same errors."""
    items = list(range(20))
    expected = ["thirteen" if i == 13 else str(2 * i) for i in items]
    for running, given_client in (
        (Execution(cluster=False, workers=1), None),
        (Execution(cluster=False, workers=3), None),
        (HERE, client),
    ):
        with open_executor(running, client=given_client) as where:
            assert doubled(where, items) == expected


def busy(_: int) -> tuple[float, float]:
    started = time.monotonic()
    time.sleep(0.1)
    return started, time.monotonic()


def test_a_gpu_has_two_tasks_at_once_and_no_more(client: Any) -> None:
    where = Cluster(client)
    assert where.detectors == 1

    async def six() -> list[tuple[float, float]]:
        spans: list[tuple[float, float]] = await asyncio.gather(*(run_task(where, True, busy, i) for i in range(6)))
        return spans

    spans = asyncio.run(six())
    assert max(sum(a <= started < b for a, b in spans) for started, _ in spans) == 2


def test_when_cancelled_what_waits_is_cancelled_too() -> None:
    started = threading.Event()
    done: list[int] = []

    def slow(number: int) -> None:
        started.set()
        threading.Event().wait(0.2)
        done.append(number)

    async def work(where: Executor) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(run_task(where, False, slow, number))
            await asyncio.to_thread(started.wait)
            raise KeyError

    with open_executor(Execution(cluster=False, workers=2)) as where, pytest.raises(ExceptionGroup):
        asyncio.run(work(where))
    assert 1 <= len(done) <= 6


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "threads", "offers"),
    [
        (0, 2, [], [4], [{"GPU": 1, "CPU": 2}]),
        (0, 16, [], [6, 6], [{"GPU": 1, "CPU": 4}] * 2),
        (3, 4, [], [3, 3, 3], [{"GPU": 1, "CPU": 1}] * 3),
        (0, 16, ["0"], [2] + [1] * 6, [{"GPU": 1}] + [{"CPU": 1}] * 6),
        (0, 4, ["0", "1"], [2, 2, 1, 1], [{"GPU": 1}] * 2 + [{"CPU": 1}] * 2),
        (1, 1, ["5"], [2, 1], [{"GPU": 1}, {"CPU": 1}]),
    ],
)
def test_machines_are_sized(
    workers: int, cores: int, gpus: list[str], threads: list[int], offers: list[dict[str, float]]
) -> None:
    chosen = worker_specs(workers, cores, gpus)
    assert [s.threads for s in chosen] == threads
    assert [s.resources for s in chosen] == offers
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in chosen if s.resources == {"GPU": 1}] == gpus


def test_a_scheduler_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"nowhere\.json does not exist"),
        open_executor(Execution(scheduler_file="nowhere.json")),
    ):
        pass
    with pytest.raises(ConfigError, match="need one of them"):
        Execution(scheduler="tcp://a:1", scheduler_file="b")
    with pytest.raises(ConfigError, match="this machine has 0"), open_executor(Execution(gpus=3), "cpu"):
        pass
