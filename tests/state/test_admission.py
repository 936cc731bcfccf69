from collections.abc import Callable
from dataclasses import replace

import pytest

from agent import state
from agent.model import PeerRemoved, PeerUpserted, Refusal, SessionGranted, SessionRevoked, UnreadablePeer
from agent.sessions import Limits
from agent.state import UnknownPeer
from tests.support.builders import (
    CORE,
    NOW,
    after,
    grant,
    key,
    location_changed,
    peer,
    prefixes,
    psk,
    snapshot,
)
from tests.support.pure_agent import PureAgent, adds, running


def test_a_peer_without_a_live_session_is_not_on_the_interface() -> None:
    agent = running(snapshot([peer(1), peer(2, preshared_key=psk(9))]))
    assert agent.kernel.peers == {}
    assert agent.state.roster.refused == {}


def test_a_peer_with_a_live_session_is_on_the_interface_with_its_psk() -> None:
    agent = running(snapshot([peer(1, "10.8.0.1", "fd00::1", session=grant("s-1", 1))]))
    held = agent.kernel.peers[key(1)]
    assert (held.preshared_key, held.allowed_ips) == (psk(1), set(prefixes("10.8.0.1", "fd00::1")))


def test_an_exempt_peer_is_on_the_interface_always_with_its_static_psk_if_it_has_one() -> None:
    agent = running(snapshot([peer(1, mfa_exempt=True), peer(2, mfa_exempt=True, preshared_key=psk(2))]))
    assert {k: p.preshared_key for k, p in agent.kernel.peers.items()} == {key(1): None, key(2): psk(2)}


def test_without_mfa_every_peer_of_the_list_is_on_the_interface_with_its_static_psk() -> None:
    agent = running(snapshot([peer(1), peer(2, preshared_key=psk(2))], mfa_required=False))
    assert {k: p.preshared_key for k, p in agent.kernel.peers.items()} == {key(1): None, key(2): psk(2)}


def test_a_static_psk_is_no_session() -> None:
    agent = running(snapshot([peer(1, preshared_key=psk(1))]))
    agent.change(PeerUpserted(peer(1, preshared_key=psk(2))), after(1))
    assert agent.kernel.peers == {}


def test_a_grant_of_the_stream_admits() -> None:
    agent = running(snapshot([peer(1), peer(2)]))
    assert adds(agent.change(SessionGranted(key(1), grant("s-1", 1)), after(1))) == {key(1)}
    assert set(agent.kernel.peers) == {key(1)}
    assert agent.state.revision == 2


def test_what_begins_and_what_is_renewed_is_told_by_the_revision_that_said_so_until_it_is_forgotten() -> None:
    state = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2)], revision=7)).state
    state.change(SessionGranted(key(2), grant("s-2", 2)), after(1))
    state.change(SessionGranted(key(1), grant("s-1", 1)), after(2))
    state.change(SessionGranted(key(1), grant("s-1", 9)), after(3))
    state.change(SessionGranted(key(1), grant("s-1", 9, lasts=60.0)), after(4))
    told = [
        {revision: [one.id for one in sessions] for revision, sessions in news.items()}
        for news in (state.granted, state.renewed)
    ]
    assert told == [{7: ["s-1"], 8: ["s-2"]}, {10: ["s-1"], 11: ["s-1"]}]
    state.change(PeerUpserted(peer(3, fault=Refusal.INVALID_ALLOWED_IPS)), after(5))
    state.forget_news()
    assert (state.granted, state.renewed, state.roster.take_judged()) == ({}, {}, ([], []))


def test_a_session_in_an_upsert_admits() -> None:
    agent = running(snapshot())
    agent.change(PeerUpserted(peer(1, session=grant("s-1", 1))), after(1))
    assert set(agent.kernel.peers) == {key(1)}


def test_a_grant_that_has_expired_by_cores_time_admits_nobody() -> None:
    gone = grant("s-1", 1, granted_at=CORE - 100.0, lasts=100.0)
    agent = running(snapshot([peer(1, session=gone)]))
    agent.change(SessionGranted(key(1), grant("s-2", 2, granted_at=CORE - 100.0, lasts=100.0)), after(1))
    assert agent.kernel.peers == {}
    assert agent.state.sessions == {}


def test_a_grant_with_less_than_a_millisecond_left_admits_nobody() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1, expires_at=CORE + 0.0005))]))
    assert agent.kernel.peers == {}


def test_a_grant_before_any_server_time_waits() -> None:
    agent = running()
    with pytest.raises(UnknownPeer):
        agent.change(SessionGranted(key(1), grant("s-1", 1)), NOW)
    agent.state.change(PeerUpserted(peer(1, session=grant("s-1", 1))), NOW)
    agent.reconcile(NOW)
    assert (agent.kernel.peers, agent.state.sessions) == ({}, {})
    agent.load(snapshot([peer(1, session=grant("s-1", 1))]), after(1))
    assert set(agent.kernel.peers) == {key(1)}


