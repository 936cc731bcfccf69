"""Keeps what is held in step with core: pulls the state, follows the change stream, polls.

Two tasks. One pulls whenever only a pull can help, beginning with the first request of the
process, which is always a full one; the other follows the stream, or polls a core without one.
They run side by side, so that changes go on arriving while a large state is on its way; fencing
them is the inbox's business.

A pull is conditional (If-None-Match) only when it is a poll and nothing is in doubt: a pull that
somebody asked for has to replace what is held, also where its revision is core's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final, NoReturn, Protocol

import structlog

from agent import clock
from agent.core.backoff import Backoff
from agent.core.messages import NotModified, Resync, decode_event
from agent.core.stream import EventParser, Heartbeat
from agent.errors import AgentError, CoreRejected, CoreUnavailable, InvalidMessage
from agent.model import Change, Snapshot
from agent.ports import Inbox, Outcome

NO_STREAM: Final = frozenset({404, 405, 501})
POLLS_PER_STREAM_ATTEMPT: Final = 10
"""A proxy's passing 404 must not make a poller of the agent for good."""
IN_FLIGHT: Final = 1024
"""Changes handed over and not in the kernel yet; beyond, the stream is left unread (TCP waits)."""
PULL_SPACING: Final = 0.25

log = structlog.get_logger()


