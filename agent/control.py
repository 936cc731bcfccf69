"""The operator's door: a unix socket in the runtime folder, root's and the agent's user's only.

``GET /status``, ``GET /plan``, ``GET /explain?what=KEY|IP|NAME``, ``GET /events?after=N&limit=N&wait=S``
(seconds), ``POST /end`` with ``{"keys": [KEY, …]}`` or ``{"all": true}``. Faults are answered with
``{"error", "hint"}``.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from agent import clock
from agent.encoding import format_key, parse_public_key
from agent.errors import AgentError, ConfigError, cannot_start
from agent.folders import private_folder
from agent.model import PublicKey
from agent.ports import Operator

_MAX_BODY: Final = 16 << 20  # 100,000 keys are 5 MB
_BACKLOG: Final = 1024
_PATH_SIZE: Final = 107  # bytes; unix(7), sun_path less its closing zero
_KNOCK_AGAIN: Final = 0.05  # seconds
EVENTS: Final = 1000
"""Occurrences in one answer at most."""
WAIT: Final = 25.0
"""Seconds that one request may wait for an occurrence: less than an answer may take."""
_ANSWER: Final = 20.0
"""Seconds of silence after which an agent that is only asked what it knows is taken to hang."""
_SLICE: Final = 1000  # peers of a status encoded at a time
_ENCODER: Final = msgspec.json.Encoder()


class _EventsRequest(msgspec.Struct, forbid_unknown_fields=True):
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=EVENTS)] = EVENTS
    wait: Annotated[float, msgspec.Meta(ge=0, le=WAIT)] = 0.0
    process: str | None = None
    who: str | None = None


class _EndRequest(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[str] | None = None
    all: bool = False


def bind_control(path: Path) -> socket.socket:
    """Return a listening unix socket at ``path``, mode 0600; one left behind is removed.

    To be called by the holder of the interface's lock. Raises ConfigError, or AgentError if the fault
    may pass.
    """
    private_folder(path.parent, "paths.runtime")
    if len(os.fsencode(path)) > _PATH_SIZE:
        raise ConfigError(
            f"paths.runtime: {path} is too long for a socket", "name a folder with a shorter path"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket():
            path.unlink()
        elif os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        before = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise cannot_start(
            error,
            f"paths.runtime: the socket {path} can't be made: {error.strerror}",
            "remove what is in its place, or name a folder that the agent's user may write to",
        ) from None
    sock.setblocking(False)
    return sock


def control_app(operator: Operator) -> ASGIApp:
    """Return the app over the operator's port."""

    async def status(request: Request) -> Response:
        return StreamingResponse(_in_slices(await operator.status()), media_type="application/json")

    async def plan(request: Request) -> Response:
        return _json(await operator.plan())

    async def explain(request: Request) -> Response:
        what = request.query_params.get("what", "")
        if not what:
            return _fault(400, "nobody is asked about", "send ?what= with a public key, an IP or a name")
        return _json(operator.explain(what))

    async def events(request: Request) -> Response:
        try:
            asked = msgspec.convert(dict(request.query_params), _EventsRequest, strict=False)
        except msgspec.ValidationError as error:
            return _fault(400, str(error), "send ?after=N&limit=N&wait=SECONDS")
        work = operator.events(asked.after, asked.limit, asked.wait, asked.process, asked.who)
        return _json(await _unless_gone(request, work))

    async def end(request: Request) -> Response:
        try:
            keys = _parse_end(await _body(request))
        except (ValueError, msgspec.MsgspecError) as error:
            return _fault(400, str(error), 'send {"keys": […]} or {"all": true}')
        return _json(await operator.end(keys))

    return Starlette(
        routes=[
            Route("/status", _guarded(status)),
            Route("/plan", _guarded(plan)),
            Route("/explain", _guarded(explain)),
            Route("/events", _guarded(events)),
            Route("/end", _guarded(end), methods=["POST"]),
        ]
    )


