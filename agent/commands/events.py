"""``wg-agent events``: the audit trail of the running agent."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from agent import clock
from agent.commands.chosen import choose
from agent.commands.output import console, print_json, say, shown, signs
from agent.control import WAIT, ControlClient
from agent.encoding import parse_time
from agent.errors import AgentError

_AGAIN: Final = 1.0  # seconds until an agent that is being restarted is asked again
_WIDE: Final = 140  # columns from which there is room for whole keys
_STYLES: Final = {
    "granted": "green",
    "renewed": "cyan",
    "ended": "yellow",
    "refused": "red",
    "cleared": "green",
    "drift": "magenta",
    "core_lost": "red",
    "core_found": "green",
    "core_invalid": "red",
}
_KIND_WIDTH: Final = max(map(len, _STYLES))
_NAME_WIDTH: Final = 20


def execute(arguments: argparse.Namespace) -> int:
    """Print the last occurrences, with ``--follow`` those to come as well until Ctrl-C."""
    client = ControlClient(choose(arguments).load().control_socket)
    # At least one: the answer also says from where to go on.
    document = client.events(limit=max(1, arguments.lines), who=arguments.who)
    past = document["events"] if arguments.lines else []
    if arguments.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(client, document, past, arguments)
        return 0
    if arguments.json:
        print_json({"interface": document["interface"], "events": past})
        return 0
    to = console()
    for event in past:
        to.print(line(event, to, to.width), soft_wrap=True)
    if not past:
        say(
            to,
            f"{document['interface']}: nothing has happened that is still known; the log goes back further",
        )
    return 0


def _follow(
    client: ControlClient,
    document: Mapping[str, Any],
    past: Iterable[Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> None:
    to = console()
    for event in itertools.chain(past, _to_come(client, document, arguments.who)):
        _print(event, to, as_json=arguments.json)


def _print(event: Mapping[str, Any], to: Console, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
        return
    to.print(line(event, to, to.width), soft_wrap=True)
    sys.stdout.flush()


def _to_come(
    client: ControlClient, document: Mapping[str, Any], who: str | None
) -> Iterator[Mapping[str, Any]]:
    """Give what happens from now on; an agent that is restarted is waited for, and its trail begins anew."""
    aside = Console(stderr=True, markup=False, emoji=False, highlight=False)
    process, last, away = document["process"], document["last"], False
    while True:
        began = clock.monotonic()
        try:
            document = client.events(last, wait=WAIT, process=process, who=who)
        except AgentError as error:
            if not away:
                say(aside, f"wg-agent: {error}; waiting for it")
            away = True
            time.sleep(_AGAIN)
            continue
        away = False
        if document["process"] != process:
            say(aside, "wg-agent: the agent was restarted; the log has what it did right before")
        elif document["missed"]:
            say(aside, f"wg-agent: {document['missed']} events were missed: the log has them")
        process, last = document["process"], document["last"]
        yield from document["events"]
        if not document["events"] and clock.monotonic() - began < _AGAIN:
            # Too many wait already, or nothing of it was about the one who matters.
            time.sleep(_AGAIN)


def line(event: Mapping[str, Any], to: Console, width: int, *, with_peer: bool = True) -> Text:
    """One occurrence in one line: time, what, whom, why, session, revision; ``width`` in columns."""
    at = datetime.fromtimestamp(parse_time(event["at"])).astimezone()
    kind = str(event["event"])
    cut, encoding = signs(to).cut, to.encoding
    text = Text(f"{at:%Y-%m-%d %H:%M:%S}  ")
    text.append(kind.ljust(_KIND_WIDTH), _STYLES.get(kind, "bold"))
    if with_peer and event["public_key"]:
        key = event["public_key"] if width >= _WIDE else event["public_key"][:8] + cut
        text.append("  " + _padded(shown(event["name"] or "-", encoding), cut), "bold").append(
            f"  {shown(key, encoding)}", "dim"
        )
    for value, before, style in (
        (event["reason"], "", _STYLES.get(kind, "")),
        (event["detail"], "", ""),
        (event["session_id"], "session ", ""),
        (event["revision"], "revision ", "dim"),
    ):
        if value is not None:
            text.append("  " + shown(before + str(value), encoding), style)
    return text


def _padded(name: str, cut: str) -> str:
    while cell_len(name) > _NAME_WIDTH:
        name = name[:-2] + cut
    return name + " " * (_NAME_WIDTH - cell_len(name))
