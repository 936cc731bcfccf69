"""Wires the parts of the agent together and runs them until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog
from starlette.types import ASGIApp

from agent import __version__, clock, log, overview
from agent.aclfirewall import AclFirewall
from agent.allocator import collect_rarely, return_freed_memory
from agent.config import Config, reload_differences
from agent.configfile import load_config
from agent.control import bind_control, control_app
from agent.core.connection import Core, HttpCore
from agent.core.push import push_app
from agent.curve25519 import public_key
from agent.desk import Desk
from agent.encoding import format_key, network_of
from agent.errors import AgentError, ConfigError, GuardError
from agent.expiry import token_expiry
from agent.firewall import Firewall
from agent.folders import claim_state, private_folder
from agent.hardening import forbid_core_dumps
from agent.health import Health
from agent.hooks import Hooks
from agent.journal import Journal
from agent.keys import (
    Secrets,
    certificate_expiries,
    check_private_key_storable,
    load_private_key,
    load_secrets,
    store_private_key,
)
from agent.lock import InterfaceLock
from agent.metrics import CONTENT_TYPE, Metrics
from agent.model import Prefix
from agent.reconciler import Reconciler
from agent.server import bind, own_app, serve, tls_context
from agent.sessions import Limits
from agent.state import State
from agent.systemd import take_service_result
from agent.timers import Timers
from agent.warden import Warden
from agent.wireguard.link import WireGuardLink

_log = structlog.get_logger(__name__)

_GUARD_LOOKS: Final = 0.5
"""Seconds at least between two looks at the guard, however often it is changed."""
_RULES: Final = 5.0
"""Seconds that the start waits for nftables to take the access rules; deadlines can't wait longer."""
_STOP: Final = 5.0
"""Seconds that a step under way may take when the agent is told to stop."""
_END: Final = 25.0
"""Seconds after which an agent that was told to stop ends, whatever does not answer: a disk, the kernel,
a resolver in a thread that the interpreter would wait for. Before the unit's TimeoutStopSec."""


