"""The kernel's guard follows the state, in the right order with the device (rules 5, 11 to 14 and 19)."""

import errno
import sqlite3
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any

import pytest

from agent import clock as agent_clock
from agent.errors import DeviceError
from agent.guard import Admission
from agent.model import AddPeer, Prefix, PublicKey, Refusal, RemovePeer, SessionPolicy
from agent.ports import Guard
from agent.sessions import Limits
from agent.warden import Warden
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, run, upserted
from tests.support.builders import grant, key, location_changed, peer, prefixes, psk
from tests.support.timed_guard import TimedGuard

Scenario = Callable[[Agent, Core], Coroutine[Any, Any, None]]


class GuardedAgent(Agent):
    """An agent whose warden can be looked at."""

    warden: Warden

    def __init__(self, world: World, *, required: bool, lease: float) -> None:
        self._about = required, lease
        super().__init__(world)

    def _warden(self, guard: Guard) -> Warden:
        required, lease = self._about
        return Warden(
            state=self.state, guard=guard, read_clock=self.world.clock, required=required, lease=lease
        )


class Gateway:
    """A host with a guard; time stands still unless the test moves it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slept = 0.0
        self.guard = TimedGuard(self.monotonic, world.host.log)

    def monotonic(self) -> float:
        return self.world.clock.now.boot - self.slept

    def suspend(self, seconds: float) -> None:
        self.world.clock.advance(seconds)
        self.slept += seconds

    def run(
        self, scenario: Scenario, *, kill: bool = False, required: bool = True, lease: float = 300
    ) -> None:
        self.world.guard = self.guard  # type: ignore[assignment]

        async def main() -> None:
            async with GuardedAgent(self.world, required=required, lease=lease) as agent:
                await scenario(agent, Core(self.world.clock))
                if kill:
                    agent.kill()

        run(main())

    def left(self, number: int) -> float | None:
        """Seconds for which 10.8.0.NUMBER is let through; None: for good, 0: not at all."""
        return self.guard.left(prefix(f"10.8.0.{number}"))

    def since(self, mark: int) -> list[str]:
        """What was done to guard and device, in words."""
        words = []
        for kind, what in self.world.host.log[mark:]:
            if kind == "operation":
                words.append(f"{type(what).__name__} {number(what.public_key)}")  # type: ignore[attr-defined]
            elif kind in {"guard: raise", "guard: admit"}:
                keys = " ".join(str(number(k)) for k in what)  # type: ignore[attr-defined]
                words.append(f"{kind[7:]} {keys}".rstrip())
            elif kind == "guard: dismiss":
                words.append(f"dismiss {' '.join(map(str, what))}")  # type: ignore[call-overload]
            elif kind in {"guard: lower", "up"}:
                words.append(kind.removeprefix("guard: "))
        return words

    def mark(self) -> int:
        return len(self.world.host.log)


def prefix(text: str) -> Prefix:
    return prefixes(text)[0]


def number(public_key: PublicKey) -> int:
    return int.from_bytes(public_key, "big")


def refusals(agent: Agent) -> dict[PublicKey, Refusal]:
    return dict(agent.state.roster.refused)


def fault(agent: Agent) -> str:
    assert isinstance(agent, GuardedAgent)
    return agent.warden.fault


@pytest.fixture
def gateway(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway(World(tmp_path))
    monkeypatch.setattr(agent_clock, "monotonic", gateway.monotonic)
    return gateway


# The order.


def test_on_a_grant_the_element_is_written_before_the_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert gateway.since(mark) == ["admit 1", "AddPeer 1"]
        assert gateway.left(1) == 3600

    gateway.run(scenario)


def test_on_an_end_the_peer_goes_before_the_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        mark = gateway.mark()
        await agent.give([core.change(revoked(1, "s1"))])
        gateway.world.clock.advance(3600)
        await agent.tick()
        assert gateway.since(mark) == [
            "RemovePeer 1",
            "dismiss 10.8.0.1/32",
            "RemovePeer 2",
            "dismiss 10.8.0.2/32",
        ]
        assert not gateway.guard.ends

    gateway.run(scenario)


def test_mfa_on_raises_the_table_before_any_peer_is_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)], mfa_required=False))
        assert not gateway.guard.up
        mark = gateway.mark()
        await agent.give([core.change(location_changed(mfa_required=True))])
        words = gateway.since(mark)
        assert words[0] == "raise 1 3"
        assert sorted(words[1:]) == ["AddPeer 1", "RemovePeer 1", "RemovePeer 2"]
        assert (gateway.left(1), gateway.left(2), gateway.left(3)) == (3600, 0, None)

    gateway.run(scenario)


def test_mfa_on_removes_who_has_no_session_even_if_the_table_cannot_be_had(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)], mfa_required=False))
        gateway.guard.fails = {"raise"}
        await agent.give([core.change(location_changed(mfa_required=True))])
        assert gateway.world.on_interface() == {}
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}

    gateway.run(scenario)


def test_mfa_off_takes_the_table_down_last(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), peer(2, mfa_exempt=True)]))
        mark = gateway.mark()
        await agent.give([core.change(location_changed(mfa_required=False))])
        assert gateway.since(mark) == ["AddPeer 1", "lower"]

    gateway.run(scenario)


def test_on_a_link_that_was_made_again_the_table_comes_first_then_peers_then_up(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.world.host.delete()
        mark = gateway.mark()
        await agent.look()
        assert gateway.since(mark) == ["raise", "admit 1", "AddPeer 1", "up"]

    gateway.run(scenario)


def test_the_first_table_comes_before_the_first_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        mark = gateway.mark()
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)]))
        assert gateway.since(mark)[:2] == ["raise", "admit 1 3"]

    gateway.run(scenario)


# Whom it admits, and for how long.


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


def test_a_table_that_could_not_be_taken_down_has_nothing_stale_once_mfa_is_on_again(
    gateway: Gateway,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.give([core.change(location_changed(mfa_required=False))])
        gateway.guard.fails = {"lower"}
        gateway.world.clock.advance(3600)
        await agent.tick()
        assert gateway.guard.up
        exempt = [peer(1, mfa_exempt=True)]
        await agent.give(core.state(exempt, mfa_required=True))
        assert gateway.left(1) is None

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


# When the guard fails.


def test_without_the_guard_required_peers_with_sessions_are_refused_and_others_are_not(
    gateway: Gateway,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.guard.fails = {"raise"}
        await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)]))
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}
        assert gateway.world.on_interface() == {key(3): None}
        assert "nftables fails" in fault(agent)
        gateway.guard.fails = ()
        await agent.look()
        assert refusals(agent) == {}
        assert gateway.world.on_interface() == {key(1): psk(1), key(3): None}
        assert (gateway.left(1), gateway.left(3), fault(agent)) == (3600, None, "")

    gateway.run(scenario)


def test_without_the_guard_not_required_everybody_is_let_in_and_the_fault_is_kept(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.guard.fails = {"raise"}
        await agent.give(core.state([live(1)]))
        assert gateway.world.on_interface() == {key(1): psk(1)}
        assert "nftables fails" in fault(agent)
        gateway.guard.fails = ()
        await agent.look()
        assert (gateway.left(1), fault(agent)) == (3600, "")

    gateway.run(scenario, required=False)


def test_without_the_guard_one_change_does_not_judge_everybody(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.guard.fails = {"raise"}
        await agent.give(core.state([live(1), live(2), peer(3)]))
        mark = gateway.mark()
        await agent.give([core.change(granted(3, grant("s3", 3)))])
        assert ("guard: failed", "raise") not in gateway.world.host.log[mark:]
        assert key(3) in gateway.world.on_interface()

    gateway.run(scenario, required=False)


def test_a_renewal_that_the_guard_fails_costs_the_peer_nothing(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        gateway.guard.fails = {"admit", "raise"}
        mark = gateway.mark()
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=7200)))])
        assert refusals(agent) == {}
        assert gateway.since(mark) == []
        await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert refusals(agent) == {key(2): Refusal.NOT_GUARDED}
        assert gateway.world.on_interface() == {key(1): psk(1)}
        gateway.guard.fails = ()
        gateway.world.clock.advance(10)
        await agent.look()
        assert (gateway.left(1), gateway.left(2), fault(agent)) == (7190, 3590, "")
        assert gateway.world.on_interface() == {key(1): psk(1), key(2): psk(2)}

    gateway.run(scenario)


def test_after_a_failed_renewal_alone_the_next_look_recovers(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.fails = {"admit", "raise"}
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=7200)))])
        gateway.guard.fails = ()
        gateway.world.clock.advance(60)
        await agent.tick()
        assert gateway.guard.lease_until == gateway.monotonic() + 300
        await agent.look()
        assert (gateway.left(1), fault(agent), agent.drift()) == (7140, "", {})
        gateway.world.clock.advance(60)
        await agent.tick()
        assert gateway.guard.lease_until == gateway.monotonic() + 300

    gateway.run(scenario)


def test_a_lease_that_cannot_be_renewed_has_the_table_raised_again(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.delete()
        gateway.world.clock.advance(1)
        await agent.tick()
        await agent.tick()
        assert (gateway.guard.up, gateway.left(1)) == (True, 3599)
        assert gateway.guard.lease_until == gateway.monotonic() + 300

    gateway.run(scenario)


def test_a_peer_that_the_guard_refuses_is_refused_until_a_look_finds_it_admitted(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.guard.refuses = {key(1)}
        await agent.give(core.state([live(1), live(2)]))
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}
        assert gateway.world.on_interface() == {key(2): psk(2)}
        gateway.guard.refuses = set()
        await agent.look()
        assert (gateway.left(1), refusals(agent), agent.drift()) == (3600, {}, {})

    gateway.run(scenario)


def test_a_renewal_that_the_guard_refuses_leaves_no_element_of_the_peer(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.refuses = {key(1)}
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=7200)))])
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}
        assert (gateway.left(1), gateway.world.on_interface()) == (0, {})

    gateway.run(scenario)


def test_a_peer_refused_by_a_guard_that_is_not_required_is_tried_again_at_a_look(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.refuses = {key(1)}
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=7200)))])
        assert gateway.left(1) == 3600
        gateway.guard.refuses = set()
        await agent.look()
        assert (gateway.left(1), agent.drift()) == (7200, {})

    gateway.run(scenario, required=False)


# The lease, and suspend.


def test_the_lease_is_renewed_once_a_second(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(gateway.guard.calls("lease"))
        for _ in range(30):
            gateway.world.clock.advance(0.1)
            await agent.tick()
        assert gateway.guard.calls("lease")[mark:] in ([30.0] * 2, [30.0] * 3)

    gateway.run(scenario, lease=30.0)


def test_without_a_lease_none_is_asked_for(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.world.clock.advance(2)
        await agent.tick()
        assert set(gateway.guard.calls("lease")) <= {None}
        assert not gateway.guard.lease_demanded
        await agent.look()
        assert agent.drift() == {}

    gateway.run(scenario, lease=0.0)


def test_after_a_suspend_all_elements_are_written_anew(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2, lasts=7200), peer(3, mfa_exempt=True)]))
        gateway.suspend(1000)
        assert gateway.left(1) == 3600
        gateway.world.clock.advance(1)
        await agent.tick()
        assert (gateway.left(1), gateway.left(2)) == (2599, 6199)
        mark = gateway.mark()
        gateway.world.clock.advance(1)
        await agent.tick()
        assert gateway.since(mark) == []

    gateway.run(scenario)


# Drift.


def test_drift_is_repaired_and_reported(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3, mfa_exempt=True)]))
        guard = gateway.guard
        guard.ends[prefix("10.8.0.1")] = gateway.monotonic() + 9999
        del guard.ends[prefix("10.8.0.3")]
        guard.ends[prefix("10.8.0.66")] = None
        agent.reconciler.guard_disturbed()
        await agent.tick()
        assert agent.drift() == {"guard": 3}
        assert guard.ends.keys() == set(prefixes("10.8.0.1", "10.8.0.2", "10.8.0.3"))
        assert (gateway.left(1), gateway.left(3)) == (3600, None)
        await agent.look()
        assert agent.drift() == {"guard": 3}

    gateway.run(scenario)


def test_a_table_that_is_gone_is_rebuilt(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        gateway.guard.delete()
        await agent.look()
        assert agent.drift() == {"guard": 1}
        assert (gateway.left(1), gateway.guard.lease_until) == (3600, gateway.monotonic() + 300)

    gateway.run(scenario)


def test_a_table_that_is_missed_on_the_way_is_counted_too(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        gateway.guard.delete()
        gateway.world.clock.advance(1)
        await agent.tick()
        await agent.tick()
        assert gateway.left(1) == 3599
        gateway.guard.delete()
        await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert (gateway.left(1), gateway.left(2)) == (3599, 3599)
        assert refusals(agent) == {}
        assert agent.drift() == {"guard": 2}

    gateway.run(scenario)


def test_what_is_still_to_follow_is_no_drift(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3), live(4, lasts=5)]))
        mark = gateway.mark()
        changes = [
            core.change(revoked(1, "s1")),
            core.change(granted(2, grant("s2", 2, lasts=7200))),
            core.change(granted(3, grant("s3", 3))),
        ]
        given = agent.inbox.submit(changes, 0.0)
        gateway.world.clock.advance(5)
        gateway.guard.ends[prefix("10.8.0.4")] = gateway.monotonic() + 0.1
        agent.reconciler.guard_disturbed()
        await agent.tick()
        await given
        assert agent.drift() == {}
        words = gateway.since(mark)
        assert words.index("RemovePeer 1") < words.index("dismiss 10.8.0.1/32 10.8.0.4/32")
        assert (gateway.left(1), gateway.left(2), gateway.left(3), gateway.left(4)) == (0, 7195, 3595, 0)

    gateway.run(scenario)


def test_what_ended_while_the_table_could_not_be_written_is_dismissed_afterwards(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        gateway.guard.fails = {"lease", "raise", "dismiss", "admit"}
        gateway.world.clock.advance(1)
        await agent.tick()
        await agent.give([core.change(revoked(1, "s1"))])
        gateway.guard.fails = ()
        await agent.look()
        await agent.look()
        assert gateway.guard.ends.keys() == set(prefixes("10.8.0.2"))
        assert agent.drift() == {}

    gateway.run(scenario)


# Restart.


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
    # The journal lost the list of peer 1, not its session.
    with sqlite3.connect(gateway.world.folder / "journal.sqlite") as journal:
        journal.execute("DELETE FROM peers WHERE public_key = ?", (key(1),))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(1)
        await agent.tick()
        await agent.look()
        assert gateway.world.on_interface() == {key(1): psk(1), key(2): None}
        assert (gateway.left(1), gateway.left(2)) == (3599, None)
        assert agent.drift() == {}

    gateway.run(second)


def test_a_table_of_an_earlier_life_has_its_lease_renewed_though_the_journal_is_lost(
    gateway: Gateway,
) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(100)
        await agent.tick()
        assert gateway.guard.lease_until == gateway.monotonic() + 300
        assert gateway.left(1) == 3500

    gateway.run(first)
    for file in gateway.world.folder.iterdir():
        file.unlink()
    gateway.run(second)


def lose_journal(gateway: Gateway) -> None:
    for file in gateway.world.folder.glob("journal*"):
        file.unlink()


def test_without_a_journal_a_peer_is_removed_when_its_element_ends(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), live(2, lasts=600), peer(3, mfa_exempt=True)]))

    async def second(agent: Agent, core: Core) -> None:
        on_interface = gateway.world.on_interface
        assert agent.state.location is None
        assert on_interface().keys() == {key(1), key(2), key(3)}
        gateway.world.clock.advance(30)
        await agent.tick()
        assert on_interface().keys() == {key(1), key(2), key(3)}
        assert agent.reconciler.next_wait() == pytest.approx(10, abs=0.1)
        gateway.world.clock.advance(10.1)
        await agent.tick()
        assert on_interface().keys() == {key(2), key(3)}
        assert agent.ends() == {}
        core.revision = 5
        mark = gateway.mark()
        await agent.give(core.state([live(2, lasts=600), peer(3, mfa_exempt=True)]))
        assert gateway.since(mark) == ["raise 2 3", "up"]
        assert on_interface().keys() == {key(2), key(3)}

    gateway.run(first, kill=True)
    lose_journal(gateway)
    gateway.world.clock.advance(20)
    gateway.run(second)


def test_without_a_journal_a_peer_whose_element_has_ended_is_removed_at_once(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), live(2, lasts=600)]))

    async def second(agent: Agent, core: Core) -> None:
        assert gateway.world.on_interface().keys() == {key(2)}

    gateway.run(first, kill=True)
    lose_journal(gateway)
    gateway.world.clock.advance(61)
    gateway.run(second)


def test_without_a_journal_a_wall_clock_that_is_set_back_lengthens_nothing(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.step(-3600)
        gateway.world.clock.advance(60.1)
        await agent.tick()
        assert gateway.world.on_interface() == {}

    gateway.run(first, kill=True)
    lose_journal(gateway)
    gateway.run(second)


def test_without_journal_or_table_nobody_is_touched_before_the_first_state(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60)]))

    async def second(agent: Agent, core: Core) -> None:
        gateway.world.clock.advance(90)
        await agent.tick()
        assert gateway.world.on_interface().keys() == {key(1)}

    gateway.run(first, kill=True)
    lose_journal(gateway)
    gateway.guard.delete()
    gateway.run(second)


def test_core_lost_for_too_long_ends_sessions_that_only_the_table_knows(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))

    async def second(agent: Agent, core: Core) -> None:
        agent.inbox.core_lost_grace = 30
        gateway.world.clock.advance(31)
        await agent.tick()
        assert gateway.world.on_interface().keys() == {key(2)}

    gateway.run(first, kill=True)
    lose_journal(gateway)
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


def test_an_element_that_outlives_its_session_covers_nobody(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.fails = {"admit", "raise", "lease"}
        outcome = await agent.give([core.change(granted(1, grant("s1", 1, lasts=60)))])
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"]
        assert gateway.world.on_interface() == {}

    gateway.run(scenario)


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


# A device that does not follow.


def test_a_peer_that_the_device_will_not_remove_loses_its_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        gateway.world.host.refuses = {key(1): frozenset({RemovePeer})}
        await agent.give([core.change(revoked(1, "s1"))])
        assert key(1) in gateway.world.on_interface()
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)

    gateway.run(scenario)


def test_the_table_stays_while_the_device_holds_a_peer_that_should_be_gone(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        gateway.world.host.refuses = {key(1): frozenset({RemovePeer})}
        await agent.give(core.state([peer(2, mfa_exempt=True)], mfa_required=False))
        assert gateway.guard.up
        gateway.world.host.refuses = {}
        await agent.tick()
        assert not gateway.guard.up

    gateway.run(scenario)


def test_a_peer_that_the_device_will_not_take_has_no_element(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.world.host.refuses = {key(1): frozenset({AddPeer})}
        await agent.give(core.state([live(1), live(2)]))
        assert (gateway.left(1), gateway.left(2)) == (0, 3600)

    gateway.run(scenario)


def test_a_guard_the_state_does_not_need_is_never_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1), live(2)], mfa_required=False))
        await agent.look()
        assert gateway.guard.calls("raise") == []
        assert gateway.guard.calls("lease") == []
        assert gateway.world.on_interface().keys() == {key(1), key(2)}

    gateway.run(scenario)


def test_the_lease_goes_on_while_the_device_does_not_follow(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        gateway.world.host.fails = gateway.world.host.reads_fail = 1000
        with pytest.raises(DeviceError):
            await agent.give([core.change(revoked(1, "s1"))])
        mark = len(gateway.guard.calls("lease"))
        for _ in range(4):
            gateway.world.clock.advance(1)
            await agent.tick()
        assert len(gateway.guard.calls("lease")) - mark in {3, 4}
        assert (gateway.left(1), gateway.left(2)) == (0, 3596)
        gateway.world.host.fails = gateway.world.host.reads_fail = 0

    gateway.run(scenario)


def test_a_table_that_takes_long_to_make_is_not_taken_for_a_suspend(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gateway.guard.raise_

    async def slowly(admissions: Mapping[PublicKey, Admission], lease: float | None, *there: Any) -> Any:
        gateway.world.clock.advance(3)
        return await make(admissions, lease, *there)

    async def scenario(agent: Agent, core: Core) -> None:
        monkeypatch.setattr(gateway.guard, "raise_", slowly)
        await agent.give(core.state([live(1)]))
        mark = len(gateway.guard.calls("admit"))
        gateway.world.clock.advance(1)
        await agent.tick()
        assert gateway.guard.calls("admit")[mark:] == []

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


# Looks.


def reads(gateway: Gateway) -> int:
    return len(gateway.guard.calls("read"))


def test_a_look_does_not_read_a_table_that_nobody_has_touched(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3)]))
        await agent.look()
        before = reads(gateway)
        await agent.give([core.change(granted(3, grant("s3", 3))), core.change(revoked(2, "s2"))])
        await agent.look()
        assert reads(gateway) == before
        gateway.guard.ends[prefix("10.8.0.9")] = None
        await agent.look()
        assert (reads(gateway), gateway.left(9)) == (before + 1, 0)
        await agent.look()
        assert reads(gateway) == before + 1

    gateway.run(scenario)


def test_now_and_then_a_look_reads_the_table_anyhow(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        before = reads(gateway)
        gateway.world.clock.advance(599)
        await agent.tick()
        await agent.look()
        assert reads(gateway) == before
        gateway.world.clock.advance(2)
        await agent.look()
        assert reads(gateway) == before + 1

    gateway.run(scenario)


def test_a_look_at_another_link_of_this_name_reads_the_table(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        before = reads(gateway)
        gateway.world.host.public_key = None
        await agent.look()
        assert reads(gateway) == before + 1
        gateway.world.host.up = False
        await agent.look()
        assert reads(gateway) == before + 2

    gateway.run(scenario)


def test_after_a_change_that_failed_a_look_reads_the_table(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await agent.look()
        before = reads(gateway)
        gateway.guard.fails = {"dismiss"}
        await agent.give([core.change(revoked(1, "s1"))])
        gateway.guard.fails = ()
        assert gateway.left(1) != 0
        await agent.look()
        assert (reads(gateway), gateway.left(1)) == (before + 1, 0)

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


def test_what_somebody_did_to_a_peer_that_is_being_dealt_with_is_mended_at_the_next_look(
    gateway: Gateway,
) -> None:
    """Its endpoint has just appeared, so it is planned again, which changes nothing about its element."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        await agent.look()
        del gateway.guard.ends[prefix("10.8.0.1")]
        gateway.world.host.kernel.handshake(key(1), psk(1), "s1", gateway.world.clock.now)
        await agent.look()
        await agent.look()
        assert gateway.left(1) == pytest.approx(3600, abs=1)

    gateway.run(scenario)


