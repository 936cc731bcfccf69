"""Checks of a Defguard core: as much as can be seen of it without passing for its gateway.

Any call to a core of the first generation counts as the gateway's own, so only the connection is tried out.
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from typing import Final

from agent import clock
from agent.commands.check_host import agent_runs
from agent.commands.findings import Finding, Mark, fault, ok
from agent.config import Config
from agent.errors import AgentError, CoreUnavailable
from agent.keys import Secrets

_SOON: Final = 30 * 86_400.0
_EXTRA: Final = Finding(
    "core",
    Mark.FAULT,
    'core.protocol = "defguard" needs packages that are not installed',
    "the Debian package has it; from a checkout: pipx install '.[defguard]'",
)


async def ask(config: Config, secrets: Secrets) -> list[Finding]:
    """Judge how core can be reached, or reaches this host."""
    return _called(config) if config.core.calls else [await _call(config, secrets)]


async def _call(config: Config, secrets: Secrets) -> Finding:
    try:
        from agent.core.defguard.client import DefguardClient  # noqa: PLC0415 (the extra's)
    except ImportError:
        return _EXTRA
    core = config.core
    try:
        client = DefguardClient(
            core.url, secrets.token.get_secret_value(), ca_file=core.ca_file, timeout=core.timeout
        )
        async with client.connect() as connection:
            await connection.reach()
    except CoreUnavailable as error:
        return Finding("core", Mark.FAULT, f"{core.url}: {error.message}", error.hint or _REACH)
    except AgentError as error:
        return fault("core", error)
    return ok("core", f"{core.url} can be reached; whether it takes the token shows when the agent runs")


_ANEW: Final = "have core adopt the gateway anew: delete it there and add it again"
_REACH: Final = "is core there, and is core.ca_file the CA of its certificate?"


def _called(config: Config) -> list[Finding]:
    try:
        from agent.core.defguard import certificates  # noqa: PLC0415 (the extra's)
    except ImportError:
        return [_EXTRA]
    listen = config.defguard.listen
    findings = []
    try:
        held = certificates.load(config.cert_dir)
    except AgentError as error:
        findings.append(fault("adoption", error))
    else:
        findings.append(_adoption(config, None if held is None else held.expires_at))
    if not agent_runs(config):
        try:
            family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
            socket.create_server((listen.host, listen.port), family=family).close()
        except OSError as error:
            findings.append(
                Finding(
                    "core",
                    Mark.FAULT,
                    f"defguard.listen: {listen} can't be had: {error.strerror}",
                    "see who has the port: ss -ltnp; Defguard's own gateway must not run beside",
                )
            )
        else:
            findings.append(ok("core", f"it can dial this host at {listen}"))
    return findings


def _adoption(config: Config, expires_at: float | None) -> Finding:
    if expires_at is None:
        minutes = config.defguard.adoption_timeout / 60
        return Finding(
            "adoption",
            Mark.INFO,
            f"no core has adopted this gateway: {config.cert_dir} holds no whole set of certificates",
            f"start the agent, and add the gateway in Defguard within {minutes:.0f} minutes",
        )
    day = f"{datetime.fromtimestamp(expires_at, UTC):%Y-%m-%d}"
    left = expires_at - clock.read().wall
    if left < 0:
        return Finding(
            "adoption",
            Mark.FAULT,
            f"the certificates have expired on {day}",
            "have core adopt the gateway anew",
        )
    if left < _SOON:
        return Finding("adoption", Mark.WARNING, f"the certificates expire on {day}", _ANEW)
    return ok("adoption", f"core has adopted this gateway; the certificates are good until {day}")
