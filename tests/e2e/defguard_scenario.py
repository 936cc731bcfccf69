"""What a Defguard core of either generation does with a real agent, wherever the WireGuard behind it runs."""

import os
import time

from agent.encoding import format_key
from tests.support.client import Client
from tests.support.defguard_site import GATEWAY, PRIVATE_KEY, DefguardSite
from tests.support.scenarios import EMULATED, SLACK, ping
from tests.support.site import until

PATIENCE = 120.0 if EMULATED else 30.0


ACCESS_RULES = {
    "192.0.2.7-192.0.2.19",
    "198.51.100.1",
    "10.8.1.0/24",
    "2001:db8:1::/48",
    "443",
    "8000-8080",
    "192.0.2.1",
    "established",
    "related",
}


def a_users_day(site: DefguardSite) -> None:
    """Adoption, configuration, MFA, traffic, MFA anew while core was away, DELETE, core's restart, Purge."""
    [client] = site.add_clients(1)
    site.start_agent(ready=False)
    if site.generation == 2:
        # Nobody has told the agent of a location: its interface is there, and nobody is on it.
        until(lambda: site.logged("waiting to be adopted"), PATIENCE, "the agent to listen")
        assert site.do("adopt", hostname=GATEWAY)[-1] == "adopted"
        site.do("dial")
    until(lambda: site.status()["epoch"], PATIENCE, "the configuration")

    def held() -> str:
        return site.gateway.run("wg", "show", site.interface, "private-key").stdout.strip()

    until(lambda: held() == format_key(PRIVATE_KEY), PATIENCE, "core's key on the interface")
    assert (site.folder / "state" / "private.key").read_text().strip() == held()
    site.attach(client)
    site.restrict()
    until(lambda: set(site.access_rules()) >= ACCESS_RULES, PATIENCE, "the access rules")

    authorised(site, client)
    with ping(client) as pings:
        pings.wait_reply(PATIENCE)
        until(lambda: any(one["publicKey"] == client.public_key for one in site.do("told")), PATIENCE)
        # Core dies and comes back, and the agent is killed and comes back: nothing of it is felt.
        before = pings.received
        site.core_away()
        until(lambda: not site.status()["core_connected"], PATIENCE, "core missed")
        site.core_back()
        until(lambda: site.status()["core_connected"], PATIENCE, "core found")
        site.kill_agent()
        site.start_agent()
        until(lambda: pings.received >= before + 50, PATIENCE, "50 more replies")
    assert pings.lost == 0

    # The user authenticates again while this gateway can't be reached, of which only pings tell: the new PSK
    # is the one that counts.
    site.cut_off()
    until(lambda: not site.status()["core_connected"], PATIENCE, "core missed by pings")
    psk = format_key(os.urandom(32))
    site.authorise(client, psk)
    site.connect(client, psk)
    site.joined()
    # Another session is another stay on the interface: in between there is none.
    nothing = {"preshared_key": ""}
    until(
        lambda: site.shown().get(client.public_key, nothing)["preshared_key"] == psk, PATIENCE, "the new PSK"
    )
    with ping(client) as pings:
        pings.wait_reply(PATIENCE)
        ended = time.monotonic()
        site.disconnect(client)
        last_reply = pings.wait_silence(1.0, 30)
    assert last_reply - ended < SLACK
    assert site.shown() == {}

    if site.generation == 2:
        authorised(site, client)
        site.core_away()
        site.do("purge")
        links = site.gateway.run("ip", "-j", "link", "show").stdout
        assert site.interface not in links
        assert site.interface not in site.gateway.run("nft", "list", "tables").stdout
        assert not any((site.folder / "state" / "certs").glob("*.pem"))
        until(lambda: len(site.logged("waiting to be adopted")) == 2, PATIENCE, "the agent to listen again")


def authorised(site: DefguardSite, client: Client) -> None:
    """Let the client in, and wait for its first reply."""
    psk = format_key(os.urandom(32))
    site.authorise(client, psk)
    until(lambda: client.public_key in site.shown(), PATIENCE, "the peer")
    site.connect(client, psk)
    with ping(client, 0.1) as pings:
        pings.wait_reply(PATIENCE)
