"""The link itself: made, addressed, brought up and removed, touching nothing that is not ours.

The order at start is: ``ensure_interface``, ``configure_link``, the firewall's table, the peers,
``bring_up``. Every step may be repeated; one that finds nothing to do changes nothing. All of them
raise DeviceError, act in the caller's network namespace and need CAP_NET_ADMIN.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

from pyroute2.iproute.linux import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.errors import DeviceError
from agent.model import InterfaceAddress, Prefix, RemovePeer
from agent.wireguard import userspace
from agent.wireguard.device import Device
from agent.wireguard.kernel import KernelDevice, kernel_has_wireguard
from agent.wireguard.userspace import UserspaceDevice

_IFF_UP: Final = 1
_RTN_UNICAST: Final = 1
_SOCKET_TIMEOUT: Final = 5.0
# How long a tun link may outlive the socket of the program that made it, and how often to look.
_DYING: Final = 2.0
_POLL: Final = 0.05


class Backend(StrEnum):
    """Who implements the interface."""

    KERNEL = "kernel"
    USERSPACE = "userspace"


@dataclass(frozen=True, slots=True)
class Link:
    """A link as read; ``kind`` is rtnetlink's, empty for hardware."""

    name: str
    index: int
    kind: str
    mtu: int
    up: bool
    addresses: frozenset[InterfaceAddress]


@dataclass(frozen=True, slots=True)
class Ensured:
    """The interface is there. ``warning`` is a sentence for the operator, or empty."""

    backend: Backend
    created: bool
    warning: str = ""


@dataclass(frozen=True, slots=True)
class LinkChanges:
    """What ``configure_link`` did; ``mtu`` is None where it was right already."""

    added: tuple[InterfaceAddress, ...] = ()
    removed: tuple[InterfaceAddress, ...] = ()
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Forwarding:
    """Whether the kernel forwards packets between interfaces."""

    ipv4: bool
    ipv6: bool


def open_device(name: str, backend: Backend) -> Device:
    """Return the device behind an interface that ``ensure_interface`` has made or found."""
    return KernelDevice(name) if backend is Backend.KERNEL else UserspaceDevice(name)


async def ensure_interface(
    name: str,
    backend: Literal["auto", "kernel", "userspace"] = "auto",
    program: str = "wireguard-go",
) -> Ensured:
    """Find the WireGuard interface, or make it: down, without addresses or peers.

    "auto" takes the interface that is there whatever implements it, else the kernel if it has
    WireGuard, else ``program``. An interface of another kind, or one that is not implemented as
    ``backend`` asks, is left alone: DeviceError, EEXIST.
    """
    found = await find_backend(name)
    if found is not None:
        if backend not in {"auto", found}:
            raise DeviceError(
                f"{name} exists and is implemented by the {found}, not by the {backend}",
                'remove it with `wg-agent purge`, or set interface.backend = "auto"',
                errno=errno.EEXIST,
            )
        return Ensured(found, created=False)
    if backend == "userspace" or (backend == "auto" and not await kernel_has_wireguard()):
        if await userspace.start(name, program):
            return Ensured(Backend.USERSPACE, created=True)
        warning = (
            f"{program} runs inside the agent's own unit and ends with it: systemd-run did not "
            "work, so tunnels will not survive a restart of the agent"
        )
        return Ensured(Backend.USERSPACE, created=True, warning=warning)
    async with _rtnetlink(name) as ip:
        await ip.link("add", ifname=name, kind="wireguard")
    return Ensured(Backend.KERNEL, created=True)


