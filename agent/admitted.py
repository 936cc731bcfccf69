"""Whom the guard's table is known to let through, beside whom the state wants let through (rules 11 to 13).

What is known is what was written, or read, by ``agent.guardtable``; here nobody is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from msgspec import Struct

from agent.guard import TOLERANCE, Admission, GuardContents, compare
from agent.model import DesiredPeer, Now, Prefix, PublicKey
from agent.sessions import Deadline
from agent.state import State


class Held(Struct, frozen=True, gc=False):
    """A peer's prefixes as they were admitted, and until when."""

    prefixes: tuple[Prefix, ...] = ()
    deadline: Deadline | None = None


_NOTHING: Final = Held()


class Admitted:
    """The peers that one table lets through. It marks as dirty in the state who is to be dealt with anew."""

    def __init__(self, state: State) -> None:
        self.untidy = False
        """Whether the table may hold elements of ours that are not known here."""
        self.unsettled: set[PublicKey] = set()
        """Who may not be admitted as is wanted: to be tried again at the next look."""
        self._state = state
        self._held: dict[PublicKey, Held] = {}
        self._owner: dict[Prefix, PublicKey] = {}
        self._agreed: set[PublicKey] = set()
        """Of those that are being dealt with, who has been admitted just as is wanted."""
        self._adopted = False
        """Whether what is held here was just read from a whole table of an earlier life."""

    # What is wanted.

    def everybody(self) -> list[PublicKey]:
        """Who is listed, has a session or is let through."""
        return list(self._state.roster.peers.keys() | self._held.keys() | self._state.sessions.keys())

    def admission(self, key: PublicKey, now: Now) -> Admission | None:
        """How the peer is to be let through now, None if it is not to be."""
        state = self._state
        session, peer = state.sessions.get(key), state.roster.peers.get(key)
        want = state.wanted(key, now)
        if want is None:
            return None
        in_use = session is not None and session.in_use
        remaining = session.deadline.remaining(now) if session is not None and in_use else None
        if isinstance(want, DesiredPeer):
            prefixes = want.allowed_ips
            fresh = not self.untidy and self._owner.keys().isdisjoint(prefixes)
            return Admission(prefixes, remaining, fresh)
        # A peer that is left as it was found: what the journal says of it.
        if peer is not None and peer.allowed_ips:
            return Admission(peer.allowed_ips, remaining)
        held = self._held.get(key)
        return None if held is None else Admission(held.prefixes, remaining)

    def admissions(
        self, keys: Iterable[PublicKey], now: Now, *, changed_only: bool = False
    ) -> dict[PublicKey, Admission]:
        """Return how those of them who are wanted are to be let through.

        ``changed_only``: without those who are admitted just so; these need not be dismissed either.
        """
        admissions = {}
        for key in keys:
            admission = self.admission(key, now)
            if admission is None:
                continue
            if changed_only and self._is_held(key, admission):
                self._agreed.add(key)
                continue
            admissions[key] = admission
        return admissions

    def as_held(self, admissions: Mapping[PublicKey, Admission]) -> dict[PublicKey, Held]:
        """Return what is to be remembered of these once they are written."""
        return {key: self._as_held(key, admission) for key, admission in admissions.items()}

    # What is known of the table.

    def lets_through(self, key: PublicKey, now: Now) -> bool:
        """Whether the peer has elements that have not ended."""
        held = self._held.get(key)
        return held is not None and (held.deadline is None or not held.deadline.passed(now))

    def covers(self, key: PublicKey, admission: Admission, now: Now) -> bool:
        """Whether the peer needs no session, or has elements that do not outlive it."""
        if admission.remaining is None:
            return True
        held = self._held.get(key, _NOTHING)
        if held.deadline is None or not set(held.prefixes) >= set(admission.prefixes):
            return False
        return held.deadline.remaining(now) <= admission.remaining + TOLERANCE

    def settled(self, now: Now) -> dict[PublicKey, Admission]:
        """Who has been admitted as is wanted now; others are still to follow, or to be tried again."""
        settled, dirty = {}, self._state.dirty
        for key, admission in self.admissions(self.everybody(), now).items():
            if key in dirty:
                continue
            if self._is_held(key, admission):
                settled[key] = admission
            else:
                dirty.add(key)
        return settled

    def is_among(self, peers: Mapping[PublicKey, Admission]) -> bool:
        """Whether nobody else than these is let through."""
        return self._held.keys() <= peers.keys()

    def strangers(self, contents: GuardContents) -> set[Prefix]:
        """Return what the table has, and nobody is known to own."""
        return (contents.elements.keys() | contents.barred) - self._owner.keys()

    def of_others(self, peers: Mapping[PublicKey, Admission]) -> set[Prefix]:
        """Return what is owned by others than these."""
        return {prefix for prefix, owner in self._owner.items() if owner not in peers}

    def already_there(self, written: Mapping[PublicKey, Held]) -> Collection[PublicKey]:
        """Who of these is just so in a table that was adopted, and has not been written to since."""
        adopted, self._adopted = self._adopted, False
        return {key for key, held in written.items() if self._held.get(key) == held} if adopted else ()

    # What becomes of it.

    def adopt(self, contents: GuardContents, now: Now) -> None:
        """Take over the elements that adopted sessions have in a whole table of an earlier life."""
        for key, admission in self.admissions(self.everybody(), now).items():
            prefixes, remaining, _ = admission
            left = contents.remaining(prefixes)
            if not compare({key: admission}, contents.of(prefixes), lease_demanded=True).drift:
                self._hold(key, self._as_held(key, admission))
            elif left and remaining is not None:
                self._hold(key, Held(prefixes, Deadline(now.boot + left, now.wall + left)))
        self._adopted = True

    def judge_anew(self) -> None:
        """Of nobody is it known any more that they have just been admitted as is wanted."""
        self._agreed.clear()

    def take(self, written: Mapping[PublicKey, Held], refused: Collection[PublicKey]) -> None:
        """These have been written, but for those that were refused."""
        self.unsettled.update(refused)
        # Whose session is nearly over is refused, and barred all the same.
        self.untidy |= bool(refused)
        for key, wanted in written.items():
            if key in refused:
                continue
            held = self._held.get(key, _NOTHING)
            # What the peer had besides is dismissed once the device has followed.
            left = [p for p in held.prefixes if p not in wanted.prefixes and self._owner.get(p) == key]
            if not left:
                self._agreed.add(key)
                self._hold(key, wanted)
            else:
                self._hold(key, Held((*wanted.prefixes, *left), wanted.deadline))

    def moving(self, admissions: Mapping[PublicKey, Admission]) -> list[Prefix]:
        """Return what these are to have, and others still have."""
        return [
            prefix
            for key, admission in admissions.items()
            for prefix in admission.prefixes
            if self._owner.get(prefix, key) != key
        ]

    def moved(self, prefixes: Iterable[Prefix]) -> None:
        """These have been dismissed for another owner."""
        for prefix in prefixes:
            owner = self._owner.pop(prefix, None)
            if owner is not None and (theirs := self._held.get(owner)) is not None:
                self.unsettled.add(owner)
                self._held[owner] = Held(tuple(p for p in theirs.prefixes if p != prefix), theirs.deadline)

    def withdraw(self, dirty: Iterable[PublicKey], now: Now, *, judged: bool) -> list[Prefix]:
        """Forget what these have and are not to have; return it, to be dismissed.

        ``judged``: those of them who are wanted have just been admitted.
        """
        gone: list[Prefix] = []
        agreed = self._agreed - self._state.dirty if judged else set()
        self._agreed = set()
        for key in dirty:
            held = None if key in agreed else self._held.get(key)
            if held is None:
                continue
            admission = self.admission(key, now)
            kept = () if admission is None else admission.prefixes
            gone += [p for p in held.prefixes if p not in kept and self._owner.get(p) == key]
            if admission is None:
                del self._held[key]
            else:
                # Not as it is wanted but as it was written: what has not been is written later.
                self._held[key] = Held(tuple(p for p in held.prefixes if p in kept), held.deadline)
                self.unsettled.add(key)
        for prefix in gone:
            del self._owner[prefix]
        return gone

    def keep_only(self, peers: Mapping[PublicKey, Admission]) -> None:
        """Whether the table has elements of others than these is not known any more."""
        for key in self._held.keys() - peers.keys():
            for prefix in self._held.pop(key).prefixes:
                if self._owner.get(prefix) == key:
                    del self._owner[prefix]
            self.untidy = True

    def try_again(self, now: Now) -> None:
        """Have those dealt with once more who are not admitted as is wanted, as far as is known."""
        dirty = self._state.dirty
        for key in self.unsettled - dirty:
            admission = self.admission(key, now)
            if admission is not None and not self._is_held(key, admission):
                dirty.add(key)
        self.unsettled.clear()

    def lose_link(self) -> None:
        """The link went, and the table's chain with it; the elements may still be there."""
        self.untidy |= bool(self._held)
        self.forget()

    def forget(self) -> None:
        """There is no table any more."""
        self._held.clear()
        self._owner.clear()
        self._adopted = False

    def _as_held(self, key: PublicKey, admission: Admission) -> Held:
        deadline = None if admission.remaining is None else self._state.sessions[key].deadline
        return Held(admission.prefixes, deadline)

    def _is_held(self, key: PublicKey, admission: Admission) -> bool:
        return self._held.get(key) == self._as_held(key, admission)

    def _hold(self, key: PublicKey, held: Held) -> None:
        self._held[key] = held
        for prefix in held.prefixes:
            self._owner[prefix] = key
