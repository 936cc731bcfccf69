"""What a dump of the kernel's WireGuard tells: bytes to what was observed.

A dump is cut into peers, and those that are as they were in the dump before are not looked at any
further. A peer that is laid out as the kernel's get_peer() does it (drivers/net/wireguard/netlink.c) takes
a precompiled path; anything else is walked attribute by attribute, with the same result.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from agent.errors import DeviceError
from agent.model import (
    KEY_SIZE,
    DeviceConfig,
    Endpoint,
    ObservedDevice,
    ObservedPeer,
    Prefix,
    PresharedKey,
    PublicKey,
)
from agent.observed import RawPeers
from agent.wireguard.netlink import (
    HEAD,
    NESTED,
    NO_PSK,
    DeviceAttribute,
    PeerAttribute,
    PrefixAttribute,
)

_NOBODY: Final = PublicKey(b""), b""
_KEY_HEAD: Final = HEAD.pack(4 + KEY_SIZE, PeerAttribute.PUBLIC_KEY)
_ADDRESS_SIZES: Final[dict[int, int]] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_TYPE_MASK: Final = 0x3FFF
_U32 = struct.Struct("=I")


class Dump:
    """One dump of a device, taken in part by part as it comes.

    ``before`` are the peers of an earlier one of the same device: the bytes of those that are the same are
    taken from it. A peer whose allowed IPs go on in a later part is put together; unknown attributes are
    skipped.
    """

    def __init__(self, before: RawPeers | None = None) -> None:
        self._private_key: bytes | None = None
        self._public_key: PublicKey | None = None
        self._listen_port = 0
        self._fwmark = 0
        self._peers: dict[PublicKey, bytes] = {}
        self._base = before
        self._changed: dict[PublicKey, None] = {}
        self._before: Mapping[PublicKey, bytes] = {} if before is None else before.raw
        # The kernel lists peers in the order in which they were added: most likely this one is the next.
        self._order = iter(self._before.items())
        self._next = next(self._order, _NOBODY)

    def feed(self, part: bytes) -> None:
        """Take in the body of the next message; raises DeviceError for what is none of a dump."""
        for kind, start, end in _attributes(part, 0, len(part)):
            if kind == DeviceAttribute.PEERS:
                self._take_peers(part, start, end)
            elif kind == DeviceAttribute.PRIVATE_KEY:
                self._private_key = _bytes(part, start, end, KEY_SIZE)
            elif kind == DeviceAttribute.PUBLIC_KEY:
                self._public_key = PublicKey(_bytes(part, start, end, KEY_SIZE))
            elif kind == DeviceAttribute.LISTEN_PORT:
                self._listen_port = _integer(part, start, end, 2)
            elif kind == DeviceAttribute.FWMARK:
                self._fwmark = _integer(part, start, end, 4)

    def device(self, name: str) -> ObservedDevice:
        """Return the device that was fed in; a peer that can't be read raises DeviceError when asked for."""
        peers = RawPeers(self._peers, decode_peer, self._base, self._changed.keys())
        return ObservedDevice(name, self._public_key, self._listen_port, self._fwmark, peers)

    def config(self) -> DeviceConfig:
        """Return its settings; the private key is None while there is none."""
        return DeviceConfig(self._private_key, self._listen_port, self._fwmark)

    def _take_peers(self, part: bytes, start: int, end: int) -> None:
        peers, order, (key, raw) = self._peers, self._order, self._next
        while start < end:
            if raw and part.startswith(raw, start) and key not in peers:
                peers[key] = raw
                start += len(raw)
                key, raw = next(order, _NOBODY)
                continue
            if end - start < 4:
                raise _malformed("a cut attribute")
            size = HEAD.unpack_from(part, start)[0]
            stop = start + size
            if size < 4 or stop > end:
                raise _malformed("an attribute's length")
            # Where the last one is cut short of its padding, what is kept of it still ends on four bytes.
            piece = part[start:stop] + bytes(-size % 4)
            start += (size + 3) & ~3
            found = _key(piece)
            if found in peers:
                peers[found] = self._same(found, peers[found] + piece)
                continue
            peers[found] = self._same(found, piece)
            if found in self._before:
                # Those in between are gone, or come later.
                while raw and key != found:
                    key, raw = next(order, _NOBODY)
                key, raw = next(order, _NOBODY)
        self._next = key, raw

    def _same(self, key: PublicKey, raw: bytes) -> bytes:
        before = self._before.get(key, b"")
        if before == raw:
            self._changed.pop(key, None)
            return before
        self._changed[key] = None
        return raw


