"""Who may be on the interface: core's list and the sessions, moved by events and the passing of time.

``State`` is the one mutable thing of the pure core. It knows no clock and does no I/O: every call is
given ``now``, and what has to follow is left for the reconciler to take: peers to plan again
(``dirty``), sessions to journal (``to_journal``), session ends to journal and report (``ends``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

from msgspec.structs import replace

from agent.model import (
    ChangeBody,
    DesiredPeer,
    EndReason,
    Grant,
    Identity,
    InterfaceSettings,
    Location,
    LocationChanged,
    Now,
    ObservedDevice,
    ObservedPeer,
    Peer,
    PeerRemoved,
    PeerUpserted,
    PresharedKey,
    PublicKey,
    Refusal,
    SessionEnd,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
)
from agent.observed import moved
from agent.plan import LEAVE, Wanted
from agent.roster import Roster
from agent.sessions import Ceilings, CoreClock, Deadline, DeadlineQueue, Limits, Liveness, Session, begin
from agent.traffic import TrafficBook

_ADMISSIBLE = 0.001
"""Seconds that a session must have left to begin: what ends in less than a millisecond has ended."""


class UnknownPeer(Exception):
    """A change names a peer that is not listed: what is held is not what core thinks; pull."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What the journal brings back: the last state of core without its secrets, and the sessions."""

    location: Location | None = None
    interface: InterfaceSettings = field(default_factory=InterfaceSettings)
    session_policy: SessionPolicy = field(default_factory=SessionPolicy)
    peers: tuple[Peer, ...] = ()
    sessions: tuple[tuple[Session, Liveness | None], ...] = ()
    ended: tuple[tuple[str, float], ...] = ()


