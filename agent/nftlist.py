"""The tables of ours as nft lists them: read back, judged, and put right.

nft's native listing is read rather than its JSON, which (1.0.6) leaves out the device of an inet chain; and
without elements, which the kernel is asked for (``agent.nftelements``). Rules are known by the digest in
their comment, because every version of nft words the same rule in its own way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, NamedTuple

from agent.aclruleset import SLOTS, AclTable, Slot, prepare, switch
from agent.guard import GuardContents
from agent.model import Prefix
from agent.ruleset import (
    ADDRESS,
    ALWAYS,
    BASE,
    CHAINS,
    LEASE_SET,
    NAME_SIZE,
    OWNER,
    Kind,
    PrefixSet,
    add_base_chain,
    add_rules,
    add_set,
    rules,
    table,
)

_SET_NAME: Final = re.compile(rf"({'|'.join(k.value for k in Kind)})([46])_(\d{{1,3}})")


class Hook(NamedTuple):
    """Where a base chain is hooked in: hook, device ("" for none), priority, policy.

    The hook has the chain's type before it, unless that is "filter".
    """

    hook: str
    device: str
    priority: str
    policy: str


def _hook(interface: str, chain: str) -> Hook:
    if chain == "ingress":
        return Hook("ingress", interface, "0", "drop")
    return Hook("postrouting", "", "0", "accept")


@dataclass(slots=True)
class HeldChain:
    """A chain as listed: its hook (None: not a base chain) and its rules' comments ("" for none)."""

    hook: Hook | None = None
    rules: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Listing:
    """The table as nft lists it, without elements. ``owned`` tells by its comment whether it is ours.

    ``dormant``: somebody has switched it off, and nothing of it is in force.
    """

    owned: bool = False
    dormant: bool = False
    sets: set[PrefixSet] = field(default_factory=set)
    has_lease: bool = False
    broken_sets: list[str] = field(default_factory=list)
    chains: dict[str, HeldChain] = field(default_factory=dict)

    def leased(self, interface: str) -> bool | None:
        """Whether the chains demand the agent's lease; None if they are not all as we make them."""
        for leased in (True, False):
            if not self.faults(interface, leased=leased):
                return leased
        return None

    def faults(self, interface: str, *, leased: bool) -> list[str]:
        """Return what is missing or foreign in sets, chains and rules, in words."""
        faults = ["the table is dormant"] if self.dormant else []
        faults += [f"the set {name} is not as the agent made it" for name in self.broken_sets]
        if not self.has_lease and LEASE_SET not in self.broken_sets:
            faults.append(f"the set {LEASE_SET} is gone")
        faults += [f"the set {one} is gone" for one in sorted(ALWAYS - self.sets)]
        expected: dict[str, list[str]] = {chain: [] for chain in CHAINS}
        for rule in rules(interface, self.sets, leased=leased):
            expected[rule.chain].append(rule.comment)
        for name, comments in expected.items():
            chain = self.chains.get(name)
            if chain is None:
                faults.append(f"the chain {name} is gone")
            elif chain.hook != (_hook(interface, name) if name in BASE else None):
                faults.append(f"the chain {name} is not hooked in where it should be")
            elif (chain.rules if name in BASE else sorted(chain.rules)) != (
                comments if name in BASE else sorted(comments)
            ):
                faults.append(f"the rules of the chain {name} are not those of the agent")
        faults += [f"there is a foreign chain {name}" for name in self.chains if name not in expected]
        return faults

    def contents(self, interface: str, elements: Mapping[str, Mapping[bytes, float | None]]) -> GuardContents:
        """Return what the table holds, in the words of the guard.

        ``elements`` are those of each set by its name: their keys with the seconds that are left.
        """
        leased = self.leased(interface)
        let_through: dict[Prefix, float | None] = {}
        barred: list[Prefix] = []
        for one in sorted(self.sets, key=lambda one: one.kind is Kind.EXEMPT, reverse=True):
            held = elements.get(str(one), {})
            prefixes = [Prefix(packed, one.length) for packed in held]
            if one.kind is Kind.BARRED:
                barred += prefixes
            elif one.kind is Kind.EXEMPT:
                let_through.update(dict.fromkeys(prefixes))
            else:
                for prefix, left in zip(prefixes, held.values(), strict=True):
                    let_through.setdefault(prefix, math.inf if left is None else left)
        lease = elements.get(LEASE_SET, {}).get(interface.encode("ascii").ljust(NAME_SIZE, b"\0"), 0.0)
        return GuardContents(
            let_through,
            frozenset(barred),
            (math.inf if lease is None else lease) or None,
            leased is not False,
            tuple(self.faults(interface, leased=leased is not False)),
        )


