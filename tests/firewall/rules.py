"""Access rules in few words."""

import ipaddress
from collections.abc import Iterable
from typing import Any

from agent.acl import TCP, UDP, Acl, AclRule, AddressRange, PortRange, Verdict

SHUT, OPEN = Acl(Verdict.DROP), Acl(Verdict.ACCEPT)
WANTED, UNWANTED = 5001, 5002
"""Ports that both of two lists of rules let through, and that neither does."""


def addresses(*texts: str) -> tuple[AddressRange, ...]:
    """Of an address, a range (A-B) or a subnet (A/N) each."""
    found = []
    for text in texts:
        first, dash, last = text.partition("-")
        if dash:
            found.append(AddressRange(*(ipaddress.ip_address(end).packed for end in (first, last))))
        else:
            network = ipaddress.ip_network(text)
            found.append(AddressRange(network.network_address.packed, network.broadcast_address.packed))
    return tuple(found)


def ports(*numbers: int) -> tuple[PortRange, ...]:
    return tuple(PortRange(number, number) for number in numbers)


def allow(version: Any = 4, **what: Any) -> AclRule:
    return AclRule(1, version, Verdict.ACCEPT, **what)


def shut_but_for(*rules: AclRule) -> Acl:
    return Acl(Verdict.DROP, rules)


def filled(numbers: Iterable[int]) -> tuple[AclRule, ...]:
    """Rules for others, each with sets of ranges."""
    return tuple(
        AclRule(
            number,
            4,
            Verdict.ACCEPT,
            addresses(f"10.9.{number}.1-10.9.{number}.9", f"10.9.{number}.20-10.9.{number}.33"),
            addresses("198.51.100.0/25", "203.0.113.7"),
            (PortRange(1000, 2000), PortRange(3000, 3010)),
            (TCP, UDP),
        )
        for number in numbers
    )


def _deny(*closed: PortRange) -> tuple[AclRule, ...]:
    return (AclRule(7, 4, Verdict.DROP, addresses("10.8.0.1-10.8.0.5", "10.8.0.9"), ports=closed),)


BOTH = {
    "the default denies": (
        Acl(Verdict.DROP, (*filled(range(30)), allow(ports=(*ports(WANTED), PortRange(6000, 6010))))),
        Acl(Verdict.DROP, (allow(ports=(PortRange(4000, WANTED), *ports(7000))), *filled(range(50)))),
    ),
    "the default allows": (
        Acl(Verdict.ACCEPT, (*_deny(PortRange(UNWANTED, 5010), *ports(9000)), *filled(range(30)))),
        Acl(Verdict.ACCEPT, (*filled(range(50)), *_deny(PortRange(8000, 8010), *ports(UNWANTED)))),
    ),
}
"""Pairs of rules for the same, worded otherwise."""
