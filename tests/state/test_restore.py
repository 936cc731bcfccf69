from contextlib import suppress
from dataclasses import replace

import pytest

from agent.model import (
    EndReason,
    Now,
    PeerRemoved,
    PeerUpserted,
    PresharedKey,
    RemovePeer,
    SessionGranted,
    SessionPolicy,
    SessionRevoked,
)
from agent.sessions import Ceilings, Deadline, Limits
from tests.support.builders import CORE, NOW, after, grant, key, peer, prefixes, psk, snapshot
from tests.support.kernel_model import Kernel, KernelPeer
from tests.support.pure_agent import Crashed, Journal, PureAgent, restarted, running

LISTED = [
    peer(1, session=grant("s-1", 1)),
    peer(2, session=grant("s-2", 2, lasts=600.0)),
    peer(3),
    peer(4, mfa_exempt=True),
    peer(5, mfa_exempt=True, preshared_key=psk(5)),
]


def stays(agent: PureAgent) -> dict[bytes, int]:
    return {k: p.incarnation for k, p in agent.kernel.peers.items()}


def test_a_restart_touches_nobody() -> None:
    agent = running(snapshot(LISTED))
    before = stays(agent)
    again = restarted(agent, after(5))
    assert stays(again) == before
    assert again.load(snapshot(LISTED, server_time=CORE + 5.0, requested_at=after(5).boot), after(5)) == []
    assert stays(again) == before
    assert set(again.state.sessions) == {key(1), key(2)}


def test_deadlines_survive_a_restart() -> None:
    agent = running(snapshot(LISTED))
    again = restarted(agent, after(5, step=-4000.0))
    assert {k: s.deadline for k, s in again.state.sessions.items()} == {
        k: s.deadline for k, s in agent.state.sessions.items()
    }
    again.tick(after(600, step=-4000.0))
    assert key(2) not in again.kernel.peers
    assert [(e.session_id, e.reason) for e in again.reported] == [("s-2", EndReason.EXPIRED)]


def test_on_start_what_is_past_its_deadline_ends_before_anything_is_adopted() -> None:
    agent = running(snapshot(LISTED, policy=SessionPolicy(liveness="core")))
    again = restarted(agent, after(700))
    assert set(again.kernel.peers) == {key(1), key(4), key(5)}
    assert [(e.session_id, e.reason, e.ended_at) for e in again.reported] == [
        ("s-2", EndReason.EXPIRED, CORE + 600.0)
    ]


def test_a_boot_deadline_of_another_boot_is_void_and_the_walls_holds() -> None:
    agent = running(snapshot(LISTED))
    again = restarted(agent, Now(boot=3.0, wall=CORE + 100.0), reboot=True)
    assert again.state.sessions[key(2)].deadline == Deadline(None, CORE + 600.0)
    again.tick(Now(boot=503.0, wall=CORE + 600.0))
    assert set(again.state.sessions) == {key(1)}


def test_a_session_of_another_boot_gains_a_boot_deadline_from_the_first_state() -> None:
    agent = running(snapshot(LISTED))
    now = Now(boot=3.0, wall=CORE + 100.0)
    again = restarted(agent, now, reboot=True)
    again.load(snapshot(LISTED, server_time=CORE + 100.0, requested_at=3.0), now)
    assert again.state.sessions[key(2)].deadline == Deadline(503.0, CORE + 600.0)
    assert again.state.renewed == {}
    assert again.kernel.peers[key(2)].preshared_key == psk(2)


def test_after_a_reboot_a_peer_with_a_static_psk_waits_for_core_and_one_without_does_not() -> None:
    agent = running(snapshot(LISTED))
    again = restarted(agent, Now(boot=3.0, wall=CORE + 100.0), reboot=True)
    assert set(again.kernel.peers) == {key(4)}


# What is taken over.


