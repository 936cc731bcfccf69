"""A whole site for end-to-end tests: a gateway and clients in namespaces, a real core, the real agent.

The core runs in a thread of the test's process and is reached over a unix socket, which knows no
namespaces; the agent is a process in the gateway's namespace.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from agent.control import ControlClient
from agent.curve25519 import public_key
from agent.encoding import format_key
from agent.errors import AgentError
from agent.sandbox.core import Core
from agent.sandbox.sessions import Session
from tests.support.client import Client
from tests.support.core_thread import CoreThread
from tests.support.netns import Network, interface_name
from tests.support.zygote import ForkedProcess, Zygote

T = TypeVar("T")
PORT = 51820
GATEWAY_ADDRESS = "10.8.0.1"


def until(condition: Callable[[], T], timeout: float = 30.0, what: str = "it") -> T:
    """Wait for a true value and return it; what raises AgentError is not there yet."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(AgentError):
            if value := condition():
                return value
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about in {timeout} s")
        time.sleep(0.05)


class Site:
    """Leave the block and all of it is gone."""

    def __init__(
        self,
        folder: Path,
        *,
        mfa_required: bool = True,
        stats_interval: int = 1,
        agent: str = "",
        core: dict[str, object] | None = None,
        location: dict[str, object] | None = None,
        forked: bool = False,
    ) -> None:
        """``agent`` is TOML appended to the agent's configuration, ``core`` keys of the core's.

        ``forked``: agents are forked from one parent, and ``zygote.clocks`` moves theirs.
        """
        self.folder = folder
        folder.chmod(0o700)
        self.network = Network()
        self.gateway = self.network.namespace("gateway")
        self.interface = interface_name()
        self.core_ahead = 0.0
        """Seconds by which core's clock is ahead of this machine's."""
        self.core = CoreThread(folder, clock=lambda: time.time() + self.core_ahead, **(core or {}))
        self.cables = "10.200"
        """The first two octets of the networks between clients and the gateway."""
        self.core_url = ""
        """Where the agent is to find core; empty: at the core itself."""
        self.config = folder / "agent.toml"
        self.process: subprocess.Popen[bytes] | ForkedProcess | None = None
        self.zygote = Zygote(self.gateway, folder) if forked else None
        self.log = folder / "agent.log"
        self._location: dict[str, object] = {
            "mfa_required": mfa_required,
            "addresses": [f"{GATEWAY_ADDRESS}/16"],
            "listen_port": PORT,
            **(location or {}),
        }
        self._agent_config = agent
        self._stats_interval = stats_interval

    def __enter__(self) -> Self:
        self.core.start()
        self.core.call(self.core.admin.add_location("hq", **self._location))
        token = self.folder / "token"
        token.write_text(self.core.service.gateway_token)
        token.chmod(0o600)
        self.config.write_text(
            f"""
[interface]
name = "{self.interface}"
[core]
url = "{self.core_url or self.core.service.gateway_url}"
token_file = "{token}"
poll_interval = 1
[stats]
interval = {self._stats_interval}
[paths]
state = "{self.folder}/state"
runtime = "{self.folder}/run"
[http]
listen = "127.0.0.1:9586"
[log]
level = "debug"
format = "json"
{self._agent_config}
"""
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.log.exists():
            print(self.log.read_text()[-6000:])
        self.stop_agent()
        if self.zygote is not None:
            self.zygote.close()
        self.network.close()
        self.core.close()

    # The agent.

    def start_agent(self, *, ready: bool = True, timeout: float = 120.0) -> None:
        """Start the agent; with ``ready``, wait until its first state is in the kernel."""
        self.fork_agent()
        until(self.status, timeout, "the agent's socket")
        if ready:
            until(lambda: self.status()["epoch"], timeout, "the first state")

    def fork_agent(self) -> None:
        """Start the agent and wait for nothing."""
        run = ("run", "-c", str(self.config))
        if self.zygote is not None:
            self.process = self.zygote.fork([*run], self.log)
        else:
            with self.log.open("ab") as log:
                self.process = self.gateway.popen(sys.executable, "-m", "agent", *run, stderr=log)

    def kill_agent(self) -> None:
        """SIGKILL."""
        self._end_agent(signal.SIGKILL)

    def stop_agent(self) -> int:
        """SIGTERM; the exit code."""
        return self._end_agent(signal.SIGTERM)

    def _end_agent(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            if self.zygote is not None:
                process.send_signal(signal.SIGUSR1)
                time.sleep(2)
                print(self.log.read_text()[-12000:])
            process.kill()
            process.wait()
            raise

    def status(self) -> dict[str, Any]:
        """``wg-agent status --json``, without the program."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(
                f"the agent ended with {self.process.returncode}: {self.log.read_text()[-3000:]}"
            )
        return ControlClient(self.folder / "run" / f"{self.interface}.sock").status()

    def peer(self, client: Client) -> dict[str, Any]:
        """The peer's entry in the status."""
        return next(p for p in self.status()["peers"] if p["public_key"] == client.public_key)

    def end(self, client: Client) -> dict[str, Any]:
        """``wg-agent end KEY``."""
        raw = public_key(client.private_key)
        return ControlClient(self.folder / "run" / f"{self.interface}.sock").end([raw])

    def metrics(self) -> str:
        """What a scrape of the agent gives."""
        url = "http://127.0.0.1:9586/metrics"
        fetch = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=20).read().decode(), end='')"
        return self.gateway.run("python3", "-c", fetch).stdout

    def metric(self, name: str) -> float:
        """The value of one series."""
        lines = self.metrics().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The agent's log lines of one event."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]

    # Clients.

    def add_clients(self, count: int, **members: object) -> list[Client]:
        """Register devices at core."""
        return self.core.register([f"device-{i}" for i in range(count)], **members)

    def add_strangers(self, count: int, *, lifetime: float = 0) -> set[str]:
        """Register devices that nobody has the private key of, each with a session; their keys."""
        keys = [format_key(os.urandom(32)) for _ in range(count)]
        wanted = [{"location": "hq", "name": f"stranger-{i}", "public_key": k} for i, k in enumerate(keys)]
        self.core.call(self.core.admin.add_devices(wanted), timeout=600)

        def grant(core: Core) -> None:
            location = core.directory.location("hq")
            with core.store.transaction():
                for device in core.directory.devices("hq"):
                    if device.name.startswith("stranger-"):
                        core.sessions.grant(device, location, "totp", core.clock(), lifetime=lifetime)

        self.core.do(grant)
        return set(keys)

    def grant(self, client: Client, lifetime: float = 0) -> tuple[Session, str]:
        """As ``CoreThread.grant``."""
        return self.core.grant(client, lifetime)

    def attach(self, client: Client) -> None:
        """Give the client a namespace of its own, cabled to the gateway, and an interface."""
        number = client.device.id % 200 + 1
        space = self.network.namespace(f"client{number}")
        client.cable = f"{self.cables}.{number}"
        self.network.link(self.gateway, f"{client.cable}.1/24", space, f"{client.cable}.2/24")
        client.join(space)

    def connect(self, client: Client, psk: str = "") -> None:
        """The client begins anew with this PSK, or without one, as after an authentication."""
        client.connect(self._server(), f"{client.cable}.1:{PORT}", psk)

    def use_psk(self, client: Client, psk: str) -> None:
        """The client takes a new PSK, as it does on a renewal: live keys stay."""
        client.use_psk(self._server(), psk)

    def _server(self) -> str:
        return self.gateway.run("wg", "show", self.interface, "public-key").stdout.strip()

    def shown(self) -> dict[str, dict[str, Any]]:
        """``wg show dump`` of the gateway, by public key."""
        rows = self.gateway.run("wg", "show", self.interface, "dump").stdout.splitlines()[1:]
        names = ("preshared_key", "endpoint", "allowed_ips", "handshake", "rx", "tx", "keepalive")
        return {row.split("\t")[0]: dict(zip(names, row.split("\t")[1:], strict=True)) for row in rows}
