import pytest

from agent.model import EndReason, PeerUpserted, Refusal, SessionGranted, SessionPolicy
from agent.sessions import Deadline, Limits
from tests.support.builders import CORE, NOW, after, grant, key, location_changed, peer, snapshot
from tests.support.pure_agent import PureAgent, running

ONE = peer(1, session=grant("s-1", 1, lasts=100.0))


def gone(agent: PureAgent) -> bool:
    return key(1) not in agent.kernel.peers


def test_a_session_ends_at_its_deadline_and_not_before() -> None:
    agent = running(snapshot([ONE]))
    assert agent.tick(after(99.9)) == []
    agent.tick(after(100))
    assert gone(agent)
    assert [(e.reason, e.ended_at) for e in agent.reported] == [(EndReason.EXPIRED, CORE + 100.0)]


@pytest.mark.parametrize("step", [-1e6, -100.0, -1.0, 0.0])
def test_a_wall_clock_stepped_back_extends_nothing(step: float) -> None:
    agent = running(snapshot([ONE]))
    agent.tick(after(99.9, step=step))
    assert not gone(agent)
    agent.tick(after(100, step=step))
    assert gone(agent)


def test_a_wall_clock_stepped_forward_past_the_deadline_ends_it() -> None:
    agent = running(snapshot([ONE]))
    agent.tick(after(1, step=99.0))
    assert gone(agent)
    assert agent.reported[0].ended_at == CORE + 1.0


def test_a_lost_timer_leaks_no_access() -> None:
    """Expiry is a property of what is wanted now, ticked or not."""
    agent = running(snapshot([ONE]))
    assert agent.state.wanted(key(1), after(99)) is not None
    assert agent.state.wanted(key(1), after(100)) is None
    assert agent.state.wanted(key(1), after(1, step=99.0)) is None


def test_the_remainder_is_of_cores_time_and_not_of_the_hosts() -> None:
    fast = snapshot([ONE], server_time=CORE + 40.0, requested_at=NOW.boot - 10.0)
    agent = running(fast)
    assert agent.state.sessions[key(1)].deadline == Deadline(NOW.boot + 50.0, NOW.wall + 50.0)


def test_cores_time_is_refreshed_by_each_pull_and_moves_no_deadline() -> None:
    agent = running(snapshot([ONE]))
    later = snapshot([ONE, peer(2)], revision=2, server_time=CORE + 70.0, requested_at=after(10).boot)
    agent.load(later, after(10))
    assert agent.state.sessions[key(1)].deadline == Deadline(NOW.boot + 100.0, NOW.wall + 100.0)
    assert agent.state.core_time(after(10)) == CORE + 70.0
    agent.change(SessionGranted(key(2), grant("s-2", 2, lasts=100.0)), after(11))
    assert agent.state.sessions[key(2)].deadline.remaining(after(11)) == pytest.approx(29.0)


def test_a_deadline_moves_only_when_expires_at_does() -> None:
    agent = running(snapshot([ONE]))
    before = agent.state.sessions[key(1)].deadline
    for now in (after(10, step=-500.0), after(20)):
        agent.change(SessionGranted(key(1), grant("s-1", 5, lasts=100.0)), now)
        agent.change(PeerUpserted(ONE), now)
        agent.load(snapshot([ONE], revision=9, server_time=CORE - 900.0), now)
        assert agent.state.sessions[key(1)].deadline == before
    agent.load(snapshot([ONE], revision=9, server_time=CORE + 30.0, requested_at=after(30).boot), after(30))
    agent.change(SessionGranted(key(1), grant("s-1", 5, lasts=200.0)), after(30))
    assert agent.state.sessions[key(1)].deadline == Deadline(NOW.boot + 200.0, NOW.wall + 200.0)
    agent.change(SessionGranted(key(1), grant("s-1", 5, lasts=50.0)), after(30))
    agent.tick(after(50))
    assert gone(agent)


def test_a_renewal_that_moves_the_end_into_the_past_ends_it() -> None:
    agent = running(snapshot([ONE]))
    agent.change(SessionGranted(key(1), grant("s-1", 1, lasts=5.0)), after(10))
    assert gone(agent)


