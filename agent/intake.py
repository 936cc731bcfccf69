"""What core says, taken in: its states and changes, and how things stand with core itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from agent.audit import Audit
from agent.books import Books
from agent.errors import InvalidMessage
from agent.events import Changes, Dismantle, Event, Pulled
from agent.fence import Fence, Position, Verdict
from agent.journal import Contact
from agent.keeper import Keeper
from agent.metrics import Metrics
from agent.model import Change, Now, Peer, Snapshot
from agent.plan import CUT
from agent.ports import Outcome
from agent.state import State, UnknownPeer

_log = structlog.get_logger(__name__)

SKEW: Final = 5.0
"""Seconds by which this host's clock may go apart from core's, or come nearer, without a word in the log."""


class _PullWanted(asyncio.Event):
    """That core's state is to be pulled; ``doubted`` until it has been, also while it is on its way."""

    doubted = True

    def set(self) -> None:
        self.doubted = True
        super().set()


class Intake:
    """The ``Inbox`` of ``agent.ports``. ``put`` queues an event for the reconciler's next step.

    ``core_lost_grace``: seconds without a byte of core's after which all sessions end; 0: never.
    """

    def __init__(
        self,
        *,
        state: State,
        keeper: Keeper,
        books: Books,
        audit: Audit,
        metrics: Metrics,
        read_clock: Callable[[], Now],
        put: Callable[[Event], None],
        core_lost_grace: float = 0.0,
    ) -> None:
        self._pull = _PullWanted()
        self.pull_wanted: asyncio.Event = self._pull
        self.settled = asyncio.Event()
        """Set once the first state is in the kernel, or core could not be had."""
        self.core_lost_grace = core_lost_grace
        self.core_connected = False
        self.core_error = ""
        self.core_since: float | None = None
        """Boot time since when core has been connected, or has not; None before the first exchange."""
        self._losses = 0
        self._core_lost = False
        self._told_skew = 0.0
        self._fence = Fence()
        self._taken: list[Change] = []
        """Changes that the log has yet to tell of."""
        self._state = state
        self._keeper = keeper
        self._books = books
        self._audit = audit
        self._metrics = metrics
        self._clock = read_clock
        self._put = put

    # The ``Inbox`` port.

    @property
    def position(self) -> Position | None:
        """What is held now; None before the first pull of this process."""
        return self._fence.position

    def holds(self, peer: Peer) -> bool:
        """Whether this peer is listed and let in already, by the session that its entry shows."""
        state, key = self._state, peer.public_key
        held, there = state.roster.peers.get(key), self._keeper.writer.mirror.peers.get(key)
        if held is None or there is None or there.tenure == CUT or key in state.roster.refused:
            return False
        if (held.mfa_exempt, held.allowed_ips) != (peer.mfa_exempt, peer.allowed_ips):
            return False
        session = state.sessions.get(key)
        if peer.session is None or session is None:
            return peer.session is None and session is None
        return session.id == peer.session.id

    def submit(self, message: Snapshot | Sequence[Change], received_at: float) -> asyncio.Future[Outcome]:
        """Queue a snapshot, or changes in their order."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if isinstance(message, Snapshot):
            self._put(Pulled(message, answer, losses=self._losses))
        else:
            self._put(Changes(message, received_at, answer))
        return answer

    async def dismantle(self) -> None:
        """Remove the interface, of which nobody is on any more; the next state makes it anew."""
        await self._keeper.before_removal()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(Dismantle(answer))
        await answer
        await self._keeper.after_removal()

    def heard(self) -> None:
        """Bytes came from core just now."""
        now = self._clock()
        self._books.heard = Contact(now.boot, now.wall)
        self._core_lost = False

    def core_answered(self) -> None:
        """The last exchange with core succeeded."""
        if not self.core_connected:
            self._audit.core_found()
            self.core_since = self._clock().boot
        self.core_connected, self.core_error = True, ""
        self._metrics.core_connected.set(1)

    def core_failed(self, error: Exception) -> None:
        """The last exchange with core failed."""
        self._losses += 1
        if self.core_connected or self.core_since is None:
            self._audit.core_lost(error)
            self.core_since = self._clock().boot
        self.core_connected, self.core_error = False, str(error)
        self._metrics.core_connected.set(0)
        self.settled.set()

    def core_sent_rubbish(self, error: Exception) -> None:
        """Core sent something invalid, which was refused whole."""
        self._audit.core_invalid(error)
        self._metrics.core_invalid.inc()

    # The reconciler's side.

    @property
    def certain(self) -> bool:
        """Whether core is there, and has nothing to say that has not arrived here."""
        return self.core_connected and self.position is not None and not self._pull.doubted

    def take_snapshot(self, pulled: Pulled) -> bool:
        """Judge it, and have the state load it if it fits; return whether it did."""
        snapshot = pulled.snapshot
        try:
            pulled.verdict = self._fence.judge_snapshot(snapshot)
        except InvalidMessage as error:
            if not pulled.answer.done():
                pulled.answer.set_exception(error)
            return False
        if pulled.verdict is not Verdict.APPLIED:
            return False
        self._pull.doubted = self._pull.is_set()
        # Said here as well, so that whoever waits for the first state does not find core unreachable. Core
        # may have gone since it sent this, though.
        if pulled.losses == self._losses:
            self.core_answered()
        state, now = self._state, self._clock()
        self._keeper.build()
        state.load(snapshot, now)
        self._fence.advance(snapshot.epoch, snapshot.revision, now)
        self._note_skew(now.wall - state.core_time(now))
        _log.info(
            "state pulled",
            position=str(self.position),
            peers=len(snapshot.peers),
            sessions=len(state.sessions),
            refused=len(state.roster.refused) + len(snapshot.unreadable),
        )
        return True

    def take_changes(self, delivered: Changes) -> bool:
        """Apply what fits, and want a pull if that is all that can help; return whether any of it did."""
        before = len(self._taken)
        delivered.verdict = self._apply(delivered.changes)
        if delivered.verdict is Verdict.PULL:
            self.pull_wanted.set()
        return len(self._taken) > before

    def _apply(self, changes: Sequence[Change]) -> Verdict:
        """Apply what fits; one that does not ends it, since nothing after it can."""
        applied = Verdict.HELD
        for change in changes:
            verdict = self._fence.judge(change)
            if verdict is Verdict.HELD:
                continue
            now = self._clock()
            if verdict is Verdict.APPLIED:
                try:
                    self._state.change(change.body, now)
                except UnknownPeer:
                    verdict = Verdict.PULL
            if verdict is not Verdict.APPLIED:
                _log.info("change does not fit", verdict=verdict.value, revision=change.revision)
                return verdict
            self._fence.advance(change.epoch, change.revision, now)
            self._taken.append(change)
            applied = verdict
        return applied

    def tell_taken(self) -> None:
        """Have the log tell of the changes that were applied since it last did."""
        self._audit.changed(self._taken)
        self._taken.clear()

    def check_lost(self, now: Now) -> None:
        """End all sessions if core has been away for longer than the grace.

        Without a contact under this boot, the wall clock tells how long that is.
        """
        if not self.core_lost_grace or self._core_lost:
            return
        heard = self._books.heard
        away = now.wall - heard.wall if heard.boot is None else now.boot - heard.boot
        if away >= self.core_lost_grace:
            self._core_lost = True
            if self._state.sessions:
                _log.error("core lost for too long, all sessions end", away=round(away))
            self._state.core_lost(now)

    def _note_skew(self, skew: float) -> None:
        """Deadlines are anchored on core's time and do not mind; certificates and handshakes may."""
        self._metrics.clock_skew.set(skew)
        if abs(skew - self._told_skew) < SKEW:
            return
        self._told_skew = skew
        if abs(skew) < SKEW:
            _log.info("this host's clock agrees with core's again", seconds_ahead=round(skew, 1))
            return
        _log.warning(
            "this host's clock differs from core's",
            seconds_ahead=round(skew, 1),
            meaning="sessions end when core means them to; certificates are judged by this host's clock,"
            " and after a step back clients can't shake hands until it has caught up",
            hint="set the clocks right (NTP), here and at core",
        )
