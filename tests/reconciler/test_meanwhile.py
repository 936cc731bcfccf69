"""What is taken in while a step waits: journalled, written and answered all the same (rules 15, 16, 18)."""

import asyncio
import time
from collections.abc import Mapping
from typing import NoReturn

import pytest

from agent import books, warden
from agent.errors import GuardError
from agent.guard import Admission
from agent.model import (
    AddPeer,
    Change,
    InterfaceSettings,
    LocationChanged,
    PeerRemoved,
    PublicKey,
)
from agent.patience import LOOK_UP
from agent.ports import Outcome, Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, upserted, with_agent
from tests.reconciler.stalls import What, disk, nftables, on_interface, rtnetlink, soon, stalled
from tests.support.builders import grant, key, peer, psk
from tests.support.recording_guard import RecordingGuard

pytestmark = pytest.mark.reliability(
    "the journal's disk, nftables or rtnetlink takes its time, or hangs (injected)",
    "what core and the operator say meanwhile is in force when it is answered, and journalled",
)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """So long a disk may take that a test which waits for it fails."""
    monkeypatch.setattr(books, "PATIENCE", 20.0)
    return 20.0


def test_a_session_that_changes_while_it_is_journalled_is_journalled_again(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)]))
        with stalled(world) as asked:
            first = agent.inbox.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            renewal = core.change(granted(1, grant("s1", 11, lasts=7200)))
            second = agent.inbox.submit([renewal], time.monotonic())
            # So that it is seen that the renewal was taken in.
            third = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
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
            first = agent.inbox.submit([change], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            change = core.change(upserted(1, "10.8.0.92", mfa_exempt=True))
            second = agent.inbox.submit([change], time.monotonic())
            third = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
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
            first = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: not {key(1), key(2)} & on_interface(world))
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert not agent.inbox.pull_wanted.is_set()

    with_agent(world, scenario)


def test_a_state_that_comes_meanwhile_is_taken_before_what_came_after_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9, "10.8.0.9")]))
        with stalled(world) as asked:
            answers: list[asyncio.Future[Outcome]] = []
            answers.append(agent.inbox.submit([core.change(granted(9, grant("s9", 9)))], time.monotonic()))
            await asyncio.to_thread(asked.wait, 10)
            answers.append(agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic()))
            peers = [peer(1, "10.8.0.1"), live(2), peer(9, "10.8.0.9", session=grant("s9", 9))]
            answers.append(agent.inbox.submit(core.state(peers), time.monotonic()))
            answers.append(agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic()))
            await soon(lambda: key(1) not in on_interface(world))
            await asyncio.sleep(3 * LOOK_UP)
            assert key(2) in on_interface(world)
        assert [(await answer).verdict for answer in answers] == [Verdict.APPLIED] * 4
        assert world.on_interface() == {key(9): psk(9)}
        assert not agent.inbox.pull_wanted.is_set()

    with_agent(world, scenario)


