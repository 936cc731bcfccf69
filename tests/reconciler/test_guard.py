"""The kernel's own guard beside the device: in which order, for whom, and what if it can't be had."""

import contextlib
import sqlite3

import pytest

from agent.encoding import parse_prefix
from agent.errors import DeviceError
from agent.model import (
    InterfaceSettings,
    Location,
    LocationChanged,
    PeerUpserted,
    Prefix,
    SessionPolicy,
)
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, with_agent
from tests.support.builders import grant, key, peer, psk
from tests.support.recording_guard import RecordingGuard


def address(number: int) -> Prefix:
    return parse_prefix(f"10.8.0.{number}/32")


def order(world: World, mark: int) -> list[str]:
    """What was done since, on guard and device; reads and lease apart."""
    done = []
    for kind, what in world.host.log[mark:]:
        if kind in {"guard raise", "guard lower", "guard admit", "guard dismiss", "up"}:
            done.append(kind)
        elif kind == "operation":
            done.append(type(what).__name__)
    return done


def held(guard: RecordingGuard) -> dict[str, int | None] | None:
    """The table: each prefix with its whole seconds, None for good; None without a table."""
    if guard.table is None:
        return None
    return {str(p): None if seconds is None else round(seconds) for p, seconds in guard.table.items()}


def switch(agent: Agent, *, mfa_required: bool) -> LocationChanged:
    assert agent.state.location is not None
    location = Location(agent.state.location.id, "hq", mfa_required)
    return LocationChanged(location, InterfaceSettings(), SessionPolicy())


def test_on_a_grant_the_element_comes_first_and_on_an_end_the_peer(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)]))
        mark = len(world.host.log)
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=60)))])
        assert held(guard) == {"10.8.0.1/32": 60}
        await agent.give([core.change(revoked(1, "s1"))])
        assert held(guard) == {}
        assert order(world, mark) == ["guard admit", "AddPeer", "RemovePeer", "guard dismiss"]

    with_agent(world, scenario)


def test_the_table_comes_before_the_peers_and_they_before_the_link_is_up(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(world.host.log)
        world.host.delete()
        await agent.look()
        assert order(world, mark) == ["guard raise", "guard admit", "AddPeer", "up"]

    with_agent(world, scenario)


def test_a_renewal_moves_the_element_later_and_earlier(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60)]))
        for lasts in (600.0, 30.0):
            await agent.give([core.change(granted(1, grant("s1", 1, lasts=lasts)))])
            assert held(guard) == {"10.8.0.1/32": lasts}
        await agent.give([core.change(switch(agent, mfa_required=True))])
        lowered = LocationChanged(
            Location("7", "hq", True), InterfaceSettings(), SessionPolicy(max_lifetime=10.0)
        )
        assert agent.state.location is not None
        lowered = LocationChanged(agent.state.location, InterfaceSettings(), lowered.session_policy)
        await agent.give([core.change(lowered)])
        assert held(guard) == {"10.8.0.1/32": 10}

    with_agent(world, scenario)


def test_a_peer_that_needs_no_session_is_let_through_for_good(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), peer(2, mfa_exempt=True), peer(3)]))
        assert held(guard) == {"10.8.0.1/32": 60, "10.8.0.2/32": None}
        await agent.give([core.change(PeerUpserted(peer(2)))])
        assert held(guard) == {"10.8.0.1/32": 60}

    with_agent(world, scenario)


def test_mfa_on_raises_the_table_first_and_off_lowers_it_last(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1)], mfa_required=False))
        assert held(guard) is None
        mark = len(world.host.log)
        await agent.give([core.change(switch(agent, mfa_required=True))])
        assert order(world, mark) == ["guard raise", "RemovePeer"]
        mark = len(world.host.log)
        await agent.give([core.change(switch(agent, mfa_required=False))])
        assert order(world, mark) == ["AddPeer", "guard lower"]
        assert held(guard) is None

    with_agent(world, scenario)


def test_with_mfa_off_a_running_session_keeps_the_table_until_it_ends(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), peer(2)]))
        await agent.give([core.change(switch(agent, mfa_required=False))])
        assert held(guard) == {"10.8.0.1/32": 60, "10.8.0.2/32": None}
        world.clock.advance(60)
        await agent.tick()
        assert held(guard) is None
        assert world.on_interface() == {key(1): None, key(2): None}

    with_agent(world, scenario)