@pytest.mark.parametrize(
    "change",
    [PeerRemoved(key(9)), SessionGranted(key(9), grant("s-9", 9)), SessionRevoked(key(9), "s-9")],
)
def test_a_change_of_an_unknown_peer_does_not_advance_the_revision(change: object) -> None:
    agent = running(snapshot([peer(1)]))
    with pytest.raises(UnknownPeer):
        agent.state.change(change, NOW)  # type: ignore[arg-type]
    assert agent.state.revision == 1


def test_what_a_snapshot_does_not_list_is_gone() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2, mfa_exempt=True)]))
    agent.load(snapshot([], revision=2), after(1))
    assert agent.kernel.peers == {}


def test_one_change_touches_one_peer() -> None:
    agent = running(snapshot([peer(n, mfa_exempt=True) for n in range(1, 50)] + [peer(50)]))
    assert len(agent.change(SessionGranted(key(50), grant("s-50", 50)), after(1))) == 1


def test_the_same_snapshot_again_does_nothing() -> None:
    whole = snapshot([peer(1, session=grant("s-1", 1)), peer(2, mfa_exempt=True)])
    agent = running(whole)
    assert agent.load(whole, after(1)) == []
    assert agent.state.to_journal == {}


def test_a_changed_address_is_changed_in_place() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1))]))
    stay = agent.kernel.peers[key(1)].incarnation
    agent.change(PeerUpserted(peer(1, "10.8.9.9", session=grant("s-1", 1))), after(1))
    held = agent.kernel.peers[key(1)]
    assert (held.incarnation, held.allowed_ips) == (stay, set(prefixes("10.8.9.9")))


def test_a_prefix_that_moves_within_one_snapshot_is_moved_in_place() -> None:
    one, two = grant("s-1", 1), grant("s-2", 2)
    agent = running(snapshot([peer(1, "10.0.0.1", session=one), peer(2, "10.0.0.2", session=two)]))
    stays = {k: p.incarnation for k, p in agent.kernel.peers.items()}
    swapped = [peer(1, "10.0.0.2", session=one), peer(2, "10.0.0.1", session=two)]
    agent.load(snapshot(swapped, revision=2), after(1))
    assert {k: p.allowed_ips for k, p in agent.kernel.peers.items()} == {
        key(1): set(prefixes("10.0.0.2")),
        key(2): set(prefixes("10.0.0.1")),
    }
    assert {k: p.incarnation for k, p in agent.kernel.peers.items()} == stays


def test_entries_whose_key_cannot_be_read_are_kept_for_the_answer_and_refuse_nobody_else() -> None:
    unreadable = (UnreadablePeer("rubbish", Refusal.INVALID_PUBLIC_KEY),)
    agent = running(snapshot([peer(1, mfa_exempt=True)], unreadable=unreadable))
    assert list(agent.state.roster.unreadable) == list(unreadable)
    assert set(agent.kernel.peers) == {key(1)}
    agent.load(snapshot([peer(1, mfa_exempt=True)], revision=2), after(1))
    assert list(agent.state.roster.unreadable) == []


def test_desired_is_what_the_interface_holds() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2), peer(3, mfa_exempt=True)]))
    assert set(agent.state.desired(NOW)) == {key(1), key(3)} == set(agent.kernel.peers)
    assert set(agent.state.desired(after(3600.0))) == {key(3)}


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda _: None,
        lambda agent: agent.change(PeerUpserted(peer(1)), after(2)),
        lambda agent: agent.change(PeerRemoved(key(2)), after(2)),
        lambda agent: agent.change(SessionGranted(key(3), grant("s-3", 3)), after(2)),
        lambda agent: agent.change(SessionRevoked(key(1), "s-1"), after(2)),
        lambda agent: agent.change(location_changed(mfa_required=False), after(2)),
        lambda agent: agent.end([key(1)], after(2)),
        lambda agent: agent.core_lost(after(2)),
        lambda agent: agent.tick(after(700)),
        lambda agent: agent.state.configure(Limits(max_lifetime=900.0), after(2)),
        lambda agent: agent.state.block([key(1)], Refusal.DEVICE),
    ],
)
def test_the_very_same_list_again_means_what_an_equal_one_means(
    meanwhile: Callable[[PureAgent], object],
) -> None:
    listed = [peer(1, session=grant("s-1", 1)), peer(2, session=grant("s-2", 2, lasts=600.0)), peer(3)]
    first = snapshot(listed)
    agents = running(first), running(snapshot(listed))
    for agent in agents:
        meanwhile(agent)
    again = replace(first, revision=7, server_time=CORE + 701.0, requested_at=after(701).boot)
    agents[0].load(again, after(701))
    agents[1].load(replace(again, peers=(*listed,)), after(701))
    one, other = (agent.state for agent in agents)
    assert one.sessions == other.sessions
    assert one.roster.peers == other.roster.peers
    assert one.roster.refused == other.roster.refused
    assert agents[0].kernel.peers.keys() == agents[1].kernel.peers.keys()
    assert (one.revision, one.core_clock) == (7, other.core_clock)


def test_the_very_same_list_again_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    first = snapshot([peer(1, session=grant("s-1", 1))])
    agent = running(first)
    monkeypatch.setattr(state, "_merge_duplicates", lambda *_: pytest.fail("it was"))
    assert agent.load(replace(first, revision=2), NOW) == []
