"""What the agent says about itself in the document of ``wg-agent status``."""

from agent.encoding import parse_time
from agent.errors import CoreUnavailable
from agent.model import CutPeer, RemovePeer
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import grant, key, peer
from tests.support.recording_guard import RecordingGuard


def lose_journal(world: World) -> None:
    for file in world.folder.iterdir():
        file.unlink()


async def ago(agent: Agent, name: str) -> float | None:
    text = (await agent.desk.status())[name]
    return None if text is None else round(agent.world.clock().wall - parse_time(text), 1)


def test_it_tells_since_when_core_is_there_or_not(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        inbox = agent.inbox
        assert await ago(agent, "core_since") is None
        inbox.core_failed(CoreUnavailable("not there"))
        world.clock.advance(30)
        inbox.core_failed(CoreUnavailable("still not there"))
        assert await ago(agent, "core_since") == 30.0
        assert (await agent.desk.status())["core_error"] == "still not there"
        inbox.core_answered()
        world.clock.advance(5)
        inbox.core_answered()
        assert await ago(agent, "core_since") == 5.0
        inbox.core_failed(CoreUnavailable("gone"))
        world.clock.advance(1)
        assert await ago(agent, "core_since") == 1.0

    with_agent(world, scenario)


def test_a_stepped_wall_clock_moves_none_of_its_ages(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        world.clock.advance(10)
        world.clock.step(3600)
        names = ("started_at", "core_since", "synced_at", "observed_at")
        assert [await ago(agent, name) for name in names] == [10.0] * 4

    with_agent(world, scenario)


def test_it_tells_when_a_change_was_last_put_in_force(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        assert await ago(agent, "synced_at") is None
        await agent.give(core.state([peer(1)]))
        world.clock.advance(60)
        await agent.tick()
        assert await ago(agent, "synced_at") == 60.0
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        world.clock.advance(2)
        assert await ago(agent, "synced_at") == 2.0

    with_agent(world, scenario)


def test_it_tells_how_things_stand_with_the_guard(world: World, guard: RecordingGuard) -> None:
    guard.fails = True

    async def scenario(agent: Agent, core: Core) -> None:
        assert (await agent.desk.status())["guard"] == "unknown"
        await agent.give(core.state([live(1)]))
        assert (await agent.desk.status())["guard"] == "missing"
        guard.fails = False
        await agent.look()
        assert (await agent.desk.status())["guard"] == "in_force"

    with_agent(world, scenario)


def test_without_a_guard_it_says_so_and_whether_the_link_is_up(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        assert (await agent.desk.status())["guard"] == "none"
        await agent.give(core.state([]))
        assert (await agent.desk.status())["link_up"] is True

    with_agent(world, scenario)


def test_after_the_journal_was_lost_it_says_of_link_and_guard_what_is_known(
    world: World, guard: RecordingGuard
) -> None:
    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def scenario(agent: Agent, core: Core) -> None:
        assert world.host.up
        assert guard.table
        document = await agent.desk.status()
        assert (document["link_up"], document["guard"], document["epoch"]) == (None, "left_over", None)
        await agent.give(core.state([live(1)]))
        document = await agent.desk.status()
        assert (document["link_up"], document["guard"], document["epoch"]) == (True, "in_force", "e1")

    with_agent(world, before)
    lose_journal(world)
    with_agent(world, scenario)


def test_a_table_that_could_not_be_read_at_the_start_is_not_said_to_be_there(
    world: World, guard: RecordingGuard
) -> None:
    guard.fails = True

    async def scenario(agent: Agent, core: Core) -> None:
        assert (await agent.desk.status())["guard"] == "unknown"
        guard.fails = False
        await agent.give(core.state([], mfa_required=False))
        assert (await agent.desk.status())["guard"] == "not_needed"

    with_agent(world, scenario)


def test_an_interface_that_was_made_just_now_is_known_to_be_down_until_it_is_up(world: World) -> None:
    world.host.comes_up_later = True

    async def scenario(agent: Agent, core: Core) -> None:
        assert (await agent.desk.status())["link_up"] is False

    with_agent(world, scenario)


def test_who_was_revoked_and_can_not_be_removed_is_told_until_gone(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        assert (await agent.desk.status())["overstaying"] == 0
        world.host.refuses[key(1)] = frozenset({RemovePeer, CutPeer})
        await agent.give([core.change(revoked(1, "s1"))])
        assert set(world.on_interface()) == {key(1), key(2)}
        document = await agent.desk.status()
        assert (document["overstaying"], document["expiry_late"]) == (1, False)
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_fault", part="device") == 1
        world.host.refuses.clear()
        await agent.tick()
        assert set(world.on_interface()) == {key(2)}
        assert (await agent.desk.status())["overstaying"] == 0
        agent.desk.refresh_metrics()
        assert agent.metric("wg_agent_fault", part="device") == 0

    with_agent(world, scenario)
