"""TLS before the sandbox core, with certificates that can be changed while it runs; and certificates."""

import contextlib
import select
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import trustme

from tests.contract.inside import _enter
from tests.support.netns import Namespace


class Pair(NamedTuple):
    """A certificate and its key (0600), in PEM."""

    cert: Path
    key: Path


class Authority:
    """A CA and what it issues."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self._name = name
        self.file = folder / f"{name}-ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, host: str = "127.0.0.1", *, expired: bool = False) -> Pair:
        now = datetime.now(UTC)
        ends = now - timedelta(minutes=1) if expired else now + timedelta(days=1)
        issued = self._ca.issue_cert(host, not_before=now - timedelta(days=1), not_after=ends)
        pair = Pair(self._folder / f"{self._name}-{name}.pem", self._folder / f"{self._name}-{name}.key")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        pair.key.touch(0o600)
        pair.key.write_bytes(issued.private_key_pem.bytes())
        return pair


def client_context(ca: Path, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


class TlsFront:
    """Listens at 127.0.0.1 of a namespace and hands on to a unix socket what comes through TLS.

    In threads: asyncio closes a connection that it refuses without the alert that says why.
    """

    def __init__(self, space: Namespace, port: int, to: Path) -> None:
        self._to = to
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = ThreadPoolExecutor(64, "tls front")
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(space.path,)) as inside:
            self._listener = inside.submit(socket.create_server, ("127.0.0.1", port)).result()
        self._threads.submit(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._cut()
        self._threads.shutdown()

    def show(self, pair: Pair, client_ca: Path | None = None) -> None:
        """Cut every connection; from now on show this, and demand clients' certificates of that CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*pair)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        with self._lock:
            self._context = context
            self._cut()

    def _cut(self) -> None:
        for connection in self._open:
            with contextlib.suppress(OSError):
                # Below TLS, whose own state belongs to the connection's thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._threads.submit(self._serve, self._listener.accept()[0])

    def _serve(self, raw: socket.socket) -> None:
        assert self._context is not None
        with raw, socket.socket(socket.AF_UNIX) as inner, contextlib.suppress(OSError):
            raw.settimeout(10)
            with self._lock:
                # Known before it shakes hands: what `show` does not cut has seen what it shows.
                outer = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
                self._open |= {outer, inner}
            try:
                with outer:
                    _shake_hands(outer)
                    outer.settimeout(None)
                    inner.connect(str(self._to))
                    _join(outer, inner)
            finally:
                with self._lock:
                    self._open -= {outer, inner}


def _shake_hands(tls: ssl.SSLSocket) -> None:
    try:
        tls.do_handshake()
    except OSError:
        # With something unread, closing would be a reset, which overtakes the alert.
        socket.socket.shutdown(tls, socket.SHUT_WR)
        while socket.socket.recv(tls, 4096):
            pass
        raise


def _join(outer: ssl.SSLSocket, inner: socket.socket) -> None:
    """Hand on, both ways, until one side ends; one thread, as OpenSSL wants it."""
    while True:
        ready, _, _ = select.select([outer, inner], [], [])
        for source in ready:
            sink = inner if source is outer else outer
            part = source.recv(65536)
            while source is outer and outer.pending():
                part += outer.recv(65536)
            if not part:
                return
            sink.sendall(part)
