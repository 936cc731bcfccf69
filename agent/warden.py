"""Keeps the kernel's own guard in step with the state (rules 11 to 13 and 19).

On a grant the element is written before the peer, on an end the peer goes before the element. The
table is there only while something needs it: a location that requires MFA, or sessions that still run
after it no longer does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, Literal, TypeVar

import structlog
from msgspec import Struct

from agent import clock
from agent.encoding import format_key
from agent.errors import GuardDrifted, GuardError
from agent.guard import TOLERANCE, Admission, GuardContents, GuardDrift, compare, slept_since
from agent.model import DesiredPeer, Now, Prefix, PublicKey
from agent.patience import Patience
from agent.ports import Guard
from agent.sessions import Deadline
from agent.state import State

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class _Held(Struct, frozen=True, gc=False):
    """A peer's prefixes as they were admitted, and until when."""

    prefixes: tuple[Prefix, ...] = ()
    deadline: Deadline | None = None


_NOTHING: Final = _Held()

_LEASE_EVERY: Final = 0.8
"""Seconds at least between two renewals of the lease: once a tick."""
_RAISE_EVERY: Final = 5.0
"""Seconds between two attempts at a table that could not be made: each is work over all peers."""
_READ_EVERY: Final = 600.0
"""Seconds after which a look reads the table though nobody has touched it: reading it is work over all peers
(``stats_tick_10k``)."""


