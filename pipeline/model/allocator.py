"""The C library's allocator in a process whose networks compute on the CPU."""

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next layer. Returns whether it does.

    glibc gets every large array from the kernel and gives it back when it is freed; the kernel clears its pages each
    time, which takes a quarter of the detector's processing time. The process then stays at the size of its peak.
    Other C libraries are left alone, and so is glibc where the user's environment sets one of these two itself.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys() or os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
