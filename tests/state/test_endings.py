from collections.abc import Callable

import pytest

from agent.model import (
    NEVER,
    ChangeBody,
    EndReason,
    Grant,
    Now,
    PeerRemoved,
    PeerUpserted,
    Refusal,
    RemovePeer,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
    UpdatePeer,
)
from agent.state import State
from tests.support.builders import CORE, after, grant, key, location_changed, peer, psk, snapshot
from tests.support.pure_agent import PureAgent, adds, running


def granted(**members: object) -> PureAgent:
    """An agent with one live session, s-1 with PSK 1 on key 1, and a client connected by it."""
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2)]), **members)  # type: ignore[arg-type]
    assert agent.kernel.handshake(key(1), psk(1), "s-1", after(1))
    return agent


def passes(agent: PureAgent, seconds: float) -> bool:
    """Whether the client's old transport keys still work."""
    return bool(agent.kernel.working_tunnels(key(1), after(seconds)))


def reasons(agent: PureAgent) -> list[tuple[str, EndReason]]:
    return [(end.session_id, end.reason) for end in agent.reported]


Do = Callable[[PureAgent], object]

ENDINGS: dict[EndReason, Do] = {
    EndReason.EXPIRED: lambda agent: agent.tick(after(3600)),
    EndReason.REVOKED: lambda agent: agent.change(SessionRevoked(key(1), "s-1"), after(5)),
    EndReason.REPLACED: lambda agent: agent.load(
        snapshot([peer(1, session=grant("s-2", 2)), peer(2)], revision=2), after(5)
    ),
    EndReason.PEER_REMOVED: lambda agent: agent.change(PeerRemoved(key(1)), after(5)),
    EndReason.CORE_LOST: lambda agent: agent.core_lost(after(5)),
    EndReason.OPERATOR: lambda agent: agent.end([key(1)], after(5)),
    EndReason.IDLE: lambda agent: [agent.observe(after(2)), agent.observe(after(302))],
    EndReason.NEVER_CONNECTED: lambda agent: agent.observe(after(180)),
}


@pytest.mark.parametrize("reason", ENDINGS)
def test_ending_means_removing_and_the_reason_is_told_once(reason: EndReason) -> None:
    if reason is EndReason.NEVER_CONNECTED:
        agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2)]))
        agent.kernel.knock(key(1))
    else:
        agent = granted()
    ENDINGS[reason](agent)
    assert not passes(agent, 3600 if reason is EndReason.EXPIRED else 5)
    assert reasons(agent) == [("s-1", reason)]
    assert "s-1" in agent.state.roster.ended
    held = agent.kernel.peers.get(key(1))
    assert held is None or held.preshared_key == psk(2)


def test_an_upsert_or_a_snapshot_without_the_session_revokes_it() -> None:
    ends: list[Do] = [
        lambda agent: agent.change(PeerUpserted(peer(1)), after(5)),
        lambda agent: agent.load(snapshot([peer(1), peer(2)], revision=2), after(5)),
    ]
    for end in ends:
        agent = granted()
        end(agent)
        assert (reasons(agent), agent.kernel.peers) == ([("s-1", EndReason.REVOKED)], {})


def test_a_snapshot_without_the_peer_ends_its_session_as_peer_removed() -> None:
    agent = granted()
    agent.load(snapshot([peer(2)], revision=2), after(5))
    assert reasons(agent) == [("s-1", EndReason.PEER_REMOVED)]


def test_another_location_revokes_every_session() -> None:
    ends: list[Do] = [
        lambda agent: agent.change(location_changed(location="8"), after(5)),
        lambda agent: agent.load(
            snapshot([peer(1, session=grant("s-1", 1))], location="8", epoch="e2"), after(5)
        ),
    ]
    for end in ends:
        agent = granted()
        end(agent)
        assert (reasons(agent), agent.kernel.peers) == ([("s-1", EndReason.REVOKED)], {})


def test_a_following_grant_that_could_not_be_read_replaces() -> None:
    agent = granted()
    agent.change(SessionGranted(key(1), None, Refusal.INVALID_PRESHARED_KEY), after(5))
    assert (reasons(agent), agent.kernel.peers) == ([("s-1", EndReason.REPLACED)], {})


