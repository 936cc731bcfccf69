from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import gzip
import json
import socket
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from agent import __version__
from agent.core.endpoint import TlsFiles, parse_base_url
from agent.core.http import CoreClient
from agent.core.messages import NotModified
from agent.errors import AgentError, ConfigError, CoreRejected, CoreUnavailable, InvalidMessage
from agent.model import Now, Snapshot
from tests.core.fakes import (
    TOKEN,
    Core,
    Handler,
    Request,
    answer,
    body,
    core,
    event,
    peer,
    run,
    state,
    stream,
)

NOW = Now(boot=1000.5, wall=1_795_489_200.0)


@asynccontextmanager
async def client(url: str, **changed: Any) -> AsyncIterator[CoreClient]:
    made = CoreClient(url, TOKEN, **({"clock": lambda: NOW, "heard": lambda: None} | changed))
    try:
        yield made
    finally:
        await made.close()


def pull(*handlers: Handler, held: str | None = None, **changed: Any) -> Snapshot | NotModified:
    async def main() -> Snapshot | NotModified:
        async with core() as told, client(told.url, **changed) as asking:
            told.on("state", *handlers)
            return await asking.get_state(held)

    return run(main())


def test_the_state_is_pulled_with_token_and_version_and_stamped_with_boot_time() -> None:
    async def main() -> tuple[Core, Snapshot | NotModified]:
        async with core() as told, client(told.url) as asking:
            told.on("state", answer(200, body(state(peer())), ETag='W/"b7e1:42"'))
            return told, await asking.get_state()

    told, snapshot = run(main())
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.revision, snapshot.requested_at) == (42, 1000.5)
    (request,) = told.requests
    assert (request.method, request.path) == ("GET", "/gateway/v1/state")
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["user-agent"] == f"wg-agent/{__version__}"
    assert request.headers["accept-encoding"] == "gzip"
    assert "if-none-match" not in request.headers


def test_a_held_state_is_named_in_if_none_match_and_304_means_it_is_current() -> None:
    async def main() -> tuple[Core, Snapshot | NotModified]:
        async with core() as told, client(told.url) as asking:
            told.on("state", answer(304))
            return told, await asking.get_state("b7e1:42")

    told, got = run(main())
    assert got == NotModified()
    assert told.requests[0].headers["if-none-match"] == '"b7e1:42"'


def test_a_304_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(CoreRejected):
        pull(answer(304))


def test_the_content_type_is_not_trusted() -> None:
    got = pull(answer(200, body(state()), Content_Type="text/html"))
    assert isinstance(got, Snapshot)


def test_a_compressed_state_of_several_members_is_read() -> None:
    text = body(state(peer()))
    packed = gzip.compress(text[:50]) + gzip.compress(text[50:])
    got = pull(answer(200, packed, Content_Encoding="gzip"))
    assert isinstance(got, Snapshot)
    assert len(got.peers) == 1


def test_a_very_large_state_is_read_off_the_loop() -> None:
    text = body(state(*(peer(number) for number in range(1, 6000))))
    assert len(text) > 1_000_000
    got = pull(answer(200, gzip.compress(text), Content_Encoding="gzip"))
    assert isinstance(got, Snapshot)
    assert len(got.peers) == 5999


@pytest.mark.parametrize(
    ("handler", "error", "says"),
    [
        (answer(401), CoreRejected, "refuses the token"),
        (answer(403), CoreRejected, "refuses the token"),
        (answer(404), CoreRejected, "core.url is wrong"),
        (answer(400), CoreRejected, "400"),
        (answer(301, Location="https://elsewhere/"), CoreRejected, "redirects"),
        (answer(302, Location="https:login"), CoreUnavailable, "headers that can't be read"),
        (answer(302, Location="http://xn--a/"), CoreUnavailable, "headers that can't be read"),
        (answer(302, Location="state"), CoreRejected, "redirects"),
        (answer(307, Location="state"), CoreRejected, "redirects"),
        (answer(429), CoreUnavailable, "429"),
        (answer(500), CoreUnavailable, "500"),
        (answer(503), CoreUnavailable, "503"),
        (answer(204), InvalidMessage, "204"),
        (answer(200, b"<html>"), InvalidMessage, "not JSON"),
        (answer(200, body(state(peer()))[:-9]), InvalidMessage, "not JSON"),
        (answer(200, body(state() | {"epoch": None})), InvalidMessage, "epoch"),
        (answer(200, body(state()), Content_Length="9999"), InvalidMessage, "truncated"),
        (answer(200, b"x", Content_Encoding="br"), InvalidMessage, "Content-Encoding"),
        (answer(200, b"xxxx", Content_Encoding="gzip"), InvalidMessage, "gzip"),
        (
            answer(200, gzip.compress(body(state()))[:-9], Content_Encoding="gzip"),
            InvalidMessage,
            "truncated",
        ),
        (
            answer(200, b"5\r\n{    \r\n", Transfer_Encoding="chunked"),
            InvalidMessage,
            "truncated",
        ),
    ],
)
def test_each_of_cores_errors_is_named(handler: Handler, error: type[AgentError], says: str) -> None:
    with pytest.raises(error) as raised:
        pull(handler)
    assert says in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_an_answer_over_max_body_is_refused() -> None:
    text = body(state(peer()))
    assert isinstance(pull(answer(200, text), max_body=len(text)), Snapshot)
    with pytest.raises(InvalidMessage, match=r"core\.max_body"):
        pull(answer(200, text), max_body=len(text) - 1)


