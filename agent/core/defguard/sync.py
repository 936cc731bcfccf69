"""Keeps in step with a core of the first generation: Config, Updates, Config, and Stats beside them.

The first Config makes core know the gateway, and opening Updates subscribes it; a change between a
configuration and the subscription would be lost, so the configuration that counts is asked for after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Final, NoReturn, TypeGuard

import grpc
import structlog

from agent.core.backoff import Backoff
from agent.core.defguard import channel
from agent.core.defguard.client import Connection, DefguardClient
from agent.core.defguard.feed import Feed, Report, batches
from agent.core.defguard.messages import Update
from agent.core.defguard.wire import gateway_v1_pb2 as wire
from agent.errors import AgentError, CoreUnavailable, InvalidMessage
from agent.ports import Inbox, Reports

_ATTEMPTS: Final = 3
"""Configurations asked for in a row until none was overtaken by an update."""
_RECHECK: Final = 1.0
_log = structlog.get_logger()
_Item = Update | InvalidMessage | AgentError


class DefguardSync:
    """Feeds the inbox, and reports, until it is cancelled; no answer of core's ends it.

    ``new_feed`` makes a connection's feed; ``quiet`` is how many seconds without an update are believed.
    """

    def __init__(
        self,
        client: DefguardClient,
        inbox: Inbox,
        reports: Reports,
        new_feed: Callable[[], Feed],
        *,
        quiet: float,
    ) -> None:
        self._client = client
        self._inbox = inbox
        self._reports = reports
        self._new_feed = new_feed
        self._quiet = quiet
        self._failure = ""

    async def run(self) -> NoReturn:
        """Connect, follow, and connect again."""
        backoff = Backoff()
        while True:
            error = await self._once(backoff)
            self._inbox.core_failed(error)
            delay = backoff.next()
            # One line an outage and cause, however many attempts it takes.
            level = _log.debug if self._failure == str(error) else _log.warning
            self._failure = str(error)
            level("core can't be followed", error=str(error), retry_in=round(delay, 3))
            await asyncio.sleep(delay)

    async def _once(self, backoff: Backoff) -> AgentError:
        """Follow core on one connection until it fails; why it did."""
        try:
            async with self._client.connect() as core:
                await self._follow(core, backoff)
        except AgentError as error:
            if isinstance(error, InvalidMessage):
                self._inbox.core_sent_rubbish(error)
            return error
        raise AssertionError("a connection is followed until it fails")

    async def _follow(self, core: Connection, backoff: Backoff) -> NoReturn:
        await core.config()
        feed = self._new_feed()
        reporting: asyncio.Task[None] | None = None
        try:
            while True:
                queue: asyncio.Queue[_Item] = asyncio.Queue()
                reading = asyncio.create_task(_read_into(queue, await core.updates()), name="core: updates")
                try:
                    await self._settle(core, feed, queue)
                    backoff.reset()
                    if reporting is None:
                        reporting = asyncio.create_task(self._report(core, feed), name="core: reports")
                    await self._take_updates(core, feed, queue, reporting)
                finally:
                    reading.cancel()
                    feed.last_words(_all_of(queue))
                _log.info("asking core for the whole again")
        finally:
            if reporting is not None:
                reporting.cancel()

    async def _settle(self, core: Connection, feed: Feed, queue: asyncio.Queue[_Item]) -> None:
        """Have the whole configuration in the kernel.

        What had arrived before it was asked for is in it. What arrived meanwhile may be older or newer: it
        is asked for again, and in the end what overtook the last one is taken to be newer.
        """
        for attempt in range(_ATTEMPTS):
            for item in _all_of(queue):
                if _is_failure(item):
                    raise item
            told = await core.config()
            self._answered()
            if queue.empty() or attempt == _ATTEMPTS - 1:
                await feed.whole(told)
                return

    async def _take_updates(
        self,
        core: Connection,
        feed: Feed,
        queue: asyncio.Queue[_Item],
        reporting: asyncio.Task[None],
    ) -> None:
        """Take in updates as they come; returns when the whole is to be asked for."""
        async with aclosing(batches(queue, self._inbox, reporting, self._quiet)) as news:
            async for told in news:
                if told or core.alive:
                    self._answered()
                # A connection that ends takes nothing along that has arrived before.
                failure = next((item for item in told if _is_failure(item)), None)
                updates = [item for item in told if isinstance(item, Update | InvalidMessage)]
                if await feed.updates(updates):
                    self._inbox.pull_wanted.set()
                if failure is not None:
                    raise failure

    async def _report(self, core: Connection, feed: Feed) -> None:
        """Report until the stream fails: the whole connection is then made anew, for reports may be lost."""
        call = core.stats()
        closed = asyncio.create_task(call.code())
        pending: asyncio.Task[None] | None = None
        number = 0
        try:
            while True:
                pending = asyncio.create_task(self._reports.pending())
                await asyncio.wait({pending, closed}, return_when=asyncio.FIRST_COMPLETED)
                if closed.done():
                    raise CoreUnavailable(f"core closed the stream of reports: {closed.result().name}")
                await feed.settled()
                for report in feed.stats():
                    number += 1
                    await call.write(wire.StatsUpdate(id=number, peer_stats=_stats(report)))
                # What is left waits for something that is out of order, such as the disk.
                await asyncio.sleep(_RECHECK)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise CoreUnavailable("core closed the stream of reports") from None
        finally:
            for task in (pending, closed):
                if task is not None:
                    task.cancel()
            call.cancel()

    def _answered(self) -> None:
        self._inbox.heard()
        self._inbox.core_answered()
        if self._failure:
            self._failure = ""
            _log.info("core answers again")


def _all_of(queue: asyncio.Queue[_Item]) -> list[_Item]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def _read_into(
    queue: asyncio.Queue[_Item],
    updates: AsyncIterator[Update | InvalidMessage],
) -> None:
    """Put what comes into the queue, and at the end why nothing more does, whatever that is."""
    failure: AgentError = CoreUnavailable("core closed the stream of updates", "it is opened again")
    try:
        async for update in updates:
            queue.put_nowait(update)
    except grpc.aio.AioRpcError as error:
        failure = channel.failure(error.code(), error.details())
    finally:
        queue.put_nowait(failure)


def _is_failure(item: _Item) -> TypeGuard[AgentError]:
    return isinstance(item, AgentError) and not isinstance(item, InvalidMessage)


def _stats(report: Report) -> wire.PeerStats:
    return wire.PeerStats(
        public_key=report.public_key,
        endpoint=report.endpoint,
        upload=report.upload,
        download=report.download,
        keepalive_interval=report.keepalive_interval,
        latest_handshake=int(report.latest_handshake),
        allowed_ips=report.allowed_ips,
    )
