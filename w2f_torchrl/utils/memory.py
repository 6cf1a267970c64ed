"""The C library's allocator, set for arrays that come back at every update."""

from __future__ import annotations

import ctypes
import platform

# Options of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_LARGEST_BEFORE_2_35 = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, instead of giving it back at once.

    An update on a CPU frees and asks for the same arrays of many megabytes every time. By default
    glibc maps and unmaps each of them, and the kernel clears every page anew. The
    process's peak stays what it is; it is not given back in between.

    Returns:
        Whether it took effect: on Linux with glibc only.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    from_heap = any(
        mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_LARGEST, _LARGEST_BEFORE_2_35)
    )
    return from_heap and mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
