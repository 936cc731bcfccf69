"""The kernel's WireGuard messages: their numbers, and operations to bytes.

Generic-netlink family ``wireguard``, version 1; every body here is what follows the generic-netlink
header. Attributes, flags and limits are those of the kernel's include/uapi/linux/wireguard.h.
Integers are in the host's byte order.

Added peers that look like most peers take a precompiled path; anything else takes a general one
that gives the same bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Final, assert_never

from agent.model import (
    KEEP,
    KEY_SIZE,
    AddPeer,
    CutPeer,
    DeviceConfig,
    Operation,
    Prefix,
    PresharedKey,
    RemovePeer,
    UpdatePeer,
)

FAMILY: Final = "wireguard"
VERSION: Final = 1
GET_DEVICE: Final = 0
SET_DEVICE: Final = 1
NLM_F_DUMP_INTR: Final = 0x10
"""The device changed under the dump, which therefore misses peers (linux/netlink.h)."""

MAX_PEERS: Final = 128
"""Peers in one message: more save next to nothing and hold the kernel's network lock longer."""
MAX_REMOVALS: Final = 8
"""Removals in one message: each waits for the kernel under that lock."""
MAX_PEERS_SIZE: Final = 60_000
"""Bytes of the nest of peers in one message; its length has 16 bits."""
MAX_PREFIXES: Final = 256
"""Prefixes in one entry; a peer with more is continued in further entries."""


class DeviceAttribute(IntEnum):
    """WGDEVICE_A_*."""

    IFNAME = 2
    PRIVATE_KEY = 3
    PUBLIC_KEY = 4
    LISTEN_PORT = 6
    FWMARK = 7
    PEERS = 8


class PeerAttribute(IntEnum):
    """WGPEER_A_*."""

    PUBLIC_KEY = 1
    PRESHARED_KEY = 2
    FLAGS = 3
    ENDPOINT = 4
    PERSISTENT_KEEPALIVE = 5
    LAST_HANDSHAKE_TIME = 6
    RX_BYTES = 7
    TX_BYTES = 8
    ALLOWEDIPS = 9
    PROTOCOL_VERSION = 10


class PrefixAttribute(IntEnum):
    """WGALLOWEDIP_A_*."""

    FAMILY = 1
    IPADDR = 2
    CIDR_MASK = 3


# WGPEER_F_*.
_REMOVE_ME, _REPLACE_ALLOWEDIPS, _UPDATE_ONLY = 1, 2, 4

NESTED: Final = 0x8000
"""NLA_F_NESTED: the attribute's value is attributes."""
HEAD: Final = struct.Struct("=HH")
"""An attribute's header: its length with the header, and its type."""
_U32 = struct.Struct("=I")
NO_PSK: Final = bytes(KEY_SIZE)
"""How the kernel writes that a peer has no PSK."""


def _attribute(kind: int, value: bytes) -> bytes:
    return HEAD.pack(len(value) + 4, kind) + value + bytes(-len(value) % 4)


def encode_name(name: str) -> bytes:
    """Return the body that names the device: the whole of a GET_DEVICE request."""
    return _attribute(DeviceAttribute.IFNAME, name.encode() + b"\0")


def encode_config(name: str, config: DeviceConfig) -> bytes:
    """Return the SET_DEVICE body that sets what is not None in ``config``."""
    body = encode_name(name)
    if config.private_key is not None:
        body += _attribute(DeviceAttribute.PRIVATE_KEY, config.private_key)
    if config.listen_port is not None:
        body += _attribute(DeviceAttribute.LISTEN_PORT, struct.pack("=H", config.listen_port))
    if config.fwmark is not None:
        body += _attribute(DeviceAttribute.FWMARK, _U32.pack(config.fwmark))
    return body