def _head(length: int, kind: int) -> int:
    """Return an attribute's header as the one integer that it is read as below."""
    return int(_U32.unpack(HEAD.pack(length + 4, kind))[0])


# A peer in a dump up to its protocol version, which is the same for all peers.
_FIXED = struct.Struct("=HHI32sI32sIqqIH2xIQIQII")
_FIXED_HEADS = (
    _head(32, PeerAttribute.PUBLIC_KEY),
    _head(32, PeerAttribute.PRESHARED_KEY),
    _head(16, PeerAttribute.LAST_HANDSHAKE_TIME),
    _head(2, PeerAttribute.PERSISTENT_KEEPALIVE),
    _head(8, PeerAttribute.TX_BYTES),
    _head(8, PeerAttribute.RX_BYTES),
    _head(4, PeerAttribute.PROTOCOL_VERSION),
)
_ENDPOINT4 = struct.Struct("=IH2s4s8x")
_ENDPOINT4_HEADS = (_head(16, PeerAttribute.ENDPOINT), int(socket.AF_INET))
_ENDPOINT6 = struct.Struct("=IH2s4x16sI")
_ENDPOINT6_HEADS = (_head(28, PeerAttribute.ENDPOINT), int(socket.AF_INET6))
_IP4 = struct.Struct("=IIB3xIH2xI4s")
_IP4_HEADS = (
    _head(24, NESTED),
    _head(1, PrefixAttribute.CIDR_MASK),
    _head(2, PrefixAttribute.FAMILY),
    int(socket.AF_INET),
    _head(4, PrefixAttribute.IPADDR),
)
_IP6 = struct.Struct("=IIB3xIH2xI16s")
_IP6_HEADS = (
    _head(36, NESTED),
    _head(1, PrefixAttribute.CIDR_MASK),
    _head(2, PrefixAttribute.FAMILY),
    int(socket.AF_INET6),
    _head(16, PrefixAttribute.IPADDR),
)


def decode_peer(raw: bytes) -> ObservedPeer:
    """Read one peer from its entries of the nest of peers, one after another; raises DeviceError."""
    peer: ObservedPeer | None = None
    start, end = 0, len(raw)
    while start < end:
        size = HEAD.unpack_from(raw, start)[0]
        stop = start + size
        one = _fast_peer(raw, start, stop) or _walk_peer(raw, start + 4, stop)
        peer = one if peer is None else peer._replace(allowed_ips=peer.allowed_ips + one.allowed_ips)
        start += (size + 3) & ~3
    if peer is None:
        raise _malformed("a peer without a public key")
    return peer


def _key(entry: bytes) -> PublicKey:
    """Return whose entry of the nest it is."""
    if entry.startswith(_KEY_HEAD, 4) and len(entry) >= 8 + KEY_SIZE:
        return PublicKey(entry[8 : 8 + KEY_SIZE])
    for kind, start, end in _attributes(entry, 4, HEAD.unpack_from(entry)[0]):
        if kind == PeerAttribute.PUBLIC_KEY:
            return PublicKey(_bytes(entry, start, end, KEY_SIZE))
    raise _malformed("a peer without a public key")


def _fast_peer(data: bytes, start: int, end: int) -> ObservedPeer | None:
    """Return the peer if it is laid out as the kernel does it, None to have it walked instead."""
    at = start + _FIXED.size
    if at > end:
        return None
    (_, _, h1, key, h2, psk, h3, seconds, nanoseconds, h4, keepalive, h5, tx, h6, rx, h7, _) = (
        _FIXED.unpack_from(data, start)
    )
    if (h1, h2, h3, h4, h5, h6, h7) != _FIXED_HEADS:
        return None
    endpoint = None
    if end - at >= _ENDPOINT4.size:
        head, family, port, packed = _ENDPOINT4.unpack_from(data, at)
        if (head, family) == _ENDPOINT4_HEADS:
            endpoint = Endpoint(packed, port[0] << 8 | port[1])
            at += _ENDPOINT4.size
        elif end - at >= _ENDPOINT6.size:
            head, family, port, packed, scope = _ENDPOINT6.unpack_from(data, at)
            if (head, family) == _ENDPOINT6_HEADS:
                endpoint = Endpoint(packed, port[0] << 8 | port[1], scope)
                at += _ENDPOINT6.size
    prefixes: list[Prefix] = []
    if at < end:
        if end - at < 4 or HEAD.unpack_from(data, at) != (end - at, PeerAttribute.ALLOWEDIPS | NESTED):
            return None
        at += 4
        while at < end:
            if end - at >= _IP4.size:
                i1, i2, length, i3, family, i4, packed = _IP4.unpack_from(data, at)
                if (i1, i2, i3, family, i4) == _IP4_HEADS and length <= 32:
                    prefixes.append(Prefix(packed, length))
                    at += _IP4.size
                    continue
            if end - at >= _IP6.size:
                i1, i2, length, i3, family, i4, packed = _IP6.unpack_from(data, at)
                if (i1, i2, i3, family, i4) == _IP6_HEADS and length <= 128:
                    prefixes.append(Prefix(packed, length))
                    at += _IP6.size
                    continue
            return None
    return ObservedPeer(
        key,
        None if psk == NO_PSK else PresharedKey(psk),
        tuple(prefixes),
        endpoint,
        keepalive,
        seconds + nanoseconds / 1e9,
        rx,
        tx,
    )


