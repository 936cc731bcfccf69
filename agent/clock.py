"""The host's clocks: the one place that reads them, so that tests can give other ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from agent.errors import AgentError
from agent.model import Now

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def read() -> Now:
    """Return boot time and wall time as they are now, in seconds."""
    return Now(time.clock_gettime(time.CLOCK_BOOTTIME), time.clock_gettime(time.CLOCK_REALTIME))


def monotonic() -> float:
    """Return CLOCK_MONOTONIC in seconds: boot time less the time spent suspended."""
    return time.monotonic()


def boot_id() -> str:
    """Return the kernel's name for this boot: boot times of another one mean nothing here.

    Raises AgentError if /proc does not give it.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as error:
        raise AgentError(f"{_BOOT_ID} can't be read: {error.strerror}", "the agent needs /proc") from None
