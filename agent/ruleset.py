"""The guard's table in nftables' own language: the commands that make and change it.

One set for each prefix length in use, each looked up by the masked address: prefixes can then neither
overlap nor nest within a set (a nested prefix makes nft refuse a whole transaction on an interval set),
and a change costs the same however many there are. Sets, chains and rules are commands; elements are values
(``agent.nftelements``), or commands where both have to change at once. In those, times are written as whole
seconds and milliseconds, because nft refuses a number of more than eight digits.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from agent.guard import Admission
from agent.model import Prefix
from agent.nftelements import ElementChange, Verb

OWNER: Final = "made by wg-agent, which owns this table"
LEASE_SET: Final = "lease"
SHORTEST: Final = 0.01
"""Seconds: one tick of the slowest clock that a kernel is built with (100 Hz). A shorter time could be
counted as no ticks at all, which to nftables means that the element never expires."""
_LONGEST: Final = 99_999_999
NAME_SIZE: Final = 16  # IFNAMSIZ
_VERSIONS: Final = {4: 4, 16: 6}
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-]")


class Kind(StrEnum):
    """What a set's prefixes are: of live sessions (timed), of MFA peers, of peers without sessions."""

    SESSION = "session"
    BARRED = "barred"
    EXEMPT = "exempt"


class PrefixSet(NamedTuple):
    """One set of prefixes: its kind, the IP version and the prefixes' length in bits."""

    kind: Kind
    version: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.version}_{self.length}"


ALWAYS: Final = frozenset(PrefixSet(k, v, n) for k in Kind for v, n in ((4, 32), (6, 128)))
"""The sets of single hosts, which are there from the start."""

_VERDICTS: Final = {Kind.SESSION: "accept", Kind.BARRED: "drop", Kind.EXEMPT: "accept"}
_Place = tuple[int, int, bool]
"""IP version and prefix length, and whether the table has nothing of these prefixes yet."""
ADDRESS: Final = {4: ("ipv4_addr", "ip", socket.AF_INET), 6: ("ipv6_addr", "ip6", socket.AF_INET6)}
_DIRECTIONS: Final = (("from", "saddr"), ("to", "daddr"))
BASE: Final = ("ingress", "postrouting")
CHAINS: Final = (*BASE, *(f"{way}_{kind.value}" for way, _ in _DIRECTIONS for kind in Kind))


def table_name(interface: str) -> str:
    """Return the table's name: other characters than nft takes bare become ".hh", so no two are alike.

    Raises ValueError for a name that nft can't quote, or that it takes for a wildcard.
    """
    if (
        not interface
        or not interface.isascii()
        or not interface.isprintable()
        or set(interface) & set('"*\\')
    ):
        raise ValueError("nftables can't name this interface")
    return "wg_agent_" + "".join(c if _PLAIN_NAME.match(c) else f".{ord(c):02x}" for c in interface)


def table(interface: str) -> str:
    """Return the table as commands address it."""
    return f"inet {table_name(interface)}"


def milliseconds(seconds: float) -> int | None:
    """Return an element's life in whole milliseconds, rounded down; None for less than SHORTEST.

    So for NaN. Zero must never be written: nftables takes it for "no timeout of its own".
    """
    if not seconds >= SHORTEST:
        return None
    return math.floor(min(seconds, _LONGEST) * 1000)


class Rule(NamedTuple):
    """A rule of ours. In the kernel its comment carries a digest of its text, to know it again."""

    chain: str
    text: str

    @property
    def comment(self) -> str:
        """What marks the rule as ours and as this one."""
        return f"wg-agent {hashlib.blake2s(self.text.encode(), digest_size=6).hexdigest()}"


