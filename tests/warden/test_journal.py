"""Where the journal is lost, the table still knows when sessions end (rule 14)."""

import pytest

from tests.reconciler.harness import Agent, Core, live
from tests.support.builders import key, peer
from tests.warden.harness import Gateway


def test_a_table_of_an_earlier_life_has_its_lease_renewed_though_the_journal_is_lost(
    gateway: Gateway,
) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(100)
        await agent.tick()
        assert gateway.guard.lease_until == gateway.monotonic() + 300
        assert gateway.left(1) == 3500

    gateway.run(first)
    gateway.lose_journal()
    gateway.run(second)


def test_without_a_journal_a_peer_is_removed_when_its_element_ends(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), live(2, lasts=600), peer(3, mfa_exempt=True)]))

    async def second(agent: Agent, core: Core) -> None:
        on_interface = gateway.world.on_interface
        assert agent.state.location is None
        assert on_interface().keys() == {key(1), key(2), key(3)}
        gateway.world.clock.advance(30)
        await agent.tick()
        assert on_interface().keys() == {key(1), key(2), key(3)}
        assert agent.reconciler.next_wait() == pytest.approx(10, abs=0.1)
        gateway.world.clock.advance(10.1)
        await agent.tick()
        assert on_interface().keys() == {key(2), key(3)}
        assert agent.ends() == {}
        core.revision = 5
        mark = gateway.mark()
        await agent.give(core.state([live(2, lasts=600), peer(3, mfa_exempt=True)]))
        assert gateway.since(mark) == ["raise 2 3", "up"]
        assert on_interface().keys() == {key(2), key(3)}

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.world.clock.advance(20)
    gateway.run(second)


def test_without_a_journal_a_peer_whose_element_has_ended_is_removed_at_once(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), live(2, lasts=600)]))

    async def second(agent: Agent, core: Core) -> None:
        assert gateway.world.on_interface().keys() == {key(2)}

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.world.clock.advance(61)
    gateway.run(second)


def test_without_a_journal_a_wall_clock_that_is_set_back_lengthens_nothing(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.step(-3600)
        gateway.world.clock.advance(60.1)
        await agent.tick()
        assert gateway.world.on_interface() == {}

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.run(second)


def test_without_journal_or_table_nobody_is_touched_before_the_first_state(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(90)
        await agent.tick()
        assert gateway.world.on_interface().keys() == {key(1)}

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.guard.delete()
    gateway.run(second)


def test_core_lost_for_too_long_ends_sessions_that_only_the_table_knows(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))

    async def second(agent: Agent, core: Core) -> None:
        agent.inbox.core_lost_grace = 30
        gateway.world.clock.advance(31)
        await agent.tick()
        assert gateway.world.on_interface().keys() == {key(2)}

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.run(second)
