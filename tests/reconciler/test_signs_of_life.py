"""Signs of life are journalled when they are seen, whether or not a plan follows (rule 7)."""

from tests.reconciler.harness import Agent, Core, World, live, with_agent
from tests.support.builders import key, psk


def test_a_sign_of_life_survives_a_kill_right_after_the_look(world: World) -> None:
    seen = {}

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        # The first look also finds an endpoint, and so makes a plan; the second finds life only.
        for _ in range(2):
            world.clock.advance(100)
            world.host.kernel.handshake(key(1), psk(1), "client", world.clock())
            await agent.look()
        seen.update(agent.state.liveness)

    async def after(agent: Agent, core: Core) -> None:
        del core
        assert agent.state.liveness == seen

    with_agent(world, scenario)
    assert seen[key(1)].last_sign_at is not None
    world.clock.advance(50)
    with_agent(world, after)
