"""What somebody else did to the table is repaired and told of (rule 19)."""

import pytest

from tests.reconciler.harness import Agent, Core, granted, live, revoked
from tests.support.builders import grant, key, peer, prefixes, psk
from tests.warden.harness import Gateway, prefix, refusals


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
