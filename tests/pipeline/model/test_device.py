"""The device that computes, and its precision."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from pipeline.config import Detector
from pipeline.errors import ConfigError, DeviceLost
from pipeline.model import device
from pipeline.model.device import choose_device, choose_precision, count_gpus, device_kind


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="need cpu, cuda, cuda:N or auto"):
        choose_device("gpu!")
    with pytest.raises(ConfigError, match="CUDA devices"):
        choose_device("cuda:99")


def test_what_a_name_means_depends_on_the_gpus_that_there_are() -> None:
    names = ("cpu", "auto", "cuda", "cuda:0", "cuda:1")
    assert [device_kind(name, 2) for name in names] == ["cpu", *["cuda"] * 4]
    assert [device_kind(name, 0) for name in names[:2]] == ["cpu", "cpu"]
    for name in names[2:]:
        with pytest.raises(ConfigError, match=f"device='{name}': this machine shows 0 CUDA devices; use cpu or auto"):
            device_kind(name, 0)


def test_gpus_are_counted_by_torch_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one torch is not asked, and so not loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for driver, count in ((True, 3), (False, 0)):
        monkeypatch.setattr(device, "has_gpu_driver", lambda driver=driver: driver)
        assert count_gpus() == count


def test_a_gpu_without_our_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is slower, and gives other last bits: in the ledger, and in the warning where some devices have them."""
    monkeypatch.setattr(device, "choose_device", lambda name: torch.device(name))
    for problem, said in ((None, "cuda float32"), ("no C compiler", "cuda float32 without Triton")):
        monkeypatch.setattr(device, "kernels_problem", lambda _, problem=problem: problem)
        assert device.computes_on(Detector(device="cuda", precision="float32")) == said
        assert device.computes_on(Detector(device="cpu", precision="bfloat16")) == "cpu bfloat16"


def test_one_computes_at_a_time_and_on_a_gpu_always_the_same_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which what PyTorch keeps by thread is found again."""
    inside, most = [0], [0]

    def function() -> str:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return threading.current_thread().name

    for gpus, names in ((0, {f"asks_{n}" for n in range(4)}), (1, {"gpu_0"})):
        monkeypatch.setattr(device, "count_gpus", lambda gpus=gpus: gpus)
        waiting = threading.Barrier(4)

        def ask(_: int, waiting: threading.Barrier = waiting) -> str:
            waiting.wait()
            return device.compute("auto", function)

        with ThreadPoolExecutor(4, "asks") as pool:
            assert set(pool.map(ask, range(4))) == names
    assert most == [1]
    with pytest.raises(ZeroDivisionError):
        device.compute("auto", lambda: 1 // 0)


def test_bfloat16_is_chosen_where_the_chosen_device_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs: the first emulates bfloat16, the second computes in it, the third does neither."""
    current = [0]

    @contextmanager
    def of_device(chosen: torch.device) -> Iterator[None]:
        before, current[0] = current[0], chosen.index or 0
        yield
        current[0] = before

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return current[0] == 1 or (including_emulation and current[0] == 0)

    monkeypatch.setattr(torch.cuda, "device", of_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    chosen = [choose_precision("auto", torch.device("cuda", index)) for index in range(3)]
    assert chosen == [torch.float32, torch.bfloat16, torch.float32]
    assert choose_precision("bfloat16", torch.device("cuda", 0)) == torch.bfloat16
    assert choose_precision("float32", torch.device("cuda", 1)) == torch.float32


@pytest.mark.parametrize("lost", [False, True])
def test_a_gpu_that_has_failed_is_told_from_a_task_that_has(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """After an illegal access, or an error of its memory, CUDA refuses all that the process asks for."""

    def synchronize(asked: torch.device) -> None:
        assert asked.type == "cuda"
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    def fails() -> None:
        raise RuntimeError("of the task")

    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    monkeypatch.setattr(device, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    expected = (
        r"the GPU cuda has failed \(CUDA error: an illegal memory access was encountered\): look" if lost else "of the"
    )
    with pytest.raises(DeviceLost if lost else RuntimeError, match=expected):
        device.compute("cuda", fails)
    assert device.compute("cuda", lambda: 3) == 3
