"""Reads Defguard's messages, of either generation, into the agent's words.

The messages differ in the numbers of two enums and the name of one field; whatever is wrong with one peer
refuses that peer alone (rule 2). A message is taken as its protobuf class has parsed it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from agent.acl import Acl
from agent.core.defguard.firewall import Generation, read_firewall
from agent.curve25519 import public_key
from agent.encoding import (
    clean_name,
    parse_interface_address,
    parse_key,
    parse_prefix,
    parse_preshared_key,
    parse_public_key,
)
from agent.errors import InvalidMessage
from agent.model import (
    NEVER,
    Grant,
    Identity,
    InterfaceAddress,
    InterfaceSettings,
    Peer,
    Prefix,
    PresharedKey,
    PublicKey,
    Refusal,
    UnreadablePeer,
)

_MTU: Final = range(576, 65_536)
"""Below 576 IPv4 does not work (RFC 791)."""
_UPDATES: Final = {1: {0: "put", 1: "put", 2: "gone"}, 2: {1: "put", 2: "put", 3: "gone"}}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A location as a whole. ``identity`` is None where the message has no key (the location is going).

    ``acl_fault`` says why the access rules can't be read, if they can't: the rest holds all the same.
    """

    name: str
    identity: Identity | None
    interface: InterfaceSettings
    peers: tuple[Peer, ...]
    unreadable: tuple[UnreadablePeer, ...] = ()
    acl: Acl | None = None
    acl_fault: InvalidMessage | None = None


@dataclass(frozen=True, slots=True)
class PeerPut:
    """A peer is new, or is as it is told now."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The peer is to go, its session with it."""

    public_key: PublicKey


@dataclass(frozen=True, slots=True)
class LocationPut:
    """The location is as it is told now."""

    configuration: Configuration


@dataclass(frozen=True, slots=True)
class LocationGone:
    """The location was deleted: everybody is to go."""


@dataclass(frozen=True, slots=True)
class AclPut:
    """The access rules are these; None: there are none, everything passes. ``fault``: they can't be read."""

    acl: Acl | None = None
    fault: InvalidMessage | None = None


Update = PeerPut | PeerGone | LocationPut | LocationGone | AclPut


def read_configuration(message: Any, generation: Generation) -> Configuration:
    """Read a Configuration; InvalidMessage for what is wrong and is no single peer's."""
    text = message.prvkey if generation == 1 else message.private_key
    peers: list[Peer] = []
    unreadable: list[UnreadablePeer] = []
    for entry in message.peers:
        peer = read_peer(entry)
        if isinstance(peer, Peer):
            peers.append(peer)
        else:
            unreadable.append(peer)
    mtu, fwmark = (0, 0) if generation == 1 else (message.mtu, message.fwmark)
    if mtu and mtu not in _MTU:
        raise _unreadable("an MTU that no tunnel can have")
    if message.port > 0xFFFF:
        raise _unreadable("a port above 65535")
    acl, acl_fault = None, None
    if message.HasField("firewall_config"):
        acl, acl_fault = _read_acl(message.firewall_config, generation)
    return Configuration(
        clean_name(message.name),
        _identity(text) if text else None,
        InterfaceSettings(_addresses(message.addresses), message.port or None, mtu or None, fwmark or None),
        tuple(peers),
        tuple(unreadable),
        acl,
        acl_fault,
    )


def read_update(message: Any, generation: Generation) -> Update:
    """Read an Update; InvalidMessage for one that is none, or about a peer without a readable key."""
    kind = _UPDATES[generation].get(message.update_type)
    if kind is None:
        raise _unreadable("an update of an unknown type")
    match message.WhichOneof("update"):
        case "peer" if kind == "gone":
            try:
                return PeerGone(parse_public_key(message.peer.pubkey))
            except ValueError:
                raise _unreadable("a public key") from None
        case "peer":
            peer = read_peer(message.peer)
            if isinstance(peer, UnreadablePeer):
                raise _unreadable("a public key")
            return PeerPut(peer)
        case "network" if kind == "gone":
            return LocationGone()
        case "network":
            return LocationPut(read_configuration(message.network, generation))
        case "firewall_config" if kind == "put":
            return AclPut(*_read_acl(message.firewall_config, generation))
        case "firewall_config" | "disable_firewall":
            return AclPut(None)
        case _:
            raise _unreadable("an update about nothing")


def read_peer(message: Any) -> Peer | UnreadablePeer:
    """Read a Peer: one with a PSK has a session, which that PSK names; one without needs none.

    A PSK that is there and is none (empty, malformed, all zero) refuses the peer.
    """
    try:
        key = parse_public_key(message.pubkey)
    except ValueError:
        return UnreadablePeer(clean_name(message.pubkey), Refusal.INVALID_PUBLIC_KEY)
    fault: Refusal | None = None
    allowed_ips: tuple[Prefix, ...] = ()
    try:
        allowed_ips = tuple(sorted({parse_prefix(text) for text in message.allowed_ips}))
    except ValueError:
        fault = Refusal.INVALID_ALLOWED_IPS
    if message.keepalive_interval > 0xFFFF:
        fault = Refusal.INVALID_KEEPALIVE
    session: Grant | None = None
    session_fault: Refusal | None = None
    if message.HasField("preshared_key"):
        try:
            preshared_key = parse_preshared_key(message.preshared_key)
        except ValueError:
            session_fault = Refusal.INVALID_PRESHARED_KEY
        else:
            session = Grant(session_id(key, preshared_key), preshared_key, None, NEVER)
    return Peer(
        public_key=key,
        allowed_ips=allowed_ips,
        persistent_keepalive=message.keepalive_interval if fault is not Refusal.INVALID_KEEPALIVE else 0,
        mfa_exempt=not message.HasField("preshared_key"),
        session=session,
        fault=fault,
        session_fault=session_fault,
    )


def session_id(key: PublicKey, preshared_key: PresharedKey) -> str:
    """Return the id of the session whose PSK this is: Defguard has none, and makes a PSK for each.

    A digest of 256 random bits gives nothing of them away.
    """
    return f"psk-{hashlib.sha256(key + preshared_key.digest()).hexdigest()[:32]}"


def _read_acl(message: Any, generation: Generation) -> tuple[Acl | None, InvalidMessage | None]:
    """Read access rules, or say why they can't be: who has to go does not wait for them."""
    try:
        return read_firewall(message, generation), None
    except InvalidMessage as error:
        return None, error


def _identity(text: str) -> Identity:
    try:
        raw = parse_key(text)
    except ValueError:
        raise _unreadable("the interface's private key") from None
    if not any(raw):
        raise _unreadable("the interface's private key")
    return Identity(raw, public_key(raw))


def _addresses(texts: Iterable[str]) -> tuple[InterfaceAddress, ...] | None:
    try:
        return tuple(dict.fromkeys(map(parse_interface_address, texts))) or None
    except ValueError:
        raise _unreadable("an address of the interface") from None


def _unreadable(what: str) -> InvalidMessage:
    return InvalidMessage(f"core sent something that can't be read: {what}", "look at core's log and version")
