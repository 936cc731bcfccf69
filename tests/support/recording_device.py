"""A link and a device in memory that behave as the kernel does, record what is asked and fail on demand.

For what a real device can't be made to do: an error in the middle of a batch, an interface that
vanishes between two calls, a peer that the kernel will not take, a slow kernel.
"""

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent.errors import DeviceError
from agent.model import (
    DeviceConfig,
    Identity,
    InterfaceAddress,
    InterfaceSettings,
    ObservedDevice,
    Operation,
    PublicKey,
)
from agent.plan import Drift, DriftKind
from tests.support.builders import OWN_KEY
from tests.support.kernel_model import Kernel


class Killed(BaseException):
    """The process dies here; what the kernel and the disk hold is what is left."""


@dataclass
class Host:
    """What outlives the agent's process: the interface, if there is one, and its settings.

    ``refuses`` names peers that the kernel takes no operation of the given kinds for; ``fails`` counts
    the calls of ``apply`` that fail after ``before_failing`` operations; ``apply_takes`` is called
    with the number of operations that a call was given (a slow kernel moves the test's clock there).
    ``link_takes`` is what the link's settings wait for, in a thread. While ``comes_up_later`` the link is
    not to come up yet, and for ``held_down``, a reason, it can't.
    """

    kernel: Kernel = field(default_factory=Kernel)
    exists: bool = False
    up: bool = False
    public_key: PublicKey | None = None
    listen_port: int = 0
    fwmark: int = 0
    mtu: int | None = None
    addresses: set[InterfaceAddress] = field(default_factory=set)
    log: list[tuple[str, object]] = field(default_factory=list)
    refuses: dict[PublicKey, frozenset[type]] = field(default_factory=dict)
    fails: int = 0
    before_failing: int = 0
    error: int = errno.ENOMEM
    reads_fail: int = 0
    cannot_be_made: bool = False
    taken_ports: frozenset[int] = frozenset()
    apply_takes: Callable[[int], None] = lambda _: None
    link_takes: Callable[[], object] | None = None
    comes_up_later: bool = False
    held_down: str | None = None
    at: Callable[[str], None] = lambda _: None

    def link(self) -> "RecordingLink":
        """What a new process opens."""
        return RecordingLink(self)

    def operations(self) -> list[Operation]:
        """The operations carried out so far, in their order."""
        return [what for kind, what in self.log if kind == "operation"]  # type: ignore[misc]

    def existing(self) -> "Host":
        """Itself; DeviceError with ENODEV while there is no interface."""
        if not self.exists:
            raise DeviceError("wg0 is gone", errno=errno.ENODEV)
        return self

    def delete(self) -> None:
        """Somebody deletes the interface."""
        self.exists = self.up = False
        self.kernel.reboot()
        self.addresses.clear()
        self.public_key, self.listen_port, self.fwmark = None, 0, 0

    def write(self, operation: Operation) -> None:
        """One operation, as the kernel takes it or not."""
        if type(operation) in self.refuses.get(operation.public_key, frozenset()):
            raise DeviceError("the kernel refuses a peer", errno=errno.EINVAL)
        self.at("kernel")
        self.kernel.apply(operation)
        self.log.append(("operation", operation))
        self.at("kernel, after")


async def _io() -> None:
    """Give way to other tasks, as a request to a real device does."""
    for _ in range(2):
        await asyncio.sleep(0)


class RecordingLink:
    """The ``Link`` of ``agent.ports``."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.addresses: tuple[InterfaceAddress, ...] = ()
        self.listen_port: int | None = None
        self.fwmark: int | None = None
        self.device = RecordingDevice(host)

    async def ensure(self) -> bool:
        if self.host.cannot_be_made:
            raise DeviceError("no interface can be made", errno=errno.EPERM)
        made, self.host.exists = not self.host.exists, True
        self.host.log.append(("ensure", made))
        return made

    async def _network(self) -> Host:
        if self.host.link_takes is not None:
            await asyncio.to_thread(self.host.link_takes)
        return self.host.existing()

    async def configure(self, settings: InterfaceSettings, identity: Identity | None) -> list[str]:
        host = await self._network()
        host.public_key = OWN_KEY if identity is None else identity.public_key
        if settings.listen_port in host.taken_ports:
            raise DeviceError("the port is taken", errno=errno.EADDRINUSE)
        self.listen_port = 51820 if settings.listen_port is None else settings.listen_port
        self.fwmark = settings.fwmark
        host.listen_port, host.fwmark = self.listen_port, settings.fwmark or 0
        host.mtu = settings.mtu
        if settings.addresses is not None:
            host.addresses = set(settings.addresses)
            self.addresses = settings.addresses
        host.log.append(("configure", settings))
        return []

    async def drift(self) -> list[Drift]:
        host = await self._network()
        drift = [Drift(DriftKind.ADDRESS, None, str(a)) for a in self.addresses if a not in host.addresses]
        return [*drift, *([] if host.up else [Drift(DriftKind.LINK_DOWN, None, "is down")])]

    async def bring_up(self) -> bool:
        host = await self._network()
        if host.held_down is not None:
            raise DeviceError(host.held_down)
        host.up = not host.comes_up_later
        host.log.append(("up", host.up))
        return host.up

    async def before_removal(self) -> None:
        """No commands."""

    async def after_removal(self) -> None:
        """No commands."""

    async def remove(self) -> None:
        await self._network()
        self.host.delete()
        self.addresses = ()
        self.host.log.append(("remove", None))

    async def close(self) -> None:
        self.host.log.append(("close", None))


class RecordingDevice:
    """The ``Device`` of such a link."""

    name = "wg0"

    def __init__(self, host: Host) -> None:
        self.host = host

    async def read(self) -> ObservedDevice:
        await _io()
        host = self.host.existing()
        if host.reads_fail:
            host.reads_fail -= 1
            raise DeviceError("the interface can't be read", errno=host.error)
        host.log.append(("read", len(host.kernel.peers)))
        peers = host.kernel.read().peers
        return ObservedDevice("wg0", host.public_key, host.listen_port, host.fwmark, peers)

    async def apply(self, operations: Sequence[Operation]) -> None:
        await _io()
        host = self.host.existing()
        host.log.append(("batch", len(operations)))
        fails_at = None
        if host.fails and operations:
            host.fails -= 1
            fails_at = min(host.before_failing, len(operations) - 1)
        for number, operation in enumerate(operations):
            if number == fails_at:
                raise DeviceError("the kernel fails", errno=host.error)
            host.write(operation)
        host.apply_takes(len(operations))

    async def configure(self, config: DeviceConfig) -> None:
        raise AssertionError("the link's own business")

    async def close(self) -> None:
        """Nothing is held."""