def rules(interface: str, sets: Iterable[PrefixSet], *, leased: bool) -> list[Rule]:
    """Return every rule in its order; ``leased``: sessions pass only while the agent's lease lasts."""
    listed = [Rule("postrouting", f'oifname != "{interface}" accept')]
    for base, device, (way, _) in zip(BASE, ("iifname", "oifname"), _DIRECTIONS, strict=True):
        lease = f"{device} @{LEASE_SET} " if leased else ""
        listed += [
            Rule(base, f"{lease}jump {way}_{Kind.SESSION.value}"),
            Rule(base, f"jump {way}_{Kind.BARRED.value}"),
            Rule(base, f"jump {way}_{Kind.EXEMPT.value}"),
        ]
    listed.append(Rule("postrouting", "drop"))
    for one in sorted(sets):
        listed += set_rules(one)
    return listed


def set_rules(one: PrefixSet) -> list[Rule]:
    """Return the two rules that look into one set."""
    _, protocol, family = ADDRESS[one.version]
    bits = 32 if one.version == 4 else 128
    mask = ""
    if one.length != bits:
        number = ((1 << one.length) - 1) << (bits - one.length)
        mask = f"& {socket.inet_ntop(family, number.to_bytes(bits // 8, 'big'))} "
    verdict = _VERDICTS[one.kind]
    return [
        Rule(f"{way}_{one.kind.value}", f"{protocol} {field_} {mask}@{one} {verdict}")
        for way, field_ in _DIRECTIONS
    ]


def add_rules(interface: str, listed: Iterable[Rule]) -> list[str]:
    """Return the commands that append rules."""
    name = table(interface)
    return [f'add rule {name} {rule.chain} {rule.text} comment "{rule.comment}"' for rule in listed]


def add_set(interface: str, one: PrefixSet) -> str:
    """Return the command that makes a set; a timed one lets an element without a timeout go in 1 s."""
    timeout = "timeout 1s; " if one.kind is Kind.SESSION else ""
    return f"add set {table(interface)} {one} {{ type {ADDRESS[one.version][0]}; {timeout}}}"


def add_base_chain(interface: str, chain: str) -> str:
    hook = f'hook ingress device "{interface}"' if chain == "ingress" else "hook postrouting"
    policy = "drop" if chain == "ingress" else "accept"
    return f"add chain {table(interface)} {chain} {{ type filter {hook} priority 0; policy {policy}; }}"


def create(interface: str, sets: Iterable[PrefixSet], *, leased: bool) -> list[str]:
    """Return the commands that make the whole table, without elements."""
    sets = frozenset(sets)
    return [*create_sets(interface, sets), *create_chains(interface, sets, leased=leased)]


def create_sets(interface: str, sets: Iterable[PrefixSet]) -> list[str]:
    """Return the commands that make the table with its sets: nothing is judged by it yet."""
    name = table(interface)
    return [
        f'add table {name} {{ comment "{OWNER}"; }}',
        f"add set {name} {LEASE_SET} {{ type ifname; timeout 1s; }}",
        *(add_set(interface, one) for one in sorted(sets)),
    ]


def create_chains(interface: str, sets: Iterable[PrefixSet], *, leased: bool) -> list[str]:
    """Return the commands that make its chains and rules: from then on it is in force."""
    return [
        *(add_base_chain(interface, chain) for chain in BASE),
        *(f"add chain {table(interface)} {chain}" for chain in CHAINS if chain not in BASE),
        *add_rules(interface, rules(interface, sets, leased=leased)),
    ]


def renew(interface: str, seconds: float) -> list[ElementChange]:
    """Return the changes that give the lease so many seconds from now."""
    return _anew(LEASE_SET, {interface.encode("ascii").ljust(NAME_SIZE, b"\0"): milliseconds(seconds)})


class Admit(NamedTuple):
    """What admits peers: commands that make the sets they need, then changes of elements."""

    commands: list[str]
    changes: list[ElementChange]
    sets: frozenset[PrefixSet]
    """The sets that there are then."""


