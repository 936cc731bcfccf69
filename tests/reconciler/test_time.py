"""Deadlines on both clocks, steps of the wall clock, core's absence (rules 9 and 10)."""

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from agent.keeper import ROUNDS
from agent.model import AddPeer, Now, PeerRemoved, PublicKey, RemovePeer, SessionGranted
from agent.ports import Outcome, Verdict
from agent.sessions import Limits
from agent.writer import FEW, SLICE
from tests.reconciler.harness import Agent, Core, World, address, granted, live, revoked, with_agent
from tests.support.builders import NOW, grant, key, peer, psk

HOUR, DAY, YEAR = 3600.0, 86_400.0, 365 * 86_400.0

pytestmark = pytest.mark.reliability(
    "the wall clock stepped by an hour, a day, a year, both ways; suspend; core away; long plans (injected)",
    "no step lengthens a session, and no deadline or revocation waits for other work",
)


@pytest.mark.parametrize("step", [-HOUR, -DAY, -YEAR])
def test_a_wall_clock_set_back_lengthens_no_session(world: World, step: float) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30)]))
        world.clock.step(step)
        world.clock.advance(29)
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}
        world.clock.advance(1)
        await agent.tick()
        assert world.on_interface() == {}
        assert agent.unreported()[0].ended_at == NOW.wall + 30

    with_agent(world, scenario)


@pytest.mark.parametrize("step", [-HOUR, -DAY, -YEAR])
def test_nor_does_a_restart_after_it(world: World, step: float) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30)]))
        world.clock.step(step)
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "expired"}
        assert core.revision == 0

    with_agent(world, scenario)
    world.clock.advance(31)
    with_agent(world, after)


@pytest.mark.parametrize("step", [HOUR, DAY, YEAR])
def test_a_wall_clock_set_forward_may_end_sessions_early_and_never_late(world: World, step: float) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=HOUR)]))
        world.clock.step(step)
        await agent.tick()
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_a_pull_after_a_step_of_the_wall_clock_grants_by_cores_time(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        world.clock.step(-YEAR)
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=30)))])
        world.clock.advance(29)
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}
        world.clock.advance(1)
        await agent.tick()
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_suspend_counts(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30)]))
        world.clock.now = Now(NOW.boot + HOUR, NOW.wall)
        await agent.tick()
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_an_expired_session_is_not_renewed_by_a_message_that_comes_with_its_deadline(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30)]))
        world.clock.advance(30)
        outcome = await agent.give([core.change(granted(1, grant("s1", 1, lasts=HOUR)))])
        assert [r.reason for r in outcome.refused] == ["session_ended"]
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "expired"}

    with_agent(world, scenario)


def test_a_long_plan_does_not_delay_a_deadline(world: World) -> None:
    """Each slice takes 2 s; the session ends during the first one."""

    def slow(operations: int) -> None:
        if operations > 100:
            world.clock.advance(2)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=3)]))
        world.host.apply_takes = slow
        many = [live(n) for n in range(2, 4 * SLICE)]
        before = agent.alive
        await agent.give(core.state([live(1, lasts=3), *many]))
        gone = [n for n, op in enumerate(world.host.operations()) if type(op).__name__ == "RemovePeer"]
        assert gone
        assert gone[0] <= 2 * SLICE + 1
        assert len(world.on_interface()) == len(many)
        assert agent.alive - before >= 4

    with_agent(world, scenario)


