import re
import time
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.netns import Pinger
from tests.support.pair import NAMES, OUTSIDE, SERVER, Host, Pair, until_at
from tests.support.places import here_and_at_full_size_on_the_kernel
from tests.support.scenarios import SLACK, monotonic_of
from tests.support.site import PORT, until

IDLE_TIMEOUT = 45
"""Seconds; longer than a failover, in which nobody hears of the client."""
FAILOVER = 40.0
"""Seconds that it may take: 3 to 4 until the address has moved, 15 until the client asks for a new
handshake, 5 more for each try that fails."""


def ping(client: Client) -> Pinger:
    """The client's pings to the server behind the gateways."""
    assert client.space is not None
    return Pinger(client.space, SERVER, interval=0.1)


def outage(pings: Pinger, since: float) -> float:
    """Wait until replies come again after this moment; the seconds without any."""
    gaps = until(
        lambda: [gap for gap in pings.gaps(1.0) if gap.end > since + 1], FAILOVER + 10, "the failover"
    )
    return gaps[0].seconds


@here_and_at_full_size_on_the_kernel
@pytest.mark.timeout(900)
def test_a_session_survives_its_gateway_and_ends_on_both(tmp_path: Path, where: str) -> None:
    policy: dict[str, object] = {"idle_timeout": IDLE_TIMEOUT, "connect_timeout": 600}
    with Pair(tmp_path, location=policy) as pair:
        first = pair.active()
        second = pair.other(first)
        alice, bob = pair.add_client("alice", 101), pair.add_client("bob", 102)
        _, psk = pair.core.grant(alice)
        session, short_psk = pair.core.grant(bob, lifetime=60)
        for host in pair.hosts:
            assert host.peers() == {alice.public_key: psk, bob.public_key: short_psk}
            assert alice.address in host.guarded()
        pair.connect(alice, psk)
        pair.connect(bob, short_psk)
        with ping(alice) as pings, ping(bob) as short_pings:
            pings.wait_reply(30)
            short_pings.wait_reply(30)
            until(lambda: pair.traffic(alice)["gateway"] == first.name, what="a report of the handshake")

            _the_host_that_has_the_address_dies(pair, first, alice, pings)
            assert second.peers()[alice.public_key] == psk
            deadline = monotonic_of(session.expires_at)
            assert short_pings.wait_reply(30) < deadline
            died = time.monotonic()

            # The session of the other ends at its deadline where its first gateway is gone.
            time.sleep(max(0.0, deadline - time.monotonic()))
            last_reply = short_pings.wait_silence(1.0, 30)
            assert deadline - SLACK < last_reply < deadline + SLACK
            assert second.peers() == {alice.public_key: psk}

            # Nobody takes the first gateway's silence for the client's.
            time.sleep(max(0.0, died + IDLE_TIMEOUT - time.monotonic()))
            assert pair.session(alice)["ended_at"] is None

            # What ended meanwhile is not there when it comes back, and it takes nothing.
            before = pings.lost
            first.boot()
            until(
                lambda: first.peers() == {alice.public_key: psk}, 300, "the sessions at the host that is back"
            )
            assert pair.active() is second
            assert pings.lost == before

            _the_address_is_given_away(pair, second, alice, pings)

            _both_end_a_session_at_its_deadline(pair, bob)

            pair.core.call(pair.core.admin.revoke(alice.sessions[-1]))
            revoked = time.monotonic()
            assert pings.wait_silence(1.0, 30) - revoked < SLACK
            for host in pair.hosts:
                until_at(host, lambda host: not host.peers(), "the revocation")

        _nothing_moves_while_core_is_lost_for_both(pair)
        _a_host_whose_agent_is_gone_gives_the_address_up(pair)


@pytest.mark.kernel
@pytest.mark.timeout(600)
def test_on_the_kernel_a_client_goes_on_at_the_other_host_with_its_session(tmp_path: Path) -> None:
    with Pair(tmp_path, location={"connect_timeout": 600}) as pair:
        first = pair.active()
        alice = pair.add_client("alice", 101)
        session, psk = pair.core.grant(alice)
        pair.connect(alice, psk)
        with ping(alice) as pings:
            pings.wait_reply(30)
            until(lambda: pair.traffic(alice)["gateway"] == first.name, what="a report of the handshake")
            _the_host_that_has_the_address_dies(pair, first, alice, pings)
            assert pair.other(first).peers() == {alice.public_key: psk}
            assert pair.session(alice)["ended_at"] is None
            pair.core.call(pair.core.admin.revoke(session.id))
            revoked = time.monotonic()
            assert pings.wait_silence(1.0, 30) - revoked < SLACK
            assert pair.other(first).peers() == {}