@pytest.mark.parametrize(
    "found",
    [
        KernelPeer(77, psk(9), set(prefixes("10.8.0.1"))),
        KernelPeer(77, None, set(prefixes("10.8.0.1"))),
        KernelPeer(77, psk(1), set()),
    ],
    ids=["another psk", "no psk", "cut"],
)
def test_an_mfa_peer_is_adopted_only_with_the_journalled_psk_and_allowed_ips(found: KernelPeer) -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.peers[key(1)] = found
    again = restarted(agent, after(5))
    assert key(1) not in again.kernel.peers
    again.load(snapshot(LISTED, server_time=CORE + 6.0, requested_at=after(6).boot), after(6))
    held = again.kernel.peers[key(1)]
    assert (held.preshared_key, held.allowed_ips) == (psk(1), set(prefixes("10.8.0.1")))
    assert held.incarnation != 77


def test_an_mfa_peer_that_is_not_journalled_is_removed() -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.peers[key(3)] = KernelPeer(77, psk(3), set(prefixes("10.8.0.3")))
    agent.kernel.peers[key(9)] = KernelPeer(78, None, set(prefixes("10.8.0.9")))
    again = restarted(agent, after(5))
    assert set(again.kernel.peers) == {key(1), key(2), key(4), key(5)}


def test_an_adopted_peer_whose_allowed_ips_drifted_meanwhile_is_put_right_in_place() -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.peers[key(1)].allowed_ips = set(prefixes("10.9.9.0/24"))
    stay = agent.kernel.peers[key(1)].incarnation
    again = restarted(agent, after(5))
    held = again.kernel.peers[key(1)]
    assert (held.incarnation, held.allowed_ips) == (stay, set(prefixes("10.8.0.1")))


def test_with_neither_journal_nor_state_nothing_is_touched_until_the_first_state() -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.peers[key(9)] = KernelPeer(78, None, set(prefixes("10.8.0.9")))
    before = stays(agent)
    again = PureAgent(agent.kernel, Journal())
    assert again.start(after(5)) == []
    assert again.tick(after(6)) == []
    assert stays(again) == before
    again.load(snapshot(LISTED, server_time=CORE + 7.0, requested_at=after(7).boot), after(7))
    assert stays(again) == {k: stay for k, stay in before.items() if k != key(9)}


def test_without_a_journal_who_was_found_goes_when_the_guards_element_does() -> None:
    """On the clock that gets there first; of whom the table knows no session is left until core speaks."""
    for end in (after(65), after(20, step=45.0), after(65, step=-1000.0)):
        agent = running(snapshot(LISTED))
        again = PureAgent(agent.kernel, Journal())
        assert again.start(after(5), {key(1): 60.0, key(2): 0.0}) == [RemovePeer(key(2))]
        assert again.tick(after(19)) == []
        assert again.state.next_wait(after(19)) == 46.0
        assert again.tick(end) == [RemovePeer(key(1))]
        assert set(again.kernel.peers) == {key(4), key(5)}


def test_without_a_journal_many_who_were_found_all_go_when_their_elements_do() -> None:
    """However often the queue of deadlines is built anew."""
    agent = running(snapshot([peer(n, session=grant(f"s-{n}", n)) for n in range(1, 101)]))
    again = PureAgent(agent.kernel, Journal())
    again.start(after(5), {key(n): 60.0 + n % 2 for n in range(1, 101)})
    again.tick(after(65))
    assert set(again.kernel.peers) == {key(n) for n in range(1, 101, 2)}
    again.tick(after(66))
    assert again.kernel.peers == {}


def test_without_a_journal_who_was_found_in_a_session_goes_when_core_was_away_for_too_long() -> None:
    agent = running(snapshot(LISTED))
    again = PureAgent(agent.kernel, Journal())
    again.start(after(5), {key(1): 600.0})
    assert again.core_lost(after(30)) == [RemovePeer(key(1))]