_BLOCK: Final = re.compile(r"(table|set|chain|map|flowtable|counter|quota|limit|secmark|synproxy) .*\{")
_BASE_CHAIN: Final = re.compile(
    r'type (\w+) hook (\w+)(?: devices? (?:= )?\{? ?"?([^" ;}]*)"? ?\}?)? priority ([^;]+); policy (\w+);'
)
_PRIORITIES: Final = {
    "raw": -300,
    "mangle": -150,
    "dstnat": -100,
    "filter": 0,
    "security": 50,
    "srcnat": 100,
}
"""The priorities that nft has a name for; it lists those beside them with what is added or taken away."""
_RULE_COMMENT: Final = re.compile(r'comment "([^"]*)"$')


def table_part(text: str, name: str) -> str | None:
    """Return a table's part of nft's listing, by family and name; None if it is not among them."""
    first = f"table {name} {{"
    lines = iter(text.splitlines())
    for line in lines:
        if line == first:
            return "\n".join((first, *takewhile(lambda line: line != "}", lines), "}"))
    return None


def parse(text: str) -> Listing:
    """Read nft's listing of the table, in its native format; raises ValueError for what it can't be."""
    listing = Listing()
    lines = iter(text.splitlines())
    for line in lines:
        match line.split():
            case ["comment", *_]:
                listing.owned |= line.strip() == f'comment "{OWNER}"'
            case ["flags", "dormant"]:
                listing.dormant = True
            case ["set", name, "{"]:
                _parse_set(listing, name, lines)
            case ["chain", name, "{"]:
                listing.chains[name] = _parse_chain(lines)
            case ["table", *_] | ["}"] | []:
                pass
            case _ if _BLOCK.match(line.strip()):
                for inner in lines:
                    if inner == "\t}":
                        break
            case _:
                raise ValueError(f"nft lists something unknown: {line.strip()[:80]}")
    return listing


def _parse_set(listing: Listing, name: str, lines: Iterator[str]) -> None:
    properties: dict[str, str] = {}
    for line in lines:
        if line == "\t}":
            break
        word, _, rest = line.strip().partition(" ")
        if word == "elements":
            while not rest.endswith("}"):
                rest = next(lines, "}")
        else:
            properties[word] = rest
    else:
        raise ValueError("nft's listing is cut off")
    properties.pop("size", None)
    properties.pop("comment", None)
    timed = properties.pop("timeout", None)
    # nft leaves "flags timeout" out where the set has a timeout of its own.
    plain = properties.pop("flags", "timeout" if timed else "") == ("timeout" if timed else "")
    plain = plain and properties.keys() == {"type"}
    if name == LEASE_SET:
        listing.has_lease = plain and timed == "1s" and properties["type"] == "ifname"
        if not listing.has_lease:
            listing.broken_sets.append(name)
    elif one := _prefix_set(name):
        wanted = "1s" if one.kind is Kind.SESSION else None
        if plain and timed == wanted and properties["type"] == ADDRESS[one.version][0]:
            listing.sets.add(one)
        else:
            listing.broken_sets.append(name)


def _prefix_set(name: str) -> PrefixSet | None:
    if found := _SET_NAME.fullmatch(name):
        kind, version, length = Kind(found[1]), int(found[2]), int(found[3])
        if length <= (32 if version == 4 else 128):
            return PrefixSet(kind, version, length)
    return None


def _parse_chain(lines: Iterator[str]) -> HeldChain:
    chain = HeldChain()
    for line in lines:
        if line == "\t}":
            break
        text = line.strip()
        if base := _BASE_CHAIN.fullmatch(text):
            hook = base[2] if base[1] == "filter" else f"{base[1]} {base[2]}"
            chain.hook = Hook(hook, base[3] or "", _priority(base[4]), base[5])
        elif text.startswith("type ") and " hook " in text:
            chain.hook = Hook(text, "", "", "")
        else:
            comment = _RULE_COMMENT.search(text)
            chain.rules.append(comment[1] if comment else "")
    return chain


