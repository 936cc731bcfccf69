"""A hostile client of the agent's listeners, as a process of its own: ``hostile.py ARGUMENTS``, in JSON.

``throw``: garbage, one connection each, ``count`` of them and for ``seconds`` at least. ``hold``:
``count`` connections for ``seconds`` that say nothing, or a byte now and then, and come back when they
are turned away. Half of it goes through TLS where that is given. What it saw goes to stdout as JSON.
"""

import asyncio
import base64
import contextlib
import json
import random
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.netns import Namespace

ROOT = Path(__file__).parents[2]
PATIENCE = 0.3
"""Seconds that an answer to garbage is waited for."""
COMEBACK = 5.0
ARRIVAL = 1.5
"""Seconds in which those who hold connections arrive: it is about places, not about a burst."""
TRICKLE = 0.5
HEAD = b"POST /v1/changes HTTP/1.1\r\nHost: agent\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: agent\r\n\r\n"


class Attack:
    """A running hostile client; ``report`` waits for its end. Leave the block and it is gone."""

    def __init__(self, space: Namespace, what: str, target: str, count: int, **more: Any) -> None:
        """``target`` is ``HOST:PORT`` or a path; ``more``: seconds, at_once, seed, and tls (the
        paths of a CA, a certificate and its key).
        """
        argv = json.dumps({"what": what, "target": target, "count": count, **more})
        self._process = space.popen(
            sys.executable, "-m", "tests.reliability.hostile", argv, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def wait_arrived(self) -> None:
        """Wait until all who hold connections have been at the door."""
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == "arrived"

    def report(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.read())
        return told


def client_hello() -> bytes:
    """The first flight of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="agent")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def signature(chance: random.Random) -> bytes:
    """Headers of a signed push, by somebody without the secret."""
    stamps = [str(int(time.time()) + step) for step in (0, -301, 600)] + ["nan", "-1", "9" * 400, "soon", ""]
    mac = base64.b64encode(chance.randbytes(32)).decode()
    macs = [f"v1,{mac}", f"v2,{mac}", "v1,%%%", "v1", " ".join([f"v1,{mac}"] * 200), "v1,a,b", "\xff"]
    lines = {
        "webhook-id": f"msg_{chance.randrange(1 << 60):x}",
        "webhook-timestamp": chance.choice(stamps),
        "webhook-signature": chance.choice(macs),
    }
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")


def json_bomb(chance: random.Random) -> bytes:
    return chance.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"location":' + b"9" * 50_000 + b"}",
            b'{"changes":[' + b"1e999," * 5_000 + b"0]}",
            b'"\\ud800' + b"\\u0000" * 5_000,
        )
    )


def with_body(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def garbage(chance: random.Random) -> Iterator[tuple[str, list[bytes]]]:
    """Kinds of garbage without end, each as the parts that are sent one after another."""
    hello = client_hello()
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
    lengths = (b"-1", b"x", b"1e3", b"9" * 40, b"5\r\nContent-Length: 6", b"0x10", b"99999")
    chunks = (
        b"zz\r\n",
        b"-5\r\nhello\r\n",
        b"f" * 40 + b"\r\n",
        b"5;" + b"x" * 70_000,
        b"5\r\nhelloworld\r\n0\r\n\r\n",
    )
    methods = (b"BREW", b"get", b"G E T", b"X" * 30_000, b"TRACE", b"CONNECT", b"\x00", b"OPTIONS")
    targets = (
        b"*",
        b"/%00",
        b"/../../etc/passwd",
        b"http://x/v1/changes",
        b"/" + b"a" * 30_000,
        b"/%ff%fe",
        b"\xc3\xa4",
    )
    upgrades = (
        b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==",
        b"h2c\r\nHTTP2-Settings: AAMAAABkAAQ",
    )
    while True:
        yield "random bytes", [chance.randbytes(chance.randrange(1, 4096))]
        yield "huge header", [b"GET / HTTP/1.1\r\nX: " + b"x" * chance.randrange(20_000, 200_000)]
        yield (
            "many headers",
            [b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(3000)) + b"\r\n"],
        )
        yield "bad method", [chance.choice(methods) + b" /metrics HTTP/1.1\r\nHost: x\r\n\r\n"]
        yield "bad target", [b"GET " + chance.choice(targets) + b" HTTP/1.1\r\nHost: x\r\n\r\n"]
        yield "HTTP/2", [preface + chance.randbytes(200)]
        yield "TLS hello", [hello, chance.randbytes(100)]
        yield "pipelined", [GET * chance.randrange(2, 50) + chance.randbytes(500)]
        yield "wrong length", [HEAD + b"Content-Length: " + chance.choice(lengths) + b"\r\n\r\n{}"]
        yield "bad chunks", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chance.choice(chunks)]
        yield (
            "chunks and length",
            [HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET"],
        )
        yield "unsigned", [with_body(HEAD, b'{"location": "1", "changes": []}')]
        yield "wrongly signed", [with_body(HEAD + signature(chance), b"{}" * chance.randrange(1, 1000))]
        yield "deep JSON", [with_body(HEAD + signature(chance), json_bomb(chance))]
        yield "too large", [HEAD + signature(chance) + b"Content-Length: 99999999999\r\n\r\n" + bytes(70_000)]
        yield (
            "upgrade",
            [
                b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: "
                + chance.choice(upgrades)
                + b"\r\n\r\n"
            ],
        )
        yield "expects", [HEAD + signature(chance) + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"]
        yield (
            "answered, then bad",
            [HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b"zz\r\n\x00\x00"],
        )
        yield "cut", [HEAD + signature(chance) + b"Content-Length: 500\r\n\r\n{"]
        yield "nothing", []


class Hostile:
    """Both attacks against one target."""

    def __init__(self, target: str, seed: int, tls: list[str] | None) -> None:
        self._target = target
        self._tls: ssl.SSLContext | None = None
        if tls:
            ca, cert, key = tls
            self._tls = ssl.create_default_context(cafile=ca)
            self._tls.load_cert_chain(cert, key)
        self._chance = random.Random(seed)
        self._tally: Counter[str] = Counter()
        self._longest = 0.0

    async def _connect(self, *, tls: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.startswith("/"):
            return await asyncio.open_unix_connection(self._target)
        host, _, port = self._target.rpartition(":")
        return await asyncio.open_connection(host, int(port), ssl=self._tls if tls else None)

    async def throw(self, count: int, seconds: float, at_once: int) -> dict[str, Any]:
        """Throw garbage; tell how often each kind came, and how each ended."""
        end = time.monotonic() + seconds
        kinds = garbage(self._chance)
        thrown = 0

        async def thrower() -> None:
            nonlocal thrown
            while thrown < count or time.monotonic() < end:
                thrown += 1
                kind, parts = next(kinds)
                self._tally[f"{kind}: {await self._throw_one(parts)}"] += 1

        await asyncio.gather(*(thrower() for _ in range(at_once)))
        return {"thrown": thrown, "ends": dict(self._tally)}

    async def _throw_one(self, parts: list[bytes]) -> str:
        """Send the parts; the status of the answer, or what there was instead."""
        try:
            reader, writer = await self._connect(tls=self._chance.random() < 0.5)
        except OSError:
            return "not connected"
        answer = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.002)
            if not parts or self._chance.random() < 0.1:
                # A reset instead of an end, in the middle of whatever goes on.
                if (connection := writer.get_extra_info("socket")) is not None:  # and not cut already
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return "reset"
            async with asyncio.timeout(PATIENCE):
                answer = await reader.read(1 << 20)
        except TimeoutError:
            return "silence"
        except OSError:
            pass
        finally:
            writer.close()
        return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"

    async def hold(self, count: int, seconds: float) -> dict[str, Any]:
        """Hold connections; tell how many were opened and how long one stayed open at most."""
        end = float("inf")
        here: set[int] = set()
        habits = (self._silent, self._trickled_head, self._trickled_body, self._half)

        def arrived(number: int) -> None:
            nonlocal end
            self._tally["opened"] += 1
            here.add(number)
            if len(here) == count and end == float("inf"):
                end = time.monotonic() + seconds
                print(json.dumps("arrived"), flush=True)

        async def holder(number: int) -> None:
            habit = habits[number % len(habits)]
            await asyncio.sleep(ARRIVAL * number / count)
            while time.monotonic() < end:
                began = time.monotonic()
                try:
                    reader, writer = await self._connect(tls=habit != self._silent)
                except OSError:
                    arrived(number)
                    self._longest = max(self._longest, time.monotonic() - began)
                    await asyncio.sleep(COMEBACK)
                    continue
                arrived(number)
                saying = asyncio.create_task(habit(writer))
                with contextlib.suppress(OSError):
                    while await reader.read(4096):
                        pass
                self._longest = max(self._longest, time.monotonic() - began)
                saying.cancel()
                writer.close()
                await asyncio.sleep(min(COMEBACK, max(0.0, end - time.monotonic())))

        holders = [asyncio.create_task(holder(number)) for number in range(count)]
        # A holder ends once its last connection was closed by the other side.
        _, late = await asyncio.wait(holders, timeout=seconds + 60)
        return {"opened": self._tally["opened"], "longest": self._longest, "never_closed": len(late)}

    async def _silent(self, writer: asyncio.StreamWriter) -> None:
        """Nothing at all."""

    async def _trickled_head(self, writer: asyncio.StreamWriter) -> None:
        await self._trickle(writer, HEAD + b"X-Long: ")

    async def _trickled_body(self, writer: asyncio.StreamWriter) -> None:
        stamp = b"webhook-id: msg_1\r\nwebhook-timestamp: %d\r\n" % time.time()
        mac = b"webhook-signature: v1," + base64.b64encode(bytes(32)) + b"\r\n"
        await self._trickle(writer, HEAD + stamp + mac + b"Content-Length: 5000\r\n\r\n")

    async def _half(self, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Le")

    async def _trickle(self, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(head)
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(TRICKLE)
                writer.write(b"x")
                await writer.drain()


async def attack(
    what: str,
    target: str,
    count: int,
    seconds: float = 0.0,
    at_once: int = 8,
    seed: int = 1,
    tls: list[str] | None = None,
) -> dict[str, Any]:
    hostile = Hostile(target, seed, tls)
    if what == "hold":
        return await hostile.hold(count, seconds)
    return await hostile.throw(count, seconds, at_once)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(attack(**json.loads(sys.argv[1])))))
