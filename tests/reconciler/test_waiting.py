"""A disk, nftables or rtnetlink that takes its time: no end waits for it (rules 8, 9, 15)."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from agent import books, guardtable, warden
from agent.model import (
    AddPeer,
    CutPeer,
    InterfaceSettings,
    LocationChanged,
    PeerRemoved,
    RemovePeer,
)
from agent.patience import LOOK_UP
from agent.plan import CUT
from agent.ports import Outcome, Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.reconciler.stalls import What, disk, nftables, on_interface, rtnetlink, soon, stalled
from tests.support.builders import grant, key, location_changed, peer, psk
from tests.support.recording_guard import RecordingGuard

pytestmark = pytest.mark.reliability(
    "the journal's disk, nftables or rtnetlink takes its time, or hangs (injected)",
    "ends by deadline, core or the operator take effect within a second; nothing new is admitted meanwhile",
)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """So long a disk may take that a test which waits for it fails."""
    monkeypatch.setattr(books, "PATIENCE", 20.0)
    return 20.0


async def grants(agent: Agent, core: Core) -> Awaitable[object]:
    return agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())


async def looks(agent: Agent, core: Core) -> Awaitable[object]:
    agent.world.host.kernel.peers[key(8)].rx_bytes += 1000
    return asyncio.ensure_future(agent.look())


async def ends_another(agent: Agent, core: Core) -> Awaitable[object]:
    return agent.inbox.submit([core.change(revoked(7, "s7"))], time.monotonic())


async def tries_the_journal_again(agent: Agent, core: Core) -> Awaitable[object]:
    agent.world.journal_fails = True
    await agent.give([core.change(granted(9, grant("s9", 9)))])
    agent.world.journal_fails = False
    return asyncio.ensure_future(agent.tick())


async def ticks(agent: Agent, core: Core) -> Awaitable[object]:
    return asyncio.ensure_future(agent.tick())


async def looks_at_the_guard(agent: Agent, core: Core) -> Awaitable[object]:
    agent.reconciler.guard_disturbed()
    return await ticks(agent, core)


async def finds_no_table(agent: Agent, core: Core) -> Awaitable[object]:
    assert agent.world.guard is not None
    agent.world.guard.table = None
    return await looks_at_the_guard(agent, core)


async def hears_of_another_mtu(agent: Agent, core: Core) -> Awaitable[object]:
    assert agent.state.location is not None
    body = LocationChanged(agent.state.location, InterfaceSettings(mtu=1280), agent.state.session_policy)
    return agent.inbox.submit([core.change(body)], time.monotonic())


WAITING = [
    *((disk, waits) for waits in (grants, looks, ends_another, tries_the_journal_again)),
    *(
        (nftables, waits)
        for waits in (grants, looks, ends_another, ticks, looks_at_the_guard, finds_no_table)
    ),
    *((rtnetlink, waits) for waits in (looks, hears_of_another_mtu)),
]
"""What does not answer, and what waits for it: each kind of call that a step makes."""


@pytest.mark.parametrize(("what", "waits"), WAITING, ids=lambda value: value.__name__)
def test_no_end_waits_for_what_does_not_answer(
    world: World,
    what: What,
    waits: Callable[[Agent, Core], Awaitable[Awaitable[object]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world.guard = guard = RecordingGuard(world.host)
    # The lease is renewed at each tick.
    monkeypatch.setattr(warden, "_LEASE_EVERY", 0.0)

    async def scenario(agent: Agent, core: Core) -> None:
        others = [live(7), peer(8, "10.8.0.8", mfa_exempt=True), peer(9, "10.8.0.9")]
        await agent.give(core.state([live(1, lasts=30), live(2), live(3), *others]))
        with stalled(world, what) as asked:
            under_way = await waits(agent, core)
            await asyncio.to_thread(asked.wait, 10)
            world.clock.advance(30)
            await soon(lambda: key(1) not in on_interface(world))
            revocation = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
            operator = asyncio.ensure_future(agent.desk.end([key(3)]))
            await soon(lambda: key(3) not in on_interface(world))
            assert key(8) in on_interface(world)
            assert key(9) not in on_interface(world)
            assert not {"s1", "s2", "s3"} & agent.ends().keys()
        outcome = await revocation
        assert outcome.verdict is Verdict.APPLIED
        assert len((await operator)["ended"]) == 1
        await under_way
        await agent.tick()
        assert agent.inbox.position is not None
        assert agent.inbox.position.revision == core.revision
        assert {"s1": "expired", "s2": "revoked", "s3": "operator"}.items() <= agent.ends().items()
        assert guard.table is not None
        assert not {f"10.8.0.{number}/32" for number in (1, 2, 3)} & set(map(str, guard.table))
        assert not agent.inbox.pull_wanted.is_set()

    async def after(agent: Agent, core: Core) -> None:
        assert {"s1": "expired", "s2": "revoked", "s3": "operator"}.items() <= agent.ends().items()

    with_agent(world, scenario)
    with_agent(world, after)


def test_what_the_device_would_not_remove_meanwhile_is_mended_when_the_step_goes_on(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9, "10.8.0.9")]))
        with stalled(world) as asked:
            first = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.host.fails = 1
            second = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
            await soon(lambda: world.host.fails == 0)
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert on_interface(world) == {key(2), key(9)}

    with_agent(world, scenario)


def test_many_who_have_to_go_meanwhile_are_cut_and_removed_later(world: World) -> None:
    many = 200

    async def scenario(agent: Agent, core: Core) -> None:
        crowd = [live(100 + number, lasts=30) for number in range(many)]
        await agent.give(core.state([*crowd, peer(9, "10.9.0.9")]))
        assert len(world.on_interface()) == many
        with stalled(world) as asked:
            first = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.clock.advance(30)
            await soon(lambda: not world.on_interface())
            mirror = agent.reconciler.writer.mirror.peers
            assert {held.tenure for held in mirror.values()} == {CUT}
        await first
        await agent.reaped()
        assert on_interface(world) == {key(9)}
        removed = [what for what in world.host.operations() if isinstance(what, RemovePeer)]
        assert len(removed) == many

    with_agent(world, scenario)


def test_a_disk_that_hangs_is_given_up_and_what_ended_is_journalled_once_it_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), live(2), peer(3)]))
        with stalled(world):
            monkeypatch.setattr(books, "PATIENCE", 0.1)
            outcome = await agent.give([core.change(granted(3, grant("s3", 3)))])
            assert [r.reason for r in outcome.refused] == ["not_journalled"]
            await agent.give([core.change(revoked(2, "s2"))])
            world.clock.advance(30)
            await agent.tick()
            assert world.on_interface() == {}
            assert agent.ends() == {}
        while not (await agent.desk.status())["journal_ok"]:
            await agent.tick()
        assert world.on_interface() == {key(3): psk(3)}
        assert agent.ends() == {"s1": "expired", "s2": "revoked"}

    with_agent(world, scenario)


def test_one_whom_the_device_will_not_remove_keeps_nobody_else_on_the_interface(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), live(3), peer(9)]))
        world.host.refuses = {key(1): frozenset({RemovePeer, CutPeer})}
        with stalled(world) as asked:
            first = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            gone = [core.change(revoked(1, "s1")), core.change(revoked(2, "s2"))]
            second = agent.inbox.submit(gone, time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
            third = agent.inbox.submit([core.change(revoked(3, "s3"))], time.monotonic())
            await soon(lambda: key(3) not in on_interface(world))
            world.host.refuses = {}
        assert [(await answer).verdict for answer in (first, second, third)] == [Verdict.APPLIED] * 3
        assert on_interface(world) == {key(9)}

    with_agent(world, scenario)


def test_a_table_that_is_made_again_keeps_nobody_on_the_interface(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.guard = guard = RecordingGuard(world.host)
    monkeypatch.setattr(warden, "_LEASE_EVERY", 0.0)
    monkeypatch.setattr(guardtable, "RAISE_EVERY", 0.0)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        guard.fails = True
        await agent.tick()
        guard.fails = False
        with stalled(world, nftables) as asked:
            answer = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            await soon(lambda: key(1) not in on_interface(world))
        assert (await answer).verdict is Verdict.APPLIED

    with_agent(world, scenario)


def test_mfa_that_is_switched_on_keeps_nobody_on_the_interface_for_the_table(world: World) -> None:
    world.guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2)], mfa_required=False))
        with stalled(world, nftables) as asked:
            changes = [core.change(location_changed(mfa_required=True)), core.change(PeerRemoved(key(1)))]
            answer = agent.inbox.submit(changes, time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            await soon(lambda: key(1) not in on_interface(world))
        assert (await answer).verdict is Verdict.APPLIED
        assert on_interface(world) == set()

    with_agent(world, scenario)


def test_who_goes_peer_by_peer_does_not_wait_for_the_disk(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9)]))
        world.host.refuses = {key(2): frozenset({RemovePeer, CutPeer})}
        with stalled(world) as asked:
            changes = [core.change(revoked(n, f"s{n}")) for n in (2, 1)]
            answer = agent.inbox.submit([*changes, core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            await soon(lambda: key(1) not in on_interface(world))
        await answer
        assert agent.ends() == {"s1": "revoked"}
        world.host.refuses = {}
        await agent.tick()
        assert agent.ends() == {"s1": "revoked", "s2": "revoked"}
        assert on_interface(world) == {key(9)}

    with_agent(world, scenario)


def test_core_that_is_away_for_too_long_ends_sessions_also_then(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        agent.inbox.heard()
        await agent.give(core.state([live(1), peer(9)]))
        with stalled(world) as asked:
            answer = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.clock.advance(60)
            await soon(lambda: key(1) not in on_interface(world))
        await answer
        assert agent.ends()["s1"] == "core_lost"

    with_agent(world, scenario, core_lost_grace=30.0)


def test_no_end_is_told_of_before_the_peer_is_off_the_interface(world: World) -> None:
    """The link comes up again slowly, and the device fails just then."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        world.host.up = False
        calls = 0
        asked, answers = threading.Event(), threading.Event()

        def takes() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:  # after drift and configure
                asked.set()
                assert answers.wait(60)

        world.host.link_takes = takes
        agent.reconciler.observe()
        await asyncio.to_thread(asked.wait, 10)
        world.host.refuses = {key(1): frozenset({RemovePeer, CutPeer})}
        answer = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
        await soon(lambda: key(1) not in agent.state.sessions)
        told: list[bool] = []
        world.host.at = lambda where: (
            told.append(key(1) in on_interface(world)) if where == "journal" else None
        )
        world.host.link_takes = None
        answers.set()
        await agent.tick()
        assert agent.ends() == {}
        world.host.refuses = {}
        await agent.tick()
        await answer
        assert agent.ends() == {"s1": "revoked"}
        assert on_interface(world) == {key(2)}

    with_agent(world, scenario)


