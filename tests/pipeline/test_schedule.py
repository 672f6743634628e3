"""Every executor gives the same records; the window is never exceeded; a failure stops alone."""

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Running
from pipeline.schedule import Step, flow, pools


def double(x: int, *_: Any) -> int:
    return 2 * x


def plus_previous(x: int, previous: int) -> int:
    if x == 13:
        raise ValueError("thirteen")
    return x + previous


STEPS = (Step(double, False), Step(plus_previous, True))


@given(st.lists(st.integers(0, 30), unique=True), st.integers(1, 5), st.sampled_from([1, 3]))
def test_every_item_takes_every_step_once(items: list[int], window: int, workers: int) -> None:
    """Law: loop and threads give the same, in whatever order; an item that fails stops alone."""
    with pools(Running(workers=workers)) as places:
        outcomes = list(flow(places, ((i,) for i in items), STEPS, window))
    assert sorted(o.item[0] for o in outcomes) == sorted(items)
    for outcome in outcomes:
        (item,) = outcome.item
        if item == 13:
            assert isinstance(outcome.error, ValueError)
        else:
            assert outcome.error is None
            assert outcome.record == 3 * item


def test_no_more_than_the_window_is_begun() -> None:
    begun, ended, most = 0, 0, 0
    lock = threading.Lock()

    def enter(_: int) -> None:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - ended)

    def leave(_: int, __: None) -> None:
        nonlocal ended
        with lock:
            ended += 1

    with pools(Running(workers=4)) as places:
        outcomes = list(flow(places, ((i,) for i in range(50)), (Step(enter, False), Step(leave, True)), 3))
    assert len(outcomes) == 50
    assert 1 <= most <= 3


def test_after_stop_nothing_is_begun() -> None:
    stop = threading.Event()
    seen = []
    with pools(Running(workers=2)) as places:
        for outcome in flow(places, ((i,) for i in range(100)), STEPS[:1], 2, stop):
            seen.append(outcome.item)
            stop.set()
    assert 1 <= len(seen) <= 4


@pytest.fixture(scope="module")
def client() -> Any:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, resources={"GPU": 1}, dashboard_address=None
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def test_a_dask_client_gives_the_same_as_threads(client: Any) -> None:
    """Law: loop, threads and Dask give the same records."""
    results = []
    for running, given_client in (
        (Running(workers=1), None),
        (Running(workers=2), None),
        (Running(), client),
    ):
        with pools(running, given_client) as places:
            outcomes = flow(places, ((i,) for i in range(12)), STEPS, 4)
            results.append(sorted((o.item, o.record) for o in outcomes))
    assert results[0] == results[1] == results[2]
