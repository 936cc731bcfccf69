from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.encoding import format_key
from tests.commands.parts import ALICE, BOB, Agent, an_agent, wg_agent, write_config

ON = {
    "public_key": format_key(ALICE),
    "name": "alice-laptop",
    "state": "up",
    "on_interface": True,
    "reason": "session",
    "because": "it has a live session",
    "remedy": "",
    "session_id": "s-1",
    "facts": [
        {"speaks_for": True, "fact": "core lists it with 10.8.0.5/32"},
        {"speaks_for": None, "fact": "latest handshake 12s ago"},
    ],
    "events": [
        {
            "number": 1,
            "at": "2027-01-15T08:00:00.000Z",
            "event": "granted",
            "public_key": format_key(ALICE),
            "name": "alice-laptop",
            "session_id": "s-1",
            "revision": 42,
            "reason": None,
            "detail": None,
        }
    ],
}
OFF = ON | {
    "public_key": format_key(BOB),
    "name": "bob\x1b[31m",
    "state": "refused",
    "on_interface": False,
    "reason": "prefix_claimed",
    "because": "another peer claims one of its prefixes",
    "remedy": "have core give each prefix to one peer only",
    "facts": [{"speaks_for": False, "fact": "so does carol"}],
    "events": [],
}


def explained(
    folder: Path, capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0, **document: Any
) -> str:
    path = write_config(folder)
    with an_agent(path, Agent(explained=document)) as agent:
        assert main(["explain", "-c", str(path), *argv]) == code
    assert agent.asked == [f"explain {argv[0]}"]
    return capsys.readouterr().out


def test_the_verdict_comes_first_then_what_speaks_for_it_then_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = explained(tmp_path, capsys, "alice", peers=[ON]).splitlines()
    assert lines[:-1] == [
        f"alice-laptop  {format_key(ALICE)}",
        "✓ on wg0: it has a live session (session)",
        "",
        "  ✓ core lists it with 10.8.0.5/32",
        "  · latest handshake 12s ago",
        "",
    ]
    assert " ".join(lines[-1].split()[2:]) == "granted session s-1 revision 42"


def test_a_peer_that_is_off_has_the_reason_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = explained(tmp_path, capsys, "bob", peers=[OFF]).splitlines()
    assert lines == [
        rf"bob\x1b[31m  {format_key(BOB)}",
        "✗ not on wg0: another peer claims one of its prefixes (prefix_claimed)",
        "  → have core give each prefix to one peer only",
        "",
        "  ✗ so does carol",
    ]


def test_nobody_is_an_error_that_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = explained(tmp_path, capsys, "carol", code=1)
    assert "no peer has the key, address or name 'carol'" in text
    assert "wg-agent status" in text


def test_too_many_are_named_and_not_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(tmp_path, capsys, "lap", code=1, peers=[ON, OFF], more=17)
    assert text.splitlines() == [
        f"alice-laptop  {format_key(ALICE)}",
        rf"bob\x1b[31m  {format_key(BOB)}",
        "… and 17 more: say more of the name, or give a key or an address",
    ]


def test_a_terminal_without_the_signs_gets_others(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with an_agent(path, Agent(explained={"peers": [ON | {"name": "böb → alice"}, OFF]})):
        done = wg_agent("explain", "-c", path, "alice", env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout.splitlines()[1:5] == [
        "+ on wg0: it has a live session (session)",
        "",
        "  + core lists it with 10.8.0.5/32",
        "  . latest handshake 12s ago",
    ]
    assert "  -> have core give each prefix" in done.stdout
    assert done.stdout.startswith("b\\xf6b \\u2192 alice  ")


def test_json_is_the_agents_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(tmp_path, capsys, "alice", "--json", peers=[ON])
    assert json.loads(text) == {"interface": "wg0", "asked": "alice", "peers": [ON], "more": 0}


def test_long_facts_are_folded_beside_their_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    long = "core " * 40
    facts = [{"speaks_for": True, "fact": long.strip()}]
    lines = explained(tmp_path, capsys, "alice", peers=[ON | {"facts": facts}]).splitlines()
    folded = [text for text in lines if "core core" in text]
    assert len(folded) > 1
    assert folded[0].startswith("  ✓ core")
    assert all(text.startswith("    core") and len(text) <= 80 for text in folded[1:])
