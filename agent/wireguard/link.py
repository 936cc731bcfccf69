"""The interface as the configuration and core want it: settings of both merged and put in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.config import Interface
from agent.encoding import format_key
from agent.errors import ConfigError, DeviceError
from agent.hooks import Hooks, When
from agent.model import DeviceConfig, Identity, InterfaceAddress, InterfaceSettings
from agent.plan import Drift, DriftKind
from agent.wireguard.device import Device
from agent.wireguard.interface import (
    bring_up,
    configure_link,
    ensure_interface,
    open_device,
    read_link,
    remove_interface,
)

_log = structlog.get_logger(__name__)


class WireGuardLink:
    """The ``Link`` of ``agent.ports``, over the kernel or a userspace implementation."""

    def __init__(
        self,
        config: Interface,
        private_key: bytes,
        addresses: tuple[InterfaceAddress, ...],
        hooks: Hooks,
        keep_key: Callable[[bytes], None] = lambda _: None,
        may_come_up: Callable[[], bool] = lambda: True,
    ) -> None:
        """``private_key`` holds until core hands out another, which ``keep_key`` stores for the next start.

        It may block, and raise ConfigError. A link that is down stays so until ``may_come_up``.
        """
        self.addresses = addresses
        self.listen_port: int | None = None
        self.fwmark: int | None = None
        self._config = config
        self._private_key = private_key
        self._hooks = hooks
        self._keep_key = keep_key
        self._may_come_up = may_come_up
        self._device: Device | None = None
        self._made_of: tuple[frozenset[InterfaceAddress], int | None] = (frozenset(), None)
        """Addresses and MTU (None: left alone) as last configured."""
        self._up = False
        self._index: int | None = None
        """Of the link when it was last looked at; None: not since it was made."""

    @property
    def device(self) -> Device:
        """The device; not before ``ensure``."""
        if self._device is None:
            raise DeviceError(f"{self._config.name} is not there yet", "the agent makes it at its next tick")
        return self._device

    async def ensure(self) -> bool:
        """Find the interface or make it, down; return whether it was made anew."""
        name = self._config.name
        ensured = await ensure_interface(name, self._config.backend, self._config.userspace_program)
        if ensured.warning:
            _log.warning("userspace WireGuard", interface=name, warning=ensured.warning)
        if self._device is not None:
            await self._device.close()
        self._device = open_device(name, ensured.backend)
        self._made_of, self._up = (frozenset(), None), False
        self._index = None if ensured.created else self._index
        _log.info(
            "interface made" if ensured.created else "interface found",
            interface=name,
            backend=ensured.backend,
        )
        return ensured.created

    async def configure(self, settings: InterfaceSettings, identity: Identity | None) -> list[str]:
        """Set what differs: core's values win, then the configuration's; return it in words."""
        config = self._config
        if identity is not None and identity.private_key != self._private_key:
            await self._take_key(identity)
        port = config.listen_port if settings.listen_port is None else settings.listen_port
        fwmark = config.fwmark if settings.fwmark is None else settings.fwmark
        mtu = config.mtu if settings.mtu is None else settings.mtu
        addresses = config.addresses if settings.addresses is None else settings.addresses
        self.listen_port, self.fwmark = port or None, fwmark
        try:
            await self.device.configure(DeviceConfig(self._private_key, self.listen_port, fwmark))
        except DeviceError:
            # The kernel stops at a port that is taken, before it has looked at the key.
            await self.device.configure(DeviceConfig(self._private_key))
            raise
        changes = await configure_link(config.name, addresses, mtu, self.addresses)
        kept = tuple(a for a in self.addresses if a not in changes.removed)
        self.addresses = tuple(dict.fromkeys((*kept, *changes.added)))
        self._made_of = frozenset(addresses), mtu
        done = [f"address {address} added" for address in changes.added]
        done += [f"address {address} removed" for address in changes.removed]
        if changes.mtu is not None:
            done.append(f"mtu {changes.mtu}")
        return done

    async def _take_key(self, identity: Identity) -> None:
        self._private_key = identity.private_key
        _log.info("core has handed out the interface's key", public_key=format_key(identity.public_key))
        try:
            await asyncio.to_thread(self._keep_key, identity.private_key)
        except ConfigError as error:
            _log.error("after a reboot the interface has its old key until core is there", error=str(error))

    async def bring_up(self) -> bool:
        """Bring the interface up, once the commands that come before have run; return whether it is up."""
        link = await read_link(self._config.name)
        if link is not None and link.up:
            self._hooks.found_up(link.index)
        elif link is not None and not (self._may_come_up() and self._hooks.may_come_up(link.index)):
            return False
        await bring_up(self._config.name)
        self._up = True
        if link is not None and not link.up:
            self._hooks.came_up()
        return True

    async def drift(self) -> list[Drift]:
        """How the link differs from what was made of it: addresses, MTU, down."""
        link = await read_link(self._config.name)
        if link is None:
            return []
        addresses, mtu = self._made_of
        before, self._index = self._index, link.index
        if before not in {None, link.index}:
            return [Drift(DriftKind.INTERFACE, None, "is another interface of this name")]
        drift = [
            Drift(DriftKind.ADDRESS, None, f"has lost the address {address}")
            for address in sorted(addresses - link.addresses)
        ]
        if mtu is not None and link.mtu != mtu:
            drift.append(Drift(DriftKind.MTU, None, f"has an MTU of {link.mtu} instead of {mtu}"))
        if self._up and not link.up:
            drift.append(Drift(DriftKind.LINK_DOWN, None, "is down"))
        return drift

    async def before_removal(self) -> None:
        """Run the operator's commands that come before the interface goes for good."""
        await self._run(When.PRE_DOWN)

    async def after_removal(self) -> None:
        """Run those that come after."""
        await self._run(When.POST_DOWN)

    async def _run(self, when: When) -> None:
        for failure in await self._hooks.run(when):
            _log.error("command failed", failure=str(failure))

    async def remove(self) -> None:
        """Remove the interface, if it is there; ``ensure`` makes it anew."""
        await remove_interface(self._config.name)
        self.addresses = ()
        self._made_of, self._up, self._index = (frozenset(), None), False, None

    async def close(self) -> None:
        """Let go of the device; the interface stays."""
        await self._hooks.close()
        if self._device is not None:
            await self._device.close()
