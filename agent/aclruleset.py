"""Core's access rules in nftables' own language: a table beside the guard's, and what puts it in force.

The chains that judge and translate packets come in two generations. The new ones are filled where no packet
passes; then one transaction turns all traffic to them, in which nothing but their names is new. Rules put in
force together with their sets would not do: the kernel turns to the new rules first, and where it keeps a set
of ranges as an array (Linux 6.18 does) fills that a moment later. With rules flushed and added in one
transaction 3,066 of 46,178 packets that old and new rules deny came through. Hooks stay where they are.

``accept`` in here only means that this table has no objection: every other one at the same hook, the
operator's and the guard's, still judges the packet.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from agent.acl import ICMP, TCP, UDP, Acl, AclRule, AddressRange, SnatBinding
from agent.model import Prefix
from agent.ruleset import ADDRESS, OWNER, Rule, table_name

Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, Slot]] = ("a", "b")
"""The generations of chains, of which one is in force."""
POSTROUTING: Final = "postrouting"
_SRCNAT: Final = 100  # nft's name for the priority of source NAT
_BITS: Final[dict[int, int]] = {4: 32, 6: 128}
_MOST_PORT: Final = 0xFFFF
_NAMES: Final = {TCP: "tcp", UDP: "udp"}
_ICMP: Final = {4: "icmp", 6: "icmpv6"}
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._,:/@()+=-]")
_COMMENT_SIZE: Final = 120
"""Characters of a rule's comment; nft takes 128 bytes, its own marks among them."""


class Line(NamedTuple):
    """A rule of one of our chains; ``note`` says for a reader whose it is."""

    text: str
    note: str = ""

    @property
    def comment(self) -> str:
        """What the rule is known by in the kernel: the mark that the guard's have too, and the note.

        The note is core's word: characters that could mean something to nft are replaced.
        """
        return f"{Rule('', self.text).comment} {_UNSAFE.sub('?', self.note)}"[:_COMMENT_SIZE].rstrip()


class Hook(NamedTuple):
    """Where a base chain of ours is hooked in: its type, its hook and its priority."""

    kind: str
    hook: str
    priority: int


@dataclass(frozen=True, slots=True)
class AclTable:
    """What the table of one interface is to hold, whichever slot is in force.

    ``judged`` are the rules for what comes in by the interface, empty: nothing is judged; ``translated``
    those for what leaves by another one. ``translates``: there is a chain for them, with rules or without.
    """

    interface: str
    priority: int
    judged: tuple[Line, ...]
    translated: tuple[Line, ...]
    translates: bool

    @property
    def forward(self) -> str:
        """The chain at the forward hook, named by its priority, because that can't be changed."""
        return f"forward_{self.priority}"

    @property
    def hooks(self) -> dict[str, Hook]:
        """Where the base chains are hooked in."""
        hooks: dict[str, Hook] = {}
        if self.judged:
            hooks[self.forward] = Hook("filter", "forward", self.priority)
        if self.translates:
            hooks[POSTROUTING] = Hook("nat", "postrouting", _SRCNAT)
        return hooks

    def base(self, slot: Slot) -> dict[str, tuple[Line, ...]]:
        """The rules of the base chains, with this slot in force.

        Traffic that does not concern the interface is left alone; so are new flows to peers.
        """
        chains: dict[str, tuple[Line, ...]] = {}
        if self.judged:
            chains[self.forward] = (Line(f'iifname "{self.interface}" jump access_{slot}'),)
        if self.translates:
            jump = Line(f'oifname != "{self.interface}" jump snat_{slot}')
            chains[POSTROUTING] = (jump,) if self.translated else ()
        return chains

    def aside(self, slot: Slot) -> dict[str, tuple[Line, ...]]:
        """The chains of this slot with their rules."""
        both = {f"access_{slot}": self.judged, f"snat_{slot}": self.translated}
        return {chain: lines for chain, lines in both.items() if lines}

    def over(self, chains: Collection[str]) -> AclTable:
        """The same where these chains are there: one that has translated flows stays as long as the table.

        Flows are no longer translated once the last chain of this type is gone.
        """
        return replace(self, translates=self.translates or POSTROUTING in chains)


