"""The upkeep of the link itself: it is made, given its settings, brought up and removed here."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Final

import structlog

from agent.books import Books
from agent.errors import DeviceError
from agent.model import Identity, InterfaceAddress, InterfaceSettings, ObservedDevice
from agent.patience import Patience
from agent.plan import Drift, DriftKind
from agent.ports import Link
from agent.state import State

_log = structlog.get_logger(__name__)

_RTNETLINK: Final = "the kernel's network configuration"


class Upkeep:
    """How far the link is what the state wants; peers and guard are others' business.

    An interface that was found is not touched while nobody has said what it should be like. Settings that
    it can't have, such as a port that is taken, are no reason to leave a peer on it: such a fault is kept,
    and only ENODEV is raised.
    """

    def __init__(self, *, state: State, link: Link, books: Books, patience: Patience) -> None:
        self.fault: DeviceError | None = None
        """Why the link does not have its settings, if it does not."""
        self.made = False
        """Whether this process has made it."""
        self.up = False
        """Whether it is up, as far as is known."""
        self.dismantled = False
        """Whether it is not to be there: core has deleted this gateway."""
        self._state = state
        self._link = link
        self._books = books
        self._patience = patience
        self._settings: tuple[InterfaceSettings, Identity | None] | None = None
        self._told_faults: set[str] = set()

    @property
    def may_be_up(self) -> bool:
        """Whether it was found, and is left as it is while nobody has said what it should be like."""
        return not (self.up or self._knows_settings)

    @property
    def configured(self) -> bool:
        """Whether it has the settings that it was given last, as far as is known."""
        return self._settings is not None

    def doubt(self) -> None:
        """It may be another one of this name, without settings and down."""
        self._settings, self.up = None, False

    async def ensure(self) -> bool:
        """Find the interface or make it; return whether it was made anew. Raises DeviceError."""
        made = await self._patience.wait_for(_RTNETLINK, self._link.ensure())
        self.made |= made
        return made

    async def configure(self) -> None:
        """Give the link its settings where they differ."""
        settings = self._state.interface, self._state.identity
        if self._settings == settings or not self._knows_settings:
            return
        before = self._link.addresses
        try:
            for change in await self._patience.wait_for(_RTNETLINK, self._link.configure(*settings)):
                _log.info("interface changed", change=change)
        except DeviceError as error:
            self._keep_fault(error)
        else:
            self._settings, self.fault = settings, None
        if self._link.addresses != before:
            await self._books.addresses(self._link.addresses)

    async def bring_up(self) -> None:
        """Bring the link up, unless it is."""
        if self.up or not self._knows_settings:
            return
        try:
            self.up = await self._patience.wait_for(_RTNETLINK, self._link.bring_up())
        except DeviceError as error:
            self._keep_fault(error)
        else:
            if self._settings == (self._state.interface, self._state.identity):
                self.fault = None
                self._told_faults.clear()

    async def remove(self) -> None:
        """Remove the interface, and do without until ``build``. Raises DeviceError."""
        await self._patience.wait_for(_RTNETLINK, self._link.remove())
        self.dismantled = True
        self.doubt()

    def build(self) -> None:
        """There is a state again: the interface is made anew when it is found to be missing."""
        self.dismantled = False

    def own(self, addresses: tuple[InterfaceAddress, ...]) -> None:
        """These addresses were put on the interface by the agent, in an earlier life."""
        self._link.addresses = addresses

    async def drift(self) -> Sequence[Drift]:
        """Return what somebody else has changed about a link that is configured. Raises DeviceError."""
        drift = await self._patience.wait_for(_RTNETLINK, self._link.drift())
        if drift:
            self.doubt()
        return drift

    def drift_of(self, device: ObservedDevice) -> Iterator[Drift]:
        """What of the link's settings the device itself shows to be otherwise."""
        if self._settings is None:
            return
        own_key = self._state.roster.own_key
        if own_key is not None and device.public_key != own_key:
            yield Drift(DriftKind.PRIVATE_KEY, None, "the interface has another private key")
        port, fwmark = self._link.listen_port, self._link.fwmark
        if port is not None and device.listen_port != port:
            yield Drift(DriftKind.LISTEN_PORT, None, f"listens on {device.listen_port} instead of {port}")
        if fwmark is not None and device.fwmark != fwmark:
            yield Drift(DriftKind.FWMARK, None, f"has {device.fwmark:#x} instead of {fwmark:#x}")

    @property
    def _knows_settings(self) -> bool:
        return self.made or self._state.location is not None

    def _keep_fault(self, error: DeviceError) -> None:
        if error.errno == errno.ENODEV:
            raise error
        if str(error) not in self._told_faults:
            self._told_faults.add(str(error))
            _log.error("the interface can't be set up, tried again at each tick", error=str(error))
        self.fault = error
