"""The worker processes fit the machine."""

import pytest

from pipeline.archive.workers.machine import worker_specs


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
