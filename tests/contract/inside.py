"""Running coroutines inside a network namespace."""

import asyncio
import ctypes
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tests.support.netns import Namespace

T = TypeVar("T")
CLONE_NEWNET = 0x40000000


def inside(space: Namespace, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop of its own in a thread that is in the namespace, and so is what it starts."""
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(space.path,)) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _enter(path: Path) -> None:
    # os.setns is new in 3.12; only the calling thread changes.
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)
