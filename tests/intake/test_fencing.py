"""Epochs, revisions, and what core is told of them (rules 4 and 18, fine print 2)."""

import asyncio
import time
from typing import Any

import pytest

from agent.errors import CoreUnavailable, InvalidMessage
from agent.model import Change, Refusal, UnreadablePeer
from agent.ports import Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import grant, key, peer, psk


def wants_pull(agent: Agent) -> bool:
    wanted = agent.inbox.pull_wanted.is_set()
    agent.inbox.pull_wanted.clear()
    return wanted


def test_a_change_before_the_first_state_is_not_applied(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        outcome = await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert (outcome.verdict, outcome.position) == (Verdict.NO_STATE, None)
        assert world.on_interface() == {}

    with_agent(world, scenario)


@pytest.mark.parametrize(
    "wrong",
    [Change("e1", 3, granted(1, grant("s1", 1))), Change("e2", 2, granted(1, grant("s1", 1)))],
    ids=["gap", "epoch"],
)
def test_a_gap_or_another_epoch_is_not_applied_and_asks_for_a_pull(world: World, wrong: Change) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        outcome = await agent.give([wrong])
        assert (outcome.verdict, str(outcome.position)) == (Verdict.PULL, "e1:1")
        assert wants_pull(agent)
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_a_change_about_an_unknown_peer_leaves_the_revision_and_asks_for_a_pull(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        outcome = await agent.give([core.change(granted(9, grant("s9", 9)))])
        assert (outcome.verdict, str(outcome.position)) == (Verdict.PULL, "e1:1")
        assert wants_pull(agent)

    with_agent(world, scenario)


def test_what_fits_is_applied_up_to_the_first_that_does_not(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2)]))
        changes = [core.change(granted(1, grant("s1", 1))), Change("e1", 9, granted(2, grant("s2", 2)))]
        outcome = await agent.give(changes)
        assert (outcome.verdict, str(outcome.position)) == (Verdict.PULL, "e1:2")
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_a_change_delivered_twice_is_held_and_does_nothing(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2)]))
        first, second = core.change(granted(1, grant("s1", 1))), core.change(revoked(1, "s1"))
        await agent.give([first, second])
        outcome = await agent.give([first])
        assert (outcome.verdict, str(outcome.position)) == (Verdict.HELD, "e1:3")
        assert world.on_interface() == {}
        third = core.change(granted(2, grant("s2", 2)))
        outcome = await agent.give([first, second, third])
        assert (outcome.verdict, str(outcome.position)) == (Verdict.APPLIED, "e1:4")
        assert world.on_interface() == {key(2): psk(2)}
        assert not wants_pull(agent)

    with_agent(world, scenario)


def test_a_revision_that_goes_back_is_refused_whole(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        core.revision = 5
        await agent.give(core.state([live(1)]))
        world.clock.advance(1)
        with pytest.raises(InvalidMessage):
            await agent.give(core.same([], revision=5))
        assert world.on_interface() == {key(1): psk(1)}
        assert str(agent.inbox.position) == "e1:6"

    with_agent(world, scenario)


def test_a_snapshot_that_a_change_overtook_is_held(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        world.clock.advance(1)
        in_flight = core.same([peer(1)])
        world.clock.advance(1)
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        outcome = await agent.give(in_flight)
        assert (outcome.verdict, str(outcome.position)) == (Verdict.HELD, "e1:2")
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_another_epoch_may_start_over_but_only_by_a_pull(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        core.revision = 100
        await agent.give(core.state([live(1)]))
        outcome = await agent.give(core.same([live(1), live(2)], epoch="e2", revision=1))
        assert (outcome.verdict, str(outcome.position)) == (Verdict.APPLIED, "e2:1")
        assert set(world.on_interface()) == {key(1), key(2)}

    with_agent(world, scenario)


def test_core_that_went_away_is_not_found_again_by_what_it_sent_before(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        inbox = agent.inbox
        inbox.core_answered()
        answer = inbox.submit(core.state([live(1)]), time.monotonic())
        inbox.core_failed(CoreUnavailable("core has gone"))
        assert (await answer).verdict is Verdict.APPLIED
        assert set(world.on_interface()) == {key(1)}
        assert not inbox.core_connected
        await agent.give(core.state([live(1)]))
        assert inbox.core_connected

    with_agent(world, scenario)


def test_a_sender_that_went_away_does_not_stop_the_agent(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        core.revision = 5
        await agent.give(core.state([live(1)]))
        world.clock.advance(1)
        agent.inbox.submit(core.same([], revision=1), time.monotonic()).cancel()
        agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic()).cancel()
        gone: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(agent.desk.end([key(1)])),
            asyncio.ensure_future(agent.desk.plan()),
        ]
        await asyncio.sleep(0)
        for future in gone:
            future.cancel()
        await agent.tick()
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_applied_is_sent_after_the_first_pull_and_after_every_pull(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        assert (await agent.acknowledge()).revision == 1
        await agent.tick()
        assert agent.applied() is None
        await agent.give(core.same([live(1)]))
        assert (await agent.acknowledge()).revision == 1

    with_agent(world, scenario)


def test_applied_carries_the_whole_list_of_the_refused(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        broken = UnreadablePeer("nonsense", Refusal.INVALID_PUBLIC_KEY)
        await agent.give(core.state([live(1), peer(2, "10.8.0.1")], unreadable=(broken,)))
        refused = (await agent.acknowledge()).refused
        assert sorted(r.reason for r in refused) == ["invalid_public_key", "prefix_claimed", "prefix_claimed"]
        outcome = await agent.give([core.change(revoked(1, "s1"))])
        assert outcome.refused == refused
        assert (await agent.acknowledge()).refused == refused

    with_agent(world, scenario)


def test_several_revisions_may_be_answered_by_the_last(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2)]))
        await agent.acknowledge()
        await agent.give([core.change(granted(1, grant("s1", 1))), core.change(granted(2, grant("s2", 2)))])
        assert (await agent.acknowledge()).revision == 3

    with_agent(world, scenario)


def test_ends_are_given_until_they_are_accepted_also_over_restarts(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await agent.give([core.change(revoked(1, "s1")), core.change(revoked(2, "s2"))])
        assert agent.ends() == agent.ends() == {"s1": "revoked", "s2": "revoked"}
        await agent.reconciler.reports.ends_accepted(agent.unreported()[:1])
        assert agent.ends() == {"s2": "revoked"}
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert agent.ends() == {"s2": "revoked"}
        assert core.revision == 0
        await agent.reconciler.reports.ends_accepted(agent.unreported())

    async def at_last(agent: Agent, core: Core) -> None:
        assert agent.ends() == {}
        # Accepted, and dead all the same.
        outcome = await agent.give(core.state([live(1), live(2)]))
        assert [r.reason for r in outcome.refused] == ["session_ended"] * 2
        assert world.on_interface() == {}

    with_agent(world, scenario)
    with_agent(world, after)
    with_agent(world, at_last)
