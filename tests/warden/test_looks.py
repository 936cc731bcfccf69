"""When a look reads the table, which is work over all peers."""

import errno

from tests.reconciler.harness import Agent, Core, granted, live, revoked
from tests.support.builders import grant, peer
from tests.warden.harness import Gateway, prefix


def reads(gateway: Gateway) -> int:
    return len(gateway.guard.calls("read"))


def test_a_look_does_not_read_a_table_that_nobody_has_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3)]))
        await agent.look()
        before = reads(gateway)
        await agent.give([core.change(granted(3, grant("s3", 3))), core.change(revoked(2, "s2"))])
        await agent.look()
        assert reads(gateway) == before
        gateway.guard.ends[prefix("10.8.0.9")] = None
        await agent.look()
        assert (reads(gateway), gateway.left(9)) == (before + 1, 0)
        await agent.look()
        assert reads(gateway) == before + 1

    gateway.run(scenario)


def test_now_and_then_a_look_reads_the_table_anyhow(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        before = reads(gateway)
        gateway.world.clock.advance(599)
        await agent.tick()
        await agent.look()
        assert reads(gateway) == before
        gateway.world.clock.advance(2)
        await agent.look()
        assert reads(gateway) == before + 1

    gateway.run(scenario)


def test_a_look_at_another_link_of_this_name_reads_the_table(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        before = reads(gateway)
        gateway.world.host.public_key = None
        await agent.look()
        assert reads(gateway) == before + 1
        gateway.world.host.up = False
        await agent.look()
        assert reads(gateway) == before + 2

    gateway.run(scenario)


def test_after_a_change_that_failed_a_look_reads_the_table(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await agent.look()
        before = reads(gateway)
        gateway.guard.fails = {"dismiss"}
        await agent.give([core.change(revoked(1, "s1"))])
        gateway.guard.fails = ()
        assert gateway.left(1) != 0
        await agent.look()
        assert (reads(gateway), gateway.left(1)) == (before + 1, 0)

    gateway.run(scenario)


def test_a_link_that_somebody_else_made_again_has_no_guard_until_it_is_raised(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        gateway.world.host.reads_fail, gateway.world.host.error = 1, errno.ENODEV
        raised = len(gateway.guard.calls("raise"))
        await agent.look()
        assert len(gateway.guard.calls("raise")) == raised + 1

    gateway.run(scenario)