def encode_operations(
    name: str, operations: Iterable[Operation], random: Callable[[int], bytes]
) -> Iterator[bytes]:
    """Yield the SET_DEVICE bodies that carry out the operations in their order.

    ``random(n)`` gives n random bytes, for the PSKs of peers that are cut.
    """
    head = encode_name(name)
    entries: list[bytes] = []
    size = removals = 0
    strange_psks = _random_keys(random)
    for operation in operations:
        removal = isinstance(operation, RemovePeer)
        for entry in _entries(operation, strange_psks):
            if (
                len(entries) == MAX_PEERS
                or size + len(entry) > MAX_PEERS_SIZE
                or (removal and removals == MAX_REMOVALS)
            ):
                yield _message(head, entries)
                entries = []
                size = removals = 0
            entries.append(entry)
            size += len(entry)
            removals += removal
    if entries:
        yield _message(head, entries)


def _message(head: bytes, entries: list[bytes]) -> bytes:
    peers = b"".join(entries)
    return b"".join((head, HEAD.pack(len(peers) + 4, DeviceAttribute.PEERS | NESTED), peers))


def _random_keys(random: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield random keys, drawn many at a time: each draw is a system call."""
    while True:
        many = random(KEY_SIZE * MAX_PEERS)
        for at in range(0, len(many), KEY_SIZE):
            yield many[at : at + KEY_SIZE]


def _entries(operation: Operation, strange_psks: Iterator[bytes]) -> tuple[bytes, ...]:
    """Return the operation's entries of the nest of peers; nearly always one.

    Tried in the order in which there may be thousands, which costs half as much as matching patterns
    (``mass_expiry_10k``).
    """
    key = operation.public_key
    if isinstance(operation, CutPeer):
        return (b"".join((_CUT_HEAD, key, _PSK_HEAD, next(strange_psks), _CUT_TAIL)),)
    if isinstance(operation, AddPeer):
        psk, prefixes = operation.preshared_key, operation.allowed_ips
        common = _common_peer(key, psk, prefixes)
        if common is not None:
            return (common,)
        return _general_peer(key, NO_PSK if psk is None else psk.raw, _REPLACE_ALLOWEDIPS, None, prefixes)
    if isinstance(operation, RemovePeer):
        return (_REMOVAL_HEAD + key + _REMOVAL_TAIL,)
    if isinstance(operation, UpdatePeer):
        return _update(operation)
    assert_never(operation)


def _update(update: UpdatePeer) -> tuple[bytes, ...]:
    raw_psk: bytes | None
    if update.preshared_key is KEEP:
        raw_psk = None
    elif update.preshared_key is None:
        raw_psk = NO_PSK
    else:
        raw_psk = update.preshared_key.raw
    flags, prefixes = _UPDATE_ONLY, None
    if update.allowed_ips is not KEEP:
        prefixes = update.allowed_ips
        flags |= _REPLACE_ALLOWEDIPS if update.replace_allowed_ips else 0
    keepalive = None if update.persistent_keepalive is KEEP else update.persistent_keepalive
    return _general_peer(update.public_key, raw_psk, flags, keepalive, prefixes)


def _general_peer(
    key: bytes,
    psk: bytes | None,
    flags: int,
    keepalive: int | None,
    prefixes: tuple[Prefix, ...] | None,
) -> tuple[bytes, ...]:
    first = [_attribute(PeerAttribute.PUBLIC_KEY, key)]
    if psk is not None:
        first.append(_attribute(PeerAttribute.PRESHARED_KEY, psk))
    first.append(_attribute(PeerAttribute.FLAGS, _U32.pack(flags)))
    if keepalive is not None:
        first.append(_attribute(PeerAttribute.PERSISTENT_KEEPALIVE, struct.pack("=H", keepalive)))
    if not prefixes:
        return (_attribute(NESTED, b"".join(first)),)
    first.append(_allowed_ips(prefixes[:MAX_PREFIXES]))
    entries = [_attribute(NESTED, b"".join(first))]
    if len(prefixes) > MAX_PREFIXES:
        again = _attribute(PeerAttribute.PUBLIC_KEY, key) + _attribute(
            PeerAttribute.FLAGS, _U32.pack(_UPDATE_ONLY)
        )
        for start in range(MAX_PREFIXES, len(prefixes), MAX_PREFIXES):
            some = _allowed_ips(prefixes[start : start + MAX_PREFIXES])
            entries.append(_attribute(NESTED, again + some))
    return tuple(entries)


def _allowed_ips(prefixes: Iterable[Prefix]) -> bytes:
    return _attribute(PeerAttribute.ALLOWEDIPS | NESTED, b"".join(map(_allowed_ip, prefixes)))


def _allowed_ip(prefix: Prefix) -> bytes:
    family = socket.AF_INET if len(prefix.packed) == 4 else socket.AF_INET6
    return _attribute(
        NESTED,
        _attribute(PrefixAttribute.FAMILY, struct.pack("=H", family))
        + _attribute(PrefixAttribute.IPADDR, prefix.packed)
        + _attribute(PrefixAttribute.CIDR_MASK, bytes((prefix.length,))),
    )


# The fixed bytes of the common entries: what stands before the key, the PSK, an address, a mask.
_PSK_HEAD = HEAD.pack(4 + KEY_SIZE, PeerAttribute.PRESHARED_KEY)
_MASK_HEAD = HEAD.pack(4 + 1, PrefixAttribute.CIDR_MASK)
_V4_HEAD = (
    HEAD.pack(28, NESTED)
    + _attribute(PrefixAttribute.FAMILY, struct.pack("=H", socket.AF_INET))
    + HEAD.pack(4 + 4, PrefixAttribute.IPADDR)
)
_V6_HEAD = (
    HEAD.pack(40, NESTED)
    + _attribute(PrefixAttribute.FAMILY, struct.pack("=H", socket.AF_INET6))
    + HEAD.pack(4 + 16, PrefixAttribute.IPADDR)
)


def _key_head(size: int) -> bytes:
    return HEAD.pack(size, NESTED) + HEAD.pack(4 + KEY_SIZE, PeerAttribute.PUBLIC_KEY)


_REMOVAL_HEAD = _key_head(4 + 36 + 8)
_REMOVAL_TAIL = _attribute(PeerAttribute.FLAGS, _U32.pack(_REMOVE_ME))
_CUT_HEAD = _key_head(4 + 36 + 36 + 8)
_CUT_TAIL = _attribute(PeerAttribute.FLAGS, _U32.pack(_UPDATE_ONLY | _REPLACE_ALLOWEDIPS))

_ONE = struct.Struct("=8s32s4s32s28s4s4sB3x")
_ONE_HEAD = _key_head(_ONE.size)
_TWO = struct.Struct(_ONE.format + "16s16s4sB3x")
_TWO_HEAD = _key_head(_TWO.size)
_ADD_FLAGS = _attribute(PeerAttribute.FLAGS, _U32.pack(_REPLACE_ALLOWEDIPS))
_ONE_IPS = _ADD_FLAGS + HEAD.pack(4 + 28, PeerAttribute.ALLOWEDIPS | NESTED) + _V4_HEAD
_TWO_IPS = _ADD_FLAGS + HEAD.pack(4 + 28 + 40, PeerAttribute.ALLOWEDIPS | NESTED) + _V4_HEAD


def _common_peer(key: bytes, psk: PresharedKey | None, prefixes: tuple[Prefix, ...]) -> bytes | None:
    """Return the entry of an added peer with one IPv4 prefix and maybe an IPv6 one after it."""
    if not 1 <= len(prefixes) <= 2:
        return None
    v4, mask4 = prefixes[0]
    if len(v4) != 4:
        return None
    raw = NO_PSK if psk is None else psk.raw
    if len(prefixes) == 1:
        return _ONE.pack(_ONE_HEAD, key, _PSK_HEAD, raw, _ONE_IPS, v4, _MASK_HEAD, mask4)
    v6, mask6 = prefixes[1]
    if len(v6) != 16:
        return None
    return _TWO.pack(
        *(_TWO_HEAD, key, _PSK_HEAD, raw, _TWO_IPS, v4, _MASK_HEAD, mask4),
        *(_V6_HEAD, v6, _MASK_HEAD, mask6),
    )
