from collections.abc import Callable

import pytest

from agent.model import (
    EndReason,
    Peer,
    PeerRemoved,
    PeerUpserted,
    PublicKey,
    Refusal,
    SessionGranted,
    SessionRevoked,
    UnreadablePeer,
)
from agent.roster import Roster
from tests.support.builders import (
    CORE,
    NOW,
    OWN_KEY,
    after,
    grant,
    key,
    location_changed,
    peer,
    prefixes,
    snapshot,
)
from tests.support.pure_agent import PureAgent, running


def refused(agent: PureAgent) -> dict[PublicKey, Refusal]:
    return agent.state.roster.refused


def present(agent: PureAgent) -> set[PublicKey]:
    return set(agent.kernel.peers)


# Faults of one peer (rule 2).

FAULTS = [
    Refusal.INVALID_PRESHARED_KEY,
    Refusal.INVALID_ALLOWED_IPS,
    Refusal.INVALID_MFA_EXEMPT,
    Refusal.INVALID_KEEPALIVE,
    Refusal.INVALID_PEER,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_peer_is_refused_alone(fault: Refusal) -> None:
    agent = running(
        snapshot([peer(1, fault=fault, mfa_exempt=True), peer(2, mfa_exempt=True)], mfa_required=False)
    )
    assert (refused(agent), present(agent)) == ({key(1): fault}, {key(2)})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_peer_that_becomes_faulty_is_removed_and_one_that_is_mended_added(fault: Refusal) -> None:
    agent = running(snapshot([peer(1, mfa_exempt=True), peer(2, mfa_exempt=True)]))
    agent.change(PeerUpserted(peer(1, fault=fault, mfa_exempt=True)), after(1))
    assert (refused(agent), present(agent)) == ({key(1): fault}, {key(2)})
    agent.change(PeerUpserted(peer(1, mfa_exempt=True)), after(2))
    assert (refused(agent), present(agent)) == ({}, {key(1), key(2)})


def test_a_faulty_session_ends_the_old_one() -> None:
    for fault in (Refusal.INVALID_PRESHARED_KEY, Refusal.INVALID_TIME, Refusal.INVALID_SESSION):
        for change in (
            SessionGranted(key(1), None, fault),
            PeerUpserted(peer(1, session_fault=fault)),
        ):
            agent = running(snapshot([peer(1, session=grant("s-1", 1))]))
            agent.change(change, after(1))
            assert (refused(agent), present(agent), agent.state.sessions) == ({key(1): fault}, set(), {})
            assert [end.session_id for end in agent.reported] == ["s-1"]


def test_a_good_grant_after_a_faulty_one_admits() -> None:
    agent = running(snapshot([peer(1, session_fault=Refusal.INVALID_TIME)]))
    assert refused(agent) == {key(1): Refusal.INVALID_TIME}
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(1))
    assert (refused(agent), present(agent)) == ({}, {key(1)})


def test_a_faulty_session_refuses_its_peer_even_where_none_is_needed() -> None:
    agent = running(snapshot([peer(1, mfa_exempt=True, session_fault=Refusal.INVALID_TIME)]))
    assert (refused(agent), present(agent)) == ({key(1): Refusal.INVALID_TIME}, set())


def test_the_interfaces_own_key_as_a_peer_is_refused() -> None:
    own = Peer(OWN_KEY, prefixes("10.8.0.77"), mfa_exempt=True)
    agent = running(snapshot([own, peer(1, mfa_exempt=True)]))
    assert (refused(agent), present(agent)) == ({OWN_KEY: Refusal.OWN_KEY}, {key(1)})


def test_duplicate_keys_refuse_all_their_entries_and_keep_their_claims() -> None:
    listed = [
        peer(1, "10.0.0.1", mfa_exempt=True),
        peer(1, "10.0.0.2", mfa_exempt=True),
        peer(2, "10.0.0.2", mfa_exempt=True),
        peer(3, mfa_exempt=True),
    ]
    for order in (listed, listed[::-1]):
        agent = running(snapshot(order))
        assert refused(agent) == {key(1): Refusal.DUPLICATE_KEY, key(2): Refusal.PREFIX_CLAIMED}
        assert present(agent) == {key(3)}


