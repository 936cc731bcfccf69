"""Many ends at once: cut first, cleaned up a few at a time (rule 8)."""

import asyncio
import errno
import itertools
import time

import pytest

from agent.model import CutPeer, RemovePeer
from agent.patience import LOOK_UP
from agent.writer import HANDFUL
from tests.reconciler.harness import CUT, Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import grant, key, peer, psk

MANY = 200


def of(world: World, kind: type) -> list[object]:
    return [operation for operation in world.host.operations() if isinstance(operation, kind)]


async def all_expire(agent: Agent, core: Core, world: World) -> None:
    await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
    world.clock.advance(30)
    await agent.tick()


def last_cut(agent: Agent) -> int:
    """The number of the cut peer that is removed last."""
    return int.from_bytes(next(reversed(agent.reconciler.writer.to_reap)), "big")


def test_many_ends_are_cut_at_once_and_removed_a_handful_at_a_time(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        cut = [n for n in range(1, MANY + 1) if key(n) in world.host.kernel.peers]
        assert set(world.on_interface()) == {key(1000)}
        assert len(of(world, CutPeer)) == MANY
        assert len(cut) >= MANY - 2 * HANDFUL
        assert len(agent.ends()) == MANY
        assert agent.metric("wg_agent_reap_backlog") == len(agent.reconciler.writer.to_reap)
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}
        assert agent.metric("wg_agent_reap_backlog") == 0
        batches = [what for kind, what in world.host.log if kind == "batch"]
        removed = [what for what in batches[batches.index(MANY) + 1 :] if isinstance(what, int)]
        assert sum(removed) == MANY
        assert max(removed) <= HANDFUL

    with_agent(world, scenario)


def test_who_is_past_a_deadline_is_cut_before_anything_else_is_done(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
        ended, before = [], len(world.host.log)
        world.host.at = lambda _: ended.append(MANY + 1 - len(agent.state.sessions))
        world.clock.advance(30)
        agent.reconciler.observe()
        await agent.tick()
        kinds = [kind for kind, _ in world.host.log[before:]]
        assert kinds[: MANY + 1] == ["batch"] + ["operation"] * MANY
        assert {type(what) for _, what in world.host.log[before + 1 : before + 1 + MANY]} == {CutPeer}
        assert kinds.index("read") > MANY
        assert kinds.index("journal") > MANY
        assert ended[: 2 * MANY] == [0] * (2 * MANY)
        assert len(agent.ends()) == MANY

    with_agent(world, scenario)


def test_no_step_of_a_clock_saves_a_session_whose_peer_was_cut(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        listed = [live(n, lasts=3600) for n in range(1, MANY + 1)] + [live(1000, lasts=9000)]
        await agent.give(core.state(listed))
        back = [3600.0]
        world.host.at = lambda _: world.clock.step(-back.pop()) if back else None
        world.clock.step(3600)
        await agent.tick()
        assert not back
        assert set(agent.state.sessions) == {key(1000)}
        assert set(agent.ends().values()) == {"expired"}
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}

    with_agent(world, scenario)


def test_each_end_is_measured_once_though_its_clocks_have_gone_apart(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)]))
        world.clock.advance(29.9)
        world.clock.step(0.1)
        world.host.apply_takes = lambda _: world.clock.advance(0.2)
        await agent.tick()
        assert agent.metric("wg_agent_expiry_lag_seconds_count") == MANY
        assert agent.metric("wg_agent_expiry_lag_seconds_sum") == pytest.approx(0.2 * MANY)
        assert agent.state.overdue == []

    with_agent(world, scenario)


def test_one_of_many_who_can_not_be_cut_is_late(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)]))
        world.host.refuses[key(1)] = frozenset({RemovePeer, CutPeer})
        world.clock.advance(30)
        await agent.tick()
        assert set(world.on_interface()) == {key(1)}
        world.clock.advance(5)
        await agent.tick()
        assert agent.reconciler.expiry_late is True
        world.host.refuses.clear()
        await agent.tick()
        assert world.on_interface() == {}
        assert agent.reconciler.expiry_late is False

    with_agent(world, scenario)


def test_a_cut_that_failed_is_nobody_elses_drift(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
        world.clock.advance(30)
        world.host.fails, world.host.before_failing = 2, MANY // 2
        agent.reconciler.observe()
        await agent.tick()
        assert set(world.on_interface()) == {key(1000)}
        assert agent.drift() == {}

    with_agent(world, scenario)


def test_an_interface_that_vanishes_amid_the_cut_comes_back_with_nobody_who_had_to_go(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
        world.clock.advance(30)
        asked = itertools.count()

        def vanishes(where: str) -> None:
            if where == "kernel" and next(asked) == MANY // 2:
                world.host.delete()
                world.host.existing()

        world.host.at = vanishes
        await agent.tick()
        assert next(asked) > MANY // 2
        assert world.host.exists
        assert set(world.host.kernel.peers) == {key(1000)}
        assert len(agent.ends()) == MANY
        assert agent.reconciler.expiry_late is False
        assert agent.drift() == {"interface": 1}

    with_agent(world, scenario)


def test_whoever_could_not_be_cut_while_the_interface_did_not_answer_goes_once_it_does(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
        world.clock.advance(30)
        world.host.fails, world.host.reads_fail, world.host.error = 1000, 1000, errno.ETIMEDOUT
        await agent.tick()
        asked = 1000 - world.host.fails
        assert asked < MANY
        assert agent.state.sessions.keys() == {key(1000)}
        assert agent.ends() == {}
        world.clock.advance(5)
        await agent.tick()
        assert agent.reconciler.expiry_late is True
        world.host.fails = world.host.reads_fail = 0
        await agent.tick()
        assert set(world.on_interface()) == {key(1000)}
        assert len(agent.ends()) == MANY
        assert agent.drift() == {}

    with_agent(world, scenario)


def test_a_plan_whose_cuts_fail_halfway_still_ends_in_everybody_gone(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n) for n in range(1, MANY + 1)] + [live(1000)]))
        world.host.fails, world.host.before_failing = 1, MANY // 2
        await agent.give([core.change(revoked(n, f"s{n}")) for n in range(1, MANY + 1)])
        assert set(world.on_interface()) == {key(1000)}
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}

    with_agent(world, scenario)


