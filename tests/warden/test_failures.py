"""What becomes of peers and table where the guard fails, or refuses somebody."""

from agent.model import Refusal
from tests.reconciler.harness import Agent, Core, granted, live, upserted
from tests.support.builders import grant, key, location_changed, peer, psk
from tests.warden.harness import Gateway, fault, prefix, refusals


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


def test_without_the_guard_required_peers_with_sessions_are_refused_and_others_are_not(
    gateway: Gateway,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        gateway.guard.fails = {"raise"}
        outcome = await agent.give(core.state([live(1), peer(2), peer(3, mfa_exempt=True)]))
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"]
        assert refusals(agent) == {key(1): Refusal.NOT_GUARDED}
        assert gateway.world.on_interface() == {key(3): None}
        told = (await agent.desk.status())["guard_error"]
        assert "nftables fails" in told
        assert "mend it" in told
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


def test_an_element_that_outlives_its_session_covers_nobody(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        gateway.guard.fails = {"admit", "raise", "lease"}
        outcome = await agent.give([core.change(granted(1, grant("s1", 1, lasts=60)))])
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"]
        assert gateway.world.on_interface() == {}

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


def test_a_look_that_the_guard_fails_has_the_table_raised_again(gateway: Gateway) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        gateway.guard.ends[prefix("10.8.0.9")] = None
        gateway.guard.fails = {"read"}
        mark = gateway.mark()
        await agent.look()
        assert gateway.since(mark) == ["raise 1 2"]
        gateway.guard.fails = ()
        await agent.look()
        assert gateway.left(9) == 0

    gateway.run(scenario)
