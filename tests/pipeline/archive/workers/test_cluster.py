"""The executor on a Dask cluster takes workers as they come and go, and says what is unsafe about a scheduler."""

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive import run as archive_run
from pipeline.archive.workers.cluster import Cluster, exposed
from pipeline.archive.workers.executors import Loop, run_task
from pipeline.archive.workers.local_cluster import start_cluster
from pipeline.config import Execution
from pipeline.model import allocator


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


def test_a_cluster_of_this_machine_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what a notebook starts later has the workers' allocator."""
    given, *others = allocator.ENVIRONMENT
    monkeypatch.setenv(given, "7")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    with start_cluster(Execution(workers=1), "cpu"):
        assert allocator.ENVIRONMENT.keys() <= os.environ.keys()
    assert {name: os.environ[name] for name in allocator.ENVIRONMENT.keys() & os.environ.keys()} == {given: "7"}


class OfANetwork:
    """A client of a scheduler that other machines reach."""

    dashboard_link = ""

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"address": "tcp://10.0.0.5:8786", "workers": {}}

    def run(self, function: Any, *args: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        return dict.fromkeys(workers)


def test_workers_that_ended_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once; a scheduler that does not answer has lost none."""
    answers: list[dict[str, Any] | None] = [{"a": {}, "b": {}}, {"a": {}}, None, {"a": {}, "c": {}}, {}]
    where = Cluster(OfANetwork())
    monkeypatch.setattr(where, "_workers", lambda: answers.pop(0))
    counts = []
    while answers:
        where.run_on_new_workers(busy, 0)
        counts.append(where.ended)
    assert counts == [0, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("address", "open_to_a_network"),
    [
        ("tcp://10.0.0.5:8786", True),
        ("tcp://head:8786", True),
        ("tcp://[fe80::1]:8786", True),
        ("tcp://0.0.0.0:8786", True),
        ("ws://10.0.0.5:8786", True),
        ("tls://10.0.0.5:8786", False),
        ("tcp://127.0.0.1:8786", False),
        ("tcp://[::1]:8786", False),
        ("tcp://localhost:8786", False),
        ("inproc://10.0.0.5/1/1", False),
    ],
)
def test_a_scheduler_without_tls_on_a_network_is_warned_of(address: str, open_to_a_network: bool) -> None:
    """Law: nothing is silent: what it means, and the remedy."""
    warning = exposed(address)
    assert bool(warning) == open_to_a_network
    assert ("can run code" in warning and "nightslide certificates" in warning) == open_to_a_network


def test_a_run_says_that_its_scheduler_is_exposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's own address counts: one reached as 127.0.0.1 may listen to the network all the same."""

    warning = Cluster(OfANetwork()).warning
    assert warning == exposed("tcp://10.0.0.5:8786")

    class Exposed(Loop):
        pass

    Exposed.warning = warning
    monkeypatch.setattr(archive_run, "open_executor", lambda *_: contextlib.nullcontext(Exposed()))
    paint(tmp_path / "a.png", 0)
    said: list[str] = []
    archive_run.run([tmp_path / "a.png"], tmp_path / "out", chosen(), mpp=0.25, say=said.append, detect=oracle.detect)
    assert f"WARNING: {warning}" in said
