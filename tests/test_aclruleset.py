"""The table of access rules as text, and over a small model of what nft makes of it."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.acl import ICMP, TCP, UDP, Acl, AclRule, AddressRange, PortRange, SnatBinding, Verdict
from agent.aclruleset import (
    AclTable,
    Line,
    access_table,
    acl_table,
    acl_table_name,
    merged,
    prepare,
    remove,
    switch,
)
from agent.encoding import parse_prefix
from agent.model import Prefix
from agent.nftlist import HeldChain, Hook, Listing, acl_change, acl_faults, parse, table_part
from agent.ruleset import OWNER, table_name
from tests.firewall.rules import OPEN, addresses

GRE = 47


def judged(*rules: AclRule) -> list[str]:
    """The texts of what these rules become."""
    table = access_table("wg0", Acl(Verdict.DROP, rules))
    assert table is not None
    assert [line.text for line in table.judged[:1]] == ["ct state established,related accept"]
    assert table.judged[-1].text == "drop"
    return [line.text for line in table.judged[1:-1]]


def translated(*bindings: SnatBinding, networks: Iterable[Prefix] = ()) -> list[str]:
    table = access_table("wg0", Acl(Verdict.ACCEPT, snat=bindings), networks)
    assert table is not None
    return [line.text for line in table.translated]


def test_a_rule_is_one_line_with_all_it_demands() -> None:
    rule = AclRule(
        7,
        4,
        Verdict.ACCEPT,
        addresses("10.8.0.5", "10.8.0.9-10.8.0.20"),
        addresses("192.0.2.0/24"),
        (PortRange(80, 80), PortRange(8000, 8010)),
        (TCP,),
    )
    (text,) = judged(rule)
    assert text == (
        "ip saddr { 10.8.0.5, 10.8.0.9-10.8.0.20 } ip daddr 192.0.2.0/24 "
        "meta l4proto tcp th dport { 80, 8000-8010 } accept"
    )


def test_a_rule_is_of_its_ip_version_also_without_addresses() -> None:
    assert judged(AclRule(1, 4, Verdict.ACCEPT), AclRule(2, 6, Verdict.DROP)) == [
        "meta nfproto ipv4 accept",
        "meta nfproto ipv6 drop",
    ]
    assert judged(AclRule(3, 6, Verdict.ACCEPT, addresses("fd00::1"))) == ["ip6 saddr fd00::1 accept"]


def test_icmp_is_that_of_the_rules_ip_version() -> None:
    rules = [AclRule(1, version, Verdict.ACCEPT, protocols=(ICMP,)) for version in (4, 6)]
    assert judged(*rules) == [
        "meta nfproto ipv4 meta l4proto icmp accept",
        "meta nfproto ipv6 meta l4proto icmpv6 accept",
    ]


def test_ports_without_protocols_are_those_of_tcp_and_udp() -> None:
    assert judged(AclRule(1, 4, Verdict.ACCEPT, ports=(PortRange(53, 53),))) == [
        "meta nfproto ipv4 meta l4proto { tcp, udp } th dport 53 accept"
    ]


def test_protocols_without_ports_beside_ports_are_a_line_of_their_own() -> None:
    ports = (PortRange(53, 53),)
    rule = AclRule(1, 4, Verdict.DROP, ports=ports, protocols=(UDP, ICMP, GRE))
    assert judged(rule) == [
        "meta nfproto ipv4 meta l4proto udp th dport 53 drop",
        "meta nfproto ipv4 meta l4proto { icmp, 47 } drop",
    ]
    assert judged(AclRule(1, 4, Verdict.DROP, ports=ports, protocols=(ICMP,))) == [
        "meta nfproto ipv4 meta l4proto icmp drop"
    ]


def test_what_takes_in_everything_is_not_asked_for() -> None:
    rule = AclRule(
        1,
        4,
        Verdict.ACCEPT,
        addresses("0.0.0.0/1", "128.0.0.0/1"),
        addresses("10.0.0.1"),
        (PortRange(0, 9), PortRange(10, 0xFFFF)),
        (TCP,),
    )
    assert judged(rule) == ["ip daddr 10.0.0.1 meta l4proto tcp accept"]
    assert judged(AclRule(1, 6, Verdict.ACCEPT, addresses("::/0"))) == ["meta nfproto ipv6 accept"]


def test_snat_bindings_come_before_masquerading() -> None:
    bindings = (
        SnatBinding(3, addresses("10.8.0.5", "10.8.0.6"), socket.inet_aton("192.0.2.77")),
        SnatBinding(4, addresses("::/0"), socket.inet_pton(socket.AF_INET6, "2001:db8::7")),
    )
    networks = map(parse_prefix, ("10.8.0.0/16", "10.9.0.0/16", "fd00:8::/64"))
    assert translated(*bindings, networks=networks) == [
        "ip saddr 10.8.0.5-10.8.0.6 snat ip to 192.0.2.77",
        "meta nfproto ipv6 snat ip6 to 2001:db8::7",
        "ip saddr 10.8.0.0/15 masquerade",
        "ip6 saddr fd00:8::/64 masquerade",
    ]


def test_a_network_of_all_addresses_is_not_masqueraded() -> None:
    assert access_table("wg0", None, map(parse_prefix, ("0.0.0.0/0", "::/0"))) is None
    both = translated(networks=map(parse_prefix, ("0.0.0.0/0", "10.8.0.0/24")))
    assert both == ["ip saddr 10.8.0.0/24 masquerade"]


def test_nothing_to_hold_is_no_table() -> None:
    assert access_table("wg0", None) is None
    assert access_table("wg0", OPEN) is not None


@pytest.mark.parametrize(
    "acl",
    [
        Acl(Verdict.DROP, (AclRule(1, 6, Verdict.ACCEPT, addresses("10.8.0.5")),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, (AddressRange(b"\x0b", b"\x0a"),)),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, (AddressRange(b"bbbb", b"aaaa"),)),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, ports=(PortRange(1, 0x10000),)),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, ports=(PortRange(-1, 7),)),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, ports=(PortRange(9, 8),)),)),
        Acl(Verdict.DROP, (AclRule(1, 4, Verdict.ACCEPT, protocols=(256,)),)),
        Acl(Verdict.DROP, snat=(SnatBinding(1, (), bytes(4)),)),
        Acl(Verdict.DROP, snat=(SnatBinding(1, addresses("10.8.0.5"), bytes(5)),)),
        Acl(Verdict.DROP, snat=(SnatBinding(1, addresses("10.8.0.5"), bytes(16)),)),
    ],
)
def test_what_is_no_address_port_or_protocol_is_refused(acl: Acl) -> None:
    with pytest.raises(ValueError, match=r"."):
        access_table("wg0", acl)


ranges_of_numbers = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple))


@given(ranges_of_numbers)
def test_merged_ranges_hold_the_same_numbers_and_are_apart(ranges: list[tuple[int, int]]) -> None:
    found = merged(ranges)

    def numbers(some: Iterable[tuple[int, int]]) -> set[int]:
        return {number for first, last in some for number in range(first, last + 1)}

    assert numbers(found) == numbers(ranges)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(found))


@given(st.sets(st.integers(0, 63), min_size=1, max_size=40), st.booleans())
def test_the_addresses_of_a_rule_are_those_of_its_text(hosts: set[int], six: bool) -> None:
    base = int(ipaddress.ip_address("fd00::" if six else "10.8.0.0"))
    make = ipaddress.IPv6Address if six else ipaddress.IPv4Address
    every = {make(base + host) for host in hosts}
    rule = AclRule(1, 6 if six else 4, Verdict.ACCEPT, tuple(AddressRange(a.packed, a.packed) for a in every))
    (text,) = judged(rule)
    _, _, listed = text.removesuffix(" accept").partition("saddr ")
    elements = listed.strip("{} ").split(", ")
    assert listed.startswith("{") == (len(elements) > 1)
    found: list[int] = []
    for first, last in addresses(*elements):
        found += range(int.from_bytes(first), int.from_bytes(last) + 1)
    assert sorted(found) == sorted(map(int, every))


@given(st.text(max_size=300))
def test_a_comment_of_cores_can_not_break_out_of_its_quotes(note: str) -> None:
    comment = Line("accept", note).comment
    assert re.fullmatch(r"wg-agent [0-9a-f]{12}( [A-Za-z0-9 ._,:/@()+=?-]*)?", comment)
    assert len(comment) <= 120


def test_a_comment_keeps_what_a_reader_can_use() -> None:
    name = 'Web & "mail"\n(hq) \N{BULLET} a.b/c'
    table = access_table("wg0", Acl(Verdict.DROP, (AclRule(42, 4, Verdict.ACCEPT, comment=name),)))
    assert table is not None
    assert table.judged[1].comment.endswith(" rule 42 Web ? ?mail??(hq) ? a.b/c")


interface_names = st.from_regex(r"(acl[_.])?[A-Za-z0-9_=+.-]{1,11}", fullmatch=True)


@given(interface_names, interface_names)
def test_no_guard_of_any_interface_has_the_name_of_this_table(one: str, other: str) -> None:
    assert acl_table_name(one) != table_name(other)
    assert (acl_table_name(one) == acl_table_name(other)) == (one == other)


# What the transactions do.


class Kernel:
    """Chains as nft would list them, and its refusals; a transaction that fails changes nothing."""

    def __init__(self) -> None:
        self.chains: dict[str, HeldChain] = {}
        self.texts: dict[str, list[str]] = {}

    def listing(self) -> Listing:
        return Listing(owned=True, chains=deepcopy(self.chains))

    def in_force(self) -> dict[str, list[str]]:
        """What packets meet: the base chains and what they jump to."""
        met = [name for name, chain in self.chains.items() if chain.hook is not None]
        for name in met:
            met += [text.split()[-1] for text in self.texts[name] if " jump " in text]
        return {name: list(self.texts[name]) for name in met}

    def run(self, commands: list[str]) -> None:
        for command in commands:
            verb, what, rest = command.split(" ", 2)
            _, name, *arguments = rest.split(" ", 2)
            assert name == acl_table_name("wg0")
            match verb, what:
                case "add", "table":
                    assert OWNER in command
                case "add", "chain":
                    self._add_chain(*arguments[0].split(" ", 1))
                case "flush", "chain":
                    self.chains[arguments[0]].rules.clear()
                    self.texts[arguments[0]].clear()
                case "delete", "chain":
                    assert not self.texts[arguments[0]]
                    jumps = [text for texts in self.texts.values() for text in texts]
                    assert not any(text.endswith(f"jump {arguments[0]}") for text in jumps)
                    del self.chains[arguments[0]], self.texts[arguments[0]]
                case "add", "rule":
                    chain, _, text = arguments[0].partition(" ")
                    text, _, comment = text.partition(" comment ")
                    assert " jump " not in text or text.split()[-1] in self.chains
                    self.chains[chain].rules.append(comment.strip('"'))
                    self.texts[chain].append(text)
                case _:
                    raise AssertionError(command)

    def _add_chain(self, name: str, properties: str = "") -> None:
        hook = None
        if properties:
            found = re.fullmatch(r"\{ type (\w+) hook (\w+) priority (\S+); policy accept; \}", properties)
            assert found
            kind = "" if found[1] == "filter" else f"{found[1]} "
            hook = Hook(f"{kind}{found[2]}", "", found[3], "accept")
        held = self.chains.setdefault(name, HeldChain(hook))
        assert held.hook == hook, "nft does not change where a chain is hooked in"
        self.texts.setdefault(name, [])


def rule_sets() -> st.SearchStrategy[AclTable]:
    ports = st.lists(st.integers(1, 9), max_size=2)
    rules = ports.map(lambda p: tuple(AclRule(n, 4, Verdict.ACCEPT, ports=(PortRange(n, n),)) for n in p))
    snat = st.sampled_from([(), (SnatBinding(1, addresses("10.8.0.5"), bytes(4)),)])
    acls = st.none() | st.builds(Acl, st.sampled_from(Verdict), rules, snat)
    networks = st.sampled_from([(), (parse_prefix("10.8.0.0/16"),)])
    tables = st.builds(access_table, st.just("wg0"), acls, networks, st.sampled_from([-5, 0]))
    return tables.flatmap(lambda table: st.nothing() if table is None else st.just(table))


@given(st.lists(rule_sets(), min_size=1, max_size=5))
def test_each_change_is_filled_aside_and_in_force_at_once(tables: list[AclTable]) -> None:
    kernel = Kernel()
    for table in tables:
        before = kernel.in_force()
        aside, change = acl_change(kernel.listing(), table)
        kernel.run(aside)
        bare: dict[str, list[str]] = {name: [] for name in table.hooks}
        assert kernel.in_force() == bare | before
        kernel.run(change)
        texts = {line.text for line in (*table.judged, *table.translated)}
        base = {f'iifname "wg0" jump access_{s}' for s in "ab"} | {
            f'oifname != "wg0" jump snat_{s}' for s in "ab"
        }
        met = {text for listed in kernel.in_force().values() for text in listed}
        assert met - base == texts
        assert acl_faults(kernel.listing(), table) == []


@given(rule_sets(), rule_sets(), st.data())
def test_whatever_somebody_did_to_the_chains_is_seen_and_mended(
    old: AclTable, table: AclTable, data: st.DataObject
) -> None:
    kernel = Kernel()
    for one in (old, table):
        for commands in acl_change(kernel.listing(), one):
            kernel.run(commands)
    chain = data.draw(st.sampled_from(sorted(kernel.chains)))
    match data.draw(st.sampled_from(["flush", "append", "hook", "another"])):
        case "flush" if kernel.texts[chain]:
            kernel.chains[chain].rules.clear()
            kernel.texts[chain].clear()
        case "hook" if kernel.chains[chain].hook is not None:
            kernel.chains[chain].hook = Hook("forward", "", "77", "accept")
        case "another":
            kernel._add_chain("theirs")
        case _:
            kernel.chains[chain].rules.append("")
            kernel.texts[chain].append("accept")
    assert acl_faults(kernel.listing(), table)
    for commands in acl_change(kernel.listing(), table):
        kernel.run(commands)
    assert acl_faults(kernel.listing(), table) == []


def test_a_change_that_was_cut_in_two_is_mended_by_the_next() -> None:
    table, other = (access_table("wg0", Acl(verdict)) for verdict in Verdict)
    assert table is not None
    assert other is not None
    kernel = Kernel()
    for commands in acl_change(kernel.listing(), table):
        kernel.run(commands)
    kernel.run(acl_change(kernel.listing(), other)[0])
    assert acl_faults(kernel.listing(), table) == ["there is a foreign chain access_b"]
    for commands in acl_change(kernel.listing(), table):
        kernel.run(commands)
    assert acl_faults(kernel.listing(), table) == []


def test_the_transactions_as_nft_gets_them() -> None:
    table = access_table("wg0", Acl(Verdict.DROP), [parse_prefix("10.8.0.0/16")], -5)
    assert table is not None
    name = "inet wg_agent.acl_wg0"
    assert [re.sub(r"wg-agent \w{12}", "#", line) for line in prepare(table, "a")] == [
        f'add table {name} {{ comment "{OWNER}"; }}',
        f"add chain {name} forward_-5 {{ type filter hook forward priority -5; policy accept; }}",
        f"add chain {name} postrouting {{ type nat hook postrouting priority 100; policy accept; }}",
        f"add chain {name} access_a",
        f"flush chain {name} access_a",
        f'add rule {name} access_a ct state established,related accept comment "#"',
        f'add rule {name} access_a drop comment "# default"',
        f"add chain {name} snat_a",
        f"flush chain {name} snat_a",
        f'add rule {name} snat_a ip saddr 10.8.0.0/16 masquerade comment "# networks of the VPN"',
    ]
    assert [re.sub(r"wg-agent \w{12}", "#", line) for line in switch(table, "a", ["access_b"])] == [
        f"flush chain {name} access_b",
        f"flush chain {name} forward_-5",
        f'add rule {name} forward_-5 iifname "wg0" jump access_a comment "#"',
        f"flush chain {name} postrouting",
        f'add rule {name} postrouting oifname != "wg0" jump snat_a comment "#"',
        f"delete chain {name} access_b",
    ]
    assert remove("wg0") == [f"add table {name}", f"delete table {name}"]


def test_a_table_that_is_switched_off_is_at_fault() -> None:
    table = access_table("wg0", OPEN)
    assert table is not None
    kernel = Kernel()
    for commands in acl_change(kernel.listing(), table):
        kernel.run(commands)
    listing = kernel.listing()
    listing.dormant = True
    assert acl_faults(listing, table) == ["the table is dormant"]
    listed = parse(f'table {acl_table("wg0")} {{\n\tflags dormant\n\tcomment "{OWNER}"\n\n}}\n')
    assert (listed.dormant, listed.owned) == (True, True)


def test_a_priority_is_read_whatever_nft_calls_it() -> None:
    names = {
        "filter": "0",
        "filter + 5": "5",
        "filter - 10": "-10",
        "srcnat": "100",
        "raw": "-300",
        "mangle + 1": "-149",
        "-42": "-42",
    }
    for listed, number in names.items():
        text = (
            f"table {acl_table('wg0')} {{\n\tchain c {{\n"
            f"\t\ttype filter hook forward priority {listed}; policy accept;\n\t}}\n}}\n"
        )
        part = table_part(text, acl_table("wg0"))
        assert part is not None
        assert parse(part).chains["c"].hook == Hook("forward", "", number, "accept")
