"""What the link's set-up does, whoever implements the interface.

Each is given a name that no interface has yet, inside a network namespace of its own.
"""

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from agent.errors import DeviceError
from agent.model import AddPeer, DeviceConfig, InterfaceAddress, Prefix, PublicKey
from agent.wireguard.interface import (
    Backend,
    Ensured,
    LinkChanges,
    bring_up,
    configure_link,
    ensure_interface,
    find_backend,
    forwarding,
    open_device,
    read_link,
    remove_interface,
    unrouted,
)
from tests.support.netns import Namespace, interface_name


@dataclass(frozen=True)
class Place:
    name: str
    backend: Backend
    space: Namespace

    async def ensure(self) -> Ensured:
        return await ensure_interface(self.name, self.backend.value)

    async def run(self, *argv: str) -> str:
        return (await asyncio.to_thread(self.space.run, *argv)).stdout

    async def shown(self) -> dict[str, Any]:
        shown: list[dict[str, Any]] = json.loads(await self.run("ip", "-j", "address", "show", self.name))
        return shown[0]

    async def addresses(self) -> set[str]:
        return {
            f"{info['local']}/{info['prefixlen']}"
            for info in (await self.shown())["addr_info"]
            if info["scope"] == "global"
        }


Behaviour = Callable[[Place], Awaitable[None]]
BEHAVIOURS: list[Behaviour] = []


def behaviour(function: Behaviour) -> Behaviour:
    BEHAVIOURS.append(function)
    return function


def v4(text: str, length: int) -> InterfaceAddress:
    return InterfaceAddress(bytes(map(int, text.split("."))), length)


V6 = InterfaceAddress(bytes([0xFD, *bytes(14), 1]), 64)


@behaviour
async def an_interface_is_made_once_and_then_found(place: Place) -> None:
    assert await find_backend(place.name) is None
    assert await read_link(place.name) is None
    assert await place.ensure() == Ensured(place.backend, created=True)
    assert await place.ensure() == Ensured(place.backend, created=False)
    assert await ensure_interface(place.name) == Ensured(place.backend, created=False)
    assert await find_backend(place.name) == place.backend


@behaviour
async def a_new_interface_is_down_and_comes_up_once(place: Place) -> None:
    await place.ensure()
    link = await read_link(place.name)
    assert link is not None
    assert (link.name, link.up, link.addresses) == (place.name, False, frozenset())
    assert await bring_up(place.name) is True
    assert await bring_up(place.name) is False
    assert "UP" in (await place.shown())["flags"]


@behaviour
async def addresses_and_mtu_are_set_where_they_differ(place: Place) -> None:
    await place.ensure()
    wanted = [v4("10.0.0.1", 24), V6]
    assert await configure_link(place.name, wanted, 1380) == LinkChanges(tuple(wanted), (), 1380)
    assert await place.addresses() == {"10.0.0.1/24", "fd00::1/64"}
    assert (await place.shown())["mtu"] == 1380
    assert await configure_link(place.name, wanted, 1380) == LinkChanges()
    assert await configure_link(place.name, wanted) == LinkChanges()
    assert (await place.shown())["mtu"] == 1380


@behaviour
async def only_addresses_that_were_ours_are_removed(place: Place) -> None:
    await place.ensure()
    old, new = v4("10.0.0.1", 24), v4("10.1.0.1", 24)
    await configure_link(place.name, [old])
    await place.run("ip", "address", "add", "192.0.2.1/32", "dev", place.name)
    changes = await configure_link(place.name, [new], previous=[old, V6])
    assert changes == LinkChanges((new,), (old,))
    assert await place.addresses() == {"192.0.2.1/32", "10.1.0.1/24"}


@behaviour
async def an_address_may_get_another_length(place: Place) -> None:
    await place.ensure()
    longer = V6._replace(length=128)
    before = [v4("10.0.0.1", 24), v4("10.0.0.2", 24), V6]
    after = [v4("10.0.0.1", 32), v4("10.0.0.2", 24), longer]
    await configure_link(place.name, before)
    await configure_link(place.name, after, previous=before)
    # Removing the first address of a network takes the others of it along.
    assert await place.addresses() == {"10.0.0.1/32", "10.0.0.2/24", "fd00::1/128"}


@behaviour
async def an_address_that_somebody_else_set_otherwise_is_left_and_reported(place: Place) -> None:
    await place.ensure()
    await place.run("ip", "address", "add", "fd00::1/48", "dev", place.name)
    with pytest.raises(DeviceError, match="fd00::1/64"):
        await configure_link(place.name, [V6])
    assert await place.addresses() == {"fd00::1/48"}


