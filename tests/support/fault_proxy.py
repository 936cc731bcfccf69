"""A TCP proxy between the agent and core whose faults are switched while connections run through it.

It listens where the agent's namespace can reach it and passes on to core's unix socket. The fault that
is set holds at once, for the connections that are open and for new ones; what it held back goes on once
it is lifted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from tests.support.netns import Namespace

T = TypeVar("T")
CHUNK: Final = 64 * 1024
_CLONE_NEWNET: Final = 0x40000000
_HEAD_ENDS: Final = b"\r\n\r\n"
_CORRUPT: Final = slice(5, None, 7)
"""Past the size of a chunk, so that it is what the chunk holds that is spoilt."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong between agent and core; times in seconds, sizes in bytes, nothing by default.

    ``delay``: for each chunk, both ways. ``reset``: every connection is reset (RST). ``half_open``:
    connections stay and nothing passes. ``truncate``: a connection is closed after so much of an
    answer. ``trickle``: answers come a byte at a time, so far apart. ``corrupt``: bytes of the answers'
    bodies have their high bits flipped, which leaves no JSON valid: what passes for another valid
    message only TLS could tell.
    """

    delay: float = 0.0
    reset: bool = False
    half_open: bool = False
    truncate: int | None = None
    trickle: float = 0.0
    corrupt: bool = False


NO_FAULT: Final = Fault()


def inside(space: Namespace, work: Callable[[], T]) -> T:
    """Do it in a thread of its own that is in the namespace; sockets made by it stay there."""
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(space.path,)) as pool:
        return pool.submit(work).result()


def _enter(path: Path) -> None:
    # os.setns is new in 3.12; only the calling thread changes.
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)


class FaultProxy:
    """The proxy, on a loop in a thread of its own; leave the block and it is gone."""

    def __init__(self, space: Namespace, target: Path) -> None:
        """Listen on a loopback port in ``space`` and pass on to the unix socket ``target``."""
        self._target = target
        self._socket = inside(space, lambda: socket.create_server(("127.0.0.1", 0)))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._passing: set[_Passage] = set()
        self._fault = NO_FAULT
        self.opened: list[float] = []
        """When each connection was opened, in monotonic seconds."""

    @property
    def url(self) -> str:
        """What the agent's ``core.url`` is set to."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/gateway/v1/"

    @property
    def fault(self) -> Fault:
        """The fault in force; set another, or ``NO_FAULT``, at any time."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        async def put() -> None:
            self._fault = fault
            for passage in list(self._passing):
                passage.put(fault)

        asyncio.run_coroutine_threadsafe(put(), self._loop).result(10)

    def opened_since(self, moment: float) -> list[float]:
        """When connections were opened from then on, in seconds after it."""
        return [at - moment for at in self.opened if at >= moment]

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._socket)

    async def _close(self) -> None:
        self._server.close()
        for passage in list(self._passing):
            passage.reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened.append(time.monotonic())
        passage = _Passage(writer, self._fault)
        self._passing.add(passage)
        try:
            await passage.run(reader, self._target)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._passing.discard(passage)


class _Passage:
    """One connection of the agent's, and core's end of it."""

    def __init__(self, agent: asyncio.StreamWriter, fault: Fault) -> None:
        self._agent = agent
        self._fault = fault
        self._flowing = asyncio.Event()
        self._answered = 0
        self._head = b""
        self._in_body = False
        self.put(fault)

    def put(self, fault: Fault) -> None:
        """This is the fault from now on."""
        self._fault = fault
        if fault.half_open:
            self._flowing.clear()
        else:
            self._flowing.set()
        if fault.reset:
            self.reset()

    def reset(self) -> None:
        """End the agent's connection by RST."""
        sock = self._agent.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._agent.transport.abort()

    async def run(self, reader: asyncio.StreamReader, target: Path) -> None:
        with contextlib.suppress(OSError):
            from_core, core = await asyncio.open_unix_connection(str(target))
            up = asyncio.create_task(self._up(reader, core))
            down = asyncio.create_task(self._down(from_core))
            try:
                await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (up, down):
                    task.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
                core.close()
        await self._flowing.wait()
        self._agent.close()

    async def _up(self, reader: asyncio.StreamReader, core: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._pass_on()
            self._answered, self._head, self._in_body = 0, b"", False
            core.write(data)
            await core.drain()

    async def _down(self, from_core: asyncio.StreamReader) -> None:
        while data := await from_core.read(CHUNK):
            await self._pass_on()
            spoilt = self._spoil(data) if self._fault.corrupt else self._note(data)
            if (most := self._fault.truncate) is not None:
                spoilt = spoilt[: max(0, most - self._answered)]
            self._answered += len(data)
            await self._write(spoilt)
            if most is not None and self._answered >= most:
                return

    async def _pass_on(self) -> None:
        await asyncio.sleep(self._fault.delay)
        await self._flowing.wait()

    async def _write(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            trickle = self._fault.trickle
            end = at + 1 if trickle else len(data)
            self._agent.write(data[at:end])
            await self._agent.drain()
            await asyncio.sleep(trickle)
            await self._flowing.wait()
            at = end

    def _note(self, data: bytes) -> bytes:
        """See where the body begins."""
        if not self._in_body:
            self._head += data
            self._in_body = _HEAD_ENDS in self._head
        return data

    def _spoil(self, data: bytes) -> bytes:
        body = 0
        if not self._in_body:
            before = len(self._head)
            self._note(data)
            if _HEAD_ENDS not in self._head:
                return data
            body = self._head.index(_HEAD_ENDS) + len(_HEAD_ENDS) - before
        spoilt = bytearray(data[body:])
        spoilt[_CORRUPT] = bytes(byte ^ 0x80 for byte in spoilt[_CORRUPT])
        return data[:body] + bytes(spoilt)