def test_a_prefix_that_moves_is_dismissed_before_its_new_owner_has_it(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), live(2, lasts=90)]))
        moved = [
            core.change(PeerUpserted(peer(1, "10.8.0.9/32", session=grant("s1", 1, lasts=60)))),
            core.change(PeerUpserted(peer(2, "10.8.0.1/32", session=grant("s2", 2, lasts=90)))),
        ]
        await agent.give(moved)
        assert held(guard) == {"10.8.0.9/32": 60, "10.8.0.1/32": 90}

    with_agent(world, scenario)


def test_where_it_is_required_and_not_to_be_had_only_sessions_are_refused(
    world: World, guard: RecordingGuard
) -> None:
    guard.fails = True

    async def scenario(agent: Agent, core: Core) -> None:
        outcome = await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"]
        assert world.on_interface() == {key(2): None}
        assert "install it" in (await agent.desk.status())["guard_error"]
        guard.fails = False
        await agent.look()
        assert world.on_interface() == {key(1): psk(1), key(2): None}
        assert (await agent.desk.status())["guard_error"] == ""

    with_agent(world, scenario)


def test_where_it_is_not_required_the_agent_goes_without_it(world: World, guard: RecordingGuard) -> None:
    guard.fails, world.guard_required = True, False

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_a_guard_that_fails_later_takes_nobody_down_who_has_an_element(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=60), peer(2)]))
        guard.fails = True
        await agent.give([core.change(granted(1, grant("s1", 1, lasts=600)))])
        outcome = await agent.give([core.change(granted(2, grant("s2", 2)))])
        assert [refused.reason for refused in outcome.refused] == ["not_guarded"]
        assert world.on_interface() == {key(1): psk(1)}

    with_agent(world, scenario)


def test_one_peer_that_the_guard_refuses_holds_nobody_back(world: World, guard: RecordingGuard) -> None:
    guard.refuses = frozenset({key(1)})

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        assert world.on_interface() == {key(2): psk(2)}

    with_agent(world, scenario)


def test_drift_of_the_table_is_counted_and_repaired(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=600)]))
        guard.table = {address(1): 6000.0, address(66): None}
        await agent.look()
        assert held(guard) == {"10.8.0.1/32": 600}
        guard.table = None
        await agent.look()
        assert held(guard) == {"10.8.0.1/32": 600}
        assert agent.metric("wg_agent_drift_total", kind="guard") == 3

    with_agent(world, scenario)


def test_a_restart_takes_the_table_over_and_ends_what_expired(world: World, guard: RecordingGuard) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=30), live(2, lasts=600)]))
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {key(2): psk(2)}
        assert held(guard) == {"10.8.0.2/32": 560}

    with_agent(world, scenario)
    world.clock.advance(40)
    assert guard.table is not None
    del guard.table[address(1)]  # as the kernel does it, at its time
    with_agent(world, after)


def test_who_can_not_be_taken_off_the_interface_is_let_through_no_longer(
    world: World, guard: RecordingGuard
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=600), live(2, lasts=600)]))
        world.host.fails = world.host.reads_fail = 1000
        with pytest.raises(DeviceError):
            await agent.give([core.change(revoked(1, "s1"))])
        assert key(1) in world.on_interface()
        assert held(guard) == {"10.8.0.2/32": 600}
        world.host.fails = world.host.reads_fail = 0
        await agent.tick()
        assert world.on_interface() == {key(2): psk(2)}
        assert held(guard) == {"10.8.0.2/32": 600}

    with_agent(world, scenario)


def test_a_peer_that_core_has_not_listed_yet_is_left_as_found_also_where_the_guard_fails(
    world: World, guard: RecordingGuard
) -> None:
    """As after a SIGKILL between the journal's word on a session and that on its peer."""

    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1, lasts=600)]))
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        await agent.tick()
        assert world.on_interface() == {key(1): psk(1)}
        assert "not to be had" in (await agent.desk.status())["guard_error"]

    with_agent(world, scenario)
    with contextlib.closing(sqlite3.connect(world.folder / "journal.sqlite")) as journal, journal:
        journal.execute("DELETE FROM peers")
    guard.fails = True
    with_agent(world, after)
