"""Two gateways for one location: hosts with an agent and keepalived each, and an address between them.

    client ── outside ──┬── alpha ──┬── inside ── server
      (192.0.2.0/24)    └── beta  ──┘  (10.0.0.0/24)

The hosts run the files of docs/high-availability as they are, but for the interface's name where the
WireGuard behind it is a program: its sockets lie in one folder for all namespaces.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.control import ControlClient
from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from tests.support.client import NETWORK, Client
from tests.support.core_thread import CoreThread
from tests.support.needs import no_kernel_wireguard
from tests.support.netns import Network, interface_name
from tests.support.site import PORT, until

FILES = Path(__file__).parents[2] / "docs/high-availability"
OUTSIDE, INSIDE = "192.0.2.10", "10.0.0.1"
"""The virtual addresses, as in the files."""
SERVER = "10.0.0.99"
NAMES = ("alpha", "beta")


class Host:
    """One gateway. ``number`` tells its addresses from the other's."""

    def __init__(self, pair: "Pair", name: str, number: int) -> None:
        self.name = name
        self.space = pair.network.namespace(name)
        self.interface = interface_name() if no_kernel_wireguard() else "wg0"
        self.address = f"192.0.2.{number}"
        self._ports = [
            (switch, pair.network.plug(self.space, f"{address}/24", switch))
            for switch, address in ((pair.outside, self.address), (pair.inside, f"10.0.0.{number + 1}"))
        ]
        self.space.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self._folder = pair.folder / name
        self._folder.mkdir()
        self._credentials = self._folder / "credentials"
        self._agent: subprocess.Popen[bytes] | None = None
        self._keepalived: subprocess.Popen[bytes] | None = None

    def configure(self, core_url: str, token: str, private_key: str) -> None:
        """Write what an operator writes: the agent's configuration and credentials, keepalived's."""
        self._credentials.mkdir(mode=0o700)
        for name, value in (("core.token", token), ("interface.private_key", private_key)):
            (self._credentials / name).write_text(value)
            (self._credentials / name).chmod(0o600)
        (self._folder / "agent.toml").write_text(
            f"""
[interface]
name = "{self.interface}"
[core]
url = "{core_url}"
[stats]
interval = 1
[paths]
state = "{self._folder}/state"
runtime = "{self._folder}/run"
[log]
format = "json"
"""
        )
        shown = (FILES / "keepalived.conf").read_text().replace("wg0", self.interface)
        (self._folder / "keepalived.conf").write_text(shown)
        self.space.run("nft", "-f", str(FILES / "vpn-address.nft"))

    def start_agent(self) -> None:
        with (self._folder / "agent.log").open("ab") as log:
            self._agent = self.space.popen(
                *(sys.executable, "-m", "agent", "run", "-c", str(self._folder / "agent.toml")),
                stderr=log,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("WG_AGENT_")},
                    "CREDENTIALS_DIRECTORY": str(self._credentials),
                },
            )

    def start_keepalived(self) -> None:
        folder = self._folder
        with (folder / "keepalived.log").open("ab") as log:
            self._keepalived = self.space.popen(
                *("keepalived", "--vrrp", "--dont-fork", "--log-console", "--log-detail", "--no-syslog"),
                *("--use-file", str(folder / "keepalived.conf")),
                *("--pid", str(folder / "keepalived.pid"), "--vrrp_pid", str(folder / "vrrp.pid")),
                stdout=log,
                stderr=log,
            )

    def stop_keepalived(self) -> None:
        """As ``systemctl stop keepalived``: the host gives the addresses away and goes on otherwise."""
        self._end(self._keepalived, signal.SIGTERM)

    def kill_agent(self) -> None:
        self._end(self._agent, signal.SIGKILL)

    def die(self) -> None:
        """The host loses its power: nobody says goodbye."""
        for switch, port in self._ports:
            switch.ip("link", "set", port, "down")
        if self._keepalived is not None:
            vrrp = int((self._folder / "vrrp.pid").read_text())
            self._end(self._keepalived, signal.SIGKILL)
            os.kill(vrrp, signal.SIGKILL)
        self.kill_agent()

    def boot(self) -> None:
        """The power is back: nothing of the interface and the addresses was kept."""
        self.space.ip("link", "delete", self.interface)
        for address, link in ((OUTSIDE, "eth0"), (INSIDE, "eth1")):
            self.space.run("ip", "address", "delete", f"{address}/24", "dev", link, check=False)
        for switch, port in self._ports:
            switch.ip("link", "set", port, "up")
        self.start_agent()
        self.start_keepalived()

    def reap(self) -> None:
        """The network's teardown has killed what still ran."""
        for process in (self._agent, self._keepalived):
            if process is not None:
                process.wait(30)

    def _end(self, process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
        if process is not None and process.poll() is None:
            process.send_signal(number)
            process.wait(30)

    @property
    def has_address(self) -> bool:
        """Whether the outside virtual address is here."""
        return f" {OUTSIDE}/" in self.space.ip("address", "show", "dev", "eth0")

    def status(self) -> dict[str, Any]:
        """``wg-agent status --json``, without the program."""
        if self._agent is None or self._agent.poll() is not None:
            raise RuntimeError(f"the agent of {self.name} does not run: {self.logs()}")
        return ControlClient(self._folder / "run" / f"{self.interface}.sock").status()

    def peers(self) -> dict[str, str]:
        """The PSK of each peer on the interface, by public key; none while there is no interface."""
        shown = self.space.run("wg", "show", self.interface, "preshared-keys", check=False)
        return dict(line.split("\t") for line in shown.stdout.splitlines())

    def guarded(self) -> str:
        """The table of the guard, as nft shows it."""
        return self.space.run("nft", "list", "ruleset", check=False).stdout

    def vrrp_log(self) -> str:
        """What keepalived has logged so far."""
        return (self._folder / "keepalived.log").read_text()

    def logs(self) -> str:
        found = (self._folder / name for name in ("agent.log", "keepalived.log"))
        return "\n".join(file.read_text()[-4000:] for file in found if file.exists())


def until_at(host: Host, condition: Callable[[Host], object], what: str, timeout: float = 30.0) -> None:
    """Wait until something holds at a host."""
    until(lambda: condition(host), timeout, f"{what} at {host.name}")


class Pair:
    """Leave the block and all of it is gone."""

    def __init__(self, folder: Path, *, location: dict[str, object]) -> None:
        self.folder = folder
        folder.chmod(0o700)
        self.network = Network()
        self.outside, self.inside = self.network.switch("outside"), self.network.switch("inside")
        self.hosts = [Host(self, name, number) for number, name in enumerate(NAMES, 2)]
        server = self.network.namespace("server")
        self.network.plug(server, f"{SERVER}/24", self.inside)
        server.ip("route", "add", NETWORK, "via", INSIDE)
        tokens = [{"name": name, "location": "hq", "token": f"token-of-{name}"} for name in NAMES]
        self.core = CoreThread(folder, gateways=tokens)
        self._private_key = clamp(os.urandom(32))
        self._location = {"addresses": ["10.8.0.1/16"], "listen_port": PORT, **location}

    def __enter__(self) -> Self:
        self.core.start()
        self.core.call(self.core.admin.add_location("hq", **self._location))
        for host in self.hosts:
            url = self.core.service.gateway_url
            host.configure(url, f"token-of-{host.name}", format_key(self._private_key))
            host.start_agent()
        for host in self.hosts:
            until_at(host, lambda host: host.status()["epoch"], "the first state", 120)
            host.start_keepalived()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for host in self.hosts:
                print(f"--- {host.name}\n{host.logs()}")
        self.network.close()
        for host in self.hosts:
            host.reap()
        self.core.close()

    def active(self, among: Sequence[Host] = ()) -> Host:
        """The one host that has the addresses, once there is one."""

        def one() -> list[Host]:
            found = [host for host in among or self.hosts if host.has_address]
            return found if len(found) == 1 else []

        return until(one, 60, "one host with the virtual address")[0]

    def other(self, host: Host) -> Host:
        return next(one for one in self.hosts if one is not host)

    def add_client(self, name: str, number: int) -> Client:
        """A registered device in a namespace of its own, with an interface and no session yet."""
        [client] = self.core.register([name])
        space = self.network.namespace(name)
        self.network.plug(space, f"192.0.2.{number}/24", self.outside)
        client.join(space)
        space.ip("route", "add", f"{SERVER}/32", "dev", client.interface)
        return client

    def connect(self, client: Client, psk: str) -> None:
        """Give the client its PSK and the virtual address."""
        server = format_key(public_key(self._private_key))
        networks = (NETWORK, f"{SERVER}/32")
        client.connect(server, f"{OUTSIDE}:{PORT}", psk, networks=networks, keepalive=25)

    def endpoint(self, client: Client) -> str:
        """Where the client sends: it follows whoever sends it valid packets."""
        assert client.space is not None
        return client.space.run("wg", "show", client.interface, "endpoints").stdout.split()[1]

    def session(self, client: Client) -> dict[str, Any]:
        """The client's newest session as core has it."""
        sessions = self.core.call(self.core.admin.sessions())
        return next(s for s in sessions if s["id"] == client.sessions[-1])

    def traffic(self, client: Client) -> dict[str, Any]:
        """What core counts of the client over both gateways; nothing of use before the first report."""
        rows = self.core.call(self.core.admin.traffic())
        return next((row for row in rows if row["public_key"] == client.public_key), {"gateway": None})
