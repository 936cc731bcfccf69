"""Reads Defguard's firewall configuration, of either generation, into access rules."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any, Final, Literal, TypeVar

from agent.acl import ICMP, TCP, UDP, Acl, AclRule, AddressRange, PortRange, SnatBinding, Verdict
from agent.encoding import clean_name
from agent.errors import InvalidMessage

_PROTOCOLS: Final = frozenset({ICMP, TCP, UDP})
# The enums' numbers differ by one from generation to generation, and the second's 0 says nothing.
_VERDICTS: Final = {1: (Verdict.ACCEPT, Verdict.DROP), 2: (None, Verdict.ACCEPT, Verdict.DROP)}
_VERSIONS: Final[dict[int, tuple[Literal[4, 6] | None, ...]]] = {1: (4, 6), 2: (None, 4, 6)}
Generation = Literal[1, 2]
_T = TypeVar("_T")


def read_firewall(config: Any, generation: Generation) -> Acl:
    """Return a FirewallConfig's rules; one that can't be read refuses all: InvalidMessage.

    Of what an administrator wrote Defguard makes a rule that allows, with sources, and one that denies,
    from everybody, each for both IP versions. Where the destinations (or sources) are all of one version,
    the other's rule comes without any, which would be "to everybody". Such a rule is left out: it was
    meant for nobody. Ids alone do not tell what belongs together: Defguard numbers two kinds of things.
    """
    default = _verdict(config.default_policy, generation)
    rules = [_rule(rule, generation) for rule in config.rules]
    with_sources = {_kin(rule) for rule in rules if rule.sources}
    with_destinations = {_kin(rule) for rule in rules if rule.destinations}
    meant = tuple(
        rule
        for rule in rules
        if (rule.sources or rule.verdict is Verdict.DROP or _kin(rule) not in with_sources)
        and (rule.destinations or _kin(rule) not in with_destinations)
    )
    return Acl(default, meant, tuple(_snat(binding) for binding in config.snat_bindings))


def _kin(rule: AclRule) -> tuple[int, Verdict, str]:
    """What a rule has in common with the same of the other IP version."""
    return rule.id, rule.verdict, rule.comment


def _rule(rule: Any, generation: Generation) -> AclRule:
    version = _enum(_VERSIONS[generation], rule.ip_version)
    if version is None:
        raise _unreadable("a rule's IP version")
    size = 4 if version == 4 else 16
    protocols = tuple(dict.fromkeys(rule.protocols))
    if not _PROTOCOLS.issuperset(protocols):
        raise _unreadable("a rule's protocol")
    return AclRule(
        rule.id,
        version,
        _verdict(rule.verdict, generation),
        _ranges(rule.source_addrs, size),
        _ranges(rule.destination_addrs, size),
        tuple(_ports(port) for port in rule.destination_ports),
        protocols,
        clean_name(rule.comment),
    )


def _snat(binding: Any) -> SnatBinding:
    public_ip = _address(binding.public_ip)
    sources = _ranges(binding.source_addrs, len(public_ip))
    if not sources:
        raise _unreadable("an SNAT binding without sources")
    return SnatBinding(binding.id, sources, public_ip, clean_name(binding.comment))


def _verdict(number: int, generation: Generation) -> Verdict:
    verdict = _enum(_VERDICTS[generation], number)
    if verdict is None:
        raise _unreadable("a policy")
    return verdict


def _enum(values: tuple[_T, ...], number: int) -> _T | None:
    return values[number] if 0 <= number < len(values) else None


def _ranges(addresses: Iterable[Any], size: int) -> tuple[AddressRange, ...]:
    return tuple(_range(address, size) for address in addresses)


def _range(address: Any, size: int) -> AddressRange:
    match address.WhichOneof("address"):
        case "ip":
            packed = _address(address.ip)
            found = AddressRange(packed, packed)
        case "ip_range":
            found = AddressRange(_address(address.ip_range.start), _address(address.ip_range.end))
        case "ip_subnet":
            try:
                network = ipaddress.ip_network(address.ip_subnet, strict=False)
            except ValueError:
                raise _unreadable("a subnet") from None
            found = AddressRange(network.network_address.packed, network.broadcast_address.packed)
        case _:
            raise _unreadable("an address")
    if len(found.first) != size or len(found.last) != size or found.first > found.last:
        raise _unreadable("an address range")
    return found


def _address(text: str) -> bytes:
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise _unreadable("an address") from None


def _ports(port: Any) -> PortRange:
    match port.WhichOneof("port"):
        case "single_port":
            found = PortRange(port.single_port, port.single_port)
        case "port_range":
            found = PortRange(port.port_range.start, port.port_range.end)
        case _:
            raise _unreadable("a port")
    if not 0 < found.first <= found.last <= 0xFFFF:
        raise _unreadable("a port range")
    return found


def _unreadable(what: str) -> InvalidMessage:
    return InvalidMessage(
        f"core's firewall configuration can't be read: {what}",
        "the rules in force stay; correct the location's access rules in Defguard",
    )
