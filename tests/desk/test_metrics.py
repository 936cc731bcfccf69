"""What the agent's metrics say of itself: starts, faults, late expiry, how far behind core it is."""

import time

import pytest

from agent.errors import CoreUnavailable
from agent.model import RemovePeer
from tests.reconciler.harness import Agent, Core, World, granted, live, run, with_agent
from tests.support.builders import grant, key, peer
from tests.support.recording_guard import RecordingGuard


async def nothing(agent: Agent, core: Core) -> None:
    del agent, core


def starts(agent: Agent) -> dict[str, float]:
    agent.desk.refresh_metrics()
    samples = (s for f in agent.metrics._registry.collect() for s in f.samples)
    return {s.labels["after"]: s.value for s in samples if s.name == "wg_agent_starts_total" and s.value}


async def shown(agent: Agent) -> bool:
    """Whether the number of starts is in what Prometheus gets, be it 0."""
    agent.desk.refresh_metrics()
    return b"wg_agent_starts_total{" in await agent.metrics.render()


def killed(world: World, **members: str) -> dict[str, float]:
    """Start an agent and kill it; its starts so far."""
    seen: dict[str, float] = {}

    async def main() -> None:
        async with world.agent(**members) as agent:
            seen.update(starts(agent))
            agent.kill()

    run(main())
    return seen


def stopped(world: World, **members: str) -> dict[str, float]:
    seen: dict[str, float] = {}

    async def look(agent: Agent, core: Core) -> None:
        seen.update(starts(agent))

    with_agent(world, look, **members)
    return seen


def test_a_killed_agent_is_counted_by_the_next_one_and_a_stopped_one_is_not(world: World) -> None:
    assert killed(world) == {"first": 1}
    assert stopped(world) == {"first": 1, "crash": 1}
    assert killed(world) == {"first": 1, "crash": 1, "stop": 1}
    assert killed(world) == {"first": 1, "crash": 2, "stop": 1}


def test_what_the_service_manager_knows_is_counted(world: World) -> None:
    killed(world)
    killed(world, service_result="watchdog")
    killed(world, service_result="oom-kill")
    assert killed(world, service_result="signal") == {"first": 1, "watchdog": 1, "oom": 1, "crash": 1}


def test_a_host_that_lost_its_power_is_no_crash_of_the_agent(world: World) -> None:
    killed(world)
    world.reboot()
    assert stopped(world) == {"first": 1, "reboot": 1}
    world.reboot(boot_id="boot-3")
    assert stopped(world) == {"first": 1, "reboot": 1, "stop": 1}


def test_an_agent_that_ends_by_itself_leaves_no_mark_of_having_been_stopped(world: World) -> None:
    async def main() -> None:
        agent = world.agent()
        await agent.reconciler.start()
        await agent.reconciler.stop(told=False)

    run(main())
    assert stopped(world) == {"first": 1, "crash": 1}


def test_starts_are_counted_again_once_an_unwritable_journal_works(world: World) -> None:
    killed(world)
    world.journal_fails = True

    async def scenario(agent: Agent, core: Core) -> None:
        assert not await shown(agent), "a 0 now would be a crash for each one that was counted before"
        world.journal_fails = False
        await agent.tick()
        assert starts(agent) == {"first": 1, "crash": 1}

    with_agent(world, scenario)
    assert stopped(world) == {"first": 1, "crash": 1, "stop": 1}


