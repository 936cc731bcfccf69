from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.control import ControlClient, bind_control, control_app
from agent.encoding import format_key
from agent.errors import AgentError, ConfigError, DeviceError
from agent.model import PublicKey
from agent.server import serve

KEY = PublicKey(bytes(range(32)))


class Daemon:
    """An operator's port that remembers what it was asked."""

    def __init__(self) -> None:
        self.ended: list[Sequence[PublicKey] | None] = []
        self.waiting = 0
        self.listed: Sequence[str] = ()

    async def status(self) -> dict[str, Any]:
        return {"interface": "wg0", "peers": [{"name": name} for name in self.listed]}

    async def plan(self) -> dict[str, Any]:
        raise DeviceError("wg0 is gone", "see dmesg")

    def explain(self, what: str) -> dict[str, Any]:
        return {"asked": what, "peers": []}

    async def events(
        self, after: int | None, limit: int, wait: float, process: str | None = None, who: str | None = None
    ) -> dict[str, Any]:
        self.waiting += 1
        try:
            await asyncio.sleep(wait)
        finally:
            self.waiting -= 1
        return {"asked": [after, limit, wait, process, who], "events": []}

    async def end(self, keys: Sequence[PublicKey] | None) -> dict[str, Any]:
        self.ended.append(keys)
        return {"ended": [] if keys is None else [format_key(key) for key in keys]}


def asked(path: Path, ask: Callable[[], Any], daemon: Daemon | None = None) -> Any:
    """Run the app on a real socket, and the (blocking) client beside it in a thread."""

    async def main() -> Any:
        sock = bind_control(path)
        task = asyncio.create_task(serve(control_app(daemon or Daemon()), sock))
        try:
            return await asyncio.to_thread(ask)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return asyncio.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "wg0.sock"


def test_a_client_waits_where_the_queue_is_full_and_says_so_if_it_stays_full(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as full, contextlib.ExitStack() as stack:
        full.bind(os.fspath(path))
        full.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(os.fspath(path))
        with pytest.raises(AgentError, match="does not answer"):
            ControlClient(path, timeout=0.2).status()

        def serve_late() -> None:
            with full.accept()[0], full.accept()[0] as client:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        threading.Timer(0.3, serve_late).start()
        assert ControlClient(path, timeout=10).status() == {}


def test_status_is_the_daemons_document(path: Path) -> None:
    assert asked(path, ControlClient(path).status) == {"interface": "wg0", "peers": []}


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 3500])
def test_of_many_peers_each_is_in_the_status_once_and_in_order(path: Path, count: int) -> None:
    daemon = Daemon()
    daemon.listed = [f"peer {number}" for number in range(count)]

    document = asked(path, ControlClient(path).status, daemon)

    assert [peer["name"] for peer in document["peers"]] == daemon.listed


def test_while_a_long_status_is_written_others_have_their_turn(path: Path) -> None:
    daemon, turns, seen = Daemon(), itertools.count(), []
    daemon.listed = [f"peer {number}" for number in range(5000)]

    async def others() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            seen.append(next(turns))

    async def main() -> None:
        beside = asyncio.create_task(others())
        scope = {"type": "http", "method": "GET", "path": "/status", "query_string": b"", "headers": []}
        await control_app(daemon)(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
        beside.cancel()

    asyncio.run(main())
    assert len(seen) >= 5
    assert all(later > earlier + 1 for earlier, later in itertools.pairwise(seen[1:-1]))


def test_explain_takes_any_text(path: Path) -> None:
    for what in ("10.8.0.0/24", "Zoë & Max?", format_key(KEY)):
        ask = functools.partial(ControlClient(path).explain, what)
        assert asked(path, ask)["asked"] == what


def test_events_are_asked_for_from_a_number_on(path: Path) -> None:
    assert asked(path, lambda: ControlClient(path).events())["asked"] == [None, 1000, 0.0, None, None]
    assert asked(path, lambda: ControlClient(path).events(7, 5, 0.1, "p1", "bob"))["asked"] == [
        *(7, 5, 0.1),
        *("p1", "bob"),
    ]


def test_nobody_waits_for_news_in_place_of_a_client_that_has_gone(path: Path) -> None:
    daemon = Daemon()

    def ask_and_go() -> int:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(path))
                client.sendall(b"GET /events?wait=20 HTTP/1.1\r\nHost: agent\r\n\r\n")
                until = time.monotonic() + 5
                while not daemon.waiting and time.monotonic() < until:
                    time.sleep(0.01)
                assert daemon.waiting
            until = time.monotonic() + 5
            while daemon.waiting and time.monotonic() < until:
                time.sleep(0.01)
        return daemon.waiting

    assert asked(path, ask_and_go, daemon) == 0


