"""`nightslide doctor`: versions, devices, weights, conflicts with other packages, and a test of the detector."""

import os
import platform
from collections.abc import Callable
from importlib import metadata

import openslide
import torch

from pipeline.archive.manifest import versions
from pipeline.config import Detector, Stain
from pipeline.errors import WeightsError
from pipeline.model import dcgmm, load
from pipeline.model.detector import load_weights
from pipeline.model.device import kernels_problem
from pipeline.model.weights import content_sha256, find_weights, licence, shipped
from pipeline.text import one_line


def check_up(say: Callable[[str], None] = print) -> int:
    """Run the checks, and report them in a line each. Returns the exit status: 0 if there is no problem, else 1."""
    for name, version in versions().items():
        say(f"{name} {version}")
    say(
        f"OpenSlide library {openslide.__library_version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        say(f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
        if slower := kernels_problem(torch.device("cuda", index)):
            say(f"cuda:{index} detects more slowly than it could, without kernels of Triton: {slower}")
    if not torch.cuda.is_available():
        say("no CUDA device: the detector runs on the CPU")
    problems = [*_conflicts(), *_damaged_weights(say), *_smoke_test(say)]
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("no problems found" if not problems else f"problems found: {len(problems)}")
    return int(bool(problems))


def _conflicts() -> list[str]:
    """Other distributions that provide a package with the name of one of ours."""
    owners = metadata.packages_distributions()
    problems = []
    for package in ("slides", "pipeline", "training"):
        others = set(owners.get(package, [])) - {"nightslide"}
        if others:
            problems.append(
                f"{', '.join(sorted(others))} also provides a package '{package}': install nightslide in an "
                f"environment of its own"
            )
    return problems


def _damaged_weights(say: Callable[[str], None]) -> list[str]:
    """Load all shipped weights, and report each. Returns what is wrong with them."""
    problems = []
    for name in shipped():
        path = find_weights(name)
        try:
            (dcgmm.load if name == Stain().weights else load_weights)(path)
            say(f"weights {name}: {content_sha256(path)[:16]} {licence(path)}")
        except WeightsError as error:
            problems.append(f"{one_line(error)}; or install nightslide anew")
    return problems


def _smoke_test(say: Callable[[str], None]) -> list[str]:
    """Run the detector on an empty image, and report the device. Returns the problems, if any."""
    try:
        running = load.detector(Detector())
        with torch.inference_mode(), running.autocast():
            features = running.model.features(torch.zeros(1, 3, 64, 64, device=running.device))
    except Exception as error:  # any error means a problem with torch on this machine
        return [f"the detector does not run: {one_line(error)}"]
    say(f"smoke test: the detector runs on {running.device} in {str(running.precision).removeprefix('torch.')}")
    if not torch.isfinite(features.table.pixels).all():
        return ["the detector computes values that are not finite: reinstall torch, or choose --detector.device cpu"]
    return []
