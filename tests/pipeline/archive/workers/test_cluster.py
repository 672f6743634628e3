"""The executor on a Dask cluster takes workers as they come and go, and says what is unsafe about a scheduler."""

import asyncio
import contextlib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import oracle
from oracle import chosen, paint
from pipeline.archive import run as archive_run
from pipeline.archive.workers.cluster import Cluster, _on_device, exposed
from pipeline.archive.workers.executors import Loop, run_task
from pipeline.archive.workers.local_cluster import start_cluster
from pipeline.config import Execution
from pipeline.errors import DeviceLost, RunError
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


def leave_a_note(folder: Path) -> None:
    (folder / f"{os.environ.get('NAME')} {os.getpid()}").touch()
    raise RuntimeError("nobody is told")


@pytest.mark.parametrize("offers", [True, False])
def test_processes_that_detect_are_prepared_beside_their_tasks(offers: bool, tmp_path: Path) -> None:
    """Those that offer a GPU; all, where none offers anything. Nobody waits for them."""
    import dask
    from distributed import Client, Nanny, SpecCluster

    def worker(name: str, **resources: float) -> dict[str, Any]:
        options = {"nthreads": 1, "resources": resources if offers else {}, "env": {"NAME": name}, "dashboard": False}
        return {"cls": Nanny, "options": options}

    workers = {0: worker("detects", GPU=1), 1: worker("feeds", CPU=1)}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": {}}),  # which Dask would leave in this process
        SpecCluster(workers) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2)
        Cluster(client).prepare(leave_a_note, tmp_path)
        expected = ["detects"] if offers else ["detects", "feeds"]
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < len(expected):
            assert time.monotonic() < until
            time.sleep(0.05)
        client.run(busy, 0)
        assert sorted(note.name.split()[0] for note in tmp_path.iterdir()) == expected