def test_revoking_another_id_than_the_live_one_has_no_effect_and_advances() -> None:
    agent = granted()
    assert agent.change(SessionRevoked(key(1), "s-0"), after(5)) == []
    assert agent.change(SessionRevoked(key(2), "s-1"), after(5)) == []
    assert (agent.state.revision, reasons(agent), passes(agent, 5)) == (3, [], True)
    assert "s-0" not in agent.state.roster.ended


# In place, or removed and added (rule 5).


def test_a_renewal_updates_in_place() -> None:
    agent = granted()
    renewed = SessionGranted(key(1), grant("s-1", 7, lasts=7200.0))
    (update,) = agent.change(renewed, after(5))
    assert isinstance(update, UpdatePeer)
    assert agent.kernel.peers[key(1)].preshared_key == psk(7)
    assert passes(agent, 6)
    assert agent.change(renewed, after(6)) == []
    assert reasons(agent) == []


def test_a_renewal_by_upsert_or_snapshot_updates_in_place() -> None:
    entry = peer(1, session=grant("s-1", 7, lasts=7200.0))
    renews: list[Do] = [
        lambda agent: agent.change(PeerUpserted(entry), after(5)),
        lambda agent: agent.load(snapshot([entry, peer(2)], revision=2), after(5)),
    ]
    for renew in renews:
        agent = granted()
        renew(agent)
        assert passes(agent, 6)
        assert agent.kernel.peers[key(1)].preshared_key == psk(7)


def test_a_grant_that_the_stream_says_replaces_a_live_session_updates_in_place() -> None:
    agent = granted()
    (update,) = agent.change(SessionGranted(key(1), grant("s-2", 2)), after(5))
    assert isinstance(update, UpdatePeer)
    assert passes(agent, 6)
    assert reasons(agent) == [("s-1", EndReason.REPLACED)]
    agent.change(SessionGranted(key(1), grant("s-1", 1)), after(7))
    assert agent.state.roster.refused == {key(1): Refusal.SESSION_ENDED}
    assert not passes(agent, 7)


@pytest.mark.parametrize("by_snapshot", [True, False])
def test_a_different_id_in_a_snapshot_or_an_upsert_is_an_end_and_a_grant(by_snapshot: bool) -> None:
    agent, entry = granted(), peer(1, session=grant("s-2", 2))
    if by_snapshot:
        done = agent.load(snapshot([entry, peer(2)], revision=2), after(5))
    else:
        done = agent.change(PeerUpserted(entry), after(5))
    assert done[0] == RemovePeer(key(1))
    assert adds(done) == {key(1)}
    assert not passes(agent, 5)


def test_an_end_and_a_new_grant_within_one_reconcile_remove_and_add() -> None:
    ends: list[Callable[[State], object]] = [
        lambda state: state.change(SessionRevoked(key(1), "s-1"), after(5)),
        lambda state: state.end([key(1)], after(5)),
        lambda state: state.core_lost(after(5)),
        lambda state: state.change(PeerUpserted(peer(1)), after(5)),
    ]
    for end in ends:
        agent = granted()
        end(agent.state)
        done = agent.change(SessionGranted(key(1), grant("s-2", 1)), after(5))
        assert adds(done) == {key(1)}
        assert not passes(agent, 5)


def test_a_peer_taken_off_the_list_and_put_on_again_within_one_reconcile_is_added_afresh() -> None:
    agent = granted()
    agent.state.change(PeerRemoved(key(1)), after(5))
    agent.change(PeerUpserted(peer(1, session=grant("s-2", 1))), after(5))
    assert not passes(agent, 5)
    exempt = running(snapshot([peer(1, mfa_exempt=True)]))
    exempt.state.change(PeerRemoved(key(1)), after(5))
    assert adds(exempt.change(PeerUpserted(peer(1, mfa_exempt=True)), after(5))) == {key(1)}


def test_a_grant_after_the_deadline_removes_and_adds_even_before_a_tick_has_seen_it() -> None:
    agent = granted()
    done = agent.change(SessionGranted(key(1), grant("s-2", 2, lasts=9000.0)), after(3600.5))
    assert adds(done) == {key(1)}
    assert reasons(agent) == [("s-1", EndReason.EXPIRED)]


