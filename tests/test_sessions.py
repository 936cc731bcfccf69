import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.model import EndReason, Grant, Now, PresharedKey, SessionPolicy
from agent.sessions import (
    Ceilings,
    CoreClock,
    Deadline,
    DeadlineQueue,
    Limits,
    Liveness,
    Session,
    anchor,
    begin,
    hard_end,
)
from tests.support.builders import CORE, NOW, after, grant, key, psk

DAY = 86400.0


def session(*, lasts: float = 3600.0, max_lifetime: float = DAY, core_time: float = CORE) -> Session:
    return begin(
        key(1),
        grant("s-1", 1, lasts=lasts),
        max_lifetime=max_lifetime,
        core_time=core_time,
        now=NOW,
        in_use=True,
        base=(5, 7),
    )


def test_a_grant_is_anchored_to_both_clocks_with_the_same_remainder() -> None:
    assert anchor(CORE + 60.0, CORE, NOW) == Deadline(NOW.boot + 60.0, NOW.wall + 60.0)
    assert session(core_time=CORE + 600.0).deadline == Deadline(NOW.boot + 3000.0, NOW.wall + 3000.0)


def test_a_session_begins_with_what_its_grant_and_its_peers_counters_say() -> None:
    begun = session(core_time=CORE + 600.0)
    assert (begun.id, begun.public_key, begun.preshared_key) == ("s-1", key(1), psk(1))
    assert (begun.granted_at, begun.expires_at, begun.in_use) == (CORE, CORE + 3600.0, True)
    assert (begun.base_rx, begun.base_tx) == (5, 7)


def test_the_same_grant_again_changes_nothing() -> None:
    held = session()
    assert held.renewed(grant("s-1", 1), 60.0, CORE + 5000.0, after(10.0, step=-9999.0)) is held


def test_the_clock_that_is_earlier_counts() -> None:
    deadline = Deadline(NOW.boot + 60.0, NOW.wall + 60.0)
    for now, passed, remaining in (
        (after(59.0), False, 1.0),
        (after(60.0), True, 0.0),
        (after(10.0, step=50.0), True, 0.0),
        (after(60.0, step=-1000.0), True, 0.0),
        (after(59.0, step=-1000.0), False, 1.0),
        (after(10.0, step=49.0), False, 1.0),
    ):
        assert (deadline.passed(now), deadline.remaining(now)) == (passed, remaining)


def test_a_boot_deadline_of_another_boot_does_not_count() -> None:
    deadline = Deadline(None, NOW.wall + 60.0)
    assert not deadline.passed(Now(boot=1e9, wall=NOW.wall + 59.0))
    assert deadline.passed(Now(boot=0.0, wall=NOW.wall + 60.0))
    assert deadline.remaining(Now(boot=1e9, wall=NOW.wall)) == 60.0
    assert deadline.earlier_by(10.0) == Deadline(None, NOW.wall + 50.0)


def test_a_grant_that_core_gives_no_date_begins_when_it_is_first_seen() -> None:
    undated = Grant("s-1", psk(1), None, CORE + DAY)
    begun = begin(
        key(1), undated, max_lifetime=600.0, core_time=CORE + 10.0, now=after(10.0), in_use=True, base=(0, 0)
    )
    assert (begun.granted_at, begun.ends_at) == (CORE + 10.0, CORE + 610.0)
    # Shown again later, it is no younger.
    again = begun.renewed(replace(undated, expires_at=CORE + 2 * DAY), 600.0, CORE + 300.0, after(300.0))
    assert (again.granted_at, again.ends_at) == (CORE + 10.0, CORE + 610.0)


def test_the_digest_of_a_psk_that_nobody_knows_is_no_psks() -> None:
    restored = replace(session(), preshared_key=None, journalled_digest=psk(2).digest())
    assert restored.psk_digest == psk(2).digest()
    assert replace(restored, journalled_digest=None).psk_digest == b""


def test_cores_time_is_server_time_and_boot_time_since_the_request_was_sent() -> None:
    clock = CoreClock(server_time=CORE, requested_at=NOW.boot - 2.0)
    assert clock.at(NOW) == CORE + 2.0
    assert clock.at(after(8.0, step=-3600.0)) == CORE + 10.0


def test_max_lifetime_counts_from_granted_at() -> None:
    late = grant("s-1", 1, granted_at=CORE - 100.0, expires_at=CORE + DAY)
    assert hard_end(late, CORE - 100.0, 150.0, CORE) == CORE + 50.0
    assert hard_end(late, CORE - 100.0, DAY * 2, CORE) == CORE + DAY


def test_of_two_ceilings_the_stricter_wins() -> None:
    limits = Limits(max_lifetime=100.0, idle_timeout=20.0, connect_timeout=30.0)
    assert limits.with_policy(SessionPolicy()) == Ceilings(100.0, 20.0, 30.0)
    assert limits.with_policy(SessionPolicy(10.0, 40.0, 90.0)) == Ceilings(90.0, 10.0, 30.0)


