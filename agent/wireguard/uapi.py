"""The cross-platform text protocol of userspace WireGuard implementations.

Lines of ``key=value``, an empty line at the end; keys in hex. The protocol is the one documented at
https://www.wireguard.com/xplatform/. A request is ``get=1`` or ``set=1`` with what to set; every
answer ends with ``errno=``, 0 for success.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, assert_never

from agent.errors import DeviceError
from agent.model import (
    KEEP,
    KEY_SIZE,
    AddPeer,
    CutPeer,
    DeviceConfig,
    Endpoint,
    ObservedPeer,
    Operation,
    Prefix,
    PresharedKey,
    PublicKey,
    RemovePeer,
    UpdatePeer,
)

GET: Final = b"get=1\n\n"
MAX_SIZE: Final = 64_000
"""Bytes of one set request, unless a single operation is larger; fits a unix socket's buffer."""

_NO_PSK: Final = bytes(KEY_SIZE)
_MAX_U16: Final = 0xFFFF
_MAX_U32: Final = 0xFFFFFFFF
_MAX_U63: Final = 0x7FFFFFFFFFFFFFFF
_MAX_U64: Final = 0xFFFFFFFFFFFFFFFF


class Answer(NamedTuple):
    """What a device told of itself; the private key is None while it has none."""

    config: DeviceConfig
    peers: dict[PublicKey, ObservedPeer]


# Encoding.


def encode_config(config: DeviceConfig) -> bytes:
    """Return the request that sets what is not None in ``config``."""
    lines = ["set=1"]
    if config.private_key is not None:
        lines.append(f"private_key={config.private_key.hex()}")
    if config.listen_port is not None:
        lines.append(f"listen_port={config.listen_port}")
    if config.fwmark is not None:
        lines.append(f"fwmark={config.fwmark}")
    return ("\n".join(lines) + "\n\n").encode()


