"""What somebody else changes is noticed, said, counted and healed; what is not ours stays as it was."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.encoding import format_key
from tests.support.client import Client
from tests.support.ledger import Seen
from tests.support.netns import Namespace, interface_name
from tests.support.places import here_and_at_full_size_on_the_kernel
from tests.support.scenarios import EMULATED, connect, ping
from tests.support.site import Site, until

NOTICED = 20.0 if EMULATED else 5.0
"""Seconds in which drift is healed: an observation is due each second here."""
FOREIGN_TABLE = (
    "table ip theirs {\n\tchain c {\n\t\ttype filter hook input priority 5; policy accept;\n\t}\n}\n"
)


@dataclass
class Stage:
    """``victim`` is what is changed; nothing is done to ``bystander``."""

    site: Site
    victim: Client
    bystander: Client

    @property
    def name(self) -> str:
        return self.site.interface

    def wg(self, *argv: str, stdin: str | None = None) -> None:
        self.site.gateway.run("wg", "set", self.name, *argv, stdin=stdin)

    def guard(self) -> str:
        return f"wg_agent_{self.name}"

    def nft(self, *argv: str, stdin: str | None = None) -> None:
        self.site.gateway.run("nft", *argv, stdin=stdin)


@dataclass(frozen=True)
class Drift:
    """One change by somebody else; ``harmless`` if no packet of a bystander may be lost for it."""

    do: Callable[[Stage], object]
    kind: str
    harmless: bool = True


def add_a_peer(stage: Stage) -> None:
    stage.wg("peer", format_key(os.urandom(32)), "allowed-ips", "10.8.77.0/24")


def remove_a_peer(stage: Stage) -> None:
    stage.wg("peer", stage.victim.public_key, "remove")


def change_a_psk(stage: Stage) -> None:
    stage.wg("peer", stage.victim.public_key, "preshared-key", "/dev/stdin", stdin=format_key(os.urandom(32)))


def clear_a_psk(stage: Stage) -> None:
    stage.wg("peer", stage.victim.public_key, "preshared-key", "/dev/null")


def widen_a_peer(stage: Stage) -> None:
    stage.wg("peer", stage.victim.public_key, "allowed-ips", f"{stage.victim.address}/32,10.8.99.0/24")


def move_a_prefix_to_a_stranger(stage: Stage) -> None:
    stage.wg("peer", format_key(os.urandom(32)), "allowed-ips", f"{stage.victim.address}/32")


def change_the_port(stage: Stage) -> None:
    stage.wg("listen-port", "51999")


def admit_a_prefix(stage: Stage) -> None:
    stage.nft("add", "element", "inet", stage.guard(), "sessions4_32", "{ 10.8.0.77 timeout 1h }")


def flush_our_table(stage: Stage) -> None:
    stage.nft("flush", "table", "inet", stage.guard())


def delete_our_table(stage: Stage) -> None:
    stage.nft("delete", "table", "inet", stage.guard())


def restart_nftables(stage: Stage) -> None:
    stage.nft("-f", "-", stdin=f"flush ruleset\n{FOREIGN_TABLE}")


def take_the_address(stage: Stage) -> None:
    stage.site.gateway.ip("address", "flush", "dev", stage.name)


def change_the_mtu(stage: Stage) -> None:
    stage.site.gateway.ip("link", "set", stage.name, "mtu", "1300")


def take_the_link_down(stage: Stage) -> None:
    stage.site.gateway.ip("link", "set", stage.name, "down")


def delete_the_interface(stage: Stage) -> None:
    stage.site.gateway.ip("link", "del", stage.name)


DRIFT = (
    Drift(add_a_peer, "peer_added"),
    Drift(remove_a_peer, "peer_removed"),
    Drift(change_a_psk, "preshared_key"),
    Drift(clear_a_psk, "preshared_key"),
    Drift(widen_a_peer, "allowed_ips"),
    Drift(move_a_prefix_to_a_stranger, "peer_added"),
    # Its chains still drop what no rule lets through: closed, until the rules are back.
    Drift(flush_our_table, "guard", harmless=False),
    Drift(delete_our_table, "guard"),
    Drift(restart_nftables, "guard"),
    Drift(change_the_mtu, "mtu", harmless=False),
    Drift(change_the_port, "listen_port", harmless=False),
    Drift(take_the_address, "address", harmless=False),
    Drift(take_the_link_down, "link_down", harmless=False),
    Drift(delete_the_interface, "interface", harmless=False),
)


def as_it_is(stage: Stage) -> tuple[object, ...]:
    """All that the agent has made: interface, peers, addresses, table; without what counts by itself."""
    gateway = stage.site.gateway
    try:
        rows = stage.site.shown()
    except RuntimeError:  # there is no interface, or nobody behind it yet
        return ()
    shown = {key: (row["preshared_key"], sorted(row["allowed_ips"].split(","))) for key, row in rows.items()}
    link = gateway.run("ip", "-o", "link", "show", stage.name, check=False).stdout.split()
    port = gateway.run("wg", "show", stage.name, "listen-port", check=False).stdout
    addresses = gateway.run("ip", "-o", "address", "show", stage.name, check=False).stdout.split()
    table = gateway.run("nft", "-st", "list", "table", "inet", stage.guard(), check=False).stdout
    # A chain that went with its interface is made again after the others.
    parts = sorted(part.strip() for part in table.strip().removesuffix("}").split("\n\n"))
    elements = gateway.run("nft", "-s", "list", "table", "inet", stage.guard(), check=False).stdout
    admitted = [c.address in elements for c in (stage.victim, stage.bystander)]
    return (
        *(shown, port, "UP" in str(link), link[link.index("mtu") + 1] if "mtu" in link else None),
        *([a for a in addresses if a.startswith("10.8.0.1/")], parts, admitted),
    )


class Foreign:
    """An interface and a table of somebody else beside ours."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.name = interface_name()
        space.run("ip", "link", "add", self.name, "type", "veth")
        space.ip("address", "add", "10.66.0.1/24", "dev", self.name)
        space.ip("link", "set", self.name, "up")
        space.run("nft", "-f", "-", stdin=FOREIGN_TABLE)

    def state(self) -> tuple[str, ...]:
        said = (
            self.space.run("ip", "-d", "address", "show", "dev", self.name).stdout,
            self.space.run("ip", "route", "show", "table", "all", "dev", self.name).stdout,
            self.space.run("nft", "list", "table", "ip", "theirs").stdout,
            self.space.run("sysctl", "net.ipv4.ip_forward").stdout,
        )
        return tuple(" ".join(word for word in text.split() if "sec" not in word) for text in said)