def test_a_session_that_could_not_be_ended_is_overdue_until_it_is(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_overdue_seconds") == 0
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        world.clock.advance(3600.0 + 7.0)
        await agent.tick()
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_overdue_seconds") == pytest.approx(7.0, abs=0.01)
        world.host.refuses.clear()
        await agent.tick()
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_overdue_seconds") == 0

    with_agent(world, scenario)


def synced(agent: Agent) -> float:
    agent.desk.refresh_metrics()
    return agent.metric("wg_agent_last_sync_timestamp_seconds")


def test_a_quiet_core_is_in_step_as_long_as_it_is_connected(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        assert synced(agent) == 0
        await agent.give(core.state([live(1)]))
        world.clock.advance(600.0)
        assert synced(agent) == world.clock.now.wall
        agent.inbox.core_failed(CoreUnavailable("gone"))
        lost = world.clock.now.wall
        world.clock.advance(60.0)
        assert synced(agent) == lost

    with_agent(world, scenario)


def test_a_core_that_was_to_be_pulled_is_not_in_step_until_its_state_is_here(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        before = synced(agent)
        agent.inbox.pull_wanted.set()
        world.clock.advance(5.0)
        assert synced(agent) == before
        agent.inbox.pull_wanted.clear()  # the pull is under way
        world.clock.advance(5.0)
        assert synced(agent) == before
        await agent.give(core.same([live(1)]))
        assert synced(agent) == world.clock.now.wall

    with_agent(world, scenario)


def test_what_core_has_just_sent_is_to_be_in_the_kernel_first(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        before = synced(agent)
        world.clock.advance(5.0)
        answer = agent.inbox.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
        assert synced(agent) == before
        await answer
        assert synced(agent) == world.clock.now.wall

    with_agent(world, scenario)


def test_an_interface_that_cannot_be_read_is_a_fault_and_not_in_step(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        before = synced(agent)
        assert agent.metric("wg_agent_fault", part="device") == 0
        world.host.reads_fail = 1000
        world.clock.advance(5.0)
        await agent.look()
        assert synced(agent) == before
        assert agent.metric("wg_agent_fault", part="device") == 1
        world.host.reads_fail = 0
        await agent.look()
        assert synced(agent) == world.clock.now.wall
        assert agent.metric("wg_agent_fault", part="device") == 0

    with_agent(world, scenario)


def test_a_broken_journal_and_a_broken_guard_are_faults(world: World) -> None:
    world.guard = guard = RecordingGuard(world.host)

    def faults(agent: Agent) -> dict[str, float]:
        agent.desk.refresh_metrics()
        return {p: agent.metric("wg_agent_fault", part=p) for p in ("device", "guard", "journal")}

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        assert faults(agent) == {"device": 0, "guard": 0, "journal": 0}
        world.journal_fails = True
        await agent.give([core.change(granted(1, grant("s2", 2)))])
        assert faults(agent) == {"device": 0, "guard": 0, "journal": 1}
        world.journal_fails = False
        guard.fails = True
        await agent.look()
        assert faults(agent)["guard"] == 1
        guard.fails = False
        await agent.look()
        await agent.tick()
        assert faults(agent) == {"device": 0, "guard": 0, "journal": 0}

    with_agent(world, scenario)


def test_the_skew_follows_this_hosts_clock_without_a_pull(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_clock_skew_seconds") == pytest.approx(0, abs=0.01)
        world.clock.step(90.0)
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_clock_skew_seconds") == pytest.approx(90, abs=0.01)

    with_agent(world, scenario)


def test_the_interface_is_shown_to_be_up_once_it_is(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([]))
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_interface_up") == 1

    with_agent(world, scenario)


def test_a_grant_is_counted_once_and_neither_a_renewal_nor_a_restart_is_one(world: World) -> None:
    def grants(agent: Agent) -> float:
        agent.desk.refresh_metrics()
        return agent.metric("wg_agent_session_grants_total")

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        assert grants(agent) == 1
        await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert grants(agent) == 2
        await agent.give([core.change(granted(2, grant("s2", 2, lasts=7200.0)))])
        assert grants(agent) == 2
        world.journal_fails = True
        await agent.give([core.change(granted(2, grant("s3", 3)))])
        assert grants(agent) == 2
        world.journal_fails = False
        await agent.tick()
        assert grants(agent) == 3

    async def after(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        assert grants(agent) == 0

    with_agent(world, scenario)
    with_agent(world, after)