def test_who_goes_with_others_does_not_wait_for_the_lease_between_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.guard = RecordingGuard(world.host)
    monkeypatch.setattr(warden, "_LEASE_EVERY", 0.0)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), live(3)]))
        with stalled(world, nftables) as asked:
            changes = [core.change(revoked(number, f"s{number}")) for number in (1, 2, 3)]
            answer = agent.inbox.submit(changes, time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            await soon(lambda: not on_interface(world))
        assert (await answer).verdict is Verdict.APPLIED

    with_agent(world, scenario)


def test_an_interface_that_goes_while_somebody_is_let_go_is_made_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9)]))
        with stalled(world) as asked:
            first = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.host.delete()
            second = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
            await soon(lambda: key(1) not in agent.state.sessions)
            await asyncio.sleep(2 * LOOK_UP)
            assert not first.done()
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert on_interface(world) == {key(2), key(9)}

    with_agent(world, scenario)


def test_one_of_many_whom_the_device_refuses_does_not_keep_the_others_from_being_cut(world: World) -> None:
    many = 400

    async def scenario(agent: Agent, core: Core) -> None:
        crowd = [live(300 + number, lasts=30) for number in range(many)]
        await agent.give(core.state([*crowd, peer(9, "10.9.0.9")]))
        world.host.refuses = {key(500): frozenset({RemovePeer, CutPeer})}
        with stalled(world) as asked:
            answer = agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.clock.advance(30)
            await soon(lambda: on_interface(world) == {key(500)})
            removed = [what for what in world.host.operations() if isinstance(what, RemovePeer)]
            assert removed == []
            world.host.refuses = {}
        await answer
        await agent.reaped()
        assert on_interface(world) == {key(9)}

    with_agent(world, scenario)


