"""A restart touches nobody (rule 14), counters only grow (rule 21), the switch of MFA (rule 19)."""

import pytest

from agent.model import AddPeer, PeerUpserted, RemovePeer
from tests.reconciler.harness import Agent, Core, World, granted, live, revoked, upserted, with_agent
from tests.support.builders import grant, key, location_changed, peer, prefixes, psk
from tests.support.kernel_model import KernelPeer

pytestmark = pytest.mark.reliability(
    "restart, reboot with core down (injected clock and boot id)",
    "live sessions are taken over untouched, the dead stay dead, counters only grow",
)


def stays(world: World) -> dict[bytes, int]:
    return {k: p.incarnation for k, p in world.host.kernel.peers.items()}


async def nothing(agent: Agent, core: Core) -> None:
    del agent, core


def test_a_restart_sends_nothing_for_live_sessions(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), peer(3, mfa_exempt=True, preshared_key=psk(33))]))
        world.host.kernel.handshake(key(1), psk(1), "client", world.clock())
        await agent.look()

    async def after(agent: Agent, core: Core) -> None:
        core.revision = 1
        assert len(world.host.operations()) == operations
        await agent.give(core.same([live(1), live(2), peer(3, mfa_exempt=True, preshared_key=psk(33))]))
        await agent.look()
        assert len(world.host.operations()) == operations
        assert agent.drift() == {}

    with_agent(world, scenario)
    operations = len(world.host.operations())
    with_agent(world, after)


def test_a_peer_of_another_psk_or_none_of_ours_is_not_adopted(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2), live(3), peer(4)]))

    with_agent(world, scenario)
    kernel = world.host.kernel
    kernel.peers[key(1)].preshared_key = psk(666)
    kernel.peers[key(2)].allowed_ips.clear()
    kernel.peers[key(4)] = KernelPeer(98, None, set(prefixes("10.8.0.4")))
    kernel.peers[key(77)] = KernelPeer(99, None, set(prefixes("10.8.0.77")))
    before = kernel.peers[key(3)].incarnation
    with_agent(world, nothing)
    assert set(kernel.peers) == {key(3)}
    assert kernel.peers[key(3)].incarnation == before