class Warden:
    """The keeper of one guard; to be called from the reconciler's task only.

    ``lease`` in seconds, 0 for none. If ``required``, peers that the guard can't admit are to be
    refused; else the agent goes without it where it can't be had.
    """

    def __init__(
        self, *, state: State, guard: Guard, read_clock: Callable[[], Now], required: bool, lease: float
    ) -> None:
        self.lease = lease
        self.fault = ""
        """Why the guard is not in force though it is needed; empty if it is, or is not needed."""
        self.drift: list[GuardDrift] = []
        """What somebody else has changed, found at a look or on the way; to be taken."""
        self.patience = Patience()
        """What the guard is waited for with: the state may move meanwhile."""
        self.busy = False
        """Whether the guard is waited for right now: it is not to be asked anything else."""
        self._state = state
        self._guard = guard
        self._clock = read_clock
        self._required = required
        self._up = False
        self._left_over = False
        """Whether there may be a table of an earlier life that was not taken over."""
        self._unread = False
        """Whether that is not known, since it could not be read."""
        self._held: dict[PublicKey, _Held] = {}
        self._owner: dict[Prefix, PublicKey] = {}
        self._untidy = False
        """Whether the table may hold elements of ours that are not known here."""
        self._unsettled: set[PublicKey] = set()
        """Who may not be admitted as is wanted: to be tried again at the next look."""
        self._agreed: set[PublicKey] = set()
        """Of those that are being dealt with, who has been admitted just as is wanted."""
        self._read_at = -_READ_EVERY
        self._read_again = False
        """Whether there was something at the last reading that could not be judged yet."""
        self._adopted = False
        """Whether what is held here was just read from a whole table of an earlier life."""
        self._failed: GuardError | None = None
        """Why the table could not be made at the last attempt, and when that was."""
        self._failed_at = 0.0
        self._stays = ""
        """Why a table that nothing needs could not be taken down."""
        self._offset = 0.0
        self._wall_offset = 0.0
        """Wall clock less boot time when all elements were last right."""
        self._renewed_at = 0.0
        self._lapsing = False
        """Whether the lease of a table that was left over could not be renewed the last time."""

    @property
    def needed(self) -> bool:
        """Whether anything depends on the guard: MFA, or a session that is in use without it."""
        state = self._state
        return state.roster.mfa_required or any(session.in_use for session in state.sessions.values())

    def guarded(self, key: PublicKey, now: Now) -> Literal["admitted", "barred", "missing"] | None:
        """What the guard is known to do with this peer now; ``missing`` where it is not in force.

        None if no guard is needed.
        """
        if not self.needed:
            return None
        if not self._up:
            return "missing"
        held = self._held.get(key)
        lets = held is not None and (held.deadline is None or not held.deadline.passed(now))
        return "admitted" if lets else "barred"

    @property
    def condition(self) -> Literal["in_force", "missing", "left_over", "unknown", "not_needed"]:
        """How things stand with the table, as far as is known.

        ``left_over``: the table of an earlier life is still there, and lets nobody through for longer than it
        did then. ``unknown``: whether there is to be one, or whether there is one, nobody has said yet.
        """
        if self._up:
            return "in_force"
        if self.needed:
            return "missing"
        if self._left_over:
            return "unknown" if self._unread else "left_over"
        return "unknown" if self._state.location is None else "not_needed"

    async def start(self) -> GuardContents | None:
        """See whether an earlier life has left a table, and return what it holds.

        It goes on ending sessions, whoever knows of it.
        """
        try:
            contents = await self._ask(self._guard.read())
        except GuardError as error:
            _log.warning("the guard can't be read", error=str(error))
            self._left_over = self._untidy = self._unread = True
            return None
        self._left_over = self._untidy = contents is not None
        return contents

    def adopt(self, contents: GuardContents) -> None:
        """Take over the elements that adopted sessions have in a table of an earlier life.

        They end these sessions whether or not the table can be made again.
        """
        if contents.faults:
            return
        now = self._clock()
        for key, admission in self._admissions(self._everybody(), now).items():
            prefixes, remaining, _ = admission
            left = contents.remaining(prefixes)
            if not compare({key: admission}, contents.of(prefixes), lease_demanded=True).drift:
                self._hold(key, self._as_held(key, admission))
            elif left and remaining is not None:
                self._hold(key, _Held(prefixes, Deadline(now.boot + left, now.wall + left)))
        self._adopted = True

    def link_made(self) -> None:
        """The link was made anew: the chain at its ingress hook went with the old one."""
        self._untidy |= bool(self._held)
        self._up, self._failed, self._adopted = False, None, False
        self._forget()

    @asynccontextmanager
    async def long_plan(self) -> AsyncIterator[None]:
        """Many are admitted in this block, a portion at a time; at its end the table is seen to be whole."""
        self._guard.mute()
        try:
            yield
        finally:
            try:
                await self._ask(self._guard.unmute())
            except GuardError as error:
                self._lost(error)

    async def before_removes(self, there: Collection[PublicKey]) -> None:
        """Have the table there before anybody is removed, when MFA was switched on.

        ``there``: who is on the interface, and is let through from its first moment on. All others are
        admitted before they are put on it.
        """
        self._agreed.clear()
        if self._up or self._is_hopeless() or not self.needed:
            return
        # Nobody is kept on the interface for it; who is to be let in is judged next.
        with contextlib.suppress(GuardError):
            await self._raise(there)
        # Who was moved meanwhile may be wanted otherwise than they were admitted.
        self._agreed.clear()

    async def before_kernel(self, dirty: Iterable[PublicKey], now: Now) -> list[PublicKey]:
        """Admit whoever of these is wanted, before the device has them; return who can't be let in.

        A long plan does so a portion at a time.
        """
        if not self.needed:
            self.fault, self._failed = "", None
            return []
        if not self._up and self._failed is not None and self._is_hopeless():
            return self._without(self._failed, dirty, now)
        was_up = self._up
        try:
            if not was_up:
                refused = await self._raise()
            else:
                try:
                    refused = await self._admit(self._admissions(dirty, now, changed_only=True))
                except GuardError as error:
                    # Nobody waits for the next look: a table that is gone is made again at once.
                    self._note_loss(error)
                    refused = await self._raise()
        except GuardError as error:
            if was_up:
                self._state.dirty.update(self._everybody())
            return self._without(error, dirty, self._clock())
        self.fault = ""
        for key, why in refused.items():
            _log.error("the guard can't admit a peer", peer=format_key(key), error=why)
        return list(refused) if self._required else []

    async def after_kernel(self, dirty: Iterable[PublicKey], now: Now, *, judged: bool = True) -> None:
        """Dismiss whoever of these is wanted no longer, now that the device does not have them.

        ``judged``: ``before_kernel`` has just admitted those who are wanted.
        """
        gone: list[Prefix] = []
        agreed = self._agreed - self._state.dirty if judged else set()
        self._agreed = set()
        for key in dirty:
            held = None if key in agreed else self._held.get(key)
            if held is None:
                continue
            admission = self._admission(key, now)
            kept = () if admission is None else admission.prefixes
            gone += [p for p in held.prefixes if p not in kept and self._owner.get(p) == key]
            if admission is None:
                del self._held[key]
            else:
                # Not as it is wanted but as it was written: what has not been is written later.
                self._held[key] = _Held(tuple(p for p in held.prefixes if p in kept), held.deadline)
                self._unsettled.add(key)
        for prefix in gone:
            del self._owner[prefix]
        if not gone:
            return
        if not self._up:
            self._untidy = True
            return
        try:
            await self._ask(self._guard.dismiss(gone))
        except GuardError as error:
            # The elements end at their deadline; the next look finds those that are still there.
            self._untidy = True
            _log.warning("the guard could not dismiss elements", error=str(error))

    async def settle(self) -> None:
        """The device has followed: a guard that nothing needs any longer goes last."""
        if self.needed or self._state.location is None or not (self._up or self._left_over):
            return
        if self._is_hopeless():
            return
        try:
            await self._ask(self._guard.lower())
        except GuardError as error:
            if str(error) != self._stays:
                _log.error("the guard could not be taken down, tried again soon", error=str(error))
            self._stays = str(error)
            self._failed, self._failed_at = error, clock.monotonic()
            return
        self._stays = ""
        self._up = self._left_over = False
        self._forget()
        _log.info("guard taken down")

    async def tick(self) -> None:
        """Renew the agent's lease, and write all elements anew after a suspend or a step of the clock."""
        left_over = self._left_over and self._state.location is None
        # A lease that lapses meanwhile would suspend whoever still has an element.
        down = bool(self.fault)
        if not (self._up or left_over or down) or clock.monotonic() - self._renewed_at < _LEASE_EVERY:
            return
        self._renewed_at = clock.monotonic()
        now = self._clock()
        try:
            await self._ask(self._guard.renew_lease(self.lease or None))
            stepped = abs(now.wall - now.boot - self._wall_offset) > TOLERANCE
            if self._up and (stepped or slept_since(self._offset, now.boot, clock.monotonic())):
                self._note_offsets(now)
                await self._admit(self._admissions(self._everybody(), now))
        except GuardError as error:
            if self._up:
                self._lost(error)
            elif left_over and not self._lapsing:
                _log.warning("the lease can't be renewed", error=str(error))
                self._lapsing = True
        else:
            self._lapsing = False

    async def look(self, *, closely: bool = False) -> None:
        """See whether somebody else has changed the table, and repair that.

        The table is read if it may have been changed, now and then, or ``closely``.
        """
        if not self.needed:
            return
        if not self._up:
            self._failed = None
            self._state.dirty.update(self._everybody())
            return
        rested = clock.monotonic() - self._read_at < _READ_EVERY
        closely |= self._untidy or self._read_again
        if rested and not closely and self._guard.untouched():
            self._try_again()
            return
        await self._read()

    def _try_again(self) -> None:
        """Have those dealt with once more who are not admitted as is wanted, as far as is known."""
        now, dirty = self._clock(), self._state.dirty
        for key in self._unsettled - dirty:
            admission = self._admission(key, now)
            if admission is not None and self._held.get(key) != self._as_held(key, admission):
                dirty.add(key)
        self._unsettled.clear()

    async def _read(self) -> None:
        try:
            contents = await self._ask(self._guard.read())
            self._read_at = clock.monotonic()
            self._unsettled.clear()
            now = self._clock()
            wanted = self._settled(now)
            # Whoever is to be dealt with anyhow may be found to be held as is wanted, and be left alone then.
            self._read_again = not self._held.keys() <= wanted.keys()
            if contents is not None:
                contents = await self._known(contents, wanted)
            repair = compare(wanted, contents, lease_demanded=bool(self.lease))
            if contents is None:
                self._forget()
            if repair.rebuild:
                await self._raise()
            if repair.dismiss:
                await self._ask(self._guard.dismiss(repair.dismiss))
            if repair.admit and not repair.rebuild:
                await self._admit(self._admissions(repair.admit, self._clock()))
        except GuardError as error:
            self._lost(error)
            return
        self.drift += repair.drift

    def _lost(self, error: GuardError) -> None:
        """The table is not as it was left: it is to be raised again, with everybody in it."""
        self._note_loss(error)
        self._state.dirty.update(self._everybody())

    def _note_loss(self, error: GuardError) -> None:
        self._up = False
        if isinstance(error, GuardDrifted):
            self.drift.append(GuardDrift(None, error.message))
        else:
            _log.error("the guard can't be kept, it is made again", error=str(error))

    async def disturbed(self) -> None:
        """Return once the table was changed, perhaps by us: time to look."""
        await self._guard.disturbed()

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._guard.close()

    def _is_hopeless(self) -> bool:
        """Whether the table could not be made just now, and need not be tried at each change."""
        return self._failed is not None and clock.monotonic() - self._failed_at < _RAISE_EVERY

    def _settled(self, now: Now) -> dict[PublicKey, Admission]:
        """Who has been admitted as is wanted now; others are still to follow, or to be tried again."""
        settled, dirty = {}, self._state.dirty
        for key, admission in self._admissions(self._everybody(), now).items():
            if key in dirty:
                continue
            if self._held.get(key) == self._as_held(key, admission):
                settled[key] = admission
            else:
                dirty.add(key)
        return settled

    async def _known(self, contents: GuardContents, settled: Mapping[PublicKey, Admission]) -> GuardContents:
        """What of the contents can be judged: not what is still to follow, nor what is left as found.

        Elements of ours whose dismissal was missed, in another life or by a fault, are dismissed.
        """
        strange = (contents.elements.keys() | contents.barred) - self._owner.keys()
        aside = {prefix for prefix, owner in self._owner.items() if owner not in settled}
        if self._state.epoch is None:
            aside |= strange
        elif self._untidy:
            if strange:
                await self._ask(self._guard.dismiss(strange))
            aside |= strange
            self._untidy = False
        if not aside:
            return contents
        elements = {prefix: left for prefix, left in contents.elements.items() if prefix not in aside}
        return replace(contents, elements=elements, barred=contents.barred - aside)

    def _everybody(self) -> list[PublicKey]:
        return list(self._state.roster.peers.keys() | self._held.keys() | self._state.sessions.keys())

    def _admission(self, key: PublicKey, now: Now) -> Admission | None:
        state = self._state
        session, peer = state.sessions.get(key), state.roster.peers.get(key)
        want = state.wanted(key, now)
        if want is None:
            return None
        in_use = session is not None and session.in_use
        remaining = session.deadline.remaining(now) if session is not None and in_use else None
        if isinstance(want, DesiredPeer):
            prefixes = want.allowed_ips
            fresh = not self._untidy and self._owner.keys().isdisjoint(prefixes)
            return Admission(prefixes, remaining, fresh)
        # A peer that is left as it was found: what the journal says of it.
        if peer is not None and peer.allowed_ips:
            return Admission(peer.allowed_ips, remaining)
        held = self._held.get(key)
        return None if held is None else Admission(held.prefixes, remaining)

    def _admissions(
        self, keys: Iterable[PublicKey], now: Now, *, changed_only: bool = False
    ) -> dict[PublicKey, Admission]:
        admissions = {}
        for key in keys:
            admission = self._admission(key, now)
            if admission is None:
                continue
            if changed_only and self._held.get(key) == self._as_held(key, admission):
                self._agreed.add(key)
                continue
            admissions[key] = admission
        return admissions

    def _as_held(self, key: PublicKey, admission: Admission) -> _Held:
        deadline = None if admission.remaining is None else self._state.sessions[key].deadline
        return _Held(admission.prefixes, deadline)

    def _all_as_held(self, admissions: Mapping[PublicKey, Admission]) -> dict[PublicKey, _Held]:
        return {key: self._as_held(key, admission) for key, admission in admissions.items()}

    async def _raise(self, whom: Collection[PublicKey] | None = None) -> Mapping[PublicKey, str]:
        """Have the table, with everybody in it or, of everybody, these."""
        everybody = self._everybody()
        keys = everybody if whom is None else [key for key in everybody if key in whom]
        admissions = self._admissions(keys, self._clock())
        if whom is not None:
            self._let_go_of(self._held.keys() - admissions.keys())
        held = self._all_as_held(admissions)
        there = {key for key, one in held.items() if self._held.get(key) == one} if self._adopted else ()
        self._adopted = False
        try:
            refused = await self._ask(self._guard.raise_(admissions, self.lease or None, there))
        except GuardError as error:
            self._failed, self._failed_at = error, clock.monotonic()
            raise
        self._failed = None
        if not self._up:
            _log.info("guard in force")
        self._up, self._left_over = True, False
        self._note_offsets(self._clock())
        self._take(held, refused)
        return refused

    def _note_offsets(self, now: Now) -> None:
        self._offset = now.boot - clock.monotonic()
        self._wall_offset = now.wall - now.boot

    async def _admit(self, admissions: dict[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        if not admissions:
            return {}
        moved = [
            prefix
            for key, admission in admissions.items()
            for prefix in admission.prefixes
            if self._owner.get(prefix, key) != key
        ]
        if moved:
            await self._ask(self._guard.dismiss(moved))
            for prefix in moved:
                owner = self._owner.pop(prefix, None)
                if owner is not None and (theirs := self._held.get(owner)) is not None:
                    self._unsettled.add(owner)
                    self._held[owner] = _Held(
                        tuple(p for p in theirs.prefixes if p != prefix), theirs.deadline
                    )
            # That took a while, and the guard counts sessions' lives from when it is asked.
            admissions = self._admissions(admissions, self._clock())
        held = self._all_as_held(admissions)
        refused = await self._ask(self._guard.admit(admissions))
        self._take(held, refused)
        return refused

    def _take(self, written: Mapping[PublicKey, _Held], refused: Mapping[PublicKey, str]) -> None:
        self._unsettled |= refused.keys()
        # Whose session is nearly over is refused, and barred all the same.
        self._untidy |= bool(refused)
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
                self._hold(key, _Held((*wanted.prefixes, *left), wanted.deadline))

    async def _ask(self, work: Awaitable[_T]) -> _T:
        self.busy = True
        try:
            return await self.patience.wait_for("nftables", work)
        except GuardError:
            # Of several transactions some may be in force.
            self._untidy = True
            raise
        finally:
            self.busy = False

    def _hold(self, key: PublicKey, held: _Held) -> None:
        self._held[key] = held
        for prefix in held.prefixes:
            self._owner[prefix] = key

    def _let_go_of(self, keys: Collection[PublicKey]) -> None:
        """Whether the table has elements of these is not known any more."""
        for key in keys:
            for prefix in self._held.pop(key).prefixes:
                if self._owner.get(prefix) == key:
                    del self._owner[prefix]
            self._untidy = True

    def _forget(self) -> None:
        self._held.clear()
        self._owner.clear()

    def _without(self, error: GuardError, dirty: Iterable[PublicKey], now: Now) -> list[PublicKey]:
        """The guard can't be had: who needs it is refused if it is required, and let in if it is not."""
        self._up = False
        if self.fault != str(error):
            level = _log.error if self._required else _log.warning
            level("there is no guard", error=error.message, hint=error.hint, required=self._required)
        self.fault = str(error)
        if not self._required:
            return []
        # Whoever was admitted before still has an element, which ends in time: nobody loses a packet.
        admissions = self._admissions(dirty, now)
        return [key for key, a in admissions.items() if not self._is_covered(key, a, now)]

    def _is_covered(self, key: PublicKey, admission: Admission, now: Now) -> bool:
        """Whether the peer needs no session, or has elements that do not outlive it."""
        if admission.remaining is None:
            return True
        held = self._held.get(key, _NOTHING)
        if held.deadline is None or not set(held.prefixes) >= set(admission.prefixes):
            return False
        return held.deadline.remaining(now) <= admission.remaining + TOLERANCE
