from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.commands.status import size, span
from agent.encoding import format_key, format_time
from tests.commands.parts import ALICE, BOB, NOBODY, Agent, an_agent, peer, write_config


def shown(folder: Path, agent: Agent, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    path = write_config(folder)
    with an_agent(path, agent):
        assert main(["status", "-c", str(path), *argv]) == 0
    return capsys.readouterr().out


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_json_is_the_agents_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent([peer(ALICE)])

    assert json.loads(shown(tmp_path, agent, capsys, "--json")) == agent.status()


def test_a_row_shows_session_time_left_handshake_endpoint_traffic_and_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = peer(
        ALICE,
        state="up",
        session_id="s-19",
        time_left=3725.4,
        latest_handshake=format_time(time.time() - 63),
        endpoint="203.0.113.9:51000",
        rx_bytes=1536,
        tx_bytes=3 << 20,
    )

    row = line_with(shown(tmp_path, Agent([up]), capsys), "alice-laptop").split("  ")

    cells = [cell.strip() for cell in row if cell]
    assert cells[:4] == ["alice-laptop", "up", "s-19", "1h02m"]
    assert cells[4] in {"1m03s ago", "1m04s ago", "1m05s ago"}
    assert cells[5:] == ["203.0.113.9:51000", "1.5 KiB", "3.0 MiB", format_key(ALICE)]


def test_peers_are_ordered_by_state_and_a_refused_one_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent(
        [
            peer(ALICE, name="carol", state="refused", reason="prefix_claimed"),
            peer(BOB, name="bob"),
            peer(NOBODY, name="dave", state="up"),
        ],
    )

    text = shown(tmp_path, agent, capsys)

    assert text.index("dave") < text.index("bob") < text.index("carol")
    assert "refused: prefix_claimed" in line_with(text, "carol")
    assert "never" in line_with(text, "bob")
    assert "1 up, 1 waiting, 1 refused" in text


def test_health_is_told_with_its_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {
        "core_connected": False,
        "core_error": "core refuses the token (401)",
        "journal_ok": False,
        "device_error": "wg0 is gone",
        "expiry_late": True,
        "reap_backlog": 7,
    }

    text = shown(tmp_path, Agent(about=about), capsys)

    assert "wg0: core unreachable, epoch b7e1 revision 42" in text
    assert "core: core refuses the token (401)" in text
    assert "journal can't be written" in text
    assert "interface: wg0 is gone" in text
    assert "past their deadline are still on the interface" in text
    assert "7 peers are cut" in text


def test_an_agent_without_a_state_yet_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"epoch": None, "revision": None, "mfa_required": None, "location": None}

    assert "no state from core yet" in shown(tmp_path, Agent(about=about), capsys)


def test_names_can_neither_style_nor_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = Agent(
        [peer(ALICE, name="[red]x[/red]\x1b]0;t\x07\u202e", session_id="[b]\x9b")], {"location": "\x1b[2J"}
    )

    text = shown(tmp_path, agent, capsys)

    assert r"[red]x[/red]\x1b]0;t\x07\u202e" in text
    assert r"[b]\x9b" in text
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)


def test_watch_shows_changes_until_ctrl_c(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    agent = Agent([peer(ALICE, name="first")])
    leader, follower = pty.openpty()
    seen = b""

    def until(word: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 20
        while word not in seen and time.monotonic() < end:
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536)
        assert word in seen

    with an_agent(path, agent):
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "status", "--watch", "-c", str(path)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
        )
        until(b"first")
        agent.peers = [peer(ALICE, name="second")]
        until(b"second")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    os.close(leader)
    os.close(follower)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (185, "3m05s"), (8_050, "2h14m"), (273_700, "3d04h")]
)
def test_a_span_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB"), (1 << 63, "8192.0 PiB")],
)
def test_a_size_has_the_unit_that_leaves_few_digits(count: int, text: str) -> None:
    assert size(count) == text
