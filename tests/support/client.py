"""Somebody's device: its key, its interface in a namespace, its tunnel to a gateway."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from agent.curve25519 import public_key
from agent.encoding import format_key
from agent.sandbox.directory import Device
from tests.support.netns import Namespace, interface_name

NETWORK = "10.8.0.0/16"
"""Of the VPN."""


@dataclass
class Client:
    """A device with its private key; ``interface`` is set once it has a tunnel."""

    name: str
    private_key: bytes
    device: Device
    space: Namespace | None = None
    interface: str = ""
    cable: str = ""
    """The first three octets of its network with the gateway."""
    sessions: list[str] = field(default_factory=list)

    @cached_property
    def public_key(self) -> str:
        return format_key(public_key(self.private_key))

    @property
    def address(self) -> str:
        return self.device.allowed_ips[0].partition("/")[0]

    def join(self, space: Namespace) -> None:
        """Have an interface in this namespace, with the client's key and address."""
        self.space, self.interface = space, interface_name()
        made = space.run("ip", "link", "add", self.interface, "type", "wireguard", check=False)
        if made.returncode:
            space.run("wireguard-go", self.interface)
        self._wg("private-key", "/dev/stdin", stdin=format_key(self.private_key))
        space.ip("address", "add", f"{self.address}/16", "dev", self.interface)
        space.ip("link", "set", self.interface, "up")

    def connect(
        self,
        server: str,
        endpoint: str,
        psk: str = "",
        *,
        networks: Iterable[str] = (NETWORK,),
        keepalive: int = 1,
    ) -> None:
        """Begin anew with this PSK, or without one, as after an authentication.

        ``server`` is the gateway's public key, ``networks`` what is sent to it.
        """
        self._wg("peer", server, "remove")
        self._wg(
            *("peer", server),
            *(("preshared-key", "/dev/stdin") if psk else ()),
            *("endpoint", endpoint),
            *("allowed-ips", ",".join(networks), "persistent-keepalive", str(keepalive)),
            stdin=psk,
        )

    def use_psk(self, server: str, psk: str) -> None:
        """Take a new PSK, as on a renewal: live keys stay."""
        self._wg("peer", server, "preshared-key", "/dev/stdin", stdin=psk)

    def _wg(self, *words: str, stdin: str = "") -> None:
        assert self.space is not None
        self.space.run("wg", "set", self.interface, *words, stdin=stdin)