def test_a_session_with_a_lost_peer_is_added_again_once_core_names_its_psk(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def after(agent: Agent, core: Core) -> None:
        assert world.on_interface() == {}
        await agent.give(core.state([live(1)]))
        assert world.on_interface() == {key(1): psk(1)}
        assert agent.ends() == {}

    with_agent(world, scenario)
    world.reboot()
    with_agent(world, after)


def test_a_peer_that_needs_no_session_is_left_as_found_until_the_first_state(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([peer(1, mfa_exempt=True, preshared_key=psk(1))]))

    async def after(agent: Agent, core: Core) -> None:
        await agent.look()
        assert world.host.kernel.peers[key(1)].preshared_key == psk(555)
        await agent.give(core.state([peer(1, mfa_exempt=True, preshared_key=psk(1))]))
        assert world.host.kernel.peers[key(1)].preshared_key == psk(1)

    with_agent(world, scenario)
    world.host.kernel.peers[key(1)].preshared_key = psk(555)
    with_agent(world, after)


def test_after_a_reboot_peers_without_a_psk_are_back_before_core_and_before_the_link_is_up(
    world: World,
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(
            core.state([peer(1, mfa_exempt=True), peer(2, mfa_exempt=True, preshared_key=psk(2)), live(3)])
        )

    with_agent(world, scenario)
    world.reboot()
    mark = len(world.host.log)
    with_agent(world, nothing)
    assert world.on_interface() == {key(1): None}
    kinds = [kind for kind, _ in world.host.log[mark:] if kind in {"configure", "operation", "up"}]
    assert kinds == ["configure", "operation", "up"]


def test_a_session_that_the_operator_ended_stays_dead_whatever_core_says(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        answer = await agent.end(1, 9)
        assert len(answer["ended"]) == 1
        assert set(world.on_interface()) == {key(2)}
        agent.kill()

    async def after(agent: Agent, core: Core) -> None:
        outcome = await agent.give(core.same([live(1), live(2)], revision=1))
        assert [r.reason for r in outcome.refused] == ["session_ended"]
        core.revision = 1
        outcome = await agent.give([core.change(granted(1, grant("s1", 5)))])
        assert [r.reason for r in outcome.refused] == ["session_ended"]
        assert set(world.on_interface()) == {key(2)}
        assert agent.ends() == {"s1": "operator"}
        await agent.give([core.change(granted(1, grant("s1b", 6)))])
        assert world.on_interface()[key(1)] == psk(6)

    with_agent(world, scenario)
    with_agent(world, after)


def test_signs_of_life_of_who_was_taken_over_count_also_if_the_device_failed_just_then(world: World) -> None:
    async def before(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))

    async def after(agent: Agent, core: Core) -> None:
        core.revision = 1
        world.host.fails = 1
        await agent.give(core.same([live(1)]))
        assert set(world.on_interface()) == {key(1)}
        world.clock.advance(400)
        await agent.look()
        assert agent.ends()["s1"] == "never_connected"

    with_agent(world, before)
    for file in world.folder.iterdir():
        file.unlink()
    with_agent(world, after)


def test_signs_of_life_are_not_reset_by_a_restart(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), live(2)]))
        world.host.kernel.handshake(key(1), psk(1), "client", world.clock())
        await agent.look()
        world.clock.advance(100)

    async def after(agent: Agent, core: Core) -> None:
        world.clock.advance(80)
        await agent.look()
        assert agent.ends() == {"s2": "never_connected"}
        world.clock.advance(120)
        await agent.look()
        assert agent.ends() == {"s2": "never_connected", "s1": "idle"}
        assert world.on_interface() == {}
        assert core.revision == 0

    with_agent(world, scenario)
    with_agent(world, after)


# Counters.


def count(agent: Agent, number: int) -> tuple[int, int]:
    traffic = agent.state.traffic.get(key(number))
    return traffic.rx_bytes, traffic.tx_bytes


def test_counters_only_grow_over_grants_restarts_and_interfaces(world: World) -> None:
    kernel = world.host.kernel

    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        kernel.peers[key(1)].rx_bytes, kernel.peers[key(1)].tx_bytes = 1000, 500
        await agent.look()
        assert count(agent, 1) == (1000, 500)
        await agent.give([core.change(revoked(1, "s1")), core.change(granted(1, grant("s2", 2)))])
        kernel.peers[key(1)].rx_bytes = 10
        await agent.look()
        assert count(agent, 1) == (1010, 500)
        end = agent.unreported()[0]
        assert (end.session_id, end.rx_bytes, end.tx_bytes) == ("s1", 1000, 500)
        agent.kill()

    async def second(agent: Agent, core: Core) -> None:
        assert count(agent, 1) == (1030, 500)
        core.revision = 3
        await agent.give(core.same([live(1, session="s2", psk=2)]))
        world.host.delete()
        await agent.look()
        kernel.peers[key(1)].rx_bytes = 5
        await agent.look()
        assert count(agent, 1) == (1035, 500)
        await agent.give([core.change(revoked(1, "s2"))])
        ends = {end.session_id: end for end in agent.unreported()}
        assert ends["s2"].rx_bytes == 35

    with_agent(world, first)
    kernel.peers[key(1)].rx_bytes = 30
    with_agent(world, second)


def test_what_was_counted_at_a_start_is_journalled_before_it_is_reported(world: World) -> None:
    kernel = world.host.kernel
    listed = [peer(1, mfa_exempt=True), live(2)]

    async def first(agent: Agent, core: Core) -> None:
        await agent.give(core.state(listed))

    async def second(agent: Agent, core: Core) -> None:
        await agent.give(core.state(listed))
        kernel.peers[key(2)].rx_bytes = 1
        await agent.look()
        report = agent.reconciler.reports.stats(10)
        assert report is not None
        assert {p.public_key: p.rx_bytes for p in report.peers}[key(1)] == 700
        agent.kill()

    async def third(agent: Agent, core: Core) -> None:
        assert count(agent, 1) == (700, 0)
        assert core.revision == 0

    with_agent(world, first)
    kernel.peers[key(1)].rx_bytes = 700
    with_agent(world, second)
    world.reboot()
    with_agent(world, third)


