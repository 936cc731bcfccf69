"""A device that fails: tried again, read afresh, then peer by peer (rule 16)."""

import errno

import pytest

from agent.errors import DeviceError
from agent.keeper import ROUNDS
from agent.model import (
    AddPeer,
    InterfaceSettings,
    Location,
    LocationChanged,
    RemovePeer,
    SessionPolicy,
    UpdatePeer,
)
from agent.ports import Verdict
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import grant, key, peer, psk

pytestmark = pytest.mark.reliability(
    "the kernel refuses or fails operations, the interface vanishes between two calls (injected)",
    "one peer holds back no other; who has to go is tried again until gone",
)


@pytest.mark.parametrize("done_before", [0, 1, 2])
def test_a_batch_that_fails_in_the_middle_is_finished_after_another_look(
    world: World, done_before: int
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.fails, world.host.before_failing = 1, done_before
        outcome = await agent.give(core.state([live(1), live(2), live(3)]))
        assert outcome.refused == ()
        assert world.on_interface() == {key(n): psk(n) for n in (1, 2, 3)}
        assert agent.drift() == {}
        # What was added before the failure is not added again.
        assert len(world.host.operations()) == 3

    with_agent(world, scenario)


def test_one_bad_peer_does_not_hold_back_others(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.refuses[key(2)] = frozenset({AddPeer})
        outcome = await agent.give(core.state([live(1), live(2), live(3)]))
        assert outcome.verdict is Verdict.APPLIED
        assert [r.reason for r in outcome.refused] == ["device_refused"]
        assert world.on_interface() == {key(1): psk(1), key(3): psk(3)}

    with_agent(world, scenario)


def test_a_refused_peer_gets_another_chance_at_the_next_look(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.refuses[key(2)] = frozenset({AddPeer})
        await agent.give(core.state([live(1), live(2)]))
        await agent.tick()
        batches = len([1 for kind, _ in world.host.log if kind == "batch"])
        await agent.tick()
        assert len([1 for kind, _ in world.host.log if kind == "batch"]) == batches
        world.host.refuses.clear()
        await agent.acknowledge()
        await agent.look()
        assert world.on_interface() == {key(1): psk(1), key(2): psk(2)}
        assert (await agent.acknowledge()).refused == ()

    with_agent(world, scenario)


def test_a_peer_whose_update_is_refused_does_not_stay_with_its_old_psk(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        world.host.refuses[key(1)] = frozenset({UpdatePeer})
        outcome = await agent.give([core.change(granted(1, grant("s1", 11)))])
        assert [r.reason for r in outcome.refused] == ["device_refused"]
        assert world.on_interface() == {key(2): psk(2)}
        await agent.look()
        assert world.on_interface() == {key(1): psk(11), key(2): psk(2)}

    with_agent(world, scenario)


def test_a_peer_that_could_not_be_removed_is_not_added_over_its_old_keys(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        stay = world.host.kernel.peers[key(1)].incarnation
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        changes = [core.change(revoked(1, "s1")), core.change(granted(1, grant("s2", 2)))]
        outcome = await agent.give(changes)
        assert [r.reason for r in outcome.refused] == ["device_refused"]
        assert world.host.kernel.peers[key(1)].preshared_key == psk(1)
        world.host.refuses.clear()
        await agent.look()
        assert world.on_interface() == {key(1): psk(2)}
        assert world.host.kernel.peers[key(1)].incarnation != stay

    with_agent(world, scenario)


@pytest.mark.parametrize("listed", [True, False])
def test_a_removal_that_fails_is_tried_at_every_tick_and_no_end_until_then(
    world: World, *, listed: bool
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), live(2, lasts=30), live(3)]))
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        if listed:
            world.clock.advance(30)
            await agent.tick()
            assert agent.ends() == {"s2": "expired"}
        else:
            await agent.give(core.state([live(3)]))
            assert agent.ends() == {"s2": "peer_removed"}
        assert set(world.on_interface()) == {key(1), key(3)}
        world.clock.advance(5)
        await agent.tick()
        assert agent.reconciler.expiry_late is listed
        world.host.refuses.clear()
        await agent.tick()
        assert set(world.on_interface()) == {key(3)}
        assert set(agent.ends()) == {"s1", "s2"}
        assert agent.reconciler.expiry_late is False
        await agent.give([core.change(granted(3, grant("s3", 33)))])
        assert world.on_interface() == {key(3): psk(33)}

    with_agent(world, scenario)


def test_a_removal_that_fails_holds_nobody_else_back(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2)]))
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        await agent.give([core.change(revoked(1, "s1"))])
        mark = len([1 for kind, _ in world.host.log if kind == "read"])
        outcome = await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert outcome.verdict is Verdict.APPLIED
        assert world.on_interface()[key(2)] == psk(2)
        # No look at the whole interface for it, each time.
        assert len([1 for kind, _ in world.host.log if kind == "read"]) == mark

    with_agent(world, scenario)


def test_a_device_that_fails_for_good_fails_the_delivery_and_is_tried_at_each_tick(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        await agent.acknowledge()
        world.host.reads_fail = world.host.fails = 1_000_000
        with pytest.raises(DeviceError):
            await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert agent.applied() is None
        assert (await agent.desk.status())["device_error"]
        world.host.reads_fail = world.host.fails = 0
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}
        assert (await agent.desk.status())["device_error"] == ""
        assert (await agent.acknowledge()).revision == 2

    with_agent(world, scenario)


