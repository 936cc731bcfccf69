"""A disk, nftables or rtnetlink that takes its time: no end waits for it (rules 8, 9, 15)."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from agent import books, warden
from agent.model import AddPeer, InterfaceSettings, LocationChanged, PublicKey, RemovePeer
from agent.patience import LOOK_UP
from agent.plan import CUT
from agent.ports import Outcome, Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, upserted, with_agent
from tests.support.builders import grant, key, peer, psk
from tests.support.recording_guard import RecordingGuard

pytestmark = pytest.mark.reliability(
    "the journal's disk, nftables or rtnetlink takes its time, or hangs (injected)",
    "ends by deadline, core or the operator take effect within a second; nothing new is admitted meanwhile",
)

SOON = 1.0
"""Seconds in which somebody has to be off the interface."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """So long a disk may take that a test which waits for it fails."""
    monkeypatch.setattr(books, "PATIENCE", 20.0)
    return 20.0


def disk(world: World, takes: Callable[[], None] | None) -> None:
    world.disk_takes = takes or (lambda: None)


def nftables(world: World, takes: Callable[[], None] | None) -> None:
    assert world.guard is not None
    world.guard.takes = takes


def rtnetlink(world: World, takes: Callable[[], None] | None) -> None:
    world.host.link_takes = takes


What = Callable[[World, Callable[[], None] | None], None]


@contextmanager
def stalled(world: World, what: What = disk) -> Iterator[threading.Event]:
    """It does not answer within the block; the event tells that somebody waits for it."""
    asked, answers = threading.Event(), threading.Event()

    def takes() -> None:
        asked.set()
        assert answers.wait(60)

    what(world, takes)
    try:
        yield asked
    finally:
        what(world, None)
        answers.set()


async def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not come about while something did not answer"
        await asyncio.sleep(0.01)


def on_interface(world: World) -> set[PublicKey]:
    return set(world.on_interface())


async def grants(agent: Agent, core: Core) -> Awaitable[object]:
    return agent.reconciler.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())


async def looks(agent: Agent, core: Core) -> Awaitable[object]:
    agent.world.host.kernel.peers[key(8)].rx_bytes += 1000
    return asyncio.ensure_future(agent.look())


async def ends_another(agent: Agent, core: Core) -> Awaitable[object]:
    return agent.reconciler.submit([core.change(revoked(7, "s7"))], time.monotonic())


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
    return agent.reconciler.submit([core.change(body)], time.monotonic())


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
            revocation = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
            operator = asyncio.ensure_future(agent.reconciler.end([key(3)]))
            await soon(lambda: key(3) not in on_interface(world))
            assert key(8) in on_interface(world)
            assert key(9) not in on_interface(world)
            assert not {"s1", "s2", "s3"} & agent.ends().keys()
        outcome = await revocation
        assert outcome.verdict is Verdict.APPLIED
        assert len((await operator)["ended"]) == 1
        await under_way
        await agent.tick()
        assert agent.reconciler.position is not None
        assert agent.reconciler.position.revision == core.revision
        assert {"s1": "expired", "s2": "revoked", "s3": "operator"}.items() <= agent.ends().items()
        assert guard.table is not None
        assert not {f"10.8.0.{number}/32" for number in (1, 2, 3)} & set(map(str, guard.table))
        assert not agent.reconciler.pull_wanted.is_set()

    async def after(agent: Agent, core: Core) -> None:
        assert {"s1": "expired", "s2": "revoked", "s3": "operator"}.items() <= agent.ends().items()

    with_agent(world, scenario)
    with_agent(world, after)


def test_a_session_that_changes_while_it_is_journalled_is_journalled_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)]))
        with stalled(world) as asked:
            first = agent.reconciler.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            renewal = core.change(granted(1, grant("s1", 11, lasts=7200)))
            second = agent.reconciler.submit([renewal], time.monotonic())
            # So that it is seen that the renewal was taken in.
            third = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
        assert [(await answer).verdict for answer in (first, second, third)] == [Verdict.APPLIED] * 3
        assert world.on_interface() == {key(1): psk(11)}
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {key(1): psk(11)}
        world.clock.advance(7000)
        await agent.tick()
        assert world.on_interface() == {key(1): psk(11)}

    with_agent(world, scenario)
    with_agent(world, after)


def test_a_listing_that_changes_while_it_is_journalled_is_journalled_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, "10.8.0.1", mfa_exempt=True), live(2)]))
        with stalled(world) as asked:
            change = core.change(upserted(1, "10.8.0.91", mfa_exempt=True))
            first = agent.reconciler.submit([change], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            change = core.change(upserted(1, "10.8.0.92", mfa_exempt=True))
            second = agent.reconciler.submit([change], time.monotonic())
            third = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
        for answer in (first, second, third):
            await answer
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert [str(p) for p in agent.state.roster.peers[key(1)].allowed_ips] == ["10.8.0.92/32"]

    with_agent(world, scenario)
    with_agent(world, after)


def test_changes_are_taken_in_their_order_though_the_disk_is_waited_for_amid_them(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(8, "10.8.0.8", mfa_exempt=True)]))
        with stalled(world) as asked:
            world.host.kernel.peers[key(8)].rx_bytes += 1000
            # One step: the look waits for the disk before the first change is taken.
            agent.reconciler.observe()
            first = agent.reconciler.submit([core.change(revoked(1, "s1"))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: not {key(1), key(2)} & on_interface(world))
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert not agent.reconciler.pull_wanted.is_set()

    with_agent(world, scenario)


def test_a_state_that_comes_meanwhile_is_taken_before_what_came_after_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9, "10.8.0.9")]))
        with stalled(world) as asked:
            answers: list[asyncio.Future[Outcome]] = []
            answers.append(
                agent.reconciler.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            )
            await asyncio.to_thread(asked.wait, 10)
            answers.append(agent.reconciler.submit([core.change(revoked(1, "s1"))], time.monotonic()))
            peers = [peer(1, "10.8.0.1"), live(2), peer(9, "10.8.0.9", session=grant("s9", 9))]
            answers.append(agent.reconciler.submit(core.state(peers), time.monotonic()))
            answers.append(agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic()))
            await soon(lambda: key(1) not in on_interface(world))
            await asyncio.sleep(3 * LOOK_UP)
            assert key(2) in on_interface(world)
        assert [(await answer).verdict for answer in answers] == [Verdict.APPLIED] * 4
        assert world.on_interface() == {key(9): psk(9)}
        assert not agent.reconciler.pull_wanted.is_set()

    with_agent(world, scenario)


def test_what_the_device_would_not_remove_meanwhile_is_mended_when_the_step_goes_on(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9, "10.8.0.9")]))
        with stalled(world) as asked:
            first = agent.reconciler.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            world.host.fails = 1
            second = agent.reconciler.submit([core.change(revoked(1, "s1"))], time.monotonic())
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
            first = agent.reconciler.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic())
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
        while not agent.reconciler.status()["journal_ok"]:
            await agent.tick()
        assert world.on_interface() == {key(3): psk(3)}
        assert agent.ends() == {"s1": "expired", "s2": "revoked"}

    with_agent(world, scenario)


@pytest.mark.parametrize("what", [disk, nftables], ids=lambda what: what.__name__)
def test_a_session_that_ends_while_it_is_still_written_is_not_let_in(world: World, what: What) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)]))
        with stalled(world, what) as asked:
            first = agent.reconciler.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.reconciler.submit([core.change(revoked(1, "s1"))], time.monotonic())
            # So that it is seen that the revocation was taken in.
            third = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
        assert [(await answer).verdict for answer in (first, second, third)] == [Verdict.APPLIED] * 3
        assert agent.ends() == {"s1": "revoked", "s2": "revoked"}
        assert not any(
            isinstance(what, AddPeer) and what.public_key == key(1) for what in world.host.operations()
        )
        assert guard.table == {}

    with_agent(world, scenario)


def test_a_session_that_is_renewed_while_its_element_is_written_gets_another_element(world: World) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)]))
        with stalled(world, nftables) as asked:
            first = agent.reconciler.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            renewal = core.change(granted(1, grant("s1", 1, lasts=7200)))
            second = agent.reconciler.submit([renewal], time.monotonic())
            third = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
        assert [(await answer).verdict for answer in (first, second, third)] == [Verdict.APPLIED] * 3
        assert guard.table is not None
        assert list(guard.table.values()) == [pytest.approx(7200, abs=1)]

    with_agent(world, scenario)


def test_changes_on_top_of_the_first_state_wait_for_it(world: World) -> None:
    """What was found is looked at before the first state is taken, if anybody was added before it."""
    world.guard = RecordingGuard(world.host)

    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))

    async def scenario(agent: Agent, core: Core) -> None:
        core.revision = 1
        agent.reconciler._keeper._added_early = True
        with stalled(world, nftables) as asked:
            first = agent.reconciler.submit(core.same([live(1), live(2)]), time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.reconciler.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await asyncio.sleep(3 * LOOK_UP)
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert on_interface(world) == {key(1)}
        assert not agent.reconciler.pull_wanted.is_set()

    with_agent(world, before)
    with_agent(world, scenario)