def encode_operations(operations: Iterable[Operation], random: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the requests that carry out the operations in their order.

    ``random(n)`` gives n random bytes, for the PSK of a peer that is cut.
    """
    entries: list[str] = []
    size = 0
    for operation in operations:
        entry = "\n".join(_lines(operation, random))
        if entries and size + len(entry) > MAX_SIZE:
            yield _request(entries)
            entries, size = [], 0
        entries.append(entry)
        size += len(entry) + 1
    if entries:
        yield _request(entries)


def _request(entries: list[str]) -> bytes:
    return ("set=1\n" + "\n".join(entries) + "\n\n").encode()


def _lines(operation: Operation, random: Callable[[int], bytes]) -> Iterator[str]:
    yield f"public_key={operation.public_key.hex()}"
    match operation:
        case RemovePeer():
            yield "remove=true"
        case CutPeer():
            yield "update_only=true"
            yield f"preshared_key={random(KEY_SIZE).hex()}"
            yield "replace_allowed_ips=true"
        case AddPeer(_, psk, prefixes):
            yield _preshared_key(psk)
            yield "replace_allowed_ips=true"
            yield from map("allowed_ip={}".format, prefixes)
        case UpdatePeer(_, new_psk, new_prefixes, replace, keepalive):
            yield "update_only=true"
            if new_psk is not KEEP:
                yield _preshared_key(new_psk)
            if keepalive is not KEEP:
                yield f"persistent_keepalive_interval={keepalive}"
            if new_prefixes is not KEEP:
                if replace:
                    yield "replace_allowed_ips=true"
                yield from map("allowed_ip={}".format, new_prefixes)
        case _:
            assert_never(operation)


def _preshared_key(psk: PresharedKey | None) -> str:
    return f"preshared_key={(_NO_PSK if psk is None else psk.raw).hex()}"


# Decoding.


def decode_errno(answer: bytes) -> int:
    """Return the answer's errno, 0 for success and never negative; raises DeviceError."""
    for line in reversed(answer.split(b"\n")):
        key, _, value = line.partition(b"=")
        if key == b"errno":
            try:
                return _number(value.removeprefix(b"-").decode(), _MAX_U32)
            except ValueError:
                break
    raise _malformed("errno")


def decode(answer: bytes) -> Answer:
    """Return what a ``get=1`` was answered with; unknown keys are skipped.

    Raises DeviceError for what is no such answer.
    """
    private_key: bytes | None = None
    listen_port = fwmark = 0
    key = "encoding"
    try:
        device, *blocks = f"\n{answer.decode('ascii')}".split("\npublic_key=")
        for line in device.split("\n"):
            key, _, value = line.partition("=")
            if key == "private_key":
                raw = _key(value)
                private_key = raw if any(raw) else None
            elif key == "listen_port":
                listen_port = _number(value, _MAX_U16)
            elif key == "fwmark":
                fwmark = _number(value, _MAX_U32)
        key = "peer"
        peers = {peer.public_key: peer for peer in map(_peer, blocks)}
    except ValueError:
        raise _malformed(key) from None
    return Answer(DeviceConfig(private_key, listen_port, fwmark), peers)


def _peer(block: str) -> ObservedPeer:
    """Return the peer of the lines from its public key on; raises ValueError."""
    public_key, *lines = block.split("\n")
    psk: PresharedKey | None = None
    prefixes: list[Prefix] = []
    endpoint: Endpoint | None = None
    keepalive = seconds = nanoseconds = rx = tx = 0
    for line in lines:
        key, _, value = line.partition("=")
        if key == "allowed_ip":
            prefixes.append(_prefix(value))
        elif key == "preshared_key":
            raw = _key(value)
            psk = PresharedKey(raw) if any(raw) else None
        elif key == "endpoint":
            endpoint = _endpoint(value)
        elif key == "persistent_keepalive_interval":
            keepalive = _number(value, _MAX_U16)
        elif key == "last_handshake_time_sec":
            seconds = _number(value, _MAX_U63)
        elif key == "last_handshake_time_nsec":
            nanoseconds = _number(value, _MAX_U63)
        elif key == "rx_bytes":
            rx = _number(value, _MAX_U64)
        elif key == "tx_bytes":
            tx = _number(value, _MAX_U64)
    return ObservedPeer(
        PublicKey(_key(public_key)),
        psk,
        tuple(prefixes),
        endpoint,
        keepalive,
        seconds + nanoseconds / 1e9,
        rx,
        tx,
    )


def _key(text: str) -> bytes:
    # fromhex skips white space; what is left of 64 characters is then too short.
    raw = bytes.fromhex(text)
    if len(text) != 2 * KEY_SIZE or len(raw) != KEY_SIZE:
        raise ValueError("a key is 64 hex digits")
    return raw


def _number(text: str, limit: int) -> int:
    # int() is slow to refuse a very long number, and takes signs and underscores.
    if not text.isdecimal() or not text.isascii() or len(text) > len(str(limit)):
        raise ValueError("not a number")
    value = int(text)
    if value > limit:
        raise ValueError("a number out of range")
    return value


def _address(text: str) -> bytes:
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        raise ValueError("not an IP address") from None


def _prefix(text: str) -> Prefix:
    address, _, length = text.partition("/")
    packed = _address(address)
    return Prefix(packed, _number(length, len(packed) * 8))


def _endpoint(text: str) -> Endpoint:
    """Return ``a.b.c.d:port`` or ``[v6%scope]:port``; a scope that is a name is not kept."""
    host, _, port = text.rpartition(":")
    if not host.startswith("["):
        return Endpoint(_address(host), _number(port, _MAX_U16))
    if not host.endswith("]"):
        raise ValueError("not an endpoint")
    address, _, scope = host[1:-1].partition("%")
    number = _number(scope, _MAX_U32) if scope.isdecimal() else 0
    return Endpoint(_address(address), _number(port, _MAX_U16), number)


def _malformed(what: str) -> DeviceError:
    return DeviceError(
        f"the userspace WireGuard's answer can't be read: its {what} is wrong",
        "the program speaks another version of the protocol; report it",
    )
