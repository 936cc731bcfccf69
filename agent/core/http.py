"""The client of core's API; the only module that knows httpx.

Responses are read raw and unpacked here, a bounded piece at a time: httpx would inflate a whole
received chunk, and 64 KiB of gzip can hold 64 MiB.
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC
from http.cookiejar import CookieJar
from typing import Any, Final, NoReturn, cast

import httpcore
import httpx

from agent import __version__
from agent.core import messages
from agent.core.endpoint import TlsFiles, parse_base_url, tls_context
from agent.core.inflate import Gunzip
from agent.core.messages import NotModified
from agent.errors import ConfigError, CoreRejected, CoreUnavailable, InvalidMessage
from agent.model import Now, Snapshot

GZIP_ABOVE: Final = 8 * 1024
DECODE_IN_THREAD_ABOVE: Final = 1_000_000
IGNORED_BODY_SIZE: Final = 64 * 1024
RETRY_AFTER_LIMIT: Final = 3600.0
SILENCE: Final = 40.0
_PIECES: Final = 64
"""Pieces of an answer after which others have their turn: one read can bring ten thousand."""
# A large state comes in 60 % of the time (``resync_50k``).
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = 240 * 1024

# OpenSSL's X509_V_ERR_ codes, by what an operator has to do about them.
_EXPIRED: Final = frozenset({10})
_NOT_YET_VALID: Final = frozenset({9})
_WRONG_NAME: Final = frozenset({62, 64})
_UNTRUSTED: Final = frozenset({2, 18, 19, 20, 21, 27})

# OpenSSL's names of the alerts (RFC 8446, section 6.2) by which core refuses a client certificate.
_CERTIFICATE_WANTED: Final = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
_CERTIFICATE_REFUSED: Final = frozenset(
    {
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)


class NoCookies(CookieJar):
    """Keeps none: a core or a portal that sets them without end would make each request longer."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Forget them."""


