"""A real ``date -s`` under live tunnels, and clocks that were never right (rule 9)."""

import subprocess
import time
from collections.abc import Iterator

import pytest

from agent.sandbox.core import Core
from tests.support.client import Client
from tests.support.ledger import FULL, Seen
from tests.support.mass_end import KEPT_CHANGES, metric
from tests.support.netns import Pinger
from tests.support.scenarios import EMULATED, SLACK, connect, ping
from tests.support.site import Site, until

HOUR = 3600.0
SHORT = 12.0 if EMULATED else 6.0
"""Seconds that a session lasts whose deadline is waited for."""
PATIENCE = 30.0 if EMULATED else 10.0

pytestmark = [pytest.mark.lab, pytest.mark.kernel, pytest.mark.timeout(600)]


class Time:
    """The machine's wall clock, which the test sets, and core's, which it does not disturb."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.core_ahead = 0.0
        """Seconds by which core's clock is ahead of the truth."""
        self._truth = time.time() - time.monotonic()
        site.core.do(self._take_over)

    def _take_over(self, core: Core) -> None:
        core.clock = lambda: time.monotonic() + self._truth + self.core_ahead

    def deadline(self, expires_at: float) -> float:
        """A moment of core's on the monotonic clock."""
        return expires_at - self.core_ahead - self._truth

    def set(self, ahead: float) -> float:
        """``date -s``; the monotonic moment after it."""
        when = time.monotonic() + self._truth + ahead
        subprocess.run(["date", "-s", f"@{when:.3f}"], check=True, capture_output=True)
        return time.monotonic()

    def pull(self) -> None:
        """Give the agent a reason to pull core's state, and wait until it has."""
        site = self.site
        before = len(site.logged("state pulled"))

        def change_much(core: Core) -> None:
            location = core.directory.location("hq")
            with core.store.transaction():
                for _ in range(KEPT_CHANGES + 1):
                    core.store.append(location.id, "location_changed", location.message())

        site.core.do(change_much)
        until(lambda: len(site.logged("state pulled")) > before, PATIENCE, "a pull")

    def skew(self) -> float:
        """What the agent shows of it."""
        return metric(self.site, "wg_agent_clock_skew_seconds")

    def told(self) -> float:
        """What the agent last said of it in its log."""
        return float(self.site.logged("this host's clock differs from core's")[-1]["seconds_ahead"])


@pytest.fixture
def clock(site: Site) -> Iterator[Time]:
    clock = Time(site)
    yield clock
    clock.core_ahead = 0.0
    clock.set(0.0)
    clock.pull()


def admit(site: Site, client: Client, lifetime: float) -> float:
    """Attach the client and grant it a session of so long; when that expires by core's clock."""
    site.attach(client)
    session, psk = site.grant(client, lifetime=lifetime)
    site.connect(client, psk)
    return session.expires_at


def cut_at(pings: Pinger, deadline: float) -> float:
    """Wait for the deadline and the silence after it; by how much the last reply came after it."""
    time.sleep(max(0.0, deadline - time.monotonic()))
    overrun = pings.wait_silence(1.0, 30) - deadline
    assert -1.0 - (SLACK if EMULATED else 0.0) < overrun < SLACK
    return overrun


@pytest.mark.reliability(
    "the wall clock is set back an hour (`date -s`)",
    "no session is lengthened: deadlines by boot time hold, live tunnels lose no packet, the skew is told",
)
def test_a_wall_clock_set_back_lengthens_no_session(site: Site, clock: Time, seen: Seen) -> None:
    lasting, ending, later = site.add_clients(3)
    site.attach(lasting)
    connect(site, lasting)
    expires_at = admit(site, ending, SHORT)
    with ping(lasting) as kept:
        with ping(ending) as cut:
            cut.wait_reply(PATIENCE)
            kept.wait_reply(PATIENCE)
            clock.set(-HOUR)
            overrun = cut_at(cut, clock.deadline(expires_at))
        clock.pull()
        assert clock.skew() == pytest.approx(-HOUR, abs=2)
        assert clock.told() == pytest.approx(-HOUR, abs=2)
        if FULL:
            # Granted under the wrong clock.
            expires_at = admit(site, later, SHORT)
            with ping(later) as cut:
                cut.wait_reply(PATIENCE)
                overrun = max(overrun, cut_at(cut, clock.deadline(expires_at)))
        kept.wait_reply(PATIENCE)
    seen(tried=2 if FULL else 1, overrun=overrun, lost=kept.lost)
    assert kept.lost == 0