def test_with_a_journal_or_cores_word_the_guards_elements_say_nothing_about_who_was_found() -> None:
    agent = running(snapshot(LISTED))
    again = restarted(agent, after(5))
    before = stays(again)
    again = PureAgent(agent.kernel, agent.journal)
    assert again.start(after(6), {key(1): 60.0, key(5): 0.0}) == []
    again.tick(after(66))
    assert stays(again) == before
    lost = PureAgent(agent.kernel, Journal())
    lost.start(after(70), {key(1): 60.0})
    lost.load(snapshot(LISTED, server_time=CORE + 71.0, requested_at=after(71).boot), after(71))
    lost.tick(after(140))
    assert stays(lost) == before


def test_without_mfa_what_was_found_is_left_until_the_first_state_which_removes_strangers() -> None:
    listed = [peer(1), peer(2, preshared_key=psk(2))]
    agent = running(snapshot(listed, mfa_required=False))
    agent.kernel.peers[key(9)] = KernelPeer(78, psk(9), set(prefixes("10.8.0.9")))
    before = stays(agent)
    again = restarted(agent, after(5))
    assert stays(again) == before
    again.load(snapshot(listed, mfa_required=False), after(6))
    assert stays(again) == {k: stay for k, stay in before.items() if k != key(9)}


def test_without_mfa_the_peer_of_a_session_that_ended_meanwhile_is_not_left_as_found() -> None:
    """A session running at the switch keeps its PSK until it ends, and no longer."""
    agent = running(snapshot([peer(1, session=grant("s-1", 1)), peer(2)]))
    agent.load(
        snapshot([peer(1, session=grant("s-1", 1)), peer(2)], mfa_required=False, revision=2), after(1)
    )
    assert agent.kernel.peers[key(1)].preshared_key == psk(1)
    again = restarted(agent, after(3600))
    assert again.kernel.peers[key(1)].preshared_key is None
    assert [e.session_id for e in again.reported] == ["s-1"]


def test_without_mfa_a_running_session_ends_on_time_before_the_first_state_too() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1))]))
    agent.load(snapshot([peer(1, session=grant("s-1", 1))], mfa_required=False, revision=2), after(1))
    stay = agent.kernel.peers[key(1)].incarnation
    again = restarted(agent, after(5))
    assert again.kernel.peers[key(1)].incarnation == stay
    again.tick(after(3600))
    assert again.kernel.peers[key(1)].preshared_key is None


def test_an_expired_session_ends_even_if_the_journal_holds_no_list() -> None:
    """Killed between the first grant's row and the list's."""
    agent = running(snapshot(LISTED))
    agent.journal.location = None
    agent.journal.peers.clear()
    again = restarted(agent, after(5))
    assert {key(1), key(2)} <= set(again.kernel.peers)
    again.tick(after(600))
    assert key(1) in again.kernel.peers
    assert key(2) not in again.kernel.peers


def test_a_live_journalled_session_is_not_removed_for_want_of_its_peers_row() -> None:
    agent = running(snapshot(LISTED))
    del agent.journal.peers[key(1)]
    stay = agent.kernel.peers[key(1)].incarnation
    again = restarted(agent, after(5))
    assert again.kernel.peers[key(1)].incarnation == stay
    again.load(snapshot(LISTED, server_time=CORE + 7.0, requested_at=after(7).boot), after(7))
    assert again.kernel.peers[key(1)].incarnation == stay


# What the first state finds.


def test_what_core_revoked_while_the_agent_was_down_ends_at_the_first_state() -> None:
    agent = running(snapshot(LISTED))
    again = restarted(agent, after(5))
    listed = [peer(1), *LISTED[1:]]
    again.load(snapshot(listed, revision=9, server_time=CORE + 6.0, requested_at=after(6).boot), after(6))
    assert key(1) not in again.kernel.peers
    assert [(e.session_id, e.reason) for e in again.reported] == [("s-1", EndReason.REVOKED)]


