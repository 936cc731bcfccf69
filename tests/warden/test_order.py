"""In which order guard, device and link are written (rules 11 and 12)."""

from agent.model import Refusal
from tests.reconciler.harness import Agent, Core, granted, live, revoked
from tests.support.builders import grant, key, location_changed, peer
from tests.warden.harness import Gateway, refusals


def test_on_a_grant_the_element_is_written_before_the_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert gateway.since(mark) == ["admit 1", "AddPeer 1"]
        assert gateway.left(1) == 3600

    gateway.run(scenario)


def test_on_an_end_the_peer_goes_before_the_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        mark = gateway.mark()
        await agent.give([core.change(revoked(1, "s1"))])
        gateway.world.clock.advance(3600)
        await agent.tick()
        assert gateway.since(mark) == [
            "RemovePeer 1",
            "dismiss 10.8.0.1/32",
            "RemovePeer 2",
            "dismiss 10.8.0.2/32",
        ]
        assert not gateway.guard.ends

    gateway.run(scenario)


def test_mfa_on_raises_the_table_before_any_peer_is_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)], mfa_required=False))
        assert not gateway.guard.up
        mark = gateway.mark()
        await agent.give([core.change(location_changed(mfa_required=True))])
        words = gateway.since(mark)
        assert words[0] == "raise 1 3"
        assert sorted(words[1:]) == ["AddPeer 1", "RemovePeer 1", "RemovePeer 2"]
        assert (gateway.left(1), gateway.left(2), gateway.left(3)) == (3600, 0, None)

    gateway.run(scenario)


def test_mfa_on_removes_who_has_no_session_even_if_the_table_cannot_be_had(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)], mfa_required=False))
        gateway.guard.fails = {"raise"}
        await agent.give([core.change(location_changed(mfa_required=True))])
        assert gateway.world.on_interface() == {}
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}

    gateway.run(scenario)


def test_mfa_off_takes_the_table_down_last(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2, mfa_exempt=True)]))
        mark = gateway.mark()
        await agent.give([core.change(location_changed(mfa_required=False))])
        assert gateway.since(mark) == ["AddPeer 1", "lower"]
        mark = gateway.mark()
        await agent.tick()
        assert gateway.since(mark) == []

    gateway.run(scenario)


def test_on_a_link_that_was_made_again_the_table_comes_first_then_peers_then_up(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.world.host.delete()
        mark = gateway.mark()
        await agent.look()
        assert gateway.since(mark) == ["raise", "admit 1", "AddPeer 1", "up"]

    gateway.run(scenario)


def test_the_first_table_comes_before_the_first_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        mark = gateway.mark()
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)]))
        assert gateway.since(mark)[:2] == ["raise", "admit 1 3"]

    gateway.run(scenario)


def test_a_guard_the_state_does_not_need_is_never_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)], mfa_required=False))
        await agent.look()
        assert gateway.guard.calls("raise") == []
        assert gateway.guard.calls("lease") == []
        assert gateway.world.on_interface().keys() == {key(1), key(2)}

    gateway.run(scenario)
