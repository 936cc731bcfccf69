"""Keeps the kernel's own guard in step with the state (rules 11 to 13 and 19).

On a grant the element is written before the peer, on an end the peer goes before the element. The
table is there only while something needs it: a location that requires MFA, or sessions that still run
after it no longer does. What the table is known to hold is ``agent.admitted``'s to know, and nftables is
asked by ``agent.guardtable``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, Literal

import structlog

from agent import clock
from agent.admitted import Admitted
from agent.encoding import format_key
from agent.errors import GuardDrifted, GuardError
from agent.guard import Admission, GuardContents, GuardDrift, compare
from agent.guardtable import GuardTable
from agent.model import Now, PublicKey
from agent.patience import Patience
from agent.ports import Guard
from agent.state import State

_log = structlog.get_logger(__name__)

_LEASE_EVERY: Final = 0.8
"""Seconds at least between two renewals of the lease: once a tick."""
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
        self.fault = ""
        """Why the guard is not in force though it is needed; empty if it is, or is not needed."""
        self.drift: list[GuardDrift] = []
        """What somebody else has changed, found at a look or on the way; to be taken."""
        self._state = state
        self._clock = read_clock
        self._required = required
        self._admitted = Admitted(state)
        self._table = GuardTable(guard, self._admitted, read_clock, lease)
        self._read_at = -_READ_EVERY
        self._read_again = False
        """Whether there was something at the last reading that could not be judged yet."""
        self._stays = ""
        """Why a table that nothing needs could not be taken down."""
        self._renewed_at = 0.0
        self._lapsing = False
        """Whether the lease of a table that was left over could not be renewed the last time."""

    @property
    def lease(self) -> float:
        """Seconds for which sessions' traffic passes without a word from the agent; 0 for ever."""
        return self._table.lease

    @lease.setter
    def lease(self, seconds: float) -> None:
        self._table.lease = seconds

    @property
    def patience(self) -> Patience:
        """What the guard is waited for with: the state may move meanwhile."""
        return self._table.patience

    @patience.setter
    def patience(self, patience: Patience) -> None:
        self._table.patience = patience

    @property
    def busy(self) -> bool:
        """Whether the guard is waited for right now: it is not to be asked anything else."""
        return self._table.busy

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
        if not self._table.up:
            return "missing"
        return "admitted" if self._admitted.lets_through(key, now) else "barred"

    @property
    def condition(self) -> Literal["in_force", "missing", "left_over", "unknown", "not_needed"]:
        """How things stand with the table, as far as is known.

        ``left_over``: the table of an earlier life is still there, and lets nobody through for longer than it
        did then. ``unknown``: whether there is to be one, or whether there is one, nobody has said yet.
        """
        if self._table.up:
            return "in_force"
        if self.needed:
            return "missing"
        if self._table.left_over:
            return "unknown" if self._table.unread else "left_over"
        return "unknown" if self._state.location is None else "not_needed"

    async def start(self) -> GuardContents | None:
        """See whether an earlier life has left a table, and return what it holds.

        It goes on ending sessions, whoever knows of it.
        """
        return await self._table.find()

    def adopt(self, contents: GuardContents) -> None:
        """Take over the elements that adopted sessions have in a table of an earlier life.

        They end these sessions whether or not the table can be made again.
        """
        if not contents.faults:
            self._admitted.adopt(contents, self._clock())

    def link_made(self) -> None:
        """The link was made anew: the chain at its ingress hook went with the old one."""
        self._table.link_made()

    @asynccontextmanager
    async def long_plan(self) -> AsyncIterator[None]:
        """Many are admitted in this block, a portion at a time; at its end the table is seen to be whole."""
        self._table.mute()
        try:
            yield
        finally:
            try:
                await self._table.unmute()
            except GuardError as error:
                self._lost(error)

    async def before_removes(self, there: Collection[PublicKey]) -> None:
        """Have the table there before anybody is removed, when MFA was switched on.

        ``there``: who is on the interface, and is let through from its first moment on. All others are
        admitted before they are put on it.
        """
        self._admitted.judge_anew()
        if self._table.up or self._table.hopeless or not self.needed:
            return
        # Nobody is kept on the interface for it; who is to be let in is judged next.
        with contextlib.suppress(GuardError):
            await self._table.raise_(there)
        # Who was moved meanwhile may be wanted otherwise than they were admitted.
        self._admitted.judge_anew()

    async def before_kernel(self, dirty: Iterable[PublicKey], now: Now) -> list[PublicKey]:
        """Admit whoever of these is wanted, before the device has them; return who can't be let in.

        A long plan does so a portion at a time.
        """
        table, admitted = self._table, self._admitted
        if not self.needed:
            self.fault, table.failed = "", None
            return []
        if not table.up and table.failed is not None and table.hopeless:
            return self._without(table.failed, dirty, now)
        was_up = table.up
        try:
            if not was_up:
                refused = await table.raise_()
            else:
                try:
                    refused = await table.admit(admitted.admissions(dirty, now, changed_only=True))
                except GuardError as error:
                    # Nobody waits for the next look: a table that is gone is made again at once.
                    self._note_loss(error)
                    refused = await table.raise_()
        except GuardError as error:
            if was_up:
                self._state.dirty.update(admitted.everybody())
            return self._without(error, dirty, self._clock())
        self.fault = ""
        for key, why in refused.items():
            _log.error("the guard can't admit a peer", peer=format_key(key), error=why)
        return list(refused) if self._required else []

    async def after_kernel(self, dirty: Iterable[PublicKey], now: Now, *, judged: bool = True) -> None:
        """Dismiss whoever of these is wanted no longer, now that the device does not have them.

        ``judged``: ``before_kernel`` has just admitted those who are wanted.
        """
        gone = self._admitted.withdraw(dirty, now, judged=judged)
        if not gone:
            return
        if not self._table.up:
            self._admitted.untidy = True
            return
        try:
            await self._table.dismiss(gone)
        except GuardError as error:
            # The elements end at their deadline; the next look finds those that are still there.
            self._admitted.untidy = True
            _log.warning("the guard could not dismiss elements", error=str(error))

    async def settle(self) -> None:
        """The device has followed: a guard that nothing needs any longer goes last."""
        table = self._table
        if self.needed or self._state.location is None or not (table.up or table.left_over):
            return
        if table.hopeless:
            return
        try:
            await table.lower()
        except GuardError as error:
            if str(error) != self._stays:
                _log.error("the guard could not be taken down, tried again soon", error=str(error))
            self._stays = str(error)
            return
        self._stays = ""
        _log.info("guard taken down")

    async def tick(self) -> None:
        """Renew the agent's lease, and write all elements anew after a suspend or a step of the clock."""
        table = self._table
        left_over = table.left_over and self._state.location is None
        # A lease that lapses meanwhile would suspend whoever still has an element.
        down = bool(self.fault)
        if not (table.up or left_over or down) or clock.monotonic() - self._renewed_at < _LEASE_EVERY:
            return
        self._renewed_at = clock.monotonic()
        try:
            await table.renew(self._clock())
        except GuardError as error:
            if table.up:
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
        if not self._table.up:
            self._table.failed = None
            self._state.dirty.update(self._admitted.everybody())
            return
        rested = clock.monotonic() - self._read_at < _READ_EVERY
        closely |= self._admitted.untidy or self._read_again
        if rested and not closely and self._table.untouched():
            self._admitted.try_again(self._clock())
            return
        await self._read()

    async def _read(self) -> None:
        table, admitted = self._table, self._admitted
        try:
            contents = await table.read()
            self._read_at = clock.monotonic()
            admitted.unsettled.clear()
            wanted = admitted.settled(self._clock())
            # Whoever is to be dealt with anyhow may be found to be held as is wanted, and be left alone then.
            self._read_again = not admitted.is_among(wanted)
            if contents is not None:
                contents = await self._known(contents, wanted)
            repair = compare(wanted, contents, lease_demanded=bool(table.lease))
            if contents is None:
                admitted.forget()
            if repair.rebuild:
                await table.raise_()
            if repair.dismiss:
                await table.dismiss(repair.dismiss)
            if repair.admit and not repair.rebuild:
                await table.admit(admitted.admissions(repair.admit, self._clock()))
        except GuardError as error:
            self._lost(error)
            return
        self.drift += repair.drift

    async def _known(self, contents: GuardContents, settled: Mapping[PublicKey, Admission]) -> GuardContents:
        """What of the contents can be judged: not what is still to follow, nor what is left as found.

        Elements of ours whose dismissal was missed, in another life or by a fault, are dismissed.
        """
        admitted = self._admitted
        strange, aside = admitted.strangers(contents), admitted.of_others(settled)
        if self._state.epoch is None:
            aside |= strange
        elif admitted.untidy:
            if strange:
                await self._table.dismiss(strange)
            aside |= strange
            admitted.untidy = False
        if not aside:
            return contents
        elements = {prefix: left for prefix, left in contents.elements.items() if prefix not in aside}
        return replace(contents, elements=elements, barred=contents.barred - aside)

    def _lost(self, error: GuardError) -> None:
        """The table is not as it was left: it is to be raised again, with everybody in it."""
        self._note_loss(error)
        self._state.dirty.update(self._admitted.everybody())

    def _note_loss(self, error: GuardError) -> None:
        self._table.up = False
        if isinstance(error, GuardDrifted):
            self.drift.append(GuardDrift(None, error.message))
        else:
            _log.error("the guard can't be kept, it is made again", error=str(error))

    async def disturbed(self) -> None:
        """Return once the table was changed, perhaps by us: time to look."""
        await self._table.disturbed()

    def close(self) -> None:
        """Let go of nftables; the table stays."""
        self._table.close()

    def _without(self, error: GuardError, dirty: Iterable[PublicKey], now: Now) -> list[PublicKey]:
        """The guard can't be had: who needs it is refused if it is required, and let in if it is not."""
        self._table.up = False
        if self.fault != str(error):
            level = _log.error if self._required else _log.warning
            level("there is no guard", error=error.message, hint=error.hint, required=self._required)
        self.fault = str(error)
        if not self._required:
            return []
        # Whoever was admitted before still has an element, which ends in time: nobody loses a packet.
        admissions = self._admitted.admissions(dirty, now)
        return [key for key, a in admissions.items() if not self._admitted.covers(key, a, now)]