class OfANetwork:
    """A client of a scheduler that other machines reach."""

    dashboard_link = ""

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"address": "tcp://10.0.0.5:8786", "workers": {}}

    def run(self, function: Any, *args: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        return dict.fromkeys(workers)


class Offering(OfANetwork):
    """A client of a scheduler that answers with these resources of its workers, one after the other; None: not."""

    scheduler = SimpleNamespace(identity=None)

    def __init__(self, *answers: list[dict[str, float]] | None) -> None:
        self.answers, self.asked = list(answers), list[dict[str, float]]()

    def sync(self, _: Any, callback_timeout: float) -> dict[str, Any]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise TimeoutError
        return {"workers": {str(number): {"resources": offered} for number, offered in enumerate(answer)}}

    def get_executor(self, *, pure: bool, resources: dict[str, float]) -> Loop:
        assert not pure, "Dask would take equal calls for one"
        self.asked.append(resources)
        return Here()


class Here(Loop):
    def submit(self, function: Any, *args: Any) -> Any:  # type: ignore[override] # as an executor of Python
        return super().submit(False, function, *args)


@pytest.mark.parametrize(
    ("offered", "detectors", "feeders", "detecting", "beside"),
    [
        ([{"GPU": 1}, {"CPU": 4}, {"CPU": 2}], 1, 6, {"GPU": 0.5}, {"CPU": 1}),
        ([{"GPU": 2}], 2, 1, {"GPU": 0.5}, {}),
        ([{"CPU": 4}], 0, 4, {"GPU": 0.5}, {"CPU": 1}),
        ([{}, {}, {}], 3, 3, {}, {}),
        ([], 0, 0, {}, {}),
    ],
    ids=["both", "GPUs alone", "none that detects", "nothing", "no worker"],
)
def test_tasks_ask_for_what_the_workers_offer(
    offered: list[dict[str, float]],
    detectors: int,
    feeders: int,
    detecting: dict[str, float],
    beside: dict[str, float],
) -> None:
    """A resource that nobody offers is not asked for, but where others offer the CPU a GPU is waited for."""
    client = Offering(offered)
    where = Cluster(client)
    assert (where.detectors, where.feeders) == (detectors, feeders)
    assert [where.submit(on_device, abs, -3).result() for on_device in (True, False)] == [3, 3]
    assert client.asked == [detecting, beside]


def test_a_scheduler_that_does_not_answer_has_the_workers_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again, but not at once."""
    where = Cluster(Offering([{"GPU": 1}], None, [{"GPU": 3}]))
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pipeline.archive.workers.cluster.time", clock)
    found = []
    for _ in range(7):
        found.append((where.detectors, where.silent))
        now[0] += 2.0
    assert found == [(1, False)] * 3 + [(1, True)] * 3 + [(3, False)]


def test_a_worker_that_ends_while_it_is_prepared_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Ending(OfANetwork):
        def run(self, *_: Any, **options: Any) -> dict[str, Any]:
            asked.append(options)
            raise OSError("Timed out trying to connect")

    where = Cluster(Ending())
    monkeypatch.setattr(where, "_workers", lambda: {"a": {"resources": {"GPU": 1}}, "b": {"resources": {"CPU": 1}}})
    where.prepare(leave_a_note, Path("nowhere"))
    assert [options["workers"] for options in asked] == [["a"]]
    assert asked[0]["callback_timeout"] > 0, "one that is suspended is not waited for"


def test_where_no_worker_detects_none_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that offer only the CPU need no detector; a scheduler that does not answer has none to prepare."""

    asked: list[dict[str, Any]] = []

    class Asked(OfANetwork):
        def run(self, *_: Any, **options: Any) -> dict[str, Any]:
            asked.append(options)
            return {}

    answers: list[dict[str, Any] | None] = [{"a": {"resources": {"CPU": 1}}, "b": {}}, {}, None]
    where = Cluster(Asked())
    monkeypatch.setattr(where, "_workers", lambda: answers.pop(0))
    while answers:
        where.prepare(leave_a_note, Path("nowhere"))
    assert asked == []


def test_workers_that_ended_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once; a scheduler that does not answer has lost none."""
    answers: list[dict[str, Any] | None] = [{"a": {}, "b": {}}, {"a": {}}, None, {"a": {}, "c": {}}, {}]
    where = Cluster(OfANetwork())
    monkeypatch.setattr(where, "_workers", lambda: answers.pop(0))
    ended = []
    while answers:
        where.run_on_new_workers(busy, 0)
        ended.append(where.ended)
    assert ended == [(), ("b",), ("b",), ("b",), ("b", "a", "c")]


def fits(dask_worker: Any) -> None:
    if dask_worker.name == "late":
        raise RunError("has another version")


@pytest.mark.parametrize("retire", [False, True])
def test_a_worker_that_is_no_use_is_retired_where_that_is_wanted(retire: bool) -> None:
    """It failed at every task, so that it was soon free for the next: a run with it came to no end."""
    from distributed import Client, LocalCluster, Worker

    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        where = Cluster(client)
        assert where.run_on_new_workers(fits, retire=retire) == []
        late = client.sync(lambda: start(Worker(cluster.scheduler_address, name="late", dashboard=False)))
        (problem,) = where.run_on_new_workers(fits, retire=retire)
        said = f"the worker at {late.address} has another version"
        assert problem == (f"{said}; it is retired" if retire else said)
        assert (late.address in client.scheduler_info(n_workers=-1)["workers"]) == (not retire)
        assert where.run_on_new_workers(fits, retire=retire) == []
        assert where.ended == (), "nobody is told to look for its end"
        client.sync(late.close)  # one that is retired ends by itself, but the loop may not end before that


async def start(worker: Any) -> Any:
    return await worker


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
        ("", False),
    ],
)
def test_a_scheduler_without_tls_on_a_network_is_warned_of(address: str, open_to_a_network: bool) -> None:
    """Law: nothing is silent: what it means, and the remedy."""
    warning = exposed(address)
    assert bool(warning) == open_to_a_network
    assert ("can run code" in warning and "nightslide certificates" in warning) == open_to_a_network


@pytest.mark.parametrize(("services", "dashboard"), [({"dashboard": 8787}, "http://head:8787/status"), ({}, "")])
def test_a_dashboard_that_is_not_served_has_no_address(services: dict[str, int], dashboard: str) -> None:
    """Dask makes one up."""

    class Serving(OfANetwork):
        dashboard_link = "http://head:8787/status"

        def scheduler_info(self, n_workers: int) -> dict[str, Any]:
            return {**super().scheduler_info(n_workers), "services": services}

    assert Cluster(Serving()).dashboard == dashboard


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


def lose_the_gpu(once: Path) -> int:
    """Loses its GPU, but not where another process has."""
    if not once.exists():
        once.touch()
        raise DeviceLost("the GPU has failed")
    return os.getpid()


def test_a_worker_that_has_lost_its_gpu_is_replaced(tmp_path: Path) -> None:
    """It would fail at every task, and so be free for the next: no other slide would be done."""
    with start_cluster(Execution(workers=1), "cpu") as client:
        before = set(client.run(os.getpid).values())
        cluster = Cluster(client)
        assert cluster.submit(True, lose_the_gpu, tmp_path / "once").result(60) not in before
        with pytest.raises(DeviceLost):
            _on_device(lose_the_gpu, tmp_path / "here")  # of a process that nobody would replace
