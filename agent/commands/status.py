"""``wg-agent status``: the peers by state, and the agent's own health."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent import clock
from agent.commands.chosen import choose
from agent.commands.output import console, print_json, shown
from agent.control import ControlClient
from agent.encoding import parse_time
from agent.errors import AgentError

_REFRESH: Final = 2.0  # seconds
_ROWS: Final = 2_000  # laying out a table costs a second for about 4,000
_KEY_FROM: Final = 150  # columns from which there is room for the public keys
_ORDER: Final = {"up": 0, "waiting": 1, "refused": 2}
_STYLES: Final = {"up": "green", "waiting": "yellow", "refused": "red"}
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")


def execute(arguments: argparse.Namespace) -> int:
    """Ask the running agent and show what it says, with ``--watch`` again and again until Ctrl-C."""
    client = ControlClient(choose(arguments).load().control_socket)
    document = client.status()
    if not arguments.watch:
        _print(document, as_json=arguments.json)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _watch(client, document, as_json=arguments.json)
    return 0


def _print(document: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        to = console()
        to.print(report(document, clock.read().wall, to.width))


def _watch(client: ControlClient, document: Mapping[str, Any], *, as_json: bool) -> None:
    to = console()
    if as_json or not to.is_terminal:
        while True:
            _print(document, as_json=as_json)
            time.sleep(_REFRESH)
            document = client.status()
    with Live(console=to, screen=True, auto_refresh=False) as live:
        while True:
            live.update(report(document, clock.read().wall, to.width, rows=to.height), refresh=True)
            time.sleep(_REFRESH)
            # An agent that is being restarted is worth waiting for.
            while True:
                try:
                    document = client.status()
                    break
                except AgentError as error:
                    live.update(_trouble(error), refresh=True)
                    time.sleep(_REFRESH)


def _trouble(error: AgentError) -> RenderableType:
    return Text(shown(str(error)), style="red")


def report(document: Mapping[str, Any], wall: float, width: int, rows: int = _ROWS) -> RenderableType:
    """The document for people: health, then the table. ``wall`` is now in Unix seconds."""
    peers = sorted(document["peers"], key=lambda peer: (_ORDER.get(peer["state"], 3), peer["name"]))
    parts: list[RenderableType] = [*_health(document), Text("")]
    if peers:
        parts.append(_table(peers[:rows], wall, with_keys=width >= _KEY_FROM))
    if len(peers) > rows:
        parts.append(Text(f"… and {len(peers) - rows} more peers: --json shows them all"))
    return Group(*parts)


def _health(document: Mapping[str, Any]) -> list[Text]:
    connected = document["core_connected"]
    core = Text(f"{document['interface']}: ", style="bold")
    core.append(
        "core connected" if connected else "core unreachable",
        style="not bold green" if connected else "not bold red",
    )
    if document["epoch"] is None:
        core.append(", no state from core yet", style="not bold")
    else:
        core.append(f", epoch {document['epoch']} revision {document['revision']}", style="not bold")
    lines = [core]
    counts = Counter(peer["state"] for peer in document["peers"])
    about = ", ".join(f"{counts[state]} {state}" for state in _ORDER)
    if document["mfa_required"] is not None:
        mfa = "requires MFA" if document["mfa_required"] else "does not require MFA"
        about = f"location {document.get('location') or '(no name)'} {mfa}: {about}"
    lines.append(Text(shown(about)))
    faults = []
    if document.get("core_error"):
        faults.append(f"core: {document['core_error']}")
    if document.get("device_error"):
        faults.append(f"interface: {document['device_error']}")
    if not document.get("journal_ok", True):
        faults.append("the journal can't be written: no new session is admitted")
    if document.get("expiry_late"):
        faults.append("sessions past their deadline are still on the interface")
    if document.get("reap_backlog"):
        lines.append(Text(f"{document['reap_backlog']} peers are cut and wait to be removed"))
    return lines + [Text(shown(fault), style="red") for fault in faults]


def _table(peers: list[Mapping[str, Any]], wall: float, *, with_keys: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("PEER", "left"), ("STATE", "left"), ("SESSION", "left")):
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for heading in ("TIME LEFT", "HANDSHAKE"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ENDPOINT", no_wrap=True, overflow="ellipsis")
    for heading in ("RX", "TX"):
        table.add_column(heading, justify="right", no_wrap=True)
    if with_keys:
        table.add_column("PUBLIC KEY", no_wrap=True)
    for peer in peers:
        left, handshake, reason = peer.get("time_left"), peer["latest_handshake"], peer.get("reason")
        cells = [
            Text(shown(peer["name"] or peer["public_key"])),
            Text(f"{peer['state']}: {reason}" if reason else peer["state"], _STYLES.get(peer["state"], "")),
            Text(shown(peer["session_id"] or "-")),
            Text("-" if left is None else span(left)),
            Text("never" if handshake is None else f"{span(max(0.0, wall - parse_time(handshake)))} ago"),
            Text(shown(peer["endpoint"] or "-")),
            Text(size(peer["rx_bytes"])),
            Text(size(peer["tx_bytes"])),
        ]
        if with_keys:
            cells.append(Text(shown(peer["public_key"])))
        table.add_row(*cells)
    return table


def span(seconds: float) -> str:
    """A duration in its two largest units, rounded down: ``45s``, ``3m05s``, ``2h14m``, ``3d04h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits: ``812 B``, ``1.5 MiB``."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1024
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.1f} {unit}"
    raise AssertionError("the last unit takes everything")
