"""The core's HTTP application and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from agent.errors import ConfigError
from agent.sandbox import admin_api, client_api, gateway_api
from agent.sandbox.config import split_address
from agent.sandbox.core import Core
from agent.sandbox.http import EXCEPTION_HANDLERS

_SHUTDOWN: Final = 2
UNACKNOWLEDGED: Final = 15.0
"""Seconds after which a connection is given up whose other end acknowledges nothing that was sent."""


def application(core: Core) -> Starlette:
    """Return the application with all three APIs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with core.running():
            yield

    return Starlette(
        routes=[
            Mount("/gateway/v1", routes=gateway_api.routes(core)),
            Mount("/client/v1", routes=client_api.routes(core)),
            Mount("/admin/v1", routes=admin_api.routes(core)),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


class _Server(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.ending = asyncio.Event()

    async def main_loop(self) -> None:
        """Tick as uvicorn's own loop does, and end without waiting for the next tick."""
        for tick in itertools.count():
            if self.ending.is_set() or await self.on_tick(tick):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self.ending.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the loop."""
        yield


class _File:
    """A unix socket's name in the file system, which does not go with the socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = path.stat().st_ino

    def remove(self) -> None:
        """Remove it, unless another core has its own there by now."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


class Running:
    """A core that serves. ``addresses`` are its listeners, ports filled in."""

    def __init__(self, core: Core) -> None:
        """Bind the core's listeners. Raises ConfigError if one can't be bound."""
        self.core = core
        self._sockets = [_bind(address) for address in core.config.listen]
        self.addresses = [_name(sock) for sock in self._sockets]
        unix = [sock for sock in self._sockets if sock.family == socket.AF_UNIX]
        self._files = [_File(Path(sock.getsockname())) for sock in unix]
        self._server = _Server(
            uvicorn.Config(
                application(core),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=_SHUTDOWN,
                ssl_certfile=core.config.tls_cert_file,
                ssl_keyfile=core.config.tls_key_file,
            )
        )

    async def serve(self) -> None:
        """Serve until ``stop`` or ``kill``."""
        try:
            await self._server.serve(sockets=self._sockets)
        finally:
            for sock in self._sockets:
                sock.close()
            for file in self._files:
                file.remove()

    async def started(self) -> None:
        """Return once connections are accepted."""
        while not self._server.started:
            if self._server.should_exit:
                raise ConfigError("the core did not start", "see its log")
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        """Shut down: streams end, requests in flight finish."""
        self.core.stop()
        self._server.should_exit = True
        self._server.ending.set()

    def kill(self) -> None:
        """Shut down with every connection cut in the middle, as a crash would; sockets' names stay."""
        self._files.clear()
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        self.stop()


async def serve(core: Core) -> None:
    """Serve until SIGTERM or SIGINT."""
    running = Running(core)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    task = asyncio.create_task(running.serve())
    await running.started()
    for address in running.addresses:
        print(f"core listens on {address}", flush=True)
    await task


def _bind(address: str) -> socket.socket:
    unix = address.startswith("unix:")
    sock = (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) if unix else _tcp_socket(split_address(address)[0])
    )
    try:
        if unix:
            _bind_unix(sock, Path(address.removeprefix("unix:")))
        else:
            sock.bind(split_address(address))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ConfigError(f"the core can't listen on {address}", str(error)) from None
    return sock


def _tcp_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets that say that they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections have it too. A gateway whose host is dead says nothing, not even goodbye: its
    # stream ends once a heartbeat is unacknowledged for so long, and nobody waits for it any more.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED * 1000))
    return sock


def _bind_unix(sock: socket.socket, path: Path) -> None:
    """Bind to a path, in the place of a socket that an earlier core left; its owner's alone."""
    if path.is_socket():
        path.unlink()
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{host}:{name[1]}"