def test_the_table_goes_once_mfa_is_off_though_core_never_rests(world: World) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(n) for n in range(1, 60)]))
        world.disk_takes = lambda: time.sleep(2 * LOOK_UP)
        switch = core.change(location_changed(mfa_required=False))
        answers = [agent.inbox.submit([switch], time.monotonic())]
        while guard.table is not None:
            held = granted(len(answers), grant(f"t{len(answers)}", len(answers)))
            answers.append(agent.inbox.submit([core.change(held)], time.monotonic()))
            assert len(answers) < 60, "the table stays"
            await asyncio.sleep(LOOK_UP / 2)
        world.disk_takes = lambda: None
        assert [(await answer).verdict for answer in answers] == [Verdict.APPLIED] * len(answers)
        assert len(on_interface(world)) == 59

    with_agent(world, scenario)


def test_who_is_stuck_on_the_interface_has_no_element(world: World) -> None:
    """The device goes peer by peer, and does not remove one whose session is revoked just then."""
    world.guard = guard = RecordingGuard(world.host)
    crowd = range(100, 140)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), *(peer(n) for n in crowd)]))
        # In whatever order the peers come, some that the device takes come after one that it refuses.
        world.host.refuses = {key(n): frozenset({AddPeer}) for n in crowd[::2]}
        world.host.refuses[key(1)] = frozenset({RemovePeer, CutPeer})
        revocations: list[asyncio.Future[Outcome]] = []

        def takes(operations: int) -> None:
            if operations == 1 and not revocations:
                change = core.change(revoked(1, "s1"))
                revocations.append(agent.inbox.submit([change], time.monotonic()))

        world.host.apply_takes = takes
        await agent.give([core.change(granted(n, grant(f"s{n}", n))) for n in crowd])
        await revocations[0]
        await agent.look()
        assert "10.8.0.1/32" not in set(map(str, guard.table or ()))
        world.host.refuses = {}
        await agent.tick()
        assert key(1) not in on_interface(world)

    with_agent(world, scenario)