def admit(
    interface: str,
    admissions: Iterable[Admission],
    sets: frozenset[PrefixSet],
    late: float = 0.0,
    *,
    empty: bool = False,
) -> Admit:
    """Return what admits these peers to a table with these sets, ``late`` seconds after it was asked for.

    ``empty``: there are no elements yet.

    Safe whatever is there, expired or not, unless the admission says that nothing is. A session with less
    than SHORTEST left is barred, not admitted.
    """
    timed: defaultdict[_Place, dict[bytes, int | None]] = defaultdict(dict)
    exempt: defaultdict[_Place, dict[bytes, None]] = defaultdict(dict)
    for prefixes, remaining, fresh in admissions:
        if remaining is None:
            for packed, length in prefixes:
                exempt[_VERSIONS[len(packed)], length, fresh or empty][packed] = None
            continue
        life = milliseconds(remaining - late)
        for packed, length in prefixes:
            timed[_VERSIONS[len(packed)], length, fresh or empty][packed] = life
    needed = {PrefixSet(kind, v, n) for v, n, _ in timed for kind in (Kind.SESSION, Kind.BARRED)}
    needed |= {PrefixSet(Kind.EXEMPT, v, n) for v, n, _ in exempt}
    new = sorted(needed - sets)
    commands = [add_set(interface, one) for one in new]
    commands += add_rules(interface, (rule for one in new for rule in set_rules(one)))
    changes: list[ElementChange] = []
    for (*place, fresh), lives in timed.items():
        session, barred, other = (PrefixSet(kind, *place) for kind in Kind)
        addresses = dict.fromkeys(lives)
        changes += _added(session, lives, timed=True) if fresh else _anew(str(session), lives)
        changes += _added(barred, addresses)
        if other in sets and not fresh:
            changes += _gone(str(other), addresses)
    for (*place, fresh), addresses in exempt.items():
        session, barred, other = (PrefixSet(kind, *place) for kind in Kind)
        changes += _added(other, addresses)
        for one in () if fresh else (session, barred):
            if one in sets:
                changes += _gone(str(one), addresses)
    return Admit(commands, changes, sets | needed)


def dismiss(prefixes: Iterable[Prefix], sets: frozenset[PrefixSet]) -> list[ElementChange]:
    """Return the changes that take these prefixes out of every set, there or not, expired or not."""
    places: defaultdict[tuple[int, int], dict[bytes, None]] = defaultdict(dict)
    for packed, length in prefixes:
        places[_VERSIONS[len(packed)], length][packed] = None
    changes: list[ElementChange] = []
    for place, addresses in places.items():
        for one in (PrefixSet(kind, *place) for kind in Kind):
            if one in sets:
                changes += _gone(str(one), addresses)
    return changes


def as_commands(interface: str, changes: Iterable[ElementChange]) -> list[str]:
    """Return the same in nft's language, for a transaction that changes more than elements."""
    name = table(interface)
    return [
        f"{verb.name.lower()} element {name} {place} {{ {', '.join(_texts(place, elements))} }}"
        for verb, place, elements in changes
        if elements
    ]


def _texts(place: str, elements: Mapping[bytes, int | None]) -> Iterable[str]:
    for key, life in elements.items():
        if place == LEASE_SET:
            text = f'"{key.rstrip(bytes(1)).decode("ascii")}"'
        else:
            text = socket.inet_ntop(socket.AF_INET if len(key) == 4 else socket.AF_INET6, key)
        yield text if life is None else f"{text} timeout {life // 1000}s{life % 1000}ms"


def _anew(place: str, lives: Mapping[bytes, int | None]) -> list[ElementChange]:
    """Add, delete, add those with a time: deleting what has expired fails, so it is added first."""
    return [*_gone(place, dict.fromkeys(lives)), *_added(place, lives, timed=True)]


def _added(
    place: PrefixSet | str, lives: Mapping[bytes, int | None], *, timed: bool = False
) -> list[ElementChange]:
    """Add them; if ``timed`` only those that have a time."""
    if timed:
        lives = {key: life for key, life in lives.items() if life is not None}
    return [ElementChange(Verb.ADD, str(place), lives)] if lives else []


def _gone(place: str, keys: Mapping[bytes, None]) -> list[ElementChange]:
    return [ElementChange(verb, place, keys) for verb in (Verb.ADD, Verb.DELETE)]
