"""What is installed, which devices there are, what is in the way, and whether the detector computes."""

import os
import platform
from collections.abc import Callable
from importlib import metadata

import openslide
import torch

from pipeline.archive.manifest import VERSIONED
from pipeline.config import Detector
from pipeline.model import load
from pipeline.model.weights import file_sha256, find_weights, licence, shipped


def check_up(say: Callable[[str], None] = print) -> int:
    """Versions, devices, name conflicts, weights, and a smoke test. Returns 0 where all is well, else 1."""
    problems = []
    for name in VERSIONED:
        say(f"{name} {metadata.version(name)}")
    say(
        f"OpenSlide library {openslide.__library_version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        say(f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        say("no CUDA device: the detector runs on the CPU")
    owners = metadata.packages_distributions()
    for package in ("slides", "pipeline", "training"):
        others = set(owners.get(package, [])) - {"nightslide"}
        if others:
            problems.append(
                f"{', '.join(sorted(others))} also provides a package '{package}': use an environment of its own"
            )
    for name in shipped():
        say(f"weights {name}: {file_sha256(find_weights(name))[:16]} {licence(find_weights(name))}")
    try:
        running = load.detector(Detector())
        with torch.inference_mode():
            features = running.model.features(torch.zeros(1, 3, 64, 64, device=running.device))
        say(f"smoke test: the detector computes on {running.device} in {str(running.precision).removeprefix('torch.')}")
        if not all(torch.isfinite(value).all() for value in features.values()):
            problems.append(
                "the detector gives values that are not finite: reinstall torch, or choose --detector.device cpu"
            )
    except Exception as error:
        problems.append(f"the detector does not run: {error}")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("all is well" if not problems else f"{len(problems)} problems")
    return int(bool(problems))
