"""How the process deals with memory: what is given back, and how often it is searched for garbage."""

from __future__ import annotations

import ctypes
import gc
from typing import Final

# glibc's <malloc.h>. The thresholds, once set, no longer grow with the largest block that was ever freed.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_THRESHOLD: Final = 512 * 1024
"""More than what is received at a time: for each the system would be asked for pages and given them back, at
the price of half a look (``stats_tick_10k``, ``resync_50k``)."""
_OBJECTS: Final = 20_000
"""New objects between two searches."""


def return_freed_memory() -> bool:
    """Use one heap for all threads, and return what is freed at its end, and large blocks, to the system.

    A large list takes much that nobody needs until the next one (``rss_100k``).
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


def collect_rarely() -> None:
    """Search for cycles less often, and not among what there is by now: modules, which stay.

    Reading a list makes objects by the hundred thousand and no cycle (``cold_sync_10k``).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS)
