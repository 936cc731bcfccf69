"""What there is to tell core: the revision in the kernel, changed peers, ended sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from agent.encoding import format_key
from agent.fence import Position
from agent.model import Now, PeerStats, RefusedPeer, SessionEnd
from agent.ports import Applied, StatsReport
from agent.state import State


class Reporting:
    """The ``Reports`` of ``agent.ports``. ``forget`` journals that core has taken these ends."""

    def __init__(
        self,
        state: State,
        clock: Callable[[], Now],
        forget: Callable[[Sequence[SessionEnd]], Awaitable[None]],
    ) -> None:
        self._state = state
        self._clock = clock
        self._forget = forget
        self._news = asyncio.Event()
        self._applied: Applied | None = None
        self._last: Applied | None = None
        self._ends: dict[str, SessionEnd] = {}
        self._stats_due = False
        self._looks = self._given = self._told = 0
        """Looks at the interface; the one that core was last given all of, and the one that it took."""
        self._refused: tuple[RefusedPeer, ...] = ()
        self._refused_at = -1

    # The reconciler's side.

    def in_kernel(self, position: Position | None, *, pulled: bool) -> None:
        """This revision is in the kernel. It is told after every pull, and when it differs from the last."""
        if position is None:
            return
        refused = self.refused()
        last = self._last
        news = last is None or (last.epoch, last.revision, last.refused) != (*position, refused)
        if pulled or news:
            applied_at = self._state.core_time(self._clock())
            self._last = self._applied = Applied(*position, applied_at, refused)
            self._news.set()

    def refused(self) -> tuple[RefusedPeer, ...]:
        """The whole current list of the refused."""
        roster = self._state.roster
        if self._refused_at == roster.refusals:
            return self._refused
        unreadable = (RefusedPeer(peer.public_key, peer.reason) for peer in roster.unreadable)
        refused = (RefusedPeer(format_key(k), r) for k, r in sorted(roster.refused.items()))
        self._refused = (*unreadable, *refused)
        self._refused_at = roster.refusals
        return self._refused

    def ended(self, ends: Iterable[SessionEnd]) -> None:
        """These ends are journalled and wait for core to take them."""
        self._ends.update((end.session_id, end) for end in ends)
        if self._ends:
            self._news.set()

    def observed(self) -> None:
        """The interface was looked at, and the traffic journalled: a report is due."""
        self._stats_due = True
        self._looks += 1
        self._news.set()

    # The ``Reports`` port.

    async def pending(self) -> None:
        """Return when there is something to send."""
        await self._news.wait()

    def applied(self) -> Applied | None:
        """The newest revision in the kernel that core has not acknowledged."""
        self._calm()
        return self._applied

    def applied_accepted(self, applied: Applied) -> None:
        """Core took it."""
        if self._applied == applied:
            self._applied = None
        self._calm()

    def stats(self, limit: int) -> StatsReport | None:
        """Up to ``limit`` changed peers, None if there are none or before the first state.

        Where core judges liveness, none are a report too, once a look: to core no report is no evidence of
        silence. Fewer than ``limit`` are the last of a look.
        """
        state = self._state
        if not self._stats_due or state.epoch is None:
            self._calm()
            return None
        keys = state.traffic.due(limit, state.roster.peers)
        silence = state.session_policy.liveness == "core" and self._told != self._looks
        if not keys and not silence:
            self._stats_due = False
            self._calm()
            return None
        self._given = self._looks if len(keys) < limit else self._told
        peers = []
        for key in keys:
            traffic, session = state.traffic.get(key), state.sessions.get(key)
            peers.append(
                PeerStats(
                    public_key=key,
                    session_id=None if session is None else session.id,
                    endpoint=traffic.endpoint,
                    latest_handshake=traffic.latest_handshake,
                    rx_bytes=traffic.rx_bytes,
                    tx_bytes=traffic.tx_bytes,
                )
            )
        return StatsReport(state.epoch, state.revision, state.core_time(self._clock()), tuple(peers))

    def stats_accepted(self, report: StatsReport) -> None:
        """Core took it: these peers are due again only when they have changed since."""
        self._told = self._given
        for peer in report.peers:
            self._state.traffic.reported(
                peer.public_key, peer.rx_bytes, peer.tx_bytes, peer.latest_handshake, peer.endpoint
            )

    def ends(self, limit: int) -> tuple[SessionEnd, ...]:
        """Up to ``limit`` session ends that core has not acknowledged, oldest first."""
        return tuple(self._ends.values())[:limit]

    async def ends_accepted(self, ends: Sequence[SessionEnd]) -> None:
        """Core took them; returns once the journal has forgotten them."""
        await self._forget(ends)
        for end in ends:
            self._ends.pop(end.session_id, None)
        self._calm()

    def _calm(self) -> None:
        if self._applied is None and not self._ends and not (self._stats_due and self._state.epoch):
            self._news.clear()