@behaviour
async def an_interface_is_removed_with_its_peers(place: Place) -> None:
    await place.ensure()
    await bring_up(place.name)
    device = open_device(place.name, place.backend)
    await device.apply(
        [
            AddPeer(
                PublicKey(bytes([1, i >> 8, i & 255, *bytes(29)])),
                None,
                (Prefix(bytes([10, 1, i >> 8, i & 255]), 32),),
            )
            for i in range(500)
        ]
    )
    await device.close()
    assert await remove_interface(place.name) is True
    assert await remove_interface(place.name) is False
    assert place.name not in place.space.links()
    assert await place.ensure() == Ensured(place.backend, created=True)


@behaviour
async def an_interface_of_another_kind_is_left_alone(place: Place) -> None:
    for make in (
        ("ip", "link", "add", place.name, "type", "veth", "peer", "name", "other"),
        ("ip", "tuntap", "add", place.name, "mode", "tun"),
    ):
        await place.run(*make)
        for call in (place.ensure(), remove_interface(place.name)):
            with pytest.raises(DeviceError, match="not a WireGuard interface") as caught:
                await call
            assert caught.value.errno == errno.EEXIST
        assert place.name in place.space.links()
        await place.run("ip", "link", "delete", place.name)


@behaviour
async def a_link_that_outlives_its_program_for_a_moment_is_waited_for(place: Place) -> None:
    await place.run("ip", "tuntap", "add", place.name, "mode", "tun")
    going = asyncio.create_task(place.run("sh", "-c", f"sleep 0.5; ip link delete {place.name}"))
    assert await find_backend(place.name) is None
    await going


@behaviour
async def an_interface_of_the_other_implementation_is_left_alone(place: Place) -> None:
    await place.ensure()
    other = Backend.USERSPACE if place.backend is Backend.KERNEL else Backend.KERNEL
    with pytest.raises(DeviceError, match=f"implemented by the {place.backend}") as caught:
        await ensure_interface(place.name, other.value)
    assert caught.value.errno == errno.EEXIST
    assert await find_backend(place.name) == place.backend


@behaviour
async def what_is_done_to_a_missing_interface_is_enodev(place: Place) -> None:
    for call in (
        configure_link(place.name, [V6]),
        bring_up(place.name),
        unrouted(place.name, []),
    ):
        with pytest.raises(DeviceError) as caught:
            await call
        assert caught.value.errno == errno.ENODEV
        assert caught.value.hint


@behaviour
async def a_port_in_use_is_reported_with_what_to_do(place: Place) -> None:
    async def serve(name: str) -> None:
        await ensure_interface(name, place.backend.value)
        device = open_device(name, place.backend)
        try:
            # A userspace implementation takes the port at once, the kernel when the link comes up.
            await device.configure(DeviceConfig(listen_port=51997))
            await bring_up(name)
        finally:
            await device.close()

    await serve(place.name)
    other = interface_name()
    with pytest.raises(DeviceError, match="in use") as caught:
        await serve(other)
    assert caught.value.errno == errno.EADDRINUSE
    assert "listen_port" in caught.value.hint
    await remove_interface(other)


@behaviour
async def prefixes_without_a_route_through_the_interface_are_found(place: Place) -> None:
    await place.ensure()
    await configure_link(place.name, [v4("10.1.0.1", 16), V6])
    await bring_up(place.name)
    await place.run("ip", "route", "add", "10.2.0.0/24", "dev", place.name, "table", "77")
    await place.run("ip", "route", "add", "blackhole", "10.3.0.0/24")
    inside = [
        Prefix(bytes([10, 1, 2, 3]), 32),
        Prefix(bytes([10, 1, 0, 0]), 16),
        Prefix(bytes([10, 2, 0, 0]), 25),
        Prefix(bytes([0xFD, *bytes(14), 9]), 128),
    ]
    outside = [
        Prefix(bytes([10, 0, 0, 0]), 8),
        Prefix(bytes([10, 3, 0, 1]), 32),
        Prefix(bytes([10, 2, 1, 0]), 32),
        Prefix(bytes([0xFD, 1, *bytes(13), 9]), 128),
    ]
    assert await unrouted(place.name, inside + outside) == outside
    await place.run("ip", "route", "add", "default", "dev", place.name)
    assert await unrouted(place.name, inside + outside) == outside[3:]


@behaviour
async def forwarding_is_read_from_this_namespace(place: Place) -> None:
    await place.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=1")
    assert (forwarding().ipv4, forwarding().ipv6) == (False, True)
    await place.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=0")
    assert (forwarding().ipv4, forwarding().ipv6) == (True, False)


async def run(check: Behaviour, space: Namespace, backend: Backend) -> None:
    """Run a behaviour, and remove what it left."""
    place = Place(interface_name(), backend, space)
    try:
        await check(place)
    finally:
        if await read_link(place.name) is not None:
            await remove_interface(place.name)