def _the_host_that_has_the_address_dies(pair: Pair, host: Host, alice: Client, pings: Pinger) -> None:
    total = pair.traffic(alice)
    died = time.monotonic()
    host.die()
    lasted = outage(pings, died)
    print(f"the host died: no reply for {lasted:.1f} s")
    assert lasted < FAILOVER
    other = pair.other(host)
    assert pair.active([other]) is other
    moved = until(lambda: (row := pair.traffic(alice))["gateway"] == other.name and row, what="a report")
    assert moved["rx_bytes"] > total["rx_bytes"]
    assert moved["tx_bytes"] > total["tx_bytes"]


def _the_address_is_given_away(pair: Pair, host: Host, alice: Client, pings: Pinger) -> None:
    """The host that gave it away still has the client's keys and address, and must not call it back."""
    other = pair.other(host)
    until_at(other, lambda host: "Entering BACKUP STATE" in _since_start(host), "readiness", 300)
    stopped = time.monotonic()
    host.stop_keepalived()
    lasted = outage(pings, stopped)
    print(f"the address was given away: no reply for {lasted:.1f} s")
    assert lasted < FAILOVER
    assert pair.active() is other
    moved = time.monotonic()
    # It has tried since 15 s after the client's last packet, every 5 s.
    while time.monotonic() < moved + 11:
        assert pair.endpoint(alice) == f"{OUTSIDE}:{PORT}"
        time.sleep(1)
    assert "counter packets 0 " not in host.space.run("nft", "list", "table", "inet", "vpn_address").stdout
    assert pings.gaps(1.0)[-1].end < moved + 1


def _both_end_a_session_at_its_deadline(pair: Pair, bob: Client) -> None:
    session, psk = pair.core.grant(bob, lifetime=10)
    for host in pair.hosts:
        assert host.peers()[bob.public_key] == psk
    deadline = monotonic_of(session.expires_at)
    for host in pair.hosts:
        until_at(host, lambda host: bob.public_key not in host.peers(), "the end")
    assert deadline - SLACK < time.monotonic() < deadline + SLACK
    # Of the gateways the later one may hear of the other's end first, as a revocation.
    until(lambda: _reporters(pair, session.id) == set(NAMES), what="the end in both gateways' reports")
    assert pair.session(bob)["reason"] == "expired"


def _reporters(pair: Pair, session_id: str) -> set[str]:
    ends = pair.core.call(pair.core.admin.session_ends())
    return {end["gateway"] for end in ends if end["session_id"] == session_id}


def _nothing_moves_while_core_is_lost_for_both(pair: Pair) -> None:
    # The other one has not run keepalived since it gave the address away.
    active = pair.active()
    pair.other(active).start_keepalived()
    for host in pair.hosts:
        until_at(host, lambda host: _priority(host) == 100, "readiness", 60)
    pair.core.kill()
    for host in pair.hosts:
        until_at(host, lambda host: _priority(host) == 80, "the loss of core", 60)
    assert pair.active() is active


def _a_host_whose_agent_is_gone_gives_the_address_up(pair: Pair) -> None:
    active = pair.active()
    other = pair.other(active)
    active.kill_agent()
    killed = time.monotonic()
    until(lambda: other.has_address and not active.has_address, 60, "the address at the other host")
    lasted = time.monotonic() - killed
    print(f"the agent was killed: the address moved after {lasted:.1f} s")
    # A restart of the agent is to be over before.
    assert lasted > 10


def _priority(host: Host) -> int:
    """The VRRP priority that keepalived last came to."""
    return int(["100", *re.findall(r"effective priority from \d+ to (\d+)", _since_start(host))][-1])


def _since_start(host: Host) -> str:
    """What keepalived has logged since it was last started."""
    return host.vrrp_log().rpartition("Starting VRRP child process")[2]
