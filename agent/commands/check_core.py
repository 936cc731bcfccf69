"""Checks of core: one GET state by the agent's own client, and what follows from the answer."""

from __future__ import annotations

from typing import Final

from agent import clock
from agent.commands.findings import Finding, Mark, fault, ok
from agent.config import Config
from agent.core.endpoint import TlsFiles
from agent.core.http import CoreClient
from agent.core.messages import NotModified
from agent.errors import AgentError, CoreUnavailable
from agent.keys import Secrets
from agent.model import Snapshot

_SKEW: Final = 5.0  # seconds
_PATIENCE: Final = 60.0  # for a whole answer
_SHOWN: Final = 5
_LATER: Final = "the agent tries again by itself; if it lasts, see core's own log"


async def ask(config: Config, secrets: Secrets) -> tuple[list[Finding], Snapshot | None]:
    """Pull the state once; return what that shows and the state, if there was one."""
    core = config.core
    try:
        client = CoreClient(
            core.url,
            secrets.token.get_secret_value(),
            clock=clock.read,
            heard=lambda: None,
            tls=TlsFiles(core.ca_file, core.client_cert_file, core.client_key_file),
            max_body=core.max_body,
            timeout=core.timeout,
            deadline=_PATIENCE,
        )
    except AgentError as error:
        return [fault("core", error)], None
    sent = clock.read()
    try:
        answer = await client.get_state()
    except AgentError as error:
        return [_unreached(core.url, error)], None
    finally:
        await client.close()
    got = clock.read()
    if isinstance(answer, NotModified):  # it is the answer to a condition, and there was none
        raise AssertionError("core answered a condition that was not made")
    location = answer.location
    mfa = "requires MFA" if location.mfa_required else "does not require MFA"
    found = ok(
        "core",
        f"{core.url} answers: location {location.name or location.id} {mfa}, {len(answer.peers)} peers",
    )
    # What core stamped lies between sending and receiving.
    off = (sent.wall + got.wall) / 2 - answer.server_time
    skew = _skew(off, tolerance=_SKEW + (got.boot - sent.boot) / 2)
    return [found, skew, *_refused(answer)], answer


def _unreached(url: str, error: AgentError) -> Finding:
    remedy = error.hint
    if isinstance(error, CoreUnavailable) and (not remedy or remedy == "it is tried again"):
        remedy = _LATER
    remedy = remedy or "check core.url: what answers there does not speak the API of core"
    return Finding("core", Mark.FAULT, f"{url}: {error.message}", remedy)


def _skew(off: float, *, tolerance: float) -> Finding:
    if abs(off) <= tolerance:
        return ok("clock", "this host's clock and core's agree")
    return Finding(
        "clock",
        Mark.WARNING,
        f"this host's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} core's",
        "keep both hosts' clocks by NTP: timedatectl set-ntp true",
    )


def _refused(snapshot: Snapshot) -> list[Finding]:
    """Peers that core itself lists wrongly; clashes between peers are the agent's to judge."""
    faults = [
        (peer.name, peer.fault or peer.session_fault)
        for peer in snapshot.peers
        if peer.fault is not None or peer.session_fault is not None
    ]
    faults += [(peer.name or peer.public_key, peer.reason) for peer in snapshot.unreadable]
    if not faults:
        return []
    examples = ", ".join(f"{name or '(no name)'} ({reason})" for name, reason in faults[:_SHOWN])
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return [
        Finding(
            "peers",
            Mark.WARNING,
            f"wrongly listed in core, and so refused ({len(faults)}): {examples}{more}",
            "correct them in core",
        )
    ]
