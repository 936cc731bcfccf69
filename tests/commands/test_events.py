from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from agent.__main__ import main
from agent.commands.events import line
from agent.encoding import format_key
from agent.trail import Kind, Subject, Trail
from tests.commands.parts import ALICE, BOB, Agent, an_agent, write_config
from tests.support.builders import columns


def an_eventful_agent() -> Agent:
    agent = Agent(names={ALICE: "alice-laptop", BOB: "bob\x1b[31m"})
    agent.happens(Kind.CORE_FOUND, Subject())
    agent.happens(Kind.GRANTED, Subject(ALICE, "s-1"), Subject(BOB, "s-2"))
    agent.happens(Kind.ENDED, Subject(ALICE, "s-1", "idle"), revision=43)
    agent.happens(Kind.DRIFT, Subject(BOB, None, "preshared_key", "has another pre-shared key"), revision=43)
    return agent


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    path = write_config(folder)
    with an_agent(path, an_eventful_agent()):
        assert main(["events", "-c", str(path), *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_each_occurrence_is_a_line_with_time_whom_why_session_and_revision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [text.split(maxsplit=2)[2] for text in printed(tmp_path, capsys)]
    assert [" ".join(text.split()) for text in lines] == [
        "core_found revision 42",
        f"granted alice-laptop {format_key(ALICE)} session s-1 revision 42",
        rf"granted bob\x1b[31m {format_key(BOB)} session s-2 revision 42",
        f"ended alice-laptop {format_key(ALICE)} idle session s-1 revision 43",
        rf"drift bob\x1b[31m {format_key(BOB)} preshared_key has another pre-shared key revision 43",
    ]


def test_the_last_ones_are_shown_if_so_many_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [text.split()[2] for text in printed(tmp_path, capsys, "-n", "2")] == ["ended", "drift"]


@pytest.mark.parametrize("who", ["alice-laptop", format_key(ALICE)[:8], format_key(ALICE)])
def test_what_concerns_one_peer_can_be_picked_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], who: str
) -> None:
    assert [text.split()[2] for text in printed(tmp_path, capsys, who)] == ["granted", "ended"]


def test_where_nothing_is_known_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (only,) = printed(tmp_path, capsys, "nobody")
    assert "the log goes back further" in only


def test_json_has_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads("\n".join(printed(tmp_path, capsys, "--json", "-n", "2")))
    assert document["interface"] == "wg0"
    assert document["events"][0] == {
        "number": 4,
        "at": "2027-01-15T08:00:00.000Z",
        "event": "ended",
        "public_key": format_key(ALICE),
        "name": "alice-laptop",
        "session_id": "s-1",
        "revision": 43,
        "reason": "idle",
        "detail": None,
    }


@pytest.mark.parametrize("lines", ["-1", "1001", "many"])
def test_a_number_of_lines_that_cannot_be_is_a_usage_error(lines: str) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["events", "-n", lines])
    assert exited.value.code == 2


@pytest.mark.parametrize("width", [80, 100, 139])
def test_on_a_narrow_terminal_keys_are_shortened_to_what_explain_takes(width: int) -> None:
    agent = an_eventful_agent()
    for event in agent.audit.documents(agent.trail.after(0, 9)):
        text = line(event, Console(), width).plain
        assert format_key(ALICE) not in text
        assert "\x1b" not in text
        if event["event"] in {"granted", "ended"}:
            assert len(text) <= 100


def test_a_line_has_only_characters_that_the_terminal_has() -> None:
    agent = Agent(names={ALICE: "Zoë with a name of more than twenty characters"})
    agent.happens(Kind.GRANTED, Subject(ALICE, "s→1"))
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), width=80)
    (event,) = agent.audit.documents(agent.trail.after(0, 9))
    text = line(event, latin, 80).plain
    assert text.encode("latin-1").decode("latin-1") == text
    assert f"Zoë with a name of ~  {format_key(ALICE)[:8]}~  " in text
    assert r"session s\u21921" in text


def test_a_line_has_no_colour_where_there_is_none() -> None:
    agent, written = an_eventful_agent(), io.StringIO()
    console = Console(file=written, no_color=True, width=200, markup=False)
    for event in agent.audit.documents(agent.trail.after(0, 9)):
        console.print(line(event, console, 200))
    assert "\x1b[" not in written.getvalue()


# Following.


@contextmanager
def following(path: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "events", "--follow", "-c", str(path), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    stop = threading.Timer(30, process.kill)
    stop.start()
    assert process.stdout is not None
    try:
        yield process, iter(process.stdout.readline, "")
    finally:
        stop.cancel()
        process.kill()
        process.communicate()


def test_following_shows_what_comes_when_it_comes_until_ctrl_c(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with an_agent(path, an_eventful_agent()) as agent, following(path, "-n", "1") as (process, lines):
        assert "preshared_key" in next(lines)
        agent.happens(Kind.CORE_LOST, Subject(detail="connection refused"))
        assert "core_lost" in next(lines)
        agent.happens(Kind.ENDED, Subject(BOB, "s-2", "core_lost"))
        assert "session s-2" in next(lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_following_as_json_gives_a_document_a_line(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with an_agent(path, an_eventful_agent()) as agent, following(path, "--json", "-n", "0") as (_, lines):
        while not any(asked.startswith("events 5 ") for asked in agent.asked):
            threading.Event().wait(0.05)
        agent.happens(Kind.ENDED, Subject(ALICE, "s-9", "revoked"))
        assert json.loads(next(lines))["session_id"] == "s-9"


def test_following_goes_on_with_the_agent_that_comes_after_a_restart(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with following_across(path) as (first, restarted, lines):
        assert "preshared_key" in next(lines)
        restarted()
        assert "started" in next(lines)
        assert first.asked


@contextmanager
def following_across(path: Path) -> Iterator[tuple[Agent, Callable[[], None], Iterator[str]]]:
    agent = an_eventful_agent()
    with an_agent(path, agent), following(path, "-n", "1") as (_, lines):

        def restart() -> None:
            agent.trail, agent.process = Trail(), "p2"
            agent.happens(Kind.STARTED, Subject(detail="1 peer found, 1 session adopted"))

        yield agent, restart, lines


def test_an_agent_that_is_away_is_waited_for_and_said_once(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    agent = an_eventful_agent()
    with an_agent(path, agent):
        followed = following(path, "-n", "1")
        process, lines = followed.__enter__()
        assert "preshared_key" in next(lines)
    try:
        later = an_eventful_agent()
        later.process = "p2"
        assert process.stderr is not None
        assert "waiting for it" in process.stderr.readline()
        with an_agent(path, later):
            assert "core_found" in next(lines)
    finally:
        followed.__exit__(None, None, None)


def test_what_was_missed_is_said(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    agent = an_eventful_agent()
    agent.trail = Trail(room=10)
    agent.happens(Kind.CORE_FOUND, Subject())
    with an_agent(path, agent), following(path, "-n", "1") as (process, lines):
        assert "core_found" in next(lines)
        agent.trail = crowded = Trail(room=10)
        for number in range(40):
            crowded.add(0.0, Kind.ENDED, number, columns(*[Subject(ALICE, f"s-{number}", "idle")] * 5))
        assert process.stderr is not None
        assert "events were missed" in process.stderr.readline()
        assert "ended" in next(lines)
