"""What the guard does, as coroutines that are run inside the gateway's namespace of a new ``Stand``."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from agent.guard import Admission, GuardContents, compare
from agent.model import PublicKey
from tests.firewall.stand import Stand
from tests.support.netns import Pinger

Behaviour = Callable[[Stand], Coroutine[Any, Any, None]]
LONG = 600.0
LATE = 0.5
"""Seconds after a deadline within which the last reply may be read, on a machine that stalls."""


class Behaviours(list[Behaviour]):
    """Those of one module, in their order."""

    def add(self, check: Behaviour) -> Behaviour:
        self.append(check)
        return check


async def quiet(ping: Pinger, within: float = 10.0) -> float:
    return await asyncio.to_thread(ping.wait_silence, 0.5, within)


async def reply(ping: Pinger) -> float:
    return await asyncio.to_thread(ping.wait_reply)


def differences(wanted: dict[PublicKey, Admission], contents: GuardContents | None) -> list[str]:
    """What has drifted but for the time that the test itself took, which under emulation is seconds."""
    drift = compare(wanted, contents, lease_demanded=True).drift
    return [detail for _, detail in drift if "than its session lives" not in detail]