def test_with_liveness_core_neither_idle_nor_connect_timeout_is_applied() -> None:
    ceilings = Limits().with_policy(SessionPolicy(10.0, 40.0, 90.0, liveness="core"))
    assert ceilings == Ceilings(90.0, None, None)
    assert Liveness(added_at=0.0).lapsed(ceilings, NOW) is None
    assert Liveness(0.0, 1.0, 0.0, 0.0).lapsed(ceilings, NOW) is None


def test_a_deadline_moves_only_when_expires_at_does() -> None:
    held = session()
    again = held.renewed(grant("s-1", 2), DAY, CORE + 5000.0, after(10.0, step=-9999.0))
    assert again.deadline == held.deadline
    assert again.preshared_key == psk(2)
    assert again.psk_digest == psk(2).digest()
    assert again.former_digest == psk(1).digest()
    assert again.renewed(grant("s-1", 2, lasts=60.0), DAY, CORE, NOW).former_digest == psk(1).digest()
    longer = held.renewed(grant("s-1", 2, lasts=7200.0), DAY, CORE + 10.0, after(10.0))
    assert longer.deadline == Deadline(NOW.boot + 7200.0, NOW.wall + 7200.0)
    shorter = held.renewed(grant("s-1", 2, lasts=60.0), DAY, CORE + 10.0, after(10.0))
    assert shorter.deadline == Deadline(NOW.boot + 60.0, NOW.wall + 60.0)


def test_a_renewal_does_not_move_max_lifetime() -> None:
    held = session(max_lifetime=4000.0)
    renewed = held.renewed(grant("s-1", 1, lasts=99_999.0), 4000.0, CORE + 10.0, after(10.0))
    assert renewed.ends_at == CORE + 4000.0
    assert renewed.granted_at == CORE


def test_core_naming_a_session_of_another_boot_gives_it_a_boot_deadline_beside_the_walls() -> None:
    held = replace(session(), deadline=Deadline(None, NOW.wall + 100.0))
    now = Now(boot=3.0, wall=NOW.wall + 50.0)
    again = held.renewed(grant("s-1", 1), DAY, CORE + 600.0, now)
    assert again.deadline == Deadline(3.0 + 3000.0, NOW.wall + 100.0)


def test_lowered_ceilings_shorten_and_raised_ones_change_nothing() -> None:
    held = session()
    assert held.lowered(DAY) is held
    lowered = held.lowered(600.0)
    assert lowered.ends_at == CORE + 600.0
    assert lowered.deadline == Deadline(NOW.boot + 600.0, NOW.wall + 600.0)
    assert lowered.lowered(DAY) is lowered


def test_a_session_knows_cores_time_without_core() -> None:
    assert session().core_time(after(100.0)) == CORE + 100.0


# Signs of life.

CEILINGS = Ceilings(max_lifetime=DAY, idle_timeout=300.0, connect_timeout=180.0)


def test_a_changed_handshake_is_a_sign_of_life() -> None:
    life = Liveness(NOW.boot).observed(CORE, rx_grew=False, now=after(5.0))
    assert life == Liveness(NOW.boot, CORE, NOW.boot + 5.0, NOW.boot + 5.0)
    assert life.observed(CORE + 120.0, rx_grew=False, now=after(130.0)).last_sign_at == NOW.boot + 130.0


def test_the_same_handshake_again_is_none() -> None:
    life = Liveness(NOW.boot).observed(CORE, rx_grew=False, now=after(5.0))
    assert life.observed(CORE, rx_grew=False, now=after(10.0)) is life


def test_a_handshake_that_the_kernel_has_forgotten_is_none() -> None:
    """Somebody has removed the peer and added it again."""
    life = Liveness(NOW.boot).observed(CORE, rx_grew=False, now=after(5.0))
    assert life.observed(0.0, rx_grew=False, now=after(10.0)) is life


@pytest.mark.parametrize(("seconds", "counts"), [(1.0, True), (179.9, True), (180.0, False), (500.0, False)])
def test_growing_rx_is_a_sign_only_within_180_s_of_the_last_handshake_change(
    seconds: float, counts: bool
) -> None:
    life = Liveness(NOW.boot).observed(CORE, rx_grew=True, now=NOW)
    later = life.observed(CORE, rx_grew=True, now=after(seconds))
    assert later.last_sign_at == (NOW.boot + seconds if counts else NOW.boot)


def test_a_client_without_the_psk_shows_no_life_however_much_it_sends() -> None:
    life = Liveness(NOW.boot)
    assert life.observed(0.0, rx_grew=True, now=after(10.0)) is life


def test_never_connected_counts_from_when_the_peer_was_added() -> None:
    life = Liveness(NOW.boot)
    assert life.lapsed(CEILINGS, after(179.0)) is None
    assert life.lapsed(CEILINGS, after(180.0)) is EndReason.NEVER_CONNECTED


