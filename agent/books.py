"""Keeps the journal in step with the state: what goes in before the kernel, what after (rule 15).

The journal's calls block on the disk, so they run in a thread of their own, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, TypeVar

import structlog

from agent.errors import JournalError
from agent.journal import Contact, Entry, Journal, Loaded
from agent.lives import After, Lives, begin
from agent.model import (
    EndReason,
    InterfaceAddress,
    InterfaceSettings,
    Location,
    Now,
    PublicKey,
    SessionEnd,
    SessionPolicy,
)
from agent.patience import Patience
from agent.sessions import Liveness, Session
from agent.state import State

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_Rows = dict[PublicKey, tuple[Session, Liveness | None]]

_CONTACT_EVERY: Final = 10.0
"""Seconds between two records of the last contact with core, when nothing else is written."""

_FORGET_EVERY: Final = 3600.0
"""Seconds between two times that dead ids are forgotten, where no pull is an occasion."""

PATIENCE: Final = 2.0
"""Seconds that the disk may take for one call before it counts as hanging."""
_PER_ROW: Final = 0.001
_DISK: Final = "the journal's disk"
_SILENT: Final = "the journal's disk does not answer"
_REMEDY: Final = "no new session is admitted until it does"


class Books:
    """The journal of one state. A write that fails returns False and is made good later.

    The state may move while the disk takes its time: what has changed since it was handed to the disk is
    still to be journalled.
    """

    def __init__(
        self,
        journal: Journal,
        state: State,
        patience: Patience | None = None,
        service_result: str = "",
    ) -> None:
        self.ok = True
        """Whether the journal could be written the last time."""
        self.heard = Contact(None, 0.0)
        """The last byte from core."""
        self.granted = 0
        """New sessions that have been journalled, and so are let in."""
        self.lives: Lives | None = None
        """All starts of the agent, this one among them; None while the journal can't be read."""
        self._service_result = service_result
        self._journal = journal
        self._state = state
        self._patience = patience or Patience()
        self._disk = ThreadPoolExecutor(1, "journal")
        self._hanging: asyncio.Future[Any] | None = None
        self._contact_at = 0.0
        self._forgot_at = 0.0
        self._loaded = False
        self._place: tuple[Location, InterfaceSettings, SessionPolicy] | None = None
        self._traffic_due: set[PublicKey] = set()
        self._addresses_due: tuple[InterfaceAddress, ...] | None = None

    async def load(self, now: Now) -> Loaded | None:
        """Read the journal into the state; None if it can't be read."""
        self.heard = Contact(now.boot, now.wall)
        try:
            loaded = await self._in_thread(self._journal.load)
        except JournalError as error:
            self._failed(error)
            return None
        self._loaded = True
        if self._journal.unwritable is not None:
            self._failed(self._journal.unwritable)
        if self._journal.set_aside is not None:
            _log.error("journal unreadable, set aside", path=str(self._journal.set_aside))
        self._state.traffic.restore(loaded.traffic)
        self._state.restore(loaded.restored, now)
        if loaded.contact is not None:
            self.heard = loaded.contact
        await self._begin(loaded)
        return loaded

    async def _begin(self, loaded: Loaded) -> None:
        """Count this start, and journal that this process has not been stopped yet."""
        after, self.lives = begin(loaded.lives, self._journal.boot_id, self._service_result)
        if after in {After.CRASH, After.WATCHDOG, After.OOM, After.REBOOT}:
            _log.warning("the agent was not stopped the last time", after=after.value)
        await self.write(Entry(lives=self.lives))

    async def before_kernel(self, whose: Collection[PublicKey] | None = None) -> list[PublicKey]:
        """Journal these peers' sessions as they are (None: everybody's).

        Returns the peers, of all, whose new session is not in the journal where it could not be written.
        """
        state = self._state
        due = state.to_journal
        rows = self._rows(due if whose is None else (key for key in whose if key in due))
        entry = Entry(sessions=list(rows.values()))
        # A session and the end of the one that it replaces go together: of two rows of one peer a
        # restart could not tell which is which.
        ended = state.roster.ended
        entry.ends = [
            (end, ended.get(end.session_id, end.ended_at))
            for end in state.ends
            if end.reason is EndReason.REPLACED and end.public_key in rows
        ]
        if await self.write(entry):
            before = len(state.begun)
            state.begun.difference_update(session.id for session, _ in entry.sessions)
            self.granted += before - len(state.begun)
            if not state.begun:
                # One that has been emptied keeps the room it had.
                state.begun = set()
            self._are_journalled(rows)
            return []
        live = {key: state.sessions[key] for key in state.to_journal if key in state.sessions}
        refused = state.roster.refused
        return [key for key, s in live.items() if s.id in state.begun and key not in refused]

    async def after_kernel(
        self, now: Now, *, pulled: bool, except_for: Collection[PublicKey]
    ) -> tuple[SessionEnd, ...]:
        """Journal what ended and what core lists now; return the ends that are journalled now.

        Ends of the peers in ``except_for``, which are still on the interface, wait for another time.
        """
        state = self._state
        ended = state.roster.ended
        ends = tuple(end for end in state.ends if end.public_key not in except_for)
        entry = Entry(ends=[(end, ended.get(end.session_id, end.ended_at)) for end in ends])
        # Signs of life and lowered ceilings, which no plan has carried to the journal.
        rows = {key: row for key, row in self._rows(state.to_journal).items() if row[0].id not in state.begun}
        entry.sessions = list(rows.values())
        relisted = {key: state.roster.peers.get(key) for key in state.relisted}
        entry.peers = [peer for peer in relisted.values() if peer is not None]
        entry.unlisted = [key for key, peer in relisted.items() if peer is None]
        place = None
        if state.epoch is not None and state.location is not None:
            place = (state.location, state.interface, state.session_policy)
            if place != self._place:
                entry.location = place
        if pulled or now.boot - self._forgot_at >= _FORGET_EVERY:
            self._forgot_at = now.boot
            entry.forgotten = state.forget_ended(now)
        entry.addresses = self._addresses_due
        if self.heard.boot is not None and (entry or now.boot - self._contact_at >= _CONTACT_EVERY):
            entry.contact = Now(self.heard.boot, self.heard.wall)
        if not await self.write(entry):
            return ()
        if entry.contact is not None:
            self._contact_at = now.boot
        self._are_journalled(rows)
        self._place, self._addresses_due = place, None
        listed = state.roster.peers
        state.relisted = state.relisted - {k for k, peer in relisted.items() if listed.get(k) is peer}
        if ends:
            done = {end.session_id for end in ends}
            state.ends[:] = [end for end in state.ends if end.session_id not in done]
        return ends

    def _rows(self, keys: Iterable[PublicKey]) -> _Rows:
        """The sessions of those that have one, as they are now."""
        sessions, liveness = self._state.sessions, self._state.liveness
        return {key: (sessions[key], liveness.get(key)) for key in keys if key in sessions}

    def _are_journalled(self, rows: _Rows) -> None:
        """What is still as it was handed to the disk need not be journalled again."""
        sessions, liveness = self._state.sessions, self._state.liveness
        for key, row in rows.items():
            if (sessions.get(key), liveness.get(key)) == row:
                self._state.to_journal.pop(key, None)
        if not self._state.to_journal:
            self._state.to_journal = {}

    async def observed(self, keys: Iterable[PublicKey]) -> bool:
        """Journal the traffic of these peers, so that no later report can be behind an earlier one.

        What could not be written is written with the next ones.
        """
        self._traffic_due.update(keys)
        traffic = self._state.traffic
        if not await self.write(Entry(traffic=[(key, traffic.get(key)) for key in self._traffic_due])):
            return False
        self._traffic_due.clear()
        return True

    async def addresses(self, addresses: tuple[InterfaceAddress, ...]) -> None:
        """Journal which addresses of the interface are the agent's."""
        self._addresses_due = addresses
        if await self.write(Entry(addresses=addresses)):
            self._addresses_due = None

    async def reported(self, ends: Sequence[SessionEnd]) -> None:
        """Core has taken these ends; raises JournalError if that can't be remembered."""
        entry = Entry(reported=[end.session_id for end in ends])
        # Reports go on beside the reconciler's steps: what can't wait there is not for them to see to.
        await self._in_thread(lambda: self._journal.write(entry), patience=Patience())

    async def retry(self) -> tuple[SessionEnd, ...] | None:
        """After a failure: None if the journal still can't be written.

        Else the ends it held, if it could not be read at the start: the ids that it knows to be dead
        are dead from now on.
        """
        ends: tuple[SessionEnd, ...] = ()
        if not self._loaded:
            try:
                loaded = await self._in_thread(self._journal.load)
            except JournalError:
                return None
            self._loaded = True
            self._state.roster.ended.update(loaded.restored.ended)
            ends = loaded.ends
            await self._begin(loaded)
        return ends if await self.write(Entry(probe=True)) else None

    async def close(self, *, told: bool) -> None:
        """Record the last contact with core, and that the agent was ``told`` to stop if it was; close."""
        last = Entry()
        if self.heard.boot is not None:
            last.contact = Now(self.heard.boot, self.heard.wall)
        if told and self.lives is not None:
            last.lives = replace(self.lives, stopped=True)
        await self.write(last)
        with contextlib.suppress(JournalError):
            await self._in_thread(self._journal.close)
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def write(self, entry: Entry) -> bool:
        """Write an entry; False, and logged once, if that can't be done."""
        if not entry:
            return True
        try:
            rows = len(entry.sessions) + len(entry.ends) + len(entry.traffic) + len(entry.peers)
            await self._in_thread(lambda: self._journal.write(entry), PATIENCE + _PER_ROW * rows)
        except JournalError as error:
            self._failed(error)
            return False
        if not self.ok:
            _log.info("journal works again")
        self.ok = True
        return True

    def _failed(self, error: JournalError) -> None:
        if self.ok:
            _log.error("journal can't be used", error=error.message, hint=error.hint)
        self.ok = False

    async def _in_thread(
        self, work: Callable[[], _T], at_most: float | None = None, patience: Patience | None = None
    ) -> _T:
        """Do it in the journal's thread; raises JournalError if the disk takes too long.

        A call that hangs goes on in its thread and may still be carried out, which is harmless: all
        that is written later is written over it. Until then nothing waits for the disk again.
        """
        if self._hanging is not None and not self._hanging.done():
            raise JournalError(_SILENT, _REMEDY)
        self._hanging = None
        future = asyncio.get_running_loop().run_in_executor(self._disk, work)
        try:
            return await (patience or self._patience).wait_for(_DISK, future, at_most or PATIENCE)
        except TimeoutError:
            self._hanging = future
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise JournalError(_SILENT, _REMEDY) from None
