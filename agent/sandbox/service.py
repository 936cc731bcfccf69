"""A core in the running event loop, for tests and programs that want a real one at hand."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from agent.sandbox import config
from agent.sandbox.admin import AdminClient
from agent.sandbox.app import Running
from agent.sandbox.core import Core


def make_config(
    folder: Path,
    *,
    location: str = "hq",
    smtp_port: int = 25,
    listen: str = "127.0.0.1:0",
    **members: object,
) -> config.Config:
    """Return a configuration with fresh tokens: one gateway ``gw1`` of ``location``.

    ``members`` are further keys of ``config.Config``, sections as dicts or Structs.
    """
    wanted: dict[str, object] = {
        "database": str(folder / "core" / "core.db"),
        "listen": [listen],
        "admin": {"token": secrets.token_urlsafe(24)},
        "smtp": {"port": smtp_port, "from": "vpn@example.com"},
        "gateways": [{"name": "gw1", "location": location, "token": secrets.token_urlsafe(24)}],
        **members,
    }
    return msgspec.convert(msgspec.to_builtins(wanted), config.Config)


class CoreService:
    """A core on a real socket that can be stopped, killed and started again.

    It keeps its address, its database and its tokens over restarts. ``core`` is the running
    ``Core``, to be used directly from the same event loop; ``admin`` is a client of its admin API.
    """

    def __init__(
        self,
        settings: config.Config,
        *,
        clock: Callable[[], float] = time.time,
        ca_file: str | None = None,
    ) -> None:
        """``clock`` gives Unix seconds; the core has no other. ``ca_file``: for ``admin`` over TLS."""
        self.config = settings
        self._ca_file = ca_file
        self._clock = clock
        self._core: Core | None = None
        self._running: Running | None = None
        self._task: asyncio.Task[None] | None = None
        self._admin: AdminClient | None = None

    @property
    def core(self) -> Core:
        """The running core."""
        if self._core is None:
            raise RuntimeError("the core is not running")
        return self._core

    @property
    def admin(self) -> AdminClient:
        """A client of the admin API."""
        if self._admin is None:
            raise RuntimeError("the core has not been started")
        return self._admin

    @property
    def url(self) -> str:
        """The core without a path: ``http://127.0.0.1:PORT`` or ``http+unix:///PATH:``."""
        address = self.config.listen[0]
        if address.startswith("unix:"):
            return f"http+unix://{address.removeprefix('unix:')}:"
        scheme = "http" if self.config.tls_cert_file is None else "https"
        return f"{scheme}://{address}"

    @property
    def gateway_url(self) -> str:
        """What an agent's ``core.url`` is set to."""
        return self.url + "/gateway/v1/"

    @property
    def gateway_token(self) -> str:
        """The first gateway's token, given in the configuration itself."""
        return self.config.gateways[0].token or ""

    async def start(self) -> None:
        """Start; returns once connections are accepted."""
        self._core = Core(self.config, self._clock)
        self._running = Running(self._core)
        # The chosen ports stay over a restart.
        self.config = msgspec.structs.replace(self.config, listen=self._running.addresses)
        self._task = asyncio.create_task(self._running.serve())
        await self._running.started()
        if self._admin is None:
            token = self.config.admin.token or ""
            self._admin = AdminClient(self.url, token, ca_file=self._ca_file)

    async def stop(self) -> None:
        """Shut down as on SIGTERM."""
        await self._end(kill=False)

    async def kill(self) -> None:
        """Cut every connection and stop, as a crash would."""
        await self._end(kill=True)

    async def _end(self, *, kill: bool) -> None:
        if self._running is None or self._task is None:
            return
        if kill:
            self._running.kill()
        else:
            self._running.stop()
        await self._task
        self._core = self._running = self._task = None

    async def close(self) -> None:
        """Stop and release everything."""
        await self.stop()
        if self._admin is not None:
            await self._admin.close()
            self._admin = None


@asynccontextmanager
async def running_core(
    folder: Path,
    *,
    clock: Callable[[], float] = time.time,
    location: str = "hq",
    **members: object,
) -> AsyncIterator[CoreService]:
    """Run a core with its database below ``folder``; arguments as for ``make_config``.

    No location exists yet: create it with ``service.admin.add_location`` or
    ``service.core.directory.add_location``.
    """
    service = CoreService(make_config(folder, location=location, **members), clock=clock)  # type: ignore[arg-type]
    await service.start()
    try:
        yield service
    finally:
        await service.close()
