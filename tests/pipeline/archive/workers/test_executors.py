"""Every executor gives the same records."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.archive.workers.execution import open_executor
from pipeline.archive.workers.executors import Executor, Loop, run_task
from pipeline.config import Execution
from pipeline.errors import ClusterLost

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


class Waiting(Loop):
    """Its task is waited for until somebody cancels it."""

    def __init__(self) -> None:
        self.task: Future[Any] = Future()

    def submit(self, *_: Any) -> Future[Any]:
        return self.task


@pytest.mark.parametrize(("by_us", "raised"), [(True, asyncio.CancelledError), (False, ClusterLost)])
def test_a_task_that_is_cancelled_by_dask_has_lost_its_cluster(by_us: bool, raised: type[BaseException]) -> None:
    async def cancelled() -> None:
        where = Waiting()
        task = asyncio.create_task(run_task(where, True, double, 1))
        await asyncio.sleep(0)
        (task if by_us else where.task).cancel()
        await task

    with pytest.raises(raised):
        asyncio.run(cancelled())


def test_tasks_of_the_device_have_threads_of_their_own() -> None:
    """Two, so that it is never idle; those of the CPU do not wait for it."""
    with open_executor(Execution(cluster=False, workers=3)) as where:
        prepared = threading.Event()
        where.prepare(prepared.set)
        assert prepared.wait(60)
        both, three = threading.Barrier(2), threading.Barrier(3)
        on_device = [where.submit(True, own_thread, both) for _ in range(2)]
        beside = [where.submit(False, own_thread, three) for _ in range(3)]
        idents = [{task.result(60) for task in tasks} for tasks in (on_device, beside)]
    assert [len(threads) for threads in idents] == [2, 3]
    assert not idents[0] & idents[1]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (64, 4)])
def test_without_a_cluster_a_few_threads_feed_the_device(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    """More would hold more blocks in memory than the device waits for."""
    monkeypatch.setattr("pipeline.archive.workers.execution.count_cores", lambda: cores)
    with open_executor(HERE) as where:
        assert where.feeders == threads


def own_thread(together: threading.Barrier) -> int:
    together.wait(60)
    return threading.get_ident()
