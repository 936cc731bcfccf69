"""What an operator is promised, seen by a client that pings through a real tunnel."""

import time
from pathlib import Path

import pytest

from tests.support.scenarios import SLACK, connect, monotonic_of, ping, revoke
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


def test_a_restart_of_the_agent_loses_no_packet_however_it_ended(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        with ping(client) as pings:
            pings.wait_reply()
            site.kill_agent()
            time.sleep(0.5)
            site.start_agent()
            assert site.stop_agent() == 0
            time.sleep(0.5)
            site.start_agent()
            until(lambda: site.peer(client)["state"] == "up")
            pings.wait_reply()
        assert pings.lost == 0
        assert pings.gaps(0.5) == []
        assert len(site.logged("session granted")) == 1


def test_with_core_dead_sessions_run_to_their_deadline_and_no_further(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        session, psk = site.grant(client, lifetime=8)
        site.connect(client, psk)
        deadline = monotonic_of(session.expires_at)
        with ping(client) as pings:
            pings.wait_reply()
            site.core.kill()
            time.sleep(1)
            site.kill_agent()
            site.start_agent(ready=False)
            assert time.monotonic() < deadline - 1
            time.sleep(deadline - time.monotonic())
            last_reply = pings.wait_silence(1.0)
        assert deadline - 1.0 < last_reply < deadline + SLACK
        assert site.status()["core_connected"] is False
        site.core.start()
        ends = until(lambda: site.core.call(site.core.admin.session_ends()), 40)
        assert [(end["session_id"], end["reason"]) for end in ends] == [(session.id, "expired")]


def test_an_ended_session_is_dead_even_if_core_still_lists_it(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        with ping(client) as pings:
            pings.wait_reply()
            ended_at = time.monotonic()
            assert site.end(client) == {"ended": [client.public_key]}
            assert pings.wait_silence(1.0) - ended_at < SLACK
        site.kill_agent()
        site.start_agent()
        assert site.peer(client)["state"] in {"waiting", "refused"}
        assert site.shown() == {}


def test_an_idle_session_ends_and_a_busy_one_does_not(tmp_path: Path) -> None:
    with Site(tmp_path, location={"idle_timeout": 4, "connect_timeout": 30}) as site:
        idle, busy = site.add_clients(2)
        site.start_agent()
        for client in (idle, busy):
            site.attach(client)
            connect(site, client)
        assert idle.space is not None
        with ping(busy) as pings:
            pings.wait_reply()
            idle.space.ip("link", "set", "eth0", "down")
            until(lambda: site.peer(idle)["state"] == "waiting", 20)
            assert site.peer(busy)["state"] == "up"
        assert pings.lost == 0
        [end] = until(lambda: site.core.call(site.core.admin.session_ends()))
        assert (end["session_id"], end["reason"]) == (idle.sessions[-1], "idle")


def test_a_session_that_nobody_uses_ends_as_never_connected(tmp_path: Path) -> None:
    with Site(tmp_path, location={"connect_timeout": 3}) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.grant(client)
        until(lambda: site.peer(client)["state"] == "waiting", 15)
        [end] = until(lambda: site.core.call(site.core.admin.session_ends()))
        assert (end["reason"], end["latest_handshake"], end["rx_bytes"]) == ("never_connected", None, 0)


def test_others_lose_no_packet_when_a_session_is_revoked(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        leaving, staying = site.add_clients(2)
        site.start_agent()
        for client in (leaving, staying):
            site.attach(client)
            connect(site, client)
        with ping(leaving) as cut, ping(staying) as kept:
            cut.wait_reply()
            kept.wait_reply()
            revoked_at = revoke(site, leaving)
            assert cut.wait_silence(1.0) - revoked_at < SLACK
            kept.wait_reply()
        assert kept.lost == 0


def test_switching_mfa_off_admits_and_on_cuts(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        site.connect(client)
        with ping(client, 0.05) as pings:
            time.sleep(1)
            assert pings.received == 0
            site.core.call(site.core.admin.change_location("hq", mfa_required=False))
            pings.wait_reply(15)
            site.core.call(site.core.admin.change_location("hq", mfa_required=True))
            switched_at = time.monotonic()
            assert pings.wait_silence(1.0) - switched_at < SLACK


def test_a_core_without_a_stream_is_polled(tmp_path: Path) -> None:
    with Site(tmp_path, core={"stream": False}) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        with ping(client) as pings:
            pings.wait_reply()
            revoked_at = revoke(site, client)
            assert pings.wait_silence(1.0) - revoked_at < 2 + SLACK


def test_drift_is_noticed_counted_and_healed(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.grant(client)
        stranger = "c3RyYW5nZXIgc3RyYW5nZXIgc3RyYW5nZXIgc3RyYW4="
        site.gateway.run("wg", "set", site.interface, "peer", stranger, "allowed-ips", "10.9.9.9/32")
        until(lambda: set(site.shown()) == {client.public_key}, what="the stranger's removal")
        site.gateway.run("wg", "set", site.interface, "peer", client.public_key, "remove")
        until(lambda: set(site.shown()) == {client.public_key}, what="the peer's return")
        assert site.metric('wg_agent_drift_total{kind="peer_added"}') == 1
        assert site.metric('wg_agent_drift_total{kind="peer_removed"}') == 1
        assert {line["kind"] for line in site.logged("drift")} == {"peer_added", "peer_removed"}