@pytest.mark.full_size
@pytest.mark.reliability(
    "the wall clock is set forward an hour (`date -s`), and right again",
    "sessions may end early, never late: those that have more than the hour left go on without losing a"
    " packet",
)
def test_a_wall_clock_set_forward_ends_early_at_most(site: Site, clock: Time, seen: Seen) -> None:
    lasting, early, later = site.add_clients(3)
    site.attach(lasting)
    connect(site, lasting, lifetime=3 * HOUR)
    admit(site, early, HOUR / 2)
    with ping(lasting) as kept:
        with ping(early) as cut:
            cut.wait_reply(PATIENCE)
            kept.wait_reply(PATIENCE)
            stepped_at = clock.set(HOUR)
            gone = cut.wait_silence(1.0, 30) - stepped_at
            assert gone < SLACK
        clock.pull()
        assert clock.skew() == pytest.approx(HOUR, abs=2)
        assert clock.told() == pytest.approx(HOUR, abs=2)
        expires_at = admit(site, later, SHORT)
        with ping(later) as cut:
            cut.wait_reply(PATIENCE)
            overrun = cut_at(cut, clock.deadline(expires_at))
        clock.set(0.0)
        kept.wait_reply(PATIENCE)
    seen(
        tried=3, overrun=overrun, lost=kept.lost, note=f"half an hour left: ended {gone:.1f} s after the step"
    )
    assert kept.lost == 0


@pytest.mark.full_size
@pytest.mark.reliability(
    "core's clock is ten minutes ahead, or behind",
    "sessions last as long as core meant, counted from core's own time; the skew is told",
)
@pytest.mark.parametrize("ahead", [600.0, -600.0])
def test_a_core_whose_clock_is_wrong_gets_what_it_meant(
    site: Site, clock: Time, ahead: float, seen: Seen
) -> None:
    [client] = site.add_clients(1)
    clock.core_ahead = ahead
    clock.pull()
    assert clock.skew() == pytest.approx(-ahead, abs=2)
    assert clock.told() == pytest.approx(-ahead, abs=2)
    expires_at = admit(site, client, SHORT)
    with ping(client) as pings:
        pings.wait_reply(PATIENCE)
        seen(overrun=cut_at(pings, clock.deadline(expires_at)))


@pytest.mark.full_size
@pytest.mark.reliability(
    "the host boots in 1970, and the agent with it; core's clock is right",
    "sessions last as long as core meant; the agent starts and tells of the skew",
)
def test_a_host_that_boots_in_1970_keeps_deadlines(site: Site, clock: Time, seen: Seen) -> None:
    [client] = site.add_clients(1)
    site.kill_agent()
    # The kernel does not let the wall clock be behind its own uptime.
    back = time.time() - time.monotonic() - 1000.0
    try:
        clock.set(-back)
    finally:
        site.start_agent()
    assert time.gmtime().tm_year == 1970
    assert clock.skew() == pytest.approx(-back, abs=2)
    assert clock.told() == pytest.approx(-back, abs=2)
    expires_at = admit(site, client, SHORT)
    with ping(client) as pings:
        pings.wait_reply(PATIENCE)
        overrun = cut_at(pings, clock.deadline(expires_at))
    seen(overrun=overrun)
    ends = until(
        lambda: [
            end
            for end in site.core.call(site.core.admin.session_ends())
            if end["session_id"] == client.sessions[-1]
        ]
    )
    assert [end["reason"] for end in ends] == ["expired"]
    assert ends[0]["ended_at"].startswith("20"), "in core's time"
