"""Whom the guard admits, and for how long (rules 5 and 13)."""

from collections.abc import Iterable
from typing import Any

import pytest

from agent.model import Prefix, PublicKey, SessionPolicy
from agent.sessions import Limits
from tests.reconciler.harness import Agent, Core, granted, live, revoked, upserted
from tests.support.builders import grant, key, location_changed, peer, prefixes, psk
from tests.warden.harness import Gateway, prefix


@pytest.mark.parametrize("lasts", [7200, 60])
def test_a_renewal_rewrites_the_element(gateway: Gateway, lasts: float) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=lasts)))])
        assert gateway.since(mark) == ["admit 1"]
        assert (gateway.left(1), gateway.left(2)) == (lasts, 3600)

    gateway.run(scenario)


def test_a_replacement_rewrites_the_element_and_dismisses_nothing(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s2", 2, lasts=100)))])
        assert gateway.since(mark) == ["admit 1", "UpdatePeer 1"]
        assert gateway.left(1) == 100

    gateway.run(scenario)


def test_lowered_ceilings_reach_the_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        agent.reconciler.configure(Limits(max_lifetime=600), 0)
        await agent.tick()
        assert (gateway.left(1), gateway.left(2)) == (600, 600)
        policy = SessionPolicy(max_lifetime=300)
        await agent.give([core.change(location_changed(policy=policy))])
        assert (gateway.left(1), gateway.left(2)) == (300, 300)

    gateway.run(scenario)


def test_an_element_lives_no_longer_than_its_session_however_slow_the_removals_were(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        gateway.world.host.apply_takes = lambda n: gateway.world.clock.advance(0.5 * n)
        await agent.give([core.change(revoked(1, "s1")), core.change(granted(2, grant("s2", 2)))])
        gateway.world.host.apply_takes = lambda _: None
        left = gateway.left(2)
        assert left is not None
        assert left == agent.state.sessions[key(2)].deadline.remaining(gateway.world.clock.now)

    gateway.run(scenario)


@pytest.mark.parametrize("exempt", [True, False])
def test_a_prefix_that_moves_is_dismissed_before_its_new_owner_is_admitted(
    gateway: Gateway, exempt: bool
) -> None:
    def listed(n: int, address: str) -> Any:
        return peer(n, address, mfa_exempt=exempt, session=None if exempt else grant(f"s{n}", n))

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([listed(1, "10.8.0.1"), listed(2, "10.8.0.2")]))
        mark = gateway.mark()
        # They swap; the guard itself insists on the order.
        await agent.give(core.state([listed(1, "10.8.0.2"), listed(2, "10.8.0.1")]))
        dismissals = [word for word in gateway.since(mark) if word.startswith("dismiss")]
        assert dismissals == ["dismiss 10.8.0.1/32 10.8.0.2/32"]
        assert (gateway.left(1), gateway.left(2)) == ((None, None) if exempt else (3600, 3600))

    gateway.run(scenario)


def test_a_prefix_moves_from_a_session_that_ends_to_another_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, "10.8.0.9", mfa_exempt=True)]))
        await agent.give(core.state([peer(1, "10.8.0.7"), peer(2, "10.8.0.1", mfa_exempt=True)]))
        assert gateway.guard.ends == {prefix("10.8.0.1"): None}
        assert not gateway.guard.barred

    gateway.run(scenario)


