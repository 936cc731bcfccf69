"""The agent's lease, and what time does to elements: suspends, steps of the clock, slow calls (rule 13)."""

from collections.abc import Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.errors import DeviceError
from agent.guard import Admission
from agent.model import PublicKey
from tests.reconciler.harness import Agent, Core, live, revoked
from tests.support.builders import key, peer
from tests.warden.harness import Gateway


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


def test_a_lease_of_an_earlier_life_that_cannot_be_renewed_is_told_of_once(gateway: Gateway) -> None:
    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def second(agent: Agent, core: Core) -> None:
        told: list[int] = []
        for fails in ({"lease"}, {"lease"}, (), {"lease"}):
            gateway.guard.fails = fails
            gateway.world.clock.advance(1)
            with capture_logs() as logged:
                await agent.tick()
            told.append(sum(entry["event"] == "the lease can't be renewed" for entry in logged))
        assert told == [1, 0, 0, 1]

    gateway.run(first, kill=True)
    gateway.lose_journal()
    gateway.run(second)
