"""``wg-agent end``: sessions end now, whatever core says, and stay dead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from agent.commands.chosen import choose
from agent.commands.health import UNHEARD
from agent.commands.output import console, print_json, say
from agent.control import ControlClient
from agent.encoding import format_key, parse_key
from agent.errors import ConfigError
from agent.model import PublicKey


def execute(arguments: argparse.Namespace) -> int:
    """End the sessions of the named peers or of all; 1 if core lists no such peer."""
    if arguments.all == bool(arguments.keys):
        raise ConfigError("say whose sessions are to end", "wg-agent end KEY …, or wg-agent end --all")
    keys = [_key(text) for text in dict.fromkeys(arguments.keys)]
    client = ControlClient(choose(arguments).load().control_socket)
    document, heard = (_end_all(client), True) if arguments.all else _end(client, keys)
    if arguments.json:
        print_json(document)
    else:
        _show(document, "core lists no peer" if heard else f"{UNHEARD}, and nobody knows a peer")
    return 1 if document["unknown"] else 0


def _key(text: str) -> PublicKey:
    try:
        return PublicKey(parse_key(text))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is not a public key: {error}",
            "wg-agent status shows the peers' keys with --json, and on a terminal of 150 columns or more",
        ) from None


def _end_all(client: ControlClient) -> dict[str, Any]:
    return {"ended": client.end(None)["ended"], "without_session": [], "unknown": []}


def _end(client: ControlClient, keys: Sequence[PublicKey]) -> tuple[dict[str, Any], bool]:
    """What came of it, and whether it is known whom core lists."""
    # The all-zero key is nobody's, and the agent takes it for a malformed one.
    asked = [key for key in keys if any(key)]
    ended: list[str] = client.end(asked)["ended"] if asked else []
    left = [text for key in keys if (text := format_key(key)) not in ended]
    status: dict[str, Any] = client.status() if left else {"epoch": "", "peers": ()}
    listed = {peer["public_key"] for peer in status["peers"]}
    document = {
        "ended": ended,
        "without_session": [text for text in left if text in listed],
        "unknown": [text for text in left if text not in listed],
    }
    return document, status["epoch"] is not None


def _show(document: dict[str, Any], nobody: str) -> None:
    to = console()
    for text in document["ended"]:
        say(to, f"ended: {text}")
    for text in document["without_session"]:
        say(to, f"had no session: {text}")
    for text in document["unknown"]:
        say(to, f"{nobody} with this key: {text}", "red")
    if not any(document.values()):
        say(to, "there was no session to end")