@pytest.mark.parametrize(
    "target",
    [
        "/explain",
        "/explain?what=",
        "/events?after=-1",
        "/events?after=x",
        "/events?limit=0",
        "/events?limit=1001",
        "/events?wait=26",
        "/events?wait=nan",
        "/events?follow=1",
    ],
)
def test_a_malformed_question_is_answered_with_what_to_send(path: Path, target: str) -> None:
    def ask() -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            return client.get(f"http://agent{target}")

    answer = asked(path, ask)
    assert (answer.status_code, "send ?" in answer.json()["hint"]) == (400, True)


def test_end_takes_keys_or_all(path: Path) -> None:
    daemon, client = Daemon(), ControlClient(path)

    assert asked(path, lambda: client.end([KEY]), daemon) == {"ended": [format_key(KEY)]}
    asked(path, lambda: client.end(None), daemon)

    assert daemon.ended == [[KEY], None]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"all": false}',
        b'{"all": true, "keys": []}',
        b'{"keys": ["x"]}',
        b'{"keys": [1]}',
        b'{"all": true, "other": 1}',
        b'{"keys": null}',
        b"\xff",
    ],
)
def test_a_malformed_end_ends_nothing(path: Path, body: bytes) -> None:
    daemon = Daemon()

    def ask() -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://agent") as client:
            return client.post("/end", content=body)

    answer = asked(path, ask, daemon)

    assert answer.status_code == 400
    assert answer.json()["error"]
    assert daemon.ended == []


def test_ending_is_no_get(path: Path) -> None:
    def ask() -> int:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://agent") as client:
            return client.get("/end").status_code

    assert asked(path, ask) == 405


def test_what_the_daemon_cannot_do_is_said_with_the_remedy(path: Path) -> None:
    with pytest.raises(AgentError) as caught:
        asked(path, ControlClient(path).plan)

    assert (caught.value.message, caught.value.hint) == ("wg0 is gone", "see dmesg")


def test_no_agent_is_said(path: Path) -> None:
    client = ControlClient(path)
    with pytest.raises(AgentError, match=r"No such file.*systemctl status wg-agent@wg0"):
        client.status()

    bind_control(path).close()
    with pytest.raises(AgentError, match="refused"):
        client.status()


def test_an_agent_that_hangs_is_said(path: Path) -> None:
    with bind_control(path), pytest.raises(AgentError, match="does not answer"):
        ControlClient(path, timeout=0.2).status()


def test_who_asks_what_is_known_is_told_sooner_that_the_agent_hangs_than_who_waits_for_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.control._ANSWER", 0.2)
    path = tmp_path / "wg0.sock"
    client = ControlClient(path, timeout=2.0)

    def waited(ask: Callable[[], object]) -> float:
        began = time.monotonic()
        with pytest.raises(AgentError, match="does not answer"):
            ask()
        return time.monotonic() - began

    with bind_control(path):
        for ask in (client.status, functools.partial(client.explain, "bob")):
            assert waited(ask) < 2.0
        for ask in (client.plan, functools.partial(client.end, None)):
            assert waited(ask) >= 2.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"rubbish\r\n\r\n", "is not the agent"),
        (b"HTTP/1.1 200 OK\r\n\r\nrubbish", "is not the agent"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "is not the agent"),
        (b"", "closed connection without response"),
    ],
)
def test_an_answer_that_is_not_the_agents_is_said(path: Path, answer: bytes, said: str) -> None:
    def other(sock: socket.socket) -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with bind_control(path) as sock:
        sock.setblocking(True)
        thread = threading.Thread(target=other, args=(sock,))
        thread.start()
        with pytest.raises(AgentError, match=said):
            ControlClient(path).status()
        thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_told_to_be_root(tmp_path: Path) -> None:
    path = tmp_path / "run" / "wg0.sock"
    with bind_control(path):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.setuid(65534)
                try:
                    ControlClient(path).status()
                except AgentError as error:
                    os._exit(0 if "run as root" in str(error) else 1)
            os._exit(2)

        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_socket_is_its_owners_alone(path: Path) -> None:
    before = os.umask(0o022)
    try:
        with bind_control(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_socket_left_behind_is_replaced_and_a_file_is_not(path: Path) -> None:
    bind_control(path).close()
    bind_control(path).close()
    path.unlink()
    path.write_text("precious")

    with pytest.raises(ConfigError, match="remove what is in its place"):
        bind_control(path)

    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        bind_control(tmp_path / ("x" * 100) / "wg0.sock")


def test_a_folder_that_others_may_write_to_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o770)

    with pytest.raises(ConfigError, match="others may write"):
        bind_control(path)
