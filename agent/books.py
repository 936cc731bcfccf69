"""Keeps the journal in step with the state: what goes in before the kernel, what after (rule 15).

The journal's calls block on the disk, so they run in a thread of their own, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import structlog

from agent.errors import JournalError
from agent.journal import Contact, Entry, Journal, Loaded
from agent.model import InterfaceAddress, Now, PublicKey, SessionEnd
from agent.state import State

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_CONTACT_EVERY: Final = 10.0
"""Seconds between two records of the last contact with core, when nothing else is written."""


class Books:
    """The journal of one state. A write that fails returns False and is made good later."""

    def __init__(self, journal: Journal, state: State) -> None:
        self.ok = True
        """Whether the journal could be written the last time."""
        self.heard = Contact(None, 0.0)
        """The last byte from core."""
        self._journal = journal
        self._state = state
        self._disk = ThreadPoolExecutor(1, "journal")
        self._known: set[str] = set()
        self._contact_at = 0.0

    async def load(self, now: Now) -> Loaded | None:
        """Read the journal into the state; None if it can't be read."""
        self.heard = Contact(now.boot, now.wall)
        try:
            loaded = await self._in_thread(self._journal.load)
        except JournalError as error:
            self._failed(error)
            return None
        if self._journal.set_aside is not None:
            _log.error("journal unreadable, set aside", path=str(self._journal.set_aside))
        self._state.restore(loaded.restored)
        self._state.traffic.restore(loaded.traffic)
        self._known = {session.id for session, _ in loaded.restored.sessions}
        if loaded.contact is not None:
            self.heard = loaded.contact
        return loaded

    async def before_kernel(self) -> list[PublicKey]:
        """Journal sessions as they are; return the peers whose new session could not be."""
        state = self._state
        keys = [key for key in state.to_journal if key in state.sessions]
        entry = Entry(sessions=[(state.sessions[key], state.liveness.get(key)) for key in keys])
        if await self.write(entry):
            self._known.update(session.id for session, _ in entry.sessions)
            for key in keys:
                state.to_journal.pop(key, None)
            return []
        refused = state.roster.refused
        return [k for k in keys if state.sessions[k].id not in self._known and k not in refused]

    async def after_kernel(self, now: Now, *, listed: bool, pulled: bool) -> tuple[SessionEnd, ...]:
        """Journal what ended and, if ``listed``, core's list; return the ends that are journalled now."""
        state = self._state
        ended, ends = state.roster.ended, tuple(state.ends)
        entry = Entry(ends=[(end, ended.get(end.session_id, end.ended_at)) for end in ends])
        if state.relisted or listed:
            peers = (state.roster.peers.get(key) for key in state.relisted)
            entry.peers = [peer for peer in peers if peer is not None and peer.fault is None]
            entry.unlisted = [key for key in state.relisted if key not in state.roster.peers]
            if state.location is not None:
                entry.location = (state.location, state.interface, state.session_policy)
        if pulled:
            entry.forgotten = state.forget_ended(now)
        if self.heard.boot is not None and (entry or now.boot - self._contact_at >= _CONTACT_EVERY):
            entry.contact = Now(self.heard.boot, self.heard.wall)
        if not await self.write(entry):
            return ()
        if entry.contact is not None:
            self._contact_at = now.boot
        self._known.difference_update(end.session_id for end in ends)
        state.relisted.clear()
        del state.ends[: len(ends)]
        return ends

    async def observed(self, keys: Iterable[PublicKey]) -> bool:
        """Journal the traffic of these peers, so that no later report can be behind an earlier one."""
        return await self.write(Entry(traffic=[(key, self._state.traffic.get(key)) for key in keys]))

    async def addresses(self, addresses: tuple[InterfaceAddress, ...]) -> bool:
        """Journal which addresses of the interface are the agent's."""
        return await self.write(Entry(addresses=addresses))

    async def reported(self, ends: Sequence[SessionEnd]) -> None:
        """Core has taken these ends; raises JournalError if that can't be remembered."""
        entry = Entry(reported=[end.session_id for end in ends])
        await self._in_thread(lambda: self._journal.write(entry))

    async def retry(self, now: Now) -> bool:
        """After a failure: whether the journal can be written again."""
        return not self.ok and await self.write(Entry(contact=now))

    async def close(self) -> None:
        """Close the journal."""
        await self._in_thread(self._journal.close)
        self._disk.shutdown()

    async def write(self, entry: Entry) -> bool:
        """Write an entry; False, and logged once, if that can't be done."""
        if not entry:
            return True
        try:
            await self._in_thread(lambda: self._journal.write(entry))
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

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)
