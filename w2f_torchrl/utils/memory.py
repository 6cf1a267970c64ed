"""Settings of the C library's allocator for arrays that recur at every update."""

from __future__ import annotations

import ctypes
import platform

# Options of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_LARGEST_BEFORE_2_35 = 32 * 2**20


def keep_freed_memory() -> bool:
    """Make the process keep the memory that it frees, instead of returning it at once.

    An update on a CPU frees and allocates the same arrays of many megabytes every time. By default
    glibc maps and unmaps each of them, and the kernel clears every page again. The process's peak
    memory does not change; it is only not returned in between.

    Returns:
        Whether it took effect: only on Linux with glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    from_heap = any(
        mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_LARGEST, _LARGEST_BEFORE_2_35)
    )
    return from_heap and mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
