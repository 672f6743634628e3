"""A cluster of real processes: whatever dies, the same command goes on, and the bytes are an undisturbed run's."""

import contextlib
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from oracle import chosen, files, paint
from pipeline.archive.certificates import Certificates, write_certificates
from pipeline.archive.run import run
from pipeline.archive.workers.scheduler import connect
from pipeline.config import Execution
from pipeline.model.allocator import ENVIRONMENT

ROOT = Path(oracle.__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
SLIDES = 3
FLAGS = [
    *("--mpp", "0.25", "--tissue.everywhere", "--tiling.tile", "128", "--tiling.margin", "20", "--tiling.block", "1"),
    *("--stitching.max-diameter-um", "4.5", "--stitching.simplify-px", "0", "--stain", "none"),
]


class Cluster:
    """`dask scheduler` and two `dask worker`, one of them with a GPU to offer; those that died are started again.

    tls: flags of both that name the files of TLS.
    """

    def __init__(self, folder: Path, *tls: str) -> None:
        self.file, self.tls = folder / "scheduler.json", tls
        self.log = (folder / "cluster.log").open("wb")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        if not self.alive("scheduler"):
            self.file.unlink(missing_ok=True)
            for worker in [name for name in self.processes if name != "scheduler"]:
                self.kill(worker)  # they belong to the scheduler that is gone
            protocol = ("--protocol", "tls") if self.tls else ()
            self._dask("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *protocol)
        for name, resources in (("gpu", "GPU=1"), ("cpu", "CPU=2")):
            if not self.alive(name):
                flags = ("--nthreads", "2", "--no-nanny", "--no-dashboard", "--resources", resources)
                self._dask(name, "worker", *flags)

    def _dask(self, name: str, kind: str, *flags: str) -> None:
        while kind == "worker" and not self.file.exists():
            time.sleep(0.05)
        command = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self.file), *flags, *self.tls]
        environment = {**os.environ, "PYTHONPATH": PATHS, oracle.SECONDS: "0.1"}
        self.processes[name] = subprocess.Popen(
            command, env=environment, cwd=self.file.parent, stdout=self.log, stderr=self.log
        )

    def alive(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def stop(self) -> None:
        for name in self.processes:
            self.kill(name)
        self.log.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for seed in range(SLIDES):
        paint(folder / f"{seed}.png", seed)
    (folder / "list.csv").write_text("path\n" + "".join(f"{seed}.png\n" for seed in range(SLIDES)))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def undisturbed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("undisturbed")
    one = Execution(cluster=False, workers=1)
    rows = run([archive], out, chosen(block=1), one, mpp=0.25, say=lambda line: None, detect=oracle.detect)
    assert [row.status for row in rows] == ["done"] * SLIDES
    return results(out)


def results(out: Path) -> dict[str, dict[str, bytes]]:
    return {str(seed): files(out / str(seed)) for seed in range(SLIDES)}


COMMAND = """
import sys, oracle
try:
    oracle.command(*sys.argv[1:])
finally:
    print("loaded:", *{"torch", "torchvision", "timm", "scipy.ndimage"} & sys.modules.keys())
"""


def nightslide(archive: Path, out: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The command, in a process of its own. At its end it says which of the detector's libraries it has loaded."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(archive), "--out", str(out), *FLAGS, *flags],
        env={**os.environ, "PYTHONPATH": PATHS, **environment},
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    if process.stdout is None or process.stdout.closed:
        return process.returncode, ""
    said, _ = process.communicate(timeout=180)
    return process.returncode, said


def blocks_done(out: Path) -> set[str]:
    """Blocks whose instances are there, and slides that are done."""
    parts = {str(p.relative_to(out)) for p in out.glob("*/work/instances/*.parquet") if not p.name.startswith(".")}
    return parts | {str(p.relative_to(out)) for p in out.glob("*/slide.json")}


def test_ten_kills_in_a_row_change_nothing(
    archive: Path, undisturbed: dict[str, dict[str, bytes]], cluster: Cluster, tmp_path: Path
) -> None:
    """Law: kill -9 of a worker, the scheduler or the client, at any moment: the same command goes on at the block."""
    rng = random.Random(int(os.environ.get("NIGHTSLIDE_TEST_SEED", "0")))
    out = tmp_path / "out"
    victims = ["client", "gpu", "scheduler", *rng.choices(["client", "gpu", "cpu", "scheduler"], [3, 3, 3, 1], k=7)]
    client = nightslide(archive, out, "--scheduler-file", str(cluster.file))
    for victim in victims:
        before = blocks_done(out)
        deadline = time.monotonic() + 120
        while blocks_done(out) <= before:
            assert client.poll() is None, finish(client)
            assert time.monotonic() < deadline, (tmp_path / "cluster.log").read_text()[-5000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        before = blocks_done(out)
        assert client.poll() is None, finish(client)
        if victim == "client":
            client.kill()
        else:
            cluster.kill(victim)
        if victim == "scheduler":
            status, said = finish(client)
            assert (status, "the Dask scheduler is gone" in said) == (1, True), said
        cluster.start()
        if victim in ("client", "scheduler"):
            finish(client)
            client = nightslide(archive, out, "--scheduler-file", str(cluster.file))
        after = blocks_done(out)
        ended = {Path(name).parts[0] for name in after if name.endswith("slide.json")}
        lost = {name for name in before - after if Path(name).parts[0] not in ended}
        assert not lost, f"{victim} was killed, and {lost} were lost"
    status, said = finish(client)
    assert status == 0, said
    assert results(out) == undisturbed
    assert not list(out.glob("*/work")), "the work of finished slides stays"
    assert not list(out.glob("*/.lease*"))
    assert json.loads((out / "0" / "slide.json").read_text())["record"]["status"] == "done"


def test_a_scheduler_that_is_gone_is_noticed_soon(archive: Path, cluster: Cluster, tmp_path: Path) -> None:
    """A process that died; for a machine that was switched off, see the next test."""
    out = tmp_path / "out"
    client = nightslide(archive, out, "--scheduler-file", str(cluster.file))
    try:
        while not blocks_done(out):
            assert client.poll() is None, finish(client)
            time.sleep(0.02)
        cluster.kill("scheduler")
        said, _ = client.communicate(timeout=25)
    finally:
        client.kill()
        client.communicate()
    assert (client.returncode, "the Dask scheduler is gone" in said) == (1, True), said
    assert not list(out.glob("*/failure.json"))
    assert not list(out.glob("*/.lease*"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the option has another name")
def test_a_scheduler_whose_machine_is_silent_is_given_up_soon(cluster: Cluster) -> None:
    """It closes no connection itself: the kernel closes the connection after so many ms without an acknowledgement."""
    while not cluster.file.exists():
        time.sleep(0.05)
    with connect(Execution(scheduler_file=str(cluster.file))) as client:
        connection = client.scheduler_comm.comm.stream.socket
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 11_000


def test_a_scheduler_that_is_suspended_is_noticed_and_waited_for(
    archive: Path, undisturbed: dict[str, dict[str, bytes]], cluster: Cluster, tmp_path: Path
) -> None:
    """Its machine answers for it, so nothing else tells."""
    out = tmp_path / "out"
    client = nightslide(archive, out, "--scheduler-file", str(cluster.file))
    while not blocks_done(out):
        assert client.poll() is None, finish(client)
        time.sleep(0.05)
    scheduler = cluster.processes["scheduler"]
    scheduler.send_signal(signal.SIGSTOP)
    try:
        since = time.monotonic()
        while (log := next(out.glob("logs/*")).read_text()).count("does not answer") == log.count("answers again"):
            assert client.poll() is None, finish(client)
            assert time.monotonic() < since + 60
            time.sleep(0.05)
    finally:
        scheduler.send_signal(signal.SIGCONT)
    status, said = finish(client)
    assert status == 0, said
    assert results(out) == undisturbed


def test_a_cluster_of_this_machine_survives_its_workers(
    archive: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Law: the process that detects and the one beside it, both of which are killed, give the same bytes as a loop."""
    import psutil

    out = tmp_path / "out"
    environment = {oracle.SECONDS: "0.05"}
    client = nightslide(archive, out, "--workers", "1", "--memory-limit", "4GB", **environment)
    while not blocks_done(out):
        assert client.poll() is None, finish(client)
        time.sleep(0.05)
    workers = [p for p in psutil.Process(client.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    started_with = [{name: worker.environ().get(name) for name in ENVIRONMENT} for worker in workers]
    for worker in workers:
        worker.kill()
    status, said = finish(client)
    assert status == 0, said
    assert said.splitlines()[-1] == "loaded:", "the command does without what its workers compute with"
    assert started_with == [ENVIRONMENT, ENVIRONMENT], "glibc reads it when a process starts"
    assert results(out) == undisturbed


def test_two_runs_share_a_folder_and_a_dead_ones_slide_is_taken_over(
    archive: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Array jobs: no slide is done twice, and what a killed job held is done by the other one."""
    out = tmp_path / "out"
    code = "import sys, oracle; oracle.command(*sys.argv[1:])"
    flags = ["run", str(archive), "--out", str(out), *FLAGS, "--no-cluster", "--workers", "1", "--window", "1"]

    def job(seconds: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": PATHS, oracle.SECONDS: seconds}
        return subprocess.Popen(
            [sys.executable, "-c", code, *flags], env=environment, stdout=subprocess.PIPE, text=True
        )

    doomed, survivor = job("0.5"), job("0.01")
    while not list(out.glob("*/work/instances/*.parquet")) or not list(out.glob("*/slide.json")):
        assert doomed.poll() is None
        assert survivor.poll() is None, finish(survivor)
        time.sleep(0.02)
    doomed.kill()
    finish(doomed)
    status, said = finish(survivor)
    assert status == 0, said
    assert results(out) == undisturbed
    with (out / "ledger.csv").open() as file:
        assert [row["status"].startswith("done") for row in csv.DictReader(file)] == [True] * SLIDES
    assert not list(out.glob("*/.lease*"))


def test_a_run_listens_on_this_machine_only(archive: Path, tmp_path: Path) -> None:
    """Law: no port of the command, its scheduler, nannies and workers can be reached from the network."""
    import psutil

    out = tmp_path / "out"
    client = nightslide(archive, out, "--workers", "1", "--memory-limit", "4GB", **{oracle.SECONDS: "0.05"})
    seen: dict[int, set[str]] = {}  # addresses by process
    while client.poll() is None:
        for process in (psutil.Process(client.pid), *psutil.Process(client.pid).children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                listening = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                seen.setdefault(process.pid, set()).update(socket.laddr.ip for socket in listening)
        time.sleep(0.1)
    status, said = finish(client)
    assert status == 0, said
    assert sum(bool(addresses) for addresses in seen.values()) == 3, "the command with its nannies, and two workers"
    assert set().union(*seen.values()) == {"127.0.0.1"}


def test_a_cluster_with_tls_gives_the_same_bytes_and_lets_nobody_else_in(
    archive: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    ours = tls_flags(write_certificates(tmp_path / "ours", 365))
    cluster = Cluster(tmp_path, *ours)
    cluster.start()
    try:
        while not cluster.file.exists():
            assert cluster.alive("scheduler")
            time.sleep(0.05)
        address = json.loads(cluster.file.read_text())["address"]
        assert address.startswith("tls://127.0.0.1:")
        status, said = finish(nightslide(archive, tmp_path / "out", "--scheduler", address, *ours))
        assert status == 0, said
        assert results(tmp_path / "out") == undisturbed
        others = tls_flags(write_certificates(tmp_path / "others", 365))
        # Dask tries again and again to connect, within this time
        environment = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
        for flags, message in (
            (("--scheduler", address), "need --tls-ca-file, --tls-cert and --tls-key"),
            (("--scheduler", address.replace("tls", "tcp")), "is it started, and with TLS?"),
            (("--scheduler", address, *others), "are its certificates of the same authority as yours?"),
        ):
            status, said = finish(nightslide(archive, tmp_path / "refused", *flags, **environment))
            assert (status, "Traceback" in said) == (2, False), said
            assert message in said.splitlines()[-2], said
    finally:
        cluster.stop()


def tls_flags(files: Certificates) -> tuple[str, ...]:
    return ("--tls-ca-file", str(files.ca), "--tls-cert", str(files.cert), "--tls-key", str(files.key))
