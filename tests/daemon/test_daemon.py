"""The daemon as a process: what the service manager, signals and a second agent see of it."""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from agent.wireguard.userspace import socket_path
from tests.support.netns import Pinger
from tests.support.scenarios import revoke
from tests.support.site import GATEWAY_ADDRESS, Site, until

userspace = pytest.mark.userspace


class Manager:
    """A service manager's notify socket, and the agent that is told of it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.told: list[str] = []
        self._path = site.folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        self._socket.bind(str(self._path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def start(self, **environment: str) -> "subprocess.Popen[bytes]":
        """Start the agent; it is not waited for."""
        with self.site.log.open("ab") as log:
            argv = (sys.executable, "-m", "agent", "run", "-c", str(self.site.config))
            env = {**os.environ, "NOTIFY_SOCKET": str(self._path), **environment}
            self.site.process = self.site.gateway.popen(*argv, stderr=log, env=env)
        return self.site.process

    def wait(self, wanted: str, timeout: float = 40.0) -> list[str]:
        """Read until a message has this line; return the messages since the last call, it among them."""
        since: list[str] = []
        end = time.monotonic() + timeout
        while not since or wanted not in since[-1].splitlines():
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{wanted} was not told, but {since}")
            since.append(self._socket.recv(4096).decode())
        self.told += since
        return since


@contextlib.contextmanager
def managed(folder: Path, **members: Any) -> Iterator[tuple[Site, Manager]]:
    with Site(folder, **members) as site, Manager(site) as manager:
        yield site, manager


def http(site: Site, path: str) -> tuple[int, str]:
    """Status and body of the agent's own HTTP."""
    fetch = (
        "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9586, timeout=5); "
        f"c.request('GET', '{path}'); r = c.getresponse(); print(r.status, r.read().decode())"
    )
    status, _, body = site.gateway.run("python3", "-c", fetch).stdout.partition(" ")
    return int(status), body.strip()


def last_log(site: Site, event: str) -> dict[str, Any]:
    return until(lambda: site.logged(event), what=f"the log line {event!r}")[-1]


@userspace
def test_what_the_manager_the_operator_and_the_signals_see(tmp_path: Path) -> None:
    with managed(tmp_path) as (site, manager):
        client, *_ = site.add_clients(2)
        process = manager.start()

        # Start: ready once the first state is in, then fed with every tick.
        before = manager.wait("READY=1")
        assert "STATUS=core connected, 0 peers up, 0 sessions" in before[-1].splitlines()
        assert http(site, "/healthz")[0] == 200
        assert http(site, "/readyz")[0] == 200
        manager.wait("WATCHDOG=1", timeout=3)
        manager.wait("WATCHDOG=1", timeout=3)
        site.grant(client)
        manager.wait("STATUS=core connected, 1 peers up, 1 sessions", timeout=5)

        # One agent for each interface.
        second = site.gateway.run(sys.executable, "-m", "agent", "run", "-c", str(site.config), check=False)
        assert second.returncode == 1
        assert f"process {process.pid}" in second.stderr

        # A reload takes what is live and names the rest.
        good = site.config.read_text()
        site.config.write_text(
            good.replace('level = "debug"', 'level = "info"').replace(
                "[paths]", "[push]\nmax_body = 7\n[paths]"
            )
        )
        process.send_signal(signal.SIGHUP)
        told = manager.wait("READY=1", timeout=5)
        reloading = [message for message in told if message.startswith("RELOADING=1\nMONOTONIC_USEC=")]
        assert len(reloading) == 1
        reloaded = last_log(site, "configuration reloaded")
        assert (reloaded["changed"], reloaded["needs_restart"]) == (["log.level"], ["push.max_body"])

        # One that can't be used changes nothing, and the reload ends all the same.
        site.config.write_text(good + "[nonsense]\n")
        process.send_signal(signal.SIGHUP)
        manager.wait("READY=1", timeout=5)
        assert "nonsense" in str(last_log(site, "configuration not reloaded, the old one stays"))
        site.config.write_text(good)

        # Core goes and comes.
        site.core.kill()
        manager.wait("STATUS=core unreachable, 1 peers up, 1 sessions", timeout=10)
        status, why = http(site, "/readyz")
        assert (status, "unreachable" in why) == (503, True)
        assert http(site, "/healthz")[0] == 200
        site.core.start()
        manager.wait("STATUS=core connected, 1 peers up, 1 sessions", timeout=40)
        assert http(site, "/readyz")[0] == 200

        # Stop: tunnels stay up.
        assert site.stop_agent() == 0
        manager.wait("STOPPING=1", timeout=1)
        assert set(site.shown()) == {client.public_key}
        assert not [line for line in site.log.read_text().splitlines() if "Traceback" in line]