def test_a_long_plan_does_not_delay_a_revocation(world: World) -> None:
    """It arrives during the first slice, and so does one for a peer that the plan has yet to add."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        count = 6 * SLICE
        snapshot = core.state([live(n) for n in range(1, count)])
        answers: list[asyncio.Future[Outcome]] = []

        def revoke(operations: int) -> None:
            if operations < SLICE or answers:
                return
            waiting = [n for n in range(2, count) if key(n) not in world.host.kernel.peers]
            revoked_too = waiting[len(waiting) // 2]
            changes = [core.change(revoked(1, "s1")), core.change(revoked(revoked_too, f"s{revoked_too}"))]
            answers.append(agent.inbox.submit(changes, time.monotonic()))
            gone.append(key(revoked_too))

        gone: list[PublicKey] = []
        world.host.apply_takes = revoke
        await agent.give(snapshot)
        outcome = await answers[0]
        assert (outcome.verdict, str(outcome.position)) == (Verdict.APPLIED, "e1:4")
        operations = world.host.operations()
        assert operations.index(RemovePeer(key(1))) <= 2 * SLICE + 2
        assert not [op for op in operations if isinstance(op, AddPeer) and op.public_key == gone[0]]
        assert len(world.on_interface()) == count - 1 - 2
        assert set(agent.ends().values()) == {"revoked"}

    with_agent(world, scenario)


@pytest.mark.parametrize("how", ["replaced", "unlisted"])
def test_nobody_is_added_by_a_plan_that_is_no_longer_true(world: World, how: str) -> None:
    """Of a peer that the plan has yet to add, core says something else during the first slice."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([]))
        sessions = [live(n) for n in range(1, 3 * SLICE)]
        exempt = [peer(n, address(n), mfa_exempt=True) for n in range(3 * SLICE, 6 * SLICE)]
        changed: list[PublicKey] = []

        def say(_: int) -> None:
            if changed:
                return
            listed = sessions if how == "replaced" else exempt
            one = next(p.public_key for p in reversed(listed) if p.public_key not in world.host.kernel.peers)
            changed.append(one)
            body = SessionGranted(one, grant("other", 9)) if how == "replaced" else PeerRemoved(one)
            agent.inbox.submit([core.change(body)], time.monotonic())

        snapshot = core.state([*sessions, *exempt])
        world.host.apply_takes = say
        await agent.give(snapshot)
        [one] = changed
        adds = [op for op in world.host.operations() if isinstance(op, AddPeer) and op.public_key == one]
        assert [op.preshared_key for op in adds] == ([psk(9)] if how == "replaced" else [])

    with_agent(world, scenario)


def test_a_grant_that_arrives_during_a_long_plan_does_not_make_it_start_over(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        snapshot = core.state([peer(1), *(live(n) for n in range(2, 4 * SLICE))])
        answers: list[asyncio.Future[Outcome]] = []

        def give(_: int) -> None:
            if not answers:
                change = core.change(granted(1, grant("s1", 1)))
                answers.append(agent.inbox.submit([change], time.monotonic()))

        world.host.apply_takes = give
        await agent.give(snapshot)
        assert (await answers[0]).verdict is Verdict.APPLIED
        assert world.on_interface()[key(1)] == psk(1)
        batches = [what for kind, what in world.host.log if kind == "batch"]
        assert batches == [SLICE, SLICE, SLICE, SLICE - 2, 1]

    with_agent(world, scenario)


def test_the_same_peer_by_peer(world: World) -> None:
    """Each operation takes 0.1 s; the session ends while 300 peers are added one by one."""
    removed_at = []

    def slow(_: int) -> None:
        world.clock.advance(0.1)
        if isinstance(world.host.operations()[-1], RemovePeer):
            removed_at.append(world.clock().boot)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=3)]))
        world.host.apply_takes = slow
        world.host.fails = ROUNDS
        many = [live(n) for n in range(2, 300)]
        await agent.give(core.state([live(1, lasts=3), *many]))
        assert key(1) not in world.on_interface()
        assert len(world.on_interface()) == len(many)
        assert removed_at[0] <= NOW.boot + 3 + 0.1 * (FEW + 2)

    with_agent(world, scenario)


def test_lowered_ceilings_hold_for_live_sessions(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=HOUR)]))
        world.clock.advance(100)
        agent.reconciler.configure(Limits(max_lifetime=100.0), 0.0)
        await agent.tick()
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "expired"}

    with_agent(world, scenario)


def test_cores_absence_ends_nothing_while_the_grace_is_off(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=2 * DAY)]))
        world.clock.advance(DAY - 1)
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_core_lost_for_the_grace_ends_all_sessions_and_no_other_peer(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3, mfa_exempt=True)]))
        agent.inbox.heard()
        world.clock.advance(59)
        await agent.tick()
        assert len(world.on_interface()) == 3
        world.clock.advance(1)
        await agent.tick()
        assert world.on_interface() == {key(3): None}
        assert agent.ends() == {"s1": "core_lost", "s2": "core_lost"}

    with_agent(world, scenario, core_lost_grace=60.0)


