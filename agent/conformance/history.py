"""Judging what core said over time: its events played onto its states, as an agent would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from agent.conformance.answers import Step
from agent.conformance.verdicts import Ledger
from agent.core.messages import Resync, decode_event
from agent.core.stream import ServerEvent
from agent.encoding import format_key
from agent.errors import InvalidMessage
from agent.fence import Position
from agent.model import (
    Change,
    Grant,
    InterfaceSettings,
    Location,
    LocationChanged,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Prefix,
    PublicKey,
    Refusal,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
)
from agent.roster import Roster


class Pulled(NamedTuple):
    """A state, and how many moments there had been when it was asked for: all before it, by default."""

    snapshot: Snapshot
    asked: int | None = None


Moment = Pulled | ServerEvent | Step
STEPS: Final = {
    "upsert": "change.peer-upserted",
    "grant": "change.session-granted",
    "renew": "change.session-renewed",
    "replace": "change.session-replaced",
    "revoke": "change.session-revoked",
    "move": "change.prefix-moves",
    "location": "change.location-changed",
    "remove": "change.peer-removed",
}
"""The clause that each kind of step is there for."""


def judge_history(history: Iterable[Moment], ledger: Ledger) -> None:
    """Judge states, events and steps in the order in which they came."""
    judge = _History(ledger)
    for moment in history:
        match moment:
            case Pulled():
                judge.pulled(moment)
            case Step():
                judge.step(moment)
            case _:
                judge.received(moment)
        judge.next()
    judge.end()


class _History:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._roster = Roster()
        self._location: tuple[Location, InterfaceSettings, SessionPolicy] | None = None
        self._held: Position | None = None
        """None before the first state, and where an event was lost: until the next one."""
        self._newest: Position | None = None
        """What core has reached, by its states and by events that came in their order."""
        self._newest_after: list[Position | None] = []
        """The same after each moment."""
        self._later: dict[Position, Snapshot] = {}
        """States that were pulled before the event of their revision had arrived."""
        self._sessions: dict[str, Grant] = {}
        """As they were first seen."""
        self._of_psk: dict[bytes, str] = {}
        self._ended: set[str] = set()
        self._dropped: set[str] = set()
        """Sessions that an upsert did not show: ended, if the next state does not show them either."""
        self._owners: dict[Prefix, PublicKey] = {}
        self._contested: dict[PublicKey, Position] = {}
        self._applied = 0
        """Events that have been played onto the state since it was pulled."""
        self._step: Step | None = None
        self._in_step: list[str] = []

    # What came.

    def step(self, step: Step) -> None:
        self._close_step()
        self._step = step
        if step.action == "new-history":
            self._newest = None
            self._newest_after = [None] * len(self._newest_after)

    def next(self) -> None:
        self._newest_after.append(self._newest)

    def end(self) -> None:
        self._close_step()
        if len(self._sessions) > 1:  # of one alone nothing can be told
            seen = f"{len(self._sessions)} sessions"
            self._ledger.passed("session.id-is-new", seen)
            self._ledger.passed("session.psk-is-fresh", seen)

    def _close_step(self) -> None:
        if self._step is not None and (clause := STEPS.get(self._step.action)):
            done = ", ".join(self._in_step) or "no event"
            self._ledger.skipped(clause, f"{self._step.action} led to {done}")
        self._step, self._in_step = None, []

    def pulled(self, pulled: Pulled) -> None:
        snapshot, asked = pulled
        position = Position(snapshot.epoch, snapshot.revision)
        before = self._newest_after[:asked]
        if (then := before[-1] if before else None) is not None and then.epoch == position.epoch:
            good = position.revision >= then.revision
            if not self._ledger.judged("state.never-back", good, f"{position} after {then}"):
                return  # what is judged by it would be no fault of its own
        newest = self._newest
        if newest is not None and newest.epoch == position.epoch and newest.revision > position.revision:
            return  # it was overtaken
        self._newest = position
        for peer in snapshot.peers:
            self._session(peer.public_key, peer.session)
        held = self._held
        if held is None or held.epoch != position.epoch:
            self._load(snapshot)
        elif position.revision > held.revision:
            self._later[position] = snapshot
        elif position == held:
            self._compare(snapshot)

    def received(self, event: ServerEvent) -> None:
        self._in_step.append(event.type)
        try:
            change = decode_event(event.type, event.id, event.data)
        except InvalidMessage:
            self._lose()
            return
        held = self._held
        if isinstance(change, Resync):
            self._lose()
            return
        if held is None or (change.epoch == held.epoch and change.revision <= held.revision):
            return
        if change != Change(held.epoch, held.revision + 1, change.body):
            self._lose()
            return
        if self._apply(change):
            self._held = Position(change.epoch, change.revision)
            if self._newest is not None and self._newest.epoch == change.epoch:
                self._newest = max(self._newest, self._held)
            self._applied += 1
            if snapshot := self._later.pop(self._held, None):
                self._compare(snapshot)
        else:
            self._lose()

    def _lose(self) -> None:
        """What is held is not core's state any more: the next one is taken as it comes."""
        self._held = None
        if self._later:
            newest = self._later[max(self._later, key=lambda position: position.revision)]
            self._later.clear()
            self._load(newest)

    def _load(self, snapshot: Snapshot) -> None:
        self._later.clear()
        self._contested.clear()
        self._applied = 0
        self._held = Position(snapshot.epoch, snapshot.revision)
        self._roster = Roster()
        self._roster.load({peer.public_key: peer for peer in snapshot.peers}, snapshot.location.mfa_required)
        self._roster.newly_refused.clear()
        self._location = (snapshot.location, snapshot.interface, snapshot.session_policy)
        self._owners = {p: peer.public_key for peer in snapshot.peers for p in peer.allowed_ips}

    # What a change does, and whether it may.

    def _apply(self, change: Change) -> bool:
        roster, body = self._roster, change.body
        if not isinstance(body, LocationChanged | PeerUpserted) and not self._is_known(
            body.public_key, change
        ):
            return False
        match body:
            case PeerUpserted(peer):
                self._upsert(peer, Position(change.epoch, change.revision))
            case PeerRemoved(key):
                self._ends(roster.peers[key].session)
                roster.drop(key)
                self._ledger.passed("change.peer-removed", f"{format_key(key)} at {change.revision}")
            case SessionGranted(key, grant, _):
                self._grant(key, grant, change.revision)
            case SessionRevoked(key, session_id):
                self._revoke(key, session_id, change.revision)
            case LocationChanged(location, interface, policy):
                self._location = (location, interface, policy)
                roster.require_mfa(location.mfa_required)
                self._ledger.passed("change.location-changed", f"at {change.revision}")
        self._look_for_contests(Position(change.epoch, change.revision))
        return True

    def _is_known(self, key: PublicKey, change: Change) -> bool:
        seen = f"{format_key(key)} at {change.revision}"
        return self._ledger.judged("change.known-peer", key in self._roster.peers, seen)

    def _upsert(self, peer: Peer, position: Position) -> None:
        key = peer.public_key
        before = self._roster.peers.get(key)
        live = None if before is None else before.session
        if live is not None and (peer.session is None or peer.session.id != live.id):
            self._dropped.add(live.id)
        self._session(key, peer.session)
        self._roster.hold(peer)
        if peer.fault is None and peer.session_fault is None:
            self._ledger.passed("change.peer-upserted", f"{format_key(key)} at {position.revision}")
        for prefix in peer.allowed_ips:
            owner = self._owners.get(prefix)
            self._owners[prefix] = key
            if owner not in {None, key} and key not in self._roster.refused and owner in self._roster.peers:
                self._ledger.passed("change.prefix-moves", f"{prefix} passed over at {position.revision}")

    def _grant(self, key: PublicKey, grant: Grant | None, revision: int) -> None:
        peer = self._roster.peers[key]
        before = peer.session
        if grant is not None:
            seen = f"{grant.id} for {format_key(key)} at {revision}"
            if before is None:
                self._ledger.passed("change.session-granted", seen)
            elif before.id == grant.id:
                if before.granted_at == grant.granted_at:
                    self._ledger.passed("change.session-renewed", seen)
            else:
                self._ledger.passed("change.session-replaced", f"{seen}, in the place of {before.id}")
                self._ends(before)
        self._session(key, grant)
        self._roster.hold(peer._replace(session=grant, session_fault=None))

    def _revoke(self, key: PublicKey, session_id: str, revision: int) -> None:
        peer = self._roster.peers[key]
        live = peer.session is not None and peer.session.id == session_id
        seen = f"{session_id} of {format_key(key)} at {revision}"
        # One that names another is allowed, and has no effect.
        if live:
            self._ends(peer.session)
            self._roster.hold(peer._replace(session=None))
            self._ledger.passed("change.session-revoked", seen)
        else:
            self._ledger.skipped("change.session-revoked", f"{seen} is not the live one")

    def _look_for_contests(self, position: Position) -> None:
        """A prefix with two owners for as long as one revision: the new one's upsert came first."""
        refused = self._roster.refused
        for key in [k for k in self._contested if refused.get(k) is not Refusal.PREFIX_CLAIMED]:
            since = self._contested.pop(key)
            self._ledger.failed(
                "change.prefix-moves", f"{format_key(key)} shared a prefix from {since} until {position}"
            )
        for key in self._roster.newly_refused:
            if refused.get(key) is Refusal.PREFIX_CLAIMED:
                self._contested[key] = position
            elif refused.get(key) is Refusal.SESSION_ON_TWO_KEYS:
                self._ledger.failed("session.id-is-new", f"{format_key(key)} has another peer's session")
        self._roster.newly_refused.clear()

    # Sessions.

    def _ends(self, session: Grant | None) -> None:
        if session is not None:
            self._ended.add(session.id)

    def _session(self, key: PublicKey, session: Grant | None) -> None:
        if session is None or session.granted_at is None:
            return
        if session.id in self._ended:
            self._ledger.failed("session.id-is-new", f"{session.id} of {format_key(key)} had ended")
        first = self._sessions.setdefault(session.id, session)
        if first.granted_at is not None and first.granted_at != session.granted_at:
            moved = f"by {session.granted_at - first.granted_at:+.3f} s"
            self._ledger.failed("session.granted-at-stays", f"that of {session.id} has moved {moved}")
        elif first != session:
            self._ledger.passed("session.granted-at-stays", f"{session.id} was renewed")
        owner = self._of_psk.setdefault(session.preshared_key.digest(), session.id)
        if owner != session.id:
            self._ledger.failed("session.psk-is-fresh", f"{session.id} has the PSK of {owner}")

    def _compare(self, snapshot: Snapshot) -> None:
        """What the events have made of the state before has to be the state that core gives now."""
        position = f"{snapshot.epoch}:{snapshot.revision}"
        listed = {peer.public_key: peer for peer in snapshot.peers}
        held = self._roster.peers
        differing = [
            f"{format_key(key)} ({what})"
            for key in sorted(listed.keys() | held.keys())
            if (what := _difference(held.get(key), listed.get(key), snapshot.server_time))
        ]
        if (snapshot.location, snapshot.interface, snapshot.session_policy) != self._location:
            differing.append("the location")
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            self._ledger.failed("change.snapshot-agrees", f"at {position}: {', '.join(differing[:3])}{more}")
            self._dropped.clear()
            self._load(snapshot)
            return
        self._ended |= self._dropped
        self._dropped.clear()
        if self._applied:
            self._ledger.passed("change.snapshot-agrees", f"up to {position}, {len(listed)} peers")


def _difference(held: Peer | None, listed: Peer | None, server_time: float) -> str:
    """Name what differs in one peer, without its values; empty if nothing does."""
    if held is None or listed is None:
        return "listed without an event" if held is None else "gone without an event"
    for name in ("allowed_ips", "name", "persistent_keepalive", "mfa_exempt", "preshared_key"):
        if getattr(held, name) != getattr(listed, name):
            return name
    for one in (held.session, listed.session):
        # Who drops a session when its time is up, and who a little later, mean the same.
        if one is not None and one.expires_at <= server_time and None in {held.session, listed.session}:
            return ""
    return "" if held.session == listed.session else "session"
