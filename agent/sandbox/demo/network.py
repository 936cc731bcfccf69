"""Two network namespaces and the cable between them."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import TypeVar

from pyroute2 import netns

from agent.errors import AgentError

T = TypeVar("T")


def ip(*argv: str) -> str:
    """Run ``ip``; return what it prints. Raises AgentError if it fails."""
    # A session of its own: Ctrl-C on the terminal is for the demo alone.
    done = subprocess.run(
        ["ip", *argv], capture_output=True, text=True, timeout=20, check=False, start_new_session=True
    )
    if done.returncode:
        raise AgentError(f"ip {' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace; ``name`` is what ``ip netns`` knows it by."""

    name: str

    def add(self) -> None:
        """Make it, with its loopback up."""
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")

    def delete(self) -> None:
        """Delete it. What still runs in it would keep it alive, without a name."""
        if self.exists():
            ip("netns", "delete", self.name)

    def exists(self) -> bool:
        """Whether there is one of this name."""
        return any(held["name"] == self.name for held in json.loads(ip("-j", "netns", "list") or "[]"))

    def argv(self, *argv: str) -> list[str]:
        """Return ``argv`` made to run in here; it takes the place of ``ip``, pid included."""
        return ["ip", "netns", "exec", self.name, *argv]

    def pids(self) -> list[int]:
        """Return the processes that run in here."""
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def is_up(self, interface: str) -> bool:
        """Whether an interface is there and up."""
        links = json.loads(ip("-n", self.name, "-j", "link", "show"))
        return any(link["ifname"] == interface and "UP" in link["flags"] for link in links)

    def remove_link(self, interface: str) -> None:
        """Remove an interface if it is there."""
        links = json.loads(ip("-n", self.name, "-j", "link", "show"))
        if any(link["ifname"] == interface for link in links):
            ip("-n", self.name, "link", "delete", interface)

    async def inside(self, work: Callable[[], T]) -> T:
        """Call ``work`` in here, in a thread of its own."""

        def entered() -> T:
            netns.setns(self.name, flags=0)
            return work()

        with ThreadPoolExecutor(1) as thread:  # it ends, so no other work finds itself in here
            return await asyncio.get_running_loop().run_in_executor(thread, entered)

    async def get(self, port: int, path: str) -> str:
        """Return the body of ``http://127.0.0.1:PORT/PATH`` in here. Raises OSError."""

        def ask() -> str:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", path)
                return connection.getresponse().read().decode()
            finally:
                connection.close()

        return await self.inside(ask)


def join(one: Namespace, one_address: str, other: Namespace, other_address: str) -> None:
    """Join two namespaces by a veth pair, ``eth0`` on both sides, with these addresses (CIDR)."""
    end = ("peer", "name", "eth0", "netns", other.name)
    ip("link", "add", "eth0", "netns", one.name, "type", "veth", *end)
    for space, address in ((one, one_address), (other, other_address)):
        ip("-n", space.name, "address", "add", address, "dev", "eth0")
        ip("-n", space.name, "link", "set", "eth0", "up")
