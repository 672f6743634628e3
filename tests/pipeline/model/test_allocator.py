"""What was freed is used again without the kernel; a user's own choice stands."""

import os
import platform
import subprocess
import sys

import pytest

from pipeline.archive.workers import execution
from pipeline.model.allocator import ENVIRONMENT
from training import fit
from training.config import Training

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Prints the page faults of a second array of 200 MB, in a thread, after the first was freed.
FAULTS = """
import resource, threading
import numpy as np
{before}
faults = []
def fill():
    for _ in range(2):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(25_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(faults[1])
"""
KEEP = "from pipeline.model.allocator import keep_freed_memory\nprint(keep_freed_memory())"


def faults(before: str, environment: dict[str, str]) -> list[str]:
    code = FAULTS.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_second_large_array_needs_no_pages_of_the_kernel() -> None:
    """In this process or from its start; by itself glibc asks for all of them again."""
    assert int(faults("", {})[0]) > 100
    kept, count = faults(KEEP, {"PYTHONPATH": ":".join(sys.path)})
    assert (kept, int(count) < 100) == ("True", True)
    (count,) = faults("", ENVIRONMENT)
    assert int(count) < 100


# Prints the bytes of the heap after three arrays of 10 MB, aligned as PyTorch's are, were made and freed 30 times.
ALIGNED = """
import ctypes
libc = ctypes.CDLL(None)
class MallInfo(ctypes.Structure):
    _fields_ = [(f"field_{n}", ctypes.c_size_t) for n in range(10)]
libc.mallinfo2.restype = MallInfo
def aligned():
    place = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(10_000_000)) == 0
    return place
for _ in range(30):
    for place in [aligned() for _ in range(3)]:
        libc.free(place)
print(libc.mallinfo2().field_0)
"""


def test_aligned_arrays_find_the_place_of_those_before_them() -> None:
    """With the thread's cache on, glibc 2.36 takes 132 MB."""
    code = [sys.executable, "-c", ALIGNED]
    done = subprocess.run(code, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40e6


RETURNED = """
import numpy as np, psutil
from pipeline.model.allocator import keep_freed_memory, return_freed_memory
keep_freed_memory()
process = psutil.Process()
before = process.memory_info().rss
large = [np.ones(12_500_000), np.ones(1_000), np.ones(12_500_000), np.ones(1_000)]
del large[2], large[0]
free = process.memory_info().rss
return_freed_memory(above_bytes=1e12)
free = min(free, process.memory_info().rss)
return_freed_memory(above_bytes=1)
print(free - before, process.memory_info().rss - before)
"""


def test_pages_between_arrays_that_stay_are_returned() -> None:
    environment = {"PYTHONPATH": ":".join(sys.path)}
    code = [sys.executable, "-c", RETURNED]
    kept, returned = subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(kept) > 180e6
    assert int(returned) < 30e6


def test_the_users_own_choice_stands() -> None:
    kept, _ = faults(KEEP, {"PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "4"})
    assert kept == "False"


# Prints by how many kB what is allocated grows while a convolution is given its 201st to 400th size of image.
SIZES = """
import ctypes
import torch
import torch.nn.functional as F
libc = ctypes.CDLL(None)
class MallInfo(ctypes.Structure):
    _fields_ = [(f"field_{n}", ctypes.c_size_t) for n in range(10)]
libc.mallinfo2.restype = MallInfo
torch.set_num_threads(1)  # two would wait for each other most of the time
weight, used = torch.ones(64, 64, 3, 3), []
with torch.inference_mode():
    for side in range(10, 410):
        F.conv2d(torch.ones(1, 64, 8, side), weight, padding=1)
        used.append(libc.mallinfo2().field_7)
print((used[-1] - used[199]) // 1000)
"""


def test_what_is_prepared_for_sizes_of_images_is_bounded() -> None:
    """PyTorch's own bound is 1024: it is 4,700 kB then."""
    done = subprocess.run([sys.executable, "-c", SIZES], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500


def test_few_prepared_layers_are_kept_by_processes_that_detect_and_do_not_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each step of a training would prepare all again."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    for module in (execution, fit):
        monkeypatch.setattr(module, "keep_freed_memory", bool)  # it would hold for all tests of this process
    fit._this_process(Training(device="cpu"))
    assert variables == {}
    execution._use_this_process("cpu")
    assert variables == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