def test_max_body_counts_decompressed_bytes_and_a_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=9)
    assert len(bomb) < 250_000
    unpacked = 0

    class Counting:
        def __init__(self, window: int) -> None:
            self.inner = _decompressobj(window)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal unpacked
            piece = self.inner.decompress(data, limit)
            unpacked += len(piece)
            return piece

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    _decompressobj = zlib.decompressobj
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.core.inflate.zlib.decompressobj", Counting)
        with pytest.raises(InvalidMessage, match="larger than 1000000 bytes"):
            pull(answer(200, bomb, Content_Encoding="gzip"), max_body=1_000_000)
    assert 1_000_000 < unpacked < 1_500_000


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("99999999999999999999", 3600.0),
        (email.utils.formatdate(NOW.wall + 90, usegmt=True), 90.0),
        (email.utils.formatdate(NOW.wall + 90), 90.0),
        (email.utils.formatdate(NOW.wall - 90, usegmt=True), 0.0),
        ("soon", None),
        ("-1", None),
        ("nan", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str, seconds: float | None) -> None:
    with pytest.raises(CoreUnavailable) as raised:
        pull(answer(503, Retry_After=value))
    assert raised.value.retry_after == seconds


def test_a_core_that_refuses_the_connection_is_unavailable() -> None:
    async def main() -> None:
        async with core() as told:
            url = told.url
        async with client(url) as asking:
            await asking.get_state()

    with pytest.raises(CoreUnavailable, match="can't be reached"):
        run(main())


def test_a_core_that_does_not_answer_in_time_is_unavailable() -> None:
    with pytest.raises(CoreUnavailable, match="silent"):
        pull(stream(), timeout=0.2)


def test_an_answer_that_trickles_is_given_up() -> None:
    async def trickle(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)

    with pytest.raises(CoreUnavailable, match="too long"):
        pull(trickle, timeout=5, deadline=0.4)


def test_what_is_not_http_is_unavailable() -> None:
    async def ssh(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await writer.drain()

    with pytest.raises(CoreUnavailable, match="HTTP"):
        pull(ssh)


def test_every_byte_from_core_counts_as_heard_also_an_error() -> None:
    heard: list[int] = []
    with pytest.raises(CoreUnavailable):
        pull(answer(500), heard=lambda: heard.append(1))
    assert heard


def test_a_core_on_a_unix_socket_is_asked_there(tmp_path: Path) -> None:
    async def main() -> Core:
        async with core(socket=str(tmp_path / "core.sock")) as told, client(told.url) as asking:
            told.on("state", answer(200, body(state())))
            await asking.get_state()
            return told

    assert run(main()).requests[0].path == "/gateway/v1/state"


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert isinstance(pull(answer(200, body(state()))), Snapshot)


@pytest.mark.parametrize(
    ("url", "http", "socket"),
    [
        ("https://core.example.com/gateway/v1", "https://core.example.com/gateway/v1/", None),
        ("https://core.example.com:8443", "https://core.example.com:8443/", None),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1/", None),
        ("http://[::1]:8080/v1/", "http://[::1]:8080/v1/", None),
        ("http://localhost/v1/", "http://localhost/v1/", None),
        (
            "http+unix:///run/core.sock:/gateway/v1/",
            "http://localhost/gateway/v1/",
            "/run/core.sock",
        ),
        ("http+unix:///run/core.sock", "http://localhost/", "/run/core.sock"),
    ],
)
def test_core_url_is_taken_apart(url: str, http: str, socket: str | None) -> None:
    base = parse_base_url(url)
    assert (base.http, base.socket) == (http, socket)
    assert base.tls == url.startswith("https")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "core.example.com",
        "ftp://core.example.com/",
        "https://",
        "https://core.example.com:port/",
        "https://[::1/",
        "http://core.example.com/v1/",
        "http://10.0.0.1/v1/",
        "http://127.0.0.1.example.com/",
        "https://user:hunter2@core.example.com/",
        "https://core.example.com/?token=hunter2",
        "http+unix://run/core.sock:/v1/",
    ],
)
def test_an_unusable_core_url_is_a_configuration_error_that_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match=r"core\.url") as raised:
        parse_base_url(url)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("token", ["", "two words", "line\n", "tökèn"])
