"""Which peers ``wg-agent status`` is about, and in which order."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from agent.commands.options import STATES
from agent.commands.output import shown

Entry = Mapping[str, Any]
"""A peer of the status document."""

_RANK: Final = {state: rank for rank, state in enumerate(STATES)}


def _by_state(peer: Entry) -> Any:
    return _RANK.get(peer["state"], len(_RANK))


def counts_down(peer: Entry) -> bool:
    """Whether the peer may be on the interface for a session, whose end takes it off."""
    has_session = peer.get("time_left") is not None and peer["state"] != "refused"
    return has_session and peer.get("session_in_use") is not False


def _by_left(peer: Entry) -> Any:
    return peer["time_left"] if counts_down(peer) else math.inf


def _by_handshake(peer: Entry) -> Any:
    # All are written alike, in UTC, so that their text sorts as they do; the latest comes first.
    return tuple(-ord(c) for c in peer["latest_handshake"] or "\0")


def _by_rate(peer: Entry) -> Any:
    return -((peer.get("rx_rate") or 0.0) + (peer.get("tx_rate") or 0.0))


def _by_traffic(peer: Entry) -> Any:
    return -(peer["rx_bytes"] + peer["tx_bytes"])


def _by_address(peer: Entry) -> Any:
    networks = [ipaddress.ip_network(text) for text in peer["allowed_ips"][:1]]
    return [(one.version, int(one.network_address), one.prefixlen) for one in networks] or [(9, 0, 0)]


def _by_name(peer: Entry) -> Any:
    return not peer["name"], peer["name"].casefold(), peer["public_key"]


_KEYS: Final[Mapping[str, Callable[[Entry], Any]]] = {
    "state": _by_state,
    "name": _by_name,
    "left": _by_left,
    "handshake": _by_handshake,
    "rate": _by_rate,
    "traffic": _by_traffic,
    "ip": _by_address,
    "key": lambda peer: peer["public_key"],
}


def ordered(peers: Sequence[Entry], by: str) -> list[Entry]:
    """Return the peers in one of the ``ORDERS``; among equals they are in the order of their names."""
    return sorted(sorted(peers, key=_by_name), key=_KEYS[by])


def matching(peers: Sequence[Entry], text: str) -> list[Entry]:
    """Return whom a prefix, an address, a part of a name or the beginning of a key means.

    The first of these that anybody answers to counts. A prefix means who has allowed IPs in it or around
    it, an address who has it among theirs; case does not matter in names.
    """
    network = _network(text)
    if network is not None:
        found = [peer for peer in peers if any(_overlap(network, other) for other in peer["allowed_ips"])]
        if found:
            return found
    part = shown(text).casefold()
    return [peer for peer in peers if part in shown(peer["name"]).casefold()] or [
        peer for peer in peers if peer["public_key"].startswith(text)
    ]


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _overlap(network: ipaddress.IPv4Network | ipaddress.IPv6Network, text: str) -> bool:
    other = _network(text)
    return other is not None and other.version == network.version and other.overlaps(network)
