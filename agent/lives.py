"""How the agent's former process ended, and how often each kind of end was seen: for the metrics.

A process that is told to stop leaves a mark in the journal; one that was killed, hung or lost its host
can't. The service manager may know more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class After(StrEnum):
    """What came before a start."""

    FIRST = "first"
    """Nothing: the journal is new."""
    STOP = "stop"
    """The agent was told to stop, and did."""
    CRASH = "crash"
    """It ended without being told to, or did not end in time."""
    WATCHDOG = "watchdog"
    """It hung, and the service manager killed it."""
    OOM = "oom"
    """The kernel killed it for want of memory."""
    REBOOT = "reboot"
    """The host went down without stopping it."""


_RESULTS: Final = {"success": After.STOP, "watchdog": After.WATCHDOG, "oom-kill": After.OOM}
"""Of systemd's $SERVICE_RESULT (systemd.exec(5)); any other one is a crash."""


@dataclass(frozen=True, slots=True)
class Lives:
    """What the journal keeps: the boot of the last process, whether it was stopped, all starts so far."""

    boot_id: str
    stopped: bool
    starts: Mapping[str, int]


def begin(former: Lives | None, boot_id: str, service_result: str = "") -> tuple[After, Lives]:
    """Return what this start comes after, and what the journal is to keep from now on.

    ``service_result`` is what the service manager says of the last process, empty if it says nothing.
    """
    after = _judge(former, boot_id, service_result)
    starts = {} if former is None else dict(former.starts)
    starts[after.value] = starts.get(after.value, 0) + 1
    return after, Lives(boot_id, stopped=False, starts=starts)


def _judge(former: Lives | None, boot_id: str, service_result: str) -> After:
    if former is None:
        return After.FIRST
    if former.stopped:
        return After.STOP
    if former.boot_id != boot_id:
        return After.REBOOT
    return _RESULTS.get(service_result, After.CRASH)
