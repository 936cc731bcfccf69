"""A gateway to take pictures of: real core, real agent, real tunnels, and paths as on a host.

The folders that an installed agent uses are mounted over in a mount namespace of our own (``private``),
so that the commands can be typed as in the documentation, and nobody's own gateway is touched.
"""

import contextlib
import ctypes
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.sandbox.core import Core
from agent.sandbox.sessions import Session
from tests.reliability.tls_front import Authority, TlsFront
from tests.support.client import Client
from tests.support.site import Site, until

INTERFACE: Final = "wg0"
CORE: Final = "core.example.com"
LOOK: Final = 15
"""Seconds between two looks of the agent at the interface."""
_MOUNTED_OVER: Final = ("/etc/wg-agent", "/var/lib/wg-agent", "/run/wg-agent", "/run/wireguard")
_CLONE_NEWNS: Final = 0x00020000
_CONFIG: Final = f"""\
[interface]
name = "{INTERFACE}"
private_key_file = "/etc/wg-agent/{INTERFACE}.key"
[core]
url = "https://{CORE}/gateway/v1/"
token_file = "/etc/wg-agent/core.token"
ca_file = "/etc/wg-agent/ca.pem"
[stats]
interval = {LOOK}
"""
_SEND: Final = """
import socket, sys, time
to, size, every = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    while True:
        try:
            sock.sendto(bytes(size), (to, 9))
        except OSError:
            pass
        time.sleep(every)
"""


def mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True)


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Have a mount namespace of our own, with the agent's folders empty in it, from here on.

    There is no way back; what had to be made to be mounted over is removed.
    """
    made = [Path(folder) for folder in _MOUNTED_OVER if not Path(folder).exists()]
    for folder in made:
        folder.mkdir(mode=0o700)
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount namespace of our own")
    mount("--make-rslave", "/")
    try:
        for path in _MOUNTED_OVER:
            mount("-t", "tmpfs", "-o", "mode=700", "tmpfs", path)
        yield
    finally:
        libc.setns(before, _CLONE_NEWNS)
        os.close(before)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


class Gateway:
    """The site, with everybody on it; ``wg-agent`` runs as on its host."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.clients: dict[str, Client] = {}
        """Whose devices are registered, by their names."""

    def argv(self, command: str) -> list[str]:
        """A ``wg-agent`` command line as it runs on the gateway."""
        program, *rest = command.split()
        assert program == "wg-agent"
        return self.site.gateway.argv(sys.executable, "-m", "agent", *rest)

    def client(self, name: str, **members: object) -> Client:
        """Register a device."""
        (made,) = self.site.add_clients(1, name=name, **members)
        self.clients[name] = made
        return made

    def granted(self, client: Client, *, ago: float, lasts: float) -> str:
        """Grant a session that core began some seconds ago; its PSK in base64."""

        def grant(core: Core) -> Session:
            location = core.directory.location("hq")
            given = core.sessions.grant(client.device, location, "totp", core.clock() - ago, lifetime=lasts)
            return given.session

        session = self.site.core.do(grant)
        assert session.preshared_key is not None
        return format_key(session.preshared_key)

    def connect(self, client: Client, psk: str = "") -> None:
        """Bring up the client's tunnel, and wait for its handshake."""
        self.site.attach(client)
        self.site.connect(client, psk)
        until(
            lambda: self.site.shown()[client.public_key]["handshake"] != "0", 30, f"{client.name}'s handshake"
        )

    def send(self, client: Client, *, size: int, every: float, to_client: bool = False) -> None:
        """Let datagrams flow through the tunnel until the end."""
        assert client.space is not None
        space = self.site.gateway if to_client else client.space
        to = client.address if to_client else "10.8.0.1"
        space.popen(sys.executable, "-c", _SEND, to, str(size), str(every), stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def gateway() -> Iterator[Gateway]:
    """A gateway with peers in every state; to be entered within ``private``."""
    etc = Path("/etc/wg-agent")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wg-agent-pictures-")))
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {CORE}\n")
        mount("--bind", str(hosts), "/etc/hosts")
        stack.callback(subprocess.run, ["umount", "/etc/hosts"], check=True)
        site = Site(folder, location={"addresses": ["10.8.0.1/24"], "endpoint": "vpn.example.com:51820"})
        site.interface, site.config, site.cables = INTERFACE, etc / f"{INTERFACE}.toml", "198.18"
        stack.enter_context(site)
        (folder / "run").symlink_to(f"/run/wg-agent/{INTERFACE}")
        key = clamp(secrets.token_bytes(32))
        for name, text in {
            f"{INTERFACE}.toml": _CONFIG,
            f"{INTERFACE}.key": format_key(key),
            "core.token": site.core.service.gateway_token,
        }.items():
            (etc / name).touch(0o600)
            (etc / name).write_text(text)
        authority = Authority(folder, "core")
        (etc / "ca.pem").write_bytes(authority.file.read_bytes())
        front = stack.enter_context(TlsFront(site.gateway, 443, folder / "core.sock"))
        front.show(authority.issue("core", CORE))
        yield _populated(Gateway(site), format_key(public_key(key)))


def _populated(here: Gateway, own_key: str) -> Gateway:
    """People with sessions of different ages, some who wait, a site router, and one entry that is wrong."""
    site = here.site
    alice, phone, bob, carol = map(here.client, ("alice-laptop", "alice-phone", "bob-laptop", "carol-laptop"))
    here.client("dave-tablet")
    here.client("erin-laptop")
    router = here.client(
        "branch-router",
        mfa_exempt=True,
        allowed_ips=["10.8.0.200/32", "192.168.40.0/24"],
        persistent_keepalive=25,
    )
    site.core.call(
        site.core.admin.add_devices([{"location": "hq", "name": "old-gateway", "public_key": own_key}])
    )
    minute, hour = 60, 3600
    psks = {
        alice.name: here.granted(alice, ago=3 * hour + 11 * minute, lasts=8 * hour),
        phone.name: here.granted(phone, ago=40 * minute, lasts=8 * hour),
        bob.name: here.granted(bob, ago=7 * hour + 37 * minute, lasts=8 * hour),
        carol.name: here.granted(carol, ago=20, lasts=8 * hour),
    }
    site.start_agent()
    for client in (router, bob, alice, phone):
        here.connect(client, psks.get(client.name, ""))
        time.sleep(3)
    here.send(alice, size=1200, every=0.003)
    here.send(alice, size=1300, every=0.02, to_client=True)
    here.send(bob, size=300, every=0.02)
    here.send(router, size=900, every=0.01)
    here.send(router, size=1300, every=0.004, to_client=True)
    return here