class ControlClient:
    """Asks the running agent over its socket; the answers are its JSON documents.

    ``timeout`` is in seconds. Every method blocks, and raises AgentError if no agent answers, or if
    it answers that it could not.
    """

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        self._path = path
        self._timeout = timeout

    def status(self) -> dict[str, Any]:
        """Return the document of ``wg-agent status --json``."""
        return self._ask("GET", "/status", wait=_ANSWER)

    def plan(self) -> dict[str, Any]:
        """Return what a reconcile would change now; the answer waits for the one under way."""
        return self._ask("GET", "/plan")

    def explain(self, what: str) -> dict[str, Any]:
        """Return why the peers that a key, an address or a name means are on the interface or not."""
        return self._ask("GET", f"/explain?{_query(what=what)}", wait=_ANSWER)

    def events(
        self,
        after: int | None = None,
        limit: int = EVENTS,
        wait: float = 0.0,
        process: str | None = None,
        who: str | None = None,
    ) -> dict[str, Any]:
        """Return the audit trail as ``Operator.events`` does; ``wait`` in seconds."""
        query = _query(after=after, limit=limit, wait=wait, process=process, who=who)
        return self._ask("GET", f"/events?{query}")

    def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        """End the sessions of these peers (None: all); returns once they are off the interface."""
        if keys is None:
            return self._ask("POST", "/end", {"all": True})
        return self._ask("POST", "/end", {"keys": [format_key(key) for key in keys]})

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, wait: float = math.inf
    ) -> dict[str, Any]:
        connection = _UnixConnection(self._path, min(wait, self._timeout))
        try:
            connection.request(method, path, None if body is None else _ENCODER.encode(body))
            answer = connection.getresponse()
            document = msgspec.json.decode(answer.read(), type=dict[str, Any])
        except TimeoutError:
            raise AgentError(
                f"the agent at {self._path} does not answer",
                f"see its log: journalctl -u wg-agent@{self._path.stem}",
            ) from None
        except OSError as error:
            raise self._not_there(error) from None
        except (HTTPException, msgspec.MsgspecError):
            raise AgentError(
                f"what answers at {self._path} is not the agent, or one of another version",
                f"systemctl restart wg-agent@{self._path.stem}",
            ) from None
        finally:
            connection.close()
        if answer.status == HTTPStatus.OK:
            return document
        raise AgentError(str(document.get("error", "it failed")), str(document.get("hint", "")))

    def _not_there(self, error: OSError) -> AgentError:
        if isinstance(error, PermissionError):
            return AgentError(f"{self._path} may not be used", "run as root or as the agent's own user")
        return AgentError(
            f"no agent answers at {self._path}: {error.strerror or error}",
            f"is it running? systemctl status wg-agent@{self._path.stem}",
        )


def _query(**asked: Any) -> str:
    given = {key: value for key, value in asked.items() if value is not None}
    # An argument of the command line need not be UTF-8.
    return urlencode(given, errors="surrogateescape")


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("agent", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        until = clock.monotonic() + (self.timeout or 0.0)
        while True:
            try:
                self.sock.connect(os.fspath(self._path))
            except BlockingIOError:
                # More are waiting than the queue holds; a unix socket does not wait for that by itself.
                if clock.monotonic() > until:
                    raise TimeoutError from None
                time.sleep(_KNOCK_AGAIN)
            else:
                return


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        try:
            return await endpoint(request)
        except AgentError as error:
            return _fault(503, error.message, error.hint)

    return call


async def _unless_gone(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Do what may take long, and give it up when the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else {}
    finally:
        working.cancel()
        waiting.cancel()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise ValueError("the request is too large")
    return bytes(body)


def _parse_end(body: bytes) -> list[PublicKey] | None:
    """Return the keys to end, None for all; ValueError unless exactly one of them is asked for."""
    asked = msgspec.json.decode(body, type=_EndRequest)
    if asked.all == (asked.keys is not None):
        raise ValueError("name keys, or all, and not both")
    return None if asked.keys is None else [parse_public_key(key) for key in asked.keys]


def _json(document: dict[str, Any]) -> Response:
    return Response(_ENCODER.encode(document), media_type="application/json")


async def _in_slices(document: dict[str, Any]) -> AsyncIterator[bytes]:
    """The JSON of a status. It takes the document apart: to let go of many peers at once takes as long.

    A thread would not do: the encoder keeps all others waiting until it is done.
    """
    peers = document.pop("peers")
    yield _ENCODER.encode(document)[:-1] + b',"peers":['
    comma = b""
    while peers:
        yield comma + _ENCODER.encode(peers[:_SLICE])[1:-1]
        comma = b","
        del peers[:_SLICE]
        await asyncio.sleep(0)
    yield b"]}"


def _fault(status_code: int, error: str, hint: str) -> Response:
    content = _ENCODER.encode({"error": error, "hint": hint})
    return Response(content, status_code, media_type="application/json")
