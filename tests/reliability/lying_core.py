"""A core in a thread that serves what a test makes up: handlers for the API's paths, bytes on its stream."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.core import fakes
from tests.core.fakes import Handler, Request
from tests.support.site import until

T = TypeVar("T")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


class LyingCore:
    """Serves on a unix socket; leave the block and it is gone. Reports are accepted from the start."""

    def __init__(self, path: Path) -> None:
        self.url = f"http+unix://{path}:/gateway/v1/"
        self._path = path
        self._core = fakes.Core()
        self._streams: list[asyncio.StreamWriter] = []
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lying core", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        started = threading.Event()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(started), self._loop)
        assert started.wait(10)
        for path in ("applied", "stats", "session-ends"):
            self.on(path, fakes.answer(202))
        self.on("changes", self.stream)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._serving.result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        async with fakes.core(socket=str(self._path)) as core:
            self._core = core
            started.set()
            await self._closing.wait()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the core's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def asked(self, path: str) -> list[Request]:
        """The requests for one of the API's paths so far."""
        return self._core.asked(path)

    def on(self, path: str, *handlers: Handler) -> None:
        """What each request for the path is answered by: the next one each time, the last for good."""
        wanted = [self._followed(handler) for handler in handlers] if path == "changes" else handlers

        async def put() -> None:
            self._core.on(path, *wanted)

        self.call(put())

    def _followed(self, handler: Handler) -> Handler:
        async def follow(request: Request, writer: asyncio.StreamWriter) -> None:
            self._streams.append(writer)
            try:
                await handler(request, writer)
            finally:
                with suppress(ValueError):
                    self._streams.remove(writer)

        return follow

    async def stream(self, _request: Request, writer: asyncio.StreamWriter) -> None:
        """Open a change stream, to be written to by ``send``."""
        writer.write(STREAM_HEAD + b":\n\n")
        await self._closing.wait()

    def send(self, data: bytes) -> None:
        """Write to the change stream, once it is open."""

        async def write() -> bool:
            self._streams = [writer for writer in self._streams if _is_open(writer)]
            for writer in self._streams:
                with suppress(OSError):
                    writer.write(data)
                    await writer.drain()
            return bool(self._streams)

        until(lambda: self.call(write()), 30, "a change stream")

    def cut(self) -> None:
        """Close the change stream."""

        async def close() -> None:
            while self._streams:
                self._streams.pop().transport.abort()

        self.call(close())


def _is_open(writer: asyncio.StreamWriter) -> bool:
    """Whether the other end is open, which asyncio's streams say to readers only."""
    if writer.is_closing():
        return False
    poll = select.poll()
    poll.register(writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return not poll.poll(0)


def endless(head: bytes, data: bytes) -> Handler:
    """A handler that goes on as long as it is listened to."""

    async def handler(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(data)
            await writer.drain()
            # A drain need not wait, and others want to be served.
            await asyncio.sleep(0)

    return handler


def raw(data: bytes) -> Handler:
    """A handler that answers with these bytes and closes."""

    async def handler(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return handler
