"""Keeping freed memory in the process, where tensors are made and dropped all the time."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h; mallopt(3) documents them.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more (half of its HEAP_MAX_SIZE)
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks rather than to give them back to the system; whether it could.

    By default a freed block of some megabytes goes back, and the next one of its size is new: the system clears each
    page again. A training step on a CPU makes hundreds of such blocks. The process keeps its largest size until it
    ends, so call this in processes that only train or serve. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
