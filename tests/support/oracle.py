"""Who is to be on the interface, by the rules of design.md read one by one: naive, quadratic, on its own.

It shares no code with the agent but the values of ``agent.model``. It is told what happens and says
who is admitted, with which PSK, and whose transport keys may still pass packets.
"""

from dataclasses import dataclass, field
from ipaddress import ip_network

from agent.model import (
    ChangeBody,
    Grant,
    LocationChanged,
    Now,
    Peer,
    PeerRemoved,
    PeerUpserted,
    Prefix,
    PresharedKey,
    PublicKey,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    Snapshot,
)
from tests.support.builders import OWN_KEY

HANDSHAKE_LIFETIME = 180.0


def overlap(a: Prefix, b: Prefix) -> bool:
    """Whether one contains the other or they are the same."""
    one, other = ip_network(str(a)), ip_network(str(b))
    return one.version == other.version and one.overlaps(other)


def dated(grant: Grant) -> float:
    """When core says that it was granted; the cores modelled here do."""
    assert grant.granted_at is not None
    return grant.granted_at


@dataclass
class Live:
    """A session that has not ended. ``heirs_of`` are the ids whose transport keys it may go on using."""

    id: str
    preshared_key: PresharedKey
    granted_at: float
    expires_at: float
    ends_at: float
    boot: float | None
    wall: float
    in_use: bool
    heirs_of: frozenset[str]

    def over(self, now: Now) -> bool:
        return now.wall >= self.wall or (self.boot is not None and now.boot >= self.boot)


@dataclass
class Life:
    """What was seen of a peer's stay."""

    added_at: float
    handshake: float = 0.0
    handshake_at: float | None = None
    sign_at: float | None = None
    rx: int = 0


