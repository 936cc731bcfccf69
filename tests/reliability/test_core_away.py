"""Core's absence ends nothing early and extends nothing (rule 10), and its return finds all in order."""

import contextlib
import sqlite3
import time
from pathlib import Path

import pytest

from agent.sandbox.reports import Reports, SessionEnds
from tests.support.ledger import FULL, Seen
from tests.support.places import here_and_at_full_size_on_the_kernel
from tests.support.scenarios import EMULATED, SLACK, connect, ping
from tests.support.site import Site, until

MINUTES = 60.0
PATIENT = "[sessions]\nidle_timeout = 7200\nconnect_timeout = 7200"
HOP = (5 if FULL else 15) * MINUTES
"""Seconds by which all clocks are moved at once, so that the hour takes a minute."""

pytestmark = pytest.mark.reliability(
    "core is away for an hour (all clocks moved), the agent is killed half-way, core comes back",
    "no allowed tunnel dropped, none kept that was not, each session end delivered once",
)


class Hour:
    """An hour that passes in hops, for the agent and for core alike."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.passed = 0.0

    def hop(self) -> float:
        """Move all clocks on; the monotonic moment of it."""
        assert self.site.zygote is not None
        self.passed += HOP
        self.site.core_ahead = self.passed
        self.site.zygote.clocks.set(boot=self.passed, wall=self.passed)
        return time.monotonic()


def told_ends(patch: pytest.MonkeyPatch) -> list[str]:
    """Let cores write down the id of each end that they are told, repeated ones as well."""
    told: list[str] = []
    take = Reports.session_ends

    def taken(self: Reports, gateway: str, report: SessionEnds, now: float) -> None:
        take(self, gateway, report, now)
        told.extend(end.session_id for end in report.ends)

    patch.setattr(Reports, "session_ends", taken)
    return told


def ends_to_tell(site: Site) -> int:
    """How many ends the journal holds that core is still to be told of."""
    with contextlib.closing(sqlite3.connect(site.folder / "state" / "journal.sqlite")) as journal:
        [(count,)] = journal.execute("SELECT count(*) FROM unreported_ends")
    return int(count)


def core_is_away_for_an_hour(folder: Path, told: list[str], seen: Seen) -> None:
    location: dict[str, object] = {"idle_timeout": 7200, "connect_timeout": 7200, "max_lifetime": 86400}
    with Site(folder, location=location, agent=PATIENT, forked=True) as site:
        early, late, lasting, router = site.add_clients(4)
        site.core.call(site.core.admin.change_device(router.device.id, mfa_exempt=True))
        site.start_agent()
        for client in (early, late, lasting, router):
            site.attach(client)
        site.connect(router)
        connect(site, early, 12 * MINUTES)
        connect(site, late, 42 * MINUTES)
        connect(site, lasting, 120 * MINUTES)
        overruns = []
        with ping(early) as p1, ping(late) as p2, ping(lasting) as kept, ping(router) as exempt:
            ending = ((p1, 15 * MINUTES), (p2, 45 * MINUTES))
            for some in (p1, p2, kept, exempt):
                some.wait_reply(30)
            site.core.kill()
            hour = Hour(site)
            while hour.passed < 60 * MINUTES:
                moved_at = hour.hop()
                for pings, at in ending:
                    if hour.passed == at:
                        overruns.append(pings.wait_silence(2.0, 30) - moved_at)
                    elif hour.passed < at:
                        pings.wait_reply(30)
                if hour.passed == 30 * MINUTES:
                    site.kill_agent()
                    site.start_agent(ready=False)
                time.sleep(2.0 if EMULATED else 0.5)
            kept.wait_reply(30)
            exempt.wait_reply(30)
            assert site.shown().keys() == {lasting.public_key, router.public_key}
            site.core.start()
            until(lambda: site.status()["core_connected"], 60)
            until(lambda: len(told) >= 2, 60, "the ends at core")
            # An agent killed between core's answer and the journal tells core again, which knows their ids.
            until(lambda: not ends_to_tell(site), 30, "the journal's word that core was told")
            site.kill_agent()
            site.start_agent()
            time.sleep(3.0)
            assert site.shown().keys() == {lasting.public_key, router.public_key}
            kept.wait_reply(30)
            exempt.wait_reply(30)
        assert sorted(told) == sorted([early.sessions[-1], late.sessions[-1]])
        assert max(overruns) < SLACK
        assert kept.losses() == exempt.losses() == []
        seen(tried=1, overrun=max(overruns), lost=kept.lost + exempt.lost)


@here_and_at_full_size_on_the_kernel
def test_core_is_away_for_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, where: str
) -> None:
    core_is_away_for_an_hour(tmp_path, told_ends(monkeypatch), seen)
