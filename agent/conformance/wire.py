"""Requests to core whose answers are kept as they came, whatever they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Final

import httpx

from agent import __version__, clock
from agent.conformance.answers import Answer, StreamRecord
from agent.core.endpoint import TlsFiles, parse_base_url, tls_context
from agent.core.http import NoCookies, translated
from agent.core.inflate import Gunzip
from agent.core.stream import EventParser, Heartbeat, ServerEvent
from agent.errors import AgentError, CoreUnavailable, InvalidMessage

TIMEOUT: Final = 20.0
MAX_BODY: Final = 64 * 1024 * 1024
_SILENCE: Final = 40.0
_LIMITS: Final = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request: one that core closes as it is taken up again would be held against core."""

OnItem = Callable[[ServerEvent | Heartbeat], Awaitable[None]]


class Wire:
    """A connection to core as the agent's: it trusts, redirects and times out in the same way."""

    def __init__(self, url: str, token: str, tls: TlsFiles) -> None:
        """Raises ConfigError for a URL that the agent would not use, or TLS files that can't be used."""
        base = parse_base_url(url)
        self._token = token
        self._client = httpx.AsyncClient(
            base_url=base.http,
            headers={
                "User-Agent": f"wg-agent/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
            },
            transport=httpx.AsyncHTTPTransport(
                verify=tls_context(tls) if base.tls else False,
                trust_env=False,
                uds=base.socket,
                limits=_LIMITS,
            ),
            trust_env=False,
            timeout=httpx.Timeout(TIMEOUT, connect=10.0),
            cookies=NoCookies(),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        authorization: str | None = "",
        read: bool = True,
    ) -> Answer:
        """Ask and return what came, never raising; without ``read`` the body is left where it is.

        ``authorization`` is the header's whole value, by default the gateway's token; None: no header.
        """
        sent = clock.read()
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._response(method, path, content, headers or {}, authorization) as response,
            ):
                body, fault = b"", ""
                try:
                    with translated(stream=False):
                        body = await _body(response) if read else b""
                except InvalidMessage as error:
                    fault = error.message
        except AgentError as error:
            return Answer(0, error=error.message, hint=error.hint)
        except TimeoutError:
            return Answer(0, error=f"no whole answer within {TIMEOUT:.0f} s")
        found = {name.lower(): value for name, value in response.headers.items()}
        return Answer(
            response.status_code,
            found,
            body,
            fault,
            sent_wall=sent.wall,
            sent=sent.boot,
            received=clock.read().boot,
        )

    async def listen(self, record: StreamRecord, on_item: OnItem) -> None:
        """Open the change stream from the record's position and keep what comes in it, until it ends."""
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "Cache-Control": "no-store",
            "Last-Event-ID": record.asked,
        }
        try:
            async with self._response("GET", "changes", None, headers, "", stream=True) as response:
                found = {name.lower(): value for name, value in response.headers.items()}
                record.head = Answer(response.status_code, found)
                if response.status_code == 200:
                    await _read_events(response, record, on_item)
        except InvalidMessage as error:
            record.fault = error.message
        except AgentError as error:
            record.head = record.head or Answer(0, error=error.message, hint=error.hint)
        except asyncio.CancelledError:
            record.let_go = True
            raise
        finally:
            record.ended = clock.monotonic()

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: Mapping[str, str],
        authorization: str | None,
        *,
        stream: bool = False,
    ) -> AsyncIterator[httpx.Response]:
        sent = dict(headers)
        if authorization is not None:
            sent["Authorization"] = authorization or f"Bearer {self._token}"
        if content is not None:
            sent.setdefault("Content-Type", "application/json")
        request = self._client.build_request(method, path, headers=sent, content=content)
        if stream:
            request.extensions["timeout"] |= {"read": _SILENCE}
        with translated(stream=stream):
            try:
                response = await self._client.send(request, stream=True)
            except (httpx.InvalidURL, ValueError):
                raise CoreUnavailable("the answer has headers that can't be read") from None
            try:
                yield response
            finally:
                with contextlib.suppress(httpx.HTTPError):
                    await response.aclose()


async def _body(response: httpx.Response) -> bytes:
    """Read and unpack a body; raises InvalidMessage where it is too large, cut or packed otherwise."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", "", "gzip", "x-gzip"}:
        raise InvalidMessage("the answer has a Content-Encoding other than gzip")
    unpack = Gunzip() if "gzip" in encoding else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        for piece in (chunk,) if unpack is None else unpack.feed(chunk):
            body += piece
            if len(body) > MAX_BODY:
                raise InvalidMessage(f"the answer is larger than {MAX_BODY} bytes")
    if unpack is not None and not unpack.complete:
        raise InvalidMessage("the answer's gzip data ends early")
    return bytes(body)


async def _read_events(response: httpx.Response, record: StreamRecord, on_item: OnItem) -> None:
    parser = EventParser()
    async with aclosing(response.aiter_raw()) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            at = clock.monotonic()
            for item in parser.feed(chunk):
                record.items.append((at, item))
                await on_item(item)
