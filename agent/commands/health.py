"""The head of ``wg-agent status``: how the agent, its interface, core and the guard are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from agent.commands.options import STATES
from agent.commands.output import cells, folded, shown, signs
from agent.commands.peertable import SIGNS
from agent.encoding import format_span, parse_time

_Mark = Literal["good", "waiting", "bad"]
_STYLES: Final = {"good": "green", "waiting": "yellow", "bad": "red"}
_GUARD: Final[Mapping[str, tuple[_Mark, str]]] = {
    "in_force": ("good", "in force: the kernel itself ends sessions on time"),
    "not_needed": ("waiting", "not needed: no peer has to have a session"),
    "left_over": ("waiting", "left over: the table of an earlier start goes on ending sessions on time"),
    "unknown": ("waiting", "not known yet whether it is needed, or there"),
    "none": ("waiting", "none"),
    "missing": ("bad", "not in force"),
}

UNHEARD: Final = "core has not been heard yet"
"""Instead of what only core can say."""


class _Fact(NamedTuple):
    about: str
    mark: _Mark
    text: str


def head(document: Mapping[str, Any], wall: float, to: Console) -> list[Text]:
    """Return the lines; ``wall`` is now in Unix seconds."""
    facts = [*_interface(document), *_core(document, wall), *_guard(document), *_agent(document, wall)]
    label = 2 + max(cells(fact.about) for fact in facts)
    lines: list[Text] = []
    before = ""
    for fact in facts:
        about = "" if fact.about == before else fact.about
        before = fact.about
        sign = getattr(signs(to), fact.mark)
        lines += folded(
            to,
            Text.assemble((about.ljust(label), "bold"), (sign, _STYLES[fact.mark]), " "),
            Text(shown(fact.text, to.encoding), style="red" if fact.mark == "bad" else ""),
        )
    return lines + folded(to, Text("peers".ljust(label), style="bold"), _counts(document, to))


def _counts(document: Mapping[str, Any], to: Console) -> Text:
    if document["epoch"] is None and not document["peers"]:
        return Text(UNHEARD)
    held = Counter(peer["state"] for peer in document["peers"])
    line = Text()
    for state in STATES:
        sign, style = SIGNS[state]
        line.append(getattr(signs(to), sign), style)
        line.append(f" {held[state]} {state}   ")
    line.rstrip()
    return line


def _ago(text: Any, wall: float) -> str:
    return format_span(max(0.0, wall - parse_time(text)))


def _interface(document: Mapping[str, Any]) -> Iterator[_Fact]:
    name = document["interface"]
    about = ""
    if document["mfa_required"] is not None:
        mfa = "requires MFA" if document["mfa_required"] else "does not require MFA"
        about = f", location {document.get('location') or '(no name)'} {mfa}"
    up = document.get("link_up", True)
    if up is None:
        yield _Fact(name, "waiting", "left as it was found until core is heard" + about)
    else:
        yield _Fact(name, "good" if up else "bad", ("up" if up else "down") + about)
    if document.get("device_error"):
        yield _Fact(name, "bad", document["device_error"])
    if overstaying := document.get("overstaying"):
        who = f"{overstaying} peer{'s' * (overstaying > 1)} that ha{'ve' if overstaying > 1 else 's'} to go"
        stays = "are" if overstaying > 1 else "is"
        yield _Fact(
            name, "bad", f"{who} {stays} still on it: the device refuses, it is tried again at each step"
        )


def _core(document: Mapping[str, Any], wall: float) -> Iterator[_Fact]:
    since = document.get("core_since")
    lasts = f" for {_ago(since, wall)}" if since else ""
    if document["core_connected"]:
        mark: _Mark = "good"
        text = f"connected{lasts}"
    elif since or document.get("core_error"):
        mark, text = "bad", f"unreachable{lasts}"
    else:
        mark, text = "waiting", "not reached yet"
    if document["epoch"] is None:
        text += ", no state from core yet"
    else:
        text += f", epoch {document['epoch']} revision {document['revision']}"
    if document.get("synced_at"):
        text += f", last update {_ago(document['synced_at'], wall)} ago"
    yield _Fact("core", mark, text)
    if document.get("core_error"):
        yield _Fact("core", "bad", document["core_error"])


def _guard(document: Mapping[str, Any]) -> Iterator[_Fact]:
    if "guard" in document:
        mark, text = _GUARD.get(document["guard"], ("waiting", str(document["guard"])))
        yield _Fact("guard", mark, text)
    if document.get("guard_error"):
        yield _Fact("guard", "bad", document["guard_error"])


def _agent(document: Mapping[str, Any], wall: float) -> Iterator[_Fact]:
    text = f"version {document['version']}" if "version" in document else "runs"
    if document.get("started_at"):
        text += f", started {_ago(document['started_at'], wall)} ago"
    if document.get("observed_at"):
        text += f", looked at {document['interface']} {_ago(document['observed_at'], wall)} ago"
    yield _Fact("agent", "good", text)
    if not document.get("journal_ok", True):
        yield _Fact("agent", "bad", "the journal can't be written: no new session is admitted")
    if document.get("expiry_late"):
        yield _Fact("agent", "bad", "sessions past their deadline are still on the interface")
    if document.get("reap_backlog"):
        yield _Fact("agent", "waiting", f"{document['reap_backlog']} peers are cut and wait to be removed")
