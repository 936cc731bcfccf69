"""The one port to the interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.curve25519 import clamp
from agent.model import DeviceConfig, ObservedDevice, Operation


class Device(Protocol):
    """A WireGuard device that exists; the adapters are ``kernel`` and ``userspace``.

    Every method raises DeviceError, with ``errno`` ENODEV if the interface is gone.
    """

    @property
    def name(self) -> str:
        """The interface's name."""

    async def read(self) -> ObservedDevice:
        """Return the whole interface, consistent: an interrupted dump is read again."""

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Carry out the operations in their order; return once all are acknowledged.

        Not transactional: when it raises, any prefix of the operations may be in force.
        """

    async def configure(self, config: DeviceConfig) -> None:
        """Set the device-wide settings that are not None and differ from what the device has."""

    async def close(self) -> None:
        """Let go of sockets; the interface stays."""


def difference(wanted: DeviceConfig, held: DeviceConfig) -> DeviceConfig:
    """Return of ``wanted`` what ``held`` does not have yet.

    Setting the same port again makes some implementations rebind and lose packets.
    """
    key, port, mark = wanted.private_key, wanted.listen_port, wanted.fwmark
    same_key = key is None or (held.private_key is not None and clamp(key) == held.private_key)
    return DeviceConfig(
        private_key=None if same_key else key,
        listen_port=None if port == held.listen_port else port,
        fwmark=None if mark == held.fwmark else mark,
    )
