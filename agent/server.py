"""HTTP on uvicorn inside the agent's own loop, and the agent's own pages.

What uvicorn leaves open is bounded here: the time to receive a request and to take its answer, the
TLS handshake, the number of connections, and the time that a shutdown may take. When all places are
taken, somebody who only waits loses his: silence must not keep out who has something to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h11
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from agent.config import Listen
from agent.errors import ConfigError, cannot_start

_TICK: Final = 5.0
"""Seconds that the Date of an answer may be behind."""
_BACKLOG: Final = 4096
"""A burst of connections must not fill the kernel's queue: who comes then is heard a second later."""
_COMPLAIN_EVERY: Final = 10.0
"""Seconds between two lines of the log about certificates of clients: anybody can show a bad one."""
_BREATH: Final = 0.5
"""Seconds until the next try when there is no descriptor or no memory for a connection."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one listener grants its clients; times in seconds, sizes in bytes.

    ``request``: from the first byte (or the connection) to the last byte of a request.
    ``response``: from there to the last byte of the answer taken by the client. ``shutdown``: for
    requests under way when the server stops. ``connections``: at once, those in their TLS handshake
    included; one more takes the place of one that waits, the oldest of whichever host has most of them.
    """

    request: float = 10.0
    response: float = 60.0
    idle: int = 5
    handshake: float = 5.0
    headers: int = 16 << 10
    connections: int = 64
    shutdown: int = 2