def acl_table_name(interface: str) -> str:
    """Return the table's name, which no guard of whatever interface has; ValueError as ``table_name``."""
    return table_name(interface).replace("wg_agent_", "wg_agent.acl_", 1)


def acl_table(interface: str) -> str:
    """Return the table as commands address it."""
    return f"inet {acl_table_name(interface)}"


def access_table(
    interface: str, acl: Acl | None, networks: Iterable[Prefix] = (), priority: int = 0
) -> AclTable | None:
    """Return what puts these rules in force and masquerades these networks; None if that takes no table.

    Raises ValueError for what is no address, port or protocol.
    """
    judged = () if acl is None else tuple(_judged(acl))
    translated = (*(() if acl is None else map(_snat, acl.snat)), *_masqueraded(networks))
    if not judged and not translated:
        return None
    return AclTable(interface, priority, judged, translated, bool(translated))


def _judged(acl: Acl) -> Iterator[Line]:
    """Yield the rules for what comes in by the interface, in their order.

    What conntrack calls invalid is judged like a new flow: with several gateways it sees one half of some.
    """
    yield Line("ct state established,related accept")
    for rule in acl.rules:
        yield from _rule(rule)
    yield Line(acl.default.value, "default")


def _rule(rule: AclRule) -> Iterator[Line]:
    sources = _addresses("saddr", rule.version, rule.sources)
    destinations = _addresses("daddr", rule.version, rule.destinations)
    family = "" if sources or destinations else f"meta nfproto ipv{rule.version}"
    note = f"rule {rule.id} {rule.comment}"
    for flow in _flows(rule):
        parts = (family, sources, destinations, flow, rule.verdict.value)
        yield Line(" ".join(filter(None, parts)), note)


def _flows(rule: AclRule) -> Iterator[str]:
    """Yield what the rule demands of the transport: with ports, and for protocols that have none."""
    protocols = sorted(set(rule.protocols)) or ([TCP, UDP] if rule.ports else [])
    if any(not 0 <= protocol <= 0xFF for protocol in protocols):
        raise ValueError("a protocol is a number from 0 to 255")
    with_ports = [protocol for protocol in protocols if rule.ports and protocol in _NAMES]
    others = [protocol for protocol in protocols if protocol not in with_ports]
    if with_ports:
        yield f"{_protocols(rule.version, with_ports)} {_ports(rule)}".rstrip()
    if others or not protocols:
        yield _protocols(rule.version, others)


def _protocols(version: int, protocols: Iterable[int]) -> str:
    names = _NAMES | {ICMP: _ICMP[version]}
    return _match("meta l4proto", [names.get(protocol, str(protocol)) for protocol in protocols])


def _ports(rule: AclRule) -> str:
    ranges = merged(rule.ports)
    if ranges[0][0] < 0 or ranges[-1][1] > _MOST_PORT:
        raise ValueError("a port is a number from 0 to 65535")
    if ranges == [(0, _MOST_PORT)]:
        return ""
    return _match("th dport", [str(a) if a == b else f"{a}-{b}" for a, b in ranges])


def _snat(binding: SnatBinding) -> Line:
    version = _version(binding.public_ip)
    if not binding.sources:
        raise ValueError("an SNAT binding has sources")
    sources = _addresses("saddr", version, binding.sources) or f"meta nfproto ipv{version}"
    _, protocol, family = ADDRESS[version]
    to = socket.inet_ntop(family, binding.public_ip)
    return Line(f"{sources} snat {protocol} to {to}", f"snat {binding.id} {binding.comment}")


def _masqueraded(networks: Iterable[Prefix]) -> Iterator[Line]:
    """Yield a rule for each IP version; a network of all addresses is nobody's own, and is left out."""
    ranges: dict[int, list[AddressRange]] = {4: [], 6: []}
    for packed, length in networks:
        version = _version(packed)
        if not 0 <= length <= _BITS[version]:
            raise ValueError("a network's length is none")
        if length:
            rest = (1 << (_BITS[version] - length)) - 1
            last = (int.from_bytes(packed, "big") | rest).to_bytes(len(packed), "big")
            ranges[version].append(AddressRange(packed, last))
    for version, found in ranges.items():
        if found:
            sources = _addresses("saddr", version, found) or f"meta nfproto ipv{version}"
            yield Line(f"{sources} masquerade", "networks of the VPN")


