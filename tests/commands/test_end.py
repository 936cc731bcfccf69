from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.encoding import format_key
from agent.model import PublicKey
from tests.commands.parts import ALICE, BOB, NOBODY, Agent, an_agent, peer, write_config


def listed() -> Agent:
    return Agent([peer(ALICE), peer(BOB)], with_session={ALICE})


def end(folder: Path, agent: Agent, *argv: str) -> int:
    path = write_config(folder)
    with an_agent(path, agent):
        return main(["end", "-c", str(path), *argv])


def test_a_peers_session_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = listed()

    assert end(tmp_path, agent, format_key(ALICE)) == 0
    assert capsys.readouterr().out == f"ended: {format_key(ALICE)}\n"
    assert not agent.with_session


def test_a_listed_peer_without_a_session_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(tmp_path, listed(), format_key(BOB)) == 0
    assert capsys.readouterr().out == f"had no session: {format_key(BOB)}\n"


@pytest.mark.parametrize("key", [NOBODY, PublicKey(bytes(32))])
def test_an_unknown_key_ends_with_1_and_the_known_ones_end(
    key: PublicKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = listed()

    assert end(tmp_path, agent, format_key(key), format_key(ALICE), "--json") == 1
    assert json.loads(capsys.readouterr().out) == {
        "ended": [format_key(ALICE)],
        "without_session": [],
        "unknown": [format_key(key)],
    }
    assert end(tmp_path, agent, format_key(key)) == 1
    assert f"core lists no peer with this key: {format_key(key)}" in capsys.readouterr().out


def test_before_the_first_state_nobody_says_whom_core_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent(about={"epoch": None})

    assert end(tmp_path, agent, format_key(NOBODY)) == 1
    told = "core has not been heard yet, and nobody knows a peer with this key"
    assert capsys.readouterr().out == f"{told}: {format_key(NOBODY)}\n"


def test_all_ends_every_session_without_asking_for_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = listed()

    assert end(tmp_path, agent, "--all") == 0
    assert end(tmp_path, agent, "--all") == 0
    assert capsys.readouterr().out == f"ended: {format_key(ALICE)}\nthere was no session to end\n"
    assert agent.asked == []


@pytest.mark.parametrize(
    "argv", [(), ("--all", format_key(ALICE)), ("alice-laptop",), (format_key(ALICE)[:-2] + "F=",)]
)
def test_what_names_no_key_or_too_much_is_a_usage_error_and_ends_nothing(
    argv: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = listed()

    assert end(tmp_path, agent, *argv) == 2
    assert "wg-agent " in capsys.readouterr().err
    assert agent.with_session == {ALICE}
