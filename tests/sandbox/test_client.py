"""The client against a real core and a gateway that is wireguard-go in a namespace of its own."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.sandbox.mail import wait_for_code
from tests.sandbox.parts import Gateway, Scene, following, scene
from tests.support.netns import Namespace, Network, interface_name

pytestmark = pytest.mark.userspace


@dataclass(slots=True)
class Site:
    scene: Scene
    gateway: Namespace
    client: Namespace
    interface: str
    core_url: str
    key_file: Path

    async def run(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "agent.sandbox", "client", *arguments]
        return await asyncio.to_thread(self.client.run, *argv, check=False, stdin=stdin)

    async def connect(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        fixed = ["--core", self.core_url, "--user", "alice", "--device-key", str(self.key_file)]
        return await self.run("connect", *fixed, "--interface", self.interface, *arguments, stdin=stdin)

    def pings(self) -> bool:
        done = self.client.run("ping", "-c", "1", "-W", "1", "10.8.0.1", check=False)
        return done.returncode == 0


@contextmanager
def wireguard(net: Network) -> Iterator[tuple[Namespace, Namespace, str, str]]:
    """Two joined namespaces, a gateway's interface in the first; its name and public key."""
    gateway, client = net.namespace("gateway"), net.namespace("client")
    net.link(gateway, "192.0.2.1/24", client, "192.0.2.2/24")
    name = interface_name()
    gateway.run("wireguard-go", name)
    private = gateway.run("wg", "genkey").stdout
    public = gateway.run("wg", "pubkey", stdin=private).stdout.strip()
    gateway.run("wg", "set", name, "listen-port", "51820", "private-key", "/dev/stdin", stdin=private)
    gateway.ip("address", "add", "10.8.0.1/24", "dev", name)
    gateway.ip("link", "set", name, "up")
    try:
        yield gateway, client, name, public
    finally:
        gateway.ip("link", "delete", name)


class WireguardGateway(Gateway):
    """Puts granted sessions on a real interface before it confirms them."""

    async def apply(self, position: str) -> Any:
        event = self.events[-1]
        if event.name == "session_granted":
            session = event.data["session"]
            argv = ["wg", "set", self.interface, "peer", event.data["public_key"]]
            argv += ["allowed-ips", "10.8.0.2/32", "preshared-key", "/dev/stdin"]
            self.namespace.run(*argv, stdin=session["preshared_key"])
        return await super().apply(position)

    interface: str
    namespace: Namespace


@asynccontextmanager
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    with Network() as net, wireguard(net) as (gateway, client, name, public):
        path = tmp_path / "core.sock"
        async with scene(listen=f"unix:{path}") as s:
            follower = WireguardGateway(s.service)
            follower.interface, follower.namespace = name, gateway
            held = Site(s, gateway, client, interface_name(), f"http+unix://{path}:", tmp_path / "key")
            await s.service.admin.change_location(
                "hq", endpoint="192.0.2.1:51820", server_public_key=public, routes=["10.8.0.0/24"]
            )
            shown = await held.run("key", "--device-key", str(held.key_file))
            [device] = await s.service.admin.devices()
            await s.service.admin.remove_device(device["id"])
            await s.service.admin.add_device(
                "hq", "client", shown.stdout.strip(), user="alice", allowed_ips=["10.8.0.2/32"]
            )
            try:
                async with following(follower):
                    yield held
            finally:
                await held.run("disconnect", "--interface", held.interface)


def test_a_client_authenticates_connects_and_leaves(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as at:
            alone = await at.connect("--method", "none", "--wait", "0.5")
            assert (alone.returncode, at.pings()) == (1, False)
            assert "requires MFA" in alone.stderr

            wrong = await at.connect("--code", at.scene.wrong_code())
            assert wrong.returncode == 1
            assert "wrong" in wrong.stderr

            right = await at.connect("--code", at.scene.code(), "--json")
            assert right.returncode == 0, right.stderr
            result = json.loads(right.stdout)
            assert (result["connected"], result["location"]) == (True, "hq")
            assert at.pings()
            [live] = await at.scene.service.admin.sessions(live=True)
            assert result["session_id"] == live["id"]

            again = await at.connect("--code", at.scene.code())
            assert (again.returncode, "has been used" in again.stderr) == (1, True)

            gone = await at.run("disconnect", "--interface", at.interface)
            assert gone.returncode == 0
            assert at.interface not in at.client.links()

    asyncio.run(main())


def test_a_code_is_read_from_stdin_after_it_was_sent(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as at:
            process = await asyncio.create_subprocess_exec(
                *at.client.argv(
                    *(sys.executable, "-m", "agent.sandbox", "client", "connect"),
                    *("--core", at.core_url, "--user", "alice", "--method", "email"),
                    *("--device-key", str(at.key_file), "--interface", at.interface),
                    "--code-from-stdin",
                ),
                stdin=asyncio.subprocess.PIPE,
            )
            code = await asyncio.to_thread(wait_for_code, at.scene.mail)
            await process.communicate(code.encode() + b"\n")
            assert process.returncode == 0
            assert at.pings()

    asyncio.run(main())