async def find_backend(name: str) -> Backend | None:
    """Return who implements the interface, None if there is none; EEXIST if it is no WireGuard.

    A tun link that nobody answers for is given a moment: of a program that dies the socket may go first.
    """
    link = await read_link(name)
    for _ in range(int(_DYING / _POLL)):
        if link is None or link.kind != "tun" or await userspace.answers(name):
            break
        await asyncio.sleep(_POLL)
        link = await read_link(name)
    if link is None:
        return None
    if link.kind == "wireguard":
        return Backend.KERNEL
    if link.kind == "tun" and await userspace.answers(name):
        return Backend.USERSPACE
    raise DeviceError(
        f"{name} exists and is not a WireGuard interface (its kind is {link.kind or 'hardware'})",
        "choose another interface.name, or remove it yourself: the agent leaves it alone",
        errno=errno.EEXIST,
    )


async def configure_link(
    name: str,
    addresses: Sequence[InterfaceAddress],
    mtu: int | None = None,
    previous: Iterable[InterfaceAddress] = (),
) -> LinkChanges:
    """Give the interface these addresses and this MTU (None: leave it).

    Of the addresses that are there and not wanted only those in ``previous`` are removed: what the
    agent set before. Others are somebody else's.
    """
    wanted = list(dict.fromkeys(addresses))
    async with _rtnetlink(name) as ip:
        link = await _existing(ip, name)
        if mtu is not None and mtu != link.mtu:
            await ip.link("set", index=link.index, mtu=mtu)
        added = [address for address in wanted if address not in link.addresses]
        removed = [
            address
            for address in dict.fromkeys(previous)
            if address in link.addresses and address not in wanted
        ]
        for address in added:
            await _add(ip, link.index, address)
        for address in removed:
            await _remove(ip, link.index, address)
        # Removing an address takes others of its network with it, and an IPv6 address can't be
        # added beside itself with another length: so what is missing now is added again.
        for address in wanted if removed else ():
            await _add(ip, link.index, address)
        missing = set(wanted) - await _addresses(ip, link.index)
    if missing:
        raise DeviceError(
            f"{name} can't have the address {min(map(str, missing))}",
            "it has the same address with another length, which the agent did not set: remove it",
            errno=errno.EEXIST,
        )
    return LinkChanges(tuple(added), tuple(removed), None if mtu == link.mtu else mtu)


async def bring_up(name: str) -> bool:
    """Bring the interface up; return whether it was down."""
    async with _rtnetlink(name) as ip:
        link = await _existing(ip, name)
        if not link.up:
            await ip.link("set", index=link.index, state="up")
        return not link.up


async def remove_interface(name: str) -> bool:
    """Remove the interface, its peers first; return whether there was one.

    The kernel waits for each peer that is still there when a link goes; peers that are removed
    before cost it a fraction of that. A userspace implementation ends with its link.
    """
    backend = await find_backend(name)
    if backend is None:
        return False
    device = open_device(name, backend)
    try:
        observed = await device.read()
        await device.apply([RemovePeer(key) for key in observed.peers])
    finally:
        await device.close()
    async with _rtnetlink(name) as ip:
        link = await _existing(ip, name)
        await ip.link("del", index=link.index)
    if backend is Backend.USERSPACE:
        for _ in range(int(_SOCKET_TIMEOUT / 0.02)):
            if not await userspace.answers(name):
                break
            await asyncio.sleep(0.02)
        else:
            raise DeviceError(
                f"the userspace WireGuard of {name} goes on although its interface is gone",
                "end the program yourself",
                errno=errno.EBUSY,
            )
        userspace.socket_path(name).unlink(missing_ok=True)
    return True


async def read_link(name: str) -> Link | None:
    """Return the link, None if there is none. Needs no privilege."""
    async with _rtnetlink(name) as ip:
        return await _read(ip, name)


def forwarding() -> Forwarding:
    """Return whether this network namespace forwards packets; what can't be read counts as off."""

    def on(path: str) -> bool:
        try:
            return Path("/proc/sys/net", path).read_text().strip() != "0"
        except OSError:
            return False

    return Forwarding(on("ipv4/ip_forward"), on("ipv6/conf/all/forwarding"))