def test_of_duplicate_entries_one_that_must_do_mfa_makes_the_peer_contest_what_it_contains() -> None:
    listed = [
        peer(1, "10.0.0.0/24", mfa_exempt=True),
        peer(1, "10.0.0.0/24"),
        peer(2, "10.0.0.2", session=grant("s-2", 2)),
    ]
    for order in (listed, listed[::-1]):
        assert set(refused(running(snapshot(order)))) == {key(1), key(2)}


def test_a_duplicated_entry_ends_no_session_by_itself() -> None:
    one = peer(1, session=grant("s-1", 1))
    agent = running(snapshot([one]))
    for again in ([one, peer(1)], [peer(1), one], [one, one]):
        agent.load(snapshot(again, revision=2), after(1))
        assert (refused(agent), present(agent)) == ({key(1): Refusal.DUPLICATE_KEY}, set())
        assert agent.reported == []
    agent.load(snapshot([one], revision=3), after(2))
    assert present(agent) == {key(1)}


def test_of_duplicated_entries_with_sessions_the_live_one_goes_on() -> None:
    one = peer(1, "10.0.0.1", "10.0.0.3", session=grant("s-1", 1))
    other = peer(1, "10.0.0.4", "10.0.0.2", session=grant("s-2", 2))
    for both in ([one, other], [other, one]):
        agent = running(snapshot([one]))
        agent.load(snapshot(both, revision=2), after(1))
        assert (agent.reported, agent.state.sessions[key(1)].id) == ([], "s-1")
        claimed = agent.state.roster.peers[key(1)].allowed_ips
        assert claimed == prefixes("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")


# Claimed prefixes (rule 3).


def test_all_claimants_of_a_prefix_are_refused_and_return_when_the_cause_is_gone() -> None:
    agent = running(snapshot([peer(1, "10.0.0.1", mfa_exempt=True), peer(3, mfa_exempt=True)]))
    agent.change(PeerUpserted(peer(2, "10.0.0.1", mfa_exempt=True)), after(1))
    assert refused(agent) == {key(1): Refusal.PREFIX_CLAIMED, key(2): Refusal.PREFIX_CLAIMED}
    assert present(agent) == {key(3)}
    agent.change(PeerRemoved(key(2)), after(2))
    assert (refused(agent), present(agent)) == ({}, {key(1), key(3)})


def test_a_refused_claimant_still_claims() -> None:
    agent = running(
        snapshot(
            [
                peer(1, "10.0.0.1", fault=Refusal.INVALID_KEEPALIVE),
                peer(2, "10.0.0.1", mfa_exempt=True),
            ]
        )
    )
    assert (set(refused(agent)), present(agent)) == ({key(1), key(2)}, set())


def test_a_peer_refused_for_a_claimed_prefix_keeps_its_session_and_deadline_and_returns_afresh() -> None:
    agent = running(snapshot([peer(1, "10.0.0.1", session=grant("s-1", 1)), peer(2)]))
    stay, deadline = agent.kernel.peers[key(1)].incarnation, agent.state.sessions[key(1)].deadline
    agent.change(PeerUpserted(peer(2, "10.0.0.1")), after(10))
    assert present(agent) == set()
    assert agent.state.sessions[key(1)].deadline == deadline
    assert agent.reported == []
    agent.change(PeerUpserted(peer(2)), after(20))
    assert agent.kernel.peers[key(1)].incarnation > stay
    assert agent.state.sessions[key(1)].deadline == deadline