def test_max_lifetime_counts_from_granted_at_and_renewals_do_not_move_it() -> None:
    agent = running(
        snapshot([peer(1, session=grant("s-1", 1, granted_at=CORE - 50.0))]), limits=Limits(120.0)
    )
    agent.change(
        SessionGranted(key(1), grant("s-1", 1, granted_at=CORE - 50.0, expires_at=CORE + 1e6)), after(10)
    )
    agent.tick(after(69.9))
    assert not gone(agent)
    agent.tick(after(70))
    assert gone(agent)


@pytest.mark.parametrize("how", ["core", "snapshot", "configuration"])
def test_lowered_ceilings_apply_to_live_sessions(how: str) -> None:
    agent = running(snapshot([ONE]))
    lowered = SessionPolicy(max_lifetime=40.0)
    match how:
        case "core":
            agent.change(location_changed(policy=lowered), after(10))
        case "snapshot":
            agent.load(snapshot([ONE], revision=2, policy=lowered), after(10))
        case _:
            agent.state.configure(Limits(max_lifetime=40.0), after(10))
            agent.reconcile(after(10))
    assert agent.state.sessions[key(1)].deadline == Deadline(NOW.boot + 40.0, NOW.wall + 40.0)
    agent.tick(after(40))
    assert gone(agent)


def test_ceilings_lowered_below_a_sessions_age_end_it_at_once() -> None:
    agent = running(snapshot([ONE]))
    agent.change(location_changed(policy=SessionPolicy(max_lifetime=5.0)), after(10))
    assert gone(agent)
    assert [e.reason for e in agent.reported] == [EndReason.EXPIRED]


def test_raised_ceilings_extend_no_live_session() -> None:
    agent = running(snapshot([ONE], policy=SessionPolicy(max_lifetime=50.0)))
    agent.change(location_changed(), after(10))
    agent.load(snapshot([ONE], revision=9), after(11))
    agent.tick(after(50))
    assert gone(agent)


def test_the_stricter_of_two_ceilings_wins() -> None:
    for limits, policy in (
        (Limits(60.0), SessionPolicy(max_lifetime=80.0)),
        (Limits(80.0), SessionPolicy(max_lifetime=60.0)),
    ):
        agent = running(snapshot([ONE], policy=policy), limits=limits)
        assert agent.state.sessions[key(1)].ends_at == CORE + 60.0


def test_core_lost_ends_all_sessions_and_leaves_other_peers() -> None:
    agent = running(snapshot([ONE, peer(2, mfa_exempt=True)]))
    agent.state.core_lost(after(5))
    agent.reconcile(after(5))
    assert set(agent.kernel.peers) == {key(2)}
    assert [e.reason for e in agent.reported] == [EndReason.CORE_LOST]


def test_the_next_wait_is_never_later_than_the_earliest_deadline() -> None:
    agent = running(snapshot())
    assert agent.state.next_wait(NOW) is None
    agent.change(PeerUpserted(ONE), after(0))
    assert agent.state.next_wait(after(10)) == 90.0
    assert agent.state.next_wait(after(10, step=60.0)) == 30.0
    assert agent.state.next_wait(after(200)) == 0.0


def test_many_renewals_leave_no_heap_of_old_deadlines() -> None:
    agent = running(snapshot([ONE, peer(2, session=grant("s-2", 2, lasts=300.0))]))
    for n in range(500):
        agent.change(SessionGranted(key(1), grant("s-1", 1, lasts=200.0 + n)), after(1 + n / 1000))
    assert len(agent.state._deadlines) < 100
    agent.tick(after(299.9))
    assert key(2) in agent.kernel.peers
    agent.tick(after(300))
    assert key(2) not in agent.kernel.peers
    agent.tick(after(698.9))
    assert not gone(agent)
    agent.tick(after(699))
    assert gone(agent)


def test_a_grant_that_was_dead_on_arrival_is_reported_and_refused_from_then_on() -> None:
    stale = grant("s-1", 1, granted_at=CORE - 100.0, lasts=50.0)
    agent = running(snapshot([peer(1, session=stale)]))
    assert [(e.session_id, e.reason) for e in agent.reported] == [("s-1", EndReason.EXPIRED)]
    agent.load(snapshot([peer(1, session=stale)], revision=2), after(1))
    assert agent.state.roster.refused == {key(1): Refusal.SESSION_ENDED}
    assert len(agent.reported) == 1
