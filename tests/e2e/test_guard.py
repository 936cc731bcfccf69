"""The kernel's own guard, with the agent stopped, hung or killed (rules 11 to 13)."""

import sys
import time
from pathlib import Path

import pytest

from tests.support.ledger import Seen
from tests.support.netns import Pinger
from tests.support.scenarios import connect, monotonic_of, ping
from tests.support.site import Site, until
from tests.support.stopped import (
    KILLED,
    LAPSED,
    LEASE,
    STOPPED,
    exempt,
    over_a_deadline_killed,
    over_a_deadline_stopped,
    over_the_lease,
)

pytestmark = [pytest.mark.netns, pytest.mark.userspace]


def table(site: Site) -> str:
    return site.gateway.run("nft", "list", "ruleset").stdout


@STOPPED
def test_the_kernel_ends_a_session_at_its_deadline_while_the_agent_is_stopped(
    tmp_path: Path, seen: Seen
) -> None:
    with Site(tmp_path) as site:
        site.start_agent()
        over_a_deadline_stopped(site, seen)


@KILLED
def test_the_kernel_ends_a_session_at_its_deadline_after_the_agent_was_killed(
    tmp_path: Path, seen: Seen
) -> None:
    with Site(tmp_path) as site:
        site.start_agent()
        over_a_deadline_killed(site, seen)


@LAPSED
def test_a_dead_agent_lapses_for_sessions_only_and_is_forgiven_when_it_is_back(
    tmp_path: Path, seen: Seen
) -> None:
    with Site(tmp_path, agent=f"[sessions]\nagent_lease = {LEASE:.0f}") as site:
        site.start_agent()
        over_the_lease(site, seen)


def test_the_table_is_there_only_while_something_needs_it(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False) as site:
        [client] = site.add_clients(1)
        foreign = "table ip theirs {\n\tchain input {\n\t\ttype filter hook input priority 0;\n\t}\n}\n"
        site.gateway.run("nft", "-f", "-", stdin=foreign)
        before = table(site)
        site.start_agent()
        site.attach(client)
        site.connect(client)
        with ping(client, 0.05) as pings:
            pings.wait_reply(15)
        assert table(site) == before
        site.core.call(site.core.admin.change_location("hq", mfa_required=True))
        until(lambda: "wg_agent_" in table(site), what="the table")
        until(lambda: not site.shown(), what="the peer's removal")
        site.core.call(site.core.admin.change_location("hq", mfa_required=False))
        until(lambda: table(site) == before, what="the table's removal")


def test_a_flushed_table_is_back_at_once_and_counted_as_drift(tmp_path: Path) -> None:
    with Site(tmp_path, stats_interval=60) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.attach(client)
        connect(site, client)
        with Pinger(client.space or site.gateway, "10.8.0.1") as pings:
            pings.wait_reply()
            site.gateway.run("nft", "flush", "ruleset")
            until(lambda: "wg_agent_" in table(site), 5, "the table's return")
            until(lambda: client.address in table(site), 5, "the session's element")
            pings.wait_reply()
        assert site.metric('wg_agent_drift_total{kind="guard"}') >= 1


def test_where_the_guard_can_not_be_had_peers_that_need_a_session_are_refused(
    tmp_path: Path,
) -> None:
    with Site(tmp_path) as site:
        person, router = site.add_clients(2)
        exempt(site, router)
        # A table of the agent's name that is not the agent's: it must be left alone.
        name = f"wg_agent_{site.interface}"
        site.gateway.run("nft", "add", "table", "inet", name)
        site.start_agent()
        site.core.do(
            lambda core: core.sessions.grant(
                person.device, core.directory.location("hq"), "totp", core.clock()
            )
        )
        until(lambda: site.peer(person).get("reason") == "not_guarded", what="the refusal")
        assert site.shown().keys() == {router.public_key}
        assert site.status()["guard_error"]
        site.gateway.run("nft", "delete", "table", "inet", name)
        until(lambda: site.peer(person)["state"] == "up", what="admission once the guard is there")


def test_stopping_leaves_interface_and_table_and_purge_takes_both_down(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        [client] = site.add_clients(1)
        site.start_agent()
        site.grant(client)
        assert site.stop_agent() == 0
        assert client.public_key in site.shown()
        assert client.address in table(site)
        said = site.gateway.run(sys.executable, "-m", "agent", "purge", "-c", str(site.config)).stdout
        assert f"{site.interface}: removed" in said
        assert f"the guard of {site.interface}: removed" in said
        assert site.interface not in site.gateway.links()
        assert "wg_agent_" not in table(site)


def test_with_a_lost_journal_and_core_away_the_table_goes_on_ending_sessions(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        ending, lasting = site.add_clients(2)
        site.start_agent()
        for client in (ending, lasting):
            site.attach(client)
        connect(site, lasting)
        session, psk = site.grant(ending, lifetime=8)
        site.connect(ending, psk)
        deadline = monotonic_of(session.expires_at)
        with ping(ending) as cut, ping(lasting) as kept:
            cut.wait_reply()
            kept.wait_reply()
            site.core.kill()
            site.kill_agent()
            for file in (tmp_path / "state").glob("journal*"):
                file.unlink()
            site.start_agent(ready=False)
            cut.wait_reply()
            time.sleep(max(0.0, deadline - time.monotonic()))
            assert deadline - 1.0 < cut.wait_silence(1.0) < deadline + 0.1
            site.core.start()
            until(lambda: site.status()["epoch"], 40)
            until(lambda: site.shown().keys() == {lasting.public_key})
            kept.wait_reply()
        assert kept.lost == 0
