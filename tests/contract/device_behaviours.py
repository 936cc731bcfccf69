"""What every Device does, whoever implements it; ``BEHAVIOURS`` are run against each adapter.

Each gets a fresh device that is down and without peers, inside a network namespace of its own.
"""

import asyncio
import errno
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from agent.curve25519 import clamp, public_key
from agent.encoding import format_key
from agent.errors import DeviceError
from agent.model import (
    KEEP,
    AddPeer,
    CutPeer,
    DeviceConfig,
    Endpoint,
    InterfaceAddress,
    ObservedPeer,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)
from agent.wireguard.device import Device
from agent.wireguard.interface import (
    Backend,
    bring_up,
    configure_link,
    ensure_interface,
    open_device,
    remove_interface,
)
from tests.support.netns import Namespace, interface_name


@dataclass(frozen=True)
class Subject:
    """A device and what else a behaviour may need of where it is."""

    device: Device
    backend: Backend
    space: Namespace


Behaviour = Callable[[Subject], Awaitable[None]]
BEHAVIOURS: list[Behaviour] = []


def behaviour(function: Behaviour) -> Behaviour:
    BEHAVIOURS.append(function)
    return function


def key(label: object) -> PublicKey:
    # Public keys need no clamping; the top bit is masked by what computes with them.
    raw = bytearray(hashlib.sha256(f"key {label}".encode()).digest())
    raw[31] &= 127
    return PublicKey(bytes(raw))


def psk(label: object) -> PresharedKey:
    return PresharedKey(hashlib.sha256(f"psk {label}".encode()).digest())


def v4(text: str, length: int = 32) -> Prefix:
    return Prefix(bytes(map(int, text.split("."))), length)


def v6(last: int, length: int = 128) -> Prefix:
    return Prefix(bytes([0xFD, *bytes(13), last >> 8, last & 255]), length)


A, B = key("a"), key("b")
IP1, IP2, IP3 = v4("10.0.0.1"), v4("10.0.0.2"), v6(3)


async def peer(subject: Subject, public: PublicKey = A) -> ObservedPeer:
    return (await subject.device.read()).peers[public]


async def prefixes(subject: Subject, public: PublicKey = A) -> set[Prefix]:
    found = (await peer(subject, public)).allowed_ips
    assert len(found) == len(set(found))
    return set(found)


@behaviour
async def a_new_device_is_empty(subject: Subject) -> None:
    seen = await subject.device.read()
    assert seen.name == subject.device.name
    assert seen.public_key is None
    assert seen.peers == {}


@behaviour
async def settings_are_read_back(subject: Subject) -> None:
    private = clamp(psk("private").raw)
    for _ in range(2):
        await subject.device.configure(DeviceConfig(private, 51999, 0x2A))
        seen = await subject.device.read()
        assert (seen.public_key, seen.listen_port, seen.fwmark) == (
            public_key(private),
            51999,
            0x2A,
        )
    await subject.device.configure(DeviceConfig(fwmark=0))
    seen = await subject.device.read()
    assert (seen.public_key, seen.listen_port, seen.fwmark) == (public_key(private), 51999, 0)


@behaviour
async def the_own_public_key_is_no_peer(subject: Subject) -> None:
    private = clamp(psk("private").raw)
    await subject.device.configure(DeviceConfig(private))
    await subject.device.apply([AddPeer(public_key(private), psk(1), (IP1,))])
    assert (await subject.device.read()).peers == {}


@behaviour
async def an_added_peer_is_read_back(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1, IP3))])
    seen = await peer(subject)
    assert seen == ObservedPeer(A, psk(1), seen.allowed_ips, None, 0, 0.0, 0, 0)
    assert set(seen.allowed_ips) == {IP1, IP3}


@behaviour
async def a_peer_may_have_any_prefixes(subject: Subject) -> None:
    wanted = {v4("0.0.0.0", 0), v4("10.0.0.0", 8), v6(0, 0)._replace(packed=bytes(16)), v6(0, 64)}
    await subject.device.apply([AddPeer(A, None, tuple(wanted)), AddPeer(B, None, ())])
    assert await prefixes(subject) == wanted
    assert await prefixes(subject, B) == set()


@behaviour
async def adding_over_a_leftover_peer_leaves_neither_its_psk_nor_its_prefixes(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1, IP2))])
    await subject.device.apply([AddPeer(A, None, (IP2,))])
    assert (await peer(subject)).preshared_key is None
    assert await prefixes(subject) == {IP2}


@behaviour
async def a_removed_peer_is_gone(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1,)), AddPeer(B, psk(2), (IP2,))])
    await subject.device.apply([RemovePeer(A)])
    assert set((await subject.device.read()).peers) == {B}


@behaviour
async def what_is_not_there_is_not_made_by_removing_updating_or_cutting(subject: Subject) -> None:
    await subject.device.apply(
        [RemovePeer(A), CutPeer(A), UpdatePeer(A, psk(1), (IP1,), True, 25), AddPeer(B, None, ())]
    )
    assert set((await subject.device.read()).peers) == {B}