def _addresses(way: str, version: int, ranges: Iterable[AddressRange]) -> str:
    """Return the match on these addresses; "" if it is any of this version."""
    _, protocol, family = ADDRESS[version]
    bits = _BITS[version]
    size = bits // 8
    numbers = []
    for first, last in ranges:
        if len(first) != size or len(last) != size:
            raise ValueError("an address is of another IP version than its rule")
        numbers.append((int.from_bytes(first, "big"), int.from_bytes(last, "big")))

    def text(number: int) -> str:
        return socket.inet_ntop(family, number.to_bytes(size, "big"))

    elements = []
    for first_, last_ in merged(numbers):
        count = last_ - first_ + 1
        if count == 1 << bits:
            return ""
        if count == 1:
            elements.append(text(first_))
        elif count.bit_count() == 1 and not first_ % count:
            elements.append(f"{text(first_)}/{bits - count.bit_length() + 1}")
        else:
            elements.append(f"{text(first_)}-{text(last_)}")
    return _match(f"{protocol} {way}", elements)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same numbers as ascending ranges that neither overlap nor touch: nft refuses any other.

    Raises ValueError for one that ends before it begins.
    """
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if first > last:
            raise ValueError("a range ends before it begins")
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _match(what: str, elements: list[str]) -> str:
    """Return the match on one of these; "" if there are none."""
    if len(elements) < 2:
        return f"{what} {elements[0]}" if elements else ""
    return f"{what} {{ {', '.join(elements)} }}"


def _version(packed: bytes) -> int:
    if len(packed) not in {4, 16}:
        raise ValueError("an address has 4 or 16 bytes")
    return 4 if len(packed) == 4 else 6


def prepare(table: AclTable, slot: Slot, wrong: Collection[str] = ()) -> list[str]:
    """Return the transaction that fills this slot, which must not be in force; no packet notices.

    Base chains that are missing get hooked in by it, without rules, so that there is no packet that has
    passed their place when there are. ``wrong`` are those that are hooked in elsewhere.
    """
    name = acl_table(table.interface)
    commands = [f'add table {name} {{ comment "{OWNER}"; }}']
    commands += [_add_base_chain(table, chain) for chain in table.hooks if chain not in wrong]
    for chain, lines in table.aside(slot).items():
        commands += [f"add chain {name} {chain}", f"flush chain {name} {chain}"]
        commands += _add_rules(name, chain, lines)
    return commands


def switch(
    table: AclTable, slot: Slot, strange: Collection[str] = (), wrong: Collection[str] = ()
) -> list[str]:
    """Return the transaction that puts the filled slot in force and removes the ``strange`` chains.

    Each packet is judged by what was in force before, all of it, or by all of the slot. ``wrong`` are the
    base chains that are hooked in elsewhere, and are made anew.
    """
    name = acl_table(table.interface)
    commands = [f"flush chain {name} {chain}" for chain in (*wrong, *strange)]
    commands += [f"delete chain {name} {chain}" for chain in wrong]
    commands += [_add_base_chain(table, chain) for chain in wrong]
    for chain, lines in table.base(slot).items():
        commands += [f"flush chain {name} {chain}", *_add_rules(name, chain, lines)]
    return [*commands, *(f"delete chain {name} {chain}" for chain in strange)]


def _add_base_chain(table: AclTable, chain: str) -> str:
    kind, hook, priority = table.hooks[chain]
    hooked = f"type {kind} hook {hook} priority {priority}; policy accept;"
    return f"add chain {acl_table(table.interface)} {chain} {{ {hooked} }}"


def _add_rules(table: str, chain: str, lines: Iterable[Line]) -> list[str]:
    return [f'add rule {table} {chain} {line.text} comment "{line.comment}"' for line in lines]


def remove(interface: str) -> list[str]:
    """Return the transaction that removes the table, if it is there."""
    return [f"{verb} table {acl_table(interface)}" for verb in ("add", "delete")]
