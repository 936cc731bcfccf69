"""The interface may have to wait for the operator's commands before it comes up; nobody else does."""

from tests.reconciler.harness import Agent, Core, World, granted, live, with_agent
from tests.support.builders import grant, key, peer


def test_while_the_interface_may_not_come_up_grants_are_answered_and_sessions_end(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), peer(2, "10.8.0.2")]))
        await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert set(world.on_interface()) == {key(1), key(2)}
        world.clock.advance(30)
        await agent.tick()
        assert set(world.on_interface()) == {key(2)}
        assert agent.ends() == {"s1": "expired"}
        assert (world.host.up, agent.reconciler.keeper.up) == (False, False)
        assert (await agent.desk.status())["device_error"] == ""

        world.host.comes_up_later = False
        await agent.tick()
        assert (world.host.up, agent.reconciler.keeper.up) == (True, True)

    world.host.comes_up_later = True
    with_agent(world, scenario)


def test_why_the_interface_stays_down_is_shown_until_it_is_up(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        assert (await agent.desk.status())["device_error"] == "wg0 stays down"
        assert set(world.on_interface()) == {key(1)}

        world.host.held_down = None
        await agent.tick()
        assert (world.host.up, agent.reconciler.keeper.up) == (True, True)
        assert (await agent.desk.status())["device_error"] == ""

    world.host.held_down = "wg0 stays down"
    with_agent(world, scenario)
