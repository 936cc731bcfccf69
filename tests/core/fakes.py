"""A core on a real socket that answers what a test tells it to, and an inbox that remembers."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agent.model import Change, Peer, Snapshot
from agent.ports import Outcome, Position, Verdict

T = TypeVar("T")
TOKEN = "token-that-nobody-may-see"
PSK = base64.b64encode(b"secret-psk-never-to-be-displayed").decode()
TIME = "2026-11-24T03:00:00.000Z"


def key(number: int) -> str:
    return base64.b64encode(number.to_bytes(32, "big")).decode()


def session(**changed: Any) -> dict[str, Any]:
    return {
        "id": "s-19",
        "preshared_key": PSK,
        "granted_at": TIME,
        "expires_at": "2026-11-24T13:00:00+00:00",
    } | changed


def peer(number: int = 1, **changed: Any) -> dict[str, Any]:
    return {
        "public_key": key(number),
        "name": f"device-{number}",
        "allowed_ips": [f"10.8.{number >> 8}.{number & 255}/32"],
        "persistent_keepalive": 25,
        "mfa_exempt": False,
        "preshared_key": None,
        "session": session(),
    } | changed


def state(*peers: Any, **changed: Any) -> dict[str, Any]:
    return {
        "epoch": "b7e1",
        "revision": 42,
        "server_time": TIME,
        "location": {"id": "7", "name": "hq", "mfa_required": True},
        "interface": {"addresses": ["10.8.0.1/24", "fd00:8::1/64"], "listen_port": 51820},
        "session_policy": {"idle_timeout": 300, "max_lifetime": 43200.5, "liveness": "gateway"},
        "peer_count": len(peers),
        "peers": list(peers),
    } | changed


def body(document: Any) -> bytes:
    return json.dumps(document).encode()


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 30))


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.005)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        packed = self.headers.get("content-encoding") == "gzip"
        return json.loads(gzip.decompress(self.body) if packed else self.body)


Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def answer(status: int, content: bytes = b"", **headers: str) -> Handler:
    """A handler that gives one whole answer and closes."""

    async def handler(_request: Request, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} Some Reason", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if not {"Content_Length", "Transfer_Encoding"} & headers.keys():
            lines.append(f"Content-Length: {len(content)}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()

    return handler


def stream(*chunks: bytes, hold: float = 30.0) -> Handler:
    """A handler that opens an event stream, sends the chunks and then stays silent."""

    async def handler(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        await asyncio.sleep(hold)

    return handler


def event(kind: str, position: str, data: Any) -> bytes:
    return f"event: {kind}\nid: {position}\ndata: {json.dumps(data)}\n\n".encode()


@dataclass
class Core:
    """What was asked, and the handlers of each path: the next one each time, the last for good."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    handlers: dict[str, list[Handler]] = field(default_factory=dict)

    def on(self, path: str, *handlers: Handler) -> None:
        self.handlers[path] = list(handlers)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith("/" + path)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
            }
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            request = Request(method, path, headers, content)
            self.requests.append(request)
            left = self.handlers.get(path.rpartition("/")[2]) or [answer(404)]
            await (left.pop(0) if len(left) > 1 else left[0])(request, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def core(context: ssl.SSLContext | None = None, socket: str = "") -> AsyncIterator[Core]:
    told = Core()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await told._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()

    if socket:
        server = await asyncio.start_unix_server(connected, socket)
        told.url = f"http+unix://{socket}:/gateway/v1/"
    else:
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        scheme = "https" if context else "http"
        told.url = f"{scheme}://localhost:{port}/gateway/v1/"
    try:
        yield told
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class FakeInbox:
    """Fences as the port says, and holds nothing but the position."""

    def __init__(self, position: Position | None = None) -> None:
        self.pull_wanted = asyncio.Event()
        self.held = position
        self.snapshots: list[Snapshot] = []
        self.changes: list[Change] = []
        self.rubbish: list[Exception] = []
        self.failures: list[Exception] = []
        self.answers = 0
        self.bytes_heard = 0
        self.connected: bool | None = None
        self.raises: Exception | None = None
        self.dismantled = False

    @property
    def position(self) -> Position | None:
        return self.held

    def submit(self, message: Snapshot | Sequence[Change], received_at: float) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        if self.raises is not None:
            future.set_exception(self.raises)
        else:
            future.set_result(self._take(message))
        return future

    def holds(self, peer: Peer) -> bool:
        return False

    async def dismantle(self) -> None:
        self.dismantled = True

    def _take(self, message: Snapshot | Sequence[Change]) -> Outcome:
        if isinstance(message, Snapshot):
            self.snapshots.append(message)
            self.held = Position(message.epoch, message.revision)
            return Outcome(Verdict.APPLIED, self.held)
        verdict = Verdict.HELD
        for change in message:
            if self.held is None:
                return Outcome(Verdict.NO_STATE, None)
            if change.epoch == self.held.epoch and change.revision <= self.held.revision:
                continue
            if (change.epoch, change.revision) != (self.held.epoch, self.held.revision + 1):
                self.pull_wanted.set()
                return Outcome(Verdict.PULL, self.held)
            self.changes.append(change)
            self.held = Position(change.epoch, change.revision)
            verdict = Verdict.APPLIED
        return Outcome(verdict, self.held)

    def heard(self) -> None:
        self.bytes_heard += 1

    def core_answered(self) -> None:
        self.answers += 1
        self.connected = True

    def core_failed(self, error: Exception) -> None:
        self.failures.append(error)
        self.connected = False

    def core_sent_rubbish(self, error: Exception) -> None:
        self.rubbish.append(error)
