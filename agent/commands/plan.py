"""``wg-agent plan``: what a reconcile would change now, as a diff."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from agent.commands.chosen import choose
from agent.commands.health import UNHEARD
from agent.commands.output import console, folded, print_json, print_lines, shown, signs
from agent.control import ControlClient

_VERBS: Final = {
    "add": ("+", "green"),
    "change": ("~", "yellow"),
    "replace": ("-/+", "yellow"),
    "remove": ("-", "red"),
}
_LABEL: Final = 16
_Entry = Mapping[str, Any]


def execute(arguments: argparse.Namespace) -> int:
    """Ask the running agent for its plan and print it."""
    document = ControlClient(choose(arguments).load().control_socket).plan()
    if arguments.json:
        print_json(document)
    else:
        to = console()
        print_lines(to, report(document, to))
    return 0


def report(document: Mapping[str, Any], to: Console) -> list[Text]:
    """Return the lines: each peer with what would change of it, then the drift, then how much it is."""
    steps = list(_steps(document["operations"]))
    lines: list[Text] = []
    for verb, entry in steps:
        lines += _lines(verb, entry, to)
    if steps:
        lines.append(Text())
    if document["drift"]:
        lines += [*_drift(document, to), Text()]
    return [*lines, _summary(document, Counter(verb for verb, _ in steps))]


def _steps(operations: Sequence[_Entry]) -> Iterator[tuple[str, _Entry]]:
    """What happens to each peer, in the order of the plan; one that is removed and added is replaced."""
    added = {entry["public_key"]: entry for entry in operations if entry["operation"] == "add"}
    replaced = {e["public_key"] for e in operations if e["operation"] == "remove"} & added.keys()
    for entry in operations:
        key, operation = entry["public_key"], entry["operation"]
        if operation == "update":
            yield "change", entry
        elif operation == "add":
            if key not in replaced:
                yield "add", entry
        elif key in replaced:
            # The add tells what comes; what there was before it is what the remove takes away.
            yield "replace", {**added[key], "before": entry["before"], "endpoint": entry["endpoint"]}
        else:
            yield "remove", entry


def _lines(verb: str, entry: _Entry, to: Console) -> list[Text]:
    sign, style = _VERBS[verb]
    name = shown(entry["name"] or "(no name)", to.encoding)
    lines = folded(
        to,
        Text(f"{sign} ", style=style),
        Text.assemble((name, f"bold {style}"), (f"  {shown(entry['public_key'], to.encoding)}", style)),
    )
    if verb == "replace":
        lines += _detail("replaced", "removed and added, so that the keys it has negotiated are void", to)
    if entry["why"]:
        lines += _detail("why", entry["why"], to)
    before, after = entry["before"] or {}, entry["after"] or {}
    lines += _value("allowed ips", _ips(before), _ips(after), verb, to)
    if verb != "remove":
        keepalives = [side.get("persistent_keepalive", 0) for side in (before, after)]
        if verb == "change" and keepalives[0] != keepalives[1]:
            old, new = (f"{one} s" if one else "off" for one in keepalives)
            lines += _value("keepalive", old, new, verb, to)
        lines += _psk(entry, before, after, verb, to)
    if entry["session_id"] and verb in {"add", "replace"}:
        lines += _detail("session", entry["session_id"], to)
    if entry["endpoint"] and verb != "add":
        lines += _detail("endpoint", entry["endpoint"], to)
    return lines


def _ips(side: _Entry) -> str:
    return ", ".join(side.get("allowed_ips", ())) or "none"


def _psk(entry: _Entry, before: _Entry, after: _Entry, verb: str, to: Console) -> list[Text]:
    has, had = after.get("preshared_key"), before.get("preshared_key")
    if verb == "add":
        return _detail("pre-shared key", "(set)" if has else "none", to)
    if not entry["preshared_key_changes"]:
        return []
    return _detail("pre-shared key", "(changes)" if has and had else "(set)" if has else "(cleared)", to)


def _value(what: str, old: str, new: str, verb: str, to: Console) -> list[Text]:
    if verb == "remove":
        return _detail(what, old, to, "red")
    if verb == "add":
        return _detail(what, new, to, "green")
    if old == new:
        return []
    text = Text.assemble((old, "red"), f" {signs(to).arrow} ", (new, "green"))
    return folded(to, Text("    " + what.ljust(_LABEL)), text)


def _detail(what: str, text: str, to: Console, style: str = "") -> list[Text]:
    return folded(to, Text("    " + what.ljust(_LABEL)), Text(shown(text, to.encoding), style=style))


def _drift(document: Mapping[str, Any], to: Console) -> Iterator[Text]:
    yield Text("drift: somebody else has changed", style="bold")
    for one in document["drift"]:
        who = one["public_key"] or document["interface"]
        if one["name"]:
            who = f"{one['name']}  {who}"
        sign = Text("! ", style="yellow")
        text = Text(shown(f"{who} {one['detail']} ({one['kind']})", to.encoding))
        yield from folded(to, sign, text)


def _summary(document: Mapping[str, Any], steps: Counter[str]) -> Text:
    # Of the link's settings and the guard a plan knows nothing.
    interface = document["interface"]
    if document.get("epoch", "") is None:
        interface += f": {UNHEARD}"
    if not steps:
        return Text(f"{interface}: nothing would change of its peers", style="bold green")
    counts = ", ".join(f"{steps[verb]} to {verb}" for verb in _VERBS if steps[verb])
    return Text(f"{interface}: {counts}", style="bold")