@behaviour
async def an_update_changes_the_psk_alone(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1, IP3)), UpdatePeer(A, KEEP, KEEP, False, 25)])
    before = await peer(subject)
    await subject.device.apply([UpdatePeer(A, psk(2), KEEP, False, KEEP)])
    assert await peer(subject) == before._replace(preshared_key=psk(2))


@behaviour
async def an_update_clears_the_psk(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1,))])
    await subject.device.apply([UpdatePeer(A, None, KEEP, False, KEEP)])
    assert (await peer(subject)).preshared_key is None
    assert await prefixes(subject) == {IP1}


@behaviour
async def an_update_adds_or_replaces_prefixes_and_keeps_the_psk(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1,))])
    await subject.device.apply([UpdatePeer(A, KEEP, (IP2,), False, KEEP)])
    assert await prefixes(subject) == {IP1, IP2}
    await subject.device.apply([UpdatePeer(A, KEEP, (IP3,), True, KEEP)])
    assert await prefixes(subject) == {IP3}
    await subject.device.apply([UpdatePeer(A, KEEP, (), True, KEEP)])
    assert await prefixes(subject) == set()
    assert (await peer(subject)).preshared_key == psk(1)


@behaviour
async def a_keepalive_is_set_and_switched_off(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1,))])
    for seconds in (25, 65535, 0):
        await subject.device.apply([UpdatePeer(A, KEEP, KEEP, False, seconds)])
        assert (await peer(subject)).persistent_keepalive == seconds


@behaviour
async def a_cut_peer_has_a_psk_that_nobody_knows_and_no_prefixes(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1, IP3)), AddPeer(B, None, (IP2,))])
    await subject.device.apply([CutPeer(A), CutPeer(B)])
    seen = (await subject.device.read()).peers
    assert [seen[A].allowed_ips, seen[B].allowed_ips] == [(), ()]
    keys = [seen[A].preshared_key, seen[B].preshared_key]
    await subject.device.apply([CutPeer(A)])
    keys += [(await peer(subject)).preshared_key, psk(1), None]
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])


@behaviour
async def a_prefix_moves_to_who_gets_it_last(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1, IP2)), AddPeer(B, psk(2), (IP2, IP3))])
    assert await prefixes(subject, A) == {IP1}
    assert await prefixes(subject, B) == {IP2, IP3}
    await subject.device.apply([UpdatePeer(A, KEEP, (IP3,), False, KEEP)])
    assert await prefixes(subject, A) == {IP1, IP3}
    assert await prefixes(subject, B) == {IP2}


@behaviour
async def operations_are_carried_out_in_their_order(subject: Subject) -> None:
    await subject.device.apply(
        [
            AddPeer(A, psk(1), (IP1,)),
            RemovePeer(A),
            AddPeer(B, psk(1), (IP1,)),
            RemovePeer(B),
            AddPeer(B, psk(2), (IP2,)),
            UpdatePeer(B, psk(3), KEEP, False, KEEP),
        ]
    )
    assert set((await subject.device.read()).peers) == {B}
    assert (await peer(subject, B)).preshared_key == psk(3)
    assert await prefixes(subject, B) == {IP2}


@behaviour
async def order_holds_over_more_than_one_message(subject: Subject) -> None:
    few = [key(i) for i in range(3)]
    rounds = 100
    await subject.device.apply(
        [
            operation
            for i in range(rounds)
            for public in few
            for operation in (RemovePeer(public), AddPeer(public, psk(i), (IP1,)))
        ]
    )
    seen = (await subject.device.read()).peers
    assert {p.preshared_key for p in seen.values()} == {psk(rounds - 1)}
    assert [seen[public].allowed_ips for public in few] == [(), (), (IP1,)]


@behaviour
async def a_peer_may_have_thousands_of_prefixes(subject: Subject) -> None:
    many = tuple(v4(f"10.{i >> 8}.{i & 255}.0", 24) for i in range(2000)) + tuple(v6(i) for i in range(1000))
    await subject.device.apply([AddPeer(A, psk(1), many), AddPeer(B, psk(2), (IP1,))])
    assert await prefixes(subject) == set(many)
    assert await prefixes(subject, B) == {IP1}
    await subject.device.apply([UpdatePeer(A, psk(2), many[500:], True, KEEP)])
    assert await prefixes(subject) == set(many[500:])
    assert (await peer(subject)).preshared_key == psk(2)


@behaviour
async def five_thousand_peers_are_added_read_cut_and_removed(subject: Subject) -> None:
    adds = [
        AddPeer(key(i), psk(i), (v4(f"10.1.{i >> 8}.{i & 255}"), v6(i))[: 1 + i % 2]) for i in range(5000)
    ]
    await subject.device.apply(adds)
    seen = (await subject.device.read()).peers
    assert len(seen) == len(adds)
    for add in adds:
        found = seen[add.public_key]
        assert found.preshared_key == add.preshared_key
        assert set(found.allowed_ips) == set(add.allowed_ips)
    await subject.device.apply([CutPeer(add.public_key) for add in adds])
    seen = (await subject.device.read()).peers
    assert {found.allowed_ips for found in seen.values()} == {()}
    assert len({found.preshared_key.raw for found in seen.values() if found.preshared_key}) == 5000
    await subject.device.apply([RemovePeer(add.public_key) for add in adds[1:]])
    assert set((await subject.device.read()).peers) == {adds[0].public_key}