@pytest.mark.parametrize("refused", ["RemovePeer", "AddPeer"])
def test_a_peer_that_could_not_be_added_afresh_is_not_counted_twice(world: World, refused: str) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        world.host.kernel.peers[key(1)].rx_bytes = 1000
        await agent.look()
        world.host.refuses[key(1)] = frozenset({{"RemovePeer": RemovePeer, "AddPeer": AddPeer}[refused]})
        await agent.give([core.change(revoked(1, "s1")), core.change(granted(1, grant("s2", 2)))])
        await agent.look()
        world.host.refuses.clear()
        await agent.look()
        assert world.on_interface() == {key(1): psk(2)}
        assert count(agent, 1) == (1000, 0)

    with_agent(world, scenario)


# The switch of MFA.


def test_mfa_on_removes_who_has_no_session_and_adds_the_others_afresh(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        listed = [peer(1), live(2), peer(3, mfa_exempt=True)]
        await agent.give(core.state(listed, mfa_required=False))
        assert world.on_interface() == {key(1): None, key(2): None, key(3): None}
        before = stays(world)
        await agent.give([core.change(location_changed(mfa_required=True))])
        assert world.on_interface() == {key(2): psk(2), key(3): None}
        assert stays(world)[key(2)] != before[key(2)]
        assert stays(world)[key(3)] == before[key(3)]

    with_agent(world, scenario)


@pytest.mark.parametrize("by_snapshot", [True, False])
def test_mfa_off_admits_everybody_and_lets_sessions_run_to_their_end(
    world: World, *, by_snapshot: bool
) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        listed = [peer(1), live(2, lasts=30), peer(3, mfa_exempt=True), peer(4, preshared_key=psk(44))]
        await agent.give(core.state(listed))
        before = stays(world)
        if by_snapshot:
            await agent.give(core.state(listed, mfa_required=False))
        else:
            await agent.give([core.change(location_changed(mfa_required=False))])
        now_in = {key(1): None, key(2): psk(2), key(3): None, key(4): psk(44)}
        assert world.on_interface() == now_in
        assert {k: v for k, v in stays(world).items() if k in before} == before
        world.clock.advance(30)
        await agent.tick()
        assert world.on_interface() == {**now_in, key(2): None}
        assert stays(world)[key(2)] != before[key(2)]
        assert agent.ends() == {"s2": "expired"}

    with_agent(world, scenario)


def test_another_location_ends_every_session(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1), peer(2, mfa_exempt=True)]))
        await agent.give([core.change(location_changed(location="8"))])
        assert world.on_interface() == {key(2): None}
        assert agent.ends() == {"s1": "revoked"}

    with_agent(world, scenario)


def test_another_location_found_at_a_restart_ends_every_session(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))

    async def after(agent: Agent, core: Core) -> None:
        outcome = await agent.give(core.state([live(1)], location="8", epoch="e9"))
        assert [r.reason for r in outcome.refused] == ["session_ended"]
        assert world.on_interface() == {}

    with_agent(world, scenario)
    with_agent(world, after)


def test_an_upsert_of_the_same_peer_changes_nothing_on_the_interface(world: World) -> None:
    async def scenario(agent: Agent, core: Core) -> None:
        await agent.give(core.state([live(1)]))
        mark = len(world.host.operations())
        await agent.give([core.change(PeerUpserted(live(1)))])
        await agent.give([core.change(upserted(1, name="a name", session=grant("s1", 1)))])
        assert len(world.host.operations()) == mark

    with_agent(world, scenario)