def run(config: Config, path: Path, interface: str | None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit code.

    ``path`` and ``interface`` are what SIGHUP loads the configuration from again. Raises ConfigError
    and LockHeld before anything is touched.
    """
    log.configure(config.log.level, config.log.format)
    forbid_core_dumps()
    return_freed_memory()
    collect_rarely()
    secrets = load_secrets(config)
    private_folder(config.paths.state, "paths.state")
    with InterfaceLock(config.paths.runtime, config.interface.name):
        claim_state(config.paths.state, config.interface.name)
        log.hide(secrets.token.get_secret_value())
        if secrets.push_secret is not None:
            log.hide(secrets.push_secret.get_secret_value())
        check_private_key_storable(config)
        private_key = load_private_key(config, create=True)
        log.hide(format_key(private_key))
        try:
            daemon = _Daemon(config, secrets, private_key, lambda: load_config(path, interface=interface))
            asyncio.run(daemon.run())
        except ConfigError:
            raise
        except AgentError as error:
            _log.critical("can't run", error=error.message, hint=error.hint)
            return 1
    return 0


def limits_of(config: Config) -> Limits:
    """The configuration's own ceilings on sessions."""
    sessions = config.sessions
    return Limits(sessions.max_lifetime, sessions.idle_timeout, sessions.connect_timeout)


class _Listener(NamedTuple):
    """A bound socket, and what is served on it."""

    app: ASGIApp
    sock: socket.socket
    tls: ssl.SSLContext | None = None


class _Daemon:
    def __init__(
        self, config: Config, secrets: Secrets, private_key: bytes, load: Callable[[], Config]
    ) -> None:
        self._config = config
        self._load = load
        self._secrets = secrets
        self._stop = asyncio.Event()
        own_key = public_key(private_key)
        self._state = State(limits_of(config), own_key)
        self._metrics = Metrics(
            config.interface.name,
            __version__,
            lambda: overview.peer_series(self._state),
            per_peer=config.metrics.per_peer,
        )
        self._warden = Warden(
            state=self._state,
            guard=Firewall(config.interface.name),
            read_clock=clock.read,
            required=config.firewall.required,
            lease=config.sessions.agent_lease,
        )
        self._reconciler = Reconciler(
            interface=config.interface.name,
            state=self._state,
            link=WireGuardLink(
                config.interface,
                private_key,
                (),
                Hooks(config.hooks, config.interface.name, self._command_ended),
                self._keep_key,
                lambda: self._acl.stands or not self._has_access_rules,
            ),
            journal=Journal(config.paths.state, clock.boot_id(), config.paths.runtime),
            metrics=self._metrics,
            core_lost_grace=config.sessions.core_lost_grace,
            alive=self._alive,
            warden=self._warden,
            service_result=take_service_result(config.paths.runtime),
        )
        self._health = Health(self._reconciler)
        self._desk = Desk(self._reconciler, self._metrics, self._warden)
        self._acl = AclFirewall(
            config.interface.name,
            self._vpn_networks,
            config.acl_file,
            enabled=self._has_access_rules,
            masquerade=config.firewall.masquerade,
            priority=config.firewall.priority,
        )
        self._certificates = certificate_expiries(config)
        self._metrics.set_certificates(self._certificates)
        expires_at = token_expiry(secrets.token.get_secret_value())
        if expires_at is not None:
            self._metrics.set_token_expiry("core.token", expires_at)
        self._core = self._open_core()
        self._timers = Timers(self._reconciler, config.stats.interval, self._ticked)

    def _command_ended(self) -> None:
        """The interface may be able to come up: at once, and not with the next tick."""
        self._reconciler.tick()

    @property
    def _has_access_rules(self) -> bool:
        """Whether core has access rules: without them nobody new is to be let in."""
        return self._config.firewall.acl and self._config.core.protocol == "defguard"

    def _open_core(self) -> Core:
        config, inbox, reports = self._config, self._reconciler.inbox, self._reconciler.reports
        if config.core.protocol == "http":
            return HttpCore(config, self._secrets, inbox, reports)
        try:
            # Only who has asked for it pays for gRPC.
            defguard: Any = importlib.import_module("agent.core.defguard.connection")
        except ImportError as error:
            raise ConfigError(
                f'core.protocol = "defguard" needs a package that is not installed: {error.name}',
                "the Debian package has it; from a checkout: pipx install '.[defguard]'",
            ) from None
        core: Core = defguard.open_core(
            config, self._secrets, inbox, reports, self._acl, self._note_certificates
        )
        return core

    def _note_certificates(self, expires_at: Mapping[str, float]) -> None:
        """Core has given this gateway certificates, or taken them away."""
        self._metrics.set_certificates({**self._certificates, **expires_at})

    def _vpn_networks(self) -> frozenset[Prefix] | None:
        """The networks of the interface's addresses, core's or else the configuration's; None: not known."""
        addresses = self._state.interface.addresses
        if addresses is None:
            addresses = self._config.interface.addresses
            if not addresses and self._state.epoch is None:
                return None
        return frozenset(map(network_of, addresses))

    def _keep_key(self, private_key: bytes) -> None:
        """Core has handed out the interface's key: it is the one secret that is kept on disk."""
        log.hide(format_key(private_key))
        store_private_key(self._config.private_key_file, private_key)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        listeners = self._listeners()
        try:
            if await self._start():
                await self._work(listeners)
        finally:
            for _, sock, _ in listeners:
                sock.close()
            self._config.control_socket.unlink(missing_ok=True)
            self._health.stopping()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP):
                    await self._core.close()
            await self._reconciler.stop(told=self._stop.is_set())
            self._acl.close()
            self._health.close()
            _log.info("stopped, tunnels stay up")

    async def _start(self) -> bool:
        """Bring the interface to what is known; False if told to stop before that was done."""
        starting = asyncio.create_task(self._bring_up(), name="start")
        stopping = asyncio.create_task(self._stop.wait(), name="told to stop")
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            # A step under way is let through to its end, if that does not take too long.
            await asyncio.wait({starting}, timeout=_STOP)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting}, timeout=_STOP)
            return False
        starting.result()
        return not self._stop.is_set()

    async def _bring_up(self) -> None:
        """Access rules before peers; without them a link that is down stays so, but sessions have to end."""
        try:
            async with asyncio.timeout(_RULES):
                await self._acl.start()
        except TimeoutError:
            _log.error(
                "nftables does not answer: access rules are not known to be in force",
                hint="see whether `nft list ruleset` does",
            )
        except GuardError as error:
            _log.error("access rules can't be put in force", error=error.message, hint=error.hint)
        await self._reconciler.start()

    def _told_to_stop(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            last = threading.Timer(_END, _end_now)
            last.daemon = True
            last.start()

    async def _work(self, listeners: Sequence[_Listener]) -> None:
        """Run everything until told to stop; a part that fails takes the agent down with it."""
        reconciling = asyncio.create_task(self._reconciler.run(), name="reconciler")
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [
                    tasks.create_task(self._timers.run(), name="timers"),
                    tasks.create_task(self._core.run(), name="core"),
                    tasks.create_task(self._health.become_ready(), name="ready"),
                    tasks.create_task(self._watch_guard(), name="guard"),
                    tasks.create_task(self._acl.keep(), name="access rules"),
                    tasks.create_task(_ended(reconciling), name="reconciler's end"),
                    *(tasks.create_task(serve(app, sock, tls=tls)) for app, sock, tls in listeners),
                ]
                await self._stop.wait()
                self._reconciler.audit.close()
                self._health.stopping("stopping")
                for task in others:
                    task.cancel()
        finally:
            self._reconciler.finish()
            await asyncio.wait({reconciling}, timeout=_STOP)
            reconciling.cancel()

    async def _watch_guard(self) -> None:
        """Look at the guard as soon as the kernel tells of a change; without its word, at each look."""
        while True:
            try:
                await self._warden.disturbed()
            except GuardError as error:
                _log.warning("changes of the guard are found at looks only", error=str(error))
                return
            self._reconciler.guard_disturbed()
            await asyncio.sleep(_GUARD_LOOKS)

    def _alive(self) -> None:
        """Amid a long step."""
        self._health.alive()

    def _ticked(self) -> None:
        self._health.ticked()
        self._acl.refresh()

    async def _render(self) -> bytes:
        self._desk.refresh_metrics()
        return await self._metrics.render()

    def _listeners(self) -> list[_Listener]:
        """Bind all sockets, so that a port that is taken ends the start."""
        config = self._config
        bound: list[_Listener] = []
        own = own_app(self._render, CONTENT_TYPE, self._health.is_healthy, self._health.is_ready)
        bound.append(_Listener(own, bind(config.http.listen, "http.listen")))
        bound.append(_Listener(control_app(self._desk), bind_control(config.control_socket)))
        push = config.push
        if self._secrets.push_secret is not None:
            app = push_app(
                self._reconciler.inbox,
                self._secrets.push_secret.get_secret_value(),
                lambda: None if self._state.location is None else self._state.location.id,
                max_body=push.max_body,
            )
            tls = None
            if push.tls_cert_file is not None and push.tls_key_file is not None:
                tls = tls_context(push.tls_cert_file, push.tls_key_file, push.client_ca_file)
            bound.append(_Listener(app, bind(push.listen, "push.listen"), tls))
        for listener in bound:
            _log.info("listening", address=_shown(listener.sock))
        return bound

    def _reload(self) -> None:
        """SIGHUP: take what can change live, and say what can't."""
        self._health.reloading()
        try:
            new = self._load()
        except ConfigError as error:
            _log.error("configuration not reloaded, the old one stays", error=error.message, hint=error.hint)
        else:
            live, needs_restart = reload_differences(self._config, new)
            # Only what changed live: a key that needs a restart is to be named again next time.
            self._config = self._config.model_copy(
                update={section: _with_live(self._config, new, section, live) for section in _sections(live)}
            )
            self._take_live()
            _log.info("configuration reloaded", changed=sorted(live), needs_restart=needs_restart)
        self._health.reloaded()

    def _take_live(self) -> None:
        config = self._config
        log.set_level(config.log.level)
        self._core.poll_interval = config.core.poll_interval
        self._timers.interval = config.stats.interval
        self._metrics.per_peer = config.metrics.per_peer
        self._warden.lease = config.sessions.agent_lease
        self._reconciler.configure(limits_of(config), config.sessions.core_lost_grace)


def _sections(dotted: dict[str, Any]) -> set[str]:
    return {key.partition(".")[0] for key in dotted}


def _with_live(old: Config, new: Config, section: str, live: dict[str, Any]) -> Any:
    keys = [key.partition(".")[2] for key in live if key.startswith(f"{section}.")]
    changed = {key: getattr(getattr(new, section), key) for key in keys}
    return getattr(old, section).model_copy(update=changed)


def _end_now() -> None:
    """Nothing is lost by it: the journal is written for a crash, and tunnels stay up."""
    _log.error("the agent did not stop in time, it ends now", seconds=_END)
    sys.stderr.flush()
    os._exit(1)


async def _ended(reconciling: asyncio.Task[None]) -> None:
    """The reconciler must not end before the rest: what it fell over ends the agent."""
    await asyncio.wait({reconciling})
    reconciling.result()


def _shown(sock: socket.socket) -> str:
    name = sock.getsockname()
    return name if isinstance(name, str) else f"{name[0]}:{name[1]}"
