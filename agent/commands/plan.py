"""``wg-agent plan``: what a reconcile would change now, as a diff."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console

from agent.commands.chosen import choose
from agent.commands.output import console, print_json, say
from agent.control import ControlClient

_SIGNS: Final = {
    "remove": ("-", "red"),
    "cut": ("-", "red"),
    "update": ("~", "yellow"),
    "add": ("+", "green"),
}


def execute(arguments: argparse.Namespace) -> int:
    """Ask the running agent for its plan and print it."""
    document = ControlClient(choose(arguments).load().control_socket).plan()
    if arguments.json:
        print_json(document)
    else:
        show(document, console())
    return 0


def show(document: Mapping[str, Any], to: Console) -> None:
    """Print the operations in their order, then the drift that some of them heal."""
    operations, drift = document["operations"], document["drift"]
    if not operations:
        say(to, f"{document['interface']}: nothing would change")
    for operation in operations:
        sign, style = _SIGNS.get(operation["operation"], ("?", ""))
        name = operation["name"] or "(not listed by core)"
        change = operation["change"].removeprefix(operation["operation"]).lstrip(": ")
        say(to, f"{sign} {name} {operation['public_key']}{'  ' + change if change else ''}", style)
    if drift:
        say(to, "drift (not the agent's doing):")
    for difference in drift:
        who = difference["public_key"] or document["interface"]
        say(to, f"  {who} {difference['detail']} ({difference['kind']})")