def test_an_unusable_token_is_a_configuration_error(token: str) -> None:
    with pytest.raises(ConfigError, match="token") as raised:
        CoreClient("https://core.example.com/", token, clock=lambda: NOW, heard=lambda: None)
    assert not token or token not in str(raised.value)


def _serve_tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def _pull_over_tls(context: ssl.SSLContext, files: TlsFiles) -> Snapshot | NotModified:
    async def main() -> Snapshot | NotModified:
        async with core(context) as told, client(told.url, tls=files) as asking:
            told.on("state", answer(200, body(state())))
            return await asking.get_state()

    return run(main())


def _pem(path: Path, *blobs: trustme.Blob) -> Path:
    path.write_bytes(b"".join(blob.bytes() for blob in blobs))
    return path


def test_core_is_trusted_by_its_ca_and_the_client_shows_its_certificate(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca_file = _pem(tmp_path / "ca.pem", ca.cert_pem)
    context = _serve_tls(ca.issue_cert("localhost"))
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    own = ca.issue_cert("gateway.example.com")
    files = TlsFiles(
        ca_file,
        _pem(tmp_path / "own.pem", *own.cert_chain_pems),
        _pem(tmp_path / "own.key", own.private_key_pem),
    )

    assert isinstance(_pull_over_tls(context, files), Snapshot)
    with pytest.raises(CoreUnavailable):
        _pull_over_tls(context, TlsFiles(ca_file))


def test_a_certificate_that_is_not_accepted_names_the_reason(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca_file = _pem(tmp_path / "ca.pem", ca.cert_pem)
    past = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    future = dt.datetime(2120, 1, 1, tzinfo=dt.UTC)
    good = ca.issue_cert("localhost")
    old = ca.issue_cert("localhost", not_before=past, not_after=past + dt.timedelta(days=1))
    early = ca.issue_cert("localhost", not_before=future, not_after=future.replace(year=2121))
    for certificate, trusted, says in [
        (good, None, "core.ca_file"),
        (ca.issue_cert("elsewhere.example.com"), ca_file, "another name"),
        (old, ca_file, "has expired"),
        (early, ca_file, "not valid yet"),
    ]:
        with pytest.raises(CoreUnavailable) as raised:
            _pull_over_tls(_serve_tls(certificate), TlsFiles(trusted))
        assert says in str(raised.value)


@contextmanager
def _strict_core(context: ssl.SSLContext, version: ssl.TLSVersion) -> Iterator[str]:
    """A server that wants a client certificate and says so by an alert, which asyncio's never sends."""
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = version

    def serve() -> None:
        connection, _ = listener.accept()
        connection.settimeout(10)
        with connection:
            tls = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with tls, suppress(OSError):
                try:
                    tls.do_handshake()
                finally:
                    # With something unread, closing would be a reset, which overtakes the alert.
                    socket.socket.shutdown(tls, socket.SHUT_WR)
                    while socket.socket.recv(tls, 4096):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://localhost:{listener.getsockname()[1]}/"
        thread.join(10)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_core_that_refuses_the_client_certificate_is_unavailable_and_the_reason_is_named(
    tmp_path: Path, version: ssl.TLSVersion
) -> None:
    ca, foreign = trustme.CA(), trustme.CA()
    ca_file = _pem(tmp_path / "ca.pem", ca.cert_pem)
    other = foreign.issue_cert("gateway.example.com")
    shown = TlsFiles(
        ca_file,
        _pem(tmp_path / "other.pem", *other.cert_chain_pems),
        _pem(tmp_path / "other.key", other.private_key_pem),
    )

    async def ask(url: str, files: TlsFiles) -> None:
        async with client(url, tls=files) as asking:
            await asking.get_state()

    for files, says in ((shown, "does not accept"), (TlsFiles(ca_file), "wants a client certificate")):
        context = _serve_tls(ca.issue_cert("localhost"))
        ca.configure_trust(context)
        with _strict_core(context, version) as url, pytest.raises(CoreUnavailable) as raised:
            run(ask(url, files))
        assert says in str(raised.value)


def test_unusable_tls_files_are_configuration_errors(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    for files in (
        TlsFiles(ca_file=junk),
        TlsFiles(ca_file=tmp_path / "missing.pem"),
        TlsFiles(client_cert_file=junk),
        TlsFiles(client_cert_file=tmp_path / "missing.pem"),
    ):
        with pytest.raises(ConfigError, match=r"\.pem"):
            CoreClient("https://localhost/", TOKEN, clock=lambda: NOW, heard=lambda: None, tls=files)


def test_the_stream_is_asked_for_uncompressed_from_the_position_held() -> None:
    async def main() -> tuple[Core, bytes]:
        async with core() as told, client(told.url) as asking:
            told.on("changes", stream(b": hi\n\n"))
            async with asking.open_changes("b7e1:42") as chunks:
                return told, await anext(aiter(chunks))

    told, chunk = run(main())
    assert chunk == b": hi\n\n"
    headers = told.requests[0].headers
    assert told.requests[0].path == "/gateway/v1/changes"
    assert headers["last-event-id"] == "b7e1:42"
    assert headers["accept-encoding"] == "identity"
    assert headers["accept"] == "text/event-stream"


def _follow(handler: Handler, **changed: Any) -> list[bytes]:
    async def main() -> list[bytes]:
        async with core() as told, client(told.url, **changed) as asking:
            told.on("changes", handler)
            async with asking.open_changes("b7e1:42") as chunks:
                return [chunk async for chunk in chunks]

    return run(main())


def test_a_silent_stream_is_a_lost_connection() -> None:
    with pytest.raises(CoreUnavailable, match="silent"):
        _follow(stream(b": hi\n\n"), silence=0.3)


def test_a_cut_stream_is_a_lost_connection_and_no_truncated_answer() -> None:
    with pytest.raises(CoreUnavailable, match="cut"):
        _follow(answer(200, b"9\r\n: hi", Transfer_Encoding="chunked"))


def test_a_stream_may_last_longer_than_an_answer() -> None:
    assert _follow(stream(b": hi\n\n", hold=0.6), deadline=0.2) == [b": hi\n\n"]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_core_without_a_stream_is_told_by_its_status(status: int) -> None:
    with pytest.raises(CoreRejected) as raised:
        _follow(answer(status))
    assert raised.value.status == status


def test_a_compressed_stream_is_refused() -> None:
    packed = gzip.compress(event("resync", "b7e1:42", {}))
    with pytest.raises(InvalidMessage, match="compressed"):
        _follow(answer(200, packed, Content_Encoding="gzip"))


def test_a_report_is_posted_and_compressed_above_8_kib() -> None:
    small, large = json.dumps(["x" * 10]).encode(), json.dumps(["x" * 10_000]).encode()

    async def main() -> Core:
        async with core() as told, client(told.url) as asking:
            for path in ("applied", "stats", "session-ends"):
                told.on(path, answer(202))
            await asking.post_applied(small)
            await asking.post_stats(large)
            await asking.post_ends(small)
            return told

    told = run(main())
    assert [r.path.rpartition("/")[2] for r in told.requests] == ["applied", "stats", "session-ends"]
    assert [r.headers.get("content-encoding") for r in told.requests] == [None, "gzip", None]
    assert [r.json() for r in told.requests] == [["x" * 10], ["x" * 10_000], ["x" * 10]]
    assert {r.headers["content-type"] for r in told.requests} == {"application/json"}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, InvalidMessage),
        (400, CoreRejected),
        (401, CoreRejected),
        (404, CoreRejected),
        (413, CoreRejected),
        (503, CoreUnavailable),
    ],
)
def test_only_202_takes_a_report(status: int, error: type[AgentError]) -> None:
    async def main() -> None:
        async with core() as told, client(told.url) as asking:
            told.on("stats", answer(status))
            await asking.post_stats(b"{}")

    with pytest.raises(error):
        run(main())
