"""A table of an earlier life is taken over, and gives way to what core says (rule 14)."""

from collections.abc import Collection, Mapping

import pytest

from agent.guard import Admission
from agent.model import PublicKey, Refusal
from tests.reconciler.harness import Agent, Core, live
from tests.support.builders import key, peer, prefixes, psk
from tests.warden.harness import Gateway, fault, prefix, refusals


def test_a_restart_changes_no_element_and_reports_no_drift(gateway: Gateway) -> None:
    listed = [live(1), peer(2, mfa_exempt=True), live(4)]

    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state(listed))

    async def second(agent: Agent, core: Core) -> None:
        await agent.look()
        assert (gateway.left(1), gateway.left(2)) == (3600, None)
        core.revision = 1
        await agent.give(core.state(listed[:2]))
        await agent.look()
        assert gateway.guard.ends.keys() == set(prefixes("10.8.0.1", "10.8.0.2"))
        assert agent.drift() == {}

    gateway.run(first)
    gateway.run(second)


def test_who_expired_during_a_restart_goes_before_core_says_anything(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), live(2, lasts=600)]))

    async def second(agent: Agent, core: Core) -> None:
        assert gateway.world.on_interface() == {key(2): psk(2)}
        assert (gateway.left(1), gateway.left(2)) == (0, 560)

    gateway.run(first, kill=True)
    gateway.world.clock.advance(40)
    gateway.run(second)


def test_elements_of_a_peer_that_went_during_a_restart_are_dismissed_silently(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2, lasts=10)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.guard.ends[prefix("10.8.0.2")] = gateway.monotonic() + 1
        core.revision = 1
        await agent.give(core.state([live(1), peer(2)]))
        await agent.look()
        assert gateway.guard.ends.keys() == set(prefixes("10.8.0.1"))
        assert agent.drift() == {}

    gateway.run(first)
    gateway.world.clock.advance(10)
    gateway.run(second)


def test_before_the_first_state_nobody_who_is_left_as_found_loses_the_element(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        # Its session is journalled, and the process dies before its peer is.
        world = gateway.world

        def die(event: str) -> None:
            if event == "kernel, after":
                agent.kill()

        world.host.at = die

    gateway.run(first, kill=True)
    gateway.world.host.at = lambda _: None
    gateway.unlist(1)

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(1)
        await agent.tick()
        await agent.look()
        assert gateway.world.on_interface() == {key(1): psk(1), key(2): None}
        assert (gateway.left(1), gateway.left(2)) == (3599, None)
        assert agent.drift() == {}

    gateway.run(second)


def test_a_guard_that_fails_at_a_restart_takes_nobody_down_whom_its_table_still_ends(
    gateway: Gateway,
) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), live(3, lasts=90)]))

    async def second(agent: Agent, core: Core) -> None:
        assert gateway.world.on_interface().keys() == {key(1), key(3)}
        assert refusals(agent) == {key(2): Refusal.NOT_GUARDED}
        assert fault(agent)

    gateway.run(first, kill=True)
    # The one's element is gone, the others' go on.
    del gateway.guard.ends[prefix("10.8.0.2")]
    gateway.guard.fails = {"raise", "lease"}
    gateway.run(second)


def test_who_is_left_as_found_stays_also_where_the_guard_fails(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=600)]))

    async def second(agent: Agent, core: Core) -> None:
        await agent.tick()
        assert gateway.world.on_interface() == {key(1): psk(1)}
        assert "nftables fails" in fault(agent)

    gateway.run(first, kill=True)
    gateway.unlist(1)
    gateway.guard.fails = {"read", "raise", "admit", "dismiss", "lease"}
    gateway.run(second)


def test_a_table_that_could_not_be_read_at_the_start_goes_when_core_requires_no_mfa(
    gateway: Gateway,
) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.guard.fails = ()
        core.revision = 1
        await agent.give(core.state([peer(1)], mfa_required=False))
        assert not gateway.guard.up

    gateway.run(first)
    gateway.guard.fails = {"read"}
    gateway.run(second)


def test_a_table_of_an_earlier_life_goes_when_core_requires_no_mfa(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))

    async def second(agent: Agent, core: Core) -> None:
        core.revision = 1
        mark = gateway.mark()
        await agent.give(core.state([peer(1)], mfa_required=False))
        assert gateway.since(mark)[-1] == "lower"

    gateway.run(first)
    gateway.run(second)


def test_after_a_restart_only_elements_that_differ_are_written_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard itself objects to elements that are said to be there and are not."""
    written: list[set[PublicKey]] = []
    raise_ = gateway.guard.raise_

    async def watched(
        admissions: Mapping[PublicKey, Admission], lease: float | None, there: Collection[PublicKey] = ()
    ) -> Mapping[PublicKey, str]:
        written.append(admissions.keys() - there)
        return await raise_(admissions, lease, there)

    monkeypatch.setattr(gateway.guard, "raise_", watched)

    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3, mfa_exempt=True)]))

    async def again(agent: Agent, core: Core) -> None:
        assert [gateway.left(n) for n in (1, 2, 3)] == [pytest.approx(3590, abs=1)] * 2 + [None]

    gateway.run(first, kill=True)
    gateway.world.clock.advance(10)
    gateway.guard.ends[prefix("10.8.0.2")] = gateway.monotonic() + 9000
    written.clear()
    gateway.run(again, kill=True)
    assert written == [{key(2)}]
