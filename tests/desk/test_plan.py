"""What a reconcile would change now, as ``wg-agent plan`` is told."""

import asyncio
import time

from agent.model import RemovePeer
from tests.reconciler.harness import Agent, Core, World, live, with_agent
from tests.support.builders import grant, key, peer, prefixes
from tests.support.kernel_model import KernelPeer


def test_the_plan_shows_drift_and_changes_nothing(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, name="bob")]))
        peers = world.host.kernel.peers
        peers[key(77)] = KernelPeer(99, None, set(prefixes("10.8.0.77")))
        del peers[key(1)]
        mark = len(world.host.operations())
        plan = await agent.desk.plan()
        assert {(o["operation"], o["public_key"][-4:]) for o in plan["operations"]} == {
            ("add", "AAE="),
            ("remove", "AE0="),
        }
        assert {d["kind"] for d in plan["drift"]} == {"peer_added", "peer_removed"}
        assert len(world.host.operations()) == mark
        assert agent.drift() == {}
        await agent.look()
        assert (await agent.desk.plan())["operations"] == []

    with_agent(world, scenario)


def test_a_plan_asked_for_beside_a_change_shows_no_drift_that_is_none(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n) for n in range(1, 30)]))
        agent.inbox.submit(core.state([live(n) for n in range(10, 60)]), time.monotonic())
        plans = await asyncio.gather(*(agent.desk.plan() for _ in range(3)))
        assert [plan["drift"] for plan in plans] == [[], [], []]

    with_agent(world, scenario)


def test_a_plan_names_who_somebody_else_has_removed(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, name="alice", session=grant("s1", 1))]))
        world.host.kernel.apply(RemovePeer(key(1)))
        planned = await agent.desk.plan()
        assert [(d["kind"], d["name"]) for d in planned["drift"]] == [("peer_removed", "alice")]
        (added,) = planned["operations"]
        assert (added["operation"], added["before"], added["session_id"]) == ("add", None, "s1")

    with_agent(world, scenario)
