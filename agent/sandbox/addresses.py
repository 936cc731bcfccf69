"""Which prefixes of a location are taken, and the next free addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network

from agent.encoding import parse_prefix
from agent.sandbox.errors import Refusal

Network = IPv4Network | IPv6Network


def networks(addresses: Iterable[str]) -> list[Network]:
    """Return the networks of interface addresses such as 10.8.0.1/24."""
    return [ip_interface(address).network for address in addresses]


class AddressPlan:
    """The prefixes that devices of one location hold: no two may overlap.

    A containing or contained prefix counts as taken, since a gateway refuses both owners.
    """

    def __init__(self, interface_addresses: list[str], held: Iterable[str]) -> None:
        """Take the gateway's own addresses and all prefixes held by devices."""
        self._networks = networks(interface_addresses)
        self._own = {ip_network(ip_interface(address).ip) for address in interface_addresses}
        self._taken: set[Network] = {ip_network(prefix) for prefix in held} | self._own
        self._lengths = {(network.version, network.prefixlen) for network in self._taken}
        self._free = [self._hosts(network) for network in self._networks]

    def _hosts(self, network: Network) -> Iterator[Network]:
        for host in network.hosts():
            candidate = ip_network(host)
            if not self._overlaps(candidate):
                yield candidate

    def _overlaps(self, candidate: Network) -> bool:
        for version, length in self._lengths:
            if version != candidate.version or length > candidate.prefixlen:
                continue
            if candidate.supernet(new_prefix=length) in self._taken:
                return True
        if candidate.prefixlen == candidate.max_prefixlen:
            return False
        return any(taken.version == candidate.version and taken.overlaps(candidate) for taken in self._taken)

    def _take(self, network: Network) -> None:
        self._taken.add(network)
        self._lengths.add((network.version, network.prefixlen))

    def claim(self, prefixes: list[str]) -> list[str]:
        """Take prefixes for a device and return them in canonical form. Raises Refusal."""
        wanted: list[Network] = []
        for text in prefixes:
            try:
                parse_prefix(text)
            except ValueError as error:
                raise Refusal(400, "bad_prefix", f"{text!r} can't be used: {error}.") from None
            network = ip_network(text)
            if self._overlaps(network):
                raise Refusal(409, "prefix_taken", f"{network} overlaps an address in use; choose another.")
            self._take(network)
            wanted.append(network)
        return [str(network) for network in wanted]

    def allocate(self) -> list[str]:
        """Take one free address of each of the location's networks. Raises Refusal if one is full."""
        found = []
        for network, free in zip(self._networks, self._free, strict=True):
            address = next(free, None)
            if address is None:
                raise Refusal(409, "network_full", f"No address of {network} is free.")
            self._take(address)
            found.append(str(address))
        if not found:
            raise Refusal(409, "no_network", "The location has no addresses; give the device allowed_ips.")
        return found
