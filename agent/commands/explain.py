"""``wg-agent explain``: why a peer is on the interface or not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from agent.commands.chosen import choose
from agent.commands.events import line
from agent.commands.output import console, folded, print_json, say, shown, signs
from agent.control import ControlClient
from agent.errors import ConfigError

_SIGNS: Final = {True: ("tick", "green"), False: ("bad", "red"), None: ("info", "dim")}


def execute(arguments: argparse.Namespace) -> int:
    """Ask the running agent and show what it says; 1 if nobody is meant, or too many are."""
    if not arguments.what:
        raise ConfigError("nobody is asked about", "wg-agent explain KEY|IP|NAME")
    document = ControlClient(choose(arguments).load().control_socket).explain(arguments.what)
    if arguments.json:
        print_json(document)
    else:
        show(document, console())
    return 0 if document["peers"] and not document["more"] else 1


def show(document: Mapping[str, Any], to: Console) -> None:
    """Print each peer's judgement, what speaks for and against it, and its last events."""
    peers, more = document["peers"], document["more"]
    if not peers:
        say(to, f"{document['interface']}: no peer has the key, address or name {document['asked']!r}", "red")
        say(to, "  wg-agent status lists them all")
        return
    if more:
        for peer in peers:
            say(to, _title(peer))
        say(to, f"{signs(to).cut} and {more} more: say more of the name, or give a key or an address")
        return
    for number, peer in enumerate(peers):
        if number:
            to.print()
        _show_peer(peer, str(document["interface"]), to)


def _title(peer: Mapping[str, Any]) -> str:
    return f"{peer['name'] or '(no name)'}  {peer['public_key']}"


def _show_peer(peer: Mapping[str, Any], interface: str, to: Console) -> None:
    there = peer["on_interface"]
    say(to, _title(peer), "bold")
    verdict = f"on {interface}" if there else f"not on {interface}"
    drawn = signs(to)
    sign, style = _SIGNS[there]
    _beside(
        f"{getattr(drawn, sign)} ", f"bold {style}", f"{verdict}: {peer['because']} ({peer['reason']})", to
    )
    if peer["remedy"]:
        _beside(f"  {drawn.arrow} ", "", peer["remedy"], to)
    to.print()
    for fact in peer["facts"]:
        sign, style = _SIGNS[fact["speaks_for"]]
        _beside(f"  {getattr(drawn, sign)} ", style, fact["fact"], to)
    if peer["events"]:
        to.print()
        for event in peer["events"]:
            to.print(Text("  ").append_text(line(event, to, to.width - 2, with_peer=False)), soft_wrap=True)


def _beside(sign: str, style: str, text: str, to: Console) -> None:
    for part in folded(to, Text(sign, style), Text(shown(text, to.encoding))):
        to.print(part)