def drift_is_healed(folder: Path, seen: Seen) -> None:
    with Site(folder, location={"mtu": 1420}) as site:
        victim, bystander = site.add_clients(2)
        foreign = Foreign(site.gateway)
        theirs = foreign.state()
        site.start_agent()
        for client in (victim, bystander):
            site.attach(client)
            connect(site, client)
        stage = Stage(site, victim, bystander)
        right = until(lambda: as_it_is(stage) if len(site.shown()) == 2 else None)
        slowest, lost = 0.0, 0
        for drift in DRIFT:
            counted = sum(line["kind"] == drift.kind for line in site.logged("drift"))
            with ping(bystander) as pings:
                pings.wait_reply(60)
                drift.do(stage)
                began = time.monotonic()
                what = drift.do.__name__
                until(
                    lambda: sum(x["kind"] == drift.kind for x in site.logged("drift")) > counted,  # noqa: B023
                    NOTICED,
                    f"a word of it: {what}",
                )
                until(lambda: as_it_is(stage) == right, NOTICED, f"the healing: {what}")
                slowest = max(slowest, time.monotonic() - began)
                if drift.kind != "interface":
                    pings.wait_reply(60)
            if drift.harmless:
                lost += pings.lost
                assert pings.losses() == [], what
            assert foreign.state() == theirs, what
        for kind in {drift.kind for drift in DRIFT}:
            assert site.metric(f'wg_agent_drift_total{{kind="{kind}"}}') >= 1
        seen(tried=len(DRIFT), lost=lost, note=f"healed within {slowest:.1f} s at the latest")


@pytest.mark.reliability(
    "somebody adds, removes or alters peers, keys, prefixes, addresses, MTU, port, link, interface or our"
    " table, or restarts nftables",
    "noticed, said, counted, healed; bystanders lose nothing; foreign interface, table and routes stay",
)
@here_and_at_full_size_on_the_kernel
def test_drift_is_healed_and_nothing_foreign_is_touched(tmp_path: Path, seen: Seen, where: str) -> None:
    drift_is_healed(tmp_path, seen)