def test_a_refused_session_still_ends_at_its_deadline() -> None:
    agent = running(snapshot([peer(1, "10.0.0.1", session=grant("s-1", 1)), peer(2, "10.0.0.1")]))
    agent.tick(after(3600))
    agent.change(PeerUpserted(peer(2)), after(3601))
    assert (present(agent), [e.session_id for e in agent.reported]) == (set(), ["s-1"])


def test_containing_counts_as_claiming_only_between_peers_that_must_do_mfa_whatever_their_sessions() -> None:
    router = peer(1, "10.0.0.0/24", mfa_exempt=True)
    client = peer(2, "10.0.0.2", session=grant("s-2", 2))
    agent = running(snapshot([router, client]))
    assert (refused(agent), present(agent)) == ({}, {key(1), key(2)})
    agent.change(PeerUpserted(peer(1, "10.0.0.0/24")), after(1))
    assert set(refused(agent)) == {key(1), key(2)}
    assert present(agent) == set()
    agent.change(location_changed(mfa_required=False), after(2))
    assert (refused(agent), present(agent)) == ({}, {key(1), key(2)})
    agent.change(location_changed(mfa_required=True), after(3))
    assert (set(refused(agent)), present(agent)) == ({key(1), key(2)}, set())


# Session ids (rule 6).


def test_an_ended_id_is_refused_wherever_it_is_seen_again() -> None:
    session = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=session), peer(2), peer(3, mfa_exempt=True)]))
    agent.change(SessionRevoked(key(1), "s-1"), after(1))
    assert refused(agent) == {}
    for change in (SessionGranted(key(1), session), PeerUpserted(peer(1, session=session))):
        agent.change(change, after(2))
        assert (refused(agent), present(agent)) == ({key(1): Refusal.SESSION_ENDED}, {key(3)})
    agent.change(PeerUpserted(peer(1)), after(3))
    agent.change(SessionGranted(key(2), grant("s-1", 7, granted_at=CORE + 3.0)), after(3))
    assert refused(agent) == {key(2): Refusal.SESSION_ENDED}
    agent.load(snapshot([peer(1, session=session), peer(2)], epoch="e2"), after(4))
    assert (refused(agent), present(agent)) == ({key(1): Refusal.SESSION_ENDED}, set())
    assert [e.session_id for e in agent.reported] == ["s-1"]


def test_a_fresh_id_lifts_the_refusal_of_an_ended_one() -> None:
    session = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=session)]))
    agent.state.end(None, after(1))
    agent.reconcile(after(1))
    agent.load(snapshot([peer(1, session=session)], revision=2), after(2))
    assert refused(agent) == {key(1): Refusal.SESSION_ENDED}
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(3))
    assert (refused(agent), present(agent)) == ({}, {key(1)})


def test_revoking_a_dead_id_that_core_still_listed_lifts_its_refusal() -> None:
    session = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=session)]))
    agent.state.end(None, after(1))
    agent.load(snapshot([peer(1, session=session)], revision=2), after(2))
    agent.change(SessionRevoked(key(1), "s-1"), after(3))
    assert refused(agent) == {}
    agent.change(SessionGranted(key(1), session), after(4))
    assert refused(agent) == {key(1): Refusal.SESSION_ENDED}


def test_a_peer_that_needs_no_session_is_not_kept_out_by_a_dead_one() -> None:
    session = grant("s-1", 1)
    agent = running(snapshot([peer(1, mfa_exempt=True, session=session)]))
    agent.change(SessionRevoked(key(1), "s-1"), after(1))
    agent.change(SessionGranted(key(1), session), after(2))
    assert (refused(agent), present(agent)) == ({}, {key(1)})
    agent.change(PeerUpserted(peer(1, session=session)), after(3))
    assert (refused(agent), present(agent)) == ({key(1): Refusal.SESSION_ENDED}, set())


