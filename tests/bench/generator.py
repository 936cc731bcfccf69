"""A core that serves what it is given as fast as it can, and notes when it is told of what.

The bench measures the agent; a real core would take longer to make its answers than the agent to use them.
"""

import asyncio
import contextlib
import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.peers import when

_NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\nETag: %b\r\n\r\n"
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
HEARTBEAT = 5.0
SERVER_TIME = b'"server_time":"'


class Told(NamedTuple):
    """A report of the agent's, and when the last byte of it was there (monotonic and Unix seconds)."""

    path: str
    token: str
    at: float
    wall: float
    body: dict[str, Any]


class GeneratorCore:
    """Listens on a unix socket, in a thread of its own, until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"http+unix://{path}:/v1/"
        self.revision = 0
        self.body = b""
        self.sent_from = 0.0
        """When the first byte of the last whole state was about to be sent; monotonic."""
        self.states = 0
        self.not_modified = 0
        self.requests_by: Counter[str] = Counter()
        """By token."""
        self.asks_for_pulls = False
        """Whether a stream begins with a resync."""
        self.streaming = True
        """Whether there is a change stream; without one the agent polls."""
        self._told: list[Told] = []
        self._changed = threading.Condition()
        self._streams: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="core", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Listen."""
        self._call(self._listen())

    def stop(self) -> None:
        """Listen no longer, and cut every connection."""
        self._call(self._cut())

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def serve(self, body: bytes, revision: int) -> None:
        """From now on this is the state."""
        self.body, self.revision = body, revision

    def send(self, event: str, data: object, revision: int | None = None) -> None:
        """Send an event to every open stream."""
        number = self.revision if revision is None else revision
        self._call(self._broadcast(self._event(event, data, number)))

    @staticmethod
    def _event(event: str, data: object, revision: int) -> bytes:
        text = f"id: bench:{revision}\nevent: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
        return text.encode()

    def resync(self) -> None:
        """Have the state pulled."""
        self.send("resync", {})

    def wait_applied(self, revision: int, since: float, timeout: float) -> float:
        """When the agent said that this revision is in the kernel, after ``since``; monotonic."""
        return self.wait(
            lambda told: told.path == "applied" and told.at > since and told.body["revision"] >= revision,
            timeout,
            f"revision {revision} to be applied",
        ).at

    def wait(self, wanted: Callable[[Told], bool], timeout: float, what: str) -> Told:
        """The first report that is wanted, when it is there."""
        with self._changed:
            if not self._changed.wait_for(lambda: any(map(wanted, self._told)), timeout):
                raise TimeoutError(f"core waited {timeout} s for {what}")
            return next(filter(wanted, self._told))

    def told(self, path: str) -> list[Told]:
        """All reports of a kind."""
        with self._changed:
            return [told for told in self._told if told.path == path]

    def wait_stream(self, timeout: float = 60.0) -> None:
        """Until the agent follows the stream."""
        end = time.monotonic() + timeout
        while not self._streams:
            if time.monotonic() > end:
                raise TimeoutError("the agent did not open the stream")
            time.sleep(0.01)

    def wait_streams(self, count: int, timeout: float) -> None:
        """Until so many agents follow the stream."""
        end = time.monotonic() + timeout
        while len(self._streams) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(self._streams)} of {count} agents opened the stream")
            time.sleep(0.05)

    def wait_all_applied(self, revision: int, count: int, since: float, timeout: float) -> list[float]:
        """Seconds after ``since`` at which each of so many agents first said that it is in the kernel."""
        first: dict[str, float] = {}
        end = time.monotonic() + timeout
        while len(first) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(first)} of {count} agents are back")
            time.sleep(0.05)
            for told in self.told("applied"):
                if told.at > since and told.body["revision"] >= revision:
                    first.setdefault(told.token, told.at - since)
        return list(first.values())

    def wait_no_stream(self, timeout: float = 60.0) -> None:
        """Until the agent that followed the stream is known to be gone."""
        end = time.monotonic() + timeout
        while self._streams:
            if time.monotonic() > end:
                raise TimeoutError("the agent's stream stays open")
            time.sleep(0.01)

    # On the loop.

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._converse, str(self.path))

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._connections):
            writer.transport.abort()
        self._streams.clear()
        self.path.unlink(missing_ok=True)

    async def _broadcast(self, data: bytes) -> None:
        for writer in self._streams:
            writer.write(_chunk(data))

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        self._connections.discard(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            request, *lines = head.split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (li.partition(":") for li in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            token = headers.get("authorization", "").removeprefix("Bearer ")
            self.requests_by[token] += 1
            path = request.split(" ")[1].rpartition("/")[2]
            if path == "changes" and not self.streaming:
                writer.write(_NOT_FOUND)
            elif path == "changes":
                await self._stream(reader, writer)
                return
            elif path == "state":
                await self._send_state(writer, headers.get("if-none-match", ""))
            else:
                self._note(path, token, body, headers.get("content-encoding", ""))
                writer.write(_ACCEPTED)
            await writer.drain()

    async def _send_state(self, writer: asyncio.StreamWriter, known: str) -> None:
        tag = f'"bench:{self.revision}"'
        if known.removeprefix("W/") == tag:
            writer.write(_NOT_MODIFIED % tag.encode())
            self.not_modified += 1
            return
        self.states += 1
        self.sent_from = time.monotonic()
        head = f"HTTP/1.1 200 OK\r\nETag: {tag}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        # The state says when it is sent, not when it was made.
        start = self.body.index(SERVER_TIME) + len(SERVER_TIME)
        now = when(time.time()).encode()
        writer.writelines((head.encode(), self.body[:start], now, self.body[start + len(now) :]))

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_STREAM + _chunk(b": here\n\n"))
        if self.asks_for_pulls:
            writer.write(_chunk(self._event("resync", {}, self.revision)))
        await writer.drain()
        self._streams.add(writer)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    # The agent says nothing more: what comes is its end.
                    await asyncio.wait_for(reader.read(1), HEARTBEAT)
                    return
                writer.write(_chunk(b": still here\n\n"))
                await writer.drain()
        finally:
            self._streams.discard(writer)

    def _note(self, path: str, token: str, body: bytes, encoding: str) -> None:
        at, wall = time.monotonic(), time.time()
        document = json.loads(gzip.decompress(body) if encoding == "gzip" else body)
        with self._changed:
            self._told.append(Told(path, token, at, wall, document))
            self._changed.notify_all()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
