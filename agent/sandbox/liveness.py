"""Who judges whether a session's client is still there, and since when one has been silent.

One gateway of a location judges by itself. Of several, each sees only the clients that use it, so
core judges from what all of them report, and a gateway that can't report is no evidence: a session
that may be in use there is not judged until the gateway is back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent.sandbox.store import Store


@dataclass(frozen=True, slots=True)
class Absence:
    """When a gateway was last away, in Unix seconds; ``end`` is None while it still is."""

    start: float
    end: float | None


def silent_since(last_sign: float, absences: Iterable[Absence]) -> float:
    """Return since when a session has been silent (Unix seconds), infinity if nobody can say.

    ``last_sign``: its last sign of life on any gateway, or its grant. A gateway that left before that
    is not the one that the session is used on. One that left later could have seen signs of life
    that it has not told of, so silence counts from its return.
    """
    returns = (math.inf if a.end is None else a.end for a in absences if a.start >= last_sign)
    return max((last_sign, *returns))


def sent_policy(policy: dict[str, Any], *, shared: bool) -> dict[str, Any]:
    """Return a location's session policy as gateways get it; ``shared``: several serve the location."""
    return policy | {"liveness": "core"} if shared else policy


class Announced:
    """Which ``liveness`` the gateways of a location were last told of.

    How many gateways there are is configuration, so it changes only while core is down, without an
    event; the gateways that resume their streams have to hear of what follows from it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, location_id: int, liveness: str) -> None:
        """Note what a location's gateways are told, in the running transaction."""
        self._store.execute("INSERT OR REPLACE INTO announced VALUES (?, ?)", location_id, liveness)

    def differs(self, location_id: int, liveness: str) -> bool:
        """Return whether they were told otherwise; a location made by an older core had ``gateway``."""
        row = self._store.row("SELECT liveness FROM announced WHERE location_id = ?", location_id)
        return ("gateway" if row is None else row["liveness"]) != liveness
