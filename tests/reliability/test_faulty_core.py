"""What lies between the agent and core goes wrong, under live traffic (rules 9, 10 and 18)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.reliability.inspect_agent import memory
from tests.support.client import Client
from tests.support.fault_proxy import NO_FAULT, Fault, FaultProxy
from tests.support.ledger import FULL, Seen
from tests.support.netns import Pinger
from tests.support.scenarios import SLACK, connect, monotonic_of, ping, revoke
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

HELD = 12.0 if FULL else 1.2
"""Seconds that a fault stays, at least."""
SILENCE = 40.0
"""Seconds without a byte after which a stream counts as lost (core-api.md)."""
QUIET = 1.0 if FULL else 0.5
"""Seconds without a reply that count as the end of them."""
ASKERS = 5
"""Who asks core for something, each at its own pace: pull, stream, and three kinds of reports."""
GROWTH = 32.0
"""MiB by which the agent may be larger after a fault than before."""
LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class Case:
    """Faults one after the other; the last one stays, for ``held`` seconds.

    ``shows``: core counts as lost meanwhile. ``hides``: no change gets through.
    """

    faults: tuple[Fault, ...]
    shows: bool = True
    hides: bool = True
    held: float = HELD


def case(
    name: str, fault: str, *faults: Fault, shows: bool = True, hides: bool = True, held: float = HELD
) -> object:
    holds = "nobody loses a packet, sessions end on time, a revocation takes effect once it is over"
    marks = pytest.mark.reliability(f"between the agent and core, {fault}", holds)
    return pytest.param(Case(faults, shows, hides, held), id=name, marks=marks)


CASES = [
    case("reset", "every connection is reset", Fault(reset=True)),
    case("black hole", "nothing passes any more", Fault(reset=True), Fault(half_open=True)),
    case("truncate", "each answer is cut after 100 bytes", Fault(truncate=100)),
    case("corrupt", "bytes are flipped", Fault(corrupt=True)),
    case("trickle", "answers come byte by byte, 5 ms apart", Fault(trickle=0.005), shows=False, hides=False),
]
if FULL:
    CASES.append(case("delay", "each chunk takes 0.3 s", Fault(delay=0.3), shows=False, hides=False))
    CASES.append(case("half open", "nothing passes, for over 40 s", Fault(half_open=True), held=SILENCE + 3))


@dataclass
class Gateway:
    """A site whose agent reaches core through the proxy, and who uses it: two stay, two come and go."""

    site: Site
    proxy: FaultProxy
    kept: Pinger
    exempt: Pinger
    expiring: Client
    revoked: Client

    @property
    def lost(self) -> int:
        return self.kept.lost + self.exempt.lost

    @property
    def resident(self) -> float:
        """The agent's memory in MiB."""
        assert self.site.process is not None
        return memory(self.site.process.pid)[0]

    def in_step(self) -> bool:
        """Whether core counts as reachable and what it says is held."""
        status = self.site.status()
        revision = self.site.core.do(lambda core: core.directory.location("hq").revision)
        return bool(status["core_connected"]) and status["revision"] == revision


@pytest.fixture(scope="module", params=["followed", "polled"] if FULL else ["followed"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("faulty")
    site = Site(folder, core={"stream": request.param == "followed"})
    with pytest.MonkeyPatch.context() as patch, FaultProxy(site.gateway, folder / "core.sock") as proxy:
        patch.setenv("WG_AGENT_CORE__TIMEOUT", "1")
        site.core_url = proxy.url
        with site:
            lasting, router, expiring, revoked = site.add_clients(4)
            site.core.call(site.core.admin.change_device(router.device.id, mfa_exempt=True))
            site.start_agent()
            for client in (lasting, router, expiring, revoked):
                site.attach(client)
            site.connect(router)
            connect(site, lasting)
            with ping(lasting) as kept, ping(router) as exempt:
                kept.wait_reply()
                exempt.wait_reply(15)
                yield Gateway(site, proxy, kept, exempt, expiring, revoked)


def ends_of(gateway: Gateway) -> dict[str, str]:
    """The ends of both sessions that core has been told of, once it knows both."""
    ids = {gateway.expiring.sessions[-1], gateway.revoked.sessions[-1]}
    told = gateway.site.core.call(gateway.site.core.admin.session_ends())
    ends = {end["session_id"]: end["reason"] for end in told if end["session_id"] in ids}
    return ends if len(ends) == len(ids) else {}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_on_the_way_to_core_costs_nobody_a_packet_and_lengthens_nothing(
    gateway: Gateway, case: Case, seen: Seen
) -> None:
    site, proxy = gateway.site, gateway.proxy
    lost, resident = gateway.lost, gateway.resident
    _, psk = site.grant(gateway.revoked)
    site.connect(gateway.revoked, psk)
    session, psk = site.grant(gateway.expiring, lifetime=case.held + 0.8)
    site.connect(gateway.expiring, psk)
    deadline = monotonic_of(session.expires_at)
    with ping(gateway.expiring) as expiring, ping(gateway.revoked) as revoked:
        expiring.wait_reply()
        revoked.wait_reply()
        began = time.monotonic()
        for fault in case.faults:
            proxy.fault = fault
        revoke(site, gateway.revoked)
        if case.shows:
            until(lambda: not site.status()["core_connected"], case.held, "the fault in the status")
            assert site.metric("wg_agent_core_connected") == 0
        time.sleep(max(0.0, deadline - time.monotonic()))
        overrun = expiring.wait_silence(QUIET) - deadline
        assert -SLACK < overrun < SLACK
        if case.hides:
            revoked.wait_reply(1.0)
        elif not case.shows:
            assert site.status()["core_connected"] is True
        lasted = time.monotonic() - began
        opened = proxy.opened_since(began)
        assert len(opened) <= ASKERS * (4 + lasted), opened
        proxy.fault = NO_FAULT
        lifted = time.monotonic()
        heeded = revoked.wait_silence(QUIET, LONGEST_WAIT + 5) - lifted
        until(gateway.in_step, LONGEST_WAIT + 5, "what core says")
    assert site.peer(gateway.expiring)["state"] == site.peer(gateway.revoked)["state"] == "waiting"
    ends = until(lambda: ends_of(gateway), LONGEST_WAIT + 5, "both ends at core")
    assert ends == {gateway.expiring.sessions[-1]: "expired", gateway.revoked.sessions[-1]: "revoked"}
    gateway.kept.wait_reply()
    gateway.exempt.wait_reply()
    assert gateway.lost == lost
    assert gateway.resident < resident + GROWTH
    assert '"exception"' not in site.log.read_text()
    note = f"{len(opened)} connections in {lasted:.0f} s"
    seen(overrun=overrun, lost=gateway.lost - lost, note=f"{note}, then {max(heeded, 0.0):.1f} s")