def test_a_handful_of_ends_is_removed_outright(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, HANDFUL + 1)]))
        world.clock.advance(30)
        await agent.tick()
        assert world.host.kernel.peers == {}
        assert of(world, CutPeer) == []

    with_agent(world, scenario)


def test_a_cut_peer_is_not_healed_and_no_drift(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        writer = agent.reconciler.writer
        somebody = next(reversed(writer.to_reap))
        await agent.look()
        assert agent.drift() == {}
        assert somebody not in writer.mirror.peers or writer.mirror.peers[somebody].tenure == CUT
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}

    with_agent(world, scenario)


def test_a_cut_peer_that_is_granted_again_is_removed_and_added(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        cut = last_cut(agent)
        stay = world.host.kernel.peers[key(cut)].incarnation
        await agent.give([core.change(granted(cut, grant("again", 77)))])
        assert world.host.kernel.peers[key(cut)].incarnation != stay
        await agent.reaped()
        await agent.look()
        assert world.on_interface() == {key(1000): psk(1000), key(cut): psk(77)}

    with_agent(world, scenario)


def test_a_cut_peer_that_somebody_removed_is_not_reaped_after_another_grant(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        cut = last_cut(agent)
        del world.host.kernel.peers[key(cut)]
        agent.reconciler.observe()
        await agent.give([core.change(granted(cut, grant("again", 77)))])
        await agent.reaped()
        assert world.on_interface() == {key(1000): psk(1000), key(cut): psk(77)}
        assert agent.drift() == {}

    with_agent(world, scenario)


def test_a_restart_in_the_middle_of_it_cleans_up(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        assert len(world.host.kernel.peers) > 1

    async def after(agent: Agent, core: Core) -> None:
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}
        assert len(agent.ends()) == MANY
        assert core.revision == 0

    with_agent(world, scenario)
    with_agent(world, after)


def test_a_cut_that_fails_in_the_middle_still_ends_in_everybody_gone(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n, lasts=30) for n in range(1, MANY + 1)] + [live(1000)]))
        world.clock.advance(30)
        world.host.fails, world.host.before_failing = 2, MANY // 2
        await agent.tick()
        assert set(world.on_interface()) == {key(1000)}
        await agent.reaped()
        assert set(world.host.kernel.peers) == {key(1000)}
        assert agent.drift() == {}

    with_agent(world, scenario)


def test_a_cut_peer_that_cannot_be_removed_holds_up_no_other(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        await all_expire(agent, core, world)
        for _ in range(4 * MANY):
            await agent.tick()
        assert set(world.host.kernel.peers) == {key(1), key(1000)}
        await agent.give([core.change(granted(1000, grant("s1000", 101)))])
        world.host.refuses.clear()
        await agent.tick()
        assert world.on_interface() == {key(1000): psk(101)}
        assert set(world.host.kernel.peers) == {key(1000)}

    with_agent(world, scenario)


def test_a_grant_comes_through_between_two_handfuls(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await all_expire(agent, core, world)
        await agent.give(core.state([peer(300, "10.9.0.1"), live(1000)]))
        await agent.give([core.change(granted(300, grant("s300", 9)))])
        assert agent.reconciler.writer.to_reap
        assert world.on_interface()[key(300)] == psk(9)

    with_agent(world, scenario)


def test_an_interface_that_does_not_answer_is_asked_once_for_all_that_are_stuck_on_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        stuck = range(1, 6)
        await agent.give(core.state([*(live(n) for n in stuck), live(1000)]))
        world.host.refuses = {key(n): frozenset({RemovePeer, CutPeer}) for n in stuck}
        await agent.give([core.change(revoked(n, f"s{n}")) for n in stuck])
        assert set(world.on_interface()) == {*map(key, stuck), key(1000)}
        world.host.refuses = {}
        world.host.fails, world.host.reads_fail, world.host.error = 1000, 1000, errno.ETIMEDOUT
        await agent.tick()
        assert 1000 - world.host.fails == 1
        world.host.fails = world.host.reads_fail = 0
        await agent.tick()
        assert set(world.on_interface()) == {key(1000)}

    with_agent(world, scenario)


def test_who_is_revoked_while_the_interface_is_slow_to_be_made_again_is_not_on_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        link = agent.reconciler.keeper._link
        ensure, answers = link.ensure, []

        async def slow() -> bool:
            answers.append(agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic()))
            link.ensure = ensure  # type: ignore[method-assign]
            await asyncio.sleep(2.5 * LOOK_UP)
            return await ensure()

        link.ensure = slow  # type: ignore[method-assign]
        world.host.delete()
        await agent.look()
        await answers[0]
        assert set(world.on_interface()) == {key(2)}
        assert world.host.up
        assert agent.ends() == {"s1": "revoked"}

    with_agent(world, scenario)