@contextlib.contextmanager
def keeping_its_peers(interface: str) -> Iterator[None]:
    """The interface's wireguard-go does all it is asked for, but removes nobody."""
    path = socket_path(interface)
    aside = path.with_suffix(".aside")

    class Refusing(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = b""
            while not request.endswith(b"\n\n"):
                if not (line := self.rfile.readline()):
                    return  # somebody who looks whether anybody listens
                request += line
            if b"remove=true\n" in request:
                self.wfile.write(b"errno=%d\n\n" % errno.EBUSY)
                return
            with socket.socket(socket.AF_UNIX) as device:
                device.connect(str(aside))
                device.sendall(request)
                answer = b""
                while not answer.endswith(b"\n\n"):
                    answer += device.recv(65536)
            self.wfile.write(answer)

    stand_in = path.with_suffix(".stand-in")
    with socketserver.ThreadingUnixStreamServer(str(stand_in), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, name="wireguard-go's stand-in")
        thread.start()
        path.rename(aside)
        stand_in.rename(path)
        try:
            yield
        finally:
            aside.rename(path)
            server.shutdown()
            thread.join()


@userspace
def test_a_gateway_that_can_not_end_access_is_not_ready_and_says_so(tmp_path: Path) -> None:
    fault = "peers that have to go are still on the interface: 1"
    with managed(tmp_path) as (site, manager):
        one, other = site.add_clients(2)
        manager.start(WG_AGENT_INTERFACE__BACKEND="userspace")
        manager.wait("READY=1")
        site.grant(one)
        site.grant(other)
        manager.wait("STATUS=core connected, 2 peers up, 2 sessions", timeout=10)

        with keeping_its_peers(site.interface):
            revoke(site, one)
            manager.wait(f"STATUS=core connected, 2 peers up, 1 sessions; {fault}", timeout=20)
            assert http(site, "/readyz") == (503, fault)
            assert http(site, "/healthz")[0] == 200
            assert set(site.shown()) == {one.public_key, other.public_key}

        manager.wait("STATUS=core connected, 1 peers up, 1 sessions", timeout=20)
        assert http(site, "/readyz") == (200, "ok")
        assert set(site.shown()) == {other.public_key}


@userspace
def test_a_killed_agent_adopts_its_peers_also_while_core_is_dead(tmp_path: Path) -> None:
    with managed(tmp_path) as (site, manager):
        client, other = site.add_clients(2)
        manager.start()
        manager.wait("READY=1")
        site.attach(client)
        _, psk = site.grant(client)
        site.grant(other)
        site.connect(client, psk)
        assert client.space is not None
        with Pinger(client.space, GATEWAY_ADDRESS) as ping:
            ping.wait_reply(20)
            shaken = site.shown()[client.public_key]
            site.kill_agent()
            manager.start()
            manager.wait("READY=1")
            ping.wait_reply()
            adopted = site.shown()[client.public_key]
            assert adopted["handshake"] == shaken["handshake"]
            assert int(adopted["rx"]) > int(shaken["rx"])

            # Core is dead at the start: ready after adoption, and not for traffic to be sent to it.
            site.core.kill()
            site.kill_agent()
            manager.start()
            ready = manager.wait("READY=1")
            assert "STATUS=core unreachable, 2 peers up, 2 sessions" in ready[-1].splitlines()
            status, why = http(site, "/readyz")
            assert (status, "unreachable" in why) == (503, True)
            assert last_log(site, "started")["sessions_adopted"] == 2
            ping.wait_reply()
            assert site.shown()[client.public_key]["handshake"] == shaken["handshake"]
            reported = site.status()
            assert reported["epoch"] is None
            assert [p["state"] for p in reported["peers"]] == ["up", "up"]
        assert ping.lost == 0
        assert int(site.peer(client)["rx_bytes"]) >= int(shaken["rx"])
        site.core.start()
        until(lambda: http(site, "/readyz")[0] == 200, what="readiness")
        assert set(site.shown()) == {client.public_key, other.public_key}
        process = site.process
        assert process is not None
        # Undumpable: what is in its memory is nobody's business.
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        core_limit = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core_limit.split()[4:6] == ["0", "0"]
        for file in (tmp_path / "state").iterdir():
            assert file.stat().st_mode & 0o077 == 0, file
            assert psk.encode() not in file.read_bytes()
        assert psk not in site.log.read_text()


@userspace
def test_a_reload_before_the_start_is_done_is_not_taken_for_its_end(tmp_path: Path) -> None:
    with managed(tmp_path) as (site, manager), socket.socket(socket.AF_UNIX) as silent:
        # A core that takes connections and says nothing.
        site.core.kill()
        path = site.folder / "core.sock"
        path.unlink(missing_ok=True)
        silent.bind(str(path))
        silent.listen(8)
        process = manager.start(WG_AGENT_CORE__TIMEOUT="5")
        until(lambda: site.logged("started"), what="the start")
        assert http(site, "/readyz") == (503, "starting")
        process.send_signal(signal.SIGHUP)
        last_log(site, "configuration reloaded")
        told = manager.wait("WATCHDOG=1", timeout=3)
        assert not [message for message in told if "READY=1" in message]
        manager.wait("READY=1", timeout=20)  # core.timeout


CONFIG = """
[core]
url = "http://127.0.0.1:1/"
token_file = "{folder}/token"
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
"""


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("[core.nonsense]\n", "nonsense"),
        ("[interface]\nname = 'a name'\n", "interface.name"),
        ("", "token"),
        ("not toml", "agent.toml"),
    ],
    ids=["unknown key", "bad value", "no token file", "no toml"],
)
def test_a_bad_configuration_exits_with_2_and_touches_nothing(tmp_path: Path, more: str, named: str) -> None:
    tmp_path.chmod(0o700)
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(folder=tmp_path) + more)
    ended = subprocess.run(
        [sys.executable, "-m", "agent", "run", "-c", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "wg0.sock").exists()


def test_json_lines_are_logged_one_object_each(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    config = tmp_path / "agent.toml"
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length")
    token.chmod(0o600)
    config.write_text(
        CONFIG.format(folder=tmp_path)
        + '[interface]\nbackend = "userspace"\nuserspace_program = "no-such-program"\n'
        + '[http]\nlisten = "127.0.0.1:0"\n[log]\nformat = "json"\n'
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "agent", "run", "-c", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert lines[-1]["event"] == "can't run"
    assert "a-token-of-some-length" not in ended.stderr


@userspace
def test_an_agent_that_is_told_to_stop_while_it_starts_does_not_wait_for_what_does_not_answer(
    tmp_path: Path,
) -> None:
    with managed(tmp_path) as (site, manager):
        wireguard = site.gateway.popen("wireguard-go", "-f", site.interface)
        # The link is there before the socket is, and without that it would be no WireGuard interface.
        asks = ("wg", "show", site.interface)
        until(lambda: site.gateway.run(*asks, check=False).returncode == 0, what="wireguard-go's answer")
        wireguard.send_signal(signal.SIGSTOP)
        try:
            process = manager.start()
            until(lambda: site.logged("interface found"), 40, "the agent's look at the interface")
            time.sleep(1)
            assert not site.logged("started")
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(25) == 0
            assert time.monotonic() - began < 20
        finally:
            wireguard.kill()
            wireguard.wait()
    assert site.logged("stopped, tunnels stay up")


HANGS = """
import asyncio, sys, time
from agent import daemon
from agent.core.http import CoreClient
from agent.__main__ import main

async def close(self):
    asyncio.create_task(asyncio.to_thread(time.sleep, 60))
    await asyncio.sleep(0.1)

daemon._END = 3.0
CoreClient.close = close
sys.exit(main(sys.argv[1:]))
"""


@userspace
def test_an_agent_that_is_told_to_stop_ends_also_if_a_thread_does_not(tmp_path: Path) -> None:
    with managed(tmp_path) as (site, manager):
        argv = (sys.executable, "-c", HANGS, "run", "-c", str(site.config))
        with site.log.open("ab") as log:
            site.process = site.gateway.popen(
                *argv, stderr=log, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
            )
        manager.wait("READY=1")
        began = time.monotonic()
        site.process.send_signal(signal.SIGTERM)
        assert site.process.wait(20) == 1
        assert 2.5 < time.monotonic() - began < 15
        assert site.interface in site.gateway.links()
    assert site.logged("the agent did not stop in time, it ends now")