def test_a_session_shown_with_another_granted_at_is_replaced_and_its_id_dead() -> None:
    altered = grant("s-1", 1, granted_at=CORE + 5.0)
    for later in (SessionGranted(key(1), altered), PeerUpserted(peer(1, session=altered)), None):
        agent = running(snapshot([peer(1, session=grant("s-1", 1))]))
        if later is None:
            agent.load(snapshot([peer(1, session=altered)], revision=2), after(10))
        else:
            agent.change(later, after(10))
        assert (present(agent), agent.state.sessions) == (set(), {})
        assert refused(agent) == {key(1): Refusal.SESSION_ENDED}
        assert [(end.session_id, end.reason) for end in agent.reported] == [("s-1", EndReason.REPLACED)]
        # Nor does the first one come back to life.
        agent.change(SessionGranted(key(1), grant("s-1", 1)), after(11))
        assert (refused(agent), present(agent)) == ({key(1): Refusal.SESSION_ENDED}, set())


def test_one_id_on_two_keys_refuses_both_by_snapshot() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2, session=grant("s-1", 2)), peer(3)]))
    assert refused(agent) == {
        key(1): Refusal.SESSION_ON_TWO_KEYS,
        key(2): Refusal.SESSION_ON_TWO_KEYS,
    }
    assert present(agent) == set()


def test_one_id_on_two_keys_refuses_both_by_events_too_until_one_lets_go() -> None:
    one = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=one), peer(2), peer(3, mfa_exempt=True)]))
    for change, back in (
        (SessionGranted(key(2), one), PeerUpserted(peer(2))),
        (PeerUpserted(peer(2, session=one)), SessionRevoked(key(2), "s-1")),
        (PeerUpserted(peer(2, session=one)), SessionGranted(key(2), None, Refusal.INVALID_TIME)),
        (PeerUpserted(peer(2, session=one)), PeerRemoved(key(2))),
    ):
        agent.change(change, after(1))
        assert agent.state.roster.holders("s-1") == {key(1), key(2)}
        assert set(refused(agent)) == {key(1), key(2)}
        assert present(agent) == {key(3)}
        agent.change(back, after(2))
        assert key(1) not in refused(agent)
        assert present(agent) == {key(1), key(3)}


def test_one_id_on_three_keys_refuses_whoever_shows_it_until_one_is_left() -> None:
    one = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=one), peer(2), peer(3)]))
    for number in (2, 3):
        agent.change(SessionGranted(key(number), one), after(1))
    assert set(refused(agent)) == {key(1), key(2), key(3)}
    agent.change(PeerUpserted(peer(3)), after(2))
    assert set(refused(agent)) == {key(1), key(2)}
    agent.change(PeerRemoved(key(2)), after(3))
    assert (refused(agent), present(agent)) == ({}, {key(1)})


def test_an_end_of_a_session_lets_go_whoever_it_kept_out() -> None:
    """An exempt peer that lists another's session id is back as soon as that id is no session."""
    one = grant("s-1", 1)
    ends: list[Callable[[PureAgent], object]] = [
        lambda agent: agent.tick(after(3600)),
        lambda agent: agent.end([key(1)], after(5)),
        lambda agent: agent.core_lost(after(5)),
        lambda agent: agent.change(SessionRevoked(key(1), "s-1"), after(5)),
    ]
    for number, end in enumerate(ends):
        agent = running(snapshot([peer(1, session=one), peer(2, mfa_exempt=True)]))
        agent.change(SessionGranted(key(2), one), after(1))
        assert present(agent) == set(), number
        end(agent)
        assert present(agent) == {key(2)}, number


# Who is told of it.