def _priority(text: str) -> str:
    """Return a priority as a number, whatever nft calls it."""
    name, _, offset = text.partition(" ")
    if name not in _PRIORITIES:
        return text
    return str(_PRIORITIES[name] + int(offset.replace(" ", "") or 0))


_FLOWTABLE: Final = re.compile(r"table (\w+) (\S+) \{|flowtable (\S+) \{|devices = \{([^}]*)\}")


def flowtables(text: str, interface: str) -> tuple[str, ...]:
    """Return the flowtables (family, table and name) in nft's listing that take in the interface."""
    found: list[str] = []
    where = flowtable = ""
    for family, table_, name, devices in _FLOWTABLE.findall(text):
        if family:
            where = f"{family} {table_}"
        elif name:
            flowtable = name
        else:
            names = [device.strip().strip('"') for device in devices.split(",")]
            if any(n == interface or (n.endswith("*") and interface.startswith(n[:-1])) for n in names):
                found.append(f"{where} {flowtable}")
    return tuple(found)


def mend(interface: str, held: Listing, sets: Iterable[PrefixSet], *, leased: bool) -> list[str]:
    """Return the commands that put chains and rules right and leave every element where it is.

    Sets that are not as they should be can't be mended: see ``Listing.broken_sets``.
    """
    name = table(interface)
    sets = sorted({*sets, *held.sets})
    strange = [chain for chain in held.chains if chain not in CHAINS]
    wrong = [c for c in BASE if c in held.chains and held.chains[c].hook != _hook(interface, c)]
    lacking = [c for c in BASE if c not in held.chains or c in wrong]
    return [
        f'add table {name} {{ comment "{OWNER}"; }}',  # which wakes a dormant one
        f"add set {name} {LEASE_SET} {{ type ifname; timeout 1s; }}",
        *(add_set(interface, one) for one in sets if one not in held.sets),
        *(f"flush chain {name} {chain}" for chain in held.chains),
        *(f"delete chain {name} {chain}" for chain in (*strange, *wrong)),
        *(add_base_chain(interface, chain) for chain in lacking),
        *(f"add chain {name} {chain}" for chain in CHAINS if chain not in BASE),
        *add_rules(interface, rules(interface, sets, leased=leased)),
    ]


def acl_faults(held: Listing, table: AclTable) -> list[str]:
    """Return what is missing or foreign in the table of access rules, in words."""
    faults = ["the table is dormant"] if held.dormant else []
    faults += [f"the chain {name} is not hooked in where it should be" for name in _acl_wrong(held, table)]
    slot = acl_slot(held, table)
    expected = table.over(held.chains).base(slot) | table.aside(slot)
    for name, lines in expected.items():
        chain = held.chains.get(name)
        if chain is None:
            faults.append(f"the chain {name} is gone")
        elif chain.rules != [line.comment for line in lines]:
            faults.append(f"the rules of the chain {name} are not those of the agent")
    return faults + [f"there is a foreign chain {name}" for name in held.chains if name not in expected]


def acl_slot(held: Listing, table: AclTable) -> Slot:
    """Return the slot that is in force, as far as can be told: the last one if none is."""
    for slot in SLOTS:
        jumps = {line.comment for lines in table.over(held.chains).base(slot).values() for line in lines}
        if any(jumps & set(chain.rules) for chain in held.chains.values()):
            return slot
    return SLOTS[-1]


def _acl_wrong(held: Listing, table: AclTable) -> list[str]:
    """The base chains that are there, and hooked in elsewhere or not at all."""
    hooks = {
        name: Hook(hook if kind == "filter" else f"{kind} {hook}", "", str(priority), "accept")
        for name, (kind, hook, priority) in table.over(held.chains).hooks.items()
    }
    return [name for name, hook in hooks.items() if name in held.chains and held.chains[name].hook != hook]


def acl_change(held: Listing, table: AclTable) -> tuple[list[str], list[str]]:
    """Return the two transactions that make the table what it should be: one aside, one that counts."""
    table = table.over(held.chains)
    now = acl_slot(held, table)
    slot = next(other for other in SLOTS if other != now)
    wrong = _acl_wrong(held, table)
    strange = [name for name in held.chains if name not in table.base(slot) and name not in table.aside(slot)]
    return prepare(table, slot, wrong), switch(table, slot, strange, wrong)
