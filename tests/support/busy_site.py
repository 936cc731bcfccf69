"""A gateway's day in minutes: clients come and go, core fails, somebody meddles, the agent is killed.

The demo's parts (core, agent, WireGuard in namespaces) with more clients, for what is to be seen over time.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trustme

from agent.encoding import format_key
from tests.support.client import Client
from tests.support.fault_proxy import NO_FAULT, Fault, FaultProxy
from tests.support.prometheus import Prometheus
from tests.support.scenarios import connect, revoke
from tests.support.site import GATEWAY_ADDRESS, Site, until

NAMES: Final = ("anna-laptop", "ben-phone", "chris-laptop", "dana-desktop", "emil-tablet", "fay-laptop")
_DAYS: Final = 86_400

# Sends so many bytes a second in bursts, swelling and ebbing; what comes back is the kernel's refusal.
_TALK: Final = """
import math, socket, sys, time
to, rate, period = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    level = 0.55 + 0.45 * math.sin(2 * math.pi * time.time() / period)
    for _ in range(max(1, round(rate * level / 10 / 1000))):
        try:
            out.sendto(bytes(1000), (to, 9))
        except OSError:
            pass
    time.sleep(0.1)
"""


@dataclass
class BusySite:
    """The site, what is between it and core, and who is there. ``pace``: seconds that a beat takes."""

    site: Site
    proxy: FaultProxy
    prometheus: Prometheus
    clients: dict[str, Client]
    pace: float
    _began: float = 0.0
    _talkers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def play(self) -> tuple[float, float]:
        """Play 160 beats; returns when that began and ended, in Unix seconds."""
        site, who = self.site, self.clients
        self._began = time.monotonic()
        began = time.time()
        site.start_agent()
        own = {"location": "hq", "name": "copied-config", "public_key": site._server()}
        site.core.call(site.core.admin.add_devices([own]))
        site.connect(who["branch-router"])
        self._talk(who["branch-router"], 60_000, 70)
        self._join("anna-laptop", 90_000, 41)
        self._beat(8)
        self._join("ben-phone", 30_000, 17)
        self._beat(14)
        self._join("chris-laptop", 140_000, 53, lifetime=50 * self.pace)
        site.add_strangers(4)
        self._beat(24)
        self._join("dana-desktop", 180_000, 67)
        self._beat(34)
        self._join("emil-tablet", 50_000, 29, lifetime=70 * self.pace)
        self._beat(44)
        self._join("fay-laptop", 110_000, 37)
        self._beat(52)
        self._meddle()
        self._beat(60)
        revoke(site, who["dana-desktop"])
        self._beat(70)
        site.core.kill()
        self._beat(94)
        site.core.start()
        self._beat(104)
        self._garble()
        self._beat(120)
        site.kill_agent()
        self._beat(124)
        site.start_agent()
        self._beat(130)
        connect(site, who["dana-desktop"], 3600)
        self._beat(142)
        site.end(who["ben-phone"])
        self._meddle()
        self._beat(160)
        return began, time.time()

    def _beat(self, number: float) -> None:
        """Wait for this beat, if it is not past."""
        time.sleep(max(0.0, self._began + number * self.pace - time.monotonic()))

    def _join(self, name: str, rate: float, period: float, lifetime: float = 3600) -> None:
        client = self.clients[name]
        connect(self.site, client, lifetime)
        self._talk(client, rate, period)

    def _talk(self, client: Client, rate: float, period: float) -> None:
        assert client.space is not None
        period = max(4.0, period * self.pace)
        for space, to, share in (
            (client.space, GATEWAY_ADDRESS, 0.4),
            (self.site.gateway, client.address, 1.0),
        ):
            argv = (sys.executable, "-c", _TALK, to, str(rate * share), str(period))
            self._talkers.append(space.popen(*argv))

    def _meddle(self) -> None:
        """Somebody uses wg on the interface."""
        site = self.site
        drift = 'wg_agent_drift_total{kind="peer_added"}'

        def found() -> float:
            line = next(line for line in site.metrics().splitlines() if line.startswith(drift))
            return float(line.rpartition(" ")[2])

        before = found()
        key = format_key(os.urandom(32))
        site.gateway.run("wg", "set", site.interface, "peer", key, "allowed-ips", "10.8.99.9/32")
        until(lambda: found() > before, 10, "the drift")

    def _garble(self) -> None:
        """What comes from core is spoilt, until the agent has refused some of it."""
        before = self.site.metric("wg_agent_core_invalid_total")
        self.proxy.fault = Fault(corrupt=True)
        self.site.add_clients(1, name="guest-phone")
        until(lambda: self.site.metric("wg_agent_core_invalid_total") > before, 20, "an invalid answer")
        self.proxy.fault = NO_FAULT

    def close(self) -> None:
        for talker in self._talkers:
            talker.kill()
            talker.wait()


def _token(expires_at: float) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part({'sub': 'gw1', 'exp': round(expires_at)})}.{'s' * 43}"


@contextlib.contextmanager
def busy_site(folder: Path, pace: float) -> Iterator[BusySite]:
    """A site with a real Prometheus, clients with tunnels that nobody has let in yet, and no agent."""
    certificate = trustme.CA().issue_cert("gw1.example.com")
    for name, content in (
        ("tls.pem", certificate.cert_chain_pems[0].bytes()),
        ("tls.key", certificate.private_key_pem.bytes()),
        ("push", b"whsec_" + base64.b64encode(os.urandom(32))),
    ):
        (folder / name).touch(0o600)
        (folder / name).write_bytes(content)
    agent = f"""
[sessions]
connect_timeout = {max(10.0, 20 * pace)}
[push]
listen = "127.0.0.1:9587"
tls_cert_file = "{folder}/tls.pem"
tls_key_file = "{folder}/tls.key"
secret_file = "{folder}/push"
"""
    gateway = {"name": "gw1", "location": "hq", "token": _token(time.time() + 100 * _DAYS)}
    site = Site(folder, agent=agent, core={"gateways": [gateway]})
    with FaultProxy(site.gateway, folder / "core.sock") as proxy:
        site.core_url = proxy.url
        with site, Prometheus(site.gateway, folder) as prometheus:
            clients = {name: site.add_clients(1, name=name)[0] for name in NAMES}
            [router] = site.add_clients(1, name="branch-router", mfa_exempt=True)
            clients["branch-router"] = router
            for client in clients.values():
                site.attach(client)
            busy = BusySite(site, proxy, prometheus, clients, pace)
            try:
                yield busy
            finally:
                busy.close()