class CoreClient:
    """Requests to core, one method a resource.

    Every method raises CoreUnavailable (not reachable, or not now), CoreRejected (core said no) or
    InvalidMessage (what came is not of the API). Redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        clock: Callable[[], Now],
        heard: Callable[[], None],
        tls: TlsFiles | None = None,
        max_body: int = 64 * 1024 * 1024,
        silence: float = SILENCE,
        timeout: float = 30.0,
        deadline: float = 300.0,
    ) -> None:
        """Make a client; ``heard`` is called whenever bytes came from core.

        ``max_body`` in decompressed bytes; ``silence`` is how many seconds a stream may be without
        a byte, ``timeout`` a request, and ``deadline`` how long a whole answer may take. Raises
        ConfigError if the URL, the token or a TLS file can't be used.
        """
        base = parse_base_url(url)
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                "core's token is empty or holds characters that no token has",
                "put the token that core gave for this gateway on one line",
            )
        context = tls_context(tls or TlsFiles()) if base.tls else False
        self._clock = clock
        self._heard = heard
        self._max_body = max_body
        self._deadline = deadline
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        self._last: Snapshot | None = None
        """The last large state: what comes next may have the same peers."""
        self._stream_timeout = httpx.Timeout(timeout, connect=min(timeout, 10.0), read=silence)
        self._client = httpx.AsyncClient(
            base_url=base.http,
            headers={
                "Authorization": f"Bearer {token}",
                "User-Agent": f"wg-agent/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
            },
            transport=httpx.AsyncHTTPTransport(
                verify=context,
                trust_env=False,
                uds=base.socket,
                limits=httpx.Limits(max_connections=8, max_keepalive_connections=4),
            ),
            trust_env=False,
            cookies=NoCookies(),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def get_state(self, held: str | None = None) -> Snapshot | NotModified:
        """Pull the state; with ``held`` (EPOCH:REVISION) only if core's is another."""
        headers = {} if held is None else {"If-None-Match": f'"{held}"'}
        requested_at = self._clock().boot
        async with self._request("GET", "state", headers=headers) as response:
            if response.status_code == 304 and held is not None:
                await self._drain(response)
                return NotModified()
            if response.status_code == 404:
                raise CoreRejected(
                    "core has no state there: core.url is wrong",
                    "core.url ends where the API's paths (state, changes) begin",
                    status=404,
                )
            self._expect(response, 200)
            body = await self._read(response)
        if len(body) <= DECODE_IN_THREAD_ABOVE:
            self._last = None
            return messages.decode_snapshot(body, requested_at)
        decode = messages.decode_snapshot
        self._last = snapshot = await asyncio.to_thread(decode, body, requested_at, self._last)
        return snapshot

    @asynccontextmanager
    async def open_changes(self, position: str) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Open the change stream after ``position`` (EPOCH:REVISION) and give its bytes.

        A core without a stream is a CoreRejected with status 404, 405 or 501. The iterator raises
        CoreUnavailable when the connection is lost or silent for too long, and ends when core does.
        """
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "Cache-Control": "no-store",
            "Last-Event-ID": position,
        }
        async with self._request("GET", "changes", headers=headers, stream=True) as response:
            if response.status_code in {404, 405, 501}:
                raise CoreRejected("core has no change stream", "it is polled", status=response.status_code)
            self._expect(response, 200)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise InvalidMessage("core compressed the change stream, which was not asked for")
            async with aclosing(self._chunks(response, stream=True)) as chunks:
                yield chunks

    async def post_applied(self, body: bytes) -> None:
        """Report a revision that is in the kernel."""
        await self._post("applied", body)

    async def post_stats(self, body: bytes) -> None:
        """Report handshakes and traffic."""
        await self._post("stats", body)

    async def post_ends(self, body: bytes) -> None:
        """Report session ends."""
        await self._post("session-ends", body)

    async def _post(self, path: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        if len(body) > GZIP_ABOVE:
            body = gzip.compress(body, compresslevel=3)
            headers["Content-Encoding"] = "gzip"
        async with self._request("POST", path, headers=headers, content=body) as response:
            self._expect(response, 202)
            await self._drain(response)

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str],
        content: bytes | None = None,
        stream: bool = False,
    ) -> AsyncGenerator[httpx.Response, None]:
        request = self._client.build_request(
            method,
            path,
            headers=headers,
            content=content,
            timeout=self._stream_timeout if stream else self._timeout,
        )
        with translated(stream=stream):
            # A stream's answer may take as long as it likes; its opening may not.
            async with asyncio.timeout(self._deadline) as deadline:
                response = await self._send(request)
                self._heard()
                if stream:
                    deadline.reschedule(None)
                try:
                    yield response
                finally:
                    await response.aclose()

    async def _chunks(self, response: httpx.Response, *, stream: bool = False) -> AsyncGenerator[bytes, None]:
        with translated(stream=stream):
            raw = cast("AsyncGenerator[bytes, None]", response.aiter_raw())
            async with aclosing(raw) as chunks:
                pieces = 0
                async for chunk in chunks:
                    self._heard()
                    yield chunk
                    pieces += 1
                    if not pieces % _PIECES:
                        await asyncio.sleep(0)

    async def _drain(self, response: httpx.Response) -> None:
        """Read a body that says nothing, so that the connection can be used again."""
        size = 0
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > IGNORED_BODY_SIZE:
                    return

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except (httpx.InvalidURL, httpx.CookieConflict, ValueError):
            # httpx reads a Location or a cookie even where it is not to follow it.
            raise CoreUnavailable(
                "core's answer has headers that can't be read", "is there a proxy or a portal before it?"
            ) from None

    async def _read(self, response: httpx.Response) -> bytes:
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        unpack: Gunzip | None
        match encoding:
            case "identity" | "":
                unpack = None
            case "gzip" | "x-gzip":
                unpack = Gunzip()
            case _:
                raise InvalidMessage("core's answer has a Content-Encoding other than gzip")
        body = bytearray()
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                for piece in (chunk,) if unpack is None else unpack.feed(chunk):
                    body += piece
                    if len(body) > self._max_body:
                        raise InvalidMessage(
                            f"core's answer is larger than {self._max_body} bytes",
                            "raise core.max_body if core really has that much to say",
                        )
        if unpack is not None and not unpack.complete:
            raise InvalidMessage("core's answer is truncated: its gzip data ends early")
        return bytes(body)

    def _expect(self, response: httpx.Response, status: int) -> None:
        """Raise what the answer's status means if it is another than the API's."""
        got = response.status_code
        if got == status:
            return
        if got in {401, 403}:
            raise CoreRejected(
                f"core refuses the token ({got})",
                "ask core for a new token and put it into core.token_file or the credential",
                status=got,
            )
        if got in {408, 429} or got >= 500:
            raise CoreUnavailable(
                f"core answers {got}",
                "it is tried again",
                retry_after=self._retry_after(response.headers.get("retry-after")),
            )
        if 300 <= got < 400:
            raise CoreRejected(
                f"core redirects ({got}), which is not followed",
                "set core.url to the address that core redirects to",
                status=got,
            )
        if 200 <= got < 300 or got < 200:
            raise InvalidMessage(f"core answers {got} where the API has {status}")
        raise CoreRejected(f"core answers {got}", "core does not keep to the API", status=got)

    def _retry_after(self, value: str | None) -> float | None:
        """Read Retry-After (RFC 9110, section 10.2.3): seconds or a date; None if it is neither."""
        if value is None:
            return None
        value = value.strip()
        if value.isascii() and value.isdigit():
            seconds = float(value[:10])
        else:
            try:
                moment = email.utils.parsedate_to_datetime(value)
                # A date with "-0000" comes back without a zone and means UTC (RFC 5322).
                moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
                seconds = moment.timestamp() - self._clock().wall
            except (ValueError, OverflowError):
                return None
        return min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


@contextmanager
def translated(*, stream: bool) -> Iterator[None]:
    """Turn httpx's and the socket's errors into ours, naming the reason and the remedy."""
    try:
        yield
    except TimeoutError:
        raise CoreUnavailable("core's answer takes too long", "it is tried again") from None
    except httpx.ConnectTimeout:
        raise CoreUnavailable(
            "core does not answer the connection attempt", "check core.url and the firewalls"
        ) from None
    except httpx.TimeoutException:
        raise CoreUnavailable("core has been silent for too long", "it is tried again") from None
    except httpx.RemoteProtocolError as error:
        if stream:
            raise CoreUnavailable("core cut the change stream", "it is opened again") from None
        # What h11 says of a body that ends before its Content-Length or its last chunk.
        if "incomplete" in str(error) or "without sending complete" in str(error):
            raise InvalidMessage("core's answer is truncated: the connection was closed") from None
        raise CoreUnavailable(
            "core closed the connection, or does not answer in HTTP",
            "check core.url, and whether core wants a client certificate",
        ) from None
    except httpx.TransportError as error:
        _raise_transport(error)
    except httpx.HTTPError:
        raise CoreUnavailable("the request to core failed", "it is tried again") from None
    except ssl.SSLError as error:
        # With TLS 1.3 core's word on a client certificate only comes in place of its answer, and httpcore
        # lets what OpenSSL says while reading through as it is.
        raise _tls_error(error) from None
    except OSError as error:
        raise CoreUnavailable(
            f"the connection to core was lost: {error.strerror}", "it is tried again"
        ) from None


def _raise_transport(error: httpx.TransportError) -> NoReturn:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            raise _tls_error(cause) from None
        if isinstance(cause, socket.gaierror):
            raise CoreUnavailable(
                f"core's name can't be resolved: {cause.strerror}",
                "check the name in core.url, and this host's DNS",
            ) from None
        if isinstance(error, httpx.ConnectError) and isinstance(cause, OSError) and cause.errno:
            raise CoreUnavailable(
                f"core can't be reached: {os.strerror(cause.errno)}",
                "is core running? check host and port in core.url, and the route to it",
            ) from None
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        raise CoreUnavailable(
            f"core can't be reached: {error}", "check core.url, the name's resolution and the route"
        ) from None
    raise CoreUnavailable("the connection to core was lost", "it is tried again") from None


def _tls_error(error: ssl.SSLError) -> CoreUnavailable:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_error(error)
    reason = error.reason or "no reason given"
    if reason == _CERTIFICATE_WANTED:
        return CoreUnavailable(
            "core wants a client certificate", "set core.client_cert_file and core.client_key_file"
        )
    if reason in _CERTIFICATE_REFUSED:
        return CoreUnavailable(
            f"core does not accept this gateway's client certificate: {reason}",
            "has core.client_cert_file expired, or does core not know its CA?",
        )
    return CoreUnavailable(
        f"the TLS connection to core failed: {reason}",
        "check that core.url speaks TLS there, and whether core wants a client certificate",
    )


def _certificate_error(error: ssl.SSLCertVerificationError) -> CoreUnavailable:
    code = error.verify_code
    if code in _EXPIRED:
        return CoreUnavailable("core's certificate has expired", "renew it, and check this host's clock")
    if code in _NOT_YET_VALID:
        return CoreUnavailable(
            "core's certificate is not valid yet", "check the clocks of core and of this host"
        )
    if code in _WRONG_NAME:
        return CoreUnavailable(
            "core's certificate is for another name than core.url's",
            "use the name in the certificate, or issue one for this name",
        )
    if code in _UNTRUSTED:
        return CoreUnavailable(
            "core's certificate is not trusted by this host",
            "set core.ca_file to the CA that signed it",
        )
    return CoreUnavailable(
        f"core's certificate can't be verified: {error.verify_message}",
        "check the certificate and core.ca_file",
    )
