from dataclasses import replace

import pytest

from agent.model import (
    EndReason,
    Identity,
    InterfaceSettings,
    Location,
    LocationChanged,
    PeerUpserted,
    PublicKey,
    Refusal,
    RemovePeer,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
)
from tests.support.builders import after, grant, key, location_changed, peer, psk, snapshot
from tests.support.pure_agent import PureAgent, running

LISTED = [
    peer(1, session=grant("s-1", 1)),
    peer(2, preshared_key=psk(22)),
    peer(3, mfa_exempt=True),
]


def psks(agent: PureAgent) -> dict[PublicKey, object]:
    return {k: p.preshared_key for k, p in agent.kernel.peers.items()}


def stays(agent: PureAgent) -> dict[PublicKey, int]:
    return {k: p.incarnation for k, p in agent.kernel.peers.items()}


def switched(agent: PureAgent, mfa_required: bool, seconds: float, how: str) -> list[object]:
    if how == "change":
        return list(agent.change(location_changed(mfa_required=mfa_required), after(seconds)))
    listed = agent.state.roster.peers.values()
    revision = agent.state.revision + 1
    return list(agent.load(snapshot(listed, mfa_required=mfa_required, revision=revision), after(seconds)))


both_ways = pytest.mark.parametrize("how", ["change", "snapshot"])


@both_ways
def test_mfa_off_admits_everybody_and_a_running_session_keeps_its_psk_until_it_ends(how: str) -> None:
    agent = running(snapshot(LISTED))
    before = stays(agent)
    switched(agent, False, 5, how)
    assert psks(agent) == {key(1): psk(1), key(2): psk(22), key(3): None}
    assert {k: stays(agent)[k] for k in before} == before
    agent.tick(after(3600))
    assert psks(agent) == {key(1): None, key(2): psk(22), key(3): None}
    assert stays(agent)[key(1)] != before[key(1)]
    assert [e.reason for e in agent.reported] == [EndReason.EXPIRED]


@both_ways
def test_mfa_on_removes_who_has_no_session_and_adds_every_survivor_again(how: str) -> None:
    agent = running(snapshot(LISTED, mfa_required=False))
    before = stays(agent)
    assert psks(agent) == {key(1): None, key(2): psk(22), key(3): None}
    done = switched(agent, True, 5, how)
    assert psks(agent) == {key(1): psk(1), key(3): None}
    assert {RemovePeer(key(1)), RemovePeer(key(2))} <= set(done)
    assert stays(agent)[key(1)] != before[key(1)]
    assert stays(agent)[key(3)] == before[key(3)]


@both_ways
def test_a_session_that_ran_through_off_and_on_is_added_again_too(how: str) -> None:
    agent = running(snapshot(LISTED))
    before = stays(agent)
    switched(agent, False, 5, how)
    switched(agent, True, 6, how)
    assert psks(agent) == {key(1): psk(1), key(3): None}
    assert stays(agent)[key(1)] != before[key(1)]
    assert agent.reported == []


def test_a_switch_off_and_on_within_one_reconcile_adds_survivors_again() -> None:
    agent = running(snapshot(LISTED))
    before = stays(agent)
    agent.state.change(location_changed(mfa_required=False), after(5))
    agent.change(location_changed(), after(5))
    assert stays(agent)[key(1)] != before[key(1)]


def test_sessions_granted_while_mfa_is_off_are_held_and_used_when_it_comes_on() -> None:
    agent = running(snapshot([peer(1), peer(2)], mfa_required=False))
    assert agent.change(SessionGranted(key(1), grant("s-1", 1)), after(5)) == []
    assert psks(agent) == {key(1): None, key(2): None}
    agent.change(location_changed(), after(10))
    assert psks(agent) == {key(1): psk(1)}
    agent.tick(after(3600))
    assert psks(agent) == {}


@pytest.mark.parametrize("how", ["expired", "revoked", "replaced", "operator", "upsert", "core_lost"])
def test_the_end_of_a_session_that_is_only_held_does_not_touch_the_peer(how: str) -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1))], mfa_required=False))
    before = stays(agent)
    match how:
        case "expired":
            done = agent.tick(after(3600))
        case "revoked":
            done = agent.change(SessionRevoked(key(1), "s-1"), after(5))
        case "replaced":
            done = agent.change(SessionGranted(key(1), grant("s-2", 2)), after(5))
        case "upsert":
            done = agent.change(PeerUpserted(peer(1)), after(5))
        case "core_lost":
            agent.state.core_lost(after(5))
            done = agent.reconcile(after(5))
        case _:
            agent.state.end(None, after(5))
            done = agent.reconcile(after(5))
    assert (done, stays(agent)) == ([], before)
    assert [e.session_id for e in agent.reported] == ["s-1"]
    agent.change(location_changed(), after(3601))
    assert psks(agent) == {}


