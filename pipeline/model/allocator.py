"""glibc's allocator in processes whose networks compute on the CPU: what is freed is kept, in one arena.

glibc gets every large array from the kernel and gives it back when it is freed; the kernel clears its pages each time.
Threads that find no room in their own arena do so too, whatever the limits. So one arena is used, which shrinks in
`return_freed_memory` only.

PyTorch asks for arrays at multiples of 64 bytes. glibc takes one that is larger by up to 96 bytes and cuts off what
is too much. Before glibc 2.38 these cuttings go to a cache of each thread (tcache), so they are not joined to the
array again when it is freed: the next array of the same size does not fit there, and the heap grows. Without the cache
they are joined.

A worker on CMU-1-Small-Region.svs (`workflows/benchmarks/watch.py`, two cores of an AMD EPYC, glibc 2.36):

    one arena that is kept      detect 12.5 to 13.0 s, peak 2.0 to 2.3 GB
    and no cache: ENVIRONMENT   detect 11.8 to 12.4 s, peak 1.4 to 1.5 GB

The cache cannot be turned off in a process that runs, so `keep_freed_memory` does the first of these. Other C libraries
are left alone.
"""

import ctypes
import functools
import os

import psutil

# Read when the first layer is computed: layers that oneDNN, and PyTorch's use of it, keep prepared.
_PREPARED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
_NO_CACHE = "glibc.malloc.tcache_count=0"
_KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}

ENVIRONMENT = {
    **_KEEP,
    "GLIBC_TUNABLES": _NO_CACHE,
    **_PREPARED,  # see `keep_few_prepared_layers`
}
"Variables to start a process with that detects: threads that are there before `keep_freed_memory` have arenas already."

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Set up the allocator of this process so, as early as can be. Returns whether it was done.

    It is not where the user's environment sets one of its variables itself.
    """
    library = _glibc()
    if library is None or _KEEP.keys() & os.environ.keys():
        return False
    return all(library.mallopt(*option) for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)))


def keep_few_prepared_layers() -> None:
    """For a process that detects: have 128 layers kept prepared, in place of 1024.

    These are many small arrays for every size of image, where each was made, between large ones: in the second cache 2
    to 10 MB for each size of patches. A detector has about a hundred layers. A training step has 300, and would prepare
    all of them again each time.
    """
    for name, number in _PREPARED.items():
        os.environ.setdefault(name, number)


def return_freed_memory(above_bytes: float = 0.0) -> None:
    """Give back the pages that are free, if more are resident than this: to be called after each patch.

    Patches of different sizes leave gaps between arrays, so a process grows. What is needed again the kernel clears, so
    the default, for 0, is a little above what a process has at first: 1.6 GB with ENVIRONMENT. With 1.4 GB detection
    in CMU-1-Small-Region.svs takes 14 s in place of 12.
    """
    above_bytes = above_bytes or (1.6e9 if _NO_CACHE in os.environ.get("GLIBC_TUNABLES", "") else 2.5e9)
    library = _glibc()
    if library is not None and psutil.Process().memory_info().rss > above_bytes:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process; None where it is another one."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
