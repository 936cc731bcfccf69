"""The real agent beside ``wg``, on interfaces of this network namespace."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.encoding import format_key
from tests.bench.generator import GeneratorCore
from tests.bench.manager import Manager
from tests.bench.peers import BenchPeer, Population, setconf
from tests.reliability.pushing import PATH, push_secret, signed
from tests.support.netns import Namespace, interface_name
from tests.support.zygote import ForkedProcess, Zygote

PUSH_PORT = 9587
METRICS_PORT = 9586


class Here(Namespace):
    """The namespace of this process."""

    def argv(self, *argv: str) -> list[str]:
        return list(argv)

    def ip(self, *argv: str) -> str:
        return sh("ip", *argv)


def sh(*argv: str, stdin: str | None = None, timeout: float = 1200.0) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def timed(*argv: str, stdin: str | None = None) -> float:
    """How long a command takes, in seconds; what it prints is thrown away."""
    data = None if stdin is None else stdin.encode()
    began = time.monotonic()
    subprocess.run(argv, input=data, stdout=subprocess.DEVNULL, check=True, timeout=1200)
    return time.monotonic() - began


def make_link(name: str) -> None:
    """A WireGuard interface, by the kernel or else by wireguard-go."""
    try:
        sh("ip", "link", "add", name, "type", "wireguard")
    except RuntimeError:
        sh("wireguard-go", name)


def remove_link(name: str) -> None:
    """Its peers first: a kernel's link that goes with them takes 17 ms for each."""
    with contextlib.suppress(RuntimeError):
        sh("wg", "syncconf", name, "/dev/null")
        sh("ip", "link", "delete", name)


@contextmanager
def plain(population: Population, port: int = 0) -> Iterator[tuple[str, bytes]]:
    """An interface that only ``wg`` writes to, up and with a private key: its name and the key."""
    name, key = interface_name(), population.private_key()
    make_link(name)
    try:
        sh("wg", "set", name, "private-key", "/dev/stdin", "listen-port", str(port), stdin=format_key(key))
        sh("ip", "link", "set", name, "up")
        yield name, key
    finally:
        remove_link(name)


def write_setconf(folder: Path, key: bytes, peers: Sequence[BenchPeer]) -> str:
    """The file for ``wg setconf``; its path."""
    path = folder / "wg.conf"
    path.write_text(setconf(key, 0, peers))
    return str(path)


class Gateway:
    """One agent after another on one interface, and the core that they follow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.core = GeneratorCore(folder / "core.sock")
        self.interface = interface_name()
        self.process: ForkedProcess | None = None
        self.log = folder / "agent.log"
        self._secret = push_secret()
        self._manager = Manager(folder / "notify")
        self._zygote = Zygote(Here(""), folder)

    def __enter__(self) -> Self:
        self.core.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.log.exists():
            print(self.log.read_text()[-3000:])
        self.reset()
        self._zygote.close()
        self.core.close()
        self._manager.close()

    def configure(self, *, interval: float = 3600, per_peer: bool = False) -> None:
        """Write the agent's configuration; ``interval`` between two looks, in seconds."""
        for name, text in (("token", "bench-token"), ("push.secret", self._secret)):
            path = self.folder / name
            path.write_text(text)
            path.chmod(0o600)
        (self.folder / "agent.toml").write_text(
            f"""
[interface]
name = "{self.interface}"
listen_port = 51820
[core]
url = "{self.core.url}"
token_file = "{self.folder}/token"
max_body = 268435456
poll_interval = 1
[sessions]
idle_timeout = 86400
connect_timeout = 86400
[stats]
interval = {interval}
[push]
listen = "127.0.0.1:{PUSH_PORT}"
secret_file = "{self.folder}/push.secret"
[http]
listen = "127.0.0.1:{METRICS_PORT}"
[metrics]
per_peer = {"true" if per_peer else "false"}
[paths]
state = "{self.folder}/state"
runtime = "{self.folder}/run"
[log]
format = "json"
"""
        )

    def start(self, timeout: float = 300.0) -> float:
        """Fork an agent, which has imported everything; the seconds until it says READY=1."""
        began = time.monotonic()
        self.process = self._zygote.fork(["run", "-c", str(self.folder / "agent.toml")], self.log)
        ready = self._manager.wait_ready(began, timeout)
        if ready is None:
            raise TimeoutError(f"the agent was not ready in {timeout} s")
        return ready - began

    def kill(self) -> None:
        """SIGKILL: interface, table and journal stay."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(60)
            self.process = None
            self.core.wait_no_stream()

    def reset(self) -> None:
        """Kill the agent, and leave nothing of what it made."""
        self.kill()
        remove_link(self.interface)
        with contextlib.suppress(RuntimeError):
            sh("nft", "delete", "table", "inet", f"wg_agent_{self.interface}")
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def cpu(self) -> float:
        """Seconds of processor time that the agent has taken; its ticks are in it."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The value of one series."""
        connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return float(next(line for line in lines if line.startswith(f"{name} ")).rpartition(" ")[2])


class Pusher:
    """Core's pushes, over one connection: the figure is not to be that of connecting."""

    def __init__(self, gateway: Gateway) -> None:
        self._secret = gateway._secret
        self._core = gateway.core
        self._connection = http.client.HTTPConnection("127.0.0.1", PUSH_PORT, timeout=60)

    def push(self, kind: str, data: dict[str, Any]) -> float:
        """Push the next revision; the seconds until it was answered, in the kernel."""
        core = self._core
        core.revision += 1
        changes = [{"id": f"bench:{core.revision}", "type": kind, "data": data}]
        body = json.dumps({"location": "1", "changes": changes}).encode()
        headers = signed(self._secret, body)
        self._connection.connect() if self._connection.sock is None else None
        assert self._connection.sock is not None
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.monotonic()
        self._connection.request("POST", PATH, body, headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        took = time.monotonic() - began
        if response.status != 200 or answer["refused"]:
            raise RuntimeError(f"a push was answered {response.status}: {answer}")
        return took