@pytest.mark.parametrize("what", [disk, nftables], ids=lambda what: what.__name__)
def test_a_session_that_ends_while_it_is_still_written_is_not_let_in(world: World, what: What) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)]))
        with stalled(world, what) as asked:
            first = agent.inbox.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.inbox.submit([core.change(revoked(1, "s1"))], time.monotonic())
            # So that it is seen that the revocation was taken in.
            third = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
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
            first = agent.inbox.submit([core.change(granted(1, grant("s1", 1)))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            renewal = core.change(granted(1, grant("s1", 1, lasts=7200)))
            second = agent.inbox.submit([renewal], time.monotonic())
            third = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
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
        agent.reconciler.keeper._rollout.added_early = True
        with stalled(world, nftables) as asked:
            first = agent.inbox.submit(core.same([live(1), live(2)]), time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await asyncio.sleep(3 * LOOK_UP)
        assert [(await answer).verdict for answer in (first, second)] == [Verdict.APPLIED] * 2
        assert on_interface(world) == {key(1)}
        assert not agent.inbox.pull_wanted.is_set()

    with_agent(world, before)
    with_agent(world, scenario)


def test_settings_are_answered_once_they_are_in_force(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        location, policy = agent.state.location, agent.state.session_policy
        assert location is not None
        mtus = [LocationChanged(location, InterfaceSettings(mtu=mtu), policy) for mtu in (1280, 1300)]
        with stalled(world, rtnetlink) as asked:
            first = agent.inbox.submit([core.change(mtus[0])], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            second = agent.inbox.submit([core.change(mtus[1])], time.monotonic())
            third = agent.inbox.submit([core.change(revoked(2, "s2"))], time.monotonic())
            await soon(lambda: key(2) not in on_interface(world))
        assert (await first).position == ("e1", 2)
        assert world.host.mtu == 1280
        await second
        assert world.host.mtu == 1300
        await third

    with_agent(world, scenario)


def test_the_operators_end_of_a_held_session_is_answered_once_it_is_journalled(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2), live(3)], mfa_required=False))
        with stalled(world) as asked:
            answer = agent.inbox.submit([core.change(upserted(2, "10.8.0.99"))], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            ended = asyncio.ensure_future(agent.desk.end([key(1)]))
            await soon(lambda: key(1) not in agent.state.sessions)
        await answer
        await ended
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        core.revision = 5
        await agent.give(core.same([live(1), peer(2), live(3)], mfa_required=True))
        assert on_interface(world) == {key(3)}

    with_agent(world, scenario)
    with_agent(world, after)


@pytest.mark.parametrize("same", [True, False])
def test_who_waits_for_an_answer_is_not_kept_by_what_comes_later(world: World, *, same: bool) -> None:
    """A disk that takes longer than core takes from one renewal to the next; of the same peer, or another."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3)]))
        world.disk_takes = lambda: time.sleep(2 * LOOK_UP)
        number = 3 if same else 2
        answers = [agent.inbox.submit([core.change(granted(3, grant("s3", 3)))], time.monotonic())]
        ticked = asyncio.Event()
        agent.reconciler.tick(ticked.set)
        while not (ticked.is_set() and (same or answers[0].done())):
            await asyncio.sleep(LOOK_UP / 2)
            renewal = granted(number, grant(f"s{number}", number, lasts=3600 + len(answers)))
            answers.append(agent.inbox.submit([core.change(renewal)], time.monotonic()))
            assert len(answers) < 80, "neither the answer nor the tick came"
        if same:
            assert not answers[0].done()
        world.disk_takes = lambda: None
        assert [(await answer).verdict for answer in answers] == [Verdict.APPLIED] * len(answers)
        assert world.on_interface() == {key(number): psk(number) for number in (1, 2, 3)}

    with_agent(world, scenario)


class HopelessGuard(RecordingGuard):
    """Raises where it refuses all of many, as where it is asked of nobody else."""

    async def admit(self, admissions: Mapping[PublicKey, Admission]) -> Mapping[PublicKey, str]:
        refused = await super().admit(admissions)
        if len(refused) == len(admissions) >= 10:
            raise GuardError("no peer can be admitted", "look at the kernel's log")
        return refused


def test_peers_that_the_guard_refuses_are_refused_though_the_table_was_made_again(world: World) -> None:
    crowd = range(100, 110)
    world.guard = HopelessGuard(world.host, refuses=frozenset(map(key, crowd)))

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), *(peer(n) for n in crowd)]))
        grants = [core.change(granted(n, grant(f"s{n}", n))) for n in crowd]
        outcome = await asyncio.wait_for(agent.give(grants), 10)
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"] * len(crowd)
        assert on_interface(world) == {key(1)}

    with_agent(world, scenario)


def test_a_prefix_that_comes_back_while_it_moves_has_its_element(world: World) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        def router(number: int, prefix: str) -> Change:
            return core.change(upserted(number, prefix, mfa_exempt=True))

        routers = [peer(1, "10.8.0.50", mfa_exempt=True), peer(2, "10.8.0.60", mfa_exempt=True)]
        await agent.give(core.state([*routers, live(7)]))
        with stalled(world, nftables) as asked:
            moved = [core.change(PeerRemoved(key(1))), router(2, "10.8.0.50")]
            first = agent.inbox.submit(moved, time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            back = [router(2, "10.8.0.60"), router(1, "10.8.0.50"), core.change(revoked(7, "s7"))]
            second = agent.inbox.submit(back, time.monotonic())
            await soon(lambda: key(7) not in on_interface(world))
        await first
        await second
        assert set(map(str, guard.table or ())) == {"10.8.0.50/32", "10.8.0.60/32"}

    with_agent(world, scenario)


def test_elements_that_are_written_after_a_failure_end_with_their_sessions(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.guard = guard = RecordingGuard(world.host)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(3)]))

        async def fails_slowly(admissions: object) -> NoReturn:
            world.clock.advance(100)
            raise GuardError("it does not answer", "")

        monkeypatch.setattr(guard, "admit", fails_slowly)
        await agent.give([core.change(granted(3, grant("s3", 3)))])
        assert guard.table is not None
        assert list(guard.table.values()) == [pytest.approx(3500, abs=1)] * 2

    with_agent(world, scenario)


def test_a_write_that_was_done_meanwhile_is_no_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seen to while the disk works may itself take longer than the disk may."""
    world.guard = guard = RecordingGuard(world.host)
    monkeypatch.setattr(books, "PATIENCE", 1.0)
    monkeypatch.setattr(warden, "_LEASE_EVERY", 0.0)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(3)]))

        def takes() -> None:
            guard.takes = lambda: time.sleep(1.5)
            time.sleep(2 * LOOK_UP)

        world.disk_takes = takes
        answer = agent.inbox.submit([core.change(granted(3, grant("s3", 3)))], time.monotonic())
        await asyncio.sleep(4 * LOOK_UP)
        guard.takes, world.disk_takes = None, lambda: None
        assert (await answer).refused == ()
        assert on_interface(world) == {key(1), key(3)}

    with_agent(world, scenario)


@pytest.mark.parametrize("journals", ["a grant", "an end"])
def test_an_end_that_was_taken_in_meanwhile_is_not_forgotten_by_stopping(world: World, journals: str) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(9)]))
        body = granted(9, grant("s9", 9)) if journals == "a grant" else revoked(2, "s2")
        with stalled(world) as asked:
            answer = agent.inbox.submit([core.change(body)], time.monotonic())
            await asyncio.to_thread(asked.wait, 10)
            ended = asyncio.ensure_future(agent.desk.end([key(1)]))
            await soon(lambda: key(1) not in on_interface(world))
            agent.reconciler.finish()
        await answer
        assert len((await ended)["ended"]) == 1

    async def after(agent: Agent, core: Core) -> None:
        core.revision = 5
        await agent.give(core.same([live(1), live(2), peer(9)]))
        assert key(1) not in on_interface(world)

    with_agent(world, scenario)
    with_agent(world, after)