def test_ended_ids_stay_dead_across_restarts_and_epochs() -> None:
    agent = running(snapshot(LISTED))
    agent.state.end(None, after(1))
    agent.reconcile(after(1))
    for reboot in (False, True):
        agent = restarted(agent, after(5), reboot=reboot)
        agent.load(snapshot(LISTED, epoch=f"e-{reboot}"), after(6))
        assert set(agent.kernel.peers) == {key(4), key(5)}


def test_mfa_switched_on_while_the_agent_was_down_removes_and_adds_survivors() -> None:
    listed = [peer(1, session=grant("s-1", 1)), peer(2), peer(4, mfa_exempt=True)]
    agent = running(snapshot(listed, mfa_required=False))
    before = stays(agent)
    again = restarted(agent, after(5))
    assert stays(again) == before
    again.load(snapshot(listed, server_time=CORE + 6.0, requested_at=after(6).boot), after(6))
    assert set(again.kernel.peers) == {key(1), key(4)}
    assert again.kernel.peers[key(1)].incarnation != before[key(1)]
    assert again.kernel.peers[key(4)].incarnation == before[key(4)]


def test_a_psk_renewed_while_the_agent_was_down_is_updated_in_place() -> None:
    agent = running(snapshot(LISTED))
    before = stays(agent)
    again = restarted(agent, after(5))
    renewed = [peer(1, session=grant("s-1", 11)), *LISTED[1:]]
    again.load(snapshot(renewed, revision=2), after(6))
    assert again.kernel.peers[key(1)].preshared_key == psk(11)
    assert stays(again) == before


def test_ceilings_lowered_in_the_configuration_hold_for_restored_sessions() -> None:
    agent = running(snapshot(LISTED))
    lowered = Limits(max_lifetime=300.0)
    again = restarted(agent, after(5), limits=lowered)
    assert again.state.sessions[key(1)].deadline == Deadline(NOW.boot + 300.0, NOW.wall + 300.0)
    raised = restarted(again, after(6))
    assert raised.state.sessions[key(1)].deadline == Deadline(NOW.boot + 300.0, NOW.wall + 300.0)
    once_more = restarted(again, after(10), limits=lowered)
    once_more.load(snapshot(LISTED, server_time=CORE + 11.0, requested_at=after(11).boot), after(11))
    once_more.tick(after(300))
    assert set(once_more.kernel.peers) == {key(4), key(5)}


def test_lowered_ceilings_of_core_hold_across_a_restart() -> None:
    policy = SessionPolicy(max_lifetime=300.0)
    agent = running(snapshot(LISTED, policy=policy))
    again = restarted(agent, after(5))
    again.load(snapshot(LISTED, revision=2), after(6))
    assert again.state.sessions[key(1)].ends_at == CORE + 300.0


def test_cores_policy_holds_before_its_first_state_whatever_the_configuration_becomes() -> None:
    policy = SessionPolicy(max_lifetime=300.0, liveness="core")
    again = restarted(running(snapshot(LISTED, policy=policy)), after(5))
    again.state.configure(Limits(max_lifetime=900.0), after(6))
    assert again.state.ceilings == Ceilings(300.0, None, None)


# Killed in the middle.


def test_of_two_journalled_sessions_of_a_peer_the_later_holds_and_the_other_has_ended() -> None:
    """Killed after the replacing grant was journalled, before the kernel or the end was."""
    for points, survives in ((2, False), (3, True)):
        agent = running(snapshot([peer(1, session=grant("s-9", 1))]))
        stay = agent.kernel.peers[key(1)].incarnation
        agent.crash_after = points - 1
        with pytest.raises(Crashed):
            agent.change(SessionGranted(key(1), grant("s-2", 2, granted_at=CORE + 5.0)), after(5))
        again = restarted(agent, after(6))
        assert [(e.session_id, e.reason) for e in again.reported] == [("s-9", EndReason.REPLACED)]
        assert again.state.sessions[key(1)].id == "s-2"
        on = again.kernel.peers.get(key(1))
        assert (on is not None and on.preshared_key == psk(2)) == survives
        assert on is None or on.incarnation == stay
        now = again.load(snapshot([peer(1, session=grant("s-2", 2, granted_at=CORE + 5.0))]), after(7))
        assert again.kernel.peers[key(1)].preshared_key == psk(2)
        assert (now == []) == survives
        third = restarted(again, after(8))
        assert third.reported == []


