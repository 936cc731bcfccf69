"""Who judges whether a session's client is still there, and for how long one has been silent.

One gateway of a location judges by itself. Of several, each sees only the clients that use it, so
core judges from what all of them report, and a gateway that does not report is no evidence: a session
that may be in use there is not judged until it does. Its counters are cumulative: a report tells of
all the time before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agent.sandbox.store import Store


@dataclass(frozen=True, slots=True)
class Witness:
    """What a gateway can say of its clients; times in Unix seconds.

    ``left``: when it was last away; ``back``: since when it is there again, None while it is not;
    ``settled``: the time of its last report but one, minus infinity if there were not two. What has grown
    is stamped with the report before, so the last report may still hold a later sign than it shows.
    """

    left: float
    back: float | None
    settled: float = -math.inf


def known_silence(last_sign: float, witnesses: Iterable[Witness], now: float, *, reports: bool) -> float:
    """Return for how many seconds a session is known to have been silent; below 0 if nobody can say.

    ``last_sign``: its last sign of life on any gateway, or its grant. A gateway that left before that,
    and is away, is not the one that the session is used on. ``reports``: the gateways report also when
    nothing has changed, as they do where core judges; one that is there and does not is no evidence then.
    Without that, those that are there are believed, once they have reported after an absence.
    """
    since, until = last_sign, now
    for witness in witnesses:
        if witness.back is None:
            if witness.left >= last_sign:
                until = min(until, witness.settled if reports else -math.inf)
        elif reports:
            until = min(until, witness.settled)
        elif witness.left >= last_sign and witness.settled < witness.back:
            since = max(since, witness.back)
    return until - since


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
