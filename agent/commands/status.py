"""``wg-agent status``: the agent's own health and a table of the peers, from the running agent."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from agent import clock
from agent.commands.chosen import choose
from agent.commands.health import UNHEARD, head
from agent.commands.listing import cut
from agent.commands.output import Screen, console, print_json, print_lines, say, shown, signs
from agent.commands.peertable import listing
from agent.commands.selection import Entry, matching, ordered
from agent.control import ControlClient
from agent.errors import AgentError

_REFRESH: Final = 2.0  # seconds


def execute(arguments: argparse.Namespace) -> int:
    """Ask the running agent and show what it says, with ``--watch`` again and again until Ctrl-C."""
    client = ControlClient(choose(arguments).load().control_socket)
    document = client.status()
    if arguments.peer is not None and not matching(document["peers"], arguments.peer):
        hint = "it is a part of a name, the beginning of a key, an address, or a prefix"
        if arguments.peer == document["interface"]:
            hint = f"an interface is chosen by -i {arguments.peer}"
        raise AgentError(f"no peer answers to {arguments.peer!r}", hint)
    if not arguments.watch:
        _print(document, arguments)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _watch(client, document, arguments)
    return 0


def chosen(document: Mapping[str, Any], arguments: argparse.Namespace) -> list[Entry]:
    """Return the peers that the arguments are about, in their order."""
    peers: Sequence[Entry] = document["peers"]
    if arguments.peer is not None:
        peers = matching(peers, arguments.peer)
    if arguments.state:
        peers = [peer for peer in peers if peer["state"] in arguments.state]
    if arguments.json and arguments.sort is None:
        return list(peers)
    return ordered(peers, arguments.sort or "state")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector out: of 10,000 peers it takes half the time, and nothing is in cycles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _print(document: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    peers = chosen(document, arguments)
    if arguments.json:
        print_json({**document, "peers": peers})
        return
    to = console()
    with _uncollected():
        print_lines(to, report(document, peers, clock.read().wall, to).lines)


def _watch(client: ControlClient, document: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    to = console()
    if arguments.json or not to.is_terminal or to.is_dumb_terminal:
        aside = Console(stderr=True, markup=False, emoji=False, highlight=False)
        while True:
            _print(document, arguments)
            document = _next(client, partial(_say_once, aside))
    with Live(console=to, screen=True, auto_refresh=False) as live:
        while True:
            peers = chosen(document, arguments)
            live.update(report(document, peers, clock.read().wall, to, height=to.height), refresh=True)
            document = _next(client, partial(_show_fault, live))


def _next(client: ControlClient, away: Callable[[AgentError, bool], None]) -> dict[str, Any]:
    """Return the next document; ``away`` is told of each vain attempt, and whether it is the first.

    An agent that is being restarted is worth waiting for.
    """
    first = True
    while True:
        time.sleep(_REFRESH)
        try:
            return client.status()
        except AgentError as error:
            away(error, first)
            first = False


def _say_once(aside: Console, error: AgentError, first: bool) -> None:
    if first:
        say(aside, f"wg-agent: {error}; waiting for it")


def _show_fault(live: Live, error: AgentError, _first: bool) -> None:
    live.update(Text(shown(str(error)), style="red"), refresh=True)


def report(
    document: Mapping[str, Any],
    peers: Sequence[Entry],
    wall: float,
    to: Console,
    height: int | None = None,
) -> Screen:
    """The agent's health, then a line for each of ``peers``; ``wall`` is now in Unix seconds.

    With a height the screen has at most so many lines, the last of which says how many peers are not
    shown; without one all are shown, and where they scroll the head away the counts follow once more.
    """
    above: list[Any] = [*head(document, wall, to), Text("")]
    of, rows = len(document["peers"]), len(peers)
    below: list[Any] = []
    if not peers:
        nobody = UNHEARD if document["epoch"] is None else "core lists no peer"
        below.append(_last(f"none of {of} peers" if of else nobody, to))
    elif rows < of:
        below.append(_last(f"{rows} of {of} peers", to))
    elif height is None and to.is_terminal and len(above) + 1 + rows > to.height:
        below.append(_last(f"{of} peers: --state, --sort or a name show fewer", to))
    if height is not None and len(above) + 1 + rows + len(below) > height:
        rows = max(0, height - len(above) - 2)
        chosen_of = f"{len(peers)} chosen of " if len(peers) < of else ""
        more = f"{signs(to).cut} and {len(peers) - rows} more of {chosen_of}{of} peers"
        below = [_last(f"{more}: --state, --sort or a name show others", to)] if peers else below
    table: list[Any] = []
    if peers:
        laid_out = listing(peers[:rows], wall, to)
        table = list(laid_out.lines(laid_out.widths(to.width if to.is_terminal else None)))
    lines = above + table
    return Screen([*lines[: None if height is None else height - len(below)], *below])


def _last(text: str, to: Console) -> Text:
    return Text(cut(text, to.width, signs(to).cut), style="dim")