class State:
    """Core's list, the sessions and what follows from both. See the module's docstring."""

    def __init__(self, limits: Limits | None = None, own_key: PublicKey | None = None) -> None:
        self.epoch: str | None = None
        """None until the first state of core's has arrived in this process."""
        self.revision = 0
        self.location: Location | None = None
        self.interface = InterfaceSettings()
        self.session_policy = SessionPolicy()
        self.core_clock: CoreClock | None = None
        self.identity: Identity | None = None
        """The interface's key, where core has handed one out in this process."""
        self.roster = Roster(own_key)
        self.sessions: dict[PublicKey, Session] = {}
        self.liveness: dict[PublicKey, Liveness] = {}
        self.traffic = TrafficBook()
        self.dirty: set[PublicKey] = set()
        """Peers of which something else may be wanted than the interface holds."""
        self.relisted: set[PublicKey] = set()
        """Peers that core lists differently from what the journal holds, or no longer."""
        self.to_journal: dict[PublicKey, None] = {}
        """Peers whose session (or its signs of life) is not in the journal as it is here."""
        self.begun: set[str] = set()
        """Ids of sessions of which the journal has nothing yet."""
        self.ends: list[SessionEnd] = []
        """Session ends that are not in the journal yet."""
        self.overdue: list[Deadline] = []
        """Deadlines that have passed, until their peers are off the interface."""
        self.granted: dict[int | None, list[Session]] = {}
        """Sessions that have begun, by core's revision that said so; for the audit trail to take."""
        self.renewed: dict[int | None, list[Session]] = {}
        """Sessions that core has given another end or another PSK."""
        self.ended_by: dict[str, int | None] = {}
        """Core's revision that has ended a session, or that was held when it ended by itself; by its id."""
        self._incoming: int | None = None
        """Core's revision that is being taken in, or is held; None before the first."""
        self._limits = limits or Limits()
        self._ceilings = self._limits.with_policy(self.session_policy)
        self._tenures: dict[PublicKey, int] = {}
        self._deadlines = DeadlineQueue()
        self._expiring: dict[PublicKey, Session] = {}
        """Sessions whose deadline has been seen to pass, and which are to end for it."""
        self._found: set[PublicKey] = set()
        self._by_element: dict[PublicKey, Deadline] = {}
        """Peers found on the interface of whose session only the guard's table knows."""
        self._seen: Mapping[PublicKey, ObservedPeer] | None = None
        """The interface's peers at the last look."""
        self._lapse_from = -math.inf
        """No session lapses before this boot time."""
        self._as_loaded: tuple[Peer, ...] | None = None
        """The list that was taken in last, if list and sessions are still what it made of them."""

    # What follows from the state.

    def wanted(self, key: PublicKey, now: Now) -> Wanted:
        """What the interface should hold of a peer at ``now``, listed or not."""
        peer = self.roster.peers.get(key)
        session = self.sessions.get(key)
        in_use = session is not None and session.in_use
        must_do_mfa = self.roster.must_do_mfa(key)
        if self.epoch is None and self._is_left_as_found(key, now):
            return LEAVE
        if peer is None or key in self.roster.refused:
            return None
        if session is not None and in_use:
            if session.preshared_key is None or session.deadline.passed(now):
                return None
            preshared_key: PresharedKey | None = session.preshared_key
        elif must_do_mfa or peer.static_key_unknown:
            return None
        else:
            preshared_key = peer.preshared_key
        tenure = self._tenures.get(key, 0)
        return DesiredPeer(key, preshared_key, peer.allowed_ips, peer.persistent_keepalive, tenure)

    def _is_left_as_found(self, key: PublicKey, now: Now) -> bool:
        """Whether a peer is not to be touched before the first state of this process (rule 14).

        That is who needs no session, everybody when not even the journal knows the location, and a
        live session that was journalled when its peer was not yet. It is not who had a session that
        ended meanwhile, by the guard's table where the journal was lost.
        """
        if (deadline := self._by_element.get(key)) is not None:
            return not deadline.passed(now)
        if key in self._tenures:
            return False
        session = self.sessions.get(key)
        if session is not None and session.in_use:
            return session.preshared_key is not None and key not in self.roster.peers
        return self.location is None or (key in self._found and not self.roster.must_do_mfa(key))

    def desired(self, now: Now) -> dict[PublicKey, DesiredPeer]:
        """Everything that the interface should hold at ``now``."""
        pairs = ((key, self.wanted(key, now)) for key in self.roster.peers)
        return {key: want for key, want in pairs if isinstance(want, DesiredPeer)}

    @property
    def ceilings(self) -> Ceilings:
        """The stricter of core's limits on sessions and the configuration's."""
        return self._ceilings

    def next_wait(self, now: Now) -> float | None:
        """Seconds until a session may have to end by itself, None if nothing is due ever."""
        return self._deadlines.wait(now)

    def core_time(self, now: Now) -> float:
        """Core's time as well as it is known; the host's own until core has said it."""
        return self.core_clock.at(now) if self.core_clock is not None else now.wall

    # Core's events.

    def restore(self, restored: Restored, now: Now) -> None:
        """Begin with what the journal holds; nothing of it is on the interface for sure yet.

        Traffic is to be restored before. Of two sessions of one peer the later was to replace the
        other, whose end was not journalled any more.
        """
        self.location, self.interface = restored.location, restored.interface
        self.session_policy = restored.session_policy
        self._ceilings = self._limits.with_policy(restored.session_policy)
        self.roster.ended.update(restored.ended)
        for session, liveness in sorted(restored.sessions, key=lambda row: (row[0].granted_at, row[0].id)):
            key = session.public_key
            if key in self.sessions:
                self._end(key, EndReason.REPLACED, now)
            lowered = session.lowered(self._ceilings.max_lifetime)
            self.sessions[key] = lowered
            if lowered is not session:
                self.to_journal[key] = None
            if liveness is not None:
                self._lives(key, liveness)
            self._deadlines.put(key, lowered.deadline)
        mfa_required = restored.location is not None and restored.location.mfa_required
        self.roster.load({peer.public_key: peer for peer in restored.peers}, mfa_required)
        self.roster.newly_refused.clear()
        self.dirty.update(self.roster.peers)

    def adopt(self, device: ObservedDevice, elements_left: Mapping[PublicKey, float], now: Now) -> None:
        """Give restored sessions the PSK of their peer on the interface, if it is theirs (rule 14).

        The one before a renewal is theirs too: the renewal was journalled and not carried out any more.
        A peer with another PSK, or without allowed IPs (it was being cut), is not taken over.
        ``elements_left``: for how many seconds the guard's table lets a found peer through, where it
        knows of a session. Without a journal this is the peer's deadline.
        """
        self._found = set(device.peers)
        self.dirty |= self._found
        if self.location is None:
            for key, left in elements_left.items():
                self._by_element[key] = Deadline(now.boot + left, now.wall + left)
                self._deadlines.put(key, self._by_element[key])
        for key, session in self.sessions.items():
            observed = device.peers.get(key)
            if session.preshared_key is not None or observed is None:
                continue
            preshared_key = observed.preshared_key
            if preshared_key is None or not observed.allowed_ips:
                continue
            if preshared_key.digest() in {session.psk_digest, session.former_digest}:
                self.sessions[key] = replace(session, preshared_key=preshared_key, journalled_digest=None)

    def load(self, snapshot: Snapshot, now: Now) -> None:
        """Take in the whole state: what is not in it is gone, sessions it does not show have ended."""
        self._expire(now)
        self._incoming = snapshot.revision
        roster, location = self.roster, snapshot.location
        if self.location is not None and self.location.id != location.id:
            self._end_all(EndReason.REVOKED, now)
        first = self.epoch is None
        self._by_element.clear()
        if self.epoch != snapshot.epoch:
            self.traffic.report_all()
        self.epoch, self.revision = snapshot.epoch, snapshot.revision
        self.core_clock = CoreClock(snapshot.server_time, snapshot.requested_at)
        self.interface = snapshot.interface
        self._take_identity(snapshot.identity)
        roster.list_unreadable(snapshot.unreadable)
        if snapshot.peers is self._as_loaded and location == self.location:
            self._set_policy(snapshot.session_policy, now)
            roster.unblock()
            self._settle(now)
            return
        self._as_loaded = snapshot.peers
        listed = _merge_duplicates(snapshot.peers, self.sessions)
        for key in [k for k in roster.peers if k not in listed]:
            self._drop(key, now)
        for key in [k for k in self.sessions if k not in listed]:
            self._end(key, EndReason.PEER_REMOVED, now)
        for key, peer in listed.items():
            self._end_what_is_not_listed(key, peer, now)
        before = roster.peers
        changed = {key for key, peer in listed.items() if peer != before.get(key)}
        self.dirty |= changed
        self.relisted |= changed
        switched = location.mfa_required != roster.mfa_required
        if first or switched:
            self.dirty.update(listed, self._found)
        needed_none = [
            key for key in (listed if switched else changed) if key in before and not roster.must_do_mfa(key)
        ]
        roster.load(listed, location.mfa_required, None if first else changed)
        self.location = location
        self._set_policy(snapshot.session_policy, now)
        for key in needed_none:
            if roster.must_do_mfa(key):
                self._mfa_switched_on(key)
        for key in listed:
            self._admit(key, now)
        self._settle(now)

    def change(self, body: ChangeBody, now: Now) -> None:
        """Take in one change; raises UnknownPeer if it is about a peer that is not listed."""
        # What is past its deadline has ended, whether a tick has seen it or not: nothing renews it.
        self._expire(now)
        self._incoming = self.revision + 1
        match body:
            case PeerUpserted(peer):
                self._upsert(peer, now)
            case PeerRemoved(key):
                self._require(key)
                self._drop(key, now)
            case SessionGranted(key, grant, fault):
                self._require(key)
                self._grant(key, grant, fault, now)
            case SessionRevoked(key, session_id):
                self._require(key)
                self._revoke(key, session_id, now)
            case LocationChanged():
                self._change_location(body, now)
            case _:
                assert_never(body)
        self._settle(now)
        self.revision += 1

    def configure(self, limits: Limits, now: Now) -> None:
        """Take other ceilings from the configuration; lowered ones hold for live sessions at once."""
        self._limits = limits
        self._set_policy(self.session_policy, now)
        self._settle(now)

    # The passing of time, and what the interface shows.

    def tick(self, now: Now) -> None:
        """End what is past its deadline; costs nothing when nothing is due."""
        self._expire(now)
        self._settle(now)

    def expiring(self, now: Now) -> list[PublicKey]:
        """Who is to go because a deadline has passed; the next ``tick`` ends them, whatever clocks say then.

        So that they can be cut before: ending thousands takes longer than that (``mass_expiry_10k``).
        """
        due = self._deadlines.due(now)
        held, seen = self.sessions.get, self._expiring
        passed = {
            key: session for key in due if (session := held(key)) is not None and session.deadline.passed(now)
        }
        if seen:
            # One clock's deadline has passed before the other's.
            passed = {k: one for k, one in passed.items() if k not in seen or seen[k].id != one.id}
        self._expiring |= passed
        self.overdue += [session.deadline for session in passed.values()]
        self.dirty |= self._by_element.keys() & due
        return [key for key, session in self._expiring.items() if session.in_use]

    def core_lost(self, now: Now) -> None:
        """Core has been away for longer than the grace: all sessions end."""
        self._end_all(EndReason.CORE_LOST, now)
        for key in self._by_element:
            self._by_element[key] = Deadline(now.boot, now.wall)
            self.dirty.add(key)
        self._settle(now)

    def observe(self, device: ObservedDevice, now: Now) -> list[PublicKey]:
        """Take in handshakes and counters, then end sessions without life; return who changed."""
        changed = []
        self.traffic.look(now.boot)
        keys, self._seen = moved(self._seen, device.peers), device.peers
        for key in keys:
            observed = device.peers[key]
            received = self.traffic.observe(observed)
            if received is None:
                continue
            changed.append(key)
            liveness = self.liveness.get(key)
            if liveness is not None:
                seen = liveness.observed(observed.latest_handshake, received > 0, now)
                if seen is not liveness:
                    self._lives(key, seen)
                    self.to_journal[key] = None
        if now.boot >= self._lapse_from:
            self._end_lapsed(device.peers.keys(), now)
        self._settle(now)
        return changed

    def _end_lapsed(self, there: Collection[PublicKey], now: Now) -> None:
        for key, liveness in list(self.liveness.items()):
            if key in there and self.sessions[key].in_use and key not in self.roster.refused:
                reason = liveness.lapsed(self._ceilings, now)
                if reason is not None:
                    self._end(key, reason, now)
        ceilings = self._ceilings
        self._lapse_from = min((one.lapses_at(ceilings) for one in self.liveness.values()), default=math.inf)

    def _lives(self, key: PublicKey, liveness: Liveness) -> None:
        """Have these signs of life of a session."""
        self.liveness[key] = liveness
        self._lapse_from = min(self._lapse_from, liveness.lapses_at(self._ceilings))

    def end(self, keys: Iterable[PublicKey] | None, now: Now) -> list[PublicKey]:
        """The operator ends these sessions (None: all); return the peers that had one."""
        asked = self.sessions if keys is None else dict.fromkeys(keys)
        had = [key for key in asked if key in self.sessions]
        for key in had:
            self._end(key, EndReason.OPERATOR, now)
        self._settle(now)
        return had

    def added(self, key: PublicKey, now: Now) -> None:
        """The peer is about to be put on the interface afresh; its signs of life begin anew.

        ``traffic`` is to be told once it is there: until then the kernel counts on.
        """
        if key in self.sessions:
            before = self.liveness.get(key)
            last_sign_at = None if before is None else before.last_sign_at
            self._lives(key, Liveness(now.boot, last_sign_at=last_sign_at))
            self.to_journal[key] = None

    def adopted(self, key: PublicKey, now: Now) -> None:
        """The peer was found on the interface as wanted; without a record its stay begins now."""
        if key in self.sessions and key not in self.liveness:
            self._lives(key, Liveness(now.boot))
            self.to_journal[key] = None

    def block(self, keys: Iterable[PublicKey], reason: Refusal) -> None:
        """Refuse these peers for a reason of our own (journal, device) until ``unblock``."""
        self.roster.block(keys, reason)
        self._bump_refused()

    def unblock(self, now: Now) -> None:
        """What kept peers out on our side may be over: judge them again."""
        self.roster.unblock()
        self._settle(now)

    def forget_news(self) -> None:
        """What is known by now need not be told: the agent has begun with it."""
        self.granted.clear()
        self.renewed.clear()
        self.roster.take_judged()

    def forget_ended(self, now: Now) -> list[str]:
        """Forget ids that can't be granted again: their first ``granted_at`` + max_lifetime is past.

        Judged by the configuration's ceiling, which no core can raise. An id that is still listed, by a
        core that does not say when it was granted, would begin anew.
        """
        if self.core_clock is None:
            return []
        horizon = self.core_clock.at(now) - self._limits.max_lifetime
        ended = self.roster.ended
        past = [session_id for session_id, granted_at in ended.items() if granted_at < horizon]
        still = self.roster.still_listed(past)
        gone = [session_id for session_id in past if session_id not in still]
        for session_id in gone:
            del ended[session_id]
        return gone

    # Inside.

    def _expire(self, now: Now) -> None:
        self.expiring(now)
        expiring, self._expiring = self._expiring, {}
        for key, expired in expiring.items():
            session = self.sessions.get(key)
            if session is not None and session.id == expired.id:
                self._end(key, EndReason.EXPIRED, now)
        if len(self._deadlines) > 64 + 4 * len(self.sessions):
            of_sessions = {key: s.deadline for key, s in self.sessions.items()}
            self._deadlines.rebuild(self._by_element | of_sessions)

    def _require(self, key: PublicKey) -> None:
        if key not in self.roster.peers:
            self._incoming = self.revision
            raise UnknownPeer

    def _hold(self, peer: Peer) -> None:
        self._as_loaded = None
        self.roster.hold(peer)
        self.dirty.add(peer.public_key)

    def _upsert(self, peer: Peer, now: Now) -> None:
        key = peer.public_key
        needed_none = key in self.roster.peers and not self.roster.must_do_mfa(key)
        self._end_what_is_not_listed(key, peer, now)
        self._hold(peer)
        self.relisted.add(key)
        if needed_none and self.roster.must_do_mfa(key):
            self._mfa_switched_on(key)
        self._admit(key, now)

    def _grant(self, key: PublicKey, grant: Grant | None, fault: Refusal | None, now: Now) -> None:
        peer = self.roster.peers[key]._replace(session=grant, session_fault=fault)
        session = self.sessions.get(key)
        if session is None or grant is None or grant.id == session.id:
            self._end_what_is_not_listed(key, peer, now)
            self._hold(peer)
        else:
            refused = key in self.roster.refused
            self._hold(peer)
            self._replace(key, session, refused, now)
        self._admit(key, now)

    def _replace(self, key: PublicKey, session: Session, refused: bool, now: Now) -> None:
        """Another id replaces the session: in place if that is live, so that no packet is lost."""
        in_place = (
            session.in_use and not refused and key not in self.roster.refused and self.roster.must_do_mfa(key)
        )
        tenure, liveness = self._tenures.get(key, 0), self.liveness.get(key)
        self._end(key, EndReason.REPLACED, now)
        if in_place:
            self._tenures[key] = tenure
            if liveness is not None:
                self._lives(key, liveness)

    def _revoke(self, key: PublicKey, session_id: str, now: Now) -> None:
        """End the live session of that id; one that is only listed, and not live, is listed no more."""
        session = self.sessions.get(key)
        listed = self.roster.peers[key].session
        if session is not None and session.id == session_id:
            self._end(key, EndReason.REVOKED, now)
        elif session is None and listed is not None and listed.id == session_id:
            self._hold(self.roster.peers[key]._replace(session=None))

    def _drop(self, key: PublicKey, now: Now) -> None:
        if key in self.sessions:
            self._end(key, EndReason.PEER_REMOVED, now)
        self._as_loaded = None
        self.roster.drop(key)
        self.relisted.add(key)
        self._new_tenure(key)

    def _end_what_is_not_listed(self, key: PublicKey, peer: Peer, now: Now) -> None:
        """End the live session unless the entry shows the same one, unaltered where it must be.

        With an altered session its id is ended, and so the alteration is refused.
        """
        session = self.sessions.get(key)
        if session is None:
            return
        grant = peer.session
        if grant is None:
            unreadable = peer.session_fault is not None
            self._end(key, EndReason.REPLACED if unreadable else EndReason.REVOKED, now)
        elif grant.id != session.id or grant.granted_at not in {None, session.granted_at}:
            self._end(key, EndReason.REPLACED, now)

    def _admit(self, key: PublicKey, now: Now) -> None:
        """Begin or renew the session that the peer's entry shows, if it is a good one."""
        grant = self.roster.peers[key].session
        if grant is None or self.core_clock is None or self.roster.session_fault(key) is not None:
            return
        core_time = self.core_clock.at(now)
        max_lifetime = self._ceilings.max_lifetime
        held = self.sessions.get(key)
        if held is not None and not held.in_use and self.roster.must_do_mfa(key):
            # It was restored without its peer, and MFA was switched on while nobody looked.
            self._mfa_switched_on(key)
            held = self.sessions[key]
        if held is None:
            traffic = self.traffic.get(key)
            session = begin(
                key,
                grant,
                max_lifetime=max_lifetime,
                core_time=core_time,
                now=now,
                in_use=self.roster.must_do_mfa(key),
                base=(traffic.rx_bytes, traffic.tx_bytes),
            )
            self.begun.add(session.id)
            self.granted.setdefault(self._incoming, []).append(session)
        else:
            session = held.renewed(grant, max_lifetime, core_time, now)
            if session is held:
                return
            if session.expires_at != held.expires_at or session.psk_digest != held.psk_digest:
                self.renewed.setdefault(self._incoming, []).append(session)
        self.sessions[key] = session
        self._deadlines.put(key, session.deadline)
        self.to_journal[key] = None
        self.dirty.add(key)
        if session.deadline.remaining(now) < _ADMISSIBLE:
            self.overdue.append(session.deadline)
            self._end(key, EndReason.EXPIRED, now)

    def _end(self, key: PublicKey, reason: EndReason, now: Now) -> None:
        self._as_loaded = None
        session = self.sessions.pop(key)
        liveness = self.liveness.pop(key, None)
        traffic = self.traffic.get(key)
        clock = self.core_clock
        ended_at = clock.at(now) if clock is not None else session.core_time(now)
        if reason is EndReason.EXPIRED:
            ended_at = min(ended_at, session.ends_at)
        self.ends.append(
            SessionEnd(
                session_id=session.id,
                public_key=key,
                reason=reason,
                ended_at=ended_at,
                latest_handshake=0.0 if liveness is None else liveness.latest_handshake,
                # The record of the traffic may have been lost, and the session's been kept.
                rx_bytes=max(0, traffic.rx_bytes - session.base_rx),
                tx_bytes=max(0, traffic.tx_bytes - session.base_tx),
            )
        )
        self.ended_by[session.id] = self._incoming
        self.to_journal.pop(key, None)
        self.begun.discard(session.id)
        self.roster.end(session.id, session.granted_at)
        if session.in_use:
            self._new_tenure(key)

    def _end_all(self, reason: EndReason, now: Now) -> None:
        for key in list(self.sessions):
            self._end(key, reason, now)

    def _change_location(self, change: LocationChanged, now: Now) -> None:
        if self.location is not None and change.location.id != self.location.id:
            self._end_all(EndReason.REVOKED, now)
        roster = self.roster
        switched = change.location.mfa_required != roster.mfa_required
        self._as_loaded = None
        self.location, self.interface = change.location, change.interface
        self._take_identity(change.identity)
        roster.require_mfa(change.location.mfa_required)
        self._set_policy(change.session_policy, now)
        if not switched:
            return
        for key in roster.peers:
            self.dirty.add(key)
            if roster.must_do_mfa(key):
                self._mfa_switched_on(key)

    def _take_identity(self, identity: Identity | None) -> None:
        if identity is not None:
            self.identity = identity
            self.roster.own(identity.public_key)

    def _set_policy(self, policy: SessionPolicy, now: Now) -> None:
        self.session_policy = policy
        ceilings = self._limits.with_policy(policy)
        lowered = ceilings.max_lifetime < self._ceilings.max_lifetime
        if ceilings != self._ceilings:
            self._lapse_from = -math.inf
        self._ceilings = ceilings
        if not lowered:
            return
        for key, session in list(self.sessions.items()):
            shorter = session.lowered(ceilings.max_lifetime)
            if shorter is not session:
                self.sessions[key] = shorter
                self._deadlines.put(key, shorter.deadline)
                self.to_journal[key] = None
                self.dirty.add(key)
        self._expire(now)

    def _mfa_switched_on(self, key: PublicKey) -> None:
        """The peer needs a session from now on: whatever it has, it is removed and added again."""
        self._new_tenure(key)
        session = self.sessions.get(key)
        if session is not None and not session.in_use:
            self.sessions[key] = replace(session, in_use=True)
            self.to_journal[key] = None

    def _new_tenure(self, key: PublicKey) -> None:
        self._tenures[key] = self._tenures.get(key, 0) + 1
        self.dirty.add(key)

    def _bump_refused(self) -> None:
        """A refused peer is removed; once it no longer is refused, it is added afresh."""
        while self.roster.newly_refused:
            self._new_tenure(self.roster.newly_refused.pop())

    def _settle(self, now: Now) -> None:
        """Follow up on what the judging of the list has turned over."""
        self._bump_refused()
        while self.roster.cleared:
            key = self.roster.cleared.pop()
            self.dirty.add(key)
            if key in self.roster.peers:
                self._admit(key, now)
            self._bump_refused()


def _merge_duplicates(peers: Iterable[Peer], sessions: dict[PublicKey, Session]) -> dict[PublicKey, Peer]:
    """Return the list by key. Entries of one key become one that claims all their prefixes and is refused.

    Of their sessions it shows the one that is live, so that a repeated entry ends nothing by itself.
    """
    listed: dict[PublicKey, Peer] = {}
    for peer in peers:
        key = peer.public_key
        other = listed.get(key)
        if other is None:
            listed[key] = peer
            continue
        live = sessions.get(key)
        shows_live = live is not None and peer.session is not None and peer.session.id == live.id
        listed[key] = other._replace(
            allowed_ips=tuple(sorted({*other.allowed_ips, *peer.allowed_ips})),
            mfa_exempt=other.mfa_exempt and peer.mfa_exempt,
            session=peer.session if shows_live else other.session,
            fault=Refusal.DUPLICATE_KEY,
        )
    return listed
