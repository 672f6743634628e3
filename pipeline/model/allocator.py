"""glibc's allocator in processes whose networks compute on the CPU: what is freed is kept, in one arena.

glibc gets every large array from the kernel and gives it back when it is freed; the kernel clears its pages each time.
Threads that find no room in their own arena do so too, whatever the limits. So one arena is used, and it never shrinks:
the process stays at the size of its peak. CMU-1-Small-Region.svs with `--no-cluster` on two cores of an AMD EPYC:

    glibc's own choice    detect 26 s, 16 s in the kernel, peak 2.2 GB
    ENVIRONMENT           detect 16 s, 1 s in the kernel, peak 2.0 GB

Other C libraries are left alone.
"""

import ctypes
import functools
import os

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
"Variables to start such a process with: threads that are there before `keep_freed_memory` have arenas already."

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Do the same for this process, as early as can be. Returns whether it was done.

    It is not where the user's environment sets one of the variables itself.
    """
    if ENVIRONMENT.keys() & os.environ.keys() or os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(*option) for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)))
