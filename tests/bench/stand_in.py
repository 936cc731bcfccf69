"""A link and a device that hold what they are told to and cost next to nothing, in WireGuard's place."""

from collections.abc import Sequence
from typing import assert_never

from agent.model import (
    AddPeer,
    CutPeer,
    DeviceConfig,
    Identity,
    InterfaceAddress,
    InterfaceSettings,
    Keep,
    ObservedDevice,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.plan import Drift


class StandInDevice:
    """The ``Device`` of ``agent.wireguard.device``; what it keeps of a peer is the agent's own values."""

    def __init__(self, name: str, public_key: PublicKey) -> None:
        self.name = name
        self._public_key = public_key
        self._peers: dict[PublicKey, tuple[PresharedKey | None, tuple[Prefix, ...]]] = {}

    async def read(self) -> ObservedDevice:
        """All peers, made anew as a dump is."""
        peers = {
            key: ObservedPeer(key, preshared_key, allowed_ips, None, 0, 0.0, 0, 0)
            for key, (preshared_key, allowed_ips) in self._peers.items()
        }
        return ObservedDevice(self.name, self._public_key, 51820, 0, peers)

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Take them as the kernel does."""
        for operation in operations:
            key = operation.public_key
            match operation:
                case RemovePeer():
                    self._peers.pop(key, None)
                case CutPeer():
                    self._peers[key] = None, ()
                case AddPeer(_, preshared_key, allowed_ips):
                    self._peers[key] = preshared_key, allowed_ips
                case UpdatePeer(_, preshared_key, allowed_ips):
                    old = self._peers[key]
                    psk = old[0] if isinstance(preshared_key, Keep) else preshared_key
                    self._peers[key] = psk, old[1] if isinstance(allowed_ips, Keep) else allowed_ips
                case _:
                    assert_never(operation)

    async def configure(self, config: DeviceConfig) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing is held."""


class StandInLink:
    """The ``Link`` of ``agent.ports``."""

    def __init__(self, name: str, public_key: PublicKey) -> None:
        self.addresses: tuple[InterfaceAddress, ...] = ()
        self.listen_port: int | None = 51820
        self.fwmark: int | None = 0
        self.device = StandInDevice(name, public_key)

    async def ensure(self) -> bool:
        return False

    async def configure(self, settings: InterfaceSettings, identity: Identity | None) -> list[str]:
        self.addresses = settings.addresses or ()
        return []

    async def bring_up(self) -> bool:
        return True

    async def drift(self) -> list[Drift]:
        return []

    async def before_removal(self) -> None:
        """No commands."""

    async def after_removal(self) -> None:
        """No commands."""

    async def remove(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing is held."""