def test_the_first_state_counts_as_pulled_also_if_the_kernel_took_it_late(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.reads_fail = world.host.fails = 1_000_000
        with pytest.raises(DeviceError):
            await agent.give(core.state([live(1)]))
        assert not agent.inbox.settled.is_set()
        world.host.reads_fail = world.host.fails = 0
        await agent.tick()
        assert agent.inbox.settled.is_set()
        assert agent.metric("wg_agent_applied_revision") == 1

    with_agent(world, scenario)


def test_a_failed_look_does_not_swallow_what_was_delivered_with_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        world.host.reads_fail = 1
        agent.reconciler.observe()
        outcome = await agent.give([core.change(granted(1, grant("s1", 1)))])
        assert outcome.verdict is Verdict.APPLIED
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_a_failed_look_does_not_delay_a_deadline(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30)]))
        world.host.reads_fail = 1
        world.clock.advance(30)
        await agent.look()
        assert world.on_interface() == {}

    with_agent(world, scenario)


def test_what_a_failed_batch_left_behind_is_no_drift(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([]))
        world.host.fails, world.host.before_failing = 1_000_000, 1
        world.host.reads_fail = 1
        with pytest.raises(DeviceError):
            await agent.give(core.state([live(1), live(2)]))
        world.host.fails = 0
        await agent.look()
        assert world.on_interface() == {key(1): psk(1), key(2): psk(2)}
        assert agent.drift() == {}

    with_agent(world, scenario)


def test_bounded_rounds_before_it_goes_peer_by_peer(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        world.host.refuses[key(1)] = frozenset({AddPeer})
        mark = len(world.host.log)
        await agent.give(core.state([live(n) for n in range(1, 6)]))
        sizes = [what for kind, what in world.host.log[mark:] if kind == "batch"]
        # The others are on after the first rounds, for the bad one does not come first each time.
        assert len([size for size in sizes if isinstance(size, int) and size > 1]) <= ROUNDS
        assert len(sizes) <= ROUNDS + 5
        assert set(world.on_interface()) == {key(n) for n in range(2, 6)}

    with_agent(world, scenario)


def test_an_interface_that_vanishes_is_made_again_with_everybody_on_it(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        world.host.delete()
        await agent.give([core.change(granted(1, grant("s1", 11)))])
        assert world.on_interface() == {key(1): psk(11), key(2): None}
        assert world.host.up
        assert world.host.listen_port == 51820
        assert agent.drift() == {"interface": 1}

    with_agent(world, scenario)


def test_a_look_notices_a_vanished_interface(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2, lasts=30)]))
        world.host.delete()
        world.clock.advance(30)
        await agent.look()
        assert world.on_interface() == {key(1): psk(1)}
        assert world.host.up

    with_agent(world, scenario)


def test_an_interface_that_cannot_be_made_is_tried_at_each_tick_and_counted_once(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.host.delete()
        world.host.cannot_be_made = True
        for _ in range(3):
            await agent.look()
        with pytest.raises(DeviceError) as caught:
            await agent.give([core.change(granted(1, grant("s1", 11)))])
        assert caught.value.errno == errno.EPERM
        world.host.cannot_be_made = False
        await agent.tick()
        assert world.on_interface() == {key(1): psk(11)}
        assert agent.drift() == {"interface": 1}

    with_agent(world, scenario)


def test_an_interface_that_somebody_made_anew_is_set_up_and_brought_up(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.host.delete()
        world.host.exists = True
        await agent.look()
        assert world.on_interface() == {key(1): psk(1)}
        assert world.host.up
        assert world.host.listen_port == 51820

    with_agent(world, scenario)


def test_a_start_without_an_interface_to_be_had_fails(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        raise AssertionError(f"{agent} {core}")

    world.host.cannot_be_made = True
    with pytest.raises(DeviceError):
        with_agent(world, scenario)


def test_settings_that_the_link_can_not_have_keep_nobody_on_it(world: World) -> None:
    world.host.taken_ports = frozenset({53})

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), live(2)]))
        settings = InterfaceSettings(listen_port=53)
        location = agent.state.location or Location("", "", mfa_required=False)
        await agent.give([core.change(LocationChanged(location, settings, SessionPolicy()))])
        await agent.give([core.change(revoked(2, "s2"))])
        assert world.on_interface() == {key(1): psk(1)}
        world.clock.advance(30)
        await agent.tick()
        assert world.on_interface() == {}
        assert "the port is taken" in (await agent.desk.status())["device_error"]
        world.host.taken_ports = frozenset()
        await agent.tick()
        assert world.host.listen_port == 53
        assert (await agent.desk.status())["device_error"] == ""

    async def again(agent: Agent, core: Core) -> None:
        assert agent.state.sessions == {}

    with_agent(world, scenario)
    world.host.taken_ports = frozenset({53})
    with_agent(world, again)


def test_an_interface_that_can_not_be_read_shows_in_the_status_until_it_can(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.host.reads_fail = 1
        await agent.look()
        await agent.tick()
        assert "can't be read" in (await agent.desk.status())["device_error"]
        await agent.look()
        assert (await agent.desk.status())["device_error"] == ""

    with_agent(world, scenario)


def test_the_operator_is_told_when_a_peer_whose_session_he_ended_could_not_be_removed(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        world.host.refuses[key(1)] = frozenset({RemovePeer})
        with pytest.raises(DeviceError, match="did not remove 1 of 2 peers"):
            await agent.end(1, 2)
        assert world.on_interface() == {key(1): psk(1)}
        world.host.refuses.clear()
        await agent.tick()
        assert world.on_interface() == {}
        assert agent.ends() == {"s1": "operator", "s2": "operator"}

    with_agent(world, scenario)
