from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.config import Listen
from agent.errors import AgentError, ConfigError
from agent.server import Limits, bind, own_app, serve, tls_context

LOOPBACK = Listen("127.0.0.1", 0)
QUICK = Limits(request=0.3, response=0.5, idle=1, handshake=0.3, connections=4, shutdown=1)


async def metrics_page() -> bytes:
    return b"up 1\n"


def pages(*, healthy: bool = True, ready: tuple[bool, str] = (True, "")) -> ASGIApp:
    return own_app(metrics_page, "text/plain; version=0.0.4", lambda: healthy, lambda: ready)


@contextlib.asynccontextmanager
async def running(
    app: ASGIApp, limits: Limits = QUICK, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    sock = bind(LOOPBACK, "http.listen")
    port: int = sock.getsockname()[1]
    task = asyncio.create_task(serve(app, sock, tls=tls, limits=limits))
    try:
        yield port
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def run(
    app: ASGIApp,
    check: Callable[[int], Awaitable[None]],
    limits: Limits = QUICK,
    tls: ssl.SSLContext | None = None,
) -> None:
    async def main() -> None:
        async with running(app, limits, tls) as port:
            await check(port)

    asyncio.run(main())


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}")


async def raw(port: int, *parts: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """Send the parts and read to the end; the answer and the seconds until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    answer = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
            if answer.done():
                break
    try:
        return await asyncio.wait_for(answer, 10), time.monotonic() - began
    except ConnectionError:
        return b"", time.monotonic() - began
    finally:
        writer.close()


def test_the_pages_answer_as_the_agent_is() -> None:
    async def check(port: int) -> None:
        answer = await get(port, "/metrics")
        assert (answer.status_code, answer.text) == (200, "up 1\n")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4"
        assert "server" not in answer.headers
        assert (await get(port, "/healthz")).status_code == 200
        assert (await get(port, "/readyz")).status_code == 200
        assert (await get(port, "/")).status_code == 404

    run(pages(), check)


def test_an_agent_that_stalls_or_is_not_ready_says_503_and_why() -> None:
    async def check(port: int) -> None:
        assert (await get(port, "/healthz")).status_code == 503
        answer = await get(port, "/readyz")
        assert (answer.status_code, answer.text) == (503, "core is unreachable\n")

    run(pages(healthy=False, ready=(False, "core is unreachable")), check)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"GET / HT",),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", *[b"X"] * 90),
        (b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", *[b"x"] * 90),
    ],
    ids=["silent", "cut", "trickled headers", "trickled body"],
)
def test_a_slow_request_is_cut_off_in_bounded_time(parts: tuple[bytes, ...]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    async def check(port: int) -> None:
        _, took = await raw(port, *parts, pause=0.02)
        assert took < 2

    run(app, check)


def test_a_second_request_on_a_connection_is_bounded_too() -> None:
    async def check(port: int) -> None:
        whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        answer, took = await raw(port, whole, *[b"X"] * 100, pause=0.02)
        assert answer.startswith(b"HTTP/1.1 200")
        assert took < 2

    run(pages(), check)


def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async def check(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(1.2)
        with contextlib.suppress(ConnectionError):
            received = 0
            while part := await asyncio.wait_for(reader.read(65536), 5):
                received += len(part)
            assert received < 2000 * 65536
        writer.close()

    run(app, check)


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_an_answer_given_in_one_piece_and_not_taken_does_not_stay_for_good(header: bytes) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (16 << 20)})

    async def check(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n")
        await asyncio.sleep(1.5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(reader.read(65536), 5):
                received += len(part)
        assert received < 16 << 20
        writer.close()

    run(app, check)


def test_a_slow_client_has_the_time_of_an_answer_and_may_then_ask_again() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"16777216")]}
        )
        await send({"type": "http.response.body", "body": b"x" * (16 << 20)})

    async def check(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.6)  # longer than a request may take to arrive
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(16 << 20)) == 16 << 20
        writer.close()

    run(app, check, Limits(request=0.3, response=1.5))


def test_a_long_answer_that_is_read_is_not_cut_off_by_the_bound_on_requests() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.4)  # longer than a request may take to arrive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def check(port: int) -> None:
        assert (await get(port, "/")).text == "done"

    run(app, check)


def test_large_headers_are_refused() -> None:
    async def check(port: int) -> None:
        answer, _ = await raw(port, b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000)
        assert answer.startswith(b"HTTP/1.1 400") or answer == b""

    run(pages(), check)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def silent(port: int, source: str = "127.0.0.1") -> Connection:
    connection = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    await asyncio.sleep(0.02)
    return connection


def are_open(connections: list[Connection]) -> list[bool]:
    """Which of them the server has left open; all are closed then."""
    still = [reader.exception() is None and not reader.at_eof() for reader, _ in connections]
    for _, writer in connections:
        writer.close()
    return still


def test_who_is_silent_longest_makes_room_for_who_has_something_to_say() -> None:
    async def check(port: int) -> None:
        held = [await silent(port) for _ in range(4)]
        assert (await get(port, "/healthz")).status_code == 200
        await asyncio.sleep(0.05)
        assert are_open(held) == [False, True, True, True]

    run(pages(), check, Limits(connections=4))


def test_a_crowd_from_one_host_does_not_take_the_place_of_another() -> None:
    async def check(port: int) -> None:
        alone = await silent(port, "127.0.0.2")
        held = [await silent(port) for _ in range(10)]
        assert are_open([alone, *held]) == [True] + [False] * 7 + [True] * 3

    run(pages(), check, Limits(connections=4))


def test_where_all_are_served_one_more_is_turned_away_and_served_later() -> None:
    go_on, entered = asyncio.Event(), asyncio.Semaphore(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        entered.release()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def check(port: int) -> None:
        served = [asyncio.create_task(get(port, "/")) for _ in range(4)]
        for _ in served:
            await asyncio.wait_for(entered.acquire(), 30)
        with pytest.raises(httpx.TransportError):
            await get(port, "/")
        go_on.set()
        assert [(await answer).text for answer in served] == ["done"] * 4
        assert (await get(port, "/")).text == "done"

    run(app, check, Limits(connections=4))


def test_who_does_not_take_his_answer_makes_room_too() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        size = 1 if scope["path"] == "/small" else 64 << 20
        await send({"type": "http.response.body", "body": b"x" * size})
        await send({"type": "http.response.body", "body": b""})

    async def check(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port, limit=1024) for _ in range(4)]
        for _, writer in held:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.3)
        assert (await get(port, "/small")).text == "x"
        for _, writer in held:
            writer.transport.abort()

    run(app, check, Limits(connections=4))


def test_garbage_does_not_stop_the_server() -> None:
    async def check(port: int) -> None:
        for garbage in (b"\x00" * 100, b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02", b"G" * 9999):
            await raw(port, garbage)
        assert (await get(port, "/healthz")).status_code == 200

    run(pages(), check)


def test_a_request_that_turns_bad_after_its_head_is_no_fault_of_the_servers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def prompt(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await prompt(scope, receive, send)

    async def begun(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body", "body": b"more"})

    async def check(port: int) -> None:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        for parts in ((head + b"zz\r\n",), (head, b"zz\r\n")):
            await raw(port, *parts, pause=0.05)

    for app in (prompt, reading, begun):
        run(app, check)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_shutdown_finishes_requests_under_way_and_is_bounded() -> None:
    async def main(seconds: float) -> tuple[bytes, float]:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(seconds)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        sock = bind(LOOPBACK, "http.listen")
        port = sock.getsockname()[1]
        task = asyncio.create_task(serve(app, sock, limits=Limits(shutdown=1)))
        request = asyncio.create_task(raw(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        took = time.monotonic() - began
        answer, _ = await request
        return answer, took

    answer, took = asyncio.run(main(0.5))
    assert b"done" in answer
    assert took < 2
    answer, took = asyncio.run(main(60))
    assert b"done" not in answer
    assert took < 4


def test_the_processs_signal_handlers_stay_as_they_are() -> None:
    async def main() -> None:
        signals = (signal.SIGTERM, signal.SIGINT)
        before = [signal.getsignal(number) for number in signals]
        async with running(pages()) as port:
            await get(port, "/healthz")
            assert [signal.getsignal(number) for number in signals] == before

    asyncio.run(main())


def test_an_address_in_use_or_not_ours_is_said_and_is_no_fault_of_the_configuration() -> None:
    with bind(LOOPBACK, "http.listen") as sock:
        taken = Listen("127.0.0.1", sock.getsockname()[1])
        with pytest.raises(AgentError, match=r"http\.listen: .*in use") as in_use:
            bind(taken, "http.listen")
    with pytest.raises(AgentError, match=r"push\.listen") as not_ours:
        bind(Listen("192.0.2.1", 0), "push.listen")
    # Either may pass, and after a ConfigError the unit would not try again.
    assert not isinstance(in_use.value, ConfigError)
    assert not isinstance(not_ours.value, ConfigError)


def test_a_listener_takes_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    with bind(Listen("::1", 0), "http.listen") as sock:
        assert sock.family == socket.AF_INET6


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def issued(folder: Path, name: str, authority: trustme.CA, host: str) -> tuple[Path, Path]:
    issued_cert = authority.issue_cert(host)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued_cert.cert_chain_pems))
    key.write_bytes(issued_cert.private_key_pem.bytes())
    return cert, key


def test_a_listener_with_a_client_ca_serves_only_its_clients(tmp_path: Path, authority: trustme.CA) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    cert, key = issued(tmp_path, "server", authority, "127.0.0.1")
    own = issued(tmp_path, "client", authority, "core")
    foreign = issued(tmp_path, "foreign", trustme.CA(), "core")

    async def ask(port: int, pair: tuple[Path, Path] | None) -> int:
        context = ssl.create_default_context(cafile=ca)
        if pair:
            context.load_cert_chain(*pair)
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            return (await client.get(f"https://127.0.0.1:{port}/healthz")).status_code

    async def check(port: int) -> None:
        assert await ask(port, own) == 200
        for pair in (None, foreign):
            with pytest.raises(httpx.TransportError):
                await ask(port, pair)
        assert await ask(port, own) == 200

    run(pages(), check, tls=tls_context(cert, key, ca))


def test_a_tls_handshake_that_does_not_go_on_is_cut_off(tmp_path: Path, authority: trustme.CA) -> None:
    cert, key = issued(tmp_path, "server", authority, "127.0.0.1")

    async def check(port: int) -> None:
        _, took = await raw(port)
        assert took < 2

    run(pages(), check, tls=tls_context(cert, key, None))


def test_connections_in_their_tls_handshake_count_and_make_room(
    tmp_path: Path, authority: trustme.CA
) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    cert, key = issued(tmp_path, "server", authority, "127.0.0.1")

    async def check(port: int) -> None:
        held = [await silent(port) for _ in range(10)]
        context = ssl.create_default_context(cafile=ca)
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/healthz")).status_code == 200
            assert are_open(held) == [False] * 7 + [True] * 3

    run(pages(), check, Limits(connections=4), tls=tls_context(cert, key, None))


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path, authority: trustme.CA) -> None:
    cert, key = issued(tmp_path, "server", authority, "127.0.0.1")
    other = issued(tmp_path, "other", authority, "127.0.0.1")
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    cases: list[tuple[Any, str]] = [
        ((cert, rubbish, None), "rubbish"),
        ((cert, other[1], None), "other.key"),
        ((cert, key, rubbish), "rubbish"),
        ((cert, tmp_path / "none", None), "none"),
    ]
    for files, named in cases:
        with pytest.raises(ConfigError, match=named):
            tls_context(*files)
