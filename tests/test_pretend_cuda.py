"""The stand-in for a CUDA device can fail: it refuses what CUDA refuses, and counts uploads."""

import pytest
import torch

from pretend_cuda import BLOCKING, DOWNLOAD, LAUNCH, UPLOAD, WAIT, MixedDevices, PretendedCuda


def test_tensors_of_two_devices_are_refused() -> None:
    host = torch.ones(2, 3, 4, 4)
    with PretendedCuda():
        images = host.to("cuda:0")
        assert images.device == torch.device("cuda", 0)
        for mix in (
            lambda: images + host,
            lambda: images.add_(host),
            lambda: torch.nn.functional.conv2d(images, torch.ones(1, 3, 1, 1)),
            lambda: torch.einsum("bchw,kc->bkhw", images, torch.ones(2, 3)),
            lambda: torch.cat([images, host]),
        ):
            with pytest.raises(MixedDevices):
                mix()
        assert torch.equal((images * torch.tensor(2.0) + 1).cpu(), host * 2 + 1)  # a scalar may come from the host


def test_results_stay_on_the_device_until_they_are_copied() -> None:
    with PretendedCuda() as cuda:
        zeros = torch.zeros(3, device="cuda")
        zeros += 1
        moved = torch.nn.Linear(3, 2).to("cuda")(zeros)
        assert {t.device.type for t in (zeros, moved, moved.sum(), moved[:1])} == {"cuda"}
        assert moved.cpu().device.type == zeros.to("cpu").device.type == "cpu"
        assert sorted(cuda.uploads) == [(2,), (2, 3)]
    assert not torch.cuda.is_available()


def test_what_makes_the_host_wait_is_counted_by_kind_and_line() -> None:
    with PretendedCuda() as cuda:
        pinned = torch.empty(5, pin_memory=True).fill_(1)[:4].to("cuda", non_blocking=True)
        pageable = torch.ones(4).to("cuda")
        numbers = torch.tensor([1.0, 2.0], device="cuda")
        assert cuda.total(LAUNCH) == 0
        both = pinned + pageable
        assert both.view(2, 2).T.shape == (2, 2)  # no kernel
        assert (cuda.total(LAUNCH), cuda.total(WAIT), cuda.total(DOWNLOAD)) == (1, 0, 0)
        assert both[both > 1].sum() > 1
        assert numbers.tolist() == [1, 2]
    assert (cuda.total(UPLOAD), cuda.total(BLOCKING), cuda.total(DOWNLOAD)) == (1, 2, 1)
    assert cuda.total(WAIT) == 2  # how many exceed 1; whether the sum does
    assert "pageable = torch.ones(4)" in cuda.table(BLOCKING)
    with PretendedCuda(largest=100), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(26, device="cuda")
