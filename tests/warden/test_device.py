"""A device that does not follow: the guard does without it."""

import pytest

from agent.errors import DeviceError
from agent.model import AddPeer, RemovePeer
from tests.reconciler.harness import Agent, Core, live, revoked
from tests.support.builders import key, peer, psk
from tests.warden.harness import Gateway


def test_a_peer_that_the_device_will_not_remove_loses_its_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        gateway.world.host.refuses = {key(1): frozenset({RemovePeer})}
        await agent.give([core.change(revoked(1, "s1"))])
        assert key(1) in gateway.world.on_interface()
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)

    gateway.run(scenario)


def test_who_cannot_be_taken_off_an_interface_that_is_broken_is_let_through_no_longer(
    gateway: Gateway,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        host = gateway.world.host
        host.fails = host.reads_fail = 1000
        with pytest.raises(DeviceError):
            await agent.give([core.change(revoked(1, "s1"))])
        assert key(1) in gateway.world.on_interface()
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)
        host.fails = host.reads_fail = 0
        await agent.tick()
        assert gateway.world.on_interface() == {key(2): psk(2)}
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)

    gateway.run(scenario)


def test_the_table_stays_while_the_device_holds_a_peer_that_should_be_gone(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        gateway.world.host.refuses = {key(1): frozenset({RemovePeer})}
        await agent.give(core.state([peer(2, mfa_exempt=True)], mfa_required=False))
        assert gateway.guard.up
        gateway.world.host.refuses = {}
        await agent.tick()
        assert not gateway.guard.up

    gateway.run(scenario)


def test_a_peer_that_the_device_will_not_take_has_no_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.world.host.refuses = {key(1): frozenset({AddPeer})}
        await agent.give(core.state([live(1), live(2)]))
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)

    gateway.run(scenario)
