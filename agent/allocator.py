"""Has the C library give back what a large list took, and nobody needs until the next (``rss_100k``)."""

from __future__ import annotations

import ctypes
from typing import Final

# glibc's <malloc.h>. The thresholds, once set, no longer grow with the largest block that was ever freed.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_THRESHOLD: Final = 64 * 1024


def return_freed_memory() -> bool:
    """Use one heap for all threads, and return what is freed at its end, and large blocks, to the system.

    Return whether the C library lets itself be told so; others than glibc do without, or need not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_TRIM_THRESHOLD, _THRESHOLD),
        (_M_MMAP_THRESHOLD, _THRESHOLD),
    )
    taken = [mallopt(parameter, value) for parameter, value in settings]
    return all(taken)
