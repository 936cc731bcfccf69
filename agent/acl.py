"""What may pass between the interface's peers and the networks behind the gateway, by core's access rules.

Values only: ``agent.aclruleset`` puts them into nftables' language.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, NamedTuple

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
"""Protocols as IANA numbers them; in a rule of IPv6, ICMP stands for ICMPv6."""


class Verdict(StrEnum):
    """What becomes of a flow."""

    ACCEPT = "accept"
    DROP = "drop"


class AddressRange(NamedTuple):
    """Addresses from ``first`` to ``last``, both in network order and of one family (4 or 16 bytes)."""

    first: bytes
    last: bytes


class PortRange(NamedTuple):
    """Ports from ``first`` to ``last``."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class AclRule:
    """A rule of one IP version. No sources, destinations, ports or protocols: any.

    Ports narrow down TCP and UDP alone; ``id`` and ``comment`` are core's, for whoever reads the rules.
    """

    id: int
    version: Literal[4, 6]
    verdict: Verdict
    sources: tuple[AddressRange, ...] = ()
    destinations: tuple[AddressRange, ...] = ()
    ports: tuple[PortRange, ...] = ()
    protocols: tuple[int, ...] = ()
    comment: str = ""


@dataclass(frozen=True, slots=True)
class SnatBinding:
    """What these sources send leaves the host from ``public_ip`` (4 or 16 bytes)."""

    id: int
    sources: tuple[AddressRange, ...]
    public_ip: bytes
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Acl:
    """All of it: the first rule that a new flow matches decides, ``default`` if none does."""

    default: Verdict
    rules: tuple[AclRule, ...] = ()
    snat: tuple[SnatBinding, ...] = ()