def test_each_change_of_who_is_refused_is_counted_and_nothing_else_is() -> None:
    """By the count it is known whether core has to be told anew."""
    crowd = [peer(n) for n in range(10, 40)]
    bad = peer(1, fault=Refusal.INVALID_PEER)
    agent = running(snapshot([peer(1), peer(2, "10.8.0.3"), *crowd]))
    roster = agent.state.roster
    steps: list[tuple[bool, Callable[[], object]]] = [
        (True, lambda: agent.change(PeerUpserted(bad), after(1))),
        (False, lambda: agent.change(PeerUpserted(bad), after(1))),
        (True, lambda: agent.change(PeerRemoved(key(1)), after(1))),
        (False, lambda: agent.change(PeerRemoved(key(2)), after(1))),
        (True, lambda: agent.load(snapshot([bad, *crowd], revision=9), after(1))),
        (True, lambda: agent.load(snapshot([peer(1), *crowd], revision=10), after(1))),
        (True, lambda: agent.load(snapshot([bad], revision=11), after(1))),
        (True, lambda: agent.load(snapshot([], revision=12), after(1))),
        (True, lambda: agent.change(PeerUpserted(peer(5)._replace(public_key=OWN_KEY)), after(1))),
    ]
    for number, (changes, step) in enumerate(steps):
        before = roster.refusals
        step()
        assert (roster.refusals != before) == changes, number


def test_who_is_refused_and_who_no_longer_is_told_once_and_not_who_was_only_in_between() -> None:
    agent = running(snapshot([peer(1), peer(2), peer(3, fault=Refusal.INVALID_PEER), peer(4)]))
    roster = agent.state.roster
    assert roster.take_judged() == ([(key(3), Refusal.INVALID_PEER)], [])
    agent.change(PeerUpserted(peer(1, fault=Refusal.INVALID_PEER)), after(1))
    agent.change(PeerUpserted(peer(2, fault=Refusal.INVALID_PEER)), after(1))
    agent.change(PeerUpserted(peer(2)), after(1))
    agent.change(PeerUpserted(peer(3)), after(1))
    told = roster.take_judged()
    assert told == ([(key(1), Refusal.INVALID_PEER)], [(key(3), Refusal.INVALID_PEER)])
    assert roster.take_judged() == ([], [])
    # For another reason: told again. No longer listed: not.
    agent.change(PeerUpserted(peer(1, fault=Refusal.INVALID_KEEPALIVE)), after(1))
    agent.change(PeerUpserted(peer(4, fault=Refusal.INVALID_PEER)), after(1))
    agent.change(PeerRemoved(key(4)), after(1))
    assert roster.take_judged() == ([(key(1), Refusal.INVALID_KEEPALIVE)], [])
    agent.change(PeerRemoved(key(1)), after(1))
    assert roster.take_judged() == ([], [])


def test_who_is_refused_by_a_list_little_of_which_is_new_has_to_go_and_so_has_who_was_before() -> None:
    roster = Roster()
    listed = {key(n): peer(n) for n in range(1, 31)}
    roster.load(dict(listed), mfa_required=True)
    roster.own(key(7))
    listed[key(8)] = peer(8, fault=Refusal.INVALID_PEER)
    roster.load(listed, mfa_required=True, changed={key(8)})
    assert roster.refused == {key(7): Refusal.OWN_KEY, key(8): Refusal.INVALID_PEER}
    assert roster.newly_refused == {key(7), key(8)}
    # Another key of the interface's own lets the former one go.
    roster.own(key(9))
    assert roster.refused == {key(9): Refusal.OWN_KEY, key(8): Refusal.INVALID_PEER}


# Reasons of our own.


def test_what_the_journal_or_the_device_would_not_take_is_kept_out_until_tried_again() -> None:
    for reason in (Refusal.NOT_JOURNALLED, Refusal.DEVICE):
        agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2, mfa_exempt=True)]))
        agent.state.block([key(1), key(9)], reason)
        agent.reconcile(after(1))
        assert (refused(agent), present(agent)) == ({key(1): reason}, {key(2)})
        assert agent.state.roster.blocked
        agent.state.unblock(after(2))
        agent.reconcile(after(2))
        assert (refused(agent), present(agent)) == ({}, {key(1), key(2)})
        assert not agent.state.roster.blocked


