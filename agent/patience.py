"""Waiting for what may be slow, while somebody sees to what can't wait for it (rule 8).

The journal's disk, nftables and rtnetlink answer within milliseconds, as a rule. Where one does not, the
step that waits for it must not hold up a deadline or a revocation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from agent import clock

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

LOOK_UP: Final = 0.25
"""Seconds that something may take before somebody sees to what can't wait for it."""
SLOW: Final = 1.0
"""Seconds from which on the log tells what was waited for."""


async def _nothing() -> None:
    """Nothing that can't wait."""


class Patience:
    """Whoever waits here for something slow has ``meanwhile`` awaited again and again.

    ``meanwhile`` may move the state and take peers off the interface: who has waited looks anew at what
    both hold. That is for one task only.
    """

    def __init__(self, meanwhile: Callable[[], Awaitable[None]] = _nothing) -> None:
        self._meanwhile = meanwhile

    async def wait_for(self, what: str, work: Awaitable[_T], at_most: float = math.inf) -> _T:
        """Return what ``work`` returns, or raise what it raises.

        Raises TimeoutError once ``at_most`` seconds are up; ``work`` then goes on. ``what`` is for the log.
        """
        future = asyncio.ensure_future(work)
        began = clock.monotonic()
        try:
            while True:
                left = max(0.0, began + at_most - clock.monotonic())
                done, _ = await asyncio.wait((future,), timeout=min(left, LOOK_UP))
                if done:
                    return future.result()
                if not left:
                    break
                await self._meanwhile()
        except BaseException:
            future.cancel()
            raise
        finally:
            note(what, clock.monotonic() - began)
        raise TimeoutError(what)


def note(what: str, seconds: float) -> None:
    """Something took so long: logged if that was long enough for an operator to wonder."""
    if seconds >= SLOW:
        _log.warning("slow", what=what, seconds=round(seconds, 2))
