"""The device that computes, and its precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.device import choose_device, choose_precision


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="need cpu, cuda, cuda:N or auto"):
        choose_device("gpu!")
    with pytest.raises(ConfigError, match="CUDA devices"):
        choose_device("cuda:99")


def test_bfloat16_is_chosen_where_the_chosen_device_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs: the first emulates bfloat16, the second computes in it, the third does neither."""
    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        before, current[0] = current[0], chosen.index or 0
        yield
        current[0] = before

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return current[0] == 1 or (including_emulation and current[0] == 0)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    chosen = [choose_precision("auto", torch.device("cuda", index)) for index in range(3)]
    assert chosen == [torch.float32, torch.bfloat16, torch.float32]
    assert choose_precision("bfloat16", torch.device("cuda", 0)) == torch.bfloat16
    assert choose_precision("float32", torch.device("cuda", 1)) == torch.float32
