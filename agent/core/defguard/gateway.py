"""The second generation: the gateway is the server, and core dials it.

One connection of core's at a time: pings find out when it is dead, and until then another is refused. The
only way to ask for the whole again is to close core's stream: it dials again after ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty

from agent.core.defguard import channel
from agent.core.defguard.certificates import Certificates, serial_of
from agent.core.defguard.feed import Feed, Report, batches
from agent.core.defguard.messages import Configuration, Update, read_configuration, read_update
from agent.core.defguard.wire import gateway_v2_pb2 as wire
from agent.errors import AgentError, CoreUnavailable, InvalidMessage
from agent.ports import Inbox, Reports

_SERVICE: Final = "defguard.gateway.v2.Gateway"
_OLDEST: Final = (2, 0, 0)
_FIRST: Final = 30.0
"""Seconds that core has to answer the request for its configuration."""
_RECHECK: Final = 1.0
BACK: Final = 30.0
"""Seconds that a core may stay away which was asked to dial again."""
DIAL: Final = 15.0
"""Seconds in which core, which dials every ten, would have come if it could."""
_LARGE: Final = 256 << 10
_PING: Final = 5_000
"""Milliseconds after which a connection is asked whether it still is one, and for an answer: a core that was
cut off dials again every ten seconds, and is to be let in within thirty."""
SERVER_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", _PING),
    ("grpc.keepalive_timeout_ms", _PING),
    # gRPC's own, which is what it goes by, is a minute.
    ("grpc.http2.ping_timeout_ms", _PING),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Core pings every ten seconds, which is too often for a server with gRPC's own settings.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
)
_log = structlog.get_logger()
_Told = Configuration | Update | InvalidMessage


class GatewayService:
    """What an adopted gateway serves.

    ``new_feed`` makes a connection's feed, ``purge`` takes down what core has deleted; ``quiet`` is how many
    seconds without an update are believed.
    """

    def __init__(
        self,
        certificates: Certificates,
        inbox: Inbox,
        reports: Reports,
        new_feed: Callable[[], Feed],
        purge: Callable[[], Awaitable[None]],
        *,
        quiet: float,
    ) -> None:
        self.purged = asyncio.Event()
        self._serial = certificates.core_serial
        self._inbox = inbox
        self._reports = reports
        self._new_feed = new_feed
        self._purge = purge
        self._quiet = quiet
        self._connection: asyncio.Task[None] | None = None
        """What follows core on the connection that there is."""
        self._missing: asyncio.Task[None] | None = None
        """What waits for a core that was asked to dial again."""
        self._purging = False
        self._met = False
        """Whether core has been here."""
        self._failure = ""

    async def until_purged(self) -> None:
        """Return once core has deleted this gateway; a core that does not come counts as unreachable."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DIAL):
                    await self.purged.wait()
            if not self._met:
                self._lost(CoreUnavailable("core has not connected", "can it reach defguard.listen?"))
            await self.purged.wait()
        finally:
            if self._missing is not None:
                self._missing.cancel()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server is to serve."""
        return grpc.method_handlers_generic_handler(
            _SERVICE,
            {
                # What core sends stays bytes until there is time to read it.
                "Bidi": grpc.stream_stream_rpc_method_handler(
                    self._bidi, None, wire.CoreRequest.SerializeToString
                ),
                "Purge": grpc.unary_unary_rpc_method_handler(
                    self._purge_all, Empty.FromString, Empty.SerializeToString
                ),
            },
        )

    async def _bidi(self, responses: AsyncIterator[bytes], context: Any) -> None:
        await self._admit(context)
        if self._connection is not None or self._purging:
            await _refuse(context, grpc.StatusCode.INTERNAL, "core is connected already, or takes this down")
        self._met = True
        if self._missing is not None:
            self._missing.cancel()
        connection = asyncio.create_task(self._follow(responses, context), name="core: connection")
        # gRPC may cancel this call at any step, also after core's stream has ended: nothing that has to be
        # done at the end may wait for its turn here.
        connection.add_done_callback(self._over)
        self._connection = connection
        with contextlib.suppress(AgentError):
            await connection

    def _over(self, connection: asyncio.Task[None]) -> None:
        """Let core in again, and take note of why it has gone."""
        self._connection = None
        failure = asyncio.CancelledError() if connection.cancelled() else connection.exception()
        if failure is None:
            # The agent has closed it, to be told the whole: that is no fault while core comes back.
            self._missing = asyncio.create_task(self._miss(), name="core: asked to dial again")
        elif isinstance(failure, AgentError):
            self._lost(failure)
        else:
            self._lost(_closed())

    async def _miss(self) -> None:
        await asyncio.sleep(BACK)
        self._lost(CoreUnavailable("core has not dialled again", "can it reach defguard.listen?"))

    async def _purge_all(self, _: Empty, context: Any) -> Empty:
        await self._admit(context)
        _log.warning("core has deleted this gateway: everything of it is taken down", core=context.peer())
        # It goes on where core does not wait for the answer: it would not call again.
        taking_down = asyncio.create_task(self._take_down(), name="core: purge")
        try:
            await asyncio.shield(taking_down)
        except AgentError as error:
            _log.error("not all of it could be taken down", error=str(error))
            await _refuse(context, grpc.StatusCode.INTERNAL, error.message)
        return Empty()

    async def _take_down(self) -> None:
        """Let nothing of core's in any more, then purge; what fails leaves the gateway to core."""
        self._purging = True
        try:
            if self._connection is not None:
                self._connection.cancel()
                await asyncio.wait({self._connection})
            await self._purge()
        except BaseException:
            self._purging = False
            raise
        self.purged.set()

    async def _admit(self, context: Any) -> None:
        """Let only the one client in whose certificate came with the adoption, and no older core."""
        shown = context.auth_context().get("x509_pem_cert", ())
        if not shown or serial_of(shown[0]) != self._serial:
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, "not the core that adopted this gateway")
        version = channel.semver(channel.value(context.invocation_metadata(), channel.VERSION))
        if version is None or version[:3] < _OLDEST:
            await _refuse(context, grpc.StatusCode.INTERNAL, "core is older than 2.0.0, or does not say")

    async def _follow(self, responses: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata(channel.versions(2))
        _log.info("core has connected", core=context.peer())
        feed = self._new_feed()
        queue: asyncio.Queue[_Told | None] = asyncio.Queue()
        reading = asyncio.create_task(_read_into(queue, responses), name="core: stream")
        reporting: asyncio.Task[None] | None = None
        try:
            await context.write(wire.CoreRequest(id=1, config_request=Empty()))
            await self._take_whole(feed, queue)
            reporting = asyncio.create_task(self._report(feed, context), name="core: reports")
            await self._take_updates(feed, queue, reporting)
        finally:
            reading.cancel()
            if reporting is not None:
                reporting.cancel()
            if not self._purging:
                feed.last_words([queue.get_nowait() for _ in range(queue.qsize())])

    async def _take_whole(self, feed: Feed, queue: asyncio.Queue[_Told | None]) -> None:
        """Wait for the configuration; an update that comes before it is in it."""
        try:
            async with asyncio.timeout(_FIRST):
                told = await queue.get()
                while told is not None and not isinstance(told, Configuration | InvalidMessage):
                    told = await queue.get()
        except TimeoutError:
            raise CoreUnavailable("core did not send its configuration") from None
        if told is None:
            raise _closed()
        if isinstance(told, InvalidMessage):
            self._inbox.core_sent_rubbish(told)
            raise told
        self._answered()
        await feed.whole(told)

    async def _take_updates(
        self, feed: Feed, queue: asyncio.Queue[_Told | None], reporting: asyncio.Task[None]
    ) -> None:
        """Take in what comes; returns when only a new connection can help."""
        async with aclosing(batches(queue, self._inbox, reporting, self._quiet)) as news:
            async for told in news:
                # Pings would have ended a connection that is none.
                self._answered()
                if await self._take(feed, told):
                    self._inbox.pull_wanted.set()
        _log.info("core is to send the whole again: closing its connection")

    async def _take(self, feed: Feed, told: list[_Told | None]) -> bool:
        """Take in what came together; returns whether the whole is needed."""
        updates: list[Update | InvalidMessage] = []
        for one in told:
            if one is None:
                await feed.updates(updates)
                raise _closed()
            if isinstance(one, Configuration):
                await feed.updates(updates)
                updates.clear()
                await feed.whole(one)
            else:
                updates.append(one)
        return await feed.updates(updates)

    async def _report(self, feed: Feed, context: Any) -> None:
        """Report until cancelled; the request for the configuration has been written before."""
        number = 1
        while True:
            await self._reports.pending()
            await feed.settled()
            for report in feed.stats():
                number += 1
                await context.write(wire.CoreRequest(id=number, peer_stats=_stats(report)))
            # What is left waits for something that is out of order, such as the disk.
            await asyncio.sleep(_RECHECK)

    def _answered(self) -> None:
        self._inbox.heard()
        self._inbox.core_answered()
        self._failure = ""

    def _lost(self, error: AgentError) -> None:
        self._inbox.core_failed(error)
        level = _log.debug if self._failure == str(error) else _log.warning
        self._failure = str(error)
        level("core's connection is over", error=str(error))


async def _read_into(queue: asyncio.Queue[_Told | None], responses: AsyncIterator[bytes]) -> None:
    """Put what core sends into the queue, and None when there is no more, for whatever reason."""
    try:
        async for raw in responses:
            try:
                told = await asyncio.to_thread(_read, raw) if len(raw) > _LARGE else _read(raw)
            except InvalidMessage as error:
                told = error
            if told is not None:
                queue.put_nowait(told)
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):
        pass
    finally:
        queue.put_nowait(None)


def _read(raw: bytes) -> _Told | None:
    """Read a CoreResponse; None for one that says nothing."""
    try:
        message = wire.CoreResponse.FromString(raw)
    except Exception:  # noqa: BLE001 protobuf's DecodeError, whose text may quote what it read
        raise InvalidMessage("what core sent is no message of Defguard's") from None
    match message.WhichOneof("payload"):
        case "config":
            return read_configuration(message.config, 2)
        case "update":
            return read_update(message.update, 2)
        case _:
            return None


def _stats(report: Report) -> wire.PeerStats:
    stats = wire.PeerStats(
        public_key=report.public_key,
        endpoint=report.endpoint,
        upload=report.upload,
        download=report.download,
        keepalive_interval=report.keepalive_interval,
        allowed_ips=report.allowed_ips,
    )
    stats.latest_handshake.FromNanoseconds(int(report.latest_handshake * 1e9))
    return stats


def _closed() -> CoreUnavailable:
    return CoreUnavailable("core closed its connection", "it dials again by itself")


async def _refuse(context: Any, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort does not return")