def test_after_core_is_back_new_sessions_are_granted_and_can_be_lost_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        agent.inbox.heard()
        world.clock.advance(60)
        await agent.tick()
        agent.inbox.heard()
        await agent.give(core.state([live(1, session="s1b", psk=2)]))
        assert world.on_interface() == {key(1): psk(2)}
        world.clock.advance(60)
        await agent.tick()
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "core_lost", "s1b": "core_lost"}

    with_agent(world, scenario, core_lost_grace=60.0)


def test_the_grace_counts_from_the_last_contact_over_a_restart(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        agent.inbox.heard()
        await agent.give(core.state([live(1)]))
        world.clock.advance(5)
        agent.inbox.heard()

    async def early(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {key(1): psk(1)}
        assert core.revision == 0
        agent.kill()

    async def late(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "core_lost"}
        assert core.revision == 0

    with_agent(world, scenario, core_lost_grace=60.0)
    world.clock.advance(59)
    with_agent(world, early, core_lost_grace=60.0)
    world.clock.advance(1)
    with_agent(world, late, core_lost_grace=60.0)


def test_under_another_boot_the_wall_clock_tells_how_long_core_is_away(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        agent.inbox.heard()
        await agent.give(core.state([live(1)]))

    async def after(agent: Agent, core: Core) -> None:
        assert agent.ends() == {"s1": "core_lost"}
        assert core.revision == 0

    with_agent(world, scenario, core_lost_grace=60.0)
    world.reboot(step=61)
    with_agent(world, after, core_lost_grace=60.0)


def test_a_step_of_the_wall_clock_is_no_absence_of_core(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=3 * YEAR)]))
        agent.inbox.heard()
        world.clock.step(-YEAR)
        world.clock.advance(59)
        await agent.tick()
        assert agent.ends() == {}

    with_agent(world, scenario, core_lost_grace=60.0, limits=Limits(max_lifetime=5 * YEAR))


def test_a_clock_that_differs_from_cores_is_told_of_whenever_the_difference_changes(world: World) -> None:
    """Not at each pull: by how much it is ahead, and that it no longer is."""

    async def scenario(agent: Agent, core: Core) -> None:
        for ahead, level in (
            (0.0, None),
            (4.9, None),
            (5.1, "warning"),
            (8.0, None),
            (HOUR, "warning"),
            (HOUR, None),
            (-DAY, "warning"),
            (1.0, "info"),
            (0.0, None),
        ):
            skew = world.clock().wall - core_time()
            world.clock.step(ahead - skew)
            with capture_logs() as logged:
                await agent.give(core.same([]))
            told = [line for line in logged if "clock" in line["event"]]
            assert [line["log_level"] for line in told] == ([level] if level else []), ahead
            assert all(line["seconds_ahead"] == ahead for line in told)
            assert agent.metric("wg_agent_clock_skew_seconds") == pytest.approx(ahead)

    def core_time() -> float:
        return NOW.wall + world.clock().boot - NOW.boot

    with_agent(world, scenario)


def test_the_log_tells_of_changes_once_they_are_in_the_kernel(world: World) -> None:
    """A thousand revocations do not wait for a thousand lines."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        with capture_logs() as logged:
            there: list[int] = []
            world.host.apply_takes = lambda _: there.append(len(logged))
            await agent.give([core.change(revoked(n, f"s{n}")) for n in (1, 2)])
            # The answer comes before the lines.
            await agent.tick()
        said = [line["event"] for line in logged]
        assert said.count("session revoked") == 2
        assert "session revoked" not in said[: there[0]]

    with_agent(world, scenario)


def test_the_lag_of_an_expiry_is_measured_once(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(9, address(9)), live(1, lasts=30)]))
        world.clock.advance(30.4)
        await agent.tick()
        await agent.tick()
        assert agent.metric("wg_agent_expiry_lag_seconds_count") == 1
        assert agent.metric("wg_agent_expiry_lag_seconds_sum") == pytest.approx(0.4)

    with_agent(world, scenario)


def test_ids_that_can_not_be_granted_again_are_forgotten_though_nobody_pulls(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.give([core.change(revoked(1, "s1"))])
        assert "s1" in agent.state.roster.ended
        world.clock.advance(Limits().max_lifetime + 3600)
        await agent.tick()
        assert agent.state.roster.ended == {}
        assert [entry.forgotten for entry in world.journalled() if entry.forgotten] == [["s1"]]

    with_agent(world, scenario)
