"""Core as the daemon runs it, of whatever kind."""

from __future__ import annotations

import asyncio
from typing import NoReturn, Protocol

from agent import clock
from agent.config import Config
from agent.core.endpoint import TlsFiles
from agent.core.http import CoreClient
from agent.core.reports import Reporter
from agent.core.sync import CoreSync
from agent.keys import Secrets
from agent.ports import Inbox, Reports


class Core(Protocol):
    """A core of any kind."""

    poll_interval: float
    """Seconds between two polls of a core that has to be polled; may be changed while it runs."""

    async def run(self) -> NoReturn:
        """Follow core and report to it until cancelled; no answer of core's ends it."""

    async def close(self) -> None:
        """Let go of what is open."""


class HttpCore:
    """A core that speaks the core API over HTTP."""

    def __init__(self, config: Config, secrets: Secrets, inbox: Inbox, reports: Reports) -> None:
        """Raises ConfigError if the URL, the token or a TLS file can't be used."""
        core = config.core
        self._client = CoreClient(
            core.url,
            secrets.token.get_secret_value(),
            clock=clock.read,
            heard=inbox.heard,
            tls=TlsFiles(core.ca_file, core.client_cert_file, core.client_key_file),
            max_body=core.max_body,
            timeout=core.timeout,
        )
        self._sync = CoreSync(self._client, inbox, poll_interval=core.poll_interval)
        self._reporter = Reporter(
            self._client, reports, started_at=clock.read().wall, accepted=self._sync.core_found
        )

    @property
    def poll_interval(self) -> float:
        """As ``Core.poll_interval``."""
        return self._sync.poll_interval

    @poll_interval.setter
    def poll_interval(self, seconds: float) -> None:
        self._sync.poll_interval = seconds

    async def run(self) -> NoReturn:
        """As ``Core.run``."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sync.run(), name="core: sync")
            tasks.create_task(self._reporter.run(), name="core: reports")
        raise AssertionError("both run until they are cancelled")

    async def close(self) -> None:
        """As ``Core.close``."""
        await self._client.close()
