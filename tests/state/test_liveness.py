from agent.model import EndReason, PeerUpserted, SessionGranted, SessionPolicy
from agent.sessions import Limits
from tests.support.builders import after, grant, key, location_changed, peer, psk, snapshot
from tests.support.kernel_model import Kernel
from tests.support.pure_agent import PureAgent, running

GRANTED = peer(1, session=grant("s-1", 1))


def ended(agent: PureAgent) -> list[EndReason]:
    return [end.reason for end in agent.reported]


def connected() -> PureAgent:
    agent = running(snapshot([GRANTED]))
    agent.kernel.handshake(key(1), psk(1), "s-1", after(10))
    agent.observe(after(10))
    return agent


def test_a_client_that_never_connects_is_ended_connect_timeout_after_its_peer_was_added() -> None:
    agent = running(snapshot([GRANTED]))
    agent.kernel.knock(key(1))
    agent.observe(after(179))
    assert ended(agent) == []
    agent.kernel.knock(key(1))
    agent.observe(after(180))
    assert (ended(agent), agent.kernel.peers) == ([EndReason.NEVER_CONNECTED], {})


def test_who_was_refused_meanwhile_has_to_connect_anew_by_the_grant_that_lets_it_in_again() -> None:
    agent = connected()
    agent.change(PeerUpserted(peer(2, session=grant("s-1", 1))), after(20))
    assert agent.kernel.peers == {}
    agent.change(SessionGranted(key(1), grant("s-2", 2)), after(30))
    agent.observe(after(209))
    assert ended(agent) == [EndReason.REPLACED]
    agent.observe(after(210))
    assert ended(agent) == [EndReason.REPLACED, EndReason.NEVER_CONNECTED]


def test_idle_ends_at_the_first_look_after_the_timeout() -> None:
    agent = connected()
    agent.tick(after(400))
    agent.observe(after(309))
    assert ended(agent) == []
    agent.observe(after(310))
    assert (ended(agent), agent.kernel.peers) == ([EndReason.IDLE], {})


def test_traffic_under_a_young_handshake_keeps_a_session_alive() -> None:
    agent = connected()
    for seconds in (60, 120, 185):
        assert agent.kernel.send(key(1), 500, after(seconds))
        agent.observe(after(seconds))
    agent.observe(after(484))
    assert ended(agent) == []
    agent.observe(after(485))
    assert ended(agent) == [EndReason.IDLE]


def test_bytes_of_a_client_without_the_psk_keep_nothing_alive() -> None:
    agent = connected()
    for seconds in range(195, 311, 5):
        agent.kernel.knock(key(1))
        agent.observe(after(seconds))
    assert ended(agent) == [EndReason.IDLE]


def test_growing_tx_is_no_sign_of_life() -> None:
    agent = connected()
    for seconds in range(20, 311, 10):
        agent.kernel.peers[key(1)].tx_bytes += 148
        agent.observe(after(seconds))
    assert ended(agent) == [EndReason.IDLE]


def test_an_in_place_update_does_not_restart_never_connected() -> None:
    agent = running(snapshot([GRANTED]))
    agent.change(SessionGranted(key(1), grant("s-1", 5, lasts=7200.0)), after(100))
    agent.change(SessionGranted(key(1), grant("s-2", 6)), after(150))
    agent.observe(after(180))
    assert ended(agent) == [EndReason.REPLACED, EndReason.NEVER_CONNECTED]


def test_an_add_restarts_the_count() -> None:
    agent = running(snapshot([GRANTED, peer(2)]))
    agent.change(PeerUpserted(peer(2, "10.8.0.1")), after(100))
    agent.observe(after(200))
    agent.change(PeerUpserted(peer(2)), after(210))
    agent.observe(after(389))
    assert ended(agent) == []
    agent.observe(after(390))
    assert ended(agent) == [EndReason.NEVER_CONNECTED]


def test_nobody_is_ended_for_want_of_life_while_kept_off_the_interface() -> None:
    agent = running(snapshot([GRANTED, peer(2, "10.8.0.1")]))
    agent.observe(after(3000))
    assert ended(agent) == []
    failing = running(snapshot([GRANTED]))
    failing.kernel.reboot()
    failing.state.observe(Kernel().read(), after(3000))
    assert failing.state.ends == []


def test_with_liveness_core_the_agent_ends_nobody_for_want_of_life() -> None:
    agent = running(snapshot([GRANTED], policy=SessionPolicy(liveness="core")))
    agent.observe(after(3599))
    assert ended(agent) == []
    agent.change(location_changed(), after(3599.5))
    agent.observe(after(3599.5))
    assert ended(agent) == [EndReason.NEVER_CONNECTED]


def test_lowered_timeouts_of_the_configuration_hold_at_the_next_look() -> None:
    agent = connected()
    agent.state.configure(Limits(idle_timeout=20.0), after(15))
    agent.observe(after(29))
    assert ended(agent) == []
    agent.observe(after(30))
    assert ended(agent) == [EndReason.IDLE]


def test_an_idle_timeout_that_is_shorter_than_the_first_one_holds_from_the_first_sign_on() -> None:
    agent = running(snapshot([GRANTED]))
    agent.state.configure(Limits(idle_timeout=60.0, connect_timeout=600.0), after(1))
    agent.observe(after(2))
    agent.kernel.handshake(key(1), psk(1), "s-1", after(10))
    agent.observe(after(10))
    agent.observe(after(69))
    assert ended(agent) == []
    agent.observe(after(70))
    assert ended(agent) == [EndReason.IDLE]


def test_a_peer_that_needs_no_session_is_never_idle() -> None:
    agent = running(snapshot([peer(1, mfa_exempt=True, session=grant("s-1", 1))]))
    agent.observe(after(3000))
    assert (ended(agent), set(agent.kernel.peers)) == ([], {key(1)})


def test_a_look_tells_who_changed_and_journals_signs_of_life() -> None:
    agent = running(snapshot([GRANTED, peer(2, mfa_exempt=True)]))
    assert agent.state.observe(agent.kernel.read(), after(1)) == []
    agent.kernel.handshake(key(1), psk(1), "s-1", after(2))
    agent.kernel.handshake(key(2), None, "static", after(2))
    assert agent.state.observe(agent.kernel.read(), after(3)) == [key(1), key(2)]
    assert list(agent.state.to_journal) == [key(1)]


def test_a_client_gets_its_keepalive_once_it_has_an_endpoint() -> None:
    agent = running(snapshot([peer(1, session=grant("s-1", 1), persistent_keepalive=25)]))
    assert agent.kernel.peers[key(1)].persistent_keepalive == 0
    agent.kernel.handshake(key(1), psk(1), "s-1", after(2))
    agent.observe(after(3))
    assert agent.kernel.peers[key(1)].persistent_keepalive == 25
    assert agent.kernel.working_tunnels(key(1), after(3))