def test_idle_counts_from_the_last_sign_or_the_adding_whichever_is_later() -> None:
    life = Liveness(NOW.boot).observed(CORE, rx_grew=False, now=after(100.0))
    assert life.lapsed(CEILINGS, after(399.0)) is None
    assert life.lapsed(CEILINGS, after(400.0)) is EndReason.IDLE
    readded = replace(life, added_at=NOW.boot + 350.0)
    assert readded.lapsed(CEILINGS, after(649.0)) is None
    assert readded.lapsed(CEILINGS, after(650.0)) is EndReason.IDLE


def test_a_stepped_wall_clock_has_no_say_in_signs_of_life() -> None:
    life = Liveness(NOW.boot)
    assert life.lapsed(CEILINGS, after(10.0, step=9999.0)) is None
    assert life.lapsed(CEILINGS, after(180.0, step=-9999.0)) is EndReason.NEVER_CONNECTED


# The queue of deadlines.


def test_the_wait_is_to_the_earliest_deadline_on_either_clock() -> None:
    queue = DeadlineQueue()
    assert queue.wait(NOW) is None
    queue.put(key(1), Deadline(NOW.boot + 50.0, NOW.wall + 90.0))
    queue.put(key(2), Deadline(None, NOW.wall + 30.0))
    assert queue.wait(NOW) == 30.0
    assert queue.wait(after(20.0, step=-1000.0)) == 30.0
    assert queue.wait(after(99.0)) == 0.0


def test_a_queue_built_anew_holds_what_it_is_given_and_nothing_else() -> None:
    queue = DeadlineQueue()
    queue.put(key(1), Deadline(NOW.boot + 1.0, NOW.wall + 1.0))
    queue.rebuild({key(2): Deadline(None, NOW.wall + 9.0), key(3): Deadline(NOW.boot + 5.0, NOW.wall + 7.0)})
    assert len(queue) == 2
    assert queue.due(after(1.0)) == set()
    assert queue.due(after(5.0)) == {key(3)}
    assert queue.due(after(9.0)) == {key(2), key(3)}


def test_many_that_are_due_at_once_come_out_once_and_nobody_else_with_them() -> None:
    queue = DeadlineQueue()
    for number in range(1, 301):
        queue.put(key(number), Deadline(NOW.boot + number, NOW.wall + number))
    assert queue.due(after(250.0)) == {key(number) for number in range(1, 251)}
    assert queue.due(after(250.0)) == set()
    assert (len(queue), queue.wait(after(250.0))) == (50, 1.0)


@pytest.mark.parametrize("step", [-1000.0, 1000.0])
def test_a_queue_built_anew_gives_the_earliest_first_in_whatever_order_it_was_given(step: float) -> None:
    """On boot time alone where the wall clock was set back, on the wall's where it was set forward."""
    far = 2000.0
    queue = DeadlineQueue()
    boot, wall = (far, NOW.wall + step) if step > 0 else (NOW.boot, far + NOW.wall)
    lives = {key(1): 9.0, key(2): 5.0, key(3): 7.0}
    queue.rebuild({who: Deadline(boot + seconds, wall + seconds) for who, seconds in lives.items()})
    assert queue.wait(after(0.0, step)) == 5.0
    for seconds, due in ((4.0, set()), (5.0, {key(2)}), (7.0, {key(3)}), (9.0, {key(1)})):
        assert queue.due(after(seconds, step)) == due


@given(
    st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(0, 20), st.integers(0, 20)), max_size=20),
    st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 5)), max_size=10),
)
def test_no_passed_deadline_stays_in_the_queue(
    deadlines: list[tuple[int, int | None, int]], steps: list[tuple[int, int]]
) -> None:
    queue, left = DeadlineQueue(), []
    for number, boot, wall in deadlines:
        deadline = Deadline(None if boot is None else float(boot), float(wall))
        queue.put(key(number), deadline)
        left.append((key(number), deadline))
    now = Now(0.0, 0.0)
    for seconds, step in steps:
        now = Now(now.boot + seconds, now.wall + seconds + step)
        due = queue.due(now)
        assert due >= {who for who, deadline in left if deadline.passed(now)}
        left = [(who, deadline) for who, deadline in left if not deadline.passed(now)]
        wait = queue.wait(now)
        if left:
            assert wait is not None
            assert wait <= min(deadline.remaining(now) for _, deadline in left)


def test_a_psk_is_32_bytes_not_all_zero_and_shows_nothing() -> None:
    for raw in (bytes(32), b"\x01" * 31, b"\x01" * 33, b""):
        with pytest.raises(ValueError):
            PresharedKey(raw)
    secret = PresharedKey(b"secretsecretsecretsecretsecretse")
    assert "secret" not in repr(secret)
    assert "secret" not in repr(grant("s", 1)) + str(secret)


def test_a_grant_dated_in_the_future_does_not_put_off_the_ceiling() -> None:
    dated = grant("s-1", 1, granted_at=CORE + 10 * DAY, expires_at=CORE + 20 * DAY)
    assert hard_end(dated, CORE + 10 * DAY, DAY, CORE) == CORE + DAY
