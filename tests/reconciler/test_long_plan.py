"""A list so long that the device takes a portion of it while the next is journalled and let through."""

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Mapping

import pytest

from agent.encoding import parse_prefix
from agent.errors import GuardDrifted
from agent.guard import Admission
from agent.journal import Entry
from agent.model import AddPeer, Operation, PeerRemoved, Prefix, PublicKey, Refusal, RemovePeer
from agent.ports import Outcome
from agent.writer import SLICE
from tests.reconciler.harness import Agent, Core, World, address, live, revoked, with_agent
from tests.support.builders import key, peer
from tests.support.recording_guard import RecordingGuard

MANY = 3 * SLICE + 5


def prefix(number: int) -> Prefix:
    return parse_prefix(f"{address(number)}/32")


def adds(world: World) -> list[PublicKey]:
    return [op.public_key for op in world.host.operations() if isinstance(op, AddPeer)]


def once(world: World, peers: int, happens: Callable[[], object]) -> None:
    """It happens when the device has so many of the peers, in the call that brings the last of them."""

    def takes(_: int) -> None:
        if len(adds(world)) >= peers:
            world.host.apply_takes = lambda _: None
            happens()

    world.host.apply_takes = takes


def test_each_is_journalled_and_let_through_before_the_device_has_it_and_not_all_at_once(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        outcome = await agent.give(core.state([live(n) for n in range(1, MANY + 1)]))
        assert outcome.refused == ()
        journalled: set[PublicKey] = set()
        admitted: set[PublicKey] = set()
        waiting_at_the_first_add = 0
        for kind, what in world.host.log:
            if isinstance(what, Entry):
                journalled |= {session.public_key for session, _ in what.sessions}
            elif kind == "guard admit":
                assert isinstance(what, tuple)
                admitted |= what[0].keys()
            elif isinstance(what, AddPeer):
                assert what.public_key in journalled
                assert what.public_key in admitted
                waiting_at_the_first_add = waiting_at_the_first_add or MANY - len(journalled)
        assert waiting_at_the_first_add >= SLICE
        assert set(world.on_interface()) == {key(n) for n in range(1, MANY + 1)}
        assert guard.table is not None
        assert guard.table.keys() == {prefix(n) for n in range(1, MANY + 1)}
        assert {round(left or 0) for left in guard.table.values()} == {3600}
        assert (guard.muted, guard.was_muted) == (0, 1)
        assert agent.drift() == {}

    with_agent(world, scenario)


@pytest.mark.parametrize("what", ["journal", "guard"])
def test_where_it_fails_amid_it_those_are_let_in_who_were_seen_to_and_the_others_once_it_works(
    world: World, guard: RecordingGuard, what: str
) -> None:
    def fail(now: bool) -> None:
        if what == "journal":
            world.journal_fails = now
        else:
            guard.fails = now

    reason = Refusal.NOT_JOURNALLED if what == "journal" else Refusal.NOT_GUARDED

    async def scenario(agent: Agent, core: Core) -> None:
        once(world, SLICE, lambda: fail(now=True))
        outcome = await agent.give(core.state([live(n) for n in range(1, MANY + 1)]))
        there = set(world.on_interface())
        assert SLICE <= len(there) < MANY
        assert {refused.reason for refused in outcome.refused} == {reason}
        assert len(outcome.refused) == MANY - len(there)
        assert there <= {entry[0].public_key for e in world.journalled() for entry in e.sessions}
        assert guard.table is not None
        assert {prefix(n) for n in range(1, MANY + 1) if key(n) in there} <= guard.table.keys()
        fail(now=False)
        await agent.look()
        await agent.tick()
        assert len(world.on_interface()) == MANY
        assert agent.ends() == {}
        assert guard.muted == 0

    with_agent(world, scenario)


def test_a_device_that_fails_amid_it_is_read_and_all_are_brought(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        def fails() -> None:
            world.host.fails, world.host.before_failing = 1, SLICE // 2

        once(world, SLICE, fails)
        outcome = await agent.give(core.state([live(n) for n in range(1, MANY + 1)]))
        assert outcome.refused == ()
        assert len(world.on_interface()) == MANY
        assert len(adds(world)) == MANY
        assert agent.drift() == {}
        assert guard.muted == 0

    with_agent(world, scenario)


def test_a_table_that_is_taken_away_meanwhile_is_missed_at_the_end(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        def taken_away() -> None:
            guard.table = None

        once(world, MANY, taken_away)
        await agent.give(core.state([live(n) for n in range(1, MANY + 1)]))
        assert guard.table is not None
        assert len(guard.table) == MANY
        assert agent.drift() == {"guard": 1}
        assert len(world.on_interface()) == MANY

    with_agent(world, scenario)


def then(guard: RecordingGuard, call: int, happens: Callable[[], object]) -> None:
    """It happens when the guard has admitted whom that call of ``admit`` from now on is for."""
    admit, calls = guard.admit, itertools.count(1)

    async def admitting(admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        refused = await admit(admissions)
        if next(calls) == call:
            happens()
        return refused

    guard.admit = admitting  # type: ignore[method-assign]


def lose(agent: Agent, guard: RecordingGuard) -> None:
    """Somebody flushes nftables, and a tick finds that."""
    guard.table = None
    guard.barred.clear()
    assert agent.warden is not None
    agent.warden._lost(GuardDrifted("the table is not whole: it is gone"))


def test_after_a_table_was_lost_amid_it_everybody_is_let_through_before_the_device_has_them(
    world: World, guard: RecordingGuard
) -> None:
    """It is lost when the second portion has just been let in, and a revocation has all planned anew."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        snapshot = core.state([live(n) for n in range(1, MANY + 1)])
        revocation = core.change(revoked(1, "s1"))
        answers: list[asyncio.Future[Outcome]] = []
        added_without: list[PublicKey] = []
        write = world.host.write

        def checked(operation: Operation) -> None:
            if isinstance(operation, AddPeer) and operation.allowed_ips[0] not in (guard.table or {}):
                added_without.append(operation.public_key)
            write(operation)

        def lost() -> None:
            lose(agent, guard)
            world.host.write = checked  # type: ignore[method-assign]
            answers.append(agent.inbox.submit([revocation], time.monotonic()))

        then(guard, 2, lost)
        await agent.give(snapshot)
        await answers[0]
        assert len(adds(world)) == MANY
        assert added_without == []
        assert guard.table is not None
        assert guard.table.keys() == {prefix(n) for n in range(2, MANY + 1)}
        assert set(world.on_interface()) == {key(n) for n in range(2, MANY + 1)}

    with_agent(world, scenario)


def test_a_revocation_is_heeded_also_amid_a_plan_of_which_some_are_refused(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        # By its session's id it is in the first portion.
        guard.refuses = frozenset({key(1000)})
        snapshot = core.state([live(n) for n in range(1, MANY + 1)])
        revocation = core.change(revoked(1, "s1"))
        answers: list[asyncio.Future[Outcome]] = []
        then(guard, 1, lambda: answers.append(agent.inbox.submit([revocation], time.monotonic())))
        mark, alive = len(world.host.log), agent.alive
        await agent.give(snapshot)
        await answers[0]
        done = [kind for kind, _ in world.host.log[mark:]]
        removed = world.host.log.index(("operation", RemovePeer(key(1)))) - mark
        assert done[:removed].count("guard admit") == 2
        assert agent.alive > alive
        assert set(world.on_interface()) == {key(n) for n in range(2, MANY + 1)} - {key(1000)}

    with_agent(world, scenario)


def test_who_has_to_go_while_the_table_is_made_keeps_no_element(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3, mfa_exempt=True)]))
        changes = [core.change(revoked(1, "s1")), core.change(PeerRemoved(key(3)))]
        answers: list[asyncio.Future[Outcome]] = []
        raise_ = guard.raise_

        async def meanwhile(
            admissions: Mapping[PublicKey, Admission], lease: float | None, there: Collection[PublicKey] = ()
        ) -> Mapping[PublicKey, str]:
            answers.append(agent.inbox.submit(changes, time.monotonic()))
            await agent.reconciler._meanwhile()
            return await raise_(admissions, lease, there)

        guard.raise_ = meanwhile  # type: ignore[method-assign]
        lose(agent, guard)
        await agent.tick()
        await answers[0]
        assert set(world.on_interface()) == {key(2)}
        assert guard.table is not None
        assert guard.table.keys() == {prefix(2)}
        assert guard.barred == {prefix(2)}

    with_agent(world, scenario)


def test_where_the_same_comes_again_nobody_is_journalled_or_written_again(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        listed = [live(n) for n in range(1, MANY + 1)]
        await agent.give(core.state(listed))
        mark = len(world.host.log)
        await agent.give(core.state(listed))
        since = world.host.log[mark:]
        assert not [what for kind, what in since if kind in {"operation", "guard admit", "guard raise"}]
        assert not [what for _, what in since if isinstance(what, Entry) and what.sessions]

    with_agent(world, scenario)