@pytest.mark.parametrize("how", ["grant", "upsert", "snapshot"])
def test_a_renewal_after_the_deadline_revives_nothing(how: str) -> None:
    """Ended is ended, also when the event comes before the tick."""
    agent, late = granted(), grant("s-1", 1, lasts=9000.0)
    match how:
        case "grant":
            agent.change(SessionGranted(key(1), late), after(3600.5))
        case "upsert":
            agent.change(PeerUpserted(peer(1, session=late)), after(3600.5))
        case _:
            agent.load(snapshot([peer(1, session=late), peer(2)], revision=2), after(3600.5))
    assert agent.kernel.peers == {}
    assert agent.state.roster.refused == {key(1): Refusal.SESSION_ENDED}
    assert reasons(agent) == [("s-1", EndReason.EXPIRED)]


def test_a_replacing_grant_that_is_dead_itself_ends_the_old_session_too() -> None:
    agent = granted()
    agent.change(SessionGranted(key(1), grant("s-2", 2, granted_at=CORE - 9.0, lasts=9.0)), after(5))
    assert (agent.kernel.peers, set(agent.state.roster.ended)) == ({}, {"s-1", "s-2"})
    assert not passes(agent, 5)


# What an end says.


def test_the_end_carries_the_sessions_own_counters_and_cores_time() -> None:
    agent = granted()
    agent.kernel.peers[key(1)].rx_bytes = 1000
    agent.kernel.peers[key(1)].tx_bytes = 500
    agent.observe(after(10, step=-77.0))
    agent.change(SessionRevoked(key(1), "s-1"), after(20, step=-77.0))
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(30))
    agent.kernel.peers[key(1)].rx_bytes = 30
    agent.observe(after(40))
    agent.tick(after(9000))
    first, second = agent.reported
    assert (first.rx_bytes, first.tx_bytes, first.ended_at) == (1000, 500, CORE + 20.0)
    assert first.latest_handshake == pytest.approx(CORE + 1.0)
    assert (second.rx_bytes, second.tx_bytes, second.latest_handshake) == (30, 0, 0.0)
    assert second.ended_at == CORE + 3600.0
    assert agent.state.traffic.get(key(1)).rx_bytes == 1030


def test_a_lost_traffic_record_makes_no_negative_counters() -> None:
    agent = granted()
    agent.kernel.peers[key(1)].rx_bytes = 1000
    agent.observe(after(10))
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(20))
    assert agent.state.sessions[key(1)].base_rx == 1000
    agent.journal.traffic.clear()
    again = PureAgent(agent.kernel, agent.journal)
    agent.kernel.reboot()
    again.start(after(3700))
    assert all(end.rx_bytes >= 0 and end.tx_bytes >= 0 for end in again.reported)
    assert [end.session_id for end in again.reported] == ["s-2"]


# The operator.


def test_a_session_that_is_to_end_twice_ends_once() -> None:
    agent = granted()
    assert agent.state.end([key(1), key(1)], after(1)) == [key(1)]
    assert len(agent.state.ends) == 1


def test_the_operator_ends_all_or_some_and_they_stay_dead() -> None:
    both = [peer(1, session=grant("s-1", 1)), peer(2, session=grant("s-2", 2)), peer(3)]
    agent = running(snapshot(both))
    assert agent.state.end([key(1), key(3), key(9)], after(1)) == [key(1)]
    agent.reconcile(after(1))
    assert set(agent.kernel.peers) == {key(2)}
    assert agent.state.end(None, after(2)) == [key(2)]
    agent.reconcile(after(2))
    agent.load(snapshot(both, revision=2), after(3))
    assert agent.kernel.peers == {}
    assert set(agent.state.roster.refused.values()) == {Refusal.SESSION_ENDED}


# Memory of the dead.


def test_a_dead_id_is_remembered_until_its_first_granted_at_and_max_lifetime_are_past() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1, lasts=10.0))]))
    agent.tick(after(10))
    assert agent.state.forget_ended(after(86400.0)) == []
    assert agent.state.forget_ended(after(86401.0)) == ["s-1"]
    assert agent.state.roster.ended == {}
    assert running().state.forget_ended(after(1e6)) == []