def test_a_prefix_that_a_peer_lost_is_dismissed_after_the_device_has_followed(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        session = grant("s1", 1)
        await agent.give(core.state([peer(1, "10.8.0.1", "10.9.0.0/24", session=session)]))
        mark = gateway.mark()
        await agent.give([core.change(upserted(1, "10.8.0.1", session=session))])
        assert gateway.since(mark) == ["admit 1", "UpdatePeer 1", "dismiss 10.9.0.0/24"]
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert gateway.since(mark) == []
        assert gateway.left(1) == 3600

    gateway.run(scenario)


def test_a_peer_that_becomes_exempt_and_back_has_the_element_of_its_kind(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        session = grant("s1", 1)
        await agent.give(core.state([peer(1, mfa_exempt=True), live(2)]))
        await agent.give([core.change(upserted(1, session=session))])
        assert (gateway.left(1), gateway.guard.barred) == (3600, set(prefixes("10.8.0.1", "10.8.0.2")))
        await agent.give([core.change(upserted(1, mfa_exempt=True))])
        assert (gateway.left(1), gateway.guard.barred) == (None, set(prefixes("10.8.0.2")))
        await agent.give([core.change(upserted(1))])
        assert gateway.left(1) == 0
        assert gateway.world.on_interface() == {key(2): psk(2)}

    gateway.run(scenario)


def test_a_session_that_outlasts_mfa_keeps_the_table_and_static_peers_are_let_through(
    gateway: Gateway,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        await agent.give([core.change(location_changed(mfa_required=False))])
        assert gateway.guard.up
        assert (gateway.left(1), gateway.left(2)) == (3600, None)
        await agent.give([core.change(upserted(3))])
        assert gateway.left(3) is None
        mark = gateway.mark()
        gateway.world.clock.advance(3600)
        await agent.tick()
        # Its session is over, and it needs none any more.
        assert gateway.since(mark) == ["RemovePeer 1", "AddPeer 1", "lower"]
        assert not gateway.guard.up

    gateway.run(scenario)


def test_refused_peers_are_not_admitted(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        both = [peer(n, "10.8.0.1", session=grant(f"s{n}", n)) for n in (1, 2)]
        await agent.give(core.state([*both, live(3)]))
        assert gateway.guard.owners == {prefix("10.8.0.3"): key(3)}

    gateway.run(scenario)


def test_one_change_costs_the_same_however_many_peers_there_are(gateway: Gateway) -> None:
    asked: list[PublicKey] = []

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(n) for n in range(1, 400)]))
        judge = agent.state.wanted

        def wanted(key: PublicKey, now: Any) -> Any:
            asked.append(key)
            return judge(key, now)

        agent.state.wanted = wanted  # type: ignore[method-assign]
        mark = gateway.mark()
        await agent.give([core.change(granted(7, grant("s7", 7, lasts=7200)))])
        await agent.give([core.change(revoked(8, "s8"))])
        await agent.tick()
        assert gateway.since(mark) == ["admit 7", "RemovePeer 8", "dismiss 10.8.0.8/32"]
        assert set(asked) == {key(7), key(8)}

    gateway.run(scenario)


def test_a_life_counts_from_after_the_dismissal_of_who_had_the_prefix(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    dismiss = gateway.guard.dismiss

    async def slowly(prefixes: Iterable[Prefix]) -> None:
        gateway.world.clock.advance(5)
        await dismiss(prefixes)

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=600), peer(2, "10.8.0.9")]))
        monkeypatch.setattr(gateway.guard, "dismiss", slowly)
        begun = gateway.world.clock.now.boot
        session = granted(2, grant("s2", 2, lasts=60))
        moved = [core.change(upserted(1, "10.8.0.7")), core.change(upserted(2, "10.8.0.1"))]
        await agent.give([*moved, core.change(session)])
        passed = gateway.world.clock.now.boot - begun
        assert passed >= 5
        assert gateway.left(1) == pytest.approx(60 - passed, abs=0.1)

    gateway.run(scenario)


def test_a_prefix_that_another_peer_had_is_not_taken_for_a_fresh_one(gateway: Gateway) -> None:
    """The guard itself objects to what is said to be fresh and is not."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        await agent.give([core.change(upserted(1, "10.8.0.77", session=grant("s1", 1)))])
        await agent.give([core.change(upserted(2, "10.8.0.1", mfa_exempt=True))])
        await agent.give([core.change(upserted(1, "10.8.0.2", session=grant("s1", 1)))])
        assert (gateway.left(1), gateway.left(2), gateway.left(77)) == (None, 3600, 0)

    gateway.run(scenario)
    gateway.run(scenario, kill=True)
    gateway.run(scenario)
