"""Three namespaces to judge the guard by: clients behind ``wg0``, the gateway, a server beyond it.

A veth pair stands in for the tunnel: the guard sees a link by name, and its peers' addresses on it.
"""

import asyncio
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from subprocess import PIPE
from types import TracebackType
from typing import Any, ParamSpec, Self

from agent.encoding import parse_prefix
from agent.firewall import Firewall
from agent.guard import Admission
from agent.model import PublicKey
from agent.nft import Nft
from agent.ruleset import table_name
from tests.contract.inside import inside
from tests.support.netns import Namespace, Network

P = ParamSpec("P")
ALICE, BOB, ROUTER = (PublicKey(bytes([number]) * 32) for number in (1, 2, 3))
ALICE4, BOB4, ROUTER4 = "10.8.0.5", "10.8.0.6", "10.8.9.9"
ALICE6, WIDE6 = "fd00:8::5", "fd00:8:0:1::7"
GATEWAY4, GATEWAY6 = "10.8.0.1", "fd00:8::1"
SERVER = "192.0.2.2"
SERVER6 = "2001:db8:2::2"


def session(remaining: float, *prefixes: str) -> Admission:
    return Admission(tuple(map(parse_prefix, prefixes)), remaining)


def exempt(*prefixes: str) -> Admission:
    return Admission(tuple(map(parse_prefix, prefixes)), None)


class Stand:
    """The namespaces, and the guard over ``name`` in the gateway's; for a coroutine run inside it."""

    def __init__(self, net: Network, name: str = "wg0") -> None:
        self.name = name
        self.gateway, self.clients, self.server = (
            net.namespace(role) for role in ("gateway", "clients", "server")
        )
        self.net = net
        for space in (self.gateway, self.clients, self.server):
            # Else IPv6 takes its time to see that nobody else has its addresses.
            space.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        self.wire()
        _, self.far = net.link(self.gateway, "192.0.2.1/24", self.server, f"{SERVER}/24")
        self.server.ip("route", "add", "default", "via", "192.0.2.1")
        for space, address in ((self.gateway, "2001:db8:2::1/64"), (self.server, f"{SERVER6}/64")):
            space.ip("address", "add", address, "dev", "eth0", "nodad")
        self.server.ip("-6", "route", "add", "default", "via", "2001:db8:2::1")
        self.gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        self.open: list[Firewall] = []

    def wire(self) -> None:
        """Make the link and its addresses, anew if it was there."""
        gateway, clients = self.gateway, self.clients
        end = ("peer", "name", "tun", "netns", clients.name)
        gateway.ip("link", "add", self.name, "type", "veth", *end)
        for space, name, addresses in (
            (gateway, self.name, (f"{GATEWAY4}/16", f"{GATEWAY6}/32")),
            (clients, "tun", (f"{ALICE4}/16", f"{BOB4}/16", f"{ROUTER4}/16", f"{ALICE6}/32", f"{WIDE6}/32")),
        ):
            for address in addresses:
                space.ip("address", "add", address, "dev", name, *(["nodad"] if ":" in address else []))
            space.ip("link", "set", name, "up")
        # A tunnel has no neighbours to find, and theirs would be dropped like anybody's packets.
        for space, name, targets, far in (
            (gateway, self.name, (ALICE4, BOB4, ROUTER4, ALICE6, WIDE6), (clients, "tun")),
            (clients, "tun", (GATEWAY4, GATEWAY6), (gateway, self.name)),
        ):
            mac = json.loads(far[0].ip("-j", "link", "show", far[1]))[0]["address"]
            for target in targets:
                space.ip("neigh", "replace", target, "lladdr", mac, "dev", name, "nud", "permanent")
        clients.ip("route", "replace", "default", "via", GATEWAY4)
        clients.ip("-6", "route", "replace", "default", "via", GATEWAY6, "dev", "tun")

    def firewall(self, nft: Nft | None = None) -> Firewall:
        firewall = Firewall(self.name, nft)
        self.open.append(firewall)
        return firewall

    def close(self) -> None:
        for firewall in self.open:
            firewall.close()

    async def nft(self, *commands: str) -> str:
        """Run nft beside the agent, as an operator would."""
        return (await asyncio.to_thread(self.gateway.run, "nft", *commands)).stdout

    async def ours(self) -> str:
        return await self.nft("list", "table", "inet", table_name(self.name))

    async def foreign(self) -> str:
        """Everybody else's tables, with no counters and no times in them."""
        listed = re.split(r"^(?=table )", await self.nft("-s", "list", "ruleset"), flags=re.MULTILINE)
        return "".join(t for t in listed if not t.startswith(f"table inet {table_name(self.name)} "))

    async def answers(self, source: str, target: str, *, space: Namespace | None = None) -> bool:
        """Whether a ping from this client is answered."""
        argv = ("ping", "-n", "-c", "3", "-i", "0.05", "-w", "1", "-I", source, target)
        done = await asyncio.to_thread((space or self.clients).run, *argv, check=False)
        return done.returncode == 0


def in_gateway(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Have a test run inside the gateway's namespace of the one fixture of its that is a ``Stand``."""

    @functools.wraps(test)
    def run(*args: P.args, **fixtures: P.kwargs) -> None:
        [stand] = (value for value in fixtures.values() if isinstance(value, Stand))
        inside(stand.gateway, test(*args, **fixtures))

    return run


class Talker:
    """A line sent every 10 ms over TCP to an echo in the server's namespace; when echoes came.

    A flow that is established once, which is what conntrack and flowtables let pass.
    """

    _ECHO = (
        "import socket,sys\n"
        "l=socket.create_server((sys.argv[1],7777));print(flush=True);c,_=l.accept()\n"
        "while d:=c.recv(999):c.send(d)"
    )
    _TALK = (
        "import socket,sys,time\n"
        "c=socket.create_connection((sys.argv[2],7777),20,(sys.argv[1],0))\n"
        "c.setsockopt(6,1,1)\n"
        "while 1:c.send(b'x');c.recv(1);print(flush=True);time.sleep(.01)"
    )

    def __init__(self, clients: Namespace, source: str, server: Namespace, target: str) -> None:
        self._lock = threading.Condition()
        self._count = 0
        self.last = 0.0
        self._echo = server.popen(sys.executable, "-c", self._ECHO, target, stdout=PIPE)
        assert self._echo.stdout is not None
        self._echo.stdout.readline()
        self._talk = clients.popen(sys.executable, "-c", self._TALK, source, target, stdout=PIPE)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in (self._talk, self._echo):
            process.kill()
            process.wait()
        self._thread.join()
        for process in (self._talk, self._echo):
            assert process.stdout is not None
            process.stdout.close()

    def _read(self) -> None:
        assert self._talk.stdout is not None
        for _ in self._talk.stdout:
            with self._lock:
                self._count += 1
                self.last = time.monotonic()
                self._lock.notify_all()

    @property
    def echoes(self) -> int:
        with self._lock:
            return self._count

    def wait(self, echoes: int, timeout: float = 30) -> None:
        """Wait for so many more echoes."""
        with self._lock:
            wanted = self._count + echoes
            if not self._lock.wait_for(lambda: self._count >= wanted, timeout):
                raise TimeoutError(f"{self._count} of {wanted} echoes within {timeout} s")
