"""Core's list of peers, and who on it is refused (rules 2, 3 and 6).

Refusals are judged over the whole held list, in the same way whether it came as a snapshot or by
changes. Whoever changes the list takes ``newly_refused`` and ``cleared`` afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from agent.claims import Claims
from agent.model import Peer, PublicKey, Refusal, UnreadablePeer

_Holders = PublicKey | frozenset[PublicKey]
"""Who shows a session id: nearly always one, which is not worth a set of its own (``rss_100k``)."""
_FEW: Final = 8
"""One in so many peers may be listed differently for a list to be taken in one by one."""


class Roster:
    """The listed peers by key. ``ended`` holds the session ids that are dead for good."""

    def __init__(self, own_key: PublicKey | None = None) -> None:
        self.peers: dict[PublicKey, Peer] = {}
        self.unreadable: tuple[UnreadablePeer, ...] = ()
        self.mfa_required = False
        self.ended: dict[str, float] = {}
        """With the first ``granted_at`` of each id, in core's time."""
        self.refused: dict[PublicKey, Refusal] = {}
        self.refusals = 0
        """Counts changes of who is refused, and why, and of what can't be read."""
        self.newly_refused: set[PublicKey] = set()
        self.cleared: set[PublicKey] = set()
        self._judged: dict[PublicKey, Refusal | None] = {}
        """Whose refusal has changed since that was last asked for, and what it was before."""
        self.own_key = own_key
        self._claims = Claims()
        self._holders: dict[str, _Holders] = {}
        self._still_listed: dict[PublicKey, str] = {}
        """Ids that have ended here and that core, which gave them no date, lists for all that is known."""
        self._blocked: dict[PublicKey, Refusal] = {}

    def list_unreadable(self, unreadable: tuple[UnreadablePeer, ...]) -> None:
        """Replace the entries of core's list that have no readable key."""
        if unreadable != self.unreadable:
            self.unreadable = unreadable
            self.refusals += 1

    def must_do_mfa(self, key: PublicKey) -> bool:
        """Whether the peer may be on the interface only with a live session; so may no unlisted one."""
        peer = self.peers.get(key)
        return self.mfa_required and (peer is None or not peer.mfa_exempt)

    def load(
        self, peers: dict[PublicKey, Peer], mfa_required: bool, changed: Collection[PublicKey] | None = None
    ) -> None:
        """Replace the list by this one.

        ``changed``, if that is known, are the peers that are new or listed differently; those that are
        gone have been dropped. A few of them cost what they would one by one.
        """
        few = changed is not None and len(changed) * _FEW <= len(peers)
        if changed is not None and few and mfa_required == self.mfa_required:
            before, pending = frozenset(self.refused), frozenset(self.newly_refused)
            for key in changed:
                self.hold(peers[key])
            # Where a prefix passes from peer to peer, both claim it halfway through the list.
            self.newly_refused &= (self.refused.keys() - before) | pending
            self.unblock()
            return
        self.refusals += 1
        for key in self.refused.keys() - peers.keys():
            self._note(key, self.refused.pop(key))
        self.peers = peers
        self._still_listed.clear()
        self.mfa_required = mfa_required
        self._blocked.clear()
        holders: dict[str, _Holders] = {}
        self._holders = holders
        for key, peer in peers.items():
            if peer.session is not None and holders.setdefault(peer.session.id, key) is not key:
                self._take_up(peer.session.id, key)
        self._judge_all()

    def require_mfa(self, mfa_required: bool) -> None:
        """Switch the location's MFA; the list stays."""
        if mfa_required != self.mfa_required:
            self.mfa_required = mfa_required
            self._judge_all()

    def hold(self, peer: Peer) -> None:
        """List a peer, or list it as it is now."""
        key = peer.public_key
        self._still_listed.pop(key, None)
        before = self.peers.get(key)
        self.peers[key] = peer
        old_id = None if before is None or before.session is None else before.session.id
        new_id = None if peer.session is None else peer.session.id
        affected = self._claims.put(key, peer.allowed_ips, self.must_do_mfa(key))
        if old_id != new_id:
            if new_id is not None:
                affected |= self._take_up(new_id, key)
            affected |= self._let_go(old_id, key)
        self._judge(affected)

    def drop(self, key: PublicKey) -> None:
        """The peer is no longer listed."""
        peer = self.peers.pop(key)
        self._still_listed.pop(key, None)
        if (refusal := self.refused.pop(key, None)) is not None:
            self._note(key, refusal)
            self.refusals += 1
        self._blocked.pop(key, None)
        affected = self._claims.drop(key)
        if peer.session is not None:
            affected |= self._let_go(peer.session.id, key)
        self._judge(affected)

    def end(self, session_id: str, granted_at: float) -> None:
        """The id is dead from now on, and listed no longer as far as the agent is concerned.

        Shown again by core, it is refused.
        """
        self.ended[session_id] = granted_at
        holders = _keys(self._holders.pop(session_id, frozenset()))
        for key in holders:
            session = self.peers[key].session
            if session is not None and session.granted_at is None:
                self._still_listed[key] = session_id
            self.peers[key] = self.peers[key]._replace(session=None)
        # It may have kept a peer out, and keeps nobody in: thousands that end at once are not judged.
        self._judge([key for key in holders if key in self.refused])

    def still_listed(self, session_ids: Iterable[str]) -> set[str]:
        """Return which of these core lists for all that is known, without saying when it granted them."""
        still = set(self._still_listed.values())
        for session_id in session_ids:
            sessions = (self.peers[k].session for k in _keys(self._holders.get(session_id, frozenset())))
            if any(session is not None and session.granted_at is None for session in sessions):
                still.add(session_id)
        return still

    def own(self, key: PublicKey) -> None:
        """The interface has this key from now on."""
        before, self.own_key = self.own_key, key
        self._judge({key} if before is None else {before, key})

    def block(self, keys: Iterable[PublicKey], reason: Refusal) -> None:
        """Refuse these peers for a reason of our own (journal, device) until ``unblock``."""
        blocked = {key: reason for key in keys if key in self.peers}
        self._blocked.update(blocked)
        self._judge(blocked)

    def unblock(self) -> None:
        """What kept peers out on our side may be over: judge them again."""
        blocked = list(self._blocked)
        self._blocked.clear()
        self._judge(blocked)

    def claimants(self, key: PublicKey) -> set[PublicKey]:
        """Return who else claims a prefix of this peer's (rule 3)."""
        return self._claims.neighbours(key)

    def holders(self, session_id: str) -> frozenset[PublicKey]:
        """Return the peers whose entries show this session id."""
        return _keys(self._holders.get(session_id, frozenset()))

    def take_judged(self) -> tuple[list[tuple[PublicKey, Refusal]], list[tuple[PublicKey, Refusal]]]:
        """Return who is refused, and who is no longer, since this was last asked; each with the reason.

        Who was refused only in between, or is not listed any more, is in neither.
        """
        judged, self._judged = self._judged, {}
        refused: list[tuple[PublicKey, Refusal]] = []
        cleared: list[tuple[PublicKey, Refusal]] = []
        for key, before in judged.items():
            refusal = self.refused.get(key)
            if refusal is not None and refusal is not before:
                refused.append((key, refusal))
            elif refusal is None and before is not None and key in self.peers:
                cleared.append((key, before))
        return refused, cleared

    def _note(self, key: PublicKey, before: Refusal | None) -> None:
        self._judged.setdefault(key, before)

    @property
    def blocked(self) -> bool:
        """Whether peers are kept out for a reason of our own."""
        return bool(self._blocked)

    def session_fault(self, key: PublicKey) -> Refusal | None:
        """What keeps the session that the peer's entry shows from being held."""
        peer = self.peers[key]
        if peer.session is not None:
            if peer.session.id in self.ended:
                return Refusal.SESSION_ENDED
            if self._on_two_keys(peer.session.id):
                return Refusal.SESSION_ON_TWO_KEYS
        return peer.session_fault

    def _on_two_keys(self, session_id: str) -> bool:
        return isinstance(self._holders.get(session_id), frozenset)

    def _take_up(self, session_id: str, key: PublicKey) -> frozenset[PublicKey]:
        """Have one holder more of a session id; return all."""
        holders = _keys(self._holders.get(session_id, key)) | {key}
        self._holders[session_id] = holders if len(holders) > 1 else key
        return holders

    def _let_go(self, session_id: str | None, key: PublicKey) -> frozenset[PublicKey]:
        """Take one holder off a session id; return the others."""
        if session_id is None or session_id not in self._holders:
            return frozenset()
        others = _keys(self._holders.pop(session_id)) - {key}
        if len(others) > 1:
            self._holders[session_id] = others
        elif others:
            (self._holders[session_id],) = others
            # Its session may begin, even if something else still keeps the peer out.
            self.cleared.update(others)
        return others

    def _refusal(self, key: PublicKey) -> Refusal | None:
        peer = self.peers[key]
        if peer.fault is not None:
            return peer.fault
        if key == self.own_key:
            return Refusal.OWN_KEY
        if self._claims.contested(key):
            return Refusal.PREFIX_CLAIMED
        fault = self.session_fault(key)
        if fault is Refusal.SESSION_ENDED and peer.session is not None and not self.must_do_mfa(key):
            # A peer that needs no session is not kept out by a dead one.
            fault = Refusal.SESSION_ON_TWO_KEYS if self._on_two_keys(peer.session.id) else None
        return fault or self._blocked.get(key)

    def _judge_all(self) -> None:
        self._claims.load((key, peer.allowed_ips, self.must_do_mfa(key)) for key, peer in self.peers.items())
        contested, holders = self._claims.all_contested(), self._holders
        doubtful = contested | self.refused.keys() | {self.own_key}  # whoever is blocked is refused
        for key, peer in self.peers.items():
            session = peer.session
            if (
                key in doubtful
                or peer.fault is not None
                or peer.session_fault is not None
                or (session is not None and (session.id in self.ended or holders[session.id] is not key))
            ):
                self._judge((key,))

    def _judge(self, keys: Iterable[PublicKey]) -> None:
        for key in keys:
            if key not in self.peers:
                continue
            refusal = self._refusal(key)
            before = self.refused.get(key)
            if refusal is before:
                continue
            self._note(key, before)
            self.refusals += 1
            if refusal is None:
                del self.refused[key]
                self.cleared.add(key)
            else:
                self.refused[key] = refusal
                if before is None:
                    self.newly_refused.add(key)


def _keys(holders: _Holders) -> frozenset[PublicKey]:
    return holders if isinstance(holders, frozenset) else frozenset({holders})