def test_what_was_kept_out_is_tried_again_with_each_state_of_cores() -> None:
    listed = snapshot([peer(1, mfa_exempt=True), peer(2, mfa_exempt=True)])
    crowd = snapshot([*listed.peers, *(peer(n) for n in range(10, 40))])
    for before, then in ((listed, listed), (listed, snapshot([*listed.peers, peer(3)])), (crowd, crowd)):
        agent = running(before)
        agent.state.block([key(1)], Refusal.DEVICE)
        agent.reconcile(after(1))
        assert present(agent) == {key(2)}
        agent.load(then, after(2))
        assert (refused(agent), present(agent)) == ({}, {key(1), key(2)})
        assert not agent.state.roster.blocked


def test_a_blocked_peer_that_is_no_longer_listed_is_forgotten() -> None:
    agent = running(snapshot([peer(1, mfa_exempt=True)]))
    agent.state.block([key(1)], Refusal.DEVICE)
    agent.change(PeerRemoved(key(1)), after(1))
    assert not agent.state.roster.blocked
    agent.change(PeerUpserted(peer(1, mfa_exempt=True)), after(2))
    assert (refused(agent), present(agent)) == ({}, {key(1)})


def test_a_dead_id_on_two_keys_refuses_both_also_where_no_session_is_needed() -> None:
    one = grant("s-1", 1)
    agent = running(snapshot([peer(1, session=one), peer(2, mfa_exempt=True)]))
    agent.change(SessionRevoked(key(1), "s-1"), after(1))
    agent.change(SessionGranted(key(1), one), after(2))
    agent.change(SessionGranted(key(2), one), after(3))
    assert set(refused(agent)) == {key(1), key(2)}
    agent.change(PeerUpserted(peer(1)), after(4))
    assert (refused(agent), present(agent)) == ({}, {key(2)})


def test_a_session_that_one_of_two_keys_let_go_begins_even_while_a_prefix_keeps_its_peer_out() -> None:
    one = grant("s-1", 1)
    listed = [peer(1, "10.0.0.9", session=one), peer(2, session=one), peer(3, "10.0.0.9")]
    agent = running(snapshot(listed))
    assert agent.state.sessions == {}
    agent.change(PeerUpserted(peer(2)), after(10))
    assert set(agent.state.sessions) == {key(1)}
    assert present(agent) == set()
    agent.change(PeerRemoved(key(3)), after(20))
    assert present(agent) == {key(1)}


def test_a_prefix_that_passes_from_peer_to_peer_within_a_list_costs_nobody_the_tunnel() -> None:
    crowd = [peer(n, session=grant(f"s-{n}", n)) for n in range(3, 40)]
    one, two = peer(1, session=grant("s-1", 1)), peer(2, session=grant("s-2", 2))
    agent = running(snapshot([one, two, *crowd]))
    before = {k: p.incarnation for k, p in agent.kernel.peers.items()}
    moved = [
        one._replace(allowed_ips=prefixes("10.8.0.2")),
        two._replace(allowed_ips=prefixes("10.8.0.250")),
    ]
    for order in (moved, moved[::-1]):
        agent.load(snapshot([one, two, *crowd]), NOW)
        agent.load(snapshot([*order, *crowd]), NOW)
        assert {k: p.incarnation for k, p in agent.kernel.peers.items()} == before
    assert agent.kernel.peers[key(1)].allowed_ips == set(prefixes("10.8.0.2"))


def test_entries_that_can_not_be_read_are_told_of_however_little_else_has_changed() -> None:
    bad = (UnreadablePeer("bad", Refusal.INVALID_PUBLIC_KEY),)
    for listed in ([], [peer(n) for n in range(1, 30)]):
        agent = running(snapshot(listed))
        roster = agent.state.roster
        for unreadable in (bad, ()):
            before = roster.refusals
            agent.load(snapshot(listed, unreadable=unreadable), NOW)
            assert roster.unreadable == unreadable
            assert roster.refusals > before
