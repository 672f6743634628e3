"""Every executor gives the same records."""

import asyncio
import threading
from typing import Any

import pytest

from pipeline.archive.workers.execution import open_executor
from pipeline.archive.workers.executors import Executor, run_task
from pipeline.config import Execution

HERE = Execution(cluster=False)


def double(x: int) -> int:
    if x == 13:
        raise ValueError("thirteen")
    return 2 * x


def doubled(where: Executor, items: list[int]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        tasks = [run_task(where, i % 2 == 0, double, i) for i in items]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return [str(answer) for answer in asyncio.run(all_of_them())]


def test_every_executor_gives_the_same(client: Any) -> None:
    """Law: loop, threads and Dask give the same records, and the same errors."""
    items = list(range(20))
    expected = ["thirteen" if i == 13 else str(2 * i) for i in items]
    for running, given_client, feeders in (
        (Execution(cluster=False, workers=1), None, 1),
        (Execution(cluster=False, workers=3), None, 3),
        (HERE, client, 1),
    ):
        with open_executor(running, client=given_client) as where:
            assert where.feeders == feeders
            assert doubled(where, items) == expected


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