@pytest.mark.parametrize("step", [3000.0, -3000.0])
def test_after_a_step_of_the_clock_elements_last_as_long_as_their_sessions(
    gateway: Gateway, step: float
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        gateway.world.clock.step(step)
        gateway.world.clock.advance(1)
        await agent.tick()
        left = agent.state.sessions[key(1)].deadline.remaining(gateway.world.clock.now)
        assert gateway.left(1) == pytest.approx(left, abs=0.1)

    gateway.run(scenario)


def test_a_peer_refused_for_a_session_that_is_nearly_over_has_left_something_in_the_table(
    gateway: Gateway,
) -> None:
    """It is barred, which must be taken back before it is let through for good."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2, lasts=0.005)]))
        assert prefix("10.8.0.2") in gateway.guard.barred
        await agent.give([core.change(upserted(2, "10.8.0.2", mfa_exempt=True))])
        assert (gateway.left(2), prefix("10.8.0.2") in gateway.guard.barred) == (None, False)

    gateway.run(scenario, required=False)


def test_a_link_that_somebody_else_made_again_has_no_guard_until_it_is_raised(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        await agent.look()
        gateway.world.host.reads_fail, gateway.world.host.error = 1, errno.ENODEV
        raised = len(gateway.guard.calls("raise"))
        await agent.look()
        assert len(gateway.guard.calls("raise")) == raised + 1

    gateway.run(scenario)
