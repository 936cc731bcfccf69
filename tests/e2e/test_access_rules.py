"""Access rules and masquerading by a whole agent; tests/firewall/test_acl.py has what they do to packets."""

import json
import sys
import time
from pathlib import Path

import msgspec
import pytest

from agent.acl import Acl, Verdict
from tests.support.netns import Pinger
from tests.support.site import Site, until

pytestmark = [pytest.mark.netns, pytest.mark.userspace]

MASQUERADE = "[firewall]\nmasquerade = true"


def table(site: Site) -> str:
    """The table of access rules; "" if there is none."""
    listed = site.gateway.run("nft", "list", "ruleset").stdout.split("table ")
    return next((t for t in listed if t.startswith(f"inet wg_agent.acl_{site.interface} ")), "")


def keep(site: Site, acl: Acl | None) -> None:
    """Leave behind the file of an agent that has had these rules from core."""
    state = site.folder / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    (state / "acl.json").write_bytes(msgspec.json.encode({"acl": acl, "version": 1}))


def test_cores_addresses_are_masqueraded_from_when_they_are_known(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False, agent=MASQUERADE) as site:
        site.start_agent()
        until(lambda: "ip saddr 10.8.0.0/16 masquerade" in table(site), 5, "the table")
        site.core.call(site.core.admin.change_location("hq", addresses=["10.8.0.1/16", "10.77.0.1/24"]))
        both = "ip saddr { 10.8.0.0/16, 10.77.0.0/24 } masquerade"
        until(lambda: both in table(site), 5, "the other network")
        site.gateway.run("nft", "delete", "table", "inet", f"wg_agent.acl_{site.interface}")
        until(lambda: "masquerade" in table(site), 5, "the table's return")
        held = site.gateway.run("nft", "-a", "list", "ruleset").stdout
        site.kill_agent()
        site.start_agent()
        assert site.stop_agent() == 0
        assert site.gateway.run("nft", "-a", "list", "ruleset").stdout == held
        purge = (sys.executable, "-m", "agent", "purge", "-c", str(site.config))
        said = site.gateway.run(*purge, "--json").stdout
        assert table(site) == ""
        document = json.loads(said)
        assert document["table_removed"]
        assert str(site.folder / "state" / "acl.json") in document["removed"]


def test_rules_that_were_kept_are_in_force_once_the_agent_is_up_and_core_is_not(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False) as site:
        of_a_defguard_core(site)
        keep(site, Acl(Verdict.DROP))
        site.core.kill()
        site.start_agent(ready=False)
        assert "drop" in table(site)
        assert site.stop_agent() == 0
        keep(site, None)
        site.start_agent(ready=False)
        assert table(site) == ""


def test_rules_that_were_kept_are_no_rules_of_another_kind_of_core(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False) as site:
        keep(site, Acl(Verdict.DROP))
        site.start_agent()
        assert table(site) == ""


def test_a_link_that_is_down_stays_so_until_the_access_rules_are_in_force(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False) as site:
        of_a_defguard_core(site)
        keep(site, Acl(Verdict.DROP))
        name = f"wg_agent.acl_{site.interface}"
        site.gateway.run("nft", f"add table inet {name}; add chain inet {name} theirs")
        site.core.kill()
        site.start_agent(ready=False)
        until(lambda: site.logged("access rules can't be put in force"))
        time.sleep(3)
        assert not is_up(site)
        site.gateway.run("nft", "delete", "table", "inet", name)
        until(lambda: is_up(site), 20, "the link once the rules are in force")
        assert "drop" in table(site)


def of_a_defguard_core(site: Site) -> None:
    """Only from a Defguard core does the agent have access rules."""
    text = site.config.read_text()
    site.config.write_text(text.replace("[core]\n", '[core]\nprotocol = "defguard"\ngeneration = 1\n'))


def is_up(site: Site) -> bool:
    """Whether the interface is up."""
    [link] = json.loads(site.gateway.run("ip", "-j", "link", "show", site.interface).stdout)
    return "UP" in link["flags"]


def test_a_firewall_that_can_not_be_had_does_not_keep_the_agent_from_its_sessions(tmp_path: Path) -> None:
    with Site(tmp_path, mfa_required=False, agent=MASQUERADE) as site:
        [client] = site.add_clients(1)
        name = f"wg_agent.acl_{site.interface}"
        site.gateway.run("nft", f"add table inet {name}; add chain inet {name} theirs")
        site.start_agent()
        site.attach(client)
        site.connect(client)
        with Pinger(client.space or site.gateway, "10.8.0.1") as pings:
            pings.wait_reply(15)
        [told] = site.logged("access rules can't be put in force")[:1]
        assert "that wg-agent did not make" in told["error"]
        assert "theirs" in table(site)
        site.gateway.run("nft", "delete", "table", "inet", name)
        until(lambda: "masquerade" in table(site), 15, "the table once it can be had")
