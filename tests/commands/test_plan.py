from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from agent.__main__ import main
from agent.commands.plan import report
from agent.encoding import format_key
from agent.model import DesiredPeer, Endpoint, PublicKey
from agent.overview import plan
from agent.plan import Mirror
from agent.state import State
from tests.commands.documents import pipe, printed, terminal
from tests.commands.parts import ALICE, BOB, NOBODY, Agent, an_agent, write_config
from tests.support.builders import CORE, NOW, OWN_KEY, device, grant, observed, peer, snapshot


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str, **document: Any) -> str:
    path = write_config(folder)
    with an_agent(path, Agent(planned=document)):
        assert main(["plan", "-c", str(path), *argv]) == 0
    return capsys.readouterr().out


def side(*allowed_ips: str, keepalive: int = 0, preshared_key: bool = True) -> dict[str, Any]:
    return {
        "allowed_ips": list(allowed_ips),
        "persistent_keepalive": keepalive,
        "preshared_key": preshared_key,
    }


def operation(kind: str, key: PublicKey, name: str, **changed: Any) -> dict[str, Any]:
    return {
        "operation": kind,
        "public_key": format_key(key),
        "name": name,
        "change": kind,
        "before": None,
        "after": None,
        "preshared_key_changes": False,
        "endpoint": None,
        "session_id": None,
        "why": "",
    } | changed


REMOVE = operation(
    "remove",
    NOBODY,
    "",
    before=side("10.8.0.99/32"),
    endpoint="203.0.113.9:51000",
    why="not listed by core",
)
UPDATE = operation(
    "update",
    BOB,
    "bob",
    before=side("10.8.0.5/32", "10.8.0.77/32"),
    after=side("10.8.0.5/32", keepalive=25),
    preshared_key_changes=True,
    session_id="s-7",
)
ADD = operation(
    "add",
    ALICE,
    "alice\x1b[31m",
    after=side("10.8.0.1/32"),
    preshared_key_changes=True,
    session_id="s-19",
)
OPERATIONS = [REMOVE, UPDATE, ADD]
DRIFT = [
    {
        "kind": "peer_added",
        "public_key": format_key(NOBODY),
        "name": "",
        "detail": "was put on the interface",
    },
    {"kind": "allowed_ips", "public_key": format_key(BOB), "name": "bob", "detail": "has none"},
    {"kind": "listen_port", "public_key": None, "name": "", "detail": "listens on port 1"},
]


def test_it_is_a_diff_in_the_order_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(tmp_path, capsys, operations=OPERATIONS, drift=DRIFT)

    assert text.splitlines() == [
        f"- (no name)  {format_key(NOBODY)}",
        "    why             not listed by core",
        "    allowed ips     10.8.0.99/32",
        "    endpoint        203.0.113.9:51000",
        f"~ bob  {format_key(BOB)}",
        "    allowed ips     10.8.0.5/32, 10.8.0.77/32 → 10.8.0.5/32",
        "    keepalive       off → 25 s",
        "    pre-shared key  (changes)",
        rf"+ alice\x1b[31m  {format_key(ALICE)}",
        "    allowed ips     10.8.0.1/32",
        "    pre-shared key  (set)",
        "    session         s-19",
        "",
        "drift: somebody else has changed",
        f"! {format_key(NOBODY)} was put on the interface (peer_added)",
        f"! bob  {format_key(BOB)} has none (allowed_ips)",
        "! wg0 listens on port 1 (listen_port)",
        "",
        "wg0: 1 to add, 1 to change, 1 to remove",
    ]


def test_nothing_to_do_says_so_of_what_a_plan_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(tmp_path, capsys, epoch="e1") == "wg0: nothing would change of its peers\n"


def test_before_the_first_state_a_plan_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "wg0: core has not been heard yet: nothing would change of its peers\n"
    assert planned(tmp_path, capsys, epoch=None) == told


def test_json_is_the_agents_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(tmp_path, capsys, "--json", operations=OPERATIONS, drift=DRIFT)

    assert json.loads(text) == {"interface": "wg0", "operations": OPERATIONS, "drift": DRIFT}


def shown(*operations: dict[str, Any]) -> list[str]:
    document = {"interface": "wg0", "operations": list(operations), "drift": []}
    to = pipe()
    return printed(to, report(document, to)).splitlines()


