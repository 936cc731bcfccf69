"""Adoption: how a core of the second generation makes a gateway its own, over plain HTTP/2 and once.

Core calls Start, GetCsr and SendCert with one token, which the gateway can't verify: whoever comes first, in
the minutes after the start of an agent without certificates, is trusted. That is Defguard's protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.empty_pb2 import Empty

from agent.core.defguard import certificates, channel
from agent.core.defguard.certificates import Certificates
from agent.core.defguard.wire import common_v2_pb2 as wire
from agent.errors import ConfigError, InvalidMessage
from agent.model import Now

_SERVICE: Final = "defguard.gateway.v2.GatewaySetup"
_BEARER: Final = "Bearer "
_WORDS: Final = 100
HOLD: Final = 120.0
"""Seconds that one adoption may take: nobody else can begin one meanwhile."""
OPTIONS: Final = (("grpc.max_receive_message_length", 64 << 10), ("grpc.max_metadata_size", 16 << 10))
"""For a server that anybody may speak to."""
_log = structlog.get_logger()


class Adoption:
    """One adoption at a time, until ``adopted``; refused once ``window`` seconds have passed from now."""

    def __init__(self, folder: Path, window: float, read_clock: Callable[[], Now]) -> None:
        self.adopted: asyncio.Future[Certificates] = asyncio.get_running_loop().create_future()
        self._folder = folder
        self._clock = read_clock
        self._until = read_clock().boot + window
        self._token = ""
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._said: asyncio.Queue[str] = asyncio.Queue(_WORDS)

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server is to serve."""
        return grpc.method_handlers_generic_handler(
            _SERVICE,
            {
                "Start": grpc.unary_stream_rpc_method_handler(
                    self._start, Empty.FromString, wire.LogEntry.SerializeToString
                ),
                "GetCsr": grpc.unary_unary_rpc_method_handler(
                    self._get_csr, wire.CertificateInfo.FromString, wire.DerPayload.SerializeToString
                ),
                "SendCert": grpc.unary_unary_rpc_method_handler(
                    self._send_cert, wire.CertBundle.FromString, Empty.SerializeToString
                ),
            },
        )

    async def _start(self, _: Empty, context: Any) -> AsyncIterator[wire.LogEntry]:
        """Tell core what happens, until the adoption is over or core goes away."""
        if self._clock().boot >= self._until:
            await _refuse(context, "FAILED_PRECONDITION", "too late for adoption: restart wg-agent first")
        token = channel.value(context.invocation_metadata(), "authorization")
        if not token.startswith(_BEARER) or token == _BEARER:
            await _refuse(context, "UNAUTHENTICATED", "adoption needs a bearer token")
        if self._token or self.adopted.done():
            await _refuse(context, "RESOURCE_EXHAUSTED", "an adoption is under way")
        self._token = token
        _log.info("core begins to adopt this gateway", core=context.peer())
        try:
            await context.send_initial_metadata(channel.versions(2))
            self._say("adoption begins")
            async with asyncio.timeout(min(HOLD, self._until - self._clock().boot)):
                while not self.adopted.done():
                    yield self._entry(await self._said.get())
        except TimeoutError:
            await _refuse(context, "DEADLINE_EXCEEDED", "the adoption took too long")
        finally:
            if not self.adopted.done():
                self._token, self._key = "", None

    async def _get_csr(self, info: wire.CertificateInfo, context: Any) -> wire.DerPayload:
        await self._authenticate(context)
        key = certificates.make_key()
        try:
            request = certificates.make_request(key, info.cert_hostname)
        except InvalidMessage as error:
            await _refuse(context, "INVALID_ARGUMENT", error.message)
        self._key = key
        self._say(f"certificate of {info.cert_hostname} asked for")
        return wire.DerPayload(der_data=request)

    async def _send_cert(self, bundle: wire.CertBundle, context: Any) -> Empty:
        await self._authenticate(context)
        if self._key is None:
            await _refuse(context, "FAILED_PRECONDITION", "no certificate was asked for: call GetCsr first")
        now = datetime.fromtimestamp(self._clock().wall, UTC)
        ders = bundle.component_cert_der, bundle.ca_cert_der, bundle.core_client_cert_der
        try:
            found = certificates.check_bundle(self._key, *ders, now)
            # Before the answer, for core takes the gateway for adopted from then on; and to its end, whether
            # core waits for it or not.
            await asyncio.shield(asyncio.create_task(self._keep(found), name="core: adoption"))
        except InvalidMessage as error:
            await _refuse(context, "INVALID_ARGUMENT", error.message)
        except ConfigError as error:
            _log.error("can't be adopted", error=error.message, hint=error.hint)
            await _refuse(context, "INTERNAL", error.message)
        return Empty()

    async def _keep(self, found: Certificates) -> None:
        await asyncio.to_thread(certificates.store, self._folder, found)
        if not self.adopted.done():
            self.adopted.set_result(found)
        self._say("adopted")
        _log.info("core has adopted this gateway", certificates=str(self._folder))

    async def _authenticate(self, context: Any) -> None:
        if self._clock().boot >= self._until:
            await _refuse(context, "FAILED_PRECONDITION", "too late for adoption: restart wg-agent first")
        token = channel.value(context.invocation_metadata(), "authorization")
        if not self._token or not hmac.compare_digest(token.encode(), self._token.encode()):
            await _refuse(context, "UNAUTHENTICATED", "the adoption under way has another token")

    def _say(self, message: str) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._said.put_nowait(message)

    def _entry(self, message: str) -> wire.LogEntry:
        at = datetime.fromtimestamp(self._clock().wall, UTC).isoformat()
        return wire.LogEntry(level="INFO", target="wg_agent", message=message, timestamp=at)


async def _refuse(context: Any, code: str, details: str) -> NoReturn:
    await context.abort(grpc.StatusCode[code], details)
    raise AssertionError("abort does not return")
