from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.encoding import format_key
from agent.model import KEEP, AddPeer, PublicKey, RemovePeer, UpdatePeer
from agent.plan import describe
from tests.commands.parts import ALICE, BOB, NOBODY, Agent, an_agent, write_config


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str, **document: Any) -> str:
    path = write_config(folder)
    with an_agent(path, Agent(planned=document)):
        assert main(["plan", "-c", str(path), *argv]) == 0
    return capsys.readouterr().out


def operation(kind: str, key: PublicKey, name: str, change: str) -> dict[str, Any]:
    return {"operation": kind, "public_key": format_key(key), "name": name, "change": change}


OPERATIONS = [
    operation("remove", NOBODY, "", describe(RemovePeer(NOBODY))),
    operation("update", BOB, "bob", describe(UpdatePeer(BOB, None, KEEP, False, 25))),
    operation("add", ALICE, "alice\x1b[31m", describe(AddPeer(ALICE, None, ()))),
]
DRIFT = [
    {"kind": "peer_added", "public_key": format_key(NOBODY), "detail": "was put on the interface"},
    {"kind": "listen_port", "public_key": None, "detail": "listens on port 1"},
]


def test_it_is_a_diff_in_the_order_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(tmp_path, capsys, operations=OPERATIONS, drift=DRIFT)

    assert text.splitlines() == [
        f"- (not listed by core) {format_key(NOBODY)}",
        f"~ bob {format_key(BOB)}  clear pre-shared key; persistent keepalive 25",
        rf"+ alice\x1b[31m {format_key(ALICE)}  without pre-shared key, allowed ips none",
        "drift (not the agent's doing):",
        f"  {format_key(NOBODY)} was put on the interface (peer_added)",
        "  wg0 listens on port 1 (listen_port)",
    ]


def test_nothing_to_do_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(tmp_path, capsys) == "wg0: nothing would change\n"


def test_json_is_the_agents_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(tmp_path, capsys, "--json", operations=OPERATIONS, drift=DRIFT)

    assert json.loads(text) == {"interface": "wg0", "operations": OPERATIONS, "drift": DRIFT}
