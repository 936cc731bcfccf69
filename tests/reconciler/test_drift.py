"""What somebody else changes on the interface is noticed, counted and healed (rule 16)."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from agent.model import InterfaceAddress, InterfaceSettings, ObservedPeer
from agent.plan import DriftKind
from tests.reconciler.harness import Agent, Core, World, live, with_agent
from tests.support.builders import key, peer, prefixes, psk
from tests.support.kernel_model import KernelPeer
from tests.support.recording_device import Host

ADDRESS = InterfaceAddress(bytes([10, 8, 0, 1]), 16)


def add_stranger(host: Host) -> None:
    host.kernel.peers[key(77)] = KernelPeer(99, None, set(prefixes("10.8.0.77")))


def remove_peer(host: Host) -> None:
    del host.kernel.peers[key(1)]


def clear_psk(host: Host) -> None:
    host.kernel.peers[key(1)].preshared_key = None


def another_psk(host: Host) -> None:
    host.kernel.peers[key(1)].preshared_key = psk(666)


def more_addresses(host: Host) -> None:
    host.kernel.peers[key(1)].allowed_ips |= set(prefixes("0.0.0.0/0"))


def no_addresses(host: Host) -> None:
    host.kernel.peers[key(1)].allowed_ips.clear()


def keepalive(host: Host) -> None:
    host.kernel.peers[key(1)].persistent_keepalive = 9


def listen_port(host: Host) -> None:
    host.listen_port = 1


def down(host: Host) -> None:
    host.up = False


def address(host: Host) -> None:
    host.addresses.clear()


def fwmark(host: Host) -> None:
    host.fwmark = 7


def private_key(host: Host) -> None:
    host.public_key = key(5)


@pytest.mark.parametrize(
    ("change", "kind", "stays"),
    [
        (add_stranger, DriftKind.PEER_ADDED, True),
        (remove_peer, DriftKind.PEER_REMOVED, False),
        (clear_psk, DriftKind.PRESHARED_KEY, False),
        (another_psk, DriftKind.PRESHARED_KEY, False),
        (more_addresses, DriftKind.ALLOWED_IPS, True),
        (no_addresses, DriftKind.ALLOWED_IPS, True),
        (keepalive, DriftKind.PERSISTENT_KEEPALIVE, True),
        (listen_port, DriftKind.LISTEN_PORT, True),
        (private_key, DriftKind.PRIVATE_KEY, True),
        (down, DriftKind.LINK_DOWN, True),
        (address, DriftKind.ADDRESS, True),
    ],
)
def test_drift_is_counted_once_and_healed(
    world: World, change: Callable[[Host], None], kind: DriftKind, *, stays: bool
) -> None:
    """``stays``: the peer keeps its tunnel; who may have been let in by a strange PSK does not."""

    async def scenario(agent: Agent, core: Core) -> None:
        settings = InterfaceSettings(addresses=(ADDRESS,))
        await agent.give(replace(core.state([live(1), live(2)]), interface=settings))
        before = world.host.kernel.read().peers
        incarnation = world.host.kernel.peers[key(1)].incarnation
        change(world.host)
        await agent.look()
        assert agent.drift() == {kind.value: 1}
        assert world.host.kernel.read().peers == before
        assert (world.host.public_key, world.host.listen_port) == (b"\xee" * 32, 51820)
        assert (world.host.up, world.host.addresses) == (True, {ADDRESS})
        assert (world.host.kernel.peers[key(1)].incarnation == incarnation) is stays
        await agent.look()
        assert agent.drift() == {kind.value: 1}

    with_agent(world, scenario)


def test_a_mark_that_core_sets_is_held(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        settings = InterfaceSettings(listen_port=443, fwmark=5)
        await agent.give(replace(core.state([]), interface=settings))
        assert (world.host.listen_port, world.host.fwmark) == (443, 5)
        fwmark(world.host)
        await agent.look()
        assert agent.drift() == {"fwmark": 1}
        assert (world.host.listen_port, world.host.fwmark) == (443, 5)

    with_agent(world, scenario)


def test_a_stolen_prefix_is_given_back(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        kernel = world.host.kernel
        kernel.peers[key(1)].allowed_ips |= set(prefixes("10.8.0.2"))
        kernel.peers[key(2)].allowed_ips.clear()
        await agent.look()
        assert agent.drift() == {"allowed_ips": 2}
        shown: dict[int, ObservedPeer] = {n: kernel.read().peers[key(n)] for n in (1, 2)}
        assert shown[1].allowed_ips == prefixes("10.8.0.1")
        assert shown[2].allowed_ips == prefixes("10.8.0.2")

    with_agent(world, scenario)


def test_a_stranger_put_on_by_hand_is_not_taken_for_a_waiting_peer(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        world.host.kernel.peers[key(2)] = KernelPeer(99, psk(2), set(prefixes("10.8.0.2")))
        await agent.look()
        assert set(world.on_interface()) == {key(1)}

    with_agent(world, scenario)


def test_an_endpoint_a_handshake_and_bytes_are_no_drift(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.host.kernel.handshake(key(1), psk(1), "client", world.clock())
        world.host.kernel.send(key(1), 5000, world.clock())
        await agent.look()
        assert agent.drift() == {}

    with_agent(world, scenario)