def _walk_peer(data: bytes, start: int, end: int) -> ObservedPeer:
    key: bytes | None = None
    psk: PresharedKey | None = None
    prefixes: list[Prefix] = []
    endpoint: Endpoint | None = None
    keepalive = rx = tx = 0
    handshake = 0.0
    for kind, at, stop in _attributes(data, start, end):
        if kind == PeerAttribute.PUBLIC_KEY:
            key = _bytes(data, at, stop, KEY_SIZE)
        elif kind == PeerAttribute.PRESHARED_KEY:
            raw = _bytes(data, at, stop, KEY_SIZE)
            psk = None if raw == NO_PSK else PresharedKey(raw)
        elif kind == PeerAttribute.ENDPOINT:
            endpoint = _walk_endpoint(data[at:stop])
        elif kind == PeerAttribute.PERSISTENT_KEEPALIVE:
            keepalive = _integer(data, at, stop, 2)
        elif kind == PeerAttribute.LAST_HANDSHAKE_TIME:
            seconds, nanoseconds = struct.unpack("=qq", _bytes(data, at, stop, 16))
            handshake = seconds + nanoseconds / 1e9
        elif kind == PeerAttribute.RX_BYTES:
            rx = _integer(data, at, stop, 8)
        elif kind == PeerAttribute.TX_BYTES:
            tx = _integer(data, at, stop, 8)
        elif kind == PeerAttribute.ALLOWEDIPS:
            prefixes.extend(_walk_prefix(data, a, b) for _, a, b in _attributes(data, at, stop))
    if key is None:
        raise _malformed("a peer without a public key")
    return ObservedPeer(PublicKey(key), psk, tuple(prefixes), endpoint, keepalive, handshake, rx, tx)


def _walk_endpoint(address: bytes) -> Endpoint:
    """Return what a struct sockaddr_in or sockaddr_in6 holds."""
    if len(address) >= 2:
        family = int.from_bytes(address[:2], sys.byteorder)
        port = int.from_bytes(address[2:4], "big")
        if family == socket.AF_INET and len(address) == 16:
            return Endpoint(address[4:8], port)
        if family == socket.AF_INET6 and len(address) == 28:
            return Endpoint(address[8:24], port, int.from_bytes(address[24:28], sys.byteorder))
    raise _malformed("an endpoint's address")


def _walk_prefix(data: bytes, start: int, end: int) -> Prefix:
    family = length = -1
    packed = b""
    for kind, at, stop in _attributes(data, start, end):
        if kind == PrefixAttribute.FAMILY:
            family = _integer(data, at, stop, 2)
        elif kind == PrefixAttribute.IPADDR:
            packed = data[at:stop]
        elif kind == PrefixAttribute.CIDR_MASK:
            length = _integer(data, at, stop, 1)
    size = _ADDRESS_SIZES.get(family, -1)
    if len(packed) != size or not 0 <= length <= size * 8:
        raise _malformed("an allowed IP")
    return Prefix(packed, length)


def _attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield each attribute's type and where its value starts and ends."""
    while start < end:
        if end - start < 4:
            raise _malformed("a cut attribute")
        size, kind = HEAD.unpack_from(data, start)
        if size < 4 or start + size > end:
            raise _malformed("an attribute's length")
        yield kind & _TYPE_MASK, start + 4, start + size
        start += (size + 3) & ~3


def _bytes(data: bytes, start: int, end: int, size: int) -> bytes:
    if end - start != size:
        raise _malformed("an attribute's size")
    return data[start:end]


def _integer(data: bytes, start: int, end: int, size: int) -> int:
    return int.from_bytes(_bytes(data, start, end, size), sys.byteorder)


def _malformed(what: str) -> DeviceError:
    return DeviceError(
        f"the kernel's answer about the interface can't be read: {what} is wrong",
        "this kernel's WireGuard speaks another version of its protocol; report it",
    )
