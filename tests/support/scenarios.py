"""What an end-to-end test does with a site, wherever the WireGuard behind it runs."""

import os
import time

from agent.encoding import format_key
from agent.sandbox.core import Core
from tests.support.client import Client
from tests.support.netns import Pinger
from tests.support.site import GATEWAY_ADDRESS, Site, until

EMULATED = os.environ.get("IN_KERNEL_LAB") == "1"
SLACK = 5.0 if EMULATED else 1.0
"""Seconds that a reply may come past a deadline; under emulation everything takes 10 to 20 times longer."""


def monotonic_of(wall: float) -> float:
    """A wall-clock moment on the monotonic clock."""
    return time.monotonic() + wall - time.time()


def ping(client: Client, interval: float = 0.01) -> Pinger:
    """The client's pings to the gateway through the tunnel."""
    assert client.space is not None
    return Pinger(client.space, GATEWAY_ADDRESS, interval=interval)


def connect(site: Site, client: Client, lifetime: float = 0) -> None:
    """Grant a session, give the client its PSK, and wait for the first reply."""
    _, psk = site.grant(client, lifetime)
    site.connect(client, psk)
    with ping(client, 0.1) as pings:
        pings.wait_reply(30 if EMULATED else 15)


def renew(site: Site, client: Client, lifetime: float = 3600.0) -> str:
    """Renew the client's session with another PSK; returns that."""
    session_id = client.sessions[-1]

    def work(core: Core) -> str:
        ceiling = core.directory.location("hq").policy["max_lifetime"]
        granted = core.sessions.renew(session_id, lifetime, core.clock(), ceiling=ceiling, rotate=True)
        assert granted.session.preshared_key is not None
        return format_key(granted.session.preshared_key)

    psk = site.core.do(work)
    until(lambda: site.shown()[client.public_key]["preshared_key"] == psk, what="the renewed PSK")
    return psk


def revoke(site: Site, client: Client) -> float:
    """Revoke the client's session at core; the monotonic moment of it."""
    session_id = client.sessions[-1]
    site.core.do(lambda core: core.sessions.end(session_id, "revoked", core.clock()))
    return time.monotonic()


def the_interface_is_as_status_says(site: Site) -> int:
    """``wg show`` and ``wg-agent status --json`` agree peer by peer; how many are up."""
    status, shown = site.status(), site.shown()
    up = {p["public_key"]: p for p in status["peers"] if p["state"] == "up"}
    assert up.keys() == shown.keys()
    for key, peer in up.items():
        row = shown[key]
        assert sorted(row["allowed_ips"].split(",")) == sorted(peer["allowed_ips"])
        assert (row["preshared_key"] != "(none)") == (peer["session_id"] is not None)
        # What the status shows may be one observation old, never ahead.
        assert peer["endpoint"] in {None, row["endpoint"]}
        assert peer["latest_handshake"] is None or row["handshake"] != "0"
        assert int(row["rx"]) >= peer["rx_bytes"]
        assert int(row["tx"]) >= peer["tx_bytes"]
    return len(up)


def the_main_job(site: Site, strangers: int) -> None:
    """Peers arrive; one is granted, renewed, revoked, granted again and expires."""
    site.add_strangers(strangers)
    [client] = site.add_clients(1)
    site.start_agent(timeout=300)
    assert site.status()["mfa_required"] is True
    assert site.peer(client)["state"] == "waiting"
    until(lambda: site.metric("wg_agent_applied_revision"), 300, "the first state in the kernel")
    assert the_interface_is_as_status_says(site) == strangers

    site.attach(client)
    site.connect(client)
    with ping(client, 0.1) as pings:
        time.sleep(3)
        assert pings.received == 0
    connect(site, client)
    assert the_interface_is_as_status_says(site) == strangers + 1

    with ping(client) as pings:
        pings.wait_reply()
        site.use_psk(client, renew(site, client))
        before = pings.received
        until(lambda: pings.received >= before + 50, what="50 replies after the renewal")
    assert pings.lost == 0

    with ping(client) as pings:
        pings.wait_reply()
        revoked_at = revoke(site, client)
        last_reply = pings.wait_silence(1.0, 30)
    assert last_reply - revoked_at < SLACK
    assert site.peer(client)["state"] == "waiting"

    lifetime = 20.0 if EMULATED else 6.0
    session, psk = site.grant(client, lifetime)
    site.connect(client, psk)
    deadline = monotonic_of(session.expires_at)
    with ping(client) as pings:
        pings.wait_reply(lifetime)
        time.sleep(max(0.0, deadline - time.monotonic()))
        last_reply = pings.wait_silence(1.0, 30)
    assert deadline - SLACK < last_reply < deadline + SLACK
    assert the_interface_is_as_status_says(site) == strangers
    ends = until(
        lambda: [e for e in site.core.call(site.core.admin.session_ends()) if e["reason"] == "expired"]
    )
    assert [end["session_id"] for end in ends] == client.sessions[-1:]