def test_a_kill_at_any_point_of_an_end_leaves_it_ended_or_to_be_ended_again() -> None:
    for change in (SessionRevoked(key(1), "s-1"), PeerRemoved(key(1)), PeerUpserted(peer(1))):
        for points in range(5):
            agent = running(snapshot(LISTED))
            agent.crash_after = points
            with suppress(Crashed):
                agent.change(change, after(5))
            again = restarted(agent, after(6))
            again.load(snapshot(LISTED[1:], server_time=CORE + 7.0, requested_at=after(7).boot), after(7))
            assert key(1) not in again.kernel.peers
            assert {e.session_id for e in again.journal.ends} == {"s-1"}
            assert "s-1" in again.journal.ended


def test_a_restored_session_knows_no_psk_until_it_is_read_back_or_named() -> None:
    agent = running(snapshot(LISTED))
    assert all(s.preshared_key is None for s, _, _ in agent.journal.sessions.values())
    del agent.kernel.peers[key(1)]
    again = restarted(agent, after(5))
    assert again.state.sessions[key(1)].preshared_key is None
    assert again.state.sessions[key(2)].preshared_key == PresharedKey(psk(2).raw)
    assert key(1) not in again.kernel.peers
    again.load(snapshot(LISTED), after(6))
    assert again.kernel.peers[key(1)].preshared_key == psk(1)


def test_signs_of_life_survive_a_restart_and_are_not_reset_by_it() -> None:
    agent = running(snapshot(LISTED))
    agent.kernel.handshake(key(1), psk(1), "s-1", after(10))
    agent.observe(after(20))
    agent.tick(after(21))
    again = restarted(agent, after(100))
    assert again.state.liveness == agent.state.liveness
    again.observe(after(180))
    assert [(e.session_id, e.reason) for e in again.reported] == [("s-2", EndReason.NEVER_CONNECTED)]
    again.observe(after(319))
    assert key(1) in again.kernel.peers
    again.observe(after(320))
    assert again.reported[-1].reason is EndReason.IDLE


def test_a_stay_without_a_record_begins_when_it_is_adopted() -> None:
    agent = running(snapshot(LISTED))
    agent.journal.sessions = {
        row: (session, None, boot) for row, (session, _, boot) in agent.journal.sessions.items()
    }
    again = restarted(restarted(agent, after(100)), after(150))
    assert again.state.liveness[key(1)].added_at == after(100).boot
    again.observe(after(279))
    assert key(1) in again.kernel.peers
    again.observe(after(280))
    assert again.kernel.peers.keys() == {key(4), key(5)}


def test_an_empty_host_with_an_empty_journal_starts_empty() -> None:
    agent = PureAgent(Kernel(), Journal())
    assert agent.start(NOW) == []
    assert agent.state.next_wait(NOW) is None
    assert replace(agent.journal) == Journal()


def test_a_session_restored_without_its_peer_is_in_use_once_its_location_requires_mfa() -> None:
    """The process died between the session's row and its peer's, and MFA was switched on meanwhile."""
    agent = running(snapshot([peer(1, session=grant("s-1", 1))], mfa_required=False))
    journal = agent.journal
    journal.peers.clear()
    again = restarted(agent, after(5))
    again.load(
        snapshot([peer(1, session=grant("s-1", 1))], server_time=CORE + 5.0, requested_at=after(5).boot),
        after(5),
    )
    assert again.state.sessions[key(1)].in_use
    assert again.kernel.peers[key(1)].preshared_key == psk(1)
