"""Every executor gives the same records; the worker processes fit the machine."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive import run as archive_run
from pipeline.archive.executors import (
    Cluster,
    Executor,
    Loop,
    ask,
    check_execution,
    exposed,
    open_executor,
    run_task,
    starts_processes,
    worker_specs,
)
from pipeline.config import Execution
from pipeline.errors import ConfigError, RunError

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
    for running, given_client, feeders in (
        (Execution(cluster=False, workers=1), None, 1),
        (Execution(cluster=False, workers=3), None, 3),
        (HERE, client, 1),
    ):
        with open_executor(running, client=given_client) as where:
            assert where.feeders == feeders
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
        where.run_on_new_workers(double, 3)
        counts.append(where.ended)
    assert counts == [0, 1, 1, 1, 3]


@pytest.mark.parametrize("apart", [True, False])
def test_a_question_is_answered_here_or_in_another_process(apart: bool) -> None:
    """The same answer, the same error; and torch, which the other process may load, stays there."""
    assert ask(apart, double, 3) == 6
    assert (ask(apart, os.getpid) == os.getpid()) != apart
    with pytest.raises(ValueError, match="thirteen"):
        ask(apart, double, 13)


def test_a_process_that_is_killed_before_it_answers_is_said() -> None:
    with pytest.raises(RunError, match="ended early: need about"):
        ask(True, os._exit, 1)


@pytest.mark.parametrize("execution", [Execution(scheduler="tcp://127.0.0.1:8786"), Execution(cluster=False)])
def test_a_script_whose_run_starts_no_workers_needs_no_main(execution: Execution) -> None:
    """Nothing is asked in a process of its own, which would import the script again."""
    assert starts_processes(Execution())
    assert not starts_processes(execution)
    assert not starts_processes(Execution(), client=object())


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
        (0, 2, [], [2, 2], [{"GPU": 1}, {"CPU": 2}]),
        (0, 1, [], [2, 1], [{"GPU": 1}, {"CPU": 1}]),
        (0, 16, [], [2, 2, 4, 4], [{"GPU": 1}] * 2 + [{"CPU": 4}] * 2),
        (3, 4, [], [2, 1, 1, 1], [{"GPU": 1}] + [{"CPU": 1}] * 3),
        (0, 16, ["0"], [2] + [1] * 15, [{"GPU": 1}] + [{"CPU": 1}] * 15),
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
    detecting = [s.environment for s in chosen if s.resources == {"GPU": 1}]
    assert [e.get("CUDA_VISIBLE_DEVICES", "all") for e in detecting] == (gpus or ["all"] * len(detecting))
    assert all(s.environment["CUDA_VISIBLE_DEVICES"] == "" for s in chosen if "CPU" in s.resources)


@pytest.mark.parametrize(
    ("cores", "gpus", "of_machine_gb", "detecting_gb", "least_gb"),
    [(64, [], 128, 10.7, 5.3), (64, ["0"], 128, 7.6, 1.7), (64, ["0", "1"], 128, 7.3, 1.7), (2, [], 4, 2.6, 1.3)],
)
def test_a_process_that_detects_has_memory_however_many_are_beside_it(
    cores: int, gpus: list[str], of_machine_gb: float, detecting_gb: float, least_gb: float
) -> None:
    """Of 64 cores with 2 GB each, and of a small laptop."""
    chosen = worker_specs(0, cores, gpus)
    gb = [of_machine_gb * spec.memory / sum(s.memory for s in chosen) for spec in chosen]
    assert gb[0] == pytest.approx(detecting_gb, abs=0.1)
    assert min(gb) >= least_gb


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


def test_files_of_tls_are_checked_before_anything_is_started(tmp_path: Path) -> None:
    """The address is nobody's: it is not even tried."""
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("no certificate")
    given: dict[str, Any] = {f"tls_{name}": str(tmp_path / name.split("_")[0]) for name in ("ca_file", "cert", "key")}
    (tmp_path / "scheduler.json").write_text('{"address": "tls://127.0.0.1:9"}')
    (tmp_path / "empty.json").write_text("{}")
    in_file = str(tmp_path / "scheduler.json")
    for execution, message in (
        (Execution(scheduler="tls://127.0.0.1:9"), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler_file=in_file), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler_file=str(tmp_path / "empty.json")), "holds no address"),
        (Execution(scheduler="tls://127.0.0.1:9", **given), "need certificates and key in PEM"),
        (Execution(scheduler="tls://127.0.0.1:9", **{**given, "tls_key": "none"}), "tls-key=none does not exist"),
        (Execution(scheduler="tcp://127.0.0.1:9", **given), "need one that was started with them, at tls://"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_execution(execution, "auto")
        with pytest.raises(ConfigError, match=message), open_executor(execution):
            pass
