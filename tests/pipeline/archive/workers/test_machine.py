"""The worker processes fit the machine."""

import pytest

from pipeline.archive.workers import machine
from pipeline.archive.workers.machine import usable_gpus, worker_specs
from pipeline.config import Execution
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "threads", "offers", "of_the_detector"),
    [
        (0, 2, [], [2, 2], [{"GPU": 1}, {"CPU": 2}], 2),
        (0, 1, [], [2, 1], [{"GPU": 1}, {"CPU": 1}], 1),
        (0, 16, [], [2, 2, 4, 4], [{"GPU": 1}] * 2 + [{"CPU": 4}] * 2, 8),
        (3, 4, [], [2, 1, 1, 1], [{"GPU": 1}] + [{"CPU": 1}] * 3, 4),
        (0, 16, ["0"], [2] + [1] * 15, [{"GPU": 1}] + [{"CPU": 1}] * 15, 1),
        (3, 16, ["0"], [2] + [1] * 3, [{"GPU": 1}] + [{"CPU": 1}] * 3, 1),
        (0, 4, ["0", "1"], [2, 2, 1, 1], [{"GPU": 1}] * 2 + [{"CPU": 1}] * 2, 1),
        (1, 1, ["5"], [2, 1], [{"GPU": 1}, {"CPU": 1}], 1),
    ],
)
def test_machines_are_sized(
    workers: int,
    cores: int,
    gpus: list[str],
    threads: list[int],
    offers: list[dict[str, float]],
    of_the_detector: int,
) -> None:
    """of_the_detector: threads of its arithmetic; on a GPU it needs none, and one for each task beside it is enough.

    Without GPUs to use, as with --gpus 0, a process that detects sees none.
    """
    chosen = worker_specs(workers, cores, gpus)
    assert [s.threads for s in chosen] == threads
    assert [s.resources for s in chosen] == offers
    detecting = [s.environment for s in chosen if s.resources == {"GPU": 1}]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in detecting] == (gpus or [""] * len(detecting))
    assert {e["OMP_NUM_THREADS"] for e in detecting} == {str(of_the_detector)}
    beside = [s.environment for s in chosen if "CPU" in s.resources]
    assert all(e == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} for e in beside)


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


def has_gpus(monkeypatch: pytest.MonkeyPatch, count: int | None, visible: str | None) -> None:
    """Pretend that this machine has so many GPUs, which CUDA_VISIBLE_DEVICES names; None: no driver, not set."""

    def counted(apart: bool) -> int:
        assert count is not None, "torch is loaded for nothing"
        return count

    monkeypatch.setattr(machine, "has_gpu_driver", lambda: count is not None)
    monkeypatch.setattr(machine, "_count_gpus", counted)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "gpus", "device", "used"),
    [
        (2, None, -1, "auto", ["0", "1"]),
        (2, "3,5", -1, "auto", ["3", "5"]),
        (2, "GPU-a,MIG-b", -1, "cuda", ["GPU-a", "MIG-b"]),
        (2, "3,5", 1, "auto", ["3"]),
        (2, None, 2, "auto", ["0", "1"]),
        (2, None, 0, "auto", []),
        (2, None, -1, "cpu", []),
        (2, None, -1, "cuda:1", ["0,1"]),
        (2, "3,5", -1, "cuda:1", ["3,5"]),
        (0, "", -1, "auto", []),
        (0, None, -1, "auto", []),
        (None, None, -1, "auto", []),
        (None, "3", -1, "cpu", []),
    ],
)
def test_a_process_for_each_gpu_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, count: int | None, visible: str | None, gpus: int, device: str, used: list[str]
) -> None:
    """Of one that is named by its number, `cuda:1`, the process sees all of them."""
    has_gpus(monkeypatch, count, visible)
    assert usable_gpus(Execution(gpus=gpus), device) == used


@pytest.mark.parametrize(
    ("count", "gpus", "device", "message"),
    [
        (1, 2, "auto", "gpus=2: this machine has 1 to use with --detector.device auto"),
        (1, 1, "cpu", "gpus=1: this machine has 0 to use with --detector.device cpu"),
        (0, -1, "cuda", "device='cuda': this machine shows 0 CUDA devices"),
        (None, -1, "cuda", "device='cuda': this machine shows 0 CUDA devices"),
        (1, -1, "cuda:1", "device='cuda:1': this machine shows 1 CUDA devices"),
        (2, 0, "cuda", "gpus=0, but with --detector.device cuda one is used: need --detector.device cpu"),
        (2, 0, "cuda:1", "gpus=0, but with --detector.device cuda:1 one is used: need --detector.device cpu"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int | None, gpus: int, device: str, message: str
) -> None:
    has_gpus(monkeypatch, count, None)
    with pytest.raises(ConfigError, match=message):
        usable_gpus(Execution(gpus=gpus), device)


def test_without_worker_processes_no_gpu_is_a_matter_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this process sees the GPUs, whatever --gpus says."""
    has_gpus(monkeypatch, 1, None)
    with pytest.raises(ConfigError, match="gpus=0, but with --detector\\.device auto"):
        usable_gpus(Execution(gpus=0, cluster=False), "auto")
    assert usable_gpus(Execution(gpus=0, cluster=False), "cpu") == []
    assert usable_gpus(Execution(cluster=False), "auto") == ["0"]