async def unrouted(name: str, prefixes: Iterable[Prefix]) -> list[Prefix]:
    """Return the prefixes that no unicast route through the interface covers, in any table."""
    routes: dict[tuple[int, int], set[int]] = {}
    async with _rtnetlink(name) as ip:
        link = await _existing(ip, name)
        for family in (socket.AF_INET, socket.AF_INET6):
            async for route in await ip.get_routes(family=family, oif=link.index):
                if route["type"] != _RTN_UNICAST:
                    continue
                size = 4 if family == socket.AF_INET else 16
                text = route.get_attr("RTA_DST")
                packed = socket.inet_pton(family, text) if text else bytes(size)
                length = route["dst_len"]
                number = int.from_bytes(packed, "big") >> (size * 8 - length)
                routes.setdefault((size, length), set()).add(number)

    def covered(prefix: Prefix) -> bool:
        size = len(prefix.packed)
        number = int.from_bytes(prefix.packed, "big")
        return any(
            number >> (size * 8 - length) in known
            for (route_size, length), known in routes.items()
            if route_size == size and length <= prefix.length
        )

    return [prefix for prefix in prefixes if not covered(prefix)]


@asynccontextmanager
async def _rtnetlink(name: str) -> AsyncIterator[Any]:
    """A socket for set-up work; kernel errors of the block come out as DeviceError."""
    try:
        async with AsyncIPRoute() as ip:
            yield ip
    except NetlinkError as error:
        raise _link_error(name, error.code) from None
    except OSError as error:
        raise _link_error(name, error.errno or errno.EIO) from None


async def _read(ip: Any, name: str) -> Link | None:
    try:
        replies = await ip.link("get", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    for reply in replies:
        return Link(
            name,
            reply["index"],
            reply.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
            reply.get_attr("IFLA_MTU"),
            bool(reply["flags"] & _IFF_UP),
            frozenset(await _addresses(ip, reply["index"])),
        )
    return None


async def _existing(ip: Any, name: str) -> Link:
    link = await _read(ip, name)
    if link is None:
        raise _link_error(name, errno.ENODEV)
    return link


async def _addresses(ip: Any, index: int) -> set[InterfaceAddress]:
    found = set()
    async for reply in await ip.get_addr(index=index):
        # On a point-to-point link IFA_ADDRESS is the other end's.
        text = reply.get_attr("IFA_LOCAL") or reply.get_attr("IFA_ADDRESS")
        found.add(InterfaceAddress(socket.inet_pton(reply["family"], text), reply["prefixlen"]))
    return found


def _text(address: InterfaceAddress) -> dict[str, Any]:
    family = socket.AF_INET if len(address.packed) == 4 else socket.AF_INET6
    return {"address": socket.inet_ntop(family, address.packed), "prefixlen": address.length}


async def _add(ip: Any, index: int, address: InterfaceAddress) -> None:
    try:
        await ip.addr("add", index=index, **_text(address))
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


async def _remove(ip: Any, index: int, address: InterfaceAddress) -> None:
    try:
        await ip.addr("del", index=index, **_text(address))
    except NetlinkError as error:
        # It went with another address of its network.
        if error.code not in {errno.EADDRNOTAVAIL, errno.ENOENT}:
            raise


_HINTS: Final = {
    errno.ENODEV: "there is no such interface: the agent makes it when it starts",
    errno.EPERM: "the agent needs CAP_NET_ADMIN: run it as root or by its systemd unit",
    errno.EACCES: "the agent needs CAP_NET_ADMIN: run it as root or by its systemd unit",
    errno.EOPNOTSUPP: 'the kernel has no WireGuard: load its module, or set interface.backend = "userspace"',
    errno.EADDRINUSE: "another program uses the port: choose another interface.listen_port",
}


def _link_error(name: str, code: int) -> DeviceError:
    return DeviceError(
        f"{name}: setting up the interface failed: {os.strerror(code)}",
        _HINTS.get(code, ""),
        errno=code,
    )
