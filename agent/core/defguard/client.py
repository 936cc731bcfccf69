"""The first generation: core is the server, and the gateway calls Config, Updates and Stats."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.empty_pb2 import Empty

from agent.core.defguard import channel
from agent.core.defguard.messages import Configuration, Update, read_configuration, read_update
from agent.core.defguard.wire import gateway_v1_pb2 as wire
from agent.core.endpoint import parse_base_url
from agent.errors import ConfigError, CoreUnavailable, InvalidMessage

_SERVICE: Final = "/gateway.GatewayService/"
_PING: Final = 10_000
"""Milliseconds after which a connection is asked whether it still is one, and for an answer."""
_LARGE: Final = 256 << 10
"""Bytes of a configuration from on which it is read in a thread: the loop has more to do."""


class DefguardClient:
    """Calls of one gateway to one core; every method raises CoreUnavailable, CoreRejected, InvalidMessage."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        ca_file: Path | None = None,
        max_body: int = 64 << 20,
        timeout: float = 10.0,
        hostname: str = "",
    ) -> None:
        """Make a client; it connects with its first call.

        ``hostname`` is what core knows this gateway by, the host's own name by default; ``timeout`` is a
        Config call's, in seconds, ``max_body`` how large its answer may be. Raises ConfigError.
        """
        base = parse_base_url(url)
        self._metadata = (
            ("authorization", token),
            ("hostname", _hostname(hostname)),
            *channel.versions(1),
        )
        self._timeout = timeout
        target, self._credentials = _target(base.http, base.socket), None
        if base.tls:
            self._credentials = grpc.ssl_channel_credentials(_roots(ca_file))
        self._target = target
        self._options = (
            ("grpc.max_receive_message_length", max_body),
            ("grpc.keepalive_time_ms", _PING),
            ("grpc.keepalive_timeout_ms", _PING),
            # gRPC's own, which is what it goes by, is a minute.
            ("grpc.http2.ping_timeout_ms", _PING),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Nobody in between is to see the token.
            ("grpc.enable_http_proxy", 0),
            # The agent's own backoff decides when to try again.
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """A connection of its own, closed at the end of the block."""
        if self._credentials is None:
            made = grpc.aio.insecure_channel(self._target, self._options)
        else:
            made = grpc.aio.secure_channel(self._target, self._credentials, self._options)
        try:
            yield Connection(made, self._metadata, self._timeout)
        except grpc.aio.AioRpcError as error:
            raise channel.failure(error.code(), error.details()) from None
        finally:
            await made.close(None)


class Connection:
    """Core on one connection. Its order is Config, Updates, and only then Stats."""

    def __init__(self, made: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...], timeout: float) -> None:
        self._channel = made
        self._metadata = metadata
        self._timeout = timeout
        # The answer stays bytes until there is time to read it.
        self._config = made.unary_unary(
            f"{_SERVICE}Config", wire.ConfigurationRequest.SerializeToString, lambda raw: raw
        )
        self._updates = made.unary_stream(
            f"{_SERVICE}Updates", Empty.SerializeToString, wire.Update.FromString
        )
        self._stats = made.stream_unary(
            f"{_SERVICE}Stats", wire.StatsUpdate.SerializeToString, Empty.FromString
        )

    @property
    def alive(self) -> bool:
        """Whether core answers pings."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def reach(self) -> None:
        """Connect, and call nothing: core would take that for the gateway."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._channel.channel_ready()
        except TimeoutError:
            raise CoreUnavailable(f"no connection in {self._timeout:g} s") from None

    async def config(self) -> Configuration:
        """The whole location."""
        request = wire.ConfigurationRequest(name=dict(self._metadata)["hostname"])
        raw = await self._config(request, metadata=self._metadata, timeout=self._timeout)
        if len(raw) > _LARGE:
            return await asyncio.to_thread(_read, raw)
        return _read(raw)

    async def updates(self) -> AsyncIterator[Update | InvalidMessage]:
        """Open the stream of updates; returns once core has subscribed the gateway to them."""
        call = self._updates(Empty(), metadata=self._metadata)
        try:
            async with asyncio.timeout(self._timeout):
                await call.initial_metadata()
        except TimeoutError:
            call.cancel()
            raise CoreUnavailable(f"core did not open the stream of updates in {self._timeout:g} s") from None
        if call.done():
            # A call that fails at once has metadata, too.
            raise channel.failure(await call.code(), await call.details())
        return _read_updates(call)

    def stats(self) -> grpc.aio.StreamUnaryCall[Any, Empty]:
        """Open the stream of reports."""
        return self._stats(metadata=self._metadata)


async def _read_updates(call: Any) -> AsyncIterator[Update | InvalidMessage]:
    try:
        async for message in call:
            try:
                yield read_update(message, 1)
            except InvalidMessage as error:
                yield error
    finally:
        call.cancel()


def _read(raw: bytes) -> Configuration:
    try:
        message = wire.Configuration.FromString(raw)
    except Exception:  # noqa: BLE001 protobuf's DecodeError, whose text may quote what it read
        raise InvalidMessage("core's configuration is no message of Defguard's") from None
    return read_configuration(message, 1)


def _hostname(configured: str) -> str:
    name = configured or socket.gethostname()
    if not name.isascii() or not name.isprintable():
        raise ConfigError("this host's name is none that core can be told", "set defguard.hostname")
    return name


def _target(http: str, unix_socket: str | None) -> str:
    if unix_socket is not None:
        return f"unix:{unix_socket}"
    return http.partition("://")[2].partition("/")[0]


def _roots(ca_file: Path | None) -> bytes:
    """The certificates to trust core's by: gRPC's own bundle is none that the operator keeps."""
    path = ca_file or ssl.get_default_verify_paths().cafile
    if path is None:
        raise ConfigError("this system has no file of root certificates", "set core.ca_file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"core.ca_file: {path} can't be read: {error.strerror}",
            "it is a PEM file with the certificate of the CA that signed core's",
        ) from None