@dataclass
class Oracle:
    max_lifetime: float = 86400.0
    idle_timeout: float = 300.0
    connect_timeout: float = 180.0
    policy: SessionPolicy = field(default_factory=SessionPolicy)
    known: bool = False
    """Whether core has been heard in this process."""
    mfa: bool = False
    location: str | None = None
    entries: list[Peer] = field(default_factory=list)
    live: dict[PublicKey, Live] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    life: dict[PublicKey, Life] = field(default_factory=dict)
    core_at_boot_zero: float = 0.0
    disturbed: set[PublicKey] = field(default_factory=set)
    """Whose tunnels had a reason to break since this was last emptied."""

    # Rules 1 to 3.

    def must_do_mfa(self, key: PublicKey) -> bool:
        return self.mfa and not all(e.mfa_exempt for e in self.entries if e.public_key == key)

    def on_two_keys(self, session_id: str) -> bool:
        keys = {e.public_key for e in self.entries if e.session and e.session.id == session_id}
        return len(keys) > 1

    def refused(self) -> set[PublicKey]:
        return {e.public_key for e in self.entries if self._is_refused(e.public_key)}

    def _is_refused(self, key: PublicKey) -> bool:
        mine = [e for e in self.entries if e.public_key == key]
        others = [e for e in self.entries if e.public_key != key]
        if key == OWN_KEY or len(mine) > 1 or any(e.fault or e.session_fault for e in mine):
            return True
        for entry in mine:
            if entry.session and self.on_two_keys(entry.session.id):
                return True
            if entry.session and entry.session.id in self.ended and self.must_do_mfa(key):
                return True
        for a in (p for e in mine for p in e.allowed_ips):
            for other in others:
                both = self.must_do_mfa(key) and self.must_do_mfa(other.public_key)
                for b in other.allowed_ips:
                    if a == b or (both and overlap(a, b)):
                        return True
        return False

    def admitted(self, now: Now) -> dict[PublicKey, tuple[PresharedKey | None, frozenset[Prefix]]]:
        """Everybody who is to be on the interface, with PSK and prefixes."""
        admitted: dict[PublicKey, tuple[PresharedKey | None, frozenset[Prefix]]] = {}
        refused = self.refused()
        for entry in self.entries:
            key, session = entry.public_key, self.live.get(entry.public_key)
            if key in refused:
                continue
            if session is not None and session.in_use and not session.over(now):
                admitted[key] = (session.preshared_key, frozenset(entry.allowed_ips))
            elif not self.must_do_mfa(key):
                admitted[key] = (entry.preshared_key, frozenset(entry.allowed_ips))
        return admitted

    def may_pass(self, key: PublicKey, label: str, now: Now) -> bool:
        """Whether packets under transport keys made by the right of ``label`` may still pass."""
        session = self.live.get(key)
        if session is not None and session.in_use and not session.over(now):
            return label in session.heirs_of
        return label == "static" and not self.must_do_mfa(key)

    # Sessions.

    def core_time(self, now: Now) -> float:
        return self.core_at_boot_zero + now.boot

    def lifetime(self) -> float:
        core = self.policy.max_lifetime
        return self.max_lifetime if core is None else min(core, self.max_lifetime)

    def end(self, key: PublicKey) -> None:
        session = self.live.pop(key)
        self.life.pop(key, None)
        self.ended.add(session.id)
        self.entries = [
            e._replace(session=None) if e.session and e.session.id == session.id else e for e in self.entries
        ]
        if session.in_use:
            self.disturbed.add(key)

    def end_all(self) -> None:
        for key in list(self.live):
            self.end(key)

    def pass_time(self, now: Now) -> None:
        for key, session in list(self.live.items()):
            if session.over(now):
                self.end(key)

    def take(self, event: Snapshot | ChangeBody, now: Now) -> None:
        self.pass_time(now)
        before = self.refused()
        must = {e.public_key: self.must_do_mfa(e.public_key) for e in self.entries}
        match event:
            case Snapshot():
                self._take_snapshot(event, now)
            case PeerUpserted(peer):
                self._keep_only(peer.public_key, [peer])
                self._list([e for e in self.entries if e.public_key != peer.public_key] + [peer])
            case PeerRemoved(key):
                self._keep_only(key, [])
                self._list([e for e in self.entries if e.public_key != key])
                self.disturbed.add(key)
            case SessionGranted():
                self._take_grant(event, now)
            case SessionRevoked(key, session_id):
                self._take_revocation(key, session_id)
            case LocationChanged():
                self._take_location(event.location.id, event.location.mfa_required, event.session_policy)
        for key in {e.public_key for e in self.entries}:
            # A restored session may have a peer that was not listed before, and needed none when it began.
            idle = key in self.live and not self.live[key].in_use
            if self.must_do_mfa(key) and (idle or not must.get(key, True)):
                self.disturbed.add(key)
                if key in self.live:
                    self.live[key].in_use = True
        self._lower()
        self.pass_time(now)
        self._begin_and_renew(now)
        self.pass_time(now)
        self.disturbed |= before ^ self.refused()

    def _take_snapshot(self, snapshot: Snapshot, now: Now) -> None:
        self.core_at_boot_zero = snapshot.server_time - snapshot.requested_at
        location = snapshot.location
        if self.location not in {None, location.id}:
            self.end_all()
        self.location = location.id
        for key in {e.public_key for e in self.entries} | set(self.live):
            mine = [p for p in snapshot.peers if p.public_key == key]
            self._keep_only(key, mine)
            if not mine:
                self.disturbed.add(key)
        self.mfa, self.policy, self.known = location.mfa_required, snapshot.session_policy, True
        self._list(list(snapshot.peers))

    def _take_location(self, location_id: str, mfa: bool, policy: SessionPolicy) -> None:
        if self.location != location_id:
            self.end_all()
        self.location, self.mfa, self.policy = location_id, mfa, policy

    def _take_grant(self, event: SessionGranted, now: Now) -> None:
        key, grant = event.public_key, event.grant
        session = self.live.get(key)
        refused_before = key in self.refused()
        keeps = session is None or grant is None or grant.id == session.id
        if keeps:
            (entry,) = {e.public_key: e for e in self.entries if e.public_key == key}.values()
            self._keep_only(key, [entry._replace(session=grant)])
        self._list(
            [
                e._replace(session=grant, session_fault=event.fault) if e.public_key == key else e
                for e in self.entries
            ]
        )
        if session is None or grant is None or keeps:
            return
        in_place = (
            session.in_use and self.must_do_mfa(key) and not refused_before and key not in self.refused()
        )
        disturbed, life = key in self.disturbed, self.life.get(key)
        self.end(key)
        if in_place:
            self._begin(key, grant, now)
            if not self.live[key].over(now):
                self.live[key].heirs_of |= session.heirs_of
                if life is not None:
                    self.life[key] = life
                if not disturbed:
                    self.disturbed.discard(key)

    def _take_revocation(self, key: PublicKey, session_id: str) -> None:
        session = self.live.get(key)
        if session is not None:
            if session.id == session_id:
                self.end(key)
            return
        if not self.on_two_keys(session_id):
            self.ended |= {
                session_id
                for e in self.entries
                if e.public_key == key and e.session and e.session.id == session_id
            }
        self.entries = [
            e._replace(session=None)
            if e.public_key == key and e.session and e.session.id == session_id
            else e
            for e in self.entries
        ]

    def _keep_only(self, key: PublicKey, entries: list[Peer]) -> None:
        """End the live session of a peer unless one of its entries shows it unaltered."""
        session = self.live.get(key)
        if session is None:
            return
        shown = [(e.session.id, e.session.granted_at) for e in entries if e.session]
        if (session.id, session.granted_at) not in shown:
            self.end(key)

    def _list(self, entries: list[Peer]) -> None:
        self.entries = entries

    def _lower(self) -> None:
        for session in self.live.values():
            too_long = session.ends_at - (session.granted_at + self.lifetime())
            if too_long > 0:
                session.ends_at -= too_long
                session.wall -= too_long
                if session.boot is not None:
                    session.boot -= too_long

    def _begin(self, key: PublicKey, grant: Grant, now: Now) -> None:
        granted_at = dated(grant)
        ends_at = min(grant.expires_at, granted_at + self.lifetime())
        remainder = ends_at - self.core_time(now)
        if remainder < 0.001:
            remainder = 0.0
        self.live[key] = Live(
            grant.id,
            grant.preshared_key,
            granted_at,
            grant.expires_at,
            ends_at,
            now.boot + remainder,
            now.wall + remainder,
            self.must_do_mfa(key),
            frozenset({grant.id}),
        )

    def _begin_and_renew(self, now: Now) -> None:
        if not self.known:
            return
        for entry in self.entries:
            key, grant, held = entry.public_key, entry.session, self.live.get(entry.public_key)
            others = [e for e in self.entries if e.public_key == key and e is not entry]
            if grant is None or any(e.session_fault for e in [entry, *others]):
                continue
            if grant.id in self.ended or self.on_two_keys(grant.id):
                continue
            if held is None:
                self._begin(key, grant, now)
                continue
            if grant.id != held.id:
                continue
            held.preshared_key = grant.preshared_key
            if grant.expires_at != held.expires_at:
                in_use, heirs_of = held.in_use, held.heirs_of
                self._begin(key, grant, now)
                self.live[key].in_use, self.live[key].heirs_of = in_use, heirs_of
            elif held.boot is None:
                held.boot = now.boot + held.ends_at - self.core_time(now)

    # Signs of life (rule 7).

    def was_added(self, key: PublicKey, now: Now) -> None:
        if key in self.live:
            before = self.life.get(key)
            self.life[key] = Life(now.boot, sign_at=before.sign_at if before else None)

    def look(self, key: PublicKey, handshake: float, rx: int, now: Now) -> None:
        life = self.life.get(key)
        if life is None:
            return
        if handshake and handshake != life.handshake:
            life.handshake, life.handshake_at, life.sign_at = handshake, now.boot, now.boot
        elif (
            rx not in {0, life.rx}
            and life.handshake_at is not None
            and now.boot - life.handshake_at < HANDSHAKE_LIFETIME
        ):
            life.sign_at = now.boot
        life.rx = rx

    def end_the_lifeless(self, present: set[PublicKey], now: Now) -> set[str]:
        """End sessions without life among those on the interface; return their ids."""
        if self.policy.liveness == "core":
            return set()
        ended = set()
        for key, life in list(self.life.items()):
            session = self.live.get(key)
            if session is None or not session.in_use or key not in present or key in self.refused():
                continue
            if life.sign_at is None:
                over = now.boot - life.added_at >= min(
                    self.connect_timeout, self.policy.connect_timeout or self.connect_timeout
                )
            else:
                over = now.boot - max(life.sign_at, life.added_at) >= min(
                    self.idle_timeout, self.policy.idle_timeout or self.idle_timeout
                )
            if over:
                ended.add(session.id)
                self.end(key)
        return ended