def test_a_grant_that_replaces_a_session_running_since_before_the_switch_is_only_held() -> None:
    agent = running(snapshot(LISTED))
    agent.change(location_changed(mfa_required=False), after(5))
    before = stays(agent)
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(6))
    assert psks(agent)[key(1)] is None
    assert stays(agent)[key(1)] != before[key(1)]
    agent.change(location_changed(), after(7))
    assert psks(agent)[key(1)] == psk(2)


def test_a_session_running_since_before_the_switch_may_be_renewed() -> None:
    agent = running(snapshot(LISTED))
    agent.change(location_changed(mfa_required=False), after(5))
    before = stays(agent)
    agent.change(SessionGranted(key(1), grant("s-1", 7, lasts=7200.0)), after(6))
    assert (psks(agent)[key(1)], stays(agent)) == (psk(7), before)


def test_exemption_is_a_switch_of_one_peer() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2, mfa_exempt=True)]))
    before = stays(agent)
    agent.change(PeerUpserted(peer(1, mfa_exempt=True, session=grant("s-1", 1))), after(5))
    assert psks(agent) == {key(1): psk(1), key(2): None}
    assert stays(agent) == before
    agent.change(PeerUpserted(peer(1, mfa_exempt=True)), after(6))
    assert psks(agent) == {key(1): None, key(2): None}
    agent.change(PeerUpserted(peer(2)), after(7))
    assert psks(agent) == {key(1): None}
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(8))
    before = stays(agent)
    agent.change(PeerUpserted(peer(1, session=grant("s-2", 2))), after(9))
    assert psks(agent) == {key(1): psk(2)}
    assert stays(agent) != before


def test_who_is_exempt_no_longer_is_removed_and_added_even_if_a_session_comes_with_it() -> None:
    """Else whoever is in without a session would keep transport keys that no session stands for."""
    agent = running(snapshot([peer(1, mfa_exempt=True)]))
    before = stays(agent)
    done = agent.change(PeerUpserted(peer(1, session=grant("s-1", 1))), after(5))
    assert RemovePeer(key(1)) in done
    assert psks(agent) == {key(1): psk(1)}
    assert stays(agent) != before


def test_a_session_that_is_only_held_stays_so_however_often_it_is_listed() -> None:
    agent = running(snapshot(LISTED, mfa_required=False))
    before = stays(agent)
    assert agent.load(snapshot(LISTED, mfa_required=False, revision=2), after(5)) == []
    agent.change(PeerUpserted(LISTED[0]), after(6))
    agent.change(SessionGranted(key(1), grant("s-1", 7, lasts=7200.0)), after(7))
    assert not agent.state.sessions[key(1)].in_use
    assert (psks(agent)[key(1)], stays(agent)) == (None, before)


def test_nobody_is_cut_for_the_end_of_a_session_that_is_only_held() -> None:
    agent = running(snapshot(LISTED, mfa_required=False))
    assert agent.state.expiring(after(3600)) == []
    assert agent.tick(after(3600)) == []
    assert [e.reason for e in agent.reported] == [EndReason.EXPIRED]


def test_a_policy_holds_also_where_the_list_that_comes_with_it_is_the_same_again() -> None:
    held = snapshot(LISTED)
    agent = running(held)
    settings = InterfaceSettings(listen_port=443)
    lowered = replace(held, revision=2, session_policy=SessionPolicy(max_lifetime=300.0), interface=settings)
    assert lowered.peers is held.peers
    agent.state.load(lowered, after(5))
    assert agent.state.dirty == {key(1)}  # the guard's element has to be written anew
    agent.reconcile(after(5))
    assert (agent.state.session_policy, agent.state.interface) == (lowered.session_policy, settings)
    assert agent.state.sessions[key(1)].deadline.remaining(after(5)) == 295.0
    agent.tick(after(300))
    assert key(1) not in agent.kernel.peers


def test_settings_and_policy_come_with_the_location() -> None:
    agent = running(snapshot(LISTED))
    change = LocationChanged(
        Location("7", "another name", mfa_required=True),
        InterfaceSettings(listen_port=443),
        SessionPolicy(max_lifetime=7200.0),
        Identity(b"\x01" * 32, key(3)),
    )
    agent.change(change, after(5))
    state = agent.state
    assert (state.location, state.interface) == (change.location, change.interface)
    assert (state.session_policy, state.identity) == (change.session_policy, change.identity)
    assert state.roster.refused == {key(3): Refusal.OWN_KEY}
    agent.change(replace(change, identity=None), after(6))
    assert state.identity == change.identity


def test_after_a_new_epoch_everybodys_traffic_is_due_again() -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.handshake(key(1), psk(1), "s-1", after(1))
    agent.observe(after(2))
    held = agent.state.traffic.get(key(1))
    agent.state.traffic.reported(key(1), *held[:2], held.latest_handshake, held.endpoint)
    assert agent.state.traffic.due(9, {key(1)}) == []
    agent.load(snapshot(LISTED, revision=2), after(3))
    assert agent.state.traffic.due(9, {key(1)}) == []
    agent.load(snapshot(LISTED, epoch="e2"), after(4))
    assert agent.state.traffic.due(9, {key(1)}) == [key(1)]