def bind(listen: Listen, key: str) -> socket.socket:
    """Return a listening TCP socket; ``key`` names it in errors.

    Raises what ``cannot_start`` makes of the system's refusal.
    """
    host = "127.0.0.1" if listen.host == "localhost" else listen.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; asyncio sets it only where a socket's protocol number says TCP,
        # and without it an answer in two writes waits 40 ms for the client's delayed acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((host, listen.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise cannot_start(
            error,
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
        self._complained_at = -_COMPLAIN_EVERY
        self._guests: dict[_BoundedProtocol, asyncio.Task[None]] = {}
        """All connections, in the order of their arrival, with the tasks of their handshakes."""

    def stop(self) -> None:
        self.should_exit = True
        self._stopped.set()

    def abort(self) -> None:
        for guest in list(self._guests):
            self._turn_away(guest)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        self._accepting = asyncio.create_task(self._accept(), name="http: accept")
        self.started = True

    async def main_loop(self) -> None:
        stopped = asyncio.create_task(self._stopped.wait())
        while not await self.on_tick(0):
            await asyncio.wait({stopped, self._accepting}, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
            if self._accepting.done():
                self._accepting.result()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accepting.cancel()
        await asyncio.wait({self._accepting})
        self._sock.close()
        for guest in list(self._guests):
            if guest.shaking_hands:
                self._turn_away(guest)
        await super().shutdown(sockets)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._sock)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    _log.error("no connection can be taken", error=os.strerror(error.errno or 0))
                    self._make_room()
                    await asyncio.sleep(_BREATH)
                continue
            if len(self._guests) < self._limits.connections or self._make_room():
                self._admit(sock, address[0] if isinstance(address, tuple) else "")
            else:
                sock.close()
            # With more of them waiting, sock_accept returns at once: the others get their turn here.
            await asyncio.sleep(0)

    def _admit(self, sock: socket.socket, host: str) -> None:
        guest: _BoundedProtocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment]
            config=self.config,
            server_state=self.server_state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        guest.host = host
        guest.gone = lambda: self._guests.pop(guest, None)

        def shaken(_: asyncio.Task[None]) -> None:
            if guest.shaking_hands:  # to no end
                guest.gone()
                sock.close()

        task = asyncio.create_task(self._shake_hands(guest, sock))
        task.add_done_callback(shaken)
        self._guests[guest] = task

    async def _shake_hands(self, guest: _BoundedProtocol, sock: socket.socket) -> None:
        patience = self._limits.handshake if self._tls else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: guest,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=patience,
                ssl_shutdown_timeout=patience,
            )
        except OSError as error:
            # What goes wrong here is the client's affair: it went, is too slow, or does not speak TLS.
            if isinstance(error, ssl.SSLError) and "CERTIFICATE" in (error.reason or ""):
                self._complain(error, str(guest.host))

    def _complain(self, error: ssl.SSLError, host: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._complained_at >= _COMPLAIN_EVERY:
            self._complained_at = now
            problem = getattr(error, "verify_message", None) or "it shows none"
            _log.warning("a client's certificate was refused", client=host, error=problem)

    def _make_room(self) -> bool:
        """Turn away one who does not need his place now; False if all of them do."""
        idle = [guest for guest in self._guests if guest.waits]
        idle = idle or [guest for guest in self._guests if guest.does_not_read]
        if not idle:
            return False
        # Who comes from elsewhere does not lose his place to a crowd from one host.
        ((crowd, _),) = Counter(guest.origin for guest in idle).most_common(1)
        self._turn_away(next(guest for guest in idle if guest.origin == crowd))
        return True

    def _turn_away(self, guest: _BoundedProtocol) -> None:
        task = self._guests.pop(guest)
        if guest.shaking_hands:
            task.cancel()
        else:
            guest.transport.abort()


def _nothing() -> None:
    pass


def _protocol(limits: Limits) -> type[H11Protocol]:
    """A class of its own for each listener, since uvicorn makes the instances."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"limits": limits})


class _BoundedProtocol(H11Protocol):
    """uvicorn's protocol with an end to everything that a client can draw out."""

    limits = Limits()

    host = ""
    """The client's address; "" on a unix socket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gone: Callable[[], object] = _nothing
        self.shaking_hands = True
        self._deadline: asyncio.TimerHandle | None = None
        self._receiving = False

    @property
    def origin(self) -> bytes | str:
        """What a client has one of for sure: an IPv4 address, an IPv6 network."""
        host = self.host.partition("%")[0]
        return socket.inet_pton(socket.AF_INET6, host)[:8] if ":" in host else host

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn, and nothing of his is under way."""
        cycle: RequestResponseCycle | None = self.cycle
        return self._receiving or cycle is None or cycle.response_complete

    @property
    def does_not_read(self) -> bool:
        """Whether an answer is stuck because the client does not take it."""
        flow: FlowControl | None = self.flow
        return flow is not None and flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.shaking_hands = False
        super().connection_made(transport)
        self._arm(self.limits.request, receiving=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.gone()
        super().connection_lost(exc)
        # After a reset uvicorn leaves its timer, which would keep all of this for seconds; and a cycle
        # would wait for the garbage collector. With TLS each has buffers of 256 KiB.
        self._unset_keepalive_if_required()
        self.gone = _nothing

    def data_received(self, data: bytes) -> None:
        if self.waits and not self._receiving:
            self._arm(self.limits.request, receiving=True)
        super().data_received(data)
        self._follow()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, if there is room for an answer.

        uvicorn answers always: also where the request's own answer is under way or over, and then each
        such request is an exception with its traceback in the log.
        """
        cycle: RequestResponseCycle | None = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way:
            self.cycle.disconnected = True  # the application has nobody to answer any more
            self.cycle.message_event.set()
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            super().send_400_response(msg)
        elif under_way:
            self.transport.abort()
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        self._disarm()
        super().on_response_complete()
        self._follow()

    def _follow(self) -> None:
        """Bound what the client does next: send the rest of a request, or take its answer."""
        state = self.conn.their_state
        whole = state not in {h11.IDLE, h11.SEND_BODY, h11.ERROR}
        if whole and not self.cycle.response_complete:
            if self._deadline is None or self._receiving:
                self._arm(self.limits.response, receiving=False)
        elif not self.transport.is_closing() and (state is h11.SEND_BODY or self.conn.trailing_data[0]):
            if self._deadline is None:
                self._arm(self.limits.request, receiving=True)
        elif self._unsent():
            # The application is done, the client has not taken all of it: closing waits for him, too.
            if self._deadline is None or self._receiving:
                self._arm(self.limits.response, receiving=False)
        else:
            self._disarm()

    def _unsent(self) -> int:
        """Bytes that the client has not taken."""
        try:
            return self.transport.get_write_buffer_size()
        except AttributeError:  # asyncio's, of a TLS connection that has just been lost
            return 0

    def _arm(self, seconds: float, *, receiving: bool) -> None:
        self._disarm()
        self._receiving = receiving
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        self._receiving = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