@behaviour
async def calls_may_overlap(subject: Subject) -> None:
    adds = [AddPeer(key(i), psk(i), (v4(f"10.1.0.{i}"),)) for i in range(200)]
    await subject.device.apply(adds[:100])
    *_, seen = await asyncio.gather(
        subject.device.read(),
        subject.device.apply(adds[100:]),
        subject.device.read(),
        subject.device.apply([RemovePeer(add.public_key) for add in adds[:50]]),
        subject.device.read(),
    )
    assert set(seen.peers) == {add.public_key for add in adds[50:]}


@behaviour
async def a_cancelled_call_does_not_disturb_the_next(subject: Subject) -> None:
    adds = [AddPeer(key(i), psk(i), (v4(f"10.1.{i >> 8}.{i & 255}"),)) for i in range(1000)]
    await subject.device.apply(adds)
    cancelled = 0
    for turns in range(20):
        task = asyncio.create_task(subject.device.read())
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled += 1
        assert len((await subject.device.read()).peers) == len(adds)
    task_apply = asyncio.create_task(subject.device.apply([CutPeer(a.public_key) for a in adds]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task_apply.cancel()
    await asyncio.gather(task_apply, return_exceptions=True)
    await subject.device.apply([AddPeer(A, None, (v6(9),))])
    assert await prefixes(subject) == {v6(9)}
    assert cancelled > 3


@behaviour
async def a_closed_device_can_be_used_again(subject: Subject) -> None:
    await subject.device.apply([AddPeer(A, psk(1), (IP1,))])
    await subject.device.close()
    await subject.device.close()
    assert set((await subject.device.read()).peers) == {A}


@behaviour
async def a_device_that_is_not_there_is_enodev(subject: Subject) -> None:
    device = open_device(interface_name(), subject.backend)
    for call in (
        device.read(),
        device.apply([AddPeer(A, None, ())]),
        device.configure(DeviceConfig(fwmark=1)),
    ):
        with pytest.raises(DeviceError) as caught:
            await call
        assert caught.value.errno == errno.ENODEV
        assert caught.value.hint
    await device.close()


@behaviour
async def a_handshake_is_observed_and_a_psk_update_does_not_forget_it(subject: Subject) -> None:
    gateway, client = clamp(psk("gateway").raw), clamp(psk("client").raw)
    name = interface_name()
    made = await ensure_interface(name, str(subject.backend))  # type: ignore[arg-type]
    other = open_device(name, made.backend)
    try:
        await subject.device.configure(DeviceConfig(gateway, 51998))
        await other.configure(DeviceConfig(client))
        await subject.device.apply([AddPeer(public_key(client), psk(1), (IP1,))])
        await other.apply([AddPeer(public_key(gateway), psk(1), (IP2,))])
        await configure_link(subject.device.name, [InterfaceAddress(IP2.packed, 32)])
        await bring_up(subject.device.name)
        await bring_up(name)
        # The agent never sets endpoints; a client's configuration does.
        await asyncio.to_thread(
            subject.space.run,
            *("wg", "set", name, "peer", format_key(public_key(gateway))),
            *("endpoint", "127.0.0.1:51998", "persistent-keepalive", "1"),
        )
        seen = await peer(subject, public_key(client))
        while not seen.latest_handshake or seen.rx_bytes <= 148:
            await asyncio.sleep(0.02)
            seen = await peer(subject, public_key(client))
        port = (await other.read()).listen_port
        assert seen.endpoint == Endpoint(bytes([127, 0, 0, 1]), port)
        assert seen.latest_handshake > 1.6e9
        assert seen.tx_bytes > 0
        await subject.device.apply(
            [UpdatePeer(public_key(client), psk(2), KEEP, False, KEEP)],
        )
        after = await peer(subject, public_key(client))
        assert (after.endpoint, after.latest_handshake) == (seen.endpoint, seen.latest_handshake)
        assert after.rx_bytes >= seen.rx_bytes
        await subject.device.apply(
            [
                RemovePeer(public_key(client)),
                AddPeer(public_key(client), psk("unknown"), (IP1,)),
            ]
        )
        anew = await peer(subject, public_key(client))
        assert (anew.endpoint, anew.latest_handshake) == (None, 0.0)
    finally:
        await other.close()
        await remove_interface(name)


async def run(check: Behaviour, space: Namespace, backend: Backend) -> None:
    """Run a behaviour on a new device, which is gone afterwards."""
    name = interface_name()
    made = await ensure_interface(name, str(backend))  # type: ignore[arg-type]
    assert made.created
    device = open_device(name, made.backend)
    try:
        await check(Subject(device, made.backend, space))
    finally:
        await device.close()
        await remove_interface(name)
