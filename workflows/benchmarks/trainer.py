"""Where the time of a training step goes: crops per second, and seconds of each part, forward and backward.

    python workflows/benchmarks/trainer.py --data DIR --mpp 0.25 [--data DIR --mpp 0.25 ...] [--steps 20] [--threads 2]

Seconds are those of the clock, and those of the processor over all threads, which other processes change less; on one
thread they are the steadiest. To compare two versions, run it by turns in the folder of either: the crops are the same.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as `nightslide train` does, before torch loads

import torch
from torch import nn

from pipeline.config import Architecture
from pipeline.model import detector
from slides.errors import NightslideError
from training import fit
from training.config import Training
from training.data.datasets import read_datasets

MODULES = (
    *("backbone", "pyramid", "semantic", "rpn.head", "roi_heads.box_roi_pool", "roi_heads.box_head"),
    *("roi_heads.box_predictor", "roi_heads.mask_roi_pool", "roi_heads.mask_head", "roi_heads.mask_predictor"),
)
FUNCTIONS = ("proposal_losses", "sample_proposals", "box_losses", "mask_loss", "suppress")


class Clock:
    """Seconds by part: what passes between two switches belongs to the part that was switched to."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # on the clock, of the processor
        self.part, self.since = "other", (time.perf_counter(), time.process_time())

    def switch(self, part: str) -> str:
        """Returns the part before."""
        now, before = (time.perf_counter(), time.process_time()), self.part
        for i in (0, 1):
            self.seconds[before][i] += now[i] - self.since[i]
        self.part, self.since = part, now
        return before

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time measured, and that of the backward pass from its result on."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(part)
            result = function(*args, **kwargs)
            for tensor in _tensors(result):
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: self.switch(f"{part}, backward") and None)
            self.switch(before)
            return result

        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--mpp", type=float, action="append", default=[])
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the step (%(default)s)")
    parser.add_argument("--loaders", type=int, default=1, help="processes that prepare crops (%(default)s)")
    parser.add_argument("--init", default="nuclei", help="weights to start from (%(default)s)")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    training = Training(init=given.init, device=given.device, loaders=given.loaders)
    datasets = read_datasets(given.data, (), tuple(given.mpp))
    measure(datasets, training, given.steps)


def measure(datasets: Any, training: Training, steps: int) -> None:
    process = fit._this_process(training)
    model = fit.initial_model(training.init, Architecture()).to(process.device).to(memory_format=torch.channels_last)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(fit._parameter_groups(model, training.decay), lr=1e-5, fused=True)
    wrapped, clock = fit._wrapped(model, process), Clock()
    crops = fit._crops(datasets, training, model.architecture, print)
    loader = fit._loader(crops, 0, training, process)
    instrument(model, optimiser, clock)
    batches = iter(loader)
    for number in itertools.count():
        if number == 3:  # memory is there and kernels are chosen
            clock.switch("other")
            clock.seconds.clear()
            started = time.perf_counter()
        if number == 3 + steps:
            break
        before = clock.switch("waiting for the loader")
        batch = next(batches)
        clock.switch(before)
        torch.manual_seed(number)
        fit._optimise(wrapped, optimiser, batch, process.device)
        clock.switch("average")
        fit._update_average(average, model, training.average)
        clock.switch("other")
    passed = time.perf_counter() - started
    table(clock, steps)
    print(
        f"{steps * training.batch / passed:.2f} crops/s, {torch.get_num_threads()} threads, {training.loaders} loaders"
    )
    started = time.process_time()
    for number in range(32):
        loader.dataset[number]
    print(f"{1000 * (time.process_time() - started) / 32:.1f} ms of a processor to prepare a crop")


def instrument(model: nn.Module, optimiser: torch.optim.Optimizer, clock: Clock) -> None:
    for name in MODULES:
        module: Any = model.get_submodule(name)
        module.forward = clock.around(name, module.forward)
    for name in FUNCTIONS:
        if hasattr(detector, name):
            setattr(detector, name, clock.around(name, getattr(detector, name)))
    step: Any = optimiser
    step.step = clock.around("optimiser", optimiser.step)
    norm = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = clock.around("norm of the gradients", norm)


def table(clock: Clock, steps: int) -> None:
    whole = sum(cpu for _, cpu in clock.seconds.values())
    print(f"{'part':40}{'s/step':>10}{'CPU s/step':>12}{'of the CPU':>12}")
    for part, (wall, cpu) in sorted(clock.seconds.items(), key=lambda item: -item[1][1]):
        print(f"{part:40}{wall / steps:10.4f}{cpu / steps:12.4f}{cpu / whole:12.1%}")
    print(f"{'all':40}{sum(wall for wall, _ in clock.seconds.values()) / steps:10.4f}{whole / steps:12.4f}{1:12.1%}")


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return _tensors(list(result.values()))
    return [t for part in result for t in _tensors(part)] if isinstance(result, (list, tuple)) else []


if __name__ == "__main__":
    try:
        main()
    except NightslideError as error:
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(2)