def test_a_dead_id_is_remembered_as_long_as_a_core_that_gives_no_dates_lists_it() -> None:
    """Forgotten, it would begin anew."""
    undated = Grant("s-1", psk(1), None, NEVER)
    agent = running(snapshot([peer(1, session=undated), peer(2, session=grant("s-2", 2))]))
    agent.end(None, after(10))
    assert agent.state.forget_ended(after(1e6)) == ["s-2"]
    agent.load(snapshot([peer(1, session=undated)], revision=2), after(1e6))
    assert agent.kernel.peers == {}
    assert agent.state.forget_ended(after(2e6)) == []
    agent.load(snapshot([peer(1)], revision=3), after(2e6))
    assert agent.state.forget_ended(after(3e6)) == ["s-1"]


@pytest.mark.parametrize(
    ("again", "delist"),
    [
        (False, PeerUpserted(peer(1))),
        (False, PeerRemoved(key(1))),
        (True, PeerUpserted(peer(1))),
        (True, PeerRemoved(key(1))),
        (True, SessionRevoked(key(1), "s-1")),
    ],
)
def test_a_dead_id_without_a_date_is_forgotten_once_core_lists_it_no_more(
    again: bool, delist: ChangeBody
) -> None:
    """Whether core has shown it once more after its end or not."""
    undated = Grant("s-1", psk(1), None, NEVER)
    agent = running(snapshot([peer(1, session=undated)]))
    agent.end(None, after(10))
    if again:
        agent.change(SessionGranted(key(1), undated), after(11))
    assert agent.state.forget_ended(after(1e6)) == []
    agent.change(delist, after(1e6))
    assert agent.state.forget_ended(after(1e6)) == ["s-1"]


def test_a_dead_id_with_a_date_is_forgotten_in_time_though_core_lists_it_still() -> None:
    """By its date it is known not to begin anew."""
    listed = [peer(1, session=grant("s-1", 1, lasts=10.0))]
    agent = running(snapshot(listed))
    agent.tick(after(10))
    agent.load(snapshot(listed, revision=2), after(20))
    assert agent.state.roster.refused == {key(1): Refusal.SESSION_ENDED}
    assert agent.state.forget_ended(after(86401.0)) == ["s-1"]


def test_a_forgotten_id_is_not_admitted_again() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1, lasts=10.0))]))
    agent.tick(after(10))
    agent.state.forget_ended(after(86401.0))
    agent.load(snapshot([peer(1, session=grant("s-1", 1, lasts=1e6))], revision=2), after(86402.0))
    assert agent.kernel.peers == {}


def test_a_core_that_sets_a_shorter_lifetime_does_not_shorten_the_memory() -> None:
    policy = SessionPolicy(max_lifetime=60.0)
    agent = running(snapshot([peer(1, session=grant("s-1", 1))], policy=policy))
    agent.tick(after(60))
    assert agent.kernel.peers == {}
    assert agent.state.forget_ended(after(100)) == []


LATER = grant("s-1", 2, lasts=9000)


@pytest.mark.parametrize(
    "then",
    [
        lambda agent, now: agent.tick(now),
        lambda agent, now: agent.observe(now),
        lambda agent, now: agent.change(SessionGranted(key(1), LATER), now),
        lambda agent, now: agent.change(PeerUpserted(peer(1, session=LATER)), now),
        lambda agent, now: agent.change(location_changed(mfa_required=False), now),
        lambda agent, now: agent.load(snapshot([peer(1, session=LATER), peer(2)], revision=2), now),
    ],
    ids=["tick", "look", "renewal", "entry with a renewal", "MFA off", "state with a renewal"],
)
def test_a_session_seen_past_its_deadline_ends_whatever_comes_next_and_whatever_clocks_say_then(
    then: Callable[[PureAgent, Now], object],
) -> None:
    agent = granted()
    for _ in range(2):
        assert agent.state.expiring(after(10, step=3600)) == [key(1)]
    assert agent.state.expiring(after(3700)) == [key(1)]  # by the other clock too
    assert len(agent.state.overdue) == 1
    assert set(agent.state.sessions) == {key(1)}
    then(agent, after(11))
    assert agent.state.sessions == {}
    assert reasons(agent) == [("s-1", EndReason.EXPIRED)]
    assert "s-1" in agent.state.roster.ended
    assert not passes(agent, 12)