def test_who_is_removed_and_added_is_replaced() -> None:
    removed = operation("remove", BOB, "bob", before=side("10.8.0.5/32"), endpoint="192.0.2.1:9")
    added = operation(
        "add", BOB, "bob", after=side("10.8.0.6/32"), preshared_key_changes=True, session_id="s-8"
    )

    lines = shown(removed, ADD, added)

    assert lines[0] == f"-/+ bob  {format_key(BOB)}"
    assert "    replaced        removed and added, so that the keys it has negotiated are void" in lines
    assert "    allowed ips     10.8.0.5/32 → 10.8.0.6/32" in lines
    assert "    pre-shared key  (changes)" in lines
    assert "    session         s-8" in lines
    assert "    endpoint        192.0.2.1:9" in lines
    assert lines[-1] == "wg0: 1 to add, 1 to replace"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(True, True, "(changes)"), (False, True, "(set)"), (True, False, "(cleared)")],
)
def test_of_a_changed_psk_only_that_it_changes_is_told(before: bool, after: bool, told: str) -> None:
    update = operation(
        "update",
        BOB,
        "bob",
        before=side(preshared_key=before),
        after=side(preshared_key=after),
        preshared_key_changes=True,
    )

    assert shown(update)[1:-2] == [f"    pre-shared key  {told}"]


def test_a_cut_peer_is_one_to_remove() -> None:
    assert shown(operation("cut", BOB, "bob", before=side()))[-1] == "wg0: 1 to remove"


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("colours", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, colours: bool) -> None:
    many = operation(
        "update",
        BOB,
        "日本" * 32,
        before=side(*(f"10.9.{n}.0/24" for n in range(40))),
        after=side("10.9.0.0/16"),
        why="refused: prefix_claimed",
    )
    to = terminal(width, colours=colours)

    text = printed(to, report({"interface": "wg0", "operations": [many, *OPERATIONS], "drift": DRIFT}, to))

    assert ("\x1b[" in text) is colours
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(cell_len, plain.splitlines())) <= width
    assert all(f"10.9.{n}.0/24" in plain for n in range(40))


def test_colours_tell_adding_from_removing() -> None:
    to = terminal(80)

    text = printed(to, report({"interface": "wg0", "operations": OPERATIONS, "drift": []}, to))

    signs = dict(re.findall(r"^\x1b\[(\d+)m(.) ", text, re.MULTILINE))
    assert signs == {"31": "-", "33": "~", "32": "+"}


def test_without_the_arrow_in_the_encoding_there_is_an_ascii_one() -> None:
    to = terminal(80, encoding="ascii", colours=False)

    text = printed(to, report({"interface": "wg0", "operations": [UPDATE], "drift": []}, to))

    assert "off -> 25 s" in text


def test_what_the_agent_plans_is_what_is_shown() -> None:
    """From a real plan, of a peer that somebody else has given another prefix, and of one that is missing."""
    state, mirror = State(own_key=OWN_KEY), Mirror()
    listed = (
        peer(1, name="alice", session=grant("s1", 1, granted_at=CORE), persistent_keepalive=25),
        peer(2, name="bob", session=grant("s2", 2, granted_at=CORE)),
    )
    state.load(snapshot(listed), NOW)
    there = observed(1, "10.8.0.1", "10.8.0.66", preshared_key=1, endpoint=Endpoint(b"\xc0\x00\x02\x01", 9))
    mirror.find(device(there))
    wanted = state.wanted(there.public_key, NOW)
    assert isinstance(wanted, DesiredPeer)
    mirror.adopt(there.public_key, wanted.tenure)
    document = plan("wg0", state, mirror, device(there), NOW)
    to = pipe()

    lines = printed(to, report(document, to)).splitlines()

    assert lines == [
        f"~ alice  {format_key(there.public_key)}",
        "    allowed ips     10.8.0.1/32, 10.8.0.66/32 → 10.8.0.1/32",
        "    keepalive       off → 25 s",
        "    endpoint        192.0.2.1:9",
        f"+ bob  {key_of_number(2)}",
        "    allowed ips     10.8.0.2/32",
        "    pre-shared key  (set)",
        "    session         s2",
        "",
        "wg0: 1 to add, 1 to change",
    ]


def key_of_number(number: int) -> str:
    return format_key(number.to_bytes(32, "big"))
