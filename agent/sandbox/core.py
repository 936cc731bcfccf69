"""The core itself: its parts, and what it does without being asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.errors import ConfigError
from agent.sandbox.config import Config, check, secret
from agent.sandbox.directory import Device, Directory, Location
from agent.sandbox.errors import Refusal
from agent.sandbox.gateways import Gateways
from agent.sandbox.http import token_digest
from agent.sandbox.liveness import Witness
from agent.sandbox.mfa import Authenticator, Mailer
from agent.sandbox.push import Pusher
from agent.sandbox.reports import Reports
from agent.sandbox.sessions import Session, Sessions
from agent.sandbox.store import Store

SWEEP_INTERVAL: Final = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownGateway:
    """A gateway as configured, without its token. ``location`` is a location's name."""

    name: str
    location: str
    enabled: bool


class Core:
    """One core. ``clock`` gives Unix seconds; tests give one they can set.

    Attributes that its APIs, and tests in the same process, use: ``config``, ``clock``, ``store``,
    ``directory``, ``sessions``, ``mfa``, ``reports``, ``gateways``.
    """

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        """Open the database. Raises ConfigError for a secret that can't be read."""
        check(config)
        self.config = config
        self.clock = clock
        self.stopping = False
        token = secret(config.admin.token, config.admin.token_file, "admin.token")
        self.admin_digest = None if token is None else token_digest(token)
        self._tokens: dict[bytes, KnownGateway] = {}
        for gateway in config.gateways:
            value = secret(gateway.token, gateway.token_file, f"token of gateway {gateway.name}")
            digest = token_digest(value or "")
            if digest in self._tokens or digest == self.admin_digest:
                raise ConfigError(f"gateway {gateway.name} shares its token", "give every gateway its own")
            self._tokens[digest] = KnownGateway(gateway.name, gateway.location, gateway.enabled)
        mailer = Mailer(config.smtp)
        self.store = Store(Path(config.database), changelog=config.changelog)
        self.directory = Directory(self.store, config.sessions, _shared(self._tokens.values()))
        self.directory.announce_liveness()
        self.sessions = Sessions(self.store, config.sessions.lifetime)
        self.mfa = Authenticator(self.store, self.directory, config.mfa, mailer.send_code)
        self.reports = Reports(self.store, self.sessions)
        self.gateways = Gateways(started=clock())

    def gateway_of(self, digest: bytes) -> KnownGateway:
        """Return the gateway whose token has this digest. Raises Refusal (401, 403)."""
        gateway = self._tokens.get(digest)
        if gateway is None:
            raise Refusal(401, "unauthorized", "This token is no gateway's; check core.token.")
        if not gateway.enabled:
            raise Refusal(403, "gateway_disabled", f"The gateway {gateway.name!r} is disabled.")
        return gateway

    async def grant(self, device: Device, location: Location, method: str, *, lifetime: float = 0) -> Session:
        """Grant a session and return it once gateways have it in the kernel.

        Raises Refusal, having revoked the session, if they refuse it or stay silent.
        """
        grant = self.sessions.grant(device, location, method, self.clock(), lifetime=lifetime)
        try:
            await self.gateways.wait_applied(
                location.id,
                device.public_key,
                grant.epoch,
                grant.revision,
                clock=self.clock,
                timeout=self.config.applied_timeout,
            )
        except BaseException:
            self.sessions.end(grant.session.id, "revoked", self.clock())
            raise
        session = self.sessions.get(grant.session.id)
        if session.ended_at is not None or session.preshared_key is None:
            raise Refusal(409, "session_ended", "The session was ended meanwhile; start again.")
        return session

    def sweep(self, now: float) -> list[tuple[str, str]]:
        """End sessions that are over at ``now``; return their ids and reasons."""
        ended = self.sessions.sweep(
            self.directory.locations(),
            lambda location: self._witnesses(location, now),
            now,
        )
        self.mfa.forget(now)
        for session_id, reason in ended:
            _log.info("session %s ended: %s", session_id, reason)
        return ended

    def _witnesses(self, location: Location, now: float) -> list[Witness]:
        serving = [g.name for g in self._tokens.values() if g.enabled and g.location == location.name]
        return self.gateways.witnesses(serving, location.id, now)

    def gateway_list(self) -> list[dict[str, Any]]:
        """Return what is known of each configured gateway, as JSON values."""
        applied = self.reports.list_applied()
        now = self.clock()
        found: list[dict[str, Any]] = []
        for gateway in self._tokens.values():
            held = self.gateways.present.get(gateway.name)
            agent = self.reports.agents.get(gateway.name)
            found.append(
                {
                    "name": gateway.name,
                    "location": gateway.location,
                    "enabled": gateway.enabled,
                    "connected": held is not None
                    and gateway.name in self.gateways.connected(held.location_id, now),
                    "streams": 0 if held is None else held.streams,
                    "applied": applied.get(gateway.name),
                    "agent": None if agent is None else {"version": agent.version},
                }
            )
        return found

    def stop(self) -> None:
        """End the open change streams, so that a server can shut down."""
        self.stopping = True
        self.store.wake()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what is due while inside: end sessions, push changes. Closes the database after."""
        tasks = [asyncio.create_task(self._sweep_forever())]
        tasks += [
            asyncio.create_task(Pusher(gateway, self.store, self.directory, self.gateways, self.clock).run())
            for gateway in self.config.gateways
            if gateway.push_url is not None
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            self.store.close()

    async def _sweep_forever(self) -> None:
        while True:
            try:
                self.sweep(self.clock())
            except Exception:  # noqa: BLE001
                # A full disk must not stop the core from ending sessions once there is room.
                _log.exception("ending sessions failed; trying again")
            await asyncio.sleep(SWEEP_INTERVAL)


def _shared(gateways: Iterable[KnownGateway]) -> frozenset[str]:
    """Return the names of the locations that more than one gateway serves."""
    counted = Counter(gateway.location for gateway in gateways if gateway.enabled)
    return frozenset(name for name, count in counted.items() if count > 1)
