"""What the operator is told and may ask for: over the agent's socket, and by its own series in /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from agent import __version__, clock, explanation, overview
from agent.events import AskPlan, End
from agent.metrics import Metrics
from agent.model import Now, PublicKey
from agent.reconciler import Reconciler
from agent.warden import Warden

_LAST_EVENTS: Final = 10
"""Occurrences of a peer that explaining it shows."""


class Desk:
    """The ``Operator`` of ``agent.ports``, before one reconciler and its warden if it has one.

    Made together with them, since the agent's age counts from then. ``read_clock`` is the host's clock.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        metrics: Metrics,
        warden: Warden | None = None,
        read_clock: Callable[[], Now] = clock.read,
    ) -> None:
        self._reconciler = reconciler
        self._state = reconciler.state
        self._keeper = reconciler.keeper
        self._books = reconciler.books
        self._audit = reconciler.audit
        self._inbox = reconciler.inbox
        self._mirror = reconciler.writer.mirror
        self._interface = reconciler.interface
        self._metrics = metrics
        self._warden = warden
        self._clock = read_clock
        self._born = read_clock().boot

    async def status(self) -> dict[str, Any]:
        """The document of ``wg-agent status --json``; ``link_up`` is None while nobody knows."""
        now, inbox, keeper = self._clock(), self._inbox, self._keeper
        about = {
            "interface": self._interface,
            "version": __version__,
            "started_at": overview.moment(self._born, now),
            "link_up": None if keeper.may_be_up else keeper.up,
            "core_connected": inbox.core_connected,
            "core_error": inbox.core_error,
            "core_since": overview.moment(inbox.core_since, now),
            "synced_at": overview.moment(self._reconciler.synced_at, now),
            "expiry_late": self._reconciler.expiry_late,
            "overstaying": self._reconciler.overstaying,
            "journal_ok": self._books.ok,
            "device_error": self._reconciler.fault,
            "guard": "none" if self._warden is None else self._warden.condition,
            "guard_error": self._guard_error,
            "reap_backlog": len(keeper.writer.to_reap),
        }
        return await overview.status(self._state, self._mirror, self._clock, about)

    def explain(self, what: str) -> dict[str, Any]:
        """Why the peers that ``what`` names are on the interface or not."""
        now, trail = self._clock(), self._audit.trail
        surroundings = explanation.Surroundings(
            interface=self._interface,
            core="connected" if self._inbox.core_connected else self._inbox.core_error,
            stuck=self._keeper.stuck.__contains__,
            device_error=self._reconciler.fault,
            guard_error=self._guard_error,
            trail=trail,
            guarded=lambda key: None if self._warden is None else self._warden.guarded(key, now),
        )
        found = explanation.explain(what, self._state, self._mirror, now, surroundings)
        for one in found["peers"]:
            key = explanation.key_of(one)
            one["events"] = [] if key is None else self._audit.documents(trail.of(key, _LAST_EVENTS))
        return found

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        """The audit trail behind a number; None: its last ``limit`` occurrences."""
        return {"interface": self._interface, **await self._audit.events(after, limit, wait, process, who)}

    async def plan(self) -> dict[str, Any]:
        """Read the interface and return what a reconcile would change now, changing nothing."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._reconciler.put(AskPlan(answer))
        return await answer

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        """End the sessions of these peers (None: all); returns once they are off the interface."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._reconciler.put(End(keys, answer))
        return await answer

    def refresh_metrics(self) -> None:
        """Bring up to date what is only known at a scrape: totals, since they cost a walk over all peers, and
        what time changes by itself.
        """
        state, metrics, now = self._state, self._metrics, self._clock()
        by_state, by_reason = overview.counts(state, self._mirror)
        metrics.set_peers(by_state)
        metrics.set_refused(by_reason)
        metrics.set_grants(self._books.granted)
        metrics.set_starts(None if self._books.lives is None else self._books.lives.starts)
        metrics.interface_up.set(self._keeper.up)
        metrics.overdue_seconds.set(max((-d.remaining(now) for d in state.overdue), default=0.0))
        metrics.set_faults(
            device=bool(self._reconciler.fault or self._reconciler.overstaying),
            guard=bool(self._guard_error),
            journal=not self._books.ok,
        )
        if state.core_clock is not None:
            metrics.clock_skew.set(now.wall - state.core_time(now))
        if self._reconciler.in_step:
            metrics.last_sync.set(now.wall)

    @property
    def _guard_error(self) -> str:
        return "" if self._warden is None else self._warden.fault
