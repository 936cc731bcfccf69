"""A Defguard core as the daemon runs it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import grpc
import structlog

from agent import clock
from agent.config import Config
from agent.core.backoff import Backoff
from agent.core.defguard import certificates
from agent.core.defguard.adoption import OPTIONS as ADOPTION_OPTIONS
from agent.core.defguard.adoption import Adoption
from agent.core.defguard.certificates import Certificates
from agent.core.defguard.client import DefguardClient
from agent.core.defguard.feed import Feed, Terms
from agent.core.defguard.gateway import SERVER_OPTIONS, GatewayService
from agent.core.defguard.sync import DefguardSync
from agent.errors import CoreUnavailable
from agent.expiry import token_claims
from agent.keys import Secrets
from agent.model import Now, SessionPolicy
from agent.ports import AccessRules, Inbox, Reports

_SUBJECT: Final = re.compile(r"DEFGUARD-NETWORK-(\d{1,18})", re.ASCII)
UNNAMED: Final = "defguard"
QUIET_1: Final = 600.0
"""Seconds without an update after which the whole is asked for again: core's queue of updates may have
overflowed, and then it is silent for good (it says so in its log only)."""
QUIET_2: Final = 6 * 3600.0
"""The same of the second generation, where it costs the connection, and core may send an e-mail for that."""
_EXPIRY_WARNING: Final = 30 * 86_400.0
_CALLS: Final = 16
_LAST_ANSWERS: Final = 1.0
"""Seconds that answers under way have when a server ends."""
_log = structlog.get_logger()


class CalledCore:
    """A core of the first generation, which the agent calls."""

    poll_interval = 0.0

    def __init__(
        self,
        config: Config,
        secrets: Secrets,
        inbox: Inbox,
        reports: Reports,
        acl: AccessRules,
        read_clock: Callable[[], Now] = clock.read,
    ) -> None:
        """Raises ConfigError if the URL or the CA's file can't be used."""
        token = secrets.token.get_secret_value()
        terms = _terms(config, location_of(token))
        client = DefguardClient(
            config.core.url,
            token,
            ca_file=config.core.ca_file,
            max_body=config.core.max_body,
            timeout=config.core.timeout,
            hostname=config.defguard.hostname,
        )
        self._sync = DefguardSync(
            client,
            inbox,
            reports,
            lambda: Feed(terms, inbox, reports, acl, read_clock),
            quiet=_quiet(config, QUIET_1),
        )

    async def run(self) -> NoReturn:
        """As ``Core.run``."""
        await self._sync.run()

    async def close(self) -> None:
        """As ``Core.close``: a connection ends with ``run``."""


class CallingCore:
    """A core of the second generation, which calls the agent: adopted or waiting for it."""

    poll_interval = 0.0

    def __init__(
        self,
        config: Config,
        inbox: Inbox,
        reports: Reports,
        acl: AccessRules,
        read_clock: Callable[[], Now] = clock.read,
        note_expiries: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> None:
        """Raises ConfigError if the certificates can't be used.

        ``note_expiries`` is told when each of them expires, in Unix seconds, whenever there are others.
        """
        self._note_expiries = note_expiries
        self._clock = read_clock
        self._config = config
        self._inbox = inbox
        self._reports = reports
        self._acl = acl
        self._folder = config.cert_dir
        self._certificates = certificates.load(self._folder) or certificates.take_over(self._folder)

    async def run(self) -> NoReturn:
        """As ``Core.run``."""
        while True:
            if self._certificates is None:
                self._certificates = await self._wait_for_adoption()
            await self._serve(self._certificates)
            self._certificates = None

    async def close(self) -> None:
        """As ``Core.close``: servers end with ``run``."""

    async def _wait_for_adoption(self) -> Certificates:
        self._inbox.core_failed(CoreUnavailable("no core has adopted this gateway", "add it in Defguard"))
        adoption = Adoption(self._folder, self._config.defguard.adoption_timeout, self._clock)
        if any((self._folder / name).exists() for name in certificates.FILES):
            _log.error(
                "the certificates are no whole set: whoever comes first adopts this gateway",
                folder=str(self._folder),
            )
        async with self._server(adoption.handlers(), None, ADOPTION_OPTIONS):
            _log.info(
                "waiting to be adopted",
                address=str(self._config.defguard.listen),
                seconds=self._config.defguard.adoption_timeout,
            )
            return await adoption.adopted

    async def _serve(self, held: Certificates) -> None:
        """Serve core until it deletes this gateway."""
        self._note_expiries(held.expiries)
        left = held.expires_at - self._clock().wall
        if left < _EXPIRY_WARNING:
            _log.warning("the certificates expire soon", days=round(left / 86_400, 1))
        config = self._config
        terms = _terms(config, f"core-{held.authority}")

        def new_feed() -> Feed:
            return Feed(terms, self._inbox, self._reports, self._acl, self._clock)

        async def purge() -> None:
            """Core has deleted the gateway: peers and interface, access rules and certificates go."""
            await new_feed().nobody()
            await asyncio.to_thread(certificates.remove, self._folder)
            self._note_expiries({})

        service = GatewayService(
            held, self._inbox, self._reports, new_feed, purge, quiet=_quiet(config, QUIET_2)
        )
        credentials = grpc.ssl_server_credentials(
            [(held.key, held.certificate)], root_certificates=held.ca, require_client_auth=True
        )
        size = (("grpc.max_receive_message_length", config.core.max_body),)
        async with self._server(service.handlers(), credentials, size):
            await service.until_purged()

    @asynccontextmanager
    async def _server(
        self,
        handlers: grpc.GenericRpcHandler,
        credentials: grpc.ServerCredentials | None,
        more: tuple[tuple[str, int], ...],
    ) -> AsyncIterator[None]:
        """A server of these in the block; what it has answered by its end is let through."""
        options = (*SERVER_OPTIONS, *more)
        backoff = Backoff()
        listen = str(self._config.defguard.listen)
        while True:
            server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_CALLS)
            server.add_generic_rpc_handlers((handlers,))
            try:
                if credentials is None:
                    server.add_insecure_port(listen)
                else:
                    server.add_secure_port(listen, credentials)
                break
            except RuntimeError:
                await server.stop(None)
                delay = backoff.next() + 1.0
                _log.error(
                    "defguard.listen can't be had",
                    address=listen,
                    hint="see who has it: ss -ltnp; Defguard's own gateway must not run beside",
                    retry_in=round(delay, 1),
                )
                await asyncio.sleep(delay)
        await server.start()
        try:
            yield
        finally:
            # It would swallow being cancelled just then.
            await asyncio.shield(asyncio.ensure_future(server.stop(_LAST_ANSWERS)))


def open_core(
    config: Config,
    secrets: Secrets,
    inbox: Inbox,
    reports: Reports,
    acl: AccessRules,
    note_expiries: Callable[[Mapping[str, float]], None],
) -> CalledCore | CallingCore:
    """Return the core of the configured generation; raises ConfigError."""
    if config.core.calls:
        return CallingCore(config, inbox, reports, acl, note_expiries=note_expiries)
    return CalledCore(config, secrets, inbox, reports, acl)


def _quiet(config: Config, usual: float) -> float:
    asked_for = config.defguard.resync_interval
    return usual if asked_for is None else asked_for


def _terms(config: Config, location: str) -> Terms:
    return Terms(location, config.defguard.mfa_required, SessionPolicy(liveness=config.defguard.liveness))


def location_of(token: str) -> str:
    """Return the id of the location that core's token is for; ``UNNAMED`` if it does not say.

    The token is a JWT whose subject is DEFGUARD-NETWORK- and the location's number. Whether it is valid
    is for core to say.
    """
    subject = token_claims(token).get("sub")
    found = _SUBJECT.fullmatch(subject) if isinstance(subject, str) else None
    return UNNAMED if found is None else found[1]