class StateSource(Protocol):
    """Core, as far as its state goes."""

    async def get_state(self, held: str | None = None) -> Snapshot | NotModified:
        """GET state; with ``held`` (EPOCH:REVISION) only if core's is another."""

    def open_changes(self, position: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """GET changes from ``position`` (EPOCH:REVISION) on."""


class CoreSync:
    """Feeds the inbox from core until it is cancelled; no answer of core's ends it.

    ``poll_interval`` is in seconds, for a core without a stream, and may be changed while it runs.
    """

    def __init__(self, source: StateSource, inbox: Inbox, *, poll_interval: float) -> None:
        self.poll_interval = poll_interval
        self._source = source
        self._inbox = inbox
        self._pulling = asyncio.Lock()
        self._pulled = asyncio.Event()
        self._found = asyncio.Event()
        self._in_flight: dict[asyncio.Future[Outcome], int] = {}
        """With the number of changes in each."""
        self._failure: str | None = None

    async def run(self) -> NoReturn:
        """Run both tasks."""
        self._inbox.pull_wanted.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pull_when_wanted(), name="core: pull")
            tasks.create_task(self._follow(), name="core: changes")
        raise AssertionError("both tasks run until they are cancelled")

    def core_found(self) -> None:
        """Core has just accepted something else of ours: who waits to try again does so now.

        Else clients would be turned away for as long as the wait lasts, up to 30 s.
        """
        self._found.set()

    async def _pull_when_wanted(self) -> NoReturn:
        backoff = Backoff()
        while True:
            await self._inbox.pull_wanted.wait()
            began = clock.monotonic()
            try:
                await self._pull(poll=False)
            except (CoreUnavailable, CoreRejected, InvalidMessage) as error:
                await self._wait(error, backoff)
            else:
                backoff.reset()
                self._pulled.set()
                # Whatever asks for pulls in a row, they take half of the time at most.
                await asyncio.sleep(max(PULL_SPACING, clock.monotonic() - began))

    async def _pull(self, *, poll: bool) -> None:
        wanted = self._inbox.pull_wanted
        async with self._pulling:
            full = wanted.is_set()
            if not full and not poll:
                return  # the poll that held the lock was a full pull
            wanted.clear()
            held = None if full else self._inbox.position
            try:
                await self._exchange(None if held is None else str(held))
            except BaseException:
                if full:
                    wanted.set()
                raise
        self._answered()

    async def _exchange(self, held: str | None) -> None:
        try:
            answer = await self._source.get_state(held)
        except InvalidMessage as error:
            self._inbox.core_sent_rubbish(error)
            raise
        if isinstance(answer, NotModified):
            return
        future = self._inbox.submit(answer, clock.monotonic())
        try:
            await asyncio.shield(future)
        except (CoreUnavailable, CoreRejected, InvalidMessage):
            raise  # a revision that goes back: core is no better than unreachable
        except AgentError as error:
            log.warning("core's state is not in force yet", error=str(error))

    async def _follow(self) -> NoReturn:
        backoff = Backoff()
        await self._pulled.wait()
        while True:
            try:
                await self._stream(backoff)
            except (CoreUnavailable, CoreRejected, InvalidMessage) as error:
                if isinstance(error, InvalidMessage):
                    # From the same position the same unreadable bytes would come again: first the pull.
                    self._pulled.clear()
                    self._distrust(error)
                await self._wait(error, backoff)
                await self._pulled.wait()

    async def _stream(self, backoff: Backoff) -> None:
        """Follow the stream until it breaks, or, if core has none, poll for a while."""
        position = self._inbox.position
        if position is None:
            self._inbox.pull_wanted.set()
            raise CoreUnavailable("there is no state of core's to follow changes from")
        try:
            async with self._source.open_changes(str(position)) as chunks:
                self._answered()
                parser = EventParser()
                async for chunk in chunks:
                    self._take(parser, chunk, backoff)
                    while sum(self._in_flight.values()) >= IN_FLIGHT:
                        await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
        except CoreRejected as error:
            if error.status not in NO_STREAM:
                raise
            await self._poll(backoff)
            return
        raise CoreUnavailable("core closed the change stream", "it is opened again")

    def _take(self, parser: EventParser, chunk: bytes, backoff: Backoff) -> None:
        """Hand over the changes that a chunk of the stream completes, without waiting for them."""
        received_at = clock.monotonic()
        changes: list[Change] = []
        items = parser.feed(chunk)
        if items:
            backoff.reset()
            self._answered()
        for item in items:
            if isinstance(item, Heartbeat):
                continue
            try:
                event = decode_event(item.type, item.id, item.data)
            except InvalidMessage as error:
                # One pull makes good for all of them, and one line says it.
                if not self._inbox.pull_wanted.is_set():
                    self._distrust(error)
                continue
            if isinstance(event, Resync):
                if not self._inbox.pull_wanted.is_set():
                    log.info("core asks for a pull of the state")
                self._inbox.pull_wanted.set()
            else:
                changes.append(event)
        if changes:
            future = self._inbox.submit(changes, received_at)
            self._in_flight[future] = len(changes)
            future.add_done_callback(self._settled)

    def _settled(self, future: asyncio.Future[Outcome]) -> None:
        self._in_flight.pop(future, None)
        if not future.cancelled() and (error := future.exception()) is not None:
            log.warning("a change is not in force yet", error=str(error))

    async def _poll(self, backoff: Backoff) -> None:
        log.info("core has no change stream: polling", interval=self.poll_interval)
        for _ in range(POLLS_PER_STREAM_ATTEMPT):
            await self._pull(poll=True)
            backoff.reset()
            await asyncio.sleep(self.poll_interval)

    def _distrust(self, error: InvalidMessage) -> None:
        log.warning("core sent something that can't be read: pulling the state", error=str(error))
        self._inbox.core_sent_rubbish(error)
        self._inbox.pull_wanted.set()

    def _answered(self) -> None:
        self._inbox.core_answered()
        if self._failure is not None:
            self._failure = None
            log.info("core answers again")

    async def _wait(self, error: AgentError, backoff: Backoff) -> None:
        self._inbox.core_failed(error)
        asked_for = error.retry_after if isinstance(error, CoreUnavailable) else None
        delay = backoff.next(asked_for)
        # One line an outage and cause, however many attempts it takes.
        level = log.debug if self._failure == str(error) else log.warning
        self._failure = str(error)
        level("core can't be followed", error=str(error), retry_in=round(delay, 3))
        if asked_for is not None or not isinstance(error, CoreUnavailable):
            await asyncio.sleep(delay)
            return
        self._found.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._found.wait()
