from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.encoding import format_key
from tests.commands.documents import some_peers
from tests.commands.parts import ALICE, BOB, NOBODY, Agent, an_agent, peer, wg_agent, write_config
from tests.pictures.drawing import run_in_terminal


def shown(folder: Path, agent: Agent, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    path = write_config(folder)
    with an_agent(path, agent):
        assert main(["status", "-c", str(path), *argv]) == 0
    return capsys.readouterr().out


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_json_is_the_agents_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent([peer(ALICE)])

    assert json.loads(shown(tmp_path, agent, capsys, "--json")) == agent.document()


def test_a_pipe_gets_a_line_for_each_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent([peer(ALICE), peer(BOB, name="bob", state="up")])

    text = shown(tmp_path, agent, capsys)

    assert "\x1b" not in text
    assert "up" in line_with(text, format_key(BOB)).split()
    assert text.index("bob") < text.index("alice-laptop")


PEERS = [
    peer(ALICE, name="alice-laptop", state="up", time_left=50.0, allowed_ips=["10.8.0.5/32"]),
    peer(BOB, name="Bob's phone", time_left=10.0, allowed_ips=["10.8.0.9/32", "fd00:8::9/128"]),
    peer(NOBODY, name="site", state="refused", reason="prefix_claimed", allowed_ips=["10.9.0.0/16"]),
]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ((), ["alice-laptop", "Bob's phone", "site"]),
        (("bob",), ["Bob's phone"]),
        (("10.9.7.1",), ["site"]),
        (("--state", "refused", "--state", "up"), ["alice-laptop", "site"]),
        (("--state", "refused,waiting"), ["Bob's phone", "site"]),
        (("--sort", "left"), ["Bob's phone", "alice-laptop", "site"]),
        (("--sort", "name", "10.0.0.0/8", "--state", "waiting,refused"), ["Bob's phone", "site"]),
        (("alice", "--state", "refused"), []),
    ],
)
def test_peers_are_chosen_and_sorted(
    argv: tuple[str, ...], names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(tmp_path, Agent(PEERS), capsys, *argv)

    order = sorted((name for name in map(name_of, PEERS) if name in text), key=text.index)
    assert order == names
    assert ("of 3 peers" in text) is (len(names) < 3)


def name_of(peer: dict[str, Any]) -> str:
    return str(peer["name"])


def test_json_has_the_chosen_peers_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(PEERS)

    text = shown(tmp_path, agent, capsys, "--json", "--sort", "left", "10.8.0.0/24")

    assert json.loads(text) == {**agent.document(), "peers": [PEERS[1], PEERS[0]]}


@pytest.mark.parametrize("argv", [("carol",), ("carol", "--json"), ("carol", "--watch"), ("10.8.0.77",)])
def test_who_matches_nobody_is_told_so_with_exit_code_1(
    argv: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    with an_agent(path, Agent(PEERS)):
        assert main(["status", "-c", str(path), *argv]) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"no peer answers to '{argv[0]}'" in printed.err


def test_an_interface_in_place_of_a_peer_is_told_where_it_belongs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    with an_agent(path, Agent(PEERS)):
        assert main(["status", "-c", str(path), "wg0"]) == 1

    assert "-i wg0" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("env", "sign", "escapes"),
    [
        ({}, "✗", r"31m"),
        ({"NO_COLOR": "1"}, "✗", r"1m"),
        ({"TERM": "dumb"}, "✗", None),
        ({"TERM": "dumb", "PYTHONIOENCODING": "ascii"}, "x", None),
    ],
)
def test_a_terminal_gets_what_it_can_show(
    env: dict[str, str], sign: str, escapes: str | None, tmp_path: Path
) -> None:
    path = write_config(tmp_path)
    with an_agent(path, Agent(PEERS)):
        argv = [sys.executable, "-m", "agent", "status", "-c", str(path)]
        text = run_in_terminal(argv, 80, env=env)

    used = set(re.findall(r"\x1b\[(.*?m)", text))
    assert (escapes in used) if escapes else not used
    assert ("31m" in used) is (not env)
    row = line_with(re.sub(r"\x1b\[.*?m", "", text), "refused: prefix_claimed")
    assert row.startswith(f"{sign} site")


def test_ten_thousand_peers_cost_little_more_than_the_programs_start(tmp_path: Path) -> None:
    path = write_config(tmp_path)

    def cost(peers: int) -> float:
        with an_agent(path, Agent(some_peers(peers))):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = wg_agent("status", "-c", path)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert len(done.stdout.splitlines()) > peers
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # It is about 0.4 s of the processor for a few and 1 s for ten thousand.
    assert cost(10_000) < 6 * cost(10)


@pytest.fixture
def ctrl_c_counts() -> Iterator[None]:
    """Where the tests run in a shell's background, SIGINT is ignored, and so it is in what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_counts")
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_watch_shows_changes_until_ctrl_c(tmp_path: Path, kind: str) -> None:
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
            env=os.environ | {"TERM": kind, "COLUMNS": "160", "LINES": "40"},
        )
        until(b"first")
        agent.peers = [peer(ALICE, name="second")]
        until(b"second")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    os.close(leader)
    os.close(follower)


def test_watch_into_a_pipe_waits_for_an_agent_that_is_restarted_and_says_so_once(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    argv = [sys.executable, "-m", "agent", "status", "--watch", "--json", "-c", str(path)]
    with an_agent(path, Agent([peer(ALICE, name="before")])):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stop = threading.Timer(40, process.kill)
        stop.start()
        assert process.stdout is not None
        assert process.stderr is not None
        assert "before" in process.stdout.readline()
    assert process.stderr.readline().endswith("; waiting for it\n")
    time.sleep(3)  # it has asked again by then
    with an_agent(path, Agent([peer(ALICE, name="after")])):
        assert any("after" in line for line in process.stdout)
    process.kill()
    stop.cancel()
    assert "waiting" not in process.communicate()[1]
