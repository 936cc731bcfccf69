"""HTTP on uvicorn inside the agent's own loop, and the agent's own pages.

What uvicorn leaves open is bounded here: the time to receive a request and to take its answer, the
TLS handshake, the number of connections, and the time that a shutdown may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from agent.config import Listen
from agent.errors import ConfigError

_TICK: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one listener grants its clients; times in seconds, sizes in bytes.

    ``request``: from the first byte (or the connection) to the last byte of a request.
    ``response``: from there to the last byte of the answer taken by the client. ``shutdown``: for
    requests under way when the server stops.
    """

    request: float = 10.0
    response: float = 60.0
    idle: int = 5
    handshake: float = 5.0
    headers: int = 16 << 10
    connections: int = 64
    shutdown: int = 2


def bind(listen: Listen, key: str) -> socket.socket:
    """Return a listening TCP socket; ``key`` names it in errors. Raises ConfigError if it can't be."""
    host = "127.0.0.1" if listen.host == "localhost" else listen.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; asyncio sets it only where a socket's protocol number says TCP,
        # and without it an answer in two writes waits 40 ms for the client's delayed acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((host, listen.port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{key}: can't listen on {listen}: {error.strerror}",
            "is another program on that port, or the address not this host's?",
        ) from None
    sock.setblocking(False)
    return sock


def tls_context(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Return a server's TLS settings; with ``client_ca`` clients must show a certificate of it.

    Raises ConfigError if a file can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    used = f"{cert} and {key}"
    try:
        # The password is empty so that an encrypted key is an error and no prompt.
        context.load_cert_chain(cert, key, password="")
        if client_ca is not None:
            used = str(client_ca)
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or "not PEM"
        raise ConfigError(
            f"TLS can't use {used}: {reason}",
            "give a certificate chain and its unencrypted key in PEM",
        ) from None
    return context


def own_app(
    render_metrics: Callable[[], Awaitable[bytes]],
    metrics_type: str,
    healthy: Callable[[], bool],
    ready: Callable[[], tuple[bool, str]],
) -> ASGIApp:
    """Return the app with /metrics, /healthz and /readyz.

    ``healthy`` says whether the loop ticks, ``ready`` whether the agent does all of its work and,
    if not, why.
    """

    async def metrics(request: Request) -> Response:
        return Response(await render_metrics(), headers={"Content-Type": metrics_type})

    async def healthz(request: Request) -> Response:
        alive = healthy()
        return PlainTextResponse("ok\n" if alive else "stalled\n", 200 if alive else 503)

    async def readyz(request: Request) -> Response:
        is_ready, reason = ready()
        return PlainTextResponse("ok\n" if is_ready else f"{reason}\n", 200 if is_ready else 503)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    )


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    *,
    tls: ssl.SSLContext | None = None,
    limits: Limits = Limits(),
) -> None:
    """Serve the app on a listening socket until cancelled; the socket is closed then.

    On cancellation no new connection is taken, and requests under way have ``limits.shutdown``.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.idle,
        timeout_graceful_shutdown=limits.shutdown,
        h11_max_incomplete_event_size=limits.headers,
    )
    server = _Server(config, sock, tls, limits)
    running = asyncio.create_task(server.serve(), name="http")
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        server.stop()
        await asyncio.wait({running}, timeout=limits.shutdown + 2)
        running.cancel()
        server.abort()
        raise


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, its poll of 10 Hz and its way of listening."""

    def __init__(
        self,
        config: uvicorn.Config,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        limits: Limits,
    ) -> None:
        super().__init__(config)
        self._sock = sock
        self._tls = tls
        self._limits = limits
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopped.set()

    def abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config,
                server_state=self.server_state,
                app_state={},
                _loop=loop,
            )
            return made

        listening = await loop.create_server(
            protocol,
            sock=self._sock,
            ssl=self._tls,
            ssl_handshake_timeout=self._limits.handshake if self._tls else None,
            ssl_shutdown_timeout=self._limits.handshake if self._tls else None,
        )
        self.servers = [listening]
        self.started = True

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), _TICK)


def _protocol(limits: Limits) -> type[H11Protocol]:
    """A class of its own for each listener, since uvicorn makes the instances."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits})


class _BoundedProtocol(H11Protocol):
    """uvicorn's protocol with an end to everything that a client can draw out."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._receiving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limits.connections:
            transport.abort()
            return
        super().connection_made(transport)
        self._arm(self.limits.request, receiving=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self in self.connections:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self not in self.connections:  # turned away, and closing
            return
        if self._deadline is None:
            self._arm(self.limits.request, receiving=True)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        self._disarm()
        super().on_response_complete()
        if not self.transport.is_closing():
            self._follow()

    def _follow(self) -> None:
        """Bound what the client does next: send the rest of a request, or take its answer."""
        state = self.conn.their_state
        whole = state not in {h11.IDLE, h11.SEND_BODY, h11.ERROR}
        if whole and not self.cycle.response_complete:
            if self._deadline is None or self._receiving:
                self._arm(self.limits.response, receiving=False)
        elif state is h11.SEND_BODY or self.conn.trailing_data[0]:
            if self._deadline is None:
                self._arm(self.limits.request, receiving=True)
        else:
            self._disarm()

    def _arm(self, seconds: float, *, receiving: bool) -> None:
        self._disarm()
        self._receiving = receiving
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        self._receiving = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
